"""What ``torch.save`` writes: ``.pt``, ``.pth``, ``.bin``, ``.ckpt``, ``.tar``.

The pickle in it is read as data: the names in it stand for functions of this file, so that no code is run, nothing of
torch is imported by name, and no tensor is read; each knows its place in the file, and is read from there. Files from
before torch 1.6 are not zips; ``torch.load(weights_only=True)`` loads their tensors whole.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyak._torch import reason_not_loaded
from polyak.checkpoints import _base
from polyak.checkpoints._base import Contents, Format, Layout, StoredTensor, TensorInfo
from polyak.checkpoints._io import DataFile
from polyak.errors import CheckpointError

__all__ = [
    "ZIP_MAGIC",
    "Member",
    "Record",
    "SavedTensor",
    "load_archive",
    "open_zip",
    "read_directory",
    "unpickle",
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


# Pickles that are read as data.


class Record:
    """An object whose class is not needed: what it was made of, and its attributes where the pickle names them."""

    arguments: tuple
    state: Any = None

    def __new__(cls, *arguments: Any, **_: Any) -> Record:
        record = super().__new__(cls)
        record.arguments = arguments
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state
        if isinstance(state, dict):
            vars(self).update(state)


class ForbiddenName(pickle.UnpicklingError):
    """The pickle needs something by a name that is not known to be data."""

    def __init__(self, name: str) -> None:
        super().__init__(f"it needs {name}, and no code from a checkpoint is run")
        self.name = name


class _Unpickler(pickle.Unpickler):
    def __init__(
        self, data: bytes, known: Callable[[str], Any], persistent: Callable[[Any], Any] | None
    ) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._known, self._persistent = known, persistent

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{'builtins' if module == '__builtin__' else module}.{name}"
        found = vars(torch).get(name) if module == "torch" else None
        found = found if isinstance(found, torch.dtype) else self._known(full_name)
        if found is None:
            raise ForbiddenName(full_name)
        return found

    def persistent_load(self, pid: Any) -> Any:
        if self._persistent is None:
            raise pickle.UnpicklingError("it refers to things outside it")
        return self._persistent(pid)


def unpickle(data: bytes, known: Callable[[str], Any], persistent: Callable[[Any], Any] | None = None) -> Any:
    """What a pickle holds, where all names in it are of torch's dtypes, or have a stand-in that is ``known``.

    Raises ``ForbiddenName`` for other names, and any exception for damaged data.
    """
    for opcode, argument, _ in pickletools.genops(data):
        # A damaged index would have the unpickler clear gigabytes of memory for its memo.
        if opcode.name in ("LONG_BINPUT", "PUT") and int(argument or 0) > len(data):
            raise pickle.UnpicklingError("impossible memo index")
        if opcode.name.startswith("EXT"):
            raise ForbiddenName(f"extension {argument}")
    return _Unpickler(data, known, persistent).load()


# What torch.save puts into its pickle, by the names that it has there.

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
}
_QUANTISED = ("QInt8Storage", "QUInt8Storage", "QInt32Storage", "QUInt4x2Storage", "QUInt2x4Storage")
_MOST_ELEMENTS = (1 << 63) - 1


class _Fixed:
    """What a pickle may ask for, and not change."""

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it changes what is not its own")


@dataclass(frozen=True)
class _Storage(_Fixed):
    """A storage: the name of its member, and the dtype it was saved with; None if that is a quantised one."""

    key: str
    dtype: torch.dtype | None


@dataclass(frozen=True)
class SavedTensor(_Fixed):
    """A tensor as the pickle describes it; the place in its storage is None where it is of an unusual kind."""

    shape: tuple[int, ...]
    storage: _Storage | None = None
    dtype: torch.dtype | None = None
    offset: int = 0
    stride: tuple[int, ...] = ()


class _TensorType(Record):
    """Stands for ``torch.Tensor`` and ``torch.nn.Parameter``."""


@dataclass(frozen=True)
class _Stand(_Fixed):
    """Stands for one of torch's functions: a plain function has attributes that a pickle could set."""

    build: Callable[..., SavedTensor]

    def __call__(self, *arguments: Any) -> SavedTensor:
        return self.build(*arguments)


