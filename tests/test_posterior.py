"""SWAG against its formulas in float64, on checkpoints whose moments are known."""

import numpy as np
import pytest
import torch
from torch import nn

import polyak
from oracles import RandomWalk
from polyak import checkpoints
from polyak.errors import CheckpointError, OptionError, StructureError
from recorded_runs import small_model

STEPS = 12


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


@pytest.fixture
def run(tmp_path):
    """A walk as checkpoints, with its samples as float64 vectors [steps, numbers]."""
    model = net()
    walk = RandomWalk(model)
    for step in range(1, STEPS + 1):
        walk.step()
        checkpoints.write(tmp_path / f"step-{step}.safetensors", dict(model.state_dict()))
    trajectory = polyak.Trajectory.from_checkpoints(tmp_path.glob("*.safetensors"))
    samples = np.stack([flat(weights) for weights in walk.visited])
    return trajectory, samples, model


def flat(weights):
    return np.concatenate([value.double().numpy().ravel() for value in weights.values()])


def moments(samples, coefficients, rank):
    """Mean, diagonal and low-rank covariance as the docstring of SWAG defines them."""
    mean = coefficients @ samples
    deviations = samples - mean
    diagonal = coefficients @ deviations**2 / (1 - (coefficients**2).sum())
    newest = np.flatnonzero(coefficients)[-rank:]
    shares = coefficients[newest] / coefficients[newest].sum()
    low = (shares[:, None] * deviations[newest]).T @ deviations[newest] / (1 - (shares**2).sum())
    return mean, diagonal, low


PROFILES = [polyak.Uniform(), polyak.Tail(0.5), polyak.Power(gamma=2.0)]


