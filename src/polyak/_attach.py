"""Averages that follow an optimizer: one line, and no change in the training loop.

torch's hooks say that a step was taken, but fire twice where a subclass's ``step`` calls its parent's, and not at
all where a step raises. So ``step`` itself is wrapped as well, by an attribute of the optimizer as torch's
schedulers do it: what its outermost call encloses is one step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, update_wrapper
from types import MethodType
from typing import Any, Protocol
from weakref import ref

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from polyak._model import Binding, ModelTensors
from polyak._torch import uncompiled
from polyak.errors import OptionError

__all__ = ["AttachHandle", "Attachment", "attach"]


class Follower(Protocol):
    """What can be attached: :class:`polyak.Average`, a recorder, or anything with such an ``update``."""

    def update(self) -> Any:
        """Called once after each optimizer step that was taken."""


class AttachHandle:
    """Undoes an :func:`attach`; as a context manager it does so on leaving."""

    def __init__(self, steps: _Steps, averages: tuple[Follower, ...]):
        self._steps, self._averages = steps, averages

    def remove(self) -> None:
        """Stop updating; calling it again does nothing."""
        averages, self._averages = self._averages, ()
        if averages:
            self._steps.remove(averages)

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
        optimizer: any torch optimizer, or a wrapper that holds one as ``.optimizer``, as accelerate's does. Where
            several train one model, the one that steps last.
        averages: objects with ``update()``, updated in this order.

    Returns:
        A handle; ``handle.remove()`` ends it.

    Raises:
        OptionError: no optimizer, no averages, an object without ``update()``, one that follows it already, an
            average or recorder that follows another optimizer, or whose model has no parameter that the optimizer
            holds. Nothing is attached then.

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
    optimizers = _nested(optimizer)
    if not averages:
        raise OptionError("attach needs at least one average after the optimizer")
    for average in averages:
        if not callable(getattr(average, "update", None)):
            raise OptionError(f"attach takes averages with an update() method, got {type(average).__name__}")
    steps = _Steps.of(optimizers[-1])
    following = [*steps.followers, *averages]
    if len(set(map(id, following))) < len(following):
        raise OptionError("attach was given the same average twice, which would count each step twice")
    for average in averages:
        _refuse_unfit(average, optimizers)
    steps.add(averages, optimizers)
    return AttachHandle(steps, averages)


class Attachment:
    """What an attached average or recorder keeps of it: who updates it, and on which threads now."""

    def __init__(self, optimizer: ref[Optimizer]):
        self.optimizer = optimizer
        self._updating: list[int] = []

    @property
    def holds(self) -> bool:
        """Whether the optimizer is still there to call anything."""
        return self.optimizer() is not None

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Around an ``update()`` that the optimizer makes."""
        self._updating.append(threading.get_ident())
        try:
            yield
        finally:
            self._updating.remove(threading.get_ident())

    def refuse_by_hand(self, follower: Follower, instead: str = "") -> None:
        """Refuse (``OptionError``) an ``update()`` that the optimizer did not make."""
        if self.holds and threading.get_ident() not in self._updating:
            raise OptionError(
                f"this {type(follower).__name__} is attached to an optimizer, which calls update() after every step: "
                f"a call of your own would count the step twice. Leave it out{instead}, or remove() the handle of "
                "attach first"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # copies of an average are attached to nothing


class _Calls(threading.local):
    """The wrapped ``step`` calls that this thread is inside of, the outermost first, and whether one took a step."""

    entered: tuple[_Step, ...] = ()
    counts = True
    taken = False


# Where an optimizer that is followed has its steps: its own dictionary, of which state dicts know nothing.
_STEPS = "_polyak_steps"


class _Steps:
    """The steps of one optimizer, what follows them, and the hook that torch calls after each."""

    def __init__(self, optimizer: ref[Optimizer]):
        self._optimizer = optimizer
        self.followers: tuple[Follower, ...] = ()
        self.calls = _Calls()
        self._wrapped: list[_Step] = []
        self._hook: RemovableHandle | None = None

    @classmethod
    def of(cls, optimizer: Optimizer) -> _Steps:
        """Those of an optimizer that is followed, or new ones."""
        found = vars(optimizer).get(_STEPS)
        return found if isinstance(found, cls) else cls(ref(optimizer))

    def add(self, followers: tuple[Follower, ...], optimizers: Sequence[Optimizer]) -> None:
        """Update ``followers`` from now on, after each step of the last of ``optimizers``, which the others hold."""
        inner = optimizers[-1]
        if self._hook is None:
            self._hook = inner.register_step_post_hook(self)
            vars(inner)[_STEPS] = self
        for optimizer in optimizers:
            if not any(step.__self__ is optimizer for step in self._wrapped):
                self._wrapped.append(_Step(optimizer, self, is_own=optimizer is inner))
        for follower in followers:
            if _binding(follower) is not None:
                follower._attachment = Attachment(self._optimizer)  # type: ignore[attr-defined]
        self.followers += followers

    def remove(self, followers: tuple[Follower, ...]) -> None:
        """Update ``followers`` no longer; without any, the optimizers are as they were."""
        self.followers = tuple(f for f in self.followers if not any(f is gone for gone in followers))
        for follower in followers:
            attachment = _attachment(follower)
            if attachment is not None and attachment.optimizer is self._optimizer:
                follower._attachment = None  # type: ignore[attr-defined]
        if self.followers or self._hook is None:
            return
        self._hook.remove()
        for step in self._wrapped:
            step.undo()
        if (optimizer := self._optimizer()) is not None:
            del vars(optimizer)[_STEPS]

    @uncompiled
    def update(self) -> None:
        """One step was taken."""
        for follower in self.followers:
            attachment = _attachment(follower)
            if attachment is None:
                follower.update()
            else:
                with attachment.updating():
                    follower.update()

    def __call__(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        if not self.followers or _was_skipped(optimizer):
            return
        if self.calls.entered:
            self.calls.taken = self.calls.counts
            return
        # Somebody kept the step of before, as accelerate does where it scales gradients.
        _refuse_several_steps(optimizer)
        self.update()

    def __reduce__(self) -> tuple[Any, ...]:
        return partial, (_no_hook,)


class _Step:
    """The ``step`` of an optimizer, as an attribute of it, while something follows.

    Args:
        optimizer: whose ``step`` it is; not kept alive.
        steps: told of each outermost call.
        is_own: whether ``optimizer`` takes the steps itself, or holds the one that does.
    """

    def __init__(self, optimizer: Optimizer, steps: _Steps, *, is_own: bool):
        before: Callable[..., Any] | None = vars(optimizer).get("step")
        # With the marks of the one before, by which a scheduler knows its own.
        update_wrapper(self, before or type(optimizer).step)
        self._before = before
        self._optimizer, self._steps, self._is_own = ref(optimizer), steps, is_own
        vars(optimizer)["step"] = self

    @property
    def __self__(self) -> Optimizer | None:
        return self._optimizer()

    @property
    def __func__(self) -> Callable[..., Any]:
        # What schedulers and others that wrap a method call, with the optimizer before the arguments.
        def step(_: Optimizer, *args: Any, **kwargs: Any) -> Any:
            return self(*args, **kwargs)

        return update_wrapper(step, self)

    @uncompiled(recursive=False)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        calls, outer = self._steps.calls, self._steps.calls.entered
        if self in outer:
            return self._take(*args, **kwargs)
        calls.entered, calls.taken = (*outer, self), False
        calls.counts = calls.counts if outer else not self._only_makes_state(kwargs)
        try:
            result = self._take(*args, **kwargs)
            if calls.taken and (self._is_own or not outer):
                self._steps.update()
                calls.taken = False
            return result
        finally:
            calls.entered = outer

    def _only_makes_state(self, kwargs: dict[str, Any]) -> bool:
        """Whether it is no step of training: torch.distributed.checkpoint has optimizers make their state by one.

        It takes it at a learning rate of 0, and says that there is no closure, which nobody who trains does.
        """
        optimizer = self._optimizer()
        if optimizer is None or kwargs != {"closure": None}:
            return False
        return not any(float(group.get("lr", 0)) for group in optimizer.param_groups)

    def undo(self) -> None:
        """Put back what was there; what was put around it since goes on calling it, to no effect."""
        optimizer = self._optimizer()
        if optimizer is None or vars(optimizer).get("step") is not self:
            return
        if self._before is None:
            del vars(optimizer)["step"]
        else:
            vars(optimizer)["step"] = self._before

    def _take(self, *args: Any, **kwargs: Any) -> Any:
        if self._before is not None:
            return self._before(*args, **kwargs)
        optimizer: Any = self._optimizer()
        return type(optimizer).step(optimizer, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _class_step, (self._optimizer(),)


def _no_hook(*_: object) -> None:
    """The hook that copies of an optimizer have, where their class copies attributes."""


def _class_step(optimizer: Optimizer) -> Callable[..., Any]:
    """The ``step`` that they have."""
    return MethodType(type(optimizer).step, optimizer)


def _nested(optimizer: Any) -> list[Optimizer]:
    """The optimizer in wrappers of optimizers, and those that are optimizers themselves, the outermost first."""
    found = [optimizer]
    while isinstance(getattr(found[-1], "optimizer", None), Optimizer):
        found.append(found[-1].optimizer)
    if not isinstance(found[-1], Optimizer):
        raise OptionError(f"attach takes a torch optimizer first, got {type(optimizer).__name__}")
    return [one for one in found if isinstance(one, Optimizer)]


def _binding(follower: Follower) -> Binding | None:
    """How an average or a recorder knows its model; None for what only has an ``update()``."""
    binding = getattr(follower, "_binding", None)
    return binding if isinstance(binding, Binding) else None


def _attachment(follower: Follower) -> Attachment | None:
    attachment = getattr(follower, "_attachment", None)
    return attachment if isinstance(attachment, Attachment) else None


def _refuse_unfit(follower: Follower, optimizers: Sequence[Optimizer]) -> None:
    binding, attachment = _binding(follower), _attachment(follower)
    if binding is None:
        return
    name = type(follower).__name__
    if attachment is not None and attachment.holds:
        raise OptionError(
            f"this {name} is attached to another optimizer, and would count the steps of both. Where both train its "
            "model, attach it to the one that steps last; else remove() the handle of that attach first"
        )
    held = {id(p) for one in optimizers for group in one.param_groups for p in group["params"]}
    # As the model is now: its parameters may have been replaced since the average or the optimizer was made.
    if not any(id(entry.tensor) in held for entry in ModelTensors(binding.model).values()):
        raise OptionError(
            f"the optimizer holds no parameter of the model that this {name} follows, so its steps would count for "
            "weights that it does not train. Attach the optimizer of that model, made after the model was last "
            "changed, as by fully_shard"
        )


def _refuse_several_steps(optimizer: Optimizer) -> None:
    steps = [
        kind.__name__ for kind in type(optimizer).__mro__ if "step" in vars(kind) and kind is not Optimizer
    ]
    if len(steps) > 1:
        raise OptionError(
            f"the step() of {steps[0]} was called as it was before attach, which accelerate does with optimizers "
            f"that were prepared before, and {steps[1]} has one too, so that part of a step may look like a step. "
            "Attach to the optimizer that prepare() returned, or before whatever kept its step()"
        )


def _was_skipped(optimizer: Optimizer) -> bool:
    # GradScaler leaves its verdict on optimizers that scale gradients themselves, for the time of the step.
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)
