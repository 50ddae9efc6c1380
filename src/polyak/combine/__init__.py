"""Averaging checkpoints: the streaming engine, and ``average_checkpoints`` on top of it."""

from polyak.combine._engine import MemoryWriter, Progress, combine
from polyak.combine._inputs import (
    Span,
    coefficients,
    common_layout,
    in_step_order,
    known_steps,
    open_inputs,
    refuse_partly_known,
    spans_of_steps,
)
from polyak.combine._offline import (
    AverageReport,
    Plan,
    average_checkpoints,
    batchnorm_statistics,
    is_statistic,
)
from polyak.combine._running import is_averaged

__all__ = [
    "AverageReport",
    "MemoryWriter",
    "Plan",
    "Progress",
    "Span",
    "average_checkpoints",
    "batchnorm_statistics",
    "coefficients",
    "combine",
    "common_layout",
    "in_step_order",
    "is_averaged",
    "is_statistic",
    "known_steps",
    "open_inputs",
    "refuse_partly_known",
    "spans_of_steps",
]
