"""Blends of a recorded run: blocks and live weights in one sum, against float64."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import polyak
from polyak import checkpoints
from polyak.errors import CheckpointError, NonFiniteError, NotStartedError, OptionError
from recorded_runs import RecordedWalk, largest_error

STEPS = 100
INNER = ["tail:0.3", "decay:sqrt:0.4", "uniform", "power:gamma=2", "window:0,20", "tail:steps=30"]


@pytest.fixture(scope="module")
def walk(tmp_path_factory) -> RecordedWalk:
    """100 steps in merged blocks; the last sample is of step 99, so that the live weights are in no block."""
    recorded = RecordedWalk(tmp_path_factory.mktemp("run"), {40, 99}, every=3, block=3, max_blocks=12)
    recorded.run(STEPS)
    recorded.model[1].running_mean.fill_(7.0)  # since the last block
    recorded.recorder.close()
    return recorded


@pytest.fixture
def trajectory(walk) -> polyak.Trajectory:
    return polyak.Trajectory(walk.recorder.directory)


def blended(walk, trajectory, inner, part) -> dict[str, torch.Tensor]:
    """part · Σ a_k mean_k + (1 - part) · live, from the samples themselves."""
    row = trajectory.explain(inner).coefficients
    shares = {
        step: float(a) / block.count
        for block, a in zip(trajectory.blocks, row, strict=True)
        for step in walk.samples(block)
    }
    mean, live = walk.mean(list(shares), list(shares.values())), walk.walk.visited[-1]
    return {name: part * mean[name] + (1 - part) * live[name] for name in live}


@pytest.mark.filterwarnings("ignore:the blocks are too long")
@settings(deadline=None, max_examples=25)
@given(inner=st.sampled_from(INNER), part=st.floats(0, 1))
def test_it_is_a_part_of_the_average_and_the_rest_of_the_live_weights(walk, inner, part):
    trajectory = polyak.Trajectory(walk.recorder.directory)
    blend = polyak.Blend(inner, part)
    assert largest_error(trajectory.average(blend), blended(walk, trajectory, inner, part)) < 1e-6
    found = trajectory.explain(blend)
    assert found.coefficients.sum() + found.live == pytest.approx(1, abs=1e-12)
    assert found.live == 1 - part
    assert found.misplaced_weight == pytest.approx(part * trajectory.explain(inner).misplaced_weight)


def test_signed_weights_are_blended_too(walk, trajectory):
    a = [(-1.0) ** k * (1 + k) for k in range(len(trajectory))]
    signed = polyak.Weights(a)
    assert any(weight < 0 for weight in trajectory.explain(signed).coefficients)
    blend = polyak.parse(f"blend:0.3:{signed}")
    error = largest_error(trajectory.average(blend), blended(walk, trajectory, signed, 0.3))
    assert error < 1e-5 * max(map(abs, trajectory.explain(signed).coefficients))


def test_its_ends_are_the_average_and_the_live_weights(trajectory):
    live, average = trajectory.live(), trajectory.average("tail:0.3")
    ends = trajectory.average_many(["blend:0:tail:0.3", "blend:1:tail:0.3"])
    for blend, end in zip(ends, (live, average), strict=True):
        assert blend.keys() == end.keys()
        assert all(torch.equal(blend[name], end[name]) for name in end)


def test_buffers_are_the_live_ones_and_many_averages_are_as_each_alone(trajectory):
    profiles = ["tail:0.3", "blend:0.5:tail:0.3", "blend:0:uniform", "uniform", "blend:1:uniform"]
    together = trajectory.average_many(profiles)
    for profile, average in zip(profiles, together, strict=True):
        alone = polyak.Trajectory(trajectory._place).average(profile)
        assert all(torch.equal(average[name], alone[name]) for name in alone)
    statistics = [average["1.running_mean"].mean().item() for average in together]
    assert [value == 7.0 for value in statistics] == [False, True, True, False, False]
    assert trajectory.average_bytes == polyak.Trajectory(trajectory._place).average_bytes


def test_it_is_written_as_it_is_averaged(trajectory, tmp_path):
    with pytest.warns(UserWarning, match="BatchNorm statistics"):
        trajectory.write("blend:0.25:tail:0.3", tmp_path / "blend.safetensors")
    written = checkpoints.open(tmp_path / "blend.safetensors")
    average = trajectory.average("blend:0.25:tail:0.3")
    assert all(torch.equal(written.read(name), average[name]) for name in average)
    assert written.metadata["polyak.profile"] == "blend:0.25:tail:0.3"


def test_the_explanation_names_the_live_weights(trajectory):
    found = trajectory.explain("blend:0.25:tail:0.3")
    assert "live" in str(found) and "0.750000" in str(found)
    counts = [block.count for block in trajectory.blocks]
    squares = sum(a * a / n for a, n in zip(found.coefficients, counts, strict=True))
    assert found.effective_samples == pytest.approx(1 / (squares + 0.75**2))


def test_what_the_blocks_cannot_resolve_is_refused_in_a_blend_too(tmp_path):
    walk = RecordedWalk(tmp_path, block=20)
    walk.run(60)
    walk.recorder.close()
    with pytest.raises(OptionError, match="the blocks cannot give ema:half_life=1:"):
        walk.recorder.trajectory.explain("blend:0.1:ema:half_life=1")


@pytest.mark.filterwarnings("ignore:the blocks are too long")
def test_a_run_that_was_not_closed_has_nothing_to_blend_with(tmp_path):
    walk = RecordedWalk(tmp_path, block=2)
    walk.run(7)
    trajectory = walk.recorder.trajectory
    for act in (trajectory.average, trajectory.explain, lambda p: trajectory.write(p, tmp_path / "x.pt")):
        with pytest.raises(NotStartedError, match=r"Close it, and open this again; or take tail:0\.5"):
            act("blend:0.5:tail:0.5")
    assert not (tmp_path / "x.pt").exists()
    assert largest_error(trajectory.average("blend:1:tail:0.5"), trajectory.average("tail:0.5")) == 0
    walk.recorder.close()
    assert walk.recorder.trajectory.explain("blend:0.5:tail:0.5").live == 0.5


@pytest.mark.filterwarnings("ignore:the model has BatchNorm")
def test_a_run_that_goes_on_blends_with_the_weights_now(tmp_path):
    walk = RecordedWalk(tmp_path, every=2, block=2)
    walk.run(9)  # the last step is in no block
    now = {name: tensor.clone() for name, tensor in walk.model.state_dict().items()}
    tail, blend = (walk.recorder.average(profile) for profile in ("tail:0.5", "blend:0.25:tail:0.5"))
    with walk.recorder.applied("blend:0.25:tail:0.5") as model:
        put_in = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name, parameter in walk.model.named_parameters():
        expected = 0.25 * tail[name].double() + 0.75 * now[name].double()
        assert (blend[name].double() - expected).abs().max() < 1e-6
        assert torch.equal(blend[name], put_in[name]) and torch.equal(parameter, now[name])
    walk.recorder.close()


class Thawing:
    """A bf16 model with a tied layer and one that is frozen until after the last sample."""

    def __init__(self, folder):
        torch.manual_seed(0)
        self.model = nn.Sequential(*(nn.Linear(2, 2, bias=False, dtype=torch.bfloat16) for _ in range(4)))
        self.model[3].weight = self.model[0].weight
        self.model[1:3].requires_grad_(False)
        with polyak.Recorder(self.model, folder, every=2, block=2) as run:
            for step in range(1, 6):
                with torch.no_grad():
                    self.model[0].weight.fill_(step)
                    if step == 5:
                        self.model[1].requires_grad_(True)
                        self.model[1].weight.fill_(9.0)
                run.update()


def test_tied_frozen_and_thawed_parameters_and_other_dtypes(tmp_path):
    """Samples at 2 and 4, live weights of 5; what thawed at 5 was frozen in every block."""
    run = Thawing(tmp_path)
    frozen = run.model[2].weight.detach()
    first = polyak.Trajectory(tmp_path).average("uniform")
    trajectory = polyak.Trajectory(tmp_path)
    blend = trajectory.average("blend:0.5:uniform")
    assert blend["0.weight"].dtype == torch.float32
    assert torch.equal(blend["0.weight"], torch.full((2, 2), 0.5 * 3 + 0.5 * 5))
    assert blend["3.weight"] is blend["0.weight"]
    assert torch.equal(blend["2.weight"], frozen)
    assert torch.allclose(blend["1.weight"].double(), 0.5 * first["1.weight"].double() + 4.5, atol=1e-6)
    # Averages of blocks alone are what they were.
    again = trajectory.average("uniform")
    assert all(torch.equal(again[name], first[name].to(again[name])) for name in first)
    assert trajectory.live()["0.weight"].dtype == torch.bfloat16
    polyak.select(
        trajectory, run.model, score=lambda m: m[0].weight.mean().item(), mode="min", progress=False
    )


def test_damage_is_named_and_the_rest_can_be_used(tmp_path):
    walk = RecordedWalk(tmp_path, block=5, max_blocks=8)
    walk.run(20)
    walk.recorder.close()
    (block,) = tmp_path.glob("block-000000000005-*")
    block.write_bytes(block.read_bytes()[:-4] + b"gone")
    trajectory = polyak.Trajectory(tmp_path)
    with pytest.raises(CheckpointError, match="needs this block"):
        trajectory.average("blend:0.5:uniform")
    rest = trajectory.usable
    found = rest.explain("blend:0.5:uniform")
    assert found.live == 0.5 and len(found.coefficients) == 3
    assert largest_error(rest.average("blend:0.5:uniform"), blended(walk, rest, "uniform", 0.5)) < 1e-6
    (live,) = tmp_path.glob("live-*")
    live.write_bytes(live.read_bytes()[:-4] + b"gone")
    with pytest.raises(CheckpointError, match="not what was written as the live weights"):
        polyak.Trajectory(tmp_path).usable.average("blend:0.5:uniform")
    assert polyak.Trajectory(tmp_path).usable.average("uniform")


def test_live_weights_that_are_no_numbers_are_named(tmp_path):
    walk = RecordedWalk(tmp_path, {8}, block=2)
    walk.run(7)
    walk.model[0].weight.data[0, 0] = float("nan")
    walk.recorder.close()
    trajectory = walk.recorder.trajectory
    with pytest.raises(NonFiniteError, match=r"live-0*7\.safetensors: tensor '0\.weight' holds NaN"):
        trajectory.average("blend:0.5:uniform")
    # Where choosing is free to leave them out, it does.
    choice = polyak.select(
        trajectory, walk.model, score=lambda m: m[2].weight.square().mean().item(), mode="min",
        progress=False,
    )  # fmt: skip
    assert not any(isinstance(c.profile, polyak.Blend) for c in choice.table)


def test_of_checkpoints_the_last_is_block_and_live_at_once(tmp_path):
    for step in (10, 20, 40):
        checkpoints.write(
            tmp_path / f"step-{step}.pt", {"w": torch.full((2,), float(step), dtype=torch.float64)}
        )
    trajectory = polyak.Trajectory.from_checkpoints(sorted(tmp_path.glob("*.pt")))
    found = trajectory.explain("blend:0.5:uniform")
    assert found.live == 0 and found.coefficients.tolist() == pytest.approx([1 / 6, 1 / 6, 2 / 3])
    assert trajectory.average("blend:0.5:uniform")["w"].tolist() == pytest.approx([95 / 3] * 2)
    report = polyak.average_checkpoints(
        sorted(tmp_path.glob("*.pt")), tmp_path / "out.safetensors", profile="blend:0.5:uniform"
    )
    assert report.coefficients == pytest.approx(found.coefficients.tolist())
    note = json.loads(checkpoints.open(tmp_path / "out.safetensors").metadata["polyak"])
    assert note["profile"] == "blend:0.5:uniform"


def test_the_last_checkpoints_of_a_run_share_what_lies_before_them():
    """The part of the average is kept, whatever part of the run the checkpoints cover."""
    from polyak.combine import Span, coefficients

    late = [Span(60, 80), Span(80, 100)]
    assert coefficients(polyak.Window(0, 80), late) == [1.0, 0.0]
    assert coefficients(polyak.Blend(polyak.Window(0, 80), 0.25), late) == [0.25, 0.75]


def test_what_is_of_blocks_alone_says_so(trajectory, walk):
    with pytest.raises(OptionError, match="counts the live weights, of which there is one sample"):
        polyak.SWAG(trajectory, "blend:0.5:uniform")
    with pytest.raises(OptionError, match="start from the profile of its average"):
        polyak.fit(trajectory, walk.model, [None], lambda m, b: m[0].weight.sum(), start="blend:0.5:uniform")
