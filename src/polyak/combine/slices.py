"""Cutting tensors into slices, and sharing the slices out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from polyak.checkpoints import TensorInfo

__all__ = ["Slice", "cut", "share_of"]

# Vector instructions treat the last few elements of a slice apart and may round them differently. Slices that
# begin at multiples of this leave those elements to the end of the tensor, however it is cut.
_ALIGNMENT_ELEMENTS = 64


@dataclass(frozen=True, slots=True)
class Slice:
    """Elements ``[start, start + count)`` of a flattened tensor."""

    name: str
    start: int
    count: int


def cut(tensors: Mapping[str, TensorInfo], width: Callable[[str], int], slice_bytes: int) -> Iterator[Slice]:
    """Slices of at most ``slice_bytes`` each, tensor by tensor and from start to end.

    Args:
        tensors: name to shape.
        width: gives the bytes that an element of the named tensor takes.
        slice_bytes: size of the buffers.

    >>> import torch
    >>> tensors = {"w": TensorInfo((300,), torch.float32)}
    >>> [(piece.start, piece.count) for piece in cut(tensors, lambda name: 4, slice_bytes=512)]
    [(0, 128), (128, 128), (256, 44)]
    """
    for name, info in tensors.items():
        most = slice_bytes // width(name) // _ALIGNMENT_ELEMENTS * _ALIGNMENT_ELEMENTS
        for start in range(0, info.numel, most):
            yield Slice(name, start, min(most, info.numel - start))


def share_of(slices: list[Slice], rank: int, ranks: int) -> list[Slice]:
    """The ``rank``-th of ``ranks`` runs of neighbouring slices with about as many elements each.

    >>> pieces = [Slice("w", 0, 128), Slice("w", 128, 128), Slice("w", 256, 44)]
    >>> [len(share_of(pieces, rank, 2)) for rank in range(2)]
    [1, 2]
    """
    total = sum(piece.count for piece in slices)
    chosen, before = [], 0
    for piece in slices:
        # A slice belongs to the rank in whose part its middle lies, so that no two ranks take it.
        if (2 * before + piece.count) * ranks // (2 * total) == rank:
            chosen.append(piece)
        before += piece.count
    return chosen
