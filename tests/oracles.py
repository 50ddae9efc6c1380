"""Obvious float64 references. They share no code with the package."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn


def uniform(n: int, gap: int = 1) -> np.ndarray:
    return np.full(n, 1 / n)


def ema_half_life(half_life: float) -> Callable[[int, int], np.ndarray]:
    def weights(n: int, gap: int = 1) -> np.ndarray:
        raw = 0.5 ** (gap * (n - np.arange(1, n + 1)) / half_life)
        return raw / raw.sum()

    return weights


def ema_decay(decay: float) -> Callable[[int, int], np.ndarray]:
    def weights(n: int, gap: int = 1) -> np.ndarray:
        raw = decay ** (n - np.arange(1.0, n + 1))
        return raw / raw.sum()

    return weights


def ema_first_copied(decay: float) -> Callable[[int, int], np.ndarray]:
    def weights(n: int, gap: int = 1) -> np.ndarray:
        raw = (1 - decay) * decay ** (n - np.arange(1.0, n + 1))
        raw[0] = decay ** (n - 1)
        return raw

    return weights


def power(gamma: float) -> Callable[[int, int], np.ndarray]:
    def weights(n: int, gap: int = 1) -> np.ndarray:
        edges = (np.arange(n + 1) / n) ** (gamma + 1)
        return np.diff(edges)

    return weights


def polynomial(eta: float) -> Callable[[int, int], np.ndarray]:
    def weights(n: int, gap: int = 1) -> np.ndarray:
        shares = np.zeros(0)
        for k in range(1, n + 1):
            c = (eta + 1) / (k + eta)
            shares = np.append(shares * (1 - c), c)
        return shares

    return weights


def mean_of(samples: Sequence[Tensor], weights: np.ndarray) -> Tensor:
    """Σ a_i · w_i in float64."""
    total = torch.zeros(samples[0].shape, dtype=torch.float64)
    for sample, weight in zip(samples, weights, strict=True):
        total += float(weight) * sample.double()
    return total


class RandomWalk:
    """A model whose parameters take reproducible random steps, with every visited value kept in float64."""

    def __init__(self, model: nn.Module, scale: float = 0.01, seed: int = 0):
        self.model = model
        self.scale = scale
        self.generator = torch.Generator().manual_seed(seed)
        self.visited: list[dict[str, Tensor]] = []

    def step(self) -> None:
        with torch.no_grad():
            for parameter in self.model.parameters():
                change = torch.randn(parameter.shape, generator=self.generator) * self.scale
                parameter.copy_(parameter + change.to(parameter.dtype))
        self.visited.append({n: p.detach().double().clone() for n, p in self.model.named_parameters()})


def relative_error(value: Tensor, reference: Tensor, movement: Tensor) -> float:
    """The largest error as a share of how far the weights moved."""
    return float((value.double() - reference).abs().max() / movement.abs().max())
