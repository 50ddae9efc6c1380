"""Everything that goes wrong ends in the right result or in a refusal that names it, and leaves no ruins."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from polyak.errors import PolyakError
from torture import accidents, damage, harness, interrupts, misuse, models, numbers, processes, quota  # noqa: F401

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="kills, forks and limits of files as Linux has them"),
    # What they do deserves a warning now and then; and an interrupt may fall where Python can only print it.
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
IN_MEMORY = Path("/dev/shm")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    seed = metafunc.config.getoption("torture_seed", 0)
    every = list(harness.cases(seed))
    values = [
        pytest.param(one.title, case, marks=() if short else pytest.mark.torture, id=identity(one, case))
        for one, case, short in every
    ]
    metafunc.parametrize(("title", "case"), values)


def identity(one: harness.Family, case: harness.Case) -> str:
    return re.sub(r"[^ -Z^-~]|::", "?", f"{one.title}-{case.name}")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """In memory where there is such a place, since most cases wait for a disk and for little else."""
    if not IN_MEMORY.is_dir():
        yield tmp_path
        return
    with TemporaryDirectory(dir=IN_MEMORY, ignore_cleanup_errors=True) as made:
        yield Path(made)


def test_case(
    title: str, case: harness.Case, place: Path, request: pytest.FixtureRequest, record_property: Callable
) -> None:
    outcome = "wrong"
    try:
        outcome = harness.judged(case, place)
    finally:
        record_property("torture", (title, outcome))
        if outcome == "wrong":
            seed = request.config.getoption("torture_seed", 0)
            words = " and ".join(re.findall(r"\w+", request.node.callspec.id))
            print(f"again: python -m pytest -m '' --torture-seed {seed} tests/torture -k '{words}'")


def refused(folder: Path, written: Path) -> None:
    written.write_text("x")
    raise PolyakError("refused")


@pytest.mark.parametrize("where", ["nonsense", "../nonsense", "../folder/.polyak-0.tmp"])
def test_what_a_case_leaves_is_seen(tmp_path: Path, where: str) -> None:
    with pytest.raises(AssertionError, match="nonsense|half-written"):
        harness.judged(harness.Case("", partial(refused, written=Path(where))), tmp_path)
