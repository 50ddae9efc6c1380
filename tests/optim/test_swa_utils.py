"""AveragedModel against torch's own, and against float64 where torch's own is wrong."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.optim.swa_utils as theirs
from torch import Tensor, nn

import polyak
from polyak import _torch
from polyak.errors import OptionError, PolyakError, StructureError, SwapError
from polyak.optim import swa_utils as ours

Fn = Callable[..., Any]
LAWS: list[Callable[[Any], dict[str, Fn]]] = [
    lambda utils: {},
    lambda utils: {"multi_avg_fn": utils.get_swa_multi_avg_fn()},
    lambda utils: {"avg_fn": utils.get_swa_avg_fn()},
    lambda utils: {"multi_avg_fn": utils.get_ema_multi_avg_fn(0.9)},
    lambda utils: {"avg_fn": utils.get_ema_avg_fn(0.9)},
    lambda utils: {"multi_avg_fn": utils.get_ema_multi_avg_fn(0.0)},
    lambda utils: {"avg_fn": utils.get_ema_avg_fn(1.0)},
    lambda utils: {"avg_fn": lambda averaged, current, n: averaged + (current - averaged) / (n + 2)},
]
HALVES = [torch.bfloat16, torch.float16]


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """With a weight that is large enough to be averaged in place, and statistics."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 300), nn.BatchNorm1d(300), nn.Linear(300, 2)).to(dtype)


def steps(model: nn.Module, numbers: range) -> Iterator[None]:
    """Every tensor wanders, the same way for the same numbers; integers count."""
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("running_var"):
                tensor.add_(0.1)
            elif tensor.is_floating_point():
                tensor.data.add_(torch.randn(tensor.shape, generator=generator).to(tensor.dtype) * 0.1)
            else:
                tensor += 1
        yield


def follow(averaged: nn.Module, model: nn.Module, numbers: range) -> None:
    for _ in steps(model, numbers):
        averaged.update_parameters(model)  # type: ignore[operator]


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return list(left) == list(right) and all(
        left[k].dtype == right[k].dtype and torch.equal(left[k], right[k]) for k in left
    )


def wander(value: float, dtype: torch.dtype, updates: int) -> Iterator[Tensor]:
    """A weight on its way, in steps far below what ``dtype`` resolves around the average."""
    for step in range(updates):
        yield torch.linspace(value, 2 * value, 20_000).add(step / updates).to(dtype)


# Against torch's own.


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("law", LAWS)
def test_it_equals_torchs_own_in_fp32(law: Callable[[Any], dict[str, Fn]], use_buffers: bool) -> None:
    model, twin = network(), network()
    # Torch averages integers too: with counts that do not move there is nothing to round.
    for layer in (model[1], twin[1]) if use_buffers else ():
        layer.num_batches_tracked = None
    mine = ours.AveragedModel(model, use_buffers=use_buffers, **law(ours))
    peer = theirs.AveragedModel(twin, use_buffers=use_buffers, **law(theirs))
    follow(mine, model, range(30))
    follow(peer, twin, range(30))
    assert list(mine.state_dict()) == list(peer.state_dict())
    for name, value in peer.state_dict().items():
        torch.testing.assert_close(mine.state_dict()[name], value, rtol=1e-6, atol=1e-6)
    mine.eval(), peer.eval()
    batch = torch.randn(5, 64)
    torch.testing.assert_close(mine(batch), peer(batch))


@pytest.mark.parametrize("law", LAWS[1:5])
def test_the_functions_work_in_torchs_own_class_and_through_pickle(
    law: Callable[[Any], dict[str, Fn]],
) -> None:
    models = [network(), network()]
    functions = pickle.loads(pickle.dumps(law(ours)))
    assert functions == law(ours)
    with_ours = theirs.AveragedModel(models[0], **functions)
    with_theirs = theirs.AveragedModel(models[1], **law(theirs))
    for averaged, model in zip((with_ours, with_theirs), models, strict=True):
        follow(averaged, model, range(10))
    for name, value in with_theirs.state_dict().items():
        torch.testing.assert_close(with_ours.state_dict()[name], value, rtol=1e-6, atol=1e-6)


