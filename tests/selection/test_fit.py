"""`fit` against problems whose best weights are known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import polyak
from polyak.errors import BatchError, NonFiniteError, OptionError, StructureError
from recorded_runs import RecordedWalk


def recorded_points(folder, points, model):
    """A trajectory whose blocks are the rows of ``points``, put into the model's only weight."""
    with polyak.Recorder(model, folder, block=1) as run:
        for point in points:
            model.weight.data.copy_(torch.tensor([point]))
            run.update()
    return run.trajectory


def to(target):
    return lambda model, batch: (model.weight - torch.tensor([target])).square().sum()


POINTS = [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]


@pytest.mark.parametrize("start", [None, polyak.Uniform(), polyak.Tail(steps=1)])
def test_positive_weights_reach_a_target_inside_the_hull(tmp_path, start):
    model = nn.Linear(2, 1, bias=False)
    trajectory = recorded_points(tmp_path, POINTS, model)
    before = model.weight.detach().clone()
    fitted = polyak.fit(trajectory, model, [None], to([0.3, 0.5]), start=start, steps=400)
    assert fitted.profile.a == pytest.approx([0.2, 0.3, 0.5], abs=0.01)
    assert sum(fitted.profile.a) == pytest.approx(1, abs=1e-12)
    assert torch.equal(model.weight, before) and model.weight.grad is None


def test_only_signed_weights_leave_the_hull(tmp_path):
    model = nn.Linear(2, 1, bias=False)
    trajectory = recorded_points(tmp_path, POINTS, model)
    options = {"start": polyak.Uniform(), "steps": 400}
    inside = polyak.fit(trajectory, model, [None], to([1.2, -0.3]), **options)
    assert min(inside.profile.a) >= 0 and inside.profile.a[1] > 0.95
    outside = polyak.fit(trajectory, model, [None], to([1.2, -0.3]), signed=True, **options)
    assert outside.profile.a == pytest.approx([0.1, 1.2, -0.3], abs=0.02)
    average = trajectory.average(outside.profile)["weight"]
    assert average.flatten().tolist() == pytest.approx([1.2, -0.3], abs=0.02)


def test_blocks_that_are_nearly_parallel_are_told_apart(tmp_path):
    generator = torch.Generator().manual_seed(0)
    drift = torch.arange(12.0).outer(torch.tensor([1.0, 0.5, 0.25, 0.1]))
    points = (drift + 0.02 * torch.randn(12, 4, generator=generator)).tolist()
    target = points[9]
    target[3] += 0.04  # two standard deviations of the noise off the way that training came
    model = nn.Linear(4, 1, bias=False)
    trajectory = recorded_points(tmp_path, points, model)
    fitted = polyak.fit(trajectory, model, [None], to(target), start=polyak.Tail(0.5), signed=True, steps=200)
    average = trajectory.average(fitted.profile)["weight"].flatten()
    assert sum(fitted.profile.a) == pytest.approx(1, abs=1e-9)
    assert (average - torch.tensor(target)).norm() < 0.004


def test_blocks_that_are_all_the_same_leave_nothing_to_fit(tmp_path):
    model = nn.Linear(2, 1, bias=False)
    trajectory = recorded_points(tmp_path, 3 * [[1.0, 2.0]], model)
    fitted = polyak.fit(trajectory, model, [None], to([0.0, 0.0]), start="uniform", signed=True, steps=3)
    assert fitted.profile.a == pytest.approx([1 / 3, 1 / 3, 1 / 3])


