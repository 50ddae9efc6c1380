"""Averaging checkpoints: the streaming engine, and ``average_checkpoints`` on top of it."""

from polyak.combine.engine import Progress, combine
from polyak.combine.headers import common_layout
from polyak.combine.inputs import in_step_order, known_steps, open_inputs, refuse_partly_known
from polyak.combine.memory import MemoryWriter
from polyak.combine.offline import average_checkpoints
from polyak.combine.plan import AverageReport, Plan, batchnorm_statistics, is_statistic, plan_average
from polyak.combine.running import is_averaged
from polyak.combine.spans import Span, coefficients, spans_of_steps

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
    "plan_average",
    "refuse_partly_known",
    "spans_of_steps",
]
