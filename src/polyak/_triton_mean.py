"""One kernel of Triton for the means that no operation of torch folds in one call: fp64, half, and compensated ones.

Triton comes with torch for NVIDIA's and AMD's GPUs; without it the kernel works nowhere. It reads weights and
means once and writes the means, in one launch for all tensors of a pair of dtypes. `TRITON_INTERPRET=1` in the
environment runs it on CPU tensors.
"""

# pyright: reportInvalidTypeForm=false
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    triton: Any = None
    tl: Any = None
else:
    try:
        import triton
        import triton.language as tl
    except ImportError:
        triton = tl = None

__all__ = ["Kernel", "can_take", "works_on"]

# What one program of the kernel takes, and what it takes at once.
_CHUNK_NUMEL = 1 << 15
_BLOCK_NUMEL = 1 << 12
# Addresses that are multiples of this many bytes are read four fp32 numbers at a time.
_ALIGNED_BYTES = 16
_TYPES = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
_compiled: Any = (lambda function: function) if triton is None else triton.jit


@_compiled
def _step(x, y, e, share, COMPENSATED: tl.constexpr):  # type: ignore[no-untyped-def]
    if COMPENSATED:  # Kahan's sum
        change = ((x - y) - e) * share + e
        new = y + change
        return new, (y - new) + change
    # A first sample is copied, whatever was there.
    return tl.where(share == 1.0, x, y + share * (x - y)), e


