"""The profiles that look at a run from its end: they are applied after training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass

import numpy as np

from polyak.errors import OptionError
from polyak.profiles._base import (
    Floats,
    Profile,
    Spelling,
    read_number,
    read_numbers,
    read_shape,
    read_whole,
    suggestion,
    whole_within,
    within,
)

# What a few hundred float64 operations may be off by, relative to their operands.
_ROUNDING = 1e-12


@dataclass(frozen=True, repr=False)
class Tail(Profile):
    """Uniform on the last part of the run, nothing before it.

    Args:
        fraction: the part of the samples, in (0, 1]. Unit: samples.
        steps: the last ``steps`` optimizer steps instead, at least 1; the whole run where that is shorter.
            Unit: steps.

    Raises:
        OptionError: both or neither of ``fraction`` and ``steps``, or one out of range.

    Source: suffix averaging, Rakhlin et al. 2012, arXiv:1109.5647; LAWA, Kaddour 2022, arXiv:2209.14981.

    >>> import polyak
    >>> polyak.Tail(0.5).weights([0, 1, 2, 3, 4]).tolist()
    [0.0, 0.0, 0.5, 0.5]
    """

    fraction: float | None = None
    _: KW_ONLY
    steps: int | None = None

    spelling = Spelling(
        "tail", "tail:0.4", {"fraction": read_number, "steps": read_whole}, positional=("fraction",)
    )

    def __post_init__(self) -> None:
        given, value = self._exactly_one("fraction", "steps")
        if given == "fraction":
            self._set(fraction=within("(0, 1]", given, value), unit="samples")
        else:
            self._set(steps=whole_within("[1, inf)", given, value), unit="steps")

    def _share(self, t: Floats, total: float) -> Floats:
        given, value = self._exactly_one("fraction", "steps")
        length = _part(value, total) if given == "fraction" else min(value, total)
        return _position_in_tail(t, total, length)


@dataclass(frozen=True, repr=False)
class Window(Profile):
    """Uniform between two optimizer steps, on ``(start, stop]``; unit: steps.

    Args:
        start: steps before the window, at least 0.
        stop: its last step, above ``start``; a window that reaches past the end of the run ends there.

    Raises:
        OptionError: an empty window; or, when it is used, a run that ends before it begins.

    Source: PMA, Li et al. 2025, arXiv:2505.12082; long used in speech recognition (icefall).

    >>> import polyak
    >>> polyak.Window(100, 300).weights([0, 100, 200, 300, 400]).tolist()
    [0.0, 0.5, 0.5, 0.0]
    """

    start: int
    stop: int

    unit = "steps"
    spelling = Spelling(
        "window",
        "window:1000,2000",
        {"start": read_whole, "stop": read_whole},
        positional=("start", "stop"),
    )

    def __post_init__(self) -> None:
        start = whole_within("[0, inf)", "start", self.start)
        self._set(start=start, stop=whole_within(f"({start}, inf)", "stop", self.stop))

    def _share(self, t: Floats, total: float) -> Floats:
        if self.start >= total:
            raise OptionError(
                f"{self} lies outside the run, which has {total:.15g} steps: choose an earlier start"
            )
        stop = min(self.stop, total)
        return np.clip((t - self.start) / (stop - self.start), 0.0, 1.0)


Shape = str | Callable[[float], float]

_SHAPES: dict[str, Callable[[Floats], Floats]] = {
    "linear": lambda x: 1 - x,
    "sqrt": lambda x: np.sqrt(1 - x),
    "1-sqrt": lambda x: 1 - np.sqrt(x),
    "cosine": lambda x: (1 + np.cos(np.pi * x)) / 2,
}


@dataclass(frozen=True, repr=False)
class Decay(Profile):
    """Stands in for a learning-rate decay over the last part of the run; unit: steps.

    Averaging with these weights scales the update that was made at position x of that part, x from 0 to 1, by
    w(x), as a learning rate falling like w would have done: F = 1 - w(x), and 0 before.

    Args:
        shape: w as ``"linear"`` 1-x, ``"sqrt"`` √(1-x) (the newest count most), ``"1-sqrt"`` 1-√x (the oldest
            count most), ``"cosine"`` (1+cos πx)/2, or a function of one float that does not increase from
            w(0) = 1 and stays in [0, 1]. What is left at the end, w(1), goes to the newest.
        fraction: the part of the run that w spans, in (0, 1].

    Raises:
        OptionError: an unknown shape, a function that breaks these rules, or a fraction out of range.

    Source: WSM, Tian et al. 2025, arXiv:2507.17634.

    >>> import polyak
    >>> polyak.Decay("sqrt", 0.5).weights([0, 4, 7, 8]).tolist()
    [0.0, 0.5, 0.5]
    >>> polyak.Decay(lambda x: 1 - x**2, 1.0).weights([0, 1, 2]).tolist()
    [0.25, 0.75]
    """

    shape: Shape
    fraction: float

    unit = "steps"
    spelling = Spelling(
        "decay",
        "decay:sqrt:0.4",
        {"shape": read_shape, "fraction": read_number},
        positional=("shape", "fraction"),
        separator=":",
    )

    def __post_init__(self) -> None:
        self._set(fraction=within("(0, 1]", "fraction", self.fraction))
        if callable(self.shape):
            _check_falls(self.shape)
        elif self.shape not in tuple(_SHAPES):
            raise OptionError(f"unknown decay shape {self.shape!r}: {suggestion(str(self.shape), _SHAPES)}")

    def _share(self, t: Floats, total: float) -> Floats:
        w = _elementwise(self.shape) if callable(self.shape) else _SHAPES[self.shape]
        return 1 - w(_position_in_tail(t, total, _part(self.fraction, total)))


@dataclass(frozen=True, repr=False)
class Weights(Profile):
    """Given or fitted weights, one per block, divided by their sum; unit: blocks.

    F is piecewise linear with F(k, K) = (a_1 + … + a_k)/(a_1 + … + a_K). Only here may weights be negative,
    and then the average may leave the convex hull of the blocks.

    Args:
        a: the K weights, oldest block first.

    Raises:
        OptionError: no weights, one that is not finite, or a sum that is zero or not finite; or, when they
            are used, a run of another number of blocks.

    Source: soups, Wortsman et al. 2022, arXiv:2203.05482; fitted: TWA, Li et al. 2023, arXiv:2205.13104.

    >>> import polyak
    >>> polyak.Weights([1, 1, 2]).weights([0, 1, 2, 3]).tolist()
    [0.25, 0.25, 0.5]
    """

    a: Sequence[float] | Floats

    unit = "blocks"
    signed = True
    spelling = Spelling("weights", "weights:1,2,3", {"a": read_numbers}, positional=("a",), separator=None)

    def __post_init__(self) -> None:
        a = tuple(within("(-inf, inf)", "a weight", value) for value in self.a)
        total = sum(a)
        # A sum of rounding errors is no sum: dividing by it would give weights of any size.
        if not abs(total) > _ROUNDING * sum(map(abs, a)):
            raise OptionError(
                f"the weights must have a sum that is finite and not zero, got {len(a)} that sum to {total}"
            )
        self._set(a=a)

    def _share(self, t: Floats, total: float) -> Floats:
        sums = np.cumsum([0.0, *self.a])
        blocks = len(sums) - 1
        if total != blocks:
            raise OptionError(
                f"there must be one weight for each of {total:.15g} blocks or inputs, got {blocks}"
            )
        return np.interp(t, np.arange(blocks + 1), sums / sums[-1])


def _part(fraction: float, total: float) -> float:
    """``fraction * total``; whole where it is meant to be, as 0.55 of 100 would reach into a 56th sample."""
    length = fraction * total
    whole = round(length)
    return whole if math.isclose(length, whole, rel_tol=_ROUNDING) else length


def _position_in_tail(t: Floats, total: float, length: float) -> Floats:
    """Where t lies in the last ``length`` of the run: 0 before it, 1 at its end."""
    return np.clip(1 - (total - t) / length, 0.0, 1.0)


def _elementwise(shape: Callable[[float], float]) -> Callable[[Floats], Floats]:
    return np.vectorize(shape, otypes=[np.float64])


def _check_falls(shape: Callable[[float], float]) -> None:
    """Refuses a function that cannot be a learning-rate decay: it is looked at on a grid."""
    rule = _broken_rule(_elementwise(shape)(np.linspace(0, 1, 1025)))
    if rule:
        raise OptionError(f"a decay shape must {rule}: {shape!r}")


def _broken_rule(w: Floats) -> str:
    if not np.all(np.isfinite(w)):
        return "be finite on [0, 1]"
    if w[0] != 1:
        return f"be 1 at x = 0, not {w[0]}"
    if np.any(np.diff(w) > _ROUNDING):
        return "never increase"
    return f"stay in [0, 1], not end at {w[-1]}" if w[-1] < 0 else ""
