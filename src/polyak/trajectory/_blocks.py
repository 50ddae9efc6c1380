"""Blocks: the numbers beside their weights, the manifest that lists them, and the checked file of each."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from polyak._checks import TOO_MANY, within
from polyak._distributed import RankGroup, shard_runs
from polyak._model import Binding, ModelTensors, NamedTensor, is_sharded, local
from polyak.checkpoints import Checkpoint, Layout, TensorInfo, Writer, _safetensors
from polyak.checkpoints._base import on_host, written_together
from polyak.checkpoints._checkpoint import RECORDING_NAME
from polyak.checkpoints._io import DataFile, Observer, write_file
from polyak.combine import combine
from polyak.errors import CheckpointError, OptionError, shown

__all__ = [
    "FROZEN_NAME",
    "Block",
    "CheckedFile",
    "Checksum",
    "Manifest",
    "Metrics",
    "Snapshot",
    "Summary",
    "complete",
    "copied_names",
    "holds_frozen",
    "merge_files",
    "open_stored",
    "refuse_damaged",
    "refuse_other_checksum",
    "with_thawed",
    "write_block",
    "write_frozen",
]

# Numbers beside the weights: learning rates and metrics, each as a summary per block.

# A long block of metrics on an accelerator must not hold on to a million tensors.
_MOST_WAITING = 4096


@dataclass(frozen=True)
class Summary:
    """The finite values of one number over a block: how many, their mean, the least and the greatest.

    >>> summary = Summary.of(1.0) + Summary.of(3.0)
    >>> summary.count, summary.mean, summary.min, summary.max
    (2, 2.0, 1.0, 3.0)
    """

    count: int
    mean: float
    min: float
    max: float

    @classmethod
    def of(cls, value: float) -> Summary:
        """The summary of one value."""
        return cls(1, value, value, value)

    @classmethod
    def of_json(cls, entry: Mapping[str, Any]) -> Summary:
        """What was written as plain values. Raises TypeError or ValueError for what was not."""
        summary = cls(**entry)
        _refuse_no_count(summary.count, least=1)
        for name in ("mean", "min", "max"):
            within("(-inf, inf)", name, getattr(summary, name))
        return summary

    def __add__(self, later: Summary) -> Summary:
        count = self.count + later.count
        return Summary(
            count,
            # Not sums divided in the end: those of huge values would overflow.
            self.mean + (later.mean - self.mean) * (later.count / count),
            min(self.min, later.min),
            max(self.max, later.max),
        )


def merged(earlier: Mapping[str, Summary], later: Mapping[str, Summary]) -> dict[str, Summary]:
    """The summaries of two neighbouring blocks together; a number that only one of them has stays as it is."""
    both = {name: earlier[name] + later[name] for name in earlier if name in later}
    return {**earlier, **later, **both}


class Metrics:
    """Collects named numbers. Values on an accelerator are read when somebody asks, not when they are given.

    >>> metrics = Metrics()
    >>> metrics.add({"loss": 2.0}); metrics.add({"loss": float("nan")}); metrics.add({"loss": 4.0})
    >>> metrics.summaries()["loss"].mean
    3.0
    """

    def __init__(self, summaries: Mapping[str, Summary] | None = None):
        self._summaries = dict(summaries or {})
        self._waiting: list[tuple[str, float | Tensor]] = []

    def add(self, values: Mapping[str, Any]) -> None:
        """Take one value of each number.

        Raises:
            OptionError: a value is neither a real number nor a tensor of one element.
        """
        self._waiting += [(name, _scalar(name, value)) for name, value in values.items()]
        if len(self._waiting) >= _MOST_WAITING:
            self.summaries()

    def summaries(self) -> dict[str, Summary]:
        """Name to summary, of the numbers that had a finite value."""
        for name, number in zip((name for name, _ in self._waiting), self._numbers(), strict=True):
            if math.isfinite(number):
                one = Summary.of(number)
                self._summaries[name] = self._summaries[name] + one if name in self._summaries else one
        self._waiting.clear()
        return dict(self._summaries)

    def _numbers(self) -> list[float]:
        """The values that wait; those on a device are read at once, as each read waits for it."""
        numbers = [value for _, value in self._waiting]
        groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for n, value in enumerate(numbers):
            if isinstance(value, Tensor):
                groups.setdefault((value.device, value.dtype), []).append(n)
        for group in groups.values():
            values = torch.stack([cast(Tensor, numbers[n]).view(()) for n in group]).tolist()
            for n, value in zip(group, values, strict=True):
                numbers[n] = value
        return list(map(float, numbers))

    def to_json(self) -> dict[str, dict[str, float]]:
        """The summaries as plain values."""
        return {name: asdict(summary) for name, summary in self.summaries().items()}


def _scalar(name: str, value: Any) -> float | Tensor:
    if type(value) is float:  # the usual case; the checks below are slow beside a training step
        return value
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        # The caller may go on writing into the tensor, as into a running loss.
        return value.detach().clone()
    if isinstance(value, Real):
        return float(value)
    raise OptionError(f"the metric {name!r} must be a number or a tensor of one element, got {value!r}")


# The manifest: a small file, and the point at which a block counts as recorded.

FROZEN_NAME = "frozen.safetensors"
_FORMAT = "polyak trajectory 1"
_OPTIONS_KEY = "law"  # as it is written since the first version of the format


@dataclass(frozen=True)
class Block:
    """The mean of the ``count`` samples taken in the optimizer steps (start, stop].

    Attributes:
        start: the optimizer step after which the block begins.
        stop: its last optimizer step.
        count: samples in the mean, at least 1.
        skipped: samples left out because they held a NaN or an infinity.
        lr: the learning rate over the block, the largest where parameter groups differ; None if it is unknown.
        metrics: the metrics given over the block, by name.
        checksum: CRC-32 of the block's file; None for a checkpoint that another tool saved.

    >>> block = Block(0, 100, count=10) + Block(100, 200, count=8, skipped=2)
    >>> block.start, block.stop, block.count, block.skipped
    (0, 200, 18, 2)
    """

    start: int
    stop: int
    count: int
    skipped: int = 0
    lr: Summary | None = None
    metrics: Mapping[str, Summary] = field(default_factory=dict)
    checksum: int | None = None

    @property
    def steps(self) -> int:
        """Its length in optimizer steps."""
        return self.stop - self.start

    @property
    def file_name(self) -> str:
        """The name of its file, from its range."""
        return f"block-{self.start:012d}-{self.stop:012d}.safetensors"

    def __add__(self, later: Block) -> Block:
        return Block(
            self.start,
            later.stop,
            self.count + later.count,
            self.skipped + later.skipped,
            self.lr + later.lr if self.lr and later.lr else self.lr or later.lr,
            merged(self.metrics, later.metrics),
        )

    def __str__(self) -> str:
        return f"({self.start}, {self.stop}]"


@dataclass(frozen=True)
class Manifest:
    """What a folder holds.

    Attributes:
        options: the options that all blocks were recorded with: ``every``, ``dtype`` and ``buffers``.
        block_steps: the length of the first blocks.
        settled: whether that length is final; otherwise it still follows the pace of training and writing.
        start: the optimizer step at which the recording began.
        blocks: oldest first, each beginning where the one before ends.
        has_frozen: whether the frozen parameters are kept beside the blocks.
        frozen_checksum: CRC-32 of their file; None while it is replaced.
        live_step: the step of the live weights that are kept; None where there are none.
        live_checksum: CRC-32 of their file.
    """

    options: Mapping[str, Any]
    block_steps: int
    settled: bool
    start: int = 0
    blocks: tuple[Block, ...] = ()
    has_frozen: bool = False
    frozen_checksum: int | None = None
    live_step: int | None = None
    live_checksum: int | None = None

    @property
    def stop(self) -> int:
        """The last recorded step."""
        return self.blocks[-1].stop if self.blocks else self.start

    @property
    def live_name(self) -> str | None:
        """The file name of the live weights."""
        return None if self.live_step is None else f"live-{self.live_step:012d}.safetensors"

    @property
    def checksums(self) -> dict[str, int | None]:
        """File names of all that is listed, to what is known of their contents."""
        checksums = {block.file_name: block.checksum for block in self.blocks}
        frozen = {FROZEN_NAME: self.frozen_checksum} if self.has_frozen else {}
        live = {self.live_name: self.live_checksum} if self.live_name else {}
        return checksums | frozen | live

    def with_block(self, block: Block) -> Manifest:
        """With one more block at the end; live weights from before its end are no longer the last ones."""
        manifest = self if self.live_step == block.stop else self.without_live()
        return replace(manifest, blocks=(*self.blocks, block))

    def without_live(self) -> Manifest:
        """With no live weights."""
        return replace(self, live_step=None, live_checksum=None)

    def with_merged(self, index: int, block: Block) -> Manifest:
        """With ``block`` in the place of the blocks ``index`` and ``index + 1``."""
        return replace(self, blocks=(*self.blocks[:index], block, *self.blocks[index + 2 :]))

    def save(self, folder: Path) -> None:
        """Write it, whole or not at all."""
        path = folder / RECORDING_NAME
        # Compact and without asdict's deep copies: a small model may write hundreds of blocks a minute.
        entries = {**vars(self), "blocks": [_entry(block) for block in self.blocks]}
        entries[_OPTIONS_KEY] = dict(entries.pop("options"))
        data = json.dumps({"format": _FORMAT, **entries}, allow_nan=False).encode()
        write_file(path, data, overwrite=True)

    @classmethod
    def exists(cls, folder: Path) -> bool:
        """Whether ``folder`` holds a trajectory."""
        return (folder / RECORDING_NAME).is_file()

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a folder.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        path = folder / RECORDING_NAME
        if not cls.exists(folder):
            raise CheckpointError(
                f"{folder} holds no trajectory: there is no {RECORDING_NAME} in it. Give the folder that a Recorder "
                "wrote, or use Trajectory.from_checkpoints for checkpoints of other tools"
            )
        try:
            return _parsed(path.read_bytes())
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{path} is damaged ({error}). The blocks beside it are whole checkpoints: ",
                f"Trajectory.from_checkpoints(sorted(Path({str(folder)!r}).glob('block-*'))) reads them, "
                "one sample each",
                "copied to another folder they can be averaged, one sample each",
            ) from error


def _entry(block: Block) -> dict[str, Any]:
    metrics = {name: vars(summary) for name, summary in block.metrics.items()}
    return {**vars(block), "lr": vars(block.lr) if block.lr else None, "metrics": metrics}


def _parsed(data: bytes) -> Manifest:
    entries = json.loads(data, parse_constant=_refuse_constant)
    if entries.pop("format") != _FORMAT:
        raise ValueError(f"it is not of the format {_FORMAT!r}")
    blocks = tuple(_parsed_block(entry) for entry in entries.pop("blocks"))
    manifest = Manifest(options={**entries.pop(_OPTIONS_KEY)}, **entries, blocks=blocks)
    edges = [manifest.start, *(block.stop for block in manifest.blocks)]
    if [block.start for block in blocks] != edges[:-1] or any(b.steps < 1 for b in blocks):
        raise ValueError("its blocks do not follow each other")
    for count in (manifest.block_steps, *(block.count for block in blocks)):
        _refuse_no_count(count, least=1)
    for count in (*edges, *(block.skipped for block in blocks), manifest.live_step or 0):
        _refuse_no_count(count)
    _ = manifest.checksums  # whose names are made of numbers: TypeError or ValueError of what is none
    return manifest


def _refuse_no_count(count: object, least: int = 0) -> None:
    if type(count) is not int or not least <= count < TOO_MANY:
        raise ValueError(f"it holds {shown(count)} where there is a count")


def _refuse_constant(text: str) -> None:
    raise ValueError(f"it holds {text}, which is no number")


def _parsed_block(entry: dict[str, Any]) -> Block:
    lr = entry.pop("lr")
    metrics = {name: Summary.of_json(summary) for name, summary in entry.pop("metrics").items()}
    return Block(**entry, lr=Summary.of_json(lr) if lr else None, metrics=metrics)


# What is written of a model: its block means, the buffers beside them, and what never changes.


@dataclass(frozen=True)
class Snapshot:
    """A model at the end of a block, in the parts that are stored apart.

    Attributes:
        averaged: name to live tensor, or to its mean.
        copied: the persistent buffers that are not averaged, as copies, since training goes on.
        frozen: parameters that are not averaged; not copied. Blocks from before one thawed have it there.
        ties: further name of a tied tensor to its first name, over all parts.
        wholes: of a sharded model, name to the tensor that this rank's part in the dictionaries above belongs to.
    """

    averaged: dict[str, Tensor]
    copied: dict[str, Tensor]
    frozen: dict[str, Tensor]
    ties: dict[str, str]
    wholes: dict[str, Tensor]

    @classmethod
    def of(cls, binding: Binding, averaged: list[Tensor]) -> Snapshot:
        """The model behind ``binding``, with ``averaged`` in the place of the tensors it averages."""
        means = dict(zip(binding.names, averaged, strict=True))
        tensors = ModelTensors(binding.model)
        others = [e for e in tensors.values() if e.persistent and e.name not in means]
        buffers, parameters = ([e for e in others if e.kind == kind] for kind in ("buffer", "parameter"))
        return cls(
            means,
            {e.name: part.detach().clone() for e, part in _parts(buffers)},
            {e.name: part.detach() for e, part in _parts(parameters)},
            {tied: name for tied, name in tensors.all_names().items() if tied != name},
            {e.name: e.tensor.detach() for e in tensors.values() if is_sharded(e.tensor)},
        )

    def ties_of(self, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """The ties that lead to one of ``tensors``."""
        return {tied: name for tied, name in self.ties.items() if name in tensors}

    def whole(self, name: str, part: Tensor) -> Tensor:
        """What ``part``, the tensor of that name, is a part of: itself, unless the model is sharded."""
        return self.wholes.get(name, part)


def _parts(entries: list[NamedTensor]) -> Iterator[tuple[NamedTensor, Tensor]]:
    return zip(entries, local(entry.tensor for entry in entries), strict=True)


# The checksum of a file, taken from its bytes as they are written or read. CRC-32 of the bytes themselves runs at
# 4 GB/s (zlib 1.2.13, one core), this at 16 GB/s from memory, and at 55 GB/s in the cache, where they still are when
# they are written. Manifests hold it, so that it must stay what it is.

_CHUNK_BYTES = 1 << 20
_WORD_BYTES = 8


class Checksum:
    """CRC-32 of the sums of a file's 64-bit words, one sum for each MiB: damage shows, at the speed of memory.

    Pieces may come in any order, each byte once. Words that changed places within a MiB would not show; a disk
    does no such thing.

    >>> whole, parts = Checksum(), Checksum()
    >>> whole.add(0, memoryview(b"block means"))
    >>> parts.add(5, memoryview(b" means"))
    >>> parts.add(0, memoryview(b"block"))
    >>> parts.value == whole.value
    True
    """

    def __init__(self) -> None:
        self._sums: dict[int, int] = {}

    def add(self, offset: int, data: memoryview) -> None:
        """Take in the bytes that lie at ``offset`` of the file."""
        done = 0
        while done < len(data):
            chunk, place = divmod(offset + done, _CHUNK_BYTES)
            piece = data[done : done + _CHUNK_BYTES - place]
            self._sums[chunk] = (self._sums.get(chunk, 0) + _sum_of_words(piece, place)) % 2**64
            done += len(piece)

    @classmethod
    def of_parts(cls, parts: Iterable[Checksum]) -> Checksum:
        """What several took in of one file together, each byte once."""
        whole = cls()
        for part in parts:
            for chunk, total in part._sums.items():
                whole._sums[chunk] = (whole._sums.get(chunk, 0) + total) % 2**64
        return whole

    @property
    def value(self) -> int:
        """The checksum of what was taken in."""
        sums = np.zeros(max(self._sums, default=-1) + 1, np.uint64)
        sums[list(self._sums)] = list(self._sums.values())
        return zlib.crc32(sums.tobytes())


def _sum_of_words(data: memoryview, place: int) -> int:
    """The sum of the 64-bit words that ``data`` is part of, zero elsewhere; its first byte lies at ``place``."""
    head = min(-place % _WORD_BYTES, len(data))
    tail = head + (len(data) - head) // _WORD_BYTES * _WORD_BYTES
    total = int(np.frombuffer(data[head:tail], np.uint64).sum())
    total += int.from_bytes(data[:head], "little") << 8 * (place % _WORD_BYTES)
    return total + int.from_bytes(data[tail:], "little")


class CheckedFile(DataFile):
    """A file that is read once, by whoever opened it, and whose checksum is known in the end.

    Raises as :class:`DataFile` does. One thread at a time.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._checksum = Checksum()
        self._unread = [(0, self.size)]

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the bytes at ``offset``, and note those that are read for the first time."""
        super().read_into(offset, buffer)
        unread = []
        for start, stop in self._unread:
            first, last = max(start, offset), min(stop, offset + len(buffer))
            if first < last:
                self._checksum.add(first, buffer[first - offset : last - offset])
                unread += [(start, first), (last, stop)]
            else:
                unread.append((start, stop))
        self._unread = [(start, stop) for start, stop in unread if start < stop]

    def checksum(self) -> int:
        """The checksum of the whole file; what was not read yet is read now."""
        buffer = memoryview(bytearray(_CHUNK_BYTES))
        while self._unread:
            start, stop = self._unread[0]
            self.read_into(start, buffer[: min(_CHUNK_BYTES, stop - start)])
        return self._checksum.value


# The file of one block: a whole checkpoint of block means, with the buffers that are copied, not averaged.

_COPIED_KEY = "polyak.copied"


def write_block(path: Path, snapshot: Snapshot, group: RankGroup) -> int:
    """Write the averaged and the copied tensors of ``snapshot``, each rank its own part; the checksum of the file."""
    tensors = {**snapshot.averaged, **snapshot.copied}
    return _written(path, snapshot, tensors, {_COPIED_KEY: json.dumps(list(snapshot.copied))}, group)


def write_frozen(path: Path, snapshot: Snapshot, group: RankGroup) -> int:
    """The same of its frozen parameters."""
    return _written(path, snapshot, snapshot.frozen, {}, group)


def open_stored(file: Path | DataFile) -> Checkpoint:
    """What was written of a model here: its tensors by its own names, whatever another tool's would mean.

    Raises ``CheckpointError`` for what is no whole file.
    """
    file = DataFile(file) if isinstance(file, Path) else file
    return Checkpoint(file.path, "safetensors", replace(_safetensors.read_file(file), exact=True))


def holds_frozen(path: Path, snapshot: Snapshot, group: RankGroup) -> bool:
    """Whether the file has the frozen parameters as they are now; each rank looks at its own part."""
    same = False
    with group.all_or_none(f"comparing {path}"), open_stored(path) as stored:
        same = all(
            torch.equal(stored.read_slice(name, start, start + len(values)), values)
            for name, part in snapshot.frozen.items()
            for start, values in _runs(snapshot, name, part, group)
        )
    return all(group.gather(same))


def with_thawed(path: Path, snapshot: Snapshot, group: RankGroup) -> Snapshot:
    """``snapshot`` with what the file of frozen parameters holds of those that thawed: earlier blocks need it."""
    with group.all_or_none(f"reading {path}"), open_stored(path) as stored:
        thawed = stored.tensors.keys() & snapshot.averaged.keys()
        parts = {
            name: torch.empty(snapshot.averaged[name].shape, dtype=stored.tensors[name].dtype)
            for name in thawed
        }
        for name, part in parts.items():
            for start, values in _runs(snapshot, name, part, group):
                values.copy_(stored.read_slice(name, start, start + len(values)))
    return replace(snapshot, frozen={**snapshot.frozen, **parts})


def _written(
    path: Path,
    snapshot: Snapshot,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    group: RankGroup,
) -> int:
    infos = {
        name: TensorInfo(tuple(snapshot.whole(name, part).shape), part.dtype)
        for name, part in tensors.items()
    }
    layout = Layout(infos, snapshot.ties_of(tensors), metadata)
    checksum = Checksum()

    def create(observe: Observer | None) -> Writer:
        return _safetensors.SafetensorsWriter(path, layout, overwrite=True, observe=observe)

    with written_together(group, path, layout, create, checksum.add) as writer:
        for name, part in tensors.items():
            for start, values in _runs(snapshot, name, part, group):
                writer.write(name, start, values)
    return Checksum.of_parts(group.gather(checksum)).value


def _runs(snapshot: Snapshot, name: str, part: Tensor, group: RankGroup) -> Iterator[tuple[int, Tensor]]:
    return shard_runs(on_host(part).view(part.shape), snapshot.whole(name, part), group.is_first)


def copied_names(checkpoint: Checkpoint) -> frozenset[str]:
    """The tensors of a block, or of any checkpoint, that are copied although they could be averaged."""
    return frozenset(json.loads(checkpoint.metadata.get(_COPIED_KEY, "[]")))


def complete(blocks: Sequence[Checkpoint], frozen: Checkpoint | None) -> None:
    """Have each of a run's opened blocks hold what others average: what thawed after it, as it was while frozen."""
    if frozen is None:
        return
    thawed = {n: info.dtype for b in blocks for n, info in b.tensors.items() if n in frozen.tensors}
    for block in blocks:
        lacking = {name: dtype for name, dtype in thawed.items() if name not in block.tensors}
        block.take_in(lacking, frozen)
        block.widen(lacking)


