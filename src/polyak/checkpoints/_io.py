"""Files as checkpoints need them: read at offsets, and written so that they appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import mmap
import os
import secrets
import shutil
import stat
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path

from polyak._swap import undoing
from polyak.errors import CheckpointError, OutputExistsError, name_list

__all__ = [
    "OWN_FILES",
    "O_BINARY",
    "SIDECAR",
    "AtomicOutput",
    "DataFile",
    "Observer",
    "sha256",
    "write_all",
    "write_file",
    "writing",
]

# Reading and writing at offsets. Large files are written past the page cache where the system knows how: 256 MiB
# written and synced (ext4, Linux 6.18, two cores) take 0.2 to 0.4 s instead of 0.7 to 1.1 s, and leave nothing there
# instead of 256 MiB, so that the data set of the training stays.

# Smaller files are left in the page cache: what is chosen among, such as the blocks of a small model, is read soon.
LEAST_UNCACHED_BYTES = 1 << 25
# The page cache holds about so much of a file at a time; pieces below the second size are left to the system.
_CHUNK_BYTES = 1 << 21
_LEAST_PIECE_BYTES = 1 << 18
# Linux 6.14 and later, on the file systems that have it; all others answer with one of these errors.
_RWF_DONTCACHE = 0x80
_UNSUPPORTED = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}
# Windows would take descriptors for text, and can only read and write at a file's one position.
O_BINARY = getattr(os, "O_BINARY", 0)
_HAS_OFFSETS = hasattr(os, "preadv") and hasattr(os, "pwrite")
_position_lock = threading.Lock()


def write_all(number: int, data: memoryview, offset: int, *, uncached: bool = False) -> None:
    """``os.pwrite`` until all is written: the system may take less at a time.

    If ``uncached``, the system begins at once to put it on the disk, and then drops it from the page cache.
    """
    uncached = uncached and len(data) >= _LEAST_PIECE_BYTES and _HAS_OFFSETS
    done = 0
    while done < len(data):
        if uncached:
            done += _write_uncached(number, data[done : done + _CHUNK_BYTES], offset + done)
        elif _HAS_OFFSETS:
            done += os.pwrite(number, data[done:], offset + done)
        else:
            done += _seek_and(os.write, number, data[done:], offset + done)


def read_into(number: int, buffer: memoryview, offset: int) -> int:
    """``os.preadv``: the bytes read, which may be fewer than asked for."""
    if _HAS_OFFSETS:
        return os.preadv(number, [buffer], offset)
    data = _seek_and(os.read, number, len(buffer), offset)
    buffer[: len(data)] = data
    return len(data)


def _seek_and(call: Callable, number: int, argument: memoryview | int, offset: int):
    """One thread at a time: a descriptor has one position."""
    with _position_lock:
        os.lseek(number, offset, os.SEEK_SET)
        return call(number, argument)


def _write_uncached(number: int, data: memoryview, offset: int) -> int:
    if sys.platform == "linux":
        try:
            return os.pwritev(number, [data], offset, _RWF_DONTCACHE)
        except NotImplementedError:
            pass  # a Python that was built for an older system knows no flags
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
    written = os.pwrite(number, data, offset)
    if hasattr(os, "posix_fadvise"):
        # An older Linux only begins to write, so that the sync at the end finds little left to do.
        os.posix_fadvise(number, offset, written, os.POSIX_FADV_DONTNEED)
    return written


# Files that are read, each through a descriptor of its own.

# Sixty-four sharded inputs have more files than a process may hold open; those read last stay open.
_MAX_OPEN_FILES = 128


class _Descriptor:
    """An open file; closed when the last thread that reads from it lets go."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY | O_BINARY)
        weakref.finalize(self, os.close, self.number)


# By the id of the file they belong to, the one read last at the end.
_open_files: OrderedDict[int, _Descriptor] = OrderedDict()
_open_files_lock = threading.Lock()


def _fingerprint(status: os.stat_result) -> tuple[int, ...]:
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


