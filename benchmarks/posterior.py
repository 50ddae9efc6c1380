"""What predicting with SWAG's distribution over weights adds to predicting with the average, on the demo's tasks.

    python benchmarks/posterior.py [--seeds 8] [--output benchmarks/results/posterior.json]

Each run trains at a constant learning rate and is recorded; validation chooses an average, of five blocks or more,
and the scale of a SWAG of the same profile. On test data stand the live weights, the average, SWAG's predictions, and
the mean prediction of the newest blocks that the profile covers, 30 at most, which needs no distribution.
Differences are paired over seeds. About 5 minutes on two cores.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import nll_loss
from torchmetrics.functional.classification import multiclass_calibration_error

import harness
import polyak
from polyak._evaluate import trial
from polyak.batchnorm import tracks_statistics
from polyak.demo._study import Difference, Scoring, mean_and_error, paired_difference, train
from polyak.demo._tasks import TASKS, Examples, digits

LIVE, AVERAGE, POSTERIOR, BLOCKS = "live weights", "average", "SWAG", "blocks' predictions"
METRICS = ("nll", "accuracy", "calibration_error", "overconfidence")
SCALES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
TASKS_HERE = {
    "digits": TASKS["digits"],
    # Wrong labels teach a network to doubt: these are all right.
    "digits, clean labels": replace(TASKS["digits"], load=partial(digits, label_noise=0.0)),
    "text": TASKS["text"],
}
DRAWS, TUNING_DRAWS, RANK, BINS = 30, 10, 20, 15
# Fewer blocks show too little of the scatter.
LEAST_BLOCKS = 5


@dataclass(frozen=True)
class Job:
    """One training run."""

    task: str
    seed: int


@dataclass(frozen=True)
class Outcome:
    """Test metrics by contender, the profile that all but the live weights use, and SWAG's scale."""

    job: Job
    profile: str
    scale: float
    metrics: dict[str, dict[str, float]]


def run(job: Job) -> Outcome:
    """Train, record, choose, predict."""
    task = TASKS_HERE[job.task]

    def look(
        trajectory: polyak.Trajectory, model: nn.Module, scoring: Scoring, selection: polyak.Selection
    ) -> Outcome:
        profile = best_of_blocks(trajectory, selection)
        batches = scoring.update_bn_batches[:1] if tracks_statistics(model) else None
        common: dict[str, Any] = {"recalibrate": batches, "seed": job.seed, "progress": False}
        validation, test = scoring.split.validation, scoring.split.test

        posterior = polyak.SWAG(trajectory, profile, rank=RANK)

        def validation_nll(scale: float) -> float:
            predicted = posterior.predict(model, on(validation), samples=TUNING_DRAWS, scale=scale, **common)
            return measure(predicted, validation)["nll"]

        scale = min(SCALES, key=validation_nll)
        predictions = {
            LIVE: with_weights(model, trajectory.live(), on(test), None),
            AVERAGE: with_weights(model, posterior.mean, on(test), batches),
            POSTERIOR: posterior.predict(model, on(test), samples=DRAWS, scale=scale, **common),
            BLOCKS: of_blocks(trajectory, profile, model, on(test), batches),
        }
        metrics = {name: measure(predicted, test) for name, predicted in predictions.items()}
        return Outcome(job, str(profile), scale, metrics)

    return train(task, job.seed, record=True, eval_steps=task.steps, look=look).seen


def best_of_blocks(trajectory: polyak.Trajectory, selection: polyak.Selection) -> polyak.Profile:
    """The best average of five blocks or more; in a blend the live weights count, and what scatters are blocks."""
    explained = (trajectory.explain(one.profile) for one in selection.table if one.profile is not None)
    return next(
        one.profile
        for one in explained
        if not one.live and np.count_nonzero(one.coefficients) >= LEAST_BLOCKS
    )


def on(examples: Examples) -> Callable[[nn.Module], Tensor]:
    """The probabilities of each class, [N, classes]."""
    return lambda model: model(examples.inputs).softmax(dim=1)


