"""Summaries for people: rich tables, with long lists folded unless everything is asked for."""

from __future__ import annotations

from rich.console import RenderableType

from polyak.inspection import Summary
from polyak.inspection.comparison import Comparison
from polyak.inspection.folder import FolderSummary
from polyak.inspection.trajectory import TrajectorySummary
from polyak.inspection.views.checkpoint import checkpoint_view
from polyak.inspection.views.comparison import comparison_view
from polyak.inspection.views.folder import folder_view
from polyak.inspection.views.trajectory import trajectory_view

__all__ = ["checkpoint_view", "comparison_view", "folder_view", "trajectory_view", "view"]


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
