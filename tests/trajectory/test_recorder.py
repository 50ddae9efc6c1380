"""Recording: blocks hold what the model went through, and nothing else."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import polyak
from polyak import checkpoints
from polyak.errors import CheckpointError, OptionError, StateError, StructureError
from polyak.trajectory import _policy as pace_module
from polyak.trajectory import _policy as writer_module
from polyak.trajectory import _store as folder_module
from recorded_runs import RecordedWalk, largest_error, small_model


@settings(deadline=None, max_examples=12)
@given(
    steps=st.integers(1, 260),
    every=st.sampled_from([1, 3]),
    block_samples=st.integers(1, 5),
    poisoned=st.sets(st.integers(1, 260), max_size=40),
)
def test_blocks_are_the_means_of_their_samples(
    tmp_path_factory, steps: int, every: int, block_samples: int, poisoned: set[int]
) -> None:
    """After any number of merges, and with samples left out."""
    directory = tmp_path_factory.mktemp("run")
    run = RecordedWalk(directory, poisoned, every=every, block=every * block_samples, max_blocks=8)
    run.run(steps)
    run.recorder.close()
    trajectory = polyak.Trajectory(directory)
    assert len(trajectory) <= 8
    taken = list(range(every, steps + 1, every))
    accepted = [step for step in taken if step not in poisoned]
    assert sum(block.count for block in trajectory.blocks) == len(accepted)
    for block in trajectory.blocks:
        samples = run.samples(block)
        assert block.count == len(samples)
        file = checkpoints.open(directory / block.file_name)
        assert largest_error({n: file.read(n) for n in run.walk.visited[0]}, run.mean(samples)) < 1e-6
    skipped_before_the_end = [
        s for s in taken if s in poisoned and accepted and s <= trajectory.blocks[-1].stop
    ]
    assert sum(block.skipped for block in trajectory.blocks) == len(skipped_before_the_end)


def test_a_poisoned_stretch_makes_a_longer_block(tmp_path: Path) -> None:
    run = RecordedWalk(tmp_path, poisoned=range(5, 12), block=4)
    run.run(16)
    run.recorder.close()
    found = [(b.start, b.stop, b.count, b.skipped) for b in run.recorder.trajectory.blocks]
    assert found == [(0, 4, 4, 0), (4, 12, 1, 7), (12, 16, 4, 0)]


def test_blocks_are_whole_checkpoints(tmp_path: Path) -> None:
    """Buffers as they were at the end of the block, ties under every name, frozen parameters beside."""
    model = small_model()
    model.add_module("tied", nn.Linear(4, 2))
    model.tied.weight = model[2].weight
    model[0].bias.requires_grad_(False)
    model.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
    with polyak.Recorder(model, tmp_path, block=2) as run:
        for step in range(1, 5):
            model[1].running_mean.fill_(step)
            model[1].num_batches_tracked.fill_(step)
            run.update()
    expected = dict(model.state_dict())
    average = run.trajectory.average(polyak.Uniform())
    assert set(average) == set(expected)
    assert average["2.weight"] is average["tied.weight"]
    assert average["mask"].tolist() == [0, float("-inf")]
    assert average["1.num_batches_tracked"] == 4
    live = run.trajectory.live()
    assert all(torch.equal(live[name], tensor) for name, tensor in expected.items())
    early = run.trajectory.average(polyak.Window(0, 2))
    assert early["1.running_mean"][0] == 2
    model.load_state_dict(average)


def test_floating_buffers_can_be_averaged(tmp_path: Path) -> None:
    model = small_model()
    with polyak.Recorder(model, tmp_path, block=4, buffers="average") as run:
        for step in range(4):
            model[1].running_mean.fill_(step)
            run.update()
    assert run.trajectory.average(polyak.Uniform())["1.running_mean"][0] == 1.5


def test_learning_rate_and_metrics(tmp_path: Path) -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with polyak.Recorder(model, tmp_path, block=2, every=2, optimizer=optimizer) as run:
        for step in range(1, 5):
            optimizer.param_groups[0]["lr"] = 1 / step
            metrics = {"accuracy": 1} if step == 4 else {}
            run.update(loss=torch.tensor(float("nan") if step == 1 else step), **metrics)
        with pytest.raises(OptionError, match="metric 'loss'"):
            run.update(loss="high")
    first, second = run.trajectory.blocks
    assert first.lr is not None and (first.lr.min, first.lr.max, first.lr.mean) == (0.5, 1, 0.75)
    assert (first.metrics["loss"].count, first.metrics["loss"].mean) == (1, 2)
    assert second.metrics["loss"].mean == 3.5 and second.metrics["accuracy"].mean == 1
    both = first + second
    assert both.metrics["loss"].mean == 3 and both.metrics["accuracy"].count == 1


def test_metrics_on_a_device_are_read_once_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each read waits for the device: all values of a dtype come over together, and are what each was."""
    reads: list[torch.Size] = []
    as_list = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: (reads.append(t.shape), as_list(t))[1])
    monkeypatch.setattr(torch.Tensor, "__float__", lambda t: pytest.fail("one value is read by itself"))
    with polyak.Recorder(small_model(), tmp_path, block=4) as run:
        for step in range(4):
            run.update(loss=torch.tensor([[0.1 * step]]), plain=0.5, tokens=torch.tensor(2**40 + step))
        run.note(loss=torch.tensor(float("inf")))
    [block] = run.trajectory.blocks
    values = np.float32(0.1 * np.arange(4)).astype(float)
    assert (block.metrics["loss"].min, block.metrics["loss"].max) == (0.0, values[3])
    assert block.metrics["loss"].mean == pytest.approx(values.mean(), rel=1e-15)
    assert block.metrics["tokens"].mean == 2**40 + 1.5 and block.metrics["plain"].count == 4
    assert sorted(map(tuple, reads)) == [(4,), (4,)]


