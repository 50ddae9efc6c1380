"""Which average of a run to ship: candidates from a trajectory, scored in the user's own model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from polyak import _evaluate, _terminal
from polyak._checks import checked
from polyak._distributed import is_main_rank
from polyak._evaluate import Mode, Score
from polyak._mean import mean_dtype
from polyak.batchnorm import tracks_statistics
from polyak.errors import OptionError
from polyak.profiles import Blend, Profile, Tail, Weights, as_profile, registered
from polyak.profiles._base import rounded
from polyak.selection._line import can_blend, search_lines
from polyak.selection._result import LIVE, RECALIBRATED, Candidate, HoldoutCheck, Selection, simplicity
from polyak.trajectory import Explanation, Trajectory

__all__ = ["averages", "coarse_grid", "fine_grid", "fold_in", "select"]

# Which profiles `select` tries where it is not told: a coarse grid, then a finer one around its best.

# Where between two neighbouring values of the coarse grid the finer ones lie, in logarithms.
_BETWEEN = (1 / 3, 2 / 3)
# More digits than scores can tell apart are of no use, and fewer are read with ease.
_DIGITS = 3


def coarse_grid(steps: int) -> list[Profile]:
    """The candidates of every profile that names some, for a run of ``steps`` optimizer steps.

    >>> grid = coarse_grid(1000)
    >>> [str(profile) for profile in grid if isinstance(profile, Tail)][:3]
    ['tail:0.02', 'tail:0.05', 'tail:0.1']
    """
    return [profile for cls in registered().values() for profile in cls.candidates(steps)]


def fine_grid(best: Profile, steps: int) -> list[Profile]:
    """Four profiles around ``best``, one of :func:`coarse_grid`: two on either side, to its neighbours.

    Neighbours are those before and after it that differ from it in one number. Where one is missing, at an end, the
    next value outwards is as far away as the one inwards; values that the profile refuses are left out.

    >>> [str(profile) for profile in fine_grid(Tail(0.2), 1000)]
    ['tail:0.159', 'tail:0.126', 'tail:0.241', 'tail:0.29']
    """
    finer = []
    for option, value in _values_around(best, list(type(best).candidates(steps))):
        with suppress(OptionError):  # out of its range
            finer.append(replace(best, **{option: value}))
    return finer


def _values_around(best: Profile, grid: Sequence[Profile]) -> list[tuple[str, float]]:
    if best not in grid:
        return []
    at = grid.index(best)
    beside = [*grid[max(at - 1, 0) : at], *grid[at + 1 : at + 2]]
    named = [(name, near) for near in beside if (name := _only_difference(best, near))]
    if not named:
        return []
    option = named[0][0]
    value = getattr(best, option)
    ends = [getattr(near, option) for name, near in named if name == option]
    ends = ends if len(ends) == 2 else [*ends, value**2 / ends[0]]
    around = [value * (end / value) ** part for end in ends for part in _BETWEEN]
    return [(option, round(near) if isinstance(value, int) else rounded(near, _DIGITS)) for near in around]


def _only_difference(one: Profile, other: Profile) -> str | None:
    """The one option, a positive number, in which two profiles differ; None where there is no such option."""
    values = {field.name: (getattr(one, field.name), getattr(other, field.name)) for field in fields(one)}
    unlike = [name for name, (first, second) in values.items() if first != second]
    numbers = all(isinstance(value, int | float) and value > 0 for name in unlike for value in values[name])
    return unlike[0] if len(unlike) == 1 and numbers else None


# Many averages of one trajectory, one after the other, with few of them in memory at a time.

# Small models are averaged many profiles at a time, as reading each block costs more than its arithmetic.
_TOGETHER_BYTES = 64 << 20
_ROUNDING = 1e-12


def averages(
    trajectory: Trajectory, explained: Sequence[Explanation]
) -> Iterator[tuple[Profile, dict[str, Tensor]]]:
    """Each explained profile with its average: name to tensor, which the next step may overwrite.

    Where all fit into 64 MB they are made in one pass over the blocks. Else tails come first, shortest first: each
    is the one before plus the blocks that it reaches further back, so that all of them read every block about once
    and hold one running mean; what is not averaged is as in the newest block, which all of them reach. Of the
    others there are as many in memory as 64 MB hold, at least one.
    """
    together = max(1, _TOGETHER_BYTES // max(1, trajectory.average_bytes))
    tails = [one for one in explained if isinstance(one.profile, Tail)] if together < len(explained) else []
    yield from _nested_tails(trajectory, tails)
    others = [one.profile for one in explained if not (tails and isinstance(one.profile, Tail))]
    for first in range(0, len(others), together):
        chunk = others[first : first + together]
        yield from zip(chunk, trajectory.average_many(chunk), strict=True)


def _nested_tails(
    trajectory: Trajectory, tails: Sequence[Explanation]
) -> Iterator[tuple[Profile, dict[str, Tensor]]]:
    running: dict[str, Tensor] = {}
    reached = np.zeros(len(trajectory.blocks))
    for tail in sorted(tails, key=lambda tail: tail.coefficients[-1], reverse=True):
        further = _beyond(reached, tail.coefficients)
        share = 1.0 if further is None else float(further.sum())
        if further is None:
            running = {}
            fold_in(running, trajectory.average(tail.profile), share, trajectory.averaged_names)
        elif share > 0:
            mean = trajectory.average(Weights(further.tolist()))
            fold_in(running, mean, share, trajectory.averaged_names)
        reached = tail.coefficients
        yield tail.profile, running


def _beyond(shorter: NDArray[np.float64], longer: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """What a longer tail adds: ``longer = c · shorter + rest`` with rest ≥ 0 that sums to 1 - c.

    None where there is no such rest, as between a tail in steps and one in samples where blocks hold unlike
    numbers of samples.
    """
    kept = longer[-1] / shorter[-1] if shorter[-1] else 0.0
    rest = longer - kept * shorter
    if rest.min() < -_ROUNDING:
        return None
    # What rounding leaves of blocks that both cover alike must not have those blocks read again.
    return np.where(rest > _ROUNDING, rest, 0.0)


@torch.no_grad()
def fold_in(
    running: dict[str, Tensor], mean: dict[str, Tensor], coefficient: float, averaged: Collection[str]
) -> None:
    """m += c (w - m) for the tensors named ``averaged``, tied ones once; the others stay what they were first."""
    if not running:
        copies = {
            id(tensor): tensor.to(mean_dtype(tensor.dtype))
            for name, tensor in mean.items()
            if name in averaged
        }
        running.update({name: copies.get(id(tensor), tensor) for name, tensor in mean.items()})
        return
    pairs = {id(running[name]): (running[name], mean[name]) for name in mean if name in averaged}
    for kept, tensor in pairs.values():
        kept.lerp_(tensor.to(kept.dtype), coefficient)


# `select`: every candidate average of a run, scored in the user's own model.

# Of averages by their profile, of live weights by their name; live weights come first.
Scores = dict[Profile | str, Score]


@dataclass(frozen=True)
class _Trials:
    """How the candidates of a run are scored in the user's model."""

    trajectory: Trajectory
    model: nn.Module
    recalibrate: Iterable[Any] | None
    prepare: _evaluate.Prepare | None

    def live(self, name: str, score: _evaluate.ScoreFunction, called: str = "score") -> Score:
        """The score of the live weights of that name."""
        recalibrate = self.recalibrate if name == RECALIBRATED else None
        weights = _evaluate.live_weights(self.trajectory)
        return _evaluate.try_weights(self.model, weights, score, recalibrate, self.prepare, called)

    def average(
        self, weights: Mapping[str, Tensor], score: _evaluate.ScoreFunction, called: str = "score"
    ) -> Score:
        """The score of an average."""
        return _evaluate.try_weights(self.model, weights, score, self.recalibrate, self.prepare, called)


