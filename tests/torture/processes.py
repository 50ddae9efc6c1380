"""Killed at any system call, a disk that fills or fails at any of them, threads, forks, and two writers."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from threading import Barrier
from unittest import mock

import torch

import polyak
from polyak import checkpoints
from polyak.errors import CheckpointError, OutputExistsError, PolyakError, StateError, SwapError
from torture.calls import Setting, loss
from torture.harness import Case, contents, family, mean64, near, same_model, small_model, state_of, walk

# What changes files, in the order in which polyak uses it.
SYSTEM_CALLS = ("open", "truncate", "pwrite", "fsync", "replace", "rename", "unlink", "mkdir")


@contextmanager
def at_system_call(n: int, act: Callable[[], object]) -> Iterator[list[int]]:
    """Do something instead of the n-th system call that changes files; the list holds how many there were."""
    count = [0]

    def watched(call: Callable) -> Callable:
        def watching(*arguments, **options):
            count[0] += 1
            if count[0] == n:
                act()
            return call(*arguments, **options)

        return watching

    with mock.patch.multiple(os, **{name: watched(getattr(os, name)) for name in SYSTEM_CALLS}):
        yield count


def in_child(work: Callable[[], object]) -> int:
    """The status of a forked process that did ``work``."""
    child = os.fork()
    if child == 0:
        with suppress(BaseException):
            work()
            os._exit(0)
        os._exit(1)
    return os.waitpid(child, 0)[1]


# What writes files, after what it needs was made; and what is right afterwards, whether it came to its end or not.


def _inputs(folder: Path) -> list[Path]:
    for number in (1, 2, 3):
        checkpoints.write(folder / f"step{number}.pt", {"w": torch.full((500,), float(number))})
    return sorted(folder.glob("step*"))


def _offline(suffix: str, folder: Path) -> tuple[Callable[[], object], Callable[[], object]]:
    inputs, output = _inputs(folder), folder / f"out{suffix}"

    def check() -> None:
        if os.path.lexists(output):
            with checkpoints.open(output) as opened:
                assert torch.equal(opened.read("w"), torch.full((500,), 2.0))

    return lambda: polyak.average_checkpoints(inputs, output, overwrite=True), check


def _saved(suffix: str, folder: Path) -> tuple[Callable[[], object], Callable[[], object]]:
    """Over a file that is there already: the old one, or the new one."""
    model, output = torch.nn.Linear(20, 20), folder / f"out{suffix}"
    average = polyak.Average(model, "uniform")
    average.update()
    old = model.weight.detach().clone()
    average.save(output)
    model.weight.data.add_(2)
    average.update()

    def check() -> None:
        with checkpoints.open(output) as opened:
            found = opened.read("weight")
        assert torch.equal(found, old) or torch.allclose(found, old + 1)

    return lambda: average.save(output, overwrite=True), check


def _recorded(steps: int, blocks: int, folder: Path) -> tuple[Callable[[], object], Callable[[], object]]:
    samples: list[dict[str, torch.Tensor]] = []
    walker = small_model()
    for step in range(1, steps + 1):
        samples.append(walk(walker, step))

    def record() -> None:
        model = small_model()
        with polyak.Recorder(model, folder / "run", block=1, max_blocks=blocks, resume=True) as run:
            for step in range(1, steps + 1):
                walk(model, step)
                run.update()

    def check() -> None:
        try:
            run = polyak.Trajectory(folder / "run")
        except CheckpointError as error:
            assert "no trajectory" in str(error), error  # stopped before it began
            return
        assert not run.blocks or not run.usable.damaged
        for block, stored in zip(run.blocks, run.checkpoints, strict=True):
            near({n: stored.read(n) for n in samples[0]}, mean64(samples[block.start : block.stop]))
        if run.has_live:
            near(run.live(), samples[run.blocks[-1].stop - 1])

    return record, check


WORK = {
    **{
        f"average_checkpoints, {s or 'a folder'}": partial(_offline, s)
        for s in (".pt", ".safetensors", ".npz", "")
    },
    **{f"Average.save, {s or 'a folder'}": partial(_saved, s) for s in (".pt", ".safetensors")},
    "Recorder": partial(_recorded, 4, 64),
    "Recorder, merging": partial(_recorded, 12, 8),
}


def killed(work: str, share: float, folder: Path) -> None:
    """A process is killed at one of its system calls; what it left is right, and in nobody's way."""
    do, check = WORK[work](folder)
    calls = folder / "calls"

    def counted() -> None:
        with at_system_call(0, lambda: None) as count:
            do()
        calls.write_text(str(count[0]))

    kept = folder / "kept"
    kept.mkdir()
    assert in_child(counted) == 0, "it fails without being killed"
    n = 1 + int(share * int(calls.read_text()))
    if (folder / "run").exists():
        (folder / "run").rename(kept / "run")

    def work_until() -> None:
        with at_system_call(n, lambda: os.kill(os.getpid(), signal.SIGKILL)):
            do()

    status = in_child(work_until)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
    check()
    for ruin in folder.rglob(".polyak-*"):  # what a killed process left cannot but lie there
        ruin.unlink() if ruin.is_file() else [*map(Path.unlink, ruin.iterdir()), ruin.rmdir()]
    if not work.startswith("Recorder"):
        assert in_child(do) == 0, "it stands in the way of the next"
        check()


