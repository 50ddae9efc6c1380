"""`select` against values that can be worked out by hand."""

from __future__ import annotations

import gc
import json
import weakref

import numpy as np
import pytest
import torch
from torch import nn

import polyak
from polyak import EMA, Decay, Power, Tail, Uniform, Weights, checkpoints, parse
from polyak.errors import NotStartedError, OptionError
from polyak.selection._select import averages, coarse_grid, fine_grid
from polyak.trajectory import Trajectory
from recorded_runs import NormedWeight, RecordedWalk, largest_error


@pytest.fixture
def recorded(tmp_path):
    """A run that circles around 3: its later average is better than its last weights."""
    model = NormedWeight()
    with polyak.Recorder(model, tmp_path / "run", block=5) as run:
        for step in range(1, 101):
            model.weight.data.fill_(3 * min(1, step / 50) + (0.5 if step % 2 else -0.5))
            run.update()
    return model, run.trajectory


def distance(model):
    return float((model.weight.detach() - 3).square())


class Losses:
    """A loss per example: the squared distance to noisy targets around ``centre``."""

    def __init__(self, centre=3.0, noise=1.0, examples=400, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.targets = centre + noise * torch.randn(examples, generator=generator, dtype=torch.float64)

    def __call__(self, model):
        return (model.weight.detach().double() - self.targets).square()


def select(recorded, **options):
    model, trajectory = recorded
    return polyak.select(
        trajectory, model, **{"score": distance, "mode": "min", "progress": False, **options}
    )


def test_an_average_is_chosen_where_the_run_circles_and_the_model_is_as_before(recorded):
    model, trajectory = recorded
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    choice = select(recorded)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training and model.norm.training
    choice.apply(model)
    assert distance(model) < 0.02
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in choice.weights().items())


@pytest.mark.filterwarnings("ignore:the blocks are too long")
def test_scores_are_those_of_the_averages_and_the_best_is_simply_the_best(recorded):
    model, trajectory = recorded
    choice = select(recorded)
    for candidate in choice.table:
        if candidate.profile is not None:
            weight = trajectory.average(candidate.profile)["weight"].double()
            assert candidate.score == pytest.approx(float((weight - 3).square()), abs=1e-5)
            explained = trajectory.explain(candidate.profile)
            assert candidate.effective_samples == explained.effective_samples
        assert candidate.difference == candidate.score - choice.live.score
    scores = [candidate.score for candidate in choice.table]
    assert scores == sorted(scores) and choice.best is choice.table[0]
    assert choice.live.score == 0.25 and choice.live.name == "live"


def test_mode_max_takes_the_largest(recorded):
    lowest, highest = select(recorded), select(recorded, score=lambda m: -distance(m), mode="max")
    assert highest.best.name == lowest.best.name and highest.best.score == -lowest.best.score
    assert "above the live weights" in highest.verdict


def test_the_live_weights_win_where_averaging_does_not_help(recorded, tmp_path):
    model, trajectory = recorded
    last = model.weight.detach().clone()
    choice = select(recorded, score=lambda m: float((m.weight.detach() - last).abs()))
    assert choice.best.name == "live" and "Keep the live weights: none of " in choice.verdict
    choice.apply(model)
    assert torch.equal(model.weight.detach(), last)
    choice.write(tmp_path / "best.pt")
    assert torch.equal(checkpoints.open(tmp_path / "best.pt").read("weight"), last)


def test_live_are_the_weights_that_the_run_ended_with_whatever_the_model_holds(recorded, tmp_path):
    """Choosing in another process, or again after `apply`, compares with the run, not with the model at hand."""
    model, trajectory = recorded
    last = model.weight.detach().clone()
    first = select(recorded, holdout=lambda m: 2 * distance(m))
    first.apply(model)
    assert "Live are the weights in the model" not in first.verdict
    for present in (model, NormedWeight()):
        again = select((present, trajectory), holdout=lambda m: 2 * distance(m))
        assert again.to_dict() == first.to_dict()
    fresh = NormedWeight()
    kept = select((fresh, trajectory), score=lambda m: float((m.weight.detach() - last).abs()))
    assert kept.best.name == "live" and fresh.weight.item() == 0
    kept.apply(fresh)
    kept.write(tmp_path / "best.pt")
    assert torch.equal(fresh.weight.detach(), last)
    assert torch.equal(checkpoints.open(tmp_path / "best.pt").read("weight"), last)


