"""What recording a trajectory costs, all writes and merges included.

    python benchmarks/trajectory.py [--rounds 5] [--only updates,training] [--output FILE]

``updates``: back-to-back updates with a block every 100, beside those of one ``Average``; there is no training
in between behind which a write could hide. ``training``: the byte language model of the demo, 2,000 steps with a
sample every 10, beside the same training alone; the recorder chooses the length of its blocks. Writes go to the
folder of temporary files: point TMPDIR at the disk that counts. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import cross_entropy

import harness
import polyak
import shapes
from harness import Spread
from polyak.demo.data import batches
from polyak.demo.tasks import TASKS

THREADS = 2
UPDATES, BLOCK_UPDATES = 400, 100
# Few blocks, so that neighbours merge after every block, as they do for most of a long run.
MAX_BLOCKS = 8
TASK = TASKS["text"]
SAMPLE_STEPS = 10
TARGETS = {"updates": 1.10, "training": 1.05}


def updates(rounds: int) -> dict[str, list[float]]:
    """Seconds per update of an ``Average`` and of a recorder, on the shapes of ResNet-50."""
    model = shapes.module_of(shapes.resnet50(), torch.float32)
    average = polyak.Average(model, polyak.Uniform())
    with tempfile.TemporaryDirectory() as folder:
        recorder = polyak.Recorder(model, folder, block=BLOCK_UPDATES, max_blocks=MAX_BLOCKS)
        contenders = {"alone": average.update, "recorded": recorder.update}
        for update in contenders.values():
            _timed(lambda update=update: _repeat(update, BLOCK_UPDATES))
        while len(recorder.trajectory) < MAX_BLOCKS:
            _repeat(recorder.update, BLOCK_UPDATES)
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(rounds):
            seconds["alone"].append(_timed(lambda: _repeat(average.update, UPDATES)) / UPDATES)
            # Opening the trajectory waits for the last write.
            run = _timed(lambda: (_repeat(recorder.update, UPDATES), recorder.trajectory))
            seconds["recorded"].append(run / UPDATES)
        recorder.close()
    return seconds


def training(rounds: int) -> dict[str, list[float]]:
    """Seconds of a whole run of the byte language model, with and without a recorder."""
    seconds: dict[str, list[float]] = {"alone": [], "recorded": []}
    for seed in range(rounds + 1):
        alone, recorded = train(seed, record=False), train(seed, record=True)
        if seed:  # the first round warms up
            seconds["alone"].append(alone)
            seconds["recorded"].append(recorded)
    return seconds


def train(seed: int, record: bool) -> float:
    """Seconds that the steps take, closing the recorder included."""
    torch.manual_seed(seed)
    split, model = TASK.load(seed), TASK.build_model()
    optimizer = TASK.optimizer(model.parameters(), **TASK.optimizer_options)
    generator = torch.Generator().manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        recording: AbstractContextManager[polyak.Recorder | None] = nullcontext()
        if record:
            recording = polyak.Recorder(model, folder, every=SAMPLE_STEPS, optimizer=optimizer)
        with recording as recorder:
            for batch in batches(split.train, TASK.batch_size, TASK.steps, generator):
                optimizer.zero_grad()
                cross_entropy(model(batch.inputs), batch.targets).backward()
                optimizer.step()
                if recorder is not None:
                    recorder.update()
        return time.perf_counter() - started


def _repeat(call: Callable[[], object], times: int) -> None:
    for _ in range(times):
        call()


def _timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


MEASUREMENTS = {"updates": updates, "training": training}


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    torch.set_num_threads(THREADS)
    environment = harness.environment(("polyak",))  # before the work, whose own load it would show
    table = Table(
        "what", "alone, ms", "recorded, ms", "ratio (IQR)", "target", title="recording a trajectory"
    )
    results: dict[str, object] = {}
    for name in options.only:
        seconds = MEASUREMENTS[name](options.rounds)
        ratio = harness.ratios(seconds["recorded"], seconds["alone"])
        medians = [f"{1000 * Spread.of(seconds[kind]).median:.2f}" for kind in ("alone", "recorded")]
        table.add_row(name, *medians, str(ratio), f"{TARGETS[name]:.2f}")
        results[name] = {"seconds": seconds, "ratio": asdict(ratio), "target": TARGETS[name]}
    Console().print(table)
    if options.output:
        harness.write_json(options.output, {"environment": environment, "results": results})


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(MEASUREMENTS))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    unknown = set(options.only) - set(MEASUREMENTS)
    if unknown:
        parser.error(f"--only knows {', '.join(MEASUREMENTS)}, not {', '.join(sorted(unknown))}")
    return options


if __name__ == "__main__":
    main()
