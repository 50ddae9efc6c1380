"""The arithmetic of the effect benchmark on made-up runs, and one tiny study from end to end."""

import json
from importlib import import_module

import numpy as np
import pytest
import torch


@pytest.fixture
def effect():
    threads = torch.get_num_threads()
    yield import_module("effect")
    torch.set_num_threads(threads)


@pytest.fixture
def made_up(effect):
    """A run in which the last weights and the selected average have given test losses."""

    def build(seed, decay, last, selected, steps=100, bound=1.5):
        runs = import_module("effect_runs")
        read = runs.Read(last, last, "tail:0.4", selected, "tail:0.4", selected, selected)
        job = runs.Job(seed, 0.006, decay, steps, (steps,), bound=True)
        return runs.RunRecord(job, last, last, {steps: read}, None, runs.Bound(bound, bound))

    return build


def test_the_way_to_the_bound_is_of_means_and_worse_cells_are_named(effect, made_up):
    noise = np.linspace(-0.01, 0.01, 5)
    grid = [made_up(seed, 0.0, 1.8 + e, 1.53 + e) for seed, e in enumerate(noise)]
    grid += [made_up(seed, 0.5, 1.62 + e, 1.64 + e + e**2) for seed, e in enumerate(noise)]
    found = effect.way_to_bound(grid)
    assert found["cells"]["0.006, 0.0"]["way"] == pytest.approx(0.9)
    assert found["least_way"] == found["cells"]["0.006, 0.5"]["way"] == pytest.approx(-0.02 / 0.12, abs=1e-3)
    assert found["significantly_worse_cells"] == ["0.006, 0.5"] and not found["aim_met"]


def test_decays_and_rates_are_tuned_by_validation_of_what_they_are_for(effect, made_up):
    tuning = [made_up(0, 0.0, 1.9, 1.5), made_up(0, 0.5, 1.7, 1.6), made_up(0, "cosine", 1.6, 1.8, steps=50)]
    assert effect._best_decay(tuning, 100) == (0.006, 0.5)
    assert effect._best_decay(tuning, 50) == (0.006, "cosine")


@pytest.mark.slow
def test_a_tiny_study_answers_all_three_questions(effect, monkeypatch, tmp_path):
    monkeypatch.setattr("polyak.demo._tasks._TEXT_SAMPLES", 300)
    monkeypatch.setattr(import_module("effect_runs"), "BOUND_ITERATIONS", 3)
    decays = (0.0, "cosine")
    plan = effect.Plan((0, 1), (1000,), (6e-3,), decays, decays, (60, 120), fit_steps=3)
    parts = effect.Parts(tmp_path / "parts.jsonl")

    def run_all(jobs):
        for job in parts.missing(jobs):
            parts.add(effect.run(job))
        return parts.of(jobs)

    found = effect.study(plan, run_all)
    text = json.dumps(found, allow_nan=False)
    # Interrupted at its last run, it goes on from what it kept.
    again = effect.Parts(tmp_path / "parts.jsonl")
    assert json.dumps(effect.study(plan, again.of)) == text
    cells = found["bound"]["cells"]
    assert set(cells) == {"0.006, 0.0", "0.006, cosine"}
    for cell in (*cells.values(), found["bound"]["tuned_decay"]):
        assert np.all(np.array(cell["bound"]) <= np.minimum(cell["live"], cell["selected"]))
    assert set(found["any_horizon"]["horizons"]) == {"60", "120"}
    assert found["any_horizon"]["training_of_decayed_runs_over_recorded"] == 1.5
    assert all(len(row["test"]) == 2 for row in found["fit"]["against"].values())
    assert len(effect.tables(found)) == 3
    # A run that is read on the way goes on as if it had not been.
    recorded = [r for r in found["runs"] if r["job"]["fit_steps"]]
    plain = [r for r in found["runs"] if r["job"]["steps"] == 120 and r["job"]["decay"] == 0.0]
    for run in recorded:
        same = [r["test"] for r in plain if r["job"]["seed"] == run["job"]["seed"]]
        assert len(set(same)) == 1
