"""``torch.distributed.checkpoint`` (DCP) folders: ``.metadata`` and ``*.distcp`` files, from any number of ranks.

The metadata says which chunk of which tensor lies where; a chunk is a torch archive inside a ``.distcp`` file, so
its bytes are read in place and nothing is gathered. The metadata is a pickle: only the classes it is made of are
allowed in it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyak._distributed import RankGroup
from polyak.checkpoints import _base, _pickle, _pt
from polyak.checkpoints._base import Contents, Layout, StoredTensor, TensorInfo
from polyak.checkpoints._dialects import STEP_KEYS
from polyak.checkpoints._io import AtomicOutput, DataFile
from polyak.errors import CheckpointError, name_list

__all__ = ["write_folder"]

_METADATA = ".metadata"
_MODULE = "torch.distributed.checkpoint"
# What metadata are made of, by the names that they have in the pickle.
_NAMES = {
    *(
        f"{_MODULE}.metadata.{name}"
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    f"{_MODULE}.filesystem._StorageInfo",
    "torch.serialization._get_layout",
}
# Positions are worked out this many elements at a time where chunks cut across rows.
_BLOCK_ELEMENTS = 1 << 16


class DcpFormat(_base.Format):
    """The tensors of a DCP folder under the nested names that were saved; no chunk is read before it is asked for."""

    name = "dcp"
    looks = "a folder of torch.distributed.checkpoint"
    own_files = ("*.distcp", _METADATA, _base.SIDECAR)

    def recognises(self, path: Path, start: bytes) -> bool:
        return (path / _METADATA).is_file()

    def read(self, path: Path) -> Contents:
        """Raises ``CheckpointError`` for damaged or dangerous metadata, missing files (all named), missing chunks."""
        metadata = _load_metadata(DataFile(path / _METADATA))
        try:
            entries = dict(metadata.state_dict_metadata)
            storage = {_place(index): info for index, info in metadata.storage_data.items()}
            files = _files(path, {info.relative_path for info in storage.values()})
            leaves = {name: _leaf(path, name, entry, storage, files) for name, entry in entries.items()}
            places = metadata.planner_data or {}
            tree = _nested({name: places.get(name, (name,)) for name in entries}, leaves)
        except CheckpointError:
            raise
        except Exception as error:  # damaged metadata has attributes of any kind
            raise CheckpointError(
                f"{path / _METADATA} is damaged ({error!r:.200}); use another copy"
            ) from error
        opened = tuple(files.values())
        if not (path / _base.SIDECAR).is_file():
            return Contents(tree, files=opened)
        sidecar = _base.read_sidecar(path, (path / _base.SIDECAR).read_bytes())
        tree |= {tied: tree[name] for tied, name in sidecar["ties"].items() if name in tree}
        return Contents(tree, sidecar["metadata"], files=opened)

    def writer(self, path: Path, layout: Layout, overwrite: bool) -> DcpWriter:
        return DcpWriter(path, layout, overwrite)


def write_folder(path: Path, tensors: Mapping[str, Tensor], group: RankGroup, overwrite: bool) -> None:
    """Write DTensors from all ranks, each its own shards, into one folder, whole or not at all; a collective call.

    Raises:
        OutputExistsError: as ``AtomicOutput``.
        CheckpointError: it cannot be written.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_saver import save

    made: list[AtomicOutput] = []  # on the first rank

    def begin() -> Path:
        made.append(AtomicOutput(path, overwrite))
        return made[0].create_folder()

    try:
        folder = group.first(begin)
        try:
            save(dict(tensors), checkpoint_id=folder)
        except CheckpointException as error:
            raise _failure(path, error.failures) from error
        group.first(lambda: made[0].commit())
    finally:
        for output in made:
            output.abort()


def _failure(path: Path, failures: Mapping[int, tuple[BaseException, Any]]) -> BaseException:
    """What torch wraps so that ``except Exception`` passes it by, interrupts among it, as what it is."""
    errors = {rank: error for rank, (error, _) in failures.items()}
    interrupt = next((error for error in errors.values() if not isinstance(error, Exception)), None)
    reasons = "; ".join(f"rank {rank} failed with {error!r:.200}" for rank, error in errors.items())
    return interrupt or CheckpointError(f"cannot write {path}: {reasons}; nothing was changed there")


def _known(name: str) -> Any:
    """The stand-in of a name in the metadata."""
    if name == "torch.Size":
        return tuple
    if name == "collections.OrderedDict":
        return dict
    is_path = name.startswith("pathlib.") and name.endswith("Path")
    return _pickle.Record if is_path or name in _NAMES else None


def _load_metadata(file: DataFile) -> Any:
    try:
        return _pickle.unpickle(file.read(0, file.size), _known)
    except Exception as error:  # pickle lets whatever the damaged bytes provoke escape
        raise CheckpointError(
            f"{file.path} is damaged or unsafe ({error!s:.200}); use another copy"
        ) from error


def _files(path: Path, names: set[str]) -> dict[str, DataFile]:
    strange = [name for name in names if Path(name).name != name]
    if strange:
        raise CheckpointError(f"{path} refers to files outside it: {name_list(sorted(strange))}")
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{path} lacks {name_list(sorted(missing))}: copy the files of all ranks into it"
        )
    return {name: DataFile(path / name) for name in names}


def _place(index: Any) -> tuple[str, tuple[int, ...] | None]:
    return index.fqn, _sizes(getattr(index, "offset", None))


def _sizes(sizes: Any) -> tuple[int, ...] | None:
    return None if sizes is None else tuple(int(size) for size in sizes)


