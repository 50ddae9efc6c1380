"""Candidates as a table that people read down its columns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from io import StringIO
from statistics import median
from typing import TYPE_CHECKING

from polyak.selection.verdict import LIVE, Candidate

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["HEADINGS", "as_rows", "as_table", "as_text", "shortened"]

# A profile with a weight for each block has a name longer than the page.
_MOST_NAME = 28
_MOST_DECIMALS = 8
_LEAST_COLUMNS, _MOST_COLUMNS = 80, 10_000


HEADINGS = ("candidate", "score", "± error", f"minus {LIVE}", "95% interval", "samples")


def as_table(candidates: Sequence[Candidate]) -> Table:
    """A row for each candidate."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == HEADINGS[0] else "right", no_wrap=True)
    for row in as_rows(candidates):
        table.add_row(*row)
    return table


def as_text(table: Table, below: str = "") -> str:
    """A table as plain text, as wide as it needs, with a paragraph of the same width below it."""
    from rich.console import Console

    console = Console(file=StringIO(), width=_MOST_COLUMNS, color_system=None)
    console.width = max(_LEAST_COLUMNS, console.measure(table).maximum)
    with console.capture() as capture:
        console.print(table)
        if below:
            console.print(below, highlight=False, markup=False)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def as_rows(candidates: Sequence[Candidate]) -> list[tuple[str, ...]]:
    """The cells under ``HEADINGS``; the numbers of a column have as many decimals as each other."""
    others = [candidate for candidate in candidates if candidate.profile is not None]
    score = _form([c.score for c in candidates], 5)
    error = _form([c.stderr for c in candidates], 2)
    difference = _form([c.difference for c in others], 3, "+")
    bound = _form([value for c in others for value in (c.low, c.high)], 3, "+")
    return [
        (
            shortened(c.name),
            f"{c.score:{score}}",
            "" if c.stderr is None else f"{c.stderr:{error}}",
            "" if c.profile is None else f"{c.difference:{difference}}",
            "" if c.profile is None or c.low is None else f"{c.low:{bound}} to {c.high:{bound}}",
            f"{c.effective_samples:.4g}",
        )
        for c in candidates
    ]


def _form(values: Sequence[float | None], digits: int, sign: str = "") -> str:
    """How to write all of ``values``: the usual one of them with ``digits`` digits.

    >>> _form([0.0123, 0.4, 0.38], 3), _form([1250.0], 2), _form([1e-12, 2e-12], 3, "+")
    ('.3f', '.0f', '+.3g')
    """
    sizes = [abs(value) for value in values if value is not None and math.isfinite(value) and value != 0]
    if not sizes:
        return f"{sign}.{digits}g"
    decimals = max(0, digits - 1 - math.floor(math.log10(median(sizes))))
    # Numbers that are smaller still, or one that is far larger than the rest, make a column of zeros.
    if decimals > _MOST_DECIMALS or max(sizes) >= 10 ** (digits + 3):
        return f"{sign}.{digits}g"
    return f"{sign}.{decimals}f"


def shortened(name: str) -> str:
    """A name that fits into a table or a figure."""
    return name if len(name) <= _MOST_NAME else f"{name[: _MOST_NAME - 1]}…"
