"""What the demo trains and averages: every setting of both tasks, fixed before any result is seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from polyak.demo import data, models
from polyak.profiles import EMA, Power, Scheme, Uniform

__all__ = ["CHOSEN", "LIVE", "LIVE_EARLY", "TASKS", "AverageSpec", "Task"]

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
    load: Callable[[int], data.Split]
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
    load=data.digits,
    build_model=models.digits_cnn,
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
    load=data.help_text,
    build_model=models.byte_language_model,
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
