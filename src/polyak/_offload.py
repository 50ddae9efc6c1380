"""Weights of an accelerator on their way to means on the host, while training goes on.

A sample is copied into pinned memory on a stream of its own, and folded in by a thread once it is there; one is under
way at most. Until its copy is done the weights must stay as they are: whoever is about to write them, the optimizers
before each step above all, has the stream that computes wait for the copy by :func:`fence`, while the host waits for
nothing.

No accelerator has run this yet: the tests take the same way, with a stand-in for its streams.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from polyak import _torch
from polyak._batches import allocate

__all__ = ["Offload", "fence"]

# Called with the sample on the host, and whether it is to be left out.
Fold = Callable[[list[Tensor], bool], object]


class SideStream:
    """A stream of an accelerator beside those that compute; on a device that has none, copies block."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream: torch.Stream | None = None
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is not None and accelerator.type == device.type:
            with suppress(RuntimeError):
                self._stream = torch.Stream(device)

    def copy(self, targets: list[Tensor], sources: list[Tensor]) -> Any:
        """Queue copies behind what the device was given to compute so far; an event, None where they are done."""
        if self._stream is None:
            _torch.foreach_copy_(targets, sources)
            return None
        self._stream.wait_stream(torch.accelerator.current_stream(self._device))
        with self._stream:
            _torch.foreach_copy_(targets, sources, True)  # which the host does not wait for
        return self._stream.record_event()

    def hold_back(self, copied: Any) -> None:
        """Have what is given to the device to compute from now on wait for an event of :meth:`copy`."""
        torch.accelerator.current_stream(self._device).wait_event(copied)


