"""The running mean against float64, in every scheme, dtype and path."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from devices import DEVICES, as_if_on
from polyak._batches import with_sources
from polyak._mean import Accumulator, mean_dtype
from polyak._offload import Offload
from polyak.errors import NonFiniteError, OptionError
from polyak.profiles import EMA, Polynomial, Power, Uniform

SCHEMES = {
    "uniform": (Uniform(), oracles.uniform),
    "half-life": (EMA(half_life=30), oracles.ema_half_life(30)),
    "decay": (EMA(decay=0.95), oracles.ema_decay(0.95)),
    "first-copied": (EMA(decay=0.9, debias=False), oracles.ema_first_copied(0.9)),
    "power": (Power(gamma=3), oracles.power(3)),
    "polynomial": (Polynomial(eta=2), oracles.polynomial(2)),
}
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}
# Sizes on both sides of what makes a batch: many small tensors, one that is cut, one that is strided.
SHAPES = [(3,), (2, 5), (), (2049, 9), (0,), (7, 1), (300, 200)]


def samples_of(shapes, dtype, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    start = [torch.randn(s, generator=generator) for s in shapes]
    return [
        [(w + 0.1 * torch.randn(w.shape, generator=generator)).to(dtype) for w in start] for _ in range(n)
    ]


def accumulated(samples, scheme, gap=1, device="host", **options):
    with as_if_on(device):
        mean = Accumulator(samples[0], [str(i) for i in range(len(samples[0]))], scheme, **options)
        for n, sample in enumerate(samples, start=1):
            mean.add(sample, n * gap)
    return mean


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("gap", [1, 7])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_means_equal_the_float64_oracle(scheme, dtype, gap, device):
    law, oracle = SCHEMES[scheme]
    samples = samples_of(SHAPES, dtype, 40)
    mean = accumulated(samples, law, gap, device)
    for i, value in enumerate(mean.means):
        assert value.dtype == mean_dtype(dtype)
        expected = oracles.mean_of([s[i] for s in samples], oracle(40, gap))
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=TOLERANCE[dtype])
    assert mean.n_averaged == 40 and mean.position == 40 * gap


@pytest.mark.parametrize(
    "options", [{"check_finite": False}, {"compensated": True}, {"dtype": torch.float64}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_option_gives_the_same_mean(dtype, options):
    samples = samples_of(SHAPES, dtype, 25)
    mean = accumulated(samples, EMA(decay=0.9), **options)
    for i, value in enumerate(mean.means):
        expected = oracles.mean_of([s[i] for s in samples], oracles.ema_decay(0.9)(25))
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "expanded-stride"])
def test_strided_weights_are_averaged_in_their_own_layout(layout):
    def laid_out(w):
        if layout == "channels_last":
            return w.to(memory_format=torch.channels_last)
        return w.transpose(0, 3) if layout == "transposed" else torch.cat([w, w], dim=3)[..., ::2]

    samples = [[laid_out(s[0])] for s in samples_of([(40, 30, 12, 14)], torch.float32, 6)]
    mean = accumulated(samples, Uniform())
    expected = oracles.mean_of([s[0] for s in samples], oracles.uniform(6))
    torch.testing.assert_close(mean.means[0].double(), expected, rtol=0, atol=1e-6)


def test_complex_weights_are_averaged():
    samples = [[torch.randn(5, dtype=torch.complex64)] for _ in range(9)]
    mean = accumulated(samples, Uniform())
    torch.testing.assert_close(mean.means[0], torch.stack([s[0] for s in samples]).mean(0))
    mean.add([torch.full((5,), complex(float("nan"), 1))], 10)
    assert mean.n_skipped == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_identical_samples_come_back_bit_for_bit(dtype, compensated, device):
    sample = samples_of(SHAPES, dtype, 1)[0]
    for scheme, _ in SCHEMES.values():
        mean = accumulated([sample] * 30, scheme, compensated=compensated, device=device)
        for value, weight in zip(mean.means, sample, strict=True):
            assert torch.equal(value, weight.to(value.dtype))


def test_bf16_model_with_a_slow_ema_does_not_stall():
    """torch, diffusers, ema-pytorch and torch_ema move by 2 to 5% of the way here."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(200, generator=generator).bfloat16()
    target = w + 1
    samples = [[w + (target - w) * min(1.0, n / 500)] for n in range(2000)]
    mean = accumulated(samples, EMA(decay=0.999))
    expected = oracles.mean_of([s[0] for s in samples], oracles.ema_decay(0.999)(2000))
    assert oracles.relative_error(mean.means[0], expected, target.double() - w.double()) <= 1e-3


