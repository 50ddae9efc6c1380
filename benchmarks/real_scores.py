"""What the runs of `real_runs` score: the weights that each ended with, their averages, and the choice among them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import polyak
from polyak import landscape
from polyak.errors import OptionError
from real_runs import EARLY, SWA, TRAJECTORY, Run, Split, Task, losses, paper_recipe, runs_of

__all__ = ["RADII", "paper_seed", "score_runs"]

SCORES = "scores.json"
# A short average: what the live weights are compared with before it is known whether averaging pays.
RECENT = "tail:0.1"
HALF_LIVES = (0.02, 0.05, 0.1, 0.2)
WINDOWS = (
    "tail:0.05",
    RECENT,
    "tail:0.2",
    "tail:0.35",
    "tail:0.5",
    "tail:0.75",
    "decay:sqrt:0.25",
    "decay:sqrt:0.5",
    "decay:sqrt:0.8",
    "power:gamma=4",
)
SHARES = (0.25, 0.5, 0.75)


def averages_of(trajectory: polyak.Trajectory, steps: int) -> list[str]:
    """What is tried on a run of ``steps``: windows and EMAs, without those that its blocks do not resolve."""
    emas = [f"ema:half_life={round(share * steps)}" for share in HALF_LIVES]
    resolved = []
    for profile in (*WINDOWS, *emas):
        with suppress(OptionError):
            trajectory.explain(profile)
            resolved.append(profile)
    return resolved


class Scorer:
    """Validation and test losses of any weights in one model."""

    def __init__(self, model: nn.Module, split: Split):
        self.model, self.split = model, split

    def of(self, weights: dict[str, Tensor], *, recalibrated: bool = True) -> dict[str, float]:
        """NLL on validation and on test, and the test error where there are classes."""
        self.model.load_state_dict(weights)
        if recalibrated and self.split.recalibrate is not None:
            polyak.update_bn(self.split.recalibrate, self.model)
        self.model.eval()
        with torch.no_grad():
            validation, test = (
                losses(self.model, part).double().mean().item()
                for part in (self.split.validation, self.split.test)
            )
            found = {"validation": validation, "test": test}
            if self.split.test.targets.ndim == 1:
                wrong = self.model(self.split.test.inputs).argmax(1) != self.split.test.targets
                found["error"] = wrong.double().mean().item()
        return found

    def validation_losses(self, model: nn.Module) -> Tensor:
        """For `select`."""
        return losses(model, self.split.validation)


def score_runs(task: Task, split: Split, seed: int, rate: float, folder: Path) -> list[dict[str, Any]]:
    """The scores of every run in ``folder``, those of an interrupted call taken from where it left them."""
    scorer = Scorer(task.build_model(), split)
    found = []
    for run in runs_of(task, seed, rate):
        kept = folder / run.name / SCORES
        if not kept.exists():
            scores = score_run(scorer, run, folder / run.name)
            temporary = kept.with_suffix(".unfinished")
            temporary.write_text(json.dumps(scores))
            temporary.rename(kept)
        found.append(vars(run) | json.loads(kept.read_text()))
    return found


def score_run(scorer: Scorer, run: Run, folder: Path) -> dict[str, Any]:
    """One run: its end, its best epoch, SWA's average, and what validation prefers of EMAs, of averages and of all.

    Of a run on SWA's schedule only the first three.
    """
    trajectory = polyak.Trajectory(folder / TRAJECTORY)
    live = trajectory.live()
    scores: dict[str, Any] = {
        "live": scorer.of(live, recalibrated=False),
        "early": scorer.of(load_file(folder / EARLY), recalibrated=False),
        "SWA": scorer.of(load_file(folder / SWA)),
    }
    scores["recalibrated"] = scorer.of(live) if scorer.split.recalibrate else scores["live"]
    return scores if run.schedule.startswith("swa") else scores | chosen_of(scorer, run, trajectory, scores)


def chosen_of(
    scorer: Scorer, run: Run, trajectory: polyak.Trajectory, scores: dict[str, Any]
) -> dict[str, Any]:
    """The EMA, the average, the blend with that average and the choice that validation prefers.

    Beside them its loss of a recent average.
    """
    tried = validation_scores(scorer, trajectory, averages_of(trajectory, run.steps))
    best = {"average": lowest(tried), "EMA": lowest({n: s for n, s in tried.items() if n.startswith("ema:")})}
    blends = [f"blend:{share}:{best['average']}" for share in SHARES]
    best["blend"] = lowest(validation_scores(scorer, trajectory, blends))
    scored = {name: {"name": name, **scorer.of(trajectory.average(name))} for name in set(best.values())}
    found: dict[str, Any] = {kind: scored[name] for kind, name in best.items()}
    everything = scores | found
    found["selected"] = _best(everything, ("live", "recalibrated", "average"))
    found["selected, blends too"] = _best(everything, ("live", "recalibrated", "average", "blend"))
    return found | {"recent": tried.get(RECENT)}


def validation_scores(scorer: Scorer, trajectory: polyak.Trajectory, profiles: list[str]) -> dict[str, float]:
    """Profile to its validation loss."""
    choice = polyak.select(
        trajectory,
        scorer.model,
        score=scorer.validation_losses,
        mode="min",
        profiles=profiles,
        recalibrate=scorer.split.recalibrate,
        progress=False,
    )
    return {one.name: one.score for one in choice.table if one.profile is not None}


def lowest(scores: dict[str, float]) -> str:
    """The name of the lowest score."""
    return min(scores, key=lambda name: scores[name])


def _best(scores: dict[str, Any], kinds: Iterable[str]) -> dict[str, Any]:
    best = min(kinds, key=lambda kind: scores[kind]["validation"])
    return {**scores[best], "kind": best}


# The paper's recipe, sized down.

PAPER_EPOCHS, PAPER_IMAGES, PAPER_BATCH, PAPER_TESTED = 18, 1024, 64, 4000
RADII, DIRECTIONS, LOOKED_AT = (0.1, 0.2, 0.3), 3, 512


def paper_seed(folder: Path, seed: int) -> dict[str, Any]:
    """Every contender's test scores, and the rise of the loss around SWA's and conventional weights of one budget."""
    parts = paper_recipe.load(folder)
    order = torch.randperm(len(parts["train"]), generator=torch.Generator().manual_seed(seed))
    train, test = parts["train"][order[:PAPER_IMAGES]], parts["test"][:PAPER_TESTED]
    data = paper_recipe.Data(train, test, torch.device("cpu"))
    settings = paper_recipe.paper_settings("preresnet8", data.classes)
    settings = paper_recipe.replace(settings, epochs=PAPER_EPOCHS, batch=PAPER_BATCH)

    def build() -> nn.Module:
        return paper_recipe.MODELS["preresnet8"](data.channels, data.classes)

    rows, weights = [], {}
    for name, budget, model in paper_recipe.contenders(build, data, settings, seed):
        rows.append({"contender": name, "budget": budget, **paper_recipe.test_scores(model, data)})
        if budget == 1 and name in (paper_recipe.CONVENTIONAL, paper_recipe.SWA):
            weights[name] = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    return {"seed": seed, "rows": rows, "around": around(build(), weights, data, seed)}


def around(
    model: nn.Module, weights: dict[str, dict[str, Tensor]], data: Any, seed: int
) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Mean rises at the radii, by part of the data, by whose size directions have, by weights."""
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for part, (inputs, labels) in {"train": data.train, "test": data.test}.items():
        score = _loss_on(inputs[:LOOKED_AT], labels[:LOOKED_AT])
        for size, size_of in {"own size": None, "same vectors": paper_recipe.CONVENTIONAL}.items():
            rays = landscape.rays(
                model,
                weights,
                score,
                radii=RADII,
                directions=DIRECTIONS,
                seed=seed,
                size_of=size_of,
                recalibrate=data.train[0][:LOOKED_AT].split(256),
                progress=False,
            )
            rises = {name: rays.rise(name).mean(axis=0).tolist() for name in weights}
            found.setdefault(part, {})[size] = rises
    return found


def _loss_on(inputs: Tensor, labels: Tensor) -> Callable[[nn.Module], Tensor]:
    return lambda model: nn.functional.cross_entropy(model(inputs), labels, reduction="none")
