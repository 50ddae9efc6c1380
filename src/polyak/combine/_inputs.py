"""The inputs of an average: opened, of one layout, in step order, each with the steps it stands for,
and the memory that a pass over them may take."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from polyak._checks import Difference
from polyak._version import __version__
from polyak.checkpoints import Checkpoint, Layout, TensorInfo
from polyak.checkpoints._io import sha256
from polyak.errors import OptionError, StructureError
from polyak.profiles import Profile, without_live

__all__ = [
    "Budget",
    "Span",
    "averaged_inputs",
    "coefficients",
    "common_layout",
    "input_names",
    "is_averaged",
    "parse_bytes",
    "provenance",
    "spans_of_steps",
]

# From a profile to coefficients: which steps each block or checkpoint stands for, and the weight they
# carry.


@dataclass(frozen=True)
class Span:
    """The optimizer steps ``(start, stop]``, and how many samples were taken in them."""

    start: int
    stop: int
    count: int = 1


def spans_of_steps(steps: Sequence[int]) -> list[Span]:
    """What checkpoints saved at ``steps`` stand for: all steps since the checkpoint before.

    The first takes the length of the next gap, or all steps up to its own if it is the only one.

    Raises ``OptionError`` unless the steps rise from 0 or later.

    >>> spans_of_steps([1000, 1500])
    [Span(start=500, stop=1000, count=1), Span(start=1000, stop=1500, count=1)]
    """
    if not all(before < after for before, after in zip([-1, *steps], steps, strict=False)):
        raise OptionError(f"checkpoints must be of different steps, oldest first, got {list(steps)}")
    first_gap = steps[1] - steps[0] if len(steps) > 1 else steps[0]
    starts = [max(0, steps[0] - first_gap), *steps[:-1]]
    return [Span(start, stop) for start, stop in zip(starts, steps, strict=True)]


def coefficients(profile: Profile, spans: Sequence[Span], *, beside: bool = False) -> list[float]:
    """The coefficient of each span: a_k = F(stop_k) - F(start_k), divided by their sum.

    F is the profile's ``cumulative`` over optimizer steps, over samples, or over spans, as its unit says. Steps
    that no span covers, as before the first of a run's last checkpoints, give their weight to all the others in
    proportion.

    Args:
        profile: any profile.
        spans: disjoint, in step order.
        beside: whether the weights that the run ended with are one more input, beside the spans, which a `Blend`
            counts. Otherwise they are those of the last span, as those of checkpoints are.

    Returns:
        One number per span, and one more at the end with ``beside``; they sum to 1.

    Raises ``OptionError`` if the profile does not fit the run, or has no weight on any span.

    >>> import polyak
    >>> spans = spans_of_steps([1000, 1500, 2500])
    >>> coefficients(polyak.Uniform(), spans[1:]), coefficients(polyak.Tail(steps=1500), spans)
    ([0.5, 0.5], [0.0, 0.333..., 0.666...])
    >>> coefficients(polyak.Blend("uniform", 0.75), spans[1:], beside=True)
    [0.375, 0.375, 0.25]
    """
    inner, live = without_live(profile)
    row = [(1 - live) * a for a in _of_spans(inner, spans)] if live else _of_spans(inner, spans)
    if beside:
        return [*row, live]
    return [*row[:-1], row[-1] + live]


def _of_spans(profile: Profile, spans: Sequence[Span]) -> list[float]:
    if profile.unit == "steps":
        starts, stops = [span.start for span in spans], [span.stop for span in spans]
    else:
        lengths = [span.count if profile.unit == "samples" else 1 for span in spans]
        stops = np.cumsum(lengths)
        starts = stops - lengths
    total = stops[-1]
    weights = profile.without_rounding(profile.cumulative(stops, total) - profile.cumulative(starts, total))
    if weights.sum() == 0:
        raise OptionError(
            f"{profile} has no weight on any of the steps there are, {spans[0].start} to {spans[-1].stop}"
        )
    return (weights / weights.sum()).tolist()


# What an averaged checkpoint says about where it comes from.

# The one entry of the output's metadata that is ours: JSON.
METADATA_KEY = "polyak"
_MAX_NAME_PARTS = 4


def provenance(
    inputs: Sequence[Checkpoint],
    coefficients: Sequence[float],
    profile: str | None,
    steps: Sequence[int] | None,
    *,
    hashes: bool = False,
) -> dict[str, str]:
    """Metadata for the average of ``inputs``: what all of them say alike, and one JSON entry about the average.

    Args:
        inputs: the checkpoints, in the order of their coefficients.
        coefficients: one for each.
        profile: the profile as text, None if weights were given.
        steps: the training step of each, if known.
        hashes: add the SHA-256 of every input file, which takes reading them once more.
    """
    record: dict[str, object] = {
        "version": __version__,
        "inputs": input_names(inputs),
        "coefficients": list(coefficients),
        "profile": profile,
        "steps": None if steps is None else list(steps),
    }
    if hashes:
        record["sha256"] = {
            file.relative_to(checkpoint.path.parent).as_posix(): sha256(file)
            for checkpoint in inputs
            for path in checkpoint.paths
            for file in _files(path)
        }
    return _agreed(inputs) | {METADATA_KEY: json.dumps(record)}


def input_names(inputs: Sequence[Checkpoint]) -> list[str]:
    """File or folder names; with those of the folders they are in as far as they would be the same without.

    Absolute paths would say more about the machine than about the weights.
    """
    parts = [checkpoint.path.absolute().parts for checkpoint in inputs]
    names: list[str] = []
    for depth in range(1, _MAX_NAME_PARTS + 1):
        names = ["/".join(those[-depth:]) for those in parts]
        if len(set(names)) == len(names):
            break
    return names


def averaged_inputs(checkpoint: Checkpoint) -> list[str]:
    """What the checkpoint was made of, as :func:`provenance` noted it; nothing where it did not."""
    try:
        return [str(name) for name in json.loads(checkpoint.metadata[METADATA_KEY])["inputs"]]
    except (KeyError, TypeError, ValueError, RecursionError):
        return []


def _agreed(inputs: Sequence[Checkpoint]) -> dict[str, str]:
    """Metadata that every input has. Text that is the name of a tensor is left out: it would read as a tie."""
    return {
        key: text
        for key, text in inputs[0].metadata.items()
        if key != METADATA_KEY
        and text not in inputs[0].tensors
        and all(checkpoint.metadata.get(key) == text for checkpoint in inputs)
    }


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


# Comparing what checkpoints say they hold, before any weight is read.


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
        Names and shapes in the order of the first input; tensors are tied where they are tied in every input. Where
        floating dtypes differ, the inputs are read in one that holds all of them: bf16 beside fp32 in fp32.

    Raises ``StructureError`` that names, for all inputs at once, the tensors that are missing, extra, of
    another shape or of another kind of dtype than in the first.
    """
    first = inputs[0]
    _widen(inputs)
    others = [other for other in inputs[1:] if other.tensors != first.tensors]
    if problems := [f"{other.path} {Difference.of(first.tensors, other.tensors)}" for other in others]:
        raise StructureError(
            f"the inputs do not hold the same tensors: compared with {first.path}, {'; '.join(problems)}. "
            "Average checkpoints of one model, or choose the right weights with ",
            "key",
            "--key",
        )
    ties = _common_ties(inputs)
    tensors = {
        name: replace(info, dtype=dtype) if dtype is not None and info.dtype.is_floating_point else info
        for name, info in first.tensors.items()
        if name not in ties
    }
    return Layout(tensors, ties, metadata or {})


