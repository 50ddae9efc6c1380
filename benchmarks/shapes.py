"""Parameter shapes of the models that the benchmarks average, and modules that hold nothing else."""

from __future__ import annotations

import math

import torch
from torch import nn

__all__ = [
    "Shape",
    "gpt2_names",
    "gpt2_small",
    "many_single",
    "many_small",
    "module_of",
    "number_of_elements",
    "resnet50",
]

Shape = tuple[int, ...]

_PARAMETERS_PER_SUBMODULE = 8


def resnet50() -> list[Shape]:
    """ResNet-50 (He et al. 2016) with 1,000 classes: 161 tensors, 25.56 million numbers."""
    shapes = _convolution_and_norm(3, 64, kernel=7)
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += _convolution_and_norm(channels, width, kernel=1)
            shapes += _convolution_and_norm(width, width, kernel=3)
            shapes += _convolution_and_norm(width, 4 * width, kernel=1)
            if block == 0:
                shapes += _convolution_and_norm(channels, 4 * width, kernel=1)
            channels = 4 * width
    return [*shapes, (1000, channels), (1000,)]


def _convolution_and_norm(inputs: int, outputs: int, kernel: int) -> list[Shape]:
    return [(outputs, inputs, kernel, kernel), (outputs,), (outputs,)]


def gpt2_small() -> list[Shape]:
    """GPT-2 small (Radford et al. 2019), the tied output layer once: 148 tensors, 124.4 million numbers."""
    width = 768
    norm = [(width,), (width,)]
    attention = [(width, 3 * width), (3 * width,), (width, width), (width,)]
    feed_forward = [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    layer = [*norm, *attention, *norm, *feed_forward]
    return [(50257, width), (1024, width), *(12 * layer), *norm]


def gpt2_names() -> list[str]:
    """The names of its tensors in transformers, in the order of :func:`gpt2_small`."""
    parts = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    layers = [f"h.{layer}.{part}" for layer in range(12) for part in parts]
    both = [f"{module}.{kind}" for module in (*layers, "ln_f") for kind in ("weight", "bias")]
    return [f"transformer.{name}" for name in ("wte.weight", "wpe.weight", *both)]


def many_small() -> list[Shape]:
    """1,200 tensors of 512 numbers, where the time goes into Python and not into memory traffic."""
    return 1200 * [(512,)]


def many_single() -> list[Shape]:
    """1,200 tensors of one number, of whose average all but a microsecond is overhead."""
    return 1200 * [(1,)]


def number_of_elements(shapes: list[Shape]) -> int:
    """How many numbers tensors of these shapes hold together."""
    return sum(math.prod(shape) for shape in shapes)


def module_of(shapes: list[Shape], dtype: torch.dtype) -> nn.Module:
    """A module with parameters of these shapes, nested in submodules, as in a model that is walked."""
    generator = torch.Generator().manual_seed(0)
    root = nn.Module()
    for start in range(0, len(shapes), _PARAMETERS_PER_SUBMODULE):
        submodule = nn.Module()
        for index, shape in enumerate(shapes[start : start + _PARAMETERS_PER_SUBMODULE]):
            values = torch.randn(shape, generator=generator).to(dtype)
            submodule.register_parameter(f"weight_{index}", nn.Parameter(values))
        root.add_module(f"layer_{start // _PARAMETERS_PER_SUBMODULE}", submodule)
    return root