@family("kill -9 at a system call", apart=16)
def kills(rng: random.Random) -> Iterator[Case]:
    for work in WORK:
        for number in range(8):
            share = (number + rng.random()) / 8
            yield Case(f"{work}, at {share:.3f}", partial(killed, work, share))


def failing(work: str, code: int, share: float, folder: Path) -> None:
    """A system call fails as that of a full or broken disk: refused, with nothing half-written."""
    do, check = WORK[work](folder)
    with at_system_call(0, lambda: None) as count:
        do()
    n = 1 + int(share * count[0])
    if work.startswith("Recorder"):
        (folder / "run").rename(folder / "first")

    def fail() -> None:
        raise OSError(code, os.strerror(code))

    before = contents(folder)
    try:
        with at_system_call(n, fail):
            do()
    finally:
        check()
        if not work.startswith("Recorder"):
            assert contents(folder).keys() <= before.keys() | {"out"}


def too_large(work: str, room: int, folder: Path) -> None:
    """No file may have more than ``room`` bytes."""
    do, check = WORK[work](folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        do()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
        check()


@family("a full or broken disk", apart=20)
def disks(rng: random.Random) -> Iterator[Case]:
    for work in WORK:
        for code in (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS):
            for number in range(3):
                share = (number + rng.random()) / 3
                run = partial(failing, work, code, share)
                yield Case(f"{work}, {errno.errorcode[code]} at {share:.3f}", run)
        for room in (0, 100, 1000, 2500):
            yield Case(f"{work}, at most {room} bytes", partial(too_large, work, room))


# Threads and forks.


def in_threads(count: int, work: Callable[[int], object]) -> list[object]:
    """What each thread returned, or raised on purpose; they begin together, and take turns often."""
    together, interval = Barrier(count), sys.getswitchinterval()

    def kept(number: int) -> object:
        together.wait()
        try:
            return work(number)
        except PolyakError as error:
            return error

    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(kept, range(count)))
    finally:
        sys.setswitchinterval(interval)


def parallel_offline(count: int, same: bool, folder: Path) -> None:
    inputs = _inputs(folder)
    outputs = [folder / f"out{0 if same else number}.safetensors" for number in range(count)]
    ends = in_threads(count, lambda number: polyak.average_checkpoints(inputs, outputs[number]))
    for output in set(outputs):
        assert torch.equal(checkpoints.open(output).read("w"), torch.full((500,), 2.0))
    assert all(isinstance(end, OutputExistsError) for end in ends if isinstance(end, PolyakError))
    assert same or not any(isinstance(end, PolyakError) for end in ends)


