"""The runs of `real_tasks`: training under many schedules, every run recorded.

Runs of one seed and rate share their beginning. One is trained at the constant rate to the end; every schedule that
leaves the constant rate later on starts from the state it had there, with the same batches, as if it had been trained
from the first step.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import polyak
from real_data import Split, Task, losses

__all__ = ["BUDGETS", "CONSTANT", "Ended", "Run", "trained"]

CONSTANT, COSINE = "constant", "cosine"
# Shares of one budget.
BUDGETS = (0.5, 1.0, 1.5, 2.0)
LOWEST_FACTOR = 0.01
# Where SWA's own schedule has come down to its rate at nine tenths of, as the paper has it.
SWA_START = 0.75
# Weights are kept for SWA and for early stopping every so many steps; schedules begin at multiples of a block.
SAMPLE_STEPS, BLOCK_STEPS = 16, 4


@dataclass(frozen=True)
class Run:
    """One training run of ``steps`` optimizer steps.

    Schedules are "constant", "cosine", "linear:0.2", down to a hundredth over the last 20% of the steps, and "swa:0.3",
    the paper's for averaging, which comes down to 0.3 of the rate and stays there.
    """

    schedule: str
    steps: int

    def leaves_constant_rate(self) -> int:
        """The step, a multiple of a block, up to which the run is that of the constant rate.

        A block before the end at the latest, as a recorder keeps live weights of what it has recorded itself.
        """
        kind, share = _parts(self.schedule)
        at = {CONSTANT: 1.0, COSINE: 0.0, "swa": 0.5 * SWA_START, "linear": 1 - share}[kind]
        return min(round(at * self.steps / BLOCK_STEPS) * BLOCK_STEPS, self.steps - BLOCK_STEPS)

    def factor(self, step: int) -> float:
        """Of the learning rate at ``step``, from 1 on."""
        kind, share = _parts(self.schedule)
        if kind == COSINE:
            return LOWEST_FACTOR + (1 - LOWEST_FACTOR) * (1 + math.cos(math.pi * step / self.steps)) / 2
        begins = self.leaves_constant_rate()
        end, lowest = {
            CONSTANT: (math.inf, 1.0),
            "swa": (0.9 * SWA_START * self.steps, share),
            "linear": (self.steps, LOWEST_FACTOR),
        }[kind]
        down = min(max((step - begins) / (end - begins), 0.0), 1.0)
        return 1 + (lowest - 1) * down


def _parts(schedule: str) -> tuple[str, float]:
    kind, _, number = schedule.partition(":")
    return kind, float(number or 0)


@dataclass(frozen=True)
class Ended:
    """A run that has ended: what was recorded, and its weights every few steps."""

    run: Run
    trajectory: polyak.Trajectory
    states: dict[int, dict[str, Tensor]]


def trained(
    task: Task, split: Split, seed: int, rate: float, runs: Iterable[Run], folder: Path
) -> Iterator[Ended]:
    """Make each of ``runs``, recorded in ``folder``."""
    runs = list(runs)
    trunk = Training(task, split, seed, rate, folder / "trunk")
    snapshots = {}
    for step in sorted({run.leaves_constant_rate() for run in runs}):
        trunk.advance(step, lambda _: 1.0)
        snapshots[step] = trunk.snapshot()
    trunk.recorder.close()
    for run in runs:
        start = snapshots[run.leaves_constant_rate()]
        branch = Training(task, split, seed, rate, folder / f"{run.schedule}-{run.steps}", start)
        branch.advance(run.steps, run.factor)
        branch.recorder.close()
        yield Ended(run, branch.recorder.trajectory, branch.states)


@dataclass(frozen=True)
class Snapshot:
    """Everything that a branch starts from; ``recorded`` is a folder that may hold what came after, too."""

    step: int
    model: dict[str, Any]
    optimizer: dict[str, Any]
    states: dict[int, dict[str, Tensor]]
    recorded: Path


class Training:
    """A model in training, recorded, from the beginning or from ``start``; ``states`` are its samples by step."""

    def __init__(
        self, task: Task, split: Split, seed: int, rate: float, folder: Path, start: Snapshot | None = None
    ):
        self.task, self.split, self.rate = task, split, rate
        torch.manual_seed(seed)
        self.model = task.build_model()
        self.optimizer = task.optimizer(self.model, rate)
        self.step = 0
        self.states: dict[int, dict[str, Tensor]] = {}
        if start is not None:
            self.model.load_state_dict(start.model)
            self.optimizer.load_state_dict(deepcopy(start.optimizer))
            self.step, self.states = start.step, dict(start.states)
            no_lock = shutil.ignore_patterns("lock")
            shutil.copytree(start.recorded, folder, copy_function=os.link, ignore=no_lock)
        self.recorder = polyak.Recorder(
            self.model,
            folder,
            every=2,
            block=BLOCK_STEPS,
            max_blocks=512,
            optimizer=self.optimizer,
            step=None if start is None else start.step,
        )

    def snapshot(self) -> Snapshot:
        """What this run is now."""
        model, optimizer = deepcopy((self.model.state_dict(), self.optimizer.state_dict()))
        return Snapshot(self.step, model, optimizer, dict(self.states), Path(self.recorder.directory))

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
            if self.step % SAMPLE_STEPS == 0:
                self.states[self.step] = deepcopy(self.model.state_dict())
