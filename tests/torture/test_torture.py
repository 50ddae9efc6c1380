"""Five hundred things that go wrong: each ends in the right result or a refusal that names it, and leaves no ruins."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from torture import harness
from torture import accidents, damage, interrupts, misuse, models, numbers, processes  # noqa: F401


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    seed = metafunc.config.getoption("torture_seed", 0)
    every = [(one, case, short) for one, case, short in harness.cases(seed)]
    ids = [f"{one.title}-{re.sub(r'[^ -Z^-~]', '?', case.name)}" for one, case, _ in every]
    assert len(set(ids)) == len(ids), sorted(name for name in ids if ids.count(name) > 1)[:5]
    marks = [() if short else (pytest.mark.torture,) for *_, short in every]
    values = [
        pytest.param(one.title, case, marks=mark, id=name)
        for (one, case, _), mark, name in zip(every, marks, ids, strict=True)
    ]
    metafunc.parametrize(("title", "case"), values)


def test_case(
    title: str, case: harness.Case, tmp_path: Path, request: pytest.FixtureRequest, record_property: Callable
) -> None:
    outcome = "wrong"
    try:
        outcome = harness.judged(case, tmp_path)
    finally:
        record_property("torture", (title, outcome))
        if outcome == "wrong":
            seed = request.config.getoption("torture_seed", 0)
            print(f"again: python -m pytest -m '' --torture-seed {seed} tests/torture -k {request.node.callspec.id!r}")