@checked
def select(
    trajectory: Trajectory,
    model: nn.Module,
    *,
    score: _evaluate.ScoreFunction,
    mode: Mode | None = None,
    profiles: Iterable[Profile | str] | None = None,
    recalibrate: Iterable[Any] | None = None,
    holdout: _evaluate.ScoreFunction | None = None,
    prepare: _evaluate.Prepare | None = None,
    progress: bool = True,
) -> Selection:
    """Score many averages of a run, and the live weights, and say which is best and how surely.

    The best is the best score, nothing else; the verdict says whether it differs from the live weights beyond
    noise, and which simpler candidate is as good. With losses ℓ_i of N examples under a candidate and under the
    live weights, the paired difference is d = (1/N) Σ (ℓ_i - ℓ_i^live). Its interval holds for all candidates at
    once with 95%, over 2,000 resamples of the examples, so that the best may be chosen by it: where no average is
    better, the verdict claims that one is in about 5% of cases at most. The score of the best is optimistic all the
    same: ``holdout`` scores it once more, on other data.

    Where BatchNorm statistics are recomputed, that alone may help. So the live weights are scored with recomputed
    statistics too, as ``live, recalibrated``, and differences are to the better of the two.

    Tails are built by one running pass over the blocks; memory is one average (a few, of a small model), a
    backup of the live weights, and a block; with ``prepare`` a copy of the model besides.

    Args:
        trajectory: a recorded run, or a folder of checkpoints, with all parameters and buffers of the model.
        model: takes the weights of each candidate, in evaluation mode and without gradients, while it is
            scored. Its own weights, modes and buffers are as before when this returns or raises. The candidate
            named ``live`` are the weights that the run ended with, see :meth:`Trajectory.live`; only of a
            recording that was not closed they are those in the model.
        score: ``score(model)`` returns a number, or a tensor of shape [N] with one loss per example, always
            of the same examples in the same order. It draws the same random numbers for each candidate, from torch's,
            NumPy's and Python's own generators, and what it does to the model is undone.
        mode: "min" if lower scores are better, "max" if higher ones are; None: "min" for losses per example. A
            single number, or whole numbers such as zeros and ones, may be an accuracy and need it said.
        profiles: what to try, as profiles or as text; None: the ``candidates`` of every profile there is (tails,
            decays, EMAs and powers on a coarse grid, and those of your own), without those that the blocks cannot
            resolve, then a finer grid around the best average, then blends of averages with the live weights, where
            the trajectory has those.
        recalibrate: batches that can be gone through many times, for :func:`polyak.update_bn` before each
            average is scored.
        holdout: like ``score``, on data that nothing is chosen on; the same data are refused.
        prepare: ``prepare(copy)`` is given a copy of the model with each candidate's weights, the live ones included,
            and returns what is scored in its place, or None if it changed the copy: for weights that are shipped
            quantised or pruned. What is chosen is applied and written as it was before that.
        progress: show a bar on stderr.

    Raises:
        OptionError: an option is out of range, ``mode`` is needed, no profile can be tried, or scores cannot be
            used.
        StructureError: the trajectory is that of another model, or lacks tensors of it.
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
    >>> choice = polyak.select(run.trajectory, model, score=lambda m: (m.weight.item() - 2) ** 2, mode="min",
    ...                        profiles=["tail:0.4", "tail:0.8", "uniform"], progress=False)
    >>> choice.best.name, choice.best.score, choice.live.score
    ('tail:0.4', 0.0, 1.0)
    >>> choice.apply(model)
    >>> model.weight.item()
    2.0
    >>> folder.cleanup()
    """
    _evaluate.refuse_unknown_mode(mode)
    _evaluate.refuse_one_pass(recalibrate)
    _evaluate.refuse_no_trajectory(trajectory)
    _evaluate.refuse_incomplete(trajectory, model)
    steps = trajectory.blocks[-1].stop - trajectory.blocks[0].start
    tried = _distinct(trajectory, coarse_grid(steps)) if profiles is None else _given(trajectory, profiles)
    trials = _Trials(trajectory, model, recalibrate, prepare)
    with _terminal.progress_bar("candidates", shown=progress and is_main_rank()) as bar:

        def try_all(explained: Sequence[Explanation]) -> Scores:
            found = bar.over(averages(trajectory, explained), len(explained))
            return {profile: trials.average(weights, score) for profile, weights in found}

        scores: Scores = {LIVE: trials.live(LIVE, score)}
        mode = _evaluate.resolved_mode(mode, scores[LIVE])
        unchosen = None if holdout is None else _Holdout(trials, holdout, score, scores[LIVE])
        if recalibrate is not None and tracks_statistics(model):
            scores[RECALIBRATED] = trials.live(RECALIBRATED, score)
        scores |= try_all(tried)
        if profiles is None:
            near = _distinct(trajectory, fine_grid(_best_average(scores, mode), steps), known=tried)
            scores |= try_all(near)
            tried += near
            tried += _blends(trajectory, tried, scores, mode, try_all)
        table = _ranked(scores, {one.profile: one for one in tried}, mode)
        check = None if unchosen is None else unchosen.check(table)
    return Selection(
        table, mode, check, trajectory, model, recalibrate, scores[LIVE].examples, prepare is not None
    )


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
    seen = {_rounded_weights(explained) for explained in known}
    distinct = []
    for profile in grid:
        try:
            explained = trajectory.explain(profile)
        except OptionError:  # it looks back less far than the blocks resolve
            continue
        if _rounded_weights(explained) not in seen:
            distinct.append(explained)
            seen.add(_rounded_weights(explained))
    return distinct


