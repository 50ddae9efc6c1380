"""What the runs of `real_tasks` mean: where averaging pays and where it does not, paired over seeds.

Settings are tuned on validation losses and reported on test losses of other examples. What is tuned over several runs
(a decay, SWA's schedule) is tuned for each seed on the other seeds; what is chosen within a run (an EMA's half-life,
the selected average) on the validation examples of that run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import chain, product
from typing import Any

import numpy as np
from rich import box
from rich.table import Table
from scipy.stats import spearmanr

from polyak.demo._study import Difference, mean_and_error, paired_difference
from real_runs import CONSTANT, COSINE, TASKS
from real_scores import RADII, paper_recipe

__all__ = ["AVERAGES", "LEAST_SEEDS", "summary", "tables"]

# A paired test, and tuning on the other seeds, need some.
LEAST_SEEDS = 3
AVERAGES = ("SWA", "EMA", "selected", "selected, blends too")
ON_TOP = ("EMA", "average", "selected", "selected, blends too")

# A setting of runs: rate, schedule, steps.
Setting = tuple[float, str, int]
Seed = dict[Setting, dict[str, Any]]


def summary(found: dict[str, list[Any]]) -> dict[str, Any]:
    """Everything that follows from the scores of the seeds that are whole; what has too few of them is left out."""
    tasks = {
        name: task_summary(name, [_by_setting(seed) for seed in found[name]])
        for name in TASKS
        if len(found[name]) >= LEAST_SEEDS
    }
    paper = found["paper"]
    return {"tasks": tasks, "paper": paper_summary(paper) if len(paper) >= LEAST_SEEDS else None}


def _by_setting(runs: list[dict[str, Any]]) -> Seed:
    return {(run["rate"], run["schedule"], run["steps"]): run for run in runs}


def task_summary(name: str, seeds: Sequence[Seed]) -> dict[str, Any]:
    """The map, what averages add to decayed runs, and the predictor."""
    task = TASKS[name]
    budgets = {budget: round(budget * task.unit_steps) for budget in task.budgets}
    decays = [schedule for schedule in task.schedules if schedule != CONSTANT and "swa" not in schedule]
    cells = []
    for (budget, steps), rate in product(budgets.items(), task.rates):
        swa = [(rate, schedule, steps) for schedule in task.schedules if schedule not in decays]
        same = [(rate, schedule, steps) for schedule in decays]
        every = [(other, schedule, steps) for other in task.rates for schedule in decays]
        cells.append(
            {"budget": budget, "steps": steps, "rate": rate} | cell(seeds, rate, steps, swa, same, every)
        )
    return {
        "seeds": [next(iter(seed.values()))["seed"] for seed in seeds],
        "map": cells,
        "on_decayed": [
            {"budget": budget, "steps": steps, "rate": rate}
            | on_decayed(seeds, [(rate, schedule, steps) for schedule in decays])
            for (budget, steps), rate in product(budgets.items(), task.rates)
        ],
        "predictor": predictor(seeds),
    }


def tuned(seeds: Sequence[Seed], settings: Sequence[Setting], kind: str) -> list[Setting]:
    """For each seed the setting of the lowest mean validation loss of ``kind`` on all other seeds."""
    losses = np.array([[seed[setting][kind]["validation"] for setting in settings] for seed in seeds])
    others = losses.sum(axis=0) - losses
    return [settings[index] for index in others.argmin(axis=1)]


def cell(
    seeds: Sequence[Seed],
    rate: float,
    steps: int,
    swa: Sequence[Setting],
    same: Sequence[Setting],
    every: Sequence[Setting],
) -> dict[str, Any]:
    """One budget and rate: test losses by seed of everything, and what averages have over the tuned decays."""
    constant = [(rate, CONSTANT, steps)] * len(seeds)
    chosen: dict[str, tuple[list[Setting], str]] = {
        "live": (constant, "live"),
        "live, recalibrated": (constant, "recalibrated"),
        "early-stopped": (constant, "early"),
        "cosine": ([(rate, COSINE, steps)] * len(seeds), "recalibrated"),
        "tuned decay": (tuned(seeds, same, "recalibrated"), "recalibrated"),
        "tuned decay, any rate": (tuned(seeds, every, "recalibrated"), "recalibrated"),
        "SWA": (tuned(seeds, swa, "SWA"), "SWA"),
        **{name: (constant, name) for name in AVERAGES[1:]},
    }
    test = {name: _values(seeds, *choice, "test") for name, choice in chosen.items()}
    error = {name: _values(seeds, *choice, "error") for name, choice in chosen.items()}
    return {
        "test": test,
        "error": error if all(error["live"]) else None,
        "tuned": {
            name: dict(
                Counter(f"{rate:g}, {schedule}" for rate, schedule, _ in chosen[name][0]).most_common()
            )
            for name in ("tuned decay", "tuned decay, any rate", "SWA")
        },
        "selected": dict(Counter(seed[constant[0]]["average"]["name"] for seed in seeds).most_common()),
        "minus": {
            baseline: {name: asdict(paired_difference(test[name], test[baseline])) for name in AVERAGES}
            for baseline in ("live, recalibrated", "tuned decay", "tuned decay, any rate")
        },
    }


def _values(seeds: Sequence[Seed], settings: Sequence[Setting], kind: str, which: str) -> list[float]:
    found = [seed[setting][kind].get(which) for seed, setting in zip(seeds, settings, strict=True)]
    return [value for value in found if value is not None]


def on_decayed(seeds: Sequence[Seed], decays: Sequence[Setting]) -> dict[str, Any]:
    """What averages of the tuned decayed run itself have over its last weights, recalibrated."""
    settings = tuned(seeds, decays, "recalibrated")
    last = _values(seeds, settings, "recalibrated", "test")
    found = {name: _values(seeds, settings, name, "test") for name in ("live", *ON_TOP)}
    return {
        "test": {"recalibrated": last, **found},
        "minus_recalibrated": {name: asdict(paired_difference(found[name], last)) for name in found},
        "blends_chosen": sum(
            seed[setting]["selected, blends too"]["kind"] == "blend"
            for seed, setting in zip(seeds, settings, strict=True)
        ),
    }


def predictor(seeds: Sequence[Seed]) -> dict[str, Any]:
    """Whether g, the validation loss of the live weights minus that of a short recent average, tells the gain.

    The gain is the test loss of the live weights minus that of the average that validation prefers; both with
    BatchNorm statistics of their own. Runs of a seed are ranked among themselves, and all runs together.
    """
    points = [_points(seed, lambda _: True) for seed in seeds]
    kinds: dict[str, Callable[[str], bool]] = {
        "all runs": lambda _: True,
        "constant rate": lambda schedule: schedule == CONSTANT,
        "others": lambda schedule: schedule != CONSTANT,
    }
    found = {}
    for kind, belongs in kinds.items():
        each = [_points(seed, belongs) for seed in seeds]
        together = np.concatenate(each)
        within = [float(spearmanr(*one.T).statistic) for one in each]
        found[kind] = {
            "runs": len(together),
            "rank_correlation": float(spearmanr(*together.T).statistic),
            "within_seeds": mean_and_error(within),
        }
    every = np.concatenate(points)
    positive = every[:, 0] > 0
    return {
        "rank": found,
        "pays_where_positive": [int((every[positive, 1] > 0).sum()), int(positive.sum())],
        "pays_where_not": [int((every[~positive, 1] > 0).sum()), int((~positive).sum())],
    }


def _points(seed: Seed, belongs: Callable[[str], bool]) -> np.ndarray:
    """Rows of g and the gain, for the runs of which both are known."""
    runs = [
        run for (_, schedule, _), run in seed.items() if belongs(schedule) and run.get("recent") is not None
    ]
    return np.array(
        [
            (
                run["recalibrated"]["validation"] - run["recent"],
                run["recalibrated"]["test"] - run["average"]["test"],
            )
            for run in runs
        ]
    )


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


# For the eye.


def tables(found: dict[str, Any]) -> list[Table]:
    """The map of each task and the paper's table."""
    shown = [_map_table(name, task) for name, task in found["tasks"].items()]
    return shown + ([_paper_table(found["paper"])] if found["paper"] else [])


