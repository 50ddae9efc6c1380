"""Every figure that polyak draws, from plain numbers; matplotlib is imported only here, and only on use.

Figures are made through matplotlib's objects, never through ``pyplot``: no window opens, no global state
changes, and the user's own figures and backend are left alone.

A title says what the figure shows. One colour stands for one thing in all of them: grey for the live weights, blue
for the average that was chosen. Lines are named where they end. What lies far out does not set the scale.
"""

from __future__ import annotations

import re
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from io import BytesIO
from typing import TYPE_CHECKING, Any, Literal, ParamSpec

import numpy as np
from numpy.typing import ArrayLike, NDArray

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
    "Role",
    "contour_chart",
    "dot_chart",
    "inline_svg",
    "levels_around",
    "line_panels",
    "png_bytes",
    "svg_bytes",
    "within_reach",
]

Role = Literal["live", "chosen", "other"]
"""What a line or dot stands for, which decides its colour."""

# Each colour of a figure by the name it has on a page, which may give it another one in the dark. All reach a contrast
# of 4.5 against white, as lines are named in their own colour; those of lines follow Okabe and Ito's, darkened.
_COLOURS = {
    "ink": "#1f2328",
    "muted": "#5c636b",
    "rule": "#d8dce1",
    "paper": "#ffffff",
    "live": "#5f5b57",
    "chosen": "#0b62b0",
    "line-1": "#a8480b",
    "line-2": "#00735a",
    "line-3": "#8e4a86",
    "line-4": "#7a6100",
}
_OTHERS = [name for name in _COLOURS if name.startswith("line-")]
_STYLE = {
    "text.parse_math": False,
    "svg.hashsalt": "polyak",
    "svg.fonttype": "none",
    "font.size": 9.5,
    "figure.titlesize": 10.5,
    "axes.xmargin": 0.02,
    "text.color": _COLOURS["ink"],
    "axes.labelcolor": _COLOURS["muted"],
    "axes.edgecolor": _COLOURS["rule"],
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _COLOURS["rule"],
    "grid.linewidth": 0.6,
    "xtick.color": _COLOURS["rule"],
    "ytick.color": _COLOURS["rule"],
    "xtick.labelcolor": _COLOURS["muted"],
    "ytick.labelcolor": _COLOURS["muted"],
    "axes.formatter.useoffset": False,
}
_DOTS_PER_INCH = 150
_MOST_TEXT = 60
# A panel is as wide as the page of a telephone, where a figure must be read as well.
_PANEL_INCHES = (4.6, 2.9)
_LETTERS_PER_INCH = 11.5
_LABEL_POINTS = 12.0
_MOST_TICKS = 6
# In distances between the quartiles: the first losses of a run are within, those of a broken average beyond.
_FAR_OUT = 10
# Levels above the worst of named places, in differences between it and the best.
_WALLS = (0.5, 1.25, 2.5, 4.5, 8, 14, 25, 45)
# In spreads of the dots that a chart is about.
_FAR_OFF = 4

Arguments = ParamSpec("Arguments")


@dataclass(frozen=True)
class Line:
    """A line with a band: ``x`` has shape ``[points]`` and ``y`` ``[repeats, points]``, one row per seed."""

    label: str
    x: ArrayLike
    y: ArrayLike
    role: Role = "other"


