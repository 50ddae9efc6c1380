"""What selecting an average after training is worth, on protocol C: the demo's byte language model.

    python benchmarks/effect.py [--seeds 8] [--quick] [--parts FILE] [--output benchmarks/results/effect.json]

Three questions, each answered on seeds that nothing was tuned on, with profiles chosen on validation and
losses reported on test: how far from the live weights to the best linear combination of a run choosing comes, over
learning rates and decays, blends of both included; whether one recorded run with a constant learning rate serves every
horizon as well as a decay tuned for that horizon; and whether fitted weights beat the same compute spent on more
steps. About 20 minutes on two idle cores; with --parts, runs that are done are kept in a file and not repeated.
--quick is a check of the program, and its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

from rich.console import Console
from rich.progress import track

import harness
from effect_report import any_horizon, fit_against_steps, tables, way_in_cell, way_to_bound
from effect_runs import COSINE, Bound, FitRead, Job, Read, RunRecord, run

DISTRIBUTIONS = ("polyak", "scipy")
# Lower ones were looked at while profiles and their search were made.
_FIRST_SEED = 40
Decay = float | str
RunAll = Callable[[Iterable[Job]], list[RunRecord]]


@dataclass(frozen=True)
class Plan:
    """Every setting of the study. Steps are optimizer steps; ``seeds`` report and ``tuning_seeds`` tune.

    Of the ``decays`` that are tuned over, the bound is worked out for ``bounded_decays``.
    """

    seeds: tuple[int, ...]
    tuning_seeds: tuple[int, ...] = (1000, 1001, 1002)
    lrs: tuple[float, ...] = (3e-3, 6e-3, 9e-3)
    decays: tuple[Decay, ...] = (0.0, 0.1, 0.2, 0.3, 0.45, 0.6, 0.7, COSINE)
    bounded_decays: tuple[Decay, ...] = (0.0, 0.2, 0.45, 0.7, COSINE)
    horizons: tuple[int, ...] = (500, 1000, 1500, 2000)
    fit_steps: int = 200

    @property
    def steps(self) -> int:
        """The length of the full run."""
        return self.horizons[-1]


QUICK = {
    "tuning_seeds": (1000,),
    "lrs": (6e-3,),
    "decays": (0.0, 0.5),
    "bounded_decays": (0.0, 0.5),
    "horizons": (200, 400),
    "fit_steps": 20,
}


def study(plan: Plan, run_all: RunAll) -> dict[str, object]:
    """All runs and what follows from them."""
    tuning = run_all(
        [
            Job(seed, lr, decay, horizon, read_at=(horizon,) if decay == 0 else ())
            for seed in plan.tuning_seeds
            for lr in plan.lrs
            for decay in plan.decays
            for horizon in plan.horizons
        ]
    )
    grid = run_all(
        [
            Job(seed, lr, decay, plan.steps, read_at=(plan.steps,), bound=True)
            for seed in plan.seeds
            for lr in plan.lrs
            for decay in plan.bounded_decays
        ]
    )
    tuned = {horizon: _best_decay(tuning, horizon) for horizon in plan.horizons}
    constant_lr = _best_constant_lr(tuning, plan)
    decayed = run_all(
        [Job(seed, *tuned[horizon], horizon) for seed in plan.seeds for horizon in plan.horizons[:-1]]
    )
    best_decayed = run_all(
        [Job(seed, *tuned[plan.steps], plan.steps, read_at=(plan.steps,), bound=True) for seed in plan.seeds]
    )
    recorded = run_all(
        [Job(seed, constant_lr, 0.0, plan.steps, plan.horizons, plan.fit_steps) for seed in plan.seeds]
    )
    longer = plan.steps + plan.fit_steps
    lengthened = run_all(
        [Job(seed, constant_lr, 0.0, longer, read_at=(longer,)) for seed in plan.seeds]
        + [Job(seed, *tuned[plan.steps], longer) for seed in plan.seeds]
    )
    return {
        "bound": {**way_to_bound(grid), "tuned_decay": way_in_cell(best_decayed)},
        "any_horizon": any_horizon(recorded, [*decayed, *best_decayed], tuned),
        "fit": fit_against_steps(recorded, best_decayed, lengthened),
        "runs": [
            asdict(record) for record in (*tuning, *grid, *decayed, *best_decayed, *recorded, *lengthened)
        ],
    }


def _best_decay(tuning: list[RunRecord], horizon: int) -> tuple[float, Decay]:
    """The learning rate and the decay of the lowest mean validation loss of the last weights."""
    losses: dict[tuple[float, Decay], float] = {}
    for record in tuning:
        if record.job.steps == horizon:
            setting = (record.job.lr, record.job.decay)
            losses[setting] = losses.get(setting, 0.0) + record.validation
    return min(losses, key=lambda setting: losses[setting])


def _best_constant_lr(tuning: list[RunRecord], plan: Plan) -> float:
    """The rate whose selected averages have the lowest mean validation loss, over all horizons."""
    losses = dict.fromkeys(plan.lrs, 0.0)
    for record in tuning:
        for read in record.reads.values():
            losses[record.job.lr] += read.selected_validation
    return min(losses, key=lambda lr: losses[lr])


class Parts:
    """What is done of a study, a line for each run in a file that goes on growing; without a file, nothing."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path is not None and path.exists() else []
        self._done = {record.job: record for record in map(_read_record, lines)}

    def missing(self, jobs: Iterable[Job]) -> list[Job]:
        """Those that are not done, each once."""
        return [job for job in dict.fromkeys(jobs) if job not in self._done]

    def add(self, record: RunRecord) -> None:
        """Keep what came of a job."""
        self._done[record.job] = record
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(asdict(record)) + "\n")

    def of(self, jobs: Iterable[Job]) -> list[RunRecord]:
        """What came of jobs that are done."""
        return [self._done[job] for job in jobs]


