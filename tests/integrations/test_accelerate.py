"""accelerate, which needs no callback: `attach` and its own way of saving what it is told of."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn

import polyak


def run(folder, n_steps, load=False):
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    average = polyak.Average(model, polyak.EMA(half_life=2))
    polyak.attach(optimizer, average)
    accelerator.register_for_checkpointing(average)
    if load:
        accelerator.load_state(str(folder))
    for _ in range(n_steps):
        accelerator.backward(model(torch.ones(2, 3)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    accelerator.save_state(str(folder))
    return average


def test_save_state_and_load_state_carry_the_average(tmp_path):
    whole = run(tmp_path / "whole", 6)
    run(tmp_path / "half", 3)
    resumed = run(tmp_path / "half", 3, load=True)
    assert resumed.n_averaged == whole.n_averaged == 6
    for name, tensor in whole.named_tensors().items():
        assert torch.equal(tensor, resumed.named_tensors()[name])
