"""`soup`: the greedy soup of checkpoints that need not lie on one run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from polyak import _evaluate
from polyak._checks import checked
from polyak._evaluate import Mode, ScoreFunction
from polyak.batchnorm import tracks_statistics
from polyak.errors import OptionError
from polyak.profiles import Weights
from polyak.selection._result import STALE_STATISTICS
from polyak.selection._select import fold_in
from polyak.trajectory import Trajectory

__all__ = ["Soup", "soup"]


@dataclass(frozen=True, repr=False)
class Soup:
    """A greedy soup: the plain mean of some checkpoints. Made by :func:`polyak.soup`.

    Attributes:
        ingredients: the checkpoints in it, in the order in which they went in; the best single one first.
        score: of their mean; on the data it was chosen by, so optimistic.
        singles: checkpoint to its own score.
        mode: "min" or "max", whichever scores are better.
    """

    ingredients: Sequence[Path]
    score: float
    singles: dict[Path, float]
    mode: Mode
    _trajectory: Trajectory
    _model: nn.Module
    _recalibrate: Iterable[Any] | None

    @property
    def profile(self) -> Weights:
        """The weights of the checkpoints in the order in which they were given."""
        return Weights([float(path in self.ingredients) for path in self.singles])

    def apply(self, model: nn.Module) -> None:
        """Put the soup into ``model`` for good; raises :class:`StructureError` if it does not fit."""
        _evaluate.apply_weights(model, self._trajectory.average(self.profile), self._recalibrate)

    def write(self, path: str | PathLike[str], *, overwrite: bool = False) -> None:
        """Write the model with the soup in it; raises :class:`OutputExistsError` if ``path`` exists."""
        names = ", ".join(ingredient.name for ingredient in self.ingredients)
        _evaluate.write_weights(
            path,
            self._model,
            self._trajectory.average(self.profile),
            inputs=self._trajectory.checkpoints,
            recalibrate=self._recalibrate,
            metadata={"polyak.soup": names, "polyak.score": repr(self.score)},
            overwrite=overwrite,
        )

    def __str__(self) -> str:
        best = self.singles[self.ingredients[0]]
        found = (
            f"soup of {len(self.ingredients)} of {len(self.singles)} checkpoints: score {self.score:.5g}, the best "
            f"single one {best:.5g} ({'lower' if self.mode == 'min' else 'higher'} is better)"
        )
        is_stale = self._recalibrate is None and tracks_statistics(self._model)
        return f"{STALE_STATISTICS} {found}" if is_stale else found

    def __repr__(self) -> str:
        return f"Soup({[str(path) for path in self.ingredients]})"


@checked
def soup(
    checkpoints: Iterable[str | PathLike[str]],
    model: nn.Module,
    score: ScoreFunction,
    mode: Mode | None = None,
    *,
    recalibrate: Iterable[Any] | None = None,
) -> Soup:
    """Average checkpoints greedily: from the best on, each is kept only if the mean does not get worse.

    On the given score the soup is never worse than the best single checkpoint. Every checkpoint is scored
    once alone and, but for the best, once in the mean. Memory: the mean, a checkpoint and a backup of the
    model's weights.

    Args:
        checkpoints: files or folders of any known format, two or more, of one architecture; for the mean to
            make sense they start from the same pre-trained weights.
        model: takes the weights for each trial, in evaluation mode; it is as before on return.
        score: ``score(model)``, a number or a tensor of losses per example, whose mean counts.
        mode: "min" if lower scores are better, "max" if higher ones are; None: "min" for losses per example. A
            single number, or whole numbers such as zeros and ones, may be an accuracy and need it said.
        recalibrate: batches for :func:`polyak.update_bn` before each trial.

    Raises:
        OptionError: fewer than two checkpoints, one of them twice, an unknown mode, or none where it is needed.
        StructureError: a checkpoint does not fit the model, or lacks tensors of it.
        CheckpointError: a file is damaged.

    Source: Wortsman et al. 2022, Model soups, arXiv:2203.05482, recipe 1.

    >>> import tempfile, torch, polyak
    >>> folder = tempfile.TemporaryDirectory()
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> paths = [Path(folder.name) / f"{value}.pt" for value in (1, 3, 9)]
    >>> for value, path in zip((1.0, 3.0, 9.0), paths):
    ...     torch.save({"weight": torch.tensor([[value]])}, path)
    >>> best = polyak.soup(paths, model, score=lambda model: abs(model.weight.item() - 2), mode="min")
    >>> [path.name for path in best.ingredients], best.score
    (['1.pt', '3.pt'], 0.0)
    >>> folder.cleanup()
    """
    paths = _checked(checkpoints)
    _evaluate.refuse_unknown_mode(mode)
    _evaluate.refuse_one_pass(recalibrate)
    trajectory = Trajectory.from_checkpoints(paths, steps=range(1, len(paths) + 1))

    _evaluate.refuse_incomplete(trajectory, model)

    def tried(weights: dict[str, Tensor]) -> _evaluate.Score:
        return _evaluate.try_weights(model, weights, score, recalibrate)

    def alone(path: Path) -> dict[str, Tensor]:
        return trajectory.average(Weights([float(path == other) for other in paths]))

    begin = tried(alone(paths[0]))
    mode = _evaluate.resolved_mode(mode, begin)
    singles = {paths[0]: begin.value} | {path: tried(alone(path)).value for path in paths[1:]}
    first, *others = sorted(paths, key=lambda path: _evaluate.badness(singles[path], mode))
    ingredients, best = [first], singles[first]
    mean: dict[str, Tensor] = {}
    fold_in(mean, alone(first), 1.0, trajectory.averaged_names)
    for path in others:
        wider = {name: tensor.clone() for name, tensor in mean.items()}
        fold_in(wider, alone(path), 1 / (len(ingredients) + 1), trajectory.averaged_names)
        value = tried(wider).value
        if _evaluate.badness(value, mode) <= _evaluate.badness(best, mode):
            ingredients, best, mean = [*ingredients, path], value, wider
    return Soup(ingredients, best, singles, mode, trajectory, model, recalibrate)


def _checked(checkpoints: Iterable[str | PathLike[str]]) -> list[Path]:
    if isinstance(checkpoints, str | PathLike):
        raise OptionError(
            f"checkpoints must be a list of paths, got {str(checkpoints)!r}: write [{str(checkpoints)!r}]"
        )
    paths = [Path(path) for path in checkpoints]
    if len(paths) < 2 or len(set(paths)) < len(paths):
        raise OptionError(
            f"a soup needs two or more different checkpoints, got {[str(path) for path in paths]}"
        )
    return paths
