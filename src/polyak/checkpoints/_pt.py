"""What ``torch.save`` writes: ``.pt``, ``.pth``, ``.bin``, ``.ckpt``, ``.tar``.

The pickle in it is read as data, and no tensor with it; each knows its place in the file, and is read from there. Files
from before torch 1.6 are not zips; ``torch.load(weights_only=True)`` loads their tensors whole.
"""

from __future__ import annotations

import copy
import pickle
import re
import struct
import threading
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyak._torch import reason_not_loaded
from polyak.checkpoints import _base
from polyak.checkpoints._base import Contents, Format, Layout, NoWeightsError, StoredTensor, TensorInfo
from polyak.checkpoints._io import DataFile
from polyak.checkpoints._pickle import (
    HARMLESS,
    Entries,
    ForbiddenName,
    Record,
    SavedShard,
    SavedTensor,
    Storage,
    stand_ins,
    unpickle,
)
from polyak.errors import CheckpointError

__all__ = [
    "ZIP_MAGIC",
    "Member",
    "TorchFormat",
    "load_archive",
    "open_zip",
    "read_directory",
]

# The directory of a zip file, checked before anything in it is believed. Torch files and npz are zips.

ZIP_MAGIC = b"PK\x03\x04"
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_ENCRYPTED = 0x1
# DEFLATE cannot do better than 1032 to 1, so a member that promises more is a bomb.
_MAX_EXPANSION = 1032


@dataclass(frozen=True)
class Member:
    """One file inside a zip: its data lie at ``[offset, offset + packed_nbytes)`` of the file around it."""

    name: str
    offset: int
    packed_nbytes: int
    nbytes: int
    is_stored: bool

    @property
    def end(self) -> int:
        return self.offset + self.packed_nbytes


def open_zip(file: DataFile, start: int = 0, nbytes: int | None = None) -> zipfile.ZipFile:
    """A ``ZipFile`` over a part of a file."""
    try:
        return zipfile.ZipFile(file.window(start, nbytes))
    except CheckpointError:
        raise
    except Exception as error:  # zipfile lets whatever the damaged bytes provoke escape
        raise CheckpointError(
            f"{file.path} is truncated or corrupt: its zip directory cannot be read ({error}); use another copy"
        ) from error


def read_directory(file: DataFile, start: int = 0, nbytes: int | None = None) -> dict[str, Member]:
    """All members by name.

    Raises ``CheckpointError`` for duplicate names, members that overlap or lie outside, encryption,
    compression other than DEFLATE, and sizes that no compression could reach.
    """
    stop = file.size if nbytes is None else start + nbytes
    members: dict[str, Member] = {}
    with open_zip(file, start, nbytes) as archive:
        for entry in archive.infolist():
            if entry.filename in members:
                raise CheckpointError(f"{file.path} is corrupt: it holds {entry.filename!r} twice")
            members[entry.filename] = _member(file, start, stop, entry)
    _refuse_overlaps(file, start, list(members.values()))
    return members


def _member(file: DataFile, start: int, stop: int, entry: zipfile.ZipInfo) -> Member:
    if entry.flag_bits & _ENCRYPTED or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise CheckpointError(
            f"{file.path} is encrypted or compressed in a way that is not read: save it with plain DEFLATE or none"
        )
    header = start + entry.header_offset
    magic, name_nbytes, extra_nbytes = _LOCAL_HEADER.unpack(file.read(header, _LOCAL_HEADER.size))
    offset = header + _LOCAL_HEADER.size + name_nbytes + extra_nbytes
    is_stored = entry.compress_type == zipfile.ZIP_STORED
    if magic != ZIP_MAGIC or offset + entry.compress_size > stop:
        raise CheckpointError(
            f"{file.path} is truncated or corrupt: member {entry.filename!r} lies outside it"
        )
    if is_stored and entry.compress_size != entry.file_size:
        raise CheckpointError(f"{file.path} is corrupt: member {entry.filename!r} has two different sizes")
    if entry.file_size > _MAX_EXPANSION * (entry.compress_size + 1):
        raise CheckpointError(
            f"{file.path} is a zip bomb: {entry.filename!r} claims {entry.file_size:,} bytes "
            f"from {entry.compress_size:,}; it is not read"
        )
    return Member(entry.filename, offset, entry.compress_size, entry.file_size, is_stored)


def _refuse_overlaps(file: DataFile, start: int, members: list[Member]) -> None:
    end = start
    for member in sorted(members, key=lambda member: (member.offset, member.end)):
        if member.offset < end:
            raise CheckpointError(f"{file.path} is corrupt: member {member.name!r} overlaps another")
        end = member.end


# The format.

# `load_state_dict` looks into this attribute of a state dict for the versions of modules; an entry that
# belongs to no module is free, and the dict itself keeps nothing but tensors.
_ATTRIBUTE, _ENTRY = "_metadata", "polyak"
# torch.save writes its pickle first.
_FIRST_MEMBER = re.compile(rb"PK\x03\x04.{26}[^/]{1,200}/data\.pkl", re.DOTALL)
_LEGACY = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


