"""Σ a_k · source_k, streamed: slices of every input pass through a few buffers into every output."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from polyak.checkpoints import Checkpoint, Layout, TensorInfo, Writer
from polyak.combine import _running
from polyak.errors import OptionError

__all__ = ["Budget", "MemoryWriter", "Progress", "combine", "parse_bytes"]

# How the memory that ``combine`` may take is spent: buffers for slices, threads, and a reserve for the rest.

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY_UNITS = {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", re.IGNORECASE)

# A slice and its running sum stay in the cache while every input passes through; larger ones bring nothing more.
_BEST_SLICE_BYTES = 1 << 22
_LEAST_SLICE_BYTES = 1 << 16
# More threads than this wait for memory, not for each other's turn.
_BEST_WORKERS = 2
# Modules loaded on first use, thread stacks, the allocator's slack.
_RESERVE_BYTES = 16_000_000
# What the description of one tensor takes in an opened checkpoint and while headers are compared.
_BYTES_PER_DESCRIPTION = 1_000
# Per worker and beside one sum per output: values as read, as summed, as written.
_BUFFERS_BESIDE_SUMS = 3


def parse_bytes(size: int | str) -> int:
    """A number of bytes, from a number or from text such as ``"512MB"`` (10**6) or ``"2GiB"`` (2**30).

    Raises ``OptionError`` for anything else.

    >>> parse_bytes("512MB"), parse_bytes("1.5 GiB"), parse_bytes(4096)
    (512000000, 1610612736, 4096)
    """
    if isinstance(size, int) and not isinstance(size, bool):
        return size
    found = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if found is None:
        raise OptionError(f"cannot read {size!r} as a size in bytes: write 512MB, 2GiB or a whole number")
    return int(float(found[1]) * (_UNITS | _BINARY_UNITS)[found[2].upper()])


@dataclass(frozen=True)
class Budget:
    """How many threads take how large slices, and the memory that this and everything beside it comes to.

    Attributes:
        workers: threads that read, sum and write.
        slice_bytes: size of each of a worker's buffers.
        total_bytes: the most memory in use, at or below what was allowed.
    """

    workers: int
    slice_bytes: int
    total_bytes: int

    @classmethod
    def within(
        cls,
        max_memory: int | str,
        inputs: Sequence[Checkpoint],
        n_outputs: int,
        most_workers: int | None = None,
    ) -> Budget:
        """The fastest that fits. Raises ``OptionError``, with the least possible, where nothing does."""
        buffers = n_outputs + _BUFFERS_BESIDE_SUMS
        fixed_bytes = _RESERVE_BYTES + sum(map(_held_bytes, inputs))
        max_bytes = parse_bytes(max_memory)
        workers = min(most_workers or _BEST_WORKERS, _usable_cores())
        slice_bytes = _BEST_SLICE_BYTES
        while fixed_bytes + workers * buffers * slice_bytes > max_bytes:
            if slice_bytes > _LEAST_SLICE_BYTES:
                slice_bytes //= 2
            elif workers > 1:
                workers -= 1
            else:
                least = (fixed_bytes + buffers * slice_bytes) // 10**6 + 1
                raise OptionError(
                    f"a memory of {max_memory} is too little for {len(inputs)} inputs and {n_outputs} "
                    f"outputs: allow {least}MB or more{_cause(inputs)}"
                )
        return cls(workers, slice_bytes, fixed_bytes + workers * buffers * slice_bytes)


def _held_bytes(checkpoint: Checkpoint) -> int:
    values = 0 if checkpoint.is_lazy else sum(info.nbytes for info in checkpoint.tensors.values())
    return values + _BYTES_PER_DESCRIPTION * len(checkpoint.tensors)


def _cause(inputs: Sequence[Checkpoint]) -> str:
    whole = [str(checkpoint.path) for checkpoint in inputs if not checkpoint.is_lazy]
    if not whole:
        return ""
    return f" ({whole[0]} is in an old torch format that must be loaded whole: save it again with torch.save)"


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# Cutting tensors into slices, sharing the slices out, and taking small ones together.

# Vector instructions treat the last few elements apart and may round them differently. Slices are cut at multiples
# of this, and the last one is treated as if it reached to the next, so that no element is ever among those few.
_ALIGNMENT_ELEMENTS = 64
# Smaller slices cost more to call upon than to sum; with larger bundles a few threads would find too few of them.
_BUNDLE_BYTES = 1 << 19


@dataclass(frozen=True, slots=True)
class Slice:
    """Elements ``[start, start + count)`` of a flattened tensor."""

    name: str
    start: int
    count: int


@dataclass(frozen=True)
class Bundle:
    """Slices that pass through the buffers together, with the place of each in them, in elements.

    >>> bundle = Bundle((Slice("a", 0, 100), Slice("b", 0, 10)))
    >>> bundle.places, bundle.count
    ([(Slice(name='a', start=0, count=100), 0), (Slice(name='b', start=0, count=10), 128)], 192)
    """

    slices: tuple[Slice, ...]

    @property
    def name(self) -> str:
        """A tensor that is like all others of the bundle."""
        return self.slices[0].name

    @cached_property
    def places(self) -> list[tuple[Slice, int]]:
        """Each slice and where it begins."""
        ends = accumulate((_aligned(piece.count) for piece in self.slices), initial=0)
        return list(zip(self.slices, ends, strict=False))

    @cached_property
    def count(self) -> int:
        """Elements of a buffer that are taken, unused ones between slices and behind the last included."""
        return sum(_aligned(piece.count) for piece in self.slices)


def _aligned(count: int) -> int:
    return -(-count // _ALIGNMENT_ELEMENTS) * _ALIGNMENT_ELEMENTS


def bundled(
    slices: Iterable[Slice], kind: Callable[[str], Hashable], width: Callable[[str], int], most_bytes: int
) -> Iterator[Bundle]:
    """Neighbouring slices of one kind of tensor together, as far as they are small.

    Args:
        slices: one after the other, none larger than ``most_bytes``.
        kind: what tensors must have in common; those of kind None are left alone.
        width: gives the bytes that an element of the named tensor takes.
        most_bytes: size of the buffers.

    >>> slices = [Slice("w", 0, 300), Slice("b", 0, 10), Slice("n", 0, 1)]
    >>> kinds = {"w": "float", "b": "float", "n": "int"}
    >>> [len(bundle.slices) for bundle in bundled(slices, kinds.get, lambda name: 4, most_bytes=4096)]
    [2, 1]
    """
    most = min(most_bytes, _BUNDLE_BYTES)
    bundle: list[Slice] = []
    nbytes = 0
    for piece in slices:
        size = _aligned(piece.count) * width(piece.name)
        if bundle and (
            kind(piece.name) is None or kind(piece.name) != kind(bundle[0].name) or nbytes + size > most
        ):
            yield Bundle(tuple(bundle))
            bundle, nbytes = [], 0
        bundle.append(piece)
        nbytes += size
    if bundle:
        yield Bundle(tuple(bundle))


def cut(tensors: Mapping[str, TensorInfo], width: Callable[[str], int], slice_bytes: int) -> Iterator[Slice]:
    """Slices of at most ``slice_bytes`` each, tensor by tensor and from start to end.

    Args:
        tensors: name to shape.
        width: gives the bytes that an element of the named tensor takes.
        slice_bytes: size of the buffers.

    >>> import torch
    >>> tensors = {"w": TensorInfo((300,), torch.float32)}
    >>> [(piece.start, piece.count) for piece in cut(tensors, lambda name: 4, slice_bytes=512)]
    [(0, 128), (128, 128), (256, 44)]
    """
    for name, info in tensors.items():
        most = slice_bytes // width(name) // _ALIGNMENT_ELEMENTS * _ALIGNMENT_ELEMENTS
        for start in range(0, info.numel, most):
            yield Slice(name, start, min(most, info.numel - start))


def share_of(slices: list[Slice], rank: int, ranks: int) -> list[Slice]:
    """The ``rank``-th of ``ranks`` runs of neighbouring slices with about as many elements each.

    >>> pieces = [Slice("w", 0, 128), Slice("w", 128, 128), Slice("w", 256, 44)]
    >>> [len(share_of(pieces, rank, 2)) for rank in range(2)]
    [1, 2]
    """
    total = sum(piece.count for piece in slices)
    chosen, before = [], 0
    for piece in slices:
        # A slice belongs to the rank in whose part its middle lies, so that no two ranks take it.
        if (2 * before + piece.count) * ranks // (2 * total) == rank:
            chosen.append(piece)
        before += piece.count
    return chosen


# A few threads that share one list of work.

Item = TypeVar("Item")


def run_on_threads(make_worker: Callable[[], Callable[[Item], None]], items: Iterable[Item], n: int) -> None:
    """Call ``n`` workers on ``items``, in order, until all are done or one fails.

    Args:
        make_worker: called once in each thread; what it returns is called with one item after the other.
        items: the work.
        n: how many threads; one is that of the caller.

    Raises what the first worker to fail raised, after the others have finished the item they were at; an
    interrupt stops them likewise.
    """
    stop = threading.Event()
    shared = _Shared(items, stop)

    def work() -> None:
        worker = make_worker()
        for item in shared:
            worker(item)

    if n == 1:
        work()
        return
    with ThreadPoolExecutor(n) as pool:
        try:
            with _interrupts_held():
                jobs = [pool.submit(work) for _ in range(n)]
            for finished in as_completed(jobs):
                finished.result()
        except BaseException:
            stop.set()
            raise


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Let signals wait: one that falls into the start of a thread leaves it running, and nobody waits for it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Shared(Iterator[Item]):
    """An iterator that several threads may draw from."""

    def __init__(self, items: Iterable[Item], stop: threading.Event) -> None:
        self._items = iter(items)
        self._stop = stop
        self._lock = threading.Lock()

    def __next__(self) -> Item:
        with self._lock:
            if self._stop.is_set():
                raise StopIteration
            return next(self._items)


# An output that stays in memory.


class MemoryWriter(Writer):
    """Collects tensors instead of writing a file.

    Attributes:
        tensors: name to tensor; tied names are the same tensor.

    >>> from polyak.checkpoints import TensorInfo
    >>> writer = MemoryWriter(Layout({"w": TensorInfo((2,), torch.float32)}))
    >>> writer.write("w", 0, torch.tensor([1.0, 2.0]))
    >>> writer.tensors
    {'w': tensor([1., 2.])}
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        self.tensors: dict[str, Tensor] = {
            name: torch.empty(info.shape, dtype=info.dtype) for name, info in layout.tensors.items()
        }
        self.tensors |= {tied: self.tensors[name] for tied, name in layout.ties.items()}

    def _write(self, name: str, start: int, values: Tensor) -> None:
        place = self.tensors[name].view(-1)[start : start + values.numel()]
        _running.copy(_running.runs(values), _running.runs(place))

    def location(self, name: str) -> None:
        return None

    def commit(self) -> None:
        """Nothing is left to do."""

    def abort(self) -> None:
        """The tensors go with the writer."""


