"""What `update_bn` does to a model besides its statistics: nothing, also when it fails."""

from __future__ import annotations

import copy
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from torch import Tensor, nn

import polyak
from batchnorm_cases import (
    CHANNELS,
    assert_population,
    assert_same_state,
    count_graphs,
    data,
    deep_network,
    state_of,
)

# --- modes -----------------------------------------------------------------------------------------------


def test_frozen_layers_are_left_alone_in_a_training_model():
    model = deep_network()
    model[4].eval()
    before = {name: tensor.clone() for name, tensor in model[4].state_dict().items()}
    seen = []
    model[6].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = data()
    polyak.update_bn(x.split(50), model)

    assert all(torch.equal(tensor, before[name]) for name, tensor in model[4].state_dict().items())
    assert not model[4].training and model[1].training and model[7].training
    assert model[1].num_batches_tracked == model[7].num_batches_tracked == 11
    with torch.no_grad():  # the frozen layer normalised by its own statistics meanwhile
        hidden = model[2](copy.deepcopy(model[1]).train()(model[0](x[:50])))
        torch.testing.assert_close(seen[0], model[5](model[4](model[3](hidden))))


def test_all_layers_are_refreshed_in_a_model_in_evaluation_mode():
    model = deep_network().eval()
    polyak.update_bn(data().split(50), model)
    assert all(layer.num_batches_tracked == 11 and not layer.training for layer in model[1::3])


def test_dropout_is_off_and_modes_and_momenta_come_back():
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(CHANNELS, momentum=None), nn.Dropout(0.5))
    model[2].eval()
    x = data()
    polyak.update_bn(x.split(50), model)
    assert_population(model[1], x)
    assert [module.training for module in model.modules()] == [True, True, True, False]
    assert model[1].momentum is None


def test_modules_that_act_on_a_change_of_mode_are_not_disturbed():
    class Merging(nn.Linear):
        def train(self, mode: bool = True) -> nn.Module:
            with torch.no_grad():
                self.weight.mul_(2)
            return super().train(mode)

    model = nn.Sequential(Merging(CHANNELS, CHANNELS), nn.BatchNorm1d(CHANNELS))
    before = model[0].weight.clone()
    polyak.update_bn(data().split(50), model)
    assert torch.equal(model[0].weight, before)


def test_layers_without_statistics_and_other_kinds_are_left_alone():
    model = nn.Sequential(
        nn.BatchNorm2d(CHANNELS, track_running_stats=False),
        nn.InstanceNorm2d(CHANNELS, track_running_stats=True),
        nn.BatchNorm2d(CHANNELS),
    )
    polyak.update_bn(data(20, 3, 3).split(5), model)
    assert model[0].running_mean is None
    assert model[1].num_batches_tracked == 0 and not model[1].running_mean.any()
    assert model[2].num_batches_tracked == 4


def test_layers_that_nothing_reaches_keep_what_they_have():
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main = nn.BatchNorm1d(CHANNELS)
            self.auxiliary = nn.BatchNorm1d(CHANNELS)
            self.auxiliary.running_mean.fill_(7)

        def forward(self, x: Tensor) -> None:
            self.main(x)
            if self.training:
                self.auxiliary(x)

    model = Auxiliary()
    x = data()
    polyak.update_bn([x], model)
    assert_population(model.main, x)
    assert (model.auxiliary.running_mean == 7).all()


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2)).train()])
def test_with_no_layer_to_refresh_the_loader_is_not_touched(model):
    for module in model.children():
        module.eval()
    taken = []
    polyak.update_bn((taken.append(batch) or batch for batch in [torch.ones(2, 2)]), model)
    assert not taken


# --- failures --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["loader", "forward", "layer"])
@pytest.mark.parametrize("n_good", [0, 1, 5])
def test_a_failure_midway_leaves_the_model_as_it_was(error, where, n_good):
    x = data()
    batches = x.split(32)
    model = deep_network()
    model[4].eval()
    for layer in model[1::3]:
        layer.running_mean.normal_()
        layer.num_batches_tracked.fill_(41)
    before = state_of(model)
    calls = iter(range(100))

    def loader():
        yield from batches[:n_good]
        if where == "loader":
            raise error("stop")
        yield from batches[n_good:]

    def forward(model, batch):
        if where != "loader" and next(calls) == n_good:
            model(batch if where == "forward" else batch[:, :2])
            raise error("stop")
        model(batch)

    with pytest.raises(RuntimeError if where == "layer" else error):
        polyak.update_bn(loader(), model, forward=forward)
    assert_same_state(model, before)


