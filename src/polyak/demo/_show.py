"""What the demo shows: the verdict, tables and figures, and the files they go to."""

from __future__ import annotations

import json
import os
import platform
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from polyak import _plots, _terminal
from polyak._checks import require
from polyak.checkpoints._io import write_file, writing
from polyak.demo import _study
from polyak.demo._study import Study
from polyak.demo._tasks import CHOSEN, LIVE, Task
from polyak.errors import OutputExistsError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType
    from rich.table import Table

__all__ = ["Outputs", "show", "study_as_data", "study_figure", "study_table", "verdict"]

# The demo's files: TASK.json, TASK.png and TASK.txt in one folder.


@dataclass(frozen=True)
class Outputs:
    """The three files of a task. A former demo's are rewritten; files that no demo made are left alone."""

    folder: Path
    task: str

    @property
    def paths(self) -> list[Path]:
        """Numbers, figure, and the table and verdict as text, in the order in which they are written."""
        return [self.folder / f"{self.task}.{suffix}" for suffix in ("json", "png", "txt")]

    def claim(self) -> None:
        """Make the folder, before hours of training find that it cannot be written.

        Raises:
            OutputExistsError: if one of the files is there and is not a former demo's.
            CheckpointError: if the folder cannot be made.
        """
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        present = [path.name for path in self.paths if path.exists()]
        if present and not self._made_by_demo():
            raise OutputExistsError(
                f"{self.folder} has {', '.join(present)}, not made by a former demo: "
                f"name another folder with --output, or move them away"
            )

    def write(self, numbers: dict[str, object], png: bytes, text: str) -> None:
        """Write all three, each whole or not at all."""
        # The JSON file goes first: it is what marks the others as the demo's own.
        as_json = json.dumps(numbers, indent=1, allow_nan=False) + "\n"
        for path, content in zip(self.paths, (as_json.encode(), png, text.encode()), strict=True):
            write_file(path, content, overwrite=True)

    def _made_by_demo(self) -> bool:
        try:
            former = json.loads(self.paths[0].read_bytes())
        except (OSError, ValueError):
            return False
        return isinstance(former, dict) and former.get("made_by") == MADE_BY


# The numbers of a study as plain sentences.

SIGNIFICANT = 0.05


def verdict(study: Study) -> list[str]:
    """Whether averaging helped, by how much and how surely: the answer, then one sentence per question.

    It is about the weights that :func:`polyak.select` chose from the recording of each run, by validation. A
    difference over seeds counts as real if its two-sided paired t-test has p < 0.05; otherwise it is "not sure".
    """
    sentences = [_answer(study), _against_live(study), _against_decay(study), _choices(study)]
    if study.task.update_bn_pair:
        sentences.append(_without_update_bn(study, *study.task.update_bn_pair))
    sentences.append(
        "The intervals are over seeds of one model on one data set: measure on your own before relying on it."
    )
    return sentences


def format_p(p_value: float) -> str:
    """
    >>> format_p(0.0312), format_p(0.00001)
    ('p = 0.031', 'p < 0.001')
    """
    return f"p = {p_value:.3f}" if p_value >= 0.001 else "p < 0.001"


def _choices(study: Study) -> str:
    found = study.selections.values()
    counts = Counter(selection["best"] for selection in found)
    choices = ", ".join(f"{name} ({count})" for name, count in counts.most_common())
    checks = [selection["holdout"] for selection in found if selection["holdout"]]
    confirmed = sum(check["high"] < 0 for check in checks)
    candidates = max(len(selection["candidates"]) for selection in found)
    return (
        f"After training, validation chose among up to {candidates} averages and the live weights, on so many "
        f"seeds: {choices}. Of {len(checks)} averages chosen, test confirms {confirmed} beyond the noise of its "
        "examples."
    )


def _answer(study: Study) -> str:
    """The verdict in one sentence, by the test NLL; accuracy stands first as it is what people know."""
    difference = _nll_difference(study, LIVE)
    agreed = {0: "worse", difference.seeds: "better"}.get(difference.seeds_lower)
    opening = _by_outcome(
        difference,
        lower="Averaging helped",
        higher="Averaging did not help, it did harm",
        unsure=f"Averaging did {agreed} on all {difference.seeds} seeds, too few to be sure"
        if agreed
        else "Not sure whether averaging helped",
    )
    against = _by_outcome(
        _nll_difference(study, study.decay),
        lower="which is worse",
        higher="which is better",
        unsure="no sure difference",
    )
    (live, live_nll), (chosen, chosen_nll), (decay, decay_nll) = (
        [_mean(study.scores(label, measure)) for measure in ("accuracy", "nll")]
        for label in (LIVE, CHOSEN, study.decay)
    )
    return (
        f"{opening}: accuracy {100 * live:.1f} → {chosen:.1%}, NLL {live_nll:.3f} → {chosen_nll:.3f}; the best tuned "
        f"decay reaches {decay:.1%} and {decay_nll:.3f}, {against}."
    )


