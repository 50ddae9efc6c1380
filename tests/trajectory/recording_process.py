"""A training run in a process of its own, to be killed: ``python recording_process.py FOLDER STEPS``.

It saves its own state every few steps, and goes on from the last one when it is started again.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

import polyak

BLOCK = 4
SAVE_EVERY = 10
SEED = 3


def train(folder: Path, steps: int) -> None:
    torch.set_num_threads(1)
    model = torch.nn.Linear(50, 20)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    run = polyak.Recorder(model, folder / "run", block=BLOCK, max_blocks=8)
    saved = folder / "training.pt"
    begin = 0
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        run.load_state_dict(state["run"])
        begin = state["step"]
    for step in range(begin + 1, steps + 1):
        generator = torch.Generator().manual_seed(SEED * 100_000 + step)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator))
        run.update(step=step)
        if step % SAVE_EVERY == 0:
            torch.save({"model": model.state_dict(), "run": run.state_dict(), "step": step}, f"{saved}.tmp")
            os.replace(f"{saved}.tmp", saved)
            print(step, flush=True)
    run.close()


if __name__ == "__main__":
    train(Path(sys.argv[1]), int(sys.argv[2]))
