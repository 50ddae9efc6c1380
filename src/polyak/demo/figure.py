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

# Before this share of the run all candidates are far worse than where they end.
_FIRST_SHOWN = 0.25


def study_figure(study: Study) -> Figure:
    """Live weights, tuned decay and averages against training time, mean over seeds ± standard error."""
    labels = [LIVE, study.decay, *study.task.averages]
    nlls = [_line(study, label, "test_nll", 1) for label in labels]
    accuracies = [_line(study, label, "test_accuracy", 100) for label in labels]
    without_update_bn = (study.task.update_bn_pair or (None,))[0]
    worth_comparing = [line for line in nlls if line.label != without_update_bn]
    return line_panels(
        f"Test scores of {study.task.description}\nmean of {len(study.curves)} seeds ± standard error",
        study.task.time_unit,
        [
            Panel("NLL (lower is better)", nlls, _limits_of_second_half(worth_comparing)),
            Panel("accuracy, % (higher is better)", accuracies, _limits_of_second_half(accuracies)),
        ],
    )


def _line(study: Study, label: str, measure: str, scale: float) -> Line:
    curves = [curves[label] for curves in study.curves.values()]
    steps = np.array(curves[0].steps)
    # Until the decay begins, its run is that of the live weights and would hide it.
    constant_share = 1 - study.decay_fraction if label == study.decay else 0.0
    shown = steps >= max(_FIRST_SHOWN, constant_share) * study.task.steps
    scores = np.array([getattr(curve, measure) for curve in curves])
    return Line(label, steps[shown] / study.task.unit_steps, scale * scores[:, shown])


def _limits_of_second_half(lines: list[Line]) -> tuple[float, float]:
    """Limits that show the second half of training in full: the first would squeeze what is compared."""
    end = max(np.max(np.asarray(line.x)) for line in lines)
    means = np.concatenate(
        [np.asarray(line.y)[:, np.asarray(line.x) >= end / 2].mean(axis=0) for line in lines]
    )
    margin = 0.08 * np.ptp(means)
    return float(means.min() - margin), float(means.max() + margin)
