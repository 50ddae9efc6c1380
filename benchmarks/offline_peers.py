"""Ways to average checkpoint files: polyak's, the limit, and what other projects do.

mergekit is the installed one, where there is one. The others are written anew from what the projects' scripts do, as
those cannot be imported. Each of them syncs its output, as polyak does and as the limit must.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

import polyak
from polyak.checkpoints._io import write_all

__all__ = ["CONTENDERS", "LIMIT", "LOAD_AND_ADD", "MERGEKIT", "MERGEKIT_INSTALLED", "POLYAK", "POLYAK_PT"]

Average = Callable[[Sequence[Path], Path], None]

_CHUNK_BYTES = 1 << 21


def read_and_write(inputs: Sequence[Path], output: Path) -> None:
    """Read all inputs, write and sync as many bytes as one has, compute nothing.

    The output passes through the page cache without staying there, as polyak's does: it costs less.
    """
    buffer = bytearray(_CHUNK_BYTES)
    for path in inputs:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    with output.open("wb", buffering=0) as file:
        for place in range(0, inputs[0].stat().st_size, _CHUNK_BYTES):
            write_all(file.fileno(), memoryview(buffer), place, uncached=True)
    _sync(output)


def polyak_average(inputs: Sequence[Path], output: Path) -> None:
    """``polyak.average_checkpoints`` as it comes."""
    polyak.average_checkpoints(inputs, output, overwrite=True)


def load_and_add(inputs: Sequence[Path], output: Path) -> None:
    """The loop in many a training script: load, add, divide."""
    total = torch.load(inputs[0], weights_only=True)
    for path in inputs[1:]:
        for name, tensor in torch.load(path, weights_only=True).items():
            total[name] += tensor
    for tensor in total.values():
        tensor /= len(inputs)
    _save(total, output)


def timm_way(inputs: Sequence[Path], output: Path) -> None:
    """timm's ``avg_checkpoints.py``: every file loaded twice, first for its metric, sums in float64."""
    for path in inputs:
        torch.load(path, map_location="cpu", weights_only=True)
    total: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    for path in inputs:
        for name, tensor in torch.load(path, map_location="cpu", weights_only=True).items():
            if name not in total:
                total[name], counts[name] = tensor.clone().to(torch.float64), 1
            else:
                total[name] += tensor.to(torch.float64)
                counts[name] += 1
    for name, tensor in total.items():
        tensor.div_(counts[name])
    limits = torch.finfo(torch.float32)
    final = {name: tensor.clamp(limits.min, limits.max).to(torch.float32) for name, tensor in total.items()}
    _save(final, output)


def fairseq_way(inputs: Sequence[Path], output: Path) -> None:
    """fairseq's ``average_checkpoints.py``: fp16 made fp32, else sums in the tensors' dtype, then division."""
    total: dict[str, Tensor] = {}
    for path in inputs:
        for name, tensor in torch.load(path, map_location="cpu", weights_only=True).items():
            values = tensor.float() if tensor.dtype == torch.float16 else tensor
            if name in total:
                total[name] += values
            else:
                total[name] = values.clone()
    for tensor in total.values():
        if tensor.is_floating_point():
            tensor.div_(len(inputs))
        else:
            tensor //= len(inputs)
    _save(total, output)


def mergekit_linear(inputs: Sequence[Path], output: Path) -> None:
    """mergekit's linear merge of Hugging Face folders with equal weights, as ``mergekit-yaml`` runs it."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    models = [{"model": str(path), "parameters": {"weight": 1.0}} for path in inputs]
    config = {"merge_method": "linear", "dtype": "float32", "models": models}
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
    run_merge(MergeConfiguration.model_validate(config), str(output), options)
    _sync(output / "model.safetensors")


def _save(state: dict[str, Tensor], output: Path) -> None:
    torch.save(state, output)
    _sync(output)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


LIMIT = "read all, write one (the limit)"
POLYAK = "polyak, .safetensors"
POLYAK_PT = "polyak, .pt in, .safetensors out"
LOAD_AND_ADD = "load and add, .pt"
MERGEKIT = "mergekit linear, .safetensors"
MERGEKIT_INSTALLED = importlib.util.find_spec("mergekit") is not None
# How it averages, the suffix of its inputs and that of its output.
CONTENDERS: dict[str, tuple[Average, str, str]] = {
    LIMIT: (read_and_write, ".safetensors", ".safetensors"),
    POLYAK: (polyak_average, ".safetensors", ".safetensors"),
    POLYAK_PT: (polyak_average, ".pt", ".safetensors"),
    LOAD_AND_ADD: (load_and_add, ".pt", ".pt"),
    "fairseq's way, .pt": (fairseq_way, ".pt", ".pt"),
    "timm's way, .pt": (timm_way, ".pt", ".pt"),
}
if MERGEKIT_INSTALLED:
    CONTENDERS[MERGEKIT] = (mergekit_linear, ".hf", ".hf")
