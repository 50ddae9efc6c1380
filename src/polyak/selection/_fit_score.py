"""`fit` for scores without gradients: the weights of groups of blocks, by CMA-ES."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from polyak._checks import require, whole_within
from polyak._evaluate import Mode, ScoreFunction, badness, refuse_one_pass, refuse_unknown_mode, try_weights
from polyak._mean import mean_dtype
from polyak.errors import NonFiniteError, OptionError
from polyak.profiles import Profile, Weights
from polyak.trajectory import Trajectory

__all__ = ["ScoreFit", "fit_to_score"]

Floats = NDArray[np.float64]

# More weights than this are more than some hundred evaluations can tell apart.
_MOST_GROUPS = 10
# The first steps change a group's weight by a factor of about e^0.5.
_FIRST_STEP = 0.5
# The share of the weight that starts spread over all blocks.
_SPREAD = 0.01
# A score that is no number ranks last: far from any other, and still a number to the search.
_WORST = 1e300


@dataclass(frozen=True)
class ScoreFit:
    """Weights that were fitted to a score, and what they cost.

    Attributes:
        profile: the weights of the best score; score them with :func:`polyak.select` on other data before they are
            used.
        scores: the score of each evaluation, that of the start first.
        mode: "min" or "max", whichever scores are better.
        groups: into how many groups of neighbouring blocks the run was cut.
    """

    profile: Weights
    scores: Sequence[float]
    mode: Mode
    groups: int

    def __str__(self) -> str:
        best = min(self.scores, key=lambda score: badness(score, self.mode))
        return (
            f"{len(self.profile.a)} weights in {self.groups} groups fitted in {len(self.scores)} evaluations: score "
            f"{self.scores[0]:.5g} of the start, {best:.5g} of the best ({self.mode})"
        )


def fit_to_score(
    trajectory: Trajectory,
    model: nn.Module,
    score: ScoreFunction,
    start: Profile,
    *,
    mode: Mode | None = None,
    evaluations: int = 200,
    recalibrate: Iterable[Any] | None = None,
    seed: int = 0,
) -> ScoreFit:
    """:func:`polyak.fit` with a score."""
    evaluations = whole_within("[1, inf)", "evaluations", evaluations)
    seed = whole_within("[0, 1e18]", "seed", seed)
    if mode is None:
        raise OptionError(
            "mode is needed to fit a score: 'min' if lower scores are better, 'max' if higher ones are"
        )
    refuse_unknown_mode(mode)
    refuse_one_pass(recalibrate)
    cma = require("cma", extra="fit", purpose="fitting weights to a score")
    groups = _Groups(trajectory, start)
    scores: list[float] = []
    best = np.zeros(groups.count)

    def tried(position: Floats) -> float:
        nonlocal best
        value = try_weights(model, groups.average(position), score, recalibrate).value
        if not scores or badness(value, mode) < min(badness(known, mode) for known in scores):
            best = position
        scores.append(value)
        return min(badness(value, mode), _WORST)

    tried(best)
    if groups.count > 1:
        _search(cma, tried, groups.count - 1, evaluations - 1, seed)
    if not any(map(math.isfinite, scores)):
        raise NonFiniteError(
            f"none of {len(scores)} scores is finite: look at what score returns for the start, {start}, first"
        )
    return ScoreFit(groups.profile(best), scores, mode, groups.count)


class _Groups:
    """Neighbouring blocks taken together: within a group they keep the proportions that the start gives them.

    Positions are the logarithms of what the weight of each group is multiplied by, oldest first, [G].
    """

    def __init__(self, trajectory: Trajectory, start: Profile):
        self._weights = _spread_over_all(trajectory, start)
        parts = np.array_split(np.arange(len(self._weights)), min(_MOST_GROUPS, len(self._weights)))
        self.count = len(parts)
        self._part_of = np.repeat(np.arange(self.count), [len(part) for part in parts])
        alone = [Weights(np.where(self._part_of == g, self._weights, 0.0)) for g in range(self.count)]
        means = trajectory.average_many(alone)
        self._newest = means[-1]
        self._stacks = {
            name: torch.stack([mean[name].to(mean_dtype(mean[name].dtype)) for mean in means])
            for name in trajectory.averaged_names
        }

    def profile(self, position: Floats) -> Weights:
        """The weights of all blocks."""
        weights = self._weights * np.exp(position - position.max())[self._part_of]
        return Weights(weights / weights.sum())

    def average(self, position: Floats) -> dict[str, Tensor]:
        """Σ_g s_g · mean_g, what is not averaged being that of the newest block."""
        shares = torch.from_numpy(np.bincount(self._part_of, self.profile(position).a))
        means = {n: torch.tensordot(shares.to(stack), stack, dims=1) for n, stack in self._stacks.items()}
        return self._newest | means


def _spread_over_all(trajectory: Trajectory, start: Profile) -> Floats:
    """The weights of the start, none of them zero: what has no weight could get none by being multiplied."""
    weights = trajectory.explain(start).coefficients.clip(min=0)
    if not weights.sum():
        raise OptionError(f"{start} has no positive weight on the blocks to start from: take another profile")
    return (1 - _SPREAD) * weights / weights.sum() + _SPREAD / len(weights)


def _search(
    cma: ModuleType, badness_at: Callable[[Floats], float], size: int, evaluations: int, seed: int
) -> None:
    """CMA-ES over the groups but the newest, which stays as it is: only proportions count."""
    rng = np.random.default_rng(seed)
    options = {
        # Numpy's own generator, which belongs to the caller, is left alone.
        "seed": math.nan,
        "randn": lambda *shape: rng.standard_normal(shape),
        "verbose": -9,
    }
    search = cma.CMAEvolutionStrategy(np.zeros(size), _FIRST_STEP, options)
    while evaluations > 0:
        positions = search.ask()[:evaluations]
        found = [badness_at(np.append(position, 0.0)) for position in positions]
        evaluations -= len(found)
        if len(found) == search.popsize:
            search.tell(positions, found)
