"""Standard errors and intervals against scipy and textbook formulas."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from polyak._evaluate import paired_intervals, read_score
from polyak.errors import OptionError


def losses(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).gamma(2.0, size=n)


@pytest.mark.parametrize("n", [20, 300])
def test_intervals_are_those_of_scipys_paired_bootstrap(n):
    live, other = losses(n, 1), losses(n, 1) + 0.1 * losses(n, 2) - 0.18
    (interval,) = paired_intervals([read_score(other)], read_score(live))
    theirs = stats.bootstrap(
        (other, live), lambda a, b, axis: np.mean(a - b, axis=axis), paired=True, method="percentile", rng=0
    ).confidence_interval
    width = theirs.high - theirs.low
    assert interval.low == pytest.approx(theirs.low, abs=0.06 * width)
    assert interval.high == pytest.approx(theirs.high, abs=0.06 * width)


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 1024), st.integers(0, 1000))
def test_the_standard_error_is_that_of_the_mean(n, seed):
    sample = losses(n, seed)
    score = read_score(torch.tensor(sample))
    assert score.value == pytest.approx(sample.mean(), rel=1e-12)
    assert score.stderr == pytest.approx(stats.sem(sample), rel=1e-9)


def test_many_examples_are_resampled_in_groups_of_neighbours():
    sample = losses(100_001, 0)
    score = read_score(sample)
    assert score.value == pytest.approx(sample.mean(), rel=1e-12)
    assert len(score.group_sums) == len(score.group_sizes) == 1024
    assert score.group_sums.sum() == pytest.approx(sample.sum())
    assert score.group_sizes.sum() == len(sample) and np.ptp(score.group_sizes) <= 1
    assert score.stderr == pytest.approx(stats.sem(sample), rel=0.1)


def test_neighbours_that_are_alike_make_the_error_larger_than_independence_would():
    sample = np.repeat(losses(1024, 3), 50)
    assert read_score(sample).stderr == pytest.approx(stats.sem(losses(1024, 3)), rel=1e-9)


def test_intervals_cover_the_truth_as_often_as_they_say():
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        sample = generator.normal(0.3, 1.0, size=60)
        (interval,) = paired_intervals([read_score(sample)], read_score(np.zeros(60)))
        covered += interval.low <= 0.3 <= interval.high
    assert 180 <= covered <= 198


def test_a_candidate_that_diverged_spoils_no_other_interval():
    live, broken = losses(50, 0), losses(50, 0)
    broken[7] = np.nan
    spoilt, fine = paired_intervals([read_score(broken), read_score(live + 1)], read_score(live))
    assert np.isnan(spoilt.low) and np.isnan(spoilt.high)
    assert (fine.low, fine.high) == (pytest.approx(1), pytest.approx(1))


@pytest.mark.parametrize("number", [0.5, 3, True, np.float32(0.5), torch.tensor(0.5), torch.tensor([0.5])])
def test_a_single_number_has_no_error(number):
    score = read_score(number)
    assert (score.value, score.stderr) == (float(number), None)
    assert paired_intervals([score], score) == [None]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "NoneType"),
        ("low", "a str"),
        ([], r"shape \(0,\)"),
        (torch.zeros(2, 3), r"shape \(2, 3\)"),
        ({"loss": 1.0}, "a dict"),
    ],
)
def test_what_is_no_score_is_refused(result, message):
    with pytest.raises(OptionError, match=message):
        read_score(result)


def test_scores_of_other_examples_cannot_be_paired():
    with pytest.raises(OptionError, match="one number and 3 examples"):
        paired_intervals([read_score([1.0, 2.0, 3.0])], read_score(1.0))
    with pytest.raises(OptionError, match="2 examples and 3 examples"):
        paired_intervals([read_score([1.0, 2.0, 3.0])], read_score([1.0, 2.0]))