def test_live_is_the_newest_checkpoint_with_its_own_statistics(tmp_path):
    trained = NormedWeight()
    for step in (10, 20, 30):
        trained.weight.data.fill_(step)
        trained.norm.running_mean.fill_(-step)
        torch.save(trained.state_dict(), tmp_path / f"step-{step}.pt")
    trajectory = Trajectory.from_checkpoints(tmp_path.glob("*.pt"))
    batches = [torch.randn(8, 1)]
    choice = select(
        (NormedWeight(), trajectory),
        score=lambda m: m.norm.running_mean.item() + 30,
        profiles=["uniform"],
        recalibrate=batches,
    )
    assert choice.live.score == 0
    assert torch.equal(trajectory.live()["weight"], trained.weight)


def test_of_a_recording_that_goes_on_live_are_the_weights_in_the_model(tmp_path):
    model = NormedWeight()
    run = polyak.Recorder(model, tmp_path / "run", block=1)
    for value in (1.0, 2.0, 5.0):
        model.weight.data.fill_(value)
        run.update()
    model.weight.data.fill_(7.0)
    choice = select((model, run.trajectory), profiles=["uniform"])
    assert choice.live.score == 16 and "Live are the weights in the model" in choice.verdict
    choice.apply(model)  # the uniform average, 8/3
    assert model.weight.item() == pytest.approx(8 / 3)
    run.close()


def test_an_average_that_is_no_better_does_not_replace_the_live_weights(recorded):
    assert select(recorded, score=lambda m: 1.0).best.name == "live"
    assert select(recorded, score=lambda m: 1.0, mode="max").best.name == "live"


def test_a_score_that_is_not_a_number_is_never_the_best(recorded):
    def score(model):
        return distance(model) if abs(model.weight.item() - 2.5) < 1e-6 else float("nan")

    for mode in ("min", "max"):
        choice = select(recorded, score=score, mode=mode)
        assert choice.best.name == "live" and choice.table[-1].to_dict()["score"] is None
        json.dumps(choice.to_dict(), allow_nan=False)
    choice = select(recorded, score=lambda m: float("nan") if m.weight.item() == 2.5 else distance(m))
    assert "the score of the live weights is not finite" in choice.verdict


def test_a_finer_grid_lies_around_the_best_of_the_coarse_one(recorded):
    names = [c.name for c in select(recorded, score=lambda m: abs(m.weight.item() - 2.99)).table]
    assert len(names) == len(set(names))
    coarse = {str(profile) for profile in polyak.selection._select.coarse_grid(100)}
    blends = {name for name in names if name.startswith("blend:")}
    assert 1 <= len(set(names) - coarse - blends - {"live"}) <= 4


def test_candidates_that_these_blocks_cannot_tell_apart_are_tried_once(tmp_path):
    for step in (10, 20):
        checkpoints.write(tmp_path / f"{step}.pt", {"weight": torch.ones(1, 1) * step})
    trajectory = Trajectory.from_checkpoints(sorted(tmp_path.glob("*.pt")))
    model = nn.Linear(1, 1, bias=False)
    choice = polyak.select(trajectory, model, score=lambda m: m.weight.item(), mode="min", progress=False)
    shares = [trajectory.explain(c.profile).coefficients[0] for c in choice.table if c.profile]
    assert len(set(np.round(shares, 9))) == len(shares)


def test_given_profiles_are_all_that_is_tried_and_checked_before_any_is_scored(recorded):
    choice = select(recorded, profiles=["tail:0.4", polyak.Uniform(), "uniform"])
    assert {candidate.name for candidate in choice.table} == {"live", "tail:0.4", "uniform"}
    for profiles, message in [
        (["uniform", "ema:half_life=0.1"], "shortest possible"),
        (["emma"], "there is no profile 'emma'"),
        ([], "empty"),
        ("uniform", "must be a list"),
        (["weights:1,2"], "got 2"),
    ]:
        with pytest.raises(OptionError, match=message):
            select(recorded, profiles=profiles, score=lambda m: pytest.fail("it was scored"))


