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
from batchnorm_cases import (
    CHANNELS,
    assert_population,
    assert_same_state,
    data,
    deep_network,
    population,
    state_of,
)

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
    with pytest.raises(polyak.errors.OptionError, match="passes must be a whole number in"):
        polyak.update_bn([data()], deep_network(), passes=passes)


def test_the_model_in_the_place_of_the_loader():
    with pytest.raises(
        polyak.errors.OptionError, match=r"a torch.nn.Module is needed as the model, got list"
    ):
        polyak.update_bn(deep_network(), [data()])


def test_a_model_that_is_called_otherwise_is_told_how():
    model = nn.Sequential(nn.BatchNorm1d(2))
    with pytest.raises(TypeError, match="unexpected keyword") as failure:
        polyak.update_bn([{"x": torch.randn(4, 2), "label": torch.zeros(4)}], model)
    assert "forward=lambda model, batch: ..." in failure.value.__notes__[0]


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


def test_progress_goes_to_stderr(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # which makes stderr a terminal to rich
    polyak.update_bn(data().split(100), nn.BatchNorm1d(CHANNELS), passes=2, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "12/12" in err
