"""The study of `real_tasks` as a section of docs/results.md, and its map as the figure docs/averaging_pays.svg.

python benchmarks/real_page.py        writes the figure from benchmarks/results/real_tasks.json
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

from page_tables import difference, mean, table

__all__ = ["real_tasks"]

ROOT = Path(__file__).parent.parent
FIGURE = ROOT / "docs" / "averaging_pays.svg"
SIGNIFICANT = 0.05
WHAT = {
    "images": "Fashion-MNIST, 1,024 images, an eight-layer ResNet with BatchNorm of 20,506 parameters",
    "text": "State of the Union speeches, a two-layer transformer over bytes of 135,168 parameters",
}
AVERAGES = ("SWA", "EMA", "selected")
COLOURS = {"SWA": "#0072b2", "EMA": "#d55e00", "selected": "#009e73"}


def real_tasks(data: dict[str, Any]) -> str:
    """The map, what averaging adds to decayed runs, the predictor, and the paper's table."""
    parts = [
        "Runs of 0.5, 1 and 2 budgets at two learning rates, each under a constant rate, schedules that come down "
        "(linearly over the last 20 or 50%, as the SWA paper's baseline, by a cosine) and, for images, SWA's own "
        "schedule. Within a row all took the same number of steps, so the same compute; averages add a fold every "
        "other step and one pass for BatchNorm statistics. Test loss, NLL in nats per image or byte. *Tuned decay* is "
        "the best of the schedules that come down, chosen for each seed by the validation losses of the other seeds; "
        "it and *cosine* are live weights with recomputed statistics. *SWA* takes one sample every few steps from 75% "
        "of the run on, at the constant rate or on its own schedule, tuned in the same way. *EMA* and *selected* are "
        "of the recorded constant-rate run: the half-life, and the weights, live or averaged, that validation prefers. "
        "p-values are of paired t-tests over seeds.",
        "![Averages minus the tuned decay, by task, rate and budget](averaging_pays.svg)",
    ]
    for name, task in data["tasks"].items():
        parts += [f"### {name.capitalize()}", task_text(name, task, data["settings"][name])]
    if len(data["tasks"]):
        parts += ["### What tells beforehand", predictor_text(data["tasks"])]
    if data["paper"]:
        parts += ["### The SWA paper's recipe, sized down", paper_text(data["paper"])]
    return "\n\n".join(parts)


def task_text(name: str, task: dict[str, Any], settings: dict[str, Any]) -> str:
    seeds = len(task["seeds"])
    losses = ("live", "live, recalibrated", "early-stopped", "cosine", "tuned decay", *AVERAGES)
    rows = [(_place(cell), *(mean(cell["test"][kind]) for kind in losses)) for cell in task["map"]]
    heading = ("budgets, steps, rate", *losses)
    parts = [
        f"{WHAT[name]}; one budget is {settings['unit_steps']} steps; {seeds} seeds.",
        table(heading, rows),
        "The map: averages of the constant-rate run minus the decay tuned at the same rate (negative: averaging is "
        "ahead), and the selected average minus the decay tuned over both rates.",
        table(
            ("budgets, steps, rate", *AVERAGES, "selected, against any rate"),
            [
                (
                    _place(cell),
                    *(difference(cell["minus"]["tuned decay"][kind]) for kind in AVERAGES),
                    difference(cell["minus"]["tuned decay, any rate"]["selected"]),
                )
                for cell in task["map"]
            ],
        ),
        _where(task["map"]),
        _tuned(task["map"], settings),
        "On top of the decay tuned at each rate, averages of that decayed run itself minus its last weights (with "
        "recomputed statistics):",
        table(
            (
                "budgets, steps, rate",
                "live as it is",
                "EMA",
                "selected",
                "selected, blends too",
                "blend chosen",
            ),
            [
                (
                    _place(cell),
                    *(
                        difference(cell["minus_recalibrated"][kind])
                        for kind in ("live", "EMA", "selected", "selected, blends too")
                    ),
                    f"{cell['blends_chosen']} of {seeds}",
                )
                for cell in task["on_decayed"]
            ],
        ),
        _harm(task["on_decayed"]),
    ]
    return "\n\n".join(parts)


def _place(cell: dict[str, Any]) -> str:
    return f"{cell['budget']:g}, {cell['steps']}, {cell['rate']:g}"


def _where(cells: list[dict[str, Any]]) -> str:
    """The map in a sentence for each average."""
    sentences = []
    for kind in AVERAGES:
        found = {_place(cell): cell["minus"]["tuned decay"][kind] for cell in cells}
        ahead, behind = (
            [place for place, d in found.items() if sign * d["mean"] < 0 and d["p_value"] < SIGNIFICANT]
            for sign in (1, -1)
        )
        sentences.append(
            f"{kind} is ahead of the tuned decay beyond chance in {len(ahead)} of {len(found)} cells"
            f"{_listed(ahead)} and behind it in {len(behind)}{_listed(behind)}."
        )
    gains = [cell["minus"]["live, recalibrated"]["selected"] for cell in cells]
    won = sum(d["mean"] < 0 and d["p_value"] < SIGNIFICANT for d in gains)
    return " ".join(
        [
            *sentences,
            f"Against the recalibrated live weights of the same run the selected one is ahead in {won}.",
        ]
    )