def test_differences_of_losses_carry_intervals_and_the_verdict_says_what_they_mean(recorded):
    choice = select(recorded, score=Losses(noise=1.0))
    best = choice.best
    assert best.low < best.difference < best.high < 0 and best.stderr > 0
    assert f"95% interval {best.low:+.3g} to {best.high:+.3g}): beyond the noise" in choice.verdict
    assert f"best of {len(choice.table)} candidates, which the interval allows for" in choice.verdict
    assert "its score is optimistic: confirm it with a holdout" in choice.verdict
    assert (choice.live.low, choice.live.high) == (0, 0)

    unsure = select(recorded, score=Losses(noise=20.0, examples=50))
    assert unsure.best.name == "live" or "not beyond the noise" in unsure.verdict
    assert "cannot be told from one number" in select(recorded).verdict


def test_of_accuracies_a_higher_one_is_beyond_noise(recorded):
    losses = Losses(examples=4000)
    choice = select(recorded, score=lambda m: losses(m) < 1, mode="max")
    best = choice.best
    assert 0 < best.low < best.difference < best.high and best.score <= 1
    assert "above the live weights" in choice.verdict and ": beyond the noise" in choice.verdict
    worse = select(recorded, score=lambda m: losses(m) < 1, mode="min")
    assert worse.best.name == "live" or worse.best.difference < 0


def test_the_holdout_scores_the_best_and_the_live_weights_once_more(recorded):
    holdout = Losses(seed=1)
    choice = select(recorded, score=Losses(), holdout=holdout)
    model, trajectory = recorded
    averaged = NormedWeight()
    averaged.weight.data.copy_(trajectory.average(choice.best.profile)["weight"])
    assert choice.holdout.baseline_score == pytest.approx(holdout(model).mean().item())
    assert choice.holdout.best_score == pytest.approx(holdout(averaged).mean().item(), abs=1e-6)
    assert choice.holdout.low < choice.holdout.difference < choice.holdout.high < 0
    assert "The holdout confirms it" in choice.verdict and "optimistic" not in choice.verdict
    other = select(recorded, score=Losses(), holdout=Losses(centre=2.5, seed=1))
    assert "The holdout does not confirm it" in other.verdict and "above the live weights" in other.verdict
    assert "On the holdout it is better" in select(recorded, holdout=lambda m: distance(m) + 1).verdict


