"""The SWA paper's recipe, sized down: every contender's scores, and how wide their optima are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polyak import landscape
from polyak.demo._study import mean_and_error, paired_difference
from real_data import paper_recipe

__all__ = ["paper_seed", "paper_summary"]

PAPER_EPOCHS, PAPER_IMAGES, PAPER_BATCH, PAPER_TESTED = 30, 1024, 64, 4000
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


def paper_summary(seeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The paper's table with standard errors, and how much less the loss rises around SWA's weights."""
    swa, conventional = paper_recipe.SWA, paper_recipe.CONVENTIONAL
    values: dict[tuple[str, float], dict[str, list[float]]] = {}
    for row in chain.from_iterable(seed["rows"] for seed in seeds):
        kept = values.setdefault((row["contender"], row["budget"]), {"accuracy": [], "nll": []})
        for metric in kept:
            kept[metric].append(row[metric])
    rows = []
    for (contender, budget), metrics in values.items():
        row = {"contender": contender, "budget": budget}
        row |= {metric: mean_and_error(found) for metric, found in metrics.items()}
        row["minus_conventional"] = {
            metric: asdict(paired_difference(found, values[conventional, budget][metric]))
            for metric, found in metrics.items()
            if contender != conventional
        }
        rows.append(row)
    rises = []
    for part, size in product(*(dict.fromkeys(keys) for keys in _parts_and_sizes(seeds[0]))):
        for index, radius in enumerate(RADII):
            both = {
                name: [seed["around"][part][size][name][index] for seed in seeds]
                for name in (conventional, swa)
            }
            rises.append(
                {
                    "part": part,
                    "size": size,
                    "radius": radius,
                    **{name: mean_and_error(found) for name, found in both.items()},
                    "difference": asdict(paired_difference(both[swa], both[conventional])),
                }
            )
    return {"seeds": [seed["seed"] for seed in seeds], "rows": rows, "rises": rises}


def _parts_and_sizes(seed: dict[str, Any]) -> tuple[list[str], list[str]]:
    around = seed["around"]
    return list(around), list(next(iter(around.values())))
