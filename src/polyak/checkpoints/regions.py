"""Tensors that lie as plain bytes in a file, read at their offsets with ``pread``.

Reading copies just the bytes asked for. Row-major tensors are not mapped, so a file that is cut short while it
is read is an error and not a dead process.
"""

from __future__ import annotations

import io
import mmap
import os
import stat
import weakref
from functools import lru_cache
from pathlib import Path

import numpy as np
from torch import Tensor

from polyak.checkpoints.base import Location, StoredTensor, TensorInfo, byte_view
from polyak.checkpoints.passing import read_into
from polyak.errors import CheckpointError

__all__ = ["DataFile", "StridedRegion", "Window", "contiguous_stride"]

# Sixty-four sharded inputs have more files than a process may hold open; those read last stay open.
_MAX_OPEN_FILES = 128


class _Descriptor:
    """An open file; closed when the last thread that reads from it lets go."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.number)


def _fingerprint(status: os.stat_result) -> tuple[int, ...]:
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=_MAX_OPEN_FILES)
def _descriptor(path: Path, fingerprint: tuple[int, ...]) -> _Descriptor:
    descriptor = _Descriptor(path)
    if _fingerprint(os.fstat(descriptor.number)) != fingerprint:
        raise CheckpointError(
            f"{path} changed while it was being read: open it again when its writer is done"
        )
    return descriptor


class DataFile:
    """A file read at byte offsets, from any number of threads.

    If ``passing``, what has to come from the disk does not stay in the page cache.

    Raises ``CheckpointError`` if the file cannot be opened, is empty, shrinks, or is replaced meanwhile.
    """

    def __init__(self, path: Path, *, passing: bool = False) -> None:
        self.path = path
        self._passing = passing
        try:
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"cannot read {path}: it is not a regular file")
            self._fingerprint = _fingerprint(status)
            _descriptor(path, self._fingerprint)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
        self.size = status.st_size
        if self.size == 0:
            raise CheckpointError(f"{path} is empty: its writer was cut off; use another copy")

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the bytes at ``offset``."""
        done = 0
        try:
            descriptor = _descriptor(self.path, self._fingerprint)
            while done < len(buffer):
                count = read_into(descriptor.number, buffer[done:], offset + done, passing=self._passing)
                if count == 0:
                    raise CheckpointError(
                        f"{self.path} ends before byte {offset + len(buffer)}: it is truncated; use another copy"
                    )
                done += count
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path}: {error.strerror}") from error

    def read(self, offset: int, nbytes: int) -> bytes:
        """The ``nbytes`` bytes at ``offset``; asking beyond the end of the file is an error."""
        if offset < 0 or nbytes < 0 or offset + nbytes > self.size:
            raise CheckpointError(f"{self.path} ends before byte {offset + nbytes}: it is truncated")
        buffer = bytearray(nbytes)
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def window(self, offset: int = 0, nbytes: int | None = None) -> io.BufferedReader:
        """A part of the file as a seekable binary stream."""
        return io.BufferedReader(Window(self, offset, self.size - offset if nbytes is None else nbytes))

    def mapped(self) -> mmap.mmap:
        """The whole file as read-only memory; it is unmapped when the last user lets go."""
        try:
            descriptor = _descriptor(self.path, self._fingerprint)
            return mmap.mmap(descriptor.number, self.size, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path}: {error.strerror}") from error

    @staticmethod
    def release() -> None:
        """Let go of the files held open; they are opened again where they are still needed."""
        _descriptor.cache_clear()


class Window(io.RawIOBase):
    """The bytes ``[offset, offset + nbytes)`` of a file as a stream of their own."""

    def __init__(self, file: DataFile, offset: int, nbytes: int) -> None:
        if offset < 0 or nbytes < 0 or offset + nbytes > file.size:
            raise CheckpointError(f"{file.path} ends before byte {offset + nbytes}: it is truncated")
        self._file, self._offset, self._nbytes, self._position = file, offset, nbytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._nbytes}[whence]
        if base + offset < 0:
            raise OSError("seek before the beginning")
        self._position = base + offset
        return self._position

    def readinto(self, buffer) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._nbytes - self._position))
        self._file.read_into(self._offset + self._position, view[:count])
        self._position += count
        return count


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides, in elements.

    >>> contiguous_stride((2, 3, 4))
    (12, 4, 1)
    """
    stride = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        stride[axis] = stride[axis + 1] * shape[axis + 1]
    return tuple(stride)


class StridedRegion(StoredTensor):
    """A dense tensor with any strides at an offset of a file.

    Args:
        file: the file.
        offset: where element (0, …, 0) lies, in bytes.
        info: shape and dtype.
        stride: in elements; row-major if left out.
        limit: the byte at which the tensor's part of the file ends.

    Raises ``CheckpointError`` if the tensor would reach beyond ``limit``.
    """

    def __init__(
        self,
        file: DataFile,
        offset: int,
        info: TensorInfo,
        stride: tuple[int, ...] | None = None,
        *,
        limit: int,
    ) -> None:
        self.info = info
        self._file, self._offset = file, offset
        row_major = contiguous_stride(info.shape)
        self._stride = row_major if stride is None else stride
        self._contiguous = all(
            ours == wanted
            for ours, wanted, size in zip(self._stride, row_major, info.shape, strict=True)
            if size > 1
        )
        self._check(limit)

    def _check(self, limit: int) -> None:
        if any(size < 0 for size in self.info.shape) or any(step < 0 for step in self._stride):
            raise CheckpointError(f"{self._file.path} is corrupt: a tensor of shape {list(self.info.shape)}")
        if self.info.numel == 0:
            return
        last = sum((size - 1) * step for size, step in zip(self.info.shape, self._stride, strict=True))
        end = self._offset + (last + 1) * self.info.dtype.itemsize
        # A tensor expanded by zero strides could claim any size; real ones are no larger than their file.
        if self._offset < 0 or end > min(limit, self._file.size) or self.info.nbytes > self._file.size:
            raise CheckpointError(
                f"{self._file.path} is truncated or corrupt: a tensor of shape {list(self.info.shape)} "
                f"reaches beyond its data"
            )

    @property
    def location(self) -> Location | None:
        return Location(self._file.path, self._offset) if self._contiguous else None

    def read_into(self, start: int, out: Tensor) -> None:
        if self._contiguous:
            self._file.read_into(self._offset + start * out.element_size(), byte_view(out))
        elif out.numel():
            self._gather(start, byte_view(out))

    def _gather(self, start: int, buffer: memoryview) -> None:
        width = self.info.dtype.itemsize
        # Elements are moved as opaque bytes: NumPy's flat iterator walks any strides without a copy of the rest.
        view = np.ndarray(
            self.info.shape,
            dtype=f"V{width}",
            buffer=self._file.mapped(),
            offset=self._offset,
            strides=tuple(step * width for step in self._stride),
        )
        count = len(buffer) // width
        buffer[:] = memoryview(view.flat[start : start + count].tobytes())
