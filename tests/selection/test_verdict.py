"""What a choice says must not mislead: scores that may be accuracies, stale statistics, ties, chance, gaps in files."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import polyak
from polyak import Decay, Power, Tail, Uniform, Weights, _evaluate, checkpoints, landscape
from polyak._evaluate import read_score, simultaneous_intervals
from polyak.errors import OptionError, StructureError
from polyak.selection._result import LIVE, RECALIBRATED, Selection, simplicity
from polyak.selection._select import _ranked
from polyak.trajectory import Trajectory
from recorded_runs import NormedWeight

BATCHES = [torch.tensor([[0.0], [2.0]])]
EXAMPLES = torch.linspace(-1, 1, 101, dtype=torch.float64)


def plain():
    return nn.Linear(1, 1, bias=False)


def recorded(folder, model, values, close=True):
    parameter = next(model.parameters())
    run = polyak.Recorder(model, folder, block=1)
    for value in values:
        parameter.data.fill_(value)
        run.update()
    if close:
        run.close()
    return run.trajectory


def select(trajectory, model, score, profiles=("uniform",), **options):
    return polyak.select(trajectory, model, score=score, profiles=profiles, progress=False, **options)


def off(model):
    """A loss per example: the weight's squared distance to targets around 2."""
    return (next(model.parameters()).detach().double().flatten() - 2 - EXAMPLES).square()


# Which scores are better.


@pytest.mark.parametrize(
    ("score", "what"),
    [
        (lambda m: 0.93, r"one number \(0.93\)"),
        (lambda m: torch.tensor([True, False, True]), "whole numbers, such as 0 and 1,"),
        (lambda m: torch.tensor([1.0, 0.0, 1.0]), "whole numbers, such as 0 and 1,"),
        (lambda m: torch.tensor([12, 7, 9]), "whole numbers, such as 0 and 1,"),
    ],
)
def test_a_score_that_may_be_an_accuracy_is_refused_before_anything_else_is_tried(tmp_path, score, what):
    model = plain()
    trajectory = recorded(tmp_path / "run", model, [1.0, 3.0])
    paths = []
    for value in (1.0, 3.0):
        paths.append(tmp_path / f"{value}.pt")
        torch.save({"weight": torch.tensor([[value]])}, paths[-1])
    ends = {"live": {"weight": torch.ones(1, 1)}, "other": {"weight": torch.zeros(1, 1)}}
    calls = []
    counted = lambda m: calls.append(1) or score(m)  # noqa: E731
    for use in (
        lambda: select(trajectory, model, counted, holdout=counted),
        lambda: polyak.soup(paths, model, counted),
        lambda: landscape.path(model, ends, counted, progress=False),
        lambda: landscape.rays(model, ends, counted, progress=False),
    ):
        calls.clear()
        with pytest.raises(OptionError, match=rf'{what} for the first weights, .* give mode="min" if lower'):
            use()
        assert len(calls) == 1


def test_losses_per_example_are_the_better_the_lower_unless_they_are_said_to_be_no_losses(tmp_path):
    model = plain()
    trajectory = recorded(tmp_path / "run", model, [1.0, 3.0])
    lower, higher = select(trajectory, model, off), select(trajectory, model, off, mode="max")
    assert (lower.mode, lower.best.name, lower.better) == ("min", "uniform", "lower is better")
    assert (higher.mode, higher.best.name, higher.better) == ("max", "live", "higher is better")
    assert str(lower).startswith("Lower is better;") and "(lower is better)" in lower.verdict
    assert str(higher).startswith("Higher is better;") and "(higher is better)" in higher.verdict
    right = select(trajectory, model, lambda m: off(m) < 0.5, mode="max")
    assert right.best.name == "uniform" and right.best.difference > 0


# Live weights with the statistics they have, and with statistics as averages get them.


def stale(model):
    """A loss per example that statistics of other weights add 5 to, whatever the weight; noise is that of ``off``."""
    return off(model) + 5 * (model.norm.running_mean - model.weight).abs().double().detach()