class TorchFormat(Format):
    """A dict, nested or flat, as ``torch.save`` writes it."""

    name = "pt"
    looks = "a file of torch.save"
    suffixes = (".pt", ".pth", ".bin", ".ckpt", ".tar")
    _allowed: tuple[str, ...] = ()

    def allowing(self, names: Sequence[str]) -> TorchFormat:
        format = copy.copy(self)
        format._allowed = tuple(names)
        return format

    def recognises(self, path: Path, start: bytes) -> bool:
        if start[:4] != ZIP_MAGIC:
            return start[:2] in _LEGACY
        return _FIRST_MEMBER.match(start) is not None or any(
            name.endswith("/data.pkl") for name in read_directory(DataFile(path))
        )

    def read(self, path: Path) -> Contents:
        """Raises ``CheckpointError`` also for anything that needs code to be loaded."""
        file = DataFile(path)
        is_lazy = file.read(0, min(4, file.size)) == ZIP_MAGIC
        if is_lazy:
            (state, stored), leaves = load_archive(file, allowed=self._allowed), (SavedTensor,)
        else:
            state, stored, leaves = _load_legacy(file, self._allowed), _Loaded(path).stored, (Tensor,)
        if not isinstance(state, Mapping):
            raise NoWeightsError(
                f"{path} holds a {_kind_of(state)}, not a dict: save the model's state_dict()"
            )
        return Contents(state, _metadata(state), is_lazy, stored, leaves, (file,))

    def writer(self, path: Path, layout: Layout, overwrite: bool) -> PickledWriter:
        return PickledWriter(path, layout, overwrite)


def _kind_of(state: Any) -> str:
    names = {SavedTensor: "Tensor", SavedShard: "DTensor", Record: "plain object"}
    return names.get(type(state), type(state).__name__)


def load_archive(
    file: DataFile, start: int = 0, nbytes: int | None = None, allowed: Sequence[str] = ()
) -> tuple[Any, Callable[[SavedTensor], StoredTensor]]:
    """The object in a torch archive, and what turns the tensors in it into tensors of the file.

    Objects of the classes whose full names are ``allowed`` are read as plain data.
    """
    members = read_directory(file, start, nbytes)
    if any(name.endswith("/constants.pkl") for name in members):
        raise CheckpointError(
            f"{file.path} is a TorchScript archive, which is code: load it with torch.jit.load and save "
            f"its state_dict()"
        )
    if not all(member.is_stored for member in members.values()):
        raise CheckpointError(f"{file.path} was compressed after torch.save: save it again with torch.save")
    for name, member in members.items():
        if name.endswith("/byteorder") and file.read(member.offset, member.nbytes) != b"little":
            raise CheckpointError(
                f"{file.path} is big-endian: load it on the machine that wrote it and convert it"
            )
    prefix = next(iter(members), "").split("/", 1)[0]
    archive = _Archive(file, {name.removeprefix(f"{prefix}/"): member for name, member in members.items()})
    return archive.state(allowed), archive.stored


class _Archive:
    """The members of a torch archive; each region of the file has one ``StoredTensor``, so that ties are one object."""

    def __init__(self, file: DataFile, members: Mapping[str, Member]) -> None:
        self._file, self._members = file, members
        self._regions: dict[SavedTensor, _base.StridedRegion] = {}

    def state(self, allowed: Sequence[str]) -> Any:
        """The object that was saved."""
        try:
            member = self._members["data.pkl"]
            known = stand_ins((*allowed, *_safe_names()))
            return unpickle(self._file.read(member.offset, member.nbytes), known, self._storage)
        except ForbiddenName as error:
            raise _needs_code(self._file.path, error.names, error.has_module, error.has_tensors) from error
        except Exception as error:  # pickle lets whatever the damaged bytes provoke escape
            raise _damaged(self._file.path, str(error)[:200] or type(error).__name__) from error

    def _storage(self, pid: Any) -> Storage:
        kind, dtype, key, _, _ = pid
        if kind != "storage" or f"data/{key}" not in self._members:
            raise pickle.UnpicklingError(f"the data of storage {key!r:.50} are missing")
        return Storage(f"data/{key}", dtype if isinstance(dtype, torch.dtype) else None)

    def stored(self, tensor: SavedTensor) -> StoredTensor:
        """The tensor in its place. Raises ``CheckpointError`` if it is of an unusual kind or has no such place."""
        if isinstance(tensor, SavedShard):
            raise _shard_error(self._file.path, tensor)
        if tensor.storage is None or tensor.dtype is None:
            raise _unusual_error(self._file.path, tensor.shape)
        if tensor not in self._regions:
            member, info = self._members[tensor.storage.key], TensorInfo(tensor.shape, tensor.dtype)
            begin = member.offset + tensor.offset * tensor.dtype.itemsize
            self._regions[tensor] = _base.StridedRegion(
                self._file, begin, info, tensor.stride, limit=member.end
            )
        return self._regions[tensor]


