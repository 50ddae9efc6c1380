"""How wide the place is where weights lie: the loss in random directions from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from polyak.errors import OptionError
from polyak.landscape.points import Point, numbers, points, scores
from polyak.profiles.base import whole_within
from polyak.selection.table import as_text
from polyak.selection.trial import Mode, ScoreFunction, refuse_unknown_mode
from polyak.selection.weights import check_statistics
from polyak.tensors import ModelTensors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["RayScores", "rays"]

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
        from polyak.plots import Line, Panel, line_panels

        lines = [
            Line(name, [0.0, *self.radii], np.insert(self.rise(name), 0, 0.0, axis=1)) for name in self.scores
        ]
        panel = Panel("how much worse than at the centre", lines)
        return line_panels("In random directions", "radius, relative to the weights", [panel])

    def __str__(self) -> str:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        first, *others = self.scores
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
        headings = ["radius", *(f"{name}, rise ± error" for name in self.scores)]
        for heading in [*headings, *(f"{name} rises less than {first}" for name in others)]:
            table.add_column(Text(heading), justify="right", no_wrap=True)
        for index, radius in enumerate(self.radii):
            rises = {name: self.rise(name)[:, index] for name in self.scores}
            less = [
                f"in {(rises[name] < rises[first]).sum()} of {len(rises[name])} directions" for name in others
            ]
            table.add_row(f"{radius:g}", *map(_mean_and_error, rises.values()), *less)
        size = "its own filters" if self.size_of is None else f"the filters of {self.size_of}, for all"
        return f"Directions have the size of {size}.\n{as_text(table)}"


def rays(
    model: nn.Module,
    weights: Mapping[str, Mapping[str, Tensor]],
    score: ScoreFunction,
    *,
    mode: Mode = "min",
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
        model: as for :func:`polyak.landscape.path`.
        weights: names with their weights, such as ``{"live": run.live(), "averaged": run.average(profile)}``.
        score: as for :func:`polyak.select`.
        mode: "min" if lower scores are better, "max" if higher ones are.
        radii: distances, relative to the size of each filter; every one is scored in every direction.
        directions: how many.
        seed: of the draws, which are the same on every device.
        size_of: name of the weights to whose filters all directions are scaled; None: each to its own.
        recalibrate: as for :func:`polyak.landscape.path`.
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
    >>> found = rays(model, centre, centred, radii=[1.0, 2.0], directions=1, progress=False)
    >>> found.centres["wide"], found.rise("wide").tolist()
    (0.0, [[5.0, 20.0]])
    """
    directions = whole_within("[1, inf)", "directions", directions)
    refuse_unknown_mode(mode)
    seed = whole_within("[0, 1e18]", "seed", seed)
    radii = sorted(set(numbers("radii", radii)))
    if not radii or min(radii) <= 0:
        raise OptionError(f"radii must be above 0, got {radii}")
    check_statistics(model, recalibrate)
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
    rows = np.reshape(
        list(scores(model, tried, total, score, recalibrate, progress)), (len(found), per_centre)
    )
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
