"""What every profile that is defined promises, and what every scheme does besides.

The classes are those of the registry, each with the examples that it gives: see :func:`polyak.profiles.registered`.
"""

import math
import pickle
from itertools import count, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import polyak
from polyak import checkpoints
from polyak.errors import OptionError
from polyak.profiles import EMA, Polynomial, Power, Profile, Scheme, Uniform, parse, registered
from polyak.trajectory import Trajectory

CLASSES = list(registered().values())
# Beside the examples: hyper-parameters at which rounding and overflow are near.
EXTREMES = [
    "ema:half_life=0.3",
    "ema:half_life=1000000000",
    "ema:half_life=20,debias=false",
    "ema:decay=0.01",
    "ema:decay=0",
    "ema:decay=0,debias=false",
    "warmup-ema:decay=0",
    "warmup-ema:decay=1",
    "warmup-ema:decay=1,power=0.3",
    "warmup-ema:decay=0.99,power=3,inv_gamma=40,min_decay=0.5",
    "warmup-ema:decay=0.999,power=2,inv_gamma=1000",
    "power:half_life_fraction=0.69",
    "power:gamma=0",
    "power:sigma_rel=0.05",
    "power:sigma_rel=0.2887",
    "polynomial:eta=0",
    "polynomial:eta=0.5",
    "polynomial:eta=300",
    "tail:0.01",
    "tail:1",
    "tail:steps=1",
    "decay:1-sqrt:0.01",
    "blend:0:uniform",
    "blend:1:ema:decay=0.9,debias=false",
    "blend:0.3:window:1000,2000",
    "blend:0.6:weights:-0.5,1.5",
]
PROFILES = [parse(text) for text in [*(text for cls in CLASSES for text in cls.examples), *EXTREMES]]
SCHEMES = [profile for profile in PROFILES if isinstance(profile, Scheme)]
N_SAMPLES = 60


@pytest.fixture(params=PROFILES)
def profile(request) -> Profile:
    return request.param


@pytest.fixture(params=SCHEMES)
def scheme(request) -> Scheme:
    return request.param


def fitting_length(profile: Profile) -> int:
    """The length of a run that the profile fits."""
    lengths = (3000, 1000) if profile.unit != "blocks" else count(1)
    return next(length for length in lengths if fits(profile, length))


def fits(profile: Profile, length: int) -> bool:
    try:
        profile.cumulative(0, length)
    except OptionError:
        return False
    return True


# Every profile.


@pytest.mark.parametrize("cls", CLASSES)
def test_every_class_gives_examples_of_itself(cls):
    assert cls.__doc__ and cls.examples
    assert all(type(parse(text)) is cls for text in cls.examples)


def test_the_share_rises_from_0_to_1(profile):
    length = fitting_length(profile)
    t = np.linspace(0, length, 3001)
    share = profile.cumulative(t, length)
    assert share.dtype == np.float64
    assert share.shape == t.shape
    assert share[0] == 0
    assert share[-1] == 1
    assert profile.signed or np.all(np.diff(share) >= -1e-15)
    each = [profile.cumulative(at, length) for at in t[::100]]
    np.testing.assert_allclose(share[::100], each, rtol=0, atol=1e-15)


