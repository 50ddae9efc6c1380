"""Runs to record, with every sample kept in float64."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import polyak
from oracles import RandomWalk
from polyak.trajectory import Block


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


class NormedWeight(nn.Module):
    """One weight, and a BatchNorm layer whose mean is that of the weight where the statistics fit."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.norm = nn.BatchNorm1d(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x * self.weight)


class RecordedWalk:
    """A model that walks at random while a recorder watches.

    Steps in ``poisoned`` end with a NaN in one weight, for that step only.
    """

    def __init__(self, directory: Path, poisoned: Collection[int] = (), **options):
        self.model = small_model()
        self.walk = RandomWalk(self.model)
        self.poisoned = poisoned
        self.recorder = polyak.Recorder(self.model, directory, **options)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.walk.step()
            weight = self.model[0].weight.data
            kept = weight[0, 0].item()
            if len(self.walk.visited) in self.poisoned:
                weight[0, 0] = float("nan")
            self.recorder.update(loss=float(len(self.walk.visited)))
            weight[0, 0] = kept

    def samples(self, block: Block) -> list[int]:
        """The steps whose weights are in a block."""
        every = self.recorder.every
        steps = [step for step in range(block.start + 1, block.stop + 1) if step % every == 0]
        return [step for step in steps if step not in self.poisoned]

    def mean(self, steps: Sequence[int], weights: Sequence[float] | None = None) -> dict[str, Tensor]:
        """The float64 mean of the weights after ``steps``."""
        shares = [1 / len(steps)] * len(steps) if weights is None else weights
        visited = self.walk.visited
        return {
            name: sum(share * visited[step - 1][name] for step, share in zip(steps, shares, strict=True))
            for name in visited[0]
        }


def largest_error(values: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """The largest difference over all tensors of the reference."""
    return max(float((values[name].double() - reference[name]).abs().max()) for name in reference)
