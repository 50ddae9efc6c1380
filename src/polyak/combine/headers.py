"""Comparing what checkpoints say they hold, before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from polyak.checkpoints import Checkpoint, Layout, TensorInfo
from polyak.combine.running import is_averaged
from polyak.errors import StructureError, name_list

__all__ = ["common_layout"]

_MOST_NAMES = 5


def common_layout(
    inputs: Sequence[Checkpoint],
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Layout:
    """What an average of ``inputs`` holds, from their headers alone.

    Args:
        inputs: one or more opened checkpoints.
        dtype: for the floating-point tensors; by default that of the inputs.
        metadata: entries of the output.

    Returns:
        Names and shapes in the order of the first input; tensors are tied where they are tied in every input.

    Raises ``StructureError`` that names, for all inputs at once, the tensors that are missing, extra, of
    another shape or of another dtype than in the first.
    """
    first = inputs[0]
    problems = [problem for other in inputs[1:] for problem in _differences(first, other)]
    if problems:
        raise StructureError(
            f"the inputs do not hold the same tensors: compared with {first.path}, {'; '.join(problems)}. "
            f"Average checkpoints of one model, or choose the right weights with key"
        )
    ties = _common_ties(inputs)
    tensors = {
        name: replace(info, dtype=dtype) if dtype is not None and info.dtype.is_floating_point else info
        for name, info in first.tensors.items()
        if name not in ties
    }
    return Layout(tensors, ties, metadata or {})


def _differences(first: Checkpoint, other: Checkpoint) -> list[str]:
    ours, theirs = first.tensors, other.tensors
    missing = [name for name in ours if name not in theirs]
    extra = [name for name in theirs if name not in ours]
    shared = [name for name in ours if name in theirs]
    reshaped = [
        f"{name!r} has shape {list(theirs[name].shape)} and not {list(ours[name].shape)}"
        for name in shared
        if theirs[name].shape != ours[name].shape
    ]
    retyped = [
        f"{name!r} is {theirs[name].dtype} and not {ours[name].dtype}"
        for name in shared
        if theirs[name].dtype != ours[name].dtype
    ]
    found = []
    if missing:
        found.append(f"lacks {name_list(missing, _MOST_NAMES)}")
    if extra:
        found.append(f"has also {name_list(extra, _MOST_NAMES)}")
    found += [_shortened(group) for group in (reshaped, retyped) if group]
    return [f"{other.path} {', '.join(found)}"] if found else []


def _shortened(phrases: list[str]) -> str:
    rest = len(phrases) - _MOST_NAMES
    return "in it " + ", ".join(phrases[:_MOST_NAMES]) + (f" and {rest} more" if rest > 0 else "")


def _common_ties(inputs: Sequence[Checkpoint]) -> dict[str, str]:
    first_names: dict[tuple[str, ...], str] = {}
    ties = {}
    for name in inputs[0].tensors:
        place = tuple(checkpoint.ties.get(name, name) for checkpoint in inputs)
        first = first_names.setdefault(place, name)
        if first != name:
            ties[name] = first
    return ties


def averaged_names(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Those that are averaged; the others are copied."""
    return [name for name, info in tensors.items() if is_averaged(info.dtype)]
