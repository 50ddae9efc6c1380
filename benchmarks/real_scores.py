"""What the runs of `real_runs` score: tried on some seeds to tune settings, then reported on others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

import polyak
from polyak.errors import OptionError
from real_data import Split, Task, losses
from real_runs import BUDGETS, CONSTANT, Ended, Run, trained
from real_tuning import FAMILIES, Setting

__all__ = ["FIT_EXAMPLES", "FIT_STEPS", "Cell", "reported", "steps_of", "tried"]


# A short average: what the live weights are compared with before it is known whether averaging pays.
RECENT = "tail:0.1"
FIT_STEPS, FIT_EXAMPLES = 150, 96


class Scorer:
    """Losses of any weights in one model, with BatchNorm statistics of their own."""

    def __init__(self, task: Task, split: Split):
        self.model, self.split = task.build_model(), split

    def validation(self, weights: dict[str, Tensor]) -> float:
        """NLL on validation."""
        return self._mean_loss(self._with(weights), validation=True)

    def both(self, weights: dict[str, Tensor], *, recalibrated: bool = True) -> dict[str, float]:
        """NLL on validation and on test, and the test error where there are classes."""
        model = self._with(weights, recalibrated)
        found = {
            "validation": self._mean_loss(model, validation=True),
            "test": self._mean_loss(model, validation=False),
        }
        if self.split.test.targets.ndim == 1:
            with torch.no_grad():
                wrong = model(self.split.test.inputs).argmax(1) != self.split.test.targets
            found["error"] = wrong.double().mean().item()
        return found

    def choice(self, ended: Ended, profiles: list[str] | None = None) -> polyak.Selection:
        """What `select` says of a run."""
        return polyak.select(
            ended.trajectory,
            self.model,
            score=lambda model: losses(model, self.split.validation),
            profiles=profiles,
            recalibrate=self.split.recalibrate,
            progress=False,
        )

    def fitted(self, ended: Ended) -> dict[str, Tensor]:
        """The average whose signed weights were fitted to the validation examples, in batches."""
        validation = self.split.validation
        batches = zip(
            validation.inputs.split(FIT_EXAMPLES), validation.targets.split(FIT_EXAMPLES), strict=True
        )
        self.model.train()
        fit = polyak.fit(
            ended.trajectory,
            self.model,
            list(batches),
            lambda model, batch: losses(model, type(validation)(*batch)).mean(),
            signed=True,
            steps=FIT_STEPS,
        )
        return ended.trajectory.average(fit.profile)

    def _with(self, weights: dict[str, Tensor], recalibrated: bool = True) -> nn.Module:
        self.model.load_state_dict(weights)
        if recalibrated and self.split.recalibrate is not None:
            polyak.update_bn(self.split.recalibrate, self.model)
        return self.model.eval()

    @torch.no_grad()
    def _mean_loss(self, model: nn.Module, validation: bool) -> float:
        examples = self.split.validation if validation else self.split.test
        return losses(model, examples).double().mean().item()


def weights_of(ended: Ended, weights: str) -> dict[str, Tensor]:
    """Of a run that has ended: live weights, an EMA, or the mean of SWA's samples."""
    kind, _, share = weights.partition(":")
    steps = ended.run.steps
    if kind == "live":
        return ended.trajectory.live()
    if kind == "ema":
        return ended.trajectory.average(f"ema:half_life={max(1, round(float(share) * steps))}")
    samples = [state for step, state in ended.states.items() if step > float(share) * steps]
    return {
        name: torch.stack([sample[name] for sample in samples]).mean(dim=0)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in samples[-1].items()
    }


def steps_of(task: Task) -> list[int]:
    """The lengths of runs."""
    return [round(budget * task.unit_steps) for budget in BUDGETS]


def ended_runs(
    task: Task, seed: int, rate: float, split: Split, schedules: Mapping[int, Iterable[str]]
) -> Iterator[Ended]:
    """Runs of each length under each of its schedules, whose recordings last until the next is asked for."""
    runs = [Run(schedule, steps) for steps, each in schedules.items() for schedule in dict.fromkeys(each)]
    with TemporaryDirectory() as folder:
        yield from trained(task, split, seed, rate, runs, Path(folder))