@pytest.mark.parametrize("n", [30_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_a_long_uniform_mean_keeps_its_precision_when_compensated(n):
    """Plain fp32 is off by 0.38 of the movement after a million samples."""
    start, movement = 1.0, 0.01
    weight = torch.full((1,), start)
    mean = Accumulator([weight], ["w"], Uniform(), compensated=True, check_finite=False)
    values = (start + movement * np.arange(n) / n).astype(np.float32)
    for value in values.tolist():
        mean.add([weight.fill_(value)])
    error = abs(float(mean.means[0]) - values.astype(np.float64).mean())
    assert error <= 1e-3 * movement


def test_a_stalling_mean_is_said_once():
    weight = torch.ones(1)
    mean = Accumulator([weight], ["w"], Uniform())
    mean.restart(n_averaged=10_000_000)
    with pytest.warns(UserWarning, match="compensated=True"):
        mean.add([weight])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mean.add([weight])
        fine = Accumulator([weight], ["w"], Uniform(), compensated=True)
        fine.restart(n_averaged=10_000_000)
        fine.add([weight])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("step", "stalls"), [(0.063, False), (0.062, True)])
def test_a_mean_stalls_below_64_eps(step, stalls, device):
    samples = [[torch.ones(1)]] * 2
    law = EMA(decay=1 - step, debias=False)  # eps of half precision is 2^-10
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        accumulated(samples, law, device=device, dtype=torch.float16)
    assert [str(one.message).startswith("the average takes in") for one in said] == [True] * stalls


@pytest.mark.parametrize("device", DEVICES)
def test_whether_a_mean_stalls_is_told_by_the_steps_between_samples(device):
    law = EMA(half_life=70, debias=False)  # takes in 6.7% every 7 steps, and 1% every step
    accumulated([[torch.ones(1)]] * 3, law, 7, device, dtype=torch.float16)
    with pytest.warns(UserWarning, match="takes in 9.9e-03 of each new sample"):
        accumulated([[torch.ones(1)]] * 3, law, 1, device, dtype=torch.float16)


def test_weights_on_the_host_are_copied_nowhere_on_their_way():
    offload = Offload()
    mean = Accumulator([torch.ones(2)], ["w"], Uniform(), offload=offload)
    mean.add([torch.ones(2)])
    assert not offload._staging


BAD = [float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("where", [0, 3, -1])
@pytest.mark.parametrize("at", [1, 2, 17])
def test_a_non_finite_sample_is_left_out(at, where, bad, device):
    samples = samples_of(SHAPES, torch.float32, 30)
    good = samples[: at - 1] + samples[at:]
    samples[at - 1] = [w.clone() for w in samples[at - 1]]
    samples[at - 1][where].view(-1)[-1] = bad
    mean = accumulated(samples, Uniform(), device=device)
    assert (mean.n_averaged, mean.n_skipped) == (29, 1)
    for i, value in enumerate(mean.means):
        expected = oracles.mean_of([s[i] for s in good], oracles.uniform(29))
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("fill", [0.0, 0.7])
def test_after_the_means_were_read_a_non_finite_sample_changes_no_bit(fill):
    samples = samples_of([(50,), (50,)], torch.float32, 3)
    mean = accumulated([[one, other.double()] for one, other in samples], Uniform())
    before = [value.clone() for value in mean.means]
    mean.add([torch.full((50,), fill), torch.full((50,), float("nan"), dtype=torch.float64)])
    assert mean.n_skipped == 1 and all(map(torch.equal, mean.memory, before))


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_weights_far_larger_than_last_time_are_folded_in_when_all_were_seen(at, compensated):
    scales = [1e-3 if place == at else 1.0 for place in range(3)]
    drawn = samples_of([(100_000,)] * 3, torch.float32, 4)
    samples = [[tensor * scale for tensor, scale in zip(one, scales, strict=True)] for one in drawn]
    mean = accumulated(samples[:3], Uniform(), compensated=compensated)
    before = [value.clone() for value in mean.memory]
    samples[3][at] *= 100
    samples[3][at - 1][-1] = float("nan")
    mean.add(samples[3])
    assert mean.n_skipped == 1 and torch.equal(mean.memory[at], before[at])
    torch.testing.assert_close(mean.memory, before, rtol=0, atol=1e-6)


def test_a_skipped_sample_lengthens_the_step_of_the_next():
    weight = torch.zeros(1)
    mean = Accumulator([weight], ["w"], EMA(half_life=1))
    for step, value in enumerate([1.0, float("nan"), 3.0], start=1):
        mean.add([weight.fill_(value)], step)
    # The third sample stands for steps 2 and 3: weights 2^1 + 2^2 against 2^0.
    assert float(mean.means[0]) == pytest.approx((1 * 1 + 3 * 6) / 7)


def test_large_sums_that_overflow_are_not_taken_for_infinities():
    weight = torch.full((1000,), 3e38)
    mean = accumulated([[weight]] * 3, Uniform())
    assert mean.n_averaged == 3 and torch.equal(mean.means[0], weight)


@pytest.mark.parametrize("device", DEVICES)
def test_raise_names_the_tensor_and_leaves_the_mean(device):
    good, bad = torch.ones(2), torch.tensor([1.0, float("nan")])
    with as_if_on(device):
        mean = Accumulator([good, good], ["a", "b"], Uniform(), check_finite="raise")
        mean.add([good, good])
        with pytest.raises(NonFiniteError, match="'b' holds a NaN"):
            mean.add([good * 2, bad])
    assert mean.n_averaged == 1 and torch.equal(mean.means[0], good)


def test_unchecked_means_take_what_they_are_given():
    mean = accumulated([[torch.ones(1)], [torch.full((1,), float("nan"))]], Uniform(), check_finite=False)
    assert mean.n_averaged == 2 and mean.means[0].isnan()


@pytest.mark.parametrize(
    "options", [{"check_finite": "maybe"}, {"check_finite": 1.5}, {"dtype": torch.int64}]
)
def test_bad_options_are_refused(options):
    with pytest.raises(OptionError, match=next(iter(options))):
        Accumulator([torch.ones(1)], ["w"], Uniform(), **options)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=30),
    st.sampled_from(sorted(SCHEMES)),
    st.integers(1, 50),
)
def test_the_mean_lies_in_the_hull(values, scheme, gap):
    mean = accumulated([[torch.tensor([v])] for v in values], SCHEMES[scheme][0], gap)
    slack = 1e-6 * max(map(abs, values))
    assert min(values) - slack <= float(mean.means[0]) <= max(values) + slack


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-10, 10, width=32), min_size=2, max_size=20), st.randoms())
def test_a_uniform_mean_does_not_depend_on_the_order(values, random):
    shuffled = random.sample(values, len(values))
    one, other = (
        accumulated([[torch.tensor([v])] for v in vs], Uniform()).means[0] for vs in (values, shuffled)
    )
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-10, 10, width=32), min_size=2, max_size=20), st.data())
def test_parts_pooled_by_counts_are_the_whole(values, data):
    cut = data.draw(st.integers(1, len(values) - 1))
    samples = [[torch.tensor([v])] for v in values]
    first, second, whole = (
        float(accumulated(s, Uniform()).means[0]) for s in (samples[:cut], samples[cut:], samples)
    )
    pooled = (cut * first + (len(values) - cut) * second) / len(values)
    assert pooled == pytest.approx(whole, abs=1e-5)


