"""The runs of the demo, and the statistics over them."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn
from torch.nn.functional import cross_entropy

from polyak.demo._show import study_as_data
from polyak.demo._study import (
    learning_rate_factor,
    mean_and_error,
    paired_difference,
    run_count,
    run_study,
    train,
)
from polyak.demo._tasks import CHOSEN, LIVE, LIVE_EARLY, TASKS, AverageSpec, batches, with_noise
from polyak.errors import OptionError
from polyak.profiles import Uniform


@pytest.fixture(scope="module")
def study(tiny_digits):
    return run_study(tiny_digits, seeds=2)


def test_the_decay_is_tuned_on_the_tuning_seeds_and_validation_only(study, tiny_digits):
    assert list(study.tuning_nll) == [0.5, 1.0]
    for fraction, by_seed in study.tuning_nll.items():
        curve = train(tiny_digits, 1000, decay_fraction=fraction).curves[LIVE]
        assert by_seed == [curve.validation_nll[-1]]
    best = min(study.tuning_nll, key=lambda fraction: np.mean(study.tuning_nll[fraction]))
    assert study.decay_fraction == best
    assert study.decay == f"decay, last {best:.0%}"


def test_every_candidate_is_scored_on_every_reported_seed(study, tiny_digits):
    assert list(study.curves) == [0, 1]
    constant = train(tiny_digits, 1, record=True).curves
    decayed = train(tiny_digits, 1, decay_fraction=study.decay_fraction).curves[LIVE]
    for label in (LIVE, *tiny_digits.averages, CHOSEN):
        assert study.scores(label, "nll")[1] == constant[label].test_nll[-1]
        assert study.scores(label, "accuracy")[1] == constant[label].test_accuracy[-1]
    assert study.scores(study.decay, "nll")[1] == decayed.test_nll[-1]
    earliest = int(np.argmin(constant[LIVE].validation_nll))
    assert study.scores(LIVE_EARLY, "nll")[1] == constant[LIVE].test_nll[earliest]


def test_what_is_chosen_has_the_scores_that_select_reports(study):
    for seed, found in study.selections.items():
        chosen = study.curves[seed][CHOSEN]
        best = found["candidates"][0]
        assert best["name"] == found["best"]
        assert chosen.validation_nll == [pytest.approx(best["score"], rel=1e-5)]
        if found["holdout"]:
            assert chosen.test_nll == [pytest.approx(found["holdout"]["best_score"], rel=1e-5)]
        scores = [candidate["score"] for candidate in found["candidates"]]
        assert best["score"] == min(scores) and "live" in {c["name"] for c in found["candidates"]}
    assert study.selections[0]["best"] in study.first_selection


def test_early_stopping_takes_the_best_validation_epoch_not_the_best_test_epoch(made_up_study):
    study = made_up_study({LIVE: [1.0, 1.0]}, live_validation_nll=(0.5, 0.2, 0.3))
    assert study.scores(LIVE, "nll") == [1.0, 1.0]
    assert study.scores(LIVE_EARLY, "nll") == [2.0, 2.0]


@pytest.mark.slow
def test_worker_processes_give_the_same_bytes(study, tiny_digits):
    again = run_study(tiny_digits, seeds=2, workers=2)
    assert json.dumps(study_as_data(again)) == json.dumps(study_as_data(study))


def test_progress_counts_every_run(tiny_digits):
    task = replace(tiny_digits, steps=4, eval_steps=4, record_every=1, block_steps=2)
    done = []
    run_study(task, seeds=2, on_run=done.append)
    assert len(done) == run_count(task, 2) == 6
    assert done[0] == "tuning the learning-rate decay"


@pytest.mark.parametrize("seeds", [0, 1, 1001])
def test_seeds_that_prove_nothing_or_were_tuned_on_are_refused(tiny_digits, seeds):
    with pytest.raises(OptionError, match="seeds must be 2 to 1000"):
        run_study(tiny_digits, seeds)


# demo/test_statistics

numbers = st.floats(-10, 10).map(lambda value: round(value, 3))
pairs = st.lists(st.tuples(numbers, numbers), min_size=2, max_size=12)


@settings(deadline=None, max_examples=50)
@given(pairs)
def test_paired_difference_is_students_test_on_the_differences(scores):
    candidate, baseline = map(list, zip(*scores, strict=True))
    found = paired_difference(candidate, baseline)

    d = [one - other for one, other in scores]
    mean = math.fsum(d) / len(d)
    variance = math.fsum((one - mean) ** 2 for one in d) / (len(d) - 1)
    stderr = math.sqrt(variance / len(d))
    assert found.mean == pytest.approx(mean, abs=1e-12)
    assert found.stderr == pytest.approx(stderr, abs=1e-12)
    assert (found.seeds, found.seeds_lower) == (len(d), sum(one < 0 for one in d))
    if stderr > 1e-9:
        student = stats.t(len(d) - 1)
        assert found.p_value == pytest.approx(2 * student.sf(abs(mean) / stderr), rel=1e-6, abs=1e-12)
        half = student.ppf(0.975) * stderr
        assert (found.low, found.high) == pytest.approx((mean - half, mean + half), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(("shift", "p_value"), [(0.0, 1.0), (-0.5, 0.0)])
def test_the_same_difference_on_every_seed_needs_no_test(shift, p_value):
    baseline = [1.0, 2.0, 4.0]
    found = paired_difference([value + shift for value in baseline], baseline)
    assert (found.low, found.mean, found.high, found.p_value) == (shift, shift, shift, p_value)


def test_standard_error():
    assert mean_and_error([2.0, 4.0, 4.0, 6.0]) == pytest.approx((4.0, math.sqrt(8 / 3) / 2))


# demo/test_training


def test_the_live_weights_and_swa_are_those_of_a_loop_written_out(tiny_digits):
    """The same training in plain torch, with the average of the samples as a mean over a stack."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    split = tiny_digits.load(5)
    torch.manual_seed(5)
    model = tiny_digits.build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    generator = torch.Generator().manual_seed(5)
    samples = []
    for step, batch in enumerate(batches(split.train, 25, 40, generator), 1):
        optimizer.zero_grad()
        cross_entropy(model(with_noise(batch.inputs, 0.3, generator)), batch.targets).backward()
        optimizer.step()
        if step in (25, 30, 35, 40):
            samples.append([parameter.detach().double().clone() for parameter in model.parameters()])

    def nll_on_test() -> float:
        with torch.no_grad():
            return cross_entropy(model.eval()(split.test.inputs), split.test.targets).item()

    live = nll_on_test()
    with torch.no_grad():
        for parameter, *taken in zip(model.parameters(), *samples, strict=True):
            parameter.copy_(torch.stack(taken).mean(0))
    swa = nll_on_test()
    torch.set_num_threads(threads)

    curves = train(tiny_digits, 5).curves
    assert curves[LIVE].steps == [10, 20, 30, 40]
    assert curves[LIVE].test_nll[-1] == live
    assert curves["SWA, no update_bn"].steps == [30, 40]
    assert curves["SWA, no update_bn"].test_nll[-1] == pytest.approx(swa, rel=1e-5)
    assert curves["SWA + update_bn"].test_nll[-1] != pytest.approx(swa, rel=1e-3)


