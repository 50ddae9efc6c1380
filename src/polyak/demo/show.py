"""The whole demo: run a study before the user's eyes, print what came out, write the files."""

from __future__ import annotations

import os
from io import StringIO

from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from polyak.demo.figure import study_figure
from polyak.demo.outputs import Outputs
from polyak.demo.report import study_as_data, study_table
from polyak.demo.study import Study, check_seeds, run_count, run_study
from polyak.demo.tasks import Task
from polyak.demo.verdict import verdict
from polyak.extras import require
from polyak.plots import png_bytes

__all__ = ["show"]

_TEXT_FILE_COLUMNS = 100


def show(task: Task, seeds: int, outputs: Outputs, console: Console) -> None:
    """Run ``task`` on ``seeds`` seeds with a progress bar, print table and verdict, write ``outputs``.

    Raises:
        MissingExtraError, OptionError, OutputExistsError, CheckpointError: before any training.
    """
    check_seeds(task, seeds)
    for module in ("matplotlib", "scipy", "sklearn"):
        require(module, extra="demo", purpose="the demo")
    outputs.claim()
    console.print(_announcement(task, seeds))
    study = _run_with_progress(task, seeds, console)
    findings = Group(
        study_table(study),
        "\nWhat select found on the first seed, scored on validation, with test as the holdout:\n",
        Text(study.first_selection),
        "",
        *(Text(sentence) for sentence in verdict(study)),
    )
    outputs.write(study_as_data(study), png_bytes(study_figure(study)), _as_text(findings))
    console.print(findings)
    console.print(Text(f"\nWritten: {', '.join(str(path) for path in outputs.paths)}", style="dim"))


def _announcement(task: Task, seeds: int) -> Text:
    return Text(
        f"Training {task.description}: {run_count(task, seeds)} runs of {task.steps} steps.\n"
        f"The learning-rate decay is tuned on {len(task.tuning_seeds)} other seeds, for validation NLL; "
        f"the averages' settings were fixed beforehand, but for one that validation chooses after training. The "
        f"scores below are from the test set, which nothing was chosen on.\n"
    )


def _run_with_progress(task: Task, seeds: int, console: Console) -> Study:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("starting", total=run_count(task, seeds))
        return run_study(
            task,
            seeds,
            workers=min(os.cpu_count() or 1, seeds),
            on_run=lambda doing: progress.update(bar, advance=1, description=doing),
        )


def _as_text(findings: Group) -> str:
    console = Console(file=StringIO(), width=_TEXT_FILE_COLUMNS, color_system=None)
    with console.capture() as capture:
        console.print(findings)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"