# The sum itself.

# On smaller bundles, and on few of them, threads spend their time waiting for each other's turn in Python.
_WORTH_THREADS_BYTES, _WORTH_THREADS_BUNDLES = 1 << 17, 16

# Called with the bytes done so far and in all, from one thread at a time.
Progress = Callable[[int, int], object]


def combine(
    inputs: Sequence[Checkpoint],
    coefficients: Sequence[Sequence[float]],
    writers: Sequence[Writer],
    *,
    max_memory: int | str = "256MB",
    accumulate: torch.dtype | None = None,
    progress: Progress | None = None,
    share: tuple[int, int] = (0, 1),
    workers: int | None = None,
    names: Iterable[str] | None = None,
) -> list[str]:
    """Write Σ_k a_k · input_k to each writer, in one pass over the inputs.

    The result depends neither on ``max_memory`` nor on threads nor on ``share``, to the bit. Identical inputs
    come back bit for bit. Integer and bool tensors are copied from the last input that counts. Infinities stay
    where all inputs that count share them. Inputs with coefficient zero are not read.

    Args:
        inputs: opened checkpoints that hold the same tensors (see ``common_layout``).
        coefficients: for each writer one number per input, which sum to 1; negative ones are allowed.
        writers: begun with layouts of the same names and shapes; the caller commits or aborts them.
        max_memory: bytes, or text such as ``"512MB"``: the most memory, the inputs' headers included.
        accumulate: ``torch.float64`` to sum everything in it; by default float32, and float64 for float64.
        progress: called with bytes done and bytes in all.
        share: ``(rank, ranks)``: do only the rank-th of so many parts; other processes do the others.
        workers: the most threads; None: as many as pay.
        names: the tensors to write, of those that the writers take; None: all.

    Returns:
        The names of copied tensors, of those in this share, that differ between the inputs.

    Raises:
        NonFiniteError: an input holds NaN or an infinity that the others do not; file and tensor are named.
        OptionError: coefficients that do not sum to 1, or a budget that is too small.
        CheckpointError: a file cannot be read or written.

    >>> import tempfile
    >>> from polyak import checkpoints
    >>> from polyak.combine import MemoryWriter, common_layout
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name, value in (("a", 1.0), ("b", 4.0)):
    ...         checkpoints.write(f"{folder}/{name}.pt", {"w": torch.full((2,), value)})
    ...     inputs = [checkpoints.open(f"{folder}/{name}.pt") for name in "ab"]
    ...     with MemoryWriter(common_layout(inputs)) as writer:
    ...         differing = combine(inputs, [[0.25, 0.75]], [writer])
    >>> writer.tensors
    {'w': tensor([3.2500, 3.2500])}
    """
    if accumulate not in (None, torch.float32, torch.float64):
        raise OptionError(f"accumulate must be torch.float32 or torch.float64, got {accumulate}")
    if len(coefficients) != len(writers) or not writers:
        raise OptionError(f"{len(coefficients)} rows of coefficients for {len(writers)} writers")
    budget = Budget.within(max_memory, inputs, len(writers), workers)
    job = _Job(inputs, coefficients, writers, accumulate)
    layout = writers[0].layout.tensors
    chosen = layout if names is None else {name: layout[name] for name in names}
    slices = share_of(list(cut(chosen, job.width, budget.slice_bytes)), *share)
    bundles = list(bundled(slices, job.kind, job.width, budget.slice_bytes))
    tally = _Tally(sum(map(job.traffic, bundles)), progress)
    nbytes = [bundle.count * job.width(bundle.name) for bundle in bundles]
    worth_threads = sum(nbytes) >= _WORTH_THREADS_BYTES * max(len(nbytes), _WORTH_THREADS_BUNDLES)
    workers = min(budget.workers, len(bundles)) if worth_threads else 1
    # A small model is averaged many times in a row, and fresh memory costs more than its arithmetic.
    run_on_threads(lambda: _Worker(job, max(nbytes, default=0), tally), bundles, workers)
    return [name for name in layout if name in job.differing]


