"""How a profile is written as text: the table row of each class, and values to and from words."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, dataclass, fields
from difflib import get_close_matches
from numbers import Real
from types import ModuleType
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from polyak.errors import OptionError

# How a profile is written as text: the table row of each class, and values to and from words.


@dataclass(frozen=True)
class Spelling:
    """One class in the written form ``name:option,option``.

    ``readers`` turns the text of each option into its value; ``positional`` options are written without
    their keyword; ``separator`` stands between them (None: there is only one, and it takes the whole text).
    """

    name: str
    example: str
    readers: Mapping[str, Callable[[str], object]]
    positional: tuple[str, ...] = ()
    separator: str | None = ","


def written(value: object) -> str:
    """A value as it stands in the text; the readers below give the very same value back.

    >>> written(2000.0), written(0.1), written(False), written((1.0, 2.5))
    ('2000', '0.1', 'false', '1,2.5')
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
    if isinstance(value, tuple):
        return ",".join(written(part) for part in value)
    if callable(value):
        name = getattr(value, "__name__", type(value).__name__)
        return f"<{name.strip('<>')}>"
    return str(value)


def _reader(kind: str, convert: Callable[[str], object]) -> Callable[[str], object]:
    def read(text: str) -> object:
        try:
            return convert(text)
        except ValueError:
            raise ValueError(f"{text!r} is not {kind}") from None

    return read


read_number = _reader("a number", float)
read_whole = _reader("a whole number", int)
read_flag = _reader("true or false", lambda text: bool(("false", "true").index(text)))
read_numbers = _reader("a list of numbers like 1,2,3", lambda text: tuple(map(float, text.split(","))))


def read_shape(text: str) -> str:
    """The name of a shape; refuses what `written` makes of a function, which text cannot carry."""
    if text.startswith("<"):
        raise ValueError(f"{text} is a Python function, which text cannot carry: build the profile in Python")
    return text


def suggestion(word: str, names: Iterable[str]) -> str:
    """The known names, and the one that was probably meant.

    >>> suggestion("emma", ["uniform", "ema"])
    "did you mean 'ema'? Known: uniform, ema"
    """
    names = list(names)
    close = get_close_matches(word, names, n=1)
    return (f"did you mean {close[0]!r}? Known: " if close else "known: ") + ", ".join(names)


# What every profile is: a cumulative share of weight; and what a scheme adds: it can be followed online.

Unit = Literal["steps", "samples", "blocks"]
Floats = NDArray[np.float64]


class Profile(ABC):
    """How much each step of a run counts: F(t, total), the share of the weight on ``(0, t]``.

    F rises from 0 at t = 0 to 1 at t = total. Profiles are immutable, and equal when their hyper-parameters
    are. ``str(profile)`` is the text that :func:`polyak.parse` reads.

    ``unit`` says what t counts: optimizer ``"steps"``, ``"samples"`` taken, or ``"blocks"`` of a trajectory.

    ``signed`` says whether weights may be negative. Then the average may leave the hull of what is averaged.

    Subclasses are frozen dataclasses with a ``spelling``; they define ``_share``, which is F for t < total.

    >>> import polyak
    >>> profile = polyak.Tail(0.5)
    >>> profile.unit, str(profile), profile.cumulative([0, 50, 75, 100], total=100).tolist()
    ('samples', 'tail:0.5', [0.0, 0.0, 0.5, 1.0])
    """

    unit: Unit
    signed: ClassVar[bool] = False
    spelling: ClassVar[Spelling]
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def cumulative(self, t: ArrayLike, total: float) -> Floats:
        """The share of the weight that lies on ``(0, t]`` in a run of length ``total``.

        Args:
            t: one or more positions in [0, total], in the profile's unit.
            total: the length of the run, in the same unit, positive.

        Returns:
            A float64 array of the shape of ``t``: exactly 0 at t = 0 and exactly 1 at t = total.

        Raises:
            OptionError: a position outside the run, or a run that the profile does not fit.

        >>> import polyak
        >>> polyak.Uniform().cumulative([0, 1, 4], total=4)
        array([0.  , 0.25, 1.  ])
        """
        total = within("(0, inf)", "total", total)
        t = np.asarray(t, dtype=np.float64)
        if not np.all((t >= 0) & (t <= total)):
            raise OptionError(f"t must lie in [0, {written(total)}], the run, got {t}")
        return np.where(t == total, 1.0, self._share(t, total))

    def weights(self, edges: ArrayLike) -> Floats:
        """The weight of each interval ``(edges[k], edges[k+1]]``: the differences of `cumulative`.

        Args:
            edges: K+1 positions in the profile's unit, rising from 0; the last is the length of the run.

        Returns:
            A float64 array of shape (K,) that sums to 1; none is negative unless the profile is ``signed``.

        Raises:
            OptionError: edges that do not rise from 0, or a run that the profile does not fit.

        >>> import polyak
        >>> polyak.Tail(steps=100).weights([0, 100, 150, 300])
        array([0., 0., 1.])
        """
        edges = np.asarray(edges, dtype=np.float64)
        if edges.ndim != 1 or len(edges) < 2 or edges[0] != 0 or not np.all(np.diff(edges) > 0):
            raise OptionError(f"edges must be two or more numbers that rise from 0, got {edges}")
        weights = np.diff(self.cumulative(edges, edges[-1]))
        # A flat stretch of F may fall by a rounding error, which must not put the average outside the hull.
        return weights if self.signed else np.maximum(weights, 0.0)

    @abstractmethod
    def _share(self, t: Floats, total: float) -> Floats:
        """F(t, total) for checked arguments; the value at t = total is not used."""

    def __str__(self) -> str:
        """The text that :func:`polyak.parse` reads."""
        words = (self.spelling.separator or "").join(self._words(written))
        return f"{self.spelling.name}:{words}" if words else self.spelling.name

    def __repr__(self) -> str:
        """The constructor call in Python."""
        return f"{type(self).__name__}({', '.join(self._words(repr))})"

    def _words(self, spell: Callable[[object], str]) -> list[str]:
        """The hyper-parameters that differ from their defaults, as ``value`` or ``keyword=value``."""
        given = [(field.name, getattr(self, field.name), field.default) for field in fields(self)]
        return [
            spell(value) if name in self.spelling.positional else f"{name}={spell(value)}"
            for name, value, default in given
            if value != default
        ]

    def _set(self, **values: object) -> None:
        """Stores checked hyper-parameters; only for ``__post_init__``, as profiles are frozen."""
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _exactly_one(self, first: str, second: str) -> tuple[str, float]:
        """The name and value of the one of two hyper-parameters that was given."""
        given = [(name, getattr(self, name)) for name in (first, second) if getattr(self, name) is not None]
        if len(given) != 1:
            got = "both" if given else "neither"
            raise OptionError(f"{type(self).__name__} takes either {first} or {second}, got {got}")
        return given[0]


