"""Σ a_k · source_k, streamed: slices of every input pass through a few buffers into every output."""

from __future__ import annotations

import math
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

from polyak import _torch
from polyak.checkpoints import Checkpoint, Layout, TensorInfo, Writer
from polyak.combine._inputs import BUFFERS_BESIDE_SUMS, Budget, is_averaged
from polyak.errors import NonFiniteError, OptionError

__all__ = ["MemoryWriter", "Progress", "accumulation_dtype", "as_reals", "combine"]

# The running mean m -= (a_k/A_k)(m - x_k), A_k = a_1 + … + a_k: its steps, its inner loop, and what may go wrong.
#
# It gives Σ a_k x_k / Σ a_k and leaves identical inputs as they are, bit for bit in every dtype, which a plain sum
# of products does not.

_SUM_TOLERANCE = 1e-6
# One operation instead of two, which takes 1 - ratio instead of the ratio: the rounding of that is as large as the
# ratio's own share of it, and lost beside a large ratio only.
_LEAST_LERP_RATIO = 1 / 8


@dataclass(frozen=True)
class Fold:
    """One input that is read, and the ratios a_k/A_k at which it goes into each output that counts it.

    Attributes:
        index: which input.
        ratios: pairs of output and ratio.
    """

    index: int
    ratios: tuple[tuple[int, float], ...]


def folds(coefficients: Sequence[Sequence[float]], n_inputs: int) -> list[Fold]:
    """The reads and ratios that give every output its combination.

    Zero coefficients are left out. Positive ones come before negative ones, so that A_k never crosses zero; an
    input is read twice only where outputs disagree about its sign.

    Args:
        coefficients: for each output one number per input, which sum to 1.
        n_inputs: how many inputs there are.

    Raises ``OptionError`` for coefficients of another number, or that are not finite or do not sum to 1.

    >>> folds([[0.5, 0.0, 0.5], [2.0, 0.0, -1.0]], n_inputs=3)
    [Fold(index=0, ratios=((0, 1.0), (1, 1.0))),
     Fold(index=2, ratios=((0, 0.5),)), Fold(index=2, ratios=((1, -1.0),))]
    """
    for row in coefficients:
        _check(row, n_inputs)
    sums = [0.0] * len(coefficients)
    steps = []
    for sign in (1, -1):
        for index in range(n_inputs):
            ratios = []
            for output, row in enumerate(coefficients):
                if row[index] * sign > 0:
                    sums[output] += row[index]
                    ratios.append((output, float(row[index] / sums[output])))
            if ratios:
                steps.append(Fold(index, tuple(ratios)))
    return steps


def _check(row: Sequence[float], n_inputs: int) -> None:
    if len(row) != n_inputs:
        raise OptionError(f"{len(row)} coefficients for {n_inputs} inputs: give one for each")
    if not math.isclose(sum(row), 1, abs_tol=_SUM_TOLERANCE * max(1, *map(abs, row))):
        raise OptionError(f"coefficients must be finite and sum to 1, got {sum(row)}")


def fold(mean: Tensor, values: Tensor, ratio: float, scratch: Tensor) -> None:
    """``mean -= ratio * (mean - values)`` in place, with ``scratch`` of the same shape; ratio 1 replaces ``mean``.

    Where both are equal the result is ``mean`` to the bit, the sign of zero included: in each form a multiple of
    their difference is added whose sign makes a zero of it -0.0, and adding that changes nothing.
    """
    if ratio > 0.5 and torch.tensor(ratio, dtype=mean.dtype) == 1:
        mean.copy_(values)
    elif ratio > 0.5 or ratio < 0:
        mean.lerp_(values, ratio)
    elif ratio >= _LEAST_LERP_RATIO:
        torch.lerp(values, mean, 1 - ratio, out=mean)
    else:
        mean.sub_(torch.sub(mean, values, out=scratch), alpha=ratio)


def accumulation_dtype(dtype: torch.dtype, wanted: torch.dtype | None = None) -> torch.dtype:
    """The real dtype in which the parts of a ``dtype`` are summed: float32, or float64 if it or ``wanted`` is.

    >>> accumulation_dtype(torch.bfloat16), accumulation_dtype(torch.complex128)
    (torch.float32, torch.float64)
    """
    return torch.float64 if torch.float64 in (dtype.to_real(), wanted) else torch.float32


