"""The file of one block: a whole checkpoint of block means, with the buffers that are copied, not averaged."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from polyak.checkpoints import Checkpoint, Layout, Location, TensorInfo, Writer, safetensors
from polyak.checkpoints import open as open_checkpoint
from polyak.checkpoints.atomic import Observer
from polyak.checkpoints.shared import written_together
from polyak.checkpoints.writer import on_host
from polyak.combine import combine
from polyak.distributed import Team
from polyak.errors import CheckpointError
from polyak.placement import runs
from polyak.trajectory.checksum import CheckedFile, Checksum
from polyak.trajectory.manifest import Block
from polyak.trajectory.snapshot import Snapshot

__all__ = [
    "Part",
    "copied_names",
    "holds_frozen",
    "merge_files",
    "refuse_damaged",
    "write_block",
    "write_frozen",
]

_COPIED_KEY = "polyak.copied"


def write_block(path: Path, snapshot: Snapshot, team: Team) -> int:
    """Write the averaged and the copied tensors of ``snapshot``, each rank its own part; the checksum of the file."""
    tensors = {**snapshot.averaged, **snapshot.copied}
    return _written(path, snapshot, tensors, {_COPIED_KEY: json.dumps(list(snapshot.copied))}, team)


def write_frozen(path: Path, snapshot: Snapshot, team: Team) -> int:
    """The same of its frozen parameters."""
    return _written(path, snapshot, snapshot.frozen, {}, team)


def holds_frozen(path: Path, snapshot: Snapshot, team: Team) -> bool:
    """Whether the file has the frozen parameters as they are now; each rank looks at its own part."""
    same = False
    with team.all_or_none(f"comparing {path}"), open_checkpoint(path) as stored:
        same = all(
            torch.equal(stored.read_slice(name, start, start + len(values)), values)
            for name, part in snapshot.frozen.items()
            for start, values in _runs(snapshot, name, part, team)
        )
    return all(team.gather(same))


def _written(
    path: Path, snapshot: Snapshot, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], team: Team
) -> int:
    infos = {
        name: TensorInfo(tuple(snapshot.whole(name, part).shape), part.dtype)
        for name, part in tensors.items()
    }
    layout = Layout(infos, snapshot.ties_of(tensors), metadata)
    checksum = Checksum()

    def create(observe: Observer | None) -> Writer:
        return safetensors.SafetensorsWriter(path, layout, overwrite=True, observe=observe)

    with written_together(team, path, layout, create, checksum.add) as writer:
        for name, part in tensors.items():
            for start, values in _runs(snapshot, name, part, team):
                writer.write(name, start, values)
    return Checksum.of_parts(team.gather(checksum)).value


def _runs(snapshot: Snapshot, name: str, part: Tensor, team: Team) -> Iterator[tuple[int, Tensor]]:
    return runs(on_host(part).view(part.shape), snapshot.whole(name, part), team.is_first)


def copied_names(checkpoint: Checkpoint) -> frozenset[str]:
    """The tensors of a block, or of any checkpoint, that are copied although they could be averaged."""
    return frozenset(json.loads(checkpoint.metadata.get(_COPIED_KEY, "[]")))


def merge_files(sources: Mapping[Path, Block], target: Path) -> int:
    """Write the mean of neighbouring blocks, weighted by their counts; the checksum of the file.

    Copied tensors are those of the last. Each source is read once, and compared with its checksum.

    Raises:
        CheckpointError: a source cannot be read, or is not what was written; there is no target.
    """
    files = {path: CheckedFile(path, passing=True) for path in sources}
    inputs = [Checkpoint(path, "safetensors", safetensors.read_file(file)) for path, file in files.items()]
    counts = [block.count for block in sources.values()]
    newest = inputs[-1]
    copied = copied_names(newest)
    first_names = {name: info for name, info in newest.tensors.items() if name not in newest.ties}
    layout = Layout(first_names, newest.ties, {_COPIED_KEY: json.dumps(sorted(copied))})
    checksum = Checksum()
    with safetensors.SafetensorsWriter(target, layout, overwrite=True, observe=checksum.add) as writer:
        averaged = Part(writer, [name for name in first_names if name not in copied])
        # One thread: the training that goes on beside this has use for the other cores.
        combine(inputs, [[count / sum(counts) for count in counts]], [averaged], workers=1)
        for name in copied:
            writer.write(name, 0, newest.read(name).view(-1))
        for path, block in sources.items():
            _refuse_other_checksum(files[path], block.checksum, f"block {block}")
    return checksum.value


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


def refuse_damaged(path: Path, checksum: int | None, what: str) -> None:
    """Read a file of the recording and compare it with the checksum that the manifest has of ``what`` it is.

    Raises:
        CheckpointError: the file is missing, or its contents have changed since they were written.
    """
    file = CheckedFile(path)
    safetensors.read_file(file)  # also where the sums are right, as with zeros at the end
    _refuse_other_checksum(file, checksum, what)


def _refuse_other_checksum(file: CheckedFile, checksum: int | None, what: str) -> None:
    if checksum is not None and file.checksum() != checksum:
        raise CheckpointError(f"{file.path} is corrupt: it is not what was written as {what}")
