"""Outputs that appear whole or not at all.

Everything is written under a temporary name beside the output, synced, and renamed over it: a process killed at
any moment leaves the old output or the new one (for a folder that is replaced, at worst the old one set aside
under a temporary name).
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path

from polyak.errors import CheckpointError, OutputExistsError, name_list

__all__ = ["AtomicOutput", "OutputFile", "write_all", "writing"]

# Smaller writes are left to the system, which gathers them.
_WRITE_BACK_BYTES = 1 << 18
# What the writers put into folders. A folder with anything else in it is somebody's, and is not replaced.
_OURS = ("*.safetensors", "*.bin", "*.index.json", "*.distcp", ".metadata", "polyak.json")


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


def write_all(number: int, data: memoryview, offset: int) -> None:
    """``os.pwrite`` until all is written: the system may take less at a time."""
    done = 0
    while done < len(data):
        done += os.pwrite(number, data[done:], offset + done)


class OutputFile:
    """A new file of known size, written at offsets from any number of threads."""

    def __init__(self, path: Path, output: Path, nbytes: int) -> None:
        self.path = path
        self._output = output
        with writing(output):
            # A full disk shows here, before hours of work, rather than at the last tensor.
            if shutil.disk_usage(path.parent).free < nbytes:
                raise OSError(errno.ENOSPC, f"{nbytes:,} bytes are needed and the disk has less")
            self._number: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                os.truncate(self._number, nbytes)
            except BaseException:
                self.close()
                raise

    def write(self, offset: int, data: memoryview) -> None:
        """Write all of ``data`` at ``offset``."""
        assert self._number is not None, "the file is closed"
        with writing(self._output):
            write_all(self._number, data, offset)
            if len(data) >= _WRITE_BACK_BYTES and hasattr(os, "posix_fadvise"):
                # Linux begins to write the range to disk, so that the sync at the end finds little left to do.
                os.posix_fadvise(self._number, offset, len(data), os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close it; more than once is harmless."""
        if self._number is not None:
            os.close(self._number)
            self._number = None


class AtomicOutput:
    """A file or folder under construction.

    Raises ``OutputExistsError`` if the output is there and ``overwrite`` is False, or if it is a folder with
    files that no writer of this package made; ``CheckpointError`` if there is no folder to write into.
    """

    def __init__(self, path: Path, overwrite: bool) -> None:
        self.path = path
        self.temporary = path.parent / f".polyak-{secrets.token_hex(6)}.tmp"
        self._overwrite = overwrite
        if not path.parent.is_dir():
            raise CheckpointError(f"cannot write {path}: there is no folder {path.parent}; make it first")
        self._refuse_existing()

    def _refuse_existing(self) -> None:
        if not os.path.lexists(self.path):
            return
        if not self._overwrite:
            raise OutputExistsError(
                f"{self.path} exists already: name another output, or ask to overwrite it"
            )
        if self.path.is_dir():
            if self.path.is_symlink():
                raise OutputExistsError(f"{self.path} is a link to a folder: name the folder itself")
            foreign = [item.name for item in self.path.iterdir() if not _is_ours(item)]
            if foreign:
                raise OutputExistsError(
                    f"{self.path} is a folder that also holds {name_list(sorted(foreign))}, which would be lost: "
                    f"name a new folder"
                )

    def create_file(self, nbytes: int) -> OutputFile:
        """The temporary file, at its full size."""
        try:
            return OutputFile(self.temporary, self.path, nbytes)
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
        aside = self.temporary.with_suffix(".old")
        os.rename(self.path, aside)
        try:
            os.rename(self.temporary, self.path)
        except BaseException:
            os.rename(aside, self.path)
            raise
        shutil.rmtree(aside)

    def abort(self) -> None:
        """Remove the temporary; more than once is harmless, and so is doing it after ``commit``."""
        if self.temporary.is_dir():
            shutil.rmtree(self.temporary, ignore_errors=True)
        else:
            with suppress(OSError):
                self.temporary.unlink()


def _is_ours(item: Path) -> bool:
    return item.is_file() and any(fnmatch(item.name, pattern) for pattern in _OURS)


def _sync_tree(path: Path) -> None:
    if path.is_dir():
        for item in path.iterdir():
            _sync_tree(item)
    _sync(path)


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
