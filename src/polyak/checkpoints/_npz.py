"""``.npz``: a zip of ``.npy`` members, read in place where stored and through a bounded stream where compressed.

NumPy has no bfloat16 and no 8-bit floats. They are written as ``ml_dtypes`` has NumPy write them, as opaque 2-byte
and 1-byte items (``array.view(ml_dtypes.bfloat16)`` gives them back), and the sidecar member names their dtypes.
"""

from __future__ import annotations

import ast
import re
import struct
import threading
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from polyak.checkpoints import _base
from polyak.checkpoints._base import SIDECAR, Contents, Format, Layout, StoredTensor, TensorInfo, byte_view
from polyak.checkpoints._io import DataFile
from polyak.checkpoints._pt import ZIP_MAGIC, Member, open_zip, read_directory
from polyak.errors import CheckpointError, shown

_MAGIC = b"\x93NUMPY"
_MAX_HEADER_BYTES = 1 << 20
_MAX_SIDECAR_BYTES = 100_000_000
_SUFFIX = ".npy"
_PIECE_BYTES = 1 << 20
_FIXED_TIME = (1980, 1, 1, 0, 0, 0)
_CODES = {
    "<f8": torch.float64,
    "<f4": torch.float32,
    "<f2": torch.float16,
    "<c16": torch.complex128,
    "<c8": torch.complex64,
    "<i8": torch.int64,
    "<i4": torch.int32,
    "<i2": torch.int16,
    "|i1": torch.int8,
    "<u8": torch.uint64,
    "<u4": torch.uint32,
    "<u2": torch.uint16,
    "|u1": torch.uint8,
    "|b1": torch.bool,
    "<V2": torch.bfloat16,
    "|V2": torch.bfloat16,
    "<f1": torch.float8_e5m2,
}
_ONE_BYTE_FLOATS = {
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e4m3fnuz": torch.float8_e4m3fnuz,
    "float8_e5m2": torch.float8_e5m2,
    "float8_e5m2fnuz": torch.float8_e5m2fnuz,
}
_OPAQUE = {torch.bfloat16: "<V2"} | dict.fromkeys(_ONE_BYTE_FLOATS.values(), "|V1")
_WRITTEN = {dtype: code for code, dtype in _CODES.items()} | _OPAQUE
_NOT_NUMBERS = re.compile(r"[|<>=]?[OSUMmV]\d*(\[.*\])?")


class NpzFormat(Format):
    """Arrays under their names. Arrays of text and objects are left out, and never unpickled."""

    name = "npz"
    looks = "an npz file"
    suffixes = (".npz",)

    def recognises(self, path: Path, start: bytes) -> bool:
        return start[:4] == ZIP_MAGIC and any(
            name.endswith(_SUFFIX) for name in read_directory(DataFile(path))
        )

    def read(self, path: Path) -> Contents:
        """Raises ``CheckpointError`` for damaged files, zip bombs, and numbers that torch cannot hold."""
        file = DataFile(path)
        members = read_directory(file)
        archive = open_zip(file)
        sidecar = _sidecar(path, archive, members)
        tree: dict[str, StoredTensor | str] = {}
        for member in members.values():
            if member.name.endswith(_SUFFIX):
                name = member.name.removesuffix(_SUFFIX)
                tree[name] = _array(file, archive, member, sidecar["dtypes"].get(name))
        tree |= {tied: tree[name] for tied, name in sidecar["ties"].items() if name in tree}
        return Contents(tree, sidecar["metadata"], files=(file,))

    def writer(self, path: Path, layout: Layout, overwrite: bool) -> NpzWriter:
        return NpzWriter(path, layout, overwrite)


def _sidecar(path: Path, archive: zipfile.ZipFile, members: dict[str, Member]) -> dict[str, dict[str, str]]:
    if SIDECAR not in members:
        return _base.read_sidecar(path, b"{}")
    if members[SIDECAR].size > _MAX_SIDECAR_BYTES:
        raise CheckpointError(f"{path}: its {SIDECAR} is too large to be one")
    return _base.read_sidecar(path, _MemberStream(path, archive, SIDECAR).read(0, members[SIDECAR].size))


def _array(
    file: DataFile, archive: zipfile.ZipFile, member: Member, dtype_name: str | None
) -> StoredTensor | str:
    stream = _MemberStream(file.path, archive, member.name)
    header, data_start = _header(stream, member)
    code, shape, is_fortran = header["descr"], header["shape"], header["fortran_order"]
    if not isinstance(code, str):  # fields
        return f"array of {shown(code)}"
    dtype = _ONE_BYTE_FLOATS.get(dtype_name or "") if code in ("|V1", "<V1") else _CODES.get(code)
    if dtype is None:
        return _not_numbers(stream, code)
    info = TensorInfo(shape, dtype)
    if data_start + info.nbytes != member.size:
        raise stream.error(
            f"shape {list(shape)} needs {info.nbytes:,} bytes and {member.size - data_start:,} are there"
        )
    if member.is_stored:
        stride = _base.contiguous_stride(shape[::-1])[::-1] if is_fortran else None
        return _base.StridedRegion(member, data_start, info, stride)
    if is_fortran and len(shape) > 1:
        raise stream.error("it is compressed in column order; save it with numpy.ascontiguousarray")
    return _InflatedTensor(stream, data_start, info)


