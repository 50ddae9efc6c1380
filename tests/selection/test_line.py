"""Blends among what `select` tries: where the best lies between the live weights and an average."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import polyak
from polyak import Blend, Decay, Profile
from polyak.selection._line import search_lines
from recorded_runs import RecordedWalk


def tried(badness, averages, live):
    """Every blend that is tried where ``badness(profile, share)`` says how good it is."""
    points: list[Blend] = []

    def try_some(profiles):
        points.extend(profiles)
        return {blend: badness(blend.profile, blend.part) for blend in profiles}

    search_lines(averages, {one.profile: badness(one.profile, 1.0) for one in averages}, live, try_some)
    return points


@pytest.fixture(scope="module")
def averages(tmp_path_factory):
    walk = RecordedWalk(tmp_path_factory.mktemp("run"), block=1, max_blocks=64)
    walk.run(60)
    walk.recorder.close()
    texts = [f"tail:{0.05 * k:g}" for k in range(1, 20)] + ["decay:sqrt:0.4", "uniform"]
    return [walk.recorder.trajectory.explain(text) for text in texts]


@pytest.mark.parametrize("best", [0.0, 0.1, 0.3, 0.5, 0.62, 0.9, 1.0])
def test_it_comes_within_a_sixteenth_of_the_best_share_of_the_best_line(averages, best):
    """The best average is a short one, the best line that of a longer."""
    ends = {one.profile: abs(one.profile.weights([0, 30, 60])[1] - 0.7) for one in averages}

    def badness(profile: Profile, share: float) -> float:
        return share * (1 - share) * ends[profile] + (share - best) ** 2 + 0.1 * ends[profile]

    points = tried(badness, averages, live=best**2)
    assert len(points) == len(set(points)) <= 22
    found = min([(badness(p.profile, p.part), p.part) for p in points])
    assert abs(found[1] - best) <= 0.126
    lines = {p.profile for p in points}
    assert len(lines) <= 10 and sum(p.part == 0.5 for p in points) == len(lines)
    assert len({p.profile for p in points if p.part != 0.5}) <= 3


class Between(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))


@pytest.fixture
def run(tmp_path):
    """Weights that circle around 1 and then go to 3: 2.5 lies between every average and the live weights."""
    model = Between()
    with polyak.Recorder(model, tmp_path, block=1) as recorder:
        for step in range(30):
            model.weight.data.fill_(1 + (-1) ** step if step < 29 else 3.0)
            recorder.update()
    return recorder.trajectory, model


def distance(model):
    return (model.weight - 2.5).square().item()


def test_a_blend_is_chosen_where_it_is_best_and_shipped_as_it_was_scored(run, tmp_path):
    trajectory, model = run
    choice = polyak.select(trajectory, model, score=distance, mode="min", progress=False)
    assert isinstance(choice.best.profile, Blend) and choice.best.score < 0.01
    assert choice.best.name == str(choice.best.profile)
    averages = [c.score for c in choice.table if not isinstance(c.profile, Blend | None)]
    assert choice.best.score < min(averages) and choice.live.score == 0.25
    choice.apply(model)
    assert distance(model) == pytest.approx(choice.best.score)
    choice.write(tmp_path / "chosen.safetensors")
    assert polyak.checkpoints.open(tmp_path / "chosen.safetensors").read("weight").equal(model.weight.data)


def test_only_where_there_are_live_weights_and_nothing_else_was_asked_for(run, tmp_path):
    trajectory, model = run
    asked = polyak.select(trajectory, model, score=distance, mode="min", profiles=["uniform"], progress=False)
    assert not any(isinstance(c.profile, Blend) for c in asked.table)
    given = polyak.select(
        trajectory, model, score=distance, mode="min", profiles=["blend:0.25:uniform"], progress=False
    )
    assert given.best.profile == Blend("uniform", 0.25)
    recorder = polyak.Recorder(model, tmp_path / "open", block=1)
    for value in (1.0, 2.0, 3.0):
        model.weight.data.fill_(value)
        recorder.update()
    still = polyak.select(recorder.trajectory, model, score=distance, mode="min", progress=False)
    assert not any(isinstance(c.profile, Blend) for c in still.table)
    recorder.close()


def test_blends_are_recalibrated_like_averages(tmp_path):
    walk = RecordedWalk(tmp_path, block=2)
    walk.run(30)
    walk.recorder.close()
    batches = [torch.randn(8, 3, generator=torch.Generator().manual_seed(0))]
    expected = polyak.Trajectory(tmp_path).average("blend:0.25:tail:0.5")
    walk.model.load_state_dict(expected)
    polyak.update_bn(batches, walk.model)
    statistics = walk.model[1].running_mean.clone()
    seen = []

    def score(model):
        seen.append(model[1].running_mean.clone())
        return model[0].weight.square().mean().item()

    polyak.select(
        walk.recorder.trajectory, walk.model, score=score, mode="min", recalibrate=batches,
        profiles=["blend:0.25:tail:0.5"], progress=False,
    )  # fmt: skip
    assert torch.allclose(seen[-1], statistics, atol=1e-6)


def test_a_decay_in_a_blend_is_no_second_decay():
    assert Decay("sqrt", 0.4).replaces_decay and not Blend("decay:sqrt:0.4", 0.5).replaces_decay
