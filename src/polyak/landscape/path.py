"""The loss along the line between two weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from polyak.landscape.points import combined, difference, inner, numbers, points, scores
from polyak.selection.trial import Mode, ScoreFunction, badness, refuse_unknown_mode
from polyak.selection.weights import check_statistics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PathScores", "path"]

_POSITIONS = tuple(step / 20 for step in range(-10, 31))


@dataclass(frozen=True)
class PathScores:
    """Scores along the line through two weights. Made by :func:`path`.

    Attributes:
        names: of the weights at positions 0 and 1.
        positions: t of (1 - t)·start + t·end, ascending.
        scores: what ``score`` returned at each, or the mean of the losses that it returned.
        distance: ‖end - start‖ over the parameters.
        mode: "min" or "max", whichever scores are better.
        recalibrated: whether BatchNorm statistics were recomputed everywhere, the ends included.
    """

    names: tuple[str, str]
    positions: tuple[float, ...]
    scores: tuple[float, ...]
    distance: float
    mode: Mode
    recalibrated: bool = False

    @property
    def best(self) -> float:
        """The position of the best score; of equal ones rather one within [0, 1], then the one nearest to the end."""

        def rank(at: tuple[float, float]) -> tuple[float, bool, float]:
            position, score = at
            return badness(score, self.mode), not 0 <= position <= 1, abs(1 - position)

        return min(zip(self.positions, self.scores, strict=True), key=rank)[0]

    @property
    def barrier(self) -> float:
        """By how much the line is worse than its ends, at most: max over [0, 1] of ℓ(t) - ((1 - t)·ℓ(0) + t·ℓ(1)).

        0 says that both ends lie in one basin, where averaging them is safe; NaN that an end has no finite score.
        With ``mode="max"`` ℓ is minus the score.

        Source: Frankle et al. 2020, Linear Mode Connectivity and the Lottery Ticket Hypothesis.
        """
        losses = {t: badness(s, self.mode) for t, s in zip(self.positions, self.scores, strict=True)}
        if not (math.isfinite(losses[0.0]) and math.isfinite(losses[1.0])):
            return math.nan
        return max(
            loss - ((1 - t) * losses[0.0] + t * losses[1.0]) if 0 < t < 1 else 0.0
            for t, loss in losses.items()
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything that was found, as plain values for JSON."""
        return {**asdict(self), "best": self.best, "barrier": self.barrier}

    def plot(self) -> Figure:
        """A matplotlib figure of the scores along the line, its ends marked.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        from polyak.plots import Mark, line_chart

        marks = [Mark(name, position) for name, position in zip(self.names, (0.0, 1.0), strict=True)]
        return line_chart(
            "Along the line", "position", "score", {"score": (self.positions, self.scores)}, marks
        )

    def __str__(self) -> str:
        start, end = self.names
        at = dict(zip(self.positions, self.scores, strict=True))
        barrier = "there is no barrier to speak of, as an end has no finite score"
        if not math.isnan(self.barrier):
            barrier = f"the barrier between them is {self.barrier:.3g}"
        statistics = " BatchNorm statistics were recomputed everywhere, the ends included."
        return (
            f"From {start} (score {at[0.0]:.5g}) to {end} ({at[1.0]:.5g}), a distance of {self.distance:.4g}: "
            f"the best score, {at[self.best]:.5g}, lies {self._place(self.best)}; {barrier}."
        ) + (statistics if self.recalibrated else "")

    def _place(self, position: float) -> str:
        start, end = self.names
        if position in (0, 1):
            return f"at {end if position else start}"
        if 0 < position < 1:
            return f"at {position:.3g} of the way"
        beyond, name = (position - 1, end) if position > 1 else (-position, start)
        return f"beyond {name}, by {beyond:.3g} of their distance"


def path(
    model: nn.Module,
    weights: Mapping[str, Mapping[str, Tensor]],
    score: ScoreFunction,
    *,
    mode: Mode = "min",
    positions: Iterable[float] = _POSITIONS,
    recalibrate: Iterable[Any] | None = None,
    progress: bool = True,
) -> PathScores:
    """Score the weights (1 - t)·start + t·end for each position t, also beyond the ends.

    Interpolated are the floating-point tensors that both hold, in fp32 at least; the rest is the model's.

    Args:
        model: takes each point's weights, in evaluation mode and without gradients, while it is scored; it is
            as before when this returns or raises.
        weights: two names with their weights, such as ``{"live": run.live(), "averaged": run.average(profile)}``.
        score: as for :func:`polyak.select`.
        mode: "min" if lower scores are better, "max" if higher ones are.
        positions: where to score; 0 and 1 always are.
        recalibrate: batches for :func:`polyak.update_bn` before each score, as no average has its own statistics.
        progress: show a bar on stderr.

    Raises:
        OptionError: not two weights, or a position that is not finite.
        StructureError: the weights do not fit the model.

    >>> import torch
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> ends = {"live": {"weight": torch.tensor([[0.0]])}, "averaged": {"weight": torch.tensor([[2.0]])}}
    >>> found = path(model, ends, lambda m: (m.weight.item() - 2) ** 2, positions=[0.5, 1.5], progress=False)
    >>> found.positions, found.scores, found.best, found.barrier
    ((0.0, 0.5, 1.0, 1.5), (4.0, 1.0, 0.0, 1.0), 1.0, 0.0)
    """
    refuse_unknown_mode(mode)
    check_statistics(model, recalibrate)
    where = sorted({0.0, 1.0, *numbers("positions", positions)})
    start, end = points(model, weights, count=2)
    first, second = weights
    tried = (combined(start, [end], [t]) for t in where)
    moved = {name: difference(end[name], start[name]) for name in start}
    distance = math.sqrt(inner(model, moved, moved))
    del moved  # a whole model, which need not wait for the scores
    return PathScores(
        names=(first, second),
        positions=tuple(where),
        scores=tuple(scores(model, tried, len(where), score, recalibrate, progress)),
        distance=distance,
        mode=mode,
        recalibrated=recalibrate is not None,
    )
