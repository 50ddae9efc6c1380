"""The profiles against plain formulas; their hyper-parameters."""

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyak import EMA, Blend, Decay, Polynomial, Power, Tail, Uniform, WarmupEMA, Weights, Window
from polyak.errors import OptionError
from polyak.profiles import registered
from profile_examples import ANY_PROFILE


@settings(deadline=None, max_examples=50)
@given(
    profile=ANY_PROFILE, total=st.integers(1, 10**7), parts=st.lists(st.floats(0, 1), min_size=2, max_size=9)
)
def test_cumulative_rises_for_any_hyper_parameters(profile, total, parts):
    averaged = profile.profile if isinstance(profile, Blend) else profile
    if isinstance(averaged, Weights):
        total = len(averaged.a)
    if isinstance(averaged, Window):
        total += averaged.start
    share = profile.cumulative(np.array([0.0, *sorted(parts), 1.0]) * total, total)
    assert share[0] == 0
    assert share[-1] == 1
    assert np.all(np.diff(share) >= -1e-12)


# The formulas of each class, written as plainly as they can be.


def test_uniform():
    np.testing.assert_allclose(Uniform().weights([0, 1, 5, 10]), [0.1, 0.4, 0.5])


@pytest.mark.parametrize(("ema", "beta"), [(EMA(decay=0.8), 0.8), (EMA(half_life=5), 2 ** (-1 / 5))])
def test_ema_weights_are_geometric(ema, beta):
    powers = beta ** np.arange(29, -1, -1)
    np.testing.assert_allclose(ema.weights(np.arange(31)), powers / powers.sum(), rtol=1e-12)


def test_ema_without_debias_is_torchs_recurrence():
    weights = np.zeros(30)
    weights[0] = 1
    for n in range(1, 30):
        weights *= 0.8
        weights[n] = 0.2
    np.testing.assert_allclose(EMA(decay=0.8, debias=False).weights(np.arange(31)), weights, rtol=1e-12)


@pytest.mark.parametrize("ema", [EMA(half_life=0.01), EMA(decay=1e-9), EMA(half_life=0.01, debias=False)])
def test_ema_does_not_overflow_in_a_long_run(ema):
    assert ema.weights([0, 10**9, 10**9 + 100]).tolist() == [0, 1]
    assert ema.coefficient(10**9, gap=100) == pytest.approx(1, abs=1e-8)


@pytest.mark.parametrize("gamma", [0, 1, 6.94, 16])
def test_power_is_a_power_and_has_its_width(gamma):
    power = Power(gamma=gamma)
    assert math.isclose(power.cumulative(30, 40), 0.75 ** (gamma + 1), rel_tol=1e-14)
    edges = np.arange(200_001)
    where, weights = (edges[1:] - 0.5) / edges[-1], power.weights(edges)
    mean = weights @ where
    width = math.sqrt(weights @ (where - mean) ** 2)
    assert width == pytest.approx(math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))), rel=1e-6)
    assert Power(sigma_rel=width).exponent == pytest.approx(gamma + 1, rel=1e-4)


@pytest.mark.parametrize("sigma_rel", [1e-6, 1e-3, 0.05, 0.1, 0.25, 0.2886])
def test_power_solves_for_the_width(sigma_rel):
    gamma = Power(sigma_rel=sigma_rel).exponent - 1
    width = math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))
    assert math.isclose(width, sigma_rel, rel_tol=1e-12)


def test_the_widest_power_is_uniform():
    assert Power(sigma_rel=0.2887).exponent == 1
    assert Power(sigma_rel=1 / math.sqrt(12)).exponent == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("eta", [0, 0.3, 2.5, 8, 200])
def test_polynomial_is_its_recurrence_in_a_long_run(eta):
    total = 1_000_000
    t = np.arange(1, total)
    # F(t, T) is the product of F(j, j+1) = j/(j+η+1) from t to T-1.
    shares = np.cumprod((t / (t + eta + 1))[::-1])[::-1]
    got = Polynomial(eta=eta).cumulative(t, total)
    np.testing.assert_allclose(got, shares, rtol=1e-10, atol=1e-300)


