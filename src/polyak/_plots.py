"""Every figure that polyak draws, from plain numbers; matplotlib is imported only here, and only on use.

Figures are made through matplotlib's objects, never through ``pyplot``: no window opens, no global state
changes, and the user's own figures and backend are left alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from io import BytesIO
from typing import TYPE_CHECKING, Any, Literal, ParamSpec

import numpy as np
from numpy.typing import ArrayLike

from polyak._checks import require
from polyak.errors import OptionError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "Dot",
    "Line",
    "Mark",
    "Panel",
    "contour_chart",
    "dot_chart",
    "line_chart",
    "line_panels",
    "png_bytes",
    "svg_bytes",
]

# Grey for what the others are compared with, then Okabe and Ito's colours, told apart by all colour vision.
_COLOURS = ("#4D4D4D", "#E69F00", "#56B4E9", "#0072B2", "#009E73", "#CC79A7", "#D55E00")
_DOTS_PER_INCH = 150
_MOST_TEXT = 60

Arguments = ParamSpec("Arguments")


@dataclass(frozen=True)
class Line:
    """A line with a band: ``x`` has shape ``[points]`` and ``y`` ``[repeats, points]``, one row per seed."""

    label: str
    x: ArrayLike
    y: ArrayLike


@dataclass(frozen=True)
class Panel:
    """One pair of axes; ``y_limits`` cuts off what would squeeze the rest, ``None`` shows everything."""

    y_label: str
    lines: Sequence[Line]
    y_limits: tuple[float, float] | None = None


@dataclass(frozen=True)
class Dot:
    """A row of a chart: a value, and its interval where there is one."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Mark:
    """A named place on the horizontal axis."""

    label: str
    x: float


def _names_are_text(draw: Callable[Arguments, Figure]) -> Callable[Arguments, Figure]:
    """A metric called "$x_{y$" is no mathematics, and would be an error as such."""

    @wraps(draw)
    def drawn(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Figure:
        with _own_style():
            return draw(*args, **kwargs)

    return drawn


@_names_are_text
def line_panels(title: str, x_label: str, panels: Sequence[Panel]) -> Figure:
    """Panels side by side, each line the mean over its repeats in a band of one standard error either way.

    A label has the same colour in every panel, in order of first appearance.

    Raises:
        OptionError: if there are no lines, shapes do not fit, or there are more labels than colours.
        MissingExtraError: if matplotlib is not installed.

    >>> line = Line("live weights", x=[1, 2, 3], y=[[0.9, 0.5, 0.4], [0.8, 0.6, 0.4]])
    >>> figure = line_panels("Test scores", "epoch", [Panel("NLL", [line])])
    >>> png_bytes(figure)[1:4]
    b'PNG'
    """
    colours = _colours_by_label(panels)
    figure = _figure(width_inches=5.2 * len(panels), height_inches=4.6)
    axes_row = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, panel in zip(axes_row, panels, strict=True):
        _draw_panel(axes, panel, colours)
        axes.set_xlabel(x_label)
    handles = {line.get_label(): line for axes in axes_row for line in axes.get_lines()}
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=min(len(handles), 3),
        frameon=False,
    )
    figure.suptitle(title, fontsize=12)
    return figure


@_names_are_text
def dot_chart(title: str, x_label: str, dots: Sequence[Dot]) -> Figure:
    """Differences as dots with their intervals, one row each, the first on top; a line marks zero.

    Raises:
        OptionError: if there are no dots.
        MissingExtraError: if matplotlib is not installed.

    >>> figure = dot_chart("Candidates", "difference", [Dot("tail:0.4", -0.2, -0.3, -0.1), Dot("live", 0.0)])
    >>> [text.get_text() for text in figure.axes[0].get_yticklabels()]
    ['tail:0.4', 'live']
    """
    if not dots:
        raise OptionError("there is nothing to draw: give at least one dot")
    figure = _figure(width_inches=7.0, height_inches=1.6 + 0.22 * len(dots))
    axes = figure.subplots()
    rows = np.arange(len(dots))
    axes.axvline(0, color=_COLOURS[0], linewidth=0.8)
    axes.plot([dot.value for dot in dots], rows, "o", color=_COLOURS[3], markersize=4)
    for row, dot in zip(rows, dots, strict=True):
        if dot.low is not None and dot.high is not None:
            axes.hlines(row, dot.low, dot.high, color=_COLOURS[3], linewidth=1.4)
    axes.set_yticks(rows, [dot.label for dot in dots])
    axes.invert_yaxis()
    axes.set_xlabel(x_label)
    axes.set_title(title, fontsize=12)
    _lighten(axes, grid="x")
    return figure


