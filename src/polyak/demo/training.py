"""One training run of a task, with its candidates scored along the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR

from polyak.demo.candidates import Candidates, Curve, Scoring, choose
from polyak.demo.data import batches, with_noise
from polyak.demo.tasks import CHOSEN, Task
from polyak.selection import Selection
from polyak.trajectory import Recorder, Trajectory

__all__ = ["Run", "learning_rate_factor", "train"]

# update_bn sees what training sees, noise included; several draws make the statistics exact enough.
_UPDATE_BN_DRAWS = 4

# What is done with a recorded run at its end: the recording, the model, how it is scored, what was chosen.
Look = Callable[[Trajectory, nn.Module, Scoring, Selection], Any]


@dataclass(frozen=True)
class Run:
    """What came of one training run.

    Attributes:
        curves: of the live weights, of each average, and the end of the chosen one, by label.
        selection: what :func:`polyak.select` found, as plain values; None where the run was not recorded.
        selection_text: the same as it prints.
        seen: what ``look`` returned.
    """

    curves: dict[str, Curve]
    selection: dict[str, Any] | None = None
    selection_text: str = ""
    seen: Any = None


def train(
    task: Task,
    seed: int,
    *,
    decay_fraction: float = 0.0,
    record: bool = False,
    eval_steps: int | None = None,
    look: Look | None = None,
) -> Run:
    """Train once; the averages are followed where the learning rate is constant.

    The learning rate goes linearly to zero over the last ``decay_fraction`` of the run. Scoring changes
    nothing in the training, and the same arguments give the same numbers, bit for bit, on the same machine.

    Args:
        task: what to train.
        seed: of the split, the initial weights, the batches and the noise.
        decay_fraction: from 0 to 1; at 0 the learning rate stays constant and the averages are followed.
        record: whether to record the run, and to choose from the recording at its end.
        eval_steps: optimizer steps between scores; by default the task's own.
        look: called at the end of a run that is recorded.
    """
    with _one_thread():
        split = task.load(seed)
        model = _initial_model(task, seed)
        scoring_generator = torch.Generator().manual_seed(seed)
        update_bn_batches = [
            with_noise(split.train.inputs, task.input_noise, scoring_generator)
            for _ in range(_UPDATE_BN_DRAWS)
        ]
        scoring = Scoring(split, update_bn_batches)
        candidates = Candidates(model, {} if decay_fraction else task.averages, scoring)
        recording = _recording(task, model) if record else nullcontext()

        optimizer = task.optimizer(model.parameters(), **task.optimizer_options)
        factor = partial(
            learning_rate_factor,
            steps=task.steps,
            warmup_steps=task.warmup_steps,
            decay_steps=round(decay_fraction * task.steps),
        )
        scheduler = LambdaLR(optimizer, factor)
        generator = torch.Generator().manual_seed(seed)
        with recording as recorder:
            for step, batch in enumerate(batches(split.train, task.batch_size, task.steps, generator), 1):
                inputs = with_noise(batch.inputs, task.input_noise, generator)
                optimizer.zero_grad()
                cross_entropy(model(inputs), batch.targets).backward()
                optimizer.step()
                scheduler.step()
                candidates.update()
                if recorder is not None:
                    recorder.update()
                if step % (eval_steps or task.eval_steps) == 0:
                    candidates.score(step)
            if recorder is None:
                return Run(candidates.curves)
            recorder.close()
            chosen, selection = choose(recorder.trajectory, model, scoring, task.steps)
            seen = None if look is None else look(recorder.trajectory, model, scoring, selection)
    return Run(candidates.curves | {CHOSEN: chosen}, selection.to_dict(), str(selection), seen)


def learning_rate_factor(steps_done: int, *, steps: int, warmup_steps: int, decay_steps: int) -> float:
    """The share of the full learning rate for the next step: linear up, constant, linear down to zero.

    >>> [learning_rate_factor(n, steps=8, warmup_steps=2, decay_steps=4) for n in range(9)]
    [0.5, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    up = (steps_done + 1) / warmup_steps if warmup_steps else 1.0
    down = (steps - steps_done) / decay_steps if decay_steps else 1.0
    return min(up, 1.0, down)


@contextmanager
def _recording(task: Task, model: nn.Module) -> Iterator[Recorder]:
    """A recorder in a folder that is gone afterwards."""
    with (
        TemporaryDirectory() as folder,
        Recorder(model, folder, every=task.record_every, block=task.block_steps) as recorder,
    ):
        yield recorder


def _initial_model(task: Task, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return task.build_model()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums split over threads depend on how many there are; one thread gives the same bits everywhere."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
