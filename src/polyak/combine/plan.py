"""An offline average as a plan: everything that headers can tell, checked before a weight is read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from polyak import checkpoints
from polyak.checkpoints import Checkpoint, Layout, TensorInfo, Writer
from polyak.checkpoints.atomic import AtomicOutput
from polyak.checkpoints.formats import format_for
from polyak.combine.budget import Budget
from polyak.combine.dtypes import parse_dtype
from polyak.combine.engine import Progress, combine
from polyak.combine.headers import common_layout
from polyak.combine.inputs import in_step_order, known_steps, open_inputs
from polyak.combine.provenance import input_names, provenance
from polyak.combine.running import is_averaged
from polyak.combine.spans import Span, coefficients, spans_of_steps
from polyak.errors import OptionError, name_list
from polyak.profiles import Profile, Uniform, Weights, as_profile

__all__ = ["AverageReport", "Paths", "Plan", "plan_average"]

Paths = Iterable[str | PathLike[str]] | str | PathLike[str]


@dataclass(frozen=True)
class AverageReport:
    """What an average is made of.

    Attributes:
        output: where it is written.
        inputs: names of the checkpoints, in the order of ``coefficients``.
        coefficients: how much each counts; they sum to 1.
        steps: the training step of each; None if not known for all.
        averaged: names of the tensors that are averaged, tied ones once.
        copied: names of the integer and bool tensors, copied from the last input that counts.
        differing: those of ``copied`` that differ between inputs; empty before anything was read.
        ignored: entries of the inputs that are not among the weights.
        notes: which weights were chosen where inputs hold several, one sentence for all that are alike.
        bytes_read, bytes_written: of tensors.
        memory_bytes: the most that it takes, beyond the interpreter with torch.
    """

    output: str
    inputs: tuple[str, ...]
    coefficients: tuple[float, ...]
    steps: tuple[int, ...] | None
    averaged: tuple[str, ...]
    copied: tuple[str, ...]
    differing: tuple[str, ...]
    ignored: tuple[str, ...]
    notes: tuple[str, ...]
    bytes_read: int
    bytes_written: int
    memory_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Plan:
    """An average that has been checked in all its headers and not begun."""

    inputs: list[Checkpoint]
    coefficients: list[float]
    steps: list[int] | None
    profile: str | None
    layout: Layout
    dtype: torch.dtype | None
    output: Path
    overwrite: bool
    max_memory: int | str
    hashes: bool

    def report(self, differing: Sequence[str] = ()) -> AverageReport:
        """What will be, or has been, averaged."""
        tensors = {name: self.inputs[0].tensors[name] for name in self.layout.tensors}
        counted = sum(a != 0 for a in self.coefficients)
        return AverageReport(
            output=str(self.output),
            inputs=tuple(input_names(self.inputs)),
            coefficients=tuple(self.coefficients),
            steps=None if self.steps is None else tuple(self.steps),
            averaged=tuple(name for name, info in tensors.items() if is_averaged(info.dtype)),
            copied=tuple(name for name, info in tensors.items() if not is_averaged(info.dtype)),
            differing=tuple(differing),
            ignored=tuple(dict.fromkeys(entry for opened in self.inputs for entry in opened.ignored)),
            notes=(*_notes(self.inputs), *(_batchnorm_note(tensors) if counted > 1 else ())),
            bytes_read=counted * sum(info.nbytes for info in tensors.values()),
            bytes_written=sum(info.nbytes for info in self.layout.tensors.values()),
            memory_bytes=Budget.within(self.max_memory, self.inputs, 1).total_bytes,
        )

    def with_provenance(self) -> Layout:
        """The layout with the metadata of the output."""
        metadata = provenance(self.inputs, self.coefficients, self.profile, self.steps, hashes=self.hashes)
        return replace(self.layout, metadata=metadata)

    def run(self, progress: Progress | None = None) -> AverageReport:
        """Read, average and write."""
        with checkpoints.create(self.output, self.with_provenance(), overwrite=self.overwrite) as writer:
            differing = self.fill(writer, progress)
        return self.report(differing)

    def fill(
        self, writer: Writer, progress: Progress | None = None, share: tuple[int, int] = (0, 1)
    ) -> list[str]:
        """Read, average and hand to ``writer``: ``combine`` with what was planned."""
        return combine(
            self.inputs,
            [self.coefficients],
            [writer],
            max_memory=self.max_memory,
            accumulate=torch.float64 if self.dtype == torch.float64 else None,
            progress=progress,
            share=share,
        )


def plan_average(
    inputs: Paths,
    output: str | PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    profile: Profile | str | None = None,
    dtype: torch.dtype | str | None = None,
    max_memory: int | str = "256MB",
    key: str | None = None,
    overwrite: bool = False,
    hashes: bool = False,
) -> Plan:
    """Check everything that can be checked in headers alone; arguments and errors as ``average_checkpoints``."""
    if weights is not None and profile is not None:
        raise OptionError("weights and profile are two ways to say one thing: give one of them")
    output = Path(output)
    format_for(output, None)
    opened = open_inputs(inputs, key)
    _refuse_input_as_output(opened, output)
    AtomicOutput(output, overwrite)  # refuses what must not be overwritten, and touches nothing
    if profile is None:
        steps = known_steps(opened)
        chosen = Uniform() if weights is None else Weights(weights)
    else:
        opened, steps = in_step_order(opened)
        chosen = as_profile(profile)
    target = None if dtype is None else parse_dtype(dtype)
    plan = Plan(
        inputs=opened,
        coefficients=coefficients(chosen, _spans(opened, steps if profile is not None else None)),
        steps=steps,
        profile=None if profile is None else str(chosen),
        layout=common_layout(opened, target),
        dtype=target,
        output=output,
        overwrite=overwrite,
        max_memory=max_memory,
        hashes=hashes,
    )
    Budget.within(max_memory, opened, n_outputs=1)
    return plan


def _notes(inputs: Sequence[Checkpoint]) -> list[str]:
    names: dict[str, list[str]] = {}
    for name, checkpoint in zip(input_names(inputs), inputs, strict=True):
        if checkpoint.note:
            names.setdefault(checkpoint.note, []).append(name)
    return [
        note if len(those) == len(inputs) else f"{name_list(those)}: {note}" for note, those in names.items()
    ]


def batchnorm_statistics(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Names of running statistics: what a file tells of BatchNorm layers."""
    return [name for name, info in tensors.items() if is_statistic(name) and is_averaged(info.dtype)]


def is_statistic(name: str) -> bool:
    """Whether a tensor is, by its name, a running statistic of a BatchNorm layer.

    >>> is_statistic("layer1.bn.running_var"), is_statistic("layer1.bn.weight")
    (True, False)
    """
    return name.endswith(("running_mean", "running_var"))


def _batchnorm_note(tensors: Mapping[str, TensorInfo]) -> Iterator[str]:
    if statistics := batchnorm_statistics(tensors):
        yield (
            f"{name_list(statistics)} are BatchNorm statistics: their averages do not fit the averaged weights, so "
            "recompute them with polyak.update_bn"
        )


def _spans(inputs: Sequence[Checkpoint], steps: Sequence[int] | None) -> list[Span]:
    return spans_of_steps(range(1, len(inputs) + 1) if steps is None else steps)


def _refuse_input_as_output(inputs: Sequence[Checkpoint], output: Path) -> None:
    place = output.resolve()
    for checkpoint in inputs:
        path = checkpoint.path.resolve()
        is_same_file = output.exists() and os.path.samefile(output, path)
        if is_same_file or path.is_relative_to(place):
            raise OptionError(f"the output {output} is the input {checkpoint.path}: name another output")
