"""A folder of checkpoints, for people."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from polyak.inspection.folder import FolderRow, FolderSummary
from polyak.inspection.movement import Movement, Neighbour
from polyak.inspection.views.parts import counted, layout_lines, number_text, printable, table

__all__ = ["folder_view", "movement_cells", "movement_lines"]


def folder_view(summary: FolderSummary, show_all: bool = False) -> RenderableType:
    """A row for each checkpoint, then how those lie that do not fit the first, and why some cannot be read."""
    return Group(
        Text(printable(f"{summary.path}: {counted(len(summary.rows), 'checkpoint')}"), style="bold"),
        *_notes(summary),
        Text(),
        _rows(summary),
        *_movement(summary),
        *_problems(summary, show_all),
    )


def _notes(summary: FolderSummary) -> Iterator[Text]:
    """Each note once, with its first checkpoint: as a rule all have the same."""
    first_names = {row.note: row.name for row in reversed(summary.readable) if row.note}
    for note, name in reversed(first_names.items()):
        yield Text(printable(f"{name}: {note}"))


def _rows(summary: FolderSummary) -> Table:
    rows = table("checkpoint", "#step", "format", "#tensors", "#size", "dtypes", "layout")
    for row in summary.rows:
        rows.add_row(*_cells(row))
    return rows


def _cells(row: FolderRow) -> list[str]:
    if row.error is not None:
        return [printable(row.name), "", "", "", "", "", "unreadable"]
    differing = len(row.layout.names) if row.layout else 0
    return [
        printable(row.name),
        "-" if row.step is None else f"{row.step:,}",
        row.format,
        f"{row.tensors:,}",
        decimal(row.nbytes),
        ", ".join(row.dtypes),
        f"{counted(differing, 'name')} differ" if differing else "same",
    ]


def _movement(summary: FolderSummary) -> Iterator[RenderableType]:
    if summary.movement is not None:
        rows = table("checkpoint", "#distance", "#cosine", "#turn")
        cells = movement_cells(summary.movement)
        for row, neighbour in zip(summary.readable, cells, strict=True):
            rows.add_row(printable(row.name), *neighbour)
        yield from (Text(), rows, *movement_lines(summary.movement))


def _problems(summary: FolderSummary, show_all: bool) -> Iterator[Text]:
    for row in summary.rows:
        if row.layout:
            yield Text()
            yield from layout_lines(row.name, str(summary.reference), row.layout, show_all)
    for row in summary.unreadable:
        yield from (Text(), Text(printable(str(row.error))))


def movement_cells(movement: Movement) -> list[tuple[str, str, str]]:
    """For each of the weights: its distance to those before it, their cosine, and the turn."""
    return [("-", "-", "-"), *map(_neighbour_cells, movement.neighbours)]


def _neighbour_cells(neighbour: Neighbour) -> tuple[str, str, str]:
    return (
        number_text(neighbour.relative_distance, ".4g"),
        number_text(neighbour.cosine, ".6f"),
        number_text(neighbour.turn, "+.2f"),
    )


def movement_lines(movement: Movement) -> Iterator[Text]:
    """What the columns mean, and whether the run drifts or circles."""
    yield Text()
    yield Text(
        "distance and cosine are to the weights before; turn is the cosine of two moves in a row", style="dim"
    )
    if movement.straightness is not None:
        yield Text(f"from first to last: {movement.straightness:.1%} of the way that was gone in all")
    yield Text(movement.verdict)