class Scheme(Profile):
    """A profile that can be followed online: the running mean ``m += c_n (w_n - m)`` has its weights.

    That is so exactly when F(s, u) = F(s, t) F(t, u) for s <= t <= u; then c_n = 1 - F(t_{n-1}, t_n), where
    t_n is the position of the n-th sample.

    >>> import polyak
    >>> mean = 0.0
    >>> for n, w in enumerate([3.0, 5.0, 10.0], start=1):
    ...     mean += polyak.Uniform().coefficient(n) * (w - mean)
    >>> round(mean, 12)
    6.0
    """

    def coefficient(self, n: int, gap: float = 1) -> float:
        """The coefficient c_n of the n-th sample in ``m += c_n (w_n - m)``.

        Args:
            n: which sample, from 1.
            gap: optimizer steps from one sample to the next; without effect where the unit is samples.

        Returns:
            1 - F((n-1) gap, n gap): exactly 1 at n = 1, and accurate at any n.

        Raises:
            OptionError: n below 1 or a gap that is not positive.

        >>> import polyak
        >>> ema = polyak.EMA(half_life=100)
        >>> ema.coefficient(1), round(ema.coefficient(1000, gap=100), 12)
        (1.0, 0.5)
        """
        if n < 1 or gap <= 0:
            raise OptionError(
                f"samples are counted from 1 and lie a positive gap apart, got n={n} and gap={gap}"
            )
        distance = gap if self.unit == "steps" else 1
        return float(self.coefficient_between((n - 1) * distance, n * distance))

    @abstractmethod
    def coefficient_between(self, before: Any, now: Any, xp: ModuleType = np) -> Any:
        """The coefficient 1 - F(before, now) of a sample at ``now`` whose predecessor lies at ``before``.

        For samples that lie uneven gaps apart. Nothing is read back from an accelerator.

        Args:
            before: the position of the previous sample in the scheme's unit; 0 for the first sample. Schemes
                whose unit is samples rely on ``before == now - 1``.
            now: the position of this sample, above ``before``.
            xp: the module whose arrays both positions are: numpy (also for Python numbers), or torch, for
                float64 tensors on any device.

        Returns:
            The coefficient, in (0, 1], as an array or tensor of ``xp``; exactly 1 where ``before`` is 0.

        >>> import polyak
        >>> float(polyak.Power(gamma=1).coefficient_between(before=30, now=60))
        0.75
        """


def within(interval: str, name: str, value: object) -> float:
    """``value`` as a float, refused unless it lies in ``interval``, given as it is shown: ``"(0, 1]"``.

    >>> within("(0, 1]", "fraction", 2)
    Traceback (most recent call last):
    polyak.errors.OptionError: fraction must be a number in (0, 1], got 2
    """
    low, high = map(float, interval[1:-1].split(","))
    try:
        number = float(value) if isinstance(value, Real) else math.nan
    except OverflowError:  # an int beyond the largest float
        number = math.nan
    above = number > low or (interval[0] == "[" and number == low)
    below = number < high or (interval[-1] == "]" and number == high)
    if not (above and below):
        raise OptionError(f"{name} must be a number in {interval}, got {value!r}")
    return number


def whole_within(interval: str, name: str, value: object) -> int:
    """``value`` as an int, refused unless it is a whole number in ``interval``.

    >>> whole_within("[1, inf)", "steps", 2.5)
    Traceback (most recent call last):
    polyak.errors.OptionError: steps must be a whole number, got 2.5
    """
    number = within(interval, name, value)
    if not number.is_integer():
        raise OptionError(f"{name} must be a whole number, got {value!r}")
    return int(number)