def test_attached(tmp_path: Path) -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = polyak.Recorder(model, tmp_path, block=1)
    with polyak.attach(optimizer, run):
        for _ in range(3):
            optimizer.step()
    run.close()
    assert [block.stop for block in run.trajectory.blocks] == [1, 2, 3]


def test_the_manifest_is_there_from_the_start(tmp_path: Path) -> None:
    run = polyak.Recorder(small_model(), tmp_path / "new" / "run")
    assert polyak.Trajectory(tmp_path / "new" / "run").blocks == ()
    run.close()
    with pytest.raises(polyak.errors.NotStartedError, match="no block yet"):
        run.trajectory.average(polyak.Uniform())


class _Clock(threading.local):
    """A clock for each thread that only moves when told, so that the machine's speed decides nothing."""

    seconds = 0.0

    def perf_counter(self) -> float:
        return self.seconds


def test_length_follows_the_pace(tmp_path: Path, caplog, monkeypatch) -> None:
    """Blocks that take long to write become long, and the recorder says so."""
    clock, commit = _Clock(), folder_module.TrajectoryFolder.commit

    def slow(*arguments) -> None:
        clock.seconds += 0.005
        commit(*arguments)

    monkeypatch.setattr(folder_module.TrajectoryFolder, "commit", slow)
    monkeypatch.setattr(pace_module, "time", clock)
    monkeypatch.setattr(writer_module, "time", clock)
    caplog.set_level("INFO", "polyak")
    with polyak.Recorder(small_model(), tmp_path) as run:
        assert run.block_steps == 4
        for _ in range(4000):
            clock.seconds += 0.001
            run.update()
        # 5 ms are a fiftieth of 250 steps of 1 ms each, and blocks grow by doubling.
        assert run.block_steps == 256
    assert "blocks of 256 optimizer steps, which take 0.256 s to train and 0.005 s to write" in caplog.text
    assert polyak.Recorder(small_model(), tmp_path, resume=True).block_steps == run.block_steps