@pytest.mark.parametrize("eta", [0, 1, 8, 40])
@pytest.mark.parametrize(("t", "total"), [(1, 2), (3, 7), (10**6 - 1, 10**6), (10**8, 10**9), (2.5, 9.25)])
def test_polynomial_with_whole_eta_is_a_ratio_of_polynomials(eta, t, total):
    exact = math.prod((t + i) / (total + i) for i in range(eta + 1))
    assert math.isclose(Polynomial(eta=eta).cumulative(t, total), exact, rel_tol=1e-14 * (eta + 1))


def test_tail():
    assert Tail(0.4).weights(np.arange(6)).tolist() == pytest.approx([0, 0, 0, 0.5, 0.5])
    assert Tail(0.3).weights(np.arange(6)).tolist() == pytest.approx([0, 0, 0, 1 / 3, 2 / 3])
    assert Tail(steps=20).weights([0, 10, 20, 30]).tolist() == [0, 0.5, 0.5]
    assert Tail(steps=31).weights([0, 10, 20, 30]).tolist() == pytest.approx([1 / 3] * 3)
    assert (Tail(0.4).unit, Tail(steps=20).unit) == ("samples", "steps")


@pytest.mark.parametrize("profile", [Tail(0.55), Decay("linear", 0.55)])
def test_a_part_of_the_run_reaches_no_further_than_it_says(profile):
    # In floats 0.55 * 100 is a little more than 55.
    assert np.count_nonzero(profile.weights(np.arange(101))) == 55


def test_window():
    assert Window(10, 30).weights([0, 10, 20, 30, 40]).tolist() == [0, 0.5, 0.5, 0]
    assert Window(10, 99).weights([0, 10, 20, 40]).tolist() == pytest.approx([0, 1 / 3, 2 / 3])
    for start in (40, 50):
        with pytest.raises(OptionError, match=f"window:{start},60 lies outside the run, which has 40 steps"):
            Window(start, 60).weights([0, 40])


@pytest.mark.parametrize(
    ("shape", "w"),
    [
        ("linear", lambda x: 1 - x),
        ("sqrt", lambda x: math.sqrt(1 - x)),
        ("1-sqrt", lambda x: 1 - math.sqrt(x)),
        ("cosine", lambda x: (1 + math.cos(math.pi * x)) / 2),
    ],
)
def test_decay_shapes(shape, w):
    expected = [0, *(w(k / 40) - w((k + 1) / 40) for k in range(40))]
    edges = [0, *range(60, 101)]
    np.testing.assert_allclose(Decay(shape, 0.4).weights(edges), expected, atol=1e-14)
    np.testing.assert_allclose(Decay(w, 0.4).weights(edges), expected, atol=1e-14)


def test_decay_weighs_updates_as_the_learning_rate_would_have():
    updates = np.array([3.0, -1.0, 4.0, 1.0, -5.0])
    positions = np.cumsum(updates)
    average = Decay("linear", 1.0).weights(np.arange(6)) @ positions
    learning_rates = 1 - np.arange(5) / 5
    assert average == pytest.approx(learning_rates @ updates)


def test_what_a_decay_leaves_goes_to_the_newest():
    assert Decay(lambda x: 1 - x / 2, 1.0).weights([0, 1, 2]).tolist() == [0.25, 0.75]
    assert Decay(lambda x: 1.0, 0.5).weights([0, 99, 100]).tolist() == [0, 1]


def test_rounding_gives_no_negative_weight():
    def flat_but_for_rounding(x):
        return 1.0 if x == 0 else 0.5 + 1e-14 * math.sin(1e5 * x)

    decay = Decay(flat_but_for_rounding, 1.0)
    assert np.any(np.diff(decay.cumulative(np.arange(101), 100)) < 0)
    assert np.all(decay.weights(np.arange(101)) >= 0)


