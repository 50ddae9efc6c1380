"""A candidate's evidence, and all of it in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from polyak.profiles import Profile
from polyak.selection.trial import Mode

__all__ = ["LIVE", "LIVE_IS_THE_MODEL", "STALE_STATISTICS", "Candidate", "HoldoutCheck", "verdict"]

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
