"""One self-contained page about a run: what was recorded, how it moved, which average is best."""

from __future__ import annotations

import math
from base64 import b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from polyak import _plots, _terminal
from polyak._checks import require
from polyak._evaluate import refuse_no_trajectory
from polyak._version import __version__
from polyak.checkpoints import _io
from polyak.errors import CheckpointError, OptionError
from polyak.inspection import Movement, measure_movement
from polyak.landscape import PathScores
from polyak.profiles import EMA, Decay, Power, Profile, Tail
from polyak.selection import Selection, _result
from polyak.trajectory import Block, Explanation, Trajectory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["write_report"]

# The pictures of a report, from a trajectory and from what was found about it.

_STEPS = "optimizer steps"
_MOST_PROFILES = 4  # lines that can still be told apart


def metric_charts(blocks: Sequence[Block]) -> Iterator[tuple[str, Figure]]:
    """The learning rate and each metric that was recorded, as means over blocks: name and figure."""
    metrics = dict.fromkeys(name for block in blocks for name in block.metrics)
    followed = [("learning rate", [block.lr for block in blocks])]
    followed += [(name, [block.metrics.get(name) for block in blocks]) for name in metrics]
    for name, summaries in followed:
        # Where a block has none the line is broken.
        means = [math.nan if summary is None else summary.mean for summary in summaries]
        if sum(map(math.isfinite, means)) > 1:
            steps = [block.stop for block in blocks]
            yield name, _plots.line_chart(name, _STEPS, name, {name: (steps, means)})


def movement_charts(blocks: Sequence[Block], movement: Movement) -> Iterator[tuple[str, Figure]]:
    """How far each block lies from the one before, and how the path turned there: name and figure."""
    steps = [block.stop for block in blocks[1:]]
    for name, values in (
        ("relative distance", [n.relative_distance for n in movement.neighbours]),
        ("turn", [n.turn for n in movement.neighbours]),
    ):
        found = [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]
        if len(found) > 1:
            x, y = zip(*found, strict=True)
            yield name, _plots.line_chart(f"{name} from block to block", _STEPS, name, {name: (x, y)})


def shown_profiles(trajectory: Trajectory, best: Profile | None) -> list[Explanation]:
    """The best profile, if one was chosen, and usual ones beside it, as far as the blocks resolve them."""
    steps = trajectory.blocks[-1].stop - trajectory.blocks[0].start
    if not steps:  # a single checkpoint of step 0
        return []
    usual = (Decay("sqrt", 0.4), Tail(0.4), EMA(half_life=0.1 * steps), Power(gamma=4))
    explained = []
    for profile in dict.fromkeys(usual if best is None else (best, *usual)):
        try:
            explained.append(trajectory.explain(profile))
        except OptionError:
            continue
    return explained[:_MOST_PROFILES]


def profile_chart(explained: Sequence[Explanation]) -> Figure:
    """How much a step counts under each profile, as a multiple of its share in the mean of the whole run."""
    return _plots.line_chart(
        "How much each step counts",
        _STEPS,
        "times the plain mean",
        {_result.shortened(str(e.profile)): _stairs(e) for e in explained},
    )


def _stairs(explained: Explanation) -> tuple[list[float], list[float]]:
    # A checkpoint of step 0 stands for no steps.
    long = [
        (block, a) for block, a in zip(explained.blocks, explained.coefficients, strict=True) if block.steps
    ]
    starts, stops = ([getattr(block, end) for block, _ in long] for end in ("start", "stop"))
    total = stops[-1] - starts[0]
    heights = [a * total / block.steps for block, a in long]
    return np.ravel([starts, stops], order="F").tolist(), np.repeat(heights, 2).tolist()


# The page: what is known of a run, put into one HTML file.

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
        line: what :func:`polyak.landscape` found, such as between the live weights and the best average.
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
            "selection must be what polyak.select returns, and line what polyak.landscape returns"
        )
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(files("polyak.report").joinpath("page.html").read_text("utf-8"))
    page = template.render(_contents(trajectory, selection, line, title or trajectory.name))
    _io.write_file(output, page.encode("utf-8", "replace"), overwrite=overwrite)


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
    trajectory: Trajectory, selection: Selection | None, line: PathScores | None, title: str
) -> dict[str, Any]:
    blocks = trajectory.blocks
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
        "average_size": _terminal.size(usable.average_bytes),
        "counted": _terminal.counted,
        "shortened": _result.shortened,
        "damaged": trajectory.damaged,
        "selection": selection,
        "headings": _result.HEADINGS,
        "rows": [] if selection is None else _result.as_rows(selection, selection.table),
        "live": _result.LIVE,
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
    return _Picture(name, f"data:image/svg+xml;base64,{b64encode(_plots.svg_bytes(figure)).decode()}")