def _rounded_weights(explained: Explanation) -> tuple[float, ...]:
    return (*explained.coefficients.round(9).tolist(), round(explained.live, 9))


def _best_average(scores: Scores, mode: Mode) -> Profile:
    averages = [profile for profile in scores if isinstance(profile, Profile)]
    return min(averages, key=lambda profile: _evaluate.badness(scores[profile].value, mode))


def _blends(
    trajectory: Trajectory,
    tried: Sequence[Explanation],
    scores: Scores,
    mode: Mode,
    try_all: Callable[[Sequence[Explanation]], Scores],
) -> list[Explanation]:
    """Blends of the live weights with averages, where there are any to try; their scores are put into ``scores``."""
    blends: list[Explanation] = []

    def badness(key: Profile | str) -> float:
        return _evaluate.badness(scores[key].value, mode)

    def try_some(profiles: Sequence[Blend]) -> dict[Blend, float]:
        new = _distinct(trajectory, profiles, known=[*tried, *blends])
        scores.update(try_all(new))
        blends.extend(new)
        return {blend: badness(blend) for blend in profiles if blend in scores}

    if can_blend(trajectory):
        # The end of each line, as statistics are recomputed along it.
        live = badness(RECALIBRATED if RECALIBRATED in scores else LIVE)
        search_lines(tried, {one.profile: badness(one.profile) for one in tried}, live, try_some)
    return blends


