"""The study of `real_tasks` as a section of docs/results.md."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from page_tables import difference, mean, table

__all__ = ["real_tasks"]

SIGNIFICANT = 0.05
WHAT = {
    "images": "Fashion-MNIST, 2,048 images in batches of 32, an eight-layer ResNet with BatchNorm of 20,506 parameters",
    "text": "State of the Union speeches in batches of 8 windows of 32 bytes, a two-layer transformer of 135,168 "
    "parameters",
}
AVERAGES = ("SWA", "EMA", "selected")


def real_tasks(data: dict[str, Any]) -> str:
    """The map, what averaging adds to decayed runs, the predictor, and the paper's table."""
    settings = data["settings"]
    grid = "; ".join(
        f"{family}: {', '.join(names)}" for family, names in settings["grid"].items() if len(names) > 1
    )
    tuned_on = len(settings["tuning_seeds"])
    parts = [
        "Runs of 0.5, 1, 1.5 and 2 budgets, test losses in nats per image or byte. Within a row all took the "
        "same number of training steps. Averages add the folding of weights and one pass for BatchNorm statistics; "
        "*selected*, `select` on a recorded constant-rate run with blends among its candidates, adds some dozens of "
        "passes over the validation examples. *Tuned decay*, *SWA* and *EMA* are the best of their grid by the mean "
        f"validation loss of {tuned_on} seeds that are not reported on; *early-stopped* is the sample of the "
        "constant-rate run that validation prefers. All but *live* have BatchNorm statistics of their own. "
        "p-values: paired t-tests over seeds, each cell by itself. The grid (shares of the run: `linear` over the "
        f"last, `swa:0.75` samples every {settings['sample_steps']} steps from there on, the half-life of `ema`; the "
        f"schedule `swa:0.2` comes down to that share of the rate): {grid}.",
        "![Averages minus the tuned decay, by task, rate and budget](averaging_pays.svg)",
    ]
    for name, task in data["tasks"].items():
        parts += [f"### {name.capitalize()}", task_text(name, task, settings["tasks"][name])]
    if len(data["tasks"]):
        parts += ["### What tells beforehand", predictor_text(data["tasks"])]
    if data["paper"]:
        parts += ["### The SWA paper's recipe, sized down", paper_text(data["paper"])]
    return "\n\n".join(parts)


def task_text(name: str, task: dict[str, Any], settings: dict[str, Any]) -> str:
    """The map at each rate, each kind of average at a rate of its own, and averages of decayed runs."""
    seeds = len(task["seeds"])
    losses = ("live", "live, recalibrated", "early-stopped", "tuned decay", *AVERAGES)
    ahead = "averages of the constant-rate run minus the tuned decay (negative: averaging is ahead)"
    parts = [
        f"{WHAT[name]}; one budget is {settings['unit_steps']} steps; {seeds} seeds; `select` scored "
        f"{task['candidates']:.0f} candidates a run.",
        table(
            ("budgets, steps, rate", *losses),
            [(_place(cell), *(mean(cell["test"][kind]) for kind in losses)) for cell in task["map"]],
        ),
        f"The map, everything tuned at the same rate: {ahead}.",
        table(
            ("budgets, steps, rate", *AVERAGES, "the tuned decay"),
            [
                (
                    _place(cell),
                    *(difference(cell["minus"]["tuned decay"][kind]) for kind in AVERAGES),
                    cell["tuned"]["decay"],
                )
                for cell in task["map"]
            ],
        ),
        _where(task["map"]),
        "The same with a rate of its own for each, tuned with the other settings: "
        f"{ahead}; in the last column what `select` took of the tuned decay's own run.",
        table(
            ("budgets, steps", "tuned decay", *AVERAGES, "the decayed run, selected"),
            [
                (
                    f"{one['budget']:g}, {one['steps']}",
                    mean(one["test"]["decay"]),
                    *(difference(one["minus_decay"][kind]) for kind in (*AVERAGES, "decay, selected")),
                )
                for one in task["own_rate"]
            ],
        ),
        _tuned(task["own_rate"]),
        "On top of the decay tuned at each rate, averages of that decayed run itself minus its last weights (with "
        "recomputed statistics):",
        table(
            ("budgets, steps, rate", "best average", "selected", "selected, blends too", "a blend chosen"),
            [
                (
                    _place(cell),
                    *(
                        difference(cell["minus_recalibrated"][kind]) or "0"
                        for kind in ("average", "selected", "blends too")
                    ),
                    f"{cell['blends_chosen']} of {seeds}",
                )
                for cell in task["on_decayed"]
            ],
        ),
        _harm(task["on_decayed"]),
        f"`fit(signed=True)` on the validation examples, {task['fit_examples']:,} of them forward and backward, at the "
        "rate of the best decay: minus what `select` chose on the same examples, and minus the last decayed weights:",
        table(
            (
                "budgets, steps, examples trained on",
                "constant rate, minus selected",
                "constant rate, minus decayed",
                "decayed, minus selected",
                "decayed, minus decayed",
            ),
            [
                (
                    f"{one['budget']:g}, {one['steps']}, {one['steps'] * settings['batch']:,}",
                    *(
                        difference(one["minus"][run][kind])
                        for run in ("constant", "decayed")
                        for kind in ("selected", "decay")
                    ),
                )
                for one in task["fitted"]
            ],
        ),
    ]
    return "\n\n".join(parts)


def _place(cell: dict[str, Any]) -> str:
    return f"{cell['budget']:g}, {cell['steps']}, {cell['rate']:g}"


