"""What polyak uses of torch that torch does not document: in one place, and looked for before it is relied upon.

Where a release of torch lacks one of these, a slower public way takes its place, or using it is a
:class:`PolyakError` that says so; never a wrong number. All other code keeps to torch's public names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from polyak.errors import PolyakError

__all__ = ["optimizer_hooks", "reason_not_loaded", "refuse_unseen_conversions", "uncompiled"]


def _refuse_without(holder: object, *names: str) -> None:
    kind = holder if isinstance(holder, type) else type(holder)
    for name in names:
        if not hasattr(holder, name):
            raise PolyakError(
                f"torch {torch.__version__} has no {kind.__qualname__}.{name}, without which polyak cannot tell what "
                "a model holds; use a newer polyak, or an older torch"
            )


# Modules


@cache
def refuse_unseen_conversions() -> None:
    """Refuse (:class:`PolyakError`) a torch whose ``Module.float()`` and the like do not go through ``_apply``.

    A module that has to know of them overrides it, as torch's own recurrent layers do.
    """
    seen: list[nn.Module] = []

    class Converted(nn.Module):
        def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> nn.Module:
            seen.append(self)
            return self

    child = Converted()
    nn.Sequential(child).float()
    if seen != [child]:
        raise PolyakError(
            f"torch {torch.__version__} converts modules without Module._apply, so AveragedModel would round its means "
            "unseen; use polyak.Average, a newer polyak, or an older torch"
        )


# Compilation

# The decorator for what must run as it stands inside a compiled training step. The public one does the same, but
# loads the compiler, which takes seconds, when it decorates rather than when it has something to do.
uncompiled: Callable[..., Any] = getattr(torch, "_disable_dynamo", torch.compiler.disable)

# Optimizers


def optimizer_hooks(optimizer: Optimizer, when: str) -> Iterable[Callable[..., Any]]:
    """The hooks that were registered ``"state_dict_pre"``, …; torch calls them, but does not list them.

    >>> from torch.optim import SGD
    >>> list(optimizer_hooks(SGD([torch.zeros(1)]), "load_state_dict_post"))
    []
    """
    name = f"_optimizer_{when}_hooks"
    _refuse_without(optimizer, name)
    hooks: Mapping[int, Callable[..., Any]] = getattr(optimizer, name)
    return list(hooks.values())


# Reading torch's files

# Words of torch.load's messages, which are otherwise a page of advice.
_FORBIDDEN = re.compile(r"GLOBAL (\S+)")
_REASON = "WeightsUnpickler error:"


def reason_not_loaded(error: Exception) -> tuple[str | None, str]:
    """What a file would need that ``torch.load(weights_only=True)`` refuses, or None; and its reason in few words.

    Where torch words its messages anew, the reason is the beginning of the message.

    >>> reason_not_loaded(RuntimeError("WeightsUnpickler error: Unsupported global: GLOBAL os.system"))
    ('os.system', 'Unsupported global: GLOBAL os.system')
    """
    forbidden = _FORBIDDEN.search(str(error))
    reason = str(error).rpartition(_REASON)[2].strip().split("\n", 1)[0][:200]
    return forbidden and forbidden[1], reason or type(error).__name__