class _Loaded:
    """The same for tensors in memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tensors: dict[tuple, _base.LoadedTensor] = {}

    def stored(self, tensor: Tensor) -> StoredTensor:
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
            raise _unusual_error(self._path, tuple(tensor.shape))
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        return self._tensors.setdefault(place, _base.LoadedTensor(tensor.detach()))


# The names that torch holds for safe are one list for all threads.
_SAFE_NAMES_LOCK = threading.Lock()


def _safe_names() -> set[str]:
    """What the user has told torch to be safe."""
    entries = torch.serialization.get_safe_globals()
    return {
        entry[1] if isinstance(entry, tuple) else f"{entry.__module__}.{entry.__qualname__}"
        for entry in entries
    }


def _load_legacy(file: DataFile, allowed: Sequence[str]) -> Any:
    try:
        with suppress(pickle.UnpicklingError):
            return _loaded_as_data(file, allowed, Entries)
        # torch fills no dict of another class than its own.
        return _loaded_as_data(file, allowed, OrderedDict)
    except CheckpointError:
        raise
    except Exception as error:  # torch.load lets whatever the damaged bytes provoke escape
        name, reason = reason_not_loaded(error)
        if name:
            raise _needs_code(file.path, [name], has_tensors=True) from error
        raise CheckpointError(
            f"{file.path} is truncated, damaged or not a torch file, or it is from before torch 1.6 and holds objects "
            f"that cannot be read as data there ({reason}): use another copy, or, where you trust it, load it with "
            "torch.load and save its state_dict()"
        ) from error


def _loaded_as_data(file: DataFile, allowed: Sequence[str], dict_type: type) -> Any:
    """What torch loads, with objects of ``dict_type`` in the place of those whose class may be a dict."""
    stand_in_of = {**dict.fromkeys(allowed, Entries), **HARMLESS}
    safe: list[Any] = [
        (dict_type if stand_in is Entries else stand_in, name) for name, stand_in in stand_in_of.items()
    ]
    with _SAFE_NAMES_LOCK, torch.serialization.safe_globals(safe), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has some for tensors that are refused here, with a reason
        return torch.load(file.window(), map_location="cpu", weights_only=True)


# More names than these make no message clearer.
_MOST_NAMES = 20


def _needs_code(
    path: Path, names: Sequence[str], has_module: bool = False, has_tensors: bool = False
) -> CheckpointError:
    shown = f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
    advice = (
        "A model was pickled whole: load it with torch.load where its code is, and save its state_dict()"
        if has_module
        else "Where you trust it, load it with torch.load and save its state_dict() alone"
    )
    message = (
        f"{path} holds more than tensors: loading it would need {shown}, and no code from a checkpoint "
        f"is run. {advice}"
    )
    if not has_tensors:
        return CheckpointError(message)
    listed = ", ".join(f'"{name}"' for name in names[:_MOST_NAMES])
    return CheckpointError(
        f"{message}. Or read the tensors beside it, and the rest as data that does nothing: ",
        f"pass allow=[{listed}]",
        f"give {' '.join(f'--allow {name}' for name in names[:_MOST_NAMES])}",
    )


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path} is truncated, damaged or not a torch file ({reason}); use another copy")


def _unusual_error(path: Path, shape: tuple[int, ...]) -> CheckpointError:
    return CheckpointError(
        f"{path} holds a sparse, quantised or lazily conjugated tensor of shape {list(shape)}: "
        f"save it dense, with dequantize() or resolve_conj()"
    )


def _shard_error(path: Path, shard: SavedShard) -> CheckpointError:
    return CheckpointError(
        f"{path} holds a DTensor of shape {list(shard.shape)} of which it has one rank's shard, of shape "
        f"{list(shard.local_shape)}: on all ranks, gather the whole with "
        f"torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
        f"options=StateDictOptions(full_state_dict=True)) and save that"
    )


def _metadata(state: Mapping) -> dict[str, str]:
    attribute = getattr(state, _ATTRIBUTE, None)
    ours = attribute.get(_ENTRY) if isinstance(attribute, Mapping) else None
    found = {str(name): str(value) for name, value in state.items() if isinstance(value, str | int | float)}
    if isinstance(ours, Mapping):
        found |= {str(name): str(text) for name, text in ours.items()}
    return found


class PickledWriter(_base.SpooledWriter):
    """``torch.save`` of a dict of tensors, flat or in an envelope; ties share their storage."""

    def _save(self, tensors: dict[str, Tensor], target: Path) -> None:
        envelope = self.layout.envelope
        state = OrderedDict(tensors if envelope is None else envelope.around(tensors))
        if self.layout.metadata:
            setattr(state, _ATTRIBUTE, OrderedDict({_ENTRY: dict(self.layout.metadata)}))
        try:
            # Given a file and not its name, torch writes the same bytes whatever the file is called.
            with target.open("xb") as stream:
                torch.save(state, stream)
        except RuntimeError as error:  # torch's writer hides the reason in its message
            raise OSError(str(error).split("\n", 1)[0]) from error
