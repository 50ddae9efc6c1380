"""The benchmarks' own arithmetic, and one short run of the cheapest contenders."""

from __future__ import annotations

import json
import sys
import tomllib
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def benchmark() -> ModuleType:
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
    with pytest.raises(RuntimeError, match="'idle' did not average every tensor"):
        short_benchmark.build_contenders(short_benchmark.CASES["small"], [idle])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from Linux's /proc")
def test_the_peak_of_a_call_includes_what_it_frees(benchmark: ModuleType) -> None:
    harness = benchmark.harness
    before = harness.resident_bytes()
    peak = harness.peak_resident_bytes(lambda: torch.ones(2 << 20))
    assert 8 << 20 <= peak - before + (1 << 20) < 16 << 20
    assert harness.resident_bytes() - before < 4 << 20


def test_overhead_is_written_beside_what_was_measured_before(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    output = tmp_path / "figures.json"
    output.write_text(json.dumps({"cases": "of another day"}))
    monkeypatch.setattr(benchmark.shapes, "many_single", lambda: 3 * [(1,)])
    monkeypatch.setattr(benchmark, "OVERHEAD_CALLS", 2)
    monkeypatch.setattr(
        benchmark.harness, "in_fresh_process", lambda function, *arguments: function(*arguments)
    )
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    benchmark.main(["--processes", "1", "--rounds", "2", "--only", "overhead", "--output", str(output)])
    record = json.loads(output.read_text())
    assert record["cases"] == "of another day"
    assert {"polyak EMA, checked", "polyak EMA, checked, an accelerator's operations"} <= record["overhead"][
        "microseconds"
    ].keys()
    assert len(record["overhead"]["promises"]) == (3 if find_spec("numba") else 2)


def test_mutants_that_are_explained_are_of_lines_that_are_there() -> None:
    settings = tomllib.loads((REPOSITORY / "benchmarks" / "mutants.toml").read_text())
    files = {file: (REPOSITORY / file).read_text() for each in settings["module"] for file in each["files"]}
    lines = {file: {line.strip() for line in text.splitlines()} for file, text in files.items()}
    assert [e for e in settings["explained"] if e["line"] not in lines[e["file"]] or not e["why"]] == []
    named = [REPOSITORY / path for each in settings["module"] for path in each["tests"]]
    assert [path for path in named if not path.exists()] == []
