"""One training run of the demo and all of them: candidates, seeds, and the statistics over them."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR

from polyak._checks import require
from polyak.average import Average
from polyak.batchnorm import tracks_statistics, update_bn
from polyak.demo import _tasks
from polyak.demo._tasks import CHOSEN, LIVE, LIVE_EARLY, Task
from polyak.errors import OptionError
from polyak.selection import Selection, select
from polyak.trajectory import Recorder, Trajectory

__all__ = [
    "Curve",
    "Difference",
    "Scoring",
    "Study",
    "check_seeds",
    "learning_rate_factor",
    "mean_and_error",
    "paired_difference",
    "run_count",
    "run_study",
    "train",
]

# Means over seeds and paired differences between candidates.


@dataclass(frozen=True)
class Difference:
    """Candidate minus baseline over the same seeds: mean, standard error, 95% interval, two-sided p-value."""

    mean: float
    stderr: float
    low: float
    high: float
    p_value: float
    seeds: int
    seeds_lower: int
    """Seeds on which the candidate's number is the lower one."""


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error, s/√n with s² divided by n - 1.

    >>> mean_and_error([1.0, 2.0, 3.0])
    (2.0, 0.5773502691896258)
    """
    return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values)))


def paired_difference(candidate: Sequence[float], baseline: Sequence[float]) -> Difference:
    """Compare seed by seed with a paired t-test: t = mean(d) / stderr(d), n - 1 degrees of freedom.

    Where all seeds differ by the same amount the p-value is 1 if that is zero and 0 otherwise.

    Source: Student, "The probable error of a mean", 1908.
    """
    differences = [one - other for one, other in zip(candidate, baseline, strict=True)]
    mean, stderr = mean_and_error(differences)
    if len(set(differences)) == 1:
        low, high, p_value = mean, mean, float(mean == 0)
    else:
        stats = require("scipy.stats", extra="demo", purpose="the paired t-test")
        test = stats.ttest_rel(candidate, baseline)
        interval = test.confidence_interval(0.95)
        low, high, p_value = float(interval.low), float(interval.high), float(test.pvalue)
    seeds_lower = sum(difference < 0 for difference in differences)
    return Difference(mean, stderr, low, high, p_value, len(differences), seeds_lower)


# The weights that a training run offers, live and averaged, and their scores along the run.


@dataclass
class Curve:
    """Scores of one candidate along a run: NLL in nats per example, accuracy from 0 to 1."""

    steps: list[int] = field(default_factory=list)
    validation_nll: list[float] = field(default_factory=list)
    validation_accuracy: list[float] = field(default_factory=list)
    test_nll: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)

    def append(self, step: int, validation: tuple[float, float], test: tuple[float, float]) -> None:
        """Add one point; scores are (NLL, accuracy)."""
        self.steps.append(step)
        self.validation_nll.append(validation[0])
        self.validation_accuracy.append(validation[1])
        self.test_nll.append(test[0])
        self.test_accuracy.append(test[1])


@dataclass(frozen=True)
class Scoring:
    """What weights are scored on, and the inputs that BatchNorm statistics are recomputed from."""

    split: _tasks.Split
    update_bn_batches: list[Tensor]

    def scores(self, model: nn.Module) -> tuple[tuple[float, float], tuple[float, float]]:
        """(NLL, accuracy) on validation and on test."""
        return _score(model, self.split.validation), _score(model, self.split.test)


class Candidates:
    """Follows ``model`` with every average of ``specs`` and scores them all without disturbing it."""

    def __init__(
        self,
        model: nn.Module,
        specs: Mapping[str, _tasks.AverageSpec],
        scoring: Scoring,
    ) -> None:
        self._model = model
        self._specs = specs
        self._averages = {
            label: Average(model, spec.scheme, start=spec.start, every=spec.every)
            for label, spec in specs.items()
        }
        self._scoring = scoring
        self.curves: dict[str, Curve] = {LIVE: Curve()} | {label: Curve() for label in specs}

    def update(self) -> None:
        """Call after each optimizer step."""
        for average in self._averages.values():
            average.update()

    def score(self, step: int) -> None:
        """Append a point to the curve of each candidate that exists by now."""
        for label, weights in self._models():
            self.curves[label].append(step, *self._scoring.scores(weights))

    def _models(self) -> Iterator[tuple[str, nn.Module]]:
        live = deepcopy(self._model)
        yield LIVE, live
        for label, average in self._averages.items():
            if average.n_averaged:
                averaged = deepcopy(self._model)
                average.copy_to(averaged)
                if self._specs[label].update_bn:
                    update_bn(self._scoring.update_bn_batches, averaged)
                yield label, averaged


def choose(trajectory: Trajectory, model: nn.Module, scoring: Scoring, step: int) -> tuple[Curve, Selection]:
    """Let validation choose from a recorded run; the choice's scores at its end, ``step``.

    Test data only confirms the choice, as a holdout.
    """
    split = scoring.split
    selection = select(
        trajectory,
        model,
        score=lambda m: _losses(m, split.validation),
        holdout=lambda m: _losses(m, split.test),
        # One draw of the noise is enough to tell candidates apart, and each of them needs a pass of its own.
        recalibrate=scoring.update_bn_batches[:1] if tracks_statistics(model) else None,
        progress=False,
    )
    chosen = deepcopy(model)
    selection.apply(chosen)
    curve = Curve()
    curve.append(step, *scoring.scores(chosen))
    return curve, selection


def _losses(model: nn.Module, examples: _tasks.Examples) -> Tensor:
    return cross_entropy(model(examples.inputs), examples.targets, reduction="none")


@torch.no_grad()
def _score(model: nn.Module, examples: _tasks.Examples) -> tuple[float, float]:
    model.eval()
    logits = model(examples.inputs)
    correct = logits.argmax(dim=1) == examples.targets
    return cross_entropy(logits, examples.targets).item(), correct.double().mean().item()


# One training run of a task, with its candidates scored along the way.

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
            _tasks.with_noise(split.train.inputs, task.input_noise, scoring_generator)
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
            for step, batch in enumerate(
                _tasks.batches(split.train, task.batch_size, task.steps, generator), 1
            ):
                inputs = _tasks.with_noise(batch.inputs, task.input_noise, generator)
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


# All training runs of a task: tune the baseline on some seeds, then compare every candidate on others.

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