class DataFile:
    """A file read at byte offsets, from any number of threads.

    Raises ``CheckpointError`` if the file cannot be opened, is empty, shrinks, or is replaced meanwhile.
    """

    start = 0

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"cannot read {path}: it is not a regular file")
            self._fingerprint = _fingerprint(status)
            self._descriptor()
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
        self.size = status.st_size
        if self.size == 0:
            raise CheckpointError(f"{path} is empty: its writer was cut off; use another copy")

    @property
    def file(self) -> DataFile:
        """Itself: a whole file is a region of a file, as a part of one is."""
        return self

    def _descriptor(self) -> _Descriptor:
        with _open_files_lock:
            descriptor = _open_files.pop(id(self), None) or self._opened()
            _open_files[id(self)] = descriptor
            if len(_open_files) > _MAX_OPEN_FILES:
                _open_files.popitem(last=False)
        return descriptor

    def _opened(self) -> _Descriptor:
        descriptor = _Descriptor(self.path)
        if _fingerprint(os.fstat(descriptor.number)) != self._fingerprint:
            raise CheckpointError(
                f"{self.path} changed while it was being read: open it again when its writer is done"
            )
        return descriptor

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the bytes at ``offset``."""
        done = 0
        try:
            descriptor = self._descriptor()
            while done < len(buffer):
                count = read_into(descriptor.number, buffer[done:], offset + done)
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
        return io.BufferedReader(FilePart(self, offset, self.size - offset if nbytes is None else nbytes))

    def mapped(self) -> mmap.mmap:
        """The whole file as read-only memory; it is unmapped when the last user lets go."""
        try:
            return mmap.mmap(self._descriptor().number, self.size, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path}: {error.strerror}") from error

    def close(self) -> None:
        """Let go of its descriptor; reading afterwards opens it again."""
        # Not under the lock: the garbage collector may come here while this thread holds it.
        _open_files.pop(id(self), None)

    __del__ = close


class FilePart(io.RawIOBase):
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


# Outputs that appear whole or not at all.

# Patterns of what the writers put into folders; each format adds its own. A folder with anything else in it is
# somebody's, and is not replaced.
OWN_FILES: set[str] = set()
# Formats with no place for metadata and ties carry them in a file of this name; in a folder with files that were
# copied, it says which these are, by name and SHA-256, so that they may be replaced as long as nobody changed them.
# Where the names of what was written are those of the inputs, these are noted as well, with their bytes.
SIDECAR = "polyak.json"

# Called with the offset and the bytes of what was written.
Observer = Callable[[int, memoryview], object]


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the errors of the file system into one that names the output."""
    try:
        yield
    except OSError as error:
        if isinstance(error, OutputExistsError):
            raise
        reason = error.strerror or str(error)
        raise CheckpointError(f"cannot write {path}: {reason}; nothing was changed there") from error


class OutputFile:
    """A new file of known size, written at offsets from any number of threads."""

    def __init__(self, path: Path, output: Path, nbytes: int, observe: Observer | None = None) -> None:
        self.path = path
        self._output = output
        self._observe = observe
        self._is_large = nbytes >= LEAST_UNCACHED_BYTES
        with writing(output):
            # A full disk shows here, before hours of work, rather than at the last tensor.
            if shutil.disk_usage(path.parent).free < nbytes:
                raise OSError(errno.ENOSPC, f"{nbytes:,} bytes are needed and the disk has less")
            self._number: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | O_BINARY, 0o666)
            try:
                os.truncate(self._number, nbytes)
            except BaseException:
                self.close()
                raise

    def write(self, offset: int, data: memoryview) -> None:
        """Write all of ``data`` at ``offset``."""
        assert self._number is not None, "the file is closed"
        with writing(self._output):
            write_all(self._number, data, offset, uncached=self._is_large)
        if self._observe is not None:
            self._observe(offset, data)

    def close(self) -> None:
        """Close it; more than once is harmless."""
        if self._number is not None:
            os.close(self._number)
            self._number = None


