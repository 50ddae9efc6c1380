"""What score functions do that they should not: it misleads nobody, and the user's model is as it was."""

import math
import random

import numpy as np
import pytest
import torch
from torch import nn

import polyak
from polyak._evaluate import read_score, resolved_mode, simultaneous_intervals, try_weights
from polyak.errors import NonFiniteError, OptionError

EXAMPLES = torch.linspace(-1, 1, 40)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(1, 1, bias=False)
        self.norm = nn.BatchNorm1d(1)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(1, 1, bias=False)

    def forward(self, x):
        return self.head(self.drop(self.norm(self.body(x))))


def off(model):
    """A loss per example: the squared distance of the weight to targets around 2."""
    return (model.body.weight.detach().float().flatten() - 2 - EXAMPLES).square()


@pytest.fixture
def run(tmp_path):
    model = Net()
    with polyak.Recorder(model, tmp_path / "run", block=1) as recorder:
        for value in (1.0, 3.0, 1.0, 3.0):
            model.body.weight.data.fill_(value)
            recorder.update()
    return recorder.trajectory


def select(run, score, model=None, **options):
    options = {"profiles": ["uniform", "tail:0.5"], "progress": False, **options}
    return polyak.select(run, Net() if model is None else model, score=score, **options)


def scores(choice):
    return {candidate.name: candidate.score for candidate in choice.table}


# Luck is no part of a difference.


def test_random_numbers_are_the_same_for_all_candidates_and_stay_the_callers(run):
    def noisy(model):
        draws = torch.rand(40), torch.from_numpy(np.random.rand(40)), torch.tensor(random.random())
        return off(model)[torch.randperm(40)] + sum(draws)

    model = Net()
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    choice, again = select(run, noisy, model), select(run, noisy, model)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[2]
    assert (np.random.get_state()[1] == states[1]).all()
    assert choice.to_dict() == again.to_dict()
    exact = scores(select(run, off))
    differences = {name: score - exact[name] for name, score in scores(choice).items()}
    assert len({round(difference, 5) for difference in differences.values()}) == 1


# What a score does to the model.


def in_half(model):
    model.half()


def without_a_head(model):
    model.head = nn.Identity()


def broken(model):
    model.train()
    model.norm.running_mean.fill_(7.0)
    model.norm = nn.Identity()


