"""The running mean over lists of tensors: m += c (w - m), the one hot loop.

:class:`polyak.Average` and the recorder of a trajectory share it. Sources and means are plain local
tensors, walked in the batches of :mod:`polyak._batches`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from polyak import _host_jobs, _torch
from polyak._batches import Batch, Tensors, allocate, are_mostly_small, lie_alike, plan_batches, with_sources
from polyak._checks import warn_user
from polyak._device_mean import DeviceMean, all_finite
from polyak._host_kernel import HostKernel
from polyak._offload import Offload
from polyak.errors import NonFiniteError, OptionError
from polyak.profiles import Scheme

__all__ = ["Accumulator", "mean_dtype"]

CheckFinite = Literal[True, False, "raise"]

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# With m around 10 to 100 times its own changes, a step of m += c (w - m) falls under half an ulp of m, and is
# lost, from about c = 64 eps on: 1.3e5 samples for a uniform fp32 mean.
_STALL_EPS = 64
# Weights grow slowly from sample to sample, unless something is going wrong.
_USUAL_GROWTH = 16


def mean_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a tensor of ``dtype`` is averaged unless asked otherwise: at least fp32.

    >>> mean_dtype(torch.bfloat16), mean_dtype(torch.float64)
    (torch.float32, torch.float64)
    """
    if dtype.is_complex:
        return torch.promote_types(dtype, torch.complex64)
    return torch.float32 if dtype.itemsize < 4 else dtype


