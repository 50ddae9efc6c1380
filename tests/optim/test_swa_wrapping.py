"""SWA is a torch optimizer around any torch optimizer, whatever its parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.optim import lr_scheduler

import polyak
from polyak.errors import StructureError
from polyak.optim import SWA
from swa_training import equal, gradients, network, parameter, train, weights

SGD = torch.optim.SGD


def dense_optimizers() -> list[tuple[str, dict[str, Any]]]:
    names = [name for name, value in vars(torch.optim).items() if isinstance(value, type)]
    plain = [(name, {}) for name in sorted(names) if name not in ("Optimizer", "SparseAdam", "Muon", "SGD")]
    return [*plain, ("SGD", {"momentum": 0.9}), ("Adam", {"fused": True}), ("Adam", {"foreach": True})]


def means_of(visited: list[list[Tensor]]) -> list[Tensor]:
    return [torch.stack(column).double().mean(0) for column in zip(*visited, strict=True)]


def check_against_the_bare_optimizer(
    make: Callable[[nn.Sequential], torch.optim.Optimizer], backward: Callable[[nn.Module, int], float]
) -> None:
    """Under SWA an optimizer steps as it does alone, and what it stepped to is averaged."""
    model, twin = network(), network()
    opt, bare = SWA(make(model), swa_start=2, swa_freq=1), make(twin)
    visited = []
    for step in range(6):

        def closure(of: nn.Module, step: int = step) -> float:
            of.zero_grad()
            return backward(of, step)

        assert opt.step(lambda closure=closure: closure(model)) == bare.step(
            lambda closure=closure: closure(twin)
        )
        assert equal(weights(model), weights(twin))
        visited.append(weights(model))
    assert {group["n_avg"] for group in opt.param_groups} == {4}
    assert not equal(visited[0], visited[-1])
    opt.swap_swa_sgd()
    for p, mean in zip(model.parameters(), means_of(visited[2:]), strict=True):
        torch.testing.assert_close(p.double(), mean, rtol=1e-5, atol=1e-6)


def dense(model: nn.Module, step: int) -> float:
    generator = torch.Generator().manual_seed(step)
    loss = model(torch.randn(8, 3, generator=generator)).square().mean()
    loss.backward()
    return loss.item()


@pytest.mark.parametrize(("name", "options"), dense_optimizers())
def test_every_optimizer_of_torch_steps_as_alone(name: str, options: dict[str, Any]) -> None:
    check_against_the_bare_optimizer(lambda m: getattr(torch.optim, name)(m.parameters(), **options), dense)


def test_muon_steps_as_alone() -> None:
    def matrices(model: nn.Sequential) -> torch.optim.Optimizer:
        for p in model.parameters():
            p.requires_grad_(p.ndim == 2)
        return torch.optim.Muon([p for p in model.parameters() if p.ndim == 2], lr=0.01)

    check_against_the_bare_optimizer(matrices, dense)


def test_sparse_adam_steps_as_alone() -> None:
    def sparse(model: nn.Module, step: int) -> float:
        for p in model.parameters():
            p.grad = torch.ones_like(p).to_sparse()
        return float(step)

    check_against_the_bare_optimizer(lambda m: torch.optim.SparseAdam(m.parameters()), sparse)


def test_it_is_an_optimizer_that_shares_what_it_wraps() -> None:
    x = parameter(1.0)
    inner = torch.optim.Adam([x], lr=0.1)
    opt = SWA(inner, swa_start=0, swa_freq=1)
    assert isinstance(opt, torch.optim.Optimizer) and opt.optimizer is inner
    assert opt.param_groups is inner.param_groups and opt.defaults is inner.defaults
    x.grad = torch.ones(1)
    opt.step()
    assert set(opt.state[x]) == {"step", "exp_avg", "exp_avg_sq", "swa_buffer"}
    assert opt.state[x]["exp_avg"] is inner.state[x]["exp_avg"]
    assert "swa_buffer" not in inner.state[x]
    for line in ("SWA (", "lr: 0.1", "n_avg: 1", "step_counter: 1"):
        assert line in repr(opt)
    opt.zero_grad(set_to_none=False)
    assert x.grad.item() == 0
    opt.zero_grad()
    assert x.grad is None


def test_averaging_before_the_first_step_does_not_disturb_adam() -> None:
    x = parameter(1.0)
    opt = SWA(torch.optim.Adam([x], lr=0.1))
    opt.update_swa()
    x.grad = torch.ones(1)
    opt.step()
    assert x.item() == pytest.approx(0.9)


@pytest.mark.parametrize("given_to", ["wrapper", "wrapped"])
@pytest.mark.parametrize(
    "make",
    [
        lambda opt: lr_scheduler.StepLR(opt, 2, 0.5),
        lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=0.2, total_steps=12),
        lambda opt: lr_scheduler.SequentialLR(
            opt, [lr_scheduler.LinearLR(opt, 0.1, 1.0, 4), lr_scheduler.ExponentialLR(opt, 0.9)], [4]
        ),
        lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=1),
    ],
    ids=["step", "one_cycle", "sequential", "plateau"],
)
def test_schedulers_change_both(make: Callable[[torch.optim.Optimizer], Any], given_to: str) -> None:
    def rates(wrap: bool) -> list[tuple[float, float]]:
        model = network()
        inner = SGD(model.parameters(), lr=0.1, momentum=0.9)
        opt = SWA(inner, swa_start=2, swa_freq=1) if wrap else inner
        scheduler = make(opt if given_to == "wrapper" else inner)
        seen = []
        for _ in gradients(model, range(10)):
            opt.step()
            scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
            assert inner.param_groups[0]["lr"] == opt.param_groups[0]["lr"]
            seen.append((opt.param_groups[0]["lr"], next(model.parameters()).sum().item()))
        return seen

    assert rates(wrap=True) == rates(wrap=False)


def test_step_hooks_of_both_fire_once() -> None:
    opt = SWA(SGD([parameter(1.0)], lr=0.1), swa_start=0, swa_freq=1)
    fired = []
    opt.register_step_pre_hook(lambda *_: fired.append("before"))
    opt.optimizer.register_step_post_hook(lambda *_: fired.append("wrapped"))
    opt.register_step_post_hook(lambda o, *_: fired.append(f"after, n_avg {o.param_groups[0]['n_avg']}"))
    opt.step()
    assert fired == ["before", "wrapped", "after, n_avg 1"]


def test_an_average_can_be_attached() -> None:
    model = network()
    opt = SWA(SGD(model.parameters(), lr=0.1), swa_start=0, swa_freq=1)
    average = polyak.Average(model, polyak.Uniform())
    polyak.attach(opt, average)
    train(opt, model, range(5))
    assert average.n_averaged == 5
    for name, p in model.named_parameters():
        assert torch.equal(average.named_tensors()[name], opt.state[p]["swa_buffer"])


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_grad_scaler_skips_do_not_count(fused: bool) -> None:
    x = parameter(1.0)
    opt = SWA(torch.optim.Adam([x], lr=0.1, fused=fused), swa_start=0, swa_freq=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for scale in (1.0, float("inf"), 1.0, float("nan")):
        opt.zero_grad()
        scaler.scale((x * scale).sum()).backward()
        scaler.step(opt)
        scaler.update()
    group = opt.param_groups[0]
    assert (group["step_counter"], group["n_avg"], group["n_skipped"]) == (2, 2, 0)
    assert x.item() == pytest.approx(0.8)
    assert opt.state[x]["swa_buffer"].item() == pytest.approx(0.85)


def test_step_passes_the_closure_and_returns_the_loss() -> None:
    x = parameter(2.0)
    opt = SWA(torch.optim.LBFGS([x], max_iter=4), swa_start=0, swa_freq=1)
    calls = []

    def closure() -> Tensor:
        opt.zero_grad()
        loss = x.square().sum()
        loss.backward()
        calls.append(loss.item())
        return loss.detach()

    assert opt.step(closure) == 4.0 and len(calls) > 1
    assert opt.param_groups[0]["step_counter"] == 1
    assert SWA(SGD([x], lr=0.1)).step() is None


# Which parameters.


def test_a_group_added_later_counts_for_itself() -> None:
    x, y, z = parameter(1.0), parameter(2.0), parameter(3.0)
    opt = SWA(SGD([x], lr=0.1), swa_start=1, swa_freq=1)
    opt.step()
    opt.step()
    opt.add_param_group({"params": y, "n_avg": 9, "step_counter": 9})
    opt.optimizer.add_param_group({"params": [z]})
    opt.step()
    opt.step()
    assert [(g["step_counter"], g["n_avg"]) for g in opt.param_groups] == [(4, 3), (2, 1), (2, 1)]
    assert opt.state[y]["swa_buffer"].item() == 2.0


def test_frozen_parameters_and_those_without_gradient_are_averaged_as_they_are() -> None:
    frozen, idle = nn.Parameter(torch.tensor([0.1]), requires_grad=False), parameter(0.3)
    opt = SWA(torch.optim.Adam([frozen, idle], lr=0.1), swa_start=0, swa_freq=1)
    for _ in range(7):
        opt.step()
    opt.swap_swa_sgd()
    assert (frozen.item(), idle.item()) == (torch.tensor(0.1).item(), torch.tensor(0.3).item())
    opt.swap_swa_sgd()
    idle.grad = torch.ones(1)
    opt.step()
    assert idle.item() == pytest.approx(0.2)


def test_integer_parameters_are_left_alone() -> None:
    whole, x = nn.Parameter(torch.tensor([7]), requires_grad=False), parameter(1.0)
    opt = SWA(SGD([{"params": [whole, x]}, {"params": []}], lr=0.1))
    opt.update_swa()
    x.data.fill_(2.0)
    whole.data.fill_(8)
    opt.swap_swa_sgd()
    assert (whole.item(), x.item()) == (8, 1.0)
    assert set(opt.state_dict()["swa_state"]) == {1}


def test_repeated_and_shared_parameters_are_as_in_torch() -> None:
    x = parameter(1.0)
    with pytest.raises(ValueError, match="more than one parameter group"):
        SWA(SGD([{"params": [x]}], lr=0.1)).add_param_group({"params": [x]})
    with pytest.warns(UserWarning, match="duplicate parameters"):
        inner = SGD([x, x], lr=0.1)
    opt = SWA(inner)
    for value in (1.0, 2.0, 6.0):
        x.data.fill_(value)
        opt.update_swa()
    assert opt.state[x]["swa_buffer"].item() == 3.0
    opt.swap_swa_sgd()
    assert x.item() == 3.0
    opt.swap_swa_sgd()
    saved = opt.state_dict()
    again = SWA(inner)
    again.load_state_dict(saved)
    assert again.state[x]["swa_buffer"].item() == 3.0


def test_memory_layout_and_complex_numbers() -> None:
    view = nn.Parameter(torch.randn(10, 5, 2)[..., 0])
    number = nn.Parameter(torch.tensor([1 + 2j]))
    opt = SWA(SGD([view, number], lr=0.1))
    opt.update_swa()
    before = view.detach().clone()
    with torch.no_grad():
        view.mul_(3)
        number.mul_(3)
    opt.update_swa()
    opt.swap_swa_sgd()
    torch.testing.assert_close(view.detach(), 2 * before)
    assert number.item() == 2 + 4j


def test_a_model_that_changes_dtype_is_followed_and_other_changes_are_refused() -> None:
    model = nn.Linear(2, 2)
    opt = SWA(SGD(model.parameters(), lr=0.1))
    opt.update_swa()
    model.double()
    opt.update_swa()
    assert opt.state[model.weight]["swa_buffer"].dtype == torch.float64
    with torch.no_grad():
        model.weight.data = torch.zeros(1, 2, dtype=torch.float64)
    with pytest.raises(StructureError, match="another shape"):
        opt.update_swa()
    opt.param_groups[0]["params"].append(parameter(1.0))
    with pytest.raises(StructureError, match="new ones as a new group"):
        opt.update_swa()


def test_sharded_parameters_are_refused() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        shard = nn.Parameter(distribute_tensor(torch.zeros(4), mesh, [Shard(0)]))
        with pytest.raises(StructureError, match=r"polyak\.Average with polyak\.Uniform"):
            SWA(SGD([shard], lr=0.1))
    finally:
        dist.destroy_process_group()
