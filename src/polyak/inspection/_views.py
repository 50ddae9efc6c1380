"""Summaries for people: rich tables, with long lists folded unless everything is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from polyak.inspection._describe import FolderRow, FolderSummary, Summary, TrajectorySummary
from polyak.inspection._measure import (
    Change,
    CheckpointSummary,
    Comparison,
    LayoutDifference,
    Movement,
    Neighbour,
    Origin,
    shape_text,
)
from polyak.trajectory import Block

__all__ = [
    "checkpoint_view",
    "comparison_view",
    "counted",
    "folder_view",
    "printable",
    "table",
    "trajectory_view",
]

# What all the views are made of.

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


# One checkpoint, for people.

_FOLDED_CHARACTERS = 200


def checkpoint_view(summary: CheckpointSummary, show_all: bool = False) -> RenderableType:
    """What it is, its dtypes, its tensors (only the largest, if many), and what lies beside them."""
    return Group(
        *_heading(summary),
        Text(),
        *_dtypes(summary),
        *_tensors(summary, show_all),
        *_beside(summary, show_all),
    )


def _heading(summary: CheckpointSummary) -> Iterator[Text]:
    yield from origin_lines(summary.origin)
    tensors = counted(len(summary.stored), "tensor")
    yield Text(f"{tensors}, {counted(summary.numel, 'element')}, {decimal(summary.nbytes)}")
    if not summary.is_lazy:
        yield Text("written by a torch from before 1.6: it has to be loaded as a whole")


def _dtypes(summary: CheckpointSummary) -> Iterator[RenderableType]:
    if len(summary.dtypes) > 1:
        rows = table("dtype", "#tensors", "#elements", "#size")
        for dtype, share in summary.dtypes.items():
            rows.add_row(dtype, f"{share.tensors:,}", f"{share.numel:,}", decimal(share.nbytes))
        yield from (rows, Text())


def _tensors(summary: CheckpointSummary, show_all: bool) -> Iterator[RenderableType]:
    tensors = list(summary.stored)
    if not show_all and len(tensors) > FOLDED_ROWS:
        tensors = sorted(tensors, key=lambda tensor: -tensor.nbytes)[:FOLDED_ROWS]
    rows = table("tensor", "dtype", "shape", "#size")
    for tensor in tensors:
        rows.add_row(printable(tensor.name), tensor.dtype, shape_text(tensor.shape), decimal(tensor.nbytes))
    yield rows
    yield from rest_lines(len(summary.stored) - len(tensors), "smaller tensor")


def _beside(summary: CheckpointSummary, show_all: bool) -> Iterator[Text]:
    ties = [f"{tensor.name} = {tensor.tied_to}" for tensor in summary.tensors if tensor.tied_to]
    lines = [*name_lines("tied", ties, show_all), *name_lines("ignored", summary.ignored, show_all)]
    for name, text in summary.metadata.items():
        line = printable(f"{name}: {text}")
        if len(line) > _FOLDED_CHARACTERS and not show_all:
            line = f"{line[:_FOLDED_CHARACTERS]}... (--all)"
        lines.append(Text(line))
    if lines:
        yield from (Text(), *lines)


# Two checkpoints compared, for people.


def comparison_view(comparison: Comparison, show_all: bool = False) -> RenderableType:
    """The two, what only one of them has, how far they lie apart, and the tensors that differ most."""
    return Group(
        *origin_lines(comparison.first),
        *origin_lines(comparison.second),
        Text(),
        *layout_lines(comparison.second.path, comparison.first.path, comparison.layout, show_all),
        *_distance(comparison),
        *_differences(comparison, show_all),
    )


def _distance(comparison: Comparison) -> Iterator[Text]:
    yield Text()
    if comparison.is_identical:
        yield Text("identical: the same names, shapes, dtypes and bits")
        return
    same = len(comparison.tensors) - len(comparison.changed)
    yield Text(f"{same:,} of {counted(len(comparison.tensors), 'comparable tensor')} identical")
    yield Text(
        f"relative distance {number_text(comparison.relative_distance, '.4g')}, "
        f"cosine {number_text(comparison.cosine, '.8f')} over all floating-point tensors"
    )


def _differences(comparison: Comparison, show_all: bool) -> Iterator[RenderableType]:
    changed = comparison.changed
    shown = changed if show_all else changed[:FOLDED_ROWS]
    if not shown:
        return
    rows = table("tensor", "dtype", "#elements", "#distance", "#cosine", "")
    for tensor in shown:
        rows.add_row(
            printable(tensor.name),
            tensor.dtype,
            f"{tensor.numel:,}",
            number_text(tensor.relative_distance, ".4g"),
            number_text(tensor.cosine, ".6f"),
            f"{tensor.non_finite:,} not finite" if tensor.non_finite else "",
        )
    yield from (Text(), rows)
    yield from rest_lines(len(changed) - len(shown), "less different tensor")


# A folder of checkpoints, for people.


def folder_view(summary: FolderSummary, show_all: bool = False) -> RenderableType:
    """A row for each checkpoint, then how those lie that do not fit the first, and why some cannot be read."""
    return Group(
        Text(printable(f"{summary.path}: {counted(len(summary.rows), 'checkpoint')}"), style="bold"),
        *_notes(summary),
        Text(),
        _folder_rows(summary),
        *_movement(summary),
        *_folder_problems(summary, show_all),
    )


def _notes(summary: FolderSummary) -> Iterator[Text]:
    """Each note once, with its first checkpoint: as a rule all have the same."""
    first_names = {row.note: row.name for row in reversed(summary.readable) if row.note}
    for note, name in reversed(first_names.items()):
        yield Text(printable(f"{name}: {note}"))


def _folder_rows(summary: FolderSummary) -> Table:
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


def _folder_problems(summary: FolderSummary, show_all: bool) -> Iterator[Text]:
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


# A recorded trajectory, for people.


def trajectory_view(summary: TrajectorySummary) -> RenderableType:
    """A row for each block, how it lies to the one before, and whether the run drifts or circles."""
    return Group(
        Text(printable(_headline(summary)), style="bold"),
        Text(),
        _block_rows(summary),
        *(movement_lines(summary.movement) if summary.movement else ()),
        *_block_problems(summary),
    )


def _headline(summary: TrajectorySummary) -> str:
    blocks = summary.blocks
    if not blocks:
        return f"{summary.path}: a recorded trajectory without a block yet"
    samples = sum(block.count for block in blocks)
    skipped = sum(block.skipped for block in blocks)
    return (
        f"{summary.path}: a recorded trajectory, optimizer steps {blocks[0].start:,} to {blocks[-1].stop:,}, "
        f"{counted(len(blocks), 'block')}, {counted(samples, 'sample')}"
        f"{f', {skipped:,} skipped' if skipped else ''}, {decimal(summary.nbytes)}"
    )


def _block_rows(summary: TrajectorySummary) -> Table:
    metrics = list(dict.fromkeys(name for block in summary.blocks for name in block.metrics))
    rows = table(
        "#steps",
        "#samples",
        "#lr",
        *(f"#{printable(name)}" for name in metrics),
        "#distance",
        "#cosine",
        "#turn",
    )
    moved = iter(movement_cells(summary.movement) if summary.movement else ())
    for index, block in enumerate(summary.blocks):
        cells = ("damaged", "", "") if index in summary.damaged else next(moved)
        rows.add_row(
            str(block), f"{block.count:,}", _lr(block), *(_metric(block, name) for name in metrics), *cells
        )
    return rows


def _lr(block: Block) -> str:
    if block.lr is None:
        return "-"
    if block.lr.min == block.lr.max:
        return f"{block.lr.max:.3g}"
    return f"{block.lr.min:.3g} to {block.lr.max:.3g}"


def _metric(block: Block, name: str) -> str:
    return f"{block.metrics[name].mean:.4g}" if name in block.metrics else "-"


def _block_problems(summary: TrajectorySummary) -> Iterator[Text]:
    for problem in summary.damaged.values():
        yield from (Text(), Text(printable(problem)))


def view(summary: Summary, show_all: bool = False) -> RenderableType:
    """Any summary as something that ``rich`` prints.

    Args:
        summary: what ``describe`` or ``compare`` returned.
        show_all: do not fold long lists.
    """
    if isinstance(summary, Comparison):
        return comparison_view(summary, show_all)
    if isinstance(summary, FolderSummary):
        return folder_view(summary, show_all)
    if isinstance(summary, TrajectorySummary):
        return trajectory_view(summary)
    return checkpoint_view(summary, show_all)
