"""How a recording keeps out of the way: how long blocks are, which of them merge, and the thread that writes them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

__all__ = ["BackgroundWriter", "Pace", "block_steps_after", "pair_to_merge"]

# Which neighbours merge, and how long blocks are: pure functions of lengths and times.

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
    if min(allowed_seconds, write_seconds) <= 0:  # a clock that stood still, or was set back
        return least_steps
    doublings = max(0, math.ceil(math.log2(write_seconds / allowed_seconds)))
    return least_steps << doublings


# The times that a run takes.


class Pace:
    """Measures training and writing, and says what block length they come to.

    Args:
        least_steps: the shortest block, in optimizer steps; others are this one doubled.
    """

    def __init__(self, least_steps: int):
        self._least_steps = least_steps
        self._write_seconds: float | None = None
        self._seconds_per_step: float | None = None
        self.restart()

    def restart(self) -> None:
        """Forget when the last steps were taken: something else than training comes between."""
        self._began: float | None = None
        self._steps = 0

    def tick(self) -> None:
        """Count a step; time runs from the first one on."""
        if self._began is None:
            self._began = time.perf_counter()
        else:
            self._steps += 1

    def stop(self) -> None:
        """Take the time of the steps since the last restart."""
        if self._began is not None and self._steps:
            self._seconds_per_step = (time.perf_counter() - self._began) / self._steps
        self.restart()

    def wrote(self, seconds: float | None) -> None:
        """Take the time that a block took to write, None if none was written."""
        if seconds is not None:
            # The fastest counts: one that the disk kept waiting must not make all blocks long.
            self._write_seconds = min(seconds, self._write_seconds or seconds)

    def block_steps(self) -> int:
        """The block length that the times so far come to."""
        if self._write_seconds is None or self._seconds_per_step is None:
            return self._least_steps
        return steps_worth_writing(self._least_steps, self._seconds_per_step, self._write_seconds)

    def __str__(self) -> str:
        seconds = (self._seconds_per_step or 0) * self.block_steps()
        return f"{seconds:.3g} s to train and {self._write_seconds or 0:.3g} s to write"


# One job at a time on a thread beside the training.


class BackgroundWriter:
    """Runs jobs one after the other; whoever hands in the next waits for the one before.

    An error in a job is raised by the next call, and by every call after it: what was to be written is lost,
    and nothing later may be written as if it were not. A job that runs when the interpreter ends is finished.

    >>> writer = BackgroundWriter()
    >>> written = []
    >>> writer.submit(lambda: written.append("block"))
    >>> seconds = writer.wait()
    >>> written
    ['block']
    >>> writer.stop()
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="polyak-writer")
        self._job: Future[float] | None = None

    def submit(self, job: Callable[[], object]) -> None:
        """Start ``job`` once the one before has ended."""
        self.wait()
        self._job = self._pool.submit(_timed, job)

    def wait(self) -> float | None:
        """Wait for the job under way; the seconds that the last one took, None before the first."""
        return None if self._job is None else self._job.result()

    def raise_if_failed(self) -> None:
        """Raise the error of a job that has failed, without waiting for one under way."""
        if self._job is not None and self._job.done():
            self._job.result()

    def stop(self) -> None:
        """End the thread, after the job under way; no job may follow."""
        self._pool.shutdown()


def _timed(job: Callable[[], object]) -> float:
    started = time.perf_counter()
    job()
    return time.perf_counter() - started