def test_the_functions_take_integers_and_complex_numbers() -> None:
    for start, target in ((1 + 2j, 3 + 4j), (2, 4)):
        mean, current = torch.tensor([start]), torch.tensor([target])
        assert ours.get_swa_avg_fn()(mean, current, 1).tolist() == [(start + target) / 2]
        ours.get_swa_multi_avg_fn()([mean], [current], torch.tensor(1))
        assert mean.tolist() == [(start + target) / 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dicts_travel_both_ways(dtype: torch.dtype) -> None:
    model = network(dtype)
    mine, peer = ours.AveragedModel(model), theirs.AveragedModel(model)
    follow(mine, model, range(3))
    peer.load_state_dict(mine.state_dict(), strict=True)
    assert same(peer.module.state_dict(), mine.module.state_dict()) and peer.n_averaged == 3
    mine.load_state_dict(peer.state_dict(), strict=True)
    assert same(mine.state_dict(), peer.state_dict())
    follow(peer, model, range(3, 5))
    back = ours.AveragedModel(model)
    back.load_state_dict(peer.state_dict(), strict=True)
    assert same(back.state_dict(), peer.state_dict())
    follow(back, model, range(5, 6))
    assert back.n_averaged == 6


def test_your_own_functions_are_called_as_torch_calls_them() -> None:
    calls: dict[str, list[Any]] = {"ours": [], "theirs": []}

    def recording(who: str) -> Fn:
        def multi_avg_fn(averaged: Any, current: Any, n: Any) -> None:
            kinds = [
                (a.shape, a.dtype, c.dtype, a.requires_grad) for a, c in zip(averaged, current, strict=True)
            ]
            calls[who].append((kinds, int(n), n.dtype))
            torch._foreach_copy_(averaged, current)

        return multi_avg_fn

    for who, utils in (("ours", ours), ("theirs", theirs)):
        model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2).bfloat16(), nn.Linear(2, 2))
        averaged = utils.AveragedModel(model, multi_avg_fn=recording(who))
        follow(averaged, model, range(3))
    assert len(calls["ours"]) == 4
    assert sorted(calls["ours"], key=str) == sorted(calls["theirs"], key=str)  # kinds come in no given order


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_functions_may_change_on_the_way(dtype: torch.dtype) -> None:
    model = nn.Linear(2, 2, bias=False).to(dtype)
    averaged = ours.AveragedModel(model)

    def latest(averaged: Any, current: Any, n: Any) -> None:
        torch._foreach_copy_(averaged, current)

    functions = [None, None, latest, ours.get_ema_multi_avg_fn(0.75)]
    expected = [1.0, 1.5, 4.0, 5.0]
    for function, weight, mean in zip(functions, (1.0, 2.0, 4.0, 8.0), expected, strict=True):
        model.weight.data.fill_(weight)
        averaged.multi_avg_fn = function
        averaged.update_parameters(model)
        assert torch.equal(averaged.module.weight, torch.full((2, 2), mean, dtype=dtype))


# Precision.


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("decay", [None, 0.999])
def test_half_precision_does_not_stall_in_2000_updates(dtype: torch.dtype, decay: float | None) -> None:
    model = nn.Linear(100, 200, bias=False).to(dtype)
    function = None if decay is None else ours.get_ema_multi_avg_fn(decay)
    averaged = ours.AveragedModel(model, multi_avg_fn=function)
    mean = first = torch.zeros(())
    for n, weight in enumerate(wander(1.0, dtype, 2_000), start=1):
        model.weight.data = weight.view(200, 100)
        averaged.update_parameters(model)
        sample = model.weight.data.double()
        weight_of_it = 1.0 if n == 1 else 1 / n if decay is None else 1 - decay
        mean = mean + weight_of_it * (sample - mean)
        first = sample if n == 1 else first
    movement = (mean - first).abs().max()
    state = averaged.state_dict()
    assert state["module.weight"].dtype == torch.float32
    assert (state["module.weight"] - mean).abs().max() <= 1e-3 * movement
    assert torch.equal(averaged.module.weight, state["module.weight"].to(dtype))


@pytest.mark.parametrize("use_buffers", [False, True])
def test_a_state_keeps_fp32_and_goes_on_bitwise(use_buffers: bool) -> None:
    model = network(torch.bfloat16)
    averaged = ours.AveragedModel(model, use_buffers=use_buffers)
    follow(averaged, model, range(5))
    saved = io.BytesIO()
    torch.save(averaged.state_dict(), saved)
    saved.seek(0)
    loaded = ours.AveragedModel(network(torch.bfloat16), use_buffers=use_buffers)
    loaded.load_state_dict(torch.load(saved, weights_only=True), strict=True)
    assert same(loaded.state_dict(), averaged.state_dict())
    wide = {k for k, v in averaged.state_dict().items() if v.dtype == torch.float32}
    assert wide == {
        f"module.{n}" for n, _ in [*model.named_parameters(), *(model.named_buffers() if use_buffers else ())]
    } - {"module.1.num_batches_tracked"}
    twin = copy.deepcopy(model)
    follow(averaged, model, range(5, 10))
    follow(loaded, twin, range(5, 10))
    assert same(loaded.state_dict(), averaged.state_dict())


