"""Wrong types and values for every argument of everything public, found by its signature."""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

import polyak
from polyak import checkpoints, inspection, landscape, optim, report, schedules
from polyak.errors import PolyakError
from torture.calls import LOADER, Setting, loss, made
from torture.harness import Case, contents, family, same_model, small_model, state_of

# To each public callable what makes it, and arguments with which it works.
Target = tuple[Callable[[Setting], Callable], Callable[[Setting], dict[str, Any]]]


def plain(function: Callable, **arguments: Any) -> Target:
    """One that needs nothing of the setting, or of it what a lambda takes."""
    return lambda s: function, lambda s: {
        n: a(s) if inspect.isfunction(a) else a for n, a in arguments.items()
    }


def score(s: Setting) -> Callable:
    return loss


def points(s: Setting) -> dict:
    return {"live": dict(s.model.state_dict()), "averaged": dict(s.average.named_tensors())}


TARGETS: dict[str, Target] = {
    "Average": plain(polyak.Average, model=lambda s: s.model, scheme="uniform"),
    "Average.applied": (lambda s: partial(entered, s.average.applied), lambda s: {"share": 0.5}),
    "Average.swap_in": (lambda s: s.average.swap_in, lambda s: {"share": 0.5}),
    "Average.copy_to": (lambda s: s.average.copy_to, lambda s: {"model": small_model(1)}),
    "Average.load_state_dict": (
        lambda s: s.average.load_state_dict,
        lambda s: {"state": s.average.state_dict()},
    ),
    "Average.module": (lambda s: s.average.module, lambda s: {"factory": small_model}),
    "Average.save": (lambda s: s.average.save, lambda s: {"path": s.folder / "out.pt"}),
    "Recorder": (lambda s: recorded, lambda s: {"model": s.model, "directory": s.folder / "new"}),
    "Recorder.applied": (lambda s: partial(entered, s.recorder.applied), lambda s: {"profile": "uniform"}),
    "Recorder.average": (lambda s: s.recorder.average, lambda s: {"profile": "uniform"}),
    "Recorder.load_state_dict": (
        lambda s: s.recorder.load_state_dict,
        lambda s: {"state": s.recorder.state_dict()},
    ),
    "Trajectory": (lambda s: polyak.Trajectory, lambda s: {"directory": s.folder / "run"}),
    "Trajectory.from_checkpoints": plain(polyak.Trajectory.from_checkpoints, paths=lambda s: s.files),
    "Trajectory.average": (lambda s: s.trajectory.average, lambda s: {"profile": "uniform"}),
    "Trajectory.average_many": (lambda s: s.trajectory.average_many, lambda s: {"profiles": ["uniform"]}),
    "Trajectory.explain": (lambda s: s.trajectory.explain, lambda s: {"profile": "uniform"}),
    "Trajectory.write": (
        lambda s: s.trajectory.write,
        lambda s: {"profile": "uniform", "path": s.folder / "out.safetensors"},
    ),
    "attach": plain(polyak.attach, optimizer=lambda s: s.optimizer),
    "average_checkpoints": plain(
        polyak.average_checkpoints, inputs=lambda s: s.files, output=lambda s: s.folder / "out.safetensors"
    ),
    "fit": plain(
        polyak.fit,
        trajectory=lambda s: s.trajectory,
        model=lambda s: s.model,
        batches=LOADER,
        loss=lambda s: lambda m, b: m(b).square().mean(),
        steps=1,
    ),
    "parse": plain(polyak.parse, text="uniform"),
    "select": plain(
        polyak.select,
        trajectory=lambda s: s.trajectory,
        model=lambda s: s.model,
        score=score,
        mode="min",
        profiles=["uniform"],
        progress=False,
    ),
    "soup": plain(
        polyak.soup, checkpoints=lambda s: s.files, model=lambda s: s.model, score=score, mode="min"
    ),
    "update_bn": plain(polyak.update_bn, loader=LOADER, model=lambda s: s.model),
    "EMA": plain(polyak.EMA, half_life=3.0),
    "EMA, decay": plain(polyak.EMA, decay=0.5),
    "Power": plain(polyak.Power, gamma=1.0),
    "Power, sigma_rel": plain(polyak.Power, sigma_rel=0.1),
    "Polynomial": plain(polyak.Polynomial, eta=1.0),
    "WarmupEMA": plain(polyak.WarmupEMA, decay=0.5),
    "Tail": plain(polyak.Tail, fraction=0.5),
    "Tail, steps": plain(polyak.Tail, steps=3),
    "Window": plain(polyak.Window, start=1, stop=3),
    "Decay": plain(polyak.Decay, shape="sqrt", fraction=0.5),
    "Blend": plain(polyak.Blend, profile=polyak.Uniform(), part=0.5),
    "Weights": plain(polyak.Weights, a=[1.0, 2.0]),
    "SWAG": plain(polyak.SWAG, trajectory=lambda s: s.trajectory, profile="uniform"),
    "SWAG.samples": (
        lambda s: lambda **o: list(polyak.SWAG(s.trajectory, "uniform").samples(**o)),
        lambda s: {"count": 1},
    ),
    "SWAG.predict": (
        lambda s: polyak.SWAG(s.trajectory, "uniform").predict,
        lambda s: {"model": s.model, "function": lambda m: m(LOADER[0]), "samples": 1, "progress": False},
    ),
    "landscape.path": plain(
        landscape.path,
        model=lambda s: s.model,
        weights=points,
        score=score,
        mode="min",
        positions=[0.0],
        progress=False,
    ),
    "landscape.rays": plain(
        landscape.rays,
        model=lambda s: s.model,
        weights=points,
        score=score,
        mode="min",
        radii=[0.1],
        directions=1,
        progress=False,
    ),
    "checkpoints.open": plain(checkpoints.open, path=lambda s: s.files[0]),
    "checkpoints.write": plain(
        checkpoints.write, path=lambda s: s.folder / "out.pt", tensors=lambda s: dict(s.model.state_dict())
    ),
    "inspection.describe": plain(inspection.describe, path=lambda s: s.folder / "run"),
    "inspection.compare": plain(inspection.compare, path=lambda s: s.files[0], other=lambda s: s.files[1]),
    "report.write_report": plain(
        report.write_report, trajectory=lambda s: s.trajectory, path=lambda s: s.folder / "out.html"
    ),
    "swa_schedule": plain(schedules.swa_schedule, optimizer=lambda s: s.optimizer, swa_start=2, swa_lr=0.01),
    "cyclical_schedule": plain(
        schedules.cyclical_schedule, optimizer=lambda s: s.optimizer, lr_min=0.01, cycle_steps=2
    ),
    "optim.SWA": plain(optim.SWA, optimizer=lambda s: s.optimizer),
}
SIGNATURES = {
    "Average.applied": polyak.Average.applied,
    "Recorder": polyak.Recorder,
    "Recorder.applied": polyak.Recorder.applied,
    "SWAG.samples": polyak.SWAG.samples,
    "swa_schedule": schedules.swa_schedule,
    "cyclical_schedule": schedules.cyclical_schedule,
}


