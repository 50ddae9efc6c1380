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

from image_files import write_mnist


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    """The benchmark with tasks of a second each, and its data in ``tmp_path / "data"``."""
    data, runs, scores = (import_module(f"real_{name}") for name in ("data", "runs", "scores"))
    tuning, study = import_module("real_tuning"), import_module("real_tasks")
    sizes = {"TRAINED_ON": 32, "VALIDATED_ON": 20, "TESTED_ON": 20, "IMAGE_BATCH": 8}
    sizes |= {"VALIDATION_WINDOWS": 4, "TEST_WINDOWS": 4, "TEXT_BATCH": 2}
    for name, value in sizes.items():
        monkeypatch.setattr(data, name, value)
    for name, task in list(data.TASKS.items()):
        small = replace(task, rates=(0.01,), reported_rates=(0.01,), unit_steps=16, warmup_steps=2)
        monkeypatch.setitem(data.TASKS, name, small)
    for module in (scores, study):
        monkeypatch.setattr(module, "BUDGETS", (1.0,))
    monkeypatch.setattr(runs, "SAMPLE_STEPS", 4)
    monkeypatch.setattr(runs, "BLOCK_STEPS", 2)
    monkeypatch.setattr(study, "TUNING_SEEDS", (1000,))
    monkeypatch.setattr(scores, "RECENT", "tail:0.5")
    monkeypatch.setattr(scores, "FIT_STEPS", 2)
    setting = tuning.Setting
    families = {
        "decay": [setting("constant", "live"), setting("linear:0.5", "live")],
        "SWA": [setting("constant", "swa:0.75"), setting("swa:0.5", "swa:0.75")],
        "EMA": [setting("constant", "ema:0.5")],
        "selected": [setting("constant", "selected")],
    }
    for module in (scores, tuning):
        monkeypatch.setattr(module, "FAMILIES", families)
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
    task = import_module("real_data").TASKS["images"]
    split = task.load(tmp_path / "data" / "fashion-mnist", 3)
    wanted = [runs.Run("constant", 8), runs.Run("linear:0.5", 16), runs.Run("cosine", 8)]
    for shared in runs.trained(task, split, 3, 0.1, wanted, tmp_path / "shared"):
        alone = runs.Training(task, split, 3, 0.1, tmp_path / "alone" / shared.run.schedule)
        alone.advance(shared.run.steps, shared.run.factor)
        alone.recorder.close()
        expected = alone.recorder.trajectory
        assert [block.stop for block in shared.trajectory.blocks] == [block.stop for block in expected.blocks]
        assert shared.states.keys() == alone.states.keys()
        for found, wanted_weights in (
            (shared.trajectory.live(), expected.live()),
            (shared.trajectory.average("uniform"), expected.average("uniform")),
            *((shared.states[step], alone.states[step]) for step in alone.states),
        ):
            assert all(torch.equal(found[name], wanted_weights[name]) for name in wanted_weights)


@pytest.mark.parametrize(
    ("schedule", "begins", "factors"),
    [
        ("constant", 98, {1: 1.0, 100: 1.0}),
        ("linear:0.2", 80, {80: 1.0, 90: 0.505, 100: 0.01}),
        ("swa:0.3", 38, {38: 1.0, 70: 0.3, 100: 0.3}),
        ("cosine", 0, {50: 0.505, 100: 0.01}),
    ],
)
def test_schedules(study: ModuleType, schedule: str, begins: int, factors: dict[int, float]) -> None:
    run = import_module("real_runs").Run(schedule, 100)
    assert run.leaves_constant_rate() == begins
    assert {step: run.factor(step) for step in factors} == pytest.approx(factors)