def test_an_average_inside_another_module_keeps_fp32_too() -> None:
    class Trainer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network(torch.bfloat16)
            self.ema = ours.AveragedModel(self.net)

    trainer, other = Trainer(), Trainer()
    follow(trainer.ema, trainer.net, range(3))
    other.load_state_dict(trainer.state_dict())
    assert trainer.state_dict()["ema.module.0.weight"].dtype == torch.float32
    assert same(other.state_dict(), trainer.state_dict())


def test_widening_a_half_precision_module_brings_all_of_its_average() -> None:
    model = network(torch.bfloat16)
    averaged = ours.AveragedModel(model)
    follow(averaged, model, range(7))
    mean = averaged.state_dict()["module.0.weight"].clone()
    averaged.float()
    assert torch.equal(averaged.module[0].weight, mean)
    follow(averaged, model, range(7, 9))
    assert averaged.n_averaged == 9 and averaged.module[0].weight.dtype == torch.float32
    averaged.bfloat16()
    assert averaged.state_dict()["module.0.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_into_the_module_counts(dtype: torch.dtype) -> None:
    model = network(dtype)
    averaged = ours.AveragedModel(model)
    follow(averaged, model, range(3))
    with torch.no_grad():
        for parameter in averaged.module.parameters():
            parameter.zero_()
    assert not averaged.state_dict()["module.0.weight"].any()
    for parameter in model.parameters():
        parameter.data.fill_(4.0)
    averaged.update_parameters(model)
    assert all(torch.equal(p, torch.ones_like(p)) for p in averaged.module.parameters())
    averaged.n_averaged.zero_()
    averaged.update_parameters(model)
    assert all(torch.equal(p, torch.full_like(p, 4.0)) for p in averaged.module.parameters())


# Samples, names, ties, structure.


@pytest.mark.parametrize("law", LAWS[:7])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_sample_that_is_not_finite_is_left_out(law: Callable[[Any], dict[str, Fn]], bad: float) -> None:
    model, twin = network(), network()
    averaged, spared = (ours.AveragedModel(m, **law(ours)) for m in (model, twin))
    for number in range(6):
        follow(spared, twin, range(number, number + 1))
        broken = copy.deepcopy(model)
        broken[2].weight.data[1, 1] = bad
        averaged.update_parameters(broken)
        follow(averaged, model, range(number, number + 1))
    assert averaged.n_averaged == spared.n_averaged == 6
    for name, value in spared.state_dict().items():
        torch.testing.assert_close(averaged.state_dict()[name], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_way_of_an_accelerator_gives_the_same(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run on the host, as the accumulator's own tests do; before the first sample it is what the module began as."""
    model, twin = network(dtype), network(dtype)
    expected = ours.AveragedModel(model)
    follow(expected, model, range(5))
    monkeypatch.setattr(_torch, "on_host", lambda tensor: False)
    averaged = ours.AveragedModel(twin)
    before = copy.deepcopy(averaged.module.state_dict())
    broken = copy.deepcopy(twin)
    broken[2].weight.data[1, 1] = float("nan")
    averaged.update_parameters(broken)
    assert same(averaged.module.state_dict(), before) and averaged.n_averaged == 0
    follow(averaged, twin, range(3))
    averaged.update_parameters(broken)
    follow(averaged, twin, range(3, 5))
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(averaged.state_dict()[name], value, rtol=1e-6, atol=1e-6)


def test_tensors_are_matched_by_name() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    averaged = ours.AveragedModel(model)
    turned = nn.ModuleDict({"b": model["b"], "a": model["a"]})
    averaged.update_parameters(nn.DataParallel(turned))
    assert same(averaged.module.state_dict(), model.state_dict())
    averaged.update_parameters(torch.compile(model, backend="eager"))  # type: ignore[arg-type]
    assert averaged.n_averaged == 2


def test_tied_weights_are_averaged_once() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)).to(dtype)
        model[1].weight = model[0].weight
        averaged = ours.AveragedModel(model)
        for value in (0.0, 3.0, 6.0):
            model[0].weight.data.fill_(value)
            averaged.update_parameters(model)
        assert averaged.module[0].weight is averaged.module[1].weight
        assert {float(v.float().mean()) for k, v in averaged.state_dict().items() if "weight" in k} == {3.0}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: m.append(nn.Linear(2, 2)), r"has '3\.weight', '3\.bias' besides"),
        (lambda m: m.__delitem__(2), r"lacks '2\.weight', '2\.bias'"),
        (lambda m: m.__setitem__(2, nn.Linear(300, 1)), r"has '2\.weight' as \(1, 300\), not \(2, 300\)"),
        (lambda m: m[1].register_buffer("running_mean", torch.zeros(1)), r"has '1\.running_mean' as "),
    ],
)
@pytest.mark.parametrize("law", [LAWS[0], LAWS[-1]])
def test_a_changed_structure_is_an_error_that_names_it(
    law: Callable[[Any], dict[str, Fn]], change: Callable[[nn.Sequential], Any], named: str
) -> None:
    model = network()
    averaged = ours.AveragedModel(model, **law(ours))
    follow(averaged, model, range(2))
    before = copy.deepcopy(averaged.state_dict())
    change(model)
    with pytest.raises(StructureError, match=f"{named}.*Make a new AveragedModel"):
        averaged.update_parameters(model)
    assert same(averaged.state_dict(), before)


