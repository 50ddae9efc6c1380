"""Means over seeds and paired differences between candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from polyak.extras import require

__all__ = ["Difference", "mean_and_error", "paired_difference"]


@dataclass(frozen=True)
class Difference:
    """Candidate minus baseline over the same seeds: mean, standard error, 95% interval, two-sided p-value."""

    mean: float
    stderr: float
    low: float
    high: float
    p_value: float
    seeds: int
    seeds_lower: int
    """Seeds on which the candidate's number is the lower one."""


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error, s/√n with s² divided by n - 1.

    >>> mean_and_error([1.0, 2.0, 3.0])
    (2.0, 0.5773502691896258)
    """
    return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values)))


def paired_difference(candidate: Sequence[float], baseline: Sequence[float]) -> Difference:
    """Compare seed by seed with a paired t-test: t = mean(d) / stderr(d), n - 1 degrees of freedom.

    Where all seeds differ by the same amount the p-value is 1 if that is zero and 0 otherwise.

    Source: Student, "The probable error of a mean", 1908.
    """
    differences = [one - other for one, other in zip(candidate, baseline, strict=True)]
    mean, stderr = mean_and_error(differences)
    if len(set(differences)) == 1:
        low, high, p_value = mean, mean, float(mean == 0)
    else:
        stats = require("scipy.stats", extra="demo", purpose="the paired t-test")
        test = stats.ttest_rel(candidate, baseline)
        interval = test.confidence_interval(0.95)
        low, high, p_value = float(interval.low), float(interval.high), float(test.pvalue)
    seeds_lower = sum(difference < 0 for difference in differences)
    return Difference(mean, stderr, low, high, p_value, len(differences), seeds_lower)
