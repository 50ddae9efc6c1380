"""Averaging checkpoints: the streaming engine, and ``average_checkpoints`` on top of it."""

from polyak.combine._engine import MemoryWriter, Progress, combine
from polyak.combine._inputs import Span, coefficients, common_layout, is_averaged
from polyak.combine._offline import (
    AverageReport,
    Plan,
    average_checkpoints,
    batchnorm_statistics,
    is_statistic,
)
from polyak.combine._outputs import write_completed

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
    "is_averaged",
    "is_statistic",
    "write_completed",
]