def _beyond_chance(found: dict[str, dict[str, float]], sign: int) -> list[str]:
    """The places where a difference has this sign and p < 0.05."""
    return [place for place, d in found.items() if sign * d["mean"] > 0 and d["p_value"] < SIGNIFICANT]


def _where(cells: list[dict[str, Any]]) -> str:
    """The map in a sentence for each average."""
    sentences = []
    for kind in AVERAGES:
        found = {_place(cell): cell["minus"]["tuned decay"][kind] for cell in cells}
        ahead, behind = (_beyond_chance(found, sign) for sign in (-1, 1))
        sentences.append(
            f"{kind} is ahead of the tuned decay beyond chance in {len(ahead)} of {len(found)} cells"
            f"{_listed(ahead)} and behind it in {len(behind)}{_listed(behind)}."
        )
    gains = {_place(cell): cell["minus"]["live, recalibrated"]["selected"] for cell in cells}
    won, lost = (_beyond_chance(gains, sign) for sign in (-1, 1))
    return " ".join(
        [
            *sentences,
            f"Against the live weights of the same constant-rate run, recalibrated, the selected one is ahead in "
            f"{len(won)} and behind in {len(lost)}.",
        ]
    )


def _listed(places: list[str]) -> str:
    return f" ({'; '.join(places)})" if places else ""


def _tuned(budgets: list[dict[str, Any]]) -> str:
    """What tuning chose, and whether that lies on the edge of what was tried."""
    chosen = [
        f"{one['budget']:g} budgets: "
        + ", ".join(f"{tuned['setting']} at {tuned['rate']:g}" for tuned in one["tuned"].values())
        for one in budgets
    ]
    edges = [
        f"{family} at {one['budget']:g} budgets"
        for one in budgets
        for family, tuned in one["tuned"].items()
        if tuned["on_edge"]
    ]
    return f"Tuned: {'; '.join(chosen)}. On the edge of the grid: {'; '.join(edges) or 'none'}."


def _harm(cells: list[dict[str, Any]]) -> str:
    kinds = {"selected": "selected", "blends too": "selected, blends too"}
    found = {
        f"{words} at {_place(cell)}": cell["minus_recalibrated"][kind]
        for cell in cells
        for kind, words in kinds.items()
    }
    worse, better = ("; ".join(_beyond_chance(found, sign)) or "none" for sign in (1, -1))
    return f"Significantly worse than the last weights: {worse}. Significantly better: {better}."


def predictor_text(tasks: dict[str, Any]) -> str:
    """How well g foretells the gain."""
    rows = [
        (
            f"{name}, {kind}",
            f"{entry['runs']}",
            f"{entry['rank_correlation']:+.2f}",
            f"{entry['within_seeds'][0]:+.2f} ± {entry['within_seeds'][1]:.2f}",
            _of(entry["pays_where_positive"]),
            _of(entry["pays_where_not"]),
        )
        for name, task in tasks.items()
        for kind, entry in task["predictor"].items()
    ]
    heading = ("task, runs", "runs", "rank correlation", "within a seed", "helped, g > 0", "helped, g ≤ 0")
    return (
        "g is the validation loss of the live weights minus that of the mean of the last 10% of the steps, both with "
        "statistics of their own; the gain is the test loss of the live weights minus that of the average that "
        "validation prefers. Rank correlation of the two, and in how many runs the average helped on test, over all "
        "budgets and rates:\n\n" + table(heading, rows)
    )


def _of(counted: Iterable[int]) -> str:
    return "{} of {}".format(*counted)


def paper_text(paper: dict[str, Any]) -> str:
    """The paper's table, and how far the loss rises around its weights."""
    rows = []
    for row in paper["rows"]:
        minus = row["minus_conventional"]
        rows.append(
            (
                f"{row['contender']}, {row['budget']:g}",
                f"{100 * row['accuracy'][0]:.2f} ± {100 * row['accuracy'][1]:.2f}",
                f"{row['nll'][0]:.4f} ± {row['nll'][1]:.4f}",
                percent(minus["accuracy"]) if minus else "",
                difference(minus["nll"]) if minus else "",
            )
        )
    heading = (
        "weights, budgets",
        "accuracy, %",
        "NLL",
        "accuracy minus conventional",
        "NLL minus conventional",
    )
    rises = [
        (
            f"{rise['part']}, {rise['size']}, {rise['radius']:g}",
            f"{rise['conventional'][0]:.4f}",
            f"{rise['SWA'][0]:.4f}",
            difference(rise["difference"]),
        )
        for rise in paper["rises"]
    ]
    return (
        "`examples/paper_recipe.py` on 1,024 images of Fashion-MNIST: the eight-layer ResNet, 30 epochs a budget in "
        f"batches of 64, the paper's rates; {len(paper['seeds'])} seeds, mean ± standard error, differences at the "
        "same budget paired over seeds. SWA samples after epochs 26 to 30 of the first budget, and to 38 and 45 of the "
        "larger ones.\n\n"
        + table(heading, rows)
        + "\n\nHow much the loss rises in random directions (see *Does the average lie wider?*) from conventional "
        "weights and SWA's, each of one budget:\n\n"
        + table(("examples, directions, radius", "conventional", "SWA", "difference"), rises)
    )


def percent(entry: dict[str, float]) -> str:
    p = "p < 0.001" if entry["p_value"] < 0.001 else f"p = {entry['p_value']:.3f}"
    return f"{100 * entry['mean']:+.2f} ({p})"
