"""Weights tried in a live model: errors and intervals against scipy and textbooks, and a model that is as before."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

import polyak
from polyak import checkpoints
from polyak._evaluate import apply_weights, read_score, simultaneous_intervals, try_weights, write_weights
from polyak._swap import Swap, modes, undoing
from polyak.errors import OptionError, OutputExistsError, StructureError, SwapError


def losses(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).gamma(2.0, size=n)


def paired_interval(score, baseline):
    ((interval,),) = simultaneous_intervals([score], baseline)
    return interval


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 1024), st.integers(0, 1000))
def test_the_standard_error_is_that_of_the_mean(n, seed):
    sample = losses(n, seed)
    score = read_score(torch.tensor(sample))
    assert score.value == pytest.approx(sample.mean(), rel=1e-12)
    assert score.stderr == pytest.approx(stats.sem(sample), rel=1e-9)


def test_many_examples_are_resampled_in_groups_of_neighbours():
    sample = losses(100_001, 0)
    score = read_score(sample)
    assert score.value == pytest.approx(sample.mean(), rel=1e-12)
    assert len(score.group_sums) == len(score.group_sizes) == 1024
    assert score.group_sums.sum() == pytest.approx(sample.sum())
    assert score.group_sizes.sum() == len(sample) and np.ptp(score.group_sizes) <= 1
    assert score.stderr == pytest.approx(stats.sem(sample), rel=0.1)


def test_neighbours_that_are_alike_make_the_error_larger_than_independence_would():
    sample = np.repeat(losses(1024, 3), 50)
    assert read_score(sample).stderr == pytest.approx(stats.sem(losses(1024, 3)), rel=1e-9)


def test_intervals_cover_the_truth_as_often_as_they_say():
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        sample = generator.normal(0.3, 1.0, size=60)
        interval = paired_interval(read_score(sample), read_score(np.zeros(60)))
        covered += interval.low <= 0.3 <= interval.high
    assert 180 <= covered <= 198


@pytest.mark.parametrize(
    ("examples", "sigma", "sign"), [(12, 1.0, 1), (50, 1.5, 1), (50, 1.0, -1), (200, 1.0, 1)]
)
def test_differences_that_few_examples_make_are_not_called_sure(examples, sigma, sign):
    """Most examples gain a little and a few lose much, or the other way round; in the mean there is no difference."""
    generator = np.random.default_rng(0)
    mean, missed = np.exp(sigma**2 / 2), 0
    for _ in range(100):
        noise = sign * (generator.lognormal(0, sigma, size=(8, examples)) - mean)
        live = generator.gamma(2.0, size=examples)
        (intervals,) = simultaneous_intervals([read_score(live + row) for row in noise], read_score(live))
        missed += not all(interval.low <= 0 <= interval.high for interval in intervals)
    assert missed <= 12


def test_a_candidate_that_diverged_spoils_no_other_interval():
    live, broken = losses(50, 0), losses(50, 0)
    broken[7] = np.nan
    ((spoilt, fine),) = simultaneous_intervals([read_score(broken), read_score(live + 1)], read_score(live))
    assert np.isnan(spoilt.low) and np.isnan(spoilt.high)
    assert (fine.low, fine.high) == (pytest.approx(1), pytest.approx(1))


def test_losses_whose_squares_are_beyond_floats_spoil_no_other_interval():
    live, broken = losses(50, 0), losses(50, 0)
    broken[7] = 1e200
    ((spoilt, fine),) = simultaneous_intervals([read_score(broken), read_score(live + 1)], read_score(live))
    assert not spoilt.low > 0 and not spoilt.high < 0
    assert (fine.low, fine.high) == (pytest.approx(1), pytest.approx(1))


@pytest.mark.parametrize("number", [0.5, 3, True, np.float32(0.5), torch.tensor(0.5), torch.tensor([0.5])])
def test_a_single_number_has_no_error(number):
    score = read_score(number)
    assert (score.value, score.stderr) == (float(number), None)
    assert paired_interval(score, score) is None


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "NoneType"),
        ("low", "a str"),
        ([], r"shape \(0,\)"),
        (torch.zeros(2, 3), r"shape \(2, 3\)"),
        ({"loss": 1.0}, "a dict"),
    ],
)
def test_what_is_no_score_is_refused(result, message):
    with pytest.raises(OptionError, match=message):
        read_score(result)


def test_scores_of_other_examples_cannot_be_paired():
    with pytest.raises(OptionError, match="one number and 3 examples"):
        paired_interval(read_score([1.0, 2.0, 3.0]), read_score(1.0))
    with pytest.raises(OptionError, match="2 examples and 3 examples"):
        paired_interval(read_score([1.0, 2.0, 3.0]), read_score([1.0, 2.0]))


# Trying, applying and writing weights: the model is exactly as before, or exactly as averaged.

BATCHES = [torch.tensor([[1.0, 2.0], [3.0, 5.0]]), torch.tensor([[0.0, 4.0]])]


class Tied(nn.Module):
    """Tied and frozen weights, BatchNorm, dropout, and a buffer that is replaced in every forward pass."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(2, 2, bias=False)
        self.norm = nn.BatchNorm1d(2)
        self.drop = nn.Dropout(0.5)
        self.second = nn.Linear(2, 2, bias=False)
        self.second.weight = self.first.weight
        self.scale = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x):
        self.calls = self.calls + 1
        return self.second(self.drop(self.norm(self.first(x)))) * self.scale


