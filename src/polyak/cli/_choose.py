"""``polyak select`` and ``polyak report``: what they share, and the two commands."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polyak import _terminal
from polyak.cli._average import AllowOption, HowToRead, KeyOption, LastOption, StepsOption, expanded
from polyak.cli._users import built, imported
from polyak.errors import OptionError

if TYPE_CHECKING:
    from torch import nn

    import polyak
    from polyak.landscape import PathScores

# What the commands that score a run have in common: its options, and how they are carried out.


class Mode(StrEnum):
    """Which scores are better."""

    min = "min"
    max = "max"


ModeOption = Annotated[
    Mode | None,
    typer.Option(
        help="Whether lower or higher scores are better; needed unless score returns losses per example."
    ),
]
ProfilesOption = Annotated[
    list[str] | None,
    typer.Option(help="What to try: 'tail:0.4 decay:sqrt:0.4'; may be repeated. By default a grid."),
]
RecalibrateOption = Annotated[
    str | None,
    typer.Option(help="package.module:function that returns batches for BatchNorm statistics."),
]
PrepareOption = Annotated[
    str | None,
    typer.Option(
        help="package.module:function that is given a copy of the model with each candidate and quantises it, say."
    ),
]
HoldoutOption = Annotated[str | None, typer.Option(help="Like --score, on data that nothing is chosen on.")]


@dataclass(frozen=True)
class Questions:
    """What is asked of a run, as it stands on the command line."""

    model: str
    score: str
    mode: Mode | None = None
    profiles: list[str] | None = None
    recalibrate: str | None = None
    holdout: str | None = None
    prepare: str | None = None


@dataclass(frozen=True)
class Answers:
    """The user's model, with the run's live weights, how it is scored, and what was chosen."""

    network: nn.Module
    score: Any
    batches: Any
    prepare: Any
    choice: polyak.Selection


def answered(trajectory: polyak.Trajectory, questions: Questions) -> Answers:
    """Import what the user names, build the model, and choose."""
    import polyak
    from polyak._evaluate import apply_weights

    build, score = imported("--model", questions.model), imported("--score", questions.score)
    holdout = None if questions.holdout is None else imported("--holdout", questions.holdout)
    holdout = score if questions.holdout == questions.score else holdout
    prepare = None if questions.prepare is None else imported("--prepare", questions.prepare)
    recalibrate = questions.recalibrate
    batches = None if recalibrate is None else imported("--recalibrate", recalibrate)()
    network = built(questions.model, build)
    apply_weights(network, trajectory.live())
    choice = polyak.select(
        trajectory,
        network,
        score=score,
        mode=None if questions.mode is None else questions.mode.value,
        profiles=None if questions.profiles is None else listed(questions.profiles),
        recalibrate=batches,
        holdout=holdout,
        prepare=prepare,
        progress=sys.stderr.isatty(),
    )
    return Answers(network, score, batches, prepare, choice)


def listed(texts: Sequence[str]) -> list[str]:
    """Profiles that stand beside each other, with commas or without.

    >>> listed(["tail:0.4, window:100,200", "uniform"])
    ['tail:0.4', 'window:100,200', 'uniform']
    """
    return [profile.rstrip(",") for profile in " ".join(texts).split()]


def opened(inputs: list[str], how: HowToRead) -> polyak.Trajectory:
    """A recorded run, or checkpoints as one; what is left out of these is said."""
    from polyak import Trajectory
    from polyak.combine._reading import read_inputs
    from polyak.trajectory._blocks import Manifest

    paths, found = expanded(inputs, "--profiles")

    if Manifest.exists(paths[0]):
        if len(paths) > 1 or how != HowToRead():
            raise OptionError(
                f"{paths[0]} is a recorded run: give it alone, and no --key, --steps, --last, --allow"
            )
        return Trajectory(paths[0])
    run = next((path.parent for path in paths if path.is_file() and Manifest.exists(path.parent)), None)
    if run is not None:
        raise OptionError(f"{paths[0]} is a part of a recorded run: give {run} alone")
    reading = read_inputs(paths, found=found, **how.keywords()).required()
    reading.refuse_unordered()
    for line in filter(None, (reading.left_out, reading.of_several_runs)):
        typer.echo(_terminal.printable(line), err=True)
    return Trajectory._of_reading(reading)


# ``polyak select``: score the averages of a run, say which is best, write it.


def select(
    inputs: Annotated[
        list[str],
        typer.Argument(help="A recorded run, or checkpoints, folders of them, and patterns."),
    ],
    model: Annotated[str, typer.Option(help="package.module:function that builds the model.")],
    score: Annotated[
        str, typer.Option(help="package.module:function that takes the model; see below what it returns.")
    ],
    mode: ModeOption = None,
    profiles: ProfilesOption = None,
    recalibrate: RecalibrateOption = None,
    holdout: HoldoutOption = None,
    prepare: PrepareOption = None,
    key: KeyOption = None,
    steps: StepsOption = None,
    last: LastOption = None,
    allow: AllowOption = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the model with the best weights here.")
    ] = None,
    like: Annotated[
        Path | None, typer.Option(help="Nest the weights as in this torch checkpoint, with its settings.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an output that is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print every candidate as JSON.")] = False,
) -> None:
    """Choose an average after training: score many, and the live weights, on your own data.

    \b
    polyak select run/ --model my.model:build --score my.data:validation_losses
    polyak select 'ckpts/step-*.pt' --model my.model:build --score my.data:accuracy --mode max
    polyak select ckpts/ --model my.model:build --score my.data:losses -o best.safetensors
    polyak select ckpts/ --model my.model:build --score my.data:losses --profiles 'tail:0.2 tail:0.4'
    polyak select ckpts/ --model my.model:build --score my.data:losses --recalibrate my.data:loader
    polyak select ckpts/ --model my.model:build --score my.data:losses --holdout my.data:test_losses
    polyak select run/ --model my.model:build --score my.data:losses --prepare my.model:quantise
    polyak select outputs/ --model my.model:build --score my.data:losses -o best      # from_pretrained("best")

    The score function gets the model in evaluation mode and returns a tensor with one loss per example: then every
    difference to the live weights comes with an interval, and what is as good but simpler is named. Or it returns
    one number, with --mode saying which are better. The live weights are the newest checkpoint, or those that the
    recorder kept; with --recalibrate they are tried with recomputed statistics too. Modules are looked for in the
    working directory too, and run: this command executes your code, never code in a checkpoint.
    """
    from polyak.checkpoints._checkpoint import format_for
    from polyak.checkpoints._io import AtomicOutput

    if like is not None and output is None:
        raise OptionError("--like is about the output: give -o as well, or leave it out")
    if output is not None:
        format_for(output, None)
        AtomicOutput(output, overwrite=force)  # refused before anything is scored
    questions = Questions(model, score, mode, profiles, recalibrate, holdout, prepare)
    choice = answered(opened(inputs, HowToRead(key, steps, last, allow)), questions).choice
    notes = [] if output is None else choice._write(output, like, force)
    if as_json:
        written = None if output is None else str(output)
        typer.echo(json.dumps(choice.to_dict() | {"output": written, "notes": notes}, indent=2))
        return
    typer.echo(str(choice))
    if output is not None:
        for line in (*notes, _terminal.wrote(output)):
            typer.echo(_terminal.printable(line))


# ``polyak report``: one page about a run.

# Every point costs an evaluation; from half the way before the live weights to as far beyond the average.
_POSITIONS = tuple(step / 8 for step in range(-4, 13))


def report(
    inputs: Annotated[
        list[str],
        typer.Argument(help="A recorded run, or checkpoints, folders of them, and patterns."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write, ending in .html.")],
    model: Annotated[
        str | None, typer.Option(help="package.module:function that builds the model; needs --score.")
    ] = None,
    score: Annotated[
        str | None, typer.Option(help="package.module:function that scores it, as for polyak select.")
    ] = None,
    mode: ModeOption = None,
    profiles: ProfilesOption = None,
    recalibrate: RecalibrateOption = None,
    holdout: HoldoutOption = None,
    prepare: PrepareOption = None,
    key: KeyOption = None,
    steps: StepsOption = None,
    last: LastOption = None,
    allow: AllowOption = None,
    title: Annotated[str | None, typer.Option(help="The heading; by default the folder's name.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a page that is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print every candidate as JSON.")] = False,
) -> None:
    """Write one self-contained page about a run: which weights to ship, what that brings, and how the run went.

    \b
    polyak report run/ -o report.html
    polyak report 'ckpts/step-*.pt' -o report.html
    polyak report run/ -o report.html --model my.model:build --score my.data:losses
    polyak report run/ -o report.html --model my.model:build --score my.data:losses \\
        --recalibrate my.data:loader --holdout my.data:test_losses

    With a model and a score it also chooses, as polyak select does, and looks along the line from the live weights
    to the best average. The page says first whether to ship the average, how surely, and what writes it; a holdout
    makes that sure. It needs no network and holds no scripts.
    """
    from polyak.report import refuse_output, write_report

    if (model is None) != (score is None):
        raise OptionError("--model and --score belong together: give both, or neither")
    if model is None and (mode or profiles or recalibrate or holdout or prepare):
        raise OptionError(
            "--mode, --profiles, --recalibrate, --holdout and --prepare are about scores: give --model and --score"
        )
    refuse_output(output, overwrite=force)
    how = HowToRead(key, steps, last, allow)
    trajectory = opened(inputs, how)
    selection = line = command = None
    if model is not None and score is not None:
        questions = Questions(model, score, mode, profiles, recalibrate, holdout, prepare)
        answers = answered(trajectory, questions)
        selection, line = answers.choice, _line(trajectory, answers)
        command = _writing(inputs, questions, how, selection)
    write_report(
        trajectory, output, selection=selection, line=line, title=title, command=command, overwrite=force
    )
    if as_json:
        found = {} if selection is None else selection.to_dict()
        typer.echo(json.dumps(found | {"output": str(output)}, indent=2))
        return
    if selection is not None:
        typer.echo(selection.verdict)
    typer.echo(_terminal.wrote(output))


def _writing(inputs: list[str], asked: Questions, how: HowToRead, choice: polyak.Selection) -> str:
    """The command that writes the best average: it is scored once more beside the live weights, and wins again."""
    options = {
        "--model": [asked.model],
        "--score": [asked.score],
        "--mode": [] if asked.mode is None else [asked.mode.value],
        "--recalibrate": [] if asked.recalibrate is None else [asked.recalibrate],
        "--prepare": [] if asked.prepare is None else [asked.prepare],
        "--key": [] if how.key is None else [how.key],
        "--steps": [] if how.steps is None else [how.steps],
        "--last": [] if how.last is None else [str(how.last)],
        "--allow": how.allow or [],
        "--profiles": [str(choice.best_average.profile)],
        "--output": ["averaged.safetensors"],
    }
    words = ["polyak", "select", *inputs]
    words += [word for option, values in options.items() for value in values for word in (option, value)]
    return shlex.join(words)


def _line(trajectory: polyak.Trajectory, answers: Answers) -> PathScores:
    from polyak import landscape
    from polyak.selection._result import LIVE, RECALIBRATED, shortened

    best = answers.choice.best_average.profile
    assert best is not None, "an average has a profile"
    # Statistics are recomputed all along the line, so its end has the name that such live weights have elsewhere.
    live = RECALIBRATED if RECALIBRATED in {candidate.name for candidate in answers.choice.table} else LIVE
    (average,) = trajectory.average_many([best])
    return landscape.path(
        answers.network,
        {live: trajectory.live(), shortened(str(best)): average},
        answers.score,
        mode=answers.choice.mode,
        positions=_POSITIONS,
        recalibrate=answers.batches,
        prepare=answers.prepare,
        progress=sys.stderr.isatty(),
    )
