"""A recording that is killed at any moment loses the open block at most."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import polyak
from polyak import checkpoints
from trajectory.recording_process import SEED, train

STEPS = 120


@pytest.fixture(scope="module")
def samples() -> torch.Tensor:
    """The weight after each step, in float64, as row step of a matrix; row 0 is not used."""
    rows = [torch.ones(20, 50)]
    for step in range(1, STEPS * 10 + 1):
        generator = torch.Generator().manual_seed(SEED * 100_000 + step)
        rows.append(rows[-1] + torch.randn((20, 50), generator=generator))
    return torch.stack(rows).double()


def killed_runs(folder: Path, kills: int, most_seconds: float) -> Iterator[float]:
    """Start the run again and again, each time killed after a random while; forked, as imports take long."""
    moments = random.Random(kills)
    for _ in range(kills):
        seconds = moments.uniform(0, most_seconds)
        child = os.fork()
        if child == 0:
            with open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), 1)
            train(folder, STEPS)
            os._exit(0)
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        yield seconds
