"""The arithmetic of the benchmarks of valleys, posteriors and previews, and a short run of the last."""

import gc
import json
from dataclasses import replace
from functools import cache
from importlib import import_module

import pytest
import torch


@pytest.fixture
def benchmark():
    return import_module


def test_rises_are_paired_over_seeds(benchmark):
    valley = benchmark("valley")

    def seed(live, averaged):
        rises = {"live": [live] * 4, "averaged": [averaged] * 4}
        return valley.Around(
            {"live": 1.0, "averaged": 0.5}, dict.fromkeys(valley.SIZES, rises), [1.0], 0.9, 0.0
        )

    found = valley.over_seeds([seed(2.0, 1.0), seed(5.0, 4.5), seed(3.0, 1.5)])
    rise = found["rises"][valley.SAME][2]
    assert rise["radius"] == valley.RADII[2] and rise["difference"]["mean"] == pytest.approx(-1.0)
    assert rise["difference"]["seeds_lower"] == 3 and found["best_position"] == [0.9] * 3


def test_predictions_are_measured_and_compared_with_the_averages(benchmark):
    posterior = benchmark("posterior")
    examples = posterior.Examples(torch.zeros(4, 1), torch.tensor([0, 0, 1, 1]))
    sure = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9], [0.9, 0.1]])
    found = posterior.measure(sure, examples)
    assert found["accuracy"] == 0.75 and found["overconfidence"] == pytest.approx(0.15)
    assert found["nll"] == pytest.approx(-(3 * torch.tensor(0.9).log() + torch.tensor(0.1).log()).item() / 4)
    assert found["calibration_error"] == pytest.approx(0.15)

    def outcome(seed, swag):
        metrics = dict.fromkeys(posterior.METRICS, 1.0)
        return posterior.Outcome(
            posterior.Job("text", seed),
            "tail:0.5",
            0.1,
            {posterior.AVERAGE: metrics, posterior.POSTERIOR: metrics | {"nll": swag}},
        )

    summary = posterior.summary([outcome(0, 1.5), outcome(1, 2.5)])["text"]
    assert summary["contenders"][posterior.POSTERIOR]["nll"]["minus_average"]["mean"] == 1.0
    assert summary["scales"] == {"0.1": 2}


@pytest.fixture
def preview(benchmark, monkeypatch):
    threads = torch.get_num_threads()
    preview = benchmark("preview")
    monkeypatch.setattr("polyak.demo._tasks._TEXT_SAMPLES", 300)
    monkeypatch.setattr(preview, "TASK", replace(preview.TASK, load=cache(preview.TASK.load)))
    gc.freeze()  # each Trainer collects garbage, which is to look at what is new only
    yield preview
    gc.unfreeze()
    torch.set_num_threads(threads)


def test_previews_are_compared_with_the_decayed_runs_of_their_seed_and_step(preview):
    plan = preview.Plan(seeds=(0, 1, 2), steps=80)

    def outcomes(seed):
        losses = {"": 2.0, "/average": 1.7, "/ema:half_life=5": 1.8, "/decayed": 1.5}
        losses = {f"eval_loss{name}": loss + 0.11 * seed for name, loss in losses.items()}
        log = [{"step": step, **losses} for step in (40, 60, 80)]
        job = preview.Job(seed, 0.1, 80, 80)
        yield preview.Outcome(replace(job, half_lives=(10, 5)), log)
        for end in (80, 60, 40):
            ended = [{"step": 10, "eval_loss": 9.0}, {"step": end, "eval_loss": 1.0 + 0.1 * seed + end / 100}]
            yield preview.Outcome(replace(job, steps=end, decay="linear"), ended)

    found = preview.summary(
        plan, {"50%": 5, "75%": 5, "100%": 10}, [o for seed in plan.seeds for o in outcomes(seed)]
    )["shares"]
    assert {share: entry["steps"] for share, entry in found.items()} == {"50%": 40, "75%": 60, "100%": 80}
    off = {share: entry["minus_decayed"]["preview"] for share, entry in found.items()}
    assert [entry["mean"] for entry in off.values()] == pytest.approx([0.11, -0.09, -0.29])
    assert off["50%"]["stderr"] == pytest.approx(0.01 / 3**0.5) and off["100%"]["seeds_lower"] == 3
    emas = {share: entry["minus_decayed"]["ema"]["mean"] for share, entry in found.items()}
    assert emas == pytest.approx({"50%": 0.41, "75%": 0.21, "100%": -0.09})


