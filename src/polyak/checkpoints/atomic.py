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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path

from polyak.checkpoints.passing import LEAST_PASSING_BYTES, write_all
from polyak.errors import CheckpointError, OutputExistsError, name_list

__all__ = ["AtomicOutput", "Observer", "OutputFile", "write_file", "writing"]

# What the writers put into folders. A folder with anything else in it is somebody's, and is not replaced.
_OURS = ("*.safetensors", "*.bin", "*.index.json", "*.distcp", ".metadata", "polyak.json")


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
        self._is_large = nbytes >= LEAST_PASSING_BYTES
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
            write_all(self._number, data, offset, passing=self._is_large)
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

    def _refuse_existing(self) -> None:
        if not os.path.lexists(self.path):
            return
        if not self._overwrite:
            raise OutputExistsError(
                f"{self.path} exists already: name another output, or pass overwrite=True (--force on the command line)"
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
