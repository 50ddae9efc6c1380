"""The pictures of a report, from a trajectory and from what was found about it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from polyak.errors import OptionError
from polyak.inspection import Movement
from polyak.plots import line_chart
from polyak.profiles import EMA, Decay, Power, Profile, Tail
from polyak.selection.table import shortened
from polyak.trajectory import Block, Explanation, Trajectory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["metric_charts", "movement_charts", "profile_chart", "shown_profiles"]

_STEPS = "optimizer steps"
_MOST_PROFILES = 4  # lines that can still be told apart


def metric_charts(blocks: Sequence[Block]) -> Iterator[tuple[str, Figure]]:
    """The learning rate and each metric that was recorded, as means over blocks: name and figure."""
    metrics = dict.fromkeys(name for block in blocks for name in block.metrics)
    followed = [("learning rate", [block.lr for block in blocks])]
    followed += [(name, [block.metrics.get(name) for block in blocks]) for name in metrics]
    for name, summaries in followed:
        # Where a block has none the line is broken.
        means = [math.nan if summary is None else summary.mean for summary in summaries]
        if sum(map(math.isfinite, means)) > 1:
            steps = [block.stop for block in blocks]
            yield name, line_chart(name, _STEPS, name, {name: (steps, means)})


def movement_charts(blocks: Sequence[Block], movement: Movement) -> Iterator[tuple[str, Figure]]:
    """How far each block lies from the one before, and how the path turned there: name and figure."""
    steps = [block.stop for block in blocks[1:]]
    for name, values in (
        ("relative distance", [n.relative_distance for n in movement.neighbours]),
        ("turn", [n.turn for n in movement.neighbours]),
    ):
        found = [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]
        if len(found) > 1:
            x, y = zip(*found, strict=True)
            yield name, line_chart(f"{name} from block to block", _STEPS, name, {name: (x, y)})


def shown_profiles(trajectory: Trajectory, best: Profile | None) -> list[Explanation]:
    """The best profile, if one was chosen, and usual ones beside it, as far as the blocks resolve them."""
    steps = trajectory.blocks[-1].stop - trajectory.blocks[0].start
    if not steps:  # a single checkpoint of step 0
        return []
    usual = (Decay("sqrt", 0.4), Tail(0.4), EMA(half_life=0.1 * steps), Power(gamma=4))
    explained = []
    for profile in dict.fromkeys(usual if best is None else (best, *usual)):
        try:
            explained.append(trajectory.explain(profile))
        except OptionError:
            continue
    return explained[:_MOST_PROFILES]


def profile_chart(explained: Sequence[Explanation]) -> Figure:
    """How much a step counts under each profile, as a multiple of its share in the mean of the whole run."""
    return line_chart(
        "How much each step counts",
        _STEPS,
        "times the plain mean",
        {shortened(str(e.profile)): _stairs(e) for e in explained},
    )


def _stairs(explained: Explanation) -> tuple[list[float], list[float]]:
    # A checkpoint of step 0 stands for no steps.
    long = [
        (block, a) for block, a in zip(explained.blocks, explained.coefficients, strict=True) if block.steps
    ]
    starts, stops = ([getattr(block, end) for block, _ in long] for end in ("start", "stop"))
    total = stops[-1] - starts[0]
    heights = [a * total / block.steps for block, a in long]
    return np.ravel([starts, stops], order="F").tolist(), np.repeat(heights, 2).tolist()
