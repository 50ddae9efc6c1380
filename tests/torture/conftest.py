"""The cases as tests, their seed, and the table of how they ended: see CONTRIBUTING.md."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

import polyak
from polyak import _terminal

PROPERTY = "torture"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--torture-seed", type=int, default=0, help="what the cases are made from")
    parser.addoption("--torture-output", type=Path, help="a JSON file for the counts by family")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The counts by family, from the reports that the workers sent."""
    counts: dict[str, Counter[str]] = {}
    for report in [r for kind in ("passed", "failed") for r in terminalreporter.stats.get(kind, [])]:
        for title, outcome in [value for name, value in report.user_properties if name == PROPERTY]:
            counts.setdefault(title, Counter())[outcome if report.passed else "wrong"] += 1
    if not counts:
        return
    rows = _terminal.table("faults and abuse", "#cases", "#right", "#refused", "#wrong")
    total = sum(counts.values(), Counter())
    for title, count in [*sorted(counts.items()), ("all", total)]:
        numbers = (count.total(), count["right"], count["refused"], count["wrong"])
        rows.add_row(title, *(f"{number:,}" for number in numbers))
    terminalreporter.write_line("")
    terminalreporter.write_line(_terminal.as_text(rows))
    if (output := config.getoption("torture_output", None)) is not None:
        found = {
            title: {"cases": c.total(), **dict(sorted(c.items()))} for title, c in sorted(counts.items())
        }
        seed = config.getoption("torture_seed")
        settings = {"seed": seed, "polyak": polyak.__version__}
        output.write_text(json.dumps({"settings": settings, "families": found}, indent=1) + "\n")
