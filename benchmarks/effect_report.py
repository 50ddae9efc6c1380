"""What the runs of `effect` mean: paired differences over seeds, and tables of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from effect_runs import RunRecord
from polyak.demo._study import Difference, paired_difference

__all__ = ["any_horizon", "fit_against_steps", "regret", "tables"]

SIGNIFICANT = 0.05
LEAST_REGRET_REMOVED, MOST_BEHIND = 0.80, 0.005


def regret(grid: Sequence[RunRecord]) -> dict[str, Any]:
    """Test losses over learning rates x decays, of the last weights and of the selected averages.

    Regret is the mean over seeds less that of the best cell of the whole grid, live or averaged, whichever
    is lowest on these very seeds: a choice that nobody could have made beforehand.
    """
    cells: dict[str, dict[str, list[float]]] = {}
    for record in grid:
        cell = cells.setdefault(_setting(record), {"last": [], "selected": []})
        (read,) = record.reads.values()
        cell["last"].append(read.live_test)
        cell["selected"].append(read.selected_test)
    best = min(float(np.mean(losses)) for cell in cells.values() for losses in cell.values())
    regrets = {
        kind: float(np.mean([np.mean(cell[kind]) - best for cell in cells.values()]))
        for kind in ("last", "selected")
    }
    differences = {name: paired_difference(cell["selected"], cell["last"]) for name, cell in cells.items()}
    worse = [name for name, d in differences.items() if d.mean > 0 and d.p_value < SIGNIFICANT]
    removed = 1 - regrets["selected"] / regrets["last"]
    return {
        "best_mean_test": best,
        "mean_regret": regrets,
        "share_removed": removed,
        "significantly_worse_cells": worse,
        "worse_cells_expected_by_chance": SIGNIFICANT / 2 * len(cells),
        "cells": {
            name: {**losses, "selected_minus_last": asdict(differences[name])}
            for name, losses in cells.items()
        },
        "aim": f"at least {LEAST_REGRET_REMOVED:.0%} removed and no cell significantly worse",
        "aim_met": removed >= LEAST_REGRET_REMOVED and not worse,
    }


def any_horizon(
    recorded: Sequence[RunRecord],
    decayed: Sequence[RunRecord],
    tuned: dict[int, tuple[float, float | str]],
) -> dict[str, Any]:
    """The averages selected along one constant-rate run, each against a decayed run of that length."""
    horizons = {}
    for horizon, (lr, decay) in tuned.items():
        selected = [record.reads[horizon].selected_test for record in recorded]
        decay_losses = [record.test for record in decayed if record.job.steps == horizon]
        difference = paired_difference(selected, decay_losses)
        horizons[str(horizon)] = {
            "tuned_lr": lr,
            "tuned_decay": decay,
            "selected": selected,
            "profiles": [record.reads[horizon].selected for record in recorded],
            "decayed": decay_losses,
            "selected_minus_decayed": asdict(difference),
            "aim_met": difference.mean <= MOST_BEHIND,
        }
    return {
        "constant_lr": recorded[0].job.lr,
        "training_of_decayed_runs_over_recorded": sum(tuned) / max(tuned),
        "horizons": horizons,
        "aim": f"within {MOST_BEHIND:+} of the tuned decay at every horizon",
        "aim_met": all(found["aim_met"] for found in horizons.values()),
    }


def fit_against_steps(
    recorded: Sequence[RunRecord], decayed: Sequence[RunRecord], lengthened: Sequence[RunRecord]
) -> dict[str, Any]:
    """Fitted weights against what the same extra forward and backward passes buy as training steps."""
    fitted = [record.fit.test for record in recorded if record.fit is not None]
    others = {
        "selected, same steps": [record.reads[record.job.steps].selected_test for record in recorded],
        "tuned decay, same steps": [record.test for record in decayed],
        "selected, more steps": [r.reads[r.job.steps].selected_test for r in lengthened if r.reads],
        "tuned decay, more steps": [record.test for record in lengthened if not record.reads],
    }
    return {
        "extra_steps": recorded[0].job.fit_steps,
        "fitted": fitted,
        "against": {
            name: {"test": losses, "fitted_minus_it": asdict(paired_difference(fitted, losses))}
            for name, losses in others.items()
        },
    }


def tables(found: dict[str, Any]) -> list[Table]:
    """The three answers for the eye: test NLL in nats per byte, means over seeds."""
    return [_regret_table(found["regret"]), _horizon_table(found["any_horizon"]), _fit_table(found["fit"])]


def _regret_table(found: dict[str, Any]) -> Table:
    regrets = found["mean_regret"]
    table = _table(
        f"Regret: last weights {regrets['last']:.4f}, selected {regrets['selected']:.4f}, "
        f"{found['share_removed']:.0%} removed; {_aim(found)}",
        ["rate, decay", "last", "selected", "difference"],
    )
    for name, cell in found["cells"].items():
        table.add_row(
            name, _mean(cell["last"]), _mean(cell["selected"]), _difference(cell["selected_minus_last"])
        )
    return table


def _horizon_table(found: dict[str, Any]) -> Table:
    table = _table(
        f"Any horizon from one run at rate {found['constant_lr']:g}; {_aim(found)}",
        ["steps", "best decay", "decayed", "selected", "difference"],
    )
    for horizon, row in found["horizons"].items():
        table.add_row(
            horizon,
            f"{row['tuned_lr']:g}, {row['tuned_decay']}",
            _mean(row["decayed"]),
            _mean(row["selected"]),
            _difference(row["selected_minus_decayed"]),
        )
    return table


def _fit_table(found: dict[str, Any]) -> Table:
    title = f"Weights fitted with {found['extra_steps']} extra passes: {_mean(found['fitted'])}"
    table = _table(title, ["against", "test", "fitted minus it"])
    for name, row in found["against"].items():
        table.add_row(name, _mean(row["test"]), _difference(row["fitted_minus_it"]))
    return table


def _table(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    return table


def _setting(record: RunRecord) -> str:
    return f"{record.job.lr:g}, {record.job.decay}"


def _aim(found: dict[str, Any]) -> str:
    return f"aim ({found['aim']}) {'met' if found['aim_met'] else 'NOT MET'}"


def _mean(losses: Sequence[float]) -> str:
    return f"{np.mean(losses):.4f}"


def _difference(difference: dict[str, Any]) -> str:
    d = Difference(**difference)
    return f"{d.mean:+.4f} (p={d.p_value:.2g}, lower on {d.seeds_lower}/{d.seeds})"
