"""The runs of `real_tasks`: two small real tasks, trained under many schedules, each run recorded in a folder.

Runs of one seed and rate share their beginning. One is trained at the constant rate to the end; every schedule that
leaves the constant rate later on starts from the state it had there, with the same batches, as if it had been trained
from the first step. A folder of runs appears whole or not at all, so that an interrupted study goes on where it was.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention
from torch.optim import SGD, AdamW, Optimizer

import polyak

sys.path.append(str(Path(__file__).parent.parent / "examples"))
import paper_data
import paper_recipe

__all__ = ["TASKS", "Examples", "Run", "Split", "Task", "losses", "paper_recipe", "record", "runs_of"]

CONSTANT, COSINE, PAPER = "constant", "cosine", "paper"
LOWEST_FACTOR = 0.01
SWA_START = 0.75
TRAJECTORY, SWA, EARLY, RECORD = "trajectory", "swa.safetensors", "early.safetensors", "run.json"


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
    """A task and the runs to be made of it. Steps are optimizer steps; budgets are in multiples of ``unit_steps``.

    Every ``sample_steps`` the live weights are validated, and SWA takes a sample. Schedules begin at multiples of
    ``block_steps``, the length of a block.
    """

    name: str
    load: Callable[[Path, int], Split]
    build_model: Callable[[], nn.Module]
    optimizer: Callable[[nn.Module, float], Optimizer]
    sample_steps: int
    block_steps: int
    unit_steps: int
    rates: tuple[float, ...]
    schedules: tuple[str, ...]
    budgets: tuple[float, ...] = (0.5, 1.0, 2.0)
    warmup_steps: int = 0


@dataclass(frozen=True)
class Run:
    """One training run of ``steps`` optimizer steps."""

    seed: int
    rate: float
    schedule: str
    steps: int

    @property
    def name(self) -> str:
        """A folder's name."""
        return f"{self.schedule.replace(':', '-')}-{self.steps}"

    def leaves_constant_rate(self, block_steps: int) -> int:
        """The step, a multiple of ``block_steps``, up to which the run is that of the constant rate.

        A block before the end at the latest, as a recorder keeps live weights of what it has recorded itself.
        """
        kind, share = _parts(self.schedule)
        at = {CONSTANT: 1.0, COSINE: 0.0, PAPER: 0.5, "swa": 0.5 * SWA_START, "linear": 1 - share}[kind]
        return min(round(at * self.steps / block_steps) * block_steps, self.steps - block_steps)

    def factor(self, step: int, begins: int) -> float:
        """Of the learning rate at ``step``, from 1 on, of a run that leaves the constant rate at ``begins``."""
        kind, share = _parts(self.schedule)
        if kind == COSINE:
            return LOWEST_FACTOR + (1 - LOWEST_FACTOR) * (1 + math.cos(math.pi * step / self.steps)) / 2
        # The paper's shapes are held at their lowest after nine tenths, of the run or of what is before averaging.
        end, lowest = {
            CONSTANT: (math.inf, 1.0),
            PAPER: (0.9 * self.steps, LOWEST_FACTOR),
            "swa": (0.9 * SWA_START * self.steps, share),
            "linear": (self.steps, LOWEST_FACTOR),
        }[kind]
        down = min(max((step - begins) / (end - begins), 0.0), 1.0)
        return 1 + (lowest - 1) * down


def _parts(schedule: str) -> tuple[str, float]:
    kind, _, number = schedule.partition(":")
    return kind, float(number or 0)


def runs_of(task: Task, seed: int, rate: float) -> list[Run]:
    """Every schedule at every budget."""
    budgets = [round(budget * task.unit_steps) for budget in task.budgets]
    return [Run(seed, rate, schedule, steps) for schedule in task.schedules for steps in budgets]


# A run in progress, and what is left of it.


def losses(model: nn.Module, examples: Examples) -> Tensor:
    """The NLL of each example in nats, ``[N]``: per image, or per byte, the mean over a window."""
    logits = model(examples.inputs)
    each = cross_entropy(logits.flatten(0, -2), examples.targets.flatten(), reduction="none")
    return each.view(len(examples.targets), -1).mean(dim=1)


@torch.no_grad()
def validated(model: nn.Module, split: Split) -> float:
    """The loss of the live weights as they are, in evaluation mode."""
    model.eval()
    found = losses(model, split.validation).mean().item()
    model.train()
    return found


