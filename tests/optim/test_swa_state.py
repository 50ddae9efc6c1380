"""SWA saved, loaded, copied: it goes on bitwise as if never interrupted."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from polyak.errors import PolyakError, StateError
from polyak.optim import SWA
from swa_training import equal, network, parameter, train, weights

SGD = torch.optim.SGD


def through_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# Saving and resuming.


def make_adam(model: nn.Sequential) -> torch.optim.Optimizer:
    return torch.optim.Adam(
        [{"params": model[0].parameters(), "lr": 0.02}, {"params": model[2].parameters()}], lr=0.01
    )


def make_momentum(model: nn.Sequential) -> torch.optim.Optimizer:
    return SGD(model.parameters(), lr=0.05, momentum=0.9)


def run(opt: SWA, model: nn.Module, steps: range) -> None:
    for step in steps:
        train(opt, model, range(step, step + 1))
        if not opt._auto_mode and step % 3 == 0:
            opt.update_swa()


@pytest.mark.parametrize("stop", [3, 11])
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [make_adam, make_momentum])
@pytest.mark.parametrize(
    "schedule", [{"swa_start": 5, "swa_freq": 2, "swa_lr": 0.03}, {}], ids=["automatic", "manual"]
)
def test_going_on_from_a_file_equals_never_having_stopped(
    schedule: dict[str, Any],
    make: Callable[[nn.Sequential], torch.optim.Optimizer],
    dtype: torch.dtype,
    swapped: bool,
    stop: int,
) -> None:
    model = network(dtype)
    opt = SWA(make(model), **schedule)
    run(opt, model, range(stop))
    if swapped := swapped and opt.param_groups[0]["n_avg"] > 0:
        opt.swap_swa_sgd()
    saved = through_file({"model": model.state_dict(), "opt": opt.state_dict()})
    if swapped:
        opt.swap_swa_sgd()
    run(opt, model, range(stop, 20))

    resumed_model = network(dtype, seed=1)
    resumed = SWA(make(resumed_model), **schedule)
    resumed.load_state_dict(saved["opt"])
    resumed_model.load_state_dict(saved["model"])
    if swapped:
        resumed.swap_swa_sgd()
    run(resumed, resumed_model, range(stop, 20))

    assert equal(weights(resumed_model), weights(model))
    assert [g["n_avg"] for g in resumed.param_groups] == [g["n_avg"] for g in opt.param_groups]
    ours, theirs = opt.state_dict(), resumed.state_dict()
    assert ours["param_groups"] == theirs["param_groups"] and len(ours["swa_state"]) == 4
    for index, entry in ours["swa_state"].items():
        assert equal([entry["swa_buffer"]], [theirs["swa_state"][index]["swa_buffer"]])
    resumed.swap_swa_sgd()
    opt.swap_swa_sgd()
    assert equal(weights(resumed_model), weights(model))


def test_state_dict_has_torchcontribs_form() -> None:
    model = network()
    opt = SWA(make_adam(model), swa_start=0, swa_freq=1)
    empty = opt.state_dict()
    assert set(empty) == {"opt_state", "swa_state", "param_groups"} and empty["swa_state"] == {}
    train(opt, model, range(3))
    state = opt.state_dict()
    assert set(state["swa_state"]) == set(state["opt_state"]) == {0, 1, 2, 3}
    assert [set(entry) for entry in state["swa_state"].values()] == [{"swa_buffer"}] * 4
    assert [group["params"] for group in state["param_groups"]] == [[0, 1], [2, 3]]
    assert state["param_groups"][1]["n_avg"] == state["param_groups"][1]["step_counter"] == 3
    assert {id(p) for p in opt.state} == {id(p) for p in model.parameters()}


def test_loading_copies_the_averages_and_leaves_the_state_alone() -> None:
    model, twin = network(), network()
    opt, other = SWA(make_momentum(model)), SWA(make_momentum(twin))
    opt.update_swa()
    state = opt.state_dict()
    before = copy.deepcopy(state["swa_state"])
    other.load_state_dict(state)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(1)
    other.update_swa()
    assert all(torch.equal(before[i]["swa_buffer"], state["swa_state"][i]["swa_buffer"]) for i in before)
    assert [g["n_avg"] for g in opt.param_groups] == [1]


def test_loading_leaves_the_optimizers_state_alone() -> None:
    model, twin = network(), network()
    opt, other = SWA(make_momentum(model)), SWA(make_momentum(twin))
    train(opt, model, range(3))
    state = copy.deepcopy(opt.state_dict())
    before = copy.deepcopy(state["opt_state"])
    other.load_state_dict(state)
    train(other, twin, range(3))
    assert [equal([*before[i].values()], [*state["opt_state"][i].values()]) for i in before] == [True] * 4


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.pop("swa_state"), "lacks 'swa_state'"),
        (lambda s: s["param_groups"].pop(), r"groups of \[2\] parameters, this optimizer of \[2, 2\]"),
        (lambda s: s["swa_state"].pop(1), "no average of parameter 1 in group 0"),
        (lambda s: s["swa_state"][2].update(swa_buffer=torch.zeros(7)), "parameter 0 of group 1 has shape"),
    ],
    ids=["kind", "groups", "lost", "shape"],
)
def test_a_state_that_does_not_fit_is_refused_untouched(damage: Callable[[Any], None], message: str) -> None:
    model = network()
    opt = SWA(make_adam(model), swa_start=0, swa_freq=1)
    train(opt, model, range(4))
    state, before = copy.deepcopy(opt.state_dict()), copy.deepcopy(opt.state_dict())
    damage(state)
    with pytest.raises(StateError, match=message):
        opt.load_state_dict(state)
    after = opt.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for part in ("opt_state", "swa_state"):
        assert all(equal([*after[part][i].values()], [*before[part][i].values()]) for i in before[part])


def test_a_state_of_torchcontrib_with_lost_averages_is_refused() -> None:
    """On today's torch it keys averages by id() and parameters by index, so they cannot be told apart."""
    x = parameter(1.0)
    opt = SWA(SGD([x], lr=0.1))
    opt.update_swa()
    state = opt.state_dict()
    state["swa_state"] = {id(x): state["swa_state"][0]}
    with pytest.raises(StateError, match="torchcontrib loses them"):
        opt.load_state_dict(state)


