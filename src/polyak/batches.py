"""Lists of tensors in batches: small enough for the cache, large enough to be worth a call.

Checking a batch, converting it and folding it into the mean then cost one trip to memory. Small tensors have
their means side by side in one buffer, so that a hundred of them are one batch. The plan is made once, when
an average is bound to a model; an update only walks it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter

import torch
from torch import Tensor

__all__ = ["Batch", "allocate", "are_mostly_small", "plan_batches"]

# Tensors below this many elements cost more to call upon than to touch.
_SMALL_NUMEL = 1 << 14
# A copy of this many costs no model memory worth counting; fewer would make many calls of a small model.
_LEAST_COPIED_NUMEL = 1 << 16
# Large tensors are cut to what the caches hold; on an accelerator to what a launch is worth.
_CACHE_NUMEL = 1 << 20
_ACCELERATOR_NUMEL = 1 << 24


@dataclass(frozen=True, slots=True)
class _Piece:
    """A tensor, narrowed by (dimension, start, length) as often as there are ``cuts``."""

    index: int
    cuts: tuple[tuple[int, int, int], ...] = ()

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        tensor = tensors[self.index]
        for cut in self.cuts:
            tensor = tensor.narrow(*cut)
        return tensor


@dataclass(slots=True)
class Batch:
    """One piece of a tensor, or several small tensors whose means lie side by side.

    ``mean`` and ``residual`` are views, made once; the source is looked up at each update, since a model may
    put other data behind a parameter at any time.
    """

    pieces: list[_Piece]
    mean: Tensor
    residual: Tensor | None
    alike: bool  # the source has the dtype and device of the mean
    pick: Callable[[Sequence[Tensor]], tuple[Tensor, ...]]
    flat: bool  # all of one dimension
    size: float = 0.0  # of the last source that was folded in: no element is larger

    def source(self, tensors: Sequence[Tensor], owned: bool = False) -> Tensor:
        """The source in the mean's shape and dtype, on its device.

        It is the live tensor itself where nothing has to be gathered or converted, unless ``owned`` asks for
        a copy that may be written to.
        """
        if len(self.pieces) > 1:
            return torch.cat(self._gathered(tensors)).to(self.mean)
        part = self.pieces[0].of(tensors)
        if self.alike and not owned:
            return part
        return part.to(self.mean.device, self.mean.dtype, copy=True)

    def _gathered(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...] | list[Tensor]:
        parts = self.pick(tensors)
        # Making a view costs more than it looks, and most small tensors are of one dimension.
        return parts if self.flat else [part if part.ndim == 1 else part.reshape(-1) for part in parts]


def allocate(
    tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype], devices: Sequence[torch.device]
) -> list[Tensor]:
    """Zeros in the shapes of ``tensors``; the small ones of one dtype and device share a buffer.

    >>> big, small, other = allocate([torch.ones(200, 100), torch.ones(2), torch.ones(3)],
    ...                              [torch.float32] * 3, [torch.device("cpu")] * 3)
    >>> small.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    True
    """
    with torch.inference_mode(False):  # means made in inference mode could not be updated outside it
        return _allocate(tensors, list(zip(dtypes, devices, strict=True)))


def _allocate(tensors: Sequence[Tensor], kinds: list[tuple[torch.dtype, torch.device]]) -> list[Tensor]:
    numels: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for tensor, kind in zip(tensors, kinds, strict=True):
        if tensor.numel() < _SMALL_NUMEL:
            numels.setdefault(kind, []).append(tensor.numel())
    parts = {
        (dtype, device): iter(torch.zeros(sum(sizes), dtype=dtype, device=device).split(sizes))
        for (dtype, device), sizes in numels.items()
    }
    return [
        next(parts[kind]).view(tensor.shape)
        if tensor.numel() < _SMALL_NUMEL
        else torch.zeros_like(tensor, dtype=kind[0], device=kind[1], requires_grad=False)
        for tensor, kind in zip(tensors, kinds, strict=True)
    ]


def plan_batches(
    tensors: Sequence[Tensor], means: Sequence[Tensor], residuals: Sequence[Tensor] = ()
) -> list[Batch]:
    """Small neighbours together; large tensors alone, cut along their outermost dimension.

    What has to be copied at once is 1% of all elements, or 65,536 where that is more, so that an update takes
    little memory of its own.

    >>> weights = [torch.zeros(3), torch.zeros(5), torch.zeros(1000, 2000)]
    >>> means = allocate(weights, [torch.float32] * 3, [torch.device("cpu")] * 3)
    >>> [tuple(batch.mean.shape) for batch in plan_batches(weights, means)]
    [(8,), (524, 2000), (476, 2000)]
    """
    copies = 3 if residuals else 1  # Kahan's sum works on copies of all it changes
    share = max(sum(mean.numel() for mean in means) // 100, _LEAST_COPIED_NUMEL) // copies
    batches = []
    for group in _groups(tensors, means, share):
        index = group[0]
        mean, alike = means[index], _kind(tensors[index]) == _kind(means[index])
        if len(group) > 1:
            pieces = [[_Piece(index) for index in group]]
        else:
            cache = _CACHE_NUMEL if mean.device.type == "cpu" else _ACCELERATOR_NUMEL
            copied = residuals or not alike or mean.device.type != "cpu"
            most = min(cache, share) if copied else cache
            pieces = [[_Piece(index, cuts)] for cuts in _cut(mean, most)]
        pick, flat = itemgetter(*group), all(means[i].ndim == 1 for i in group)
        batches += [
            Batch(p, _joined(means, p), _joined(residuals, p) if residuals else None, alike, pick, flat)
            for p in pieces
        ]
    return batches


def are_mostly_small(means: Sequence[Tensor]) -> bool:
    """Whether gathering small tensors pays: beside large ones a call on each is lost in the time of those.

    >>> are_mostly_small([torch.zeros(10)] * 3), are_mostly_small([torch.zeros(10), torch.zeros(1000, 1000)])
    (True, False)
    """
    return sum(mean.numel() for mean in means) < _SMALL_NUMEL * len(means)


def _groups(tensors: Sequence[Tensor], means: Sequence[Tensor], most: int) -> Iterator[list[int]]:
    """Indices of tensors to handle together: large ones alone, neighbouring small ones up to ``most`` elements."""
    group: list[int] = []
    small = sorted(
        (i for i, mean in enumerate(means) if mean.numel() < _SMALL_NUMEL), key=lambda i: _place(means[i])
    )
    for i in small:
        if group and not (
            _place(means[i]) == _end(means[group[-1]])
            and _kind(tensors[i]) == _kind(tensors[group[0]])
            and sum(means[j].numel() for j in group) + means[i].numel() <= most
        ):
            yield group
            group = []
        group.append(i)
    if group:
        yield group
    yield from ([i] for i, mean in enumerate(means) if mean.numel() >= _SMALL_NUMEL)


def _cut(tensor: Tensor, most: int) -> list[tuple[tuple[int, int, int], ...]]:
    """Cuts along the outermost dimensions in memory that leave ``most`` elements, or about as many."""
    if tensor.numel() <= most:
        return [()]
    outermost = max((d for d in range(tensor.ndim) if tensor.shape[d] > 1), key=tensor.stride)
    size = tensor.shape[outermost]
    length = max(most * size // tensor.numel(), 1)
    cuts = ((outermost, start, min(length, size - start)) for start in range(0, size, length))
    return [(cut, *further) for cut in cuts for further in _cut(tensor.narrow(*cut), most)]


def _joined(tensors: Sequence[Tensor], pieces: list[_Piece]) -> Tensor:
    first = pieces[0].of(tensors)
    if len(pieces) == 1:
        return first
    total = sum(tensors[piece.index].numel() for piece in pieces)
    return first.as_strided((total,), (1,))


def _place(mean: Tensor) -> tuple[str, int, int]:
    return str(mean.device), mean.untyped_storage().data_ptr(), int(mean.storage_offset())


def _end(mean: Tensor) -> tuple[str, int, int]:
    device, storage, offset = _place(mean)
    return device, storage, offset + mean.numel()


def _kind(tensor: Tensor) -> tuple[torch.dtype, torch.device]:
    return tensor.dtype, tensor.device
