"""What a profile is, how it is written as text, and the registry through which the rest of polyak knows it."""

from __future__ import annotations

import contextlib
import re
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from difflib import get_close_matches
from numbers import Real
from types import ModuleType, UnionType
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from polyak.errors import OptionError

Unit = Literal["steps", "samples", "blocks"]
Floats = NDArray[np.float64]

# Every class that defines `share`, by its name in text, in the order of definition.
_REGISTRY: dict[str, type[Profile]] = {}
# What F may fall by between two positions from rounding alone.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Profile(ABC):
    """How much each step of a run counts: F(t, total), the share of the weight on ``(0, t]``.

    F rises from 0 at t = 0 to 1 at t = total. Profiles are immutable, and equal when their hyper-parameters
    are. ``str(profile)`` is the text that :func:`polyak.parse` reads.

    **A profile of your own** is a frozen dataclass with a ``unit`` and a method ``share``. With that it is known
    wherever a profile is taken, as an object or as text, and needs nothing else. What it may say besides:

    Attributes:
        unit: what t counts: optimizer ``"steps"``, ``"samples"`` taken, or ``"blocks"`` of a trajectory.
        name: what it is called in text; the name of the class in lower case if not given.
        examples: texts of it. The first is shown in messages about text that cannot be read, and the contract
            tests run over all of them.
        separator: stands between the options in text.
        signed: whether weights may be negative. Then the average may leave the hull of what is averaged.
        replaces_decay: whether it stands in for a decay of the learning rate, and so should not follow one.

    Fields are its options in text: numbers, flags and words by their annotations; those declared ``KW_ONLY`` are
    written with their keyword. ``__post_init__`` raises :class:`~polyak.errors.OptionError` for values out of
    range.

    >>> from dataclasses import dataclass
    >>> import numpy as np, polyak
    >>> @dataclass(frozen=True)
    ... class Ramp(polyak.Profile):
    ...     '''Weights that rise in a straight line over the last part of the run.'''
    ...     fraction: float
    ...     unit = "samples"
    ...     def share(self, t, total):
    ...         return np.clip(1 - (total - t) / (self.fraction * total), 0, 1) ** 2
    >>> polyak.parse("ramp:0.5"), str(Ramp(0.5)), Ramp(0.5).weights([0, 50, 75, 100]).tolist()
    (Ramp(0.5), 'ramp:0.5', [0.0, 0.25, 0.75])
    """

    unit: ClassVar[Unit]
    name: ClassVar[str]
    examples: ClassVar[Sequence[str]] = ()
    separator: ClassVar[str] = ","
    signed: ClassVar[bool] = False
    replaces_decay: ClassVar[bool] = False

    @abstractmethod
    def share(self, t: Any, total: Any) -> Any:
        """F(t, total), the share of the weight on ``(0, t]``, for 0 <= t < total; 0 at t = 0.

        Args:
            t: positions in the profile's unit, a float64 array.
            total: the length of the run, positive; a number or an array like ``t``.

        Raises:
            OptionError: a run that the profile does not fit.
        """

    @classmethod
    def candidates(cls, steps: int) -> Sequence[Profile]:
        """What :func:`polyak.select` tries by default of this class, for a run of ``steps`` optimizer steps.

        Neighbours that differ in one positive number are tried at values between them, too, if one is best; values
        that the class refuses are left out. None are tried unless the class says so.
        """
        return ()

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
        if not (isinstance(total, Real) and 0 < total < np.inf):
            raise OptionError(f"total must be a number in (0, inf), got {total!r}")
        total = float(total)
        t = np.asarray(t, dtype=np.float64)
        if not np.all((t >= 0) & (t <= total)):
            raise OptionError(f"t must lie in [0, {written(total)}], the run, got {t}")
        at_end = t == total
        return np.where(at_end, 1.0, self.share(np.where(at_end, 0.0, t), total))

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
        return self.without_rounding(np.diff(self.cumulative(edges, edges[-1])))

    def without_rounding(self, weights: Floats) -> Floats:
        """Differences of F as weights: one that is negative is 0, unless the profile is ``signed``.

        A flat stretch of F may fall by a rounding error, which must not put the average outside the hull. An F
        that falls by more, or is not a number, is refused (``OptionError``).
        """
        if not np.all(np.isfinite(weights)) or (not self.signed and np.any(weights < -_ROUNDING)):
            raise OptionError(f"share(t, total) of {self} must be finite and rise with t, which it does not")
        return weights if self.signed else np.maximum(weights, 0.0)

    @classmethod
    def from_text(cls, options: str | None) -> Self:
        """The profile with the options that stand behind its name and a colon in text; None: there is no colon.

        Raises:
            ValueError: they cannot be read; :func:`polyak.parse` says so of the whole text.
        """
        return cls(**_read_options(cls, options))

    # Known by being defined, and written as its fields tell.

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "name" not in vars(cls):
            cls.name = cls.__name__.lower()
        if "__repr__" not in vars(cls):
            cls.__repr__ = cls.__repr__  # in place of the one that the dataclass decorator would give it
        if not getattr(cls.share, "__isabstractmethod__", False):
            _register(cls)

    def __new__(cls, *values: object, **options: object) -> Self:
        unnamed = sum(not field.kw_only for field in _options(cls))
        if len(values) == unnamed + 1:
            _refuse_unnamed(cls, values, unnamed)
        return super().__new__(cls)

    def __str__(self) -> str:
        """The text that :func:`polyak.parse` reads."""
        words = self.separator.join(self._words(written))
        return f"{self.name}:{words}" if words else self.name

    def __repr__(self) -> str:
        """The constructor call in Python."""
        return f"{type(self).__name__}({', '.join(self._words(repr))})"

    def _words(self, spell: Callable[[object], str]) -> list[str]:
        """The hyper-parameters that differ from their defaults, as ``value`` or ``keyword=value``."""
        words: list[str] = []
        left_out = False  # what follows cannot be told by its place
        for field in _options(type(self)):
            value = getattr(self, field.name)
            if value == _default(field):
                left_out = True
                continue
            keyword = f"{field.name}=" if field.kw_only or left_out else ""
            words.append(keyword + spell(value))
        return words

    def _set(self, **values: object) -> None:
        """Stores checked hyper-parameters; only for ``__post_init__``, as profiles are frozen."""
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _exactly_one(self, *names: str) -> tuple[str, float]:
        """The name and value of the one of these hyper-parameters that was given."""
        given = [(name, getattr(self, name)) for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            got = "both" if given else "neither"
            raise OptionError(f"{type(self).__name__} takes either {' or '.join(names)}, got {got}")
        return given[0]


class Scheme(Profile):
    """A profile that can be followed online: the running mean ``m += c_n (w_n - m)`` has its weights.

    That is so exactly when F(s, u) = F(s, t) F(t, u) for s <= t <= u, as where F(t, T) = g(t)/g(T) for a g that
    rises from 0. Then c_n = 1 - F(t_{n-1}, t_n), where t_n is the position of the n-th sample.

    **A scheme of your own** is written as a :class:`Profile` is. Its coefficients follow from ``share``, on an
    accelerator too if that is made of operators and NumPy's functions, and are accurate to 1e-16. Where that is too
    coarse, as after 1e9 samples, the class gives a ``coefficient_between`` of its own.

    >>> from dataclasses import dataclass
    >>> import numpy as np, polyak
    >>> @dataclass(frozen=True)
    ... class Fading(polyak.Scheme):
    ...     '''Late samples count less and less: g(t) = ln(1 + t/scale).'''
    ...     scale: float
    ...     unit = "samples"
    ...     def share(self, t, total):
    ...         return np.log1p(t / self.scale) / np.log1p(total / self.scale)
    >>> mean = 0.0
    >>> for n, w in enumerate([3.0, 5.0, 10.0], start=1):
    ...     mean += Fading(2).coefficient(n) * (w - mean)
    >>> round(mean, 6), round(float(Fading(2).weights([0, 1, 2, 3]) @ [3.0, 5.0, 10.0]), 6)
    (5.332632, 5.332632)
    """

    def coefficient(self, n: int, gap: float = 1) -> float:
        """The coefficient c_n of the n-th sample in ``m += c_n (w_n - m)``.

        Args:
            n: which sample, from 1.
            gap: optimizer steps from one sample to the next; without effect where the unit is samples.

        Returns:
            1 - F((n-1) gap, n gap): exactly 1 at n = 1.

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
        if xp is np:
            return 1 - self.share(np.asarray(before, np.float64), np.asarray(now, np.float64))
        kept = self.share(_Tensor(before, now, xp), _Tensor(now, now, xp))
        return 1 - (kept.value if isinstance(kept, _Tensor) else xp.full_like(now, kept))

    def longer(self, factor: float) -> Scheme | None:
        """The scheme of this kind that looks back about ``factor`` times as far, in round numbers.

        With it a message about blocks that are too long for a scheme can name the shortest that they resolve. None:
        there is none, or the class does not say.
        """
        return None


# NumPy's name of a function: torch's, where it is another.
_TORCH_NAMES = {"power": "pow", "equal": "eq"}


class _Tensor(np.lib.mixins.NDArrayOperatorsMixin):
    """A tensor that NumPy's functions and operators take, and that torch works on where it lies."""

    def __init__(self, value: Any, like: Any, xp: ModuleType):
        self.value, self._like, self._xp = value, like, xp

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *values: Any, **options: Any) -> _Tensor:
        return self._call(ufunc.__name__, values, options)

    def __array_function__(
        self, function: Callable[..., Any], types: Any, values: Sequence[Any], options: dict[str, Any]
    ) -> _Tensor:
        return self._call(function.__name__, values, options)

    def _call(self, name: str, values: Sequence[Any], options: dict[str, Any]) -> _Tensor:
        function = getattr(self._xp, _TORCH_NAMES.get(name, name), None)
        if function is None or options:
            raise OptionError(
                f"torch has no {name} like NumPy's, so coefficients on an accelerator cannot follow from share(): "
                "leave it out, or give the scheme a coefficient_between"
            )
        # A bare number would be copied to the tensors' device, which waits for it; a fill does not.
        tensors = [v.value if isinstance(v, _Tensor) else self._xp.full_like(self._like, v) for v in values]
        return _Tensor(function(*tensors), self._like, self._xp)

    def __bool__(self) -> bool:
        raise OptionError("share() must not branch on a position: use np.where, as positions may be many")


