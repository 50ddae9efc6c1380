"""The study of real tasks on made-up data: runs that share a beginning, their scores, and what follows from them."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

import polyak
from image_files import write_mnist

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

pytestmark = pytest.mark.skipif(not BENCHMARKS.exists(), reason="benchmarks come with a checkout only")


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The benchmark with tasks of a second each, and its data in ``tmp_path / "data"``."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    runs, scores = import_module("real_runs"), import_module("real_scores")
    study = import_module("real_tasks")
    sizes = {"TRAINED_ON": 32, "VALIDATED_ON": 20, "TESTED_ON": 20, "IMAGE_BATCH": 8}
    sizes |= {"VALIDATION_WINDOWS": 4, "TEST_WINDOWS": 4, "TEXT_BATCH": 2}
    for name, value in sizes.items():
        monkeypatch.setattr(runs, name, value)
    kept = {"images": ("constant", "paper", "swa:0.3"), "text": ("constant", "cosine")}
    steps = {"sample_steps": 4, "block_steps": 2, "unit_steps": 16, "warmup_steps": 2}
    for name, schedules in kept.items():
        task = replace(runs.TASKS[name], schedules=schedules, budgets=(0.5, 1.0), **steps)
        monkeypatch.setitem(runs.TASKS, name, task)
    monkeypatch.setattr(scores, "RECENT", "tail:0.5")
    monkeypatch.setattr(scores, "WINDOWS", ("tail:0.5",))
    monkeypatch.setattr(scores, "HALF_LIVES", (0.5,))
    monkeypatch.setattr(import_module("real_report"), "LEAST_SEEDS", 2)
    write_mnist(tmp_path / "data" / "fashion-mnist", 60, 30)
    (tmp_path / "data" / "speeches").mkdir()
    for number in range(16):
        text = f"Speech {number}: the state of the union is such that we count to {number}. " * 5
        (tmp_path / "data" / "speeches" / f"{1900 + number}.txt").write_text(text)
    threads = torch.get_num_threads()
    yield study
    torch.set_num_threads(threads)


def test_a_run_that_shares_its_beginning_is_the_run_trained_alone(study: ModuleType, tmp_path: Path) -> None:
    runs = import_module("real_runs")
    task = runs.TASKS["images"]
    split = task.load(tmp_path / "data" / "fashion-mnist", 3)
    runs.record(task, split, 3, 0.1, tmp_path / "runs")
    for run in runs.runs_of(task, 3, 0.1):
        alone = runs.Training(task, split, 3, 0.1, tmp_path / "alone" / run.name)
        begins = run.leaves_constant_rate(task.block_steps)
        alone.advance(run.steps, lambda step, run=run, begins=begins: run.factor(step, begins))
        alone.recorder.close()
        shared = polyak.Trajectory(tmp_path / "runs" / run.name / runs.TRAJECTORY)
        expected = alone.recorder.trajectory
        assert [block.stop for block in shared.blocks] == [block.stop for block in expected.blocks]
        for found, wanted in (
            (shared.live(), expected.live()),
            (shared.average("uniform"), expected.average("uniform")),
        ):
            assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        record = json.loads((tmp_path / "runs" / run.name / runs.RECORD).read_text())
        assert record["curve"] == {str(step): loss for step, loss in alone.curve.items()}


@pytest.mark.parametrize(
    ("schedule", "begins", "factors"),
    [
        ("constant", 98, {1: 1.0, 100: 1.0}),
        ("linear:0.2", 80, {80: 1.0, 90: 0.505, 100: 0.01}),
        ("paper", 50, {50: 1.0, 70: 0.505, 90: 0.01, 100: 0.01}),
        ("swa:0.3", 38, {38: 1.0, 70: 0.3, 100: 0.3}),
        ("cosine", 0, {50: 0.505, 100: 0.01}),
    ],
)
def test_schedules(study: ModuleType, schedule: str, begins: int, factors: dict[int, float]) -> None:
    run = import_module("real_runs").Run(0, 0.1, schedule, 100)
    assert run.leaves_constant_rate(2) == begins
    assert {step: run.factor(step, begins) for step in factors} == pytest.approx(factors)


def test_a_study_goes_on_where_it_was_and_says_what_follows(
    study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = import_module("real_scores")
    monkeypatch.setattr(scores, "PAPER_EPOCHS", 4)
    monkeypatch.setattr(scores, "PAPER_IMAGES", 16)
    monkeypatch.setattr(scores, "PAPER_BATCH", 8)
    monkeypatch.setattr(scores, "DIRECTIONS", 1)
    monkeypatch.setattr(scores, "RADII", (0.1,))
    monkeypatch.setattr(import_module("real_report"), "RADII", (0.1,))
    work, data = tmp_path / "work", tmp_path / "data"
    for task in study.FOLDERS:
        for seed in range(2):
            study.run(study.Job(task, seed, data, work))
    monkeypatch.setattr(study, "scored", None)  # what is there is not made again
    study.run(study.Job("images", 0, data, work))
    output = tmp_path / "real_tasks.json"
    study.main(["--data", str(data), "--work", str(work), "--part", "report", "--output", str(output)])
    found = json.loads(output.read_text())
    assert {name: len(task["map"]) for name, task in found["tasks"].items()} == {"images": 4, "text": 4}
    cell = found["tasks"]["images"]["map"][0]
    assert all(len(losses) == 2 for losses in cell["test"].values())
    page = import_module("real_page")
    assert "| 0.5, 8, 0.1 |" in page.real_tasks(found)
    page.draw(found, tmp_path / "map.svg")
    assert (tmp_path / "map.svg").stat().st_size < 60_000


def test_a_setting_is_tuned_for_a_seed_on_the_others(study: ModuleType) -> None:
    report = import_module("real_report")

    def seed(**losses: float) -> dict:
        return {(0.1, name, 8): {"live": {"validation": loss}} for name, loss in losses.items()}

    seeds = [seed(a=0.0, b=1.0), seed(a=2.0, b=1.5), seed(a=2.0, b=1.5)]
    settings = [(0.1, "a", 8), (0.1, "b", 8)]
    assert [setting[1] for setting in report.tuned(seeds, settings, "live")] == ["b", "a", "a"]
