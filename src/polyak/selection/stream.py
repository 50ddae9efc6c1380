"""Many averages of one trajectory, one after the other, with few of them in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polyak.accumulator import mean_dtype
from polyak.profiles import Profile, Tail, Weights
from polyak.trajectory import Explanation, Trajectory

__all__ = ["averages", "fold_in"]

# Small models are averaged many profiles at a time, as reading each block costs more than its arithmetic.
_TOGETHER_BYTES = 64 << 20


def averages(
    trajectory: Trajectory, explained: Sequence[Explanation]
) -> Iterator[tuple[Profile, dict[str, Tensor]]]:
    """Each explained profile with its average: name to tensor, which the next step may overwrite.

    Tails come first, shortest first: each is the one before plus the blocks that it reaches further back, so
    that all of them read every block about once and hold one running mean. Of the others there are as many
    in memory as 64 MB hold, at least one.
    """
    tails = [one for one in explained if isinstance(one.profile, Tail)]
    yield from _nested_tails(trajectory, tails)
    others = [one.profile for one in explained if not isinstance(one.profile, Tail)]
    first, together = 0, 1
    while first < len(others):
        chunk = others[first : first + together]
        means = trajectory.average_many(chunk)
        together = max(1, _TOGETHER_BYTES // max(1, _size_bytes(means[0])))
        yield from zip(chunk, means, strict=True)
        first += len(chunk)


def _nested_tails(
    trajectory: Trajectory, tails: Sequence[Explanation]
) -> Iterator[tuple[Profile, dict[str, Tensor]]]:
    running: dict[str, Tensor] = {}
    reached = np.zeros(len(trajectory.blocks))
    for tail in sorted(tails, key=lambda tail: tail.coefficients[-1], reverse=True):
        further = _beyond(reached, tail.coefficients)
        share = float(further.sum())
        if share > 0:
            fold_in(running, trajectory.average(Weights(further.tolist())), share)
        reached = tail.coefficients
        yield tail.profile, running


def _beyond(shorter: NDArray[np.float64], longer: NDArray[np.float64]) -> NDArray[np.float64]:
    """What a longer tail adds: ``longer = c · shorter + rest`` with rest ≥ 0 that sums to 1 - c."""
    kept = longer[-1] / shorter[-1] if shorter[-1] else 0.0
    rest = longer - kept * shorter
    # What rounding leaves of blocks that both cover alike must not have those blocks read again.
    return np.where(rest > 1e-12, rest, 0.0)


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
