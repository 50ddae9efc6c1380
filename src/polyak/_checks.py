"""What is refused everywhere in the same words: states of other objects, and extras that are not installed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

from torch import Tensor

from polyak._model import is_sharded
from polyak.errors import MissingExtraError, StateError, name_list

__all__ = ["refuse_other_state", "require"]

# Optional dependencies: imported where they are used, and asked for politely where they are missing.


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import ``module``, which the optional dependencies ``polyak[extra]`` bring.

    Raises:
        MissingExtraError: if it is not installed; the message says who needs it and the pip command.

    >>> require("no_such_module", extra="demo", purpose="drawing figures")
    Traceback (most recent call last):
    polyak.errors.MissingExtraError: drawing figures needs no_such_module, which is not installed:
    pip install 'polyak[demo]'
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        # An installed module that lacks something of its own is that module's fault to report.
        if error.name != module.partition(".")[0]:
            raise
        raise MissingExtraError(
            f"{purpose} needs {error.name}, which is not installed: pip install 'polyak[{extra}]'"
        ) from error


# Refusing a saved state that belongs to something else, before anything is loaded.


def refuse_other_state(current: Mapping[str, Any], state: Mapping[str, Any], options: Iterable[str]) -> None:
    """Compare a saved state with the present one of the object that is to take it up.

    Args:
        current: the object's own state.
        state: the saved one.
        options: the keys whose values must be equal.

    Raises:
        StateError: keys, options, names, shapes or dtypes differ; the message says which.

    >>> refuse_other_state({"scheme": "uniform"}, {"scheme": "ema:decay=0.9"}, options=["scheme"])
    Traceback (most recent call last):
    polyak.errors.StateError: the state was saved with scheme='ema:decay=0.9', but this has scheme='uniform';
    nothing was loaded
    """
    lacking = [key for key in current if key not in state]
    unknown = [key for key in state if key not in current]
    if lacking or unknown:
        raise StateError(
            f"this is not a state of the kind expected: it lacks {name_list(lacking) or 'nothing'} and has "
            f"{name_list(unknown) or 'nothing'} besides; nothing was loaded"
        )
    other = [key for key in options if current[key] != state[key]]
    if other:
        saved = ", ".join(f"{key}={state[key]!r}" for key in other)
        here = ", ".join(f"{key}={current[key]!r}" for key in other)
        raise StateError(f"the state was saved with {saved}, but this has {here}; nothing was loaded")
    for key, value in current.items():
        if isinstance(value, Mapping):
            _refuse_other_tensors(key, value, state[key])


def _refuse_other_tensors(key: str, current: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    complaints = []
    if missing := [name for name in current if name not in saved]:
        complaints.append(f"it lacks {name_list(missing)}")
    if added := [name for name in saved if name not in current]:
        complaints.append(f"it has {name_list(added)} besides")
    if other := [name for name in current if name in saved and _kind(current[name]) != _kind(saved[name])]:
        first = other[0]
        complaints.append(
            f"shape or dtype differ for {name_list(other)} (saved {_kind(saved[first])}, here {_kind(current[first])})"
        )
    if complaints:
        raise StateError(f"the saved {key} does not fit: {'; '.join(complaints)}; nothing was loaded")


def _kind(tensor: Tensor) -> str:
    split = ", sharded" if is_sharded(tensor) else ""
    return f"{tuple(tensor.shape)} {tensor.dtype}{split}"
