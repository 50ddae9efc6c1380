"""``polyak report``: one page about a run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from polyak.cli.choosing import (
    HoldoutOption,
    KeyOption,
    Mode,
    ProfilesOption,
    Questions,
    RecalibrateOption,
    answered,
    opened,
)
from polyak.cli.inputs import expanded

if TYPE_CHECKING:
    from polyak.cli.choosing import Answers
    from polyak.landscape import PathScores
    from polyak.trajectory import Trajectory

# Every point costs an evaluation; from half the way before the live weights to as far beyond the average.
_POSITIONS = tuple(step / 8 for step in range(-4, 13))


def report(
    inputs: Annotated[
        list[str],
        typer.Argument(help="A recorded trajectory, or checkpoints, folders of them, and patterns."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write, ending in .html.")],
    model: Annotated[
        str | None, typer.Option(help="package.module:function that builds the model; needs --score.")
    ] = None,
    score: Annotated[
        str | None, typer.Option(help="package.module:function that scores it, as for polyak select.")
    ] = None,
    mode: Annotated[
        Mode | None, typer.Option(help="Whether lower or higher scores are better; lower by default.")
    ] = None,
    profiles: ProfilesOption = None,
    recalibrate: RecalibrateOption = None,
    holdout: HoldoutOption = None,
    key: KeyOption = None,
    title: Annotated[str | None, typer.Option(help="The heading; by default the folder's name.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a page that is there.")] = False,
) -> None:
    """Write one self-contained page about a run: metrics, movement, profiles, and which average is best.

    \b
    polyak report run/ -o report.html
    polyak report 'ckpts/step-*.pt' -o report.html
    polyak report run/ -o report.html --model my.model:build --score my.data:losses
    polyak report run/ -o report.html --model my.model:build --score my.data:losses \\
        --recalibrate my.data:loader --holdout my.data:test_losses

    With a model and a score it also chooses, as polyak select does, and looks along the line from the live weights
    to the best average. The page needs no network and holds no scripts.
    """
    from polyak.errors import OptionError
    from polyak.report.page import refuse_output, write_report

    if (model is None) != (score is None):
        raise OptionError("--model and --score belong together: give both, or neither")
    if model is None and (mode or profiles or recalibrate or holdout):
        raise OptionError(
            "--mode, --profiles, --recalibrate and --holdout are about scores: give --model and --score"
        )
    refuse_output(output, overwrite=force)
    trajectory = opened(expanded(inputs, "--profiles"), key)
    selection = line = None
    if model is not None and score is not None:
        answers = answered(
            trajectory, Questions(model, score, mode or Mode.min, profiles, recalibrate, holdout)
        )
        selection, line = answers.choice, _line(trajectory, answers)
    write_report(trajectory, output, selection=selection, line=line, title=title, overwrite=force)
    typer.echo(f"Written: {output}" if selection is None else f"{selection.verdict}\nWritten: {output}")


def _line(trajectory: Trajectory, answers: Answers) -> PathScores:
    from polyak import landscape
    from polyak.selection.table import shortened

    best = answers.choice.best_average.profile
    assert best is not None, "an average has a profile"
    return landscape.path(
        answers.network,
        {"live": trajectory.live(), shortened(str(best)): trajectory.average(best)},
        answers.score,
        mode=answers.choice.mode,
        positions=_POSITIONS,
        recalibrate=answers.batches,
        progress=sys.stderr.isatty(),
    )
