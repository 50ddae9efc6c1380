"""The numbers of a study as plain sentences."""

from __future__ import annotations

from collections import Counter

from polyak.demo.statistics import Difference, paired_difference
from polyak.demo.study import Study
from polyak.demo.tasks import CHOSEN, LIVE

__all__ = ["SIGNIFICANT", "format_p", "verdict"]

SIGNIFICANT = 0.05


def verdict(study: Study) -> list[str]:
    """Whether averaging helped, by how much and how surely: one sentence per question.

    It is about the weights that :func:`polyak.select` chose from the recording of each run, by validation. A
    difference over seeds counts as real if its two-sided paired t-test has p < 0.05; otherwise it is "not sure".
    """
    sentences = [_choices(study), _against_live(study), _against_decay(study)]
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


def _against_live(study: Study) -> str:
    difference = _nll_difference(study, LIVE)
    opening = _by_outcome(
        difference,
        lower="Averaging helped",
        higher="Averaging did not help, it did harm",
        unsure="Not sure whether averaging helped",
    )
    return f"{opening}: the test NLL of what was chosen is {_size(difference, f'the {LIVE}')}."


def _against_decay(study: Study) -> str:
    difference = _nll_difference(study, study.decay)
    opening = _by_outcome(
        difference,
        lower="It also beat the best tuned learning-rate decay",
        higher="The best tuned learning-rate decay is better still",
        unsure="Against the best tuned learning-rate decay there is no sure difference",
    )
    runs = len(study.task.decay_fractions) * len(study.task.tuning_seeds)
    return (
        f"{opening}: the test NLL is {_size(difference, 'decay')}. That decay is linear over the last "
        f"{study.decay_fraction:.0%}, a share that {runs} runs on other seeds went to find; averaging needed none."
    )


def _without_update_bn(study: Study, *labels: str) -> str:
    raw, recomputed = (study.scores(label, "accuracy") for label in labels)
    difference = paired_difference(raw, recomputed)
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


def _nll_difference(study: Study, baseline: str) -> Difference:
    return paired_difference(study.scores(CHOSEN, "nll"), study.scores(baseline, "nll"))


def _by_outcome(difference: Difference, *, lower: str, higher: str, unsure: str) -> str:
    if difference.p_value >= SIGNIFICANT:
        return unsure
    return lower if difference.mean < 0 else higher


def _size(difference: Difference, baseline: str) -> str:
    side = "below" if difference.mean < 0 else "above"
    return (
        f"{abs(difference.mean):.4f} {side} that of {baseline} (95% interval of the difference "
        f"{difference.low:+.4f} to {difference.high:+.4f}, {format_p(difference.p_value)}, lower on "
        f"{difference.seeds_lower} of {difference.seeds} seeds)"
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