# The registry.


def _register(cls: type[Profile]) -> None:
    if not re.fullmatch(r"[\w.-]+", cls.name):
        raise OptionError(f"the name of {cls.__qualname__} in text must be one word, got {cls.name!r}")
    if getattr(cls, "unit", None) not in (None, *typing.get_args(Unit)) and isinstance(cls.unit, str):
        raise OptionError(
            f"the unit of {cls.__qualname__} must be steps, samples or blocks, got {cls.unit!r}"
        )
    known = _REGISTRY.get(cls.name)
    # The same class defined anew, as in a notebook or by a reload, takes the place of what it was.
    if known and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise OptionError(
            f"two profiles cannot both be {cls.name!r} in text: {known.__module__}.{known.__qualname__} is, so give "
            f"{cls.__module__}.{cls.__qualname__} another `name`"
        )
    _REGISTRY[cls.name] = cls


def registered(kind: type[Profile] = Profile) -> dict[str, type[Profile]]:
    """Every profile that is defined, by its name in text; or only the schemes, with ``kind=Scheme``.

    >>> import polyak
    >>> registered()["tail"], "tail" in registered(polyak.Scheme)
    (<class 'polyak.profiles._builtin.Tail'>, False)
    """
    return {name: cls for name, cls in _REGISTRY.items() if issubclass(cls, kind)}


