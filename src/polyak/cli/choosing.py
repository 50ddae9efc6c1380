"""What the commands that score a run have in common: its options, and how they are carried out."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polyak.cli.inputs import imported

if TYPE_CHECKING:
    from torch import nn

    from polyak.selection import Selection
    from polyak.trajectory import Trajectory

__all__ = [
    "Answers",
    "HoldoutOption",
    "KeyOption",
    "Mode",
    "ModeOption",
    "ProfilesOption",
    "Questions",
    "RecalibrateOption",
    "answered",
    "opened",
]


class Mode(StrEnum):
    """Which scores are better."""

    min = "min"
    max = "max"


ModeOption = Annotated[Mode, typer.Option(help="Whether lower or higher scores are better.")]
ProfilesOption = Annotated[
    list[str] | None,
    typer.Option(help="What to try: 'tail:0.4 decay:sqrt:0.4'; may be repeated. By default a grid."),
]
RecalibrateOption = Annotated[
    str | None,
    typer.Option(help="package.module:function that returns batches for BatchNorm statistics."),
]
HoldoutOption = Annotated[str | None, typer.Option(help="Like --score, on data that nothing is chosen on.")]
KeyOption = Annotated[
    str | None, typer.Option(help="Nested key of the checkpoints' weights; by default the best known.")
]


@dataclass(frozen=True)
class Questions:
    """What is asked of a run, as it stands on the command line."""

    model: str
    score: str
    mode: Mode = Mode.min
    profiles: list[str] | None = None
    recalibrate: str | None = None
    holdout: str | None = None


@dataclass(frozen=True)
class Answers:
    """The user's model, with the run's live weights, how it is scored, and what was chosen."""

    network: nn.Module
    score: Any
    batches: Any
    choice: Selection


def answered(trajectory: Trajectory, questions: Questions) -> Answers:
    """Import what the user names, build the model, and choose."""
    import polyak
    from polyak.selection.weights import apply_weights

    build, score = imported("--model", questions.model), imported("--score", questions.score)
    holdout = None if questions.holdout is None else imported("--holdout", questions.holdout)
    recalibrate = questions.recalibrate
    batches = None if recalibrate is None else imported("--recalibrate", recalibrate)()
    network = _built(questions.model, build)
    apply_weights(network, trajectory.live())
    choice = polyak.select(
        trajectory,
        network,
        score=score,
        mode=questions.mode.value,
        profiles=None if questions.profiles is None else " ".join(questions.profiles).split(),
        recalibrate=batches,
        holdout=holdout,
        progress=sys.stderr.isatty(),
    )
    return Answers(network, score, batches, choice)


def opened(paths: list[Path], key: str | None) -> Trajectory:
    """A recorded trajectory, or checkpoints as one."""
    from polyak import Trajectory
    from polyak.combine.inputs import open_inputs
    from polyak.errors import OptionError
    from polyak.trajectory.manifest import Manifest

    if Manifest.exists(paths[0]):
        if len(paths) > 1 or key is not None:
            raise OptionError(f"{paths[0]} is a recorded trajectory: give it alone, and no --key")
        return Trajectory(paths[0])
    recording = next((path.parent for path in paths if path.is_file() and Manifest.exists(path.parent)), None)
    if recording is not None:
        raise OptionError(
            f"{paths[0]} is a part of the recorded trajectory {recording}: give {recording} alone"
        )
    return Trajectory.from_checkpoints([each.path for each in open_inputs(paths, key)], key=key)


def _built(text: str, build: Any) -> Any:
    from torch import nn

    from polyak.errors import OptionError

    network = build()
    if not isinstance(network, nn.Module):
        raise OptionError(
            f"--model {text} must return a torch.nn.Module, it returned a {type(network).__name__}"
        )
    return network
