import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from polyak.demo._study import mean_and_error, paired_difference

numbers = st.floats(-10, 10).map(lambda value: round(value, 3))
pairs = st.lists(st.tuples(numbers, numbers), min_size=2, max_size=12)


@settings(deadline=None, max_examples=50)
@given(pairs)
def test_paired_difference_is_students_test_on_the_differences(scores):
    candidate, baseline = map(list, zip(*scores, strict=True))
    found = paired_difference(candidate, baseline)

    d = [one - other for one, other in scores]
    mean = math.fsum(d) / len(d)
    variance = math.fsum((one - mean) ** 2 for one in d) / (len(d) - 1)
    stderr = math.sqrt(variance / len(d))
    assert found.mean == pytest.approx(mean, abs=1e-12)
    assert found.stderr == pytest.approx(stderr, abs=1e-12)
    assert (found.seeds, found.seeds_lower) == (len(d), sum(one < 0 for one in d))
    if stderr > 1e-9:
        student = stats.t(len(d) - 1)
        assert found.p_value == pytest.approx(2 * student.sf(abs(mean) / stderr), rel=1e-6, abs=1e-12)
        half = student.ppf(0.975) * stderr
        assert (found.low, found.high) == pytest.approx((mean - half, mean + half), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(("shift", "p_value"), [(0.0, 1.0), (-0.5, 0.0)])
def test_the_same_difference_on_every_seed_needs_no_test(shift, p_value):
    baseline = [1.0, 2.0, 4.0]
    found = paired_difference([value + shift for value in baseline], baseline)
    assert (found.low, found.mean, found.high, found.p_value) == (shift, shift, shift, p_value)


def test_standard_error():
    assert mean_and_error([2.0, 4.0, 4.0, 6.0]) == pytest.approx((4.0, math.sqrt(8 / 3) / 2))