class Training:
    """A model in training, recorded; ``states`` and ``curve`` hold its weights and validation loss at every sample."""

    def __init__(self, task: Task, split: Split, seed: int, rate: float, folder: Path):
        self.task, self.split, self.rate = task, split, rate
        torch.manual_seed(seed)
        self.model = task.build_model()
        self.optimizer = task.optimizer(self.model, rate)
        self.step = 0
        self.states: dict[int, dict[str, Tensor]] = {}
        self.curve: dict[int, float] = {}
        self.recorder = self._recorder(folder)

    def _recorder(self, folder: Path, step: int | None = None) -> polyak.Recorder:
        return polyak.Recorder(
            self.model,
            folder,
            every=2,
            block=self.task.block_steps,
            max_blocks=512,
            optimizer=self.optimizer,
            step=step,
        )

    def snapshot(self) -> dict[str, Any]:
        """Everything that a branch starts from."""
        return deepcopy({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()})

    def branch(self, step: int, snapshot: dict[str, Any], folder: Path) -> None:
        """Go on in ``folder`` from where this run was at ``step``; what is recorded of it by then is linked."""
        recorded = self.recorder.directory
        shutil.copytree(recorded, folder, copy_function=os.link, ignore=shutil.ignore_patterns("lock"))
        self.model.load_state_dict(snapshot["model"])
        self.optimizer.load_state_dict(deepcopy(snapshot["optimizer"]))
        self.step = step
        self.states = {at: state for at, state in self.states.items() if at <= step}
        self.curve = {at: loss for at, loss in self.curve.items() if at <= step}
        self.recorder = self._recorder(folder, step)

    def advance(self, to: int, factor: Callable[[int], float]) -> None:
        """Train up to step ``to``."""
        while self.step < to:
            self.step += 1
            warm = min(1.0, self.step / max(1, self.task.warmup_steps))
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate * warm * factor(self.step)
            self.optimizer.zero_grad()
            losses(self.model, self.split.batch(self.step)).mean().backward()
            self.optimizer.step()
            self.recorder.update()
            if self.step % self.task.sample_steps == 0:
                self.curve[self.step] = validated(self.model, self.split)
                self.states[self.step] = deepcopy(self.model.state_dict())

    def finish(self, run: Run, folder: Path) -> None:
        """Write the early-stopped weights, SWA's with their own statistics, and the curve beside the trajectory."""
        self.recorder.close()
        best = min(self.curve, key=lambda step: self.curve[step])
        polyak.checkpoints.write(folder / EARLY, self.states[best])
        scratch = self.task.build_model()
        average = polyak.Average(scratch, polyak.Uniform())
        for step, state in self.states.items():
            if step > SWA_START * run.steps:
                scratch.load_state_dict(state)
                average.update_now()
        average.copy_to(scratch)
        if self.split.recalibrate is not None:
            polyak.update_bn(self.split.recalibrate, scratch)
        polyak.checkpoints.write(folder / SWA, scratch.state_dict())
        record = {"curve": self.curve, "early_step": best, "swa_samples": average.n_averaged}
        (folder / RECORD).write_text(json.dumps(record))


def record(task: Task, split: Split, seed: int, rate: float, folder: Path) -> None:
    """Make all runs of a seed and a rate, each in a folder of its name; ``folder`` appears when they are done."""
    if folder.exists():
        return
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    runs = runs_of(task, seed, rate)
    begins = {run: run.leaves_constant_rate(task.block_steps) for run in runs}
    trunk = Training(task, split, seed, rate, unfinished / "trunk")
    snapshots = {}
    for step in sorted(set(begins.values())):
        trunk.advance(step, lambda _: 1.0)
        snapshots[step] = trunk.snapshot()
    trunk.recorder.close()
    whole = (trunk.recorder, trunk.states, trunk.curve)
    for run in runs:
        trunk.recorder, trunk.states, trunk.curve = whole
        trunk.branch(begins[run], snapshots[begins[run]], unfinished / run.name / TRAJECTORY)
        trunk.advance(run.steps, lambda step, run=run: run.factor(step, begins[run]))
        trunk.finish(run, unfinished / run.name)
    shutil.rmtree(unfinished / "trunk")
    unfinished.rename(folder)


def _generator(*numbers: int) -> torch.Generator:
    """A generator of its own for each tuple of a seed, a purpose and a step."""
    seed = 0
    for number in numbers:
        seed = seed * 1_000_003 + number
    return torch.Generator().manual_seed(seed)


# Fashion-MNIST, or any set of small images.

TRAINED_ON, VALIDATED_ON, TESTED_ON, IMAGE_BATCH = 1024, 600, 1500, 32
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
            name="images",
            load=images,
            build_model=small_preresnet,
            optimizer=sgd,
            sample_steps=16,
            block_steps=8,
            unit_steps=192,
            rates=(0.03, 0.1),
            schedules=(CONSTANT, PAPER, COSINE, "swa:0.3"),
        ),
        Task(
            name="text",
            load=speeches,
            build_model=ByteTransformer,
            optimizer=adamw,
            sample_steps=20,
            block_steps=10,
            unit_steps=320,
            rates=(2e-3, 6e-3),
            schedules=(CONSTANT, "linear:0.2", "linear:0.5", COSINE),
            warmup_steps=30,
        ),
    )
}
