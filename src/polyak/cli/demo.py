"""``polyak demo``: train on real data, average, compare, show."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


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
    output: Annotated[Path, typer.Option(help="Folder for TASK.json, TASK.png and TASK.txt.")] = Path(
        "polyak-demo"
    ),
) -> None:
    """Train on real data, average the weights, choose an average, and say plainly whether that helped.

    Every candidate is held against the live weights and against the best learning-rate decay, which is
    tuned on other seeds; each difference comes with a paired t-test over seeds. Each run is recorded, and what the
    verdict is about is the average that select chose from the recording, by validation.

    \b
    polyak demo                       digits: SWA and EMA, with and without update_bn
    polyak demo --seeds 20            the same, with narrower intervals
    polyak demo --task text           a byte language model: tail average, EMA, power
    polyak demo --output results      put the files there

    The table and the verdict are printed and written to TASK.txt, the curves drawn in TASK.png, and all
    numbers and settings kept in TASK.json; the same seeds give the same TASK.json, byte for byte. A former
    demo's three files are rewritten; anything else in the folder is left alone, and files of these names that
    no demo made are refused. Needs: pip install 'polyak[demo]'
    """
    from rich.console import Console

    from polyak.demo.outputs import Outputs
    from polyak.demo.show import show
    from polyak.demo.tasks import TASKS

    chosen = TASKS[task.value]
    show(
        chosen,
        chosen.seeds if seeds is None else seeds,
        Outputs(output, chosen.name),
        Console(highlight=False),
    )
