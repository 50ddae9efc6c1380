"""What recording a trajectory costs, all writes and merges included, and what selecting from it does.

    python benchmarks/trajectory.py [--processes 4] [--rounds 3] [--only updates,merging,training,selection]
                                    [--output FILE]

``updates``: back-to-back updates on the shapes of ResNet-50 with a block every 100, beside those of one
``Average``; there is no training in between behind which a write could hide. ``merging``: the same where
neighbours merge after every block, as they do for most of a long run. ``training``: the byte language model of
the demo, 2,000 steps with a sample every 10, beside the same training alone; the recorder chooses the length of
its blocks. ``selection``: choosing among 40 profiles of that run, beside 40 evaluations of its model. Writes go
to the folder of temporary files: point TMPDIR at the disk that counts. Each is done in several processes one after
the other, as where a process happens to lie in memory can change a ratio by a quarter for as long as it lives. Run it
on an idle machine.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import harness
import polyak
import shapes
from harness import Spread
from polyak.demo._tasks import TASKS, Examples, batches

THREADS = 2
UPDATES, BLOCK_UPDATES = 400, 100
# With few blocks neighbours merge after every block; with many, not in a run as short as this one.
MERGING_MAX_BLOCKS, MAX_BLOCKS = 8, 1000
TASK = TASKS["text"]
SAMPLE_STEPS, BLOCK_STEPS = 10, 20
PROFILES = [
    *(polyak.Tail(share) for share in np.linspace(0.05, 1, 16).round(3)),
    *(polyak.Decay(shape, share) for shape in ("sqrt", "linear") for share in (0.2, 0.4, 0.6, 0.8)),
    *(polyak.EMA(half_life=float(steps)) for steps in (50, 100, 150, 200, 300, 400, 600, 800)),
    *(polyak.Power(gamma=gamma) for gamma in (1, 2, 3, 4, 6, 8, 12, 16)),
]
TARGETS = {"updates": 1.10, "merging": 1.10, "training": 1.05, "selection": 1.3}
Seconds = dict[str, list[float]]


def updates(rounds: int, max_blocks: int = MAX_BLOCKS, least_blocks: int = 1) -> Seconds:
    """Seconds per update of an ``Average`` and of a recorder, once there are ``least_blocks``."""
    model = shapes.module_of(shapes.resnet50(), torch.float32)
    average = polyak.Average(model, polyak.Uniform())
    with tempfile.TemporaryDirectory() as folder:
        recorder = polyak.Recorder(model, folder, block=BLOCK_UPDATES, max_blocks=max_blocks)
        contenders = {"alone": average.update, "ours": recorder.update}
        for update in contenders.values():
            _timed(lambda update=update: _repeat(update, BLOCK_UPDATES))
        while len(recorder.trajectory) < least_blocks:
            _repeat(recorder.update, BLOCK_UPDATES)
        seconds: Seconds = {name: [] for name in contenders}
        for _ in range(rounds):
            seconds["alone"].append(_timed(lambda: _repeat(average.update, UPDATES)) / UPDATES)
            # Opening the trajectory waits for the last write.
            run = _timed(lambda: (_repeat(recorder.update, UPDATES), recorder.trajectory))
            seconds["ours"].append(run / UPDATES)
        recorder.close()
    return seconds


def merging(rounds: int) -> Seconds:
    """The same with a merge after every block."""
    return updates(rounds, MERGING_MAX_BLOCKS, least_blocks=MERGING_MAX_BLOCKS)


def training(rounds: int) -> Seconds:
    """Seconds of a whole run of the byte language model, with and without a recorder.

    The same training takes 10% more or less from run to run, so there are three pairs a round.
    """
    seconds: Seconds = {"alone": [], "ours": []}
    for seed in range(3 * rounds + 1):
        # Each goes first as often as the other, and the first round warms up.
        for name in sorted(seconds, reverse=bool(seed % 2)):
            with tempfile.TemporaryDirectory() as folder:
                one = train(seed, Path(folder) if name == "ours" else None)
            if seed:
                seconds[name].append(one.seconds)
    return seconds


def selection(rounds: int) -> Seconds:
    """Seconds of choosing among the profiles, and of as many evaluations of the live weights."""
    seconds: Seconds = {"alone": [], "ours": []}
    with tempfile.TemporaryDirectory() as folder:
        run = train(0, Path(folder), block=BLOCK_STEPS)
        trajectory = polyak.Trajectory(folder)

        def score(model: nn.Module) -> Tensor:
            with torch.no_grad():
                return cross_entropy(model(run.validation.inputs), run.validation.targets, reduction="none")

        def evaluate() -> None:
            _repeat(lambda: score(run.model), len(PROFILES))

        def select() -> None:
            polyak.select(trajectory, run.model, score=score, profiles=PROFILES, progress=False)

        _timed(evaluate), _timed(select)
        for _ in range(rounds):
            seconds["alone"].append(_timed(evaluate))
            seconds["ours"].append(_timed(select))
    return seconds


@dataclass(frozen=True)
class Run:
    """A run of the byte language model that has ended, and the seconds of its steps and its recorder."""

    seconds: float
    model: nn.Module
    validation: Examples


def train(seed: int, folder: Path | None, block: int | None = None) -> Run:
    """Train, and record into ``folder`` if there is one; closing the recorder is timed too."""
    torch.manual_seed(seed)
    split, model = TASK.load(seed), TASK.build_model()
    optimizer = TASK.optimizer(model.parameters(), **TASK.optimizer_options)
    generator = torch.Generator().manual_seed(seed)
    started = time.perf_counter()
    recording: AbstractContextManager[polyak.Recorder | None] = nullcontext()
    if folder is not None:
        recording = polyak.Recorder(model, folder, every=SAMPLE_STEPS, block=block, optimizer=optimizer)
    with recording as recorder:
        for batch in batches(split.train, TASK.batch_size, TASK.steps, generator):
            optimizer.zero_grad()
            cross_entropy(model(batch.inputs), batch.targets).backward()
            optimizer.step()
            if recorder is not None:
                recorder.update()
    return Run(time.perf_counter() - started, model, split.validation)


def _repeat(call: Callable[[], object], times: int) -> None:
    for _ in range(times):
        call()


def _timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


MEASUREMENTS = {"updates": updates, "merging": merging, "training": training, "selection": selection}


def measure(name: str, rounds: int) -> Seconds:
    """One measurement. Runs in a fresh process."""
    torch.set_num_threads(THREADS)
    return MEASUREMENTS[name](rounds)


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    torch.set_num_threads(THREADS)  # for the record of the environment
    environment = harness.environment(("polyak",))  # before the work, whose own load it would show
    table = Table(
        "what", "alone, ms", "ours, ms", "ratio (IQR)", "aim", title="recording a run, selecting from it"
    )
    results: dict[str, object] = {}
    for name in options.only:
        runs = (harness.in_fresh_process(measure, name, options.rounds) for _ in range(options.processes))
        seconds = harness.merged(runs)
        ratio = harness.ratios(seconds["ours"], seconds["alone"])
        medians = [f"{1000 * Spread.of(seconds[kind]).median:.2f}" for kind in ("alone", "ours")]
        table.add_row(name, *medians, str(ratio), f"{TARGETS[name]:.2f}")
        results[name] = {"seconds": seconds, "ratio": asdict(ratio), "aim": TARGETS[name]}
    Console().print(table)
    if options.output:
        harness.write_json(
            options.output,
            {
                "benchmark": "trajectory",
                "environment": environment,
                "settings": {"processes": options.processes, "rounds": options.rounds},
                "results": results,
            },
        )


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(MEASUREMENTS))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    unknown = set(options.only) - set(MEASUREMENTS)
    if unknown:
        parser.error(f"--only knows {', '.join(MEASUREMENTS)}, not {', '.join(sorted(unknown))}")
    return options


if __name__ == "__main__":
    main()