def parallel_reading(count: int, folder: Path) -> None:
    setting = Setting(folder)
    setting.close()
    run = setting.trajectory
    wanted = mean64(setting.samples[:4])
    for found in in_threads(count, lambda number: run.average("uniform")):
        near(found, wanted)


def reading_while_recording(count: int, folder: Path) -> None:
    model = small_model()
    with polyak.Recorder(model, folder / "run", block=1, max_blocks=8) as run:
        samples = [walk(model, 1)]
        run.update()
        run.trajectory  # noqa: B018
        with ThreadPoolExecutor(count) as pool:
            readers = [
                pool.submit(lambda: polyak.Trajectory(folder / "run").average("uniform"))
                for _ in range(count)
            ]
            for step in range(2, 20):
                samples.append(walk(model, step))
                run.update()
            for reader in readers:
                with suppress(CheckpointError):  # recorded further meanwhile: it asks to be opened again
                    assert all(t.isfinite().all() for t in reader.result().values())
    near(run.trajectory.average("uniform"), mean64(samples))


def parallel_swaps(count: int, folder: Path) -> None:
    model = small_model()
    averages = [polyak.Average(model, "uniform") for _ in range(count)]
    for average in averages:
        average.update()
    walk(model, 2)
    before = state_of(model)

    def swap(number: int) -> None:
        for _ in range(20):
            with suppress(SwapError), averages[number].applied():
                pass

    in_threads(count, swap)
    same_model(model, before)


def closed_elsewhere(count: int, folder: Path) -> None:
    setting = Setting(folder)
    ends = in_threads(count, lambda number: setting.recorder.close())
    assert not any(isinstance(end, PolyakError) for end in ends), ends
    near(polyak.Trajectory(folder / "run").average("uniform"), mean64(setting.samples[:4]))


def used_everywhere(count: int, folder: Path) -> None:
    """Threads that train, save, average and close with one recorder: each step that was counted is recorded once."""
    setting = Setting(folder)
    recorder, counted = setting.recorder, []

    def use(number: int) -> None:
        for step in range(5):
            recorder.update()
            counted.append(step)
            recorder.state_dict()
            recorder.average("uniform")
            with (
                suppress(SwapError),
                recorder.applied("uniform"),
            ):  # or another thread's average is in the model
                pass
        if number == 1:
            recorder.close()

    ends = in_threads(count, use)
    setting.close()
    assert all(isinstance(end, StateError | SwapError | None) for end in ends), ends
    run = polyak.Trajectory(folder / "run")
    assert sum(block.count for block in run.blocks) == run.blocks[-1].stop == 4 + len(counted)
    same_model(setting.model, state_of(setting.model))


THREADED: dict[str, Callable[[int, Path], object]] = {
    "average to several files": lambda count, folder: parallel_offline(count, False, folder),
    "average to one file": lambda count, folder: parallel_offline(count, True, folder),
    "read one trajectory": parallel_reading,
    "read what is recorded": reading_while_recording,
    "swap one model": parallel_swaps,
    "close one recorder": closed_elsewhere,
    "use one recorder": used_everywhere,
}


@family("threads", apart=12)
def threads(rng: random.Random) -> Iterator[Case]:
    for label, work in THREADED.items():
        for count in (2, 3, 5, 8):
            yield Case(f"{count} {label}", partial(work, count))


