"""Through how many files of polyak a call passes: what a reader has to open to follow it.

``sys.setprofile`` sees every Python call, on helper threads too; a file counts once, the faces of packages
(``__init__.py``) as well. Each call is made once before it is counted, so that nothing is seen of first imports.

    python benchmarks/flows.py                # a table, and the files with --files
    python benchmarks/flows.py --json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch
from torch import nn

import polyak

SOURCE = Path(polyak.__file__).parent
# What each flow may pass through at most.
LIMITS = {"Average.update": 6, "a block's write": 14, "average_checkpoints": 25, "select": 23}


def files_of(call: Callable[[], object]) -> list[str]:
    """The files of polyak that ``call`` passes through, on any thread."""
    found: set[str] = set()

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(SOURCE)):
            found.add(frame.f_code.co_filename)

    threading.setprofile_all_threads(note) if sys.version_info >= (3, 12) else threading.setprofile(note)
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
        threading.setprofile_all_threads(None) if sys.version_info >= (3, 12) else threading.setprofile(None)
    return sorted(str(Path(path).relative_to(SOURCE)) for path in found)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))


def update(folder: Path) -> Callable[[], object]:
    average = polyak.Average(network(), polyak.EMA(half_life=10))
    average.update()
    return average.update


def block_write(folder: Path) -> Callable[[], object]:
    """The step that ends a block, its write on another thread, and the end of the recording, which waits for it."""
    recorders = [polyak.Recorder(network(), folder / name, block=1) for name in ("warm", "counted")]

    def call() -> None:
        recorder = recorders.pop(0)  # each has a thread of its own, which must begin while it is watched
        recorder.update()
        recorder.close()

    return call


def average_files(folder: Path) -> Callable[[], object]:
    paths = []
    for step in (1, 2, 3):
        paths.append(folder / f"step-{step}.pt")
        torch.save(network().state_dict(), paths[-1])

    def call() -> None:
        polyak.average_checkpoints(paths, folder / "average.safetensors", overwrite=True)

    return call


def select(folder: Path) -> Callable[[], object]:
    model = network()
    with polyak.Recorder(model, folder / "run", block=1) as recorder:
        for _ in range(4):
            recorder.update()
    batches = [torch.randn(8, 4)]
    profiles = [polyak.Uniform(), polyak.Tail(0.5)]

    def call() -> None:
        polyak.select(
            polyak.Trajectory(folder / "run"),
            model,
            score=lambda m: m(batches[0]).square().mean().item(),
            mode="min",
            profiles=profiles,
            recalibrate=batches,
            progress=False,
        )

    return call


FLOWS: dict[str, Callable[[Path], Callable[[], object]]] = {
    "Average.update": update,
    "a block's write": block_write,
    "average_checkpoints": average_files,
    "select": select,
}


def measure(name: str) -> list[str]:
    """The files that the flow passes through, warm."""
    with tempfile.TemporaryDirectory() as folder:
        call = FLOWS[name](Path(folder))
        call()
        return files_of(call)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--json", action="store_true", help="print one JSON object: flow to files")
    options.add_argument("--files", action="store_true", help="print the files too")
    given = options.parse_args()
    found = {name: measure(name) for name in FLOWS}
    if given.json:
        print(json.dumps(found, indent=1))
        return
    for name, files in found.items():
        print(f"{name:20} {len(files):3} files (at most {LIMITS[name]})")
        if given.files:
            print("".join(f"    {file}\n" for file in files), end="")


if __name__ == "__main__":
    main()