class Accumulator:
    """Running means of a list of tensors under one scheme.

    Compensated means carry a residual e, so that m + e is the mean to twice the precision (Kahan 1965).

    Args:
        tensors: what will be averaged: local, dense, floating or complex; their values are not read yet.
        names: their names, for messages.
        scheme: the coefficients c_n.
        dtype: of the means; None: that of each tensor, but at least fp32.
        device: of the means; None: that of each tensor.
        compensated: keep a residual per element.
        check_finite: True skips and counts a sample with a NaN or an infinity, "raise" raises, False does
            not look.
        agree: takes a 0-dim tensor, 1 where this rank refuses the sample and 0 elsewhere, and makes it 1 in place if
            any rank does; a collective call.
        means: memory for them, with the values it is to begin with; None: zeros of their own.
        offload: how samples of an accelerator come to means on the host; accumulators that take turns may share it.
        watched: whether the owner calls :meth:`bind` before it adds tensors that lie otherwise in memory, by shape,
            dtype, device or strides, than those that were bound last; else each sample is looked at.

    Where the means live on an accelerator nothing is read back to the host: verdict, coefficient and counters stay
    there until somebody asks, see :mod:`polyak._device_mean`.

    >>> from polyak.profiles import Uniform
    >>> weight = torch.tensor([1.0])
    >>> mean = Accumulator([weight], ["weight"], Uniform())
    >>> for value in (1.0, float("nan"), 3.0):
    ...     mean.add([weight.fill_(value)])
    >>> mean.means, mean.n_averaged, mean.n_skipped
    ([tensor([2.])], 2, 1)
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        names: Sequence[str],
        scheme: Scheme,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        compensated: bool = False,
        check_finite: CheckFinite = True,
        agree: Callable[[Tensor], object] | None = None,
        means: Sequence[Tensor] | None = None,
        offload: Offload | None = None,
        watched: bool = False,
    ):
        if check_finite not in (True, False, "raise"):
            raise OptionError(f"check_finite must be True, False or 'raise', got {check_finite!r}")
        if dtype is not None and dtype not in _DTYPES:
            raise OptionError(f"dtype must be one of {', '.join(map(str, _DTYPES))}, got {dtype!r}")
        if device is not None and torch.device(device).type == "meta":
            raise OptionError("device='meta' holds no numbers; name one that does, or None")
        self.names = list(names)
        self.scheme = scheme
        self.compensated = compensated
        self.check_finite = check_finite
        self._agree = agree
        self._watched = watched
        self._offload = offload or Offload()
        self._comes_over = False
        self._dtype, self._device = dtype, device
        self._means: list[Tensor] = list(means or ())
        self.residuals: list[Tensor] = []
        self._counts: _HostCounts | DeviceMean = _HostCounts()
        self._warned = False
        self._attempts, self._last_position = 0, 0.0
        self.bind(tensors)

    def bind(self, tensors: Sequence[Tensor], names: Sequence[str] | None = None) -> None:
        """Take up tensors of the same shapes, whose dtypes, devices and memory order may differ from before.

        Means follow to another device unless one was asked for, widen where the tensors did, and lie as they do.

        With other ``names`` a tensor that was averaged before keeps its mean. One that was not stands there as it is
        now for all samples so far, as a parameter that was frozen until now does: that value is its mean.
        """
        self._join()
        if names is not None and list(names) != self.names:
            self._choose(tensors, names)
        dtypes = [self._dtype_for(i, tensor) for i, tensor in enumerate(tensors)]
        devices = [torch.device(self._device or tensor.device) for tensor in tensors]
        kinds = [(m.dtype, m.device) for m in self._means]
        if kinds != list(zip(dtypes, devices, strict=True)) or not lie_alike(self._means, tensors):
            self._means = _moved(self._means, allocate(tensors, dtypes, devices))
            if self.compensated:
                self.residuals = _moved(self.residuals, allocate(tensors, dtypes, devices))
        self._eps = max(torch.finfo(dtype).eps for dtype in dtypes)
        counters = (self.n_averaged, self.n_skipped, self.position, self.clock)
        # Where only some are on an accelerator the operations take them from there.
        self._comes_over = all(map(_torch.on_host, self._means)) and not any(map(_torch.on_host, tensors))
        if any(map(_torch.on_host, self._means)):
            self._counts = _HostCounts()
            self._plan_on_host(self._offload.staging(tensors) if self._comes_over else tensors)
        else:
            options = {
                "agree": self._agree,
                "check": self.check_finite is not False,
                "watched": self._watched,
            }
            self._counts = DeviceMean(tensors, self._means, self.residuals, **options)
        self._counts.set(*counters)

    def _plan_on_host(self, tensors: Sequence[Tensor]) -> None:
        batches = plan_batches(tensors, self._means, self.residuals)
        # What compiled loops can take comes first, so that one number says where torch's operations begin.
        self._kernel = HostKernel(tensors, self._means, () if self.compensated else batches, self._watched)
        covered = set(map(id, self._kernel.covered))
        self._batches = [*self._kernel.covered, *(batch for batch in batches if id(batch) not in covered)]
        self._n_compiled = 0  # of these in this update
        self._look_anew()
        # Where nothing is looked at or converted, whole tensors go into one call.
        self._gathers = are_mostly_small(self._means)
        direct = [batch for batch in self._batches if self._goes_directly(batch)]
        self._direct = sorted({piece.index for batch in direct for piece in batch.pieces})
        self._direct_means = [self._means[index] for index in self._direct]
        self._others = [batch for batch in self._batches if not self._goes_directly(batch)]

    @torch.no_grad()
    def _choose(self, tensors: Sequence[Tensor], names: Sequence[str]) -> None:
        new = [tensor for name, tensor in zip(names, tensors, strict=True) if name not in self.names]
        dtypes = [self._dtype_of_new(tensor) for tensor in new]
        devices = [torch.device(self._device or tensor.device) for tensor in new]
        # Nothing else is allocated: what was averaged before stays where it is.
        means = allocate(new, dtypes, devices)
        if self.n_averaged:
            means = _moved(new, means)
        self._means = self._by_name(names, self._means, means)
        if self.compensated:
            self.residuals = self._by_name(names, self.residuals, allocate(new, dtypes, devices))
        self.names = list(names)

    def _by_name(self, names: Sequence[str], before: list[Tensor], new: list[Tensor]) -> list[Tensor]:
        found, others = dict(zip(self.names, before, strict=True)), iter(new)
        return [found[name] if name in found else next(others) for name in names]

    def _goes_directly(self, batch: Batch) -> bool:
        return batch.alike and not self.compensated and not (self._gathers and batch.copy is not None)

    def _dtype_for(self, index: int, tensor: Tensor) -> torch.dtype:
        dtype = self._dtype_of_new(tensor)
        return (
            torch.promote_types(self._means[index].dtype, dtype) if self._means and not self._dtype else dtype
        )

    def _dtype_of_new(self, tensor: Tensor) -> torch.dtype:
        if self._dtype is not None:
            return _complex_like(self._dtype) if tensor.is_complex() else self._dtype
        return mean_dtype(tensor.dtype)

    def _join(self) -> None:
        """Wait for the sample that is on its way, if any is."""
        if self._comes_over:
            self._offload.join()

    def __getstate__(self) -> dict[str, Any]:
        self._join()
        return self.__dict__

    @property
    def backend(self) -> str:
        """What folds samples in at present: "numba", "triton" or "torch"; where they share the work not the last."""
        if isinstance(self._counts, DeviceMean):
            return self._counts.backend
        return "numba" if self._kernel.covered and _host_jobs.are_ready() else "torch"

    @property
    def _settled(self) -> _HostCounts | DeviceMean:
        self._join()
        return self._counts

    @property
    def refused_there(self) -> Tensor | None:
        """1 where the last sample was left out, on the accelerator on which the means live; None on the host."""
        return self._counts.refused if isinstance(self._counts, DeviceMean) else None

    @property
    def n_averaged(self) -> int:
        """Samples in the means; on an accelerator reading it waits for the device."""
        return int(self._settled.averaged)

    @property
    def n_skipped(self) -> int:
        """Samples left out because they were not finite."""
        return int(self._settled.skipped)

    @property
    def position(self) -> float:
        """Where the last accepted sample was taken, in the steps given to :meth:`add`."""
        return float(self._settled.position)

    @property
    def clock(self) -> float:
        """Where the last sample was taken, accepted or not; samples that a CUDA graph replayed count."""
        return float(self._settled.clock)

    def replayed(self) -> float:
        """How much farther a CUDA graph came that replayed :meth:`add`, since this was last asked.

        Only the device knows, so it is waited for; the next position is taken to be as much farther.
        """
        ahead = self.clock - self._last_position
        self._last_position += ahead
        return ahead

    def restart(
        self, n_averaged: int = 0, n_skipped: int = 0, position: float = 0.0, clock: float | None = None
    ) -> None:
        """Forget every sample, or set the counters to those of a saved state whose means the caller fills.

        ``clock`` is the position of the last sample, if that was not an accepted one.
        """
        self._join()
        self._last_position = position if clock is None else clock
        self._counts.set(n_averaged, n_skipped, position, self._last_position)
        self._attempts = n_averaged
        self._look_anew()
        if isinstance(self._counts, DeviceMean) and not n_averaged:
            # There the first sample is added to what is left of the samples before, not copied over it.
            _torch.foreach_zero_(self._means + self.residuals)
        self._warned = False

    @property
    def means(self) -> list[Tensor]:
        """The means themselves; whoever reads them may save them, so the next sample is looked at as a first one is.

        After a sample that is not finite they are then the same, to the bit, whether one goes on or loads what was
        saved.
        """
        self._join()
        self._look_anew()
        return self._means

    @property
    def memory(self) -> list[Tensor]:
        """The means, for one who shares their memory and saves nothing."""
        self._join()
        return self._means

    def _look_anew(self) -> None:
        """Look at all of the next sample before any of it is folded in."""
        if isinstance(self._counts, DeviceMean):
            return  # which always does
        # Of the last sources folded in: no element is larger. Less than none, so that not even zeros are folded in.
        self._sizes = [-1.0] * len(self._batches)

    @torch.no_grad()
    def add(
        self, tensors: Sequence[Tensor], position: float | None = None, *, overlaps: bool = False
    ) -> None:
        """Fold one sample in.

        Args:
            tensors: the values now, in the order and with the shapes that the means have.
            position: where the sample lies, in optimizer steps since the first block began; None: one step
                further than the last. Only schemes that count steps look at it.
            overlaps: whether a sample that comes from an accelerator to the host may be on its way when this returns,
                see :mod:`polyak._offload`; an error on the way is raised by the next call. Not with ``"raise"``.

        Raises:
            NonFiniteError: with ``check_finite="raise"``, naming the tensor; the means are as they were.
        """
        self._join()
        if position is None:
            position = self._last_position + 1
        gap = position - self._last_position
        self._last_position = position
        self._attempts += 1
        if isinstance(self._counts, DeviceMean):
            self._warn_if_stalling(self._nominal_coefficient())
            self._counts.add(tensors, self.scheme, gap)
            if self.check_finite == "raise" and bool(self._counts.refused):
                self._raise_non_finite(tensors)
            return
        coefficient = self._coefficient(self._counts, position)
        self._warn_if_stalling(coefficient)
        if self._comes_over:
            self._send(tensors, coefficient, position, overlaps)
            return
        accepted = self._fold_in(tensors, coefficient)
        self._counts.count(accepted, position)
        if not accepted and self.check_finite == "raise":
            self._raise_non_finite(tensors)

    def _nominal_coefficient(self) -> float:
        """That of as many samples, evenly spaced, had all been finite; the one in use is on the device."""
        gap = 1 if self.scheme.unit == "samples" else self._last_position / self._attempts
        return self.scheme.coefficient(self._attempts, gap)

    def _coefficient(self, counts: _HostCounts, position: float) -> float:
        samples = self.scheme.unit == "samples"
        before, now = (counts.averaged, counts.averaged + 1) if samples else (counts.position, position)
        return float(self.scheme.coefficient_between(before, now, xp=np))

    def _warn_if_stalling(self, coefficient: float) -> None:
        if self._warned or self.compensated or coefficient >= _STALL_EPS * self._eps:
            return
        self._warned = True
        warn_user(
            f"the average takes in {coefficient:.1e} of each new sample, which its precision (eps {self._eps:.1e}) "
            "starts to round away; pass compensated=True, a wider dtype, or a larger every"
        )

    # From an accelerator to the host.

    def _send(self, tensors: Sequence[Tensor], coefficient: float, position: float, overlaps: bool) -> None:
        """The sample is looked at where it is, and the verdict comes over with it: nobody waits for that."""
        refused = self._refused_there(tensors) if self.check_finite else None
        raises = self.check_finite == "raise"
        fold = partial(self._take_over, coefficient, position)
        self._offload.send(tensors, refused, fold, overlaps=overlaps and not raises)
        if raises and bool(refused):
            self._raise_non_finite(tensors)

    def _refused_there(self, tensors: Sequence[Tensor]) -> Tensor:
        device = tensors[0].device
        finite = all_finite([(t, m.dtype) for t, m in zip(tensors, self._means, strict=True)], device)
        refused = torch.zeros((), device=device) if finite is None else finite.logical_not().float()
        if self._agree is not None:
            self._agree(refused)
        return refused

    def _take_over(self, coefficient: float, position: float, sample: list[Tensor], refused: bool) -> None:
        if not refused:
            self._choose_loops(sample)
            self._fold_all(sample, coefficient)
        if isinstance(self._counts, _HostCounts):
            self._counts.count(not refused, position)

    # On the host.

    def _choose_loops(self, tensors: Sequence[Tensor]) -> None:
        covered = self._kernel.covered
        self._n_compiled = len(covered) if covered and self._kernel.take(tensors) else 0

    def _fold_in(self, tensors: Sequence[Tensor], coefficient: float) -> bool:
        self._choose_loops(tensors)
        if not self.check_finite:
            self._fold_all(tensors, coefficient)
            return True
        # A sample that takes half or more leaves too little of the mean to undo; see _fold_while_finite.
        if coefficient >= 0.5 or self._agree is not None:
            finite = self._all_finite(tensors)
            if finite:
                self._fold_all(tensors, coefficient)
            return finite
        return self._fold_while_finite(tensors, coefficient)

    def _fold_while_finite(self, tensors: Sequence[Tensor], coefficient: float) -> bool:
        """Check and fold batch by batch while each is in the cache: one trip to memory instead of two.

        A batch is folded in at once if it holds no weights far larger than last time, as in a divergence. When all
        were seen the others follow; or, where a number is not finite, what was folded in is taken back by the inverse
        update m -= c/(1-c) (w - m): to the rounding of the largest weight in a batch, and exactly where m = w.
        Compiled loops decide so for a few thousand numbers at a time, so that they take back others than torch's
        operations do.
        """
        compiled = self._n_compiled
        limits = [_USUAL_GROWTH * size for size in self._sizes]
        sizes = self._kernel.fold_fitting(coefficient, limits[:compiled]) if compiled else []
        further, folded, others = self._fold_fitting(tensors, coefficient, limits[compiled:])
        sizes += further
        finite = all(map(math.isfinite, sizes))
        if finite:
            self._sizes = sizes
            self._fold_rest(others, tensors, coefficient)
        else:
            self._take_back(folded, tensors, coefficient)
        return finite

    def _fold_fitting(
        self, tensors: Sequence[Tensor], coefficient: float, limits: Sequence[float]
    ) -> tuple[list[float], list[Batch], list[Batch]]:
        """The size of each batch of torch's operations, those that were folded in, and those above their limit."""
        sizes: list[float] = []
        folded: list[Batch] = []
        others: list[Batch] = []
        for batch, sources in with_sources(
            self._batches[self._n_compiled :], tensors, owned=self.compensated
        ):
            sizes.append(_size(sources))
            if sizes[-1] <= limits[len(sizes) - 1]:
                self._fold(batch, sources, coefficient)
                folded.append(batch)
            else:
                others.append(batch)
        return sizes, folded, others

    def _fold_rest(self, batches: list[Batch], tensors: Sequence[Tensor], coefficient: float) -> None:
        if self._n_compiled:
            self._kernel.fold_rest(coefficient)
        self._fold_batches(batches, tensors, coefficient)

    def _take_back(self, batches: list[Batch], tensors: Sequence[Tensor], coefficient: float) -> None:
        if self._n_compiled:
            self._kernel.take_back(coefficient)
        self._fold_batches(batches, tensors, -coefficient / (1 - coefficient))

    def _all_finite(self, tensors: Sequence[Tensor]) -> bool:
        sizes = self._sizes_of(tensors)
        finite = all(map(math.isfinite, sizes))
        if self._agree is None:
            if finite:
                self._sizes = sizes
            return finite
        refused = torch.tensor(float(not finite))
        self._agree(refused)
        return not refused

    def _sizes_of(self, tensors: Sequence[Tensor]) -> list[float]:
        compiled = self._kernel.sizes() if self._n_compiled else []
        return compiled + [
            _size(sources) for _, sources in with_sources(self._batches[self._n_compiled :], tensors)
        ]

    def _fold_all(self, tensors: Sequence[Tensor], coefficient: float) -> None:
        if coefficient == 1:
            _torch.foreach_copy_(self._means, list(tensors))
            for residual in self.residuals:
                residual.zero_()
        elif self._n_compiled:
            self._kernel.fold(coefficient)
            self._fold_batches(self._batches[self._n_compiled :], tensors, coefficient)
        else:
            self._fold_by_operations(tensors, coefficient)

    def _fold_by_operations(self, tensors: Sequence[Tensor], coefficient: float) -> None:
        if self._direct:
            _torch.foreach_lerp_(self._direct_means, [tensors[index] for index in self._direct], coefficient)
        self._fold_batches(self._others, tensors, coefficient)

    def _fold_batches(self, batches: list[Batch], tensors: Sequence[Tensor], coefficient: float) -> None:
        for batch, sources in with_sources(batches, tensors, owned=self.compensated):
            self._fold(batch, sources, coefficient)

    def _fold(self, batch: Batch, sources: Tensors, coefficient: float) -> None:
        if batch.residual is None:
            _torch.foreach_lerp_(batch.means, sources, coefficient)
            return
        # Kahan's sum, on copies: m and e are replaced in one call, which no interrupt can split.
        [old], [source] = batch.means, sources
        change = source.sub_(old).sub_(batch.residual).mul_(coefficient).add_(batch.residual)
        mean = old + change
        _torch.foreach_copy_([batch.residual, old], [(old - mean).add_(change), mean])

    def _raise_non_finite(self, tensors: Sequence[Tensor]) -> None:
        bad = [name for name, t in zip(self.names, tensors, strict=True) if not bool(torch.isfinite(t).all())]
        where = repr(bad[0]) if bad else "a tensor, on another rank or in the average's dtype,"
        raise NonFiniteError(
            f"{where} holds a NaN or an infinity, so the sample was not averaged; "
            "find its cause, or pass check_finite=True to skip such samples"
        )