def test_parameters_that_are_replaced_or_retyped_are_followed() -> None:
    model, twin = network(), network()
    averaged, undisturbed = ours.AveragedModel(model), ours.AveragedModel(twin)
    follow(undisturbed, twin, range(4))
    follow(averaged, model, range(2))
    for layer in (model[0], averaged.module[0], averaged.module[2]):
        layer.weight = nn.Parameter(layer.weight.detach().clone())
        layer.bias.data = layer.bias.data.clone()
    follow(averaged, model, range(2, 4))
    assert same(averaged.state_dict(), undisturbed.state_dict())
    averaged.update_parameters(model.double())
    assert averaged.module[0].weight.dtype == torch.float32 and averaged.n_averaged == 5


# Memory and copies.


@pytest.mark.parametrize("law", LAWS[:5])
def test_in_fp32_the_module_is_the_only_copy(law: Callable[[Any], dict[str, Fn]]) -> None:
    model = network()
    averaged = ours.AveragedModel(model, **law(ours))
    places = {name: p.data_ptr() for name, p in averaged.module.named_parameters()}
    follow(averaged, model, range(3))
    assert averaged._mean is not None
    means = dict(zip(averaged._mean._accumulator.names, averaged._mean._accumulator.means, strict=True))
    assert means["0.weight"].data_ptr() == places["0.weight"]
    assert {name: p.data_ptr() for name, p in averaged.module.named_parameters()} == places


def test_the_model_is_free_once_its_owner_lets_go() -> None:
    model = network()
    averaged = ours.AveragedModel(model)
    averaged.update_parameters(model)
    gone = weakref.ref(model[0].weight)
    del model
    gc.collect()
    assert gone() is None and averaged.n_averaged == 1


def through_pickle(averaged: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(averaged))


def through_torch_save(averaged: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(averaged, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_state(averaged: nn.Module) -> nn.Module:
    fresh = ours.AveragedModel(network(averaged.module[0].weight.dtype), multi_avg_fn=averaged.multi_avg_fn)  # type: ignore
    fresh.load_state_dict(averaged.state_dict())
    return fresh


@pytest.mark.parametrize("copied", [through_pickle, through_torch_save, copy.deepcopy, through_state])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
@pytest.mark.parametrize("law", [LAWS[0], LAWS[3]])
def test_a_copy_goes_on_bitwise(
    law: Callable[[Any], dict[str, Fn]], dtype: torch.dtype, copied: Callable[[nn.Module], nn.Module]
) -> None:
    model = network(dtype)
    averaged = ours.AveragedModel(model, **law(ours))
    follow(averaged, model, range(4))
    other, twin = copied(averaged), copy.deepcopy(model)
    assert same(
        other.module.state_dict(), averaged.module.state_dict()
    )  # theirs, as our own does what a copy must
    for average, source in ((averaged, model), (other, twin)):
        weight = source[0].weight.data.clone()
        # Found last, when the rest was folded in and is taken back.
        source[0].weight.data[-1, -1] = float("nan")
        average.update_parameters(source)
        source[0].weight.data.copy_(weight)
    follow(averaged, model, range(4, 8))
    before = copy.deepcopy(other.state_dict())
    assert not same(before, averaged.state_dict())  # nothing is shared
    follow(other, twin, range(4, 8))
    assert same(other.state_dict(), averaged.state_dict())


def test_small_tensors_are_saved_without_the_memory_they_share() -> None:
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(20)]).bfloat16()
    averaged = ours.AveragedModel(model)
    averaged.update_parameters(model)
    state = averaged.state_dict()
    assert all(v.untyped_storage().nbytes() == v.nbytes for v in state.values())
    assert len(pickle.dumps(averaged)) < 2 * sum(v.nbytes for v in state.values())