@pytest.mark.parametrize("does", [in_half, without_a_head, broken])
def test_what_a_score_does_to_the_model_is_undone_before_the_next_candidate(run, does):
    model = Net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules, modes = dict(model.named_modules()), [module.training for module in model.modules()]
    seen = []

    def score(model):
        found = off(model)
        seen.append((model.body.weight.dtype, type(model.head), type(model.norm), model.training))
        does(model)
        return found

    assert scores(select(run, score, model)) == scores(select(run, off))
    assert set(seen) == {(torch.float32, nn.Linear, nn.BatchNorm1d, False)}
    assert dict(model.named_modules()) == modules
    assert [module.training for module in model.modules()] == modes
    after = model.state_dict()
    assert {name: t.dtype for name, t in after.items()} == {name: t.dtype for name, t in before.items()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
def test_a_score_that_changes_the_model_and_is_interrupted_leaves_it_as_it_was(run, error):
    model = Net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def score(model):
        without_a_head(model)
        in_half(model)
        raise error

    with pytest.raises(type(error)):
        select(run, score, model)
    assert model.state_dict().keys() == before.keys() and model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_prepare_returns_is_scored_in_evaluation_mode(run):
    modes = []

    def score(model):
        modes.extend(module.training for module in model.modules())
        return off(model[0])

    select(run, score, prepare=lambda copy: nn.Sequential(copy, nn.Dropout()).train())
    assert modes and not any(modes)


# What is a score.


@pytest.mark.parametrize(
    "result",
    [torch.tensor([1j, 2.0]), np.array([1j, 2.0]), 1j, [torch.ones(2, requires_grad=True)]],
)
def test_what_is_no_real_number_is_refused(result):
    with pytest.raises(OptionError, match="holdout must return a number"):
        read_score(result, "holdout")


@pytest.mark.parametrize("losses", [[math.inf, 1.0, 2.0], [1e30, 2e30], [3e7, 3e7]])
def test_broken_and_huge_losses_are_not_taken_for_right_answers(losses):
    assert resolved_mode(None, read_score(losses)) == "min"


def test_of_too_few_examples_noise_cannot_be_told(run):
    """Among many candidates the best of two losses would look certain half of the time."""
    choice = select(run, lambda m: off(m)[:4])
    assert choice.best.name == "uniform" and choice.beats_baseline is None
    assert "cannot be told from 4 losses for each: let score return those of more examples" in choice.verdict


@pytest.mark.parametrize("examples", [6, 10])
def test_the_best_of_independent_noise_of_few_examples_is_seldom_called_a_gain(examples):
    claimed = 0
    for seed in range(100):
        generator = np.random.default_rng(seed)
        losses = [read_score(row) for row in generator.normal(size=(20, examples))]
        best = min(losses, key=lambda score: score.value)
        ((_, interval),) = simultaneous_intervals([losses[0], best], losses[0])
        ((*_, wide),) = simultaneous_intervals([*losses, best], losses[0])
        assert wide.high - wide.low >= interval.high - interval.low
        claimed += wide.high < 0
    assert claimed <= 12


# What cannot be scored.


def test_no_finite_score_is_no_choice(run, tmp_path):
    model = Net()
    choice = select(run, lambda m: off(m) * math.nan, model)
    assert "No candidate has a finite score" in choice.verdict and not choice.has_best
    for use in (choice.weights, lambda: choice.apply(model), lambda: choice.write(tmp_path / "best.pt")):
        with pytest.raises(NonFiniteError, match="no candidate has a finite score, so none is the best"):
            use()
    assert not (tmp_path / "best.pt").exists()


def test_averages_without_a_finite_score_are_counted_and_rank_last(run):
    live = 3.0
    choice = select(run, lambda m: off(m) if m.body.weight.item() == live else off(m) - math.inf)
    assert (
        choice.best.name == "live"
        and "2 of 2 averages have no finite score, and rank last." in choice.verdict
    )
    assert "nan" not in str(choice) and "-inf" not in str(choice).splitlines()[3]
    assert "no finite score" not in select(run, off).verdict


# Data that nothing is chosen on.


@pytest.mark.parametrize("holdout", [off, lambda m: off(m).numpy()])
def test_a_holdout_that_is_what_the_choice_is_made_on_is_refused_at_once(run, holdout):
    calls = []
    with pytest.raises(OptionError, match="holdout gives the very losses that score gives"):
        select(run, off, holdout=lambda m: calls.append(1) or holdout(m))
    assert len(calls) == 1


def test_a_holdout_is_called_before_anything_is_chosen_so_that_its_faults_are_known_early(run):
    calls = []
    with pytest.raises(OptionError, match="holdout must return a number"):
        select(run, lambda m: calls.append(1) or off(m), holdout=lambda m: {"loss": 1})
    assert len(calls) == 1
    right = lambda m: (off(m) < 2).float()  # noqa: E731
    assert select(run, right, holdout=lambda m: right(m).clone(), mode="max").best  # may be equal by accident


def test_a_holdout_that_is_not_finite_confirms_nothing(run):
    choice = select(run, off, holdout=lambda m: off(m) * math.nan)
    assert "On the holdout a score is not finite, which confirms nothing." in choice.verdict


# Arguments of another kind.


def test_wrong_arguments_are_named_in_plain_words(run):
    with pytest.raises(OptionError, match=r"score must be a function, got 0\.4"):
        select(run, 0.4)
    with pytest.raises(OptionError, match=r"got <function .*call it, and give what it returns"):
        select(run, off, recalibrate=lambda: iter([]))
    model = Net()
    loss = lambda m, batch: m.body.weight.sum()  # noqa: E731
    for options, error, message in (
        ({"score": 3, "mode": "min"}, OptionError, "score must be a function or None"),
        ({"batches": 3, "loss": loss}, OptionError, "batches must be of type Iterable"),
        (
            {"batches": [1], "loss": loss, "mode": "min"},
            TypeError,
            "batches and a loss takes signed, steps, not mode",
        ),
        ({"score": off, "signed": True}, TypeError, "a score takes mode, .*, not signed"),
    ):
        with pytest.raises(error, match=message):
            polyak.fit(run, model, **options)


def test_one_trial_may_lie_inside_another_only_where_it_is_right():
    model = nn.Linear(1, 1, bias=False)
    assert try_weights(model, {}, lambda m: torch.rand(()).item()) == try_weights(
        model, {}, lambda m: torch.rand(()).item()
    )
