"""A recorded trajectory, for people."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from polyak.inspection.trajectory import TrajectorySummary
from polyak.inspection.views.folder import movement_cells, movement_lines
from polyak.inspection.views.parts import counted, printable, table
from polyak.trajectory import Block

__all__ = ["trajectory_view"]


def trajectory_view(summary: TrajectorySummary) -> RenderableType:
    """A row for each block, how it lies to the one before, and whether the run drifts or circles."""
    return Group(
        Text(printable(_headline(summary)), style="bold"),
        Text(),
        _rows(summary),
        *(movement_lines(summary.movement) if summary.movement else ()),
        *_problems(summary),
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


def _rows(summary: TrajectorySummary) -> Table:
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


def _problems(summary: TrajectorySummary) -> Iterator[Text]:
    for problem in summary.damaged.values():
        yield from (Text(), Text(printable(problem)))