def merge_files(sources: Mapping[Path, Block], target: Path, frozen: Path | None = None) -> int:
    """Write the mean of neighbouring blocks, weighted by their counts; the checksum of the file.

    Copied tensors are those of the last. Each source is read once, and compared with its checksum. ``frozen`` is the
    file of the frozen parameters, for those that thawed.

    Raises:
        CheckpointError: a source cannot be read, or is not what was written; there is no target.
    """
    files = {path: CheckedFile(path) for path in sources}
    inputs = [open_stored(file) for file in files.values()]
    complete(inputs, open_stored(frozen) if frozen else None)
    counts = [block.count for block in sources.values()]
    newest = inputs[-1]
    copied = copied_names(newest)
    first_names = {name: info for name, info in newest.tensors.items() if name not in newest.ties}
    layout = Layout(first_names, newest.ties, {_COPIED_KEY: json.dumps(sorted(copied))})
    checksum = Checksum()
    averaged = [name for name in first_names if name not in copied]
    with _safetensors.SafetensorsWriter(target, layout, overwrite=True, observe=checksum.add) as writer:
        # One thread: the training that goes on beside this has use for the other cores.
        shares = [count / sum(counts) for count in counts]
        combine(inputs, [shares], [writer], workers=1, names=averaged)
        for name in copied:
            writer.write(name, 0, newest.read(name).view(-1))
        for path, block in sources.items():
            refuse_other_checksum(files[path], block.checksum, f"block {block}")
    return checksum.value


def refuse_damaged(path: Path, checksum: int | None, what: str) -> None:
    """Read a file of the recording and compare it with the checksum that the manifest has of ``what`` it is.

    Raises:
        CheckpointError: the file is missing, or its contents have changed since they were written.
    """
    file = CheckedFile(path)
    _safetensors.read_file(file)  # also where the sums are right, as with zeros at the end
    refuse_other_checksum(file, checksum, what)


def refuse_other_checksum(file: CheckedFile, checksum: int | None, what: str) -> None:
    """Raise ``CheckpointError`` if a file that was read is not what was written as ``what``."""
    if checksum is not None and file.checksum() != checksum:
        raise CheckpointError(f"{file.path} is corrupt: it is not what was written as {what}")