def test_weights_of_coarse_blocks_add_up_the_fine_ones(profile):
    length = fitting_length(profile)
    fine = profile.weights(np.arange(length + 1))
    assert profile.signed or np.all(fine >= 0)
    assert fine.sum() == pytest.approx(1, abs=1e-12)
    edges = np.unique([0, length // 300, length // 3, length - 1, length])
    coarse = np.add.reduceat(fine, edges[:-1])
    np.testing.assert_allclose(profile.weights(edges), coarse, rtol=0, atol=1e-12)


def test_text_and_python_give_the_profile_back(profile):
    assert parse(str(profile)) == profile
    assert str(parse(str(profile))) == str(profile)
    assert str(profile).split(":")[0] == profile.name
    names = {cls.__name__: cls for cls in CLASSES}
    assert eval(repr(profile), names) == profile


def test_profiles_are_values(profile):
    again = parse(str(profile))
    assert again is not profile
    assert len({profile, again}) == 1
    copied = pickle.loads(pickle.dumps(profile))
    assert copied == profile
    assert copied.unit == profile.unit
    with pytest.raises(AttributeError):
        profile.unit = "steps"


@pytest.mark.parametrize("cls", CLASSES)
def test_candidates_are_of_their_class_and_can_be_written_down(cls):
    for steps in (1, 7, 2000, 10**7):
        candidates = cls.candidates(steps)
        assert {type(candidate) for candidate in candidates} <= {cls}
        assert [parse(str(candidate)) for candidate in candidates] == list(candidates)


@pytest.fixture
def run(profile, tmp_path):
    """Checkpoints of a run that the profile fits: of steps 1000, 2000, … each holding the square of its number."""
    n = fitting_length(profile) if profile.unit == "blocks" else 3
    for k in range(1, n + 1):
        weight = torch.full((1, 1), float(k * k), dtype=torch.float64)
        checkpoints.write(tmp_path / f"step-{1000 * k}.pt", {"weight": weight})
    return Trajectory.from_checkpoints(sorted(tmp_path.glob("*.pt")))


def test_a_trajectory_takes_it(profile, run, tmp_path):
    n = len(run.blocks)
    edges = 1000 * np.arange(n + 1) if profile.unit == "steps" else np.arange(n + 1)
    expected = profile.weights(edges) @ np.arange(1.0, n + 1) ** 2
    explained = run.explain(str(profile))
    np.testing.assert_allclose(explained.coefficients, profile.weights(edges), rtol=0, atol=1e-12)
    assert str(profile) in str(explained)
    assert run.average(profile)["weight"].item() == pytest.approx(expected, rel=1e-12)
    run.write(str(profile), tmp_path / "average.pt")
    written = torch.load(tmp_path / "average.pt", weights_only=True)
    assert written["weight"].item() == pytest.approx(expected, rel=1e-12)


def test_select_tries_it(profile, run):
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    # The score is lowest at the very average.
    target = run.average(profile)["weight"]
    choice = polyak.select(
        run,
        model,
        score=lambda m: (m.weight - target).abs().item(),
        mode="min",
        profiles=[str(profile)],
        progress=False,
    )
    assert str(profile) in {candidate.name for candidate in choice.table}
    assert choice.best.score == 0


# Every scheme.


def followed(coefficients) -> np.ndarray:
    """The weight of each sample in ``m += c_n (w_n - m)``: sample n is the n-th unit vector."""
    samples = np.eye(len(coefficients))
    mean = np.zeros(len(coefficients))
    for coefficient, sample in zip(coefficients, samples, strict=True):
        mean += coefficient * (sample - mean)
    return mean


def edges_at_gap(scheme: Scheme, gap: float) -> np.ndarray:
    return np.arange(N_SAMPLES + 1.0) * (gap if scheme.unit == "steps" else 1)


def rounding(scheme: Scheme) -> float:
    """What a coefficient may be off by, absolutely: one that follows from the share is a difference from 1."""
    return 1e-15 if type(scheme).coefficient_between is Scheme.coefficient_between else 0.0


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


def test_the_gap_is_without_effect_where_the_unit_is_samples(scheme):
    if scheme.unit == "samples":
        assert scheme.coefficient(5, gap=10) == scheme.coefficient(5, gap=1)


@pytest.mark.parametrize(("n", "gap"), [(0, 1), (-3, 1), (1, 0), (1, -2)])
def test_positions_before_the_first_sample_are_refused(scheme, n, gap):
    with pytest.raises(OptionError, match="from 1"):
        scheme.coefficient(n, gap)


@settings(deadline=None, max_examples=20)
@given(points=st.lists(st.integers(1, 10**6), min_size=3, max_size=3))
@pytest.mark.parametrize("scheme", SCHEMES)
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
        assert math.isclose(got.item(), float(expected), rel_tol=1e-15, abs_tol=rounding(scheme))


@pytest.mark.parametrize("gap", [1, 5, 400])
def test_a_coefficient_is_what_the_older_samples_do_not_keep(scheme, gap):
    gap = gap if scheme.unit == "steps" else 1
    for before in (0, 3, 1000):
        kept = scheme.cumulative(before, before + gap)
        assert scheme.coefficient_between(before, before + gap) == pytest.approx(1 - kept, abs=1e-12)


def test_arrays_are_taken_elementwise(scheme):
    now = np.arange(1.0, 9.0)
    each = [float(scheme.coefficient_between(n - 1, n)) for n in now]
    got = scheme.coefficient_between(now - 1, now)
    np.testing.assert_allclose(got, each, rtol=1e-15, atol=rounding(scheme))


def test_tensors_are_not_read_back(scheme):
    # A meta tensor has no value: reading one raises.
    before, now = (torch.empty((), dtype=torch.float64, device="meta") for _ in range(2))
    assert scheme.coefficient_between(before, now, xp=torch).is_meta


def test_one_that_looks_back_farther_is_of_its_class(scheme):
    for factor in (2.0, 2.0**10):
        longer = scheme.longer(factor)
        if longer is not None:
            assert type(longer) is type(scheme)
            assert parse(str(longer)) == longer
            # Less of the weight of a long run lies on its last steps.
            assert longer.cumulative(990, 1000) >= scheme.cumulative(990, 1000) - 1e-3


def test_an_average_follows_it_and_resumes(scheme):
    def averaged(text, state=None, steps=range(9)):
        model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
        average = polyak.Average(model, text, every=2)
        if state is not None:
            average.load_state_dict(state)
        for step in steps:
            nn.init.constant_(model.weight, step**2)
            average.update()
        return average

    whole = averaged(str(scheme), steps=range(20))
    half = averaged(scheme, steps=range(9))
    assert half.state_dict()["scheme"] == str(scheme)
    resumed = averaged(str(scheme), half.state_dict(), steps=range(9, 20))
    assert torch.equal(whole.named_tensors()["weight"], resumed.named_tensors()["weight"])
    weights = scheme.weights(2 * np.arange(11) if scheme.unit == "steps" else np.arange(11))
    expected = weights @ np.arange(1, 20, 2) ** 2.0
    assert whole.named_tensors()["weight"].item() == pytest.approx(expected, rel=1e-9)


# Long runs, in which a difference from 1 would be too coarse.


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
