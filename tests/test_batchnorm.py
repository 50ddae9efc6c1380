"""`update_bn` against float64 moments of what really reaches each layer."""

from __future__ import annotations

import copy
from collections import namedtuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn as torch_update_bn

import polyak

CHANNELS = 6


def population(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Float64 mean and variance (divided by N) per channel, from all the data at once."""
    rows = inputs.double().transpose(0, 1).flatten(1)
    mean = rows.mean(1)
    return mean, (rows - mean[:, None]).square().mean(1)


def assert_population(layer: nn.Module, inputs: Tensor, rtol: float = 3e-5) -> None:
    mean, variance = population(inputs)
    torch.testing.assert_close(layer.running_mean.double(), mean, rtol=rtol, atol=rtol)
    torch.testing.assert_close(layer.running_var.double(), variance, rtol=rtol, atol=0)


def data(n_samples: int = 517, *shape: int, seed: int = 0) -> Tensor:
    """Channels of different offsets and scales, sorted by size: early batches are unlike late ones."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_samples, CHANNELS, *shape, generator=generator).sort(0).values
    per_channel = (1, CHANNELS, *(1 for _ in shape))
    return x * torch.linspace(0.1, 5, CHANNELS).view(per_channel) + torch.linspace(-9, 9, CHANNELS).view(
        per_channel
    )


def deep_network(depth: int = 3, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    blocks = [[nn.Linear(CHANNELS, CHANNELS), nn.BatchNorm1d(CHANNELS), nn.Tanh()] for _ in range(depth)]
    return nn.Sequential(*(layer for block in blocks for layer in block))


def state_of(model: nn.Module) -> tuple:
    """Everything that update_bn may not leave changed after a failure."""
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        [module.training for module in model.modules()],
        [getattr(module, "momentum", None) for module in model.modules()],
        [len(module._forward_pre_hooks) for module in model.modules()],
        [id(buffer) for buffer in model.buffers()],
    )


def assert_same_state(model: nn.Module, before: tuple) -> None:
    tensors, *rest = state_of(model)
    assert rest == list(before[1:])
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[0][name]), name


# --- population statistics -------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [2, 7, 32, 256])
@pytest.mark.parametrize("order", ["sorted", "shuffled"])
def test_any_order_and_batch_size_gives_the_population(order, batch_size):
    x = data()
    if order == "shuffled":
        x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(1))]
    layer = nn.BatchNorm1d(CHANNELS)
    polyak.update_bn(x.split(batch_size), layer)
    assert_population(layer, x)