@_names_are_text
def line_chart(
    title: str,
    x_label: str,
    y_label: str,
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    marks: Sequence[Mark] = (),
) -> Figure:
    """Lines over one pair of axes, each with points of its own; marks are named vertical lines.

    Raises:
        OptionError: if there are no lines, or more than colours.
        MissingExtraError: if matplotlib is not installed.

    >>> figure = line_chart("Along the line", "position", "loss", {"loss": ([0, 1], [2.0, 1.0])}, [Mark("live", 0)])
    >>> [text.get_text() for text in figure.axes[0].texts]
    ['live']
    """
    colours = _coloured(list(lines))
    figure = _figure(width_inches=7.0, height_inches=3.6)
    axes = figure.subplots()
    for label, (x, y) in lines.items():
        axes.plot(x, y, label=_printable(label), color=colours[label], linewidth=1.6)
    for mark in marks:
        axes.axvline(mark.x, color=_COLOURS[0], linewidth=0.8, linestyle=":")
        axes.annotate(
            _printable(mark.label),
            (mark.x, 1.0),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="bottom",
            fontsize=9,
        )
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=9)
    axes.set_xlabel(x_label)
    axes.set_ylabel(_printable(y_label))
    axes.set_title(_printable(title), fontsize=12, pad=18 if marks else 6)
    _lighten(axes)
    return figure


@_names_are_text
def contour_chart(
    title: str,
    x: Sequence[float],
    y: Sequence[float],
    values: Sequence[Sequence[float]],
    places: Mapping[str, tuple[float, float]],
) -> Figure:
    """Contours of ``values`` [len(y), len(x)] over a plane, and named places on it.

    Raises:
        MissingExtraError: if matplotlib is not installed.

    >>> figure = contour_chart("Plane", [0, 1], [0, 1], [[1.0, 2.0], [2.0, 3.0]], {"live": (0.5, 0.5)})
    >>> [text.get_text() for text in figure.axes[0].texts]
    ['live']
    """
    figure = _figure(width_inches=6.4, height_inches=4.8)
    axes = figure.subplots()
    filled = axes.contourf(x, y, np.asarray(values), levels=24, cmap="cividis")
    figure.colorbar(filled, ax=axes, label="score")
    for name, (right, up) in places.items():
        axes.plot([right], [up], "o", color="white", markeredgecolor="black", markersize=7)
        box = {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
        axes.annotate(
            _printable(name), (right, up), xytext=(6, 6), textcoords="offset points", fontsize=9, bbox=box
        )
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_xlabel("distance")
    axes.set_ylabel("distance")
    axes.set_title(title, fontsize=12)
    return figure


def png_bytes(figure: Figure) -> bytes:
    """The figure as a PNG file; the same figure gives the same bytes."""
    # By default the file names matplotlib's version.
    return _saved(figure, format="png", dpi=_DOTS_PER_INCH, metadata={"Software": None})


def svg_bytes(figure: Figure) -> bytes:
    """The figure as an SVG file; the same figure gives the same bytes."""
    # By default it says when it was made.
    return _saved(figure, format="svg", metadata={"Date": None, "Creator": None})


def _saved(figure: Figure, **options: Any) -> bytes:
    buffer = BytesIO()
    with _own_style(), warnings.catch_warnings():
        # A box stands for a letter that matplotlib's own font has not.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(buffer, **options)
    return buffer.getvalue()


@contextmanager
def _own_style() -> Iterator[None]:
    """matplotlib's defaults, whatever the user has set; text is text, and names within a file are not random."""
    require("matplotlib", extra="demo", purpose="drawing figures")
    from matplotlib import style

    with style.context(["default", {"text.parse_math": False, "svg.hashsalt": "polyak"}]):
        yield


def _figure(width_inches: float, height_inches: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_inches, height_inches), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _colours_by_label(panels: Sequence[Panel]) -> dict[str, str]:
    return _coloured(list(dict.fromkeys(line.label for panel in panels for line in panel.lines)))


def _coloured(labels: Sequence[str]) -> dict[str, str]:
    if not labels:
        raise OptionError("there is nothing to draw: give at least one panel with a line")
    if len(labels) > len(_COLOURS):
        raise OptionError(
            f"{len(labels)} labels are more than the {len(_COLOURS)} colours that can be told apart; "
            f"draw fewer lines"
        )
    return dict(zip(labels, _COLOURS, strict=False))


def _draw_panel(axes: Axes, panel: Panel, colours: dict[str, str]) -> None:
    for line in panel.lines:
        x, y = np.asarray(line.x, float), np.asarray(line.y, float)
        if y.ndim != 2 or x.shape != y.shape[1:]:
            raise OptionError(
                f"line {line.label!r} needs x [points] and y [repeats, points]; "
                f"got {list(x.shape)} and {list(y.shape)}"
            )
        mean = y.mean(axis=0)
        axes.plot(x, mean, label=line.label, color=colours[line.label], linewidth=1.8)
        if len(y) > 1:
            error = y.std(axis=0, ddof=1) / np.sqrt(len(y))
            axes.fill_between(
                x, mean - error, mean + error, color=colours[line.label], alpha=0.2, linewidth=0
            )
    axes.set_ylabel(panel.y_label)
    if panel.y_limits:
        axes.set_ylim(panel.y_limits)
    _lighten(axes)


def _printable(text: str) -> str:
    """Without what no picture can hold, such as control characters; long text is cut."""
    clean = "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in text)
    return clean if len(clean) <= _MOST_TEXT else f"{clean[: _MOST_TEXT - 1]}…"


def _lighten(axes: Axes, grid: Literal["both", "x"] = "both") -> None:
    axes.grid(axis=grid, alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
