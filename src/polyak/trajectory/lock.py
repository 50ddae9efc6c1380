"""One writer for a folder: a lock that ends with its process, however that ends."""

from __future__ import annotations

import fcntl
import os
import weakref
from pathlib import Path

from polyak.errors import StateError

__all__ = ["FolderLock"]

_FILE = "lock"


class FolderLock:
    """An advisory lock on a folder, until ``release()``, which may be called more than once.

    Raises:
        StateError: somebody else, in this process or another, holds it.
    """

    def __init__(self, folder: Path):
        descriptor = os.open(folder / _FILE, os.O_RDWR | os.O_CREAT, 0o666)
        # At most once, and at the latest when a recorder that was never closed, as in a notebook, is collected.
        self.release = weakref.finalize(self, os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise StateError(
                f"{folder} is being recorded by another recorder: close that one first, give each run a folder "
                "of its own, and in a job of several processes record on rank 0 only"
            ) from None
        _held.add(self)


_held: weakref.WeakSet[FolderLock] = weakref.WeakSet()


def _let_go_in_child() -> None:
    # A forked child, such as a worker that loads data, would keep the lock beyond the death of its parent.
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_let_go_in_child)