@dataclass(frozen=True)
class Dot:
    """A row of a chart: a value, and its interval where there is one; ``filled`` marks those that stand out."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    role: Role = "other"
    filled: bool = True


@dataclass(frozen=True)
class Mark:
    """A named place on the horizontal axis."""

    label: str
    x: float
    role: Role = "other"


@dataclass(frozen=True)
class Panel:
    """One pair of axes; ``y_limits`` cuts off what would squeeze the rest, ``None`` leaves out what is far out."""

    y_label: str
    lines: Sequence[Line]
    y_limits: tuple[float, float] | None = None
    marks: Sequence[Mark] = ()


def within_reach(values: ArrayLike) -> tuple[float, float]:
    """Limits that show ``values``, but for those that are not finite or far out, with a margin.

    Far out is what lies beyond the quartiles by more than ten times their distance.

    >>> within_reach([1.0, 2.0, 3.0, 1e9, float("nan")])
    (0.9, 3.1)
    """
    every = np.asarray(values, float).ravel()
    finite = every[np.isfinite(every)]
    if not finite.size:
        return 0.0, 1.0
    low, high = np.quantile(finite, [0.25, 0.75], method="lower")
    reach = _FAR_OUT * (high - low)
    near = finite[(finite >= low - reach) & (finite <= high + reach)] if reach else finite
    margin = 0.05 * np.ptp(near) or 0.05 * abs(float(near[0])) or 1.0
    return float(near.min() - margin), float(near.max() + margin)


def levels_around(
    values: ArrayLike, places: Sequence[float], mode: Literal["min", "max"]
) -> list[float] | None:
    """Contour levels that tell ``places``, scores of which "min" or "max" are better, from each other.

    Four steps from the best to the worst of them, two to what is better still, and ever longer ones up the walls: even
    steps would give all places one colour wherever walls are high. None where they all score the same.

    >>> levels_around([0.0, 100.0], places=[1.0, 2.0], mode="min")
    [0.0, 0.5, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.25, 4.5, 6.5, 10.0, 16.0, 27.0, 47.0]
    """
    sign = 1 if mode == "min" else -1
    losses = sign * np.asarray(values, float)
    losses = losses[np.isfinite(losses)]
    low, high = sorted(sign * place for place in places)[:: len(places) - 1]
    gap = high - low
    if not (np.isfinite(gap) and gap > 0):
        return None
    least = losses.min(initial=low)
    below = np.linspace(least, low, 3)[:-1] if low - least > gap / 8 else np.array([])
    above = [high + gap * part for part in _WALLS if high + gap * part < losses.max(initial=high)]
    return sorted(float(sign * level) for level in (*below, *np.linspace(low, high, 5), *above))


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

    A label has the same colour in every panel, in order of first appearance, but for the colours that roles have.

    Raises:
        OptionError: if there are no lines, shapes do not fit, or there are more labels than colours.
        MissingExtraError: if matplotlib is not installed.

    >>> line = Line("live weights", x=[1, 2, 3], y=[[0.9, 0.5, 0.4], [0.8, 0.6, 0.4]], role="live")
    >>> figure = line_panels("The loss falls", "epoch", [Panel("NLL", [line])])
    >>> [text.get_text() for text in figure.axes[0].texts], png_bytes(figure)[1:4]
    (['live weights'], b'PNG')
    """
    colours = _colours_by_label(panels)
    figure = _figure(title, panels=len(panels))
    axes_row = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, panel in zip(axes_row, panels, strict=True):
        _draw_panel(axes, panel, colours)
        axes.set_xlabel(x_label)
    return figure


@_names_are_text
def dot_chart(title: str, x_label: str, dots: Sequence[Dot]) -> Figure:
    """Differences as dots with their intervals, one row each, the first on top; a line marks zero.

    A dot far out does not set the scale: it stands as an arrow at the edge, with its number.

    Raises:
        OptionError: if there are no dots.
        MissingExtraError: if matplotlib is not installed.

    >>> figure = dot_chart("Candidates", "difference", [Dot("tail:0.4", -0.2, -0.3, -0.1), Dot("live", 0.0)])
    >>> [text.get_text() for text in figure.axes[0].get_yticklabels()]
    ['tail:0.4', 'live']
    """
    if not dots:
        raise OptionError("there is nothing to draw: give at least one dot")
    figure = _figure(title, height_inches=0.9 + 0.26 * len(dots))
    axes = figure.subplots()
    axes.axvline(0, color=_COLOURS["live"], linewidth=0.9)
    low, high = _limits_of_dots(dots)
    axes.set_xlim(low, high)
    for row, dot in enumerate(dots):
        _draw_dot(axes, row, dot)
    axes.set_yticks(range(len(dots)), [_printable(dot.label) for dot in dots])
    axes.tick_params(axis="y", length=0, labelcolor=_COLOURS["ink"])
    axes.set_ylim(len(dots) - 0.4, -0.6)
    axes.set_xlabel(x_label)
    axes.locator_params(axis="x", nbins=_MOST_TICKS)
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)
    return figure


@_names_are_text
def contour_chart(
    title: str,
    x: Sequence[float],
    y: Sequence[float],
    values: Sequence[Sequence[float]],
    places: Mapping[str, tuple[float, float]],
    levels: Sequence[float] | None = None,
    roles: Mapping[str, Role] | None = None,
) -> Figure:
    """Contours of ``values`` [len(y), len(x)] over a plane, and named places on it.

    Each step from one of the ``levels`` to the next is a colour of its own; by default they lie evenly over what is
    not far out.

    Raises:
        MissingExtraError: if matplotlib is not installed.

    >>> figure = contour_chart("Plane", [0, 1], [0, 1], [[1.0, 2.0], [2.0, 3.0]], {"live": (0.5, 0.5)})
    >>> [text.get_text() for text in figure.axes[0].texts]
    ['live']
    """
    from matplotlib.colors import BoundaryNorm

    figure = _figure(title, height_inches=3.8)
    axes = figure.subplots()
    steps = np.linspace(*within_reach(values), 13) if levels is None else np.asarray(levels)
    norm = BoundaryNorm(steps, ncolors=256, extend="both")
    filled = axes.contourf(x, y, np.asarray(values), levels=steps, cmap="cividis", norm=norm, extend="both")
    figure.colorbar(filled, ax=axes, label="score", format="%.4g", ticks=steps)
    box = {"boxstyle": "round,pad=0.25", "facecolor": _COLOURS["paper"], "edgecolor": "none", "alpha": 0.85}
    for name, (right, up) in places.items():
        role = (roles or {}).get(name, "other")
        colour = "paper" if role == "other" else role
        axes.plot([right], [up], "o", color=_COLOURS[colour], markeredgecolor="white", markersize=8)
        on_the_right = right > (x[0] + x[-1]) / 2
        axes.annotate(
            _printable(name),
            (right, up),
            xytext=(-8 if on_the_right else 8, 8),
            textcoords="offset points",
            ha="right" if on_the_right else "left",
            bbox=box,
        )
    axes.set_aspect("equal")
    axes.set_xlabel("distance")
    axes.set_ylabel("distance")
    return figure