class AtomicOutput:
    """A file or folder under construction; making one writes nothing, and finds what could not be written.

    Raises ``OutputExistsError`` if the output is there and ``overwrite`` is False, or if it is a folder with
    files that no writer of this package made; ``CheckpointError`` if there is no folder to write into, or it may not
    be written to.
    """

    def __init__(self, path: Path, overwrite: bool) -> None:
        self.path = path
        self.temporary = path.parent / f".polyak-{secrets.token_hex(6)}.tmp"
        self._overwrite = overwrite
        if not path.parent.is_dir():
            raise CheckpointError(f"cannot write {path}: there is no folder {path.parent}; make it first")
        if not os.access(path.parent, os.W_OK):
            raise CheckpointError(f"cannot write {path}: {path.parent} may not be written to")
        self._refuse_existing()
        # An interrupt may fall where nobody can abort: between the lines of whoever does, or within.
        self._ruins = (self.temporary, self.temporary.with_suffix(".old"), self.path)
        self._forgotten = weakref.finalize(self, _clear, *self._ruins)
        self._forgotten.atexit = False  # a forked child that ends would take its parent's output away

    def _refuse_existing(self) -> None:
        if not os.path.lexists(self.path):
            return
        if not self._overwrite:
            raise OutputExistsError(
                f"{self.path} exists already: name another output, or ", "pass overwrite=True", "give --force"
            )
        if self.path.is_dir():
            if self.path.is_symlink():
                raise OutputExistsError(f"{self.path} is a link to a folder: name the folder itself")
            foreign = list(_foreign(self.path, _noted(self.path, "copied"), _noted(self.path, "written")))
            if foreign:
                raise OutputExistsError(
                    f"{self.path} is a folder that also holds {name_list(sorted(foreign))}, which would be lost: "
                    f"name a new folder"
                )

    def create_file(self, nbytes: int, observe: Observer | None = None) -> OutputFile:
        """The temporary file, at its full size."""
        try:
            return OutputFile(self.temporary, self.path, nbytes, observe)
        except BaseException:
            self.abort()
            raise

    def create_folder(self) -> Path:
        """The temporary folder."""
        with writing(self.path):
            self.temporary.mkdir()
        return self.temporary

    def commit(self) -> None:
        """Sync and rename: from here on the output is there, whole."""
        with writing(self.path):
            _sync_tree(self.temporary)
            self._refuse_existing()
            self._rename()
            _sync(self.path.parent)

    def _rename(self) -> None:
        if not self.path.is_dir():
            os.replace(self.temporary, self.path)
            return
        # No rename replaces a folder that has files in it.
        _, aside, path = self._ruins
        with undoing(lambda: _settle(aside, path)):
            os.rename(path, aside)
            os.rename(self.temporary, path)

    def abort(self) -> None:
        """Remove the temporary; more than once is harmless, and so is doing it after ``commit``."""
        _clear(*self._ruins)
        self._forgotten.detach()


def _clear(temporary: Path, aside: Path, path: Path) -> None:
    _remove(temporary)
    with suppress(OSError):
        _settle(aside, path)


def _settle(aside: Path, path: Path) -> None:
    """A folder that made way goes, or comes back where nothing came into its place."""
    if os.path.lexists(path):
        shutil.rmtree(aside, ignore_errors=True)
    elif os.path.lexists(aside):
        os.rename(aside, path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def write_file(path: Path, content: bytes, *, overwrite: bool) -> None:
    """Write a small file, whole or not at all.

    Raises:
        OutputExistsError: ``path`` exists and ``overwrite`` is False.
        CheckpointError: it cannot be written.
    """
    output = AtomicOutput(path, overwrite=overwrite)
    try:
        file = output.create_file(len(content))
        try:
            file.write(0, memoryview(content))
        finally:
            file.close()
        output.commit()
    finally:
        output.abort()


def _foreign(
    folder: Path, copied: Mapping[str, str], written: Mapping[str, str], above: str = ""
) -> Iterator[str]:
    """Names of what is in a folder, and in those of its folders that a writer made, and is not of a writer."""
    for item in folder.iterdir():
        name = above + item.name
        if item.is_dir() and any(file.startswith(f"{name}/") for file in written):
            yield from _foreign(item, copied, written, f"{name}/")
        elif not _is_ours(item, name, copied, written):
            yield name


def _is_ours(item: Path, name: str, copied: Mapping[str, str], written: Mapping[str, str]) -> bool:
    if not item.is_file():
        return False
    if any(fnmatch(name, pattern) for pattern in OWN_FILES if "/" not in name):
        return True
    return written.get(name) == str(item.stat().st_size) or (name in copied and copied[name] == sha256(item))


def _noted(folder: Path, section: str) -> Mapping[str, str]:
    """What a writer copied into ``folder``, names and hashes; or wrote there, names and bytes."""
    try:
        noted = json.loads((folder / SIDECAR).read_bytes())[section]
        return noted if isinstance(noted, dict) else {}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return {}


def sha256(file: Path) -> str:
    """The SHA-256 of a file. Raises ``CheckpointError`` if it cannot be read."""
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error


def _sync_tree(path: Path) -> None:
    if path.is_dir():
        for item in path.iterdir():
            _sync_tree(item)
    _sync(path)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folder, and its renames are in its journal
    # Windows syncs only what is open for writing.
    number = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
