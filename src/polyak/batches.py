"""Lists of tensors in batches: small enough for the cache, large enough to be worth a call.

Checking a batch, converting it and folding it into the mean then cost one trip to memory. The plan is made
once, when an average is bound to a model; an update only walks it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Batch", "plan_batches"]

# A batch has at most 1% of all elements, for the memory promise, and on the host no more than its caches hold;
# tensors below the least size are worth copying together, since calls cost more than the memory they touch.
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
    may put other data behind a parameter at any time.
    """

    pieces: list[_Piece]
    means: list[Tensor]
    residuals: list[Tensor]
    alike: bool  # sources have the dtype and device of their means
    numels: list[int] = field(init=False)
    numel: int = field(init=False)

    def __post_init__(self) -> None:
        self.numels = [mean.numel() for mean in self.means]
        self.numel = sum(self.numels)

    def stage(self, tensors: Sequence[Tensor], owned: bool = False) -> tuple[Tensor, list[Tensor]]:
        """The sources in the dtype and on the device of the means: as one tensor, and piece by piece.

        Pieces that need no conversion are the live tensors themselves, unless ``owned`` asks for a copy that
        may be written to, of which the one tensor is then the whole.
        """
        sources = [piece.of(tensors) for piece in self.pieces]
        if self.alike and not owned:
            return (sources[0] if len(sources) == 1 else torch.cat(list(map(_flat, sources)))), sources
        buffer = torch.empty(self.numel, dtype=self.means[0].dtype, device=self.means[0].device)
        parts = torch.split(buffer, self.numels)
        copies = [
            part if mean.ndim == 1 else part.view(mean.shape)
            for part, mean in zip(parts, self.means, strict=True)
        ]
        torch._foreach_copy_(copies, sources)
        return buffer, copies


def plan_batches(
    tensors: Sequence[Tensor], means: Sequence[Tensor], residuals: Sequence[Tensor] = ()
) -> list[Batch]:
    """Small neighbours of one kind together, large tensors alone and cut along their outermost dimension.

    >>> weights = [torch.zeros(3), torch.zeros(5), torch.zeros(1000, 1000)]
    >>> [batch.numel for batch in plan_batches(weights, [torch.zeros_like(w) for w in weights])][:3]
    [8, 16000, 16000]
    """
    on_host = any(mean.device.type == "cpu" for mean in means)
    cap = _CACHE_NUMEL if on_host else _ACCELERATOR_NUMEL
    most = min(cap, max(sum(mean.numel() for mean in means) // 100, _LEAST_NUMEL))
    return [
        Batch(
            group,
            [piece.of(means) for piece in group],
            [piece.of(residuals) for piece in group] if residuals else [],
            alike=_kind(tensors[group[0].index]) == _kind(means[group[0].index]),
        )
        for group in _group(tensors, means, most)
    ]


def _group(tensors: Sequence[Tensor], means: Sequence[Tensor], most: int) -> Iterator[list[_Piece]]:
    group: list[_Piece] = []
    kind, numel = None, 0
    for index, (tensor, mean) in enumerate(zip(tensors, means, strict=True)):
        for piece in _cut(index, mean, most):
            size = piece.of(means).numel()
            new_kind = _kind(tensor) + _kind(mean)
            alone = size >= _LEAST_NUMEL or piece.length is not None
            if group and (alone or new_kind != kind or numel + size > most):
                yield group
                group, numel = [], 0
            if alone:
                yield [piece]
            else:
                group.append(piece)
                kind, numel = new_kind, numel + size
    if group:
        yield group


def _cut(index: int, tensor: Tensor, most: int) -> list[_Piece]:
    if tensor.numel() <= most:
        return [_Piece(index)]
    outermost = max((d for d in range(tensor.ndim) if tensor.shape[d] > 1), key=tensor.stride)
    size = tensor.shape[outermost]
    length = max(most * size // tensor.numel(), 1)
    return [_Piece(index, outermost, start, min(length, size - start)) for start in range(0, size, length)]


def _flat(tensor: Tensor) -> Tensor:
    return tensor if tensor.ndim == 1 else tensor.reshape(-1)  # a view costs more than it looks


def _kind(tensor: Tensor) -> tuple[torch.dtype, torch.device]:
    return tensor.dtype, tensor.device
