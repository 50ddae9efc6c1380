"""One training run of protocol C, the demo's byte language model, and what is read from its trajectory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

import polyak
from effect_bound import Combinations
from polyak.demo._study import learning_rate_factor
from polyak.demo._tasks import TASKS, Examples, Split, batches

__all__ = ["COSINE", "Bound", "FitRead", "Job", "Read", "RunRecord", "run"]

TASK = TASKS["text"]
COSINE = "cosine"
RECORD_EVERY, BLOCK_STEPS = 10, 20
# Passes over 10,000 examples each: three times as many bring the bound down by another 3% of the way to it.
BOUND_ITERATIONS = 20


@dataclass(frozen=True)
class Job:
    """A run: ``decay`` is the share of it with a linearly falling learning rate, or "cosine" for all of it.

    ``read_at`` are the optimizer steps at which averages are selected from what is recorded by then, at the last of
    all steps with blends among them; with ``fit_steps`` the weights of the blocks are fitted at the end as well, on
    that many more training batches. With ``bound`` the best linear combination is fitted there, too.
    """

    seed: int
    lr: float
    decay: float | str
    steps: int
    read_at: tuple[int, ...] = ()
    fit_steps: int = 0
    bound: bool = False


@dataclass(frozen=True)
class Read:
    """The live weights, the best average and what was selected at one step: NLL in nats per byte.

    ``average`` is the best of the averages by validation, without blends and the live weights, ``selected`` the best
    of all.
    """

    live_validation: float
    live_test: float
    average: str
    average_test: float
    selected: str
    selected_validation: float
    selected_test: float


@dataclass(frozen=True)
class Bound:
    """Test NLL of the best linear combination for the test examples, and of that for the validation examples."""

    test: float
    fitted_on_validation: float


@dataclass(frozen=True)
class FitRead:
    """The fitted average, which validation data has not seen."""

    validation: float
    test: float
    extra_steps: int


@dataclass
class RunRecord:
    """What came of a job: the live weights at the end, and what was read along the way, by step."""

    job: Job
    validation: float
    test: float
    reads: dict[int, Read] = field(default_factory=dict)
    fit: FitRead | None = None
    bound: Bound | None = None


def run(job: Job) -> RunRecord:
    """Train on one thread; equal jobs give equal numbers on the same machine."""
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        return _Run(job, Path(folder)).result()


class _Run:
    def __init__(self, job: Job, folder: Path) -> None:
        self.job = job
        self.split: Split = TASK.load(job.seed)
        self.generator = torch.Generator().manual_seed(job.seed)
        torch.manual_seed(job.seed)
        self.model = TASK.build_model()
        options: dict[str, Any] = {**TASK.optimizer_options, "lr": job.lr}
        self.optimizer = AdamW(self.model.parameters(), **options)
        self.recorder = (
            polyak.Recorder(
                self.model, folder, every=RECORD_EVERY, block=BLOCK_STEPS, optimizer=self.optimizer
            )
            if job.read_at
            else None
        )

    def result(self) -> RunRecord:
        reads = self._train()
        record = RunRecord(
            self.job, _nll(self.model, self.split.validation), _nll(self.model, self.split.test), reads
        )
        if self.recorder is not None:
            self.recorder.close()
            trajectory = self.recorder.trajectory
            if self.job.steps in self.job.read_at:
                choice = self._select(trajectory)
                reads[self.job.steps] = self._read(trajectory, choice)
                if self.job.bound:
                    record.bound = self._bound(trajectory, choice)
            if self.job.fit_steps:
                record.fit = self._fit(trajectory)
        return record

    def _train(self) -> dict[int, Read]:
        scheduler = LambdaLR(self.optimizer, lambda done: _factor(done, self.job))
        reads: dict[int, Read] = {}
        for step, batch in enumerate(self._batches(self.job.steps), 1):
            self.optimizer.zero_grad()
            cross_entropy(self.model(batch.inputs), batch.targets).backward()
            self.optimizer.step()
            scheduler.step()
            if self.recorder is not None:
                self.recorder.update()
                if step in self.job.read_at and step < self.job.steps:
                    trajectory = self.recorder.trajectory
                    reads[step] = self._read(trajectory, self._select(trajectory))
        return reads

    def _batches(self, steps: int) -> Iterator[Examples]:
        return batches(self.split.train, TASK.batch_size, steps, self.generator)

    def _select(self, trajectory: polyak.Trajectory) -> polyak.Selection:
        return polyak.select(
            trajectory, self.model, score=self._validation_losses, mode="min", progress=False
        )

    def _read(self, trajectory: polyak.Trajectory, choice: polyak.Selection) -> Read:
        averages = [c.profile for c in choice.table if c.profile and not isinstance(c.profile, polyak.Blend)]
        return Read(
            live_validation=choice.live.score,
            live_test=_nll(self.model, self.split.test),
            average=str(averages[0]),
            average_test=self._test(trajectory.average(averages[0])),
            selected=choice.best.name,
            selected_validation=choice.best.score,
            selected_test=self._test(choice.weights() or self.model.state_dict()),
        )

    def _test(self, weights: dict[str, Tensor]) -> float:
        model = deepcopy(self.model)
        model.load_state_dict(weights)
        return _nll(model, self.split.test)

    def _bound(self, trajectory: polyak.Trajectory, choice: polyak.Selection) -> Bound:
        combinations = Combinations(trajectory, self.model)
        starts = [candidate.profile for candidate in choice.table[:3] if candidate.profile is not None]

        def best_for(examples: Examples) -> float:
            best = combinations.lowest(
                lambda model: _batch_loss(model, examples), starts, iterations=BOUND_ITERATIONS
            )
            return self._test(best)

        return Bound(best_for(self.split.test), best_for(self.split.validation))

    def _validation_losses(self, model: nn.Module) -> Tensor:
        return _losses(model, self.split.validation)

    def _fit(self, trajectory: polyak.Trajectory) -> FitRead:
        steps = self.job.fit_steps
        fitted = polyak.fit(trajectory, self.model, self._batches(steps), _batch_loss, steps=steps)
        averaged = deepcopy(self.model)
        averaged.load_state_dict(trajectory.average(fitted.profile))
        return FitRead(
            _nll(averaged, self.split.validation), _nll(averaged, self.split.test), fitted.extra_steps
        )


def _factor(steps_done: int, job: Job) -> float:
    if job.decay == COSINE:
        up = learning_rate_factor(steps_done, steps=job.steps, warmup_steps=TASK.warmup_steps, decay_steps=0)
        return up * (1 + math.cos(math.pi * steps_done / job.steps)) / 2
    decay_steps = round(float(job.decay) * job.steps)
    return learning_rate_factor(
        steps_done, steps=job.steps, warmup_steps=TASK.warmup_steps, decay_steps=decay_steps
    )


def _batch_loss(model: nn.Module, batch: Examples) -> Tensor:
    return cross_entropy(model(batch.inputs), batch.targets)


@torch.no_grad()
def _losses(model: nn.Module, examples: Examples) -> Tensor:
    return cross_entropy(model(examples.inputs), examples.targets, reduction="none")


def _nll(model: nn.Module, examples: Examples) -> float:
    return _losses(model, examples).double().mean().item()