@pytest.fixture
def model():
    model = Tied()
    model.norm.eval()
    return model


WEIGHTS = {
    "first.weight": torch.tensor([[1.0, 0.5], [0.0, 2.0]]),
    "norm.weight": torch.tensor([2.0, 3.0]),
    "norm.bias": torch.zeros(2),
    "norm.running_mean": torch.tensor([7.0, 7.0]),
}


def state(model):
    tensors = {name: t.clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}
    modes = {name: module.training for name, module in model.named_modules()}
    places = {name: id(t) for name, t in [*model.named_parameters(), *model.named_buffers()]}
    return tensors, modes, places


def unchanged(model, before):
    tensors, modes, places = state(model)
    same = all(torch.equal(tensor, before[0][name]) for name, tensor in tensors.items())
    return same and (modes, places) == before[1:]


def test_a_trial_sees_the_weights_in_evaluation_mode_without_gradients(model):
    before = state(model)
    seen = {}

    def score(tried):
        seen["modes"] = {module.training for module in tried.modules()}
        seen["tensors"] = {name: tensor.clone() for name, tensor in tried.state_dict().items()}
        seen["gradients"] = tried(BATCHES[0]).requires_grad
        tried.train()  # users do, and forget
        return 1.0

    try_weights(model, WEIGHTS, score)
    assert seen["modes"] == {False} and not seen["gradients"]
    for name, value in WEIGHTS.items():
        assert torch.equal(seen["tensors"][name], value)
    assert torch.equal(seen["tensors"]["second.weight"], WEIGHTS["first.weight"])
    assert unchanged(model, before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["score", "loader"])
def test_the_model_is_as_before_when_something_raises(model, error, where):
    before = state(model.train())

    def broken(*_):
        model(BATCHES[0])
        raise error("yours")

    def batches():
        yield BATCHES[0]
        broken()

    score, loader = (broken, BATCHES) if where == "score" else (lambda model: 1.0, batches())
    with pytest.raises(error, match="yours"):
        try_weights(model, WEIGHTS, score, loader)
    assert unchanged(model, before)


def recalibrated(model):
    """An obvious reference: load, then update_bn."""
    reference = Tied()
    reference.load_state_dict({**model.state_dict(), **WEIGHTS, "second.weight": WEIGHTS["first.weight"]})
    polyak.update_bn(BATCHES, reference)
    return reference.state_dict()


def test_recalibration_gives_each_trial_the_statistics_of_its_weights(model):
    model.train()
    expected = recalibrated(model)
    before = state(model)
    seen = {}
    try_weights(model, WEIGHTS, lambda tried: seen.update(_copied(tried)) or 1.0, BATCHES)
    for name in expected:
        assert torch.equal(seen[name], expected[name])
    assert unchanged(model, before)
    try_weights(model, {}, lambda tried: seen.update(_copied(tried)) or 1.0)
    assert torch.equal(seen["norm.running_mean"], before[0]["norm.running_mean"])


