"""How long blocks are, and which neighbours merge: pure functions of lengths.

With at most 64 blocks, any block that ends d steps before the end of a run of T steps is at most
max(base, 0.131 (d + 0.02 T)) long, where base is the length of a new block and at most T/512 once the run is
longer than 1,024 first blocks; in general 8.4/max_blocks stands for 0.131, from 32 blocks on. So blocks are
fine at the end of the run, where averages look closest, and in proportion to their age before. A million first
blocks cost about 12 thousand writes, merges included: a run of T steps has 1,024 + 512 log2(T / (1,024 first))
blocks, each merged away once.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np

__all__ = ["block_steps_after", "pair_to_merge", "steps_worth_writing"]

# Resolution stops rising within the last 2% of the run; finer blocks there would cost more writes, and coarser
# ones everywhere else.
_AGE_FLOOR = 0.02
_MOST_BASE_BLOCKS = 1024
# The part of the time spent on training a block that writing it may take, on a thread of its own.
_WRITE_SHARE = 0.02


def pair_to_merge(lengths: Sequence[int], max_blocks: int, kept: Collection[int] = ()) -> int | None:
    """Which block is to merge with the next one, so that no more than ``max_blocks`` remain.

    The pair with the smallest (len_i + len_{i+1}) / (age + 0.02 T) merges, where age is how far the pair's end
    lies before the end of the run, and T is the length of the run.

    Args:
        lengths: of the blocks in optimizer steps, oldest first.
        max_blocks: how many may remain.
        kept: the i whose border with i + 1 must stay.

    Returns:
        i, for blocks i and i + 1, or None where nothing has to merge, or nothing can.

    >>> pair_to_merge([10] * 5, max_blocks=4)
    0
    >>> pair_to_merge([10] * 5, max_blocks=4, kept={0})
    1
    """
    if len(lengths) <= max_blocks:
        return None
    stops = np.cumsum(lengths, dtype=np.float64)
    run = stops[-1]
    pairs = np.add(lengths[:-1], lengths[1:])
    coarseness = pairs / (run - stops[1:] + _AGE_FLOOR * run)
    coarseness[list(kept)] = math.inf
    best = int(np.argmin(coarseness))
    return best if math.isfinite(coarseness[best]) else None


def block_steps_after(recorded_steps: int, first_block_steps: int) -> int:
    """The length of a block that begins after ``recorded_steps``: doubled whenever 1,024 of them are exceeded.

    >>> [block_steps_after(steps, first_block_steps=10) for steps in (0, 10_239, 10_240, 20_480)]
    [10, 10, 20, 40]
    """
    doublings = 0
    while recorded_steps >= _MOST_BASE_BLOCKS * first_block_steps << doublings:
        doublings += 1
    return first_block_steps << doublings


def steps_worth_writing(least_steps: int, seconds_per_step: float, write_seconds: float) -> int:
    """``least_steps``, doubled until a block takes 50 times longer to train than to write.

    >>> steps_worth_writing(4, seconds_per_step=0.01, write_seconds=0.1)
    512
    """
    allowed_seconds = _WRITE_SHARE * least_steps * seconds_per_step
    doublings = max(0, math.ceil(math.log2(write_seconds / allowed_seconds)))
    return least_steps << doublings
