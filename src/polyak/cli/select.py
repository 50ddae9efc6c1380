"""``polyak select``: score the averages of a run, say which is best, write it."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polyak.cli.inputs import expanded, imported

if TYPE_CHECKING:
    from polyak.trajectory import Trajectory


class Mode(StrEnum):
    """Which scores are better."""

    min = "min"
    max = "max"


def select(
    inputs: Annotated[
        list[str],
        typer.Argument(help="A recorded trajectory, or checkpoints, folders of them, and patterns."),
    ],
    model: Annotated[str, typer.Option(help="package.module:function that builds the model.")],
    score: Annotated[
        str, typer.Option(help="package.module:function that takes the model; see below what it returns.")
    ],
    mode: Annotated[Mode, typer.Option(help="Whether lower or higher scores are better.")] = Mode.min,
    profiles: Annotated[
        list[str] | None,
        typer.Option(help="What to try: 'tail:0.4 decay:sqrt:0.4'; may be repeated. By default a grid."),
    ] = None,
    recalibrate: Annotated[
        str | None,
        typer.Option(help="package.module:function that returns batches for BatchNorm statistics."),
    ] = None,
    holdout: Annotated[
        str | None, typer.Option(help="Like --score, on data that nothing is chosen on.")
    ] = None,
    key: Annotated[
        str | None, typer.Option(help="Nested key of the checkpoints' weights; by default the best known.")
    ] = None,
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
    import polyak
    from polyak.selection.weights import apply_weights

    _refuse_output(output, force)
    build, score_model = imported("--model", model), imported("--score", score)
    score_holdout = None if holdout is None else imported("--holdout", holdout)
    batches = None if recalibrate is None else imported("--recalibrate", recalibrate)()
    trajectory = _opened(expanded(inputs), key)
    network = _built(model, build)
    apply_weights(network, trajectory.live())
    choice = polyak.select(
        trajectory,
        network,
        score=score_model,
        mode=mode.value,
        profiles=None if profiles is None else " ".join(profiles).split(),
        recalibrate=batches,
        holdout=score_holdout,
        progress=sys.stderr.isatty(),
    )
    if output is not None:
        choice.write(output, overwrite=force)
    if as_json:
        written = None if output is None else str(output)
        typer.echo(json.dumps(choice.to_dict() | {"output": written}, indent=2))
    else:
        typer.echo(str(choice) if output is None else f"{choice}\nWritten: {output}")


def _opened(paths: list[Path], key: str | None) -> Trajectory:
    from polyak import Trajectory
    from polyak.combine.inputs import open_inputs
    from polyak.errors import OptionError
    from polyak.trajectory.manifest import Manifest

    if Manifest.exists(paths[0]):
        if len(paths) > 1 or key is not None:
            raise OptionError(f"{paths[0]} is a recorded trajectory: give it alone, and no --key")
        return Trajectory(paths[0])
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


def _refuse_output(output: Path | None, force: bool) -> None:
    """Say that nothing can be written there before anything is scored."""
    from polyak.checkpoints.formats import format_for
    from polyak.errors import CheckpointError, OutputExistsError

    if output is None:
        return
    format_for(output, None)
    if not output.absolute().parent.is_dir():
        raise CheckpointError(f"cannot write {output}: there is no folder {output.parent}; make it first")
    if output.exists() and not force:
        raise OutputExistsError(f"{output} exists: give another name, or --force to replace it")
