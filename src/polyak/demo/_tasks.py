"""What the demo trains: its data, models and losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from polyak._checks import require
from polyak.profiles import EMA, Power, Scheme, Uniform

__all__ = [
    "CHOSEN",
    "LIVE",
    "LIVE_EARLY",
    "TASKS",
    "AverageSpec",
    "Examples",
    "Split",
    "Task",
    "batches",
    "digits",
    "help_text",
    "quick",
    "with_noise",
]

# The demo's data: handwritten digits and the English of Python's own help pages, split by seed.

_CONTEXT_BYTES, _HELD_OUT_SHARE, _TEXT_SAMPLES = 8, 0.1, 10_000


@dataclass(frozen=True)
class Examples:
    """Inputs ``[N, ...]`` and their classes ``[N]`` (int64)."""

    inputs: Tensor
    targets: Tensor

    def __getitem__(self, rows: Tensor | slice) -> Examples:
        return Examples(self.inputs[rows], self.targets[rows])


@dataclass(frozen=True)
class Split:
    """Disjoint examples to train on, to tune on and to report on."""

    train: Examples
    validation: Examples
    test: Examples


def digits(seed: int, trained_on: int = 500, validated_on: int = 600, label_noise: float = 0.2) -> Split:
    """scikit-learn's 1,797 digits, ``[N, 1, 8, 8]`` in [0, 1]: to train on, to validate on, the rest to test.

    ``label_noise`` is the share of training labels that are replaced by random ones; those of validation and
    test are clean.
    """
    bunch = require("sklearn.datasets", extra="demo", purpose="the digits demo").load_digits()
    everything = Examples(
        torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16, torch.tensor(bunch.target)
    )
    generator = torch.Generator().manual_seed(seed)
    shuffled = everything[torch.randperm(len(everything.targets), generator=generator)]
    return Split(
        _with_noisy_labels(shuffled[:trained_on], label_noise, generator),
        shuffled[trained_on : trained_on + validated_on],
        shuffled[trained_on + validated_on :],
    )


def help_text(seed: int) -> Split:
    """The next byte given eight, in the help pages that ship with Python (466 kB of English).

    Trains on the first 90%; validation and test are disjoint random samples, 10,000 bytes each, of the rest.
    """
    from pydoc_data.topics import topics

    corpus = torch.tensor(list("".join(topics.values()).encode()))
    windows = corpus.unfold(0, _CONTEXT_BYTES + 1, 1)
    everything = Examples(windows[:, :-1], windows[:, -1])
    held_out = len(everything.targets) - int(_HELD_OUT_SHARE * len(everything.targets))
    generator = torch.Generator().manual_seed(seed)
    tail = everything[held_out:]
    shuffled = tail[torch.randperm(len(tail.targets), generator=generator)]
    # The windows that reach into the tail are in neither part: no test byte is ever seen in training.
    return Split(
        everything[: held_out - _CONTEXT_BYTES],
        shuffled[:_TEXT_SAMPLES],
        shuffled[_TEXT_SAMPLES : 2 * _TEXT_SAMPLES],
    )


def batches(
    examples: Examples, batch_size: int, steps: int, generator: torch.Generator
) -> Iterator[Examples]:
    """``steps`` shuffled batches, epoch after epoch; what does not fill a batch is left out of its epoch."""
    epoch_steps = len(examples.targets) // batch_size
    order = torch.empty(0, dtype=torch.int64)
    for step in range(steps):
        if step % epoch_steps == 0:
            order = torch.randperm(len(examples.targets), generator=generator)
        first = step % epoch_steps * batch_size
        yield examples[order[first : first + batch_size]]


def with_noise(inputs: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    """``inputs`` plus fresh Gaussian noise; as they are if ``deviation`` is 0."""
    if deviation == 0:
        return inputs
    return inputs + deviation * torch.randn(inputs.shape, generator=generator)


def _with_noisy_labels(examples: Examples, share: float, generator: torch.Generator) -> Examples:
    count = len(examples.targets)
    replaced = torch.rand(count, generator=generator) < share
    random_labels = torch.randint(0, 10, (count,), generator=generator)
    return Examples(examples.inputs, torch.where(replaced, random_labels, examples.targets))


# The demo's two models: small enough for a minute on two cores, of the kinds that people average.


def digits_cnn() -> nn.Sequential:
    """Two convolutions, 16 and 32 channels, with BatchNorm: images ``[N, 1, 8, 8]`` to logits ``[N, 10]``."""
    return nn.Sequential(
        *_convolution(1, 16),
        nn.MaxPool2d(2),
        *_convolution(16, 32),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def byte_language_model() -> nn.Sequential:
    """One hidden layer over eight embedded bytes: contexts ``[N, 8]`` to next-byte logits ``[N, 256]``."""
    return nn.Sequential(
        nn.Embedding(256, 24),
        nn.Flatten(),
        nn.Linear(8 * 24, 192),
        nn.LayerNorm(192),
        nn.GELU(),
        nn.Linear(192, 256),
    )


def _convolution(inputs: int, outputs: int) -> list[nn.Module]:
    # BatchNorm subtracts the mean, so a bias before it would do nothing.
    return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


# What the demo trains and averages: every setting of both tasks, fixed before any result is seen.

LIVE = "live weights"
LIVE_EARLY = "live, early-stopped"
CHOSEN = "chosen by select"


@dataclass(frozen=True)
class AverageSpec:
    """One average to follow; ``start`` and ``every`` are optimizer steps."""

    scheme: Scheme
    start: int = 0
    every: int = 1
    update_bn: bool = False


@dataclass(frozen=True)
class Task:
    """A data set, a model, how it is trained, and which averages of the run are compared.

    ``averages`` maps the label of each to its spec. Besides, the run is recorded, a sample every ``record_every``
    optimizer steps and a block of ``block_steps``, and :func:`polyak.select` chooses from the recording at its end.
    ``decay_fractions`` are the shares of the run over which the learning rate may go linearly to zero: the
    best for validation on ``tuning_seeds`` is the baseline. Counts are optimizer steps; every ``eval_steps``
    of them the weights are scored. ``update_bn_pair`` are the labels of one average with BatchNorm statistics that
    are not recomputed, and that are, if the model has any. Figures count time in ``time_unit`` of ``unit_steps``.
    """

    name: str
    description: str
    load: Callable[[int], Split]
    build_model: Callable[[], nn.Module]
    optimizer: type[Optimizer]
    optimizer_options: Mapping[str, Any]
    batch_size: int
    steps: int
    eval_steps: int
    averages: Mapping[str, AverageSpec]
    record_every: int
    block_steps: int
    decay_fractions: tuple[float, ...]
    seeds: int
    tuning_seeds: tuple[int, ...]
    warmup_steps: int = 0
    input_noise: float = 0.0
    update_bn_pair: tuple[str, str] | None = None
    time_unit: str = "optimizer steps"
    unit_steps: int = 1


_DIGITS = Task(
    name="digits",
    description="a small CNN with BatchNorm on 500 handwritten digits, a fifth of the labels wrong",
    load=digits,
    build_model=digits_cnn,
    optimizer=SGD,
    optimizer_options={"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4},
    batch_size=25,
    input_noise=0.3,
    steps=800,
    eval_steps=40,
    time_unit="epochs",
    unit_steps=20,
    averages={
        "SWA, no update_bn": AverageSpec(Uniform(), start=320, every=20),
        "SWA + update_bn": AverageSpec(Uniform(), start=320, every=20, update_bn=True),
        "EMA + update_bn": AverageSpec(EMA(half_life=100), update_bn=True),
    },
    record_every=5,
    block_steps=20,
    update_bn_pair=("SWA, no update_bn", "SWA + update_bn"),
    decay_fractions=(0.05, 0.1, 0.2, 0.4, 0.7, 1.0),
    seeds=8,
    tuning_seeds=(1000, 1001, 1002),
)

_TEXT = Task(
    name="text",
    description="a byte language model on the help pages that ship with Python",
    load=help_text,
    build_model=byte_language_model,
    optimizer=AdamW,
    optimizer_options={"lr": 6e-3, "betas": (0.9, 0.95), "weight_decay": 0.1},
    batch_size=64,
    steps=2000,
    warmup_steps=100,
    eval_steps=200,
    averages={
        "uniform tail": AverageSpec(Uniform(), start=1300, every=20),
        "EMA": AverageSpec(EMA(half_life=200)),
        "power, gamma 4": AverageSpec(Power(gamma=4)),
    },
    record_every=10,
    block_steps=20,
    decay_fractions=(0.2, 0.45, 0.7, 1.0),
    seeds=5,
    tuning_seeds=(1000, 1001),
)

TASKS = {task.name: task for task in (_DIGITS, _TEXT)}


def quick(task: Task) -> Task:
    """The task on two seeds, every second decay tried on one: to see how it goes, as two seeds prove little."""
    return replace(
        task, seeds=2, tuning_seeds=task.tuning_seeds[:1], decay_fractions=task.decay_fractions[1::2]
    )
