"""What all the views are made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table
from rich.text import Text

from polyak.inspection.contents import Origin
from polyak.inspection.layouts import Change, LayoutDifference

__all__ = [
    "FOLDED_ROWS",
    "counted",
    "layout_lines",
    "name_lines",
    "number_text",
    "origin_lines",
    "printable",
    "rest_lines",
    "table",
]

FOLDED_ROWS = 12
_FOLDED_NAMES = 5


def table(*columns: str) -> Table:
    """An empty table; a column whose heading begins with ``#`` holds numbers, and loses the sign."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        if column.startswith("#"):
            made.add_column(column[1:], justify="right", no_wrap=True)
        else:
            # A long name goes on in the next line: half a name cannot be looked up.
            made.add_column(column, overflow="fold")
    return made


def origin_lines(origin: Origin) -> Iterator[Text]:
    """Which checkpoint this is, and which of its weights were taken."""
    step = "" if origin.step is None else f", step {origin.step:,}"
    yield Text(printable(f"{origin.path}: {origin.format}{step}"), style="bold")
    if origin.note:
        yield Text(printable(origin.note))


def layout_lines(
    name: str, reference: str, layout: LayoutDifference | None, show_all: bool
) -> Iterator[Text]:
    """The names that two checkpoints do not share, or share with another shape, dtype or tie; none if all agree."""
    if layout:
        yield Text(printable(f"{name}, compared with {reference}:"), style="bold")
        yield from name_lines("missing", layout.missing, show_all)
        yield from name_lines("extra", layout.extra, show_all)
        yield from name_lines("reshaped", _changes(layout.reshaped), show_all)
        yield from name_lines("retyped", _changes(layout.retyped), show_all)
        yield from name_lines("tied otherwise", layout.retied, show_all)


def _changes(changes: Sequence[Change]) -> list[str]:
    return [f"{change.name} ({change.first} -> {change.second})" for change in changes]


def name_lines(label: str, names: Sequence[str], show_all: bool) -> Iterator[Text]:
    """One line with the names, or the first few of them; none where there are none."""
    if names:
        shown = names if show_all else names[:_FOLDED_NAMES]
        rest = len(names) - len(shown)
        more = f" and {rest:,} more (--all)" if rest else ""
        yield Text(f"{label}: {', '.join(map(printable, shown))}{more}")


def rest_lines(count: int, what: str) -> Iterator[Text]:
    """How many rows of a table were folded away; nothing where none were."""
    if count:
        yield Text(f"... and {counted(count, what)} (--all)", style="dim")


def counted(count: int, noun: str) -> str:
    """A count with its noun.

    >>> counted(1, "tensor"), counted(1234, "tensor")
    ('1 tensor', '1,234 tensors')
    """
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def number_text(value: float | None, form: str) -> str:
    """A number in a format such as ``".3g"``; a dash where it is not defined.

    >>> number_text(0.12345, ".3g"), number_text(None, ".3g")
    ('0.123', '-')
    """
    return "-" if value is None else format(value, form)


def printable(text: str) -> str:
    """Text from a file nobody vouches for, with everything escaped that could move or confuse a terminal.

    >>> printable("a" + chr(27) + "[2Jb").count(chr(27))
    0
    """
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