def _leaf(path: Path, name: str, entry: Any, storage: dict, files: dict[str, DataFile]) -> Any:
    if not hasattr(entry, "chunks"):
        return _plain_value(name, storage.get((name, None)), files)
    # The properties are a tuple, of which the dtype is the first.
    info = TensorInfo(_sizes(entry.size) or (), entry.properties.state[0])
    if not _base.is_shape(info.shape) or not isinstance(info.dtype, torch.dtype):
        raise CheckpointError(f"{path / _METADATA} is damaged: it describes no tensor as {name!r}")
    chunks = []
    for chunk in entry.chunks:
        offsets, sizes = _sizes(chunk.offsets) or (), _sizes(chunk.sizes) or ()
        place = storage.get((name, offsets))
        if place is None:
            raise CheckpointError(
                f"{path} lacks a chunk of tensor {name!r}: the save was cut off; use another copy"
            )
        chunks.append(_Chunk(files[place.relative_path], place, TensorInfo(sizes, info.dtype), offsets))
    return ChunkedTensor(path, name, info, chunks)


def _plain_value(name: str, place: Any, files: dict[str, DataFile]) -> Any:
    """A value that is no tensor: only step counters are worth the reading."""
    if place is None or name.rsplit(".", 1)[-1] not in STEP_KEYS:
        return None
    return _pt.load_archive(files[place.relative_path], place.offset, place.length)[0]


def _nested(places: dict[str, tuple], leaves: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, place in places.items():
        node = tree
        for part in place[:-1]:
            node = node.setdefault(str(part), {})
        node[str(place[-1])] = leaves[name]
    return tree


class _Chunk:
    """A box of a tensor, saved by one rank; its archive is opened when first read."""

    def __init__(self, file: DataFile, place: Any, info: TensorInfo, offsets: tuple[int, ...]) -> None:
        if getattr(place, "transform_descriptors", None):
            raise CheckpointError(f"{file.path} was compressed by a DCP extension: save it again without")
        self.info, self.offsets = info, offsets
        self._file, self._start, self._nbytes = file, int(place.offset), int(place.length)

    @cached_property
    def stored(self) -> StoredTensor:
        tensor, leaf = _pt.load_archive(self._file, self._start, self._nbytes)
        stored = leaf(tensor) if isinstance(tensor, _pickle.SavedTensor) else None
        if stored is None or stored.info != self.info:
            raise CheckpointError(f"{self._file.path} is corrupt: a chunk is not what the metadata says")
        return stored


class ChunkedTensor(StoredTensor):
    """A tensor in boxes that tile it."""

    def __init__(self, path: Path, name: str, info: TensorInfo, chunks: list[_Chunk]) -> None:
        self.info = info
        self._path, self._name, self._chunks = path, name, chunks
        inside = all(
            len(chunk.offsets) == len(chunk.info.shape) == len(info.shape)
            and all(
                0 <= low <= low + size <= whole
                for low, size, whole in zip(chunk.offsets, chunk.info.shape, info.shape, strict=True)
            )
            for chunk in chunks
        )
        if not inside or sum(chunk.info.numel for chunk in chunks) != info.numel:
            raise self._does_not_tile()

    def _does_not_tile(self) -> CheckpointError:
        return CheckpointError(
            f"{self._path}: the chunks of tensor {self._name!r} do not tile its shape {list(self.info.shape)}"
        )

    @property
    def location(self) -> _base.Location | None:
        return self._chunks[0].stored.location if len(self._chunks) == 1 else None

    def read_into(self, start: int, out: Tensor) -> None:
        if len(self._chunks) == 1:
            self._chunks[0].stored.read_into(start, out)
            return
        for block_start in range(0, out.numel(), _BLOCK_ELEMENTS):
            block = out[block_start : block_start + _BLOCK_ELEMENTS]
            self._read_block(start + block_start, block)

    def _read_block(self, start: int, out: Tensor) -> None:
        position = np.arange(start, start + out.numel())
        coordinates = np.unravel_index(position, self.info.shape)
        items = out.view(torch.uint8).view(-1, out.element_size())
        covered = np.zeros(out.numel(), dtype=bool)
        for chunk in self._chunks:
            local = [axis - low for axis, low in zip(coordinates, chunk.offsets, strict=True)]
            inside = np.logical_and.reduce(
                [(axis >= 0) & (axis < size) for axis, size in zip(local, chunk.info.shape, strict=True)]
            )
            covered |= inside
            if inside.any():
                # Row-major order is kept inside a box, so its part of the block is one run of the chunk.
                first = np.argmax(inside)
                run_start = sum(
                    int(axis[first]) * step
                    for axis, step in zip(local, _base.contiguous_stride(chunk.info.shape), strict=True)
                )
                run = torch.empty(int(inside.sum()), dtype=self.info.dtype)
                chunk.stored.read_into(run_start, run)
                items[torch.from_numpy(inside)] = run.view(torch.uint8).view(-1, out.element_size())
        if not covered.all():
            raise self._does_not_tile()


class DcpWriter(_base.SpooledWriter):
    """DCP's own writer, every name of tied tensors (DCP knows no ties), and the sidecar."""

    def _save(self, tensors: dict[str, Tensor], target: Path) -> None:
        # Imported here because it takes a second.
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that one process writes, which is what is wanted
            try:
                save(dict(tensors), storage_writer=FileSystemWriter(target), no_dist=True)
            except CheckpointException as error:
                reason, _ = next(iter(error.failures.values()))
                raise OSError(str(reason)) from error
        (target / _base.SIDECAR).write_text(_base.sidecar_text(self.layout))
