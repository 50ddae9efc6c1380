"""The mean on an accelerator, by its operations on CPU tensors, and on meta tensors, which have no numbers to read."""

from __future__ import annotations

import copy
import json
from contextlib import nullcontext
from importlib import import_module
from itertools import count

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import polyak
from devices import Tape, as_if_on
from polyak import _batches, _model, _torch
from polyak._device_mean import DeviceMean, _FusedFold
from polyak._mean import Accumulator
from polyak.errors import NonFiniteError
from polyak.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from polyak.profiles import Scheme, Uniform, parse, registered
from ranks import run_on_ranks

SCHEMES = [s for cls in registered().values() for s in map(parse, cls.examples) if isinstance(s, Scheme)]
# Small ones, one that is staged alone, and one without elements.
SHAPES = [(3,), (2, 5), (), (0,), (130, 140)]


def on_accelerator(tensors, scheme=None, **options):
    with as_if_on("accelerator"):
        return Accumulator(tensors, [f"w{n}" for n in range(len(tensors))], scheme or Uniform(), **options)


def on_host(tensors, scheme=None, **options):
    return Accumulator(tensors, [f"w{n}" for n in range(len(tensors))], scheme or Uniform(), **options)


def random_tensors(dtypes, seed, scale=1.0, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return [
        (scale * torch.randn(shape, generator=generator)).to(dtype)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]


def bits(tensors):
    return [t.detach().contiguous().reshape(-1).view(torch.uint8).clone() for t in tensors]


def same_bits(tensors, before):
    return all(map(torch.equal, bits(tensors), before))


OPTIONS = [
    {},
    {"check_finite": False},
    {"compensated": True},
    {"dtype": torch.float64},
    {"dtype": torch.bfloat16},
    {"dtype": torch.float16},
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64]
BAD = [float("nan"), float("inf"), -float("inf")]


@pytest.mark.filterwarnings("ignore:the average takes in")  # half precision stalls soon
@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.sampled_from(DTYPES), min_size=len(SHAPES), max_size=len(SHAPES)),
    st.sampled_from(SCHEMES),
    st.sampled_from(OPTIONS),
    st.lists(
        st.tuples(st.none() | st.sampled_from(BAD), st.integers(0, 10**6), st.integers(1, 9)), max_size=8
    ),
)
def test_all_of_a_sample_or_none(dtypes, scheme, options, samples):
    """Counters are the host's, means too to 1e-6 (rounding in half precision), and bad samples change no bit."""
    first = random_tensors(dtypes, 0)
    host, device = (make(first, scheme, **options) for make in (on_host, on_accelerator))
    position = 0
    for seed, (bad, place, gap) in enumerate(samples):
        position += gap
        sample = random_tensors(dtypes, seed)
        with_numbers = [tensor for tensor in sample if tensor.numel()]
        if bad is not None and options.get("check_finite", True):
            flat = with_numbers[place % len(with_numbers)].view(-1)
            flat[place % flat.numel()] = bad
            before = bits(device.means + device.residuals)
        host.add(sample, position)
        device.add(sample, position)
        if bad is not None and options.get("check_finite", True):
            assert same_bits(device.means + device.residuals, before)
        assert (host.n_averaged, host.n_skipped) == (device.n_averaged, device.n_skipped)
        assert (host.position, host.clock) == (device.position, device.clock) == (host.position, position)
    for one, other in zip(host.means, device.means, strict=True):
        tolerance = {torch.bfloat16: 5e-2, torch.float16: 5e-3}.get(one.dtype, 1e-6)
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("most", [1 << 10, 1 << 22])
@pytest.mark.parametrize("layout", ["dense", "channels_last", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_staged_is_in_pieces_of_any_size_and_order(monkeypatch, most, layout, dtype):
    monkeypatch.setattr(_batches, "_STAGED_NUMEL", most)
    shapes = [(40, 30, 3, 5), (7,), (300,), *[(50,)] * 40, (4, 6, 3, 3)]

    def laid_out(sample):
        if layout == "strided":
            return [torch.stack([w, w], dim=-1)[..., 0] for w in sample]
        wanted = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        return [w.contiguous(memory_format=wanted) if w.ndim == 4 else w for w in sample]

    samples = [laid_out(random_tensors([dtype] * len(shapes), n, shapes=shapes)) for n in range(4)]
    samples[2][5].view(-1)[-1] = float("nan")
    device, host = on_accelerator(samples[0]), on_host(samples[0])
    for sample in samples:
        device.add(sample)
        host.add(sample)
    assert device.n_skipped == 1
    for one, other in zip(device.means, host.means, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_weights_that_change_their_memory_order_unseen_are_followed():
    first, second = torch.randn(200, 300), torch.randn(300, 200).t()
    mean = on_accelerator([first])
    for sample in (first, second, first):
        mean.add([sample])
    torch.testing.assert_close(mean.means[0], (2 * first + second) / 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_scratch_takes_16_megabytes_at_most(dtype):
    weights = [torch.zeros(3000, 3000, dtype=dtype), torch.zeros(3_000_000, dtype=dtype)]
    [fold] = on_accelerator(weights)._counts._folds
    scratch = {
        c.untyped_storage().data_ptr(): c.untyped_storage().nbytes() for _, own in fold._staged for c in own
    }
    assert sum(scratch.values()) <= (16 << 20 if dtype == torch.bfloat16 else 0)


# A graph.


@pytest.mark.parametrize(
    "options", [{}, {"compensated": True}, {"dtype": torch.float64}, {"check_finite": False}], ids=str
)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_graph_replays_it(scheme, options):
    """The operations of one update, run again on other values: each replay is the next update."""
    dtypes = [torch.float32, torch.bfloat16, torch.float32, torch.float32, torch.float32]
    weights = random_tensors(dtypes, 0)
    graph, eager = (on_accelerator(weights, scheme, **options) for _ in range(2))
    for mean in (graph, eager):
        mean.add(weights, 5)
        mean.add(weights, 10)
    with Tape() as tape:
        graph.add(weights, 15)
    eager.add(weights, 15)
    position = 15
    for seed, bad in enumerate([False, True, False, True, True, False, False], start=1):
        for weight, value in zip(weights, random_tensors(dtypes, seed), strict=True):
            weight.copy_(value)
        if bad and options.get("check_finite") is not False:
            weights[-1][3, 4] = float("nan")
        position += 5
        tape.replay()
        eager.add(weights, position)
        assert (graph.n_averaged, graph.n_skipped) == (eager.n_averaged, eager.n_skipped)
        assert (graph.position, graph.clock) == (eager.position, position)
        assert same_bits(graph.means + graph.residuals, bits(eager.means + eager.residuals))


@pytest.mark.parametrize("scheme", ["uniform", "ema:half_life=3", "power:gamma=2"])
def test_an_average_counts_what_a_graph_replayed(scheme):
    """In its state, which another goes on from, and by hand afterwards."""
    model, twin = (nn.Linear(3, 2) for _ in range(2))
    with as_if_on("accelerator"):
        average, plain = (polyak.Average(m, scheme, every=2) for m in (model, twin))

    def step(value, *updates):
        for m in (model, twin):
            nn.init.constant_(m.weight, value)
            nn.init.constant_(m.bias, -value)
        for update in updates:
            update()

    for value in (1.0, 4.0):
        step(value, average.update_now, plain.update_now)
    tape = Tape()

    def captured():
        with tape:
            average.update_now()

    step(5.0, captured, plain.update_now)
    for value in (2.0, float("nan"), 8.0, float("nan")):
        step(value, tape.replay, plain.update_now)
    state, expected = average.state_dict(), plain.state_dict()
    assert (state["step"], state["n_averaged"], state["n_skipped"]) == (14, 5, 2)
    assert {k: v for k, v in state.items() if k != "average"} == {
        k: v for k, v in expected.items() if k != "average"
    }
    resumed = polyak.Average(twin, scheme, every=2)
    state = copy.deepcopy(state)
    resumed.load_state_dict(state)
    step(3.0, average.update_now, plain.update_now, resumed.update_now)
    step(6.0, tape.replay, plain.update_now, resumed.update_now)
    averaged = {name: tensor.clone() for name, tensor in average.named_tensors().items()}
    average.load_state_dict(state)  # the graph goes on from it
    step(3.0, tape.replay)
    step(6.0, tape.replay)
    for one in (average, resumed):
        assert one.state_dict()["step"] == 18
    assert all(torch.equal(averaged[name], tensor) for name, tensor in average.named_tensors().items())
    for one in (average, resumed):
        for name, tensor in plain.named_tensors().items():
            torch.testing.assert_close(one.named_tensors()[name], tensor, rtol=1e-6, atol=1e-6)


# What an update costs, counted where there are no numbers to be read.

LIMITS = {
    "resnet50 fp32 checked": (30, 4.1),
    "resnet50 fp32 unchecked": (16, 3.1),
    "gpt2 fp32 checked": (30, 4.1),
    "gpt2 fp32 unchecked": (16, 3.1),
    "resnet50 bf16 checked": (45, 5.1),
    "many_small fp32 checked": (90, 6.1),
}


@pytest.fixture
def accelerator():
    return import_module("accelerator")


def test_calls_and_passes_of_an_update(accelerator, capsys):
    accelerator.main(["--count"])
    counted = json.loads(capsys.readouterr().out)
    assert counted.keys() == LIMITS.keys()
    for name, (calls, passes) in LIMITS.items():
        found = counted[name]
        assert found["calls"] <= calls and found["passes"] <= passes and found["host_reads"] == 0, (
            name,
            found,
        )


def test_the_counter_counts(accelerator):
    weights = [torch.empty(1000, 1000, device="meta") for _ in range(3)]
    means = [torch.empty_like(weight) for weight in weights]
    with accelerator.Counter() as counter:
        torch._foreach_lerp_(means, [weight.view(1000, 1000) for weight in weights], 0.1)
    assert (counter.calls, counter.traffic_bytes) == (1, 3 * 12_000_000)
    with accelerator.Counter() as counter:
        torch.empty(3, device="meta").copy_(torch.zeros(3))
        float(torch.empty((), device="meta"))
    assert counter.host_reads == 2


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_an_average_reads_nothing(accelerator, monkeypatch, scheme):
    monkeypatch.setattr(_model, "_has_data", lambda tensor: True)
    model = nn.Sequential(nn.Linear(300, 200), nn.BatchNorm1d(200), nn.Linear(200, 10)).to("meta")
    average = polyak.Average(model, scheme, start=1, every=2)
    with accelerator.Counter() as counter:
        for _ in range(9):
            average.update()
    assert counter.calls > 0 and counter.host_reads == 0


def test_a_swap_is_a_few_calls(accelerator):
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(50)), nn.BatchNorm1d(3))
    average = polyak.Average(model, "uniform")
    average.update()
    with accelerator.Counter() as counter, average.applied():
        pass
    assert 3 <= counter.calls <= 9


# What was wrong before.


@pytest.mark.parametrize("device", ["host", "accelerator"])
@pytest.mark.parametrize(
    ("dtype", "mean", "value", "fits"),
    [
        (torch.float32, torch.float16, 1e5, False),
        (torch.float32, torch.float16, 65_504.0, True),
        (torch.float32, torch.float16, 65_519.0, True),  # is rounded to 65,504
        (torch.bfloat16, torch.float16, 65_536.0, False),
        (torch.float64, torch.float32, 1e39, False),
        (torch.float64, torch.float64, 1e39, True),
        (torch.float64, None, 1e300, True),
        (torch.complex64, None, 3e38 + 3e38j, True),
        (torch.complex128, None, 1e308 - 1e308j, True),
        (torch.complex128, torch.float32, 1e39j, False),
    ],
)
def test_what_a_mean_cannot_hold_is_refused_and_nothing_else(device, dtype, mean, value, fits):
    good, other = torch.ones(4, dtype=dtype), torch.ones(4, dtype=dtype)
    other[2] = value
    with as_if_on(device):
        accumulator = Accumulator([good], ["w"], Uniform(), dtype=mean)
    for sample in (good, other, good):
        accumulator.add([sample])
    assert (accumulator.n_averaged, accumulator.n_skipped) == ((3, 0) if fits else (2, 1))
    assert torch.isfinite(
        torch.view_as_real(accumulator.means[0]) if dtype.is_complex else accumulator.means[0]
    ).all()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_refused_sample_leaves_the_sign_of_zero(options):
    weight = torch.full((4,), -0.0)
    mean = on_accelerator([weight], **options | {"check_finite": True})
    mean.add([torch.ones(4)])
    mean.means[0].fill_(-0.0)
    before = bits(mean.means)
    mean.add([weight * float("inf")])
    assert mean.n_skipped == 1 and same_bits(mean.means, before)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_of_8_bits_are_averaged(dtype):
    good, bad = torch.ones(70), torch.ones(70)
    bad[3] = float("nan")
    mean = on_accelerator([good.to(dtype)])
    for sample in (good, bad, 2 * good):
        mean.add([sample.to(dtype)])
    assert (mean.n_averaged, mean.n_skipped) == (2, 1)
    assert torch.equal(mean.means[0], torch.full((70,), 1.5))


def test_a_copy_has_means_of_its_own():
    for options in OPTIONS:
        mean = on_accelerator([torch.ones(3), torch.ones(200, 200)], **options)
        mean.add([torch.ones(3), torch.ones(200, 200)])
        copied = copy.deepcopy(mean)
        copied.add([torch.zeros(3), torch.zeros(200, 200)])
        assert (mean.n_averaged, copied.n_averaged) == (1, 2)
        assert all((m == 1).all() for m in mean.means) and all((m == 0.5).all() for m in copied.means)


def test_raise_names_the_tensor_there_too():
    good = [torch.ones(2), torch.ones(2)]
    mean = on_accelerator(good, check_finite="raise")
    mean.add(good)
    with pytest.raises(NonFiniteError, match="'w1' holds a NaN"):
        mean.add([torch.ones(2), torch.tensor([1.0, float("nan")])])
    assert mean.n_averaged == 1 and torch.equal(mean.means[1], torch.ones(2))


def empty_shards():
    model = nn.Linear(3, 1)
    fully_shard(model)
    with as_if_on("accelerator"):
        average = polyak.Average(model, polyak.Uniform())
    live = model.weight.to_local()
    for value in (1.0, float("nan"), 3.0):
        with torch.no_grad():
            live.fill_(value)
        average.update()
    whole = average.named_tensors()["weight"].full_tensor()
    return live.numel(), average.n_averaged, average.n_skipped, whole.flatten().tolist()


def test_a_rank_without_elements_agrees_with_the_others():
    found = run_on_ranks(empty_shards)
    assert found == [(3, 2, 1, [2.0] * 3), (0, 2, 1, [2.0] * 3)]


class Copies(TorchDispatchMode):
    """How many numbers were copied out of some tensors."""

    def __init__(self, tensors):
        super().__init__()
        self._places = {t.untyped_storage().data_ptr() for t in tensors}
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "copy" in func._schema.name:
            sources = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
            self.numel += sum(t.numel() for t in sources if t.untyped_storage().data_ptr() in self._places)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("agree", [None, lambda refused: None], ids=["alone", "sharded"])
def test_what_comes_over_to_the_host_comes_once(monkeypatch, agree):
    weights = [torch.randn(300, 200), torch.randn(7)]
    theirs = {weight.data_ptr() for weight in weights}
    monkeypatch.setattr(_torch, "on_host", lambda tensor: tensor.data_ptr() not in theirs)
    mean = on_host(weights, agree=agree)
    total = sum(weight.numel() for weight in weights)
    for n in count(1):
        with Copies(weights) as copies:
            mean.add(weights)
        assert copies.numel == total
        if n == 4:
            break
    weights[1][3] = float("nan")
    with Copies(weights) as copies:  # nobody waits for the verdict, which comes over with it
        mean.add(weights)
    assert (mean.n_averaged, mean.n_skipped, copies.numel) == (4, 1, total)


class Deaf(TorchDispatchMode):
    """The host may read nothing of what is computed inside."""

    READS = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.__name__.partition(".")[0] not in self.READS, "the host reads a number of the device"
        return func(*args, **(kwargs or {}))


def sampled(dtype, options, listens):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(40, 500)).to(dtype)
    model[2].bias.requires_grad_(False)
    averaged = AveragedModel(model, **options)
    for n in range(7):
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape) if tensor.is_floating_point() else torch.tensor(n))
        if n in (0, 4):
            model[0].bias.data[1] = float("nan")
        with nullcontext() if listens or n < 2 else Deaf():  # the second is the first that is finite
            averaged.update_parameters(model)
    return averaged


