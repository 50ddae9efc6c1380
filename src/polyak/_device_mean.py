"""The running mean where it lives on an accelerator: nothing of an update is read by the host.

The verdict on a sample, the coefficient and the counters stay on the device and are changed in place, so that a CUDA
graph that captured an update replays it. Passes over the model's bytes are what an update costs: one looks for NaNs and
infinities, three fold the sample in, by the one operation of torch that does nothing at all where the verdict says so.
That operation is for fp32 means. Others are folded in by the kernel of :mod:`polyak._triton_mean` where Triton is
installed, and elsewhere by operations on copies, of which the verdict picks the old or the new.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from polyak import _torch
from polyak._batches import (
    Tensors,
    are_mostly_small,
    is_small,
    plan_batches,
    plan_staged,
    with_sources,
)
from polyak.profiles import Scheme

__all__ = ["DeviceMean", "all_finite", "are_finite"]


class DeviceMean:
    """The state of running means on an accelerator, and what folds a sample into them, or leaves it out, there.

    Counters are 0-dim tensors of the widest float there is, on the device of the first mean: they are the same ones
    for as long as it lives.

    Args:
        tensors: what is averaged, as it is now.
        means: their means, none of them on the host.
        residuals: of compensated means, else empty.
        check: leave out samples that are not finite, or not once they are rounded to the dtypes of the means.
        agree: takes a 0-dim tensor, 1 where this rank refuses the sample and 0 elsewhere, and makes it 1 in place if
            any rank does; a collective call.
        watched: whether the tensors are known to lie in memory as these do at each :meth:`add`.

    Attributes:
        averaged: samples in the means.
        skipped: samples left out.
        position: where the last sample lies that was folded in, in the clock's unit.
        clock: how far the samples have come, those left out included.
        refused: 1 where the last sample was left out.

    >>> from polyak.profiles import Uniform
    >>> weight, total = torch.tensor([4.0]), torch.zeros(1)
    >>> mean = DeviceMean([weight], [total], [], check=True)
    >>> for value in (4.0, float("inf"), 8.0):
    ...     mean.add([weight.fill_(value)], Uniform(), gap=10)
    >>> total, mean.averaged.item(), mean.skipped.item(), mean.clock.item()
    (tensor([6.]), 2.0, 1.0, 30.0)
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        means: Sequence[Tensor],
        residuals: Sequence[Tensor],
        *,
        check: bool,
        agree: Callable[[Tensor], object] | None = None,
        watched: bool = False,
    ):
        self._check, self._agree, self._watched = check, agree, watched
        self._is_complex = any(tensor.is_complex() for tensor in tensors)
        device = means[0].device
        with torch.inference_mode(False):  # what is made in inference mode could not be changed outside it
            state = torch.zeros(4, dtype=_torch.widest_float(device), device=device)
            self.refused = torch.zeros((), device=device)
        self.averaged, self.skipped, self.position, self.clock = state.unbind()
        self._means, self._residuals = list(map(_real, means)), list(map(_real, residuals))
        self._plan(list(map(_real, tensors)))

    def _plan(self, sources: Sequence[Tensor]) -> None:
        self._layouts = list(map(Tensor.stride, sources))
        self._folds = list(_folds(sources, self._means, self._residuals))

    @property
    def backend(self) -> str:
        """ "triton" where its kernel folds any of the means, else "torch"."""
        return "triton" if any(isinstance(fold, _KernelFold) for fold in self._folds) else "torch"

    def set(self, averaged: int, skipped: int, position: float, clock: float) -> None:
        """Set the counters, in place."""
        self.averaged.fill_(averaged)
        self.skipped.fill_(skipped)
        self.position.fill_(position)
        self.clock.fill_(clock)

    def add(self, tensors: Sequence[Tensor], scheme: Scheme, gap: float) -> None:
        """Fold a sample in that lies ``gap`` after the last, or leave it out and touch no mean."""
        sources = list(map(_real, tensors)) if self._is_complex else tensors
        if not self._watched and list(map(Tensor.stride, sources)) != self._layouts:
            self._plan(sources)
        self.clock.add_(gap)
        samples = scheme.unit == "samples"
        before, now = (self.averaged, self.averaged + 1) if samples else (self.position, self.clock)
        coefficient = scheme.coefficient_between(before, now, xp=torch)
        if self._check:
            self._look(sources)
        for fold in self._folds:
            fold(sources, coefficient, self.refused if self._check else None)
        self._count()

    def _look(self, sources: Sequence[Tensor]) -> None:
        looked_at = [pair for fold in self._folds for pair in fold.looked_at(sources)]
        finite = all_finite(looked_at, self.refused.device)
        if finite is None:
            self.refused.zero_()
        else:
            torch.logical_not(finite, out=self.refused)
        if self._agree is not None:
            self._agree(self.refused)

    def _count(self) -> None:
        if not self._check:
            self.averaged.add_(1)
            self.position.copy_(self.clock)
            return
        refused = self.refused.to(self.averaged.dtype)
        accepted = 1 - refused
        self.averaged.add_(accepted)
        self.skipped.add_(refused)
        self.position.lerp_(self.clock, accepted)