def _tensor(
    storage: _Storage,
    offset: int,
    size: tuple,
    stride: tuple,
    dtype: torch.dtype | None,
    flags: Mapping | None,
) -> SavedTensor:
    numbers = (offset, *size, *stride)
    is_possible = all(type(number) is int and 0 <= number <= _MOST_ELEMENTS for number in numbers)
    if not is_possible or len(size) != len(stride) or math.prod(n or 1 for n in size) > _MOST_ELEMENTS:
        raise pickle.UnpicklingError(f"a tensor of shape {size!r:.100}")
    if flags:  # conjugated or negated when it is looked at
        return SavedTensor(tuple(size))
    return SavedTensor(tuple(size), storage, dtype, offset, tuple(stride))


def _rebuild_tensor(storage, offset, size, stride, _grad=False, _hooks=None, flags=None) -> SavedTensor:
    return _tensor(storage, offset, size, stride, storage.dtype, flags)


def _rebuild_tensor_v3(storage, offset, size, stride, _grad, _hooks, dtype, flags=None) -> SavedTensor:
    return _tensor(storage, offset, size, stride, dtype, flags)


def _rebuild_parameter(data: SavedTensor, *_: Any) -> SavedTensor:
    return data


def _rebuild_on_device(data: SavedTensor, dtype: torch.dtype, *_: Any) -> SavedTensor:
    return data if data.dtype == dtype else SavedTensor(data.shape)


def _rebuild_from_type(
    build: Callable[..., SavedTensor], kind: Any, arguments: tuple, _state: Any
) -> SavedTensor:
    tensor = build(*arguments)
    return tensor if kind is _TensorType else SavedTensor(tensor.shape)


def _unusual(*arguments: Any) -> SavedTensor:
    """Sparse, quantised and nested tensors, subclasses: the first tuple of numbers is taken for their shape."""
    flat = [part for argument in arguments for part in (argument if type(argument) is tuple else ())]
    shapes = [
        part for part in (*arguments, *flat) if type(part) is tuple and all(type(n) is int for n in part)
    ]
    return SavedTensor(shapes[0] if shapes else ())


_KNOWN: dict[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "collections.Counter": OrderedDict,
    "torch.Size": tuple,
    "torch.Tensor": _TensorType,
    "torch.nn.parameter.Parameter": _TensorType,
    "torch._utils._rebuild_tensor": _Stand(_rebuild_tensor),
    "torch._utils._rebuild_tensor_v2": _Stand(_rebuild_tensor),
    "torch._utils._rebuild_tensor_v3": _Stand(_rebuild_tensor_v3),
    "torch._utils._rebuild_parameter": _Stand(_rebuild_parameter),
    "torch._utils._rebuild_parameter_with_state": _Stand(_rebuild_parameter),
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _Stand(_rebuild_on_device),
    "torch._tensor._rebuild_from_type_v2": _Stand(_rebuild_from_type),
    "torch.storage.UntypedStorage": torch.uint8,
    **{f"torch.{name}": dtype for name, dtype in _STORAGES.items()},
    **{f"torch.cuda.{name}": dtype for name, dtype in _STORAGES.items()},
    **dict.fromkeys(
        (
            "torch._utils._rebuild_sparse_tensor",
            "torch._utils._rebuild_qtensor",
            "torch._utils._rebuild_nested_tensor",
            "torch._utils._rebuild_wrapper_subclass",
            "torch._utils._rebuild_meta_tensor_no_storage",
            "torch._utils._rebuild_device_tensor_from_numpy",
        ),
        _Stand(_unusual),
    ),
    **dict.fromkeys(
        (
            "_codecs.encode",
            "builtins.bytearray",
            "builtins.complex",
            "builtins.set",
            "torch.device",
            "torch.serialization._get_layout",
            "torch.storage.TypedStorage",
            "torch.per_tensor_affine",
            "torch.per_tensor_symmetric",
            "torch.per_channel_affine",
            "torch.per_channel_symmetric",
            "torch.per_channel_affine_float_qparams",
            *(f"torch.{name}" for name in _QUANTISED),
        ),
        Record,
    ),
}


def _known(name: str) -> Any:
    """The stand-in of a name; what the user has told torch to be safe is a record of what it was made of."""
    return _KNOWN.get(name) or (Record if name in _safe_names() else None)


def _safe_names() -> set[str]:
    entries = torch.serialization.get_safe_globals()
    return {
        entry[1] if isinstance(entry, tuple) else f"{entry.__module__}.{entry.__qualname__}"
        for entry in entries
    }


