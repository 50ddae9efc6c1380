"""What every format speaks: tensors that lie in files, and the contents of an opened checkpoint."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

__all__ = ["Contents", "LoadedTensor", "Location", "StoredTensor", "TensorInfo", "byte_view"]


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor that has not been read.

    >>> info = TensorInfo((2, 3), torch.bfloat16)
    >>> info.numel, info.nbytes
    (6, 12)
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        """What a checkpoint will hold of ``tensor``."""
        return cls(tuple(tensor.shape), tensor.dtype)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of a contiguous copy."""
        return self.numel * self.dtype.itemsize


class Location(NamedTuple):
    """Where the contiguous little-endian bytes of a tensor begin: a file, and an offset in bytes."""

    path: Path
    offset: int


class StoredTensor(ABC):
    """One tensor inside a checkpoint; reading it touches only the elements asked for.

    Two names that hold the same ``StoredTensor`` object are tied.
    """

    info: TensorInfo

    @abstractmethod
    def read_into(self, start: int, out: Tensor) -> None:
        """Fill the 1-D ``out`` with the elements ``[start, start + out.numel())`` in row-major order.

        ``out`` has the tensor's own dtype and is contiguous; the range is inside the tensor.
        """

    @property
    def location(self) -> Location | None:
        """Where the plain bytes lie, or None if they are packed, strided or in several pieces."""
        return None


class LoadedTensor(StoredTensor):
    """A tensor that its format could only give in memory."""

    def __init__(self, tensor: Tensor) -> None:
        self.info = TensorInfo.of(tensor)
        self._flat = tensor.reshape(-1)

    def read_into(self, start: int, out: Tensor) -> None:
        out.copy_(self._flat[start : start + out.numel()])


@dataclass
class Contents:
    """What a format's reader found.

    Args:
        tree: names to tensors, nested trees, lists of them, and plain values.
        metadata: text entries beside the tensors.
        is_lazy: whether the tensors are still in the file.
        stored: turns a leaf that is a tensor into a ``StoredTensor``.
    """

    tree: Mapping[Any, Any]
    metadata: dict[str, str] = field(default_factory=dict)
    is_lazy: bool = True
    stored: Callable[[Any], StoredTensor] = lambda leaf: leaf


def byte_view(flat: Tensor) -> memoryview:
    """The memory of a contiguous 1-D CPU tensor as writable bytes, in any dtype.

    >>> byte_view(torch.ones(2, dtype=torch.bfloat16)).tobytes().hex()
    '803f803f'
    """
    # NumPy knows neither bfloat16 nor the 8-bit floats, but every dtype can be seen as bytes.
    return flat.detach().view(torch.uint8).numpy().data