def as_reals(values: Tensor) -> Tensor:
    """A 1-D tensor as it is, a complex one as twice as many real numbers in the same memory."""
    return torch.view_as_real(values).view(-1) if values.is_complex() else values


# What becomes of a slice whose result is not finite or does not fit: the slow path.


def fits(mean: Tensor, dtype: torch.dtype) -> bool:
    """Whether every number of ``mean`` is finite and in the range of ``dtype``."""
    limit = torch.finfo(dtype).max
    # Comparing with NaN is False, and NaN is what the extremes of numbers with a NaN are.
    return bool(mean.amax() <= limit) and bool(mean.amin() >= -limit)


def restore_infinities(mean: Tensor, sources: Iterable[tuple[Path, Tensor]], name: str) -> Tensor:
    """Put the infinities that all sources share into ``mean``, where summing has left NaN.

    Args:
        mean: the result, 1-D; changed in place.
        sources: path and values of each input that counts, one at a time: the values may share one buffer.
        name: of the tensor, for messages.

    Returns:
        A mask of the places that are infinite.

    Raises ``NonFiniteError``, naming file and tensor, for NaN and for infinities that not all sources share.
    """
    shared, first = None, None
    for path, values in sources:
        if values.isnan().any():
            raise NonFiniteError(f"{path}: tensor {name!r} holds NaN; leave this checkpoint out")
        infinities = torch.where(values.isinf(), values, 0)
        if shared is None:
            shared, first = infinities, path
        elif not torch.equal(shared, infinities):
            holder = path if infinities.count_nonzero() >= shared.count_nonzero() else first
            raise NonFiniteError(
                f"{holder}: tensor {name!r} holds infinities that are not in every input; "
                f"leave this checkpoint out"
            )
    assert shared is not None, "every output counts at least one input"
    mask = shared != 0
    mean[mask] = shared[mask]
    return mask


def refuse_overflow(values: Tensor, infinite: Tensor, mean: Tensor, name: str) -> None:
    """Raise ``NonFiniteError`` if ``values``, which is ``mean`` as it will be written, has lost large numbers.

    ``infinite`` masks the infinities that belong there.
    """
    written, finfo = values.to(mean.dtype), torch.finfo(values.dtype)
    # Some conversions give infinity or NaN for what is too large, others the largest number there is.
    is_near = (written - mean).abs() <= finfo.eps * mean.abs()
    kept = torch.where(infinite, written.isinf(), (mean.abs() <= finfo.max) | is_near)
    if not kept.all():
        raise NonFiniteError(
            f"the average of tensor {name!r} is too large for {values.dtype}, it comes out as "
            f"{mean[~kept][0].item():.3g}: choose a wider dtype"
        )


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
        # A slice fits a core's cache; more threads inside torch would take it out again.
        with _torch.on_one_core():
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
        self.tensors[name].view(-1)[start : start + values.numel()] = values

    def location(self, name: str) -> None:
        return None

    def commit(self) -> None:
        """Nothing is left to do."""

    def abort(self) -> None:
        """The tensors go with the writer."""


# The sum itself.

# On smaller bundles, and on few of them, threads spend their time waiting for each other's turn in Python.
_WORTH_THREADS_BYTES, _WORTH_THREADS_BUNDLES = 1 << 17, 16

Progress = Callable[[int, int], object]
"""Called with the bytes done so far and in all, from one thread at a time."""


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
        self.folds = folds(coefficients, len(inputs))
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
        if is_averaged(source):
            widths.append(_reals_in(source) * accumulation_dtype(source, self.accumulate).itemsize)
        return max(widths)

    def kind(self, name: str) -> tuple[torch.dtype, ...] | None:
        """What tensors that are summed together have in common; None for those that are copied."""
        source = self.source_dtype(name)
        return (source, *self.output_dtypes(name)) if is_averaged(source) else None

    def traffic(self, bundle: Bundle) -> int:
        """Bytes read and written for a bundle."""
        source = self.source_dtype(bundle.name)
        reads = len(self.folds) if is_averaged(source) else len(set().union(*self.counted))
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


