"""Σ a_k · source_k, streamed: slices of every input pass through a few buffers into every output."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from polyak.checkpoints import Checkpoint, Writer
from polyak.combine.budget import Budget
from polyak.combine.finite import fits, refuse_overflow, restore_infinities
from polyak.combine.running import accumulation_dtype, as_reals, fold, folds, is_averaged
from polyak.combine.slices import Bundle, Slice, bundled, cut, share_of
from polyak.combine.threads import run_on_threads
from polyak.errors import OptionError

__all__ = ["Progress", "combine"]

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
    slices = share_of(list(cut(writers[0].layout.tensors, job.width, budget.slice_bytes)), *share)
    bundles = list(bundled(slices, job.kind, job.width, budget.slice_bytes))
    tally = _Tally(sum(map(job.traffic, bundles)), progress)
    nbytes = [bundle.count * job.width(bundle.name) for bundle in bundles]
    worth_threads = sum(nbytes) >= _WORTH_THREADS_BYTES * max(len(nbytes), _WORTH_THREADS_BUNDLES)
    workers = min(budget.workers, len(bundles)) if worth_threads else 1
    # A small model is averaged many times in a row, and fresh memory costs more than its arithmetic.
    run_on_threads(lambda: _Worker(job, max(nbytes, default=0), tally), bundles, workers)
    return [name for name in writers[0].layout.tensors if name in job.differing]


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
        self._read, self._values, self._scratch, self._written = (buffer() for _ in range(4))
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