def _map_table(name: str, task: dict[str, Any]) -> Table:
    title = (
        f"{name}, {len(task['seeds'])} seeds: test NLL, and averages minus the decay tuned at the same rate"
    )
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("budget, rate", "live", "recalibrated", "tuned decay", *AVERAGES):
        table.add_column(heading, no_wrap=True)
    for one in task["map"]:
        means = (
            f"{np.mean(one['test'][kind]):.4f}" for kind in ("live", "live, recalibrated", "tuned decay")
        )
        differences = (_short(one["minus"]["tuned decay"][kind]) for kind in AVERAGES)
        table.add_row(f"{one['budget']:g}, {one['rate']:g}", *means, *differences)
    return table


def _paper_table(paper: dict[str, Any]) -> Table:
    table = Table(
        title=f"The paper's recipe, {len(paper['seeds'])} seeds", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for heading in ("budget", "weights", "accuracy, %", "NLL"):
        table.add_column(heading, no_wrap=True)
    for row in paper["rows"]:
        (accuracy, error), (nll, nll_error) = row["accuracy"], row["nll"]
        scores = (f"{100 * accuracy:.2f} ± {100 * error:.2f}", f"{nll:.4f} ± {nll_error:.4f}")
        table.add_row(f"{row['budget']:g}", row["contender"], *scores)
    return table


def _short(difference: dict[str, Any]) -> str:
    d = Difference(**difference)
    return f"{d.mean:+.4f} ± {d.stderr:.4f} (p={d.p_value:.2g})"