@pytest.mark.filterwarnings("ignore:the blocks are too long")
def test_a_short_study_of_previews_logs_all_losses_beside_runs_that_are_the_same_until_they_decay(preview):
    outcomes = []

    def run_all(jobs):
        outcomes.extend(map(preview.run, jobs))
        return outcomes[-len(jobs) :]

    plan = preview.Plan((0, 1), (1000,), rates=(6e-3,), shapes=("linear",), half_lives=(5, 10), steps=80)
    found = preview.study(plan, run_all)
    json.dumps(found, allow_nan=False)
    assert {"eval_loss", "eval_loss/average", "eval_loss/decayed", "step"} <= set(found["log"][0])
    assert [entry["step"] for entry in found["log"]] == list(range(10, 81, 10))
    constant, *decayed = (outcome for outcome in outcomes if outcome.job.seed == 1)
    assert [outcome.job.steps for outcome in decayed] == [40, 60, 80]
    for outcome in decayed:
        same = [outcome.loss("eval_loss", step) == constant.loss("eval_loss", step) for step in (20, 30)]
        assert same == [True, outcome.job.steps > 40]  # that of 40 steps decays from step 24 on
        assert outcome.loss("eval_loss") != constant.loss("eval_loss", outcome.job.steps)


def test_swag_is_made_of_an_average_of_many_blocks_and_of_no_blend(benchmark, tmp_path):
    posterior = benchmark("posterior")
    model = torch.nn.Linear(1, 1)
    with posterior.polyak.Recorder(model, tmp_path / "run", block=1) as run:
        for _ in range(10):
            run.update()
    profiles = ["blend:0.5:tail:0.8", "tail:0.2", "tail:0.8"]
    scores = iter([3.0, 0.0, 1.0, 2.0])  # of the live weights, then of each
    selection = posterior.polyak.select(
        run.trajectory, model, score=lambda _: next(scores), mode="min", profiles=profiles, progress=False
    )
    assert str(posterior.best_of_blocks(run.trajectory, selection)) == "tail:0.8"


def test_fits_and_longer_runs_are_compared_with_what_was_selected_of_the_same_seed(benchmark):
    fitted = benchmark("fitted")
    outcomes = [
        fitted.Outcome(
            fitted.Job(seed, kind, more),
            live=3.0 + seed,
            selected=2.0 + seed - more / 1000,
            fitted=dict.fromkeys(fitted.EXAMPLES, dict.fromkeys(fitted.PASSES, 1.5 + 1.1 * seed)),
        )
        for seed in (0, 1)
        for kind in fitted.DECAYS
        for more in (0, *fitted.PASSES)
    ]
    found = fitted.summary(outcomes)["tuned decay"]
    assert found["selected"] == (2.5, 0.5)
    assert found["minus_selected"]["more training"][100]["mean"] == pytest.approx(-0.1)
    assert found["minus_selected"]["fitted on validation examples"][25]["mean"] == pytest.approx(-0.45)


def test_rises_by_quantisation_are_paired_over_seeds(benchmark):
    quantised = benchmark("quantised")

    def seed(live, average, live_at_4, average_at_4, chosen_at_4):
        full = {quantised.LIVE: live, quantised.DECAYED: live, quantised.AVERAGE: average}
        narrow = {quantised.LIVE: live_at_4, quantised.DECAYED: live_at_4, quantised.AVERAGE: average_at_4}
        return {quantised.FULL: full, "4": {**narrow, quantised.CHOSEN: chosen_at_4}}

    found = quantised.summary([seed(2.0, 1.0, 2.5, 1.25, 1.0), seed(3.0, 1.5, 4.5, 2.25, 1.75)])["4"]
    assert found["rise"][quantised.LIVE] == [0.5, 1.5] and found["rise"][quantised.AVERAGE] == [0.25, 0.75]
    assert found["rise_minus_live"]["mean"] == pytest.approx(-0.5)
    assert found["quantised_minus_unquantised_choice"]["mean"] == pytest.approx(-0.375)


def test_the_decay_beside_quantised_averages_is_the_best_of_other_seeds(benchmark, monkeypatch):
    quantised = benchmark("quantised")
    monkeypatch.setattr(quantised, "RATES", (0.1, 0.3))
    monkeypatch.setattr(quantised, "DECAYS", (0.5,))
    monkeypatch.setattr(quantised.harness, "on_two_processes", lambda *_: [[0.0, 1.0], [3.0, 1.0]])
    assert quantised.tuned() == (quantised.Decay(0.3, 0.5), {"0.1, 0.5": 1.5, "0.3, 0.5": 1.0})


@pytest.mark.parametrize("bits", [8, 3])
def test_quantised_weights_are_the_nearest_levels_of_their_channel(benchmark, bits):
    layer = torch.nn.Linear(40, 5)
    before = layer.weight.detach().double().clone()
    benchmark("quantised").example.quantised(bits)(torch.nn.Sequential(layer))
    for row, weights in zip(before, layer.weight.detach().double(), strict=True):
        levels = (
            row.abs().max() * torch.arange(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1)) / (2 ** (bits - 1) - 1)
        )
        nearest = levels[(row[:, None] - levels).abs().argmin(dim=1)]
        torch.testing.assert_close(weights, nearest, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["valley", "posterior", "no_harm", "preview", "quantised"])
def test_a_single_seed_is_refused(benchmark, name, capsys):
    with pytest.raises(SystemExit):
        benchmark(name).main(["--seeds", "1"])
    assert "at least 2" in capsys.readouterr().err
