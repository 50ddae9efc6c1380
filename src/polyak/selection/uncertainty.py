"""How sure a score is: what ``score(model)`` returned, standard errors, paired bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from polyak.errors import OptionError

__all__ = ["Interval", "Score", "paired_intervals", "read_score"]

Floats = NDArray[np.float64]

# More examples than this are resampled in this many groups of neighbours. That bounds the cost whatever the
# data, and is right where neighbours are alike, as the tokens of one text are.
_MOST_GROUPS = 1024
_RESAMPLES = 2000
_SEED = 0


@dataclass(frozen=True)
class Score:
    """One result of ``score(model)``.

    ``value`` is the score. Where ``score`` gave a loss per example it is their mean, and ``group_sums`` [G]
    are their sums over groups of ``group_sizes`` [G] neighbouring examples; otherwise both are None.
    """

    value: float
    group_sums: Floats | None = None
    group_sizes: Floats | None = None

    @property
    def stderr(self) -> float | None:
        """The standard error of the mean over groups, √(Σ (s_g - n_g μ)² G/(G-1)) / N; None for a number."""
        if self.group_sums is None or self.group_sizes is None:
            return None
        groups = len(self.group_sums)
        residuals = self.group_sums - self.value * self.group_sizes
        return float(np.sqrt(np.sum(residuals**2) * groups / (groups - 1)) / self.group_sizes.sum())


@dataclass(frozen=True)
class Interval:
    """A 95% interval of a difference."""

    low: float
    high: float


def read_score(result: object) -> Score:
    """What a score function returned, as a :class:`Score`.

    Args:
        result: a number, a tensor or array of one element, or one of shape [N] with the losses of N examples.

    Raises:
        OptionError: anything else, or no examples.

    >>> read_score(torch.tensor([1.0, 2.0, 3.0])).value, read_score(0.5).value
    (2.0, 0.5)
    """
    if isinstance(result, torch.Tensor):
        result = result.detach().cpu().to(torch.float64).numpy()
    if result is None or isinstance(
        result, str | tuple
    ):  # NumPy would make numbers of them, or of (loss, accuracy)
        raise OptionError(_not_a_score(f"a {type(result).__name__}"))
    try:
        losses = np.asarray(result, dtype=np.float64)
    except (TypeError, ValueError):
        raise OptionError(_not_a_score(f"a {type(result).__name__}")) from None
    if losses.ndim > 1 or not losses.size:
        raise OptionError(_not_a_score(f"an array of shape {losses.shape}"))
    if losses.size == 1:
        return Score(float(losses.item()))
    groups = min(len(losses), _MOST_GROUPS)
    starts = np.arange(groups) * len(losses) // groups
    sizes = np.diff(starts, append=len(losses)).astype(np.float64)
    return Score(float(losses.mean()), np.add.reduceat(losses, starts), sizes)


def paired_intervals(scores: Sequence[Score], baseline: Score) -> list[Interval | None]:
    """A 95% interval of each score minus that of ``baseline``, by the paired percentile bootstrap.

    Examples are drawn with replacement, the same ones for all, 2,000 times with a fixed seed; the interval
    holds the middle 95% of the mean differences. None where scores are single numbers.

    Raises:
        OptionError: scores of different numbers of examples.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13.

    >>> live, other = read_score([1.0, 2.0, 3.0]), read_score([0.5, 1.5, 2.5])
    >>> paired_intervals([other], live)
    [Interval(low=-0.5, high=-0.5)]
    """
    _refuse_other_examples(scores, baseline)
    if baseline.group_sums is None or baseline.group_sizes is None:
        return [None for _ in scores]
    differences = np.array([np.asarray(score.group_sums) - baseline.group_sums for score in scores])  # [C, G]
    times_drawn = _times_drawn(len(baseline.group_sums))  # [B, G]
    # A loss that is not finite makes its own candidate's interval NaN, and no other's.
    with np.errstate(invalid="ignore"):
        means = times_drawn @ differences.T / (times_drawn @ baseline.group_sizes)[:, None]  # [B, C]
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    return [Interval(*pair) for pair in zip(low.tolist(), high.tolist(), strict=True)]


def _times_drawn(groups: int) -> Floats:
    """How often each group is in each resample, [resamples, groups]."""
    generator = np.random.default_rng(_SEED)
    draws = (generator.integers(groups, size=groups) for _ in range(_RESAMPLES))
    return np.array([np.bincount(drawn, minlength=groups) for drawn in draws], dtype=np.float64)


def _refuse_other_examples(scores: Sequence[Score], baseline: Score) -> None:
    counts = {0 if s.group_sizes is None else int(s.group_sizes.sum()) for s in (*scores, baseline)}
    if len(counts) > 1:
        shown = " and ".join("one number" if n == 0 else f"{n} examples" for n in sorted(counts))
        raise OptionError(
            f"score returned {shown} for different weights, which cannot be paired: it must look at the same "
            "examples in the same order each time"
        )


def _not_a_score(got: str) -> str:
    return f"score must return a number, or a tensor [N] with one loss per example; it returned {got}"
