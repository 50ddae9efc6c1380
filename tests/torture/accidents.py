"""Clocks that jump, and times of files that say nothing."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import torch

import polyak
from polyak import checkpoints
from torture.harness import Case, family, mean64, near, small_model, walk

_BEGUN = 1.7e9


def _after(jump: float, at: int, clock: Callable[[], float]) -> Callable[[], float]:
    """A clock that jumps at its n-th reading."""
    readings = [0]

    def read() -> float:
        readings[0] += 1
        return clock() + (jump if readings[0] >= at else 0)

    return read


JUMPS = {"a day back": -86_400.0, "a century on": 3e9, "to the beginning": -_BEGUN, "a second back": -1.0}


def jumps(name: str, jump: float, at: int, folder: Path) -> None:
    """Whatever a clock says while a run with a free block length is recorded, each sample counts once."""
    model, samples = small_model(), []
    with mock.patch.object(time, name, _after(jump, at, getattr(time, name))):
        with polyak.Recorder(model, folder / "run") as run:
            for step in range(1, 41):
                samples.append(walk(model, step))
                run.update()
        near(polyak.Trajectory(folder / "run").average("uniform"), mean64(samples))
    blocks = run.trajectory.blocks
    assert blocks[0].start == 0 and blocks[-1].stop == 40 and sum(block.count for block in blocks) == 40


def stopped(folder: Path) -> None:
    with mock.patch.object(time, "perf_counter", lambda: 1.0):
        jumps("monotonic", 0.0, 1, folder)


def times_of_files(label: str, seconds: list[float], folder: Path) -> None:
    """The order is that of the steps, whenever the files were written."""
    for number, when in enumerate(seconds, 1):
        path = folder / f"step-{number}.pt"
        checkpoints.write(path, {"w": torch.full((2,), float(number))})
        os.utime(path, (when, when))
    polyak.average_checkpoints(folder, folder / "out.safetensors", profile="tail:0.5")
    assert checkpoints.open(folder / "out.safetensors").read("w").tolist() == [3.5, 3.5]


@family("clocks that jump", apart=12)
def clocks(rng: random.Random) -> Iterator[Case]:
    for name in ("perf_counter", "time", "monotonic"):
        for label, jump in JUMPS.items():
            at = rng.randint(2, 20)
            yield Case(f"{name}, {label} at {at}", partial(jumps, name, jump, at))
    yield Case("perf_counter stands still", stopped)
    times = {
        "all the same": [1e9] * 4,
        "backwards": [4e9, 3e9, 2e9, 1e9],
        "of the future": [4e9 + n for n in range(4)],
    }
    for label, seconds in {**times, "of 1970": [0.0, 1.0, 0.0, 1.0]}.items():
        yield Case(f"files {label}", partial(times_of_files, label, seconds))
