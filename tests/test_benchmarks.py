"""The benchmarks' own arithmetic, and one short run of the cheapest contenders."""

from __future__ import annotations

import json
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

pytestmark = pytest.mark.skipif(not BENCHMARKS.exists(), reason="benchmarks come with a checkout only")


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return import_module("update_cost")


@pytest.fixture
def short_benchmark(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """One small case, with the contenders that need no other package and one that is not installed."""
    peers = sys.modules["peers"]

    def missing(model: torch.nn.Module) -> None:
        raise ModuleNotFoundError("No module named 'absent'")

    chosen = (peers.LIMIT, "foreach, lists built once", "torch AveragedModel, EMA")
    contenders = {name: peers.CONTENDERS[name] for name in chosen}
    contenders["absent"] = peers.Contender("absent", "peer", missing)
    monkeypatch.setattr(benchmark, "CONTENDERS", contenders)
    monkeypatch.setattr(benchmark, "CASES", {"small": benchmark.Case(lambda: 4 * [(32,)])})
    monkeypatch.setattr(benchmark, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(
        benchmark.harness, "in_fresh_process", lambda function, *arguments: function(*arguments)
    )
    monkeypatch.setattr(benchmark, "THREADS", torch.get_num_threads())
    return benchmark


@pytest.mark.parametrize(
    ("model", "tensors", "elements"),
    [("resnet50", 161, 25_557_032), ("gpt2_small", 148, 124_439_808), ("many_small", 1_200, 614_400)],
)
def test_shapes_are_those_of_the_architectures(
    benchmark: ModuleType, model: str, tensors: int, elements: int
) -> None:
    shapes = getattr(benchmark.shapes, model)()
    assert len(shapes) == tensors
    assert benchmark.shapes.number_of_elements(shapes) == elements


def test_rounds_are_rotated_and_ratios_are_taken_round_by_round(benchmark: ModuleType) -> None:
    harness = benchmark.harness
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = harness.time_rounds(calls, rounds=3, least_seconds=0.0)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"  # one call of each to find how long it takes
    assert [len(values) for values in seconds.values()] == [3, 3, 3]
    ratio = harness.ratios([2.0, 6.0, 20.0], [1.0, 2.0, 4.0])
    assert (ratio.lower_quartile, ratio.median, ratio.upper_quartile) == (2.5, 3.0, 4.0)


def test_a_short_run_writes_its_figures_and_names_who_was_left_out(
    short_benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results" / "figures.json"
    short_benchmark.main(["--processes", "2", "--rounds", "3", "--only", "small", "--output", str(output)])
    assert "left out: absent (No module named 'absent')" in capsys.readouterr().out
    case = json.loads(output.read_text())["cases"]["small"]
    assert case["best_peer"] == "torch AveragedModel, EMA"
    assert len(case["contenders"]["torch AveragedModel, EMA"]["seconds_by_round"]) == 6


def test_a_contender_that_skips_its_work_is_refused(
    short_benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    peers = sys.modules["peers"]
    idle = peers.Contender("idle", "peer", lambda model: peers.Averager(int, lambda: [torch.ones(1)]))
    monkeypatch.setattr(short_benchmark, "CONTENDERS", {"idle": idle})
    with pytest.raises(RuntimeError, match="'idle' did not average every tensor"):
        short_benchmark.build_contenders(short_benchmark.CASES["small"])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from Linux's /proc")
def test_the_peak_of_a_call_includes_what_it_frees(benchmark: ModuleType) -> None:
    harness = benchmark.harness
    before = harness.resident_bytes()
    peak = harness.peak_resident_bytes(lambda: torch.ones(2 << 20))
    assert 8 << 20 <= peak - before + (1 << 20) < 16 << 20
    assert harness.resident_bytes() - before < 4 << 20


def test_mutants_that_are_explained_are_of_lines_that_are_there() -> None:
    settings = tomllib.loads((BENCHMARKS / "mutants.toml").read_text())
    files = {
        file: (BENCHMARKS.parent / file).read_text() for each in settings["module"] for file in each["files"]
    }
    lines = {file: {line.strip() for line in text.splitlines()} for file, text in files.items()}
    assert [e for e in settings["explained"] if e["line"] not in lines[e["file"]] or not e["why"]] == []
    named = [BENCHMARKS.parent / path for each in settings["module"] for path in each["tests"]]
    assert [path for path in named if not path.exists()] == []
