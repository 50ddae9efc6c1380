"""The laws of other tools' EMAs: against what they say, written plainly, and against the tools themselves."""

from itertools import accumulate

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import polyak
from peers import timm_model_ema
from polyak import EMA, Power, WarmupEMA
from polyak.errors import OptionError
from polyak.profiles import decay_at_batch_size

# The n-th sample's decay as each tool computes it, from 1; the first is copied.


def law_of_num_updates(n, decay=0.9999, min_decay=0.0):
    return np.where(n > 1, np.clip(n / (n + 9), min_decay, decay), 0)


def law_of_inv_gamma(n, decay, power, inv_gamma=1.0, min_decay=0.0):
    return np.where(n > 1, np.clip(1 - (1 + (n - 1) / inv_gamma) ** -power, min_decay, decay), 0)


CASES = [
    (WarmupEMA(decay=0.9999), lambda n: law_of_num_updates(n)),
    (WarmupEMA(decay=1), lambda n: law_of_num_updates(n, decay=1)),
    (WarmupEMA(decay=0.3, min_decay=0.2), lambda n: law_of_num_updates(n, 0.3, 0.2)),
    (WarmupEMA(decay=0.9999, power=2 / 3), lambda n: law_of_inv_gamma(n, 0.9999, 2 / 3)),
    (WarmupEMA(decay=0.9999, power=3 / 4), lambda n: law_of_inv_gamma(n, 0.9999, 3 / 4)),
    (WarmupEMA(decay=1, power=2 / 3), lambda n: law_of_inv_gamma(n, 1, 2 / 3)),
    (
        WarmupEMA(decay=0.99999, power=2, inv_gamma=1000, min_decay=0.5),
        lambda n: law_of_inv_gamma(n, 0.99999, 2, 1000, 0.5),
    ),
    (WarmupEMA(decay=0), lambda n: 0.0 * n),
]


@pytest.mark.parametrize(("scheme", "law"), CASES)
def test_coefficients_are_the_laws(scheme, law):
    n = np.array([1, 2, 3, 10, 500, 4096, 4097, 10**6])
    got = [scheme.coefficient(int(k)) for k in n]
    np.testing.assert_allclose(got, 1 - law(n.astype(np.longdouble)), rtol=1e-11)


@pytest.mark.parametrize(("scheme", "law"), CASES)
@pytest.mark.parametrize("total", [7, 4096, 10**6])
def test_shares_are_the_product_of_the_decays(scheme, law, total):
    decays = law(np.arange(1.0, total + 1))
    exact = np.cumprod(decays[::-1], dtype=np.longdouble)[::-1][1:]  # F(n, total) for n = 1 … total - 1
    at = np.unique(
        np.concatenate([np.geomspace(1, total - 1, 40), total - np.geomspace(1, total - 1, 40)])
    ).astype(int)
    np.testing.assert_allclose(
        scheme.cumulative(at, total), exact[at - 1].astype(float), rtol=1e-11, atol=1e-300
    )


@settings(deadline=None, max_examples=50)
@given(
    decay=st.floats(0.5, 1),
    power=st.floats(0.2, 5),
    inv_gamma=st.floats(0.01, 1e3),
    min_decay=st.floats(0, 0.5),
    total=st.integers(2, 20_000),
)
def test_weights_of_any_law_are_those_of_its_recurrence(decay, power, inv_gamma, min_decay, total):
    scheme = WarmupEMA(decay=decay, power=power, inv_gamma=inv_gamma, min_decay=min_decay)
    decays = law_of_inv_gamma(
        np.arange(1, total + 1, dtype=np.longdouble), decay, power, inv_gamma, min_decay
    )
    later = np.append(np.cumprod(decays[::-1])[::-1][1:], 1)
    expected = ((1 - decays) * later).astype(float)
    np.testing.assert_allclose(scheme.weights(np.arange(total + 1)), expected, rtol=0, atol=1e-11)


