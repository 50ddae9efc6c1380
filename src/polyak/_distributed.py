"""Ranks that do something together, and the part of a sharded tensor that each of them holds.

One process alone is a group as well: its calls are plain local answers.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch.distributed as dist
from torch import Tensor

from polyak import _torch
from polyak._model import is_sharded, shape_of
from polyak.errors import PolyakError, StructureError, name_list

__all__ = [
    "RankGroup",
    "held_runs",
    "is_distributed",
    "is_main_rank",
    "refuse_unplaced",
    "shard_runs",
    "sum_over_ranks",
]

Result = TypeVar("Result")


def is_distributed() -> bool:
    """Whether this process belongs to a default process group of more than one rank.

    >>> is_distributed()
    False
    """
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_main_rank() -> bool:
    """Whether this process is rank 0, or alone.

    >>> is_main_rank()
    True
    """
    return not is_distributed() or dist.get_rank() == 0


class RankGroup:
    """Ranks that do something together: their calls are collective, and plain local answers for one process alone.

    Objects travel through ``group``; None is one process alone.

    >>> RankGroup().gather("alone")
    ['alone']
    """

    def __init__(self, group: Any = None) -> None:
        self._group = group

    @classmethod
    def of_all(cls) -> RankGroup:
        """All ranks of the default group, or this process alone."""
        return cls(dist.group.WORLD if is_distributed() else None)

    @classmethod
    def of(cls, ranks: Sequence[int]) -> RankGroup:
        """These ranks of the default group, in a gloo group of their own; a collective call among them.

        Its calls may be made on another thread than the training's own. It lives as long as the default group: torch
        names a group by its ranks, so that one made after another was taken apart would meet the other's traces.
        """
        return cls(dist.new_group(list(ranks), backend="gloo", use_local_synchronization=True))

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return 1 if self._group is None else dist.get_world_size(self._group)

    @property
    def is_first(self) -> bool:
        """Whether this is the first of them."""
        return self._group is None or dist.get_rank(self._group) == 0

    def gather(self, value: Any) -> list[Any]:
        """``value`` of every rank, in rank order, on every rank.

        Raises:
            PolyakError: a rank was lost.
        """
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.size
        with _lost_ranks_noticed():
            dist.all_gather_object(values, value, group=self._group)
        return values

    def first(self, call: Callable[[], Result]) -> Result:
        """What ``call`` returns on the first rank, where alone it runs; what it raises there is raised on all.

        >>> RankGroup().first(lambda: 2 + 2)
        4
        """
        if self._group is None:
            return call()
        outcome: list[Any] = [None, None]
        if self.is_first:
            try:
                outcome[0] = call()
            except BaseException as error:  # an interrupt too must reach the other ranks, which wait below
                outcome[1] = _sendable(error)
        with _lost_ranks_noticed():
            dist.broadcast_object_list(outcome, group=self._group, group_src=0)
        value, error = outcome
        if error is not None:
            raise error
        return value

    @contextmanager
    def all_or_none(self, task: str) -> Iterator[None]:
        """Run the body on every rank and leave it successfully on all of them or on none.

        The body itself must hold no collective call, so that a rank that failed can leave it early.

        Raises:
            PolyakError: on the ranks that did not fail, naming those that did; the others raise their own error.

        >>> with RankGroup().all_or_none("counting"):
        ...     total = 1 + 1
        """
        failure: BaseException | None = None
        try:
            yield
        except BaseException as error:  # an interrupt too must reach the other ranks, which wait below
            failure = error
        reports = self.gather(None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        failed = [f"rank {rank} with {report}" for rank, report in enumerate(reports) if report is not None]
        if failed:
            raise PolyakError(
                f"{task} was given up on every rank, because it failed on {'; '.join(failed)}. "
                "Nothing was changed; mend the cause there first."
            )


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of ``tensor`` over all ranks, with the same bits on every rank; a collective call.

    >>> import torch
    >>> sum_over_ranks(torch.tensor([1.0, 2.0]))
    tensor([1., 2.])
    """
    if not is_distributed():
        return tensor
    total = tensor.to(_torch.device_of_collectives(), copy=True)
    dist.all_reduce(total)
    return total.to(tensor.device)


