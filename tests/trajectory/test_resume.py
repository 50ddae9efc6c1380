"""Resuming: the recorder goes on where the training does."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

import polyak
from polyak.errors import CheckpointError, StateError
from recorded_runs import RecordedWalk, small_model


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("block-*")}


def through_a_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def resumed(run: RecordedWalk, directory: Path, **options) -> RecordedWalk:
    """A new recorder beside the same walk."""
    again = object.__new__(RecordedWalk)
    again.__dict__.update(run.__dict__)
    again.recorder = polyak.Recorder(run.model, directory, **({"resume": True} | options))
    return again


@pytest.mark.parametrize("at", [1, 10, 37, 40, 93])
def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path: Path, at: int) -> None:
    options = {"block": 4, "max_blocks": 8}
    whole = RecordedWalk(tmp_path / "whole", {30, 39}, **options)
    whole.run(at)
    whole.recorder.state_dict()  # a state keeps its border, in both runs
    whole.run(120 - at)
    whole.recorder.close()

    run = RecordedWalk(tmp_path / "cut", {30, 39}, **options)
    run.run(at)
    state, model = through_a_file(run.recorder.state_dict()), run.model.state_dict()
    model = {name: tensor.clone() for name, tensor in model.items()}
    generator = run.walk.generator.get_state()
    run.run(25)
    run.recorder.close()

    run.model.load_state_dict(model)
    run.walk.generator.set_state(generator)
    del run.walk.visited[at:]
    again = resumed(run, tmp_path / "cut", **options)
    again.recorder.load_state_dict(state)
    again.run(120 - at)
    again.recorder.close()
    assert again.recorder.trajectory.blocks == whole.recorder.trajectory.blocks
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.parametrize("resumes", [False, True])
def test_the_sample_after_a_save_may_be_lost_to_a_nan(tmp_path: Path, resumes: bool) -> None:
    """Nothing of it is folded in and taken back, which would leave rounding in one of the runs."""
    torch.manual_seed(0)
    model = nn.ParameterList([torch.randn(300), torch.randn(1200, 1000)])  # two batches; the first is finite
    recorder = polyak.Recorder(model, tmp_path, block=12)
    for _ in range(17):
        for parameter in model:
            parameter.data.mul_(1.01)
        recorder.update()
    state = through_a_file(recorder.state_dict())
    if resumes:
        recorder.close()
        recorder = polyak.Recorder(model, tmp_path, block=12, resume=True)
        recorder.load_state_dict(state)
    model[1].data.fill_(float("nan"))
    recorder.update()
    found = recorder.state_dict()
    recorder.close()
    assert found["n_skipped"] == 1
    for name, mean in found["open_block"].items():
        assert torch.equal(mean, state["open_block"][name])


def test_a_state_keeps_its_border(tmp_path: Path) -> None:
    """However long the run goes on, the last two states that were asked for can be loaded."""
    run = RecordedWalk(tmp_path, block=2, max_blocks=8)
    states = []
    for _ in range(4):
        run.run(21)
        states.append(through_a_file(run.recorder.state_dict()))
    run.run(300)
    run.recorder.close()
    for state in (states[3], states[2]):
        again = resumed(run, tmp_path, block=2)
        again.recorder.load_state_dict(state)
        assert again.recorder.trajectory.blocks[-1].stop == state["start"]
        again.recorder.close()


def test_without_a_state_it_continues_after_the_last_block(tmp_path: Path) -> None:
    run = RecordedWalk(tmp_path, block=4)
    run.run(10)
    run.recorder.close()
    assert run.recorder.trajectory.blocks[-1].stop == 10
    again = resumed(run, tmp_path)
    # Whether training went back to an earlier step only its user can know.
    with pytest.warns(UserWarning, match="goes on after its last block, optimizer step 10.*says from where"):
        again.run(1)
    again.run(
        2
    )  # once is enough; loading a state or giving a step says it all, so that no test of those warns
    assert [block.stop for block in again.recorder.trajectory.blocks] == [4, 8, 10, 12]
    with pytest.raises(polyak.errors.NotStartedError, match="live"):
        again.recorder.trajectory.live()
    again.recorder.close()
    assert again.recorder.trajectory.blocks[-1].stop == 13
    assert len(list(tmp_path.glob("live-*"))) == 1


def test_a_new_run_in_the_folder_of_another_is_refused(tmp_path: Path) -> None:
    """Of the same model, as where a script is run once more: nothing else tells them apart."""
    run = RecordedWalk(tmp_path, block=4)
    run.run(10)
    run.recorder.close()
    stray = tmp_path / "block-000000000007-000000000009.safetensors"
    stray.touch()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(
        StateError, match=r"3 blocks up to optimizer step 10.*step=0.*resume=True.*load_state_dict"
    ):
        polyak.Recorder(small_model(), tmp_path, block=4)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    polyak.Recorder(small_model(), tmp_path, block=4, step=0).close()
    assert not polyak.Trajectory(tmp_path).blocks
    polyak.Recorder(small_model(), tmp_path).close()  # which holds no run


def test_step_drops_later_blocks(tmp_path: Path) -> None:
    run = RecordedWalk(tmp_path, block=4)
    run.run(20)
    run.recorder.close()
    again = resumed(run, tmp_path, step=8)
    assert [block.stop for block in again.recorder.trajectory.blocks] == [4, 8]
    assert len(contents(tmp_path)) == 2
    again.run(4)
    again.recorder.close()
    assert [block.stop for block in again.recorder.trajectory.blocks] == [4, 8, 12]


def test_step_may_lie_after_the_last_block(tmp_path: Path) -> None:
    """The samples of the open block were lost; its border stays where it would have been."""
    run = RecordedWalk(tmp_path, block=4)
    run.run(8)
    run.recorder.close()
    again = resumed(run, tmp_path, step=10)
    again.run(2)
    block = again.recorder.trajectory.blocks[-1]
    assert (block.start, block.stop, block.count) == (8, 12, 2)
    again.recorder.close()


def test_a_step_far_after_the_last_block_is_told(tmp_path: Path) -> None:
    run = RecordedWalk(tmp_path, block=4)
    run.run(8)
    run.recorder.close()
    with pytest.warns(UserWarning, match="optimizer steps 8 to 100 were not recorded"):
        resumed(run, tmp_path, step=100).recorder.close()


def test_a_block_across_the_step_is_refused(tmp_path: Path) -> None:
    run = RecordedWalk(tmp_path, block=4)
    run.run(20)
    run.recorder.close()
    before = contents(tmp_path)
    with pytest.raises(StateError, match=r"block \(8, 12\] lies across it.*state_dict.*step 8 or 12"):
        resumed(run, tmp_path, step=10)
    assert contents(tmp_path) == before
    resumed(run, tmp_path, step=12).recorder.close()


def test_a_new_folder_can_begin_late(tmp_path: Path) -> None:
    with polyak.Recorder(small_model(), tmp_path, block=4, step=1001) as run:
        for _ in range(10):
            run.update()
    assert [(b.start, b.stop, b.count) for b in run.trajectory.blocks] == [
        (1001, 1004, 3),
        (1004, 1008, 4),
        (1008, 1011, 3),
    ]
    assert run.trajectory.explain(polyak.Uniform()).coefficients.round(9).tolist() == [0.3, 0.4, 0.3]


def test_other_models_and_options_are_refused(tmp_path: Path) -> None:
    run = RecordedWalk(tmp_path, block=4)
    run.run(8)
    state = through_a_file(run.recorder.state_dict())
    run.recorder.close()
    before = contents(tmp_path)
    for knows_of_it in ({"resume": True}, {"step": 0}, {"step": 8}):
        with pytest.raises(StateError, match="another model: .*'0.weight'"):
            polyak.Recorder(nn.Linear(2, 2), tmp_path, **knows_of_it)
    with pytest.raises(StateError, match="every=1, not 2"):
        resumed(run, tmp_path, every=2)
    with pytest.raises(StateError, match="block=4, not 8"):
        resumed(run, tmp_path, block=8)
    again = resumed(run, tmp_path)
    with pytest.raises(StateError, match="every"):
        again.recorder.load_state_dict(state | {"every": 3})
    with pytest.raises(StateError, match="lacks 'weight'|'0.weight'"):
        again.recorder.load_state_dict(state | {"open_block": {}})
    with pytest.raises(StateError, match="ends at step 8"):
        again.recorder.load_state_dict(state | {"start": 12, "last_sample": 12, "step": 12})
    again.recorder.close()
    assert contents(tmp_path) == before


def test_two_writers_are_refused(tmp_path: Path) -> None:
    first = polyak.Recorder(small_model(), tmp_path)
    with pytest.raises(StateError, match="rank 0 only"):
        polyak.Recorder(small_model(), tmp_path)
    first.close()
    polyak.Recorder(small_model(), tmp_path).close()


OUTLIVED = """
    import os, signal, sys, time, torch, polyak

    run = polyak.Recorder(torch.nn.Linear(2, 2), sys.argv[1])
    if os.fork() == 0:
        print(os.getpid(), flush=True)
        time.sleep(60)
        os._exit(0)
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_the_lock_ends_with_its_process_though_a_forked_child_lives_on(tmp_path: Path) -> None:
    """As a worker that loads data does for a while."""
    script = [sys.executable, "-c", textwrap.dedent(OUTLIVED), str(tmp_path)]
    with subprocess.Popen(script, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            assert process.wait(30) == -signal.SIGKILL
            polyak.Recorder(small_model(), tmp_path).close()
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", flock)
    with pytest.raises(CheckpointError, match="cannot write .*: Function not implemented"):
        polyak.Recorder(small_model(), tmp_path)
    assert not (tmp_path / "manifest.json").exists()


def test_importing_it_needs_nothing_that_windows_lacks() -> None:
    script = "import sys; sys.modules['fcntl'] = None; import polyak.trajectory; polyak.Recorder"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_only_a_writer_cleans_up(tmp_path: Path) -> None:
    run = RecordedWalk(tmp_path, block=4)
    run.run(8)
    run.recorder.close()
    strays = [
        tmp_path / name
        for name in (
            "block-000000000007-000000000009.safetensors",
            ".polyak-0123456789ab.tmp",
            "live-000000000009.safetensors",
        )
    ]
    mine = [tmp_path / name for name in ("notes.txt", "block-best.safetensors", "live-old.safetensors")]
    for path in (*strays, *mine):
        path.touch()
    polyak.Trajectory(tmp_path)
    assert all(path.exists() for path in strays)
    resumed(run, tmp_path).recorder.close()
    assert not any(path.exists() for path in strays) and all(path.exists() for path in mine)
    assert polyak.Trajectory(tmp_path).live()


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    run = RecordedWalk(tmp_path, block=4)
    run.run(8)
    run.recorder.close()
    manifest = tmp_path / "manifest.json"
    good = json.loads(manifest.read_text())
    overlapping = json.loads(manifest.read_text())
    overlapping["blocks"][1]["start"] = 2
    for text in (
        "",
        "{",
        "[]",
        json.dumps(overlapping),
        json.dumps(good | {"format": "x"}),
        json.dumps(good | {"z": 1}),
    ):
        manifest.write_text(text)
        with pytest.raises(CheckpointError, match=r"manifest.json is damaged.*from_checkpoints"):
            polyak.Trajectory(tmp_path)
        with pytest.raises(CheckpointError, match="manifest.json is damaged"):
            resumed(run, tmp_path)
    rescued = polyak.Trajectory.from_checkpoints(sorted(tmp_path.glob("block-*")))
    assert [block.stop for block in rescued.blocks] == [4, 8]
    with pytest.raises(CheckpointError, match="no trajectory"):
        polyak.Trajectory(tmp_path / "elsewhere")
