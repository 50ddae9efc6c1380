"""What goes wrong around a recording, each found by somebody who tried."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch
from torch import nn

import polyak
from devices import as_if_on
from polyak._mean import Accumulator
from polyak.errors import CheckpointError, OptionError, StateError, SwapError
from polyak.profiles import Uniform


def line(value: float = 0.0) -> nn.Linear:
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(value)
    return model


def record(recorder, model, values):
    for value in values:
        model.weight.data.fill_(value)
        recorder.update()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = line(), line()
        self.b.weight = self.a.weight


def test_tied_weights_are_scored_as_they_are_averaged(tmp_path):
    model = Tied()
    with polyak.Recorder(model, tmp_path, block=1) as run:
        record(run, model.a, [0.0, 0.0, 8.0, 8.0])
    choice = polyak.select(
        run.trajectory,
        model,
        profiles=["tail:0.5", "tail:1"],
        score=lambda m: m.a.weight.item(),
        mode="min",
        progress=False,
    )
    assert {c.name: c.score for c in choice.table} == {"live": 8, "tail:0.5": 8, "tail:1": 4}


def test_tails_in_steps_and_in_samples_of_uneven_runs_are_scored_as_they_are_averaged(tmp_path):
    for step, value in ((100, 1.0), (1000, 2.0), (1100, 4.0)):
        torch.save({"weight": torch.full((1, 1), value)}, tmp_path / f"step-{step}.pt")
    trajectory = polyak.Trajectory.from_checkpoints(sorted(tmp_path.glob("*.pt")))
    profiles = ["tail:steps=1000", "tail:0.5", "tail:0.9", "tail:1"]
    choice = polyak.select(
        trajectory, line(), profiles=profiles, score=lambda m: m.weight.item(), mode="min", progress=False
    )
    for candidate in choice.table:
        if candidate.profile is not None:
            expected = trajectory.average(candidate.profile)["weight"].item()
            assert candidate.score == pytest.approx(expected, abs=1e-6)


def test_buffers_that_are_copied_are_scored_as_they_are_shipped(tmp_path):
    model = nn.Sequential(line(), nn.BatchNorm1d(1))
    with polyak.Recorder(model, tmp_path, block=1) as run:
        for value in (0.0, 0.0, 8.0, 6.0):
            model[1].running_mean.fill_(value)
            run.update()
    choice = polyak.select(
        run.trajectory,
        model,
        profiles=["tail:0.25", "tail:1"],
        score=lambda m: m[1].running_mean.item(),
        mode="min",
        progress=False,
    )
    assert {c.score for c in choice.table} == {6.0}


def test_frozen_parameters_that_are_moved_by_hand_are_those_of_the_end(tmp_path):
    model = nn.Sequential(line(), line())
    model[1].requires_grad_(False)
    with polyak.Recorder(model, tmp_path, block=1) as run:
        for value in (1.0, 2.0, 3.0):
            model[0].weight.data.fill_(value)
            model[1].weight.data.fill_(10 * value)
            run.update()
    assert run.trajectory.live()["1.weight"].item() == 30
    assert run.trajectory.average(Uniform())["1.weight"].item() == 30


def test_a_model_with_other_frozen_parameters_is_another_model(tmp_path):
    model = nn.Sequential(line())
    with polyak.Recorder(model, tmp_path, block=1) as run:
        run.update()
    wider = nn.Sequential(line(), line())
    wider[1].requires_grad_(False)
    with pytest.raises(StateError, match=r"1.weight \(frozen\)"):
        polyak.Recorder(wider, tmp_path, block=1, resume=True)
    assert len(polyak.Trajectory(tmp_path)) == 1


def test_a_score_that_changes_the_live_weights_is_undone_and_said(tmp_path):
    model = line()
    with polyak.Recorder(model, tmp_path, block=1) as run:
        record(run, model, [1.0, 2.0])

    def score(m):
        m.weight.data = m.weight.data * 0.5
        with torch.no_grad():
            m.weight.mul_(0.5)
        return 1.0

    with pytest.warns(UserWarning, match="weights were changed"):
        polyak.select(run.trajectory, model, score=score, mode="min", profiles=["uniform"], progress=False)
    assert model.weight.item() == 2


def test_close_refuses_averaged_weights_and_follows_replaced_ones(tmp_path):
    model = line()
    swa = polyak.Average(model, Uniform())
    run = polyak.Recorder(model, tmp_path, block=1)
    for value in (1.0, 3.0):
        model.weight.data.fill_(value)
        run.update(), swa.update()
    with swa.applied(), pytest.raises(SwapError):
        run.close()
    model.weight = nn.Parameter(torch.full((1, 1), 7.0))
    run.close()
    assert run.trajectory.live()["weight"].item() == 7


def test_a_trajectory_that_the_recording_has_outgrown_asks_to_be_opened_again(tmp_path):
    model = line()
    run = polyak.Recorder(model, tmp_path, block=1, max_blocks=8)
    record(run, model, range(8))
    early = run.trajectory
    record(run, model, range(32))
    run.close()
    with pytest.raises(CheckpointError, match="open it again"):
        early.average(Uniform())


def test_live_weights_outlive_a_reopening_that_trains_nothing(tmp_path):
    """As of a job that is started once more and finds itself finished."""
    model = line()
    with polyak.Recorder(model, tmp_path, block=2) as run:
        record(run, model, [5.0, 1.0, 9.0])
        state = run.state_dict()
    with polyak.Recorder(model, tmp_path, block=2, step=3):
        pass
    assert polyak.Trajectory(tmp_path).live()["weight"].item() == 9
    # Also where only the state was loaded: its open block is written anew, the model at hand is not.
    with polyak.Recorder(line(), tmp_path, block=2, resume=True) as again:
        again.load_state_dict(state)
    assert polyak.Trajectory(tmp_path).live()["weight"].item() == 9
    assert polyak.Trajectory(tmp_path).blocks[-1].stop == 3
    with polyak.Recorder(model, tmp_path, block=2, step=2) as again:  # goes back
        assert not again.trajectory.has_live


def test_a_model_that_was_not_loaded_is_never_live(tmp_path):
    model = line()
    with polyak.Recorder(model, tmp_path, block=2) as run:
        record(run, model, [5.0, 1.0, 9.0])
        state = run.state_dict()
        record(run, model, [4.0, 3.0])
    with polyak.Recorder(line(), tmp_path, block=2, resume=True) as again:
        again.load_state_dict(state)
    assert not polyak.Trajectory(tmp_path).has_live


def test_live_weights_of_the_same_step_are_replaced_whole(tmp_path, monkeypatch):
    """A kill between the new file and the manifest leaves none rather than ones that seem damaged."""
    model = line()
    with polyak.Recorder(model, tmp_path, every=2, block=2) as run:
        record(run, model, [5.0, 1.0, 9.0])
    with pytest.warns(UserWarning, match="goes on after its last block"):
        again = polyak.Recorder(model, tmp_path, every=2, block=2, resume=True)
        record(again, model, [8.0])
    saves = []
    monkeypatch.setattr(type(again._folder), "_save", lambda folder, manifest: saves.append(manifest))
    again.close()
    assert [(manifest.live_step, manifest.live_checksum is None) for manifest in saves] == [
        (None, True),
        (3, False),
    ]


def test_damaged_and_replaced_live_weights_are_told_apart(tmp_path):
    model = line()
    with polyak.Recorder(model, tmp_path, block=2) as run:
        record(run, model, [5.0, 1.0, 9.0])
    early, (live,) = run.trajectory, tmp_path.glob("live-*")
    whole = live.read_bytes()
    live.write_bytes(whole[:-1] + b"!")
    with pytest.raises(CheckpointError, match="corrupt: it is not what was written as the live weights"):
        early.live()
    live.write_bytes(whole)
    with polyak.Recorder(model, tmp_path, block=2, step=3) as again:
        record(again, model, [7.0])
    with pytest.raises(CheckpointError, match="open it again"):
        early.live()
    assert again.trajectory.live()["weight"].item() == 7


def test_damaged_and_replaced_frozen_parameters_are_told_apart(tmp_path):
    model = nn.Sequential(line(), line())
    model[1].requires_grad_(False)
    with polyak.Recorder(model, tmp_path, block=1) as run:
        run.update()
    early, frozen = run.trajectory, tmp_path / "frozen.safetensors"
    whole = frozen.read_bytes()
    frozen.write_bytes(whole[:-1] + b"!")
    for use in (run.trajectory.live, lambda: run.trajectory.average(Uniform())):
        with pytest.raises(CheckpointError, match="not what was written as the frozen parameters"):
            use()
    frozen.write_bytes(whole)
    with polyak.Recorder(model, tmp_path, block=1, step=1) as again:
        again.update()
        model[1].weight.data.fill_(7.0)
    with pytest.raises(CheckpointError, match="open it again"):
        early.average(Uniform())
    assert again.trajectory.average(Uniform())["1.weight"].item() == 7


def test_a_run_that_was_recorded_anew_is_no_damage(tmp_path):
    model = line()
    with polyak.Recorder(model, tmp_path, block=1, step=0) as run:
        record(run, model, [5.0, 1.0])
    early = run.trajectory
    with polyak.Recorder(model, tmp_path, block=1, step=0) as run:
        record(run, model, [50.0, 10.0])
    for use in (early.live, lambda: early.average(Uniform())):
        with pytest.raises(CheckpointError, match="open it again"):
            use()


def test_huge_metrics_and_a_damaged_block_do_not_end_a_recording(tmp_path):
    model = line()
    with polyak.Recorder(model, tmp_path, block=2, max_blocks=8) as run:
        for step in range(16):
            model.weight.data.fill_(step)
            run.update(loss=1e308)
        assert run.trajectory.blocks[0].metrics["loss"].mean == 1e308
        oldest = tmp_path / run.trajectory.blocks[0].file_name
        oldest.write_bytes(oldest.read_bytes()[:-1] + b"!")
        with pytest.warns(UserWarning, match="is corrupt.*the recording goes on"):
            for step in range(16, 64):
                model.weight.data.fill_(step)
                run.update()
    trajectory = run.trajectory
    assert (trajectory.blocks[-1].stop, len(trajectory) <= 10) == (64, True)
    assert trajectory.usable.average(polyak.Tail(steps=2))["weight"].item() == 62.5
    with pytest.raises(CheckpointError, match="corrupt"):
        trajectory.average(Uniform())


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.replace(b'"weight"', b'"weighs"'),
        lambda data: data.replace(b'"polyak.copied":"[]"', b'"polyak.copied":"[!"'),
        lambda data: data.replace(b'"polyak.copied":"[]"', b'"polyak.copied":"17"'),
        lambda data: data + bytes(8),
        lambda data: data[:-4] + b"\xff\xff\xff\x7f",  # a NaN
        lambda data: data[:40],
    ],
)
@pytest.mark.parametrize("index", [0, 1])
def test_no_damage_ends_a_recording(tmp_path, damage, index):
    model = line()
    with polyak.Recorder(model, tmp_path, block=1, max_blocks=8) as run:
        record(run, model, range(8))
        path = tmp_path / run.trajectory.blocks[index].file_name
        data = path.read_bytes()
        path.write_bytes(damage(data))
        assert path.read_bytes() != data
        with pytest.warns(UserWarning, match="the recording goes on"):
            record(run, model, range(8, 24))
    trajectory = run.trajectory
    good = trajectory.usable
    assert trajectory.blocks[-1].stop == 24 and len(good) == len(trajectory) - 1
    blocks = [block for block in trajectory.blocks if block.file_name != path.name]
    weights = good.average(Uniform())["weight"].item()
    values = [step - 1 for block in blocks for step in range(block.start + 1, block.stop + 1)]
    assert weights == pytest.approx(sum(values) / len(values))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="only Linux lists the files that are open")
def test_blocks_that_were_merged_away_are_let_go(tmp_path):
    model = line()
    with polyak.Recorder(model, tmp_path, block=1, max_blocks=8) as run:
        record(run, model, range(40))
        assert len(run.trajectory) == 8
        open_files = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
    assert not [file for file in open_files if str(tmp_path) in file and file.endswith("(deleted)")]


def test_blocks_without_their_manifest_are_not_thrown_away(tmp_path):
    model = line()
    with polyak.Recorder(model, tmp_path, block=1) as run:
        record(run, model, [1.0, 2.0])
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="its manifest is missing"):
        polyak.Recorder(model, tmp_path, block=1)
    assert len(list(tmp_path.glob("block-*"))) == 2


def test_a_recorder_that_was_never_closed_lets_go_when_it_is_collected(tmp_path):
    model = line()
    run = polyak.Recorder(model, tmp_path, block=1)
    run.update()
    run._writer.wait()
    del run
    gc.collect()
    with polyak.Recorder(model, tmp_path, block=1, step=1) as again:
        again.update()
    assert [block.stop for block in again.trajectory.blocks] == [1, 2]


def test_what_blocks_cannot_hold_is_refused_at_once(tmp_path):
    model = nn.Linear(1, 1, dtype=torch.complex128)
    with pytest.raises(OptionError, match="complex128"):
        polyak.Recorder(model, tmp_path, dtype=None)


def test_misused_arguments_are_named(tmp_path):
    model = line()
    with polyak.Recorder(model, tmp_path, block=1) as run:
        record(run, model, [1.0, 3.0])
    trajectory = run.trajectory
    assert trajectory.average("tail:1")["weight"].item() == 2
    assert trajectory.explain("tail:1").exact
    score = lambda m: 0.0  # noqa: E731
    for profiles in ("uniform", polyak.Tail(0.4), [0.4]):
        with pytest.raises(OptionError, match="list|profile is needed|profiles must be"):
            polyak.select(trajectory, model, score=score, profiles=profiles, progress=False)
    with pytest.raises(OptionError, match="must be a Trajectory"):
        polyak.select(str(tmp_path), model, score=score)
    with pytest.raises(OptionError, match="must be a list|paths must be"):
        polyak.Trajectory.from_checkpoints(tmp_path)
    with pytest.raises(OptionError, match="a tuple"):
        polyak.select(trajectory, model, score=lambda m: (0.5, 0.9), progress=False)
    with pytest.raises(OptionError, match="recorded run"):
        polyak.average_checkpoints([tmp_path], tmp_path / "average.pt")


def test_an_accumulator_on_an_accelerator_forgets_what_it_held():
    """There the first sample is added to what was there, so that must be nothing."""
    weight = torch.tensor([1e8])
    with as_if_on("accelerator"):
        mean = Accumulator([weight], ["w"], Uniform())
    mean.add([weight])
    mean.restart()
    assert mean.means[0].item() == 0
