"""Whether averaged weights lie in a wider place than the live ones, on the demo's two tasks.

    python benchmarks/valley.py [--seeds 8] [--output benchmarks/results/valley.json]

Each run trains at a constant learning rate and is recorded; validation chooses an average. Then the loss on training
and on test data is looked at around both: at filter-normalised distances in random directions, of each weights' own
size and by the very same vectors, and along the line from the live to the averaged weights and beyond. Differences
are paired over seeds. About 6 minutes on two cores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import harness
import polyak
from polyak import landscape
from polyak.batchnorm import tracks_statistics
from polyak.demo._study import Difference, Scoring, mean_and_error, paired_difference, train
from polyak.demo._tasks import TASKS, Examples

LIVE, AVERAGED = "live", "averaged"
OWN, SAME = "own size", "same vectors"
SIZES = {OWN: None, SAME: LIVE}
RADII = (0.05, 0.1, 0.2, 0.3)
POSITIONS = tuple(step / 10 for step in range(-5, 21))
TRAIN_EXAMPLES = 10_000


@dataclass(frozen=True)
class Job:
    """One training run."""

    task: str
    seed: int
    directions: int


@dataclass(frozen=True)
class Around:
    """The loss around both weights on one set of examples.

    Rises are means over the directions, one per radius: each weights' directions of their own size, and those of
    the live weights' size for both.
    """

    loss: dict[str, float]
    rises: dict[str, dict[str, list[float]]]
    path: list[float]
    best_position: float
    barrier: float


@dataclass(frozen=True)
class Outcome:
    """What was found on training and on test examples, and which average it was."""

    job: Job
    chosen: str
    distance: float
    around: dict[str, Around]


def run(job: Job) -> Outcome:
    """Train, record, choose, look around."""
    task = TASKS[job.task]

    def look(
        trajectory: polyak.Trajectory, model: nn.Module, scoring: Scoring, selection: polyak.Selection
    ) -> Outcome:
        chosen = selection.best_average
        assert chosen.profile is not None
        weights = {LIVE: trajectory.live(), AVERAGED: trajectory.average(chosen.profile)}
        batches = scoring.update_bn_batches[:1] if tracks_statistics(model) else None
        examples = {"train": scoring.split.train[:TRAIN_EXAMPLES], "test": scoring.split.test}
        common: dict[str, Any] = {"recalibrate": batches, "progress": False}
        around, distance = {}, 0.0
        for name, given in examples.items():
            score = loss_on(given)
            options = {"radii": RADII, "directions": job.directions, "seed": job.seed, **common}
            rays = {
                size: landscape.rays(model, weights, score, size_of=size_of, **options)
                for size, size_of in SIZES.items()
            }
            line = landscape.path(model, weights, score, positions=POSITIONS, **common)
            around[name] = Around(
                loss=rays[OWN].centres,
                rises={
                    size: {which: found.rise(which).mean(axis=0).tolist() for which in weights}
                    for size, found in rays.items()
                },
                path=list(line.scores),
                best_position=line.best,
                barrier=line.barrier,
            )
            distance = line.distance
        return Outcome(job, chosen.name, distance, around)

    found = train(task, job.seed, record=True, eval_steps=task.steps, look=look)
    return found.seen


def loss_on(examples: Examples) -> Callable[[nn.Module], Tensor]:
    """The loss of each example; labels may be noisy, as the training's own are."""
    return lambda model: cross_entropy(model(examples.inputs), examples.targets, reduction="none")


def summary(outcomes: list[Outcome]) -> dict[str, Any]:
    """For each task and each set of examples, over seeds: rises and their differences, and the line."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys(outcome.job.task for outcome in outcomes):
        ours = [outcome for outcome in outcomes if outcome.job.task == name]
        found[name] = {
            "chosen": [outcome.chosen for outcome in ours],
            "distance": [outcome.distance for outcome in ours],
            **{examples: over_seeds([o.around[examples] for o in ours]) for examples in ours[0].around},
        }
    return found


def over_seeds(seeds: list[Around]) -> dict[str, Any]:
    """What all seeds say together."""
    return {
        "rises": {size: [rise_at(seeds, size, index) for index in range(len(RADII))] for size in SIZES},
        "path": [mean_and_error(at) for at in zip(*(seed.path for seed in seeds), strict=True)],
        "loss": {name: mean_and_error([seed.loss[name] for seed in seeds]) for name in (LIVE, AVERAGED)},
        "best_position": [seed.best_position for seed in seeds],
        "barrier": [seed.barrier for seed in seeds],
    }


def rise_at(seeds: list[Around], size: str, index: int) -> dict[str, Any]:
    """The rises at one radius, and their difference."""
    live, averaged = ([seed.rises[size][name][index] for seed in seeds] for name in (LIVE, AVERAGED))
    return {
        "radius": RADII[index],
        LIVE: mean_and_error(live),
        AVERAGED: mean_and_error(averaged),
        "difference": asdict(paired_difference(averaged, live)),
    }


def table(found: dict[str, Any]) -> Table:
    """The rises for the eye."""
    shown = Table(title="Rise of the loss in random directions", box=box.SIMPLE_HEAD)
    for heading in ("task, examples, size, radius", LIVE, AVERAGED, "difference"):
        shown.add_column(heading, justify="left" if "," in heading else "right", no_wrap=True)
    for task, entry in found.items():
        for examples, size in product(("train", "test"), SIZES):
            for rise in entry[examples]["rises"][size]:
                d = Difference(**rise["difference"])
                means = [f"{rise[name][0]:.4f}" for name in (LIVE, AVERAGED)]
                label = f"{task}, {examples}, {size}, {rise['radius']:g}"
                shown.add_row(label, *means, f"{d.mean:+.4f} (p={d.p_value:.2g})")
    return shown


def main(arguments: list[str] | None = None) -> None:
    parser = harness.study_parser(__doc__, seeds=8)
    parser.add_argument("--directions", type=int, default=10, help="random directions each (default 10)")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), help="which tasks")
    options = parser.parse_args(arguments)
    environment = harness.environment(("polyak", "scipy", "scikit-learn"))
    jobs = [Job(task, seed, options.directions) for task in options.tasks for seed in range(options.seeds)]
    outcomes = harness.on_two_processes(run, jobs)
    found = summary(outcomes)
    Console().print(table(found))
    if options.output is not None:
        record = {
            "benchmark": "valley",
            "environment": environment,
            "directions": options.directions,
            "positions": sorted({0.0, 1.0, *POSITIONS}),
            "tasks": found,
        }
        harness.write_json(options.output, record)


if __name__ == "__main__":
    main()
