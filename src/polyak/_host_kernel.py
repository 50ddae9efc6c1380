"""The mean on the host by compiled loops, where numba is installed: a sample is looked at for free where it is folded.

They take fp32, bf16 and fp16 weights into fp32 means that lie in memory as the weights do; the rest, and everything
until the loops are there, is for torch's operations. Accepted samples give the same bits either way, which is tried
before the loops are used. What a sample that is refused leaves differs in rounding; it is the same on any number of
threads. numba is imported, and what it made before is loaded or made anew, on a thread, while training goes on: see
:mod:`polyak._host_jobs`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from polyak import _host_jobs, _torch
from polyak._batches import Batch
from polyak._host_jobs import CHUNK_NUMEL, KINDS, addresses_of

__all__ = ["HostKernel"]

# Fewer numbers than this are not worth a compiler.
_LEAST_NUMEL = 1 << 18
# Of each thread: calling one takes as long as folding a fraction of this.
_LEAST_NUMEL_OF_A_THREAD = 1 << 18
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
    >>> from polyak._host_jobs import are_ready
    >>> weight, mean = torch.full((1 << 18,), 3.0), torch.zeros(1 << 18)
    >>> kernel = HostKernel([weight], [mean], plan_batches([weight], [mean]))
    >>> if are_ready(wait=True) and kernel.take([weight]):
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
        if numel < max(_LEAST_NUMEL, 1) or not _host_jobs.are_possible():
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
        self._shares_of: dict[int, np.ndarray] = {}  # by the number of threads
        self._folded = np.zeros(len(self._chunks), np.uint8)
        self._addresses = self._mean_addresses = np.zeros(0, np.int64)
        _host_jobs.are_ready()  # which begins to compile

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
                begins = np.arange(0, mean.numel(), CHUNK_NUMEL)
                columns = np.broadcast_arrays(
                    owners[piece.index],
                    (start + begins) * source.itemsize,
                    number,
                    (int(mean.storage_offset()) + begins) * mean.itemsize,
                    np.minimum(CHUNK_NUMEL, mean.numel() - begins),
                    KINDS[source.dtype],
                    group,
                )
                yield np.stack(columns, axis=1).astype(np.int64, copy=False)

    def take(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the loops are there, and these tensors lie in memory as those did that this was made for."""
        if not self.covered or not _host_jobs.are_ready():
            return False
        owned = self._pick(tensors)
        if self._layout is not None and not self._layout.is_that_of(owned):
            return False
        addresses = addresses_of(owned)
        if not addresses.all():  # where FSDP and others freed them for a while
            return False
        self._addresses, self._mean_addresses = addresses, addresses_of(self._roots)
        return True

    def sizes(self) -> list[float]:
        """The largest magnitude in each batch; NaN or infinite where a number is."""
        return self._run("look")

    def fold(self, share: float) -> None:
        """``means += share (weights - means)``, whatever the weights are."""
        self._folded.fill(0)
        self._run("fold", share)

    def fold_fitting(self, share: float, limits: Sequence[float]) -> list[float]:
        """Fold those chunks in that hold no magnitude above the limit of their batch; the largest of each batch.

        The share is less than a half. Below a negative limit there is nothing, not even zeros."""
        bounds = np.clip(limits, 0, _FLOAT32_MAX).astype(np.float32).view(np.uint32) + np.uint32(1)
        bounds[np.less(limits, 0)] = 0  # nothing lies below
        return self._run("fold fitting", share, bounds=bounds)

    def fold_rest(self, share: float) -> None:
        """Fold those chunks in that :meth:`fold_fitting` left out."""
        if not self._folded.all():
            self._run("fold", share)

    def take_back(self, share: float) -> None:
        """Take those chunks back, to their rounding, that :meth:`fold_fitting` folded in."""
        self._run("fold", -share / (1 - share), which=1)

    def _run(
        self, task: _host_jobs.Task, share: float = 0.0, which: int = 0, bounds: np.ndarray | None = None
    ) -> list[float]:
        """Do a task on all chunks; the largest magnitude of each batch, where the task looks at it."""
        shares = self._shares()
        tops = np.zeros((len(shares), len(self.covered)), np.uint32)
        if task != "look":
            # As an operation of torch would, so that autograd sees that what it may have kept is no longer the same.
            torch.autograd.graph.increment_version(self._counted)
        tables = (shares, self._chunks, self._addresses, self._mean_addresses, self._folded)
        limits = tops[0] if bounds is None else bounds
        _host_jobs.do(task, (*tables, limits, tops), share, which)
        # Those of all threads as numbers: bits of magnitudes are ordered as these are, NaNs last.
        return tops.max(0).view(np.float32).tolist()

    def _shares(self) -> np.ndarray:
        """For each thread the first of its chunks, and the one after the last."""
        n_threads = max(1, min(_host_jobs.most_threads(), self._numel // _LEAST_NUMEL_OF_A_THREAD))
        if n_threads not in self._shares_of:
            numels = [self._numel * n // n_threads for n in range(1, n_threads)]
            cuts = [0, *self._chunks[:, 4].cumsum().searchsorted(numels).tolist(), len(self._chunks)]
            self._shares_of[n_threads] = np.array(list(pairwise(cuts)), np.int64)
        return self._shares_of[n_threads]


def _can_take(tensor: Tensor, mean: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, nn.Parameter, nn.Buffer)
        and tensor.dtype in KINDS
        and mean.dtype == torch.float32
        and _torch.on_host(tensor)
        and _torch.on_host(mean)
        and not tensor.is_neg()  # its numbers are stored with the other sign
    )


def _is_one_run(source: Tensor, mean: Tensor) -> bool:
    return source.is_contiguous() and mean.is_contiguous()