# The format.

# `load_state_dict` looks into this attribute of a state dict for the versions of modules; an entry that
# belongs to no module is free, and the dict itself keeps nothing but tensors.
_ATTRIBUTE, _ENTRY = "_metadata", "polyak"
_LEGACY = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


class TorchFormat(Format):
    """A dict, nested or flat, as ``torch.save`` writes it."""

    name = "pt"
    looks = "a file of torch.save"
    suffixes = (".pt", ".pth", ".bin", ".ckpt", ".tar")

    def recognises(self, path: Path, start: bytes) -> bool:
        if start[:4] != ZIP_MAGIC:
            return start[:2] in _LEGACY
        return any(name.endswith("/data.pkl") for name in read_directory(DataFile(path)))

    def read(self, path: Path) -> Contents:
        """Raises ``CheckpointError`` also for anything that needs code to be loaded."""
        file = DataFile(path)
        is_lazy = file.read(0, min(4, file.size)) == ZIP_MAGIC
        if is_lazy:
            (state, stored), leaves = load_archive(file), (SavedTensor,)
        else:
            state, stored, leaves = _load_legacy(file), _Loaded(path).stored, (Tensor,)
        if not isinstance(state, Mapping):
            raise CheckpointError(
                f"{path} holds a {_kind_of(state)}, not a dict: save the model's state_dict()"
            )
        return Contents(state, _metadata(state), is_lazy, stored, leaves, (file,))

    def writer(self, path: Path, layout: Layout, overwrite: bool) -> PickledWriter:
        return PickledWriter(path, layout, overwrite)


def _kind_of(state: Any) -> str:
    return "Tensor" if isinstance(state, SavedTensor) else type(state).__name__


def load_archive(
    file: DataFile, start: int = 0, nbytes: int | None = None
) -> tuple[Any, Callable[[SavedTensor], StoredTensor]]:
    """The object in a torch archive, and what turns the tensors in it into tensors of the file."""
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
    return archive.state(), archive.stored


class _Archive:
    """The members of a torch archive; each region of the file has one ``StoredTensor``, so that ties are one object."""

    def __init__(self, file: DataFile, members: Mapping[str, Member]) -> None:
        self._file, self._members = file, members
        self._regions: dict[SavedTensor, _base.StridedRegion] = {}

    def state(self) -> Any:
        """The object that was saved."""
        try:
            member = self._members["data.pkl"]
            return unpickle(self._file.read(member.offset, member.nbytes), _known, self._storage)
        except ForbiddenName as error:
            raise _needs_code(self._file.path, error.name) from error
        except Exception as error:  # pickle lets whatever the damaged bytes provoke escape
            raise _damaged(self._file.path, str(error)[:200] or type(error).__name__) from error

    def _storage(self, pid: Any) -> _Storage:
        kind, dtype, key, _, _ = pid
        if kind != "storage" or f"data/{key}" not in self._members:
            raise pickle.UnpicklingError(f"the data of storage {key!r:.50} are missing")
        return _Storage(f"data/{key}", dtype if isinstance(dtype, torch.dtype) else None)

    def stored(self, tensor: SavedTensor) -> StoredTensor:
        """The tensor in its place. Raises ``CheckpointError`` if it is of an unusual kind or has no such place."""
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


def _load_legacy(file: DataFile) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch has some for tensors that are refused here, with a reason
            return torch.load(file.window(), map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # torch.load lets whatever the damaged bytes provoke escape
        name, reason = reason_not_loaded(error)
        raise (_needs_code(file.path, name) if name else _damaged(file.path, reason)) from error


def _needs_code(path: Path, name: str) -> CheckpointError:
    return CheckpointError(
        f"{path} holds more than tensors: loading it would need {name}, and no code from a checkpoint "
        f"is run. Where you trust it, load it with torch.load and save its state_dict() alone"
    )


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path} is truncated, damaged or not a torch file ({reason}); use another copy")


def _unusual_error(path: Path, shape: tuple[int, ...]) -> CheckpointError:
    return CheckpointError(
        f"{path} holds a sparse, quantised or lazily conjugated tensor of shape {list(shape)}: "
        f"save it dense, with dequantize() or resolve_conj()"
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
