"""Whether selecting an average ever does harm: protocols A and B, runs that were annealed included.

    python benchmarks/no_harm.py [--seeds 20] [--output benchmarks/results/no_harm.json]

A: an MLP on 900 digits, three labels in ten wrong. B: the demo's CNN with BatchNorm on 500, one in five wrong. Each
at a constant learning rate, decayed over the last 40%, and annealed to zero over the whole run. Validation chooses
among the averages of the recorded run and the live weights; test losses are reported. About 5 minutes on two cores.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

import harness
from polyak.demo._study import Difference, mean_and_error, paired_difference, train
from polyak.demo._tasks import CHOSEN, LIVE, TASKS, Task, digits

DECAYS = {"constant": 0.0, "last 40%": 0.4, "annealed": 1.0}
SIGNIFICANT = 0.05


def mlp() -> nn.Sequential:
    """64-128-128-10."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )


PROTOCOLS = {
    "A, MLP": replace(
        TASKS["digits"],
        load=partial(digits, trained_on=900, validated_on=400, label_noise=0.3),
        build_model=mlp,
        optimizer_options={"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4},
        batch_size=32,
        input_noise=0.0,
        steps=1120,
        averages={},
        record_every=7,
        block_steps=28,
    ),
    "B, CNN with BatchNorm": replace(TASKS["digits"], averages={}),
}


@dataclass(frozen=True)
class Job:
    """One training run."""

    protocol: str
    decay: str
    seed: int


@dataclass(frozen=True)
class Outcome:
    """Test NLL of the live weights and of the chosen ones, and which those are."""

    job: Job
    live: float
    best: float
    chosen: str


def run(job: Job) -> Outcome:
    """Train, record, choose."""
    task: Task = PROTOCOLS[job.protocol]
    found = train(task, job.seed, decay_fraction=DECAYS[job.decay], record=True, eval_steps=task.steps)
    live, best = (found.curves[label].test_nll[-1] for label in (LIVE, CHOSEN))
    assert found.selection is not None
    return Outcome(job, live, best, found.selection["best"])


def summary(outcomes: list[Outcome]) -> dict[str, Any]:
    """For each protocol and decay: both losses by seed, their paired difference, what was chosen."""
    cells = {}
    for protocol in PROTOCOLS:
        for decay in DECAYS:
            cell = [o for o in outcomes if (o.job.protocol, o.job.decay) == (protocol, decay)]
            live, best = [o.live for o in cell], [o.best for o in cell]
            difference = paired_difference(best, live)
            cells[f"{protocol}, {decay}"] = {
                "live": live,
                "best": best,
                "best_minus_live": asdict(difference),
                "chosen": dict(Counter(o.chosen for o in cell).most_common()),
                "significantly_worse": difference.mean > 0 and difference.p_value < SIGNIFICANT,
            }
    return cells


def table(cells: dict[str, Any]) -> Table:
    """The same for the eye."""
    shown = Table(title="Test NLL of the selected weights against the live ones", box=box.SIMPLE_HEAD)
    for heading in ("protocol, decay", "live", "best", "best minus live", "live chosen"):
        shown.add_column(heading, no_wrap=True)
    for name, cell in cells.items():
        d = Difference(**cell["best_minus_live"])
        means = [f"{mean_and_error(cell[kind])[0]:.4f}" for kind in ("live", "best")]
        share = f"{cell['chosen'].get('live', 0)} of {d.seeds}"
        shown.add_row(name, *means, f"{d.mean:+.4f} (p={d.p_value:.2g})", share)
    return shown


def main(arguments: list[str] | None = None) -> None:
    parser = harness.study_parser(__doc__, seeds=20)
    options = parser.parse_args(arguments)
    environment = harness.environment(("polyak", "scipy", "scikit-learn"))
    jobs = [Job(p, d, seed) for p in PROTOCOLS for d in DECAYS for seed in range(options.seeds)]
    outcomes = harness.on_two_processes(run, jobs)
    cells = summary(outcomes)
    Console().print(table(cells))
    if options.output is not None:
        record = {"benchmark": "no_harm", "environment": environment, "decays": DECAYS, "cells": cells}
        harness.write_json(options.output, record)


if __name__ == "__main__":
    main()
