"""Cutting tensors into slices, sharing the slices out, and taking small ones together."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from polyak.checkpoints import TensorInfo

__all__ = ["Bundle", "Slice", "bundled", "cut", "share_of"]

# Vector instructions treat the last few elements apart and may round them differently. Slices are cut at multiples
# of this, and the last one is treated as if it reached to the next, so that no element is ever among those few.
_ALIGNMENT_ELEMENTS = 64
# Smaller slices cost more to call upon than to sum; with larger bundles a few threads would find too few of them.
_BUNDLE_BYTES = 1 << 19


@dataclass(frozen=True, slots=True)
class Slice:
    """Elements ``[start, start + count)`` of a flattened tensor."""

    name: str
    start: int
    count: int


@dataclass(frozen=True)
class Bundle:
    """Slices that pass through the buffers together, with the place of each in them, in elements.

    >>> bundle = Bundle((Slice("a", 0, 100), Slice("b", 0, 10)))
    >>> bundle.places, bundle.count
    ([(Slice(name='a', start=0, count=100), 0), (Slice(name='b', start=0, count=10), 128)], 192)
    """

    slices: tuple[Slice, ...]

    @property
    def name(self) -> str:
        """A tensor that is like all others of the bundle."""
        return self.slices[0].name

    @cached_property
    def places(self) -> list[tuple[Slice, int]]:
        """Each slice and where it begins."""
        ends = accumulate((_aligned(piece.count) for piece in self.slices), initial=0)
        return list(zip(self.slices, ends, strict=False))

    @cached_property
    def count(self) -> int:
        """Elements of a buffer that are taken, unused ones between slices and behind the last included."""
        return sum(_aligned(piece.count) for piece in self.slices)


def _aligned(count: int) -> int:
    return -(-count // _ALIGNMENT_ELEMENTS) * _ALIGNMENT_ELEMENTS


def bundled(
    slices: Iterable[Slice], kind: Callable[[str], Hashable], width: Callable[[str], int], most_bytes: int
) -> Iterator[Bundle]:
    """Neighbouring slices of one kind of tensor together, as far as they are small.

    Args:
        slices: one after the other, none larger than ``most_bytes``.
        kind: what tensors must have in common; those of kind None are left alone.
        width: gives the bytes that an element of the named tensor takes.
        most_bytes: size of the buffers.

    >>> slices = [Slice("w", 0, 300), Slice("b", 0, 10), Slice("n", 0, 1)]
    >>> kinds = {"w": "float", "b": "float", "n": "int"}
    >>> [len(bundle.slices) for bundle in bundled(slices, kinds.get, lambda name: 4, most_bytes=4096)]
    [2, 1]
    """
    most = min(most_bytes, _BUNDLE_BYTES)
    bundle: list[Slice] = []
    nbytes = 0
    for piece in slices:
        size = _aligned(piece.count) * width(piece.name)
        if bundle and (
            kind(piece.name) is None or kind(piece.name) != kind(bundle[0].name) or nbytes + size > most
        ):
            yield Bundle(tuple(bundle))
            bundle, nbytes = [], 0
        bundle.append(piece)
        nbytes += size
    if bundle:
        yield Bundle(tuple(bundle))


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
