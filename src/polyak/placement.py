"""Which elements of a sharded tensor a rank holds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from torch import Tensor

from polyak.errors import StructureError, name_list
from polyak.tensors import is_sharded

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["refuse_unplaced", "runs"]


def refuse_unplaced(tensors: Mapping[str, Tensor]) -> None:
    """Refuse (``StructureError``) DTensors of which it cannot be told which rank holds what.

    >>> import torch
    >>> refuse_unplaced({"weight": torch.ones(1)})
    """
    for name, tensor in tensors.items():
        if is_sharded(tensor):
            _refuse_unplaced(name, cast("DTensor", tensor))


def _refuse_unplaced(name: str, tensor: DTensor) -> None:
    from torch.distributed.tensor import Replicate, Shard

    if not all(type(placement) in (Shard, Replicate) for placement in tensor.placements):
        raise StructureError(
            f"{name_list([name])} is placed as {tensor.placements}: only Shard and Replicate can be recorded, so not a "
            "dimension that is sharded twice, as FSDP over tensor parallelism does; save checkpoints and read them "
            "with Trajectory.from_checkpoints"
        )


def runs(part: Tensor, whole: Tensor, is_first: bool) -> Iterator[tuple[int, Tensor]]:
    """Where the elements of ``part`` lie in the flattened ``whole``: (start, 1-D values), one run after the other.

    Over all ranks every element comes once: of copies on several ranks only the first is given out.

    Args:
        part: what this rank holds of ``whole``, or of something that is distributed as it is.
        whole: a DTensor, or a plain tensor, of which every rank holds a copy.
        is_first: whether this is the rank that gives out plain tensors.

    >>> import torch
    >>> [(start, values.tolist()) for start, values in runs(torch.ones(2, 2), torch.ones(2, 2), is_first=True)]
    [(0, [1.0, 1.0, 1.0, 1.0])]
    """
    if not is_sharded(whole):
        if is_first:
            yield 0, part.reshape(-1)
        return
    offsets = _offsets(whole)
    if offsets is None or not part.numel():
        return
    # Dimensions that are held whole, and the first one before them, make one run.
    held = [mine == size for mine, size in zip(part.shape, whole.shape, strict=True)]
    inner = len(held) - next((i for i, is_whole in enumerate(reversed(held)) if not is_whole), len(held))
    outer = max(inner - 1, 0)
    length = math.prod(part.shape[outer:])
    places = [np.arange(size) + offset for size, offset in zip(part.shape[:outer], offsets, strict=False)]
    strides = [math.prod(whole.shape[dim + 1 :]) for dim in range(whole.ndim)]
    within = offsets[outer] * strides[outer] if whole.ndim else 0
    starts = sum(
        (place.reshape(-1, *[1] * (outer - 1 - dim)) * strides[dim] for dim, place in enumerate(places)),
        np.array(within),
    )
    yield from zip(np.ravel(starts).tolist(), part.reshape(-1, length), strict=True)


def _offsets(whole: Tensor) -> list[int] | None:
    """Where this rank's part begins in each dimension; None where another rank gives out the same copy."""
    from torch.distributed.tensor import DTensor, Replicate

    # Private, but what torch.distributed.checkpoint goes by; torch offers nothing public that says it.
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    tensor = cast(DTensor, whole)
    mesh, placements = tensor.device_mesh, tensor.placements
    coordinate: Any = mesh.get_coordinate()
    copies = [
        place for place, kind in zip(coordinate, placements, strict=True) if isinstance(kind, Replicate)
    ]
    if any(copies):
        return None
    _, offsets = compute_local_shape_and_global_offset(whole.shape, mesh, placements)
    return list(offsets)
