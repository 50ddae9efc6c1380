"""Lists of tensors in batches: small enough for the cache, large enough to be worth a call.

Checking a batch, converting it and folding it into the mean then cost one trip to memory. Small tensors have
their means side by side in one buffer, so that a hundred of them are one tensor. The plan is made once, when
an average is bound to a model; an update only walks it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import itemgetter

import torch
from torch import Tensor

from polyak import _torch

__all__ = [
    "Batch",
    "Tensors",
    "allocate",
    "are_mostly_small",
    "in_place_of",
    "is_small",
    "lie_alike",
    "plan_batches",
    "plan_staged",
    "with_sources",
]

# Tensors below this many elements cost more to call upon than to touch.
_SMALL_NUMEL = 1 << 14
# A copy of this many costs no model memory worth counting; fewer would make many calls of a small model.
_LEAST_COPIED_NUMEL = 1 << 16
# Large tensors are cut, and neighbours taken together, to what the caches hold; on an accelerator tensors are
# cut to what a launch is worth.
_CACHE_NUMEL = 1 << 20
_ACCELERATOR_NUMEL = 1 << 24
# What is converted there at once: 16 MB of fp32, which the second-level cache of a GPU holds.
_STAGED_NUMEL = 1 << 22

_Kind = tuple[torch.dtype, torch.device]
_Geometry = tuple[torch.Size, tuple[int, ...], int]
# What torch's functions on many tensors take.
Tensors = list[Tensor] | tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class _Piece:
    """A tensor, its dimensions in another order if one is given, narrowed by each (dimension, start, length)."""

    index: int
    order: tuple[int, ...] | None = None
    cuts: tuple[tuple[int, int, int], ...] = ()

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        tensor = tensors[self.index]
        if self.order is not None:
            tensor = tensor.permute(self.order)
        for cut in self.cuts:
            tensor = tensor.narrow(*cut)
        return tensor


@dataclass(frozen=True, slots=True)
class _Copy:
    """Where small tensors are gathered, to be one call instead of many: a slot for each, and all as one."""

    pick: Callable[[Sequence[Tensor]], tuple[Tensor, ...]]
    slots: list[Tensor]
    whole: Tensor
    joins: bool  # nothing is converted, and all are of one dimension, as torch.cat wants them

    @classmethod
    def of(cls, indices: list[int], means: list[Tensor], buffer: Tensor, alike: bool) -> _Copy:
        numels = [mean.numel() for mean in means]
        whole = buffer[: sum(numels)]
        slots = [
            slot.as_strided(m.shape, m.stride()) for slot, m in zip(whole.split(numels), means, strict=True)
        ]
        joins = alike and all(mean.ndim == 1 for mean in means)
        return cls(itemgetter(*indices), slots, whole, joins)

    def fill(self, parts: Tensors) -> Tensor:
        """All parts; they last until the buffer is filled again."""
        with torch.inference_mode():  # nothing is noted for autograd, which takes a third of the time
            if self.joins:
                return torch.cat(parts, out=self.whole)
            _torch.foreach_copy_(self.slots, parts)
            return self.whole


@dataclass(frozen=True, slots=True)
class Batch:
    """Pieces of tensors, each with its mean, or several small tensors whose means lie side by side as one.

    ``means`` and ``residual`` are views, made once; the sources are looked up at each update, since a model
    may put other data behind a parameter at any time.
    """

    pieces: list[_Piece]
    means: list[Tensor]
    residual: Tensor | None
    copy: _Copy | None  # where several tensors are gathered
    alike: bool  # the sources have the dtype and device of the means
    kind: _Kind  # of the means
    numel: int
    geometry: list[_Geometry]  # shape, strides and offset of a copy of each source in one buffer

    def parts(self, tensors: Sequence[Tensor]) -> Tensors:
        """What :meth:`sources` takes, as views."""
        if self.copy is not None:
            return self.copy.pick(tensors)
        return [piece.of(tensors) for piece in self.pieces]

    def sources(self, parts: Tensors, copies: Tensors) -> Tensors:
        """The parts in the shapes and the dtype of the means, on their device.

        They are the live tensors themselves where nothing has to be gathered and there are no ``copies`` to fill.
        What is copied lasts until another batch is.
        """
        if self.copy is not None:
            return [self.copy.fill(parts)]
        if not copies:
            return parts
        _torch.foreach_copy_(copies, parts)
        return copies

    def copies_in(self, scratch: Tensor) -> Tensors:
        """Views of ``scratch`` in the shapes of the means, one after the other."""
        start = int(scratch.storage_offset())
        return [scratch.as_strided(shape, stride, start + offset) for shape, stride, offset in self.geometry]


def allocate(
    tensors: Sequence[Tensor],
    dtypes: Sequence[torch.dtype],
    devices: Sequence[torch.device],
    pinned: bool = False,
) -> list[Tensor]:
    """Zeros in the shapes of ``tensors``; the small ones of one dtype and device share a buffer.

    ``pinned`` memory of the host is what accelerators copy to by themselves; RuntimeError where there is none.

    >>> big, small, other = allocate([torch.ones(200, 100), torch.ones(2), torch.ones(3)],
    ...                              [torch.float32] * 3, [torch.device("cpu")] * 3)
    >>> small.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    True
    """
    with torch.inference_mode(False):  # means made in inference mode could not be updated outside it
        return _allocate(tensors, list(zip(dtypes, devices, strict=True)), pinned)


def _allocate(tensors: Sequence[Tensor], kinds: list[_Kind], pinned: bool) -> list[Tensor]:
    numels: dict[_Kind, list[int]] = {}
    for tensor, kind in zip(tensors, kinds, strict=True):
        if tensor.numel() < _SMALL_NUMEL:
            numels.setdefault(kind, []).append(tensor.numel())
    parts = {
        (dtype, device): iter(
            torch.zeros(sum(sizes), dtype=dtype, device=device, pin_memory=pinned).split(sizes)
        )
        for (dtype, device), sizes in numels.items()
    }
    return [
        next(parts[kind]).as_strided(tensor.shape, torch.empty_like(tensor, device="meta").stride())
        if is_small(tensor)
        else torch.zeros_like(tensor, dtype=kind[0], device=kind[1], requires_grad=False, pin_memory=pinned)
        for tensor, kind in zip(tensors, kinds, strict=True)
    ]


def in_place_of(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Means with the values of ``tensors``, in their very memory where they are large and of the dtype asked for.

    >>> big, small = torch.ones(200, 100), torch.ones(2)
    >>> [m is t for m, t in zip(in_place_of([big, small], [torch.float32] * 2), [big, small])]
    [True, False]
    """
    apart = [
        i
        for i, (tensor, dtype) in enumerate(zip(tensors, dtypes, strict=True))
        if tensor.numel() < _SMALL_NUMEL or tensor.dtype != dtype
    ]
    means = list(tensors)
    sources = [tensors[i] for i in apart]
    copies = allocate(sources, [dtypes[i] for i in apart], [source.device for source in sources])
    for i, copy in zip(apart, copies, strict=True):
        means[i] = copy.copy_(tensors[i])
    return means


