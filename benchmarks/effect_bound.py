"""The best that any linear average of a run could have done: combinations fitted on the test examples themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import polyak
from polyak.demo._tasks import Examples

__all__ = ["lowest_loss"]

# Directions in which blocks differ by less than this part of the most are rounding.
_LEAST_SCALE = 1e-6


def lowest_loss(
    trajectory: polyak.Trajectory,
    model: nn.Module,
    loss: Callable[[nn.Module], Tensor],
    starts: Sequence[polyak.Profile | str],
    iterations: int = 30,
) -> float:
    """The lowest ``loss`` of w = live + Σ_k a_k (block_k - live) over all real a_k, by L-BFGS.

    Every signed combination of blocks and live weights that sums to 1 is of this form. The a_k are moved along the
    principal axes of the block_k - live, in units of their length, in which the problem is well scaled. It begins at
    the start of the lowest loss, or at the live weights, and never ends above it. A local minimum: nothing says that
    there is none below it, but no profile that was tried is.
    """
    live = _vector(model, trajectory.live())
    units = [polyak.Weights([float(k == at) for k in range(len(trajectory))]) for at in range(len(trajectory))]
    blocks = torch.stack([_vector(model, one) - live for one in trajectory.average_many(units)])  # [K, P]
    _, scales, axes = torch.linalg.svd(blocks, full_matrices=False)
    axes = axes[scales > _LEAST_SCALE * scales[0]]
    shifts = [live - live, *(_vector(model, one) - live for one in trajectory.average_many(list(starts)))]
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    sizes = [shape.numel() for shape in shapes.values()]
    objective = _Objective(model, loss)

    def value(position: Tensor) -> Tensor:
        parts = (live + position @ axes).split(sizes)
        named = {f"model.{n}": p.view(s) for (n, s), p in zip(shapes.items(), parts, strict=True)}
        return functional_call(objective, named, ())

    with torch.no_grad():
        positions = [axes @ shift for shift in shifts]
        best = min(positions, key=lambda position: value(position).item())
    position = best.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [position], max_iter=iterations, history_size=iterations, line_search_fn="strong_wolfe"
    )
    lowest = [float("inf")]

    def closure() -> Tensor:
        optimizer.zero_grad()
        found = value(position)
        found.backward()
        lowest[0] = min(lowest[0], found.item())
        trace.append(found.item())
        return found

    trace=[]
    optimizer.step(closure)
    print('   ', len(trace), [round(t,5) for t in trace[::5]])
    return lowest[0]


class _Objective(nn.Module):
    """A loss as a module, in which ``functional_call`` exchanges the parameters."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module], Tensor]):
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self) -> Tensor:
        return self._loss(self.model)


def _vector(model: nn.Module, weights: dict[str, Tensor]) -> Tensor:
    return torch.cat([weights[name].reshape(-1) for name, _ in model.named_parameters()])
