"""Along the line from the live weights to an average: the blends that `select` tries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from polyak.profiles import Blend, Profile
from polyak.trajectory import Explanation, Trajectory

__all__ = ["can_blend", "search_lines"]

# Averages less than this part of whose weight lies elsewhere give blends that scores can hardly tell apart.
_LEAST_APART = 0.2
# Lines on which one blend is tried, and on which more are.
_MOST_LINES, _BEST_LINES = 10, 3
_FIRST_SHARE = 0.5
# How far from the best share so far the next two lie.
_DISTANCES = (0.25, 0.125)

# Scores those blends that are new on these blocks, and gives the badness of each.
Try = Callable[[Sequence[Blend]], Mapping[Blend, float]]


def can_blend(trajectory: Trajectory) -> bool:
    """Whether there are live weights to blend with, and they are numbers."""
    return trajectory.has_live and all(tensor.isfinite().all() for tensor in trajectory.live().values())


def search_lines(
    averages: Sequence[Explanation], badness: Mapping[Profile, float], live: float, try_some: Try
) -> None:
    """Try blends of the live weights with averages of the run: coarse, then finer around the best.

    On a run that was decayed the averages worth blending with are longer than the best average. So half and half is
    tried with up to ten averages that differ in at least a fifth of their weight, better ones first. On the three
    best lines two more shares follow around the best one so far, its ends included, and two more around that: 22
    blends at most.

    Args:
        averages: those that were tried.
        badness: of each of their profiles.
        live: that of the live weights.
        try_some: scores more profiles.
    """
    better_first = sorted(averages, key=lambda one: badness[one.profile])
    lines = {one.profile: {0.0: live, 1.0: badness[one.profile]} for one in _apart(better_first)}

    def try_on(points: Sequence[tuple[Profile, float]]) -> None:
        blends = {Blend(profile, share): (profile, share) for profile, share in points}
        for blend, found in try_some(list(blends)).items():
            profile, share = blends[blend]
            lines[profile][share] = found

    try_on([(profile, _FIRST_SHARE) for profile in lines])
    halves = {profile: line[_FIRST_SHARE] for profile, line in lines.items() if _FIRST_SHARE in line}
    best = sorted(halves, key=halves.__getitem__)[:_BEST_LINES]
    for distance in _DISTANCES:
        try_on([(profile, share) for profile in best for share in _around(lines[profile], distance)])


def _around(line: Mapping[float, float], distance: float) -> list[float]:
    """The shares so far from the best one of a line, inside it.

    >>> _around({0.0: 3.0, 0.5: 1.0, 1.0: 2.0}, 0.25), _around({0.0: 1.0, 0.5: 2.0, 1.0: 3.0}, 0.25)
    ([0.25, 0.75], [0.25])
    """
    best = min(line, key=line.__getitem__)
    return [share for share in (best - distance, best + distance) if 0 < share < 1]


def _apart(explained: Sequence[Explanation]) -> list[Explanation]:
    """The first of those whose weight lies alike, one after the other."""
    kept: list[Explanation] = []
    for one in explained:
        distances = (np.abs(one.coefficients - other.coefficients).sum() / 2 for other in kept)
        if len(kept) < _MOST_LINES and all(distance >= _LEAST_APART for distance in distances):
            kept.append(one)
    return kept
