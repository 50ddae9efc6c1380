"""``polyak inspect``, ``polyak profiles`` and ``polyak demo``."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from polyak import _terminal
from polyak.cli._average import AllowOption
from polyak.errors import CheckpointError, OptionError, name_list

if TYPE_CHECKING:
    from polyak import inspection

# ``polyak inspect``: what is at a path, and what differs between two.


def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            readable=False, help="A checkpoint (file or folder), a folder of them, or a recorded run."
        ),
    ],
    other: Annotated[
        Path | None, typer.Argument(readable=False, help="A second checkpoint to compare with.")
    ] = None,
    key: Annotated[
        list[str] | None,
        typer.Option(help="Nested key of the weights; given twice, one for each of two paths."),
    ] = None,
    allow: AllowOption = None,
    movement: Annotated[
        bool, typer.Option("--movement", help="For a folder: read all weights and measure how they moved.")
    ] = False,
    show_all: Annotated[bool, typer.Option("--all", help="List everything, however long.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, always complete.")] = False,
) -> None:
    """Say what is in a checkpoint, a folder or a recorded run, or how two checkpoints differ.

    \b
    polyak inspect model.safetensors             what it is, tensors, dtypes, sizes, ties, metadata
    polyak inspect last.pth --key state_dict     other weights than those chosen by default
    polyak inspect checkpoints/                  a row for each: step, size, same layout or not
    polyak inspect checkpoints/ --movement       also: does the run drift on, or circle around one place?
    polyak inspect run                           blocks, steps, metrics, and how the run moved between them
    polyak inspect a.safetensors b.pt            what differs, and by how much, in any formats
    polyak inspect last.pth last.pth --key state_dict --key state_dict_ema

    Nothing is changed, no code in a file is run, and weights are read only to compare them, in slices. The
    relative distance of a to b is |a - b| / |a|. Exit code 2 if something cannot be read.
    """
    from polyak import inspection

    paths = 1 if other is None else 2
    keys = key or [None]
    if len(keys) > paths:
        raise OptionError(f"{len(keys)} keys for {paths} path{'s'[: paths - 1]}: give at most one for each")
    if other is None:
        summary = inspection.describe(path, keys[0], movement=movement, allow=allow or ())
    elif movement:
        raise OptionError("--movement is measured along one folder of checkpoints: leave the second path out")
    else:
        summary = inspection.compare(path, other, keys[0], keys[-1], allow=allow or ())
    _show(summary, show_all, as_json)
    if isinstance(summary, inspection.FolderSummary) and summary.unreadable:
        names = name_list([row.name for row in summary.unreadable])
        raise CheckpointError(
            f"{len(summary.unreadable)} of {len(summary.rows)} checkpoints in {path} cannot be read: {names}"
        )


def _show(summary: inspection.Summary, show_all: bool, as_json: bool) -> None:
    from polyak.inspection._views import view

    if as_json:
        typer.echo(json.dumps(summary.to_dict(), indent=2, allow_nan=False))
    else:
        _terminal.console().print(view(summary, show_all))


# ``polyak profiles``: what may follow --profile.


def profiles(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with the unit of each.")] = False,
) -> None:
    """List the profiles: how each is written, and how much it says that each step of a run counts.

    They follow --profile, and --profiles takes several between spaces. F(t, T) is the share of the weight that lies on
    the first t of T steps or samples, c_n what an average that follows training takes of its n-th sample.
    """
    from polyak.profiles import parse, registered

    known = {
        name: {
            "examples": list(cls.examples),
            "weights": (cls.__doc__ or "").partition("\n")[0].replace("``", ""),
            "counts": sorted({parse(example).unit for example in cls.examples}),
        }
        for name, cls in registered().items()
    }
    if as_json:
        typer.echo(json.dumps(known, indent=2, ensure_ascii=False))
        return
    rows = _terminal.table("profile", "weights")
    for name, profile in known.items():
        rows.add_row("\n".join(profile["examples"]) or name, str(profile["weights"]))
    _terminal.console().print(rows)


# ``polyak demo``: train on real data, average, compare, show.


class TaskName(StrEnum):
    """The tasks of the demo."""

    digits = "digits"
    text = "text"


def demo(
    task: Annotated[
        TaskName, typer.Option(help="What to train: digits and text take half a minute to two minutes each.")
    ] = TaskName.digits,
    seeds: Annotated[
        int | None, typer.Option(help="Seeds to report on, 2 or more; by default 8 for digits, 5 for text.")
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Two seeds, the decay tuned on one: under half a minute on two cores."),
    ] = False,
    output: Annotated[Path, typer.Option(help="Folder for TASK.json, TASK.png and TASK.txt.")] = Path(
        "polyak-demo"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print what TASK.json holds, and no more.")] = False,
) -> None:
    """Train on real data, average the weights, choose an average, and say plainly whether that helped.

    Every candidate is held against the live weights and against the best learning-rate decay, which is
    tuned on other seeds; each difference comes with a paired t-test over seeds. Each run is recorded, and what the
    verdict is about is the average that select chose from the recorded run, by validation.

    \b
    polyak demo                       digits: SWA and EMA, with and without update_bn
    polyak demo --quick               the same on two seeds, which prove little
    polyak demo --seeds 20            the same, with narrower intervals
    polyak demo --task text           a byte language model: tail average, EMA, power
    polyak demo --output results      put the files there

    The verdict and the table are printed and written to TASK.txt, the curves drawn in TASK.png, and all
    numbers and settings kept in TASK.json; the same seeds give the same TASK.json, byte for byte. A former
    demo's three files are rewritten; anything else in the folder is left alone, and files of these names that
    no demo made are refused. Needs: pip install 'polyak[demo]'
    """
    from polyak.demo import _tasks
    from polyak.demo._show import Outputs, show

    chosen = _tasks.quick(_tasks.TASKS[task.value]) if quick else _tasks.TASKS[task.value]
    show(chosen, chosen.seeds if seeds is None else seeds, Outputs(output, chosen.name), as_json=as_json)
