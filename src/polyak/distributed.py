"""The few things polyak asks of a process group; every helper is a plain local answer where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from polyak.errors import PolyakError

__all__ = ["all_or_none", "gather", "is_distributed", "is_main_rank", "sum_over_ranks"]


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


def gather(value: Any) -> list[Any]:
    """``value`` of every rank, in rank order, on every rank; a collective call.

    >>> gather("alone")
    ['alone']
    """
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of ``tensor`` over all ranks, with the same bits on every rank; a collective call.

    >>> sum_over_ranks(torch.tensor([1.0, 2.0]))
    tensor([1., 2.])
    """
    if not is_distributed():
        return tensor
    total = tensor.to(_group_device(), copy=True)
    dist.all_reduce(total)
    return total.to(tensor.device)


@contextmanager
def all_or_none(task: str) -> Iterator[None]:
    """Run the body on every rank and leave it successfully on all of them or on none; a collective call.

    The body itself must hold no collective call, so that a rank that failed can leave it early.

    Raises:
        PolyakError: on the ranks that did not fail, naming those that did; the others raise their own error.

    >>> with all_or_none("counting"):
    ...     total = 1 + 1
    """
    failure: BaseException | None = None
    try:
        yield
    except BaseException as error:  # an interrupt too must reach the other ranks, which wait below
        failure = error
    reports = gather(None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    failed = [f"rank {rank} with {report}" for rank, report in enumerate(reports) if report is not None]
    if failed:
        raise PolyakError(
            f"{task} was given up on every rank, because it failed on {'; '.join(failed)}. "
            "Nothing was changed; mend the cause there and call it again on all ranks."
        )


def _group_device() -> torch.device:
    """A device whose tensors the default group can reduce; NCCL, for one, takes none from the CPU."""
    accelerator = torch.accelerator.current_accelerator()
    if "cpu:" in dist.get_backend_config() or accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type)
