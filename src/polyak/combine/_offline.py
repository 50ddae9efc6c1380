"""``average_checkpoints``: what will be read and written, planned before anything is touched, and then done."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import KW_ONLY, asdict, dataclass, field, replace
from datetime import timedelta
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from polyak import checkpoints
from polyak._checks import checked, warn_user
from polyak._distributed import RankGroup
from polyak.checkpoints import _base, _io
from polyak.checkpoints._checkpoint import format_for
from polyak.combine import _inputs, _lora, _outputs, _ranks
from polyak.combine._engine import Progress, combine
from polyak.combine._inputs import Budget, is_averaged
from polyak.combine._reading import Paths, Reading, read_inputs
from polyak.errors import OptionError, PolyakError, name_list
from polyak.profiles import Profile, Uniform, Weights, as_profile

__all__ = [
    "AverageReport",
    "Plan",
    "average_checkpoints",
    "launched_on_ranks",
    "parse_dtype",
    "process_group",
    "run_on_ranks",
]

# Dtypes as people write them.

_SHORT = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
}


def parse_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A floating-point dtype from itself, its name in torch, or ``fp64``, ``fp32``, ``fp16``, ``bf16``, ``fp8``.

    Raises ``OptionError`` for anything else.

    >>> parse_dtype("bf16"), parse_dtype("float8_e5m2"), parse_dtype(torch.float32)
    (torch.bfloat16, torch.float8_e5m2, torch.float32)
    """
    text = str(dtype).removeprefix("torch.")
    found = _SHORT.get(text) or getattr(torch, text, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise OptionError(
            f"{text!r} is no floating-point dtype: choose from {', '.join(_SHORT)}, or a name that torch has"
        )
    return found


# An offline average as a plan: everything that headers can tell, checked before a weight is read.


@dataclass(frozen=True)
class AverageReport:
    """What an average is made of.

    Attributes:
        output: where it is written.
        inputs: names of the checkpoints, in the order of ``coefficients``.
        coefficients: how much each counts; they sum to 1.
        steps: the training step of each; None if not known for all.
        plan: for everything that was found: name, whether it is taken, why not, step, key.
        left_out: one line about what was found and not taken, and why; empty where all was.
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
    left_out: str
    plan: tuple[dict[str, Any], ...]
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


@dataclass(eq=False)
class Plan:
    """An average of checkpoints, checked in all their headers, and not begun.

    What is given, and what is raised where something does not fit, is as for :func:`average_checkpoints`.

    Attributes:
        opened: the inputs, in the order of ``coefficients``.
        coefficients: how much each counts; they sum to 1.
        steps: the training step of each; None if not known for all.
        layout: of the output, with the files that lie beside its weights.
        output_notes: what to know about the output, one sentence each.
        ranks: the folder to write where each input is one file for each rank; else None.
    """

    inputs: Paths
    output: str | PathLike[str]
    _: KW_ONLY
    weights: Sequence[float] | None = None
    profile: Profile | str | None = None
    dtype: torch.dtype | str | None = None
    max_memory: int | str = "256MB"
    key: str | None = None
    overwrite: bool = False
    hashes: bool = False
    steps: Sequence[int] | None = None
    last: int | None = None
    found: Collection[Path] = ()
    allow: Sequence[str] = ()
    like: str | PathLike[str] | None = None
    rank: int | None = None
    lora: str = "product"

    reading: Reading = field(init=False)
    opened: list[checkpoints.Checkpoint] = field(init=False)
    coefficients: list[float] = field(init=False)
    layout: checkpoints.Layout = field(init=False)
    output_notes: list[str] = field(init=False)
    ranks: _ranks.RankFolder | None = field(init=False, default=None)
    _adapters: _lora.MeanOfUpdates | _lora.MeanOfFactors | None = field(init=False)

    def __post_init__(self) -> None:
        if self.weights is not None and self.profile is not None:
            raise OptionError(
                "of two ways to say one thing give one: ", "weights or profile", "--weights or --profile"
            )
        self.output = Path(self.output)
        format_for(self.output, None)
        self.reading = read_inputs(
            self.inputs,
            self.key,
            found=self.found,
            steps=self.steps,
            last=self.last,
            all_count=self.weights is not None,
            allow=self.allow,
        ).required(by_rank=True)
        self.opened, self.steps = self.reading.checkpoints, self.reading.steps
        _refuse_input_as_output(self.opened, self.output)
        # Refuses what must not be overwritten, and touches nothing.
        _io.AtomicOutput(self.output, self.overwrite)
        if self.profile is None:
            chosen = Uniform() if self.weights is None else Weights(self.weights)
            spans = _inputs.spans_of_steps(range(1, len(self.opened) + 1))
        else:
            chosen = self.profile = as_profile(self.profile)
            self.reading.refuse_unordered()
            spans = _inputs.spans_of_steps(self.steps or range(1, len(self.opened) + 1))
        self.dtype = None if self.dtype is None else parse_dtype(self.dtype)
        self.coefficients = _inputs.coefficients(chosen, spans)
        self._refuse_parts_of_adapters()
        self._adapters = _lora.planned(
            self.opened, self.coefficients, rank=self.rank, mode=self.lora, dtype=self.dtype
        )
        layout = self._adapters.layout if self._adapters else _inputs.common_layout(self.opened, self.dtype)
        if self.opened[0].parts:
            self._plan_ranks(layout, self.output)
        else:
            self._plan_one(layout, self.output)
        self._memory_bytes()

    def _plan_one(self, layout: checkpoints.Layout, output: Path) -> None:
        self.layout, self.output_notes = _outputs.completed(
            layout, self.opened, output, like=self.like, key=self.key
        )

    def _refuse_parts_of_adapters(self) -> None:
        if self.lora != "factors" and any(one.parts and _lora.is_adapter(one) for one in self.opened):
            raise OptionError(
                f"{name_list([item.name for item in self.reading.taken])} are the ranks' parts of LoRA adapters, whose "
                "updates are products of whole factors: make whole adapters first, or average the factors with ",
                'lora="factors"',
                "--lora factors",
            )

    def _plan_ranks(self, layout: checkpoints.Layout, output: Path) -> None:
        self.ranks = _ranks.RankFolder(self.opened, output, layout)
        if self.like is not None:
            like = Path(self.like)
            named = [item for item in self.reading.items if like in (item.path, *item.parts.values())]
            self.ranks.nest(named or read_inputs(like, self.key, allow=self.allow).taken, like, self.key)
        self.layout, self.output_notes = self.ranks.layout, self.ranks.notes

    def report(self, differing: Sequence[str] = (), *, recalibrated: bool = False) -> AverageReport:
        """What will be, or has been, averaged; ``recalibrated`` if BatchNorm statistics are computed anew."""
        tensors = {name: self.opened[0].tensors[name] for name in self.layout.tensors}
        counted = sum(a != 0 for a in self.coefficients)
        return AverageReport(
            output=str(self.output),
            inputs=tuple(_inputs.input_names(self.opened)),
            coefficients=tuple(self.coefficients),
            steps=None if self.steps is None else tuple(self.steps),
            left_out=self.reading.left_out,
            plan=tuple(item.to_dict() for item in self.reading.items),
            averaged=tuple(name for name, info in tensors.items() if is_averaged(info.dtype)),
            copied=tuple(name for name, info in tensors.items() if not is_averaged(info.dtype)),
            differing=tuple(differing),
            ignored=tuple(dict.fromkeys(entry for one in self.opened for entry in one.ignored)),
            notes=(
                *_notes(self.opened),
                *_single_note(counted),
                *_ranks.part_notes(self.reading.taken),
                *filter(None, (self.reading.of_several_runs,)),
                *(_batchnorm_note(tensors, recalibrated) if counted > 1 or recalibrated else ()),
                *self.output_notes,
                *self._adapter_notes(),
            ),
            bytes_read=counted * sum(info.nbytes for info in tensors.values()),
            bytes_written=sum(info.nbytes for info in self.layout.tensors.values()),
            memory_bytes=self._memory_bytes(),
        )

    def run(self, progress: Progress | None = None) -> AverageReport:
        """Read, average and write."""
        with self.create() as writer:
            differing = self.fill(writer, progress)
        return self.report(differing)

    def create(self, _observe: _io.Observer | None = None) -> checkpoints.Writer:
        """The writer of the output, which says what it was made of."""
        profile = None if self.profile is None else str(self.profile)
        metadata = _inputs.provenance(self.opened, self.coefficients, profile, self.steps, hashes=self.hashes)
        if self.ranks is not None:
            return self.ranks.create(metadata, self.overwrite)
        if self._adapters is not None:
            metadata = self._adapters.metadata(metadata)
        layout = replace(self.layout, metadata=metadata)
        return checkpoints.create(self.output, layout, overwrite=self.overwrite)

    def fill(
        self, writer: checkpoints.Writer, progress: Progress | None = None, share: tuple[int, int] = (0, 1)
    ) -> list[str]:
        """Read, average and hand to ``writer``: ``combine`` with what was planned."""
        # The factors of adapters are few: one process is enough.
        if self._adapters is not None and share[0] == 0:
            self._adapters.write(writer, progress)
        return combine(
            self.opened,
            [self.coefficients],
            [writer],
            max_memory=self.max_memory,
            accumulate=torch.float64 if self.dtype == torch.float64 else None,
            progress=progress,
            share=share,
            names=None if self._adapters is None else self._adapters.averaged,
        )

    def _adapter_notes(self) -> list[str]:
        if self._adapters is None:
            return []
        return self._adapters.notes(format_for(Path(self.output), None) == "huggingface")

    def _memory_bytes(self) -> int:
        return Budget.within(self.max_memory, self.opened, n_outputs=1).total_bytes


def _single_note(counted: int) -> Iterator[str]:
    if counted == 1:
        yield "only one checkpoint counts: what is written are its weights"


def _notes(inputs: Sequence[checkpoints.Checkpoint]) -> list[str]:
    names: dict[str, list[str]] = {}
    for name, checkpoint in zip(_inputs.input_names(inputs), inputs, strict=True):
        if checkpoint.note:
            names.setdefault(checkpoint.note, []).append(name)
    return [
        note if len(those) == len(inputs) else f"{name_list(those)}: {note}" for note, those in names.items()
    ]


def batchnorm_statistics(tensors: Mapping[str, checkpoints.TensorInfo]) -> list[str]:
    """Names of running statistics: what a file tells of BatchNorm layers."""
    return [name for name, info in tensors.items() if is_statistic(name) and is_averaged(info.dtype)]


def is_statistic(name: str) -> bool:
    """Whether a tensor is, by its name, a running statistic of a BatchNorm layer.

    >>> is_statistic("layer1.bn.running_var"), is_statistic("layer1.bn.weight")
    (True, False)
    """
    return name.endswith(("running_mean", "running_var"))


def _batchnorm_note(tensors: Mapping[str, checkpoints.TensorInfo], recalibrated: bool) -> Iterator[str]:
    if statistics := batchnorm_statistics(tensors):
        what = f"{name_list(statistics)} are BatchNorm statistics"
        yield (
            f"{what}, computed anew for the averaged weights"
            if recalibrated
            else f"{what}: their averages do not fit the averaged weights, so recompute them, with polyak.update_bn or "
            "polyak average ... --model module:factory --recalibrate module:batches"
        )


def _refuse_input_as_output(inputs: Sequence[checkpoints.Checkpoint], output: Path) -> None:
    place = output.resolve()
    for checkpoint in inputs:
        for path in checkpoint.paths:
            is_same_file = output.exists() and os.path.samefile(output, path)
            if is_same_file or path.resolve().is_relative_to(place):
                raise OptionError(f"the output {output} is the input {checkpoint.path}: name another output")


# One average shared out over processes and machines: each rank fills its bytes of the one output file.

# Ranks that die are noticed by their closed connections; ranks that are slow may be so for hours.
_TIMEOUT = timedelta(days=1)


def launched_on_ranks() -> bool:
    """Whether a launcher such as ``torchrun`` started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


@contextmanager
def process_group() -> Iterator[None]:
    """A gloo process group as the launcher's environment describes it."""
    dist.init_process_group("gloo", timeout=_TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def run_on_ranks(plan: Plan, progress: Progress | None = None) -> AverageReport:
    """``plan.run`` on all ranks of the default process group, bit for bit the same; a collective call.

    Rank 0 lays the file out and commits it when all have written and synced their part. If one rank fails, all
    raise and nothing is left behind.

    Raises as ``Plan.run``; ``OptionError`` for formats whose bytes have no place before all are known;
    ``PolyakError`` on the ranks that did not fail, or if one was lost.
    """
    group = RankGroup.of_all()
    try:
        with _base.written_together(group, Path(plan.output), plan.layout, plan.create) as target:
            differing = plan.fill(target, progress, share=(dist.get_rank(), dist.get_world_size()))
        return plan.report(sorted(set().union(*group.gather(differing))))
    finally:
        # A launcher ends all ranks when one leaves with an error: the temporary file must be gone by then.
        with suppress(PolyakError):
            group.gather(None)


# ``average_checkpoints``: checkpoints of any tool in, one average out.


@checked
def average_checkpoints(
    inputs: Paths,
    output: str | PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    profile: Profile | str | None = None,
    dtype: torch.dtype | str | None = None,
    max_memory: int | str = "256MB",
    key: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    hashes: bool = False,
    steps: Sequence[int] | None = None,
    last: int | None = None,
    allow: Sequence[str] = (),
    like: str | PathLike[str] | None = None,
    rank: int | None = None,
    lora: str = "product",
) -> AverageReport:
    """Average checkpoints of any size and format in bounded memory: Σ_k a_k · input_k.

    Sums are kept in float32, in float64 for float64 tensors; identical inputs come back bit for bit. Integer and
    bool tensors are copied from the last input that counts, with a warning where they differ. Tied tensors stay
    tied. The output appears whole or not at all.

    Args:
        inputs: checkpoints, and folders of checkpoints, in any formats. Those that are one file for each rank are
            averaged rank by rank, where the layout is known.
        output: the file or folder to write; its suffix says the format. For inputs that are one file for each rank it
            is a folder like theirs.
        weights: one number for each input, in the order given; they are divided by their sum. By default all
            count the same.
        profile: instead of ``weights``, a profile or its text. The inputs are then taken in the order of their
            training steps, read from the files, else from their names, else in the order given; a checkpoint
            stands for the steps since the one before it, or for one step each where steps are not known.
        dtype: of the floating-point tensors written, such as ``torch.bfloat16`` or ``"bf16"``; by default that
            of the inputs.
        max_memory: bytes, or text such as ``"512MB"``, beyond the interpreter with torch.
        key: the nested key that holds the weights, such as ``"state_dict_ema"``; by default the best known.
        overwrite: replace an output that is there.
        progress: called with bytes done and bytes in all.
        hashes: note the SHA-256 of the inputs in the output.
        steps: the training step of each checkpoint that is taken, in the order given; by default they are read.
        last: take only the newest so many checkpoints.
        allow: types that a torch file may hold beside tensors, see :func:`polyak.checkpoints.open`.
        like: a torch checkpoint, such as one of the inputs, that a torch output is nested like: the average lies under
            the key that the weights have there, under the same names, beside the plain entries (text, numbers, and
            lists and dicts of them, such as hyperparameters). Counters, state of the training and other weights are
            left out.
        rank: of LoRA adapters' average; by default, module by module, the largest of the inputs.
        lora: ``"product"`` for the mean of LoRA adapters' updates Σ a_k s_k B_k A_k, cut back to ``rank``;
            ``"factors"`` for the means of their factors, each by itself, which is something else.

    Returns:
        What was averaged, copied and ignored, and the coefficient of each input.

    Raises:
        StructureError: the inputs do not hold the same tensors; all differences are named.
        CheckpointError: an input cannot be read, or the output not written.
        NonFiniteError: an input holds NaN, or an infinity that the others do not; file and tensor are named.
        OptionError: both ``weights`` and ``profile``, an output that is one of the inputs, too little memory, a
            ``like`` that is not nested or holds other tensors, or an output that cannot be.
        OutputExistsError: the output is there and may not be overwritten.

    >>> import tempfile
    >>> import polyak
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for step in (100, 200, 300):
    ...         torch.save({"w": torch.full((2,), float(step))}, f"{folder}/step{step}.pt")
    ...     report = polyak.average_checkpoints(folder, f"{folder}/tail.pt", profile="tail:steps=200")
    ...     torch.load(f"{folder}/tail.pt")["w"], report.coefficients
    (tensor([250., 250.]), (0.0, 0.5, 0.5))
    """
    plan = Plan(
        inputs,
        output,
        weights=weights,
        profile=profile,
        dtype=dtype,
        max_memory=max_memory,
        key=key,
        overwrite=overwrite,
        hashes=hashes,
        steps=steps,
        last=last,
        allow=allow,
        like=like,
        rank=rank,
        lora=lora,
    )
    report = plan.run(progress)
    plan.reading.warn()
    if report.differing:
        warn_user(
            f"integer and bool tensors were copied from the last input, though the inputs differ in "
            f"{name_list([*report.differing])}"
        )
    return report