def test_weights():
    assert Weights([2, 0, 6]).weights([0, 1, 2, 3]).tolist() == [0.25, 0, 0.75]
    assert Weights(np.float32([2, 6])).cumulative([0.5, 1.5], 2).tolist() == [0.125, 0.625]
    assert Weights([-1, 3]).weights([0, 1, 2]).tolist() == [-0.5, 1.5]
    with pytest.raises(OptionError, match="one weight for each of 3 blocks or inputs, got 2"):
        Weights([1, 2]).weights([0, 1, 2, 3])


def test_the_first_sample_of_a_warm_up_counts_from_0_in_a_straight_line():
    for total in (0.5, 1.0):
        assert WarmupEMA(decay=0.9).cumulative([0.1, 0.25], total).tolist() == pytest.approx(
            [0.1 / total, 0.25 / total]
        )


@pytest.mark.parametrize(
    ("scheme", "longer"),
    [
        (EMA(half_life=30), EMA(half_life=120)),
        (EMA(decay=0.96), EMA(decay=0.99)),
        (Power(gamma=6), Power(gamma=1.5)),
        (Power(sigma_rel=0.05), Power(sigma_rel=0.2)),
        (Power(sigma_rel=0.2), Power(sigma_rel=0.2887)),
        (Power(half_life_fraction=0.05), Power(half_life_fraction=0.2)),
        (Power(half_life_fraction=0.5), Power(half_life_fraction=math.log(2))),
        (Polynomial(eta=6), Polynomial(eta=1.5)),
        (WarmupEMA(decay=0.96), WarmupEMA(decay=0.99)),
        (WarmupEMA(decay=1), None),
        (Uniform(), None),
    ],
)
def test_schemes_that_look_back_four_times_as_far(scheme, longer):
    assert scheme.longer(4) == longer


