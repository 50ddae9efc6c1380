"""What every scheme promises: following it online gives the weights of its profile."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyak import profiles
from polyak.errors import OptionError
from polyak.profiles import EMA, Polynomial, Power, Scheme, Uniform

SCHEMES = [
    Uniform(),
    EMA(half_life=0.3),
    EMA(half_life=20),
    EMA(half_life=1e9),
    EMA(half_life=20, debias=False),
    EMA(decay=0.01),
    EMA(decay=0.999),
    EMA(decay=0.9, debias=False),
    Power(gamma=0),
    Power(gamma=6.94),
    Power(sigma_rel=0.05),
    Power(sigma_rel=0.2887),
    Polynomial(eta=0),
    Polynomial(eta=0.5),
    Polynomial(eta=8),
    Polynomial(eta=300),
]
N_SAMPLES = 60


@pytest.fixture(params=SCHEMES)
def scheme(request) -> Scheme:
    return request.param


def followed(coefficients) -> np.ndarray:
    """The weight of each sample in ``m += c_n (w_n - m)``: sample n is the n-th unit vector."""
    samples = np.eye(len(coefficients))
    mean = np.zeros(len(coefficients))
    for coefficient, sample in zip(coefficients, samples, strict=True):
        mean += coefficient * (sample - mean)
    return mean


def edges_at_gap(scheme: Scheme, gap: float) -> np.ndarray:
    return np.arange(N_SAMPLES + 1.0) * (gap if scheme.unit == "steps" else 1)


def test_every_scheme_is_held_to_the_contract():
    exported = {cls for cls in map(profiles.__dict__.get, profiles.__all__) if isinstance(cls, type)}
    concrete = {cls for cls in exported if issubclass(cls, Scheme)} - {Scheme}
    assert concrete == {type(scheme) for scheme in SCHEMES} == set(Scheme.__subclasses__())


@pytest.mark.parametrize("gap", [1, 7, 100])
def test_following_gives_the_weights_of_the_profile(scheme, gap):
    coefficients = [scheme.coefficient(n, gap) for n in range(1, N_SAMPLES + 1)]
    expected = scheme.weights(edges_at_gap(scheme, gap))
    np.testing.assert_allclose(followed(coefficients), expected, rtol=1e-10, atol=1e-14)


def test_following_uneven_gaps_gives_the_weights_of_the_profile(scheme):
    gaps = np.random.default_rng(0).integers(1, 40, size=N_SAMPLES)
    positions = np.concatenate([[0], np.cumsum(gaps)])
    # Where the unit is samples, a block of several weighs as much as they do together.
    sampled_at = np.arange(positions[-1] + 1.0) if scheme.unit == "samples" else positions
    coefficients = [scheme.coefficient_between(before, now) for before, now in pairwise(sampled_at)]
    boundaries = np.searchsorted(sampled_at, positions[:-1])
    block_weights = np.add.reduceat(followed(coefficients), boundaries)
    np.testing.assert_allclose(block_weights, scheme.weights(positions), rtol=0, atol=1e-12)


@pytest.mark.parametrize("gap", [1, 3])
def test_coefficients_are_positive_and_at_most_one(scheme, gap):
    coefficients = [scheme.coefficient(n, gap) for n in range(1, 400)]
    assert coefficients[0] == 1.0
    assert all(type(c) is float and 0 < c <= 1 for c in coefficients)


def test_the_gap_matters_exactly_where_the_unit_is_steps_and_there_is_a_scale(scheme):
    differs = scheme.coefficient(5, gap=10) != scheme.coefficient(5, gap=1)
    assert differs == (isinstance(scheme, EMA) and scheme.unit == "steps")


@pytest.mark.parametrize(("n", "gap"), [(0, 1), (-3, 1), (1, 0), (1, -2)])
def test_positions_before_the_first_sample_are_refused(scheme, n, gap):
    with pytest.raises(OptionError, match="from 1"):
        scheme.coefficient(n, gap)


@settings(deadline=None, max_examples=50)
@given(scheme=st.sampled_from(SCHEMES), points=st.lists(st.integers(1, 10**6), min_size=3, max_size=3))
def test_semigroup(scheme, points):
    s, t, u = sorted(points)
    whole = scheme.cumulative(s, u)
    parts = scheme.cumulative(s, t) * scheme.cumulative(t, u)
    np.testing.assert_allclose(parts, whole, rtol=1e-9, atol=1e-300)


def test_weights_are_those_of_a_mean(scheme):
    for edges in (edges_at_gap(scheme, 1), [0, 1], [0, 500, 501, 10**6]):
        weights = scheme.weights(edges)
        assert np.all(weights >= 0)
        assert weights.sum() == pytest.approx(1, abs=1e-14)


def test_torch_and_numpy_agree(scheme):
    positions = [(0, 1), (1, 2), (2, 3), (999, 1000), (10**9 - 1, 10**9)]
    if scheme.unit == "steps":
        positions += [(0, 400), (400, 403), (403, 100_000)]
    for before, now in positions:
        expected = scheme.coefficient_between(float(before), float(now))
        before, now = (torch.tensor(at, dtype=torch.float64) for at in (before, now))
        got = scheme.coefficient_between(before, now, xp=torch)
        assert got.dtype == torch.float64
        assert got.ndim == 0
        assert math.isclose(got.item(), float(expected), rel_tol=1e-15)


@pytest.mark.parametrize("gap", [1, 5, 400])
def test_a_coefficient_is_what_the_older_samples_do_not_keep(scheme, gap):
    gap = gap if scheme.unit == "steps" else 1
    for before in (0, 3, 1000):
        kept = scheme.cumulative(before, before + gap)
        assert scheme.coefficient_between(before, before + gap) == pytest.approx(1 - kept, abs=1e-12)


def test_arrays_are_taken_elementwise(scheme):
    now = np.arange(1.0, 9.0)
    each = [float(scheme.coefficient_between(n - 1, n)) for n in now]
    np.testing.assert_allclose(scheme.coefficient_between(now - 1, now), each, rtol=1e-15)


def test_tensors_are_not_read_back(scheme):
    # A meta tensor has no value: reading one raises.
    before, now = (torch.empty((), dtype=torch.float64, device="meta") for _ in range(2))
    assert scheme.coefficient_between(before, now, xp=torch).is_meta


@pytest.mark.parametrize("n", [10**6, 10**9])
@pytest.mark.parametrize(
    ("scheme", "exact"),
    [
        (Uniform(), lambda n: 1 / n),
        (Power(gamma=0), lambda n: 1 / n),
        # (1 - 1/n)^3 multiplied out, so that nothing cancels.
        (Power(gamma=2), lambda n: (3 * n * n - 3 * n + 1) / n**3),
        (Polynomial(eta=8), lambda n: 9 / (n + 8)),
        (
            EMA(half_life=1e12),
            lambda n: math.expm1(-math.log(2) / 1e12) / math.expm1(-n * math.log(2) / 1e12),
        ),
        (EMA(decay=0.5), lambda n: 0.5),
        (EMA(decay=0.5, debias=False), lambda n: 0.5),
    ],
)
def test_coefficients_stay_accurate_in_long_runs(scheme, exact, n):
    assert math.isclose(scheme.coefficient(n), exact(n), rel_tol=1e-14)
