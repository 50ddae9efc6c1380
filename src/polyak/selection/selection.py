"""What `select` found: every candidate with its evidence, and the best of them ready for use."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from polyak.batchnorm import tracks_statistics
from polyak.selection.table import as_table, as_text, shortened
from polyak.selection.trial import Mode, badness
from polyak.selection.verdict import LIVE_IS_THE_MODEL, STALE_STATISTICS, Candidate, HoldoutCheck, verdict
from polyak.selection.weights import apply_weights, live_weights, write_weights
from polyak.trajectory import Trajectory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Selection"]

_ROWS_SHOWN = 10


@dataclass(frozen=True, repr=False)
class Selection:
    """The candidates of a run in order of their scores, and what is to be done with the best.

    Printing it shows the best ten, the live weights and the verdict. Made by :func:`polyak.select`.

    Attributes:
        table: every :class:`Candidate`, best first; the live weights are the one named ``live``.
        mode: "min" or "max", whichever scores are better.
        holdout: the best and the live weights on data that nothing was chosen on, if that was asked for.
    """

    table: Sequence[Candidate]
    mode: Mode
    holdout: HoldoutCheck | None
    _trajectory: Trajectory
    _model: nn.Module
    _recalibrate: Iterable[Any] | None

    @property
    def best(self) -> Candidate:
        """The candidate of the best score, whether or not that is beyond noise."""
        return self.table[0]

    @property
    def best_average(self) -> Candidate:
        """The average of the best score, also where the live weights are better."""
        return next(candidate for candidate in self.table if candidate.profile is not None)

    @property
    def live(self) -> Candidate:
        """The live weights."""
        return next(candidate for candidate in self.table if candidate.profile is None)

    @property
    def verdict(self) -> str:
        """Whether the best beats the live weights beyond noise, and how many it was the best of."""
        caveats = {
            LIVE_IS_THE_MODEL: not self._trajectory.has_live,
            STALE_STATISTICS: self._recalibrate is None and tracks_statistics(self._model),
        }
        holding = [caveat for caveat, holds in caveats.items() if holds]
        return verdict(self.table, self.live, self.mode, self.holdout, holding)

    def weights(self) -> dict[str, Tensor]:
        """The best weights: name to tensor on the host, as :meth:`Trajectory.average` and ``live`` give them.

        Their BatchNorm statistics are not recomputed. Of a recording that was not closed, live weights are those in
        the model, and the dictionary is empty.
        """
        return self._best()[0]

    def apply(self, model: nn.Module) -> None:
        """Put the best weights into ``model`` for good, BatchNorm statistics of an average recomputed if asked for.

        If the live weights are the best, they are put in as the run ended with them; of a recording that was
        not closed the model is left as it is.

        Raises:
            StructureError: the weights do not fit the model, which is then as it was.
        """
        apply_weights(model, *self._best())

    def write(self, path: str | PathLike[str], *, overwrite: bool = False) -> None:
        """Write the model with the best weights; the ending says the format, see :mod:`polyak.checkpoints`.

        The file holds the whole model, averaged parameters in the average's own dtype. What is not averaged
        is read from the model that was given to ``select``, as it is now; it is left as it is.

        Raises:
            OutputExistsError: ``path`` exists and ``overwrite`` is False.
        """
        weights, recalibrate = self._best()
        write_weights(
            path,
            self._model,
            weights,
            recalibrate=recalibrate,
            metadata={"polyak.profile": self.best.name, "polyak.score": repr(self.best.score)},
            overwrite=overwrite,
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything that was found, as plain values for JSON."""
        return {
            "verdict": self.verdict,
            "mode": self.mode,
            "best": self.best.name,
            "holdout": None if self.holdout is None else self.holdout.to_dict(),
            "candidates": [candidate.to_dict() for candidate in self.table],
        }

    def plot(self) -> Figure:
        """A matplotlib figure of the scores, best on top, with their intervals where there are any.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        from polyak.plots import Dot, dot_chart

        dots = [Dot(shortened(c.name), c.difference, c.low, c.high) for c in self.table]
        better = "lower" if self.mode == "min" else "higher"
        return dot_chart("Candidates", f"score minus that of the live weights ({better} is better)", dots)

    def __str__(self) -> str:
        return as_text(as_table(self._shown()), self.verdict)

    def __repr__(self) -> str:
        return f"Selection(best={self.best.name!r}, candidates={len(self.table)})"

    def _best(self) -> tuple[dict[str, Tensor], Iterable[Any] | None]:
        """The best weights, and the batches for statistics, which live weights have."""
        profile = self.best.profile
        if profile is None:
            return live_weights(self._trajectory), None
        return self._trajectory.average(profile), self._recalibrate

    def _shown(self) -> list[Candidate]:
        top = list(self.table[:_ROWS_SHOWN])
        return top if self.live in top else [*top, self.live]


def ranked(candidates: Sequence[Candidate], mode: Mode) -> list[Candidate]:
    """Best first; of equal scores the one that was tried first, so that nothing beats the live weights by a tie."""
    return sorted(candidates, key=lambda candidate: badness(candidate.score, mode))
