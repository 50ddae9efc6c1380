"""What the runs of `real_tasks` mean: where averaging pays and where it does not, paired over seeds.

Settings (a decay, SWA's schedule and start, an EMA's half-life, the rate) are tuned on validation losses of seeds of
their own, and reported as test losses of others; what is chosen within a run is chosen on its validation examples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, product
from typing import Any

import numpy as np
from rich import box
from rich.table import Table
from scipy.stats import spearmanr

from polyak.demo._study import Difference, mean_and_error, paired_difference
from real_data import TASKS
from real_paper import paper_summary
from real_runs import BUDGETS
from real_scores import FIT_EXAMPLES, FIT_STEPS
from real_tuning import FAMILIES, Tuning

__all__ = ["AVERAGES", "LEAST_SEEDS", "Found", "summary", "tables"]

# A paired test needs some.
LEAST_SEEDS = 3
AVERAGES = ("SWA", "EMA", "selected")
# What is reported, and where it is in the scores of a cell.
KINDS: dict[str, tuple[str, ...]] = {
    "live": ("constant", "live"),
    "live, recalibrated": ("constant", "recalibrated"),
    "early-stopped": ("early-stopped",),
    "tuned decay": ("decayed", "recalibrated"),
    "SWA": ("SWA",),
    "EMA": ("EMA",),
    "selected": ("constant", "blends too"),
    "selected, no blends": ("constant", "selected"),
}
ON_TOP = ("live", "average", "selected", "blends too")

# A rate and a number of steps to the scores of a seed.
Seed = dict[tuple[float, int], dict[str, Any]]


@dataclass(frozen=True)
class Found:
    """What was tried on tuning seeds, and the scores of each seed that is whole: of each of its jobs."""

    tried: list[dict[str, Any]]
    seeds: dict[int, list[Any]]


def summary(found: dict[str, Found]) -> dict[str, Any]:
    """Everything that follows from the scores of the seeds that are whole; what has too few of them is left out."""
    tasks = {
        name: {"seeds": list(found[name].seeds)} | task_summary(name, found[name])
        for name in TASKS
        if len(found[name].seeds) >= LEAST_SEEDS
    }
    paper = [scores for (scores,) in found["paper"].seeds.values()]
    return {"tasks": tasks, "paper": paper_summary(paper) if len(paper) >= LEAST_SEEDS else None}


def task_summary(name: str, found: Found) -> dict[str, Any]:
    """The map, each kind of average at a rate of its own, what averages add to decayed runs, and the predictor."""
    task, tuning = TASKS[name], Tuning(found.tried)
    seeds = [
        {(cell["rate"], cell["steps"]): cell for cell in chain.from_iterable(rates)}
        for rates in found.seeds.values()
    ]
    lengths = {budget: round(budget * task.unit_steps) for budget in BUDGETS}
    places = [
        {"budget": budget, "steps": steps, "rate": rate}
        for (budget, steps), rate in product(lengths.items(), task.reported_rates)
    ]
    return {
        "map": [place | cell(seeds, tuning, place["rate"], place["steps"]) for place in places],
        "own_rate": [
            {"budget": budget, "steps": steps} | own_rate(seeds, tuning, steps)
            for budget, steps in lengths.items()
        ],
        "on_decayed": [place | on_decayed(seeds, place["rate"], place["steps"]) for place in places],
        "fitted": [
            {"budget": budget, "steps": steps} | fitted(seeds, tuning, steps)
            for budget, steps in lengths.items()
        ],
        "fit_examples": FIT_STEPS * FIT_EXAMPLES,
        "predictor": predictor(seeds),
        "candidates": float(np.mean([run["candidates"] for seed in seeds for run in runs_of(seed)])),
    }


def values(
    seeds: Sequence[Seed], rate: float, steps: int, path: Iterable[str], which: str = "test"
) -> list[Any]:
    """One number of each seed's scores at a rate and a number of steps."""
    found = []
    for seed in seeds:
        scores = seed[rate, steps]
        for name in path:
            scores = scores[name]
        found.append(scores.get(which))
    return found


def minus(candidate: Sequence[float], baseline: Sequence[float]) -> dict[str, Any]:
    return asdict(paired_difference(candidate, baseline))


def cell(seeds: Sequence[Seed], tuning: Tuning, rate: float, steps: int) -> dict[str, Any]:
    """One budget and rate: losses by seed of everything, and what averages have over the tuned decay."""
    test = {kind: values(seeds, rate, steps, path) for kind, path in KINDS.items()}
    error = {kind: values(seeds, rate, steps, path, "error") for kind, path in KINDS.items()}
    chosen = (seed[rate, steps]["constant"]["blends too"]["name"] for seed in seeds)
    return {
        "tuned": {family: str(tuning.best(family, steps, rate)[1]) for family in ("decay", "SWA", "EMA")},
        "test": test,
        "error": error if all(error["live"]) else None,
        "selected": dict(Counter(chosen).most_common()),
        "minus": {
            baseline: {kind: minus(test[kind], test[baseline]) for kind in AVERAGES}
            for baseline in ("live, recalibrated", "tuned decay")
        },
    }