# Hyper-parameters and arguments.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EMA(), "EMA takes either half_life or decay, got neither"),
        (lambda: EMA(half_life=1, decay=0.5), "EMA takes either half_life or decay, got both"),
        (lambda: EMA(decay=1), r"decay must be a number in \[0, 1\), got 1"),
        (lambda: EMA(decay=-0.1), r"got -0.1"),
        (lambda: EMA(decay="0.9"), r"got '0.9'"),
        (lambda: EMA(half_life=0), r"half_life must be a number in \(0, inf\), got 0"),
        (lambda: EMA(half_life=math.inf), "got inf"),
        (lambda: EMA(half_life=10**400), "got 1000"),
        (lambda: EMA(decay=0.9, debias="false"), "debias must be True or False, got 'false'"),
        (lambda: Power(), "got neither"),
        (lambda: Power(gamma=1, sigma_rel=0.1), "got both"),
        (lambda: Power(gamma=-0.1), r"gamma must be a number in \[0, inf\), got -0.1"),
        (lambda: Power(sigma_rel=0.2888), r"sigma_rel must be a number in \(0, 0.2887\], got 0.2888"),
        (lambda: Power(sigma_rel=0), "got 0"),
        (lambda: Polynomial(eta=-1), r"eta must be a number in \[0, inf\), got -1"),
        (lambda: Polynomial(eta=math.nan), "got nan"),
        (lambda: Tail(), "Tail takes either fraction or steps, got neither"),
        (lambda: Tail(0.5, steps=5), "got both"),
        (lambda: Tail(1.1), r"fraction must be a number in \(0, 1\], got 1.1"),
        (lambda: Tail(2), r"fraction must be .*, got 2: .*--last 2, or last=2 .* tail:steps=2$"),
        (lambda: Tail(1e9), r"fraction must be a number in \(0, 1\], got 1000000000.0$"),
        (lambda: Tail(steps=0), r"steps must be a whole number in \[1, inf\), got 0"),
        (lambda: Tail(steps=1.5), "steps must be a whole number in .*, got 1.5"),
        (lambda: Window(-1, 5), "start must be"),
        (lambda: Window(5, 5), r"stop must be a whole number in \(5, inf\), got 5"),
        (lambda: Decay("sqt", 0.5), "unknown decay shape 'sqt': did you mean 'sqrt'"),
        (lambda: Decay(["sqrt"], 0.5), "unknown decay shape"),
        (lambda: Decay("sqrt", 0), "fraction must be"),
        (lambda: Decay(lambda x: x, 0.5), "be 1 at x = 0, not 0.0"),
        (lambda: Decay(lambda x: 1 - x + 3 * (x > 0.5), 0.5), "never increase"),
        (lambda: Decay(lambda x: 1 - 2 * x, 0.5), r"stay in \[0, 1\], not end at -1.0"),
        (lambda: Decay(lambda x: -math.inf if x > 0.5 else 1, 0.5), "be finite"),
        (lambda: Weights([]), "got 0 that sum to 0"),
        (lambda: Weights([1, -1]), "finite and not zero, got 2 that sum to 0"),
        (lambda: Weights([0.1, 0.2, -0.3]), "finite and not zero"),
        (lambda: Weights([1e308, 1e308]), "sum to inf"),
        (lambda: Weights([1, math.nan]), "a weight must be a number in .*got nan"),
    ],
)
def test_hyper_parameters_out_of_range_are_refused(make, message):
    with pytest.raises(OptionError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EMA(0.999), r"EMA\(0.999\) does not .*: EMA\(half_life=0.999\) or EMA\(decay=0.999\)$"),
        (lambda: EMA(2000), r"meant: EMA\(half_life=2000\)$"),
        (lambda: Power(0.1), r"Power\(gamma=0.1\) or Power\(sigma_rel=0.1\) or Power\(half_"),
        (lambda: Polynomial(8), r"Polynomial\(8\) does not .*: Polynomial\(eta=8\)$"),
        (lambda: EMA("fast"), "positional argument"),
        (lambda: EMA(1, 2, 3), "positional argument"),
        (lambda: Tail(0.4, 200), "positional argument"),
        (lambda: Uniform(3), "positional argument"),
        (lambda: Uniform(start=3), "unexpected keyword argument 'start'"),
    ],
)
def test_unknown_and_unnamed_hyper_parameters_are_type_errors(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_the_gap_matters_exactly_where_the_unit_is_steps_and_there_is_a_scale():
    for scheme in (EMA(half_life=20), EMA(half_life=20, debias=False)):
        assert scheme.coefficient(5, gap=10) != scheme.coefficient(5, gap=1)
    for scheme in (Power(gamma=2), Uniform(), Polynomial(eta=2), EMA(decay=0.9)):
        assert scheme.coefficient(5, gap=10) == scheme.coefficient(5, gap=1)


@pytest.mark.parametrize(
    "edges", [5, [0], [1, 2], [0, 2, 2], [0, 3, 2], [[0, 1]], [0, math.nan], [0, 1, math.inf]]
)
def test_edges_that_do_not_rise_from_0_are_refused(edges):
    with pytest.raises(OptionError, match=r"edges must|total must"):
        Uniform().weights(edges)


def test_positions_outside_the_run_are_refused():
    for t in (-1, 11, [3, math.nan]):
        with pytest.raises(OptionError, match=r"t must lie in \[0, 10\], the run"):
            Uniform().cumulative(t, 10)
    for total in (0, -1, math.inf, math.nan, "10"):
        with pytest.raises(OptionError, match="total must be"):
            Uniform().cumulative(0, total)


def test_profiles_are_values():
    assert EMA(half_life=2000) == EMA(half_life=2000.0) == EMA(half_life=np.float32(2000))
    assert EMA(half_life=2000) != EMA(decay=0.999)
    assert len({Tail(0.4), Tail(0.4), Tail(steps=4), Weights([1, 2]), Weights(np.array([1, 2]))}) == 3
    with pytest.raises(AttributeError):
        Tail(0.4).fraction = 0.5


def test_decays_alone_stand_in_for_a_decay_and_weights_alone_are_signed():
    ours = [cls for cls in registered().values() if cls.__module__ == Decay.__module__]
    assert [cls for cls in ours if cls.replaces_decay] == [Decay]
    assert [cls for cls in ours if cls.signed] == [Weights]


def test_profiles_need_neither_torch_nor_scipy():
    code = "import sys, polyak.profiles; sys.exit(bool({'torch', 'scipy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