def test_state_hooks_are_called() -> None:
    opt = SWA(SGD([parameter(1.0)], lr=0.1))
    fired = []
    opt.register_state_dict_pre_hook(lambda o: fired.append("save"))
    opt.register_state_dict_post_hook(lambda o, state: {**state, "epoch": 3})
    opt.register_load_state_dict_pre_hook(lambda o, state: fired.append(f"load {state.pop('epoch')}"))
    opt.register_load_state_dict_post_hook(lambda o: fired.append("loaded"))
    state = opt.state_dict()
    opt.load_state_dict(state)
    assert fired == ["save", "load 3", "loaded"] and state["epoch"] == 3
    del opt._optimizer_state_dict_pre_hooks  # as in a torch that keeps them elsewhere
    with pytest.raises(PolyakError, match="_optimizer_state_dict_pre_hooks"):
        opt.state_dict()


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_and_pickles_go_on_by_themselves(duplicate: Callable[[Any], Any], swapped: bool) -> None:
    model = network(torch.bfloat16)
    opt = SWA(make_adam(model), swa_start=2, swa_freq=1, swa_lr=0.03)
    lr_scheduler.StepLR(opt, 100)
    train(opt, model, range(6))
    if swapped:
        opt.swap_swa_sgd()
    twin, other = duplicate((model, opt))
    if swapped:
        opt.swap_swa_sgd()
        other.swap_swa_sgd()
    train(opt, model, range(6, 12))
    assert other.param_groups[0]["n_avg"] == 4 and opt.param_groups[0]["n_avg"] == 10
    train(other, twin, range(6, 12))
    assert equal(weights(twin), weights(model))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(opt.state[p]["swa_buffer"], other.state[q]["swa_buffer"])


def test_saved_and_loaded_it_is_the_same_to_the_bit_where_the_next_sample_is_not_finite() -> None:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(300)), nn.Parameter(torch.randn(1200, 1000))]
    running = SWA(SGD(params, lr=0.1))
    for _ in range(7):
        for param in params:
            param.data.mul_(1.01)
        running.update_swa()
    state = through_file(running.state_dict())
    resumed = SWA(SGD(params, lr=0.1))
    resumed.load_state_dict(state)
    params[1].data.fill_(float("nan"))
    for opt in (running, resumed):
        opt.update_swa()
        assert opt.param_groups[0]["n_skipped"] == 1
    for param in params:
        assert torch.equal(running.state[param]["swa_buffer"], resumed.state[param]["swa_buffer"])