def as_profile(given: object) -> Profile:
    """A profile as it is, text parsed. Raises ``OptionError`` for anything else.

    >>> as_profile("uniform")
    Uniform()
    """
    if isinstance(given, str):
        return parse(given)
    if not isinstance(given, Profile):
        raise OptionError(f"a profile is needed, such as polyak.Tail(0.4) or 'tail:0.4', got {given!r}")
    return given


def as_scheme(given: object) -> Scheme:
    """A scheme as it is, text parsed. Raises ``OptionError`` for anything else, and for one that is none.

    >>> as_scheme("ema:half_life=2000")
    EMA(half_life=2000.0)
    """
    scheme = parse(given) if isinstance(given, str) else given
    if not isinstance(scheme, Scheme):
        names = ", ".join(cls.__name__ for cls in registered(Scheme).values())
        raise OptionError(
            f"an average follows a scheme ({names}), got {given!r}; other profiles need the whole run, so take them "
            "from a trajectory after training"
        )
    if scheme.unit == "blocks":
        raise OptionError(f"a running mean knows no blocks: {scheme!r} must count steps or samples")
    for t in (5, 20, 45):
        s = np.arange(t)
        if not np.allclose(
            scheme.cumulative(s, 60), scheme.cumulative(s, t) * scheme.cumulative(t, 60), 1e-6, 1e-12
        ):
            raise OptionError(
                f"no running mean has the weights of {scheme!r}, as F(s, 60) is not F(s, {t}) F({t}, 60): derive its "
                "class from Profile instead of Scheme, and take it from a trajectory after training"
            )
    return scheme


