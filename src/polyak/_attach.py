"""Averages that follow an optimizer: one line, and no change in the training loop."""

from __future__ import annotations

import sys
import threading
from contextlib import suppress
from types import FrameType
from typing import Any, Protocol
from weakref import WeakSet, ref

from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from polyak.errors import OptionError

__all__ = ["AttachHandle", "attach", "refuse_by_hand"]


class Follower(Protocol):
    """What can be attached: :class:`polyak.Average`, a recorder, or anything with such an ``update``."""

    def update(self) -> Any:
        """Called once after each optimizer step that was taken."""


# What is attached: to the optimizers that call it, as long as they live.
_attached = WeakIdKeyDictionary()


class _Calls(threading.local):
    """What hooks of this thread are updating now, the innermost last."""

    updating: tuple[Follower, ...] = ()


_calls = _Calls()

# An attribute of optimizers: what follows them now. It is no part of their state dicts and copies.
_FOLLOWERS = "_polyak_followers"


class AttachHandle:
    """Undoes an :func:`attach`; as a context manager it does so on leaving."""

    def __init__(
        self, hook: Any, optimizer: Optimizer, following: list[Follower], averages: tuple[Follower, ...]
    ):
        self._hook, self._following, self._averages = hook, following, averages
        self._optimizer = ref(optimizer)

    def remove(self) -> None:
        """Stop updating; calling it again does nothing."""
        self._hook.remove()
        self._following[:] = [
            f for f in self._following if not any(f is average for average in self._averages)
        ]
        for average in self._averages:
            with suppress(TypeError):
                (_attached.get(average) or WeakSet()).discard(self._optimizer())
        self._averages = ()

    def __enter__(self) -> AttachHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def attach(optimizer: Optimizer, *averages: Follower) -> AttachHandle:
    """Call ``update()`` on each average after every step that ``optimizer`` takes.

    A step counts once, also where a subclass's ``step`` calls its parent's and torch's hooks fire twice. A step
    that GradScaler skipped does not count, also with ``fused=True``, where the optimizer runs and leaves the
    weights alone (reading that flag from an accelerator waits for it, with fp16 scaling and fused steps only).
    With gradient accumulation and accelerate's wrapper, steps count, not backward passes. A call of an attached
    average's own ``update()`` is refused then, since it would count a step twice.

    Args:
        optimizer: any torch optimizer, or a wrapper that holds one as ``.optimizer``, as accelerate's does.
        averages: objects with ``update()``, updated in this order.

    Returns:
        A handle; ``handle.remove()`` ends it.

    Raises:
        OptionError: no optimizer, no averages, an object without ``update()``, or one that follows it already.

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
    following = vars(inner).setdefault(_FOLLOWERS, [])
    if len(set(map(id, [*following, *averages]))) < len(following) + len(averages):
        raise OptionError("attach was given the same average twice, which would count each step twice")

    def after_step(stepped: Optimizer, args: object, kwargs: object) -> None:
        if _is_nested(sys._getframe(1), stepped) or _was_skipped(stepped):
            return
        for average in averages:
            before = _calls.updating
            _calls.updating = (*before, average)
            try:
                average.update()
            finally:
                _calls.updating = before

    following += averages
    for average in averages:
        _note_attached(average, inner)
    return AttachHandle(inner.register_step_post_hook(after_step), inner, following, averages)


def _note_attached(follower: Follower, optimizer: Optimizer) -> None:
    # Somebody's class may have no weak references; it asks nothing of refuse_by_hand.
    with suppress(TypeError):
        optimizers = _attached.get(follower) or WeakSet()
        optimizers.add(optimizer)
        _attached[follower] = optimizers


def refuse_by_hand(follower: Follower, instead: str = "") -> None:
    """Refuse (``OptionError``) an ``update()`` that no hook makes, of what a hook updates already."""
    if _attached.get(follower) and not any(updated is follower for updated in _calls.updating):
        raise OptionError(
            f"this {type(follower).__name__} is attached to an optimizer, which calls update() after every step: a "
            f"call of your own would count the step twice. Leave it out{instead}, or remove() the handle of attach "
            "first"
        )


def _is_nested(call: FrameType, optimizer: Optimizer) -> bool:
    """Whether the call of ``step`` that fired a hook runs inside another one of the same optimizer.

    torch wraps ``step`` once a class, so super().step() fires the hooks too, from a frame of the same code.
    """
    outer = call.f_back
    while outer is not None:
        if outer.f_code is call.f_code and any(value is optimizer for value in _arguments(outer)):
            return True
        outer = outer.f_back
    return False


def _arguments(call: FrameType) -> tuple[Any, ...]:
    return call.f_locals.get("args", ())


def _innermost(optimizer: Any) -> Optimizer:
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, Optimizer):
        raise OptionError(f"attach takes a torch optimizer first, got {type(optimizer).__name__}")
    return optimizer


def _was_skipped(optimizer: Optimizer) -> bool:
    # GradScaler leaves its verdict on optimizers that scale gradients themselves, for the time of the step.
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)