@pytest.mark.parametrize("options", [{}, {"use_buffers": True}, {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_averaged_model_reads_the_device_at_the_first_sample_alone(monkeypatch, dtype, options):
    host = sampled(dtype, options, listens=True)
    monkeypatch.setattr(_torch, "on_host", lambda tensor: False)
    device = sampled(dtype, options, listens=False)
    assert device.n_averaged == host.n_averaged == 5 and device.n_averaged.dtype == torch.long
    assert device.module[1].num_batches_tracked == 6
    for mine, peer in (
        (device.module.state_dict(), host.module.state_dict()),
        (device.state_dict(), host.state_dict()),
    ):
        assert mine.keys() == peer.keys()
        for name, tensor in peer.items():
            tolerance = 1e-6 if tensor.dtype != torch.bfloat16 else 1e-2
            torch.testing.assert_close(mine[name], tensor, rtol=tolerance, atol=tolerance)
    device.n_averaged.fill_(2)  # written by somebody: it is looked at
    device.update_parameters(device.module)
    assert device.n_averaged == 3


def test_the_fused_way_is_taken_where_it_can_be():
    fold = lambda **options: type(on_accelerator([torch.zeros(3)], **options)._counts._folds[0])  # noqa: E731
    assert fold() is _FusedFold
    assert fold(compensated=True) is not _FusedFold and fold(dtype=torch.float64) is not _FusedFold
    assert isinstance(on_accelerator([torch.zeros(3)])._counts, DeviceMean)


def test_without_the_operation_of_torch_the_other_way_is_taken(monkeypatch):
    monkeypatch.setattr(_torch, "lerps_unless", lambda device: False)
    sample = [torch.ones(3), torch.ones(200, 200)]
    mean = on_accelerator(sample)
    for value in (1.0, float("nan"), 3.0):
        mean.add([w * value for w in sample])
    assert (mean.n_averaged, mean.n_skipped) == (2, 1) and torch.equal(mean.means[0], torch.full((3,), 2.0))
