"""A file system of a few megabytes that fills up, and has room again later."""

from __future__ import annotations

import ctypes
import os
import pickle
import random
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

import polyak
from polyak import checkpoints, report
from polyak.errors import CheckpointError, PolyakError
from torture.harness import Case, contents, family

_CLONE_NEWUSER, _CLONE_NEWNS = 0x10000000, 0x00020000
_DISK_BYTES = 4 << 20
_PAGE_BYTES = 4096
# A file of a model takes 40,000 bytes, a recording some 400,000.
_SIZE = 100
_STEPS = 8


def mount(folder: Path) -> None:
    """Put a small file system in the place of ``folder``, which this process alone sees; it has one thread yet."""
    user, group = os.getuid(), os.getgid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "no name spaces for users")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    options = f"size={_DISK_BYTES}".encode()
    if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, options):
        raise OSError(ctypes.get_errno(), "no file systems in them")


@cache
def imported() -> None:
    """What all works import is there before the first fork, rather than in every child."""
    with TemporaryDirectory() as folder:
        for work in works(Path(folder)).values():
            work()


def on_small_disk(work: Callable[[Path], object], folder: Path) -> None:
    """Do ``work`` in a forked process where ``folder`` is a small file system; raises what it raised."""
    imported()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        end: tuple[str, str] = ("right", "")
        try:
            try:
                mount(folder)
            except OSError as error:
                end = ("skipped", str(error))
            else:
                work(folder)
        except PolyakError as error:
            end = ("refused", str(error))
        except BaseException:
            end = ("wrong", traceback.format_exc())
        with os.fdopen(writing, "wb") as stream:
            pickle.dump(end, stream)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        data = stream.read()
    os.waitpid(child, 0)
    how, words = pickle.loads(data)
    if how == "skipped":
        pytest.skip(f"this system lets nobody mount a file system: {words}")
    if how == "refused":
        raise PolyakError(words)
    assert how == "right", words


# What writes, after what it needs was made: done, and seen to be right. It may be done again after it failed.


def model_of(step: int) -> torch.nn.Module:
    model = torch.nn.Linear(_SIZE, _SIZE, bias=False)
    torch.nn.init.constant_(model.weight, step)
    return model


def inputs(folder: Path) -> list[Path]:
    paths = [folder / f"step-{step}.safetensors" for step in (1, 2, 3)]
    for step, path in enumerate(paths, 1):
        checkpoints.write(path, dict(model_of(step).named_parameters()))
    return paths


def written(folder: Path, name: str, write: Callable[[Path], object]) -> None:
    output = folder / name
    write(output)
    with checkpoints.open(output) as opened:
        assert torch.equal(opened.read("weight"), torch.full((_SIZE, _SIZE), 2.0))


def record(folder: Path) -> None:
    """Goes on after the last block that is there."""
    model = model_of(0)
    with polyak.Recorder(model, folder / "run", block=1, resume=True) as run:
        done = len(polyak.Trajectory(folder / "run"))
        for step in range(done + 1, _STEPS + 1):
            model.weight.data.fill_(step)
            run.update()
    found = polyak.Trajectory(folder / "run")
    assert not found.usable.damaged and [block.stop for block in found.blocks] == [*range(1, _STEPS + 1)]
    assert torch.equal(found.average("uniform")["weight"], torch.full((_SIZE, _SIZE), (_STEPS + 1) / 2))


def reported(trajectory: polyak.Trajectory, folder: Path) -> None:
    report.write_report(trajectory, folder / "out.html", overwrite=True)
    assert (folder / "out.html").read_text().rstrip().endswith("</html>")


def works(folder: Path) -> dict[str, Callable[[], object]]:
    paths = inputs(folder)
    model, trajectory = model_of(2), polyak.Trajectory.from_checkpoints(paths)
    average = polyak.Average(model, "uniform")
    average.update()
    chosen = polyak.select(
        trajectory,
        model_of(1),
        score=lambda m: -float(m.weight[0, 0]),
        mode="max",
        profiles=["uniform"],
        progress=False,
    )
    weights = dict(model.named_parameters())

    def offline(output: Path) -> None:
        polyak.average_checkpoints(paths, output, overwrite=True)

    def uniform(output: Path) -> None:
        trajectory.write("uniform", output, overwrite=True)

    writes: dict[str, Callable[[Path], object]] = {
        "average_checkpoints": offline,
        "Average.save": partial(average.save, overwrite=True),
        "Trajectory.write": uniform,
        "checkpoints.write": lambda output: checkpoints.write(output, weights, overwrite=True),
    }
    found: dict[str, Callable[[], object]] = {
        f"{label}, {name}": partial(written, folder, name, write)
        for label, write in writes.items()
        for name in OUTPUTS
    }
    return found | {
        "checkpoints.write_sharded": partial(
            written, folder, "out", lambda output: checkpoints.write_sharded(output, weights, overwrite=True)
        ),
        "Selection.write": lambda: chosen.write(folder / "out.safetensors", overwrite=True),
        "Recorder": partial(record, folder),
        "report.write_report": partial(reported, trajectory, folder),
    }


WRITES = ("average_checkpoints", "Average.save", "Trajectory.write", "checkpoints.write")
OUTPUTS = ("out.safetensors", "out.pt", "out.npz", "out")
OTHERS = ("checkpoints.write_sharded", "Selection.write", "Recorder", "report.write_report")
NAMES = (*(f"{write}, {output}" for write in WRITES for output in OUTPUTS), *OTHERS)


def fills_up(name: str, room: int, folder: Path) -> None:
    """The disk has ``room`` bytes: a refusal names the file and leaves nothing; with room again the work is done."""
    work = works(folder)[name]
    before = contents(folder)
    (folder / "ballast").write_bytes(bytes(free(folder) - room))
    with ExitStack() as later:
        later.callback(work)  # once more, where there is room again
        later.callback((folder / "ballast").unlink)
        try:
            work()
        except CheckpointError as error:
            assert str(folder) in str(error), error
            if name != "Recorder":
                after = contents(folder)
                assert after.keys() - {"ballast"} == before.keys(), after.keys()
            raise
        finally:
            assert not list(folder.rglob(".polyak-*")), "half-written"


def free(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


@family("a file system that fills up", apart=17)
def quotas(rng: random.Random) -> Iterator[Case]:
    for name in NAMES:
        for pages in (0, 1, rng.randint(2, 9), rng.randint(10, 30), 200):
            work = partial(fills_up, name, pages * _PAGE_BYTES)
            yield Case(
                f"{name}, room for {pages} pages", partial(on_small_disk, work), names=("cannot write",)
            )