def plan_batches(
    tensors: Sequence[Tensor], means: Sequence[Tensor], residuals: Sequence[Tensor] = ()
) -> list[Batch]:
    """Small tensors gathered, large ones cut; what needs no copy is taken together until the cache is full.

    What has to be copied at once is 1% of all elements, or 65,536 where that is more, so that an update takes
    little memory of its own; small tensors are gathered in memory of that size which the batches share.

    >>> weights = [torch.zeros(n) for n in (3, 5, 300_000, 500_000, 1_500_000)]
    >>> means = allocate(weights, [torch.float32] * 5, [torch.device("cpu")] * 5)
    >>> for batch in plan_batches(weights, means):
    ...     print([mean.numel() for mean in batch.means])
    [8]
    [300000, 500000]
    [1048576]
    [451424]
    """
    copies = 3 if residuals else 1  # Kahan's sum works on copies of all it changes
    share = max(sum(mean.numel() for mean in means) // 100, _LEAST_COPIED_NUMEL) // copies
    groups = _small_groups(tensors, means, range(len(means)), share)
    small = [[_Piece(index, _order(means[index])) for index in group] for group in groups]
    buffers = _buffers(
        (_kind(means[group[0].index]), sum(means[piece.index].numel() for piece in group)) for group in small
    )
    plan: list[list[_Piece]] = []
    in_place: list[_Piece] = []
    for index, mean in enumerate(means):
        if mean.numel() < _SMALL_NUMEL:
            continue
        on_host = _torch.on_host(mean)
        cache = _CACHE_NUMEL if on_host else _ACCELERATOR_NUMEL
        if on_host and not residuals and _kind(tensors[index]) == _kind(mean):
            in_place += _pieces(index, mean, cache)
        else:
            plan += [[piece] for piece in _pieces(index, mean, min(cache, share))]
    plan += _filled(in_place, means, _CACHE_NUMEL)
    gathered = [_batch(pieces, tensors, means, residuals, buffers) for pieces in small]
    return gathered + [_batch(pieces, tensors, means, residuals) for pieces in plan]


def plan_staged(
    tensors: Sequence[Tensor], means: Sequence[Tensor], indices: Sequence[int], gathers: bool
) -> tuple[list[tuple[Batch, Tensors]], bool]:
    """Batches whose sources are copied to one scratch first, each with the views of it that they are copied to.

    For means of one dtype on an accelerator. A batch has sources of one dtype, and at most 4 million elements; a
    call takes all of it. The scratch is as large as the largest batch, or as all of them where that is no more than
    one may have: the second value says so. Then what was copied lasts until the next update.

    Args:
        tensors: the sources.
        means: their means, dense.
        indices: of those that are to be staged.
        gathers: small ones whose means lie side by side become one tensor.

    >>> weights = [torch.zeros(n, dtype=torch.bfloat16) for n in (3, 5, 3_000_000, 2_000_000)]
    >>> means = allocate(weights, [torch.float32] * 4, [torch.device("cpu")] * 4)
    >>> staged, at_once = plan_staged(weights, means, range(4), gathers=True)
    >>> [batch.numel for batch, _ in staged], at_once
    ([8, 3000000, 2000000], False)
    """
    small = list(_small_groups(tensors, means, indices, _STAGED_NUMEL)) if gathers else []
    gathered = {index for group in small for index in group}
    plan = [[_Piece(index, _order(means[index])) for index in group] for group in small]
    by_kind: dict[_Kind, list[_Piece]] = {}
    for index in indices:
        if index not in gathered:
            by_kind.setdefault(_kind(tensors[index]), []).extend(_pieces(index, means[index], _STAGED_NUMEL))
    plan += [batch for pieces in by_kind.values() for batch in _filled(pieces, means, _STAGED_NUMEL)]
    sizes = [sum(piece.of(means).numel() for piece in pieces) for pieces in plan]
    at_once = sum(sizes) <= _STAGED_NUMEL
    starts = [end - size if at_once else 0 for end, size in zip(accumulate(sizes), sizes, strict=True)]
    if not plan:
        return [], True
    kind = _kind(means[plan[0][0].index])
    scratch = _buffers([(kind, sum(sizes) if at_once else max(sizes))])[kind]
    staged = []
    for n, (pieces, start, size) in enumerate(zip(plan, starts, sizes, strict=True)):
        stretch = scratch[start : start + size]
        batch = _batch(pieces, tensors, means, (), {kind: stretch} if n < len(small) else None)
        staged.append((batch, () if batch.copy is not None else batch.copies_in(stretch)))
    return staged, at_once


def with_sources(
    batches: Sequence[Batch], tensors: Sequence[Tensor], owned: bool = False
) -> Iterator[tuple[Batch, Tensors]]:
    """Each batch with its sources, which are copied, where they must be, when their turn comes.

    They are copied where ``owned`` asks for sources that may be written to, and where they are converted: one after
    the other to the same memory, as pieces of many sizes that come and go would leave holes as large as they.

    All views are made first: between two trips to memory, which leave nothing else in the cache, one takes
    five times as long.
    """
    if not batches:
        return
    parts = [batch.parts(tensors) for batch in batches]
    copied = [batch.copy is None and (owned or not batch.alike) for batch in batches]
    scratch = _buffers((b.kind, b.numel) for b, is_copied in zip(batches, copied, strict=True) if is_copied)
    copies = [
        batch.copies_in(scratch[batch.kind]) if is_copied else ()
        for batch, is_copied in zip(batches, copied, strict=True)
    ]
    for batch, part, own in zip(batches, parts, copies, strict=True):
        yield batch, batch.sources(part, own)


def is_small(tensor: Tensor) -> bool:
    """Whether calling upon a tensor costs more than touching it.

    >>> is_small(torch.zeros(10)), is_small(torch.zeros(1000, 1000))
    (True, False)
    """
    return tensor.numel() < _SMALL_NUMEL


def lie_alike(means: Sequence[Tensor], tensors: Sequence[Tensor]) -> bool:
    """Whether every large mean is laid out in memory as :func:`allocate` would lay it out now.

    >>> weight = torch.zeros(200, 100)
    >>> lie_alike([torch.zeros(100, 200).t()], [weight]), lie_alike([torch.zeros(200, 100)], [weight])
    (False, True)
    """
    return all(
        mean.numel() < _SMALL_NUMEL or mean.stride() == torch.empty_like(tensor, device="meta").stride()
        for mean, tensor in zip(means, tensors, strict=True)
    )


def are_mostly_small(means: Sequence[Tensor]) -> bool:
    """Whether gathering small tensors pays: beside large ones a call on each is lost in the time of those.

    >>> are_mostly_small([torch.zeros(10)] * 3), are_mostly_small([torch.zeros(10), torch.zeros(1000, 1000)])
    (True, False)
    """
    return sum(mean.numel() for mean in means) < _SMALL_NUMEL * len(means)


def _small_groups(
    tensors: Sequence[Tensor], means: Sequence[Tensor], indices: Sequence[int], most: int
) -> Iterator[list[int]]:
    """Indices of small tensors that are neighbours in a buffer, of one kind, and up to ``most`` elements."""
    group: list[int] = []
    small = (i for i in indices if means[i].numel() < _SMALL_NUMEL)
    for i in sorted(small, key=lambda i: _place(means[i])):
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


def _filled(pieces: list[_Piece], means: Sequence[Tensor], most: int) -> Iterator[list[_Piece]]:
    """Neighbouring pieces together, up to ``most`` elements."""
    batch: list[_Piece] = []
    numel = 0
    for piece in pieces:
        size = piece.of(means).numel()
        if batch and numel + size > most:
            yield batch
            batch, numel = [], 0
        batch.append(piece)
        numel += size
    if batch:
        yield batch


def _buffers(needs: Iterable[tuple[_Kind, int]]) -> dict[_Kind, Tensor]:
    """Memory for the largest number of elements of each kind."""
    largest: dict[_Kind, int] = {}
    for kind, numel in needs:
        largest[kind] = max(largest.get(kind, 0), numel)
    with torch.inference_mode(False):
        return {(t, d): torch.empty(numel, dtype=t, device=d) for (t, d), numel in largest.items()}


def _batch(
    pieces: list[_Piece],
    tensors: Sequence[Tensor],
    means: Sequence[Tensor],
    residuals: Sequence[Tensor],
    buffers: dict[_Kind, Tensor] | None = None,
) -> Batch:
    parts = [piece.of(means) for piece in pieces]
    others = [piece.of(residuals) for piece in pieces] if residuals else []
    kind = _kind(parts[0])
    alike = _kind(tensors[pieces[0].index]) == kind
    ends = list(accumulate(part.numel() for part in parts))
    geometry = [(p.shape, p.stride(), end - p.numel()) for p, end in zip(parts, ends, strict=True)]
    about = (alike, kind, ends[-1], geometry)
    if buffers is None or len(pieces) == 1:
        return Batch(pieces, parts, others[0] if others else None, None, *about)
    indices = [piece.index for piece in pieces]
    copy = _Copy.of(indices, [means[index] for index in indices], buffers[kind], alike)
    return Batch(pieces, [_as_one(parts)], _as_one(others) if others else None, copy, *about)


def _pieces(index: int, mean: Tensor, most: int) -> list[_Piece]:
    """The mean in pieces of at most ``most`` elements, or about as many, that lie contiguously in memory.

    Some operations copy what does not: aminmax of channels-last weights would take eight times as long.
    """
    order = _order(mean)
    ordered = mean if order is None else mean.permute(order)
    return [_Piece(index, order, cuts) for cuts in _cut(ordered, most)]


def _order(mean: Tensor) -> tuple[int, ...] | None:
    """Its dimensions as they follow each other in memory; None where that is as they are."""
    if mean.is_contiguous():
        return None
    return tuple(sorted(range(mean.ndim), key=mean.stride, reverse=True))


def _cut(tensor: Tensor, most: int) -> list[tuple[tuple[int, int, int], ...]]:
    """Cuts along the outermost dimensions that leave ``most`` elements, or about as many."""
    if tensor.numel() <= most:
        return [()]
    outermost = next(d for d in range(tensor.ndim) if tensor.shape[d] > 1)
    size = tensor.shape[outermost]
    length = max(most * size // tensor.numel(), 1)
    cuts = ((outermost, start, min(length, size - start)) for start in range(0, size, length))
    return [(cut, *further) for cut in cuts for further in _cut(tensor.narrow(*cut), most)]


def _as_one(neighbours: list[Tensor]) -> Tensor:
    return neighbours[0].as_strided((sum(tensor.numel() for tensor in neighbours),), (1,))


def _place(mean: Tensor) -> tuple[str, int, int]:
    return str(mean.device), mean.untyped_storage().data_ptr(), int(mean.storage_offset())


def _end(mean: Tensor) -> tuple[str, int, int]:
    device, storage, offset = _place(mean)
    return device, storage, offset + mean.numel()


def _kind(tensor: Tensor) -> _Kind:
    return tensor.dtype, tensor.device