class _Job:
    """What all workers share."""

    def __init__(
        self,
        inputs: Sequence[Checkpoint],
        coefficients: Sequence[Sequence[float]],
        writers: Sequence[Writer],
        accumulate: torch.dtype | None,
    ) -> None:
        self.inputs = inputs
        self.writers = writers
        self.accumulate = accumulate
        self.folds = _running.folds(coefficients, len(inputs))
        self.counted = [[index for index, a in enumerate(row) if a != 0] for row in coefficients]
        self.differing: set[str] = set()

    def source_dtype(self, name: str) -> torch.dtype:
        return self.inputs[0].tensors[name].dtype

    def output_dtypes(self, name: str) -> list[torch.dtype]:
        return [writer.layout.tensors[name].dtype for writer in self.writers]

    def width(self, name: str) -> int:
        """Bytes an element takes in the widest buffer it passes through."""
        source = self.source_dtype(name)
        widths = [dtype.itemsize for dtype in (source, *self.output_dtypes(name))]
        if _running.is_averaged(source):
            widths.append(_reals_in(source) * _running.accumulation_dtype(source, self.accumulate).itemsize)
        return max(widths)

    def kind(self, name: str) -> tuple[torch.dtype, ...] | None:
        """What tensors that are summed together have in common; None for those that are copied."""
        source = self.source_dtype(name)
        return (source, *self.output_dtypes(name)) if _running.is_averaged(source) else None

    def traffic(self, bundle: Bundle) -> int:
        """Bytes read and written for a bundle."""
        source = self.source_dtype(bundle.name)
        reads = len(self.folds) if _running.is_averaged(source) else len(set().union(*self.counted))
        written = sum(dtype.itemsize for dtype in self.output_dtypes(bundle.name))
        return sum(piece.count for piece in bundle.slices) * (reads * source.itemsize + written)


