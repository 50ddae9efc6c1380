"""`select`: every candidate average of a run, scored in the user's own model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from polyak.errors import OptionError
from polyak.profiles import Profile, as_profile
from polyak.selection.candidates import coarse_grid, fine_grid
from polyak.selection.progress import bar
from polyak.selection.selection import Selection, ranked
from polyak.selection.stream import averages
from polyak.selection.trial import (
    Mode,
    ScoreFunction,
    badness,
    refuse_no_trajectory,
    refuse_unknown_mode,
    try_weights,
)
from polyak.selection.uncertainty import Score, paired_intervals
from polyak.selection.verdict import LIVE, Candidate, HoldoutCheck
from polyak.selection.weights import live_weights, refuse_one_pass
from polyak.trajectory import Explanation, Trajectory

__all__ = ["select"]

Scores = dict[Profile | None, Score]


def select(
    trajectory: Trajectory,
    model: nn.Module,
    *,
    score: ScoreFunction,
    mode: Mode = "min",
    profiles: Iterable[Profile | str] | None = None,
    recalibrate: Iterable[Any] | None = None,
    holdout: ScoreFunction | None = None,
    progress: bool = True,
) -> Selection:
    """Score many averages of a run, and the live weights, and say which is best and how surely.

    The best is the best score, nothing else; the verdict says whether it differs from the live weights beyond
    noise. With losses ℓ_i of N examples under a candidate and under the live weights, the paired difference is
    d = (1/N) Σ (ℓ_i - ℓ_i^live), and its interval is the middle 95% of d over 2,000 resamples of the examples.
    The best of many candidates looks better than it is: ``holdout`` scores it once more, on other data.

    Tails are built by one running pass over the blocks; memory is one average (a few, of a small model), a
    backup of the live weights, and a block.

    Args:
        trajectory: a recorded run, or a folder of checkpoints.
        model: takes the weights of each candidate, in evaluation mode and without gradients, while it is
            scored. Its own weights, modes and buffers are as before when this returns or raises. The candidate
            named ``live`` are the weights that the run ended with, see :meth:`Trajectory.live`; only of a
            recording that was not closed they are those in the model.
        score: ``score(model)`` returns a number, or a tensor of shape [N] with one loss per example, always
            of the same examples in the same order.
        mode: "min" if lower scores are better, "max" if higher ones are.
        profiles: what to try, as profiles or as text; None: tails, decays, EMAs and powers on a coarse grid,
            without those that the blocks cannot resolve, then a finer grid around the best average.
        recalibrate: batches that can be gone through many times, for :func:`polyak.update_bn` before each
            average is scored. The live weights keep the statistics they have.
        holdout: like ``score``, on data that nothing is chosen on.
        progress: show a bar on stderr.

    Raises:
        OptionError: an option is out of range, no profile can be tried, or scores cannot be used.
        StructureError: the trajectory is that of another model.
        CheckpointError: a block or checkpoint is damaged; it is named.
        NotStartedError: the trajectory holds no block yet.

    >>> import tempfile, torch, polyak
    >>> folder = tempfile.TemporaryDirectory()
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> run = polyak.Recorder(model, folder.name, block=1)
    >>> for value in (5.0, 1.0, 3.0, 1.0, 3.0):                 # the run circles around 2
    ...     _ = model.weight.data.fill_(value)
    ...     run.update()
    >>> run.close()
    >>> choice = polyak.select(run.trajectory, model, score=lambda m: (m.weight.item() - 2) ** 2,
    ...                        profiles=["tail:0.4", "tail:0.8", "uniform"], progress=False)
    >>> choice.best.name, choice.best.score, choice.live.score
    ('tail:0.4', 0.0, 1.0)
    >>> choice.apply(model)
    >>> model.weight.item()
    2.0
    >>> folder.cleanup()
    """
    refuse_unknown_mode(mode)
    refuse_one_pass(recalibrate)
    refuse_no_trajectory(trajectory)
    steps = trajectory.blocks[-1].stop - trajectory.blocks[0].start
    tried = _distinct(trajectory, coarse_grid(steps)) if profiles is None else _given(trajectory, profiles)
    with bar("candidates", progress) as advance:

        def try_all(explained: Sequence[Explanation]) -> Scores:
            scores: Scores = {}
            for profile, weights in advance(averages(trajectory, explained), len(explained)):
                scores[profile] = try_weights(model, weights, score, recalibrate)
            return scores

        scores: Scores = {None: try_weights(model, live_weights(trajectory), score)} | try_all(tried)
        if profiles is None:
            near = _distinct(trajectory, fine_grid(_best_average(scores, mode), steps), known=tried)
            scores |= try_all(near)
            tried += near
        table = ranked(_candidates(scores, {one.profile: one for one in tried}), mode)
        check = None
        if holdout is not None and table[0].profile is not None:
            check = _check(trajectory, model, table[0].profile, holdout, recalibrate)
    return Selection(table, mode, check, trajectory, model, recalibrate)


def _given(trajectory: Trajectory, profiles: Iterable[Profile | str]) -> list[Explanation]:
    """The user's own profiles; one that the blocks cannot resolve is refused before any is scored."""
    if isinstance(profiles, str | Profile):
        raise OptionError(f"profiles must be a list, got {profiles!r}: write [{profiles!r}]")
    given = dict.fromkeys(map(as_profile, profiles))
    if not given:
        raise OptionError("profiles is empty: give at least one, or None for the default grid")
    return [trajectory.explain(profile) for profile in given]


def _distinct(
    trajectory: Trajectory, grid: Sequence[Profile], known: Sequence[Explanation] = ()
) -> list[Explanation]:
    """The profiles of ``grid`` that the blocks resolve and that differ from each other on these blocks."""
    seen = {_rounded(explained) for explained in known}
    distinct = []
    for profile in grid:
        try:
            explained = trajectory.explain(profile)
        except OptionError:  # it looks back less far than the blocks resolve
            continue
        if _rounded(explained) not in seen:
            distinct.append(explained)
            seen.add(_rounded(explained))
    return distinct


def _rounded(explained: Explanation) -> tuple[float, ...]:
    return tuple(explained.coefficients.round(9).tolist())


def _best_average(scores: Scores, mode: Mode) -> Profile:
    averages = [profile for profile in scores if profile is not None]
    return min(averages, key=lambda profile: badness(scores[profile].value, mode))


def _candidates(scores: Scores, explained: Mapping[Profile, Explanation]) -> list[Candidate]:
    live = scores[None]
    intervals = paired_intervals(list(scores.values()), live)
    return [
        Candidate(
            name=LIVE if profile is None else str(profile),
            profile=profile,
            score=score.value,
            stderr=score.stderr,
            difference=score.value - live.value,
            low=interval.low if interval else None,
            high=interval.high if interval else None,
            effective_samples=1.0 if profile is None else explained[profile].effective_samples,
            warnings=() if profile is None else explained[profile].warnings,
        )
        for (profile, score), interval in zip(scores.items(), intervals, strict=True)
    ]


def _check(
    trajectory: Trajectory,
    model: nn.Module,
    best: Profile,
    holdout: ScoreFunction,
    recalibrate: Iterable[Any] | None,
) -> HoldoutCheck:
    live = try_weights(model, live_weights(trajectory), holdout)
    score = try_weights(model, trajectory.average(best), holdout, recalibrate)
    (interval,) = paired_intervals([score], live)
    return HoldoutCheck(
        best_score=score.value,
        live_score=live.value,
        difference=score.value - live.value,
        low=interval.low if interval else None,
        high=interval.high if interval else None,
    )