def _not_numbers(stream: _MemberStream, code: str) -> str:
    if _NOT_NUMBERS.fullmatch(code) and code not in ("|V1", "<V1"):
        return f"array of {code}"
    if code in ("|V1", "<V1"):
        raise stream.error("its 8-bit floats may be of several kinds; save them as float16 or with polyak")
    raise stream.error(f"torch has no numbers like {code!r}; save it little-endian, as float32 for example")


def _header(stream: _MemberStream, member: Member) -> tuple[dict, int]:
    start = stream.read(0, min(12, member.size))
    if len(start) < 12 or start[:6] != _MAGIC or start[6] not in (1, 2, 3):
        raise stream.error("it is no .npy array")
    length_nbytes = 2 if start[6] == 1 else 4
    nbytes = int.from_bytes(start[8 : 8 + length_nbytes], "little")
    data_start = 8 + length_nbytes + nbytes
    if nbytes > _MAX_HEADER_BYTES or data_start > member.size:
        raise stream.error("its header is longer than it is")
    text = stream.read(8 + length_nbytes, nbytes)
    try:
        header = ast.literal_eval(text.decode("utf-8" if start[6] == 3 else "latin-1").strip())
        shape, is_fortran, _ = header["shape"], header["fortran_order"], header["descr"]
    except (ValueError, SyntaxError, TypeError, KeyError, MemoryError, RecursionError) as error:
        raise stream.error("its header is damaged") from error
    sizes_fit = isinstance(shape, tuple) and _base.is_shape(shape)
    if not sizes_fit or not isinstance(is_fortran, bool):
        raise stream.error("its header is damaged")
    return header, data_start


class _MemberStream:
    """A member read forwards, from its beginning again where a reader goes back; safe from several threads."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, name: str) -> None:
        self._path, self._archive, self._name = path, archive, name
        self._lock = threading.Lock()
        self._stream = None
        self._position = 0

    def error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self._path} cannot be read at {self._name!r}: {problem}")

    def read(self, start: int, nbytes: int) -> bytes:
        buffer = bytearray(nbytes)
        self.read_into(start, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, start: int, buffer: memoryview) -> None:
        with self._lock:
            try:
                self._move_to(start)
                self._fill(buffer)
            except CheckpointError:
                raise
            except Exception as error:  # zipfile and zlib let whatever the damaged bytes provoke escape
                raise self.error(f"it is truncated or damaged ({error})") from error

    def _move_to(self, start: int) -> None:
        if self._stream is None or start < self._position:
            self._stream = self._archive.open(self._name)
            self._position = 0
        skipped = memoryview(bytearray(min(_PIECE_BYTES, start - self._position)))
        while self._position < start:
            self._fill(skipped[: start - self._position])

    def _fill(self, buffer: memoryview) -> None:
        assert self._stream is not None
        done = 0
        while done < len(buffer):
            piece = self._stream.read(min(_PIECE_BYTES, len(buffer) - done))
            if not piece:
                raise self.error("it is truncated")
            buffer[done : done + len(piece)] = piece
            done += len(piece)
            self._position += len(piece)


class _InflatedTensor(StoredTensor):
    """A compressed array: cheap in order, and from the beginning again when read backwards."""

    def __init__(self, stream: _MemberStream, data_start: int, info: TensorInfo) -> None:
        self.info = info
        self._stream, self._data_start = stream, data_start

    def read_into(self, start: int, out: Tensor) -> None:
        self._stream.read_into(self._data_start + start * out.element_size(), byte_view(out))


class NpzWriter(_base.SpooledWriter):
    """Stored members, every name of tied tensors (NumPy knows no ties), and the sidecar."""

    def _save(self, tensors: dict[str, Tensor], target: Path) -> None:
        dtypes = {
            name: str(tensor.dtype).removeprefix("torch.")
            for name, tensor in tensors.items()
            if tensor.dtype in _OPAQUE
        }
        with zipfile.ZipFile(target, "x") as archive:
            for name, tensor in tensors.items():
                entry = zipfile.ZipInfo(name + _SUFFIX, _FIXED_TIME)
                # Sizes are not known to zipfile beforehand; without this it refuses members over 2 GB.
                with archive.open(entry, "w", force_zip64=True) as member:
                    member.write(_npy_header(tensor))
                    data = byte_view(tensor.reshape(-1))
                    for start in range(0, len(data), _PIECE_BYTES):
                        member.write(data[start : start + _PIECE_BYTES])
            archive.writestr(
                zipfile.ZipInfo(SIDECAR, _FIXED_TIME), _base.sidecar_text(self.layout, dtypes=dtypes)
            )


def _npy_header(tensor: Tensor) -> bytes:
    fields = {"descr": _WRITTEN[tensor.dtype], "fortran_order": False, "shape": tuple(tensor.shape)}
    text = repr(fields).encode("latin-1")
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return _MAGIC + b"\x01\x00" + struct.pack("<H", len(text)) + text
