"""Many averages of one trajectory, one after the other, with few of them in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polyak.accumulator import mean_dtype
from polyak.profiles import Profile, Tail, Weights
from polyak.trajectory import Trajectory

__all__ = ["averages", "fold_in"]

# Small models are averaged many profiles at a time, as reading each block costs more than its arithmetic.
_TOGETHER_BYTES = 64 << 20


def averages(
    trajectory: Trajectory, profiles: Sequence[Profile]
) -> Iterator[tuple[Profile, dict[str, Tensor]]]:
    """Each profile with its average: name to tensor, which the next step of the iteration may overwrite.

    Tails come first, shortest first: each is the one before plus the blocks that it reaches further back, so
    that all of them read every block about once and hold one running mean. Of the others there are as many
    in memory as 64 MB hold, at least one.
    """
    yield from _nested_tails(trajectory, [profile for profile in profiles if isinstance(profile, Tail)])
    others = [profile for profile in profiles if not isinstance(profile, Tail)]
    first = 0
    together = 1
    while first < len(others):
        chunk = others[first : first + together]
        means = trajectory.average_many(chunk)
        together = max(1, _TOGETHER_BYTES // max(1, _size_bytes(means[0])))
        yield from zip(chunk, means, strict=True)
        first += len(chunk)


def _nested_tails(
    trajectory: Trajectory, tails: Sequence[Profile]
) -> Iterator[tuple[Profile, dict[str, Tensor]]]:
    weights = {tail: np.asarray(trajectory.explain(tail).coefficients) for tail in tails}
    running: dict[str, Tensor] = {}
    reached = np.zeros(len(trajectory.blocks))
    for tail in sorted(tails, key=lambda tail: weights[tail][-1], reverse=True):
        kept, further = _split(weights[tail], reached)
        share = float(further.sum())
        if share > 0:
            fold_in(running, trajectory.average(Weights(further.tolist())), share / (kept + share))
        reached = weights[tail]
        yield tail, running


def _split(longer: NDArray[np.float64], shorter: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
    """The share c of ``shorter`` in ``longer``, and what is left: longer = c · shorter + rest, rest ≥ 0."""
    kept = longer[-1] / shorter[-1] if shorter[-1] else 0.0
    rest = longer - kept * shorter
    # What rounding leaves of blocks that both cover alike must not have those blocks read again.
    return kept, np.where(rest > 1e-12, rest, 0.0)


@torch.no_grad()
def fold_in(running: dict[str, Tensor], mean: dict[str, Tensor], coefficient: float) -> None:
    """m += c (w - m); whole numbers stay those of the newest blocks, which came first."""
    for name, tensor in mean.items():
        numeric = tensor.is_floating_point() or tensor.is_complex()
        if name not in running:
            running[name] = tensor.to(mean_dtype(tensor.dtype)) if numeric else tensor
        elif numeric:
            running[name].lerp_(tensor.to(running[name].dtype), coefficient)


def _size_bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
