import json
from dataclasses import replace

import numpy as np
import pytest

from polyak.demo._show import study_as_data
from polyak.demo._study import run_count, run_study, train
from polyak.demo._tasks import CHOSEN, LIVE, LIVE_EARLY
from polyak.errors import OptionError


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
