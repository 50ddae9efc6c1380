"""Lists of tensors in batches: small enough for the cache, large enough to be worth a call.

Checking a batch, converting it and folding it into the mean then cost one trip to memory. The plan is made
once, when an average is bound to a model; an update only walks it.
"""

from __future__ import annotations

import cmath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Batch", "plan_batches"]

# Elements in a batch: on the host, what its caches hold. Where sources are copied for conversion, and where small
# ones are gathered to be looked at together, 1% of all elements at most, for the memory promise. Tensors of the
# least size and more are worth a call of their own.
_CACHE_NUMEL = 1 << 19
_ACCELERATOR_NUMEL = 1 << 24
_LEAST_NUMEL = 1 << 14


@dataclass(frozen=True, slots=True)
class _Piece:
    """A whole tensor (``length`` None), or the part [start, start + length) of one of its dimensions."""

    index: int
    dim: int = 0
    start: int = 0
    length: int | None = None

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        tensor = tensors[self.index]
        return tensor if self.length is None else tensor.narrow(self.dim, self.start, self.length)


@dataclass(slots=True)
class Batch:
    """Pieces with one dtype and device, and another one for their means.

    ``means`` and ``residuals`` are views, made once; the sources are looked up at each update, since a model
    may put other data behind a parameter at any time. ``checks`` are the positions to look at together.
    """

    pieces: list[_Piece]
    means: list[Tensor]
    residuals: list[Tensor]
    alike: bool  # sources have the dtype and device of their means
    checks: list[list[int]]
    numels: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.numels = [mean.numel() for mean in self.means]

    def sources(self, tensors: Sequence[Tensor], owned: bool = False) -> list[Tensor]:
        """The sources in the dtype and on the device of the means, piece by piece.

        Where nothing has to be converted they are the live tensors themselves, unless ``owned`` asks for
        copies that may be written to.
        """
        if self.alike and not owned:
            return [piece.of(tensors) for piece in self.pieces]
        return self.copies(tensors)[1]

    def copies(self, tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Converted copies of the sources, side by side in one buffer: the buffer, and the pieces as views."""
        buffer = torch.empty(sum(self.numels), dtype=self.means[0].dtype, device=self.means[0].device)
        copies = [
            part if mean.ndim == 1 else part.view(mean.shape)
            for part, mean in zip(torch.split(buffer, self.numels), self.means, strict=True)
        ]
        torch._foreach_copy_(copies, [piece.of(tensors) for piece in self.pieces])
        return buffer, copies

    def is_finite(self, sources: list[Tensor]) -> bool:
        """Whether no source holds a NaN or an infinity."""
        for group in self.checks:
            together = [sources[i] for i in group]
            if not _is_finite(together[0] if len(group) == 1 else torch.cat(list(map(_flat, together)))):
                return False
        return True


def plan_batches(
    tensors: Sequence[Tensor], means: Sequence[Tensor], residuals: Sequence[Tensor] = ()
) -> list[Batch]:
    """Neighbours of one kind together, large tensors cut along their outermost dimension in memory.

    >>> weights = [torch.zeros(3), torch.zeros(5), torch.zeros(1000, 1000)]
    >>> [batch.numels for batch in plan_batches(weights, [torch.zeros_like(w) for w in weights])]
    [[3, 5, 524000], [476000]]
    """
    on_host = any(mean.device.type == "cpu" for mean in means)
    cache = _CACHE_NUMEL if on_host else _ACCELERATOR_NUMEL
    copied = min(cache, max(sum(mean.numel() for mean in means) // 100, _LEAST_NUMEL))
    uncopied = cache if on_host and not residuals else copied
    batches = []
    for group in _group(tensors, means, uncopied, copied):
        own = [piece.of(means) for piece in group]
        batches.append(
            Batch(
                group,
                own,
                [piece.of(residuals) for piece in group] if residuals else [],
                _alike(tensors[group[0].index], means[group[0].index]),
                _checks([mean.numel() for mean in own], copied),
            )
        )
    return batches


def _group(
    tensors: Sequence[Tensor], means: Sequence[Tensor], uncopied: int, copied: int
) -> Iterator[list[_Piece]]:
    group: list[_Piece] = []
    kind, numel = None, 0
    for index, (tensor, mean) in enumerate(zip(tensors, means, strict=True)):
        most = uncopied if _alike(tensor, mean) else copied
        for piece in _cut(index, mean, most):
            size = piece.of(means).numel()
            new_kind = _kind(tensor) + _kind(mean)
            if group and (new_kind != kind or numel + size > most):
                yield group
                group, numel = [], 0
            group.append(piece)
            kind, numel = new_kind, numel + size
    if group:
        yield group


def _checks(numels: list[int], most: int) -> list[list[int]]:
    """Positions to check together: large ones alone, small ones up to ``most`` elements."""
    alone = [[i] for i, numel in enumerate(numels) if numel >= _LEAST_NUMEL]
    groups: list[list[int]] = []
    total = most
    for i, numel in enumerate(numels):
        if numel >= _LEAST_NUMEL:
            continue
        if total + numel > most:
            groups.append([])
            total = 0
        groups[-1].append(i)
        total += numel
    return groups + alone


def _cut(index: int, tensor: Tensor, most: int) -> list[_Piece]:
    if tensor.numel() <= most:
        return [_Piece(index)]
    outermost = max((d for d in range(tensor.ndim) if tensor.shape[d] > 1), key=tensor.stride)
    size = tensor.shape[outermost]
    length = max(most * size // tensor.numel(), 1)
    return [_Piece(index, outermost, start, min(length, size - start)) for start in range(0, size, length)]


def _is_finite(tensor: Tensor) -> bool:
    # A NaN or an infinity always shows in the sum; a sum that only overflowed is looked at again.
    return cmath.isfinite(tensor.sum().item()) or bool(tensor.isfinite().all())


def _flat(tensor: Tensor) -> Tensor:
    return tensor if tensor.ndim == 1 else tensor.reshape(-1)  # a view costs more than it looks


def _alike(tensor: Tensor, mean: Tensor) -> bool:
    return _kind(tensor) == _kind(mean)


def _kind(tensor: Tensor) -> tuple[torch.dtype, torch.device]:
    return tensor.dtype, tensor.device
