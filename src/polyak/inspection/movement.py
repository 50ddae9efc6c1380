"""How a run moved through weight space: drifting on, or circling around one place.

Let b_1 … b_K be weights along a run and d_k = b_k − b_{k−1} its displacements. The *turn* of k is the cosine of
d_k with d_{k−1}. With a steady drift v and independent scatter of variance s² around it, the expected turn is
about (‖v‖² − s²) / (‖v‖² + 2s²): 1 for pure drift, 0 where both are as large, −1/2 for pure circling, which is
where averaging removes the scatter and loses nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from polyak.checkpoints import Checkpoint
from polyak.combine.running import is_averaged
from polyak.errors import StructureError, name_list
from polyak.inspection.layouts import compare_layouts
from polyak.inspection.products import cosine, read_float64, slices

__all__ = ["Movement", "Neighbour", "measure_movement"]

# The least mean turn, its name, what it means. Of the squares the drift is then twice the scatter, or 40% of it.
_KINDS = (
    (0.25, "Drifting", "A long average may lag behind: compare it with shorter ones on validation data."),
    (-0.25, "Drifting and circling at once", "Let validation choose how long to average."),
    (-math.inf, "Circling", "Averaging this part removes scatter at little cost."),
)


@dataclass(frozen=True)
class Neighbour:
    """How weights lie to those before them.

    Attributes:
        relative_distance: ``‖b_k − b_{k−1}‖ / ‖b_{k−1}‖``; None where the former weights are zero.
        cosine: of ``b_k`` and ``b_{k−1}``; None where either is zero.
        turn: cosine of this displacement and the one before; None for the first, and where nothing moved.
    """

    relative_distance: float | None
    cosine: float | None
    turn: float | None


@dataclass(frozen=True)
class Movement:
    """The path through weight space.

    Attributes:
        neighbours: one for each of the weights but the first.
        straightness: ``‖b_K − b_1‖ / Σ ‖d_k‖``, 1 on a straight line; None where nothing moved.
    """

    neighbours: tuple[Neighbour, ...]
    straightness: float | None

    @property
    def late_turns(self) -> tuple[float, ...]:
        """The turns of the second half, which is what a tail average sees; the beginning of any run drifts."""
        turns = [neighbour.turn for neighbour in self.neighbours if neighbour.turn is not None]
        return tuple(turns[len(turns) // 2 :])

    @property
    def finding(self) -> str:
        """Drifting or circling, in a sentence."""
        if not self.late_turns:
            return "Three different weights are needed to tell drifting from circling."
        turn, (_, kind, _) = mean(self.late_turns), self._kind
        return f"{kind}: over the second half the mean turn is {turn:+.2f} (1 straight on, -0.5 around one place)."

    @property
    def verdict(self) -> str:
        """The same, with what it means for averages; scores on validation data know better."""
        return f"{self.finding} {self._kind[2]}" if self.late_turns else self.finding

    @property
    def _kind(self) -> tuple[float, str, str]:
        turn = mean(self.late_turns)
        return next(kind for kind in _KINDS if turn >= kind[0])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {**asdict(self), "verdict": self.verdict}


def measure_movement(checkpoints: Sequence[Checkpoint]) -> Movement:
    """Measure the path through checkpoints in order, over their floating-point tensors as one vector.

    Each is read once, in slices; a few slices are held, whatever the sizes and however many there are. Elements
    that are not finite count as not moving.

    Raises ``StructureError`` if the checkpoints do not hold the same tensors, ``CheckpointError`` where one cannot
    be read.

    >>> import tempfile, torch
    >>> from pathlib import Path
    >>> from polyak import checkpoints
    >>> folder = tempfile.TemporaryDirectory()
    >>> opened = []
    >>> for step, place in enumerate([(0.0, 1.0), (0.0, 2.0), (2.0, 2.0), (1.0, 2.0)]):
    ...     path = Path(folder.name) / f"{step}.safetensors"
    ...     checkpoints.write(path, {"w": torch.tensor(place)})
    ...     opened.append(checkpoints.open(path))
    >>> [neighbour.turn for neighbour in measure_movement(opened).neighbours]
    [None, 0.0, -1.0]
    >>> folder.cleanup()
    """
    reference = checkpoints[0]
    for checkpoint in checkpoints[1:]:
        _refuse_other_layout(reference, checkpoint)
    path = _Path(len(checkpoints))
    for name, info in reference.tensors.items():
        if name not in reference.ties and is_averaged(info.dtype):
            for start, stop in slices(info.numel):
                path.follow(read_float64(checkpoint, name, start, stop) for checkpoint in checkpoints)
    return path.movement()


def _refuse_other_layout(reference: Checkpoint, checkpoint: Checkpoint) -> None:
    difference = compare_layouts(reference, checkpoint)
    names = {*difference.missing, *difference.extra, *(change.name for change in difference.reshaped)}
    if names:
        raise StructureError(
            f"{checkpoint.path} does not hold the tensors of {reference.path}: {name_list(sorted(names))} differ; "
            f"compare the two to see how"
        )


class _Path:
    """Squares and products along the path, added up slice by slice."""

    def __init__(self, count: int) -> None:
        self._square = [0.0] * count  # ‖b_k‖²
        self._cross = [0.0] * count  # b_k · b_{k−1}
        self._moved = [0.0] * count  # ‖d_k‖²
        self._turned = [0.0] * count  # d_k · d_{k−1}
        self._net = 0.0  # ‖b_K − b_1‖²

    def follow(self, places: Iterable[Tensor]) -> None:
        """Add one slice, given as the same elements of each of the weights in turn."""
        first = before = moved_before = None
        for k, place in enumerate(places):
            self._square[k] += _dot(place, place)
            if first is None or before is None:
                first = before = place
                continue
            moved = place - before
            self._cross[k] += _dot(place, before)
            self._moved[k] += _dot(moved, moved)
            if moved_before is not None:
                self._turned[k] += _dot(moved, moved_before)
            before, moved_before = place, moved
        if first is not None and before is not None:
            self._net += _dot(before - first, before - first)

    def movement(self) -> Movement:
        neighbours = [
            Neighbour(
                math.sqrt(self._moved[k] / self._square[k - 1]) if self._square[k - 1] else None,
                cosine(self._cross[k], self._square[k], self._square[k - 1]),
                cosine(self._turned[k], self._moved[k], self._moved[k - 1]),
            )
            for k in range(1, len(self._square))
        ]
        length = sum(map(math.sqrt, self._moved))
        return Movement(tuple(neighbours), math.sqrt(self._net) / length if length else None)


def _dot(first: Tensor, second: Tensor) -> float:
    """The inner product, in which NaN and infinities count as zeros."""
    product = float(torch.dot(first, second))
    if math.isfinite(product):
        return product
    first, second = (torch.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0) for values in (first, second))
    return float(torch.dot(first, second))
