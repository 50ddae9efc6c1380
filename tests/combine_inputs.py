"""Checkpoints for the tests of averaging, made on the spot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from polyak import checkpoints
from polyak.checkpoints import Checkpoint
from polyak.combine import MemoryWriter, combine, common_layout

FLOATS = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    torch.complex64,
    torch.complex128,
)
SHAPE = (7, 300)


def random(dtype: torch.dtype, seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(shape, dtype=wide, generator=generator).to(dtype)


def saved(folder: Path, models: Sequence[Mapping[str, Tensor]], suffix: str = ".pt") -> list[Checkpoint]:
    """Each model as a checkpoint ``step1``, ``step2``, … of the folder, opened."""
    paths = [folder / f"step{step}{suffix}" for step in range(1, len(models) + 1)]
    for path, model in zip(paths, models, strict=True):
        checkpoints.write(path, model)
    return [checkpoints.open(path) for path in paths]


def combined(
    inputs: Sequence[Checkpoint], coefficients: Sequence[float], dtype: torch.dtype | None = None, **options
) -> dict[str, Tensor]:
    """One output, in memory."""
    with MemoryWriter(common_layout(inputs, dtype)) as writer:
        combine(inputs, [coefficients], [writer], **options)
    return writer.tensors


def same_bits(one: Tensor, other: Tensor) -> bool:
    def bits(tensor: Tensor) -> Tensor:
        return tensor.contiguous().view(-1).view(torch.uint8)

    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(bits(one), bits(other))
