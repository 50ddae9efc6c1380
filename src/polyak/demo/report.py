"""A study as a table for people and as plain data for programs."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from rich import box
from rich.table import Table

from polyak.demo.statistics import Difference, mean_and_error, paired_difference
from polyak.demo.study import Study
from polyak.demo.tasks import LIVE, Task
from polyak.demo.verdict import format_p, verdict

__all__ = ["MADE_BY", "study_as_data", "study_table"]

MADE_BY = "polyak demo"
_PACKAGES = ("polyak", "torch", "numpy", "scipy", "scikit-learn")


def study_table(study: Study) -> Table:
    """Test NLL and accuracy of each candidate, and its paired differences to both baselines."""
    table = Table(
        title=f"Test scores over {len(study.curves)} seeds, mean ± standard error",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("", no_wrap=True)
    for heading in ("", f"minus {LIVE}", "minus tuned decay"):
        table.add_column(heading, justify="right", no_wrap=True)
    _add_section(table, study, "NLL", "nll", lambda value: f"{value:.4f}")
    table.add_section()
    _add_section(table, study, "accuracy, %", "accuracy", lambda value: f"{100 * value:.2f}")
    return table


def study_as_data(study: Study) -> dict[str, Any]:
    """Settings, versions, all measured numbers, what follows from them: equal for equal seeds."""
    return {
        "made_by": MADE_BY,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES},
        "settings": _settings(study.task) | {"seeds": list(study.curves)},
        "verdict": verdict(study),
        "summary": {label: _summary(study, label) for label in study.labels},
        "tuning": {
            "validation_nll": {str(fraction): nll for fraction, nll in study.tuning_nll.items()},
            "best_decay_fraction": study.decay_fraction,
        },
        "selections": {str(seed): found for seed, found in study.selections.items()},
        "curves": {
            str(seed): {label: asdict(curve) for label, curve in curves.items()}
            for seed, curves in study.curves.items()
        },
    }


def _add_section(table: Table, study: Study, name: str, measure: str, number: Callable[[float], str]) -> None:
    table.add_row(f"[bold]{name}[/]")
    live, decay = study.scores(LIVE, measure), study.scores(study.decay, measure)
    for label in study.labels:
        scores = study.scores(label, measure)
        mean, stderr = mean_and_error(scores)
        table.add_row(
            f" {label}",
            f"{number(mean)} ± {number(stderr)}",
            "" if label == LIVE else _cell(paired_difference(scores, live), number),
            "" if label == study.decay else _cell(paired_difference(scores, decay), number),
        )


def _cell(difference: Difference, number: Callable[[float], str]) -> str:
    sign = "-" if difference.mean < 0 else "+"
    return f"{sign}{number(abs(difference.mean))} ({format_p(difference.p_value).replace(' ', '')})"


def _summary(study: Study, label: str) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    for measure in ("nll", "accuracy"):
        scores = study.scores(label, measure)
        mean, stderr = mean_and_error(scores)
        summary[f"test_{measure}"] = {
            "by_seed": scores,
            "mean": mean,
            "stderr": stderr,
            "minus_live": asdict(paired_difference(scores, study.scores(LIVE, measure))),
            "minus_tuned_decay": asdict(paired_difference(scores, study.scores(study.decay, measure))),
        }
    return summary


def _settings(task: Task) -> dict[str, Any]:
    return {
        "task": task.name,
        "description": task.description,
        "optimizer": task.optimizer.__name__,
        "optimizer_options": dict(task.optimizer_options),
        "batch_size": task.batch_size,
        "steps": task.steps,
        "warmup_steps": task.warmup_steps,
        "input_noise": task.input_noise,
        "eval_steps": task.eval_steps,
        "averages": {
            label: {
                "scheme": str(spec.scheme),
                "start": spec.start,
                "every": spec.every,
                "update_bn": spec.update_bn,
            }
            for label, spec in task.averages.items()
        },
        "record_every": task.record_every,
        "block_steps": task.block_steps,
        "decay_fractions": list(task.decay_fractions),
        "tuning_seeds": list(task.tuning_seeds),
    }
