"""What is refused everywhere in the same words: numbers out of range, other names and shapes, other states, and
extras that are not installed. Warnings, which point at the user's own line.

It needs no torch, so that profiles are checked without waiting for it.
"""

from __future__ import annotations

import inspect
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from importlib import import_module
from numbers import Integral, Real
from types import ModuleType
from typing import Any, Self, TypeVar

from polyak.errors import MissingExtraError, OptionError, StateError, name_list, shown

__all__ = [
    "TOO_MANY",
    "Difference",
    "checked",
    "refuse_other_state",
    "require",
    "warn_user",
    "whole_within",
    "within",
]

# What lies between a line of a user's and what it makes polyak do.
_BETWEEN = {"polyak", "contextlib", "functools", "torch", "lightning", "pytorch_lightning"} | {
    "transformers",
    "accelerate",
    "peft",
    "trl",
}


def warn_user(message: str) -> None:
    """A ``UserWarning`` at the line that called polyak, through whatever framework it did."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)


# Numbers and their range.

# Steps and samples, of which no run has so many; recordings have 12 digits for them in the names of files.
TOO_MANY = 10**12


def within(interval: str, name: str, value: object) -> float:
    """``value`` as a float, refused unless it lies in ``interval``, given as it is shown: ``"(0, 1]"``.

    >>> within("(0, 1]", "fraction", 2)
    Traceback (most recent call last):
    polyak.errors.OptionError: fraction must be a number in (0, 1], got 2
    """
    number = _as_float(value)
    if not _lies_in(interval, number):
        raise OptionError(f"{name} must be a number in {interval}, got {shown(value)}")
    return number


def whole_within(interval: str, name: str, value: object) -> int:
    """``value`` as an int, refused unless it is a whole number in ``interval``.

    >>> whole_within("[1, inf)", "steps", 2.5)
    Traceback (most recent call last):
    polyak.errors.OptionError: steps must be a whole number in [1, inf), got 2.5
    """
    number = math.nan if isinstance(value, bool) else _as_float(value)
    if not (_lies_in(interval, number) and number.is_integer()):
        raise OptionError(f"{name} must be a whole number in {interval}, got {shown(value)}")
    return int(value) if isinstance(value, Integral) else int(number)  # not every int is a float


def _as_float(value: object) -> float:
    try:
        return float(value) if isinstance(value, Real) else math.nan
    except OverflowError:  # an int beyond the largest float
        return math.nan


def _lies_in(interval: str, number: float) -> bool:
    low, high = map(float, interval[1:-1].split(","))
    above = number > low or (interval[0] == "[" and number == low)
    return above and (number < high or (interval[-1] == "]" and number == high))


# Arguments of another type than a signature says.

Call = TypeVar("Call", bound=Callable[..., Any])

# What the parts of an annotation stand for; numbers are looked at by who uses them, and what is not here by nobody.
_TESTS: Mapping[str, Callable[[Any], bool]] = {
    "None": lambda value: value is None,
    "str": lambda value: isinstance(value, str),
    "PathLike": lambda value: isinstance(value, os.PathLike),
    "Path": lambda value: isinstance(value, os.PathLike),
    "bool": lambda value: isinstance(value, bool) or type(value).__name__ == "bool_" or value in (0, 1),
    "Callable": callable,
    "Iterable": lambda value: hasattr(value, "__iter__") or hasattr(value, "__getitem__"),
    "Sequence": lambda value: hasattr(value, "__len__") and hasattr(value, "__getitem__"),
    "Mapping": lambda value: isinstance(value, Mapping),
    "dict": lambda value: isinstance(value, Mapping),
    "Optimizer": lambda value: hasattr(value, "param_groups"),
}
_PATHS = "Iterable[str | PathLike[str]] | str | PathLike[str]"
_ALIASES = {
    "ScoreFunction": "Callable",
    "LossFunction": "Callable",
    "Prepare": "Callable",
    "Progress": "Callable",
}
# Whose elements are looked at: a loader might take hours.
_GONE_THROUGH = ("list", "tuple", "set", "dict", "bytes", "Tensor")


def checked(call: Call) -> Call:
    """Refuse arguments that are not of the types in the signature, and paths that no system takes, before the call.

    beartype would do the types alone, in several lines about hints ("parameter path=3 violates type hint
    str | os.PathLike[str]"), and leave paths, devices and what is only like a sequence to code of our own.

    >>> @checked
    ... def read(path: str | os.PathLike[str], names: Iterable[str] | None = None): ...
    >>> read("a.pt", ["weight", 3])
    Traceback (most recent call last):
    polyak.errors.OptionError: names must be of type Iterable[str] | None, got ['weight', 3]
    """
    signature = inspect.signature(call)

    @wraps(call)
    def checking(*positional: Any, **named: Any) -> Any:
        try:
            given = signature.bind(*positional, **named).arguments
        except TypeError:
            return call(*positional, **named)  # Python's own words for unknown and missing ones
        for name, value in given.items():
            parameter = signature.parameters[name]
            if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                _refuse_misfit(name, parameter.annotation, value)
        return call(*positional, **named)

    return checking  # type: ignore[return-value]


def _refuse_misfit(name: str, annotation: Any, value: Any) -> None:
    if not isinstance(annotation, str):
        return
    if not _fits(annotation, value):
        called = ": call it, and give what it returns" if callable(value) and "Iterable" in annotation else ""
        raise OptionError(f"{name} must be {_in_words(annotation)}, got {shown(value)}{called}")
    if "torch.device" in annotation and value is not None:
        try:
            import_module("torch").device(value)
        except Exception as error:  # of several kinds
            reason = str(error).partition("\n")[0]
            raise OptionError(f"{name} cannot be {shown(value)}: {reason:.200}") from error
    if "PathLike" in annotation and isinstance(value, str | os.PathLike):
        try:
            os.lstat(value)
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise OptionError(f"{name} cannot be {shown(value)}: {reason}") from error


def _in_words(annotation: str) -> str:
    """The annotation for those who have not read the signature."""
    names = {name for name, _ in _parts(annotation)}
    if names <= {*_ALIASES, "Callable", "None"}:
        return "a function or None" if "None" in names else "a function"
    return f"of type {annotation}"


def _fits(annotation: str, value: Any) -> bool:
    """Whether ``value`` is of one of the types, or one of them is not known here."""
    return any(_is_of(*part, value) for part in _parts(annotation))


def _is_of(name: str, elements: str, value: Any) -> bool:
    test = _TESTS.get(_ALIASES.get(name, name))
    if test is None or elements == "float":
        return True
    try:
        is_one = test(value)
    except Exception:  # of comparing what cannot be
        return False
    if is_one and elements and name in ("Iterable", "Sequence") and type(value).__name__ in _GONE_THROUGH:
        return all(_fits(elements, element) for element in value)
    return is_one


@cache
def _parts(annotation: str) -> tuple[tuple[str, str], ...]:
    """The types of a union, each with what is in its brackets."""
    parts, depth, start = [], 0, 0
    annotation = annotation.replace("Paths", _PATHS).replace("os.PathLike", "PathLike") + "|"
    for n, letter in enumerate(annotation):
        depth += (letter == "[") - (letter == "]")
        if letter == "|" and not depth:
            name, _, inside = annotation[start:n].strip().partition("[")
            parts.append((re.sub(r"^_evaluate\.", "", name), inside[:-1]))
            start = n + 1
    return tuple(parts)


# How two sets of named things differ.

_MOST_CHANGES = 5


@dataclass(frozen=True)
class Difference:
    """How names with their descriptions, such as shapes, differ from those that were expected; false where not.

    As text it is what those that were given do: whoever raises puts their subject before it, and the cure after.

    Attributes:
        missing: names that were expected only.
        added: names that were given only.
        changed: names of both, to what was expected and what was given.

    >>> str(Difference.of({"a": "(2,)", "b": "(2,)"}, {"b": "(3,)", "c": "(1,)"}))
    "lacks 'a'; has 'c' besides; has 'b' as (3,), not (2,)"
    """

    missing: tuple[str, ...]
    added: tuple[str, ...]
    changed: Mapping[str, tuple[Any, Any]]

    @classmethod
    def of(cls, expected: Mapping[str, object], given: Mapping[str, object]) -> Self:
        """Compare two mappings of names to descriptions; an expected None stands for any."""
        return cls(
            tuple(name for name in expected if name not in given),
            tuple(name for name in given if name not in expected),
            {n: (e, given[n]) for n, e in expected.items() if n in given and e not in (None, given[n])},
        )

    def __bool__(self) -> bool:
        return bool(self.missing or self.added or self.changed)

    def __str__(self) -> str:
        found = [f"lacks {name_list(self.missing)}"] if self.missing else []
        if self.added:
            found.append(f"has {name_list(self.added)} besides")
        if self.changed:
            shown = list(self.changed.items())[:_MOST_CHANGES]
            more = len(self.changed) - len(shown)
            changes = ", ".join(f"{name!r} as {given}, not {expected}" for name, (expected, given) in shown)
            found.append(f"has {changes}" + (f", and {more} more that differ" if more else ""))
        return "; ".join(found)


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


def refuse_other_state(
    current: Mapping[str, Any],
    state: Mapping[str, Any],
    options: Iterable[str],
    counts: Iterable[Sequence[str]] = (),
) -> None:
    """Compare a saved state with the present one of the object that is to take it up.

    Args:
        current: the object's own state.
        state: the saved one.
        options: the keys whose values must be equal.
        counts: the keys of what was counted; of several in one place none is less than the one before.

    Raises:
        StateError: keys, options, names, shapes or dtypes differ, or counts are none; the message says which.

    >>> refuse_other_state({"scheme": "uniform"}, {"scheme": "ema:decay=0.9"}, options=["scheme"])
    Traceback (most recent call last):
    polyak.errors.StateError: the state was saved with scheme='ema:decay=0.9', but this has scheme='uniform';
    nothing was loaded
    """
    keys = Difference.of(dict.fromkeys(current), dict.fromkeys(state))
    if keys:
        raise StateError(f"this is not a state of the kind expected: it {keys}; nothing was loaded")
    other = [key for key in options if not _are_equal(current[key], state[key])]
    if other:
        saved = ", ".join(f"{key}={shown(state[key])}" for key in other)
        here = ", ".join(f"{key}={current[key]!r}" for key in other)
        raise StateError(f"the state was saved with {saved}, but this has {here}; nothing was loaded")
    for keys in counts:
        _refuse_other_counts({key: state[key] for key in keys})
    for key, value in current.items():
        if isinstance(value, Mapping) and (unfit := Difference.of(_kinds(value), _kinds(state[key]))):
            raise StateError(f"the saved {key} does not fit: it {unfit}; nothing was loaded")


def _are_equal(here: object, saved: object) -> bool:
    try:
        return bool(here == saved)
    except (RuntimeError, ValueError):  # a tensor or an array, which is compared by its elements
        return False


def _refuse_other_counts(counts: Mapping[str, Any]) -> None:
    least = 0
    for key, count in counts.items():
        is_whole = isinstance(count, Integral) and not isinstance(count, bool)
        if not is_whole or not least <= int(count) < TOO_MANY:
            raise StateError(
                f"the saved {key} must be a whole number of at least {least}, and less than {TOO_MANY:,}, got "
                f"{shown(count)}; nothing was loaded"
            )
        least = int(count)


def _kinds(tensors: object) -> dict[str, str]:
    """Shape and dtype, and whether it is sharded: over how many ranks may differ."""
    return {name: _kind(tensor) for name, tensor in tensors.items()} if isinstance(tensors, Mapping) else {}


def _kind(tensor: Any) -> str:
    if not hasattr(tensor, "dtype"):
        return f"a {type(tensor).__name__}"
    return f"{tuple(tensor.shape)} {tensor.dtype}{', sharded' if hasattr(tensor, 'to_local') else ''}"
