"""The mean on the host by compiled loops, where numba is installed: a sample is looked at for free where it is folded.

They take fp32, bf16 and fp16 weights into fp32 means that lie in memory as the weights do; the rest, and everything
until the loops are there, is for torch's operations. Accepted samples give the same bits either way, which is tried
before the loops are used. What a sample that is refused leaves differs in rounding; it is the same on any number of
threads. numba is imported, and what it made before is loaded or made anew, on a thread, while training goes on.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cache, lru_cache
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polyak import _torch
from polyak._batches import Batch
from polyak._swap import undoing

__all__ = ["HostKernel", "loops_are_ready"]

# Fewer numbers than this are not worth a compiler.
_LEAST_NUMEL = 1 << 18
# Of each thread: waking one takes as long as folding a fraction of this.
_LEAST_NUMEL_OF_A_THREAD = 1 << 18
# What is looked at before it is folded: with the next, and both means, it fits into the first cache.
_CHUNK_NUMEL = 1 << 13
# A fork waits so long for the compiler, whose locks a child would otherwise inherit and never see opened.
_PATIENCE_SECONDS = 60.0
# How late a thread's end is seen where an interrupt falls just there.
_BELL_SECONDS = 0.05
_FLOAT32_MAX = float(np.finfo(np.float32).max)


class HostKernel:
    """Which of some batches the loops take, and where their numbers are.

    A sample goes through in steps: :meth:`take` says whether the loops can have it now, and the others work on the
    sample that was taken last.

    Args:
        tensors: what is averaged, as it is now.
        means: their means.
        batches: of both, as an update walks them.
        watched: whether who calls :meth:`take` has seen that the tensors lie in memory as these do.

    Attributes:
        covered: the batches that the loops take, in the order in which sizes are given and returned.

    >>> from polyak._batches import plan_batches
    >>> weight, mean = torch.full((1 << 18,), 3.0), torch.zeros(1 << 18)
    >>> kernel = HostKernel([weight], [mean], plan_batches([weight], [mean]))
    >>> if loops_are_ready(wait=True) and kernel.take([weight]):
    ...     kernel.fold(0.5)
    ... else:                                            # without numba
    ...     _ = mean.lerp_(weight, 0.5)
    >>> mean[0]
    tensor(1.5000)
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        means: Sequence[Tensor],
        batches: Sequence[Batch],
        watched: bool = False,
    ):
        able = [_can_take(tensor, mean) for tensor, mean in zip(tensors, means, strict=True)]
        self.covered = [
            batch
            for batch in batches
            if all(able[p.index] and _is_one_run(p.of(tensors), p.of(means)) for p in batch.pieces)
        ]
        numel = sum(batch.numel for batch in self.covered)
        if numel < max(_LEAST_NUMEL, 1) or not _is_installed():
            self.covered = []
        if not self.covered:
            return
        pieces = [piece for batch in self.covered for piece in batch.pieces]
        self._owners = sorted({piece.index for piece in pieces if tensors[piece.index].numel()})
        self._owns_all = len(self._owners) == len(tensors)
        owned = self._pick(tensors)
        self._layout = None if watched else _torch.Layout(owned)
        roots: dict[int, tuple[int, Tensor]] = {}
        self._chunks = np.concatenate(list(self._rows(tensors, means, roots)))
        self._roots = [root for _, root in roots.values()]
        self._counted = [root for root in self._roots if not root.is_inference()]
        self._numel = numel
        self._stretches_of: dict[int, list[tuple[int, int]]] = {}  # by the number of threads
        self._folded = np.zeros(len(self._chunks), np.uint8)
        self._addresses = self._mean_addresses = np.zeros(0, np.int64)
        _loader(os.getpid())  # which begins to compile

    def __reduce__(self) -> tuple[type[HostKernel], tuple[tuple[()], ...]]:
        """Copies and pickles cover nothing: their means lie elsewhere."""
        return HostKernel, ((), (), ())

    def _pick(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return tensors if self._owns_all else [tensors[index] for index in self._owners]

    def _rows(
        self, tensors: Sequence[Tensor], means: Sequence[Tensor], roots: dict[int, tuple[int, Tensor]]
    ) -> Iterable[np.ndarray]:
        """The table of chunks, piece by piece; ``roots`` gets a tensor of each storage of means, to find it by."""
        owners = {index: owner for owner, index in enumerate(self._owners)}
        for group, batch in enumerate(self.covered):
            for piece in (piece for piece in batch.pieces if piece.index in owners):
                source, mean = piece.of(tensors), piece.of(means)
                start = int(source.storage_offset()) - int(tensors[piece.index].storage_offset())
                storage = mean.untyped_storage()
                # Not the mean itself, behind which its owner might put other data.
                root = mean.detach().as_strided((1,), (1,), 0)
                number, _ = roots.setdefault(storage.data_ptr(), (len(roots), root))
                begins = np.arange(0, mean.numel(), _CHUNK_NUMEL)
                columns = np.broadcast_arrays(
                    owners[piece.index],
                    (start + begins) * source.itemsize,
                    number,
                    (int(mean.storage_offset()) + begins) * mean.itemsize,
                    np.minimum(_CHUNK_NUMEL, mean.numel() - begins),
                    _KINDS[source.dtype],
                    group,
                )
                yield np.stack(columns, axis=1).astype(np.int64, copy=False)

    def take(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the loops are there, and these tensors lie in memory as those did that this was made for."""
        if not self.covered or not loops_are_ready():
            return False
        owned = self._pick(tensors)
        if self._layout is not None and not self._layout.is_that_of(owned):
            return False
        self._addresses = _addresses(owned)
        self._mean_addresses = _addresses(self._roots)
        return bool(self._addresses.all())  # where FSDP and others freed them for a while there is none

    def sizes(self) -> list[float]:
        """The largest magnitude in each batch; NaN or infinite where a number is."""
        tops = np.zeros((len(self._stretches()), len(self.covered)), np.uint32)
        self._run("look", lambda n: (tops[n],))
        return _as_floats(tops)

    def fold(self, share: float) -> None:
        """``means += share (weights - means)``, whatever the weights are."""
        self._folded.fill(0)
        self._fold_those(0, share)

    def fold_fitting(self, share: float, limits: Sequence[float]) -> list[float]:
        """Fold those chunks in that hold no magnitude above the limit of their batch; the largest of each batch.

        The share is less than a half. Below a negative limit there is nothing, not even zeros."""
        bounds = np.clip(limits, 0, _FLOAT32_MAX).astype(np.float32).view(np.uint32) + np.uint32(1)
        bounds[np.less(limits, 0)] = 0  # nothing lies below
        tops = np.zeros((len(self._stretches()), len(self.covered)), np.uint32)
        about = (self._mean_addresses, self._folded, bounds)
        self._run("fold_fitting", lambda n: (*about, tops[n], np.float32(share)), changes=True)
        return _as_floats(tops)

    def fold_rest(self, share: float) -> None:
        """Fold those chunks in that :meth:`fold_fitting` left out."""
        if not self._folded.all():
            self._fold_those(0, share)

    def take_back(self, share: float) -> None:
        """Take those chunks back, to their rounding, that :meth:`fold_fitting` folded in."""
        self._fold_those(1, -share / (1 - share))

    def _fold_those(self, which: int, share: float) -> None:
        # As torch's lerp_ does, which rounds less where one of the two ends is near.
        single = np.float32(share)
        far = bool(abs(single) >= 0.5)
        about = (self._mean_addresses, self._folded, which, single - np.float32(1) if far else single, far)
        self._run("fold", lambda n: about, changes=True)

    def _run(self, name: str, others: Callable[[int], tuple[Any, ...]], changes: bool = False) -> None:
        """Call a loop on all chunks, a contiguous stretch a thread; ``others`` are its further arguments."""
        loop = getattr(_loader(os.getpid()).loops, name)
        stretches = self._stretches()

        def work(n: int) -> None:
            loop(*stretches[n], self._chunks, self._addresses, *others(n))

        if changes:
            # As an operation of torch would, so that autograd sees that what it may have kept is no longer the same.
            torch.autograd.graph.increment_version(self._counted)
        _on_threads(work, len(stretches))

    def _stretches(self) -> list[tuple[int, int]]:
        n_threads = max(1, min(torch.get_num_threads(), self._numel // _LEAST_NUMEL_OF_A_THREAD))
        if n_threads not in self._stretches_of:
            shares = [self._numel * n // n_threads for n in range(1, n_threads)]
            cuts = [0, *self._chunks[:, 4].cumsum().searchsorted(shares).tolist(), len(self._chunks)]
            self._stretches_of[n_threads] = list(pairwise(cuts))
        return self._stretches_of[n_threads]


_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _can_take(tensor: Tensor, mean: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, nn.Parameter, nn.Buffer)
        and tensor.dtype in _KINDS
        and mean.dtype == torch.float32
        and _torch.on_host(tensor)
        and _torch.on_host(mean)
        and not tensor.is_neg()  # its numbers are stored with the other sign
    )


def _is_one_run(source: Tensor, mean: Tensor) -> bool:
    return source.is_contiguous() and mean.is_contiguous()


def _addresses(tensors: Sequence[Tensor]) -> np.ndarray:
    return np.fromiter(map(Tensor.data_ptr, tensors), np.int64, len(tensors))


def _as_floats(tops: np.ndarray) -> list[float]:
    """Those of all threads as numbers: bits of magnitudes are ordered as these are, NaNs last."""
    return tops.max(0).view(np.float32).tolist()


# The loops, which take a while to come.


@cache
def _is_installed() -> bool:
    return find_spec("numba") is not None


def loops_are_ready(wait: bool = False) -> bool:
    """Whether the compiled loops can be called now; they begin to be made when they are first asked for.

    Args:
        wait: until they are there, or cannot be.
    """
    if not _is_installed():
        return False
    loader = _loader(os.getpid())
    if wait:
        loader.join()
    return loader.loops is not None


@lru_cache(maxsize=1)  # a child that was forked has no threads of its parent's
def _loader(process_id: int) -> _Loader:
    loader = _Loader()
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


def _before_fork() -> None:
    _held_by_fork.value = _compiling.acquire(timeout=_PATIENCE_SECONDS)


def _after_fork() -> None:
    if getattr(_held_by_fork, "value", False):
        _held_by_fork.value = False
        _compiling.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)


def _are_right(loops: Any) -> bool:
    """Whether they are compiled, and give the bits of torch's own operations on this processor."""
    numba: Any = import_module("numba")
    if numba.config.DISABLE_JIT:  # then they are Python's loops, a thousand times as slow
        return False
    return all(
        _agrees(loops, torch.linspace(-3, 4, numel).to(dtype), share)
        for dtype in _KINDS
        for numel in (1, 7, 31, 67, 1027)
        for share in (1e-3, 0.3, 0.7, -0.4, -1.0)
    )


def _agrees(loops: Any, weight: Tensor, share: float) -> bool:
    numel = weight.numel()
    mean = torch.linspace(5, -2, numel)
    expected = mean.lerp(weight.float(), share)
    single, far = np.float32(share), abs(share) >= 0.5
    chunks = np.array([[0, 0, 0, 0, numel, _KINDS[weight.dtype], 0]], np.int64)
    places = _addresses([weight]), _addresses([mean])
    loops.fold(
        0, 1, chunks, *places, np.zeros(1, np.uint8), 0, single - np.float32(1) if far else single, far
    )
    return torch.equal(mean.view(torch.int32), expected.view(torch.int32))


# Threads of our own: numba's take their shares in pieces too small for memory, and torch's are not to be had.


@lru_cache(maxsize=1)  # a child that was forked has no threads of its parent's
def _helpers(process_id: int) -> _Helpers:
    return _Helpers()


class _Helpers:
    """Threads that wait for tasks until the process ends; they are daemons, as nobody has to tell them that it does."""

    def __init__(self) -> None:
        self._tasks = SimpleQueue[Callable[[], object]]()
        self._count = 0

    def call(self, task: Callable[[], object], times: int) -> None:
        """Have as many threads as ``times`` call it, each once, when they come to it."""
        while self._count < times:
            threading.Thread(target=self._serve, name="polyak-helper", daemon=True).start()
            self._count += 1
        for _ in range(times):
            self._tasks.put(task)

    def _serve(self) -> None:
        while True:
            self._tasks.get()()


def _on_threads(work: Callable[[int], object], count: int) -> None:
    """Call ``work`` with 0 to ``count - 1``, each once, on as many threads, and come back when all is done.

    What no other thread has begun the caller does itself, so that it never waits for one that is not there. Where an
    interrupt falls into it what was not begun is left undone, and nothing is being done any more when it is raised.
    """
    if count == 1:
        work(0)
        return
    waiting, begun = deque(range(count)), []
    ended: list[BaseException | None] = []
    bell = SimpleQueue[None]()
    gate = threading.Lock()

    def next_one(of: list[int]) -> int | None:
        with gate:
            if waiting:
                of.append(waiting.popleft())
                return of[-1]
        return None

    def help_out() -> None:
        while (n := next_one(begun)) is not None:
            error = None
            try:
                work(n)
            except BaseException as caught:
                error = caught
            ended.append(error)
            bell.put(None)

    def wait() -> None:
        with gate:
            waiting.clear()
        while len(ended) < len(begun):
            # What is counted is kept elsewhere, as an interrupt may take away what was just taken from a queue.
            with suppress(Empty):
                bell.get(timeout=_BELL_SECONDS)

    with undoing(wait):
        with suppress(RuntimeError):  # at the end of a process no thread begins any more
            _helpers(os.getpid()).call(help_out, count - 1)
        while (n := next_one([])) is not None:
            work(n)
    for error in ended:
        if error is not None:
            raise error
