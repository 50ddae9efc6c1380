"""One checkpoint, for people."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.text import Text

from polyak.inspection.contents import CheckpointSummary
from polyak.inspection.layouts import shape_text
from polyak.inspection.views.parts import (
    FOLDED_ROWS,
    counted,
    name_lines,
    origin_lines,
    printable,
    rest_lines,
    table,
)

__all__ = ["checkpoint_view"]

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