def _sendable(error: BaseException) -> BaseException:
    """The error, or where it cannot travel to other ranks, one that says as much."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return PolyakError(f"rank {dist.get_rank()} failed with {type(error).__name__}: {error}")
    return error


@contextmanager
def _lost_ranks_noticed() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:  # gloo has no class of its own for closed connections
        raise PolyakError(
            f"another rank was lost, or did not make the same call ({error}): what was under way did not take effect"
        ) from error


# Which elements of a sharded tensor a rank holds.


def refuse_unplaced(tensors: Mapping[str, Tensor]) -> None:
    """Refuse DTensors of which it cannot be told which rank holds what.

    Raises:
        StructureError: naming the first of them.

    >>> import torch
    >>> refuse_unplaced({"weight": torch.ones(1)})
    """
    sharded: dict[str, Any] = {name: tensor for name, tensor in tensors.items() if is_sharded(tensor)}
    if not sharded:
        return
    from torch.distributed.tensor import Replicate, Shard

    for name, tensor in sharded.items():
        if not all(type(placement) in (Shard, Replicate) for placement in tensor.placements):
            raise StructureError(
                f"{name_list([name])} is placed as {tensor.placements}: only of Shard and Replicate can it be told "
                "which elements a rank holds, so not of a dimension that is sharded twice, as FSDP over tensor "
                "parallelism does; save folders of torch.distributed.checkpoint, which polyak.average_checkpoints and "
                "Trajectory.from_checkpoints read"
            )


def shard_runs(part: Tensor, whole: Tensor, is_first: bool) -> Iterator[tuple[int, Tensor]]:
    """Where the elements of ``part`` lie in the flattened ``whole``: (start, 1-D values), one run after the other.

    Over all ranks every element comes once: of copies on several ranks only the first is given out.

    Args:
        part: what this rank holds of ``whole``, or of something that is distributed as it is.
        whole: a DTensor, or a plain tensor, of which every rank holds a copy.
        is_first: whether this is the rank that gives out plain tensors.

    >>> import torch
    >>> [(start, values.tolist()) for start, values in shard_runs(torch.ones(2, 2), torch.ones(2, 2), is_first=True)]
    [(0, [1.0, 1.0, 1.0, 1.0])]
    """
    if _is_first_copy(whole) if is_sharded(whole) else is_first:
        yield from held_runs(part, whole)


def held_runs(part: Tensor, whole: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The same of all that this rank holds, whichever others hold it as well.

    >>> import torch
    >>> [(start, values.tolist()) for start, values in held_runs(torch.ones(2), torch.ones(2))]
    [(0, [1.0, 1.0])]
    """
    if not is_sharded(whole):
        yield 0, part.reshape(-1)
        return
    offsets = _offsets(part, whole)
    if not part.numel():
        return
    # Dimensions that are held whole, and the first one before them, make one run.
    held = [mine == size for mine, size in zip(part.shape, whole.shape, strict=True)]
    inner = len(held) - next((i for i, is_whole in enumerate(reversed(held)) if not is_whole), len(held))
    outer = max(inner - 1, 0)
    length = math.prod(part.shape[outer:])
    places = [np.arange(size) + offset for size, offset in zip(part.shape[:outer], offsets, strict=False)]
    strides = [math.prod(whole.shape[dim + 1 :]) for dim in range(whole.ndim)]
    within = offsets[outer] * strides[outer] if whole.ndim else 0
    starts = sum(
        (place.reshape(-1, *[1] * (outer - 1 - dim)) * strides[dim] for dim, place in enumerate(places)),
        np.array(within),
    )
    yield from zip(np.ravel(starts).tolist(), part.reshape(-1, length), strict=True)


def _is_first_copy(whole: Any) -> bool:
    """Whether no rank before this one holds the same part."""
    places = zip(whole.placements, whole.device_mesh.get_coordinate(), strict=True)
    return not any(place for kind, place in places if kind.is_replicate())


def _offsets(part: Tensor, whole: Any) -> list[int]:
    """Where this rank's part begins in each dimension.

    ``Shard`` cuts as torch.chunk does, one dimension of the mesh after the other.
    """
    from torch.distributed.tensor import Shard

    mesh, sizes, offsets = whole.device_mesh, list(whole.shape), [0] * whole.ndim
    nth = mesh.get_coordinate()
    for kind, place, n_parts in zip(whole.placements, nth, mesh.shape, strict=True):
        if isinstance(kind, Shard):
            most = -(-sizes[kind.dim] // n_parts)
            start = min(place * most, sizes[kind.dim])
            offsets[kind.dim] += start
            sizes[kind.dim] = min(most, sizes[kind.dim] - start)
    if tuple(sizes) != tuple(part.shape):
        raise StructureError(
            f"this rank holds {tuple(part.shape)} of a tensor of {shape_of(whole)}, not the {tuple(sizes)} that its "
            "placements mean: it cannot be told which part that is"
        )
    return offsets