def _listed(places: list[str]) -> str:
    return f" ({'; '.join(places)})" if places else ""


def _tuned(cells: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """What tuning chose, and whether that lies on the edge of what was tried."""
    chosen = [
        (cell["budget"], max(cell["tuned"]["tuned decay, any rate"].items(), key=lambda i: i[1]))
        for cell in cells
    ]
    named = "; ".join(f"{budget:g} budgets: {setting}" for budget, (setting, _) in dict(chosen).items())
    rates, shortest = settings["rates"], settings["schedules"][1]
    at_shortest = sum(setting.endswith(shortest) for setting, _ in dict(chosen).values())
    return (
        f"The decay tuned over both rates, on most seeds: {named}. The grid is small: of two rates, {rates[0]:g} and "
        f"{rates[1]:g}, the best is always on the edge, and so is `{shortest}`, the shortest decay that was tried and "
        f"the best at {at_shortest} of {len(dict(chosen))} budgets. A wider grid could only lower the tuned decay."
    )


def _harm(cells: list[dict[str, Any]]) -> str:
    kinds = ("selected", "selected, blends too")
    signs = {
        sign: [
            f"{kind} at {_place(cell)}"
            for cell, kind in product(cells, kinds)
            if sign * (d := cell["minus_recalibrated"][kind])["mean"] > 0 and d["p_value"] < SIGNIFICANT
        ]
        for sign in (1, -1)
    }
    return (
        f"Significantly worse than the last weights: {'; '.join(signs[1]) or 'none'}. Significantly better: "
        f"{'; '.join(signs[-1]) or 'none'}."
    )


def predictor_text(tasks: dict[str, Any]) -> str:
    rows = [
        (
            f"{name}, {kind}",
            f"{entry['runs']}",
            f"{entry['rank_correlation']:+.2f}",
            f"{entry['within_seeds'][0]:+.2f} ± {entry['within_seeds'][1]:.2f}",
        )
        for name, task in tasks.items()
        for kind, entry in task["predictor"]["rank"].items()
    ]
    counts = " ".join(
        "{}: where g > 0 averaging helped on test in {} of {} runs, elsewhere in {} of {}.".format(
            name.capitalize(), *task["predictor"]["pays_where_positive"], *task["predictor"]["pays_where_not"]
        )
        for name, task in tasks.items()
    )
    return (
        "g is the validation loss of the live weights minus that of the mean of the last 10% of the steps, both with "
        "statistics of their own; the gain is the test loss of the live weights minus that of the average that "
        "validation prefers. Rank correlation of the two over all runs, all schedules, budgets and rates:\n\n"
        + table(("task, runs", "runs", "rank correlation", "within a seed"), rows)
        + f"\n\n{counts}"
    )


def paper_text(paper: dict[str, Any]) -> str:
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
        "`examples/paper_recipe.py` on 1,024 images of Fashion-MNIST: the eight-layer ResNet, 18 epochs a budget in "
        f"batches of 64, the paper's rates; {len(paper['seeds'])} seeds, mean ± standard error, differences at the "
        "same budget paired over seeds. SWA samples after epochs 16 to 18 of the first budget, three times.\n\n"
        + table(heading, rows)
        + "\n\nHow much the loss rises in random directions (see *Does the average lie wider?*) from conventional "
        "weights and SWA's, each of one budget:\n\n"
        + table(("examples, directions, radius", "conventional", "SWA", "difference"), rises)
    )


def percent(entry: dict[str, float]) -> str:
    return f"{100 * entry['mean']:+.2f} ± {100 * entry['stderr']:.2f}"


# The map as a figure.


def draw(data: dict[str, Any], path: Path) -> None:
    """A panel for each task and rate: averages minus the tuned decay, with standard errors, over the budget."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {"svg.fonttype": "none", "svg.hashsalt": "polyak", "font.family": "sans-serif"}
    )
    from matplotlib import pyplot as plt

    panels = [(name, rate) for name in data["tasks"] for rate in data["settings"][name]["rates"]]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(3.2 * len(panels), 3.4), squeeze=False, layout="constrained"
    )
    for (name, rate), axis in zip(panels, axes[0], strict=True):
        cells = [cell for cell in data["tasks"][name]["map"] if cell["rate"] == rate]
        for kind, colour in COLOURS.items():
            found = [cell["minus"]["tuned decay"][kind] for cell in cells]
            axis.errorbar(
                [cell["budget"] for cell in cells],
                [d["mean"] for d in found],
                [d["stderr"] for d in found],
                color=colour,
                marker="o",
                label=kind,
            )
        axis.axhline(0, color="#808080", linewidth=1)
        axis.set_xscale("log", base=2)
        axis.set_xticks([cell["budget"] for cell in cells], [f"{cell['budget']:g}" for cell in cells])
        axis.minorticks_off()
        axis.set(title=f"{name}, rate {rate:g}", xlabel="budget")
    axes[0][0].set_ylabel("test NLL minus the tuned decay's")
    axes[0][0].legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    draw(json.loads((ROOT / "benchmarks" / "results" / "real_tasks.json").read_text()), FIGURE)