class _Tally:
    """Counts bytes over all threads."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._progress = 0, total, progress
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            if self._progress is not None:
                self._progress(self._done, self._total)


class _Buffer:
    """Memory that is seen as numbers of one dtype after the other."""

    def __init__(self, nbytes: int) -> None:
        self._bytes = torch.empty(nbytes, dtype=torch.uint8)
        self._runs: dict[tuple[torch.dtype, int], tuple[Tensor, ...]] = {}

    def part(self, dtype: torch.dtype, count: int) -> Tensor:
        """The first ``count`` of them."""
        return self._bytes[: count * dtype.itemsize].view(dtype)

    def runs(self, dtype: torch.dtype, count: int) -> tuple[Tensor, ...]:
        """The same in runs, which are made once: most bundles are of one size."""
        if (dtype, count) not in self._runs:
            self._runs[dtype, count] = _running.runs(self.part(dtype, count))
        return self._runs[dtype, count]


class _Worker:
    """One thread's buffers, used for one slice after the other."""

    def __init__(self, job: _Job, buffer_bytes: int, tally: _Tally) -> None:
        self._job, self._tally = job, tally
        self._read, self._values, self._written, *self._means = (
            _Buffer(buffer_bytes) for _ in range(_BUFFERS_BESIDE_SUMS + len(job.writers))
        )

    def __call__(self, bundle: Bundle) -> None:
        if _running.is_averaged(self._job.source_dtype(bundle.name)):
            self._average(bundle)
        else:
            for piece in bundle.slices:
                self._copy(piece)
        self._tally.add(self._job.traffic(bundle))

    def _average(self, bundle: Bundle) -> None:
        job = self._job
        source = job.source_dtype(bundle.name)
        dtype = _running.accumulation_dtype(source, job.accumulate)
        n_reals = bundle.count * _reals_in(source)
        means = [buffer.runs(dtype, n_reals) for buffer in self._means]
        for step in job.folds:
            (output, ratio), *others = step.ratios
            # What only replaces a mean is read into it: one copy less.
            if ratio == 1 and not others and source.to_real() == dtype:
                self._load(step.index, bundle, dtype, self._means[output])
                continue
            values = self._load(step.index, bundle, dtype, self._read).runs(dtype, n_reals)
            for output, ratio in step.ratios:
                _running.fold(means[output], values, ratio)
        for output, target in enumerate(job.output_dtypes(bundle.name)):
            # What lies between the slices may be anything; then each is looked at by itself.
            all_fit = _running.fits(means[output], target.to_real())
            mean = self._means[output].part(dtype, n_reals)
            for piece, place in bundle.places:
                part = mean[place * _reals_in(source) :][: piece.count * _reals_in(source)]
                fit = all_fit or _running.fits(_running.runs(part), target.to_real())
                self._write(output, piece, part, fit)

    def _load(self, index: int, bundle: Bundle, dtype: torch.dtype, buffer: _Buffer) -> _Buffer:
        """Read a bundle of one input as real numbers of ``dtype``, to ``buffer`` or, converted, to another; which."""
        source = self._job.source_dtype(bundle.name)
        read = buffer.part(source, bundle.count)
        for piece, place in bundle.places:
            self._job.inputs[index].read_into(piece.name, piece.start, read[place : place + piece.count])
        if source.to_real() == dtype:
            return buffer
        n_reals = bundle.count * _reals_in(source)
        _running.copy(buffer.runs(source.to_real(), n_reals), self._values.runs(dtype, n_reals))
        return self._values

    def _write(self, output: int, piece: Slice, mean: Tensor, fit: bool) -> None:
        writer = self._job.writers[output]
        dtype = writer.layout.tensors[piece.name].dtype
        infinite = None
        if not fit:
            sources = self._sources(self._job.counted[output], piece, mean.dtype)
            infinite = _running.restore_infinities(mean, sources, piece.name)
        if mean.dtype == dtype.to_real():
            values = mean.view(dtype)  # numbers in pairs are complex again
        else:
            values = self._written.part(dtype, piece.count)
            _running.copy(_running.runs(mean), _running.runs(_running.as_reals(values)))
        if infinite is not None:
            _running.refuse_overflow(_running.as_reals(values), infinite, mean, piece.name)
        writer.write(piece.name, piece.start, values)

    def _sources(self, indices: list[int], piece: Slice, dtype: torch.dtype) -> Iterator[tuple[Path, Tensor]]:
        count = piece.count * _reals_in(self._job.source_dtype(piece.name))
        for index in indices:
            values = self._load(index, Bundle((piece,)), dtype, self._read)
            yield self._job.inputs[index].path, values.part(dtype, count)

    def _copy(self, piece: Slice) -> None:
        job = self._job
        dtype = job.source_dtype(piece.name)
        values = self._read.part(dtype, piece.count)
        for writer, counted in zip(job.writers, job.counted, strict=True):
            job.inputs[counted[-1]].read_into(piece.name, piece.start, values)
            writer.write(piece.name, piece.start, values)
        other = self._values.part(dtype, piece.count)
        for index in sorted(set().union(*job.counted)):
            if piece.name in job.differing:
                return
            job.inputs[index].read_into(piece.name, piece.start, other)
            if not torch.equal(values, other):
                job.differing.add(piece.name)


def _reals_in(dtype: torch.dtype) -> int:
    return dtype.itemsize // dtype.to_real().itemsize