def test_a_gain_of_recalibration_alone_is_not_called_one_of_averaging(tmp_path):
    model = NormedWeight()
    trajectory = recorded(tmp_path / "run", model, [1.8, 2.2, 1.8, 2.0])
    choice = select(trajectory, model, stale, recalibrate=BATCHES, holdout=lambda m: stale(m) + 0.5)
    scores = {c.name: c.score for c in choice.table}
    assert scores[LIVE] == pytest.approx(scores[RECALIBRATED] + 10)
    assert choice.best.name == choice.baseline.name == RECALIBRATED and choice.live.name == LIVE
    assert choice.live.difference == pytest.approx(10) and choice.baseline.difference == 0
    assert choice.best_average.difference == pytest.approx(scores["uniform"] - scores[RECALIBRATED])
    assert "Keep the live weights, with recomputed BatchNorm statistics" in choice.verdict
    assert choice.holdout is None
    assert "differences are to live, recalibrated" in str(choice)
    assert "live, recalibrated" in choice.plot().get_axes()[0].get_xlabel()
    assert choice.to_dict()["baseline"] == RECALIBRATED

    choice.write(tmp_path / "best.pt")
    written = checkpoints.open(tmp_path / "best.pt")
    choice.apply(model)
    for weight, mean in (
        (model.weight, model.norm.running_mean),
        (written.read("weight"), written.read("norm.running_mean")),
    ):
        assert (weight.item(), mean.item()) == (pytest.approx(2.0), pytest.approx(2.0))
    assert choice.weights()["weight"].item() == 2.0


def test_an_average_is_compared_with_the_recalibrated_live_weights_everywhere(tmp_path):
    model = NormedWeight()
    trajectory = recorded(tmp_path / "run", model, [1.0, 3.0])
    holdout = lambda m: stale(m) + 0.5  # noqa: E731
    choice = select(trajectory, model, stale, recalibrate=BATCHES, holdout=holdout)
    assert choice.best.name == "uniform" and choice.baseline.name == RECALIBRATED
    assert choice.best.difference == pytest.approx(-1)
    assert choice.best.low < -1 < choice.best.high
    assert choice.holdout.baseline_score == pytest.approx(choice.baseline.score + 0.5)
    assert choice.holdout.difference == pytest.approx(-1)
    assert "1 below the live weights, recalibrated (95%" in choice.verdict


def test_live_weights_that_are_worse_recalibrated_are_the_baseline_as_they_are(tmp_path):
    model = NormedWeight()
    trajectory = recorded(tmp_path / "run", model, [1.0, 3.0])
    worse = lambda m: off(m) + 0.1 * m.norm.running_mean.double()  # noqa: E731
    choice = select(trajectory, model, worse, recalibrate=BATCHES)
    assert choice.baseline is choice.live
    assert {c.name for c in choice.table} == {LIVE, RECALIBRATED, "uniform"}
    assert {c.name for c in select(trajectory, model, worse).table} == {LIVE, "uniform"}
    untracked = plain()
    run = recorded(tmp_path / "plain", untracked, [1.0, 3.0])
    assert {c.name for c in select(run, untracked, off).table} == {LIVE, "uniform"}


def test_live_weights_in_the_model_are_recalibrated_where_the_recording_goes_on(tmp_path):
    model = NormedWeight()
    trajectory = recorded(tmp_path / "run", model, [5.0, 3.0, 2.0], close=False)
    choice = select(trajectory, model, stale, recalibrate=BATCHES)
    assert choice.best.name == RECALIBRATED and model.norm.running_mean.item() == 0
    choice.apply(model)
    assert model.norm.running_mean.item() == pytest.approx(2.0) and choice.weights() == {}


# Ties.


def test_of_equal_scores_the_simplest_is_the_best(tmp_path):
    model = plain()
    trajectory = recorded(tmp_path / "run", model, [1.0, 3.0, 1.0, 3.0, 2.0])
    profiles = ["power:gamma=2", "decay:sqrt:0.8", "ema:half_life=2", "tail:0.8", "uniform"]
    flat = lambda m: 1.0 if m.weight.item() != 2 else 2.0  # noqa: E731
    choice = select(trajectory, model, flat, profiles, mode="min")
    names = [candidate.name for candidate in choice.table]
    averages = ["tail:0.8", "ema:half_life=2", "decay:sqrt:0.8", "power:gamma=2"]
    assert names == [*averages, LIVE, "uniform"] and choice.simplest is choice.best
    assert "cannot be told from one number" in choice.verdict and "as good" in choice.verdict
    assert {candidate.tied for candidate in choice.table} == {None}
    assert "≈:" not in str(choice)


def test_the_simplest_within_noise_of_the_best_is_marked_and_named(tmp_path):
    model = plain()
    trajectory = recorded(tmp_path / "run", model, [30.0, 1.0, 3.0, 1.1, 3.1, 4.0])
    profiles = ["tail:0.667", "decay:sqrt:0.6", "uniform"]
    # Targets around what the decay gives, so that it is the best, and the tail as good but for noise.
    aim = trajectory.average("decay:sqrt:0.6")["weight"].double().flatten() + 3 * EXAMPLES
    choice = select(
        trajectory, model, lambda m: (m.weight.detach().double().flatten() - aim).square(), profiles
    )
    tied = {candidate.name: candidate.tied for candidate in choice.table}
    assert choice.best.name == "decay:sqrt:0.6" and tied["tail:0.667"] and not tied[LIVE]
    assert choice.simplest.name == "tail:0.667" and choice.to_dict()["simplest"] == "tail:0.667"
    score = next(c.score for c in choice.table if c.name == "tail:0.667")
    assert f"tail:0.667 ({score:.5g}) is as good within noise, and simpler." in choice.verdict
    marks = [line.split()[1] == "≈" for line in str(choice).splitlines()[3:7]]
    assert marks == [candidate.tied and candidate is not choice.best for candidate in choice.table]