def own_rate(seeds: Sequence[Seed], tuning: Tuning, steps: int) -> dict[str, Any]:
    """One budget: every kind of average and the decay, each at the rate that is best for it, and the differences."""
    kinds = {family: KINDS["tuned decay" if family == "decay" else family] for family in FAMILIES}
    best = {family: tuning.best(family, steps) for family in FAMILIES}
    test = {family: values(seeds, best[family][0], steps, kinds[family]) for family in FAMILIES}
    test["decay, selected"] = values(seeds, best["decay"][0], steps, ("decayed", "blends too"))
    return {
        "tuned": {
            family: {"rate": rate, "setting": str(setting), "on_edge": tuning.on_edge(rate, setting)}
            for family, (rate, setting) in best.items()
        },
        "test": test,
        "minus_decay": {kind: minus(test[kind], test["decay"]) for kind in test if kind != "decay"},
    }


def on_decayed(seeds: Sequence[Seed], rate: float, steps: int) -> dict[str, Any]:
    """What averages of the tuned decayed run itself have over its last weights, recalibrated."""
    last = values(seeds, rate, steps, KINDS["tuned decay"])
    found = {kind: values(seeds, rate, steps, ("decayed", kind)) for kind in ON_TOP}
    chosen = [seed[rate, steps]["decayed"]["blends too"]["name"] for seed in seeds]
    return {
        "test": {"recalibrated": last, **found},
        "minus_recalibrated": {kind: minus(found[kind], last) for kind in ON_TOP},
        "blends_chosen": sum(name.startswith("blend:") for name in chosen),
        "live_chosen": sum(name.startswith("live") for name in chosen),
    }


def fitted(seeds: Sequence[Seed], tuning: Tuning, steps: int) -> dict[str, Any]:
    """Signed weights fitted to the validation examples, and what `select` chose on the same, at the decay's rate."""
    rate = tuning.best("decay", steps)[0]
    decay = values(seeds, rate, steps, KINDS["tuned decay"])
    found: dict[str, Any] = {"rate": rate, "test": {}, "minus": {}}
    for run in ("constant", "decayed"):
        test = values(seeds, rate, steps, (run, "fitted"))
        selected = values(seeds, rate, steps, (run, "blends too"))
        found["test"][run] = test
        found["minus"][run] = {"selected": minus(test, selected), "decay": minus(test, decay)}
    return found


def runs_of(seed: Seed, kinds: Iterable[str] = ("constant", "decayed")) -> list[dict[str, Any]]:
    """The runs of a seed that were selected from; a decay of no length is the constant run, and counts once."""
    runs = []
    for scores in seed.values():
        runs += [
            scores[kind] for kind in kinds if kind == "constant" or scores["decayed"] != scores["constant"]
        ]
    return runs


def predictor(seeds: Sequence[Seed]) -> dict[str, Any]:
    """Whether g, the validation loss of the live weights minus that of a short recent average, tells the gain.

    The gain is the test loss of the live weights minus that of the average that validation prefers; both with
    BatchNorm statistics of their own. Runs of a seed are ranked among themselves, and all runs together.
    """
    found = {}
    for name, kinds in {
        "all runs": ("constant", "decayed"),
        "constant rate": ("constant",),
        "decayed": ("decayed",),
    }.items():
        each = [points(runs_of(seed, kinds)) for seed in seeds]
        together = np.concatenate(each)
        within = [float(spearmanr(*one.T).statistic) for one in each if len(one) > 2]
        found[name] = {
            "runs": len(together),
            "rank_correlation": float(spearmanr(*together.T).statistic),
            "within_seeds": mean_and_error(within),
            "pays_where_positive": counted(together[together[:, 0] > 0]),
            "pays_where_not": counted(together[together[:, 0] <= 0]),
        }
    return found


def points(runs: Iterable[dict[str, Any]]) -> np.ndarray:
    """Rows of g and the gain, for the runs of which both are known."""
    rows = [
        (
            run["recalibrated"]["validation"] - run["recent"],
            run["recalibrated"]["test"] - run["average"]["test"],
        )
        for run in runs
        if run["recent"] is not None
    ]
    return np.array(rows).reshape(-1, 2)


def counted(rows: np.ndarray) -> tuple[int, int]:
    """In how many of them averaging helped, of how many."""
    return int((rows[:, 1] > 0).sum()), len(rows)


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
