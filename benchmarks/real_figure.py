"""The map of `real_tasks` as a figure: `python benchmarks/real_figure.py` writes docs/averaging_pays.svg."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "real_tasks.json"
FIGURE = ROOT / "docs" / "averaging_pays.svg"
COLOURS = {"SWA": "#0072b2", "EMA": "#d55e00", "selected": "#009e73"}


def draw(data: dict[str, Any], path: Path) -> None:
    """A panel for each task and rate: averages minus the tuned decay, with standard errors, over the budget."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {"svg.fonttype": "none", "svg.hashsalt": "polyak", "font.family": "sans-serif"}
    )
    from matplotlib import pyplot as plt

    rates = {name: data["settings"]["tasks"][name]["reported"] for name in data["tasks"]}
    figure, axes = plt.subplots(
        len(rates), max(map(len, rates.values())), figsize=(10, 3 * len(rates)), squeeze=False, sharey="row"
    )
    figure.set_layout_engine("constrained")
    for row, (name, tried) in zip(axes, rates.items(), strict=True):
        for axis in row[len(tried) :]:
            axis.set_axis_off()
        for axis, rate in zip(row, tried, strict=False):
            cells = [cell for cell in data["tasks"][name]["map"] if cell["rate"] == rate]
            budgets = [cell["budget"] for cell in cells]
            for kind, colour in COLOURS.items():
                found = [cell["minus"]["tuned decay"][kind] for cell in cells]
                means, errors = ([d[part] for d in found] for part in ("mean", "stderr"))
                axis.errorbar(budgets, means, errors, color=colour, marker="o", label=kind)
            axis.axhline(0, color="#808080", linewidth=1)
            axis.set_xticks(budgets, [f"{budget:g}" for budget in budgets])
            axis.set(title=f"{name}, rate {rate:g}", xlabel="budget")
        row[0].set_ylabel("test NLL minus the tuned decay's")
    axes[0][0].legend(frameon=False)
    figure.suptitle("Below the line averages of a constant-rate run are ahead of the tuned decay")
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    draw(json.loads(RESULTS.read_text()), FIGURE)
