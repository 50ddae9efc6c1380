"""The command line: one file per command, and everything heavy imported only inside them."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from polyak import _terminal
from polyak._version import __version__
from polyak.cli._average import average
from polyak.cli._choose import report, select
from polyak.cli._look import demo, inspect, profiles
from polyak.errors import PolyakError

__all__ = ["app", "main"]

app = typer.Typer(
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(short_help="Train on real data, and say whether averaging helped.")(demo)
app.command(short_help="Average checkpoints of any tool, format and size.")(average)
app.command(short_help="Say what checkpoints or a recorded run hold.")(inspect)
app.command(short_help="Choose an average of a run on your own data.")(select)
app.command(short_help="Write a page about a run.")(report)
app.command(short_help="List the profiles: how they are written, what they weigh.")(profiles)


@app.callback(invoke_without_command=True)
def polyak(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Weight averaging for PyTorch: SWA, EMA and every window between them.

    Start with: polyak demo
    """
    if version:
        typer.echo(f"polyak {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for bad input, 130 if interrupted.

    Bad input is one line on stderr; a traceback is a bug in polyak. Where nobody reads on, as after ``| head``, it ends
    with 1 and says nothing.
    """
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            return app(arguments, prog_name="polyak", standalone_mode=False) or 0
    except PolyakError as error:
        message = error.for_command
    except (typer.Abort, KeyboardInterrupt):
        return 130
    except OSError as error:
        if not _is_of_printing(error):
            raise
        message = f"cannot print the result: {error.strerror}"
    except Exception as error:
        # A wrong command line. typer keeps the class in other places, or in click, from version to version.
        if not hasattr(error, "format_message"):
            raise
        message = _wrong_use(error)
    print(f"polyak: error: {_in_one_line(message)}", file=sys.stderr)
    return 2


def _is_of_printing(error: OSError) -> bool:
    """Whether stdout is what could not be written, as on a full disk: polyak prints by these libraries alone."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals["__name__"].partition(".")[0] in ("click", "rich", "typer")


def _warn(message: Warning | str, *_: object) -> None:
    """A warning of any library as a line of ours: who typed a command asks for no source code."""
    print(f"polyak: warning: {_in_one_line(str(message))}", file=sys.stderr)


def _in_one_line(message: str) -> str:
    return _terminal.printable(" ".join(message.split()))


def _wrong_use(error: Any) -> str:
    """What is wrong with a command line, and where its options are."""
    context = getattr(error, "ctx", None)
    # Some versions of typer let pydantic check values, and its name for every complaint says nothing.
    message = error.format_message().replace("Value error, ", "")
    return f"{message} (see {context.command_path if context else 'polyak'} --help)"
