"""Jobs for the compiled loops of the mean on the host, and the threads that do them.

A chunk is a run of numbers, dense in memory, with its mean; a table of chunks has a row for each. A job is what is to
be done with a table. It is cut into shares, of which every thread takes one after another until none is left. All
tables are told by addresses, and nothing is checked: :class:`polyak._host_kernel.HostKernel` vouches for them.

The threads are those that torch's own operations run on. After an operation they look out for the next for
milliseconds, and any others would have to share the processors with them; nor do they take long to begin.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from polyak import _torch

__all__ = [
    "CHUNK_NUMEL",
    "KINDS",
    "Task",
    "addresses_of",
    "are_possible",
    "are_ready",
    "do",
    "most_threads",
]

Task = Literal["look", "fold", "fold fitting"]
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Numbers in a chunk at most. Its weights and means, as they were and as they are, fit into the second cache.
CHUNK_NUMEL = 1 << 13
_INFINITY = np.float32(np.inf).view(np.uint32)
# Views of freed memory pretend to lie below, as few others do.
_LOW_ADDRESS = 1 << 40
# A fork waits so long for the compiler, whose locks a child would otherwise inherit and never see opened.
_PATIENCE_SECONDS = 60.0


def do(task: Task, tables: tuple[np.ndarray, ...], share: float = 0.0, which: int = 0) -> None:
    """Do a job, on as many threads as there are shares.

    Args:
        task: "look" keeps the largest magnitudes; "fold" is ``means += share (weights - means)``, for the chunks of
            which ``folded`` says ``which``; "fold fitting" looks at all and folds those that are below their bounds,
            and says which they were; its share is less than a half.
        tables: those of :data:`polyak._host_loops.JOB`, in its order, but for the last, which is made here.
    """
    _do(_loader(os.getpid()).loops, task, tables, share, which)


def _do(loops: Any, task: Task, tables: tuple[np.ndarray, ...], share: float, which: int = 0) -> None:
    shares, chunks, *_, tops = tables
    # As torch's lerp_ does, which rounds less where one of the two ends is near.
    single = np.float32(share)
    far = abs(single) >= 0.5
    coefficient = single - np.float32(1) if far else single
    before = np.empty((len(shares), CHUNK_NUMEL if task == "fold fitting" else 0), np.float32)
    places = [table.ctypes.data for table in (*tables, before)]
    sizes = (len(chunks), CHUNK_NUMEL, tops.shape[1])
    about = (loops.TASKS.index(task), which, far, coefficient)
    job = np.array((0, len(shares), *places, *sizes, *about), loops.JOB)
    parallel = _parallel()
    if len(shares) == 1 or parallel is None:
        loops.run.ctypes(job.ctypes.data)
    else:
        parallel(loops.run.address, job.ctypes.data, len(shares), 0)


def addresses_of(tensors: Sequence[Tensor]) -> np.ndarray:
    """Where they begin in memory; 0 where they have none."""
    addresses = np.fromiter(map(Tensor.data_ptr, tensors), np.int64, len(tensors))
    # A view of memory that was freed says how far it is from there, which only the storages of low addresses need tell.
    low = np.flatnonzero(addresses < _LOW_ADDRESS).tolist()
    addresses[[i for i in low if not tensors[i].untyped_storage().data_ptr()]] = 0
    return addresses


# Threads


@cache
def _parallel() -> Callable[[int, int, int, int], None] | None:
    """Call a function with an argument on so many threads of the OpenMP that torch's operations use; None: not found.

    It is ``GOMP_parallel`` of GNU's library, which those of LLVM and Intel have too.
    """
    parallel = _torch.openmp("GOMP_parallel")
    if parallel is None:
        return None
    parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    parallel.restype = None
    return parallel


_process_id = os.getpid()


def most_threads() -> int:
    """As many as torch uses; one in a process that was forked, where OpenMP's threads did not come along."""
    return torch.get_num_threads() if os.getpid() == _process_id else 1


# The loops, which take a while to come.


@cache
def are_possible() -> bool:
    """Whether there can be compiled loops here: numba and torch's threads."""
    return find_spec("numba") is not None and _parallel() is not None


def are_ready(wait: bool = False) -> bool:
    """Whether the compiled loops can be called now; they begin to be made when they are first asked for.

    Args:
        wait: until they are there, or cannot be.
    """
    if _is_orphan or not are_possible():
        return False
    loader = _loader(os.getpid())
    if wait and loader.is_alive():
        loader.join()
    return loader.loops is not None


@lru_cache(maxsize=1)  # a child that was forked has no threads of its parent's
def _loader(process_id: int) -> _Loader:
    loader = _Loader()
    with suppress(RuntimeError):  # no thread begins where Python ends, or where the system allows no more
        loader.start()
    return loader


class _Loader(threading.Thread):
    """Imports what compiles the loops, and tries them; not a daemon, as a compiler should not be torn to pieces."""

    def __init__(self) -> None:
        super().__init__(name="polyak-compiler", daemon=False)
        self.loops: Any = None

    def run(self) -> None:
        with _compiling:
            try:
                loops = import_module("polyak._host_loops")
                if _are_right(loops):
                    self.loops = loops
            except Exception:  # of a compiler there are many, and torch's operations do the same
                self.loops = None


# Held while there is a compiler at work, and by whoever forks: a child would inherit its locks, shut.
_compiling = threading.Lock()
_held_by_fork = threading.local()
_is_orphan = False  # forked while a compiler was at work, which nobody waited for any longer


def _before_fork() -> None:
    _held_by_fork.value = not _is_orphan and _compiling.acquire(timeout=_PATIENCE_SECONDS)


def _after_fork() -> None:
    if getattr(_held_by_fork, "value", False):
        _held_by_fork.value = False
        _compiling.release()


def _after_fork_in_child() -> None:
    global _is_orphan
    _is_orphan = _is_orphan or not getattr(_held_by_fork, "value", False)
    _after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)


def _are_right(loops: Any) -> bool:
    """Whether they are compiled, and give the bits of torch's own operations on this processor."""
    numba: Any = import_module("numba")
    if numba.config.DISABLE_JIT:  # then they are Python's loops, a thousand times as slow
        return False
    return all(
        _agrees(loops, torch.linspace(-3, 4, numel, dtype=torch.float32).to(dtype), share)
        for dtype in KINDS
        for numel in (1, 7, 31, 67, 1027)
        for share in (1e-3, 0.3, 0.7, -0.4, -1.0)
    )


def _agrees(loops: Any, weight: Tensor, share: float) -> bool:
    numel = weight.numel()
    start = torch.linspace(5, -2, numel, dtype=torch.float32)
    expected = start.lerp(weight.float(), share)
    chunks = np.array([[0, 0, 0, 0, numel, KINDS[weight.dtype], 0]], np.int64)
    bounds, tops = np.array([_INFINITY]), np.zeros((1, 1), np.uint32)
    tasks: tuple[Task, ...] = ("fold", "fold fitting") if abs(share) < 0.5 else ("fold",)
    for task in tasks:
        mean, folded = start.clone(), np.zeros(1, np.uint8)
        places = addresses_of([weight]), addresses_of([mean])
        _do(loops, task, (np.array([[0, 1]]), chunks, *places, folded, bounds, tops), share)
        if not torch.equal(mean.view(torch.int32), expected.view(torch.int32)):
            return False
    return True