@dataclass
class _HostCounts:
    """What :class:`DeviceMean` keeps on a device, as plain numbers."""

    averaged: int = 0
    skipped: int = 0
    position: float = 0.0
    clock: float = 0.0

    def set(self, averaged: int, skipped: int, position: float, clock: float) -> None:
        self.averaged, self.skipped, self.position, self.clock = averaged, skipped, position, clock

    def count(self, accepted: bool, position: float) -> None:
        """A sample that was taken at a position, and whether it was folded in."""
        self.averaged += accepted
        self.skipped += not accepted
        self.clock = position
        if accepted:
            self.position = position


def _moved(old: list[Tensor], new: list[Tensor]) -> list[Tensor]:
    if old:
        _torch.foreach_copy_(new, old)
    return new


def _complex_like(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype == torch.float64 else torch.complex64


def _size(tensors: Tensors) -> float:
    """The largest absolute value; NaN or infinite where an element is."""
    size = 0.0
    for tensor in tensors:
        if tensor.numel():
            # Only numbers as they are stored can be viewed as real ones; a sign more or less does not matter here.
            stored = tensor.conj() if tensor.is_conj() else tensor
            reals = torch.view_as_real(stored) if stored.is_complex() else stored
            low, high = torch.aminmax(reals)  # both NaN where an element is
            largest = max(-low.item(), high.item())
            if not math.isfinite(largest):
                return largest
            size = max(size, largest)
    return size
