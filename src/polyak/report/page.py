"""The page: what is known of a run, put into one HTML file."""

from __future__ import annotations

import math
from base64 import b64encode
from dataclasses import dataclass
from importlib.resources import files
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal

from polyak._version import __version__
from polyak.checkpoints.atomic import AtomicOutput, write_file
from polyak.errors import CheckpointError, OptionError
from polyak.extras import require
from polyak.inspection import measure_movement
from polyak.inspection.views.parts import counted
from polyak.landscape import PathScores
from polyak.plots import svg_bytes
from polyak.report.charts import metric_charts, movement_charts, profile_chart, shown_profiles
from polyak.selection import Selection
from polyak.selection.table import HEADINGS, as_rows, shortened
from polyak.selection.trial import refuse_no_trajectory
from polyak.selection.verdict import LIVE
from polyak.trajectory import Explanation, Trajectory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["refuse_output", "write_report"]

_SUFFIXES = (".html", ".htm")


@dataclass(frozen=True)
class _Picture:
    name: str
    source: str
    """A data URI: the page needs no other file."""


def write_report(
    trajectory: Trajectory,
    path: str | PathLike[str],
    *,
    selection: Selection | None = None,
    line: PathScores | None = None,
    title: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write one self-contained HTML page about a run, without scripts and without anything from elsewhere.

    It shows what was chosen and how surely (where ``selection`` is given), the metrics and learning rate along the
    run, whether it drifted or circled, how much each step counts under the best profiles, the score along the line
    from the live weights to the chosen ones (``line``), and every block. Equal inputs give equal pages.

    Args:
        trajectory: a recorded run, or a folder of checkpoints. All blocks are read, in slices.
        path: the page, ending in ``.html`` or ``.htm``.
        selection: what :func:`polyak.select` found on this trajectory.
        line: what :func:`polyak.landscape.path` found, such as between the live weights and the best average.
        title: the heading; None: the name of the run's folder.
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
            "selection must be what polyak.select returns, and line what polyak.landscape.path returns"
        )
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(files("polyak.report").joinpath("page.html").read_text("utf-8"))
    page = template.render(_contents(trajectory, selection, line, title or trajectory.name))
    write_file(output, page.encode("utf-8", "replace"), overwrite=overwrite)


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
    AtomicOutput(path, overwrite)
    for module in ("jinja2", "matplotlib"):
        require(module, extra="report", purpose="writing a report")


def _contents(
    trajectory: Trajectory, selection: Selection | None, line: PathScores | None, title: str
) -> dict[str, Any]:
    blocks = trajectory.blocks
    candidates = [] if selection is None else selection.table
    best = None if selection is None else selection.best_average.profile
    explained = shown_profiles(trajectory, best)
    usable = trajectory.usable  # every block is compared with its checksum
    if not usable.blocks:
        raise CheckpointError(f"no block can be read: {next(iter(trajectory.damaged.values()))}")
    if line is not None and not any(map(math.isfinite, line.scores)):
        line = None  # a picture of nothing
    movement = measure_movement([checkpoint for checkpoint in usable.checkpoints if checkpoint is not None])
    return {
        "title": title,
        "version": __version__,
        "blocks": blocks,
        "samples": sum(block.count for block in blocks),
        "skipped": sum(block.skipped for block in blocks),
        "average_size": decimal(usable.average_bytes),
        "counted": counted,
        "shortened": shortened,
        "damaged": trajectory.damaged,
        "selection": selection,
        "headings": HEADINGS,
        "rows": as_rows(candidates),
        "live": LIVE,
        "selection_chart": None if selection is None else _picture("candidates", selection.plot()),
        "metric_charts": [_picture(name, figure) for name, figure in metric_charts(blocks)],
        "movement": movement,
        "movement_charts": [
            _picture(name, figure) for name, figure in movement_charts(usable.blocks, movement)
        ],
        "explained": explained,
        "profile_chart": _picture("weights of steps", profile_chart(explained)) if explained else None,
        "warnings": _warnings(explained),
        "line": line,
        "line_chart": None if line is None else _picture("line", line.plot()),
        "metrics": list(dict.fromkeys(name for block in blocks for name in block.metrics)),
    }


def _warnings(explained: list[Explanation]) -> list[str]:
    return list(dict.fromkeys(warning for one in explained for warning in one.warnings))


def _picture(name: str, figure: Figure) -> _Picture:
    return _Picture(name, f"data:image/svg+xml;base64,{b64encode(svg_bytes(figure)).decode()}")
