"""Recordings of runs in which parameters thaw: blocks from before and after it are averaged as one run."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import oracles
import polyak
from polyak import checkpoints
from polyak.errors import CheckpointError, StateError
from polyak.trajectory import Recorder

pytestmark = pytest.mark.filterwarnings("ignore:the blocks are too long")

STEPS, THAW = 24, 10
PROFILES = ["uniform", "tail:0.5", "decay:sqrt:0.75", "window:0,8", "power:gamma=2", "ema:half_life=8"]


def model_of(dtype=torch.float32):
    """A frozen layer that is tied to another name, one that thaws, and one that is trained from the start."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(2, 2, dtype=dtype) for _ in range(3)))
    model.append(nn.Linear(2, 2, bias=False, dtype=dtype))
    model[3].weight = model[1].weight
    model[:2].requires_grad_(False)
    return model


class Run:
    """Training by an optimizer, with every sample kept in float64."""

    def __init__(self, folder, **options):
        self.model, self.seen, self.thaw = model_of(), [], THAW
        self.options = {"block": 4, "max_blocks": 8} | options
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
        self.folder = folder
        self.recorder = Recorder(self.model, folder, **self.options)

    def steps(self, n):
        for _ in range(n):
            if len(self.seen) == self.thaw:
                self.model[1].requires_grad_(True)
            self.optimizer.zero_grad()
            self.model(torch.tensor([[1.0, -2.0]])).square().sum().backward()
            self.optimizer.step()
            self.seen.append({k: v.double().clone() for k, v in self.model.state_dict().items()})
            self.recorder.update()

    def assert_averages_are_right(self, n_blocks=None):
        trajectory = polyak.Trajectory(self.folder)
        assert n_blocks is None or len(trajectory) == n_blocks
        edges = [0, *(block.stop for block in trajectory.blocks)]
        profiles = [polyak.parse(text) for text in PROFILES]
        for profile, average in zip(profiles, trajectory.average_many(profiles), strict=True):
            coefficients = trajectory.explain(profile).coefficients
            lengths = np.diff(edges)
            weights = np.repeat(coefficients / lengths, lengths)  # of the samples in each block
            assert average.keys() == self.seen[0].keys()
            for name, value in average.items():
                expected = oracles.mean_of([s[name] for s in self.seen], weights)
                torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-6)
            alone = trajectory.average(profile)
            assert all(torch.equal(alone[name], value) for name, value in average.items())
        return trajectory


@pytest.mark.parametrize("thaw", [2, 8, 10])
@pytest.mark.parametrize("block", [4, 1])
def test_blocks_that_hold_other_tensors_are_averaged_as_one_run(tmp_path, thaw, block):
    run = Run(tmp_path, block=block)  # those of one step merge
    run.thaw = thaw
    run.steps(STEPS)
    run.recorder.close()
    trajectory = run.assert_averages_are_right(n_blocks=6 if block == 4 else None)
    assert {"1.weight", "3.weight", "2.bias"} <= trajectory.averaged_names
    assert all({"1.weight", "3.weight"} <= c.tensors.keys() for c in trajectory.checkpoints)
    live = trajectory.live()
    assert all(torch.equal(value, live[name]) for name, value in run.model.state_dict().items())


def test_recorded_in_float64_and_written_to_a_file(tmp_path):
    run = Run(tmp_path / "run", dtype=torch.float64)
    run.steps(STEPS)
    run.recorder.close()
    trajectory = run.assert_averages_are_right()
    trajectory.write("uniform", tmp_path / "average.safetensors")
    averaged = trajectory.average("uniform")
    written = checkpoints.open(tmp_path / "average.safetensors")
    assert all(torch.equal(written.read(name), value) for name, value in averaged.items())
    early = trajectory.average("window:0,8")
    assert torch.equal(early["1.weight"], run.seen[0]["1.weight"])


def test_the_tools_above_take_such_a_run(tmp_path):
    run = Run(tmp_path)
    run.steps(STEPS)
    run.recorder.close()
    trajectory = polyak.Trajectory(tmp_path)
    x = torch.tensor([[1.0, -2.0]])
    options = {"mode": "min", "profiles": PROFILES, "progress": False}
    choice = polyak.select(trajectory, model_of(), score=lambda m: m(x).square().sum().item(), **options)
    for candidate in choice.table:
        if candidate.profile is not None:
            model = model_of()
            model.load_state_dict(trajectory.average(candidate.profile))
            assert candidate.score == pytest.approx(model(x).square().sum().item(), rel=1e-4)


