"""A KeyboardInterrupt at some line of every public call."""

from __future__ import annotations

import contextlib
import dis
import random
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import CodeType, FrameType
from typing import Any

import torch

import polyak
from polyak import checkpoints
from torture.calls import CALLS, LOADER, Setting, made
from torture.harness import Case, contents, family, mean64, near, same_model, state_of

SOURCE = str(Path(polyak.__file__).parent)
PER_CALL = 6


class Interrupt:
    """Raises KeyboardInterrupt where polyak, or contextlib for it, comes to its n-th line; counts them where n is 0."""

    def __init__(self, at: int = 0):
        self.at, self.lines = at, 0

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Callable | None:
        name = frame.f_code.co_filename
        if not (name.startswith(SOURCE) or name == contextlib.__file__):
            return None
        if event == "line" and frame.f_lasti not in ends_of_with(frame.f_code):
            self.lines += 1
            if self.lines == self.at:
                raise KeyboardInterrupt
        return self

    def during(self, call: Callable[[], object]) -> bool:
        """Whether ``call`` was interrupted."""
        sys.settrace(self)
        try:
            call()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(None)
        return False


@cache
def ends_of_with(code: CodeType) -> set[int]:
    """Where ``__exit__(None, None, None)`` comes next: Python looks at no signal there, and locks would be kept."""
    steps = [(step.offset, step.opname, step.argval) for step in dis.get_instructions(code)]
    loads = [(opname, value) == ("LOAD_CONST", None) for _, opname, value in steps]
    return {steps[n][0] for n in range(len(steps) - 2) if all(loads[n : n + 3])}


@cache
def lines_of(name: str) -> int:
    """How many lines a call comes through, once what is imported at the first call is there."""
    counter = Interrupt()
    with TemporaryDirectory() as folder, made(Path(folder)) as setting:
        CALLS[name](setting)
        counter.during(lambda: CALLS[name](setting))
    return counter.lines


def interrupted(name: str, share: float, folder: Path) -> None:
    with made(folder) as setting:
        before, files = state_of(setting.model), contents(folder)
        at = 1 + int(share * lines_of(name))
        was = Interrupt(at).during(lambda: CALLS[name](setting))
        torch.set_grad_enabled(True)  # one that falls between torch's own lines leaves it off
        check_model(setting, name, before)
        check_average(setting)
        check_files(setting, files)
        assert not ruins(folder), f"ruins, {was}"
        CALLS[name](setting)  # what was interrupted stands in the way of nothing
        check_average(setting)
    check_recording(setting)


def ruins(folder: Path) -> list[Path]:
    """Files under construction, once a recorder's thread has had the time to end what it writes."""
    for _ in range(200):
        if not (found := list(folder.rglob(".polyak-*"))):
            break
        time.sleep(0.02)
    return found


def check_model(s: Setting, name: str, before: dict[str, object]) -> None:
    """The live weights are there, or still kept by a swap that its caller was to end."""
    if s.average.swapped:
        s.average.swap_out()
    if s.classic is not None and s.classic._is_swapped():
        s.classic.swap_swa_sgd()
    if name == "update_bn" and not torch.equal(s.model[1].running_mean, before["1.running_mean"]):
        wanted = torch.cat([s.model[0](batch) for batch in LOADER]).double().mean(0)
        assert torch.allclose(s.model[1].running_mean.double(), wanted, atol=1e-5)
        before |= {
            n: t for n, t in state_of(s.model).items() if n.startswith("1.running") or "num_batches" in n
        }
    same_model(s.model, before)


def check_average(s: Setting) -> None:
    """Each tensor lies on the line from the mean to the sample that was under way, which was taken twice at most."""
    found, mean = s.average.named_tensors(), mean64(s.samples[:4])
    for name, sample in s.samples[4].items():
        way, done = (sample - mean[name]).flatten(), (found[name].double() - mean[name]).flatten()
        share = float(way @ done / (way @ way))
        assert -1e-6 <= share <= 0.4 and float((done - share * way).abs().max()) < 1e-5, f"{name} is off"


def check_files(s: Setting, before: dict[str, bytes]) -> None:
    """What was there is as it was, but for the recorder's own; what is new is whole."""
    now = contents(s.folder)
    for name, data in before.items():
        assert name.startswith(("run/", "other/")) or now.get(name) == data, name
    for path in s.folder.glob("out.*"):
        if path.suffix == ".html":
            assert path.read_text().rstrip().endswith("</html>")
            continue
        with checkpoints.open(path) as opened:
            assert opened.read("0.weight").isfinite().all()


def check_recording(s: Setting) -> None:
    """Blocks of one step hold the sample of that step."""
    run = polyak.Trajectory(s.folder / "run")
    assert not run.usable.damaged and len(run) >= 4
    for number, (block, stored) in enumerate(zip(run.blocks, run.checkpoints, strict=True)):
        sample = s.samples[min(number, 4)]
        assert block.count >= 1 and stored is not None
        near({name: stored.read(name) for name in sample}, sample)


@family("interrupts in public calls", apart=24)
def interrupts(rng: random.Random) -> Iterator[Case]:
    if sys.gettrace() is not None:
        return  # an interrupt and a measurement of coverage want the same hook
    for name in CALLS:
        if name == "report.write_report":
            continue
        for number in range(PER_CALL):
            share = (number + rng.random()) / PER_CALL
            yield Case(f"{name}, at {share:.3f}", partial(interrupted, name, share))
