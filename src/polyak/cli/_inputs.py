"""What the user names on the command line: paths with patterns, and functions in modules of their own."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from traceback import print_exception
from typing import Any

__all__ = ["expanded", "imported"]


def expanded(inputs: list[str], profile_option: str) -> list[Path]:
    """Paths, patterns replaced by what they match, in the order people count.

    ``profile_option`` is where the command takes profiles, which are no paths.
    """
    from glob import glob

    from polyak.checkpoints._formats import natural_order
    from polyak.errors import CheckpointError

    paths: list[Path] = []
    for text in inputs:
        if not Path(text).exists():
            _refuse_profile(text, profile_option)
        if Path(text).exists() or not any(sign in text for sign in "*?["):
            paths.append(Path(text))
            continue
        matches = sorted(glob(text, recursive=True), key=natural_order)
        if not matches:
            raise CheckpointError(f"nothing matches the pattern {text}")
        paths += map(Path, matches)
    return paths


def _refuse_profile(text: str, option: str) -> None:
    from polyak.errors import OptionError
    from polyak.profiles import parse

    try:
        parse(text)
    except OptionError:
        return
    raise OptionError(f"{text} is a profile, not a path: write {option} {text}, and several in quotes")


def imported(option: str, text: str) -> Callable[..., Any]:
    """The function that ``package.module:function`` names; modules in the working directory are found too.

    Raises ``OptionError`` if there is none. An error inside the module is the user's own, with its traceback. So
    is one inside the function, whose traceback goes to stderr before an ``OptionError`` says what was called.

    >>> imported("--score", "math:fsum")([0.5, 0.25])
    0.75
    """
    from polyak.errors import OptionError

    module_name, colon, name = text.partition(":")
    if not (module_name and colon and name) or module_name.startswith(".") or module_name.endswith(".py"):
        raise OptionError(
            f"{option} takes package.module:function, such as my.model:build for build in my/model.py, got {text!r}"
        )
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        raise OptionError(f"{option} {text}: there is no module {error.name!r} here or installed") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise OptionError(f"{option} {text}: {module_name} has no function {name!r}")
    return _guarded(f"{option} {text}", function)


def _guarded(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
    from polyak.errors import OptionError, PolyakError

    def call(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except PolyakError:
            raise
        except Exception as error:
            print_exception(error)
            raise OptionError(f"{what} raised {type(error).__name__}: {error}") from error

    return call