def _ranked(scores: Scores, explained: Mapping[Profile, Explanation], mode: Mode) -> list[Candidate]:
    """Every candidate with its evidence, best first; of equal scores the simplest, so the live weights first."""

    def rank(key: Profile | str) -> tuple[float, tuple[int, int]]:
        profile = key if isinstance(key, Profile) else None
        return _evaluate.badness(scores[key].value, mode), simplicity(profile)

    keys = sorted(scores, key=rank)
    best, baseline = scores[keys[0]], scores[next(key for key in keys if isinstance(key, str))]
    to_baseline, to_best = _evaluate.simultaneous_intervals([scores[key] for key in keys], baseline, best)
    candidates = []
    for key, interval, behind in zip(keys, to_baseline, to_best, strict=True):
        profile = key if isinstance(key, Profile) else None
        candidates.append(
            Candidate(
                name=str(key),
                profile=profile,
                score=scores[key].value,
                stderr=scores[key].stderr,
                difference=scores[key].value - baseline.value,
                low=interval.low if interval else None,
                high=interval.high if interval else None,
                tied=behind.low <= 0 <= behind.high if behind else None,
                effective_samples=1.0 if profile is None else explained[profile].effective_samples,
                warnings=() if profile is None else explained[profile].warnings,
            )
        )
    return candidates


class _Holdout:
    """Data that nothing is chosen on: the live weights are scored at once, so that what is wrong is known at once.

    Raises:
        OptionError: the holdout is what the choice is made on.
    """

    def __init__(
        self,
        trials: _Trials,
        holdout: _evaluate.ScoreFunction,
        score: _evaluate.ScoreFunction,
        chosen_on: Score,
    ):
        self._trials, self._score = trials, holdout
        self._live = trials.live(LIVE, holdout, "holdout")
        if holdout is score or _are_same_losses(self._live, chosen_on):
            raise OptionError(
                "holdout gives the very losses that score gives, and would confirm whatever is chosen: let it look at "
                "other examples, or leave it out"
            )

    def check(self, table: Sequence[Candidate]) -> HoldoutCheck | None:
        """The best average and the baseline on the holdout; None where the live weights are the best."""
        best, baseline = table[0], next(candidate for candidate in table if candidate.profile is None)
        if best.profile is None:
            return None
        is_live = baseline.name == LIVE
        before = self._live if is_live else self._trials.live(baseline.name, self._score, "holdout")
        (weights,) = self._trials.trajectory.average_many([best.profile])
        after = self._trials.average(weights, self._score, "holdout")
        ((interval,),) = _evaluate.simultaneous_intervals([after], before)
        return HoldoutCheck(
            best_score=after.value,
            baseline_score=before.value,
            difference=after.value - before.value,
            low=interval.low if interval else None,
            high=interval.high if interval else None,
            examples=after.examples,
        )


def _are_same_losses(one: Score, other: Score) -> bool:
    """Whether two scores are of the same examples; right answers, and losses that are all equal, may by chance."""
    if one.group_sums is None or other.group_sums is None or one.counts or one.examples != other.examples:
        return False
    return np.array_equal(one.group_sums, other.group_sums) and bool(np.ptp(one.group_sums))
