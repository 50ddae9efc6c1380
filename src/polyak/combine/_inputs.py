"""The inputs of an average: opened, of one layout, in step order, each with the steps it stands for,
and the memory that a pass over them may take."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

import numpy as np
import torch

from polyak import checkpoints
from polyak._checks import Difference
from polyak._version import __version__
from polyak.checkpoints import Checkpoint, Layout, TensorInfo, _checkpoint
from polyak.checkpoints._io import sha256
from polyak.errors import OptionError, StructureError, name_list
from polyak.profiles import Profile

__all__ = [
    "Budget",
    "Span",
    "coefficients",
    "common_layout",
    "in_step_order",
    "input_names",
    "is_averaged",
    "known_steps",
    "open_inputs",
    "parse_bytes",
    "provenance",
    "refuse_partly_known",
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


def coefficients(profile: Profile, spans: Sequence[Span]) -> list[float]:
    """The coefficient of each span: a_k = F(stop_k) - F(start_k), divided by their sum.

    F is the profile's ``cumulative`` over optimizer steps, over samples, or over spans, as its unit says. Steps
    that no span covers, as before the first of a run's last checkpoints, give their weight to all the others in
    proportion.

    Args:
        profile: any profile.
        spans: disjoint, in step order.

    Returns:
        One number per span; they sum to 1.

    Raises ``OptionError`` if the profile does not fit the run, or has no weight on any span.

    >>> import polyak
    >>> spans = spans_of_steps([1000, 1500, 2500])
    >>> coefficients(polyak.Uniform(), spans[1:]), coefficients(polyak.Tail(steps=1500), spans)
    ([0.5, 0.5], [0.0, 0.333..., 0.666...])
    """
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
            for file in _files(checkpoint.path)
        }
    return _agreed(inputs) | {METADATA_KEY: json.dumps(record)}


def input_names(inputs: Sequence[Checkpoint]) -> list[str]:
    """File or folder names; with that of the folder they are in where they would be the same.

    Absolute paths would say more about the machine than about the weights.
    """
    names = [checkpoint.path.name for checkpoint in inputs]
    if len(set(names)) == len(names):
        return names
    return [f"{checkpoint.path.absolute().parent.name}/{checkpoint.path.name}" for checkpoint in inputs]


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
        Names and shapes in the order of the first input; tensors are tied where they are tied in every input.

    Raises ``StructureError`` that names, for all inputs at once, the tensors that are missing, extra, of
    another shape or of another dtype than in the first.
    """
    first = inputs[0]
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


# Which checkpoints are averaged, and at which training steps they were saved.

# A number after one of these words, the first that all names have; else one that stands by itself, not in 0.90.
_AFTER_WORDS = [
    re.compile(rf"{word}\D?(\d{{1,18}})(?!\d)", re.IGNORECASE) for word in ("step", "iter(?:ation)?", "epoch")
]
_AFTER_EPOCH = _AFTER_WORDS[-1]
_NUMBER = re.compile(r"(?<!\d)(?<!\d\.)\d{1,18}(?!\d)(?!\.\d)")


def open_inputs(
    paths: Iterable[str | PathLike[str]] | str | PathLike[str], key: str | None = None
) -> list[Checkpoint]:
    """Open checkpoints, and all those in folders of checkpoints.

    Raises ``OptionError`` if there is none, or a folder holds an average of others in it, and what
    ``polyak.checkpoints.open`` raises.
    """
    if isinstance(paths, str | PathLike):
        paths = [paths]
    opened: list[Checkpoint] = []
    for path in map(Path, paths):
        files = _expanded(path)
        found = [checkpoints.open(file, key) for file in files]
        if files != [path]:
            _refuse_average_of_others(found)
        opened += found
    if not opened:
        raise OptionError("there is nothing to average: name one or more checkpoints, or a folder of them")
    return opened


def _refuse_average_of_others(siblings: Sequence[Checkpoint]) -> None:
    """Refuse what an earlier call wrote into the folder of what it was made of: these would count twice."""
    names = {checkpoint.path.name for checkpoint in siblings}
    for checkpoint in siblings:
        made_of = names.intersection(Path(name).name for name in averaged_inputs(checkpoint))
        if made_of - {checkpoint.path.name}:
            raise OptionError(
                f"{checkpoint.path} is itself an average, of "
                f"{name_list(sorted(made_of, key=_checkpoint.natural_order))} beside it: move it to another folder, or "
                "name the checkpoints to average"
            )