class Offload:
    """One sample under way from an accelerator to the host.

    Its place on the host is as large as the weights are in their dtype, and of pinned memory where there is any,
    of which torch takes powers of two for each large tensor. Accumulators that take turns may share one.

    A sample is copied while training goes on only once it was seen that nothing but optimizers writes the weights: for
    the first one the host waits, and looks whether they were changed when the next step begins.
    """

    def __init__(self) -> None:
        self._staging: list[Tensor] = []
        self._staged: list[object] = []  # what it was made for
        self._streams: dict[torch.device, SideStream] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._process_id = 0  # of the pool
        self._job: _Job | None = None
        self._copies: list[tuple[SideStream, Any]] = []
        self._sources: list[Tensor] = []  # their memory must not be given to others before they are copied
        self._versions: list[int] = []
        self._is_watched = False  # whether the sources were written since is still to be looked at
        self._only_optimizers_write: bool | None = None  # not known yet

    def __reduce__(self) -> tuple[type[Offload], tuple[()]]:
        """Copies have nothing under way: whoever copies its owner joins first."""
        return Offload, ()

    def staging(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Where on the host a sample of such tensors is put; the same place for as long as they lie alike."""
        described: list[object] = [(t.shape, t.dtype, t.device, t.stride()) for t in tensors]
        if described != self._staged:
            self._staging = []  # before there are others
            self._staging = _on_host([*tensors, torch.zeros(())])  # the last is for the verdict
            self._staged = described
        return self._staging[:-1]

    def send(
        self, tensors: Sequence[Tensor], refused: Tensor | None, fold: Fold, *, overlaps: bool = False
    ) -> None:
        """Have ``fold`` called with copies of the tensors as they are now.

        Args:
            tensors: of accelerators, all those that a sample is of.
            refused: a 0-dim tensor of one of their devices, not 0 where the sample is to be left out; None: it is not.
            fold: called once, on another thread where it ``overlaps``.
            overlaps: whether to come back before it was; what it raises is then raised by :meth:`join`.
        """
        self.join()
        meanwhile = overlaps and self._only_optimizers_write is not False
        if meanwhile:
            self._be_held_back()
        places = self._staging[:-1] or self.staging(tensors)
        pairs = list(zip(places, tensors, strict=True))
        verdict = None
        if refused is not None:
            verdict = self._staging[-1]
            pairs.append((verdict, refused))
        self._sources = [source.detach() for _, source in pairs]
        self._versions, self._is_watched = _torch.versions(self._sources), meanwhile
        self._copies = list(self._copied([place for place, _ in pairs]))
        job = _Job(partial(_fold_copied, [copied for _, copied in self._copies], verdict, places, fold))
        self._job = job
        if meanwhile and self._only_optimizers_write:
            self._begin(job)
            return
        job.run()
        if not meanwhile or job.error is not None:
            self.join()

    def _be_held_back(self) -> None:
        """Before there is anything: an interrupt must leave no copy that nobody waits for."""
        _hook_into_optimizers()
        with _gate:
            _under_way.add(self)

    def _begin(self, job: _Job) -> None:
        if self._pool is None or self._process_id != os.getpid():  # a child that was forked has no threads
            self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="polyak-offload")
            self._process_id = os.getpid()
        # At the end of a process no thread begins any more; whoever joins does it then.
        with suppress(RuntimeError):
            self._pool.submit(job.run)

    def _copied(self, targets: list[Tensor]) -> Iterator[tuple[SideStream, Any]]:
        for device in {source.device for source in self._sources}:
            here = [n for n, source in enumerate(self._sources) if source.device == device]
            if device not in self._streams:
                self._streams[device] = SideStream(device)
            stream = self._streams[device]
            copied = stream.copy([targets[n] for n in here], [self._sources[n] for n in here])
            if copied is not None:
                yield stream, copied

    def hold_back(self, *, at_step: bool) -> None:
        """Have what is given to the devices from now on wait for the copy under way; the host does not."""
        for stream, copied in self._copies:
            stream.hold_back(copied)
        self._look_for_writes(at_step)

    def _look_for_writes(self, at_step: bool = False) -> None:
        if not self._is_watched:
            return
        self._is_watched = False
        trusted, written = self._only_optimizers_write, _torch.versions(self._sources) != self._versions
        if written or at_step:
            self._only_optimizers_write = not written
        if written and trusted:
            warnings.warn(
                "the model's weights were changed between a step of the optimizer and the next, while they were copied "
                "to the host, so that one sample of the average may hold some of the new ones. From now on each update "
                "waits for its copy. Change weights before the step, or leave attach() out and call update() yourself",
                UserWarning,
                stacklevel=3,
            )

    def join(self) -> None:
        """Wait until nothing is under way, and raise the error of what was."""
        job = self._job
        if job is None:
            return
        self._look_for_writes()
        job.run()
        self._job, self._copies, self._sources = None, [], []
        with _gate:
            _under_way.discard(self)
        if job.error is not None:
            raise job.error

    def settle(self) -> None:
        """Wait until nothing is under way; what went wrong is for :meth:`join`."""
        if self._job is not None:
            self._job.run()


def _on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    places = [tensor.dtype for tensor in tensors], [torch.device("cpu")] * len(tensors)
    try:
        return allocate(tensors, *places, pinned=True)
    except RuntimeError:  # where there is none, or no more
        return allocate(tensors, *places)


class _Job:
    """Something to be done once, by whoever comes first; others wait until it is done."""

    def __init__(self, work: Callable[[], object]):
        self._work: Callable[[], object] | None = work
        self._gate = threading.Lock()
        self.error: BaseException | None = None

    def run(self) -> None:
        """Do it if nobody has begun; it is done when this returns."""
        if self._work is None:  # a child that was forked may have the gate shut by a thread that is not there
            return
        with self._gate:
            if self._work is None:
                return
            try:
                self._work()
            except BaseException as error:
                self.error = error
            finally:
                self._work = None


@torch.no_grad()
def _fold_copied(events: list[Any], verdict: Tensor | None, sample: list[Tensor], fold: Fold) -> None:
    for copied in events:
        copied.synchronize()
    fold(sample, verdict is not None and bool(verdict))


# Those whose sample may not be copied yet.
_under_way: WeakSet[Offload] = WeakSet()
_gate = threading.RLock()  # which whoever did not shut it cannot open


def _all_under_way() -> list[Offload]:
    with _gate:
        return list(_under_way)


def fence(*, at_step: bool = False) -> None:
    """To be called before live weights are written: what is queued from now on waits for the copies under way.

    Args:
        at_step: whether an optimizer's step is to write them.
    """
    for offload in _all_under_way():
        offload.hold_back(at_step=at_step)


@cache
def _hook_into_optimizers() -> None:
    _torch.before_optimizer_steps(partial(fence, at_step=True))


def _settle_all() -> None:
    for offload in _all_under_way():
        offload.settle()


def _before_fork() -> None:
    """Nobody would do what is under way in a child, nor open the gate that another thread had shut."""
    _gate.acquire()
    _settle_all()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_gate.release, after_in_child=_gate.release)
