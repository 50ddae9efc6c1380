"""``polyak select``: score the averages of a run, say which is best, write it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from polyak.cli.choosing import (
    HoldoutOption,
    KeyOption,
    Mode,
    ModeOption,
    ProfilesOption,
    Questions,
    RecalibrateOption,
    answered,
    opened,
)
from polyak.cli.inputs import expanded


def select(
    inputs: Annotated[
        list[str],
        typer.Argument(help="A recorded trajectory, or checkpoints, folders of them, and patterns."),
    ],
    model: Annotated[str, typer.Option(help="package.module:function that builds the model.")],
    score: Annotated[
        str, typer.Option(help="package.module:function that takes the model; see below what it returns.")
    ],
    mode: ModeOption = Mode.min,
    profiles: ProfilesOption = None,
    recalibrate: RecalibrateOption = None,
    holdout: HoldoutOption = None,
    key: KeyOption = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the model with the best weights here.")
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

    The score function gets the model in evaluation mode and returns a number, or a tensor with one loss per
    example: then every difference to the live weights comes with a paired interval. The live weights are the
    newest checkpoint, or those that the recorder kept. Modules are looked for in the working directory too,
    and run: this command executes your code, never code in a checkpoint.
    """
    from polyak.checkpoints.atomic import AtomicOutput
    from polyak.checkpoints.formats import format_for

    if output is not None:
        format_for(output, None)
        AtomicOutput(output, overwrite=force)  # refused before anything is scored
    questions = Questions(model, score, mode, profiles, recalibrate, holdout)
    choice = answered(opened(expanded(inputs, "--profiles"), key), questions).choice
    if output is not None:
        choice.write(output, overwrite=force)
    if as_json:
        written = None if output is None else str(output)
        typer.echo(json.dumps(choice.to_dict() | {"output": written}, indent=2))
    else:
        typer.echo(str(choice) if output is None else f"{choice}\nWritten: {output}")