def test_between_two_samples_the_share_is_interpolated_geometrically():
    scheme = WarmupEMA(decay=0.99, power=0.75)
    before, after = scheme.cumulative([6, 7], 20)
    assert scheme.cumulative(6.25, 20) == pytest.approx(before**0.75 * after**0.25, rel=1e-14)
    assert scheme.cumulative(6, 20.5) == pytest.approx(before * scheme.cumulative(20, 20.5), rel=1e-14)
    assert scheme.cumulative(20, 20.5) == pytest.approx(scheme.cumulative(20, 21) ** 0.5, rel=1e-14)
    first = scheme.cumulative(1, 20)
    np.testing.assert_allclose(scheme.cumulative([0, 0.25, 0.5], 20), [0, first / 4, first / 2], rtol=1e-14)
    assert scheme.cumulative(0.25, 0.5) == 0.5


@pytest.mark.parametrize("text", ["ema:decay=0", "ema:decay=0,debias=false", "warmup-ema:decay=0"])
def test_decay_0_keeps_the_newest_sample_alone(text):
    scheme = polyak.parse(text)
    assert [scheme.coefficient(n) for n in (1, 2, 10**9)] == [1, 1, 1]
    assert scheme.weights([0, 1, 10**9, 10**9 + 1]).tolist() == [0, 0, 1]
    model = nn.Linear(1, 1)
    average = polyak.Average(model, scheme)
    for value in (1.0, 2.0, 7.0):
        nn.init.constant_(model.weight, value)
        average.update()
    assert average.named_tensors()["weight"].item() == 7


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WarmupEMA(decay=1.1), r"decay must be a number in \[0, 1\], got 1.1"),
        (lambda: WarmupEMA(decay=0.9, power=0), r"power must be a number in \(0, inf\), got 0"),
        (lambda: WarmupEMA(decay=0.9, power=1, inv_gamma=0), r"inv_gamma must be .*, got 0"),
        (lambda: WarmupEMA(decay=0.9, inv_gamma=2), "inv_gamma belongs to the law with a power: give both"),
        (
            lambda: WarmupEMA(decay=0.9, min_decay=0.95),
            "min_decay must be at most decay, which is 0.9, got 0.95",
        ),
        (lambda: WarmupEMA(decay=1, min_decay=1), r"min_decay must be a number in \[0, 1\), got 1"),
        (
            lambda: Power(half_life_fraction=0),
            r"half_life_fraction must be a number in \(0, 0.69\d*\], got 0",
        ),
        (lambda: Power(half_life_fraction=0.7), "got 0.7"),
        (lambda: decay_at_batch_size(1.5, 8, 4), r"decay must be a number in \[0, 1\], got 1.5"),
        (lambda: decay_at_batch_size(0.9, 0, 4), r"batch_size must be a number in \(0, inf\), got 0"),
        (lambda: decay_at_batch_size(0.9, 4, -1), r"reference must be a number in \(0, inf\), got -1"),
    ],
)
def test_values_out_of_range_are_refused(make, message):
    with pytest.raises(OptionError, match=message):
        make()


def test_a_half_life_as_a_share_of_the_run_is_torchtitans_law():
    fraction, total = 0.05, 5000
    mean = np.zeros(total)
    mean[0] = 1
    for t in range(2, total + 1):
        mean *= 2 ** (-1 / (fraction * t))
        mean[t - 1] += 1 - 2 ** (-1 / (fraction * t))
    power = Power(half_life_fraction=fraction)
    assert power.exponent == np.log(2) / fraction
    weights = power.weights(np.arange(total + 1))
    np.testing.assert_allclose(weights, mean, rtol=0, atol=2e-5)
    assert 0.5 * np.abs(weights - mean).sum() < 2e-3
    # Half of it lies on the last 1 - e^-f of the run.
    assert power.cumulative(np.exp(-fraction) * total, total) == pytest.approx(0.5, rel=1e-12)


