"""When averaging pays, on two real tasks."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from real_runs import TASKS, Task, record


def train(task: Task, data: Path, work: Path, seeds: range) -> None:
    """All runs, seed by seed across rates, so that whatever is done by the end is balanced."""
    for seed in seeds:
        split = task.load(data, seed)
        for rate in task.rates:
            record(task, split, seed, rate, work / task.name / f"seed-{seed}" / f"rate-{rate:g}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("step")
    parser.add_argument("--task")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--seeds", type=int)
    o = parser.parse_args()
    torch.set_num_threads(1)
    (o.work / o.task).mkdir(parents=True, exist_ok=True)
    train(TASKS[o.task], o.data, o.work, range(o.seeds))