def test_scoring_and_averaging_do_not_change_the_training(tiny_digits):
    often = train(tiny_digits, 0, record=True).curves[LIVE]
    once = train(replace(tiny_digits, averages={}), 0, eval_steps=40).curves[LIVE]
    assert once.steps == [40]
    assert once.test_nll[-1] == often.test_nll[-1]
    assert once.validation_accuracy[-1] == often.validation_accuracy[-1]


def test_a_decayed_run_is_the_constant_one_until_the_decay_begins(tiny_digits):
    constant = train(tiny_digits, 0).curves[LIVE]
    decayed = train(tiny_digits, 0, decay_fraction=0.5).curves
    assert list(decayed) == [LIVE]
    assert decayed[LIVE].test_nll[:2] == constant.test_nll[:2]
    assert decayed[LIVE].test_nll[2:] != constant.test_nll[2:]


def test_the_callers_random_state_and_threads_are_left_alone(tiny_digits):
    random_state, threads = torch.get_rng_state(), torch.get_num_threads()
    train(replace(tiny_digits, steps=4, eval_steps=4, record_every=1, block_steps=2), seed=123)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.get_num_threads() == threads


def test_the_text_task_trains():
    task = replace(
        TASKS["text"],
        steps=30,
        eval_steps=30,
        block_steps=10,
        warmup_steps=5,
        averages={"uniform tail": AverageSpec(Uniform(), start=20)},
    )
    curves = train(task, 0, record=True).curves
    assert set(curves) == {LIVE, "uniform tail", CHOSEN}
    # 256 bytes guessed evenly would cost ln 256 = 5.5 nats.
    assert curves[LIVE].test_nll[0] < 4.0
    assert curves["uniform tail"].test_nll[0] < 4.0


def test_every_step_of_the_schedule_has_a_positive_rate():
    factors = [learning_rate_factor(n, steps=50, warmup_steps=5, decay_steps=20) for n in range(50)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[5:31] == [1.0] * 26
    assert factors[31:] == pytest.approx([left / 20 for left in range(19, 0, -1)])


@pytest.mark.parametrize(("name", "inputs"), [("digits", (3, 1, 8, 8)), ("text", (3, 8))])
def test_models_give_one_logit_per_class(name, inputs):
    task = TASKS[name]
    model: nn.Module = task.build_model()
    x = torch.zeros(inputs, dtype=torch.int64 if name == "text" else torch.float32)
    assert model(x).shape == (3, 256 if name == "text" else 10)