def test_recalibration_gives_every_candidate_its_own_statistics(recorded):
    model, trajectory = recorded
    batch = torch.tensor([[0.0], [2.0]])
    means = []
    score = lambda m: means.append((m.weight.item(), m.norm.running_mean.item())) or distance(m)  # noqa: E731
    choice = select(recorded, score=score, recalibrate=[batch])
    live, *averages = means
    assert live == (2.5, 0.0) and averages[0] == (2.5, pytest.approx(2.5))  # the second is recalibrated
    assert all(mean == pytest.approx(weight) for weight, mean in averages)
    choice.apply(model)
    assert model.norm.running_mean.item() == pytest.approx(model.weight.item())
    assert "of other weights" not in choice.verdict
    assert select(recorded).verdict.startswith("These scores are not those the averages can have")


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
        select(recorded, score=score, recalibrate=[torch.randn(8, 1)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_no_number_of_the_table_is_cut(recorded):
    def score(m):
        return 0.0123 + 1e-5 * Losses()(m)

    weights = ",".join(["0.123456789"] * len(recorded[1]))
    text = str(select(recorded, score=score, profiles=["uniform", f"weights:{weights}"]))
    assert text.count("…") <= 1  # the name of a profile with a number for each block


def test_the_table_can_be_printed_drawn_stored_and_written(recorded, tmp_path):
    choice = select(recorded, score=Losses())
    lines = str(choice).splitlines()
    assert lines[0] == "Lower is better; differences are to live; ≈: as good as the best"
    assert lines[3].startswith(choice.best.name)
    assert any(line.startswith("live ") for line in lines[13:15])  # the simplest may come before
    assert max(map(len, lines)) <= 80
    assert repr(choice) == f"Selection(best={choice.best.name!r}, candidates={len(choice.table)})"

    data = json.loads(json.dumps(choice.to_dict(), allow_nan=False))
    assert data["best"] == choice.best.name and data["verdict"] == choice.verdict
    assert [c["name"] for c in data["candidates"]] == [c.name for c in choice.table]

    (axes,) = choice.plot().get_axes()
    drawn = [text.get_text() for text in axes.get_yticklabels()]
    assert drawn[0] == choice.best.name and len(drawn) <= 8 and choice.live.name in drawn
    tied = {c.name for c in choice.table if c.tied and c is not choice.best}
    assert {name.removesuffix(" ≈") for name in drawn if name.endswith(" ≈")} <= tied
    assert choice.best.name in choice.plot().get_suptitle()

    choice.write(tmp_path / "best.safetensors")
    written = checkpoints.open(tmp_path / "best.safetensors")
    model, trajectory = recorded
    assert torch.equal(written.read("weight"), trajectory.average(choice.best.profile)["weight"])
    assert set(written.tensors) == set(model.state_dict())
    assert written.metadata["polyak.profile"] == choice.best.name


def test_a_decay_that_was_chosen_on_a_decayed_run_brings_its_warning(tmp_path):
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with polyak.Recorder(model, tmp_path / "run", block=1, optimizer=optimizer) as run:
        for step in range(1, 11):
            model.weight.data.fill_(step)
            optimizer.param_groups[0]["lr"] = 1 / step
            run.update()
    choice = polyak.select(
        run.trajectory,
        model,
        score=lambda m: abs(m.weight.item() - 7),
        mode="min",
        profiles=["decay:sqrt:0.8"],
        progress=False,
    )
    assert "Mind that the learning rate was not constant" in choice.verdict


def test_options_are_refused_before_anything_is_scored(recorded, tmp_path):
    unscored = lambda m: pytest.fail("it was scored")  # noqa: E731
    with pytest.raises(OptionError, match="mode must be 'min'"):
        select(recorded, score=unscored, mode="lowest")
    with pytest.raises(OptionError, match="can be gone through only once"):
        select(recorded, score=unscored, recalibrate=iter([torch.zeros(2, 1)]))
    model = NormedWeight()
    with polyak.Recorder(model, tmp_path / "empty", block=5) as run, pytest.raises(NotStartedError):
        polyak.select(run.trajectory, model, score=unscored)


def test_the_bar_is_shown_on_stderr_only_where_it_is_asked_for(recorded, capsys):
    select(recorded)
    assert capsys.readouterr() == ("", "")
    select(recorded, progress=True)
    assert capsys.readouterr().out == ""


# The grids that are tried by default.


@pytest.mark.parametrize("steps", [1, 7, 2000, 10**7])
def test_the_grid_holds_every_kind_and_can_be_written_down(steps):
    grid = coarse_grid(steps)
    assert len(set(grid)) == len(grid)
    assert {type(profile) for profile in grid} == {Tail, Decay, EMA, Power}
    assert [parse(str(profile)) for profile in grid] == grid


def test_half_lives_follow_the_length_of_the_run():
    half_lives = [profile.half_life for profile in coarse_grid(2000) if isinstance(profile, EMA)]
    assert half_lives == [20, 50, 100, 200, 400]


@pytest.mark.parametrize("best", coarse_grid(2000))
def test_finer_values_lie_around_the_best_and_in_its_family(best):
    near = fine_grid(best, 2000)
    assert len(set(near)) == len(near) >= 2
    assert all(type(profile) is type(best) and profile not in coarse_grid(2000) for profile in near)
    if isinstance(best, Decay):
        assert {profile.shape for profile in near} == {best.shape}


def test_at_an_end_of_the_grid_the_finer_values_reach_beyond_it():
    assert min(profile.fraction for profile in fine_grid(Tail(0.02), 2000)) < 0.02
    assert max(profile.gamma for profile in fine_grid(Power(gamma=32), 2000)) > 32
    assert max(profile.fraction for profile in fine_grid(Tail(1.0), 2000)) < 1


def test_there_is_nothing_finer_around_what_is_not_on_the_grid():
    assert fine_grid(Uniform(), 2000) == []


# Averages made one after the other equal those made alone, and are never all in memory.


@pytest.fixture
def recorded_stream(tmp_path):
    walk = RecordedWalk(tmp_path / "run", every=2, block=10, max_blocks=16, poisoned={44, 46})
    walk.run(500)
    walk.recorder.close()
    return walk.recorder.trajectory


@pytest.fixture
def little_memory(monkeypatch):
    """Averages do not all fit into it."""
    monkeypatch.setattr("polyak.selection._select._TOGETHER_BYTES", 0)


@pytest.fixture
def passes(monkeypatch):
    """How many averages each pass over the blocks makes."""
    made = []
    average_many = Trajectory.average_many

    def watched(self, profiles, **options):
        made.append(len(profiles))
        return average_many(self, profiles, **options)

    monkeypatch.setattr(Trajectory, "average_many", watched)
    return made


def streamed(trajectory, profiles):
    for profile, weights in averages(trajectory, [trajectory.explain(profile) for profile in profiles]):
        yield profile, {name: tensor.double().clone() for name, tensor in weights.items()}


@pytest.mark.filterwarnings("ignore:the blocks are too long")
def test_nested_tails_are_the_averages_that_the_trajectory_makes_alone(recorded_stream, little_memory):
    tails = [Tail(1.0), Tail(0.02), Tail(steps=3), Tail(0.31), Tail(0.3), Tail(steps=200)]
    found = dict(streamed(recorded_stream, tails))
    assert set(found) == set(tails)
    for tail, weights in found.items():
        alone = recorded_stream.average(tail)
        assert weights.keys() == alone.keys()
        assert largest_error(weights, {n: t.double() for n, t in alone.items()}) < 2e-7
        assert weights["1.num_batches_tracked"] == alone["1.num_batches_tracked"]


def test_nested_tails_read_each_block_about_once(recorded_stream, monkeypatch, little_memory):
    reads = []
    coefficients = Trajectory._coefficients

    def watched(self, profile):
        found = coefficients(self, profile)
        reads.extend(index for index, a in enumerate(found) if a)
        return found

    monkeypatch.setattr(Trajectory, "_coefficients", watched)
    tails = [Tail(f / 20) for f in range(1, 21)]
    assert len(list(streamed(recorded_stream, tails))) == 20
    # A tail that ends inside a block reads that block again for the next one.
    assert set(reads) == set(range(len(recorded_stream.blocks)))
    assert len(reads) <= len(recorded_stream.blocks) + len(tails)


def test_what_fits_the_memory_is_made_in_one_pass(recorded_stream, passes):
    profiles = [Tail(0.5), Power(gamma=1), Tail(0.25)]
    found = dict(streamed(recorded_stream, profiles))
    assert passes == [3] and list(found) == profiles
    for profile in profiles:
        alone = recorded_stream.average(profile)
        assert largest_error(found[profile], {n: t.double() for n, t in alone.items()}) == 0


def test_the_others_come_in_chunks_that_fit_the_memory(recorded_stream, passes, monkeypatch):
    monkeypatch.setattr("polyak.selection._select._TOGETHER_BYTES", 1000)
    size = sum(tensor.nbytes for tensor in recorded_stream.average(Uniform()).values())
    assert recorded_stream.average_bytes == size
    together = 1000 // size
    assert 1 < together < 10
    profiles = [Power(gamma=gamma) for gamma in range(1, 8)] + [
        Decay("sqrt", 0.4),
        Weights([1.0] * len(recorded_stream)),
    ]
    found = dict(streamed(recorded_stream, profiles))
    assert list(found) == profiles and max(passes) == together
    for profile in profiles:
        alone = recorded_stream.average(profile)
        assert largest_error(found[profile], {n: t.double() for n, t in alone.items()}) == 0


def test_of_tails_one_is_in_memory_at_a_time(recorded_stream, little_memory):
    seen = []
    explained = [recorded_stream.explain(Tail(f / 10)) for f in range(1, 11)]
    for _, weights in averages(recorded_stream, explained):
        seen += [weakref.ref(tensor) for tensor in weights.values() if tensor.is_floating_point()]
        gc.collect()
        alive = {id(reference()) for reference in seen if reference() is not None}
        assert alive == {id(tensor) for tensor in weights.values() if tensor.is_floating_point()}


def test_half_precision_blocks_keep_a_mean_in_fp32(tmp_path, little_memory):
    for step in range(1, 5):
        torch.save({"w": torch.full((2,), 1 + step / 128, dtype=torch.bfloat16)}, tmp_path / f"{step}.pt")
    trajectory = Trajectory.from_checkpoints(sorted(tmp_path.glob("*.pt")))
    found = dict(streamed(trajectory, [Tail(0.25), Tail(1.0)]))
    assert found[Tail(1.0)]["w"].tolist() == pytest.approx([1 + 2.5 / 128] * 2, abs=1e-7)
