"""The loss around weights: along a line, over a plane, and in random directions.

Izmailov et al. 2018 found the average in the middle of a wide valley at whose walls SGD's iterates lie. These
three show whether that is so of a run. Weights are given by name, as ``trajectory.average(...)``,
``trajectory.live()``, ``average.named_tensors()`` or ``model.state_dict()``; scores are those of
:func:`polyak.select`.

A flat place is no proof of good generalisation: sharpness depends on how a network is parametrised (Dinh et al.
2017) and does not always go with test error (Andriushchenko et al. 2023). Choose by held-out scores, and look
here to understand them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from polyak import _evaluate, _plots, _terminal
from polyak._checks import checked, whole_within, within
from polyak._distributed import is_main_rank
from polyak._evaluate import Mode, Prepare, Score, ScoreFunction
from polyak._mean import mean_dtype
from polyak._model import ModelTensors
from polyak.checkpoints._tree import bare_names
from polyak.errors import OptionError, StructureError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PathScores", "PlaneScores", "RayScores", "path", "plane", "rays"]

# Weights as points of a space: checked, combined, measured, and scored in the model.

_BETTER = {"min": "lower", "max": "higher"}

# Canonical name to value: the floating-point tensors of a model, in fp32 at least, on the model's devices.
Point = dict[str, Tensor]


def points(model: nn.Module, weights: Mapping[str, Mapping[str, Tensor]], count: int | None) -> list[Point]:
    """Each of the named ``weights`` as a point, all over the same tensors.

    Integer tensors, and what only some of the weights hold, stay as the model has them.

    Raises:
        OptionError: not ``count`` named weights, or none.
        StructureError: some do not fit the model.
    """
    wrong = not isinstance(weights, Mapping) or not all(isinstance(w, Mapping) for w in weights.values())
    if wrong or not weights or count not in (None, len(weights)):
        needed = "names and their weights" if count is None else f"{count} names and their weights"
        raise OptionError(f"weights must be {needed}, as in {{'live': trajectory.live(), 'averaged': ...}}")
    names = ModelTensors(model).all_names()
    found: list[Point] = []
    for name, given in weights.items():
        if not given.keys() <= names.keys():
            given = bare_names(given)
        if not given or not all(isinstance(value, Tensor) for value in given.values()):
            raise OptionError(f"weights[{name!r}] must be names and their tensors, as in model.state_dict()")
        try:
            pairs = _evaluate.matched(model, given)
        except StructureError as error:
            raise StructureError(f"weights[{name!r}]: {error}") from None
        found.append(
            {
                e.name: value.detach().to(e.tensor.device, mean_dtype(value.dtype))
                for e, value in pairs
                if e.tensor.is_floating_point() or e.tensor.is_complex()
            }
        )
    shared = set.intersection(*map(set, found))
    return [{name: value for name, value in point.items() if name in shared} for point in found]


def combined(origin: Point, others: Sequence[Point], coefficients: Sequence[float]) -> Point:
    """origin + Σ c_i (other_i - origin), which is one of them itself where its coefficient is 1 and the rest are 0.

    >>> a, b = {"w": torch.tensor([1.0])}, {"w": torch.tensor([3.0])}
    >>> combined(a, [b], [0.5])
    {'w': tensor([2.])}
    """
    counted = [(other, c) for other, c in zip(others, coefficients, strict=True) if c]
    if len(counted) == 1 and counted[0][1] == 1:
        return counted[0][0]
    result = dict(origin)
    for name, start in origin.items():
        for other, coefficient in counted:
            result[name] = result[name] + difference(other[name], start) * coefficient
    return result


def difference(end: Tensor, start: Tensor) -> Tensor:
    """``end`` - ``start``; 0 where they are equal, as infinities in a causal mask are.

    >>> difference(torch.tensor([-torch.inf, 3.0]), torch.tensor([-torch.inf, 1.0]))
    tensor([0., 2.])
    """
    return (end - start).masked_fill(end == start, 0)


def inner(model: nn.Module, first: Point, second: Point) -> float:
    """The inner product over the parameters, which the distances of weights are made of; float64."""
    names = [e.name for e in ModelTensors(model).values() if e.kind == "parameter" and e.name in first]
    return sum(float(torch.vdot(_flat(first[name]), _flat(second[name])).real) for name in names)


def scores(
    model: nn.Module,
    tried: Iterable[Point],
    total: int,
    score: ScoreFunction,
    recalibrate: Iterable[Any] | None,
    progress: bool,
    prepare: Prepare | None = None,
) -> Iterator[Score]:
    """The score of each point, with the model as it was between them and afterwards."""
    with _terminal.progress_bar("weights", shown=progress and is_main_rank()) as bar:
        for point in bar.over(tried, total):
            yield _evaluate.try_weights(model, point, score, recalibrate, prepare)


def directed(mode: Mode | None, found: Iterator[Score]) -> tuple[Mode, list[float]]:
    """Which scores are better, known or refused once the first is there, and all of them."""
    first = next(found)
    return _evaluate.resolved_mode(mode, first), [first.value, *(score.value for score in found)]


def numbers(option: str, values: Iterable[float]) -> list[float]:
    """``values`` as floats; ``OptionError`` for any that is not a finite number."""
    try:
        if isinstance(values, str):
            raise TypeError
        found = [float(value) for value in values]
    except (TypeError, ValueError):
        raise OptionError(f"{option} must be numbers, as in [0.1, 0.2], got {values!r}") from None
    if not all(map(math.isfinite, found)):
        raise OptionError(f"{option} must be finite, got {found}")
    return found


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).to(torch.complex128 if tensor.is_complex() else torch.float64)


def _roles(names: Sequence[str]) -> dict[str, _plots.Role]:
    """What the named weights are in a figure: those called live, the first of the others, and the rest."""
    averages = [name for name in names if not name.startswith("live")]

    def role(name: str) -> _plots.Role:
        return "live" if name not in averages else "chosen" if name == averages[0] else "other"

    return {name: role(name) for name in names}


# The loss along the line between two weights.

_POSITIONS = tuple(step / 20 for step in range(-10, 31))


@dataclass(frozen=True)
class PathScores:
    """Scores along the line through two weights. Made by :func:`path`.

    Attributes:
        names: of the weights at positions 0 and 1.
        positions: t of (1 - t)·start + t·end, ascending.
        scores: what ``score`` returned at each, or the mean of the losses that it returned.
        distance: ‖end - start‖ over the parameters.
        mode: "min" or "max", whichever scores are better.
        recalibrated: whether BatchNorm statistics were recomputed everywhere, the ends included.
    """

    names: tuple[str, str]
    positions: tuple[float, ...]
    scores: tuple[float, ...]
    distance: float
    mode: Mode
    recalibrated: bool = False

    @property
    def best(self) -> float:
        """The position of the best score; of equal ones rather one within [0, 1], then the one nearest to the end."""

        def rank(at: tuple[float, float]) -> tuple[float, bool, float]:
            position, score = at
            return _evaluate.badness(score, self.mode), not 0 <= position <= 1, abs(1 - position)

        return min(zip(self.positions, self.scores, strict=True), key=rank)[0]

    @property
    def barrier(self) -> float:
        """By how much the line is worse than its ends, at most: max over [0, 1] of ℓ(t) - ((1 - t)·ℓ(0) + t·ℓ(1)).

        0 says that both ends lie in one basin, where averaging them is safe; NaN that an end has no finite score.
        With ``mode="max"`` ℓ is minus the score.

        Source: Frankle et al. 2020, Linear Mode Connectivity and the Lottery Ticket Hypothesis.
        """
        losses = {
            t: _evaluate.badness(s, self.mode) for t, s in zip(self.positions, self.scores, strict=True)
        }
        if not (math.isfinite(losses[0.0]) and math.isfinite(losses[1.0])):
            return math.nan
        return max(
            loss - ((1 - t) * losses[0.0] + t * losses[1.0]) if 0 < t < 1 else 0.0
            for t, loss in losses.items()
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything that was found, as plain values for JSON."""
        return {**asdict(self), "best": self.best, "barrier": self.barrier}

    def plot(self) -> Figure:
        """A matplotlib figure of the scores along the line, its ends marked.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        roles = _roles(self.names)
        marks = [_plots.Mark(name, at, roles[name]) for name, at in zip(self.names, (0.0, 1.0), strict=True)]
        between = [s for t, s in zip(self.positions, self.scores, strict=True) if 0 <= t <= 1]
        # What lies between the two is shown whole; beyond them a line may leave the picture.
        limits = [*_plots.within_reach(self.scores), *filter(math.isfinite, between)]
        panel = _plots.Panel(
            f"score ({_BETTER[self.mode]} is better)",
            [_plots.Line("score", self.positions, [self.scores])],
            (min(limits), max(limits)),
            marks,
        )
        return _plots.line_panels(self._title, "position on the line", [panel])

    @property
    def _title(self) -> str:
        if not any(map(math.isfinite, self.scores)):
            return "No point of the line has a finite score"
        at = dict(zip(self.positions, self.scores, strict=True))
        title = f"The best score on the line, {at[self.best]:.4g}, lies {self._place(self.best)}"
        title += f" to {self.names[1]}" if 0 < self.best < 1 else ""
        if self.barrier > abs(at[1.0] - at[0.0]):
            title += f"; a barrier of {self.barrier:.3g} lies between"
        return title

    def __str__(self) -> str:
        start, end = self.names
        at = dict(zip(self.positions, self.scores, strict=True))
        barrier = "there is no barrier to speak of, as an end has no finite score"
        if not math.isnan(self.barrier):
            barrier = f"the barrier between them is {self.barrier:.3g}"
        statistics = " BatchNorm statistics were recomputed everywhere, the ends included."
        return (
            f"From {start} (score {at[0.0]:.5g}) to {end} ({at[1.0]:.5g}), a distance of {self.distance:.4g}: "
            f"the best score, {at[self.best]:.5g}, lies {self._place(self.best)}; {barrier}."
        ) + (statistics if self.recalibrated else "")

    def _place(self, position: float) -> str:
        start, end = self.names
        if position in (0, 1):
            return f"at {end if position else start}"
        if 0 < position < 1:
            return f"at {position:.3g} of the way"
        beyond, name = (position - 1, end) if position > 1 else (-position, start)
        return f"beyond {name}, by {beyond:.3g} of their distance"


@checked
def path(
    model: nn.Module,
    weights: Mapping[str, Mapping[str, Tensor]],
    score: ScoreFunction,
    *,
    mode: Mode | None = None,
    positions: Iterable[float] = _POSITIONS,
    recalibrate: Iterable[Any] | None = None,
    prepare: Prepare | None = None,
    progress: bool = True,
) -> PathScores:
    """Score the weights (1 - t)·start + t·end for each position t, also beyond the ends.

    Interpolated are the floating-point tensors that both hold, in fp32 at least; the rest is the model's.

    Args:
        model: takes each point's weights, in evaluation mode and without gradients, while it is scored; it is
            as before when this returns or raises.
        weights: two names with their weights, such as ``{"live": run.live(), "averaged": run.average(profile)}``.
        score: as for :func:`polyak.select`.
        mode: as for :func:`polyak.select`.
        positions: where to score; 0 and 1 always are.
        recalibrate: batches for :func:`polyak.update_bn` before each score, as no average has its own statistics.
        prepare: as for :func:`polyak.select`.
        progress: show a bar on stderr.

    Raises:
        OptionError: not two weights, or a position that is not finite.
        StructureError: the weights do not fit the model.

    >>> import torch
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> ends = {"live": {"weight": torch.tensor([[0.0]])}, "averaged": {"weight": torch.tensor([[2.0]])}}
    >>> off = lambda m: (m.weight.item() - 2) ** 2
    >>> found = path(model, ends, off, mode="min", positions=[0.5, 1.5], progress=False)
    >>> found.positions, found.scores, found.best, found.barrier
    ((0.0, 0.5, 1.0, 1.5), (4.0, 1.0, 0.0, 1.0), 1.0, 0.0)
    """
    _evaluate.refuse_unknown_mode(mode)
    _evaluate.check_statistics(model, recalibrate)
    where = sorted({0.0, 1.0, *numbers("positions", positions)})
    start, end = points(model, weights, count=2)
    first, second = weights
    tried = (combined(start, [end], [t]) for t in where)
    moved = {name: difference(end[name], start[name]) for name in start}
    distance = math.sqrt(inner(model, moved, moved))
    del moved  # a whole model, which need not wait for the scores
    mode, found = directed(mode, scores(model, tried, len(where), score, recalibrate, progress, prepare))
    return PathScores(
        names=(first, second),
        positions=tuple(where),
        scores=tuple(found),
        distance=distance,
        mode=mode,
        recalibrated=recalibrate is not None,
    )


# The loss over the plane through three weights.

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
        mode: "min" or "max", whichever scores are better.
    """

    places: dict[str, Place]
    x: tuple[float, ...]
    y: tuple[float, ...]
    scores: tuple[tuple[float, ...], ...]
    at_places: dict[str, float]
    recalibrated: bool = False
    mode: Mode = "min"

    def to_dict(self) -> dict[str, Any]:
        """Everything that was found, as plain values for JSON."""
        return asdict(self)

    def plot(self) -> Figure:
        """A matplotlib figure: contours of the score, and the three weights.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        levels = _plots.levels_around(self.scores, list(self.at_places.values()), self.mode)
        roles = _roles(list(self.places))
        return _plots.contour_chart(self._title, self.x, self.y, self.scores, self.places, levels, roles)

    @property
    def _title(self) -> str:
        ranked = sorted(self.at_places.items(), key=lambda at: _evaluate.badness(at[1], self.mode))
        best, *others = (f"{name} {score:.4g}" for name, score in ranked)
        return f"Of the three, {best} is the best ({', '.join(others)})"

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


@checked
def plane(
    model: nn.Module,
    weights: Mapping[str, Mapping[str, Tensor]],
    score: ScoreFunction,
    *,
    mode: Mode | None = None,
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
        model: as for :func:`polyak.landscape`.
        weights: three names with their weights.
        score: as for :func:`polyak.select`.
        mode: as for :func:`polyak.select`.
        size: points along each side.
        margin: how far the grid goes beyond the three on every side, as a part of the longer side of what they span.
        recalibrate: as for :func:`polyak.landscape`.
        progress: show a bar on stderr.

    Raises:
        OptionError: not three weights, or three on one line, or an option out of range.
        StructureError: the weights do not fit the model.

    >>> import torch
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> corners = {"a": (0.0, 0.0), "b": (2.0, 0.0), "c": (1.0, 3.0)}
    >>> weights = {name: {"weight": torch.tensor([place])} for name, place in corners.items()}
    >>> found = plane(model, weights, lambda m: m.weight.sum(), mode="min", size=2, margin=0.0, progress=False)
    >>> found.places, found.scores
    ({'a': (0.0, 0.0), 'b': (2.0, 0.0), 'c': (1.0, 3.0)}, ((0.0, 2.0), (3.0, 5.0)))
    """
    size, margin = whole_within("[2, inf)", "size", size), within("[0, inf)", "margin", margin)
    _evaluate.refuse_unknown_mode(mode)
    _evaluate.check_statistics(model, recalibrate)
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
    points_there = (at(*place) for place in tried)
    mode, found = directed(mode, scores(model, points_there, len(tried), score, recalibrate, progress))
    grid = np.reshape(found[3:], (size, size))
    return PlaneScores(
        places=places,
        x=tuple(x),
        y=tuple(y),
        scores=tuple(map(tuple, grid.tolist())),
        at_places=dict(zip(weights, found, strict=False)),
        recalibrated=recalibrate is not None,
        mode=mode,
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


# How wide the place is where weights lie: the loss in random directions from them.

_RADII = (0.1, 0.2, 0.3, 0.4, 0.5)


@dataclass(frozen=True)
class RayScores:
    """Scores along random rays from one or more weights. Made by :func:`rays`.

    Attributes:
        radii: how far along each ray, ascending, relative to the size of filters.
        centres: name to the score of the weights themselves.
        scores: name to a row for each direction, with a score for each radius.
        mode: "min" or "max", whichever scores are better.
        size_of: whose filters all directions were scaled to; None: each weights' own.
        recalibrated: whether BatchNorm statistics were recomputed for every score.
    """

    radii: tuple[float, ...]
    centres: dict[str, float]
    scores: dict[str, tuple[tuple[float, ...], ...]]
    mode: Mode = "min"
    size_of: str | None = None
    recalibrated: bool = False

    def rise(self, name: str) -> NDArray[np.float64]:
        """How much worse the score is than at the centre, [directions, radii]: little around a wide place.

        Negative where weights in that direction are better, as around weights that are no minimum of the score.
        """
        if name not in self.scores:
            raise OptionError(f"there are rays from {', '.join(self.scores)}, not from {name!r}")
        with np.errstate(invalid="ignore"):  # NaN where both are infinite
            rise = np.asarray(self.scores[name]) - self.centres[name]
        return rise if self.mode == "min" else -rise

    def to_dict(self) -> dict[str, Any]:
        """Everything that was found, as plain values for JSON."""
        return asdict(self)

    def plot(self) -> Figure:
        """A matplotlib figure: the mean rise over the radius, in a band of one standard error either way.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        rises = {name: self.rise(name) for name in self.scores}
        roles = _roles(list(rises))
        lines = [
            _plots.Line(name, [0.0, *self.radii], np.insert(rise, 0, 0.0, axis=1), roles[name])
            for name, rise in rises.items()
        ]
        ends = ", ".join(f"{name} worse by {rise[:, -1].mean():.3g}" for name, rise in rises.items())
        title = f"Moved at random by {self.radii[-1]:g} of the filters' size: {ends}"
        panel = _plots.Panel("rise of the score", lines)
        return _plots.line_panels(title, "radius, relative to the weights", [panel])

    def __str__(self) -> str:
        first, *others = self.scores
        headings = ["radius", *(f"{name}, rise ± error" for name in self.scores)]
        headings += [f"{name} rises less than {first}" for name in others]
        table = _terminal.table(*(f"#{heading}" for heading in headings))
        for index, radius in enumerate(self.radii):
            rises = {name: self.rise(name)[:, index] for name in self.scores}
            less = [
                f"in {(rises[name] < rises[first]).sum()} of {len(rises[name])} directions" for name in others
            ]
            table.add_row(f"{radius:g}", *map(_mean_and_error, rises.values()), *less)
        size = "its own filters" if self.size_of is None else f"the filters of {self.size_of}, for all"
        return f"Directions have the size of {size}.\n{_terminal.as_text(table)}"


@checked
def rays(
    model: nn.Module,
    weights: Mapping[str, Mapping[str, Tensor]],
    score: ScoreFunction,
    *,
    mode: Mode | None = None,
    radii: Iterable[float] = _RADII,
    directions: int = 10,
    seed: int = 0,
    size_of: str | None = None,
    recalibrate: Iterable[Any] | None = None,
    progress: bool = True,
) -> RayScores:
    """Score weights moved by ``radius`` in random directions; around a wide optimum the loss rises slowly.

    A direction is drawn from a normal distribution, and each of its filters (the slices of a tensor along its
    first dimension) scaled to the size of the same filter of the weights, so that a network and the same one
    rescaled, as BatchNorm and ReLU allow, look alike. Vectors such as biases stay where they are. All weights
    get the same draws, so their rises may be compared direction by direction.

    Averaging removes noise from weights and makes them shorter, so an average is moved less far than the live
    weights at the same radius. Look also with ``size_of``, which moves all by the very same vectors, before saying
    that one lies wider than the other.

    Args:
        model: as for :func:`polyak.landscape`.
        weights: names with their weights, such as ``{"live": run.live(), "averaged": run.average(profile)}``.
        score: as for :func:`polyak.select`.
        mode: as for :func:`polyak.select`.
        radii: distances, relative to the size of each filter; every one is scored in every direction.
        directions: how many.
        seed: of the draws, which are the same on every device.
        size_of: name of the weights to whose filters all directions are scaled; None: each to its own.
        recalibrate: as for :func:`polyak.landscape`.
        progress: show a bar on stderr.

    Raises:
        OptionError: an option is out of range, or the model has no filters.
        StructureError: the weights do not fit the model.

    References:
        Li et al. 2018, Visualizing the Loss Landscape of Neural Nets (filter normalisation);
        Izmailov et al. 2018, section 4.2 (rays from SWA's and SGD's weights).

    >>> import torch
    >>> model = torch.nn.Linear(1, 2, bias=False)
    >>> centre = {"wide": {"weight": torch.tensor([[1.0], [2.0]])}}
    >>> centred = lambda m: ((m.weight - torch.tensor([[1.0], [2.0]])) ** 2).sum()
    >>> found = rays(model, centre, centred, mode="min", radii=[1.0, 2.0], directions=1, progress=False)
    >>> found.centres["wide"], found.rise("wide").tolist()
    (0.0, [[5.0, 20.0]])
    """
    directions = whole_within("[1, inf)", "directions", directions)
    _evaluate.refuse_unknown_mode(mode)
    seed = whole_within("[0, 1e18]", "seed", seed)
    radii = sorted(set(numbers("radii", radii)))
    if not radii or min(radii) <= 0:
        raise OptionError(f"radii must be above 0, got {radii}")
    _evaluate.check_statistics(model, recalibrate)
    found = points(model, weights, count=None)
    if size_of is not None and size_of not in weights:
        raise OptionError(f"size_of must be one of {', '.join(weights)}, got {size_of!r}")
    names = _filtered(model, found[0])
    sizes = found if size_of is None else [found[list(weights).index(size_of)]] * len(found)
    tried = (
        point
        for centre, size in zip(found, sizes, strict=True)
        for point in _along(centre, size, names, radii, directions, seed)
    )
    per_centre = 1 + directions * len(radii)
    total = per_centre * len(found)
    mode, values = directed(mode, scores(model, tried, total, score, recalibrate, progress))
    rows = np.reshape(values, (len(found), per_centre))
    return RayScores(
        radii=tuple(radii),
        centres=dict(zip(weights, rows[:, 0].tolist(), strict=True)),
        scores={
            name: tuple(map(tuple, row[1:].reshape(directions, len(radii)).tolist()))
            for name, row in zip(weights, rows, strict=True)
        },
        mode=mode,
        size_of=size_of,
        recalibrated=recalibrate is not None,
    )


def _filtered(model: nn.Module, point: Point) -> list[str]:
    """The parameters that have filters."""
    entries = ModelTensors(model).values()
    names = [e.name for e in entries if e.name in point and e.tensor.requires_grad and point[e.name].ndim > 1]
    if not names:
        raise OptionError(
            "the model has no trainable parameter with two dimensions or more, so no filters to move; frozen ones stay"
        )
    return names


def _along(
    centre: Point, size: Point, names: Sequence[str], radii: Sequence[float], directions: int, seed: int
) -> Iterator[Point]:
    yield centre
    generator = torch.Generator().manual_seed(seed)
    for _ in range(directions):
        direction = {name: _scaled(_drawn(size[name], generator), size[name]) for name in names}
        for radius in radii:
            yield centre | {name: centre[name] + radius * direction[name] for name in names}


def _drawn(like: Tensor, generator: torch.Generator) -> Tensor:
    # In one precision: the same numbers for weights of any.
    dtype = torch.complex64 if like.is_complex() else torch.float32
    return torch.randn(like.shape, dtype=dtype, generator=generator, device="cpu").to(like)


def _scaled(direction: Tensor, weights: Tensor) -> Tensor:
    """Each filter of ``direction`` as long as the same one of ``weights``."""
    within = tuple(range(1, weights.ndim))
    sizes = [torch.linalg.vector_norm(t, dim=within, keepdim=True) for t in (weights, direction)]
    return direction * (sizes[0] / sizes[1])


def _mean_and_error(rises: NDArray[np.float64]) -> str:
    error = f" ± {rises.std(ddof=1) / np.sqrt(len(rises)):.2g}" if len(rises) > 1 else ""
    return f"{rises.mean():+.4g}{error}"
