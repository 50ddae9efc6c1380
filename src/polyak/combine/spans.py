"""From a profile to coefficients: which steps each block or checkpoint stands for, and the weight they carry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from polyak.errors import OptionError
from polyak.profiles import Profile

__all__ = ["Span", "coefficients", "spans_of_steps"]


@dataclass(frozen=True)
class Span:
    """The optimizer steps ``(start, stop]``, and how many samples were taken in them."""

    start: int
    stop: int
    count: int = 1


def spans_of_steps(steps: Sequence[int]) -> list[Span]:
    """What checkpoints saved at ``steps`` stand for: all steps since the checkpoint before.

    The first takes the length of the next gap, or all steps up to its own if it is the only one.

    Raises ``OptionError`` unless the steps rise from 0 or later.

    >>> spans_of_steps([1000, 1500])
    [Span(start=500, stop=1000, count=1), Span(start=1000, stop=1500, count=1)]
    """
    if not all(before < after for before, after in zip([-1, *steps], steps, strict=False)):
        raise OptionError(f"checkpoints must be of different steps, oldest first, got {list(steps)}")
    first_gap = steps[1] - steps[0] if len(steps) > 1 else steps[0]
    starts = [max(0, steps[0] - first_gap), *steps[:-1]]
    return [Span(start, stop) for start, stop in zip(starts, steps, strict=True)]


def coefficients(profile: Profile, spans: Sequence[Span]) -> list[float]:
    """The coefficient of each span: a_k = F(stop_k) - F(start_k), divided by their sum.

    F is the profile's ``cumulative`` over optimizer steps, over samples, or over spans, as its unit says. Steps
    that no span covers, as before the first of a run's last checkpoints, give their weight to all the others in
    proportion.

    Args:
        profile: any profile.
        spans: disjoint, in step order.

    Returns:
        One number per span; they sum to 1.

    Raises ``OptionError`` if the profile does not fit the run, or has no weight on any span.

    >>> import polyak
    >>> spans = spans_of_steps([1000, 1500, 2500])
    >>> coefficients(polyak.Uniform(), spans[1:]), coefficients(polyak.Tail(steps=1500), spans)
    ([0.5, 0.5], [0.0, 0.333..., 0.666...])
    """
    if profile.unit == "steps":
        starts, stops = [span.start for span in spans], [span.stop for span in spans]
    else:
        lengths = [span.count if profile.unit == "samples" else 1 for span in spans]
        stops = np.cumsum(lengths)
        starts = stops - lengths
    total = stops[-1]
    weights = profile.cumulative(stops, total) - profile.cumulative(starts, total)
    if not profile.signed:
        # A flat stretch of F may fall by a rounding error, which must not put the average outside the hull.
        weights = np.maximum(weights, 0.0)
    if weights.sum() == 0:
        raise OptionError(
            f"{profile} has no weight on any of the steps there are, {spans[0].start} to {spans[-1].stop}"
        )
    return (weights / weights.sum()).tolist()
