"""Averages that follow an optimizer: one line, and no change in the training loop."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any, Protocol

from torch.optim import Optimizer

from polyak.errors import OptionError

__all__ = ["AttachHandle", "attach"]


class Follower(Protocol):
    """What can be attached: :class:`polyak.Average`, a recorder, or anything with such an ``update``."""

    def update(self) -> Any:
        """Called once after each optimizer step that was taken."""


class AttachHandle:
    """Undoes an :func:`attach`; as a context manager it does so on leaving."""

    def __init__(self, hooks: list[Any]):
        self._hooks = hooks

    def remove(self) -> None:
        """Stop updating; calling it again does nothing."""
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> AttachHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def attach(optimizer: Optimizer, *averages: Follower) -> AttachHandle:
    """Call ``update()`` on each average after every step that ``optimizer`` takes.

    A step counts once, also where a subclass's ``step`` calls its parent's and torch's hooks fire twice. A step
    that GradScaler skipped does not count, also with ``fused=True``, where the optimizer runs and leaves the
    weights alone (reading that flag from an accelerator waits for it, with fp16 scaling and fused steps only).
    With gradient accumulation and accelerate's wrapper, steps count, not backward passes.

    Args:
        optimizer: any torch optimizer, or a wrapper that holds one as ``.optimizer``, as accelerate's does.
        averages: objects with ``update()``, updated in this order.

    Returns:
        A handle; ``handle.remove()`` ends it.

    Raises:
        OptionError: no optimizer, no averages, or an object without ``update()``.

    >>> import torch, polyak
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> ema = polyak.Average(model, polyak.EMA(decay=0.9))
    >>> handle = polyak.attach(optimizer, ema)
    >>> for _ in range(3):
    ...     optimizer.zero_grad()
    ...     model(torch.ones(1, 2)).sum().backward()
    ...     optimizer.step()
    >>> ema.n_averaged
    3
    >>> handle.remove()
    """
    inner = _innermost(optimizer)
    if not averages:
        raise OptionError("attach needs at least one average after the optimizer")
    for average in averages:
        if not callable(getattr(average, "update", None)):
            raise OptionError(f"attach takes averages with an update() method, got {type(average).__name__}")
    hooks = _StepHooks(averages)
    return AttachHandle(
        [inner.register_step_pre_hook(hooks.before), inner.register_step_post_hook(hooks.after)]
    )


class _StepHooks:
    """Tells the outermost call of ``step`` from those nested in it.

    torch wraps ``step`` once a class, so super().step() fires the hooks again, from a frame of its own. The
    outermost frame is remembered rather than a depth counted: after a step that raised, a count would be off
    for good, while a frame that is no longer on the stack is known to be over.
    """

    def __init__(self, averages: tuple[Follower, ...]):
        self._averages = averages
        self._outermost: FrameType | None = None

    def before(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        caller = sys._getframe(1)
        if self._outermost is None or not _is_running(self._outermost, caller):
            self._outermost = caller

    def after(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        if sys._getframe(1) is not self._outermost:
            return
        self._outermost = None
        if _was_skipped(optimizer):
            return
        for average in self._averages:
            average.update()


def _innermost(optimizer: Any) -> Optimizer:
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, Optimizer):
        raise OptionError(f"attach takes a torch optimizer first, got {type(optimizer).__name__}")
    return optimizer


def _is_running(frame: FrameType, caller: FrameType | None) -> bool:
    while caller is not None:
        if caller is frame:
            return True
        caller = caller.f_back
    return False


def _was_skipped(optimizer: Optimizer) -> bool:
    # GradScaler leaves its verdict on optimizers that scale gradients themselves, for the time of the step.
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)
