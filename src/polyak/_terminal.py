"""What people see in a terminal: tables, progress bars, text from files, and one word for success.

rich is imported where something is drawn, so that ``polyak --help`` does not wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import StringIO
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

__all__ = [
    "Bar",
    "as_text",
    "console",
    "counted",
    "line",
    "printable",
    "progress_bar",
    "size",
    "table",
    "wrote",
]

Item = TypeVar("Item")

_LEAST_COLUMNS, _MOST_COLUMNS = 80, 10_000


# Words.


def wrote(*paths: object, dry_run: bool = False) -> str:
    """How every command says that it did what it was asked for.

    >>> wrote("a.json", "a.png"), wrote("average.pt", dry_run=True)
    ('wrote a.json, a.png', 'would write average.pt')
    """
    return printable(f"{'would write' if dry_run else 'wrote'} {', '.join(map(str, paths))}")


def counted(count: int, noun: str) -> str:
    """A count with its noun.

    >>> counted(1, "tensor"), counted(1234, "tensor")
    ('1 tensor', '1,234 tensors')
    """
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def size(nbytes: int) -> str:
    """Bytes for people.

    >>> size(24), size(12_300_000)
    ('24 bytes', '12.3 MB')
    """
    from rich.filesize import decimal

    return decimal(nbytes)


def printable(text: str) -> str:
    """Text from a file nobody vouches for, with everything escaped that could move or confuse a terminal.

    >>> printable("a" + chr(27) + "[2Jb").count(chr(27))
    0
    """
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def line(text: str = "", style: str = "") -> Text:
    """A line of such text; headings are ``bold``, remarks ``dim``."""
    from rich.text import Text

    return Text(printable(text), style=style)


# Tables, and where they are printed.


def table(*headings: str, title: str | None = None) -> Table:
    """An empty table; a column whose heading begins with ``#`` holds numbers, and loses the sign.

    >>> rows = table("tensor", "#size")
    >>> rows.add_row("weight", "24 bytes")
    >>> print(as_text(rows))
    tensor      size
    ────────────────
    weight  24 bytes
    """
    from rich import box
    from rich.table import Table

    made = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in headings:
        if heading.startswith("#"):
            made.add_column(line(heading[1:]), justify="right", no_wrap=True)
        else:
            # A long name goes on in the next line: half a name cannot be looked up.
            made.add_column(line(heading), overflow="fold")
    return made


def console(**options: Any) -> Console:
    """A console to which text is text: names in files are no markup, no emoji codes, and not coloured.

    Where no terminal shows them, as in a pipe, lines are as long as what they say.
    """
    from rich.console import Console

    made = Console(highlight=False, markup=False, emoji=False, **options)
    if not (made.is_terminal or made.is_jupyter or "width" in options):
        made.width = _MOST_COLUMNS
    return made


def as_text(first: RenderableType, *below: RenderableType, width: int | None = None) -> str:
    """Tables and paragraphs as plain text of ``width`` columns, by default as many as the first one needs."""
    plain = console(file=StringIO(), width=width or _MOST_COLUMNS, color_system=None, force_jupyter=False)
    if width is None:
        plain.width = max(_LEAST_COLUMNS, plain.measure(first).maximum)
    with plain.capture() as capture:
        plain.print(first, *below, sep="\n")
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


# Bars on stderr, while something takes its time.


@dataclass(frozen=True)
class Bar:
    """How far something is; nothing happens where no bar is shown."""

    _update: Callable[..., object]

    def advance(self, doing: str | None = None) -> None:
        """One more is done; ``doing`` is what the bar says from now on."""
        self._update(advance=1, description=doing)

    def reach(self, done: int, total: int) -> None:
        """So many are done."""
        self._update(completed=done, total=total)

    def over(self, items: Iterable[Item], total: int) -> Iterator[Item]:
        """The items, of which each is done when the next is asked for."""
        self.reach(0, total)
        for item in items:
            yield item
            self.advance()


@contextmanager
def progress_bar(
    doing: str, *, shown: bool, total: int | None = None, in_bytes: bool = False
) -> Iterator[Bar]:
    """A bar on stderr that is gone afterwards, if it is to be ``shown`` and there is a terminal to show it.

    >>> with progress_bar("candidates", shown=False) as bar:
    ...     list(bar.over([1, 2], total=2))
    [1, 2]
    """
    if not shown:
        yield Bar(lambda **_: None)
        return
    from rich import progress

    stderr = console(stderr=True)
    if in_bytes:
        numbers = (progress.DownloadColumn(), progress.TransferSpeedColumn(), progress.TimeRemainingColumn())
    else:
        numbers = (progress.MofNCompleteColumn(), progress.TimeElapsedColumn())
    columns = (progress.TextColumn("{task.description}", markup=False), progress.BarColumn(), *numbers)
    # Elsewhere, as in the log of a job, rich would leave what no longer moves, or empty lines.
    hidden = not (stderr.is_terminal or stderr.is_jupyter)
    with progress.Progress(*columns, console=stderr, transient=True, disable=hidden) as bars:
        yield Bar(partial(bars.update, bars.add_task(doing, total=total)))
