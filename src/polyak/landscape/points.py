"""Weights as points of a space: checked, combined, measured, and scored in the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from polyak.accumulator import mean_dtype
from polyak.errors import OptionError, StructureError
from polyak.selection.progress import bar
from polyak.selection.trial import ScoreFunction, try_weights
from polyak.selection.weights import matched
from polyak.tensors import ModelTensors

__all__ = ["Point", "combined", "inner", "points", "scores"]

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
    found: list[Point] = []
    for name, given in weights.items():
        if not given:
            raise OptionError(f"weights[{name!r}] is empty")
        try:
            pairs = matched(model, given)
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
    """origin + Σ c_i (other_i - origin), which is an end itself where one coefficient is 1 and the rest are 0.

    >>> a, b = {"w": torch.tensor([1.0])}, {"w": torch.tensor([3.0])}
    >>> combined(a, [b], [0.5])
    {'w': tensor([2.])}
    """
    result = dict(origin)
    for name, start in origin.items():
        for other, coefficient in zip(others, coefficients, strict=True):
            if coefficient == 1:  # exactly, whatever the rounding of the difference
                result[name] = other[name] + (result[name] - start)
            elif coefficient:
                result[name] = result[name] + (other[name] - start) * coefficient
    return result


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
) -> Iterator[float]:
    """The score of each point, with the model as it was between them and afterwards."""
    with bar("weights", progress) as advance:
        for point in advance(tried, total):
            yield try_weights(model, point, score, recalibrate).value


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).to(torch.complex128 if tensor.is_complex() else torch.float64)
