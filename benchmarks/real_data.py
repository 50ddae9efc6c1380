"""The tasks of `real_tasks`: images of clothes and speeches, with a small model and the optimizer for each."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention
from torch.optim import SGD, AdamW, Optimizer

sys.path.append(str(Path(__file__).parent.parent / "examples"))
import paper_data
import paper_recipe

__all__ = ["TASKS", "Examples", "Split", "Task", "losses", "paper_recipe"]


@dataclass(frozen=True)
class Examples:
    """Inputs ``[N, ...]`` and targets, classes ``[N]`` or bytes ``[N, T]`` (int64)."""

    inputs: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Split:
    """Disjoint parts; ``recalibrate`` are batches of training inputs for BatchNorm statistics, None without it."""

    batch: Callable[[int], Examples]
    validation: Examples
    test: Examples
    recalibrate: list[Tensor] | None


@dataclass(frozen=True)
class Task:
    """A task, the rates that are tuned over, and those reported on; one budget is ``unit_steps`` optimizer steps."""

    name: str
    load: Callable[[Path, int], Split]
    build_model: Callable[[], nn.Module]
    optimizer: Callable[[nn.Module, float], Optimizer]
    unit_steps: int
    batch: int
    rates: tuple[float, ...]
    reported_rates: tuple[float, ...]
    warmup_steps: int = 0


def losses(model: nn.Module, examples: Examples) -> Tensor:
    """The NLL of each example in nats, ``[N]``: per image, or per byte, the mean over a window."""
    logits = model(examples.inputs)
    each = cross_entropy(logits.flatten(0, -2), examples.targets.flatten(), reduction="none")
    return each.view(len(examples.targets), -1).mean(dim=1)


def _generator(*numbers: int) -> torch.Generator:
    """A generator of its own for each tuple of a seed, a purpose and a step."""
    seed = 0
    for number in numbers:
        seed = seed * 1_000_003 + number
    return torch.Generator().manual_seed(seed)


# Fashion-MNIST, or any set of small images.

TRAINED_ON, VALIDATED_ON, TESTED_ON, IMAGE_BATCH = 2048, 600, 1500, 32
SHIFT = 2


def images(folder: Path, seed: int) -> Split:
    """Disjoint random parts of the images: to train on and to validate on from the training part, to test on."""
    parts = paper_data.load(folder)
    order = torch.randperm(len(parts["train"]), generator=_generator(seed, 0))
    test_order = torch.randperm(len(parts["test"]), generator=_generator(seed, 1))
    train = _scaled(parts["train"][order[:TRAINED_ON]])
    return Split(
        batch=lambda step: _image_batch(train, seed, step),
        validation=_scaled(parts["train"][order[TRAINED_ON : TRAINED_ON + VALIDATED_ON]]),
        test=_scaled(parts["test"][test_order[:TESTED_ON]]),
        recalibrate=[train.inputs[:256]],
    )


def _scaled(part: paper_data.Images) -> Examples:
    pixels = part.pixels.float().div(127.5).sub(1)
    return Examples(pixels.contiguous(memory_format=torch.channels_last), part.labels)


def _image_batch(train: Examples, seed: int, step: int) -> Examples:
    """Batch ``step``, from 1 on, of shuffled epochs, shifted by up to two pixels and mirrored at random."""
    epoch, index = divmod(step - 1, len(train.targets) // IMAGE_BATCH)
    order = torch.randperm(len(train.targets), generator=_generator(seed, 2, epoch))
    rows = order[index * IMAGE_BATCH : (index + 1) * IMAGE_BATCH]
    inputs = paper_data.augmented(train.inputs[rows], SHIFT, _generator(seed, 3, step))
    return Examples(inputs, train.targets[rows])


def small_preresnet() -> nn.Module:
    """Eight layers, 20,506 parameters, for grey images in ten classes."""
    return paper_recipe.MODELS["preresnet8"](1, 10).to(memory_format=torch.channels_last)


def sgd(model: nn.Module, rate: float) -> Optimizer:
    """As the paper's, for pre-activation ResNets."""
    return SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=3e-4)


# State of the Union speeches, byte by byte.

WINDOW, TEXT_BATCH, VALIDATION_WINDOWS, TEST_WINDOWS = 32, 8, 192, 768
HELD_OUT_EVERY = 8


def speeches(folder: Path, seed: int) -> Split:
    """Whole speeches are held out, every eighth to validate on and the one after it to test on."""
    texts = [
        torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
        for path in sorted(folder.glob("*.txt"))
    ]
    if not texts:
        raise FileNotFoundError(f"{folder} holds no speeches (*.txt)")
    held_out = [torch.cat(texts[first::HELD_OUT_EVERY]) for first in (0, 1)]
    train = torch.cat([text for index, text in enumerate(texts) if index % HELD_OUT_EVERY > 1])
    validation, test = (
        _windows(text, count, _generator(seed, purpose))
        for text, count, purpose in zip(held_out, (VALIDATION_WINDOWS, TEST_WINDOWS), (0, 1), strict=True)
    )
    return Split(
        batch=lambda step: _windows(train, TEXT_BATCH, _generator(seed, 2, step)),
        validation=validation,
        test=test,
        recalibrate=None,
    )


def _windows(text: Tensor, count: int, generator: torch.Generator) -> Examples:
    starts = torch.randint(len(text) - WINDOW, (count,), generator=generator)
    rows = text[starts[:, None] + torch.arange(WINDOW + 1)].long()
    return Examples(rows[:, :-1], rows[:, 1:])


class TransformerBlock(nn.Module):
    """Attention to what is before, and a layer of four times the width, both on normalised inputs and added."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        attended = scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(gelu(self.up(self.norm2(x))))


class ByteTransformer(nn.Module):
    """Two blocks of width 64 over bytes ``[N, T]``: next-byte logits ``[N, T, 256]``; 135,168 parameters."""

    def __init__(self, width: int = 64, heads: int = 4, layers: int = 2):
        super().__init__()
        self.byte, self.position = nn.Embedding(256, width), nn.Embedding(WINDOW, width)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)
        nn.init.normal_(self.byte.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.byte(tokens) + self.position.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def adamw(model: nn.Module, rate: float) -> Optimizer:
    """With the usual settings of language models."""
    return AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)


TASKS = {
    task.name: task
    for task in (
        Task(
            "images",
            images,
            small_preresnet,
            sgd,
            unit_steps=480,
            batch=IMAGE_BATCH,
            rates=(0.01, 0.03, 0.1, 0.3),
            reported_rates=(0.03, 0.1),
        ),
        Task(
            "text",
            speeches,
            ByteTransformer,
            adamw,
            unit_steps=480,
            batch=TEXT_BATCH,
            rates=(7e-4, 2e-3, 6e-3),
            reported_rates=(2e-3, 6e-3),
            warmup_steps=30,
        ),
    )
}
