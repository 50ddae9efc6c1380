"""When averaging pays, on two small real tasks: a map over budgets, rates and schedules, and the SWA paper's table.

    python benchmarks/fetch_data.py data
    python benchmarks/real_tasks.py --data data --work real-tasks [--output benchmarks/results/real_tasks.json]

Images: Fashion-MNIST, an eight-layer ResNet with BatchNorm. Text: State of the Union speeches, a small transformer over
bytes. On each, runs of 0.5, 1 and 2 budgets at two rates and under constant, linear, cosine and SWA's own schedules are
recorded and scored: live weights, recalibrated, early-stopped, decayed, SWA, EMA, selected averages, blends. Paper: the
recipe of examples/paper_recipe.py, sized down. Everything is kept in the work folder, so that a study that was
interrupted goes on; `--part report` writes the figures of the seeds that are whole. Several hours on two cores.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import harness
from real_report import summary, tables
from real_runs import TASKS, record
from real_scores import paper_seed, score_runs

IMAGES, SPEECHES = "fashion-mnist", "speeches"
FOLDERS = {"images": IMAGES, "text": SPEECHES, "paper": IMAGES}


@dataclass(frozen=True)
class Job:
    """One seed of a task."""

    task: str
    seed: int
    data: Path
    work: Path


def run(job: Job) -> None:
    """Train and score what is not there yet, on one thread."""
    torch.set_num_threads(1)
    folder = job.work / job.task / f"seed-{job.seed}"
    kept = folder / "scores.json"
    if kept.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    data = job.data / FOLDERS[job.task]
    found: Any = paper_seed(data, job.seed) if job.task == "paper" else scored(job, data, folder)
    temporary = kept.with_suffix(".unfinished")
    temporary.write_text(json.dumps(found))
    temporary.rename(kept)


def scored(job: Job, data: Path, folder: Path) -> list[dict[str, Any]]:
    """Every run of one seed, at all rates."""
    task = TASKS[job.task]
    split = task.load(data, job.seed)
    found = []
    for rate in task.rates:
        record(task, split, job.seed, rate, folder / f"rate-{rate:g}")
        found += score_runs(task, split, job.seed, rate, folder / f"rate-{rate:g}")
    return found


def collected(work: Path) -> dict[str, list[Any]]:
    """Of each task the scores of all seeds that are whole, in order of the seeds."""
    return {
        task: [json.loads(path.read_text()) for path in sorted((work / task).glob("seed-*/scores.json"))]
        for task in FOLDERS
    }


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.part == "all":
        jobs = [
            Job(task, seed, options.data, options.work)
            for seed in range(options.seeds)
            for task in options.tasks
        ]
        harness.on_two_processes(run, jobs)
    found = summary(collected(options.work))
    for table in tables(found):
        Console().print(table)
    if options.output is not None:
        settings = {name: _plain(asdict(task)) for name, task in TASKS.items()}
        head = {"benchmark": "real_tasks", "environment": harness.environment(("polyak", "scipy"))}
        harness.write_json(options.output, {**head, "settings": settings, **found})


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if not callable(value)}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = harness.study_parser(__doc__, seeds=8)
    parser.add_argument("--data", type=Path, required=True, help="the folder that fetch_data.py filled")
    parser.add_argument(
        "--work", type=Path, required=True, help="where runs are kept; the study goes on from there"
    )
    parser.add_argument(
        "--tasks", nargs="+", choices=list(FOLDERS), default=list(FOLDERS), help="which (all)"
    )
    parser.add_argument("--part", choices=("all", "report"), default="all", help="report: train nothing more")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
