"""Every public call in a small setting, ready to be made, and how to see that all is well after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import polyak
from polyak import checkpoints, inspection, landscape, optim, report, schedules
from torture.harness import small_model, walk

LOADER = [torch.randn(6, 3, generator=torch.Generator().manual_seed(n)) for n in range(2)]


def loss(model: nn.Module) -> float:
    """A score that any weights have."""
    return sum(float(p.detach().double().square().sum()) for p in model.parameters())


@dataclass
class Setting:
    """What calls are made on: a model, averaged and recorded for four steps, at its fifth; and files of the run."""

    folder: Path
    model: nn.Sequential = field(default_factory=small_model)
    classic: optim.SWA | None = None

    def __post_init__(self) -> None:
        self.samples: list[dict[str, Tensor]] = []
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.average = polyak.Average(self.model, "uniform")
        self.recorder = polyak.Recorder(self.model, self.folder / "run", block=1)
        self.files = []
        for step in range(1, 5):
            self.samples.append(walk(self.model, step))
            self.average.update()
            self.recorder.update(loss=float(step))
            self.files.append(self.folder / f"step-{step}.safetensors")
            checkpoints.write(self.files[-1], self.model.state_dict())
        self.recorder.trajectory  # noqa: B018  # waits for what is being written
        self.samples.append(walk(self.model, 5))

    @property
    def trajectory(self) -> polyak.Trajectory:
        return polyak.Trajectory.from_checkpoints(self.files)

    def close(self) -> None:
        self.recorder.close()


@contextmanager
def made(folder: Path) -> Iterator[Setting]:
    setting = Setting(folder)
    try:
        yield setting
    finally:
        setting.close()


def _used(context: Any) -> None:
    with context:
        pass


def _attached(s: Setting) -> None:
    polyak.attach(s.optimizer, polyak.Average(s.model, "uniform")).remove()


def _selected(s: Setting, **options: Any) -> Any:
    options = {"score": loss, "mode": "min", "profiles": ["tail:0.5"], "progress": False} | options
    return polyak.select(s.trajectory, s.model, **options)


def _points(s: Setting) -> dict[str, dict[str, Tensor]]:
    live = {name: tensor.clone() for name, tensor in s.model.state_dict().items()}
    return {"live": live, "averaged": {n: t.clone() for n, t in s.average.named_tensors().items()}}


def _of_swa(s: Setting, swaps: bool = False) -> None:
    s.classic = optim.SWA(s.optimizer)
    s.classic.update_swa()
    if swaps:
        s.classic.swap_swa_sgd()
        s.classic.swap_swa_sgd()


# Each may be made twice.
CALLS: dict[str, Callable[[Setting], object]] = {
    "Average": lambda s: polyak.Average(s.model, "ema:decay=0.9", compensated=True),
    "Average.update": lambda s: s.average.update(),
    "Average.update_now": lambda s: s.average.update_now(),
    "Average.applied": lambda s: _used(s.average.applied()),
    "Average.applied, a share": lambda s: _used(s.average.applied(0.3)),
    "Average.swap_in and out": lambda s: (s.average.swap_in(), s.average.swap_out()),
    "Average.named_tensors": lambda s: s.average.named_tensors(),
    "Average.module": lambda s: s.average.module(),
    "Average.copy_to": lambda s: s.average.copy_to(small_model(5)),
    "Average.save": lambda s: s.average.save(s.folder / "out.pt", overwrite=True),
    "Average.state_dict": lambda s: s.average.load_state_dict(s.average.state_dict()),
    "Recorder": lambda s: polyak.Recorder(s.model, s.folder / "other", step=0).close(),
    "Recorder.update": lambda s: s.recorder.update(loss=1.0),
    "Recorder.note": lambda s: s.recorder.note(loss=1.0),
    "Recorder.applied": lambda s: _used(s.recorder.applied("uniform")),
    "Recorder.average": lambda s: s.recorder.average("uniform"),
    "Recorder.state_dict": lambda s: s.recorder.load_state_dict(s.recorder.state_dict()),
    "Recorder.close": lambda s: s.recorder.close(),
    "Trajectory": lambda s: polyak.Trajectory(s.folder / "run"),
    "Trajectory.from_checkpoints": lambda s: s.trajectory,
    "Trajectory.average": lambda s: s.trajectory.average("tail:0.5"),
    "Trajectory.average_many": lambda s: s.trajectory.average_many(["tail:0.5", "uniform"]),
    "Trajectory.write": lambda s: s.trajectory.write("uniform", s.folder / "out.safetensors", overwrite=True),
    "Trajectory.explain": lambda s: s.trajectory.explain("tail:0.5"),
    "Trajectory.live": lambda s: s.trajectory.live(),
    "attach": _attached,
    "average_checkpoints": lambda s: polyak.average_checkpoints(s.files, s.folder / "out.pt", overwrite=True),
    "average_checkpoints, a folder": lambda s: polyak.average_checkpoints(
        s.files, s.folder / "hf", overwrite=True
    ),
    "update_bn": lambda s: polyak.update_bn(LOADER, s.model),
    "select": _selected,
    "select, recalibrated": lambda s: _selected(s, recalibrate=LOADER),
    "Selection.apply": lambda s: _selected(s).apply(small_model(5)),
    "Selection.write": lambda s: _selected(s).write(s.folder / "out.pt", overwrite=True),
    "soup": lambda s: polyak.soup(s.files, s.model, loss, "min"),
    "fit": lambda s: polyak.fit(s.trajectory, s.model, LOADER, lambda m, b: m(b).square().mean(), steps=2),
    "SWAG": lambda s: list(polyak.SWAG(s.trajectory, "uniform", rank=2).samples(1)),
    "SWAG.predict": lambda s: polyak.SWAG(s.trajectory, "uniform").predict(
        s.model, lambda m: m(LOADER[0]), samples=1, recalibrate=LOADER, progress=False
    ),
    "landscape.path": lambda s: landscape.path(
        s.model, _points(s), loss, positions=[0, 1], mode="min", progress=False
    ),
    "landscape.rays": lambda s: landscape.rays(
        s.model, _points(s), loss, radii=[0.1], directions=1, mode="min", progress=False
    ),
    "checkpoints.open": lambda s: checkpoints.open(s.files[0]).read("0.weight"),
    "checkpoints.write": lambda s: checkpoints.write(
        s.folder / "out.npz", s.model.state_dict(), overwrite=True
    ),
    "checkpoints.write_sharded": lambda s: checkpoints.write_sharded(
        s.folder / "dcp", dict(s.model.named_parameters()), overwrite=True
    ),
    "inspection.describe": lambda s: inspection.describe(s.folder / "run"),
    "inspection.compare": lambda s: inspection.compare(s.files[0], s.files[1]),
    "report.write_report": lambda s: report.write_report(s.trajectory, s.folder / "out.html", overwrite=True),
    "optim.SWA": _of_swa,
    "optim.SWA.swap": lambda s: _of_swa(s, swaps=True),
    "AveragedModel": lambda s: optim.swa_utils.AveragedModel(s.model).update_parameters(s.model),
    "SWALR": lambda s: optim.swa_utils.SWALR(s.optimizer, 0.05),
    "swa_schedule": lambda s: schedules.swa_schedule(s.optimizer, swa_start=2, swa_lr=0.01),
    "cyclical_schedule": lambda s: schedules.cyclical_schedule(s.optimizer, lr_min=0.01, cycle_steps=2),
    "parse": lambda s: polyak.parse("ema:half_life=20"),
}
