"""Trying weights in a live model: the score they get, and which of two scores is better."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from polyak.errors import NotStartedError, OptionError
from polyak.selection.uncertainty import Score, read_score
from polyak.selection.weights import averaged, evaluation
from polyak.trajectory import Trajectory

__all__ = ["Mode", "ScoreFunction", "badness", "refuse_no_trajectory", "refuse_unknown_mode", "try_weights"]

Mode = Literal["min", "max"]
ScoreFunction = Callable[[nn.Module], object]


@torch.no_grad()
def try_weights(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    score: ScoreFunction,
    recalibrate: Iterable[Any] | None = None,
) -> Score:
    """``score(model)`` in evaluation mode with ``weights`` in the model, which is as before afterwards.

    Empty ``weights`` are those that the model has.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> _ = model.weight.data.fill_(3.0)
    >>> try_weights(model, {"weight": torch.tensor([[2.0]])}, lambda m: m.weight.item()).value
    2.0
    >>> model.weight.item()
    3.0
    """
    with averaged(model, weights, recalibrate), evaluation(model):
        return read_score(score(model))


def badness(value: float, mode: Mode) -> float:
    """A number that is lower the better the score; a score that is not a number is the worst.

    >>> badness(0.9, "max"), badness(math.nan, "max")
    (-0.9, inf)
    """
    if math.isnan(value):
        return math.inf
    return value if mode == "min" else -value


def refuse_unknown_mode(mode: str) -> None:
    """Refuse (``OptionError``) anything but ``"min"`` and ``"max"``."""
    if mode not in ("min", "max"):
        raise OptionError(f"mode must be 'min' (a loss) or 'max' (an accuracy), got {mode!r}")


def refuse_no_trajectory(given: object) -> None:
    """Refuse (``OptionError``) anything but a trajectory, and (``NotStartedError``) one without blocks."""
    if not isinstance(given, Trajectory):
        raise OptionError(
            f"the first argument must be a Trajectory, got {given!r}: open it with polyak.Trajectory(directory), or "
            "checkpoints with polyak.Trajectory.from_checkpoints(paths)"
        )
    if not given.blocks:
        raise NotStartedError(f"{given} has no block to average yet: its first one is not full")