# On tuning seeds.


def tried(task: Task, data: Path, seed: int, rate: float) -> list[dict[str, Any]]:
    """The validation loss of every setting at every length."""
    split = task.load(data, seed)
    scorer = Scorer(task, split)
    settings = list(dict.fromkeys(setting for family in FAMILIES.values() for setting in family))
    schedules = {steps: [setting.schedule for setting in settings] for steps in steps_of(task)}
    found = []
    for ended in ended_runs(task, seed, rate, split, schedules):
        for setting in settings:
            if setting.schedule != ended.run.schedule:
                continue
            if setting.weights == "selected":
                loss = scorer.choice(ended).best.score
            else:
                loss = scorer.validation(weights_of(ended, setting.weights))
            place = {"rate": rate, "steps": ended.run.steps}
            found.append(place | vars(setting) | {"validation": loss})
    return found


# On the seeds of the report.


@dataclass(frozen=True)
class Cell:
    """A number of steps and what was tuned for it at one rate; ``fit`` where that is the rate of the best decay."""

    steps: int
    decay: Setting
    swa: Setting
    ema: Setting
    fit: bool


def reported(task: Task, data: Path, seed: int, rate: float, cells: Iterable[Cell]) -> list[dict[str, Any]]:
    """For each cell the scores of its constant run, of its decayed run and of averages of both."""
    split = task.load(data, seed)
    scorer = Scorer(task, split)
    by_steps = {cell.steps: cell for cell in cells}
    found = {steps: {"rate": rate, "steps": steps} for steps in by_steps}
    curve: dict[int, float] = {}
    schedules = {cell.steps: (CONSTANT, cell.decay.schedule, cell.swa.schedule) for cell in by_steps.values()}
    for ended in ended_runs(task, seed, rate, split, schedules):
        cell, scores = by_steps[ended.run.steps], found[ended.run.steps]
        schedule = ended.run.schedule
        if schedule == CONSTANT:
            scores["constant"] = run_scores(scorer, ended, cell.fit)
            scores["early-stopped"] = early_stopped(scorer, ended, curve)
        if schedule == cell.decay.schedule:
            scores["decayed"] = (
                scores["constant"] if schedule == CONSTANT else run_scores(scorer, ended, cell.fit)
            )
        for name, setting in (("SWA", cell.swa), ("EMA", cell.ema)):
            if schedule == setting.schedule:
                scores[name] = scorer.both(weights_of(ended, setting.weights))
    return list(found.values())


def run_scores(scorer: Scorer, ended: Ended, fit: bool) -> dict[str, Any]:
    """The last weights, the best average and what `select` chose, without blends and with them.

    Beside them ``recent``, the validation loss of a short recent average, None where blocks do not resolve it.
    """
    choice = scorer.choice(ended)
    live = ended.trajectory.live()
    names = [one.name for one in choice.table if not isinstance(one.profile, polyak.Blend)]
    averages = [one.name for one in choice.table if one.name in names and one.profile is not None]
    scores: dict[str, Any] = {
        "live": scorer.both(live, recalibrated=False),
        "recalibrated": scorer.both(live),
    }
    for kind, name in {"average": averages[0], "selected": names[0], "blends too": choice.best.name}.items():
        known = {"live": "live", "live, recalibrated": "recalibrated"}.get(name)
        of = scores[known] if known else scorer.both(ended.trajectory.average(name))
        scores[kind] = {"name": name, **of}
    if fit:
        scores["fitted"] = scorer.both(scorer.fitted(ended))
    recent = None
    with suppress(OptionError):
        recent = scorer.validation(ended.trajectory.average(RECENT))
    return scores | {"candidates": len(choice.table), "recent": recent}


def early_stopped(scorer: Scorer, ended: Ended, curve: dict[int, float]) -> dict[str, float]:
    """The best sample of a run by validation; ``curve`` is what is known of those, by step, and is filled."""
    for step in ended.states.keys() - curve.keys():
        curve[step] = scorer.validation(ended.states[step])
    best = min(ended.states, key=curve.__getitem__)
    return {"step": best, **scorer.both(ended.states[best])}