@_compiled
def _fold(  # type: ignore[no-untyped-def]
    addresses,  # of weights, means and residuals: int64, three for each tensor
    numels,
    tensor_of,  # for each program, which tensor it works on
    start_of,  # and from which element on
    share_pointer,
    refused_pointer,
    WEIGHT: tl.constexpr,
    MEAN: tl.constexpr,
    COMPENSATED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    program = tl.program_id(0)
    tensor = tl.load(tensor_of + program)
    start = tl.multiple_of(tl.load(start_of + program), CHUNK)
    # Of a refused sample nothing is read or written: its tensors have no elements.
    numel = tl.where(tl.load(refused_pointer) == 0.0, tl.load(numels + tensor), 0)
    weights = tl.load(addresses + 3 * tensor).to(tl.pointer_type(WEIGHT))
    means = tl.load(addresses + 3 * tensor + 1).to(tl.pointer_type(MEAN))
    residuals = tl.load(addresses + 3 * tensor + 2).to(tl.pointer_type(MEAN))
    if ALIGNED > 1:
        weights = tl.multiple_of(weights, ALIGNED)
        means = tl.multiple_of(means, ALIGNED)
        residuals = tl.multiple_of(residuals, ALIGNED)
    EXACT: tl.constexpr = tl.float64 if MEAN == tl.float64 else tl.float32  # noqa: SIM300
    share = tl.load(share_pointer).to(EXACT)
    for offset in range(0, CHUNK, BLOCK):
        places = start + offset + tl.arange(0, BLOCK)
        if start + offset + BLOCK <= numel:  # without a mask several numbers are one access
            x = tl.load(weights + places).to(EXACT)
            y = tl.load(means + places).to(EXACT)
            e = tl.load(residuals + places).to(EXACT) if COMPENSATED else y
            new, rest = _step(x, y, e, share, COMPENSATED)
            tl.store(means + places, new.to(MEAN))
            if COMPENSATED:
                tl.store(residuals + places, rest.to(MEAN))
        else:
            inside = places < numel
            x = tl.load(weights + places, mask=inside, other=0.0).to(EXACT)
            y = tl.load(means + places, mask=inside, other=0.0).to(EXACT)
            e = tl.load(residuals + places, mask=inside, other=0.0).to(EXACT) if COMPENSATED else y
            new, rest = _step(x, y, e, share, COMPENSATED)
            tl.store(means + places, new.to(MEAN), mask=inside)
            if COMPENSATED:
                tl.store(residuals + places, rest.to(MEAN), mask=inside)


@dataclass(frozen=True)
class _Table:
    """Where the tensors of one pair of dtypes are, and how they are shared out, on the device."""

    indices: list[int]
    addresses: Tensor
    numels: Tensor
    tensor_of: Tensor
    start_of: Tensor

    @classmethod
    def of(cls, indices: list[int], means: Sequence[Tensor]) -> _Table:
        device = means[indices[0]].device
        numels = [means[index].numel() for index in indices]
        chunks = [(n, start) for n, size in enumerate(numels) for start in range(0, size, _CHUNK_NUMEL)]
        tensor_of, start_of = (torch.tensor(column, device=device) for column in zip(*chunks, strict=True))
        addresses = torch.zeros(len(indices), 3, dtype=torch.int64, device=device)
        return cls(indices, addresses, torch.tensor(numels, device=device), tensor_of, start_of)


class Kernel:
    """Folds sources into means that lie in memory as they do, all dense and with elements, on one device.

    Args:
        sources: as they are now.
        means: theirs.
        residuals: of compensated means, else empty.
    """

    def __init__(self, sources: Sequence[Tensor], means: Sequence[Tensor], residuals: Sequence[Tensor]):
        self._means, self._residuals = means, residuals
        groups: dict[tuple[torch.dtype, torch.dtype], list[int]] = {}
        for index, (source, mean) in enumerate(zip(sources, means, strict=True)):
            groups.setdefault((source.dtype, mean.dtype), []).append(index)
        with torch.inference_mode(False):
            self._tables = {kinds: _Table.of(indices, means) for kinds, indices in groups.items()}
            self._accepted = torch.zeros((), device=means[0].device)
        self._places: list[tuple[int, ...]] = []

    def __call__(self, sources: Sequence[Tensor], share: Tensor, refused: Tensor | None) -> None:
        """``means += share (sources - means)``, unless ``refused`` is 1; both are 0-dim and on the device."""
        with torch.accelerator.device_index(
            self._accepted.device.index
        ):  # Triton launches on the current one
            self._launch(sources, share, self._accepted if refused is None else refused)

    def _launch(self, sources: Sequence[Tensor], share: Tensor, refused: Tensor) -> None:
        self._follow(sources)
        kernel: Any = _fold
        for (weight, mean), table in self._tables.items():
            kernel[(len(table.tensor_of),)](
                table.addresses,
                table.numels,
                table.tensor_of,
                table.start_of,
                share,
                refused,
                WEIGHT=getattr(tl, _TYPES[weight]),
                MEAN=getattr(tl, _TYPES[mean]),
                COMPENSATED=bool(self._residuals),
                CHUNK=_CHUNK_NUMEL,
                BLOCK=_BLOCK_NUMEL,
                ALIGNED=self._aligned,
            )

    def _follow(self, sources: Sequence[Tensor]) -> None:
        """Write down where everything is: a model may move its weights, and a copy of this has other means."""
        columns = (sources, self._means, self._residuals or self._means)
        places = list(zip(*(map(Tensor.data_ptr, column) for column in columns), strict=True))
        if places == self._places:
            return
        self._places = places
        self._aligned = 1 if any(p % _ALIGNED_BYTES for row in places for p in row) else _ALIGNED_BYTES
        for table in self._tables.values():
            table.addresses.copy_(torch.tensor([places[index] for index in table.indices]))


def can_take(source: Tensor, mean: Tensor) -> bool:
    """Whether the kernel knows the dtypes, and the two lie in memory alike."""
    known = source.dtype in _TYPES and mean.dtype in _TYPES
    return known and source.device == mean.device and source.stride() == mean.stride()


@cache
def works_on(device: torch.device) -> bool:
    """Whether the kernel can be compiled and run there, and does what it says; found by trying."""
    if triton is None:
        return False
    try:
        return all(_is_right(device, compensated) for compensated in (False, True))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # no compiler, no driver, another Triton: whatever it is, there is another way
        return False


def _is_right(device: torch.device, compensated: bool) -> bool:
    options: dict[str, Any] = {"dtype": torch.float64, "device": device}
    source = torch.arange(_BLOCK_NUMEL + 5, **options)
    mean, residuals = torch.zeros_like(source), [torch.zeros_like(source)] if compensated else []
    kernel = Kernel([source], [mean], residuals)
    kernel([source], torch.tensor(0.5, **options), torch.zeros((), device=device))
    kernel([source], torch.full((), float("nan"), **options), torch.ones((), device=device))
    return torch.equal(2 * mean, source)