def _expanded(path: Path) -> list[Path]:
    if not path.is_dir() or _checkpoint.is_checkpoint_folder(path):
        return [path]
    if _checkpoint.is_recording(path):
        raise OptionError(
            f"{path} is a recorded run, whose blocks stand for unlike numbers of samples: take averages of it alone, ",
            f"by polyak.Trajectory({str(path)!r}).write, or let polyak.select choose one",
            "by polyak average, or let polyak select choose one",
        )
    files = _checkpoint.checkpoint_paths(path)
    if not files:
        _checkpoint.recognise(path)  # says what the folder holds instead
    return files


def known_steps(inputs: Sequence[Checkpoint]) -> list[int] | None:
    """The training step of each checkpoint, or None where they are not known for all, or not all different.

    They are taken from the checkpoints themselves, else from their names.
    """
    saved = [checkpoint.step for checkpoint in inputs]
    known = [step for step in saved if step is not None]
    if len(known) == len(saved) == len(set(known)):
        return _counted_from_one(known, any(checkpoint.step_key != "epoch" for checkpoint in inputs))
    return steps_in_names([checkpoint.path for checkpoint in inputs])


def steps_in_names(paths: Sequence[Path]) -> list[int] | None:
    """The number that tells the names apart: after ``step``, ``iter`` or ``epoch``, else the last that always differs.

    A name without numbers, such as ``model.safetensors``, is taken with that of its folder. Where epochs, or
    numbers that nothing says to be steps, begin at 0, the first stands for one that was trained: they are
    counted from 1.

    >>> steps_in_names([Path("epoch=1-step=500.ckpt"), Path("epoch=2-step=1000.ckpt")])
    [500, 1000]
    >>> steps_in_names([Path("epoch1_loss0.90.pt"), Path("epoch2_loss0.50.pt")])
    [1, 2]
    >>> steps_in_names([Path("run/9/model_bf16.pt"), Path("run/10/model_bf16.pt")])
    [9, 10]
    >>> steps_in_names([Path("epoch0.pt"), Path("epoch1.pt")])
    [1, 2]
    >>> steps_in_names([Path("best.pt"), Path("last.pt")])
    """
    for names in ([path.stem for path in paths], [path.absolute().parent.name for path in paths]):
        for column, are_steps in _columns(names):
            numbers = [int(number) for number in column]
            if len(set(numbers)) == len(numbers):
                return _counted_from_one(numbers, are_steps)
    return None


def _counted_from_one(numbers: list[int], are_steps: bool) -> list[int]:
    return numbers if are_steps or min(numbers) > 0 else [number + 1 for number in numbers]


def _columns(names: Sequence[str]) -> Iterator[tuple[Sequence[str], bool]]:
    """Numbers that all ``names`` have, those that most likely are steps first, and whether a word says so."""
    for word in _AFTER_WORDS:
        found = [match[1] for name in names if (match := word.search(name))]
        if len(found) == len(names):
            yield found, word is not _AFTER_EPOCH
    numbers = [_NUMBER.findall(name) for name in names]
    if len({len(found) for found in numbers}) == 1:
        for column in reversed(list(zip(*numbers, strict=True))):
            yield column, False


def in_step_order(inputs: Sequence[Checkpoint]) -> tuple[list[Checkpoint], list[int] | None]:
    """Checkpoints by rising step, with the steps; in the order given, with None, where they are not known.

    Raises ``OptionError`` where they are known of some only.
    """
    steps = known_steps(inputs)
    if steps is None:
        refuse_partly_known(inputs)
        return list(inputs), None
    order = sorted(range(len(steps)), key=steps.__getitem__)
    return [inputs[index] for index in order], [steps[index] for index in order]


def refuse_partly_known(inputs: Sequence[Checkpoint]) -> None:
    """Refuse (``OptionError``) inputs of which only some say a step.

    A ``best.pt`` beside ``epoch_1.pt``, ``epoch_2.pt``, … has no place in their order.
    """
    without = [c.path.name for c in inputs if c.step is None and not _NUMBER.search(c.path.stem)]
    if 0 < len(without) < len(inputs):
        raise OptionError(
            f"no training step is known of {name_list(without)}, as it is of the others: leave those out, for example "
            "by a pattern such as 'run/epoch_*.pt'"
        )


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
