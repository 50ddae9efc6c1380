"""Reproducible training in a few lines, for the tests of SWA."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn


def parameter(*values: float, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=dtype))


def network(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)


def gradients(model: nn.Module, steps: range) -> Iterator[None]:
    """Reproducible gradients that depend on the step and on the weights."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator).to(p.dtype)
            p.grad = (noise + 0.1 * p).detach()
        yield


def train(opt: torch.optim.Optimizer, model: nn.Module, steps: range) -> None:
    for _ in gradients(model, steps):
        opt.step()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(left, right, strict=True))
