"""Two checkpoints compared, for people."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.text import Text

from polyak.inspection.comparison import Comparison
from polyak.inspection.views.parts import (
    FOLDED_ROWS,
    counted,
    layout_lines,
    number_text,
    origin_lines,
    printable,
    rest_lines,
    table,
)

__all__ = ["comparison_view"]


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