def test_live_weights_within_noise_are_the_simplest(tmp_path):
    model = plain()
    trajectory = recorded(tmp_path / "run", model, [1.9, 2.0, 2.1])
    choice = select(trajectory, model, off)
    assert choice.best.name == "uniform" and choice.beats_baseline is False
    assert choice.simplest is choice.live and "are as good within noise, and simpler" in choice.verdict


def test_simple_profiles_come_before_intricate_ones():
    order = [
        None,
        Uniform(),
        Tail(0.2),
        polyak.EMA(half_life=5),
        Decay("sqrt", 0.4),
        Power(gamma=3),
        Weights((1.0, 2.0)),
    ]
    ranks = [simplicity(profile) for profile in order]
    assert ranks == sorted(ranks) and len(set(ranks)) == len(ranks)


# Chance.


def test_simultaneous_intervals_are_those_of_the_formula():
    generator = np.random.default_rng(3)
    losses = generator.gamma(1.0, size=40) + generator.normal(size=(4, 40)) * [[0.1], [0.3], [1.0], [0.0]]
    scores = [read_score(row) for row in losses]
    draws = np.random.default_rng(0)
    picked = [draws.integers(40, size=40) for _ in range(2000)]
    to_third = losses - losses[2]
    means, errors = to_third.mean(axis=1), stats.sem(to_third, axis=1)
    others = [0, 1, 3]
    measured = np.array(
        [
            (to_third[others][:, rows].mean(axis=1) - means[others])
            / stats.sem(to_third[others][:, rows], axis=1)
            for rows in picked
        ]
    )
    least, most = np.quantile(measured.min(axis=1), 0.025), np.quantile(measured.max(axis=1), 0.975)
    assert -4 < least < -1.9 and 1.9 < most < 4
    found, to_first = simultaneous_intervals(scores, scores[2], scores[0])
    np.testing.assert_allclose([i.low for i in found], means - most * errors, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose([i.high for i in found], means - least * errors, rtol=1e-9, atol=1e-12)
    (alone,) = simultaneous_intervals(scores, scores[0])
    assert to_first == alone


def test_a_broken_candidate_has_no_interval_and_takes_none_from_the_others():
    losses = ([1.0, 2.0, 4.0, 0.0, 1.0], [1.5, 1.0, 3.0, 0.0, 2.0], [np.nan, 1.0, 1.0, 1.0, 1.0])
    scores = [read_score(row) for row in losses]
    (with_it,), (without,) = (simultaneous_intervals(part, scores[0]) for part in (scores, scores[:2]))
    assert with_it[:2] == without and np.isnan(with_it[2].low)
    broken, to_first = simultaneous_intervals(scores, scores[2], scores[0])
    assert all(np.isnan(interval.low) for interval in broken) and to_first[1].low < to_first[1].high
    assert simultaneous_intervals([read_score(0.5)], read_score(0.7)) == [[None]]


def test_the_best_of_many_candidates_that_are_noise_is_seldom_called_a_gain(monkeypatch):
    """The chance of a verdict "beyond the noise" where no average is better, over 200 made-up runs."""
    monkeypatch.setattr(_evaluate, "_times_drawn", functools.cache(_evaluate._times_drawn))
    tails = [Tail(round(0.03 * (1 + index), 2)) for index in range(12)]
    explained = dict.fromkeys(tails, SimpleNamespace(effective_samples=1.0, warnings=()))
    claimed = claimed_plainly = 0
    for seed in range(200):
        generator = np.random.default_rng(seed)
        live = generator.gamma(1.0, size=60)
        noise = {tail: live + 0.1 * generator.standard_t(5, size=60) for tail in tails}
        scores = {LIVE: read_score(live)} | {tail: read_score(losses) for tail, losses in noise.items()}
        table = _ranked(scores, explained, "min")
        choice = Selection(table, "min", None, None, None, None)
        claimed += bool(choice.beats_baseline)
        ((plain_interval,),) = simultaneous_intervals([scores[table[0].profile]], scores[LIVE])
        claimed_plainly += plain_interval.high < 0
    assert claimed / 200 <= 0.05
    assert claimed_plainly / 200 > 0.15  # what the correction is for


def test_a_real_gain_is_seen_past_the_correction(tmp_path):
    model = plain()
    trajectory = recorded(tmp_path / "run", model, [1.0, 3.0, 1.0, 3.0, 1.0, 3.0])
    choice = polyak.select(trajectory, model, score=off, progress=False)
    assert choice.beats_baseline and "beyond the noise" in choice.verdict
    assert "confirm it with a holdout" in choice.verdict
    assert "confirm it with" not in select(trajectory, model, off, holdout=lambda m: off(m) + 0.5).verdict


# Files that lack a part of the model.


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.base = nn.Linear(1, 1)
        self.base.requires_grad_(False)
        self.head = nn.Linear(1, 1, bias=False)
        self.norm = nn.BatchNorm1d(1)
        self.register_buffer("scale", torch.ones(1), persistent=False)


def saved(folder, without):
    folder.mkdir()
    for step in (1, 2, 3):
        model = Deep()
        model.head.weight.data.fill_(step)
        state = {name: value for name, value in model.state_dict().items() if not name.startswith(without)}
        torch.save(state, folder / f"step-{step}.pt")
    return Trajectory.from_checkpoints(sorted(folder.glob("*.pt")))


@pytest.mark.parametrize(
    ("without", "named"),
    [
        ("norm.running", r"lack 'norm.running_mean', 'norm.running_var', which"),
        ("base.bias", r"lack 'base.bias', which"),
        ("head", r"lacks 'head.weight'"),
    ],
)
def test_checkpoints_that_lack_tensors_of_the_model_are_refused_unscored(tmp_path, without, named):
    trajectory = saved(tmp_path / "files", (without,))
    unscored = lambda m: pytest.fail("it was scored")  # noqa: E731
    with pytest.raises(StructureError, match=named):
        select(trajectory, Deep(), unscored)
    with pytest.raises(StructureError, match=named):
        polyak.soup(sorted((tmp_path / "files").glob("*.pt")), Deep(), unscored)


@pytest.mark.parametrize("without", ["base", "norm.num_batches"])
def test_files_of_what_was_trained_only_and_without_counters_are_scored(tmp_path, without):
    trajectory = saved(tmp_path / "files", (without,))
    score = lambda m: (m.head.weight.detach().flatten() - 2 + EXAMPLES).square()  # noqa: E731
    choice = select(trajectory, Deep(), score, recalibrate=None)
    assert choice.best.name == "uniform"
    assert ("Frozen parameters are those of the given model" in choice.verdict) == (without == "base")


def test_a_recording_holds_all_of_the_model(tmp_path):
    model = Deep()
    with polyak.Recorder(model, tmp_path / "run", block=1) as run:
        run.update()
        run.update()
    score = lambda m: (m.head.weight.detach().flatten() + EXAMPLES).square()  # noqa: E731
    assert select(run.trajectory, Deep(), score).best.name == "live"


# Scoring what a candidate becomes.


@pytest.mark.parametrize("returns", [True, False])
def test_candidates_are_prepared_on_a_copy_before_they_are_scored(tmp_path, returns):
    model = plain()
    trajectory = recorded(tmp_path / "run", model, [1.4, 3.0, 1.3])
    before = model.weight.detach().clone()
    given = []

    def rounded(copy):
        given.append(copy)
        if returns:
            other = plain()
            other.weight.data.copy_(copy.weight.round())
            return other
        with torch.no_grad():
            copy.weight.round_()
        return None

    others = lambda m: off(m) + 0.5  # noqa: E731
    choice = select(
        trajectory, model, off, ["uniform", "window:0,2"], holdout=others, prepare=rounded, mode="min"
    )
    exact = lambda value: float((value - 2 - EXAMPLES).square().mean())  # noqa: E731
    scores = {candidate.name: candidate.score for candidate in choice.table}
    assert scores == pytest.approx({"live": exact(1), "uniform": exact(2), "window:0,2": exact(2)})
    assert len(given) == 5 and not any(copy is model or copy.training for copy in given)
    assert torch.equal(model.weight, before) and model.training
    assert choice.holdout.best_score == pytest.approx(exact(2) + 0.5)
    choice.apply(model)
    assert model.weight.item() == pytest.approx(1.9)  # as it was before it was rounded


def test_what_cannot_be_prepared_is_said_and_the_model_stays(tmp_path):
    model = plain()
    trajectory = recorded(tmp_path / "run", model, [1.0, 3.0])
    with pytest.raises(OptionError, match="prepare must return a module, or None"):
        select(trajectory, model, off, prepare=lambda m: m.weight)
    model.handle = (value for value in ())  # a generator cannot be copied
    with pytest.raises(OptionError, match="this Linear cannot be copied"):
        select(trajectory, model, off, prepare=lambda m: None)
    assert model.weight.item() == 3.0
