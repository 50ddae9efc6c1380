"""Everything polyak raises on purpose.

Each message says what went wrong, which tensor or file, why, and the cure::

    PolyakError
    ├── OptionError          (also ValueError)         an option or hyper-parameter is out of range
    ├── StructureError       (also ValueError)         tensors differ in name, shape or kind from what was expected
    ├── StateError           (also ValueError)         a saved state does not belong to this object
    ├── BatchError           (also ValueError)         a batch or loader cannot be used as given
    ├── NonFiniteError       (also ArithmeticError)    NaN or infinity where a finite number is needed
    ├── NotStartedError      (also RuntimeError)       an average was asked for before its first sample
    ├── SwapError            (also RuntimeError)       weights are swapped in already, or were never swapped in
    ├── CheckpointError      (also ValueError)         a file is corrupt, truncated, unsafe or of an unknown kind
    ├── OutputExistsError    (also FileExistsError)    an output is there already and may not be overwritten
    └── MissingExtraError    (also ImportError)        an optional dependency is not installed

Unknown keywords are Python's own ``TypeError``.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "BatchError",
    "CheckpointError",
    "MissingExtraError",
    "NonFiniteError",
    "NotStartedError",
    "OptionError",
    "OutputExistsError",
    "PolyakError",
    "StateError",
    "StructureError",
    "SwapError",
    "name_list",
    "shown",
]


class PolyakError(Exception):
    """The root of every error that polyak raises on purpose.

    Args:
        message: what went wrong, and the cure where it is the same for everybody.
        cure: the end of the message for who called from Python.
        command_cure: its end for who typed a command, whose options have other names; None: the same.

    >>> error = PolyakError("a.pt exists already: ", "pass overwrite=True", "give --force")
    >>> str(error), error.for_command
    ('a.pt exists already: pass overwrite=True', 'a.pt exists already: give --force')
    """

    def __init__(self, message: str = "", cure: str = "", command_cure: str | None = None) -> None:
        super().__init__(message + cure)
        self.for_command = message + (cure if command_cure is None else command_cure)


class OptionError(PolyakError, ValueError):
    """An option or hyper-parameter is out of range; the message says the range."""


class StructureError(PolyakError, ValueError):
    """Tensors differ in name, shape or kind from what was expected; the message names them."""


class StateError(PolyakError, ValueError):
    """A saved state does not belong to this object; nothing was loaded."""


class BatchError(PolyakError, ValueError):
    """A batch or loader cannot be used as given; the model is as it was."""


class NonFiniteError(PolyakError, ArithmeticError):
    """NaN or infinity was found where a finite number is needed."""


class NotStartedError(PolyakError, RuntimeError):
    """An average was asked for before its first sample."""


class SwapError(PolyakError, RuntimeError):
    """Averaged weights are in the model already, or were never swapped in."""


class CheckpointError(PolyakError, ValueError):
    """A file is corrupt, truncated, unsafe or of an unknown kind."""


class OutputExistsError(PolyakError, FileExistsError):
    """An output is there already; nothing is overwritten unasked."""


class MissingExtraError(PolyakError, ImportError):
    """An optional dependency is not installed; the message is the pip command that brings it."""


def shown(value: object, most: int = 60) -> str:
    """``value`` in a message: as Python writes it, cut off, or its type where Python refuses to.

    Files may hold numbers of more digits than Python writes, and tuples in tuples a thousand deep.

    >>> shown([3.5]), shown("a" * 10, most=6), shown(1 << 20_000)
    ('[3.5]', "'aaaaa", 'an int too long to show')
    """
    try:
        return repr(value)[:most]
    except (ValueError, RecursionError):
        kind = type(value).__name__
        return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind} too long to show"


def name_list(names: Sequence[str], most: int = 5) -> str:
    """The first ``most`` names, quoted, for a message.

    >>> name_list(["a", "b", "c"], most=2)
    "'a', 'b' and 1 more"
    """
    shown = ", ".join(repr(name) for name in names[:most])
    rest = len(names) - most
    return f"{shown} and {rest} more" if rest > 0 else shown
