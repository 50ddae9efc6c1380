"""A few threads that share one list of work."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import TypeVar

import torch

__all__ = ["run_on_threads"]

Item = TypeVar("Item")


def run_on_threads(make_worker: Callable[[], Callable[[Item], None]], items: Iterable[Item], n: int) -> None:
    """Call ``n`` workers on ``items``, in order, until all are done or one fails.

    Args:
        make_worker: called once in each thread; what it returns is called with one item after the other.
        items: the work.
        n: how many threads; one is that of the caller.

    Raises what the first worker to fail raised, after the others have finished the item they were at; an
    interrupt stops them likewise.
    """
    stop = threading.Event()
    shared = _Shared(items, stop)

    def work() -> None:
        # A slice fits a core's cache; more threads inside torch would take it out again.
        torch.set_num_threads(1)
        worker = make_worker()
        for item in shared:
            worker(item)

    torch_threads = torch.get_num_threads()
    try:
        if n == 1:
            work()
            return
        with ThreadPoolExecutor(n) as pool:
            try:
                with _interrupts_held():
                    jobs = [pool.submit(work) for _ in range(n)]
                for finished in as_completed(jobs):
                    finished.result()
            except BaseException:
                stop.set()
                raise
    finally:
        # What a thread sets is also what threads made later begin with.
        torch.set_num_threads(torch_threads)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Let signals wait: one that falls into the start of a thread leaves it running, and nobody waits for it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Shared(Iterator[Item]):
    """An iterator that several threads may draw from."""

    def __init__(self, items: Iterable[Item], stop: threading.Event) -> None:
        self._items = iter(items)
        self._stop = stop
        self._lock = threading.Lock()

    def __next__(self) -> Item:
        with self._lock:
            if self._stop.is_set():
                raise StopIteration
            return next(self._items)
