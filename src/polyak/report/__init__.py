"""One self-contained page about a run: what was recorded, how it moved, which average is best."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.resources import files
from os import PathLike
from pathlib import Path
from typing import Any

from polyak import _terminal
from polyak._checks import checked, require
from polyak._evaluate import refuse_no_trajectory
from polyak._version import __version__
from polyak.checkpoints import _io
from polyak.errors import CheckpointError, OptionError
from polyak.inspection import measure_movement
from polyak.landscape import PathScores
from polyak.report import _charts
from polyak.report._answer import answer, diverged_in
from polyak.selection import Selection, _result
from polyak.trajectory import Trajectory

__all__ = ["write_report"]

_SUFFIXES = (".html", ".htm")
_SETTLED = "How long to average, the scores above have settled."


@checked
def write_report(
    trajectory: Trajectory,
    path: str | PathLike[str],
    *,
    selection: Selection | None = None,
    line: PathScores | None = None,
    title: str | None = None,
    command: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write one self-contained HTML page about a run, without scripts and without anything from elsewhere.

    It says first whether to ship the average or to keep the live weights, what that brings, how surely, and what
    writes them (where ``selection`` is given). Below are the candidates, the score along the line from the live
    weights to the average (``line``), the metrics and learning rate along the run, whether it drifted or circled, how
    much each step counts, and every block. It is light or dark as the reader's system is, and fits a telephone.
    Equal inputs give equal pages on the same day, which the page names.

    An average is shipped if it is better than the live weights beyond noise: on the holdout, where there is one, or
    else on the data that it was chosen on, with an interval that allows for the choice. Where the score is one
    number, noise is unknown, and the holdout must be better. Of a run that diverged neither is: where, late in the run,
    neighbouring blocks lie apart by more than five times the weights' size.

    Args:
        trajectory: a recorded run, or a folder of checkpoints. All blocks are read, in slices.
        path: the page, ending in ``.html`` or ``.htm``.
        selection: what :func:`polyak.select` found on this trajectory.
        line: what :func:`polyak.landscape` found, such as between the live weights and the best average.
        title: the heading; None: the name of the run's folder.
        command: a command line that writes the chosen average, to be shown; None: the Python that does.
        overwrite: replace a page that is there.

    Raises:
        OptionError: ``path`` does not end in ``.html`` or ``.htm``.
        NotStartedError: the trajectory holds no block yet.
        CheckpointError: not one block can be read.
        OutputExistsError: ``path`` exists and ``overwrite`` is False.
        MissingExtraError: matplotlib or jinja2 is not installed.

    >>> import tempfile, torch, polyak
    >>> folder = tempfile.TemporaryDirectory()
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> with polyak.Recorder(model, f"{folder.name}/run", block=1) as run:
    ...     for value in (1.0, 3.0, 1.0, 3.0):
    ...         _ = model.weight.data.fill_(value)
    ...         run.update(loss=value)
    >>> polyak.report.write_report(run.trajectory, f"{folder.name}/report.html")
    >>> page = Path(f"{folder.name}/report.html").read_text()
    >>> "Circling" in page, "<script" in page
    (True, False)
    >>> folder.cleanup()
    """
    output = Path(path)
    refuse_output(output, overwrite=overwrite)
    import jinja2

    refuse_no_trajectory(trajectory)
    if not isinstance(selection, Selection | None) or not isinstance(line, PathScores | None):
        raise OptionError(
            "selection must be what polyak.select returns, and line what polyak.landscape returns"
        )
    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=_printable,
    )
    template = environment.from_string(files("polyak.report").joinpath("page.html").read_text("utf-8"))
    page = template.render(_contents(trajectory, selection, line, title or trajectory.name, command))
    _io.write_file(output, page.encode("utf-8", "replace"), overwrite=overwrite)


def _printable(value: Any) -> Any:
    """What a page shows of a value: a bidirectional control in a name would turn around what stands beside it."""
    if hasattr(value, "__html__"):  # markup of the page's own
        return value
    return "\n".join(map(_terminal.printable, str(value).split("\n")))


