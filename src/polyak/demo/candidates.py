"""The weights that a training run offers, live and averaged, and their scores along the run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from polyak.average import Average
from polyak.batchnorm import tracks_statistics, update_bn
from polyak.demo.data import Examples, Split
from polyak.demo.tasks import LIVE, AverageSpec
from polyak.selection import Selection, select
from polyak.trajectory import Trajectory

__all__ = ["Candidates", "Curve", "Scoring", "choose"]


@dataclass
class Curve:
    """Scores of one candidate along a run: NLL in nats per example, accuracy from 0 to 1."""

    steps: list[int] = field(default_factory=list)
    validation_nll: list[float] = field(default_factory=list)
    validation_accuracy: list[float] = field(default_factory=list)
    test_nll: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)

    def append(self, step: int, validation: tuple[float, float], test: tuple[float, float]) -> None:
        """Add one point; scores are (NLL, accuracy)."""
        self.steps.append(step)
        self.validation_nll.append(validation[0])
        self.validation_accuracy.append(validation[1])
        self.test_nll.append(test[0])
        self.test_accuracy.append(test[1])


@dataclass(frozen=True)
class Scoring:
    """What weights are scored on, and the inputs that BatchNorm statistics are recomputed from."""

    split: Split
    update_bn_batches: list[Tensor]

    def scores(self, model: nn.Module) -> tuple[tuple[float, float], tuple[float, float]]:
        """(NLL, accuracy) on validation and on test."""
        return _score(model, self.split.validation), _score(model, self.split.test)


class Candidates:
    """Follows ``model`` with every average of ``specs`` and scores them all without disturbing it."""

    def __init__(
        self,
        model: nn.Module,
        specs: Mapping[str, AverageSpec],
        scoring: Scoring,
    ) -> None:
        self._model = model
        self._specs = specs
        self._averages = {
            label: Average(model, spec.scheme, start=spec.start, every=spec.every)
            for label, spec in specs.items()
        }
        self._scoring = scoring
        self.curves: dict[str, Curve] = {LIVE: Curve()} | {label: Curve() for label in specs}

    def update(self) -> None:
        """Call after each optimizer step."""
        for average in self._averages.values():
            average.update()

    def score(self, step: int) -> None:
        """Append a point to the curve of each candidate that exists by now."""
        for label, weights in self._models():
            self.curves[label].append(step, *self._scoring.scores(weights))

    def _models(self) -> Iterator[tuple[str, nn.Module]]:
        live = deepcopy(self._model)
        yield LIVE, live
        for label, average in self._averages.items():
            if average.n_averaged:
                averaged = deepcopy(self._model)
                average.copy_to(averaged)
                if self._specs[label].update_bn:
                    update_bn(self._scoring.update_bn_batches, averaged)
                yield label, averaged


def choose(trajectory: Trajectory, model: nn.Module, scoring: Scoring, step: int) -> tuple[Curve, Selection]:
    """Let validation choose from a recorded run; the choice's scores at its end, ``step``.

    Test data only confirms the choice, as a holdout.
    """
    split = scoring.split
    selection = select(
        trajectory,
        model,
        score=lambda m: _losses(m, split.validation),
        holdout=lambda m: _losses(m, split.test),
        # One draw of the noise is enough to tell candidates apart, and each of them needs a pass of its own.
        recalibrate=scoring.update_bn_batches[:1] if tracks_statistics(model) else None,
        progress=False,
    )
    chosen = deepcopy(model)
    selection.apply(chosen)
    curve = Curve()
    curve.append(step, *scoring.scores(chosen))
    return curve, selection


def _losses(model: nn.Module, examples: Examples) -> Tensor:
    return cross_entropy(model(examples.inputs), examples.targets, reduction="none")


@torch.no_grad()
def _score(model: nn.Module, examples: Examples) -> tuple[float, float]:
    model.eval()
    logits = model(examples.inputs)
    correct = logits.argmax(dim=1) == examples.targets
    return cross_entropy(logits, examples.targets).item(), correct.double().mean().item()
