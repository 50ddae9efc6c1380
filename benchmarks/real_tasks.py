"""When averaging pays, on two small real tasks: a map over budgets and rates, and the SWA paper's table.

    python benchmarks/fetch_data.py data
    python benchmarks/real_tasks.py --data data --work real-tasks [--output benchmarks/results/real_tasks.json]

Images: Fashion-MNIST, an eight-layer ResNet with BatchNorm. Text: State of the Union speeches, a small transformer over
bytes. On seeds of their own every setting of a decay, SWA and EMA is tried at 0.5, 1, 1.5 and 2 budgets and several
rates; on other seeds the best of them are reported, beside live weights, recalibrated, early-stopped, and what
`select` chooses of constant-rate and decayed runs, blends included. Paper: the recipe of examples/paper_recipe.py,
sized down. What is done is kept in the work folder, so that a study that was interrupted goes on; `--part report`
writes the figures of the seeds that are whole. Less than an hour on two idle cores.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import harness
from real_data import TASKS
from real_paper import paper_seed
from real_report import Found, summary, tables
from real_runs import BUDGETS, SAMPLE_STEPS
from real_scores import Cell, reported, steps_of, tried
from real_tuning import FAMILIES, Tuning

IMAGES, SPEECHES = "fashion-mnist", "speeches"
FOLDERS = {"images": IMAGES, "text": SPEECHES, "paper": IMAGES}
# Others than those reported on.
TUNING_SEEDS = (1000, 1001)


@dataclass(frozen=True)
class Job:
    """One seed of a task at one rate, to tune on where there are no ``cells``; of the paper's recipe, one seed."""

    task: str
    seed: int
    data: Path
    rate: float = 0.0
    cells: tuple[Cell, ...] = ()

    def kept(self, work: Path) -> Path:
        """Where the scores are."""
        part = "tuning" if self.seed in TUNING_SEEDS else "report"
        return work / self.task / part / f"seed-{self.seed}-rate-{self.rate:g}.json"


def run(job: Job, work: Path) -> None:
    """Train and score on one thread, unless that was done."""
    kept = job.kept(work)
    asked = json.loads(json.dumps([asdict(cell) for cell in job.cells]))
    if kept.exists() and json.loads(kept.read_text())["cells"] == asked:
        return
    torch.set_num_threads(1)
    data = job.data / FOLDERS[job.task]
    if job.task == "paper":
        found: Any = paper_seed(data, job.seed)
    elif job.cells:
        found = reported(TASKS[job.task], data, job.seed, job.rate, job.cells)
    else:
        found = tried(TASKS[job.task], data, job.seed, job.rate)
    kept.parent.mkdir(parents=True, exist_ok=True)
    temporary = kept.with_suffix(".unfinished")
    temporary.write_text(json.dumps({"seed": job.seed, "cells": asked, "found": found}))
    temporary.rename(kept)


def tuning_jobs(task: str, data: Path) -> list[Job]:
    """All rates on all tuning seeds."""
    return [Job(task, seed, data, rate) for seed, rate in product(TUNING_SEEDS, TASKS[task].rates)]


def report_jobs(task: str, seeds: Sequence[int], data: Path, work: Path) -> list[Job]:
    """All rates that are reported on, on all seeds, with what was tuned."""
    tuning = Tuning(tried_of(task, work))
    cells = {rate: cells_of(tuning, steps_of(TASKS[task]), rate) for rate in TASKS[task].reported_rates}
    return [Job(task, seed, data, rate, cells[rate]) for seed, rate in product(seeds, cells)]


def cells_of(tuning: Tuning, lengths: Sequence[int], rate: float) -> tuple[Cell, ...]:
    """What was tuned at ``rate``."""
    return tuple(
        Cell(
            steps,
            *(tuning.best(family, steps, rate)[1] for family in ("decay", "SWA", "EMA")),
            fit=tuning.best("decay", steps)[0] == rate,
        )
        for steps in lengths
    )


def tried_of(task: str, work: Path) -> list[dict[str, Any]]:
    """What was tried on tuning seeds."""
    kept = sorted((work / task / "tuning").glob("*.json"))
    return [row for path in kept for row in json.loads(path.read_text())["found"]]


def collected(work: Path) -> dict[str, Found]:
    """Of each task what was tried, and the scores of all seeds that are whole, by seed."""
    found = {}
    for task in FOLDERS:
        parts = [json.loads(path.read_text()) for path in sorted((work / task / "report").glob("*.json"))]
        rates = len(TASKS[task].reported_rates) if task in TASKS else 1
        by_seed = {seed: [part["found"] for part in parts if part["seed"] == seed] for seed in _seeds(parts)}
        whole = {seed: scores for seed, scores in by_seed.items() if len(scores) == rates}
        found[task] = Found(tried_of(task, work), whole)
    return found


def _seeds(parts: Sequence[dict[str, Any]]) -> list[int]:
    return sorted({part["seed"] for part in parts})


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.part == "all":
        in_turns = partial(run, work=options.work)
        tasks = [task for task in options.tasks if task in TASKS]
        harness.on_two_processes(in_turns, [job for task in tasks for job in tuning_jobs(task, options.data)])
        seeds = range(options.seeds)
        jobs = [job for task in tasks for job in report_jobs(task, seeds, options.data, options.work)]
        if "paper" in options.tasks:
            jobs += [Job("paper", seed, options.data) for seed in seeds]
        harness.on_two_processes(in_turns, sorted(jobs, key=lambda job: job.seed))
    found = summary(collected(options.work))
    for table in tables(found):
        Console().print(table)
    if options.output is not None:
        settings = {
            "tuning_seeds": TUNING_SEEDS,
            "budgets": BUDGETS,
            "sample_steps": SAMPLE_STEPS,
            "grid": {family: list(map(str, grid)) for family, grid in FAMILIES.items()},
            "tasks": {
                name: {
                    "unit_steps": task.unit_steps,
                    "batch": task.batch,
                    "rates": task.rates,
                    "reported": task.reported_rates,
                }
                for name, task in TASKS.items()
            },
        }
        head = {"benchmark": "real_tasks", "environment": harness.environment(("polyak", "scipy"))}
        harness.write_json(options.output, {**head, "settings": settings, **found})


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = harness.study_parser(__doc__, seeds=8)
    parser.add_argument("--data", type=Path, required=True, help="the folder that fetch_data.py filled")
    parser.add_argument(
        "--work", type=Path, required=True, help="where scores are kept; the study goes on from there"
    )
    parser.add_argument(
        "--tasks", nargs="+", choices=list(FOLDERS), default=list(FOLDERS), help="which (all)"
    )
    parser.add_argument("--part", choices=("all", "report"), default="all", help="report: train nothing more")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