# Text.


def parse(text: str) -> Profile:
    """The profile that ``text`` describes; ``parse(str(profile)) == profile``.

    The form is ``name:option,option``, an option being ``keyword=value``. The usual options of a tail, a
    window, a decay and weights need no keyword: see the examples.

    Raises:
        OptionError: the text is not of this form, or a hyper-parameter is out of range.

    >>> import polyak
    >>> polyak.parse("ema:decay=0.999,debias=false")
    EMA(decay=0.999, debias=False)
    >>> polyak.parse("tail:0.4"), polyak.parse("tail:steps=2000"), polyak.parse("window:1000,2000")
    (Tail(0.4), Tail(steps=2000), Window(1000, 2000))
    >>> polyak.parse("decay:sqrt:0.4"), polyak.parse("weights:1,2,3")
    (Decay('sqrt', 0.4), Weights((1.0, 2.0, 3.0)))
    >>> polyak.parse("emma:decay=0.9")
    Traceback (most recent call last):
    polyak.errors.OptionError: cannot read the profile 'emma:decay=0.9': there is no profile 'emma';
    did you mean 'ema'? Known: uniform, ema, power, ... For example: ema:half_life=2000
    """
    if not isinstance(text, str):
        raise OptionError(f"a profile is read from text such as uniform, got {text!r:.60}")
    name, colon, rest = text.strip().partition(":")
    known = _REGISTRY.get(name)
    try:
        if known is None:
            raise ValueError(f"there is no profile {name!r}; {suggestion(name, _REGISTRY)}")
        return known.from_text(rest if colon else None)
    except ValueError as error:
        texts = (
            known.examples if known else [e for cls in _REGISTRY.values() for e in cls.examples if ":" in e]
        )
        example = f". For example: {texts[0]}" if texts else ""
        raise OptionError(f"cannot read the profile {text!r}: {error}{example}") from None


def _options(cls: type[Profile]) -> list[Field[Any]]:
    """The fields that text and the constructor take: first those that need no keyword."""
    return sorted((field for field in fields(cls) if field.init), key=lambda field: field.kw_only is True)


def _default(field: Field[Any]) -> object:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _refuse_unnamed(cls: type[Profile], values: Sequence[object], unnamed: int) -> None:
    """Say (``TypeError``) which options a value without a name could be; without any, Python's own words do."""
    meant = []
    for name in (field.name for field in _options(cls) if field.kw_only):
        with contextlib.suppress(TypeError, ValueError):
            cls(*values[:unnamed], **{name: values[-1]})
            meant.append(f"{cls.__name__}({name}={values[-1]!r})")
    if meant:
        given = ", ".join(map(repr, values))
        raise TypeError(f"{cls.__name__}({given}) does not say which option is meant: {' or '.join(meant)}")