def all_finite(pairs: Iterable[tuple[Tensor, torch.dtype]], device: torch.device) -> Tensor | None:
    """Whether every element is finite once it is rounded to the dtype beside its tensor; None without elements.

    A 0-dim bool on ``device``. Each tensor is read once, where it is, and the host waits for none of them, unless
    they are on another device.

    >>> all_finite([(torch.tensor([1e5]), torch.float16)], torch.device("cpu"))
    tensor(False)
    """
    groups: dict[tuple[torch.device, torch.dtype, torch.dtype], list[Tensor]] = {}
    for tensor, dtype in pairs:
        if tensor.numel():
            real = _real(tensor) if tensor.itemsize > 1 else tensor.bfloat16()  # torch has no norm of 8 bits
            groups.setdefault((real.device, real.dtype, dtype.to_real()), []).append(real)
    verdicts = [
        # Rounding keeps order, so the largest element tells of all; no comparison with a NaN is true.
        (torch.stack(_torch.foreach_norm(group, math.inf)).to(dtype) <= torch.finfo(dtype).max)
        .all()
        .to(device)
        for (_, _, dtype), group in groups.items()
    ]
    if len(verdicts) < 2:
        return verdicts[0] if verdicts else None
    return torch.stack(verdicts).all()


def are_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no tensor holds a NaN or an infinity; the host waits once.

    >>> are_finite([torch.ones(2)]), are_finite([torch.ones(2), torch.tensor(float("inf"))])
    (True, False)
    """
    finite = all_finite([(t, t.dtype) for t in tensors], tensors[0].device) if tensors else None
    return finite is None or bool(finite)


class _Fold(ABC):
    """Some of the means, all on one device, and how sources are folded into them.

    Args:
        indices: which of the means, and of all tensors given.
    """

    def __init__(self, tensors: Sequence[Tensor], means: Sequence[Tensor], indices: Sequence[int]):
        self._indices = None if len(indices) == len(means) else list(indices)
        self._means = [means[index] for index in indices]

    def _mine(self, sources: Sequence[Tensor]) -> Sequence[Tensor]:
        return sources if self._indices is None else [sources[index] for index in self._indices]

    def looked_at(self, sources: Sequence[Tensor]) -> list[tuple[Tensor, torch.dtype]]:
        """What has to be finite, in which dtype."""
        return [(s, m.dtype) for s, m in zip(self._mine(sources), self._means, strict=True)]

    @abstractmethod
    def __call__(self, sources: Sequence[Tensor], coefficient: Tensor, refused: Tensor | None) -> None:
        """Fold them in, unless ``refused`` is 1; None is an unchecked sample. Both may be on another device."""


class _FusedFold(_Fold):
    """fp32 means, by one call for all sources that lie as their means do.

    The others are copied first, which also converts them; small tensors are, where most are small, so that a hundred
    of them are one. They are then looked at as one as well.
    """

    def __init__(self, tensors: Sequence[Tensor], means: Sequence[Tensor], indices: Sequence[int]):
        super().__init__(tensors, means, indices)
        with torch.inference_mode(False):
            self._minus_share = torch.zeros((), device=self._means[0].device)
        self._gathers = are_mostly_small(self._means)
        sources = self._mine(tensors)
        places = range(len(sources))
        staged = [i for i in places if not self._goes_directly(sources[i], self._means[i])]
        self._staged, self._at_once = plan_staged(sources, self._means, staged, self._gathers)
        self._direct = sorted({*places} - {*staged})
        self._direct_means = [self._means[i] for i in self._direct]
        self._gathered = [(batch, own) for batch, own in self._staged if batch.copy is not None]
        small = {piece.index for batch, _ in self._gathered for piece in batch.pieces}
        self._looked_at = [i for i in places if i not in small] if self._at_once else list(places)

    def _goes_directly(self, source: Tensor, mean: Tensor) -> bool:
        alike = (source.dtype, source.device, source.stride()) == (mean.dtype, mean.device, mean.stride())
        return alike and not (self._gathers and is_small(mean))

    def looked_at(self, sources: Sequence[Tensor]) -> list[tuple[Tensor, torch.dtype]]:
        mine = self._mine(sources)
        together = [batch.sources(batch.parts(mine), ())[0] for batch, _ in self._gathered if self._at_once]
        return [(tensor, torch.float32) for tensor in (*together, *(mine[i] for i in self._looked_at))]

    def __call__(self, sources: Sequence[Tensor], coefficient: Tensor, refused: Tensor | None) -> None:
        mine = self._mine(sources)
        self._minus_share.copy_(coefficient).neg_()
        if refused is not None:
            refused = refused.to(self._minus_share.device)
        if self._direct:
            self._lerp(self._direct_means, [mine[i] for i in self._direct], refused)
        for batch, copies in self._staged:
            # Looking at the sample gathered them already.
            if batch.copy is not None and self._at_once and refused is not None:
                self._lerp(batch.means, [batch.copy.whole], refused)
            else:
                self._lerp(batch.means, batch.sources(batch.parts(mine), copies), refused)

    def _lerp(self, means: Tensors, sources: Tensors, refused: Tensor | None) -> None:
        _torch.lerp_unless_(list(means), list(sources), self._minus_share, refused)


class _MaskedFold(_Fold):
    """Means of any dtype, with or without residuals, by operations on copies: the verdict picks the old or the new."""

    def __init__(
        self,
        tensors: Sequence[Tensor],
        means: Sequence[Tensor],
        residuals: Sequence[Tensor],
        indices: Sequence[int],
    ):
        super().__init__(tensors, means, indices)
        self._batches = plan_batches(
            self._mine(tensors), self._means, self._mine(residuals) if residuals else ()
        )

    def __call__(self, sources: Sequence[Tensor], coefficient: Tensor, refused: Tensor | None) -> None:
        device = self._means[0].device
        share = coefficient.to(device)
        keeps = None if refused is None else refused.to(device, torch.bool)
        for batch, copies in with_sources(self._batches, self._mine(sources), owned=True):
            for mean, source in zip(batch.means, copies, strict=True):
                _fold_masked(mean, batch.residual, source, share, keeps)


def _fold_masked(
    mean: Tensor, residual: Tensor | None, source: Tensor, share: Tensor, keeps: Tensor | None
) -> None:
    change = source.sub_(mean)
    if residual is not None:  # Kahan's sum
        change = change.sub_(residual).mul_(share).add_(residual)
        new = mean + change
        _replace(residual, (mean - new).add_(change), keeps)
    else:
        new = change.mul_(share).add_(mean)
    _replace(mean, new, keeps)


def _replace(old: Tensor, new: Tensor, keeps: Tensor | None) -> None:
    # Not a factor of 0, as 0 * NaN is NaN, nor a sum with 0, which makes 0.0 of -0.0.
    old.copy_(new if keeps is None else torch.where(keeps, old, new))


class _KernelFold(_Fold):
    """Means of any dtype, with or without residuals, by a kernel of Triton, where it works."""

    def __init__(
        self,
        tensors: Sequence[Tensor],
        means: Sequence[Tensor],
        residuals: Sequence[Tensor],
        indices: Sequence[int],
    ):
        from polyak._triton_mean import Kernel

        super().__init__(tensors, means, indices)
        self._kernel = Kernel(self._mine(tensors), self._means, self._mine(residuals) if residuals else [])

    def __call__(self, sources: Sequence[Tensor], coefficient: Tensor, refused: Tensor | None) -> None:
        device = self._means[0].device
        self._kernel(
            self._mine(sources), coefficient.to(device), None if refused is None else refused.to(device)
        )


def _folds(
    tensors: Sequence[Tensor], means: Sequence[Tensor], residuals: Sequence[Tensor]
) -> Iterator[_Fold]:
    """One for each device and way."""
    groups: dict[tuple[torch.device, str], list[int]] = {}
    for index, (tensor, mean) in enumerate(zip(tensors, means, strict=True)):
        if mean.numel():
            way = "fused" if not residuals and _can_be_fused(mean) else _other_way(tensor, mean)
            groups.setdefault((mean.device, way), []).append(index)
    for (_, way), indices in groups.items():
        if way == "fused":
            yield _FusedFold(tensors, means, indices)
        else:
            yield (_KernelFold if way == "kernel" else _MaskedFold)(tensors, means, residuals, indices)


def _can_be_fused(mean: Tensor) -> bool:
    return mean.dtype == torch.float32 and _torch.lerps_unless(mean.device)


def _other_way(tensor: Tensor, mean: Tensor) -> str:
    from polyak._triton_mean import can_take, works_on  # here, as importing Triton takes long

    return "kernel" if can_take(tensor, mean) and works_on(mean.device) else "masked"


def _real(tensor: Tensor) -> Tensor:
    """A complex one as pairs of real numbers, which have to be stored as they are for that."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
