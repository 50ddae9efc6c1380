"""Inner products of weights, streamed: all that distances and cosines need.

Values are read a slice at a time and summed in float64, so that memory does not depend on the sizes of tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from polyak.checkpoints import Checkpoint
from polyak.combine.running import as_reals

__all__ = ["Products", "as_float64", "cosine", "products", "read_float64", "slices"]

# A slice and what is worked out from it take some 10 MB, and stay in cache better than larger ones would.
_SLICE_ELEMENTS = 1 << 17


@dataclass(frozen=True)
class Products:
    """``‖a‖²``, ``‖b‖²``, ``a·b`` and ``‖a − b‖²``; those of pieces add up to those of the whole.

    >>> both = products(torch.tensor([3.0, 0.0]), torch.tensor([3.0, 4.0]))
    >>> both.cosine, both.relative_distance
    (0.6, 1.3333333333333333)
    """

    first: float = 0.0
    second: float = 0.0
    cross: float = 0.0
    difference: float = 0.0

    def __add__(self, other: Products) -> Products:
        return Products(
            self.first + other.first,
            self.second + other.second,
            self.cross + other.cross,
            self.difference + other.difference,
        )

    @property
    def relative_distance(self) -> float | None:
        """``‖a − b‖ / ‖a‖``; 0 where both are zero, None where only ``a`` is."""
        if self.difference == 0:
            return 0.0
        return _finite_or_none(math.sqrt(self.difference) / math.sqrt(self.first)) if self.first else None

    @property
    def cosine(self) -> float | None:
        """``a·b / (‖a‖ ‖b‖)``; None where one is zero."""
        return cosine(self.cross, self.first, self.second)


def cosine(cross: float, first: float, second: float) -> float | None:
    """``a·b / (‖a‖ ‖b‖)`` from ``a·b``, ``‖a‖²`` and ``‖b‖²``; None where one is zero.

    >>> cosine(-2.0, 4.0, 1.0)
    -1.0
    """
    # The product of the squares could overflow where that of the roots does not.
    scale = math.sqrt(first) * math.sqrt(second)
    value = _finite_or_none(cross / scale) if scale else None
    return value if value is None else max(-1.0, min(1.0, value))


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def products(first: Tensor, second: Tensor) -> Products:
    """The inner products of two 1-D tensors of one dtype."""
    difference = first - second
    pairs = ((first, first), (second, second), (first, second), (difference, difference))
    return Products(*[float(torch.dot(one, other)) for one, other in pairs])


def slices(numel: int) -> Iterator[tuple[int, int]]:
    """``(start, stop)`` of the slices that cover ``numel`` elements.

    >>> list(slices(3)), list(slices(0))
    ([(0, 3)], [])
    """
    for start in range(0, numel, _SLICE_ELEMENTS):
        yield start, min(start + _SLICE_ELEMENTS, numel)


def read_float64(checkpoint: Checkpoint, name: str, start: int, stop: int) -> Tensor:
    """Elements ``[start, stop)`` of a tensor as 1-D float64; a complex one counts as two real ones."""
    return as_float64(checkpoint.read_slice(name, start, stop))


def as_float64(values: Tensor) -> Tensor:
    """A 1-D tensor of any dtype as float64, real and imaginary parts side by side.

    >>> as_float64(torch.tensor([1 + 2j]))
    tensor([1., 2.], dtype=torch.float64)
    """
    return as_reals(values).to(torch.float64)