def _read_options(cls: type[Profile], rest: str | None) -> dict[str, object]:
    known = [field.name for field in _options(cls)]
    unnamed = iter(field.name for field in _options(cls) if not field.kw_only)
    try:
        types = typing.get_type_hints(cls)
    except NameError as error:
        raise ValueError(f"the annotations of {cls.__qualname__} cannot be read ({error})") from None
    options: dict[str, object] = {}
    for piece in [] if rest is None else _pieces(cls, rest):
        keyword, equals, value = piece.partition("=")
        if not equals:
            keyword, value = next(unnamed, ""), piece
        keyword, value = keyword.strip(), value.strip()
        if keyword not in known:
            takes = suggestion(piece.partition("=")[0], known) if known else "it takes none"
            raise ValueError(f"{piece!r} is not an option of {cls.name}; {takes}")
        if keyword in options:
            raise ValueError(f"{keyword} is given twice, the second time by {piece!r}")
        options[keyword] = _reader(types[keyword])(value)
    if missing := [f.name for f in _options(cls) if _default(f) is MISSING and f.name not in options]:
        raise ValueError(f"it lacks {' and '.join(missing)}")
    return options


def _pieces(cls: type[Profile], rest: str) -> list[str]:
    if len(_options(cls)) == 1:  # it may be a list of numbers
        return [rest]
    return rest.split("," if "=" in rest and cls.separator not in rest else cls.separator)


def read_number(text: str) -> float:
    return _converted(text, float, "a number")


def _whole(text: str) -> int:
    return _converted(text, int, "a whole number")


def _flag(text: str) -> bool:
    return bool(_converted(text, ("false", "true").index, "true or false"))


def _numbers(text: str) -> tuple[float, ...]:
    return _converted(text, lambda text: tuple(map(float, text.split(","))), "a list of numbers like 1,2,3")


def _word(text: str) -> str:
    """A name; refuses what `written` makes of a function, which text cannot carry."""
    if text.startswith("<"):
        raise ValueError(f"{text} is a Python function, which text cannot carry: build the profile in Python")
    return text


def _nothing(text: str) -> object:
    raise ValueError(f"text cannot carry the option that {text!r} stands for: build the profile in Python")


def _converted(text: str, convert: Callable[[str], Any], kind: str) -> Any:
    try:
        return convert(text)
    except ValueError:
        raise ValueError(f"{text!r} is not {kind}") from None


_READERS: dict[Any, Callable[[str], object]] = {
    bool: _flag,
    float: read_number,
    int: _whole,
    str: _word,
    tuple: _numbers,
    Sequence: _numbers,
}


def _reader(annotation: Any) -> Callable[[str], object]:
    """What turns text into a value of the first of the annotation's types that text can carry."""
    is_union = typing.get_origin(annotation) in (typing.Union, UnionType)
    parts = typing.get_args(annotation) if is_union else (annotation,)
    types = {typing.get_origin(part) or part for part in parts}
    return next((read for known, read in _READERS.items() if known in types), _nothing)


def written(value: object) -> str:
    """A value as it stands in the text; reading that gives the very same value back.

    >>> written(2000.0), written(0.1), written(False), written((1.0, 2.5))
    ('2000', '0.1', 'false', '1,2.5')
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return repr(float(value)).removesuffix(".0")
    if isinstance(value, tuple):
        return ",".join(written(part) for part in value)
    if callable(value):
        name = getattr(value, "__name__", type(value).__name__)
        return f"<{name.strip('<>')}>"
    return str(value)


def suggestion(word: str, names: Iterable[str]) -> str:
    """The known names, and the one that was probably meant.

    >>> suggestion("emma", ["uniform", "ema"])
    "did you mean 'ema'? Known: uniform, ema"
    """
    names = list(names)
    close = get_close_matches(word, names, n=1)
    return (f"did you mean {close[0]!r}? Known: " if close else "known: ") + ", ".join(names)


# Numbers.


def rounded(value: float, digits: int) -> float:
    """``value`` to so many digits that count.

    >>> rounded(0.123456, 3)
    0.123
    """
    return float(f"{value:.{digits}g}")