def of_blocks(
    trajectory: polyak.Trajectory,
    profile: polyak.Profile,
    model: nn.Module,
    function: Callable[[nn.Module], Tensor],
    batches: Any,
) -> Tensor:
    """The mean prediction of the newest blocks that the profile covers, at most as many as SWAG makes draws."""
    covered = np.flatnonzero(trajectory.explain(profile).coefficients)[-DRAWS:]
    one_hot = np.eye(len(trajectory.blocks))
    each = [
        with_weights(model, trajectory.average(polyak.Weights(one_hot[index])), function, batches)
        for index in covered
    ]
    return torch.stack(each).mean(dim=0)


def with_weights(
    model: nn.Module, weights: dict[str, Tensor], function: Callable[[nn.Module], Tensor], batches: Any
) -> Tensor:
    """What ``function`` says of the model with ``weights`` in it."""
    with trial(model, weights, batches):
        return function(model)


def measure(probabilities: Tensor, examples: Examples) -> dict[str, float]:
    """NLL in nats; accuracy and expected calibration error from 0 to 1; mean confidence minus accuracy."""
    classes, correct = probabilities.shape[1], (probabilities.argmax(dim=1) == examples.targets).double()
    return {
        "nll": nll_loss(probabilities.clamp_min(1e-12).log(), examples.targets).item(),
        "accuracy": correct.mean().item(),
        "calibration_error": multiclass_calibration_error(
            probabilities, examples.targets, num_classes=classes, n_bins=BINS
        ).item(),
        "overconfidence": (probabilities.amax(dim=1).double().mean() - correct.mean()).item(),
    }


def summary(outcomes: list[Outcome]) -> dict[str, Any]:
    """For each task: every contender over seeds, and its paired difference to the average."""
    found: dict[str, Any] = {}
    for task in dict.fromkeys(outcome.job.task for outcome in outcomes):
        ours = [outcome for outcome in outcomes if outcome.job.task == task]
        contenders = {}
        for name in ours[0].metrics:
            values = {metric: [o.metrics[name][metric] for o in ours] for metric in METRICS}
            average = {metric: [o.metrics[AVERAGE][metric] for o in ours] for metric in METRICS}
            contenders[name] = {
                metric: {
                    "by_seed": values[metric],
                    "mean_and_error": mean_and_error(values[metric]),
                    "minus_average": asdict(paired_difference(values[metric], average[metric])),
                }
                for metric in METRICS
            }
        found[task] = {
            "contenders": contenders,
            "scales": dict(Counter(str(o.scale) for o in ours)),
            "profiles": dict(Counter(o.profile for o in ours)),
        }
    return found


def table(found: dict[str, Any]) -> Table:
    """The same for the eye."""
    shown = Table(title="Test data", box=box.SIMPLE_HEAD)
    shown.add_column("task: prediction", no_wrap=True)
    for heading in ("NLL", "acc., %", "ECE, %", "minus average"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for task, entry in found.items():
        for name, metrics in entry["contenders"].items():
            nll, accuracy, error, _ = (metrics[metric]["mean_and_error"][0] for metric in METRICS)
            d = Difference(**metrics["nll"]["minus_average"])
            against = "" if name == AVERAGE else f"{d.mean:+.4f} (p={d.p_value:.2g})"
            shown.add_row(
                f"{task}: {name}", f"{nll:.4f}", f"{accuracy:.2%}"[:-1], f"{error:.2%}"[:-1], against
            )
    return shown


def main(arguments: list[str] | None = None) -> None:
    parser = harness.study_parser(__doc__, seeds=8)
    parser.add_argument(
        "--tasks", nargs="+", choices=list(TASKS_HERE), default=list(TASKS_HERE), help="which tasks"
    )
    options = parser.parse_args(arguments)
    environment = harness.environment(("polyak", "scipy", "scikit-learn", "torchmetrics"))
    jobs = [Job(task, seed) for task in options.tasks for seed in range(options.seeds)]
    outcomes = harness.on_two_processes(run, jobs)
    found = summary(outcomes)
    Console().print(table(found))
    if options.output is not None:
        record = {
            "benchmark": "posterior",
            "environment": environment,
            "draws": DRAWS,
            "rank": RANK,
            "scales": SCALES,
            "tasks": found,
        }
        harness.write_json(options.output, record)


if __name__ == "__main__":
    main()