def _read_record(line: str) -> RunRecord:
    entries = json.loads(line)
    job = Job(**{**entries["job"], "read_at": tuple(entries["job"]["read_at"])})
    reads = {int(step): Read(**read) for step, read in entries["reads"].items()}
    fit, bound = entries["fit"], entries["bound"]
    return RunRecord(
        job,
        entries["validation"],
        entries["test"],
        reads,
        FitRead(**fit) if fit else None,
        Bound(**bound) if bound else None,
    )


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    seeds = tuple(range(_FIRST_SEED, _FIRST_SEED + options.seeds))
    plan = Plan(seeds=seeds, **(QUICK if options.quick else {}))
    console = Console()
    environment = harness.environment(DISTRIBUTIONS)
    started = time.perf_counter()
    parts = Parts(options.parts)
    # A fork would inherit torch's threads in the middle of what they do. Ctrl-C is for the parent to handle.
    ignore_interrupts = (signal.signal, (signal.SIGINT, signal.SIG_IGN))
    processes = min(options.processes, os.cpu_count() or 1)
    with ProcessPoolExecutor(processes, get_context("spawn"), *ignore_interrupts) as pool:

        def run_all(jobs: Iterable[Job]) -> list[RunRecord]:
            jobs = list(jobs)
            missing = parts.missing(jobs)
            for record in track(
                pool.map(run, missing), description=f"{len(missing)} runs", total=len(missing)
            ):
                parts.add(record)
            return parts.of(jobs)

        found = study(plan, run_all)
    for table in tables(found):
        console.print(table)
    if options.output is not None:
        record = {
            "benchmark": "effect",
            "quick": options.quick,
            "environment": environment,
            "minutes": (time.perf_counter() - started) / 60,
            "settings": asdict(plan),
            **found,
        }
        harness.write_json(options.output, record)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--seeds", type=_seeds, default=8, help="seeds to report on (default 8, at least 2)")
    parser.add_argument("--quick", action="store_true", help="a tiny run that checks the program")
    parser.add_argument(
        "--processes", type=int, default=2, help="runs at a time, of one thread each (default 2)"
    )
    parser.add_argument("--parts", type=Path, help="a file for what is done, from which a study goes on")
    parser.add_argument("--output", type=Path, help="write the figures to this file as JSON")
    return parser.parse_args(arguments)


def _seeds(text: str) -> int:
    number = int(text)
    if not 2 <= number <= 1000:
        raise argparse.ArgumentTypeError("2 to 1000, as a single run shows nothing about chance")
    return number


if __name__ == "__main__":
    main()