class Tied(nn.Module):
    """Tied bf16 weights, a frozen one and BatchNorm."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 2, bias=False, dtype=torch.bfloat16)
        self.norm = nn.BatchNorm1d(2, dtype=torch.bfloat16)
        self.second = nn.Linear(2, 2, bias=False, dtype=torch.bfloat16)
        self.second.weight = self.first.weight
        self.scale = nn.Parameter(torch.ones(2, dtype=torch.bfloat16), requires_grad=False)

    def forward(self, x):
        return self.second(self.norm(self.first(x))) * self.scale


def test_the_users_model_is_called_with_the_average_in_it_and_left_as_it_is(tmp_path):
    torch.manual_seed(0)
    model = Tied()
    with polyak.Recorder(model, tmp_path / "run", block=2) as run:
        for _ in range(8):
            model.first.weight.data += torch.randn(2, 2).to(torch.bfloat16)
            run.update()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen = []

    def loss(called, batch):
        assert called is model and called.first.weight is called.second.weight
        assert called.first.weight.dtype == torch.bfloat16
        seen.append((called.first.weight.detach().float(), batch))
        return called(torch.randn(4, 2, dtype=torch.bfloat16)).float().square().mean()

    fitted = polyak.fit(run.trajectory, model, ["a", "b"], loss, start=polyak.Uniform(), steps=5)
    assert [batch for _, batch in seen] == ["a", "b", "a", "b", "a"]
    assert fitted.extra_steps == len(fitted.losses) == 5 and fitted.run_steps == 8
    assert str(fitted).startswith(
        "4 weights fitted in 5 forward and backward passes, 62.5% of the run's 8 steps"
    )
    uniform = run.trajectory.average(polyak.Uniform())["first.weight"]
    assert torch.allclose(seen[0][0], uniform, rtol=1e-2, atol=1e-2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training


def test_a_fit_brings_the_loss_down_and_select_takes_its_weights(tmp_path):
    walk = RecordedWalk(tmp_path / "run", block=5)
    walk.run(60)
    walk.recorder.close()
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    target = walk.mean([20])

    def loss(model, batch):
        weight, bias = target["0.weight"].float(), target["0.bias"].float()
        return (model[0](batch) - batch @ weight.T - bias).square().mean()

    fitted = polyak.fit(walk.recorder.trajectory, walk.model, [x], loss, start=polyak.Tail(0.2))
    assert fitted.losses[-1] < 0.1 * fitted.losses[0]
    choice = polyak.select(
        walk.recorder.trajectory,
        walk.model,
        score=lambda m: loss(m, x).item(),
        mode="min",
        profiles=["tail:0.2", fitted.profile],
        progress=False,
    )
    assert choice.best.profile == fitted.profile
    assert choice.best.score == pytest.approx(fitted.losses[-1], rel=0.05)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": 0}, OptionError, "steps must be a whole number in \\[1, inf\\), got 0"),
        ({"batches": []}, BatchError, "no more batches"),
        ({"batches": iter([1, 2])}, BatchError, "no more batches"),
        ({"loss": lambda m, b: m.weight}, OptionError, r"scalar tensor with a gradient, got shape \(1, 2\)"),
        ({"loss": lambda m, b: 1.0}, OptionError, "got float"),
        ({"loss": lambda m, b: torch.tensor(1.0)}, OptionError, "scalar tensor with a gradient"),
        ({"loss": lambda m, b: m.weight.sum() / 0}, NonFiniteError, "loss of step 1 is"),
        ({"start": polyak.Weights([1, 2])}, OptionError, "got 2"),
        ({"model": nn.Linear(3, 1)}, StructureError, "do not fit this model"),
        ({"model": [1]}, OptionError, "a torch.nn.Module is needed as the model, got list"),
        ({"trajectory": "run/"}, OptionError, "must be a Trajectory, got 'run/'"),
    ],
)
def test_what_cannot_be_fitted_is_refused(tmp_path, options, error, message):
    model = nn.Linear(2, 1, bias=False)
    trajectory = recorded_points(tmp_path, POINTS, model)
    arguments = {
        "trajectory": trajectory,
        "model": model,
        "batches": [None],
        "loss": to([0.0, 0.0]),
        **options,
    }
    with pytest.raises(error, match=message):
        polyak.fit(**arguments)
