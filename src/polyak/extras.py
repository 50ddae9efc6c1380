"""Optional dependencies: imported where they are used, and asked for politely where they are missing."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from polyak.errors import MissingExtraError

__all__ = ["require"]


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
