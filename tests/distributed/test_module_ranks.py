"""Two ranks: the averaged model as a module, and parameters that thaw while they are sharded."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import polyak
from polyak.errors import StructureError
from ranks import run_on_ranks

X = torch.linspace(-1, 1, 30).view(10, 3)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))


def under_ddp():
    """The bare model is copied, once on each rank."""
    model = nn.parallel.DistributedDataParallel(network())
    average = polyak.Average(model, "uniform")
    module = average.module()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(X + dist.get_rank()).square().mean().backward()
        optimizer.step()
        average.update()
    y = module(X)
    model.eval()
    with average.applied():
        return type(module) is nn.Sequential and torch.equal(y, model.module(X).detach())


def sharded():
    """A module is refused, with what works instead."""
    student, teacher = fully_shard(network()), fully_shard(network())
    average = polyak.Average(student, "uniform")
    try:
        average.module()
    except StructureError as error:
        refusal = str(error)
    for _ in range(2):
        with torch.no_grad():
            student[0].weight.to_local().add_(1.0)
        average.update()
        average.copy_to(teacher)
    return refusal, torch.equal(teacher[0].weight.full_tensor(), student[0].weight.full_tensor() - 0.5)


def thawed(shard):
    """Averages of a run that thaws its first layer, which is resumed in the middle, and once more after it."""
    model = network()[::2]
    model[0].requires_grad_(False)
    model = shard(model)
    average, optimizer = (
        polyak.Average(model, "ema:decay=0.8"),
        torch.optim.SGD(model[1].parameters(), lr=0.1),
    )
    for step in range(9):
        if step == 4:
            model[0].requires_grad_(True)
            optimizer.add_param_group({"params": list(model[0].parameters())})
        if step in (3, 6):
            state = average.state_dict()
            model[0].requires_grad_(False)  # as a model that has just been made
            average = polyak.Average(model, "ema:decay=0.8")
            average.load_state_dict(state)
            model[0].requires_grad_(step > 4)
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
        average.update()
    tensors = average.named_tensors()
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in tensors.items()}


def on_two_ranks():
    sharded_run, plain_run = thawed(fully_shard), thawed(lambda model: model)
    off = max((sharded_run[name] - plain_run[name]).abs().max().item() for name in plain_run)
    return under_ddp(), sharded(), off


def test_modules_and_thawed_parameters_of_parallel_models():
    for equal, (refusal, follows), off in run_on_ranks(on_two_ranks):
        assert equal and follows
        assert "average.copy_to(second) after each update" in refusal
        assert off < 1e-6
