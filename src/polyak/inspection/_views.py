"""Summaries for people: rich tables, with long lists folded unless everything is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType

from polyak._terminal import counted, line, printable, size, table
from polyak.inspection import _describe, _measure
from polyak.trajectory import Block

__all__ = ["view"]

# What all the views are made of.

FOLDED_ROWS = 12
_FOLDED_NAMES = 5


def origin_lines(origin: _measure.Origin) -> Iterator[RenderableType]:
    """Which checkpoint this is, and which of its weights were taken."""
    step = "" if origin.step is None else f", step {origin.step:,}"
    yield line(f"{origin.path}: {origin.format}{step}", "bold")
    if origin.note:
        yield line(origin.note)


def layout_lines(
    name: str, reference: str, layout: _measure.LayoutDifference | None, show_all: bool
) -> Iterator[RenderableType]:
    """The names that two checkpoints do not share, or share with another shape, dtype or tie; none if all agree."""
    if layout:
        yield line(f"{name}, compared with {reference}:", "bold")
        yield from name_lines("missing", layout.missing, show_all)
        yield from name_lines("extra", layout.extra, show_all)
        yield from name_lines("reshaped", _changes(layout.reshaped), show_all)
        yield from name_lines("retyped", _changes(layout.retyped), show_all)
        yield from name_lines("tied otherwise", layout.retied, show_all)


def _changes(changes: Sequence[_measure.Change]) -> list[str]:
    return [f"{change.name} ({change.first} -> {change.second})" for change in changes]


def name_lines(label: str, names: Sequence[str], show_all: bool) -> Iterator[RenderableType]:
    """One line with the names, or the first few of them; none where there are none."""
    if names:
        shown = names if show_all else names[:_FOLDED_NAMES]
        rest = len(names) - len(shown)
        more = f" and {rest:,} more (--all)" if rest else ""
        yield line(f"{label}: {', '.join(shown)}{more}")


def rest_lines(count: int, what: str) -> Iterator[RenderableType]:
    """How many rows of a table were folded away; nothing where none were."""
    if count:
        yield line(f"... and {counted(count, what)} (--all)", "dim")


def number_text(value: float | None, form: str) -> str:
    """A number in a format such as ``".3g"``; a dash where it is not defined.

    >>> number_text(0.12345, ".3g"), number_text(None, ".3g")
    ('0.123', '-')
    """
    return "-" if value is None else format(value, form)


# One checkpoint, for people.

_FOLDED_CHARACTERS = 200


def checkpoint_view(summary: _measure.CheckpointSummary, show_all: bool = False) -> RenderableType:
    """What it is, its dtypes, its tensors (only the largest, if many), and what lies beside them."""
    return Group(
        *_heading(summary),
        line(),
        *_dtypes(summary),
        *_tensors(summary, show_all),
        *_beside(summary, show_all),
    )


def _heading(summary: _measure.CheckpointSummary) -> Iterator[RenderableType]:
    yield from origin_lines(summary.origin)
    tensors = counted(len(summary.stored), "tensor")
    yield line(f"{tensors}, {counted(summary.numel, 'element')}, {size(summary.nbytes)}")
    if not summary.is_lazy:
        yield line("written by a torch from before 1.6: it has to be loaded as a whole")


def _dtypes(summary: _measure.CheckpointSummary) -> Iterator[RenderableType]:
    if len(summary.dtypes) > 1:
        rows = table("dtype", "#tensors", "#elements", "#size")
        for dtype, share in summary.dtypes.items():
            rows.add_row(dtype, f"{share.tensors:,}", f"{share.numel:,}", size(share.nbytes))
        yield from (rows, line())


def _tensors(summary: _measure.CheckpointSummary, show_all: bool) -> Iterator[RenderableType]:
    tensors = list(summary.stored)
    if not show_all and len(tensors) > FOLDED_ROWS:
        tensors = sorted(tensors, key=lambda tensor: -tensor.nbytes)[:FOLDED_ROWS]
    rows = table("tensor", "dtype", "shape", "#size")
    for tensor in tensors:
        rows.add_row(
            printable(tensor.name), tensor.dtype, _measure.shape_text(tensor.shape), size(tensor.nbytes)
        )
    yield rows
    yield from rest_lines(len(summary.stored) - len(tensors), "smaller tensor")


def _beside(summary: _measure.CheckpointSummary, show_all: bool) -> Iterator[RenderableType]:
    ties = [f"{tensor.name} = {tensor.tied_to}" for tensor in summary.tensors if tensor.tied_to]
    lines = [*name_lines("tied", ties, show_all), *name_lines("ignored", summary.ignored, show_all)]
    for name, text in summary.metadata.items():
        entry = printable(f"{name}: {text}")
        if len(entry) > _FOLDED_CHARACTERS and not show_all:
            entry = f"{entry[:_FOLDED_CHARACTERS]}... (--all)"
        lines.append(line(entry))
    if lines:
        yield from (line(), *lines)


# Two checkpoints compared, for people.


def comparison_view(comparison: _measure.Comparison, show_all: bool = False) -> RenderableType:
    """The two, what only one of them has, how far they lie apart, and the tensors that differ most."""
    return Group(
        *origin_lines(comparison.first),
        *origin_lines(comparison.second),
        line(),
        *layout_lines(comparison.second.path, comparison.first.path, comparison.layout, show_all),
        *_distance(comparison),
        *_differences(comparison, show_all),
    )


def _distance(comparison: _measure.Comparison) -> Iterator[RenderableType]:
    yield line()
    if comparison.is_identical:
        yield line("identical: the same names, shapes, dtypes and bits")
        return
    same = len(comparison.tensors) - len(comparison.changed)
    yield line(f"{same:,} of {counted(len(comparison.tensors), 'comparable tensor')} identical")
    yield line(
        f"relative distance {number_text(comparison.relative_distance, '.4g')}, "
        f"cosine {number_text(comparison.cosine, '.8f')} over all floating-point tensors"
    )


def _differences(comparison: _measure.Comparison, show_all: bool) -> Iterator[RenderableType]:
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
    yield from (line(), rows)
    yield from rest_lines(len(changed) - len(shown), "less different tensor")


# A folder of checkpoints, for people.


def folder_view(summary: _describe.FolderSummary, show_all: bool = False) -> RenderableType:
    """A row for each checkpoint, then how those lie that do not fit the first, and why some cannot be read."""
    return Group(
        line(f"{summary.path}: {counted(len(summary.rows), 'checkpoint')}", "bold"),
        *_notes(summary),
        line(),
        _folder_rows(summary),
        *_refusal(summary),
        *_movement(summary),
        *_folder_problems(summary, show_all),
    )


def _notes(summary: _describe.FolderSummary) -> Iterator[RenderableType]:
    """Each note once, with its first checkpoint: as a rule all have the same."""
    first_names = {row.note: row.name for row in reversed(summary.readable) if row.note}
    for note, name in reversed(first_names.items()):
        yield line(f"{name}: {note}")


def _folder_rows(summary: _describe.FolderSummary) -> RenderableType:
    rows = table("checkpoint", "#step", "format", "#tensors", "#size", "dtypes", "layout")
    for row in summary.rows:
        rows.add_row(*_cells(row))
    return rows


def _cells(row: _describe.FolderRow) -> list[str]:
    if row.error is not None:
        return [printable(row.name), "", "", "", "", "", "unreadable"]
    if not row.taken and not row.format:
        return [printable(row.name), "", "", "", "", "", f"left out: {printable(row.why)}"]
    differing = len(row.layout.names) if row.layout else 0
    return [
        printable(row.name),
        "-" if row.step is None else f"{row.step:,}",
        row.format,
        f"{row.tensors:,}",
        size(row.nbytes),
        ", ".join(row.dtypes),
        f"left out: {printable(row.why)}"
        if row.why
        else f"{counted(differing, 'name')} differ"
        if differing
        else "same",
    ]


def _refusal(summary: _describe.FolderSummary) -> Iterator[RenderableType]:
    if summary.refusal is not None:
        yield from (line(), line(f"an average of this folder is refused: {summary.refusal}"))
    elif summary.of_several_runs:
        yield from (line(), line(summary.of_several_runs))


def _movement(summary: _describe.FolderSummary) -> Iterator[RenderableType]:
    if summary.movement is not None:
        rows = table("checkpoint", "#distance", "#cosine", "#turn")
        cells = movement_cells(summary.movement)
        for row, neighbour in zip(summary.taken, cells, strict=True):
            rows.add_row(printable(row.name), *neighbour)
        yield from (line(), rows, *movement_lines(summary.movement))


def _folder_problems(summary: _describe.FolderSummary, show_all: bool) -> Iterator[RenderableType]:
    for row in summary.rows:
        if row.layout:
            yield line()
            yield from layout_lines(row.name, str(summary.reference), row.layout, show_all)
    for row in summary.unreadable:
        yield from (line(), line(str(row.error)))


def movement_cells(movement: _measure.Movement) -> list[tuple[str, str, str]]:
    """For each of the weights: its distance to those before it, their cosine, and the turn."""
    return [("-", "-", "-"), *map(_neighbour_cells, movement.neighbours)]


def _neighbour_cells(neighbour: _measure.Neighbour) -> tuple[str, str, str]:
    return (
        number_text(neighbour.relative_distance, ".4g"),
        number_text(neighbour.cosine, ".6f"),
        number_text(neighbour.turn, "+.2f"),
    )


def movement_lines(movement: _measure.Movement) -> Iterator[RenderableType]:
    """What the columns mean, and whether the run drifts or circles."""
    yield line()
    yield line(
        "distance and cosine are to the weights before; turn is the cosine of two moves in a row", "dim"
    )
    if movement.straightness is not None:
        yield line(f"from first to last: {movement.straightness:.1%} of the way that was gone in all")
    yield line(movement.verdict)


# A recorded run, for people.


def trajectory_view(summary: _describe.TrajectorySummary) -> RenderableType:
    """A row for each block, how it lies to the one before, and whether the run drifts or circles."""
    return Group(
        line(_headline(summary), "bold"),
        line(),
        _block_rows(summary),
        *(movement_lines(summary.movement) if summary.movement else ()),
        *_block_problems(summary),
    )


def _headline(summary: _describe.TrajectorySummary) -> str:
    blocks = summary.blocks
    if not blocks:
        return f"{summary.path}: a recorded run without a block yet"
    samples = sum(block.count for block in blocks)
    skipped = sum(block.skipped for block in blocks)
    return (
        f"{summary.path}: a recorded run, optimizer steps {blocks[0].start:,} to {blocks[-1].stop:,}, "
        f"{counted(len(blocks), 'block')}, {counted(samples, 'sample')}"
        f"{f', {skipped:,} skipped' if skipped else ''}, {size(summary.nbytes)}"
    )


def _block_rows(summary: _describe.TrajectorySummary) -> RenderableType:
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


def _block_problems(summary: _describe.TrajectorySummary) -> Iterator[RenderableType]:
    for problem in summary.damaged.values():
        yield from (line(), line(problem))


def view(summary: _describe.Summary, show_all: bool = False) -> RenderableType:
    """Any summary as something that ``rich`` prints.

    Args:
        summary: what ``describe`` or ``compare`` returned.
        show_all: do not fold long lists.
    """
    if isinstance(summary, _measure.Comparison):
        return comparison_view(summary, show_all)
    if isinstance(summary, _describe.FolderSummary):
        return folder_view(summary, show_all)
    if isinstance(summary, _describe.TrajectorySummary):
        return trajectory_view(summary)
    return checkpoint_view(summary, show_all)
