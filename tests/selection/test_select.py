"""`select`, `fit` and `soup` against values that can be worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import polyak
from polyak.errors import PolyakError


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.norm = nn.BatchNorm1d(1)

    def forward(self, x):
        return self.norm(x * self.weight)


@pytest.fixture
def recorded(tmp_path):
    """A run that circles around 3: its later average is better than its last weights."""
    model = Line()
    with polyak.Recorder(model, tmp_path / "run", block=5) as run:
        for step in range(1, 101):
            model.weight.data.fill_(3 * min(1, step / 50) + (0.5 if step % 2 else -0.5))
            run.update()
    return model, run.trajectory


def distance(model):
    return (model.weight.detach() - 3).square()


def test_an_average_is_chosen_where_the_run_circles_and_the_model_is_as_before(recorded):
    model, trajectory = recorded
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    choice = polyak.select(trajectory, model, score=lambda m: float(distance(m)), progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training and model.norm.training
    assert "live" in str(choice) and str(choice.best) != "live"
    choice.apply(model)
    assert float(distance(model)) < 0.02


def test_the_live_weights_win_where_averaging_does_not_help(recorded):
    model, trajectory = recorded
    last = model.weight.detach().clone()
    choice = polyak.select(
        trajectory, model, score=lambda m: float((m.weight.detach() - last).abs()), progress=False
    )
    choice.apply(model)
    assert torch.equal(model.weight.detach(), last)


def test_a_score_that_raises_leaves_the_model(recorded):
    model, trajectory = recorded
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calls = []

    def score(m):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("broken")
        return 1.0

    with pytest.raises(RuntimeError, match="broken"):
        polyak.select(trajectory, model, score=score, recalibrate=[torch.randn(8, 1)], progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_unknown_mode_is_refused(recorded):
    model, trajectory = recorded
    with pytest.raises(PolyakError, match="mode"):
        polyak.select(trajectory, model, score=lambda m: 0.0, mode="lowest", progress=False)


def test_fit_finds_coefficients_that_beat_where_they_began(recorded):
    model, trajectory = recorded
    fitted = polyak.fit(
        trajectory,
        model,
        [torch.ones(4, 1)],
        lambda m, batch: (m.weight - 3).square().sum(),
        start=polyak.Uniform(),
    )
    assert fitted.losses[-1] < fitted.losses[0]


def test_a_soup_is_never_worse_than_its_best_ingredient(tmp_path):
    paths = []
    for i, value in enumerate((2.0, 3.5, 9.0)):
        model = Line()
        model.weight.data.fill_(value)
        paths.append(tmp_path / f"{i}.pt")
        torch.save(model.state_dict(), paths[-1])
    model = Line()
    best = polyak.soup(paths, model, score=lambda m: float(distance(m)))
    best.apply(model)
    assert float(distance(model)) <= 0.25