def test_a_failure_in_the_second_pass_leaves_the_model_as_it_was():
    model = deep_network()
    before = state_of(model)
    calls = iter(range(100))

    def forward(model, batch):
        assert next(calls) < 25, "stop"
        model(batch)

    with pytest.raises(AssertionError, match="stop"):
        polyak.update_bn(data().split(32), model, forward=forward, passes=2)
    assert_same_state(model, before)


def test_statistics_that_are_not_finite_are_refused_by_name():
    model = deep_network()
    before = state_of(model)
    x = data()
    x[300, 2] = torch.nan
    with pytest.raises(polyak.errors.NonFiniteError, match="'1', '4', '7'"):
        polyak.update_bn(x.split(32), model)
    assert_same_state(model, before)


def test_a_variance_beyond_half_precision_is_refused():
    layer = nn.BatchNorm1d(CHANNELS, dtype=torch.float16)
    with pytest.raises(polyak.errors.NonFiniteError, match="too large"):
        polyak.update_bn([torch.linspace(-6e4, 6e4, 10)[:, None].expand(-1, CHANNELS).half()], layer)


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_lazy_layers_are_asked_for_a_first_batch():
    x = data()
    model = nn.Sequential(nn.LazyBatchNorm1d())
    with pytest.raises(polyak.errors.StructureError, match="run one batch"):
        polyak.update_bn([x], model)
    model(x)
    polyak.update_bn(x.split(50), model)
    assert_population(model[0], x)


def test_layers_on_the_meta_device_are_refused():
    with pytest.raises(polyak.errors.StructureError, match="meta"):
        polyak.update_bn([data()], nn.Sequential(nn.BatchNorm1d(CHANNELS, device="meta")))


# --- wrappers and relatives ------------------------------------------------------------------------------


def compiled_outside(model: nn.Sequential) -> nn.Module:
    return torch.compile(model, backend="eager")


def compiled_in_place(model: nn.Sequential) -> nn.Module:
    model.compile(backend="eager")
    return model


def compiled_inside(model: nn.Sequential) -> nn.Module:
    return nn.Sequential(model[0], torch.compile(model[1:], backend="eager"))


@pytest.mark.parametrize("wrap", [compiled_outside, compiled_in_place, compiled_inside, nn.DataParallel])
@pytest.mark.parametrize("training", [True, False])
def test_wrapped_models(wrap, training):
    x = data(96)
    plain, inner = deep_network().train(training), deep_network().train(training)
    model = wrap(inner).train(training)
    with torch.no_grad():
        model(x[:32])  # a graph without our hooks is there already
    inner.load_state_dict(plain.state_dict())
    polyak.update_bn(x.split(32), plain)
    polyak.update_bn(x.split(32), model)
    for ours, expected in zip(inner.buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, expected)
    assert all(module.training == training for module in model.modules())


def test_compiled_parts_are_not_compiled_anew():
    # In a process of its own: what other tests have compiled, or interrupted, can keep torch from compiling at all.
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        before, after = pool.submit(count_graphs).result()
    assert 0 < before == after


def test_a_subclass_with_a_forward_of_its_own():
    class NormAct(nn.BatchNorm1d):
        def forward(self, input: Tensor) -> Tensor:
            return torch.relu(super().forward(input))

    x = data()
    model = nn.Sequential(NormAct(CHANNELS), nn.BatchNorm1d(CHANNELS))
    seen = []
    model[1].register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    polyak.update_bn(x.split(50), model)
    assert_population(model[0], x)
    assert_population(model[1], torch.cat(seen))
    assert torch.cat(seen).min() == 0


def test_no_graph_is_kept():
    model = deep_network()
    outputs = []
    x = data().requires_grad_()
    polyak.update_bn(x.split(50), model, forward=lambda model, batch: outputs.append(model(batch)))
    assert not any(output.requires_grad for output in outputs)