def _copied(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_applied_and_written_are_the_same_and_writing_changes_nothing(model, tmp_path):
    model.train()
    expected = recalibrated(model)
    before = state(model)
    write_weights(tmp_path / "best.pt", model, WEIGHTS, recalibrate=BATCHES, metadata={"polyak.profile": "x"})
    assert unchanged(model, before)
    written = checkpoints.open(tmp_path / "best.pt")
    assert set(written.tensors) == set(expected) and written.ties == {"second.weight": "first.weight"}
    apply_weights(model, WEIGHTS, BATCHES)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]) and torch.equal(written.read(name), expected[name])
    assert model.training and model.norm.training
    with pytest.raises(OutputExistsError):
        write_weights(tmp_path / "best.pt", model, WEIGHTS, metadata={})


def test_a_half_precision_model_is_written_in_the_precision_of_its_average(tmp_path):
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    write_weights(tmp_path / "a.safetensors", model, {"weight": torch.tensor([[1.001]])}, metadata={})
    assert checkpoints.open(tmp_path / "a.safetensors").read("weight").item() == pytest.approx(
        1.001, abs=1e-6
    )


def test_an_apply_that_fails_leaves_the_model(model):
    before = state(model.train())
    with pytest.raises(polyak.PolyakError):
        apply_weights(model, WEIGHTS, recalibrate=[torch.full((4, 2), float("nan"))])
    assert unchanged(model, before)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({**WEIGHTS, "third.weight": torch.zeros(1)}, "has 'third.weight' besides"),
        ({"first.weight": WEIGHTS["first.weight"]}, "lacks 'norm.weight', 'norm.bias'"),
        ({**WEIGHTS, "norm.bias": torch.zeros(3)}, r"'norm.bias' as \(3,\), not \(2,\)"),
        ({**WEIGHTS, "norm.bias": torch.zeros(1)}, r"'norm.bias' as \(1,\), not \(2,\)"),
    ],
)
def test_weights_of_another_model_are_refused(model, weights, message):
    before = state(model)
    with pytest.raises(StructureError, match=message):
        try_weights(model, weights, lambda model: pytest.fail("it was scored"))
    assert unchanged(model, before)


def test_a_model_that_holds_an_average_already_is_refused(model):
    average = polyak.Average(model, polyak.Uniform())
    average.update()
    with average.applied(), pytest.raises(SwapError):
        try_weights(model, WEIGHTS, lambda model: 1.0)


# What the trial rests on: modes that come back, and what is undone whatever falls into it.


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_what_is_undone_is_undone_once_more_where_an_interrupt_falls_into_it(error):
    calls = []

    def undo():
        calls.append("begun")
        if len(calls) == 1:
            raise error
        calls.append("done")

    with pytest.raises(error), undoing(undo):
        pass
    assert calls == ["begun", "begun", "done"]


def test_an_error_inside_leaves_after_one_undoing():
    calls = []
    with pytest.raises(RuntimeError), undoing(lambda: calls.append("done")):
        raise RuntimeError
    assert calls == ["done"]


def test_every_module_has_its_own_mode_back():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()), nn.Dropout())
    model[1].eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(RuntimeError), modes(model, training={model[1]}):
        assert [module.training for module in model.modules()] == [False, False, True, False, False]
        model.train()
        raise RuntimeError
    assert [module.training for module in model.modules()] == before


def test_what_is_kept_stays_and_the_model_may_be_swapped_again():
    weight, buffer = torch.tensor([1.0, 2.0]), torch.tensor([3.0])
    swap = Swap([weight], keep=[buffer])
    swap.put_in([torch.tensor([5.0, 6.0])])
    buffer.fill_(7.0)
    swap.keep()
    swap.undo()
    swap.undo()
    assert weight.tolist() == [5.0, 6.0] and buffer.tolist() == [7.0]
    again = Swap([weight])
    again.put_in([torch.zeros(2)])
    again.undo()
    assert weight.tolist() == [5.0, 6.0]
