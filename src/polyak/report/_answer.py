"""What a report says first: which weights to ship, what that brings, how surely, and how to get them."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from polyak._evaluate import badness
from polyak.checkpoints._checkpoint import is_recording
from polyak.inspection import Movement
from polyak.selection import Selection, _result
from polyak.trajectory import Block, Explanation, Trajectory

__all__ = ["Answer", "Figure", "answer", "diverged_in", "reach", "signed"]

Decision = Literal["average", "live", "open"]

_HEADLINES: dict[Decision, str] = {
    "average": "Ship the average",
    "live": "Keep the live weights",
    "open": "Not decided yet",
}
# The part of a profile's weight that says which steps it is about.
_MOST_OF_IT = 0.95
# How far neighbouring blocks lie apart, in sizes of the weights, where a run went off.
_WENT_OFF = 5


@dataclass(frozen=True)
class Figure:
    """One of the three numbers that stand under the headline."""

    label: str
    number: str
    remark: str


@dataclass(frozen=True)
class Answer:
    """The first screen of a page.

    Attributes:
        decision: which weights to ship.
        headline: the same in a few words.
        lead: what it brings, and whether that is more than noise.
        check: what a holdout said; empty where there was none.
        simpler: which simpler average is as good, if one is.
        figures: live, chosen, gain; empty where nothing was scored.
        writing: what writes the weights, to be pasted; empty where there is nothing to write.
        writing_remark: where to paste it.
        caveats: what speaks against it, in sentences.
    """

    decision: Decision
    headline: str
    lead: str
    check: str = ""
    simpler: str = ""
    figures: tuple[Figure, ...] = ()
    writing: str = ""
    writing_remark: str = ""
    caveats: tuple[str, ...] = ()


def answer(
    trajectory: Trajectory,
    selection: Selection | None,
    command: str | None,
    diverged_in: Block | None = None,
) -> Answer:
    """What is known of which weights to ship.

    Args:
        trajectory: the run.
        selection: what was found; None: nothing was scored.
        command: a command line that writes the chosen weights, if there is one.
        diverged_in: the block, if any, where the run went off: better than what came of that says nothing.
    """
    if selection is None:
        return _unscored(trajectory)
    if diverged_in is not None:
        return _diverged(trajectory, selection, diverged_in)
    decision = decided(selection)
    headline = _HEADLINES[decision]
    if decision == "live" and selection.baseline.name == _result.RECALIBRATED:
        headline += ", with recomputed BatchNorm statistics"
    writing, remark = _writing(trajectory, selection, command) if decision != "live" else _keeping(selection)
    return Answer(
        decision=decision,
        headline=headline,
        lead=_lead(selection),
        check=_checked(selection),
        simpler=_simpler(selection) if decision == "average" else "",
        figures=_figures(trajectory, selection),
        writing=writing,
        writing_remark=remark,
        caveats=tuple(_caveats(selection)),
    )


def decided(selection: Selection) -> Decision:
    """Which weights to ship: data that nothing was chosen on decide, where there are any.

    An average must be better beyond noise; where that cannot be known, from one number for each, the holdout must
    be better as well.
    """
    best, holdout = selection.best, selection.holdout
    if not (math.isfinite(best.score) and math.isfinite(best.difference)):
        return "open"
    if best.profile is None:
        return "live"
    if holdout is not None:
        ships = _confirms(selection)
    elif selection.beats_baseline is None:
        return "open"
    else:
        ships = selection.beats_baseline
    return "average" if ships else "live"


def reach(explained: Explanation) -> str:
    """Which steps a profile is about, in words.

    >>> import numpy as np, polyak
    >>> from polyak.trajectory import Block
    >>> blocks = [Block(0, 60, count=60), Block(60, 100, count=40)]
    >>> for shares, live in (([0.0, 1.0], 0.0), ([0.02, 0.98], 0.0), ([0.2, 0.2], 0.6)):
    ...     print(reach(Explanation(polyak.Weights(shares), blocks, np.array(shares), live)))
    a mean of the weights of steps 60 to 100
    a mean of the weights of steps 0 to 100, mostly of the last 40
    40% a mean of the weights of steps 0 to 100, 60% the live ones
    """
    counted = [(block, a) for block, a in zip(explained.blocks, explained.coefficients, strict=True) if a]
    first, last = counted[0][0], counted[-1][0]
    total = 1 - explained.live
    what, rest = (
        (f"{total:.0%} a mean", f", {explained.live:.0%} the live ones") if explained.live else ("a mean", "")
    )
    left, begin = total, first.start
    for block, coefficient in counted:
        if left - coefficient < _MOST_OF_IT * total:
            begin = block.start
            break
        left -= coefficient
    is_short = len(counted) < len(explained.blocks) or begin == first.start
    mostly = "" if is_short else f", mostly of the last {last.stop - begin:,}"
    return f"{what} of the weights of steps {first.start:,} to {last.stop:,}{mostly}{rest}"


def signed(value: float | None) -> str:
    """A difference with its sign.

    >>> signed(-0.01234), signed(0.5)
    ('−0.0123', '+0.5')
    """
    return (
        "unknown"
        if value is None or not math.isfinite(value)
        else f"{value:+.3g}".replace("-", "\N{MINUS SIGN}")
    )


def _unscored(trajectory: Trajectory) -> Answer:
    place = shlex.quote(trajectory._place)
    return Answer(
        decision="open",
        headline="Nothing was scored yet",
        lead="This page shows how the run went. Which average of it is best, and whether it beats the live weights, "
        "those that training ended with, only a score on held-out data can tell. Name your model and your score:",
        writing=f"polyak report {place} -o report.html --model my.model:build --score my.data:losses",
        writing_remark="In a terminal, with functions of yours; polyak report --help says what they return.",
    )


def diverged_in(blocks: Sequence[Block], movement: Movement) -> Block | None:
    """The first block of the run's second half whose weights lie many times their own size from those before."""
    pairs = list(zip(blocks[1:], movement.neighbours, strict=True))
    late = pairs[len(pairs) // 2 :]
    return next((block for block, moved in late if (moved.relative_distance or 0) > _WENT_OFF), None)


def _diverged(trajectory: Trajectory, selection: Selection, block: Block) -> Answer:
    before = f"window:{trajectory.blocks[0].start},{block.start}"
    return Answer(
        decision="open",
        headline="Ship neither: the run diverged",
        lead=f"In steps {block} the weights moved by more than {_WENT_OFF} times their own size. An average may score "
        "better than what came of that, and be no good model all the same. Go back to before it: an average of the "
        f"steps up to there is {before}, which --profiles scores.",
        check=_checked(selection),
        figures=_figures(trajectory, selection),
        caveats=tuple(selection.caveats),
    )


def _confirms(selection: Selection) -> bool:
    holdout = selection.holdout
    assert holdout is not None
    if holdout.low is None or holdout.high is None:
        return badness(holdout.difference, selection.mode) < 0
    return holdout.high < 0 if selection.mode == "min" else holdout.low > 0


def _lead(selection: Selection) -> str:
    best, baseline = selection.best, selection.baseline
    if not selection.has_best:
        return "No candidate has a finite score: look at what the score returns for the live weights first."
    if not math.isfinite(best.difference):
        return (
            "The live weights have no finite score, and averages have: either the run diverged, and the best of it may "
            "be no good model, or the score is broken. Look at what it returns for the live weights first."
        )
    if best.profile is None:
        averages = sum(candidate.profile is not None for candidate in selection.table)
        count = (
            "The average tried scores no" if averages == 1 else f"None of {averages} averages tried scores"
        )
        return f"{count} better than the weights that training ended with."
    against = "the weights that training ended with"
    if baseline.name == _result.RECALIBRATED:
        against += ", also with recomputed BatchNorm statistics"
    sentence = f"The best average scores better than {against}"
    if selection.beats_baseline is None:
        unknown = (
            "" if selection.holdout else "; whether that is more than noise, one number for each cannot tell"
        )
        return f"{sentence}{unknown}."
    return (
        f"{sentence}, {'beyond' if selection.beats_baseline else 'but not beyond'} the noise of these "
        f"{selection.examples:,} examples."
    )


def _checked(selection: Selection) -> str:
    """What a holdout said, in a sentence."""
    holdout = selection.holdout
    if holdout is None:
        return ""
    on = "other data" if holdout.examples is None else f"{holdout.examples:,} other examples"
    if not math.isfinite(holdout.difference):
        return "\N{BALLOT X} Not confirmed: on the holdout a score is not finite."
    size = f"a difference of {signed(holdout.difference)}{_interval(holdout.low, holdout.high, ', ')}"
    mark = "\N{CHECK MARK} Confirmed" if _confirms(selection) else "\N{BALLOT X} Not confirmed"
    return f"{mark} on a holdout, {on} that nothing was chosen on: {size}."


def _simpler(selection: Selection) -> str:
    simplest = selection.simplest
    if simplest is selection.best or simplest.profile is None:
        return ""
    return f"{_result.shortened(simplest.name)} is as good within noise, and simpler."


def _figures(trajectory: Trajectory, selection: Selection) -> tuple[Figure, ...]:
    average, baseline = selection.best_average, selection.baseline
    chosen = "Chosen average" if selection.best is average else "Best average"
    live = "Live weights" if baseline.name == _result.LIVE else "Live, recalibrated"
    assert average.profile is not None, "an average has a profile"
    what = f"{_result.shortened(average.name)}: {reach(trajectory.explain(average.profile))}"
    gain = "Gain" if badness(average.difference, selection.mode) < 0 else "Difference"
    return (
        Figure(live, f"{baseline.score:.4g}", f"score of what training ended with, {selection.better}"),
        Figure(chosen, f"{average.score:.4g}", what),
        Figure(
            gain,
            signed(average.difference),
            _interval(average.low, average.high) or "one number: no interval",
        ),
    )


def _interval(low: float | None, high: float | None, before: str = "") -> str:
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return ""
    return f"{before}95% interval {signed(low)} to {signed(high)}"


def _caveats(selection: Selection) -> Sequence[str]:
    caveats = list(selection.caveats)
    if selection.best.profile is None:
        return caveats
    if selection.holdout is None:
        caveats.append(
            "Not yet confirmed: the average was picked because it did best on these examples, so its score is "
            "optimistic. Score it once more on data that nothing was chosen on (--holdout, or holdout= in Python)."
        )
    elif selection.beats_baseline is None:
        caveats.append(
            "There was one number for each set of weights, so how large noise is stays unknown. Let the score return "
            "one loss per example."
        )
    return [*caveats, *(f"{warning[:1].upper()}{warning[1:]}." for warning in selection.best.warnings)]


def _writing(trajectory: Trajectory, selection: Selection, command: str | None) -> tuple[str, str]:
    """What writes the chosen average, and where to paste it."""
    profile, place = str(selection.best_average.profile), trajectory._place
    if command is not None:
        return command, "In a terminal, in the folder where this page was made."
    if not is_recording(Path(place)):
        return (
            'choice.write("averaged.safetensors")',
            "In Python, where this page was made; choice is what polyak.select returned.",
        )
    run = f"import polyak, torch\nrun = polyak.Trajectory({place!r})\n"
    if selection._recalibrate is None:
        return (
            f'{run}run.write("{profile}", "averaged.safetensors")',
            "In Python, in the folder where this page was made.",
        )
    return (
        f'{run}model.load_state_dict(run.average("{profile}"), strict=False)\n'
        'polyak.update_bn(train_loader, model)\ntorch.save(model.state_dict(), "averaged.pt")',
        "In Python, with your model and your batches of training data for its BatchNorm statistics.",
    )


def _keeping(selection: Selection) -> tuple[str, str]:
    if selection.baseline.name == _result.RECALIBRATED:
        return (
            "polyak.update_bn(train_loader, model)",
            "In Python, with the weights that training ended with in model.",
        )
    return "", "There is nothing to write: ship the weights that training ended with."