def refuse_output(path: Path, *, overwrite: bool) -> None:
    """Say that no page can be written there before anything is read or scored.

    Raises:
        OptionError: ``path`` does not end in ``.html`` or ``.htm``, or is a folder.
        OutputExistsError: it exists and ``overwrite`` is False.
        CheckpointError: there is no such folder, or it may not be written to.
        MissingExtraError: matplotlib or jinja2 is not installed.
    """
    if path.suffix.lower() not in _SUFFIXES or path.is_dir():
        raise OptionError(f"a report is a page, a file whose name must end in .html: {path} is not")
    _io.AtomicOutput(path, overwrite)
    for module in ("jinja2", "matplotlib"):
        require(module, extra="report", purpose="writing a report")


def _contents(
    trajectory: Trajectory,
    selection: Selection | None,
    line: PathScores | None,
    title: str,
    command: str | None,
) -> dict[str, Any]:
    blocks = trajectory.blocks
    best = None if selection is None else selection.best_average.profile
    explained = _charts.shown_profiles(trajectory, best)
    usable = trajectory.usable  # every block is compared with its checksum
    if not usable.blocks:
        raise CheckpointError(f"no block can be read: {next(iter(trajectory.damaged.values()))}")
    if line is not None and not any(map(math.isfinite, line.scores)):
        line = None  # a picture of nothing
    read = [checkpoint for checkpoint in usable.checkpoints if checkpoint is not None]
    movement = measure_movement(read)
    charts, constant = _charts.metric_charts(blocks)
    return {
        "title": title,
        "answer": answer(trajectory, selection, command, diverged_in(usable.blocks, movement)),
        "facts": _facts(trajectory, usable, selection, _newest(one.path for one in read)),
        "damaged": list(trajectory.damaged.values()),
        "selection": selection,
        "headings": _result.HEADINGS,
        "rows": [] if selection is None else _result.as_rows(selection, selection.table),
        "candidates": None if selection is None else _charts.candidates_chart(selection),
        "line": line,
        "line_chart": None if line is None else _charts.line_chart(line),
        "metric_charts": charts,
        "constant": constant,
        "movement": f"{movement.finding} {_SETTLED}" if selection else movement.verdict,
        "movement_charts": list(_charts.movement_charts(usable.blocks, movement)),
        "explained": explained,
        "profiles": _charts.profiles_chart(explained, best) if explained else None,
        "warnings": list(dict.fromkeys(warning for one in explained for warning in one.warnings)),
        "blocks": blocks,
        "metrics": list(dict.fromkeys(name for block in blocks for name in block.metrics)),
        "counted": _terminal.counted,
        "shortened": _result.shortened,
    }


def _facts(
    trajectory: Trajectory, usable: Trajectory, selection: Selection | None, newest: float
) -> dict[str, str]:
    """What was measured: on what, how much of it, when, from where."""
    blocks = trajectory.blocks
    samples, skipped = (sum(getattr(block, what) for block in blocks) for what in ("count", "skipped"))
    recorded = (
        f"{_terminal.counted(len(blocks), 'block')} of {_terminal.counted(samples, 'sample')} of the weights"
    )
    left_out = f", {skipped:,} left out as they were not finite" if skipped else ""
    facts = {
        "Run": f"{trajectory._place}, optimizer steps {blocks[0].start:,} to {blocks[-1].stop:,}",
        "Recorded": f"{recorded}{left_out}; the newest is of {_day(newest)}",
        "Size": f"an average takes {_terminal.size(usable.average_bytes)}",
    }
    if selection is not None:
        averages = sum(candidate.profile is not None for candidate in selection.table)
        facts["Scored"] = (
            f"{_terminal.counted(averages, 'average')} and the live weights, {_examples(selection.examples)}; "
            f"{selection.better}{'; each as prepare made it' if selection.prepared else ''}"
        )
        if selection.holdout is not None:
            facts["Holdout"] = (
                f"the best average and the live weights, {_examples(selection.holdout.examples)}"
            )
    return facts | {"Written": f"{_day(time.time())}, by polyak {__version__}"}


def _newest(paths: Iterable[Path]) -> float:
    """When the newest of the files was written, which is now where one has been merged away since it was opened."""
    try:
        return max(path.stat().st_mtime for path in paths)
    except FileNotFoundError:
        return time.time()


def _examples(count: int | None) -> str:
    return "one number for each" if count is None else f"on {_terminal.counted(count, 'example')}"


def _day(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d}"