def forked(use: str, folder: Path) -> None:
    """A child of a training process uses what it inherited, or ends; the parent's run goes on untouched."""
    setting = Setting(folder)
    uses: dict[str, Callable[[], object]] = {
        "nothing": lambda: None,
        "collect": lambda: __import__("gc").collect(),
        "update": setting.average.update,
        "save": lambda: setting.average.save(folder / "out.pt"),
        "read": lambda: polyak.Trajectory(folder / "run").average("uniform"),
        "average": lambda: setting.trajectory.average("uniform"),
        "offline": lambda: polyak.average_checkpoints(setting.files, folder / "out.safetensors"),
        "select": lambda: polyak.select(
            setting.trajectory, setting.model, score=loss, mode="min", profiles=["uniform"], progress=False
        ),
        "another recorder": lambda: polyak.Recorder(setting.model, folder / "other").close(),
        "record there": lambda: _refused(lambda: polyak.Recorder(setting.model, folder / "run", resume=True)),
    }
    assert in_child(uses[use]) == 0
    setting.recorder.update()
    setting.close()
    near(polyak.Trajectory(folder / "run").average("uniform"), mean64(setting.samples))
    near(setting.average.named_tensors(), mean64(setting.samples[:4]))


def _refused(call: Callable[[], object]) -> None:
    try:
        call()
    except StateError:
        return
    raise AssertionError("not refused")


@family("forks", apart=5)
def forks(rng: random.Random) -> Iterator[Case]:
    for use in ("nothing", "collect", "update", "save", "read", "average", "offline", "select"):
        yield Case(f"the child: {use}", partial(forked, use))
    for use in ("another recorder", "record there"):
        yield Case(f"the child: {use}", partial(forked, use))


# Two writers in one folder.


def second_recorder(path: str, folder: Path) -> None:
    setting = Setting(folder)
    (folder / "link").symlink_to("run")
    places = {
        "the same path": folder / "run",
        "a link": folder / "link",
        "a detour": folder / "run" / ".." / "run",
        "a relative path": Path(os.path.relpath(folder / "run")),
    }
    try:
        _refused(lambda: polyak.Recorder(setting.model, places[path], resume=True))
        _refused(lambda: polyak.Recorder(setting.model, places[path], step=0))
    finally:
        setting.close()
        near(polyak.Trajectory(folder / "run").average("uniform"), mean64(setting.samples[:4]))


def meddled(how: str, folder: Path) -> None:
    """Somebody changes the folder of a recording that goes on; its error names it, and what is whole is still read."""
    setting = Setting(folder)
    run = folder / "run"
    blocks = sorted(run.glob("block-*"))
    meddling: dict[str, Callable[[], object]] = {
        "a block removed": blocks[1].unlink,
        "a block emptied": lambda: blocks[1].write_bytes(b""),
        "the last block cut": lambda: blocks[-1].write_bytes(blocks[-1].read_bytes()[:-9]),
        "the manifest removed": (run / "manifest.json").unlink,
        "the manifest emptied": lambda: (run / "manifest.json").write_bytes(b""),
        "a file more": lambda: (run / "notes.txt").write_text("mine"),
        "a folder named as a block": lambda: (run / "block-000000000005-000000000006.safetensors").mkdir(),
        "the folder renamed": lambda: run.rename(folder / "moved"),
        "the folder removed": lambda: __import__("shutil").rmtree(run),
        "an average written there": lambda: polyak.average_checkpoints(
            setting.files, run / "average.safetensors"
        ),
    }
    meddling[how]()
    try:
        setting.recorder.update()
        setting.close()
        polyak.Trajectory(run).usable.average("uniform")
        assert how != "a file more" or (run / "notes.txt").read_text() == "mine"
    finally:
        with suppress(PolyakError):
            setting.close()


@family("two writers in one folder", apart=5)
def writers(rng: random.Random) -> Iterator[Case]:
    for path in ("the same path", "a link", "a detour", "a relative path"):
        yield Case(f"two recorders, {path}", partial(second_recorder, path))
    for how in (
        "a block removed",
        "a block emptied",
        "the last block cut",
        "the manifest removed",
        "the manifest emptied",
        "a file more",
        "a folder named as a block",
        "the folder renamed",
        "the folder removed",
        "an average written there",
    ):
        yield Case(how, partial(meddled, how), names=("run",))
