"""One job at a time on a thread beside the training."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

__all__ = ["BackgroundWriter"]


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
