"""The loss over the plane through three weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from polyak.errors import OptionError
from polyak.landscape.points import combined, difference, inner, points, scores
from polyak.profiles.base import whole_within, within
from polyak.selection.trial import ScoreFunction
from polyak.selection.weights import check_statistics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PlaneScores", "plane"]

# The three are on a line where the third lies nearer to it than this part of its distance from the first.
_FLAT = 1e-3

Place = tuple[float, float]


@dataclass(frozen=True)
class PlaneScores:
    """Scores on a grid of the plane through three weights. Made by :func:`plane`.

    Distances are Euclidean, over the parameters: one along ``x`` is as long as one along ``y``.

    Attributes:
        places: name to (x, y) of the three weights; the first lies at (0, 0), the second at (distance, 0).
        x: the columns of the grid.
        y: its rows.
        scores: a row for each of ``y``, with a score for each of ``x``.
        at_places: name to the score of the three weights themselves.
        recalibrated: whether BatchNorm statistics were recomputed for every score.
    """

    places: dict[str, Place]
    x: tuple[float, ...]
    y: tuple[float, ...]
    scores: tuple[tuple[float, ...], ...]
    at_places: dict[str, float]
    recalibrated: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Everything that was found, as plain values for JSON."""
        return asdict(self)

    def plot(self) -> Figure:
        """A matplotlib figure: contours of the score, and the three weights.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        from polyak.plots import contour_chart

        return contour_chart("The plane of three weights", self.x, self.y, self.scores, self.places)

    def __str__(self) -> str:
        rows = [
            f"{name} at ({x:.4g}, {y:.4g}): score {self.at_places[name]:.5g}"
            for name, (x, y) in self.places.items()
        ]
        every = np.asarray(self.scores)
        finite = every[np.isfinite(every)]
        reach = f"{every.size} points of their plane"
        if finite.size:
            reach += f": scores {finite.min():.5g} to {finite.max():.5g}"
        if finite.size < every.size:
            reach += f"; {every.size - finite.size} have no finite score"
        return "\n".join([*rows, reach])


def plane(
    model: nn.Module,
    weights: Mapping[str, Mapping[str, Tensor]],
    score: ScoreFunction,
    *,
    size: int = 13,
    margin: float = 0.5,
    recalibrate: Iterable[Any] | None = None,
    progress: bool = True,
) -> PlaneScores:
    """Score a grid of the plane through three weights, as figures 1 and 3 of Izmailov et al. 2018 show it.

    With u = w_2 - w_1 and v the part of w_3 - w_1 that is orthogonal to u, the grid is w_1 + x·u/‖u‖ + y·v/‖v‖.
    Good choices are three iterates, as that figure has, or the live weights, the averaged ones and those of
    another run; two weights and their own mean lie on one line. Every point costs an evaluation: size² and three.

    Args:
        model: as for :func:`polyak.landscape.path`.
        weights: three names with their weights.
        score: as for :func:`polyak.select`.
        size: points along each side.
        margin: how far the grid goes beyond the three on every side, as a part of the longer side of what they span.
        recalibrate: as for :func:`polyak.landscape.path`.
        progress: show a bar on stderr.

    Raises:
        OptionError: not three weights, or three on one line, or an option out of range.
        StructureError: the weights do not fit the model.

    >>> import torch
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> corners = {"a": (0.0, 0.0), "b": (2.0, 0.0), "c": (1.0, 3.0)}
    >>> weights = {name: {"weight": torch.tensor([place])} for name, place in corners.items()}
    >>> found = plane(model, weights, lambda m: m.weight.sum(), size=2, margin=0.0, progress=False)
    >>> found.places, found.scores
    ({'a': (0.0, 0.0), 'b': (2.0, 0.0), 'c': (1.0, 3.0)}, ((0.0, 2.0), (3.0, 5.0)))
    """
    size, margin = whole_within("[2, inf)", "size", size), within("[0, inf)", "margin", margin)
    check_statistics(model, recalibrate)
    first, second, third = points(model, weights, count=3)
    u, v = ({name: difference(other[name], first[name]) for name in first} for other in (second, third))
    length, slant, height = _triangle(inner(model, u, u), inner(model, u, v), inner(model, v, v))
    del u, v
    extra = margin * max(height, max(length, slant) - min(0, slant))
    x, y = (
        np.linspace(min(at) - extra, max(at) + extra, size).tolist()
        for at in ([0, length, slant], [0, height])
    )

    def at(right: float, up: float) -> dict[str, Tensor]:
        part = up / height
        return combined(first, [second, third], [(right - part * slant) / length, part])

    places = dict(zip(weights, [(0.0, 0.0), (length, 0.0), (slant, height)], strict=True))
    tried = [*places.values(), *((right, up) for up in y for right in x)]
    found = list(scores(model, (at(*place) for place in tried), len(tried), score, recalibrate, progress))
    grid = np.reshape(found[3:], (size, size))
    return PlaneScores(
        places=places,
        x=tuple(x),
        y=tuple(y),
        scores=tuple(map(tuple, grid.tolist())),
        at_places=dict(zip(weights, found, strict=False)),
        recalibrated=recalibrate is not None,
    )


def _triangle(uu: float, uv: float, vv: float) -> tuple[float, float, float]:
    """‖u‖, and where w_3 lies along it and across, from the inner products."""
    if not all(map(math.isfinite, (uu, uv, vv))):
        raise OptionError("the three weights are not all finite, so there is no plane through them")
    length = math.sqrt(uu)
    slant = uv / length if length else 0.0
    height = math.sqrt(max(vv - slant**2, 0.0))
    if not length or height <= _FLAT * math.sqrt(vv) or not vv:
        raise OptionError("the three weights lie on one line, through which there is no one plane: use path")
    return length, slant, height
