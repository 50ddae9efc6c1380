"""Weights as points of a space: checked, combined, measured, and scored in the model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from polyak.accumulator import mean_dtype
from polyak.checkpoints.nesting import bare_names
from polyak.errors import OptionError, StructureError
from polyak.selection.progress import bar
from polyak.selection.trial import ScoreFunction, try_weights
from polyak.selection.weights import matched
from polyak.tensors import ModelTensors

__all__ = ["Point", "combined", "difference", "inner", "numbers", "points", "scores"]

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
) -> Iterator[float]:
    """The score of each point, with the model as it was between them and afterwards."""
    with bar("weights", progress) as advance:
        for point in advance(tried, total):
            yield try_weights(model, point, score, recalibrate).value


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
