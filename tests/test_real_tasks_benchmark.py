"""The study of real tasks on made-up data: runs that share a beginning, their scores, and what follows from them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import polyak
from image_files import write_mnist


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    """The benchmark with tasks of a second each, and its data in ``tmp_path / "data"``."""
    runs, scores = import_module("real_runs"), import_module("real_scores")
    study = import_module("real_tasks")
    sizes = {"TRAINED_ON": 32, "VALIDATED_ON": 20, "TESTED_ON": 20, "IMAGE_BATCH": 8}
    sizes |= {"VALIDATION_WINDOWS": 4, "TEST_WINDOWS": 4, "TEXT_BATCH": 2}
    for name, value in sizes.items():
        monkeypatch.setattr(runs, name, value)
    kept = {"images": ("constant", "paper", "swa:0.3"), "text": ("constant", "cosine")}
    steps = {"sample_steps": 4, "block_steps": 2, "unit_steps": 16, "warmup_steps": 2}
    for name, schedules in kept.items():
        task = replace(runs.TASKS[name], schedules=schedules, rates=(0.01,), budgets=(0.5, 1.0), **steps)
        monkeypatch.setitem(runs.TASKS, name, task)
    monkeypatch.setattr(scores, "RECENT", "tail:0.5")
    monkeypatch.setattr(scores, "WINDOWS", ("tail:0.5", "tail:0.01"))
    monkeypatch.setattr(scores, "HALF_LIVES", (0.5,))
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
    task = replace(runs.TASKS["images"], schedules=("constant", "paper"))
    split = task.load(tmp_path / "data" / "fashion-mnist", 3)
    runs.record(task, split, 3, 0.1, tmp_path / "runs")
    for run in (runs.Run(3, 0.1, "constant", 8), runs.Run(3, 0.1, "paper", 16)):
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


@pytest.mark.parametrize("task", [pytest.param("images", marks=pytest.mark.slow), "text"])
def test_a_seed_is_trained_and_scored_once(
    study: ModuleType, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = study.Job(task, 0, tmp_path / "data", tmp_path / "work")
    study.run(job)
    monkeypatch.setattr(study, "scored", None)  # what is there is not made again
    study.run(job)
    found = study.collected(tmp_path / "work")[task]
    runs = {(run["schedule"], run["steps"]): run for run in found[0]}
    assert len(found) == 1 and len(runs) == (6 if task == "images" else 4)
    constant = runs["constant", 16]
    assert constant["selected"]["validation"] == min(
        constant[kind]["validation"] for kind in ("live", "recalibrated", "average")
    )
    assert constant["average"]["name"] in ("tail:0.5", "ema:half_life=8")
    assert constant["blend"]["name"].startswith("blend:")
    # SWA's samples are those after three quarters: of 16 steps the last one, so the live weights at that time.
    assert constant["SWA"]["test"] == pytest.approx(constant["recalibrated"]["test"], abs=1e-5)


def test_the_papers_recipe_is_scored_and_looked_around(
    study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = import_module("real_scores")
    small = {"PAPER_EPOCHS": 4, "PAPER_IMAGES": 16, "PAPER_BATCH": 8, "DIRECTIONS": 1, "RADII": (0.1,)}
    for name, value in small.items():
        monkeypatch.setattr(scores, name, value)
    found = scores.paper_seed(tmp_path / "data" / "fashion-mnist", 0)
    assert len(found["rows"]) == 12
    assert {
        len(rises) for sizes in found["around"].values() for size in sizes.values() for rises in size.values()
    } == {1}


def made_up_seed(task: Any, seed: int) -> list[dict[str, Any]]:
    """Scores in which averages of constant-rate runs are 0.1 below the decay, and live weights as noisy as g says."""
    rng = np.random.default_rng(seed)
    runs = []
    for rate in task.rates:
        for schedule in task.schedules:
            for budget in task.budgets:
                noise = rng.uniform(0.1, 0.5) if schedule == "constant" else rng.uniform(0, 0.01)
                level = (1.0 if schedule == "constant" else 1.1) + 0.01 * rng.normal()
                below = {"validation": level, "test": level, "error": 0.1}
                above = {"validation": level + noise, "test": level + noise, "error": 0.2}
                kinds = dict.fromkeys(("live", "recalibrated", "early"), above)
                kinds |= {kind: below | {"name": "tail:0.1"} for kind in ("SWA", "EMA", "average", "blend")}
                chosen = {**below, "name": "tail:0.1", "kind": "average"}
                kinds |= {"selected": chosen, "selected, blends too": chosen}
                steps = round(budget * task.unit_steps)
                place = {"seed": seed, "rate": rate, "schedule": schedule, "steps": steps, "recent": level}
                runs.append(place | kinds)
    return runs


def made_up_paper(radii: int, seed: int) -> dict[str, Any]:
    recipe = import_module("paper_recipe")
    rng = np.random.default_rng(seed)
    names = (recipe.LIVE, recipe.SWA, recipe.CONVENTIONAL, recipe.COSINE)
    rows = [
        {"contender": name, "budget": budget, "accuracy": rng.uniform(), "nll": rng.uniform()}
        for budget in recipe.BUDGETS
        for name in names
    ]
    rises = {name: rng.uniform(size=radii).tolist() for name in (recipe.SWA, recipe.CONVENTIONAL)}
    return {"seed": seed, "rows": rows, "around": {"train": {"own size": rises}, "test": {"own size": rises}}}


def test_what_follows_is_written_as_tables_a_page_and_a_figure(
    study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    tasks = import_module("real_runs").TASKS
    radii = len(import_module("real_scores").RADII)
    for seed in range(4):
        found = {name: made_up_seed(task, seed) for name, task in tasks.items()}
        for name, scores in {**found, "paper": made_up_paper(radii, seed)}.items():
            folder = tmp_path / "work" / name / f"seed-{seed}"
            folder.mkdir(parents=True)
            (folder / "scores.json").write_text(json.dumps(scores))
    output = tmp_path / "real_tasks.json"
    study.main(
        ["--data", "none", "--work", str(tmp_path / "work"), "--part", "report", "--output", str(output)]
    )
    found = json.loads(output.read_text())
    for name, task in tasks.items():
        summary = found["tasks"][name]
        assert len(summary["map"]) == len(task.rates) * len(task.budgets)
        for cell in summary["map"]:
            ahead = cell["minus"]["tuned decay"]["selected"]
            assert ahead["mean"] == pytest.approx(-0.1, abs=0.03) and ahead["p_value"] < 0.05
        rank = summary["predictor"]["rank"]["all runs"]
        assert rank["rank_correlation"] == pytest.approx(1) and rank["within_seeds"][0] == pytest.approx(1)
    page = import_module("real_page")
    written = page.real_tasks(found)
    assert "SWA is ahead of the tuned decay beyond chance in 6 of 6 cells" in written
    page.draw(found, tmp_path / "map.svg")
    assert (tmp_path / "map.svg").stat().st_size < 60_000


def test_a_setting_is_tuned_for_a_seed_on_the_others(study: ModuleType) -> None:
    report = import_module("real_report")

    def seed(**losses: float) -> dict:
        return {(0.1, name, 8): {"live": {"validation": loss}} for name, loss in losses.items()}

    seeds = [seed(a=0.0, b=1.0), seed(a=2.0, b=1.5), seed(a=2.0, b=1.5)]
    settings = [(0.1, "a", 8), (0.1, "b", 8)]
    assert [setting[1] for setting in report.tuned(seeds, settings, "live")] == ["b", "a", "a"]
