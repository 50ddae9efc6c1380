"""A training run that is killed and resumed at random moments: ``python killed_recordings.py FOLDER KILLS``.

A process of its own, since it forks: importing torch anew for each of the lives would take most of the time.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

import polyak
from polyak import checkpoints
from polyak.errors import CheckpointError

STEPS = 240
BLOCK = 4
SAVE_EVERY = 10
# Without merges every block is the same in any run; with merges its rounding depends on what was merged first.
WITHOUT_MERGES, WITH_MERGES = STEPS // BLOCK, 8


def change(step: int) -> Tensor:
    return torch.randn((20, 50), generator=torch.Generator().manual_seed(step))


def train(folder: Path, max_blocks: int) -> None:
    """Take the steps that are left, saving the training state every few steps."""
    model = torch.nn.Linear(50, 20, bias=False)
    model.weight.data.fill_(1)
    saved, begin = folder / "training.pt", 0
    begins = {"resume": True} if saved.exists() else {"step": 0}
    run = polyak.Recorder(model, folder / "run", block=BLOCK, max_blocks=max_blocks, **begins)
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        run.load_state_dict(state["run"])
        begin = state["step"]
    for step in range(begin + 1, STEPS + 1):
        model.weight.data.add_(change(step))
        run.update(step=step)
        if step % SAVE_EVERY == 0:
            torch.save({"model": model.state_dict(), "run": run.state_dict(), "step": step}, f"{saved}.tmp")
            os.replace(f"{saved}.tmp", saved)
    run.close()


def in_child(work: Callable[[], None], seconds: float | None = None) -> bool:
    """Run ``work`` in a forked process, which is killed after ``seconds``; whether it ended by itself."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert killed or os.waitstatus_to_exitcode(status) == 0, f"the training failed: status {status}"
    return not killed


def committed(folder: Path) -> set[int]:
    """The borders of the blocks recorded so far."""
    try:
        return {block.stop for block in polyak.Trajectory(folder / "run").blocks}
    except CheckpointError as error:
        assert "no trajectory" in str(error), error  # killed before it began
        return set()


def check_blocks(folder: Path, visited: Tensor) -> None:
    """Every listed block is whole, and the mean of its samples."""
    if not committed(folder):
        return
    trajectory = polyak.Trajectory(folder / "run")
    assert len(trajectory.usable) == len(trajectory), trajectory.damaged
    for block in trajectory.blocks:
        assert block.count == block.steps
        mean = checkpoints.open(folder / "run" / block.file_name).read("weight").double()
        error = (mean - visited[block.start : block.stop].mean(0)).abs().max()
        assert error < 1e-5, f"{block} is off by {error}"


def same_blocks(folder: Path, whole: Path) -> None:
    names = [sorted(path.name for path in place.glob("run/block-*")) for place in (folder, whole)]
    assert names[0] == names[1]
    for name in names[0]:
        assert (folder / "run" / name).read_bytes() == (whole / "run" / name).read_bytes(), name


def saved_border(folder: Path) -> int:
    saved = folder / "training.pt"
    return torch.load(saved, weights_only=True)["run"]["start"] if saved.exists() else 0


def kill_and_resume(folder: Path, kills: int) -> dict[str, int]:
    """Record runs until ``kills`` of them were killed, checking what is left each time."""
    visited = torch.stack(list(accumulate(map(change, range(1, STEPS + 1)), initial=torch.ones(20, 50))))[
        1:
    ].double()
    whole = folder / "whole"
    whole.mkdir()
    in_child(partial(train, whole, WITHOUT_MERGES))
    moments = random.Random(kills)
    killed = finished = 0
    while killed < kills:
        place = folder / f"run-{finished}"
        place.mkdir(exist_ok=True)
        max_blocks = WITH_MERGES if finished % 2 else WITHOUT_MERGES
        ended = in_child(partial(train, place, max_blocks), seconds=moments.uniform(0, 0.15))
        killed += not ended
        check_blocks(place, visited)
        assert max(committed(place), default=0) >= saved_border(place)
        if ended:
            assert max(committed(place)) == STEPS
            if max_blocks == WITHOUT_MERGES:
                same_blocks(place, whole)
            finished += 1
    return {"killed": killed, "finished": finished}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(kill_and_resume(Path(sys.argv[1]), int(sys.argv[2]))))
