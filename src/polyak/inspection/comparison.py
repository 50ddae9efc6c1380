"""Two checkpoints compared: what differs, and by how much."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from polyak.checkpoints import Checkpoint
from polyak.combine.running import is_averaged
from polyak.errors import StructureError, name_list
from polyak.inspection.contents import Origin, dtype_name
from polyak.inspection.layouts import LayoutDifference, compare_layouts
from polyak.inspection.products import Products, as_float64, products, slices

__all__ = ["Comparison", "TensorDifference", "compare_checkpoints"]


@dataclass(frozen=True)
class TensorDifference:
    """How far one tensor lies from its counterpart.

    Attributes:
        name: its name, the first one of tied names.
        dtype: in the first checkpoint.
        numel: number of elements.
        is_identical: same dtype, same bits.
        relative_distance: ``‖a − b‖ / ‖a‖``; None where only ``a`` is zero.
        cosine: ``a·b / (‖a‖ ‖b‖)``; None where one is zero.
        non_finite: elements where either is NaN or infinite; they are left out of distance and cosine.
    """

    name: str
    dtype: str
    numel: int
    is_identical: bool
    relative_distance: float | None
    cosine: float | None
    non_finite: int


@dataclass(frozen=True)
class Comparison:
    """What differs between two checkpoints.

    Attributes:
        first, second: where the weights came from.
        layout: names, shapes, dtypes and ties that are not the same.
        tensors: each tensor that both have in one shape, the largest relative distance first.
        relative_distance, cosine: of all floating-point ones as one vector. Counters and index tables are no
            weights: their size would drown everything else.
    """

    first: Origin
    second: Origin
    layout: LayoutDifference
    tensors: tuple[TensorDifference, ...]
    relative_distance: float | None
    cosine: float | None

    @property
    def changed(self) -> tuple[TensorDifference, ...]:
        """The tensors that are not identical, the largest relative distance first."""
        return tuple(tensor for tensor in self.tensors if not tensor.is_identical)

    @property
    def is_identical(self) -> bool:
        """Whether names, shapes, dtypes, ties and all bits are the same."""
        return not self.layout and not self.changed

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {"kind": "comparison", "is_identical": self.is_identical, **asdict(self)}


def compare_checkpoints(first: Checkpoint, second: Checkpoint) -> Comparison:
    """Compare two opened checkpoints, tensor by tensor, in float64.

    Reads both once, in slices: memory does not depend on their sizes.

    Raises ``StructureError`` if no name and shape is in both, ``CheckpointError`` where a file cannot be read.

    >>> import tempfile, torch
    >>> from pathlib import Path
    >>> from polyak import checkpoints
    >>> folder = tempfile.TemporaryDirectory()
    >>> a, b = Path(folder.name) / "a.safetensors", Path(folder.name) / "b.safetensors"
    >>> checkpoints.write(a, {"w": torch.tensor([3.0, 0.0]), "frozen": torch.ones(1)})
    >>> checkpoints.write(b, {"w": torch.tensor([3.0, 4.0]), "frozen": torch.ones(1)})
    >>> comparison = compare_checkpoints(checkpoints.open(a), checkpoints.open(b))
    >>> [tensor.name for tensor in comparison.changed], comparison.tensors[0].cosine
    (['w'], 0.6)
    >>> folder.cleanup()
    """
    pairs = list(_comparable(first, second))
    if not pairs:
        raise StructureError(
            f"{first.path} and {second.path} have no tensor of one name and shape in common: the first has "
            f"{name_list(list(first.tensors), most=3)}, the second {name_list(list(second.tensors), most=3)}; "
            f"if other weights are nested in there, choose them with a key"
        )
    total = Products()
    tensors = []
    for name in pairs:
        difference, part = _compare_tensor(first, second, name)
        tensors.append(difference)
        if all(is_averaged(checkpoint.tensors[name].dtype) for checkpoint in (first, second)):
            total += part
    return Comparison(
        Origin.of(first),
        Origin.of(second),
        compare_layouts(first, second),
        tuple(sorted(tensors, key=_largest_first)),
        total.relative_distance,
        total.cosine,
    )


def _comparable(first: Checkpoint, second: Checkpoint) -> Iterator[str]:
    """Names that both have in one shape; those that are tied in both come once."""
    seen = set()
    for name, info in first.tensors.items():
        if name in second.tensors and second.tensors[name].shape == info.shape:
            pair = (first.ties.get(name, name), second.ties.get(name, name))
            if pair not in seen:
                yield name
            seen.add(pair)


def _compare_tensor(first: Checkpoint, second: Checkpoint, name: str) -> tuple[TensorDifference, Products]:
    info = first.tensors[name]
    is_identical = info.dtype == second.tensors[name].dtype
    total, non_finite = Products(), 0
    for start, stop in slices(info.numel):
        ours, theirs = first.read_slice(name, start, stop), second.read_slice(name, start, stop)
        is_identical = is_identical and _same_bits(ours, theirs)
        part, dropped = _finite_products(ours, theirs)
        total += part
        non_finite += dropped
    return (
        TensorDifference(
            name,
            dtype_name(info.dtype),
            info.numel,
            is_identical,
            total.relative_distance,
            total.cosine,
            non_finite,
        ),
        total,
    )


def _same_bits(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first.view(torch.uint8), second.view(torch.uint8))


def _finite_products(first: Tensor, second: Tensor) -> tuple[Products, int]:
    """The products over the elements that are finite in both, and the number of the others."""
    first, second = _paired(first, second)
    whole = products(first, second)
    # Sums that are finite are of finite elements: the masks are only needed where they are not.
    if math.isfinite(whole.first + whole.second):
        return whole, 0
    finite = first.isfinite() & second.isfinite()
    return products(first[finite], second[finite]), int(finite.logical_not().sum())


def _paired(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64; a real one is held against a complex one as complex."""
    if first.is_complex() != second.is_complex():
        first, second = first.to(torch.complex128), second.to(torch.complex128)
    return as_float64(first), as_float64(second)


def _largest_first(tensor: TensorDifference) -> tuple[bool, float]:
    distance = math.inf if tensor.relative_distance is None else tensor.relative_distance
    return tensor.is_identical, -distance