def _widen(inputs: Sequence[Checkpoint]) -> None:
    """Have tensors of unlike floating dtypes read in one that holds them all."""
    dtypes: dict[str, set[torch.dtype]] = {}
    for checkpoint in inputs:
        for name, info in checkpoint.tensors.items():
            dtypes.setdefault(name, set()).add(info.dtype)
    unlike = {
        name: _widest(those)
        for name, those in dtypes.items()
        if len(those) > 1 and all(dtype.is_floating_point for dtype in those)
    }
    for checkpoint in inputs if unlike else ():
        checkpoint.widen(unlike)


def _widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    # torch promotes no 8-bit floats.
    wide = [torch.float32 if dtype.itemsize == 1 else dtype for dtype in dtypes]
    return functools.reduce(torch.promote_types, wide)


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


def is_averaged(dtype: torch.dtype) -> bool:
    """Whether tensors of this dtype are averaged; integer and bool ones are copied."""
    return dtype.is_floating_point or dtype.is_complex


# How the memory that ``combine`` may take is spent: buffers for slices, threads, and a reserve for the rest.

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY_UNITS = {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", re.IGNORECASE)

# A slice and its running sum stay in the cache while every input passes through; larger ones bring nothing more.
_BEST_SLICE_BYTES = 1 << 22
_LEAST_SLICE_BYTES = 1 << 16
# More threads than this wait for memory, not for each other's turn.
_BEST_WORKERS = 2
# Modules loaded on first use, thread stacks, the allocator's slack.
_RESERVE_BYTES = 16_000_000
# What the description of one tensor takes in an opened checkpoint and while headers are compared.
_BYTES_PER_DESCRIPTION = 1_000
# Per worker and beside one sum per output: values as read, as summed, their difference, as written.
BUFFERS_BESIDE_SUMS = 4


def parse_bytes(size: int | str) -> int:
    """A number of bytes, from a number or from text such as ``"512MB"`` (10**6) or ``"2GiB"`` (2**30).

    Raises ``OptionError`` for anything else.

    >>> parse_bytes("512MB"), parse_bytes("1.5 GiB"), parse_bytes(4096)
    (512000000, 1610612736, 4096)
    """
    if isinstance(size, int) and not isinstance(size, bool):
        return size
    found = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if found is None:
        raise OptionError(f"cannot read {size!r} as a size in bytes: write 512MB, 2GiB or a whole number")
    return int(float(found[1]) * (_UNITS | _BINARY_UNITS)[found[2].upper()])


@dataclass(frozen=True)
class Budget:
    """How many threads take how large slices, and the memory that this and everything beside it comes to.

    Attributes:
        workers: threads that read, sum and write.
        slice_bytes: size of each of a worker's buffers.
        total_bytes: the most memory in use, at or below what was allowed.
    """

    workers: int
    slice_bytes: int
    total_bytes: int

    @classmethod
    def within(
        cls,
        max_memory: int | str,
        inputs: Sequence[Checkpoint],
        n_outputs: int,
        most_workers: int | None = None,
    ) -> Budget:
        """The fastest that fits. Raises ``OptionError``, with the least possible, where nothing does."""
        buffers = n_outputs + BUFFERS_BESIDE_SUMS
        fixed_bytes = _RESERVE_BYTES + sum(map(_held_bytes, inputs))
        max_bytes = parse_bytes(max_memory)
        workers = min(most_workers or _BEST_WORKERS, _usable_cores())
        slice_bytes = _BEST_SLICE_BYTES
        while fixed_bytes + workers * buffers * slice_bytes > max_bytes:
            if slice_bytes > _LEAST_SLICE_BYTES:
                slice_bytes //= 2
            elif workers > 1:
                workers -= 1
            else:
                least = (fixed_bytes + buffers * slice_bytes) // 10**6 + 1
                raise OptionError(
                    f"a memory of {max_memory} is too little for {len(inputs)} inputs and {n_outputs} "
                    f"outputs: allow {least}MB or more{_cause(inputs)}"
                )
        return cls(workers, slice_bytes, fixed_bytes + workers * buffers * slice_bytes)


def _held_bytes(checkpoint: Checkpoint) -> int:
    values = 0 if checkpoint.is_lazy else sum(info.nbytes for info in checkpoint.tensors.values())
    return values + _BYTES_PER_DESCRIPTION * len(checkpoint.tensors)


def _cause(inputs: Sequence[Checkpoint]) -> str:
    whole = [str(checkpoint.path) for checkpoint in inputs if not checkpoint.is_lazy]
    if not whole:
        return ""
    return f" ({whole[0]} is in an old torch format that must be loaded whole: save it again with torch.save)"


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