@pytest.mark.parametrize("task", [pytest.param("images", marks=pytest.mark.slow), "text"])
def test_a_seed_is_tuned_on_and_another_is_reported_once(
    study: ModuleType, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, work = tmp_path / "data", tmp_path / "work"
    (tuning_job,) = study.tuning_jobs(task, data)
    study.run(tuning_job, work)
    tried = {(row["schedule"], row["weights"]): row["validation"] for row in study.tried_of(task, work)}
    assert len(tried) == 6
    (job,) = study.report_jobs(task, [0], data, work)
    (cell,) = job.cells
    decays = {key: loss for key, loss in tried.items() if key[1] == "live"}
    assert (cell.decay.schedule, "live") == min(decays, key=decays.__getitem__) and cell.fit
    study.run(job, work)
    monkeypatch.setattr(study, "reported", None)  # what is there is not made again
    study.run(job, work)
    found = study.collected(work)[task]
    assert list(found.seeds) == [0]
    ((scores,),) = found.seeds[0]
    constant = scores["constant"]
    validation = [constant[kind]["validation"] for kind in ("blends too", "selected", "recalibrated")]
    assert validation == sorted(validation)
    assert not constant["selected"]["name"].startswith("blend:")
    assert scores["early-stopped"]["validation"] <= constant["recalibrated"]["validation"] + 1e-6
    # SWA's samples are those after three quarters: of 16 steps the last one, so the live weights at that time.
    if cell.swa.schedule == "constant":
        assert scores["SWA"]["test"] == pytest.approx(constant["recalibrated"]["test"], abs=1e-5)


def test_other_settings_are_run_anew(
    study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = import_module("real_tuning").Setting
    cell = import_module("real_scores").Cell(
        16, setting("constant", "live"), setting("constant", "swa:0.5"), setting("constant", "ema:0.5"), False
    )
    asked = []
    monkeypatch.setattr(study, "reported", lambda *_: asked.append(1))
    for cells in ((cell,), (cell,), (replace(cell, fit=True),)):
        study.run(study.Job("text", 0, tmp_path, 0.01, cells), tmp_path / "work")
    assert len(asked) == 2


def test_swa_averages_what_is_sampled_after_its_start(study: ModuleType) -> None:
    scores, runs = import_module("real_scores"), import_module("real_runs")
    states = {step: {"w": torch.tensor([float(step)]), "n": torch.tensor(step)} for step in (4, 8, 12, 16)}
    ended = runs.Ended(runs.Run("constant", 16), None, states)
    found = scores.weights_of(ended, "swa:0.5")
    assert found["w"].item() == 14 and found["n"].item() == 16


def test_the_papers_recipe_is_scored_and_looked_around(
    study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paper = import_module("real_paper")
    small = {"PAPER_EPOCHS": 4, "PAPER_IMAGES": 16, "PAPER_BATCH": 8, "DIRECTIONS": 1, "RADII": (0.1,)}
    for name, value in small.items():
        monkeypatch.setattr(paper, name, value)
    found = paper.paper_seed(tmp_path / "data" / "fashion-mnist", 0)
    assert len(found["rows"]) == 12
    assert {
        len(rises) for sizes in found["around"].values() for size in sizes.values() for rises in size.values()
    } == {1}


def made_up_tried(task: Any, lengths: list[int], families: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each family the second setting is the best, at the second rate."""
    return [
        {"rate": rate, "steps": steps, **vars(setting), "validation": (index != 1) + abs(at - 1)}
        for at, rate in enumerate(task.rates)
        for steps in lengths
        for settings in families.values()
        for index, setting in enumerate(settings)
    ]


def made_up_cells(rate: float, lengths: list[int], seed: int) -> list[dict[str, Any]]:
    """Scores in which averages of constant-rate runs are 0.1 below the decay, and live weights as noisy as g says."""
    rng = np.random.default_rng((seed, round(1e4 * rate)))

    def scores(loss: float, name: str = "tail:0.1") -> dict[str, Any]:
        return {"validation": loss, "test": loss, "error": 0.1, "name": name}

    def run(level: float, noise: float) -> dict[str, Any]:
        high, low = scores(level + noise), scores(level)
        kinds = dict.fromkeys(("live", "recalibrated"), high)
        kinds |= dict.fromkeys(("average", "selected", "blends too", "fitted"), low)
        return {**kinds, "candidates": 60, "recent": level}

    cells = []
    for steps in lengths:
        level = 1 + 0.01 * rng.normal()
        constant = run(level, rng.uniform(0.2, 0.5))
        decayed = run(level + 0.1 + 0.01 * rng.normal(), rng.uniform(0.001, 0.01))
        averages = {kind: scores(level) for kind in ("SWA", "EMA", "early-stopped")}
        cells.append({"rate": rate, "steps": steps, "constant": constant, "decayed": decayed, **averages})
    return cells


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


def write_made_up_study(work: Path) -> None:
    """Four seeds, as the study keeps them, and one that is not whole."""
    scores, tuning = import_module("real_scores"), import_module("real_tuning")

    def write(name: str, part: str, seed: int, rate: float, found: Any) -> None:
        folder = work / name / part
        folder.mkdir(parents=True, exist_ok=True)
        kept = {"seed": seed, "cells": [], "found": found}
        (folder / f"seed-{seed}-rate-{rate:g}.json").write_text(json.dumps(kept))

    for name, task in import_module("real_data").TASKS.items():
        lengths = scores.steps_of(task)
        write(name, "tuning", 1000, 0, made_up_tried(task, lengths, tuning.FAMILIES))
        for seed in range(4):
            for rate in task.reported_rates:
                write(name, "report", seed, rate, made_up_cells(rate, lengths, seed))
        write(name, "report", 4, task.reported_rates[0], [])
    for seed in range(4):
        write("paper", "report", seed, 0, made_up_paper(len(import_module("real_paper").RADII), seed))


def test_what_follows_is_written_as_tables_a_page_and_a_figure(
    study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(import_module("real_tuning"), "EDGES", set())
    write_made_up_study(tmp_path / "work")
    output = tmp_path / "real_tasks.json"
    study.main(
        ["--data", "none", "--work", str(tmp_path / "work"), "--part", "report", "--output", str(output)]
    )
    found = json.loads(output.read_text())
    for name, task in import_module("real_data").TASKS.items():
        summary = found["tasks"][name]
        assert summary["seeds"] == [0, 1, 2, 3]
        assert len(summary["map"]) == 4 * len(task.reported_rates)
        for cell in summary["map"]:
            ahead = cell["minus"]["tuned decay"]["selected"]
            assert ahead["mean"] == pytest.approx(-0.1, abs=0.03) and ahead["p_value"] < 0.05
            assert cell["tuned"]["decay"] == "linear:0.05"
        assert all(one["tuned"]["EMA"]["rate"] == task.rates[1] for one in summary["own_rate"])
        rank = summary["predictor"]["all runs"]
        assert rank["rank_correlation"] == pytest.approx(1) and rank["within_seeds"][0] == pytest.approx(1)
        assert rank["pays_where_positive"] == [rank["runs"]] * 2
    page = import_module("real_page")
    written = page.real_tasks(found)
    cells = 4 * len(task.reported_rates)
    assert f"SWA is ahead of the tuned decay beyond chance in {cells} of {cells} cells" in written
    assert "On the edge of the grid: none." in written
    import_module("real_figure").draw(found, tmp_path / "map.svg")
    assert (tmp_path / "map.svg").stat().st_size < 90_000


def test_the_best_setting_is_that_of_the_lowest_mean_and_edges_are_said(study: ModuleType) -> None:
    tuning = import_module("real_tuning")
    setting = tuning.Setting
    tried = [
        {"rate": rate, "steps": 8, "schedule": schedule, "weights": "live", "validation": loss}
        for rate, schedule, of_seeds in (
            (0.1, "constant", (0.0, 3.0)),
            (0.1, "linear:0.5", (1.0, 1.0)),
            (0.2, "constant", (0.5, 0.5)),
            (0.2, "linear:0.5", (2.0, 2.0)),
            (0.3, "constant", (3.0, 3.0)),
            (0.3, "linear:0.5", (3.0, 3.0)),
        )
        for loss in of_seeds
    ]
    found = tuning.Tuning(tried)
    assert found.best("decay", 8, 0.1) == (0.1, setting("linear:0.5", "live"))
    assert found.best("decay", 8) == (0.2, setting("constant", "live"))
    assert not found.on_edge(0.2, setting("constant", "live"))
    assert found.on_edge(0.3, setting("constant", "live"))
    assert found.on_edge(0.2, tuning.SWAS[-1])
