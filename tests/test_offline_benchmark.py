"""A short run of the offline benchmark, with a small model."""

import json
import time
from importlib import import_module
from pathlib import Path

import pytest


@pytest.fixture
def offline(monkeypatch):
    module = import_module("offline")
    monkeypatch.setattr(module, "MODEL", lambda: [(300, 400), (7,)])
    monkeypatch.setattr(module, "LARGE_TENSOR", (2, 1_000_000))
    monkeypatch.setattr(module, "N_PLANNED", 5)
    # A peer of hundreds of megabytes, which warns where it is imported, is for the benchmark itself.
    monkeypatch.setattr(module, "MERGEKIT_INSTALLED", False)
    contenders = {name: how for name, how in module.CONTENDERS.items() if name != module.MERGEKIT}
    monkeypatch.setattr(module, "CONTENDERS", contenders)
    return module


def test_a_short_run_writes_its_figures(offline, tmp_path, monkeypatch):
    monkeypatch.setattr(offline.harness, "memory_is_measurable", lambda: False)
    monkeypatch.setattr(
        offline.harness, "in_fresh_process", lambda function, *arguments: function(*arguments)
    )
    offline.main(["--rounds", "2", "--folder", str(tmp_path), "--output", str(tmp_path / "figures.json")])
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert set(figures["cases"]) == set(offline.CONTENDERS)
    assert len(figures["cases"][offline.POLYAK]["seconds_by_round"]) == 2
    assert len(figures["planning"]["seconds_by_round"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]


def test_a_contender_that_does_not_average_is_refused(offline, tmp_path, monkeypatch):
    offline.make_inputs(tmp_path, offline.MODEL())
    read_and_write = offline.CONTENDERS[offline.LIMIT][0]
    copy = lambda inputs, output: output.write_bytes(inputs[0].read_bytes())  # noqa: E731
    contenders = {offline.LIMIT: (read_and_write, ".pt", ".pt"), "copy": (copy, ".pt", ".pt")}
    monkeypatch.setattr(offline, "CONTENDERS", contenders)
    with pytest.raises(RuntimeError, match="'copy' did not average"):
        offline.check(tmp_path)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of memory")
def test_peak_memory_is_that_of_the_call(offline):
    import torch

    # As other tests may leave it: freed memory that glibc keeps, because it was freed as much before.
    torch.ones(7_700_000)
    kept = [torch.ones(6_500_000) for _ in range(2)]
    del kept

    def held_for_a_while():  # memory is sampled by a thread, which a busy machine may not let run for a moment
        held = torch.ones(10_000_000)
        time.sleep(0.5)
        return held

    assert 40e6 <= offline.harness.peak_anonymous_bytes(held_for_a_while) <= 60e6