def test_update_bn_refreshes_the_averaged_module() -> None:
    model = network()
    averaged = ours.AveragedModel(model)
    follow(averaged, model, range(2))
    data = torch.randn(50, 64)
    ours.update_bn(data.split(10), averaged)
    torch.testing.assert_close(averaged.module[1].running_mean, averaged.module[0](data).detach().mean(0))
    assert ours.SWALR is theirs.SWALR
    assert set(ours.__all__) == set(theirs.__all__)


class TakesBatches(nn.Module):
    """Keeps what it is called with, and normalises the tensor in it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.calls: list[object] = []

    def forward(self, batch: object) -> torch.Tensor:
        self.calls.append(batch)
        return self.norm(batch["x"] if isinstance(batch, dict) else batch)


def test_update_bn_calls_the_model_as_torch_does() -> None:
    x = torch.randn(4, 3)
    batches = [x, (x, "labels"), [x, 1, 2], {"x": x, "y": "labels"}, ({"x": x}, "labels")]
    for update_bn in (ours.update_bn, theirs.update_bn):
        model = TakesBatches().train()
        update_bn(batches, model)
        assert [type(call) for call in model.calls] == [torch.Tensor] * 3 + [dict] * 2
        assert model.calls[3] is batches[3] and model.calls[4] is batches[4][0]
        torch.testing.assert_close(model.norm.running_mean, x.mean(0))
    with pytest.raises(TypeError, match="unexpected keyword"):
        polyak.update_bn(batches, TakesBatches())


# Errors.


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(OptionError, match="give only one of them"):
        ours.AveragedModel(network(), avg_fn=ours.get_swa_avg_fn(), multi_avg_fn=ours.get_swa_multi_avg_fn())
    for get in (ours.get_ema_avg_fn, ours.get_ema_multi_avg_fn):
        for decay in (-0.1, 1.1, float("nan")):
            with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
                get(decay)
    with pytest.raises(OptionError, match=r"Module is needed, got list"):
        ours.AveragedModel([nn.Linear(1, 1)])  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="nothing to average"):
        ours.AveragedModel(nn.ReLU()).update_parameters(nn.ReLU())


def test_a_model_that_cannot_be_copied_is_refused_with_the_cure() -> None:
    model = network()
    model.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(StructureError, match=r"Sequential cannot be deep-copied .*polyak\.Average"):
        ours.AveragedModel(model)


def test_a_model_without_data_is_refused_until_it_has_some() -> None:
    for model in (nn.Linear(2, 2, device="meta"), nn.LazyLinear(2)):
        averaged = ours.AveragedModel(model)
        with pytest.raises(StructureError, match="'weight'.* have no data yet"):
            averaged.update_parameters(model)


def test_weights_of_another_average_are_not_averaged() -> None:
    model = network()
    average, averaged = polyak.Average(model, polyak.Uniform()), ours.AveragedModel(model)
    average.update()
    with average.applied(), pytest.raises(SwapError):
        averaged.update_parameters(model)


def test_a_sharded_model_is_refused_with_the_cure(tmp_path: Any) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = nn.Linear(2, 2, bias=False)
        model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh, [Shard(0)]))
        with pytest.raises(StructureError, match=r"'weight' are sharded.*polyak\.Average"):
            ours.AveragedModel(model)
        with pytest.raises(StructureError, match=r"'weight' are sharded"):
            ours.AveragedModel(nn.Linear(2, 2, bias=False)).update_parameters(model)
    finally:
        torch.distributed.destroy_process_group()


def test_a_torch_that_converts_modules_unseen_is_refused(monkeypatch):
    """AveragedModel would drop the means that it holds beside a module in half precision."""
    _torch.refuse_unseen_conversions.cache_clear()
    monkeypatch.setattr(nn.Module, "float", lambda self: self)
    with pytest.raises(PolyakError, match=r"converts modules without Module\._apply"):
        ours.AveragedModel(nn.Linear(1, 1))
    monkeypatch.undo()
    ours.AveragedModel(nn.Linear(1, 1))
