"""Many averages of one trajectory, one after the other, with few of them in memory at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

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
_ROUNDING = 1e-12


def averages(
    trajectory: Trajectory, explained: Sequence[Explanation]
) -> Iterator[tuple[Profile, dict[str, Tensor]]]:
    """Each explained profile with its average: name to tensor, which the next step may overwrite.

    Where all fit into 64 MB they are made in one pass over the blocks. Else tails come first, shortest first: each
    is the one before plus the blocks that it reaches further back, so that all of them read every block about once
    and hold one running mean; what is not averaged is as in the newest block, which all of them reach. Of the
    others there are as many in memory as 64 MB hold, at least one.
    """
    together = max(1, _TOGETHER_BYTES // max(1, trajectory.average_bytes))
    tails = [one for one in explained if isinstance(one.profile, Tail)] if together < len(explained) else []
    yield from _nested_tails(trajectory, tails)
    others = [one.profile for one in explained if not (tails and isinstance(one.profile, Tail))]
    for first in range(0, len(others), together):
        chunk = others[first : first + together]
        yield from zip(chunk, trajectory.average_many(chunk), strict=True)


def _nested_tails(
    trajectory: Trajectory, tails: Sequence[Explanation]
) -> Iterator[tuple[Profile, dict[str, Tensor]]]:
    running: dict[str, Tensor] = {}
    reached = np.zeros(len(trajectory.blocks))
    for tail in sorted(tails, key=lambda tail: tail.coefficients[-1], reverse=True):
        further = _beyond(reached, tail.coefficients)
        share = 1.0 if further is None else float(further.sum())
        if further is None:
            running = {}
            fold_in(running, trajectory.average(tail.profile), share, trajectory.averaged_names)
        elif share > 0:
            mean = trajectory.average(Weights(further.tolist()))
            fold_in(running, mean, share, trajectory.averaged_names)
        reached = tail.coefficients
        yield tail.profile, running


def _beyond(shorter: NDArray[np.float64], longer: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """What a longer tail adds: ``longer = c · shorter + rest`` with rest ≥ 0 that sums to 1 - c.

    None where there is no such rest, as between a tail in steps and one in samples where blocks hold unlike
    numbers of samples.
    """
    kept = longer[-1] / shorter[-1] if shorter[-1] else 0.0
    rest = longer - kept * shorter
    if rest.min() < -_ROUNDING:
        return None
    # What rounding leaves of blocks that both cover alike must not have those blocks read again.
    return np.where(rest > _ROUNDING, rest, 0.0)


@torch.no_grad()
def fold_in(
    running: dict[str, Tensor], mean: dict[str, Tensor], coefficient: float, averaged: Collection[str]
) -> None:
    """m += c (w - m) for the tensors named ``averaged``, tied ones once; the others stay what they were first."""
    if not running:
        copies = {
            id(tensor): tensor.to(mean_dtype(tensor.dtype))
            for name, tensor in mean.items()
            if name in averaged
        }
        running.update({name: copies.get(id(tensor), tensor) for name, tensor in mean.items()})
        return
    pairs = {id(running[name]): (running[name], mean[name]) for name in mean if name in averaged}
    for kept, tensor in pairs.values():
        kept.lerp_(tensor.to(kept.dtype), coefficient)
