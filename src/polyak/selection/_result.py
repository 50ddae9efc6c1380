"""What a selection found: the verdict, the table, and the chosen weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from statistics import median
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from polyak import _plots, _terminal
from polyak._evaluate import Mode, apply_weights, badness, live_weights, write_weights
from polyak.batchnorm import tracks_statistics
from polyak.profiles import Profile
from polyak.trajectory import Trajectory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "HEADINGS",
    "LIVE",
    "STALE_STATISTICS",
    "Candidate",
    "HoldoutCheck",
    "Selection",
    "as_rows",
    "shortened",
]

# A candidate's evidence, and all of it in words.

LIVE = "live"
STALE_STATISTICS = (
    "These scores are not those the averages can have: the model has BatchNorm layers, whose statistics are of "
    "other weights. Give recalibrate the batches to recompute them from."
)
LIVE_IS_THE_MODEL = (
    "Live are the weights in the model, as the trajectory was opened before its recorder was closed."
)


@dataclass(frozen=True)
class Candidate:
    """One set of weights and how it scored.

    Attributes:
        name: the profile as text, or ``live``.
        profile: what was averaged; None for the live weights.
        score: what ``score`` returned, or the mean of the losses that it returned.
        stderr: the standard error of that mean; None if ``score`` returned one number.
        difference: the score minus that of the live weights.
        low, high: the 95% paired bootstrap interval of the difference; None if ``score`` returned one number.
        effective_samples: 1 / Σ a², of the weights a of the samples: how many equal ones do the same.
        warnings: what speaks against this profile on this run, in sentences.
    """

    name: str
    profile: Profile | None
    score: float
    stderr: float | None
    difference: float
    low: float | None
    high: float | None
    effective_samples: float
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, which knows no NaN: None stands for it. The profile is its name."""
        return {key: _plain(value) for key, value in asdict(self).items() if key != "profile"}