@pytest.mark.parametrize("options", [{}, {"compensated": True}, {"dtype": torch.float64}], ids=str)
def test_weights_in_another_memory_order_are_folded_in_pieces_that_need_no_copy(options):
    """aminmax copies what is not contiguous: channels-last weights took eight times as long to check."""
    conv = torch.randn(300, 500, 3, 3).to(memory_format=torch.channels_last)
    samples = [[conv * n, torch.randn(700, 2000).t() * n] for n in (1.0, 2.0)]
    mean = accumulated(samples, Uniform(), **options)
    assert len(mean._batches) > 1
    for batch in mean._batches:
        assert all(part.is_contiguous() for part in [*batch.means, *batch.parts(samples[0])])
    for one, first, second in zip(mean.means, *samples, strict=True):
        assert one.stride() == first.stride()
        torch.testing.assert_close(one, ((first.double() + second.double()) / 2).to(one.dtype))


def test_a_tensor_that_is_not_dense_and_one_that_changes_its_memory_order_are_averaged():
    weight = torch.randn(700, 4000)
    mean = accumulated([[weight[:, ::2]], [weight[:, ::2].t().contiguous().t()]], Uniform())
    assert torch.equal(mean.means[0], weight[:, ::2])


@pytest.mark.parametrize("compensated", [False, True])
def test_means_follow_into_another_memory_order(compensated):
    """So that a resumed mean, which has the order of its model, is cut alike: a sample taken back agrees bitwise."""
    first, second, bad = (torch.randn(1200, 1500) for _ in range(3))
    bad[-1, -1] = float("nan")

    def turned(values):
        return values.t().contiguous().t()

    changed = accumulated([[first]], Uniform(), compensated=compensated)
    changed.bind([turned(second)])
    resumed = Accumulator([turned(second)], ["w"], Uniform(), compensated=compensated)
    resumed.bind([turned(second)])
    for one in (changed, resumed):
        assert one.means[0].stride() == (1, 1200)
    resumed.add([turned(first)])
    for sample in (turned(second), turned(bad), turned(first)):
        for one in (changed, resumed):
            one.add([sample])
    assert changed.n_skipped == resumed.n_skipped == 1
    assert torch.equal(changed.means[0], resumed.means[0])


