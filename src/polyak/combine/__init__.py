"""Averaging checkpoints: the streaming engine, and ``average_checkpoints`` on top of it."""

from polyak.combine.engine import Progress, combine
from polyak.combine.headers import common_layout
from polyak.combine.memory import MemoryWriter
from polyak.combine.spans import Span, coefficients, spans_of_steps

__all__ = [
    "MemoryWriter",
    "Progress",
    "Span",
    "coefficients",
    "combine",
    "common_layout",
    "spans_of_steps",
]