def entered(context: Callable, **options: Any) -> None:
    with context(**options):
        pass


def recorded(**options: Any) -> None:
    polyak.Recorder(**options).close()


class Strange:
    """Fits nowhere."""


# What people pass by mistake, by name.
JUNK: dict[str, Any] = {
    "None": None,
    "text": "nonsense",
    "no text": "",
    "-1": -1,
    "0": 0,
    "1.5": 1.5,
    "NaN": math.nan,
    "infinity": math.inf,
    "True": True,
    "a huge number": 10**400,
    "complex": 1j,
    "bytes": b"\xff",
    "a list": [object()],
    "no list": [],
    "a dict": {1: 2},
    "a tensor": torch.ones(2),
    "an object": Strange(),
    "a class": Strange,
    "a function": lambda *_: None,
}


def parameters(name: str) -> Mapping[str, inspect.Parameter]:
    """The arguments of a target that have names; the setting is not needed for its signature."""
    path = SIGNATURES.get(name)
    if path is None:
        owner: Any = polyak
        for part in name.partition(",")[0].split("."):
            owner = (
                getattr(owner, part)
                if hasattr(owner, part)
                else getattr(optim if part == "SWA" else polyak, part)
            )
        path = owner
    found = inspect.signature(path).parameters
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {n: p for n, p in found.items() if p.kind not in kinds and n != "self"}


def misused(name: str, parameter: str, value: Any, folder: Path) -> None:
    """With one argument wrong a call is refused, or does what it says; the model and all files are as before."""
    with made(folder) as setting:
        make, arguments = TARGETS[name]
        call, given = make(setting), {**arguments(setting), parameter: value}
        before, files = state_of(setting.model), contents(folder)
        try:
            call(**given)
        except PolyakError:
            now = contents(folder)
            assert {n: now.get(n) for n in files} == files, "a refused call changed files"
            assert not [n for n in now.keys() - files.keys() if not n.startswith("new")], (
                "a refused call left files"
            )
            raise
        finally:
            if setting.average.swapped:
                setting.average.swap_out()
            if name != "update_bn":
                same_model(setting.model, before)


# What is handed to functions of the caller's own, whose errors are theirs: batches of any kind, and what can be called.
BATCHES, FUNCTIONS = (
    ("batches", "loader", "recalibrate"),
    ("function", "holdout", "loss", "prepare", "score", "forward", "progress", "factory"),
)
THEIRS = {"text", "bytes", "a list", "a dict", "a tensor"}
# fit says in a TypeError of Python's own that it takes batches and a loss, or a score and what belongs to it.
LEFT_OUT = {
    ("fit", name) for name in ("batches", "loss", "score", "mode", "evaluations", "recalibrate", "seed")
}
PER_ARGUMENT = 4


@family("wrong values of public arguments", apart=75)
def wrong_values(rng: random.Random) -> Iterator[Case]:
    for name in TARGETS:
        for parameter in parameters(name):
            theirs = (
                THEIRS
                if parameter in BATCHES
                else {"a class"}
                if parameter in (*FUNCTIONS, "shape")
                else set()
            )
            labels = [label for label in JUNK if label not in theirs and (name, parameter) not in LEFT_OUT]
            for label in rng.sample(labels, min(PER_ARGUMENT, len(labels))):
                yield Case(f"{name}({parameter} = {label})", partial(misused, name, parameter, JUNK[label]))