@settings(deadline=None, max_examples=40)
@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any), seed=st.integers(0, 99))
def test_any_split_gives_the_population(sizes, seed):
    x = data(sum(sizes), seed=seed)
    layer = nn.BatchNorm1d(CHANNELS)
    polyak.update_bn(x.split(sizes), layer)
    assert_population(layer, x)
    assert layer.num_batches_tracked == sum(size > 0 for size in sizes)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (nn.BatchNorm1d, (5,)),
        (nn.BatchNorm2d, (3, 4)),
        (nn.BatchNorm3d, (2, 3, 2)),
        (nn.SyncBatchNorm, (3, 4)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_kind_of_layer(kind, shape, dtype):
    x = data(50, *shape).to(dtype)
    layer = kind(CHANNELS, dtype=dtype)
    polyak.update_bn(x.split(16), layer)
    assert_population(layer, x, rtol=3e-5 if dtype == torch.float32 else 1e-12)


def test_channels_last():
    x = data(50, 4, 4)
    layer = nn.BatchNorm2d(CHANNELS)
    polyak.update_bn([part.to(memory_format=torch.channels_last) for part in x.split(16)], layer)
    assert_population(layer, x)


def test_batches_of_images_of_different_sizes_count_by_elements():
    small, large = data(8, 2, 2), data(8, 5, 5, seed=1)
    layer = nn.BatchNorm2d(CHANNELS)
    polyak.update_bn([small, large], layer)
    assert_population(
        layer,
        torch.cat(
            [small.flatten(2).transpose(1, 2).flatten(0, 1), large.flatten(2).transpose(1, 2).flatten(0, 1)]
        ),
    )


def test_sorted_data_on_which_torch_loses_the_variance_between_batches():
    x = torch.arange(1000.0)[:, None]
    ours, theirs = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
    polyak.update_bn(x.split(250), ours)
    torch_update_bn(x.split(250), theirs)
    _, variance = population(x)
    assert theirs.running_var < 0.1 * variance
    assert_population(ours, x)


def test_an_uneven_last_batch_counts_for_what_it_holds():
    x = torch.cat([torch.zeros(100, 1), torch.full((2, 1), 50.0)])
    ours, theirs = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
    polyak.update_bn(x.split(100), ours)
    torch_update_bn(x.split(100), theirs)
    assert theirs.running_mean == 25
    assert_population(ours, x)


def test_agrees_with_torch_where_torch_is_right():
    """Even batches with equal moments, layer by layer; torch divides the variance by n - 1."""
    x = data(32)
    batches = [x[torch.randperm(32, generator=torch.Generator().manual_seed(seed))] for seed in range(4)]
    ours, theirs = deep_network(), deep_network()
    polyak.update_bn(batches, ours)
    torch_update_bn(batches, theirs)
    for name, tensor in theirs.state_dict().items():
        expected = tensor * 31 / 32 if name.endswith("running_var") else tensor
        torch.testing.assert_close(ours.state_dict()[name], expected, msg=name)


def test_single_samples():
    x = data(20)
    layer = nn.BatchNorm1d(CHANNELS)
    polyak.update_bn(x.split(1), layer)
    assert_population(layer, x)


def test_a_last_batch_of_one_sample_in_a_deep_network_is_normalised_by_what_was_pooled_before():
    x = data(33)
    model = deep_network(2)
    first, second = model[1], model[4]
    polyak.update_bn([x[:32], x[32:]], model)

    assert_population(first, model[0](x).detach())
    hidden = model[0](x).detach()
    normalised = copy.deepcopy(first).train()
    with torch.no_grad():
        first_batch = model[3](model[2](normalised(hidden[:32])))
        last_sample = model[3](model[2](first.eval()(hidden[32:])))
    assert_population(second, torch.cat([first_batch, last_sample]))


def test_empty_batches_are_skipped():
    x = data(64)
    model = nn.Sequential(nn.Unflatten(1, (2, -1)), nn.BatchNorm1d(2))
    polyak.update_bn([x[:0], x[:32], (x[:0], "labels"), x[32:], []], model)
    assert model[1].num_batches_tracked == 2

    layer = nn.BatchNorm1d(CHANNELS)
    polyak.update_bn([x[:0], x], layer, forward=lambda model, batch: model(batch))
    assert_population(layer, x)


def test_a_shared_layer_is_pooled_over_its_calls():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(CHANNELS)

        def forward(self, x: Tensor) -> None:
            self.norm(x)
            self.norm(input=3 * x[:5] + 1)

    x = data(40)
    model = Twice()
    polyak.update_bn(x.split(20), model)
    assert_population(model.norm, torch.cat([x, *(3 * part[:5] + 1 for part in x.split(20))]))
    assert model.norm.num_batches_tracked == 4


def test_old_statistics_leave_no_trace():
    layer = nn.BatchNorm1d(CHANNELS)
    layer.running_mean.fill_(torch.nan)
    layer.running_var.fill_(torch.inf)
    layer.num_batches_tracked.fill_(1000)
    x = data()
    polyak.update_bn(x.split(100), layer)
    assert_population(layer, x)
    assert layer.num_batches_tracked == 6


# --- dtypes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch_size", [1, 64])
def test_half_precision_layers_get_the_nearest_value_to_the_population(dtype, batch_size):
    x = data(2000 if batch_size > 1 else 100).to(dtype)
    layer = nn.BatchNorm1d(CHANNELS, dtype=dtype)
    polyak.update_bn(x.split(batch_size), layer)
    mean, variance = population(x)
    assert torch.equal(layer.running_mean, mean.to(dtype))
    assert torch.equal(layer.running_var, variance.to(dtype))


def test_half_precision_inputs_of_full_precision_layers():
    x = data(2000, 3).bfloat16()
    layer = nn.BatchNorm1d(CHANNELS)
    polyak.update_bn(x.split(64), layer)
    assert_population(layer, x)


def test_a_half_precision_network_in_depth():
    x = data(512).bfloat16()
    model = deep_network(2).bfloat16()
    seen = []
    model[4].register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    polyak.update_bn(x.split(64), model)
    mean, variance = population(torch.cat(seen))
    assert torch.equal(model[4].running_mean, mean.bfloat16())
    assert torch.equal(model[4].running_var, variance.bfloat16())


# --- passes ----------------------------------------------------------------------------------------------


def evaluation_statistics(model: nn.Sequential, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Layer by layer: the population of what reaches each BatchNorm layer once all before it are right."""
    model = copy.deepcopy(model).double().eval()
    x = x.double()
    statistics = []
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, nn.BatchNorm1d):
                mean, variance = population(x)
                layer.running_mean.copy_(mean)
                layer.running_var.copy_(variance)
                statistics.append((mean, variance))
            x = layer(x)
    return statistics


@pytest.mark.parametrize("batch_size", [1, 50])
def test_k_passes_settle_the_first_k_layers_on_sorted_data(batch_size):
    x = data(200)
    expected = evaluation_statistics(deep_network(3), x)
    for passes in (1, 2, 3, 4):
        model = deep_network(3)
        polyak.update_bn(x.split(batch_size), model, passes=passes)
        errors = [
            (layer.running_var.double() / variance - 1).abs().max()
            for layer, (_, variance) in zip(model[1::3], expected, strict=True)
        ]
        assert max(errors[:passes]) < 1e-4
        assert not errors[passes:] or min(errors[passes:]) > 1e-2
    for layer, (mean, _) in zip(model[1::3], expected, strict=True):
        torch.testing.assert_close(layer.running_mean.double(), mean, rtol=1e-4, atol=1e-5)


def test_a_generator_serves_one_pass_and_is_refused_for_more():
    x = data()
    model = deep_network()
    before = state_of(model)
    batches = (part for part in x.split(32))
    with pytest.raises(polyak.errors.BatchError, match="only once"):
        polyak.update_bn(batches, model, passes=2)
    assert_same_state(model, before)
    polyak.update_bn(batches, model)
    assert model[1].num_batches_tracked == 17


@pytest.mark.parametrize("passes", [0, -1, 1.5, "2"])
def test_passes_out_of_range(passes):
    with pytest.raises(polyak.errors.OptionError, match="at least 1"):
        polyak.update_bn([data()], deep_network(), passes=passes)


# --- batches ---------------------------------------------------------------------------------------------


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(CHANNELS)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.norm(x * scale)


Pair = namedtuple("Pair", ["x", "label"])


@pytest.mark.parametrize(
    ("wrap", "forward"),
    [
        (lambda x: x, None),
        (lambda x: (x, "label"), None),
        (lambda x: [x], None),
        (lambda x: Pair(x, 3), None),
        (lambda x: {"x": x / 2, "scale": 2.0}, None),
        (lambda x: {"image": {"pixels": x}}, lambda model, batch: model(x=batch["image"]["pixels"])),
        (lambda x: ("index", x), lambda model, batch: model(batch[1])),
    ],
    ids=["tensor", "tuple", "list", "namedtuple", "mapping", "nested with forward", "second with forward"],
)
@pytest.mark.parametrize("device", [None, "cpu"])
def test_forms_of_batches(wrap, forward, device):
    x = data(100)
    model = Keywords()
    polyak.update_bn([wrap(part) for part in x.split(32)], model, device, forward=forward)
    assert_population(model.norm, x)


def test_a_data_loader():
    x = data(100)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.arange(100)), batch_size=32)
    layer = nn.BatchNorm1d(CHANNELS)
    polyak.update_bn(loader, layer, passes=2)
    assert_population(layer, x)


@pytest.mark.parametrize("loader", [[], [torch.empty(0, CHANNELS)], iter(())])
def test_no_samples(loader):
    model = deep_network()
    before = state_of(model)
    with pytest.raises(polyak.errors.BatchError, match="no sample"):
        polyak.update_bn(loader, model)
    assert_same_state(model, before)


def test_progress_goes_to_stderr(capsys):
    polyak.update_bn(data().split(100), nn.BatchNorm1d(CHANNELS), passes=2, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "12/12" in err


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
    polyak.update_bn((pytest.fail("the loader was consumed") for _ in range(1)), model)


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
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    x = data(96)
    model = nn.Sequential(torch.compile(deep_network(), backend=backend))
    with torch.no_grad():
        model(x[:32])
    n_graphs = len(graphs)
    assert n_graphs > 0
    polyak.update_bn(x.split(32), model)
    assert len(graphs) == n_graphs


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
