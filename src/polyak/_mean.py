"""The running mean over lists of tensors: m += c (w - m), the one hot loop.

:class:`polyak.Average` and the recorder of a trajectory share it. Sources and means are plain local
tensors, walked in the batches of :mod:`polyak._batches`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from polyak import _torch
from polyak._batches import Batch, Tensors, allocate, are_mostly_small, lie_alike, plan_batches, with_sources
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
        agree: takes a 0-dim bool tensor, this rank's verdict on the sample, and returns that of all ranks.
        means: memory for them, with the values it is to begin with; None: zeros of their own.

    Where a mean lives on an accelerator nothing is read back to the host: the verdict masks the update on the
    device, and the counters are tensors until somebody asks.

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
        agree: Callable[[Tensor], Tensor] | None = None,
        means: Sequence[Tensor] | None = None,
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
        self._dtype, self._device = dtype, device
        self._means: list[Tensor] = list(means or ())
        self.residuals: list[Tensor] = []
        self._n_averaged: Any = 0
        self._n_skipped: Any = 0
        self._position: Any = 0.0
        self._warned = False
        self.bind(tensors)

    def bind(self, tensors: Sequence[Tensor], names: Sequence[str] | None = None) -> None:
        """Take up tensors of the same shapes, whose dtypes, devices and memory order may differ from before.

        Means follow to another device unless one was asked for, widen where the tensors did, and lie as they do.

        With other ``names`` a tensor that was averaged before keeps its mean. One that was not stands there as it is
        now for all samples so far, as a parameter that was frozen until now does: that value is its mean.
        """
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
        self._batches = plan_batches(tensors, self._means, self.residuals)
        self._look_anew()
        # Where nothing is looked at or converted, whole tensors go into one call.
        self._gathers = are_mostly_small(self._means)
        direct = [batch for batch in self._batches if self._goes_directly(batch)]
        self._direct = sorted({piece.index for batch in direct for piece in batch.pieces})
        self._direct_means = [self._means[index] for index in self._direct]
        self._others = [batch for batch in self._batches if not self._goes_directly(batch)]
        self._set_counters(self.n_averaged, self.n_skipped, self.position)

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

    @property
    def n_averaged(self) -> int:
        """Samples in the means; on an accelerator reading it waits for the device."""
        return int(self._n_averaged)

    @property
    def n_skipped(self) -> int:
        """Samples left out because they were not finite."""
        return int(self._n_skipped)

    @property
    def position(self) -> float:
        """Where the last accepted sample was taken, in the steps given to :meth:`add`."""
        return float(self._position)

    def restart(self, n_averaged: int = 0, n_skipped: int = 0, position: float = 0.0) -> None:
        """Forget every sample, or set the counters to those of a saved state whose means the caller fills."""
        self._set_counters(n_averaged, n_skipped, position)
        self._look_anew()
        if self._masked and not n_averaged:
            # There the first sample is added to what is left of the samples before, not copied over it.
            _torch.foreach_zero_(self._means + self.residuals)
        self._warned = False

    @property
    def means(self) -> list[Tensor]:
        """The means themselves; whoever reads them may save them, so the next sample is looked at as a first one is.

        After a sample that is not finite they are then the same, to the bit, whether one goes on or loads what was
        saved.
        """
        self._look_anew()
        return self._means

    @property
    def memory(self) -> list[Tensor]:
        """The means, for one who shares their memory and saves nothing."""
        return self._means

    def _look_anew(self) -> None:
        """Look at all of the next sample before any of it is folded in."""
        self._sizes = [0.0] * len(self._batches)  # of the last sources folded in: no element is larger

    @torch.no_grad()
    def add(self, tensors: Sequence[Tensor], position: float | None = None) -> None:
        """Fold one sample in.

        Args:
            tensors: the values now, in the order and with the shapes that the means have.
            position: where the sample lies, in optimizer steps since the first block began; None: one step
                further than the last. Only schemes that count steps look at it.

        Raises:
            NonFiniteError: with ``check_finite="raise"``, naming the tensor; the means are as they were.
        """
        if position is None:
            position = float(self._attempts + 1)
        self._attempts += 1
        if self._masked:
            self._add_masked(tensors, position)
            return
        coefficient = float(self._coefficient(position))
        self._warn_if_stalling(coefficient)
        accepted = self._fold_in(tensors, coefficient)
        self._count(accepted, position)
        if not accepted and self.check_finite == "raise":
            self._raise_non_finite(tensors)

    def _set_counters(self, n_averaged: int, n_skipped: int, position: float) -> None:
        counts: Any = (n_averaged, n_skipped, position)
        device = self._means[0].device
        self._masked = not any(map(_torch.on_host, self._means))
        if self._masked:
            counts = torch.tensor(counts, dtype=_torch.widest_float(device), device=device).unbind()
        self._n_averaged, self._n_skipped, self._position = counts
        self._attempts = n_averaged

    # Which coefficient comes next. Numbers on the host, 0-dim tensors on an accelerator.

    def _coefficient(self, position: float) -> Any:
        if self.scheme.unit == "samples":
            before, now = self._n_averaged, self._n_averaged + 1
        else:
            before, now = self._position, self._position * 0 + position  # a tensor where the counter is one
        return self.scheme.coefficient_between(before, now, xp=torch if self._masked else np)

    def _count(self, accepted: Any, position: float) -> None:
        self._n_averaged = self._n_averaged + accepted
        self._n_skipped = self._n_skipped + (1 - accepted)
        self._position = self._position + accepted * (position - self._position)

    def _warn_if_stalling(self, coefficient: float) -> None:
        if self._warned or self.compensated or coefficient >= _STALL_EPS * self._eps:
            return
        self._warned = True
        warnings.warn(
            f"the average takes in {coefficient:.1e} of each new sample, which its precision (eps {self._eps:.1e}) "
            "starts to round away; pass compensated=True, a wider dtype, or a larger every",
            UserWarning,
            stacklevel=5,
        )

    # On the host.

    def _fold_in(self, tensors: Sequence[Tensor], coefficient: float) -> bool:
        if not self.check_finite:
            self._fold_all(tensors, coefficient)
            return True
        # A sample that takes more than half leaves too little of the mean to undo; see _fold_while_finite.
        if coefficient > 0.5 or self._agree is not None:
            finite = self._all_finite(tensors)
            if finite:
                self._fold_all(tensors, coefficient)
            return finite
        return self._fold_while_finite(tensors, coefficient)

    def _fold_while_finite(self, tensors: Sequence[Tensor], coefficient: float) -> bool:
        """Check and fold batch by batch while each is in the cache: one trip to memory instead of two.

        A batch that is not finite ends it, and the batches before are taken back by the inverse update
        m -= c/(1-c) (w - m): to the rounding of the largest weight in a batch, and exactly where m = w. Where
        a batch suddenly holds far larger weights, as in a divergence, that rounding would be large too, so the
        whole sample is looked at before any more of it is folded in.
        """
        sizes: list[float] = []
        for batch, sources in with_sources(self._batches, tensors, owned=self.compensated):
            sizes.append(_size(sources))
            if not sizes[-1] <= _USUAL_GROWTH * self._sizes[len(sizes) - 1]:
                break
            self._fold(batch, sources, coefficient)
        else:
            self._sizes = sizes
            return True
        del sources  # and with them the memory that they were copied to
        return self._fold_rest_if_finite(len(sizes) - 1, tensors, coefficient)

    def _fold_rest_if_finite(self, n_folded: int, tensors: Sequence[Tensor], coefficient: float) -> bool:
        sizes = self._sizes_of(tensors)
        finite = all(map(math.isfinite, sizes))
        if finite:
            self._fold_batches(self._batches[n_folded:], tensors, coefficient)
            self._sizes = sizes
        else:
            self._fold_batches(self._batches[:n_folded], tensors, -coefficient / (1 - coefficient))
        return finite

    def _all_finite(self, tensors: Sequence[Tensor]) -> bool:
        sizes = self._sizes_of(tensors)
        finite = all(map(math.isfinite, sizes))
        if self._agree is not None:
            return bool(self._agree(torch.tensor(finite)))
        if finite:
            self._sizes = sizes
        return finite

    def _sizes_of(self, tensors: Sequence[Tensor]) -> list[float]:
        return [_size(sources) for _, sources in with_sources(self._batches, tensors)]

    def _fold_all(self, tensors: Sequence[Tensor], coefficient: float) -> None:
        if coefficient == 1:
            _torch.foreach_copy_(self._means, list(tensors))
            for residual in self.residuals:
                residual.zero_()
            return
        if self._direct:
            _torch.foreach_lerp_(self._direct_means, [tensors[index] for index in self._direct], coefficient)
        self._fold_batches(self._others, tensors, coefficient)

    def _fold_batches(self, batches: list[Batch], tensors: Sequence[Tensor], coefficient: float) -> None:
        for batch, sources in with_sources(batches, tensors, owned=self.compensated):
            self._fold(batch, sources, coefficient)

    def _fold(self, batch: Batch, sources: Tensors, coefficient: Any) -> None:
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

    # On an accelerator: the same update, with the verdict as a mask.

    def _add_masked(self, tensors: Sequence[Tensor], position: float) -> None:
        samples = self.scheme.unit == "samples"
        nominal = self.scheme.coefficient(self._attempts, 1 if samples else position / self._attempts)
        self._warn_if_stalling(nominal)
        finite = self._finite_on_device(tensors) if self.check_finite else torch.tensor(True)
        finite = finite.to(self._means[0].device, non_blocking=True)
        coefficient = self._coefficient(position) * finite
        for batch, sources in with_sources(self._batches, tensors, owned=True):
            device = batch.means[0].device
            for source in sources:
                source.masked_fill_(~finite.to(device), 0)  # a factor of 0 would not do: 0 * NaN is NaN
            if batch.residual is not None:
                self._fold(batch, sources, coefficient.to(device))
                continue
            for mean, source in zip(batch.means, sources, strict=True):
                mean.add_(source.sub_(mean).mul_(coefficient.to(device)))
        self._count(finite.to(coefficient.dtype), position)
        if self.check_finite == "raise" and not finite:
            self._raise_non_finite(tensors)

    def _finite_on_device(self, tensors: Sequence[Tensor]) -> Tensor:
        device = self._means[0].device
        largest = _torch.foreach_norm([t for t in tensors if t.numel()], float("inf"))
        finite = torch.stack([norm.to(device, torch.float32) for norm in largest]).isfinite().all()
        return self._agree(finite) if self._agree else finite


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
