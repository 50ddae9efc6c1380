"""How long a block has to be, so that writing it costs less than training it."""

from __future__ import annotations

import time

from polyak.trajectory.policy import steps_worth_writing

__all__ = ["Pace"]


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
