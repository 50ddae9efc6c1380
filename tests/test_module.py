"""`Average.module()`: the averaged model beside the live one."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import oracles
import polyak
from polyak.errors import OptionError, StructureError, SwapError


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 2)).to(dtype)


def walk_on(model, *averages, steps=5, seed=0):
    walk = oracles.RandomWalk(model, seed=seed)
    for _ in range(steps):
        walk.step()
        for average in averages:
            average.update()


def inside(average, x):
    """What the live model gives with the average in it."""
    with average.applied() as model, torch.no_grad():
        modes = [m.training for m in model.modules()]
        model.eval()
        y = model(x)
        for module, mode in zip(model.modules(), modes, strict=True):
            module.training = mode
    return y


def storages(*modules_and_averages):
    """Bytes of all memory behind them, what they have in common counted once."""
    found = {}
    for thing in modules_and_averages:
        tensors = (
            [*thing.parameters(), *thing.buffers()]
            if isinstance(thing, nn.Module)
            else thing.state_dict()["average"].values()
        )
        found |= {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(found.values())


X = torch.linspace(-1, 1, 30).view(10, 3)


@pytest.mark.parametrize("scheme", ["uniform", "ema:half_life=3", "power:gamma=2", "polynomial:eta=4"])
@pytest.mark.parametrize(
    "options", [{}, {"buffers": "average"}, {"compensated": True}, {"dtype": torch.float64}]
)
def test_it_is_at_every_step_what_applied_puts_into_the_live_model(scheme, options):
    model = network()
    average = polyak.Average(model, scheme, **options)
    module = average.module()
    assert torch.equal(module(X), copy.deepcopy(model).eval()(X))
    for seed in range(4):
        model.train()(X + seed)
        walk_on(model, average, steps=2, seed=seed)
        assert torch.equal(module(X), inside(average, X))
        assert torch.equal(average.module()(X), inside(average, X))
    assert model.training and not any(m.training for m in module.modules())
    assert not any(p.requires_grad for p in module.parameters())
    assert module(X).grad_fn is None


class _Allocations(TorchDispatchMode):
    """Bytes of new memory that operations return."""

    def __init__(self):
        super().__init__()
        self.nbytes, self._seen = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {
            t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in known:
                self.nbytes += t.untyped_storage().nbytes()
        return result


@pytest.mark.parametrize("started", [True, False])
def test_its_parameters_take_no_memory_also_while_it_is_made(started):
    model = nn.Sequential(nn.Linear(1000, 1000), nn.BatchNorm1d(1000), nn.Linear(1000, 1000))
    model[2].requires_grad_(False)
    average = polyak.Average(model, "uniform")
    if started:
        average.update()
    before = storages(model, average)
    with _Allocations() as made:
        module = average.module()
    buffers = sum(b.nbytes for b in model.buffers())
    assert storages(model, average, module) == before + buffers
    assert made.nbytes <= 4 * buffers
    average.update()
    another = average.module()
    assert storages(model, average, module, another) == before + 2 * buffers


def test_what_has_another_dtype_or_device_follows_as_a_copy():
    model = network(torch.bfloat16)
    average = polyak.Average(model, "uniform")
    module = average.module()
    live = model[0].weight.detach().clone()
    walk_on(model, average)
    assert module[0].weight.dtype == torch.bfloat16
    assert torch.equal(module[0].weight, average.named_tensors()["0.weight"].bfloat16())
    assert not torch.equal(model[0].weight, live)  # and its own memory is not the live model's
    before = model[0].weight.detach().clone()
    walk_on(model, average, steps=1)
    average.update()
    assert not torch.equal(model[0].weight, before)
    wide = polyak.Average(network(), "uniform", dtype=torch.float64)
    module = wide.module()
    weights = wide._binding.model.state_dict()
    kept = {name: value.clone() for name, value in weights.items()}
    nn.init.constant_(weights["0.weight"], 3.0)
    wide.update()
    nn.init.constant_(weights["0.weight"], 7.0)
    wide.update()
    assert torch.equal(weights["0.weight"], torch.full((8, 3), 7.0))
    assert torch.equal(module[0].weight, torch.full((8, 3), 5.0))
    assert torch.equal(module[3].weight, kept["3.weight"])


def test_a_module_that_is_converted_stays_so_and_follows():
    model = network()
    average = polyak.Average(model, "uniform")
    average.update()
    module = average.module().double()
    walk_on(model, average)
    means = average.named_tensors()
    assert all(
        p.dtype == torch.float64 and torch.equal(p, means[n].double()) for n, p in module.named_parameters()
    )
    module.float()
    walk_on(model, average)
    assert module[0].weight.data_ptr() == average.named_tensors()["0.weight"].data_ptr()


# Buffers.


def test_buffers_are_the_live_models_of_each_sample_until_they_are_recomputed():
    model = network()
    average = polyak.Average(model, "uniform", every=2)
    module = average.module()
    model(X)
    walk_on(model, average, steps=2)
    assert torch.equal(module[1].running_mean, model[1].running_mean)
    live = {name: b.clone() for name, b in model.named_buffers()}
    average.update()
    polyak.update_bn([X], module)
    expected = nn.Linear(3, 8)
    expected.load_state_dict(module[0].state_dict())
    torch.testing.assert_close(module[1].running_mean, expected(X).mean(0))
    assert all(torch.equal(b, live[name]) for name, b in model.named_buffers())
    average.update()
    assert torch.equal(module[1].running_mean, model[1].running_mean)


def test_averaged_buffers_are_not_changed_by_recomputing_the_modules():
    model = network()
    average = polyak.Average(model, "uniform", buffers="average")
    module = average.module()
    for value in (1.0, 4.0):
        model[1].running_mean.fill_(value)
        average.update()
    assert torch.equal(module[1].running_mean, torch.full((8,), 2.5))
    polyak.update_bn([X], module)
    model[1].running_mean.fill_(4.0)
    average.update()
    assert torch.equal(module[1].running_mean, torch.full((8,), 3.0))


def test_buffers_that_are_no_part_of_a_state_dict_are_its_own():
    model = nn.Linear(1, 1)
    model.register_buffer("cache", torch.zeros(1), persistent=False)
    model.register_buffer("queue", torch.zeros(1))
    average = polyak.Average(model, "uniform")
    module = average.module()
    model.cache.fill_(1)
    model.queue = torch.ones(3)
    average.update()
    assert module.cache.item() == 0
    assert torch.equal(module.queue, torch.ones(3)) and module.queue is not model.queue


# What stands in a model beside plain layers.


def test_ties_stay_ties():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(4, 3), nn.Linear(3, 4, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x):
            return self.head(self.embedding(x))

    model = Tied()
    average = polyak.Average(model, "uniform")
    copied, made = average.module(), average.module(factory=Tied)
    walk_on(model, average)
    x = torch.arange(4)
    for module in (copied, made):
        assert module.head.weight is module.embedding.weight
        assert torch.equal(module(x), inside(average, x))


def test_frozen_parameters_lie_in_the_live_model_until_they_thaw():
    model = network()
    model[0].requires_grad_(False)
    average = polyak.Average(model, "uniform")
    module = average.module()
    average.update()
    assert module[0].weight.data_ptr() == model[0].weight.data_ptr()
    model[0].requires_grad_(True)
    assert not module[0].weight.requires_grad
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = model[0].weight.detach().clone()
    model(X).square().sum().backward()
    optimizer.step()
    assert torch.equal(module[0].weight, before) and not torch.equal(model[0].weight, before)
    average.update()
    torch.testing.assert_close(module[0].weight, (before + model[0].weight.detach()) / 2)
    assert module[0].weight.data_ptr() == average.named_tensors()["0.weight"].data_ptr()


def test_parameters_that_are_left_out_are_the_live_models():
    model = network()
    average = polyak.Average(model, "uniform", exclude="0.*")
    module = average.module()
    walk_on(model, average)
    assert torch.equal(module[0].weight, model[0].weight)
    model[0].weight = nn.Parameter(torch.ones(8, 3))
    average.update()
    assert torch.equal(module[0].weight, torch.ones(8, 3))


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_weight_norm(norm):
    model = nn.Sequential(norm(nn.Linear(3, 4)), nn.utils.parametrizations.spectral_norm(nn.Linear(4, 2)))
    model(X)  # after which the older kind holds a weight that torch does not copy
    average = polyak.Average(model, "uniform")
    module = average.module()
    walk_on(model, average)
    assert torch.equal(module(X), inside(average, X))


@pytest.mark.parametrize("how", ["whole", "inner", "in place", "parallel"])
def test_wrappers_are_left_out(how):
    model = network()
    wrapped = {
        "whole": lambda: torch.compile(model, backend="eager"),
        "inner": lambda: nn.Sequential(torch.compile(model, backend="eager")),
        "in place": lambda: model,
        "parallel": lambda: nn.DataParallel(model),
    }[how]()
    if how == "in place":
        model.compile(backend="eager")
    wrapped(X)
    average = polyak.Average(wrapped, "uniform")
    module = average.module()
    walk_on(model, average)
    assert type(module) is nn.Sequential
    assert torch.equal(module(X), inside(average, X))


def test_hooks_are_copied():
    calls = []
    model = nn.Sequential(nn.Linear(3, 1))
    model[0].register_forward_hook(lambda module, args, output: calls.append(module) or output * 2)
    average = polyak.Average(model, "uniform")
    module = average.module()
    assert torch.equal(module(X), model(X))
    assert calls == [module[0], model[0]]


class Locked(nn.Module):
    """What cannot be copied, as it holds a generator."""

    def __init__(self, width=2):
        super().__init__()
        self.linear, self.rows = nn.Linear(3, width), (row for row in ())

    def forward(self, x):
        return self.linear(x)


def test_what_cannot_be_copied_is_made_anew():
    model = Locked()
    average = polyak.Average(model, "uniform")
    with pytest.raises(StructureError, match=r"Locked cannot be copied \(TypeError: .*factory=…"):
        average.module()
    module = average.module(factory=Locked)
    assert module.linear.weight.data_ptr() == model.linear.weight.data_ptr()
    walk_on(model, average)
    assert torch.equal(module(X), inside(average, X))
    assert module.linear.weight.data_ptr() == average.named_tensors()["linear.weight"].data_ptr()
    half = average.module(factory=lambda: Locked().half())
    walk_on(model, average)
    assert torch.equal(half.linear.weight, module.linear.weight.half())


def test_another_factory_is_refused():
    average = polyak.Average(Locked(), "uniform")
    with pytest.raises(StructureError, match=r"another model .*'linear.weight' as \(5, 3\), not \(2, 3\)"):
        average.module(factory=lambda: Locked(5))
    with pytest.raises(OptionError, match="a plain torch.nn.Module is needed, got int"):
        average.module(factory=lambda: 3)

    def on_meta():
        with torch.device("meta"):
            return Locked()

    with pytest.raises(StructureError, match="'linear.weight', 'linear.bias' of what factory"):
        average.module(factory=on_meta)
    with pytest.raises(StructureError, match="no data yet"):
        polyak.Average(nn.LazyLinear(3), "uniform").module()


# What happens to the average meanwhile.


def test_a_swap_leaves_it_alone_and_it_may_be_made_inside_one():
    model = network()
    average, other = polyak.Average(model, "uniform"), polyak.Average(model, "ema:decay=0.5")
    module = average.module()
    walk_on(model, average, other)
    expected = module(X)
    with average.applied():
        polyak.update_bn([X], model)
        assert torch.equal(module(X), expected)
        recalibrated = average.module()
        assert torch.equal(recalibrated(X), copy.deepcopy(model).eval()(X))
        average.state_dict()
    with other.applied():
        assert torch.equal(module(X), expected)
        with pytest.raises(SwapError):
            average.module()
    assert torch.equal(module(X), expected)


def test_it_follows_a_state_that_is_loaded_and_a_change_of_scheme():
    model = network()
    average = polyak.Average(model, "uniform")
    empty = copy.deepcopy(average.state_dict())
    module = average.module()
    walk_on(model, average)
    state = copy.deepcopy(average.state_dict())
    walk_on(model, average, seed=1)
    average.load_state_dict(state)
    assert torch.equal(module[0].weight, state["average"]["0.weight"])
    average.scheme = "ema:decay=0.9"
    walk_on(model, average, seed=2)
    assert torch.equal(module(X), inside(average, X))
    average.scheme = "uniform"
    average.load_state_dict(empty)
    assert torch.equal(module[0].weight, model[0].weight)
    average.update()
    assert torch.equal(module[0].weight, model[0].weight)
    assert module[0].weight.data_ptr() == average.named_tensors()["0.weight"].data_ptr()


@pytest.mark.parametrize("change", [nn.Module.double, lambda m: m.to(memory_format=torch.channels_last)])
def test_it_follows_where_the_means_move_in_memory(change):
    model = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Conv2d(64, 8, 1))
    model[1].requires_grad_(False)
    average = polyak.Average(model, "uniform")
    module = average.module()
    walk_on(model, average)
    change(model)
    walk_on(model, average, seed=1)
    means = average.named_tensors()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter, means[name].to(parameter.dtype), rtol=0, atol=1e-7)
    with torch.no_grad():
        x = torch.randn(1, 64, 4, 4)
        assert module(x).isfinite().all()


def test_a_sample_that_is_left_out_leaves_it_as_it_was():
    model = network()
    average = polyak.Average(model, "uniform")
    module = average.module()
    walk_on(model, average)
    expected = module(X)
    model[3].weight.data.fill_(float("nan"))
    average.update()
    assert torch.equal(module(X), expected)


def test_training_it_is_refused_at_the_next_sample():
    model = network()
    average = polyak.Average(model, "uniform")
    module = average.module()
    module.train()
    average.update()
    module.requires_grad_(True)
    with pytest.raises(
        StructureError, match=r"'0.weight', .* of a module\(\) of this average require gradients"
    ):
        average.update()
    assert average.n_averaged == 1
    module.requires_grad_(False)
    average.update()
    own = copy.deepcopy(module).requires_grad_(True)
    nn.init.zeros_(own[0].weight)
    average.update()
    assert torch.equal(module(X), module(X)) or module.training
    assert average.named_tensors()["0.weight"].count_nonzero() > 0


def test_copies_of_an_average_have_modules_of_their_own():
    model = network()
    average = polyak.Average(model, "uniform")
    module = average.module()
    walk_on(model, average)
    expected = module(X)
    for copied in (copy.deepcopy(average), pickle.loads(pickle.dumps(average))):
        walk_on(copied._binding.model, copied, seed=3)
        assert torch.equal(module(X), expected)
        assert torch.equal(copied.module()(X), inside(copied, X))
    again = pickle.loads(pickle.dumps(module))
    assert torch.equal(again(X), expected)


def test_a_module_that_nobody_holds_is_let_go():
    model = network()
    average = polyak.Average(model, "uniform")
    module = average.module()
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None
    average.update()
    assert average._modules is not None and not average._modules._links
