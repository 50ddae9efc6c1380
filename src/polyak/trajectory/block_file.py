"""The file of one block: a whole checkpoint of block means, with the buffers that are copied, not averaged."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from torch import Tensor

from polyak import checkpoints
from polyak.checkpoints import Checkpoint, Layout, Location, Writer
from polyak.combine import combine
from polyak.errors import CheckpointError
from polyak.trajectory.manifest import Block
from polyak.trajectory.snapshot import Snapshot

__all__ = ["Part", "copied_names", "file_checksum", "merge_files", "refuse_damaged", "write_file"]

_COPIED_KEY = "polyak.copied"
_CHUNK_BYTES = 1 << 20


def write_file(path: Path, snapshot: Snapshot) -> int:
    """Write the averaged and the copied tensors of ``snapshot``; the checksum of the file."""
    tensors = {**snapshot.averaged, **snapshot.copied}
    metadata = {_COPIED_KEY: json.dumps(list(snapshot.copied))}
    checkpoints.write(path, tensors, ties=snapshot.ties_of(tensors), metadata=metadata, overwrite=True)
    return file_checksum(path)


def copied_names(checkpoint: Checkpoint) -> frozenset[str]:
    """The tensors of a block, or of any checkpoint, that are copied although they could be averaged."""
    return frozenset(json.loads(checkpoint.metadata.get(_COPIED_KEY, "[]")))


def merge_files(sources: list[Path], counts: list[int], target: Path) -> int:
    """Write the mean of neighbouring blocks, weighted by their counts; the checksum of the file.

    Copied tensors are those of the last.
    """
    total = sum(counts)
    inputs = [checkpoints.open(source) for source in sources]
    newest = inputs[-1]
    copied = copied_names(newest)
    first_names = {name: info for name, info in newest.tensors.items() if name not in newest.ties}
    layout = Layout(first_names, newest.ties, {_COPIED_KEY: json.dumps(sorted(copied))})
    with checkpoints.create(target, layout, overwrite=True) as writer:
        averaged = Part(writer, [name for name in first_names if name not in copied])
        # One thread: the training that goes on beside this has use for the other cores.
        combine(inputs, [[count / total for count in counts]], [averaged], workers=1)
        for name in copied:
            writer.write(name, 0, newest.read(name).view(-1))
    return file_checksum(target)


class Part(Writer):
    """Some tensors of a checkpoint that is being written; who began it commits it."""

    def __init__(self, whole: Writer, names: Iterable[str]) -> None:
        chosen = {name: whole.layout.tensors[name] for name in names}
        ties = {tied: name for tied, name in whole.layout.ties.items() if name in chosen}
        super().__init__(Layout(chosen, ties))
        self._whole = whole

    def _write(self, name: str, start: int, values: Tensor) -> None:
        self._whole.write(name, start, values)

    def location(self, name: str) -> Location | None:
        return self._whole.location(name)

    def commit(self) -> None:
        """Left to the whole."""

    def abort(self) -> None:
        """Left to the whole."""


def refuse_damaged(path: Path, block: Block) -> None:
    """Read a block's file and compare it with the checksum that the manifest has.

    Raises:
        CheckpointError: the file is missing, or its contents have changed since they were written.
    """
    if block.checksum is not None and file_checksum(path) != block.checksum:
        raise CheckpointError(f"{path} is corrupt: it is not what was written as block {block}")


def file_checksum(path: Path) -> int:
    """CRC-32 of the sums of a file's 64-bit words, one sum for each MiB: damage shows, at the speed of memory.

    Words that changed places within a MiB would not show; a disk does no such thing.

    Raises:
        CheckpointError: it cannot be read.
    """
    memory = memoryview(bytearray(_CHUNK_BYTES))
    words = np.frombuffer(memory, dtype=np.uint64)
    value = 0
    try:
        with path.open("rb") as file:
            while nbytes := file.readinto(memory):
                memory[nbytes : -(-nbytes // 8) * 8] = bytes(-nbytes % 8)
                value = zlib.crc32(words[: -(-nbytes // 8)].sum().tobytes(), value)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    return value
