"""The demo's figure: test NLL and accuracy along the run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from polyak.demo.study import Study
from polyak.demo.tasks import LIVE
from polyak.plots import Line, Panel, line_panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["study_figure"]


def study_figure(study: Study) -> Figure:
    """Live weights, tuned decay and averages against training time, mean over seeds ± standard error."""
    labels = [LIVE, study.decay, *study.task.averages]
    panels = [
        Panel("test NLL", [_line(study, label, "test_nll", 1) for label in labels]),
        Panel("test accuracy, %", [_line(study, label, "test_accuracy", 100) for label in labels]),
    ]
    title = f"{study.task.description}\nmean of {len(study.curves)} seeds ± standard error"
    return line_panels(title, study.task.time_unit, panels)


def _line(study: Study, label: str, measure: str, scale: float) -> Line:
    curves = [curves[label] for curves in study.curves.values()]
    time = np.array(curves[0].steps) / study.task.unit_steps
    return Line(label, time, scale * np.array([getattr(curve, measure) for curve in curves]))
