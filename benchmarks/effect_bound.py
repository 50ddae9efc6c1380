"""The best that any linear average of a run could do: fitted combinations of its blocks and its live weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

import polyak

__all__ = ["Combinations"]

# Directions in which blocks differ by less than this part of the most are rounding.
_LEAST_SCALE = 1e-6


class Combinations:
    """All w = live + Σ_k a_k (block_k - live) with real a_k: every signed combination whose weights sum to 1.

    Positions are coordinates along the principal axes of the block_k - live, in the unit of the weights, in which
    descending is well scaled: the a_k themselves belong to vectors that are nearly parallel.

    Args:
        trajectory: a recorded run with its live weights.
        model: of that run; all its parameters are averaged.
    """

    def __init__(self, trajectory: polyak.Trajectory, model: nn.Module):
        self._trajectory, self._model = trajectory, model
        self._live = self._vector(trajectory.live())
        count = len(trajectory)
        alone = [polyak.Weights([float(k == at) for k in range(count)]) for at in range(count)]
        shifts = [self._vector(one) - self._live for one in trajectory.average_many(alone)]
        _, scales, axes = torch.linalg.svd(torch.stack(shifts), full_matrices=False)
        self._axes = axes[scales > _LEAST_SCALE * scales[0]]

    def lowest(
        self, loss: Callable[[nn.Module], Tensor], starts: Sequence[polyak.Profile], iterations: int
    ) -> dict[str, Tensor]:
        """The weights of the lowest ``loss`` that L-BFGS finds, name to tensor.

        It begins at the best of the live weights and ``starts``, and ends nowhere above that. The minimum is a local
        one: nothing says that there is none below it, only that no profile of ``starts`` is.
        """
        objective = _Objective(self._model, loss)

        def value(position: Tensor) -> Tensor:
            weights = self._weights(position)
            return functional_call(
                objective, {f"model.{name}": tensor for name, tensor in weights.items()}, ()
            )

        with torch.no_grad():
            averages = [self._vector(weights) for weights in self._trajectory.average_many(list(starts))]
            positions = [self._axes @ (vector - self._live) for vector in (self._live, *averages)]
            start = min(positions, key=lambda position: value(position).item())
        position = start.clone().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [position], max_iter=iterations, history_size=iterations, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            found = value(position)
            found.backward()
            return found

        optimizer.step(closure)
        with torch.no_grad():
            return self._weights(min((position, start), key=lambda each: value(each).item()))

    def _weights(self, position: Tensor) -> dict[str, Tensor]:
        parameters = dict(self._model.named_parameters())
        parts = (self._live + position @ self._axes).split([p.numel() for p in parameters.values()])
        return {name: part.view(p.shape) for (name, p), part in zip(parameters.items(), parts, strict=True)}

    def _vector(self, weights: dict[str, Tensor]) -> Tensor:
        return torch.cat([weights[name].reshape(-1) for name, _ in self._model.named_parameters()])


class _Objective(nn.Module):
    """A loss as a module, in which ``functional_call`` exchanges the parameters."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module], Tensor]):
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self) -> Tensor:
        return self._loss(self.model)
