"""`fit(score=...)` against problems whose best weights are known."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import nn

import polyak
from polyak.errors import NonFiniteError, OptionError
from recorded_runs import RecordedWalk


def recorded_points(folder, points, model):
    with polyak.Recorder(model, folder, block=1, max_blocks=64) as run:
        for point in points:
            model.weight.data.copy_(torch.tensor([point]))
            run.update()
    return run.trajectory


def hits(target, radius):
    """An accuracy: the share of rings around the target that the weights lie in, which has no gradient."""
    return lambda m: (
        ((m.weight - torch.tensor([target])).norm() < torch.linspace(radius, 0.001, 200)).double().mean()
    )


def test_it_reaches_a_target_inside_the_hull(tmp_path):
    model = nn.Linear(2, 1, bias=False)
    trajectory = recorded_points(tmp_path, [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], model)
    before = model.weight.detach().clone()
    generator = np.random.get_state()[1].copy()
    score = hits([0.3, 0.5], 1.0)
    fitted = polyak.fit(trajectory, model, score=score, mode="max", start="uniform", evaluations=150)
    assert fitted.profile.a == pytest.approx([0.2, 0.3, 0.5], abs=0.02)
    assert len(fitted.scores) == 150 and fitted.groups == 3
    assert max(fitted.scores) > 0.97 > 0.9 > fitted.scores[0]
    assert torch.equal(model.weight, before) and np.array_equal(np.random.get_state()[1], generator)
    assert "3 weights in 3 groups fitted in 150 evaluations" in str(fitted)
    options = {"score": score, "mode": "max", "start": "uniform", "evaluations": 30}
    again, other = (polyak.fit(trajectory, model, **options, seed=seed) for seed in (0, 1))
    assert again.scores == fitted.scores[:30] and other.scores[1:] != again.scores[1:]


def test_many_blocks_are_fitted_in_groups_that_keep_the_proportions_of_the_start(tmp_path):
    walk = RecordedWalk(tmp_path, block=1, max_blocks=64)
    walk.run(47)
    walk.recorder.close()
    trajectory, seen = walk.recorder.trajectory, []

    def distance(model):
        seen.append({name: tensor.double().clone() for name, tensor in model.named_parameters()})
        return (model[0].weight - 0.3).square().mean().item()

    start = trajectory.explain("decay:sqrt:0.5").coefficients
    fitted = polyak.fit(
        trajectory, walk.model, score=distance, mode="min", start="decay:sqrt:0.5", evaluations=25, seed=3
    )
    assert fitted.groups == 10 and len(fitted.scores) == 25 == len(seen)
    a, spread = np.array(fitted.profile.a), 0.99 * start + 0.01 / 47
    for part in np.array_split(np.arange(47), 10):
        assert np.allclose(a[part] / a[part].sum(), spread[part] / spread[part].sum())
    # What was scored is the average of the profile that is given back.
    best = int(np.argmin(fitted.scores))
    average = trajectory.average(fitted.profile)
    assert all((average[name].double() - seen[best][name]).abs().max() < 1e-6 for name in seen[best])
    assert best > 0 and fitted.scores[best] < fitted.scores[0]


def test_a_score_that_says_nothing_gives_the_start_back(tmp_path):
    model = nn.Linear(2, 1, bias=False)
    trajectory = recorded_points(tmp_path, [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], model)
    options = {"mode": "max", "start": "uniform", "evaluations": 30}
    fitted = polyak.fit(trajectory, model, score=lambda m: 0.5, **options)
    assert fitted.profile.a == pytest.approx([1 / 3] * 3) and len(fitted.scores) == 30
    with pytest.raises(NonFiniteError, match="none of 30 scores is finite"):
        polyak.fit(trajectory, model, score=lambda m: float("nan"), **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, OptionError, "mode is needed"),
        ({"mode": "best"}, OptionError, "mode must be"),
        ({"mode": "max", "evaluations": 0}, OptionError, "evaluations must be"),
        ({"mode": "max", "seed": -1}, OptionError, "seed must be"),
        ({"mode": "max", "start": "blend:0.5:uniform"}, OptionError, "counts the live weights"),
        ({"mode": "max", "start": polyak.Weights([-1.0, -1.0, -1.0, 4.0])}, OptionError, "blocks or inputs"),
        (
            {"mode": "max", "signed": False},
            TypeError,
            "takes mode, evaluations, recalibrate, seed, not signed",
        ),
        ({"mode": "max", "step": 3}, TypeError, "unexpected keyword argument 'step'"),
        ({"mode": "max", "batches": [None]}, TypeError, "either batches and a loss, or a score"),
        ({"score": None}, TypeError, "needs batches and a loss, or a score"),
        ({"mode": "max", "recalibrate": iter([])}, OptionError, "only once"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_scored(tmp_path, options, error, message):
    model = nn.Linear(2, 1, bias=False)
    trajectory = recorded_points(tmp_path, [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], model)
    scored = []
    with pytest.raises(error, match=message):
        polyak.fit(trajectory, model, **{"score": scored.append} | options)
    assert not scored


def test_without_its_extra_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cma", None)
    model = nn.Linear(2, 1, bias=False)
    trajectory = recorded_points(tmp_path, [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], model)
    with pytest.raises(polyak.errors.MissingExtraError, match=r"pip install 'polyak\[fit\]'"):
        polyak.fit(trajectory, model, score=lambda m: pytest.fail("scored"), mode="max")
