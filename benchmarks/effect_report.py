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

__all__ = ["any_horizon", "fit_against_steps", "tables", "way_in_cell", "way_to_bound"]

SIGNIFICANT = 0.05
LEAST_WAY, MOST_BEHIND = 0.90, 0.005


def way_to_bound(grid: Sequence[RunRecord]) -> dict[str, Any]:
    """Test losses over learning rates x decays: live weights, best average, what was selected, the linear bound.

    The bound is fitted on the test examples themselves, so that it holds what fits these examples and no others.
    What the same fit gives that has seen the validation examples only is beside it.
    """
    records: dict[str, list[RunRecord]] = {}
    for record in grid:
        records.setdefault(_setting(record), []).append(record)
    cells = {name: way_in_cell(those) for name, those in records.items()}
    worse = [
        name
        for name, cell in cells.items()
        if cell["selected_minus_live"]["mean"] > 0 and cell["selected_minus_live"]["p_value"] < SIGNIFICANT
    ]
    least = min(cell["way"] for cell in cells.values())
    return {
        "cells": cells,
        "least_way": least,
        "significantly_worse_cells": worse,
        "worse_cells_expected_by_chance": SIGNIFICANT / 2 * len(cells),
        "aim": f"at least {LEAST_WAY:.0%} of the way in every cell, and no cell significantly worse",
        "aim_met": least >= LEAST_WAY and not worse,
    }


def way_in_cell(records: Sequence[RunRecord]) -> dict[str, Any]:
    """The losses of runs that differ in their seed, and how far from the live weights to the bound choosing came."""
    reads = [record.reads[record.job.steps] for record in records]
    bounds = [record.bound for record in records if record.bound is not None]
    losses = {
        "live": [read.live_test for read in reads],
        "average": [read.average_test for read in reads],
        "selected": [read.selected_test for read in reads],
        "bound": [bound.test for bound in bounds],
        "fitted_on_validation": [bound.fitted_on_validation for bound in bounds],
    }
    live, selected, bound = (float(np.mean(losses[kind])) for kind in ("live", "selected", "bound"))
    return {
        **losses,
        "chosen": [read.selected for read in reads],
        "selected_minus_live": asdict(paired_difference(losses["selected"], losses["live"])),
        "selected_minus_average": asdict(paired_difference(losses["selected"], losses["average"])),
        "way": (live - selected) / (live - bound),
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
    """The answers for the eye: test NLL in nats per byte, means over seeds."""
    return [_way_table(found["bound"]), _horizon_table(found["any_horizon"]), _fit_table(found["fit"])]


def _way_table(found: dict[str, Any]) -> Table:
    table = _table(
        f"From the live weights to the linear bound: {found['least_way']:.0%} of the way at least; {_aim(found)}",
        [
            "rate, decay",
            "live",
            "average",
            "selected",
            "bound",
            "way",
            "selected minus live",
            "minus average",
        ],
    )
    for name, cell in {**found["cells"], "tuned decay": found["tuned_decay"]}.items():
        table.add_row(
            name,
            *(_mean(cell[kind]) for kind in ("live", "average", "selected", "bound")),
            f"{cell['way']:.0%}",
            _difference(cell["selected_minus_live"]),
            _difference(cell["selected_minus_average"]),
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