def _against_live(study: Study) -> str:
    return f"The test NLL of what was chosen is {_size(_nll_difference(study, LIVE), f'the {LIVE}')}."


def _against_decay(study: Study) -> str:
    difference = _nll_difference(study, study.decay)
    runs = len(study.task.decay_fractions) * len(study.task.tuning_seeds)
    return (
        f"It is {_size(difference, 'the best tuned learning-rate decay')}. That decay is linear over the last "
        f"{study.decay_fraction:.0%}, a share that {runs} runs on other seeds went to find; averaging needed none."
    )


def _without_update_bn(study: Study, *labels: str) -> str:
    raw, recomputed = (study.scores(label, "accuracy") for label in labels)
    difference = _study.paired_difference(raw, recomputed)
    opening = _by_outcome(
        difference,
        lower="Without update_bn the average is wrong",
        higher="Without update_bn the average did better, which is unusual",
        unsure="Whether update_bn mattered is not sure here",
    )
    return (
        f"{opening}: {_mean(raw):.1%} of the test examples right instead of {_mean(recomputed):.1%} "
        f"({format_p(difference.p_value)})."
    )


def _nll_difference(study: Study, baseline: str) -> _study.Difference:
    return _study.paired_difference(study.scores(CHOSEN, "nll"), study.scores(baseline, "nll"))


def _by_outcome(difference: _study.Difference, *, lower: str, higher: str, unsure: str) -> str:
    if difference.p_value >= SIGNIFICANT:
        return unsure
    return lower if difference.mean < 0 else higher


