"""Large files pass through the page cache without staying in it, where the system knows how.

What trains beside them keeps its data there, and no time goes into finding memory for gigabytes that nobody reads
again soon.
"""

from __future__ import annotations

import errno
import os
import sys

__all__ = ["LEAST_PASSING_BYTES", "read_into", "write_all"]

# Smaller files are left in the page cache: what is chosen among, such as the blocks of a small model, is read soon.
LEAST_PASSING_BYTES = 1 << 25
# The page cache holds about so much of a file at a time; pieces below the second size are left to the system.
_CHUNK_BYTES = 1 << 21
_LEAST_PIECE_BYTES = 1 << 18
# Linux 6.14 and later, on the file systems that have it; all others answer with one of these errors.
_RWF_DONTCACHE = 0x80
_UNSUPPORTED = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}
# A Python that was built for an older system knows no flags.
_ERRORS = (OSError, NotImplementedError)


def write_all(number: int, data: memoryview, offset: int, *, passing: bool = False) -> None:
    """``os.pwrite`` until all is written: the system may take less at a time.

    If ``passing``, the system begins at once to put it on the disk, and then drops it from the page cache.
    """
    passing = passing and len(data) >= _LEAST_PIECE_BYTES
    done = 0
    while done < len(data):
        if passing:
            done += _write_passing(number, data[done : done + _CHUNK_BYTES], offset + done)
        else:
            done += os.pwrite(number, data[done:], offset + done)


def read_into(number: int, buffer: memoryview, offset: int, *, passing: bool = False) -> int:
    """``os.preadv``; if ``passing``, what has to come from the disk does not stay in the page cache."""
    if passing and sys.platform == "linux":
        try:
            return os.preadv(number, [buffer], offset, _RWF_DONTCACHE)
        except _ERRORS as error:
            _raise_unless_unsupported(error)
    return os.preadv(number, [buffer], offset)


def _raise_unless_unsupported(error: Exception) -> None:
    if isinstance(error, OSError) and error.errno not in _UNSUPPORTED:
        raise error


def _write_passing(number: int, data: memoryview, offset: int) -> int:
    if sys.platform == "linux":
        try:
            return os.pwritev(number, [data], offset, _RWF_DONTCACHE)
        except _ERRORS as error:
            _raise_unless_unsupported(error)
    written = os.pwrite(number, data, offset)
    if hasattr(os, "posix_fadvise"):
        # An older Linux only begins to write, so that the sync at the end finds little left to do.
        os.posix_fadvise(number, offset, written, os.POSIX_FADV_DONTNEED)
    return written