def test_frozen_parameters_that_are_moved_keep_what_earlier_blocks_need(tmp_path):
    run = Run(tmp_path)
    run.steps(STEPS)
    nn.init.constant_(run.model[0].weight, 3.0)  # which is still frozen
    for sample in run.seen:
        sample["0.weight"].fill_(3.0)
    run.recorder.close()
    run.assert_averages_are_right()


def test_a_damaged_file_of_frozen_parameters_is_named(tmp_path):
    run = Run(tmp_path)
    run.steps(STEPS)
    run.recorder.close()
    frozen = tmp_path / "frozen.safetensors"
    frozen.write_bytes(frozen.read_bytes()[:-1] + b"!")
    with pytest.raises(CheckpointError, match="not what was written as the frozen parameters"):
        polyak.Trajectory(tmp_path).average("uniform")


# Resuming.


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def contents(folder: Path):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("stop", [THAW - 1, THAW, THAW + 3])
def test_resuming_around_the_thaw_is_as_if_never_interrupted(tmp_path, stop, trained):
    whole = Run(tmp_path / "whole")
    whole.steps(stop)
    whole.recorder.state_dict()
    whole.steps(STEPS - stop)
    whole.recorder.close()

    run = Run(tmp_path / "run")
    run.steps(stop)
    state, weights = through_a_file(run.recorder.state_dict()), through_a_file(run.model.state_dict())
    run.steps(7)
    run.recorder.close()
    again = Run.__new__(Run)
    again.__dict__.update(run.__dict__, model=model_of(), seen=run.seen[:stop])
    again.model[1].requires_grad_(trained)
    again.optimizer = torch.optim.SGD(again.model.parameters(), lr=0.05)
    again.recorder = Recorder(
        again.model, again.folder, resume=True, step=None if stop else 0, **again.options
    )
    again.model.load_state_dict(weights)
    again.recorder.load_state_dict(state)
    again.model[1].requires_grad_(stop > THAW)
    again.steps(STEPS - stop)
    again.recorder.close()
    again.assert_averages_are_right()
    one, other = contents(whole.folder), contents(again.folder)
    assert one.keys() == other.keys()
    if not trained or stop > THAW:
        assert one == other


def test_what_was_trained_goes_on_being_recorded_where_it_is_frozen_again(tmp_path):
    run = Run(tmp_path)
    run.steps(16)
    run.recorder.close()
    run.model[1].requires_grad_(False)  # as a script has it that begins anew
    run.recorder = Recorder(run.model, tmp_path, step=16, **run.options)
    run.steps(8)
    run.recorder.close()
    run.assert_averages_are_right()


def test_a_run_that_begins_anew_with_all_trained_forgets_what_was_frozen(tmp_path):
    run = Run(tmp_path)
    run.steps(8)
    run.recorder.close()
    run.model.requires_grad_(True)
    run.seen.clear()
    run.recorder = Recorder(run.model, tmp_path, step=0, **run.options)
    run.steps(STEPS)
    run.recorder.close()
    run.assert_averages_are_right()


def test_the_state_of_another_recording_is_refused_and_nothing_has_changed(tmp_path):
    run = Run(tmp_path)
    run.steps(6)
    state = through_a_file(run.recorder.state_dict())
    del state["open_block"]["2.bias"]
    with pytest.raises(StateError, match="lacks '2.bias'"):
        run.recorder.load_state_dict(state)
    run.steps(STEPS - 6)
    run.recorder.close()
    run.assert_averages_are_right()
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["has_frozen"]


@pytest.mark.parametrize("keep_in_memory", [0, "1MB"])
def test_an_average_of_the_run_so_far_has_what_thawed_as_it_was(tmp_path, keep_in_memory):
    run = Run(tmp_path, block=1, max_blocks=64, keep_in_memory=keep_in_memory)
    for n_steps in (6, 5, 12):
        run.steps(n_steps)
        for text in PROFILES:
            weights = polyak.parse(text).weights(range(len(run.seen) + 1))
            with run.recorder.applied(text):
                for name, value in run.model.state_dict().items():
                    expected = oracles.mean_of([sample[name] for sample in run.seen], weights)
                    torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-6)
    run.recorder.close()
