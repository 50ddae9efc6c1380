"""Which profiles `select` tries where it is not told: a coarse grid, then a finer one around its best."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from polyak.profiles import EMA, Decay, Power, Profile, Tail

__all__ = ["coarse_grid", "fine_grid"]

# Where between two neighbouring values of the coarse grid the finer ones lie, in logarithms.
_BETWEEN = (1 / 3, 2 / 3)
_DIGITS = 3


@dataclass(frozen=True)
class _Family:
    """Profiles with one parameter; ``build`` takes it and the length of the run in optimizer steps."""

    build: Callable[[float, int], Profile]
    values: tuple[float, ...]
    largest: float = float("inf")


_FAMILIES: Mapping[str, _Family] = {
    "tail": _Family(lambda f, steps: Tail(f), (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0), largest=1.0),
    "sqrt decay": _Family(lambda f, steps: Decay("sqrt", f), (0.1, 0.2, 0.4, 0.6, 0.8), largest=1.0),
    "linear decay": _Family(lambda f, steps: Decay("linear", f), (0.1, 0.2, 0.4, 0.6, 0.8), largest=1.0),
    "EMA": _Family(lambda h, steps: EMA(half_life=_rounded(h * steps)), (0.01, 0.025, 0.05, 0.1, 0.2)),
    "power": _Family(lambda gamma, steps: Power(gamma=gamma), (1, 2, 4, 8, 16, 32)),
}


def coarse_grid(steps: int) -> list[Profile]:
    """Tails, decays, EMAs and powers of every length for a run of ``steps`` optimizer steps.

    >>> [str(profile) for profile in coarse_grid(1000)[:3]]
    ['tail:0.02', 'tail:0.05', 'tail:0.1']
    """
    return [family.build(value, steps) for family in _FAMILIES.values() for value in family.values]


def fine_grid(best: Profile, steps: int) -> list[Profile]:
    """Four profiles around ``best``, one of :func:`coarse_grid`: two on either side, to its neighbours.

    At an end of its family's grid the next value outwards is as far away as the one inwards.

    >>> [str(profile) for profile in fine_grid(Tail(0.2), 1000)]
    ['tail:0.159', 'tail:0.126', 'tail:0.241', 'tail:0.29']
    """
    for family in _FAMILIES.values():
        for value in family.values:
            if family.build(value, steps) == best:
                return [family.build(near, steps) for near in _values_around(value, family)]
    return []


def _values_around(value: float, family: _Family) -> list[float]:
    index = family.values.index(value)
    below = family.values[index - 1] if index else value**2 / family.values[1]
    last = index + 1 == len(family.values)
    above = value**2 / family.values[index - 1] if last else family.values[index + 1]
    around = [value * (end / value) ** part for end in (below, above) for part in _BETWEEN]
    return [_rounded(near) for near in around if near <= family.largest]


def _rounded(value: float) -> float:
    """Three digits are more than scores can tell apart, and are read with ease."""
    return float(f"{value:.{_DIGITS}g}")