class _Worker:
    """One thread's buffers, used for one slice after the other."""

    def __init__(self, job: _Job, buffer_bytes: int, tally: _Tally) -> None:
        def buffer() -> Tensor:
            return torch.empty(buffer_bytes, dtype=torch.uint8)

        self._job, self._tally = job, tally
        beside = (buffer() for _ in range(BUFFERS_BESIDE_SUMS))
        self._read, self._values, self._scratch, self._written = beside
        self._means = [buffer() for _ in job.writers]

    def __call__(self, bundle: Bundle) -> None:
        if is_averaged(self._job.source_dtype(bundle.name)):
            self._average(bundle)
        else:
            for piece in bundle.slices:
                self._copy(piece)
        self._tally.add(self._job.traffic(bundle))

    def _average(self, bundle: Bundle) -> None:
        job = self._job
        source = job.source_dtype(bundle.name)
        dtype = accumulation_dtype(source, job.accumulate)
        n_reals = bundle.count * _reals_in(source)
        means = [_part(buffer, dtype, n_reals) for buffer in self._means]
        scratch = _part(self._scratch, dtype, n_reals)
        for step in job.folds:
            (output, ratio), *others = step.ratios
            # What only replaces a mean is read into it: one copy less.
            if ratio == 1 and not others and source.to_real() == dtype:
                self._values_of(step.index, bundle, dtype, self._means[output])
                continue
            values = self._values_of(step.index, bundle, dtype, self._read)
            for output, ratio in step.ratios:
                fold(means[output], values, ratio, scratch)
        for output, (mean, target) in enumerate(zip(means, job.output_dtypes(bundle.name), strict=True)):
            # What lies between the slices may be anything; then each is looked at by itself.
            all_fit = fits(mean, target.to_real())
            for piece, place in bundle.places:
                part = mean[place * _reals_in(source) :][: piece.count * _reals_in(source)]
                self._write(output, piece, part, all_fit or fits(part, target.to_real()))

    def _values_of(self, index: int, bundle: Bundle, dtype: torch.dtype, buffer: Tensor) -> Tensor:
        """A bundle of one input as real numbers of ``dtype``, in ``buffer`` or, if converted, in one kept for that."""
        read = _part(buffer, self._job.source_dtype(bundle.name), bundle.count)
        for piece, place in bundle.places:
            self._job.inputs[index].read_into(piece.name, piece.start, read[place : place + piece.count])
        reals = as_reals(read)
        return reals if reals.dtype == dtype else _part(self._values, dtype, len(reals)).copy_(reals)

    def _write(self, output: int, piece: Slice, mean: Tensor, fit: bool) -> None:
        writer = self._job.writers[output]
        dtype = writer.layout.tensors[piece.name].dtype
        infinite = None
        if not fit:
            sources = self._sources(self._job.counted[output], piece, mean.dtype)
            infinite = restore_infinities(mean, sources, piece.name)
        # Seen as bytes, numbers in pairs are complex again.
        written = mean.view(torch.uint8) if mean.dtype == dtype.to_real() else self._written
        values = _part(written, dtype, piece.count)
        if mean.dtype != dtype.to_real():
            as_reals(values).copy_(mean)
        if infinite is not None:
            refuse_overflow(as_reals(values), infinite, mean, piece.name)
        writer.write(piece.name, piece.start, values)

    def _sources(self, indices: list[int], piece: Slice, dtype: torch.dtype) -> Iterator[tuple[Path, Tensor]]:
        count = piece.count * _reals_in(self._job.source_dtype(piece.name))
        for index in indices:
            values = self._values_of(index, Bundle((piece,)), dtype, self._read)
            yield self._job.inputs[index].path, values[:count]

    def _copy(self, piece: Slice) -> None:
        job = self._job
        dtype = job.source_dtype(piece.name)
        values = _part(self._read, dtype, piece.count)
        for writer, counted in zip(job.writers, job.counted, strict=True):
            job.inputs[counted[-1]].read_into(piece.name, piece.start, values)
            writer.write(piece.name, piece.start, values)
        other = _part(self._values, dtype, piece.count)
        for index in sorted(set().union(*job.counted)):
            if piece.name in job.differing:
                return
            job.inputs[index].read_into(piece.name, piece.start, other)
            if not torch.equal(values, other):
                job.differing.add(piece.name)


def _reals_in(dtype: torch.dtype) -> int:
    return dtype.itemsize // dtype.to_real().itemsize


def _part(buffer: Tensor, dtype: torch.dtype, count: int) -> Tensor:
    return buffer[: count * dtype.itemsize].view(dtype)
