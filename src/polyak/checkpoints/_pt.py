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
from itertools import pairwise
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
    Place,
    Record,
    SavedShard,
    SavedTensor,
    stand_ins,
    unpickle,
)
from polyak.errors import CheckpointError, shown

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


class Member:
    """One file inside a zip, as a part of the file around it; where its bytes begin is found out when they are read.

    Attributes:
        name: its name there.
        file: the file around it.
        size: of what it holds, in bytes.
        is_stored: whether that lies in the file as it is.
    """

    def __init__(self, file: DataFile, start: int, end: int, entry: zipfile.ZipInfo) -> None:
        self.name, self.file, self.path, self.size = entry.filename, file, file.path, entry.file_size
        self.is_stored = entry.compress_type == zipfile.ZIP_STORED
        self._packed_nbytes, self._header, self._end = entry.compress_size, start + entry.header_offset, end
        self._start: int | None = None
        self._check(entry)

    def _check(self, entry: zipfile.ZipInfo) -> None:
        if entry.flag_bits & _ENCRYPTED or not (
            self.is_stored or entry.compress_type == zipfile.ZIP_DEFLATED
        ):
            raise CheckpointError(
                f"{self.path} is encrypted or compressed in a way that is not read: save it with plain DEFLATE or none"
            )
        self._check_end(self._header + _LOCAL_HEADER.size)
        if self.is_stored and self._packed_nbytes != self.size:
            raise CheckpointError(f"{self.path} is corrupt: member {self.name!r} has two different sizes")
        if self.size > _MAX_EXPANSION * (self._packed_nbytes + 1):
            raise CheckpointError(
                f"{self.path} is a zip bomb: {self.name!r} claims {self.size:,} bytes from {self._packed_nbytes:,}; "
                "it is not read"
            )

    def _check_end(self, start: int) -> None:
        if start + self._packed_nbytes > self._end:
            raise CheckpointError(
                f"{self.path} is truncated or corrupt: member {self.name!r} lies outside it, or overlaps another"
            )

    @property
    def start(self) -> int:
        """Where its bytes begin in the file around it."""
        if self._start is None:
            self._start = self._find_start()
        return self._start

    def _find_start(self) -> int:
        header = self.file.read(self._header, _LOCAL_HEADER.size)
        magic, name_nbytes, extra_nbytes = _LOCAL_HEADER.unpack(header)
        start = self._header + _LOCAL_HEADER.size + name_nbytes + extra_nbytes
        if magic != ZIP_MAGIC:
            raise CheckpointError(
                f"{self.path} is truncated or corrupt: member {self.name!r} is not at its place"
            )
        self._check_end(start)
        return start

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with its bytes from ``offset`` on, as they lie in the file."""
        self.file.read_into(self.start + offset, buffer)

    def read(self) -> bytes:
        """All its bytes, as they lie in the file."""
        return self.file.read(self.start, self._packed_nbytes)

    def mapped(self) -> memoryview:
        """The same as read-only memory."""
        return memoryview(self.file.mapped())[self.start :]


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
    """All members by name; nothing but the directory at the end of the zip is read.

    Raises ``CheckpointError`` for duplicate names, members that overlap or lie outside, encryption,
    compression other than DEFLATE, and sizes that no compression could reach.
    """
    with open_zip(file, start, nbytes) as archive:
        entries = archive.infolist()
    stop = file.size if nbytes is None else start + nbytes
    headers = sorted(start + entry.header_offset for entry in entries)
    # Each ends where the next begins, and no two at the same place.
    ends = dict(pairwise([*headers, stop]))
    members: dict[str, Member] = {}
    for entry in entries:
        if entry.filename in members:
            raise CheckpointError(f"{file.path} is corrupt: it holds {entry.filename!r} twice")
        members[entry.filename] = Member(file, start, ends.pop(start + entry.header_offset, 0), entry)
    return members


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
    archive = _Archive(file, next(iter(members), "").split("/", 1)[0], members)
    if "constants.pkl" in archive:
        raise CheckpointError(
            f"{file.path} is a TorchScript archive, which is code: load it with torch.jit.load and save "
            f"its state_dict()"
        )
    if not all(member.is_stored for member in members.values()):
        raise CheckpointError(f"{file.path} was compressed after torch.save: save it again with torch.save")
    if "byteorder" in archive and archive.read("byteorder") != b"little":
        raise CheckpointError(
            f"{file.path} is big-endian: load it on the machine that wrote it and convert it"
        )
    return archive.state(allowed), archive.stored


class _Archive:
    """The members of a torch archive, below its name; each region of the file has one ``StoredTensor``, so that ties
    are one object."""

    def __init__(self, file: DataFile, name: str, members: Mapping[str, Member]) -> None:
        self._file, self._name, self._members = file, name, members
        self._regions: dict[Place, _base.StridedRegion] = {}

    def __contains__(self, name: str) -> bool:
        return f"{self._name}/{name}" in self._members

    def read(self, name: str) -> bytes:
        """A whole member."""
        return self._members[f"{self._name}/{name}"].read()

    def state(self, allowed: Sequence[str]) -> Any:
        """The object that was saved."""
        try:
            return unpickle(self.read("data.pkl"), stand_ins((*allowed, *_safe_names())))
        except ForbiddenName as error:
            raise _needs_code(self._file.path, error.names, error.has_module, error.has_tensors) from error
        except CheckpointError:
            raise
        except Exception as error:  # pickle lets whatever the damaged bytes provoke escape
            raise _damaged(self._file.path, str(error)[:200] or type(error).__name__) from error

    def stored(self, tensor: SavedTensor) -> StoredTensor:
        """The tensor in its place. Raises ``CheckpointError`` if it is of an unusual kind or has no such place."""
        if isinstance(tensor, SavedShard):
            raise _shard_error(self._file.path, tensor)
        try:
            place = tensor.place
        except Exception as error:
            raise _damaged(self._file.path, str(error)) from error
        if place is None:
            raise _unusual_error(self._file.path, tensor.shape)
        region = self._regions.get(place)
        if region is None:
            region = self._regions[place] = self._region(place)
        return region

    def _region(self, place: Place) -> _base.StridedRegion:
        member = self._members.get(f"{self._name}/data/{place.storage}")
        if member is None:
            raise _damaged(self._file.path, f"the data of storage {shown(place.storage)} are missing")
        begin, info = place.offset * place.dtype.itemsize, TensorInfo(place.shape, place.dtype)
        return _base.StridedRegion(member, begin, info, place.stride)


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
        f"{path} holds a sparse, quantised or lazily conjugated tensor of shape {shown(list(shape))}: "
        f"save it dense, with dequantize() or resolve_conj()"
    )


def _shard_error(path: Path, shard: SavedShard) -> CheckpointError:
    return CheckpointError(
        f"{path} holds a DTensor of shape {shown(list(shard.shape))} of which it has one rank's shard, of shape "
        f"{shown(list(shard.local_shape))}: on all ranks, gather the whole with "
        f"torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
        f"options=StateDictOptions(full_state_dict=True)) and save that"
    )


def _metadata(state: Mapping) -> dict[str, str]:
    attribute = getattr(state, _ATTRIBUTE, None)
    ours = attribute.get(_ENTRY) if isinstance(attribute, Mapping) else None
    entries = [(name, value) for name, value in state.items() if isinstance(value, str | int | float)]
    if isinstance(ours, Mapping):
        entries += ours.items()
    found = {}
    for name, value in entries:
        # Python writes no numbers of thousands of digits, and no tuples that are nested as deeply.
        with suppress(ValueError, RecursionError):
            found[str(name)] = str(value)
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