@dataclass(frozen=True)
class HoldoutCheck:
    """The best candidate and the live weights on other data: scores, their difference and its interval."""

    best_score: float
    live_score: float
    difference: float
    low: float | None
    high: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, as those of a candidate."""
        return {key: _plain(value) for key, value in asdict(self).items()}


def verdict(
    table: Sequence[Candidate],
    live: Candidate,
    mode: Mode,
    holdout: HoldoutCheck | None,
    caveats: Sequence[str] = (),
) -> str:
    """What the table, best candidate first, says about the live weights, as one paragraph after the caveats."""
    best = table[0]
    if math.isnan(best.score):
        return "No candidate has a score that is a number: look at what score returns for the live weights first."
    if best is live:
        sentences = [
            f"Keep the live weights: none of {len(table) - 1} averages scored better than their {live.score:.5g}."
        ]
    else:
        sentences = [_against_live(best, mode), _chance(len(table), best, holdout)]
        if holdout is not None:
            sentences.append(_on_holdout(holdout, mode))
    sentences += [f"Mind that {warning}." for warning in best.warnings]
    return " ".join([*caveats, *sentences])


def _plain(value: Any) -> Any:
    """The value, or None for a float that is not finite.

    >>> _plain(math.nan), _plain(0.5)
    (None, 0.5)
    """
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _against_live(best: Candidate, mode: Mode) -> str:
    if math.isnan(best.difference):
        return f"{best.name} scores best, {best.score:.5g}; the score of the live weights is not a number."
    side = "below" if mode == "min" else "above"
    sentence = (
        f"{best.name} scores best, {best.score:.5g}, {abs(best.difference):.3g} {side} the live weights"
    )
    if best.low is None or best.high is None:
        return (
            f"{sentence}. Whether that is beyond noise cannot be told from one number for each: let score "
            "return a tensor with one loss per example."
        )
    interval = _interval(best.low, best.high)
    if _beyond_noise(best.low, best.high, mode):
        return f"{sentence} ({interval}): beyond the noise of these examples."
    return f"{sentence} ({interval}): not beyond the noise of these examples."


def _chance(candidates: int, best: Candidate, holdout: HoldoutCheck | None) -> str:
    sentence = f"It is the best of {candidates} candidates"
    if holdout is not None:
        return f"{sentence}."
    what = "its score is" if best.low is None else "its score and interval are"
    return f"{sentence}, so {what} optimistic: a holdout measures it on data it was not chosen on."


def _on_holdout(holdout: HoldoutCheck, mode: Mode) -> str:
    better = holdout.difference < 0 if mode == "min" else holdout.difference > 0
    side = "below" if holdout.difference < 0 else "above"
    size = f"{abs(holdout.difference):.3g} {side} the live weights"
    if holdout.low is None or holdout.high is None:
        return f"On the holdout it is {'better' if better else 'no better'}: {size}."
    interval = _interval(holdout.low, holdout.high)
    if _beyond_noise(holdout.low, holdout.high, mode):
        return f"The holdout confirms it: {size} ({interval})."
    return f"The holdout does not confirm it: {size} ({interval})."


def _interval(low: float, high: float) -> str:
    return f"95% interval {low:+.3g} to {high:+.3g}"


def _beyond_noise(low: float, high: float, mode: Mode) -> bool:
    return high < 0 if mode == "min" else low > 0


# Candidates as a table that people read down its columns.

# A profile with a weight for each block has a name longer than the page.
_MOST_NAME = 28
_MOST_DECIMALS = 8

HEADINGS = ("candidate", "score", "± error", f"minus {LIVE}", "95% interval", "samples")


def as_rows(candidates: Sequence[Candidate]) -> list[tuple[str, ...]]:
    """The cells under ``HEADINGS``; the numbers of a column have as many decimals as each other."""
    others = [candidate for candidate in candidates if candidate.profile is not None]
    score = _form([c.score for c in candidates], 5)
    error = _form([c.stderr for c in candidates], 2)
    difference = _form([c.difference for c in others], 3, "+")
    bound = _form([value for c in others for value in (c.low, c.high)], 3, "+")
    return [
        (
            shortened(c.name),
            f"{c.score:{score}}",
            "" if c.stderr is None else f"{c.stderr:{error}}",
            "" if c.profile is None else f"{c.difference:{difference}}",
            "" if c.profile is None or c.low is None else f"{c.low:{bound}} to {c.high:{bound}}",
            f"{c.effective_samples:.4g}",
        )
        for c in candidates
    ]


def _form(values: Sequence[float | None], digits: int, sign: str = "") -> str:
    """How to write all of ``values``: the usual one of them with ``digits`` digits.

    >>> _form([0.0123, 0.4, 0.38], 3), _form([1250.0], 2), _form([1e-12, 2e-12], 3, "+")
    ('.3f', '.0f', '+.3g')
    """
    sizes = [abs(value) for value in values if value is not None and math.isfinite(value) and value != 0]
    if not sizes:
        return f"{sign}.{digits}g"
    decimals = max(0, digits - 1 - math.floor(math.log10(median(sizes))))
    # Numbers that are smaller still, or one that is far larger than the rest, make a column of zeros.
    if decimals > _MOST_DECIMALS or max(sizes) >= 10 ** (digits + 3):
        return f"{sign}.{digits}g"
    return f"{sign}.{decimals}f"


def shortened(name: str) -> str:
    """A name that fits into a table or a figure."""
    return name if len(name) <= _MOST_NAME else f"{name[: _MOST_NAME - 1]}…"


# What `select` found: every candidate with its evidence, and the best of them ready for use.

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
        dots = [_plots.Dot(shortened(c.name), c.difference, c.low, c.high) for c in self.table]
        better = "lower" if self.mode == "min" else "higher"
        return _plots.dot_chart(
            "Candidates", f"score minus that of the live weights ({better} is better)", dots
        )

    def __str__(self) -> str:
        first, *others = HEADINGS
        rows = _terminal.table(first, *(f"#{heading}" for heading in others))
        for row in as_rows(self._shown()):
            rows.add_row(*row)
        return _terminal.as_text(rows, self.verdict)

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