def png_bytes(figure: Figure) -> bytes:
    """The figure as a PNG file; the same figure gives the same bytes."""
    # By default the file names matplotlib's version.
    return _saved(figure, format="png", dpi=_DOTS_PER_INCH, metadata={"Software": None})


def svg_bytes(figure: Figure, **options: Any) -> bytes:
    """The figure as an SVG file; the same figure gives the same bytes."""
    # By default it says when it was made.
    return _saved(figure, format="svg", metadata={"Date": None, "Creator": None}, **options)


def inline_svg(figure: Figure) -> tuple[str, str]:
    """The figure's title, and the rest of it as an ``<svg>`` element for a page; the same figure gives the same.

    Colours are ``var(--name, …)``, so that a page in the dark may say others; text is text in the page's own font,
    and the size is the page's.
    """
    title = " ".join(figure.get_suptitle().split())
    figure.suptitle("")
    file = svg_bytes(figure, facecolor="none").decode()
    drawing = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|xmlns(:xlink)?=\"[^\"]*\"", "", file, flags=re.S)
    # The names of groups are the same in every figure; those of paths that are used again are made of what they hold.
    drawing = re.sub(r'<g id="[^"]*"', "<g", drawing[drawing.index("<svg") :])
    drawing = re.sub(r"<style.*?</style>|font-family: [^;\"]*;", "", drawing, flags=re.S)
    drawing = re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", drawing)
    )
    for name, colour in _COLOURS.items():
        drawing = drawing.replace(colour, f"var(--{name}, {colour})")
    return title, re.sub(r"\n\s*", "\n", drawing).strip()


def _saved(figure: Figure, **options: Any) -> bytes:
    buffer = BytesIO()
    with _own_style(), warnings.catch_warnings():
        # A box stands for a letter that matplotlib's own font has not.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(buffer, **options)
    return buffer.getvalue()


@contextmanager
def _own_style() -> Iterator[None]:
    """matplotlib's defaults and our own, whatever the user has set; names within a file are not random."""
    require("matplotlib", extra="demo", purpose="drawing figures")
    from matplotlib import style

    with style.context(["default", _STYLE]):
        yield


def _figure(title: str, *, panels: int = 1, height_inches: float = _PANEL_INCHES[1]) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width_inches = _PANEL_INCHES[0] * panels
    figure = Figure(figsize=(width_inches, height_inches), layout="constrained")
    FigureCanvasAgg(figure)
    lines = textwrap.wrap(_printable(title, most=200), int(_LETTERS_PER_INCH * width_inches))
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontweight="bold")
    return figure


def _colours_by_label(panels: Sequence[Panel]) -> dict[str, str]:
    lines = {line.label: line.role for panel in panels for line in panel.lines}
    if not lines:
        raise OptionError("there is nothing to draw: give at least one panel with a line")
    others = [label for label, role in lines.items() if role == "other"]
    if len(others) > len(_OTHERS):
        raise OptionError(
            f"{len(others)} labels are more than the {len(_OTHERS)} colours that can be told apart; draw fewer lines"
        )
    names = {label: role for label, role in lines.items() if role != "other"}
    names |= dict(zip(others, _OTHERS, strict=False)) if len(lines) > 1 else dict.fromkeys(others, "ink")
    return {label: _COLOURS[name] for label, name in names.items()}