def _size(difference: _study.Difference, baseline: str) -> str:
    side = "below" if difference.mean < 0 else "above"
    return (
        f"{abs(difference.mean):.4f} {side} that of {baseline} (95% interval of the difference "
        f"{difference.low:+.4f} to {difference.high:+.4f}, {format_p(difference.p_value)}, lower on "
        f"{difference.seeds_lower} of {difference.seeds} seeds)"
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


# The demo's figure: test NLL and accuracy along the run.

# Before this share of the run all candidates are far worse than where they end.
_FIRST_SHOWN = 0.25


def study_figure(study: Study) -> Figure:
    """Live weights, tuned decay and averages against training time, mean over seeds ± standard error."""
    labels = [LIVE, study.decay, *study.task.averages, CHOSEN]
    without_update_bn = (study.task.update_bn_pair or (None,))[0]
    panels = []
    for name, measure, scale in (
        ("NLL, lower is better", "nll", 1),
        ("accuracy, %", "accuracy", 100),
    ):
        lines = [_line(study, label, f"test_{measure}", scale) for label in labels]
        # An average with wrong statistics is drawn, but is no measure for the others.
        limits = _limits_of_second_half([line for line in lines if line.label != without_update_bn])
        panels.append(_plots.Panel(name, lines, limits))
    ends = {label: f"{_mean(study.scores(label, 'accuracy')):.1%}" for label in (CHOSEN, LIVE, study.decay)}
    title = (
        f"The average {CHOSEN} ends at {ends[CHOSEN]} accuracy, the {LIVE} at {ends[LIVE]}, the best tuned decay at "
        f"{ends[study.decay]} (mean of {len(study.curves)} seeds ± standard error)"
    )
    return _plots.line_panels(title, study.task.time_unit, panels)


def _line(study: Study, label: str, measure: str, scale: float) -> _plots.Line:
    curves = [curves[label] for curves in study.curves.values()]
    steps = np.array(curves[0].steps)
    # Until the decay begins, its run is that of the live weights and would hide it.
    constant_share = 1 - study.decay_fraction if label == study.decay else 0.0
    shown = steps >= max(_FIRST_SHOWN, constant_share) * study.task.steps
    scores = np.array([getattr(curve, measure) for curve in curves])
    roles: dict[str, _plots.Role] = {LIVE: "live", CHOSEN: "chosen"}
    return _plots.Line(
        label, steps[shown] / study.task.unit_steps, scale * scores[:, shown], roles.get(label, "other")
    )


def _limits_of_second_half(lines: list[_plots.Line]) -> tuple[float, float]:
    """Limits that show the second half of training in full: the first would squeeze what is compared."""
    end = max(np.max(np.asarray(line.x)) for line in lines)
    means = np.concatenate(
        [np.asarray(line.y)[:, np.asarray(line.x) >= end / 2].mean(axis=0) for line in lines]
    )
    margin = 0.08 * np.ptp(means)
    return float(means.min() - margin), float(means.max() + margin)


# A study as a table for people and as plain data for programs.

MADE_BY = "polyak demo"
_PACKAGES = ("polyak", "torch", "numpy", "scipy", "scikit-learn")


def study_table(study: Study) -> Table:
    """Test NLL and accuracy of each candidate, and its paired differences to both baselines."""
    title = f"Test scores over {len(study.curves)} seeds, mean ± standard error"
    table = _terminal.table("", "#", f"#minus {LIVE}", "#minus tuned decay", title=title)
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
    table.add_row(_terminal.line(name, "bold"))
    live, decay = study.scores(LIVE, measure), study.scores(study.decay, measure)
    for label in study.labels:
        scores = study.scores(label, measure)
        mean, stderr = _study.mean_and_error(scores)
        table.add_row(
            f" {label}",
            f"{number(mean)} ± {number(stderr)}",
            "" if label == LIVE else _cell(_study.paired_difference(scores, live), number),
            "" if label == study.decay else _cell(_study.paired_difference(scores, decay), number),
        )


def _cell(difference: _study.Difference, number: Callable[[float], str]) -> str:
    sign = "-" if difference.mean < 0 else "+"
    return f"{sign}{number(abs(difference.mean))} ({format_p(difference.p_value).replace(' ', '')})"


def _summary(study: Study, label: str) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    for measure in ("nll", "accuracy"):
        scores = study.scores(label, measure)
        mean, stderr = _study.mean_and_error(scores)
        summary[f"test_{measure}"] = {
            "by_seed": scores,
            "mean": mean,
            "stderr": stderr,
            "minus_live": asdict(_study.paired_difference(scores, study.scores(LIVE, measure))),
            "minus_tuned_decay": asdict(_study.paired_difference(scores, study.scores(study.decay, measure))),
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


# The whole demo: run a study before the user's eyes, print what came out, write the files.

_TEXT_FILE_COLUMNS = 100


def show(task: Task, seeds: int, outputs: Outputs, *, as_json: bool = False) -> None:
    """Run ``task`` on ``seeds`` seeds with a progress bar, print verdict and table or all numbers, write ``outputs``.

    Raises:
        MissingExtraError, OptionError, OutputExistsError, CheckpointError: before any training.
    """
    _study.check_seeds(task, seeds)
    for module in ("matplotlib", "scipy", "sklearn"):
        require(module, extra="demo", purpose="the demo")
    outputs.claim()
    console = _terminal.console()
    if not as_json:
        console.print(_announcement(task, seeds))
    study = _run_with_progress(task, seeds)
    answer, *details = verdict(study)
    findings: tuple[RenderableType, ...] = (
        _terminal.line(answer, "bold"),
        "",
        study_table(study),
        "",
        *details,
    )
    selected = (
        "\nWhat select found on the first seed, scored on validation, with test as the holdout:\n",
        study.first_selection,
    )
    text = _terminal.as_text(*findings, *selected, width=_TEXT_FILE_COLUMNS) + "\n"
    numbers = study_as_data(study)
    outputs.write(numbers, _plots.png_bytes(study_figure(study)), text)
    if as_json:
        console.print(json.dumps(numbers, indent=2), soft_wrap=True)
        return
    console.print(*findings, sep="\n")
    console.print(f"\n{_terminal.wrote(*outputs.paths)}", soft_wrap=True)


def _announcement(task: Task, seeds: int) -> str:
    return (
        f"Training {task.description}: {_study.run_count(task, seeds)} runs of {task.steps} steps.\n"
        f"The learning-rate decay is tuned for validation NLL on "
        f"{_terminal.counted(len(task.tuning_seeds), 'other seed')}; the averages' settings were fixed beforehand, but "
        "for one that validation chooses after training. The scores below are from the test set, which nothing was "
        "chosen on.\n"
    )


def _run_with_progress(task: Task, seeds: int) -> Study:
    with _terminal.progress_bar("starting", shown=True, total=_study.run_count(task, seeds)) as bar:
        workers = min(os.cpu_count() or 1, seeds)
        return _study.run_study(task, seeds, workers=workers, on_run=bar.advance)
