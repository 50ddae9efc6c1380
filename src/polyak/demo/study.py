"""All training runs of a task: tune the baseline on some seeds, then compare every candidate on others."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import Any

import numpy as np

from polyak.demo.candidates import Curve
from polyak.demo.tasks import CHOSEN, LIVE, LIVE_EARLY, Task
from polyak.demo.training import Run, train
from polyak.errors import OptionError

__all__ = ["Study", "check_seeds", "run_count", "run_study"]

Runs = Iterable[Run]
Map = Callable[..., Runs]


@dataclass(frozen=True)
class Study:
    """Everything that was measured, by seed; ``curves`` holds the curve of each candidate of each seed.

    ``tuning_nll`` is the validation NLL that each decay fraction reached on each of the tuning seeds;
    ``selections`` is what `select` found in the recording of each seed, and ``first_selection`` how it
    printed that of the first.
    """

    task: Task
    tuning_nll: dict[float, list[float]]
    curves: dict[int, dict[str, Curve]]
    selections: dict[int, dict[str, Any]]
    first_selection: str

    @property
    def decay_fraction(self) -> float:
        """The decay fraction of the lowest mean validation NLL on the tuning seeds."""
        return min(self.tuning_nll, key=lambda fraction: float(np.mean(self.tuning_nll[fraction])))

    @property
    def decay(self) -> str:
        """The label of the best tuned decay."""
        return f"decay, last {self.decay_fraction:.0%}"

    @property
    def labels(self) -> list[str]:
        """All candidates, baselines first."""
        return [LIVE, LIVE_EARLY, self.decay, *self.task.averages, CHOSEN]

    def scores(self, label: str, measure: str) -> list[float]:
        """The test scores to report, one per seed; ``measure`` is ``"nll"`` or ``"accuracy"``.

        They are those of the end of the run, or, for the early-stopped weights, of their best validation NLL.
        """
        if label != LIVE_EARLY:
            return [getattr(curves[label], f"test_{measure}")[-1] for curves in self.curves.values()]
        live = [curves[LIVE] for curves in self.curves.values()]
        return [getattr(curve, f"test_{measure}")[int(np.argmin(curve.validation_nll))] for curve in live]


def run_count(task: Task, seeds: int) -> int:
    """How many training runs :func:`run_study` makes."""
    return len(task.decay_fractions) * len(task.tuning_seeds) + 2 * seeds


def check_seeds(task: Task, seeds: int) -> None:
    """Refuse (``OptionError``) too few seeds for a paired test, or so many that they reach the tuning seeds."""
    if not 2 <= seeds <= min(task.tuning_seeds):
        raise OptionError(
            f"seeds must be 2 to {min(task.tuning_seeds)}: a single run shows nothing about chance, and from "
            f"{min(task.tuning_seeds)} on the seeds tune the baseline. Got {seeds}."
        )


def run_study(
    task: Task, seeds: int, *, workers: int = 1, on_run: Callable[[str], object] = lambda doing: None
) -> Study:
    """Tune the learning-rate decay on the tuning seeds, then train with and without it on seeds 0, 1, ….

    Args:
        task: what to train.
        seeds: how many seeds to report on, at least 2.
        workers: processes to train in; with 1, in this one. The numbers do not depend on it.
        on_run: called after each training run with what is being done.

    Raises:
        OptionError: as :func:`check_seeds` does.
    """
    check_seeds(task, seeds)
    with _mapper(workers) as run_all:
        pairs = [(fraction, seed) for fraction in task.decay_fractions for seed in task.tuning_seeds]
        tuning_nll: dict[float, list[float]] = {fraction: [] for fraction in task.decay_fractions}
        for (fraction, _), run in zip(pairs, run_all(partial(_tuning_run, task), pairs), strict=True):
            tuning_nll[fraction].append(run.curves[LIVE].validation_nll[-1])
            on_run("tuning the learning-rate decay")

        runs = []
        for run in run_all(partial(train, task, record=True), range(seeds)):
            runs.append(run)
            on_run("training at a constant learning rate, averaging, choosing")
        selections = {seed: run.selection for seed, run in enumerate(runs) if run.selection is not None}
        curves = {seed: run.curves for seed, run in enumerate(runs)}
        study = Study(task, tuning_nll, curves, selections, runs[0].selection_text)
        decayed = run_all(partial(train, task, decay_fraction=study.decay_fraction), study.curves)
        for seed, run in zip(study.curves, decayed, strict=True):
            study.curves[seed][study.decay] = run.curves[LIVE]
            on_run("training with the best tuned decay")
    return study


def _tuning_run(task: Task, pair: tuple[float, int]) -> Run:
    fraction, seed = pair
    return train(task, seed, decay_fraction=fraction, eval_steps=task.steps)


@contextmanager
def _mapper(workers: int) -> Iterator[Map]:
    """``map``, or one that keeps the order and spreads the calls over worker processes."""
    if workers == 1:
        yield map
        return
    # A fork would inherit torch's threads in the middle of what they do. Ctrl-C is for the parent to handle.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN))
    try:
        yield pool.map
    finally:
        pool.shutdown(cancel_futures=True)
