"""The pictures of a report, from a trajectory and from what was found about it; each says what it shows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from polyak import _plots
from polyak.errors import OptionError
from polyak.inspection import Movement
from polyak.landscape import PathScores
from polyak.profiles import EMA, Decay, Power, Profile, Tail
from polyak.report._answer import reach
from polyak.selection import Selection, _result
from polyak.trajectory import Block, Explanation, Trajectory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Picture",
    "candidates_chart",
    "line_chart",
    "metric_charts",
    "movement_charts",
    "profile_chart",
    "profiles_chart",
    "shown_profiles",
]

_STEPS = "optimizer steps"
_MOST_PROFILES = 4  # lines that can still be told apart


@dataclass(frozen=True)
class Picture:
    """A figure on the page: what it shows in a sentence, the drawing, and how to read it."""

    title: str
    svg: str
    caption: str

    @classmethod
    def of(cls, figure: Figure, caption: str) -> Picture:
        """The figure as text of the page."""
        return cls(*_plots.inline_svg(figure), caption)


def candidates_chart(selection: Selection) -> Picture:
    """The best few candidates with their intervals."""
    intervals = (
        " The bar says where the true difference lies, with 95% certainty for all rows at once; those marked ≈ are as "
        "good as the best within noise."
    )
    return Picture.of(
        selection.plot(),
        "Each row is one set of weights; its dot says how far its score lies from that of the live weights."
        + (intervals if selection.best.low is not None else ""),
    )


def line_chart(line: PathScores) -> Picture:
    """The score between two sets of weights, and beyond them."""
    start, end = line.names
    statistics = (
        " BatchNorm statistics were recomputed everywhere, the ends included." if line.recalibrated else ""
    )
    return Picture.of(
        line.plot(),
        f"Every point is a mixture of two sets of weights: {start} at 0, {end} at 1, half of each at 0.5; beyond them "
        f"the same line goes on.{statistics}",
    )


def metric_charts(blocks: Sequence[Block]) -> tuple[list[Picture], list[str]]:
    """The learning rate and each metric that was recorded, as means over blocks; constant ones as a sentence."""
    metrics = dict.fromkeys(name for block in blocks for name in block.metrics)
    followed = [("learning rate", [block.lr for block in blocks])]
    followed += [(name, [block.metrics.get(name) for block in blocks]) for name in metrics]
    charts, constant = [], []
    for name, summaries in followed:
        # Where a block has none the line is broken.
        means = [math.nan if summary is None else summary.mean for summary in summaries]
        finite = list(filter(math.isfinite, means))
        if len(finite) > 1 and len(set(finite)) == 1:
            constant.append(f"{name}: {finite[0]:.4g} throughout")
        elif len(finite) > 1:
            verb = "fell" if finite[-1] < finite[0] else "rose" if finite[-1] > finite[0] else "came back"
            named = _result.shortened(name) or "A metric without a name"
            title = f"{named} {verb} from {finite[0]:.4g} to {finite[-1]:.4g}"
            charts.append(_along_steps(title, name, [block.stop for block in blocks], means, ""))
    return charts, constant


def movement_charts(blocks: Sequence[Block], movement: Movement) -> Iterator[Picture]:
    """How far each block lies from the one before, and how the path turned there."""
    steps = [block.stop for block in blocks[1:]]
    for name, caption, values in (
        (
            "relative distance",
            "How far the weights of each block lie from those of the block before, as a part of their own size.",
            [n.relative_distance for n in movement.neighbours],
        ),
        (
            "turn",
            "1: straight on. 0: at a right angle. -0.5: around one place. -1: straight back.",
            [n.turn for n in movement.neighbours],
        ),
    ):
        found = [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]
        if len({value for _, value in found}) > 1:
            x, y = zip(*found, strict=True)
            title = f"{name.capitalize()} from block to block: {y[0]:.3g} at first, {y[-1]:.3g} at the end"
            yield _along_steps(title, name, x, y, caption)


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


def profiles_chart(explained: Sequence[Explanation], best: Profile | None) -> Picture:
    """How much each step counts under the best profile, and under usual ones."""
    return Picture.of(
        profile_chart(explained, best),
        "How much the weights of each step count in an average: at 1 as much as in the plain mean of the whole run, at "
        "0 not at all."
        + (
            " What a blend gives the live weights lies at the end, on the dotted line."
            if explained[0].live
            else ""
        ),
    )


def profile_chart(explained: Sequence[Explanation], best: Profile | None) -> Figure:
    """How much a step counts under each profile, as a multiple of its share in the mean of the whole run."""
    lines = []
    for one in explained:
        x, y = _stairs(one)
        role = "chosen" if one.profile == best else "other"
        lines.append(_plots.Line(_result.shortened(str(one.profile)), x, [y], role))
    first = explained[0]
    title = f"{_result.shortened(str(first.profile))} is {reach(first)}"
    heights = np.concatenate([np.ravel(line.y) for line in lines])
    limits = (min(0.0, float(heights.min())), 1.05 * float(heights.max()))
    end = first.blocks[-1].stop
    live = [_plots.Mark(f"{one.live:.0%} live weights", end, "live") for one in explained if one.live]
    return _plots.line_panels(title, _STEPS, [_plots.Panel("times the plain mean", lines, limits, live)])


def _along_steps(
    title: str, name: str, steps: Iterable[float], values: Iterable[float], caption: str
) -> Picture:
    panel = _plots.Panel(name, [_plots.Line(name, list(steps), [list(values)])])
    return Picture.of(_plots.line_panels(title, _STEPS, [panel]), caption)


def _stairs(explained: Explanation) -> tuple[list[float], list[float]]:
    # A checkpoint of step 0 stands for no steps.
    long = [
        (block, a) for block, a in zip(explained.blocks, explained.coefficients, strict=True) if block.steps
    ]
    starts, stops = ([getattr(block, end) for block, _ in long] for end in ("start", "stop"))
    total = stops[-1] - starts[0]
    heights = [a * total / block.steps for block, a in long]
    return np.ravel([starts, stops], order="F").tolist(), np.repeat(heights, 2).tolist()
