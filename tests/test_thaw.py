"""Parameters that thaw and freeze while they are averaged, against float64."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import oracles
import polyak
from polyak.errors import StateError, StructureError
from polyak.profiles import Scheme, registered

STEPS, THAW = 12, 5
NAMES = {"0.weight", "0.bias", "1.weight", "1.bias"}
SCHEMES = [
    text
    for cls in registered().values()
    if issubclass(cls, Scheme) and cls.__module__ == polyak.EMA.__module__
    for text in cls.examples
]


def two_layers(dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, dtype=dtype), nn.Linear(4, 2, dtype=dtype))
    model[0].requires_grad_(False)
    return model


class Training:
    """A plain loop that thaws the first layer after ``THAW`` steps, as BaseFinetuning does, and keeps what it saw."""

    def __init__(self, model):
        self.model, self.seen = model, []
        self.optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        self.inputs = torch.Generator().manual_seed(1)

    def steps(self, n, *followers):
        for _ in range(n):
            if len(self.seen) == THAW and not self.model[0].weight.requires_grad:
                self.model[0].requires_grad_(True)
                self.optimizer.add_param_group({"params": list(self.model[0].parameters()), "lr": 0.3})
            x = torch.randn(8, 3, generator=self.inputs, dtype=torch.float64).to(self.model[0].weight.dtype)
            self.optimizer.zero_grad()
            self.model(x).square().mean().backward()
            self.optimizer.step()
            self.seen.append({n: p.detach().double().clone() for n, p in self.model.named_parameters()})
            for follower in followers:
                follower.update()

    def mean(self, scheme, every=1):
        """In float64, over all that was sampled."""
        samples = self.seen[every - 1 :: every]
        positions = np.arange(len(samples) + 1)
        weights = scheme.weights(positions * every if scheme.unit == "steps" else positions)
        return {name: oracles.mean_of([s[name] for s in samples], weights) for name in samples[0]}


def assert_is_mean(average, training, scheme, atol=1e-12, **options):
    tensors = average.named_tensors()
    assert set(average.state_dict()["average"]) == NAMES
    for name, expected in training.mean(polyak.parse(scheme), **options).items():
        torch.testing.assert_close(tensors[name].double(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_thawed_parameter_has_been_what_it_was_when_frozen(scheme, every):
    training = Training(two_layers())
    average = polyak.Average(training.model, scheme, every=every)
    attached = polyak.Average(training.model, scheme, every=every)
    with polyak.attach(training.optimizer, attached):
        training.steps(STEPS, average)
    for one in (average, attached):
        assert_is_mean(one, training, scheme, every=every)


@pytest.mark.parametrize(
    "options", [{"compensated": True}, {"dtype": torch.float32}, {"check_finite": False}]
)
def test_it_is_so_under_every_option(options):
    training = Training(two_layers(torch.float32))
    average = polyak.Average(training.model, "uniform", **options)
    training.steps(STEPS, average)
    assert_is_mean(average, training, "uniform", atol=1e-7)
    if options.get("compensated"):
        assert set(average.state_dict()["residual"]) == NAMES


def test_nothing_is_averaged_twice_while_layers_thaw_one_by_one():
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(3)))
    model[:2].requires_grad_(False)
    average = polyak.Average(model, "uniform")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)  # which holds frozen ones from the start
    seen = []
    for step in range(9):
        if step in (3, 6):
            model[2 - step // 3].requires_grad_(True)
        optimizer.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        average.update()
        seen.append(live(model))
        means = {name: torch.stack([s[name].double() for s in seen]).mean(0) for name in seen[0]}
        for name, value in average.named_tensors().items():
            torch.testing.assert_close(value.double(), means[name], rtol=0, atol=1e-6)


def live(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_what_freezes_goes_on_with_its_value_and_may_thaw_again():
    training = Training(two_layers())
    model = training.model
    average = polyak.Average(model, "ema:decay=0.8")
    for step in range(STEPS):
        model[1].requires_grad_(not 7 <= step < 10)
        training.steps(1, average)
        assert average.n_averaged == step + 1
    assert torch.equal(training.seen[6]["1.weight"], training.seen[9]["1.weight"])
    assert_is_mean(average, training, "ema:decay=0.8")


def test_a_thaw_before_the_first_sample_leaves_nothing_of_what_was_before():
    training = Training(two_layers())
    average = polyak.Average(training.model, "uniform", start=THAW + 2)
    training.steps(STEPS, average)
    training.seen = training.seen[THAW + 2 :]
    assert_is_mean(average, training, "uniform")


def test_copies_and_several_averages_see_the_thaw():
    training = Training(two_layers())
    average = polyak.Average(training.model, "uniform")
    training.steps(THAW - 1, average)
    training.model, average, training.optimizer = copy.deepcopy((training.model, average, training.optimizer))
    training.steps(STEPS - THAW + 1, average)
    assert_is_mean(average, training, "uniform")
    pickle.loads(pickle.dumps(average)).update()


def test_moved_by_hand_while_frozen_it_counts_as_it_is_when_it_thaws():
    model = two_layers()
    average = polyak.Average(model, "uniform")
    average.update()
    nn.init.constant_(model[0].weight, 5.0)
    average.update()
    assert float(average.named_tensors()["0.weight"].mean()) == 5
    model[0].requires_grad_(True)
    average.update()
    assert float(average.named_tensors()["0.weight"].mean()) == 5


def test_an_optimizer_that_is_not_torchs_is_seen_at_the_next_sample():
    model = two_layers()
    average = polyak.Average(model, "uniform")
    nn.init.constant_(model[0].weight, 1.0)
    average.update()
    model[0].requires_grad_(True)
    nn.init.constant_(model[0].weight, 3.0)
    average.update()
    nn.init.constant_(model[0].weight, 6.0)
    average.update()
    assert float(average.named_tensors()["0.weight"].mean()) == pytest.approx(4)


def test_names_that_were_chosen_stay_those_that_were_chosen():
    model = two_layers()
    chosen = polyak.Average(model, "uniform", include="1.*")
    rest = polyak.Average(model, "uniform", exclude="0.bias")
    model[0].requires_grad_(True)
    for average in (chosen, rest):
        average.update()
    assert set(chosen.state_dict()["average"]) == {"1.weight", "1.bias"}
    assert set(rest.state_dict()["average"]) == NAMES - {"0.bias"}


def test_a_thaw_while_averaged_weights_are_in_the_model_changes_nothing():
    training = Training(two_layers())
    average = polyak.Average(training.model, "uniform")
    other = polyak.Average(training.model, "uniform", include="0.*")
    training.steps(3, average, other)
    before = live(training.model)
    nn.init.constant_(training.model[0].weight, 9.0)
    other.update()
    training.model[0].weight.data.copy_(before["0.weight"])
    another_models = torch.optim.SGD([nn.Parameter(torch.ones(1))])
    with other.applied():
        training.model[0].requires_grad_(True)
        another_models.step()
    assert average.state_dict()["frozen"] == ["0.weight", "0.bias"]
    another_models.step()
    assert average.state_dict()["frozen"] == []
    assert torch.equal(average.named_tensors()["0.weight"], before["0.weight"])


def test_a_thaw_while_its_own_weights_are_in_the_model_is_taken_up():
    training = Training(two_layers())
    average = polyak.Average(training.model, "uniform")
    training.steps(3, average)
    before = live(training.model)
    with average.applied():
        training.model[0].requires_grad_(True)
        torch.optim.SGD([nn.Parameter(torch.ones(1))]).step()
    assert average.state_dict()["frozen"] == []
    assert all(torch.equal(value, before[name]) for name, value in live(training.model).items())
    training.steps(2, average)
    assert_is_mean(average, training, "uniform")


def test_sparse_ones_are_refused_when_they_thaw():
    model = two_layers()
    model[0].weight = nn.Parameter(torch.eye(3).double().to_sparse(), requires_grad=False)
    average = polyak.Average(model, "uniform")
    average.update()
    model[0].weight.requires_grad_(True)
    with pytest.raises(StructureError, match=r"'0.weight' are sparse"):
        average.update()


# Resuming.


def resumed(state, training, model_first=True):
    """Another process: a new model, whose first layer is frozen as the recipe has it, and the states of training."""
    model = two_layers()
    model[0].requires_grad_(training.model[0].weight.requires_grad)
    again = Training(model)
    if len(training.optimizer.param_groups) > 1:
        again = copy.copy(training)
        again.model, again.seen = model, list(training.seen)
        again.optimizer = torch.optim.SGD([{"params": list(model[i].parameters())} for i in (1, 0)], lr=0.0)
    average = polyak.Average(model, state["scheme"], compensated=state["compensated"])
    if not model_first:
        average.load_state_dict(state)
    model.load_state_dict(training.model.state_dict())
    if model_first:
        average.load_state_dict(state)
    again.optimizer.load_state_dict(training.optimizer.state_dict())
    again.seen, again.inputs = list(training.seen), training.inputs
    return again, average


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


@pytest.mark.parametrize("model_first", [True, False])
@pytest.mark.parametrize("compensated", [True, False])
@pytest.mark.parametrize("stop", [THAW - 2, THAW, THAW + 2])
def test_resuming_around_the_thaw_is_as_if_never_interrupted(stop, compensated, model_first):
    whole = Training(two_layers())
    reference = polyak.Average(whole.model, "ema:half_life=4", compensated=compensated)
    whole.steps(STEPS, reference)

    half = Training(two_layers())
    average = polyak.Average(half.model, "ema:half_life=4", compensated=compensated)
    half.steps(stop, average)
    again, average = resumed(through_a_file(average.state_dict()), half, model_first)
    again.steps(STEPS - stop, average)
    expected = reference.named_tensors()
    assert all(torch.equal(value, expected[name]) for name, value in average.named_tensors().items())


@pytest.mark.parametrize("trained_at_load", [True, False])
def test_a_state_from_after_the_thaw_goes_into_a_model_that_is_frozen_and_the_other_way_round(
    trained_at_load,
):
    training = Training(two_layers())
    average = polyak.Average(training.model, "uniform")
    training.steps(THAW if trained_at_load else THAW + 2, average)
    state = through_a_file(average.state_dict())
    model = two_layers()
    model[0].requires_grad_(trained_at_load)
    other = polyak.Average(model, "uniform")
    other.load_state_dict(state)
    assert other.state_dict()["average"].keys() == state["average"].keys()
    model.load_state_dict(training.model.state_dict())
    again = Training(model)
    again.seen = list(training.seen)
    model[0].requires_grad_(True)
    again.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    again.steps(3, other)
    assert_is_mean(other, again, "uniform")


def test_states_of_other_models_are_refused_and_nothing_has_changed():
    training = Training(two_layers())
    average = polyak.Average(training.model, "uniform")
    training.steps(2, average)
    before = through_a_file(average.state_dict())
    state = through_a_file(before)
    del state["average"]["1.bias"]
    with pytest.raises(StateError, match="lacks '1.bias'"):
        average.load_state_dict(state)
    everything = polyak.Average(training.model, "uniform", include="*")
    with pytest.raises(StateError, match="lacks '0.weight', '0.bias'"):
        everything.load_state_dict(before)
    for one in (average, everything):
        del state["frozen"]
        with pytest.raises(StateError, match="lacks 'frozen'"):
            one.load_state_dict(state)
        state["frozen"] = []
    after = average.state_dict()
    assert after["frozen"] == before["frozen"] == ["0.weight", "0.bias"]
    assert all(torch.equal(after["average"][name], value) for name, value in before["average"].items())