@pytest.mark.parametrize("profile", PROFILES, ids=str)
def test_moments_are_those_of_the_samples(run, profile):
    trajectory, samples, _ = run
    posterior = polyak.SWAG(trajectory, profile)
    mean, diagonal, _ = moments(samples, trajectory.explain(profile).coefficients, rank=20)
    np.testing.assert_allclose(flat(posterior.mean), mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(flat(posterior.variance), diagonal, rtol=1e-4)


def test_equal_weights_give_the_papers_moments(run):
    trajectory, samples, _ = run
    _, diagonal, low = moments(samples, np.full(STEPS, 1 / STEPS), rank=STEPS)
    # Maddox et al. 2019: Σ_diag = mean(w²) - mean(w)², Σ_low = D Dᵀ / (K - 1).
    papers = (samples**2).mean(axis=0) - samples.mean(axis=0) ** 2
    np.testing.assert_allclose(diagonal, papers * STEPS / (STEPS - 1))
    deviations = samples - samples.mean(axis=0)
    np.testing.assert_allclose(low, deviations.T @ deviations / (STEPS - 1))
    assert polyak.SWAG(trajectory, "uniform").variance["0.bias"].shape == (4,)


@pytest.mark.parametrize("profile", PROFILES, ids=str)
@pytest.mark.parametrize("rank", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_draws_have_the_covariance_that_was_promised(run, profile, rank):
    trajectory, samples, _ = run
    count, scale = 4000, 0.7
    posterior = polyak.SWAG(trajectory, profile, rank=rank, scale=scale)
    mean, diagonal, low = moments(samples, trajectory.explain(profile).coefficients, rank)
    expected = scale / 2 * (np.diag(diagonal) + low)
    drawn = np.stack([flat(weights) for weights in posterior.samples(count, seed=1)])
    spread = np.sqrt(np.diag(expected))
    assert np.abs((drawn.mean(axis=0) - mean) / spread).max() < 5 / np.sqrt(count)
    # The error of an estimated correlation is about 1/√count, of a variance √2 times that.
    errors = (np.cov(drawn.T) - expected) / np.outer(spread, spread)
    assert np.abs(errors).max() < 6 / np.sqrt(count)


def test_the_seed_decides_and_more_draws_begin_like_fewer(run, monkeypatch):
    posterior = polyak.SWAG(run[0], "uniform")
    few = [flat(weights) for weights in posterior.samples(2, seed=3)]
    monkeypatch.setattr("polyak.posterior._TOGETHER_BYTES", 1)  # as of a large model: a pass for each
    many = [flat(weights) for weights in posterior.samples(3, seed=3)]
    np.testing.assert_array_equal(few, many[:2])
    assert not np.array_equal(many[0], many[1])
    assert not np.array_equal(flat(next(posterior.samples(1, seed=4))), few[0])


def test_predictions_are_means_over_draws(run):
    trajectory, _, model = run
    posterior = polyak.SWAG(trajectory, "uniform")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = torch.randn(5, 3)
    found = posterior.predict(model, lambda m: m(data).softmax(dim=1), samples=7, progress=False)
    expected = torch.zeros(5, 2)
    other = net()
    for weights in posterior.samples(7):
        other.load_state_dict(weights)
        expected += other(data).softmax(dim=1).detach() / 7
    torch.testing.assert_close(found, expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training


def test_batchnorm_statistics_and_counters_are_not_drawn(tmp_path):
    model = small_model()
    for step in range(1, 5):
        model(torch.randn(16, 3))
        model[0].weight.data.add_(torch.randn(4, 3))
        checkpoints.write(tmp_path / f"step-{step}.safetensors", dict(model.state_dict()))
    trajectory = polyak.Trajectory.from_checkpoints(tmp_path.glob("*.safetensors"))
    posterior = polyak.SWAG(trajectory, "uniform")
    (drawn,) = posterior.samples(1)
    for name in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
        assert name not in posterior.variance
        assert torch.equal(drawn[name], posterior.mean[name])
    data = torch.randn(16, 3)
    with pytest.warns(UserWarning, match="BatchNorm layers"):
        stale = posterior.predict(model, lambda m: m(data), samples=3, progress=False)
    fresh = posterior.predict(model, lambda m: m(data), samples=3, recalibrate=[data], progress=False)
    assert not torch.equal(stale, fresh)


def test_tied_weights_are_drawn_once(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    with polyak.Recorder(model, tmp_path / "run", block=1) as run:
        for _ in range(4):
            model[0].weight.data.add_(torch.randn(2, 2))
            run.update()
    posterior = polyak.SWAG(run.trajectory, "uniform")
    assert list(posterior.variance) == ["0.weight"]
    (drawn,) = posterior.samples(1)
    assert drawn["1.weight"] is drawn["0.weight"]
    assert not torch.equal(drawn["0.weight"], posterior.mean["0.weight"])


def test_half_precision_and_complex_checkpoints_are_drawn_in_fp32_at_least(tmp_path):
    torch.manual_seed(0)
    for step in range(1, 5):
        tensors = {
            "half": torch.randn(3).bfloat16(),
            "double": torch.randn(3, dtype=torch.float64),
            "complex": torch.randn(3, dtype=torch.complex64),
        }
        checkpoints.write(tmp_path / f"step-{step}.safetensors", tensors)
    posterior = polyak.SWAG(polyak.Trajectory.from_checkpoints(tmp_path.glob("*.safetensors")), "uniform")
    (drawn,) = posterior.samples(1)
    assert {name: value.dtype for name, value in posterior.variance.items()} == {
        "half": torch.float32,
        "double": torch.float64,
        "complex": torch.float32,
    }
    assert drawn["double"].dtype == torch.float64 and drawn["complex"].dtype == torch.complex64
    assert drawn["complex"].imag.abs().min() > 0


class Masked(nn.Module):
    """Attention has such a mask, which no average may make a NaN of."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3, bias=False)
        self.register_buffer("mask", torch.triu(torch.full((3, 3), -torch.inf), 1))

    def forward(self, x):
        return (self.inner(x) + self.mask).softmax(dim=-1)


def saved(folder, states):
    for step, state in enumerate(states, 1):
        torch.save(state, folder / f"step-{step}.pt")
    return polyak.Trajectory.from_checkpoints(folder.glob("*.pt"))


def test_infinities_that_never_change_are_no_noise(tmp_path):
    posterior = polyak.SWAG(saved(tmp_path, [Masked().state_dict() for _ in range(4)]), "uniform")
    (drawn,) = posterior.samples(1)
    assert torch.equal(drawn["mask"], Masked().mask) and not posterior.variance["mask"].any()
    found = posterior.predict(Masked(), lambda m: m(torch.eye(3)), samples=3, progress=False)
    assert found.isfinite().all()
    (logarithm,) = (posterior.predict(Masked(), lambda m: torch.zeros(1).log(), samples=3, progress=False),)
    assert logarithm.item() == -torch.inf


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints_scatter_no_more_than_they_do(tmp_path, dtype):
    values = [1.0, 1.0078125] * 10  # neighbours in bf16, whose mean is neither
    run = saved(tmp_path, [{"w": torch.full((2000,), value, dtype=dtype)} for value in values])
    posterior = polyak.SWAG(run, "uniform")
    expected = np.var(values, ddof=1)
    assert posterior.mean["w"].unique().tolist() == [pytest.approx(np.mean(values), rel=1e-6)]
    assert posterior.variance["w"].unique().tolist() == [pytest.approx(expected, rel=1e-3)]
    drawn = torch.stack([weights["w"] for weights in posterior.samples(200, seed=0)])
    assert drawn.dtype == torch.float32
    assert (drawn.double() - np.mean(values)).square().mean().item() == pytest.approx(expected, rel=0.2)


def test_eight_bit_checkpoints_are_drawn_in_fp32(tmp_path):
    run = saved(
        tmp_path, [{"w": torch.full((4,), v).to(torch.float8_e4m3fn)} for v in (1.0, 1.125, 1.0, 1.125)]
    )
    posterior = polyak.SWAG(run, "uniform")
    assert posterior.mean["w"].tolist() == [1.0625] * 4
    assert next(posterior.samples(1))["w"].dtype == torch.float32


def test_draws_are_the_callers_own(tmp_path):
    model = small_model()
    run = saved(tmp_path, [{**model.state_dict(), "0.weight": torch.randn(4, 3)} for _ in range(3)])
    posterior = polyak.SWAG(run, "uniform")
    (drawn,) = posterior.samples(1)
    drawn["1.running_mean"].fill_(9.0)
    assert not (posterior.mean["1.running_mean"] == 9).any()


def test_models_without_numbers(tmp_path):
    run = saved(tmp_path, [{"w": torch.empty(0, 3)} for _ in range(3)])
    assert [weights["w"].shape for weights in polyak.SWAG(run, "uniform").samples(2)] == [(0, 3)] * 2


def test_a_recording_that_went_on_is_drawn_from_as_it_was_or_says_so(tmp_path, monkeypatch):
    model = nn.Linear(2, 1)

    def go_on(steps, step):
        with polyak.Recorder(model, tmp_path / "run", block=1, max_blocks=8, step=step) as run:
            for _ in range(steps):
                model.weight.data.add_(torch.randn(1, 2))
                run.update()
        return run.trajectory

    posterior = polyak.SWAG(go_on(8, 0), "uniform")
    before = next(posterior.samples(1))
    go_on(30, 8)  # replaces the files, which the trajectory holds open
    assert torch.equal(next(posterior.samples(1))["weight"], before["weight"])

    monkeypatch.setattr(
        "polyak.checkpoints._io._MAX_OPEN_FILES", 1
    )  # as of a trajectory of hundreds of blocks
    posterior = polyak.SWAG(polyak.Trajectory(tmp_path / "run"), "uniform")
    go_on(30, 38)
    with pytest.raises(CheckpointError, match="recorded further since this trajectory was opened"):
        next(posterior.samples(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 1}, "rank must be"),
        ({"rank": 2.5}, "rank must be"),
        ({"scale": 0.0}, "scale must be"),
        ({"scale": float("inf")}, "scale must be"),
        ({"profile": polyak.Weights([1.0] * (STEPS - 1) + [-0.5])}, "negative weights"),
        ({"profile": "tail:steps=1"}, "single block"),
        ({"profile": "power:gamma=400"}, "single block"),
        ({"scale": 1e40}, "scale must be"),
        ({"profile": "tail:2"}, "fraction"),
    ],
)
def test_options_out_of_range_are_refused(run, options, message):
    with pytest.raises(OptionError, match=message):
        polyak.SWAG(run[0], **{"profile": "uniform", **options})


def test_what_cannot_be_averaged_is_refused(run):
    trajectory, _, model = run
    posterior = polyak.SWAG(trajectory, "uniform")
    with pytest.raises(OptionError, match=r"\[1, inf\)"):
        posterior.samples(0)
    with pytest.raises(OptionError, match="floating-point tensor.*a float"):
        posterior.predict(model, lambda m: 1.0, progress=False)
    with pytest.raises(OptionError, match="floating-point tensor.*int64"):
        posterior.predict(model, lambda m: m(torch.ones(1, 3)).argmax(dim=1), progress=False)
    sizes = iter((1, 2))
    with pytest.raises(OptionError, match="two draws"):
        posterior.predict(model, lambda m: m(torch.ones(next(sizes), 3)), progress=False)
    with pytest.raises(StructureError):
        posterior.predict(nn.Linear(3, 3), lambda m: m(torch.ones(1, 3)), progress=False)
    with pytest.raises(OptionError, match="Trajectory"):
        polyak.SWAG("run/", "uniform")


def test_several_scales_may_be_tried_with_the_same_moments(run, monkeypatch):
    trajectory, _, model = run
    posterior = polyak.SWAG(trajectory, "uniform", scale=4.0)
    small = polyak.SWAG(trajectory, "uniform", scale=0.25)
    np.testing.assert_array_equal(
        flat(next(posterior.samples(1, seed=5, scale=0.25))), flat(next(small.samples(1, seed=5)))
    )
    look = lambda m: m[0].weight.detach()  # noqa: E731
    tried = posterior.predict(model, look, samples=3, scale=0.25, progress=False)
    torch.testing.assert_close(tried, small.predict(model, look, samples=3, progress=False), rtol=0, atol=0)
    with pytest.raises(OptionError, match="scale must be"):
        posterior.samples(1, scale=-1.0)


def test_many_draws_of_a_small_model_come_in_groups(run, monkeypatch):
    posterior = polyak.SWAG(run[0], "uniform")
    together = [flat(weights) for weights in posterior.samples(5)]
    monkeypatch.setattr("polyak.posterior._MOST_TOGETHER", 2)
    np.testing.assert_array_equal(together, [flat(weights) for weights in posterior.samples(5)])