def test_the_trainer_waits_for_one_block_in_flight(tmp_path: Path, monkeypatch) -> None:
    gate, commit = threading.Event(), folder_module.TrajectoryFolder.commit
    running = []

    def held(*arguments) -> None:
        running.append(arguments)
        assert gate.wait(10)
        commit(*arguments)

    monkeypatch.setattr(folder_module.TrajectoryFolder, "commit", held)
    run = RecordedWalk(tmp_path, block=2)
    run.run(3)  # the first block is in flight, the second half full
    trainer = threading.Thread(target=run.run, args=(1,))
    trainer.start()
    trainer.join(0.1)
    assert trainer.is_alive() and len(running) == 1
    gate.set()
    trainer.join(10)
    run.recorder.close()
    for block in run.recorder.trajectory.blocks:
        file = checkpoints.open(tmp_path / block.file_name)
        means = {name: file.read(name) for name in run.walk.visited[0]}
        assert largest_error(means, run.mean(run.samples(block))) < 1e-6


def test_errors_of_the_writer_surface(tmp_path: Path, monkeypatch) -> None:
    """At the next update, and at close; what was committed before stays."""
    run = RecordedWalk(tmp_path, block=2)
    run.run(4)
    run.recorder.trajectory  # noqa: B018 (waits)

    def full(*_: object, **__: object) -> None:
        raise CheckpointError("cannot write: no space left")

    monkeypatch.setattr(folder_module._blocks, "write_block", full)
    with pytest.raises(CheckpointError, match="no space"):
        run.run(4)
    with pytest.raises(CheckpointError, match="no space"):
        run.run(1)
    with pytest.raises(CheckpointError, match="no space"):
        run.recorder.close()
    assert [str(block) for block in polyak.Trajectory(tmp_path).blocks] == ["(0, 2]", "(2, 4]"]
    polyak.Recorder(run.model, tmp_path, block=2, resume=True).close()


def test_models_that_come_later_or_change_dtype(tmp_path: Path) -> None:
    model = nn.Sequential(nn.LazyLinear(2))
    with polyak.Recorder(model, tmp_path, block=2) as run:
        model(torch.ones(1, 3))
        for value in (1, 2, 3, 5):
            model[0].weight.data.fill_(value)
            run.update()
            if value == 2:
                model.double()
    assert [b.stop for b in run.trajectory.blocks] == [2, 4]
    average = run.trajectory.average(polyak.Tail(0.5))
    assert average["0.weight"].dtype == torch.float32 and average["0.weight"][0, 0] == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"every": 0}, "every must be a whole number in"),
        ({"block": 10**12}, "block must be a whole number in"),  # more digits than names of files have
        ({"step": 10**12}, "step must be a whole number in"),
        ({"block": 5, "every": 2}, "multiple of every=2"),
        ({"max_blocks": 4}, "max_blocks"),
        ({"dtype": torch.bfloat16}, "float32"),
        ({"buffers": "keep"}, "buffers"),
        ({"step": -1}, "step"),
    ],
)
def test_bad_options(tmp_path: Path, options: dict, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        polyak.Recorder(small_model(), tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_unknown_options_and_bad_places(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        polyak.Recorder(small_model(), tmp_path, evry=2)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot write"):
        polyak.Recorder(small_model(), tmp_path / "file")


def test_after_close(tmp_path: Path) -> None:
    run = polyak.Recorder(small_model(), tmp_path)
    run.close()
    run.close()
    for call in (run.update, run.state_dict):
        with pytest.raises(StateError, match="after close"):
            call()


def test_a_changed_model_is_refused(tmp_path: Path) -> None:
    model = small_model()
    with polyak.Recorder(model, tmp_path, block=1) as run:
        run.update()
        model[2] = nn.Linear(4, 5)
        with pytest.raises(StructureError, match="2.weight"):
            run.update()
        model[2] = nn.Linear(4, 2)