@given(decay=st.floats(0.5, 1), factor=st.integers(1, 20))
def test_a_decay_keeps_its_memory_in_examples_at_another_batch_size(decay, factor):
    scaled = decay_at_batch_size(decay, batch_size=32 * factor, reference=32)
    assert scaled == pytest.approx(list(accumulate([decay] * factor, float.__mul__))[-1], rel=1e-12)
    assert decay_at_batch_size(scaled, batch_size=32, reference=32 * factor) == pytest.approx(
        decay, rel=1e-12
    )


# The tools themselves, along one run in float64.


@pytest.fixture
def model():
    return nn.Linear(2, 3).double()


def follow(model, *updates, steps=60):
    """Calls each of ``updates`` after every change of the weights."""
    generator = torch.Generator().manual_seed(0)
    for step in range(1, steps + 1):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        for update in updates:
            update(step)


def assert_same(average, tensors, tolerance=1e-12):
    for own, theirs in zip(average.named_tensors().values(), tensors, strict=True):
        torch.testing.assert_close(own, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("options", "scheme"),
    [
        ({}, EMA(decay=0.97, debias=False)),
        ({"use_warmup": True}, WarmupEMA(decay=0.97, power=2 / 3)),
        (
            {"use_warmup": True, "warmup_gamma": 3.0, "warmup_power": 1.5, "min_decay": 0.4},
            WarmupEMA(decay=0.97, power=1.5, inv_gamma=3, min_decay=0.4),
        ),
    ],
)
def test_timm(model, options, scheme):
    theirs = timm_model_ema().ModelEmaV3(model, decay=0.97, **options)
    average = polyak.Average(model, scheme)
    follow(model, lambda step: (theirs.update(model, step=step), average.update()))
    assert_same(average, theirs.module.parameters())


def test_timm_that_starts_late(model):
    theirs = timm_model_ema().ModelEmaV3(model, decay=0.97, use_warmup=True, update_after_step=20)
    average = polyak.Average(model, WarmupEMA(decay=0.97, power=2 / 3), start=20)
    follow(model, lambda step: (theirs.update(model, step=step), average.update()))
    assert_same(average, theirs.module.parameters())


def test_ema_pytorch(model):
    from ema_pytorch import EMA as Theirs

    theirs = Theirs(model, beta=0.9, update_after_step=0, update_every=1)
    average = polyak.Average(model, WarmupEMA(decay=0.9, power=2 / 3))
    follow(model, lambda step: (theirs.update(), average.update()))
    assert_same(average, theirs.ema_model.parameters(), 1e-5)  # its decays are in fp32


def test_ema_pytorch_sampled_rarely(model):
    # Its decay is per sample, and its warm-up counts steps: ten of them shorten inv_gamma to a tenth.
    from ema_pytorch import EMA as Theirs

    theirs = Theirs(model, beta=0.9, update_after_step=20, update_every=10)
    scheme = WarmupEMA(decay=0.9, power=2 / 3, inv_gamma=1 / 10)
    average = polyak.Average(model, scheme, start=20 + 1 - 10, every=10)
    follow(model, lambda step: (theirs.update(), average.update()), steps=101)
    assert average.n_averaged == 9
    assert_same(average, theirs.ema_model.parameters(), 1e-5)  # its decays are in fp32


@pytest.mark.parametrize("use_num_updates", [True, False])
def test_torch_ema(model, use_num_updates):
    # It begins with the weights that the model has before training.
    shadow = [parameter.detach().clone() for parameter in model.parameters()]
    average = polyak.Average(
        model, WarmupEMA(decay=0.95) if use_num_updates else EMA(decay=0.95, debias=False)
    )
    average.update_now()

    def update(step):
        decay = min(0.95, (1 + step) / (10 + step)) if use_num_updates else 0.95
        for held, parameter in zip(shadow, model.parameters(), strict=True):
            held.sub_((held - parameter.detach()) * (1 - decay))

    follow(model, update, lambda step: average.update(), steps=300)
    assert_same(average, shadow)