@pytest.mark.parametrize("rows", [100, 4000])
def test_memory_of_an_update_is_two_percent_or_a_quarter_of_a_megabyte(rows):
    weights = [torch.randn(rows, 1000), torch.randn(1000)]
    mean = Accumulator([w.bfloat16() for w in weights], ["a", "b"], Uniform())
    largest = max(m.numel() for batch in mean._batches for m in batch.means)
    assert largest * 4 <= max(0.02 * sum(m.numel() * 4 for m in mean.means), 1 << 18)
    # All copies in the same place: pieces of many sizes that come and go would leave holes as large as they. That of
    # small tensors is another.
    copies = [s for _, sources in with_sources(mean._batches, mean.means, owned=True) for s in sources]
    assert len({copy.untyped_storage().data_ptr() for copy in copies}) <= 2


def test_positions_go_on_by_one_and_begin_anew_at_a_restart():
    weight = torch.ones(2)
    mean = Accumulator([weight], ["weight"], Uniform())
    assert mean.position == mean.clock == 0.0
    for position, expected in ((None, 1.0), (None, 2.0), (5.0, 5.0), (None, 6.0)):
        mean.add([weight], position)
        assert mean.position == mean.clock == expected
    assert mean.n_averaged == 4
    mean.add([torch.full((2,), float("nan"))])
    assert (mean.position, mean.clock, mean.n_skipped) == (6.0, 7.0, 1)
    mean.restart()
    assert (mean.position, mean.clock, mean.n_averaged, mean.n_skipped) == (0.0, 0.0, 0, 0)
    mean.restart(3, 1, position=4.0)
    assert (mean.position, mean.clock, mean.n_averaged, mean.n_skipped) == (4.0, 4.0, 3, 1)
    assert torch.equal(mean.memory[0], mean.means[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("compensated", [False, True])
def test_nothing_is_left_behind_a_restart(device, compensated):
    with as_if_on(device):
        mean = Accumulator([torch.ones(3)], ["w"], Uniform(), check_finite=False, compensated=compensated)
        for value in (1.0, float("nan")):
            mean.add([torch.full((3,), value)])
        mean.restart()
        mean.add([torch.full((3,), 2.0)])
    assert torch.equal(mean.means[0], torch.full((3,), 2.0))


def test_of_several_tensors_that_are_not_finite_the_first_is_named():
    tensors = [torch.ones(2), torch.full((2,), float("nan")), torch.full((2,), float("inf"))]
    mean = Accumulator(tensors, ["good", "first", "second"], Uniform(), check_finite="raise")
    with pytest.raises(NonFiniteError, match="'first' holds a NaN or an infinity"):
        mean.add(tensors)