def _draw_panel(axes: Axes, panel: Panel, colours: dict[str, str]) -> None:
    ends: dict[str, float] = {}
    means = []
    for line in panel.lines:
        x, y = np.asarray(line.x, float), np.asarray(line.y, float)
        if y.ndim != 2 or x.shape != y.shape[1:]:
            raise OptionError(
                f"line {line.label!r} needs x [points] and y [repeats, points]; "
                f"got {list(x.shape)} and {list(y.shape)}"
            )
        mean = y.mean(axis=0)
        means.append(mean)
        axes.plot(
            x, mean, label=_printable(line.label), color=colours[line.label], linewidth=1.8, marker=_marker(x)
        )
        ends[line.label] = _last_finite(mean)
        if len(y) > 1:
            error = y.std(axis=0, ddof=1) / np.sqrt(len(y))
            axes.fill_between(
                x, mean - error, mean + error, color=colours[line.label], alpha=0.2, linewidth=0
            )
    axes.set_ylim(panel.y_limits or within_reach(np.concatenate(means)))
    axes.set_ylabel(_printable(panel.y_label))
    axes.locator_params(axis="x", nbins=_MOST_TICKS)
    axes.grid()
    for mark in panel.marks:
        _draw_mark(axes, mark)
    if len(panel.lines) > 1 or panel.lines[0].role != "other":
        _name_lines(axes, ends, colours)


def _draw_mark(axes: Axes, mark: Mark) -> None:
    colour = _COLOURS["muted" if mark.role == "other" else mark.role]
    axes.axvline(mark.x, color=colour, linewidth=1, linestyle=":")
    at = {"xy": (mark.x, 1.0), "xycoords": ("data", "axes fraction"), "ha": "center", "va": "bottom"}
    axes.annotate(_printable(mark.label), color=colour, **at)


def _name_lines(axes: Axes, ends: Mapping[str, float], colours: Mapping[str, str]) -> None:
    """Each line's name beside its end, in its colour, moved apart where two would lie on each other."""
    low, high = axes.get_ylim()
    shares = {label: min(1.0, max(0.0, (y - low) / (high - low))) for label, y in ends.items()}
    away = {label: " ↑" if y > high else " ↓" if y < low else "" for label, y in ends.items()}
    apart = _LABEL_POINTS / (72 * 0.7 * _PANEL_INCHES[1])
    reached = -1.0
    for label in sorted(shares, key=lambda label: shares[label]):
        reached = max(shares[label], reached + apart)
        shares[label] = reached
    # What was pushed beyond the top goes down again, and pushes in its turn.
    room = 1.0
    for label in sorted(shares, key=lambda label: -shares[label]):
        room = min(shares[label], room)
        axes.annotate(
            _printable(label, most=24) + away[label],
            (1.0, room),
            xycoords="axes fraction",
            xytext=(5, 0),
            textcoords="offset points",
            color=colours[label],
            va="center",
        )
        room -= apart


def _limits_of_dots(dots: Sequence[Dot]) -> tuple[float, float]:
    """Limits that show zero, what is live or chosen, and what is not further off than a few times their spread."""
    named = _ends([dot for dot in dots if dot.role != "other"] or dots[:1])
    reach = _FAR_OFF * (max(named) - min(named))
    near = [dot for dot in dots if not reach or min(named) - reach <= dot.value <= max(named) + reach]
    ends = [*named, *_ends(near)]
    margin = 0.05 * (max(ends) - min(ends)) or 1.0
    return min(ends) - margin, max(ends) + margin


def _ends(dots: Sequence[Dot]) -> list[float]:
    ends = [end for dot in dots for end in (dot.value, dot.low, dot.high) if end is not None]
    return [0.0, *(end for end in ends if np.isfinite(end))]


def _draw_dot(axes: Axes, row: int, dot: Dot) -> None:
    colour = _COLOURS["muted" if dot.role == "other" else dot.role]
    low, high = axes.get_xlim()
    if not low <= dot.value <= high:
        left = dot.value < low
        text, edge, side = f"{dot.value:+.3g}", float(not left), "left" if left else "right"
        if np.isfinite(dot.value):
            text = f"◂ {text}" if left else f"{text} ▸"
        at = {"xy": (edge, row), "xycoords": ("axes fraction", "data"), "ha": side, "va": "center"}
        axes.annotate(text, color=colour, **at)
        return
    if dot.low is not None and dot.high is not None:
        axes.hlines(row, dot.low, dot.high, color=colour, linewidth=1.6 if dot.filled else 1.0)
    face = colour if dot.filled else _COLOURS["paper"]
    axes.plot([dot.value], [row], "o", color=colour, markerfacecolor=face, markersize=5.5)


def _marker(x: NDArray[np.float64]) -> str:
    """A line of one point would not be seen."""
    return "o" if len(x) == 1 else ""


def _last_finite(values: NDArray[np.float64]) -> float:
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if finite.size else 0.0


def _printable(text: str, most: int = _MOST_TEXT) -> str:
    """Without what no picture can hold, such as control characters; long text is cut."""
    clean = "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in text)
    return clean if len(clean) <= most else f"{clean[: most - 1]}…"
