"""How the memory that ``combine`` may take is spent: buffers for slices, threads, and a reserve for the rest."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from polyak.checkpoints import Checkpoint
from polyak.errors import OptionError

__all__ = ["Budget", "parse_bytes"]

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY_UNITS = {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", re.IGNORECASE)

# A slice and its running sum stay in the cache while every input passes through; larger ones bring nothing more.
_BEST_SLICE_BYTES = 1 << 22
_LEAST_SLICE_BYTES = 1 << 16
# More threads than this wait for memory, not for each other's turn.
_BEST_WORKERS = 2
# Modules loaded on first use, thread stacks, the allocator's slack.
_RESERVE_BYTES = 16_000_000
# What the description of one tensor takes in an opened checkpoint and while headers are compared.
_BYTES_PER_DESCRIPTION = 1_000
# Per worker and beside one sum per output: values as read, as summed, their difference, as written.
_BUFFERS_BESIDE_SUMS = 4


def parse_bytes(size: int | str) -> int:
    """A number of bytes, from a number or from text such as ``"512MB"`` (10**6) or ``"2GiB"`` (2**30).

    Raises ``OptionError`` for anything else.

    >>> parse_bytes("512MB"), parse_bytes("1.5 GiB"), parse_bytes(4096)
    (512000000, 1610612736, 4096)
    """
    if isinstance(size, int) and not isinstance(size, bool):
        return size
    found = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if found is None:
        raise OptionError(f"cannot read {size!r} as a size in bytes: write 512MB, 2GiB or a whole number")
    return int(float(found[1]) * (_UNITS | _BINARY_UNITS)[found[2].upper()])


@dataclass(frozen=True)
class Budget:
    """How many threads take how large slices, and the memory that this and everything beside it comes to.

    Attributes:
        workers: threads that read, sum and write.
        slice_bytes: size of each of a worker's buffers.
        total_bytes: the most memory in use, at or below what was allowed.
    """

    workers: int
    slice_bytes: int
    total_bytes: int

    @classmethod
    def within(
        cls,
        max_memory: int | str,
        inputs: Sequence[Checkpoint],
        n_outputs: int,
        most_workers: int | None = None,
    ) -> Budget:
        """The fastest that fits. Raises ``OptionError``, with the least possible, where nothing does."""
        buffers = n_outputs + _BUFFERS_BESIDE_SUMS
        fixed_bytes = _RESERVE_BYTES + sum(map(_held_bytes, inputs))
        max_bytes = parse_bytes(max_memory)
        workers = min(most_workers or _BEST_WORKERS, _usable_cores())
        slice_bytes = _BEST_SLICE_BYTES
        while fixed_bytes + workers * buffers * slice_bytes > max_bytes:
            if slice_bytes > _LEAST_SLICE_BYTES:
                slice_bytes //= 2
            elif workers > 1:
                workers -= 1
            else:
                least = (fixed_bytes + buffers * slice_bytes) // 10**6 + 1
                raise OptionError(
                    f"max_memory of {max_memory!r} is too little for {len(inputs)} inputs and {n_outputs} "
                    f"outputs: allow {least}MB or more{_cause(inputs)}"
                )
        return cls(workers, slice_bytes, fixed_bytes + workers * buffers * slice_bytes)


def _held_bytes(checkpoint: Checkpoint) -> int:
    values = 0 if checkpoint.is_lazy else sum(info.nbytes for info in checkpoint.tensors.values())
    return values + _BYTES_PER_DESCRIPTION * len(checkpoint.tensors)


def _cause(inputs: Sequence[Checkpoint]) -> str:
    whole = [str(checkpoint.path) for checkpoint in inputs if not checkpoint.is_lazy]
    if not whole:
        return ""
    return f" ({whole[0]} is in an old torch format that must be loaded whole: save it again with torch.save)"


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
