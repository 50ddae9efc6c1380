"""Averages of a run that goes on, in the live model."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import polyak
from polyak.errors import CheckpointError, NotStartedError, OptionError, StateError, SwapError
from polyak.profiles._base import registered
from recorded_runs import RecordedWalk, largest_error

PROFILES = [
    text for cls in registered().values() if cls.__module__.startswith("polyak.") for text in cls.examples
]
STATISTICS = pytest.mark.filterwarnings("ignore:the model has BatchNorm")
COARSE = pytest.mark.filterwarnings("ignore:the blocks are too long")


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(values: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return values.keys() == others.keys() and all(torch.equal(values[name], others[name]) for name in values)


def put_in(run: polyak.Recorder, profile: polyak.Profile | str) -> dict[str, Tensor]:
    """The parameters that the model has inside ``applied()``; the live ones are back to the bit."""
    model = run._binding.model
    before = state_of(model)
    with run.applied(profile) as applied:
        found = parameters_of(applied)
    assert applied is model and same(state_of(model), before)
    return found


def expected(walk: RecordedWalk, profile: polyak.Profile | str) -> dict[str, Tensor]:
    """Each accepted sample weighs what the profile gives the steps since the one before, in float64."""
    profile = polyak.parse(profile) if isinstance(profile, str) else profile
    if isinstance(profile, polyak.Blend):
        average, live = expected(walk, profile.profile), walk.walk.visited[-1]
        return {name: profile.part * average[name] + (1 - profile.part) * live[name] for name in live}
    now, every = len(walk.walk.visited), walk.recorder.every
    samples = [step for step in range(every, now + 1, every) if step not in walk.poisoned]
    edges = [0, *samples[:-1], now] if profile.unit == "steps" else range(len(samples) + 1)
    return walk.mean(samples, profile.weights(edges))


@pytest.mark.parametrize("text", PROFILES)
@pytest.mark.parametrize(("every", "steps"), [(1, 29), (3, 41), (7, 7)])
@STATISTICS
def test_every_profile_weighs_the_samples_so_far(tmp_path: Path, text: str, every: int, steps: int) -> None:
    """Blocks of one sample, so that no profile is cut; poisoned samples leave their steps to the next one."""
    profile: polyak.Profile = polyak.parse(text)
    walk = RecordedWalk(tmp_path, {6, 12, 27}, every=every, block=every)
    walk.run(steps)
    if isinstance(profile, polyak.Window):
        profile = polyak.Window(2, 9)
    if isinstance(profile, polyak.Weights):
        samples = len([s for s in range(every, steps + 1, every) if s not in walk.poisoned])
        profile = polyak.Weights([1.0 + i % 3 for i in range(samples)])
    with walk.recorder:
        assert largest_error(put_in(walk.recorder, profile), expected(walk, profile)) < 1e-6


@pytest.mark.parametrize("keep_in_memory", [0, 1000, "1MB"])
@STATISTICS
@COARSE
def test_the_open_block_counts_and_blocks_merge_in_memory_as_they_do_on_disk(
    tmp_path: Path, keep_in_memory: int | str
) -> None:
    walk = RecordedWalk(tmp_path, {30, 39}, block=4, max_blocks=8, keep_in_memory=keep_in_memory)
    with walk.recorder as run:
        for steps in (3, 1, 2, 40, 27, 64):
            walk.run(steps)
            now = len(walk.walk.visited)
            blocks = list(run.trajectory.blocks)
            filling = range((blocks[-1].stop if blocks else 0) + 1, now + 1)
            assert largest_error(put_in(run, "uniform"), expected(walk, "uniform")) < 1e-6
            # A profile that is cut by blocks gives each the weight of its steps, the open one those up to now.
            edges = [0, *(block.stop for block in blocks), *([now] if filling else [])]
            shares = polyak.Decay("sqrt", 0.4).weights(edges)
            means = [walk.mean(walk.samples(block)) for block in blocks] + (
                [walk.mean(filling)] if filling else []
            )
            reference = {n: sum(a * mean[n] for a, mean in zip(shares, means, strict=True)) for n in means[0]}
            assert largest_error(put_in(run, "decay:sqrt:0.4"), reference) < 1e-6
        kept = run._means._kept
        assert len(kept) == {0: 0, 1000: 7, "1MB": 8}[keep_in_memory]
        assert list(kept) == [block.file_name for block in reversed(run.trajectory.blocks)][: len(kept)]


@STATISTICS
def test_what_is_kept_in_memory_is_what_the_files_hold(tmp_path: Path) -> None:
    walks = [
        RecordedWalk(tmp_path / size, block=2, max_blocks=8, keep_in_memory=size) for size in ("0", "1MB")
    ]
    for walk in walks:
        walk.run(85)
    from_disk, from_memory = (put_in(walk.recorder, "tail:0.7") for walk in walks)
    assert same(from_disk, from_memory)
    for path in tmp_path.glob("1MB/block-*"):
        path.write_bytes(b"")  # nothing is read
    assert same(put_in(walks[1].recorder, "tail:0.7"), from_memory)
    for walk in walks:
        walk.recorder._release()


def test_live_weights_come_back_and_nothing_is_recorded_meanwhile(tmp_path: Path) -> None:
    model = nn.Linear(3, 1)
    average = polyak.Average(model, "uniform")
    run = polyak.Recorder(model, tmp_path, every=2, block=4)
    for _ in range(5):
        model.weight.data.add_(1.0)
        run.update(), average.update()
    before = state_of(model)
    with pytest.raises(ZeroDivisionError), run.applied("uniform"):
        assert not same(state_of(model), before)
        for refused in (
            run.update,
            run.state_dict,
            run.close,
            average.update,
            average.swap_in,
            lambda: run.average("uniform"),
            lambda: run.applied("uniform").__enter__(),
            lambda: run.load_state_dict({}),
        ):
            with pytest.raises(SwapError):
                refused()
        run.note(preview=1.0)
        raise ZeroDivisionError
    assert same(state_of(model), before)
    with average.applied(), pytest.raises(SwapError), run.applied("uniform"):
        pass
    run.update()
    assert run._step == 6
    run.close()
    with pytest.raises(StateError, match=r"applied\(\) after close"), run.applied("uniform"):
        pass
    assert run.trajectory.blocks[-1].metrics["preview"].count == 1


def test_before_a_sample_and_for_what_does_not_fit_it_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(3, 1)
    with polyak.Recorder(model, tmp_path, every=3, block=6) as run:
        run.update()
        with (
            pytest.raises(NotStartedError, match="each 3 optimizer steps, and the last step was 1"),
            run.applied("uniform"),
        ):
            pass
        for _ in range(11):
            run.update()
        for profile in ("unifrom", 0.4, "window:50,60", "ema:decay=0.1", polyak.Weights([1.0])):
            with pytest.raises(OptionError), run.applied(profile):
                pass
        run.update()
        assert not run._binding.live[0].isnan().any()
    for size in (-1, "a lot", None):
        with pytest.raises(OptionError):
            polyak.Recorder(model, tmp_path / "other", keep_in_memory=size)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("damage", [lambda data: data[-3] ^ 1, lambda data: 0xFF], ids=["a bit", "a NaN"])
@COARSE
def test_a_damaged_block_is_named_where_it_counts(tmp_path: Path, damage: Callable[[bytearray], int]) -> None:
    model = nn.Linear(3, 1)
    run = polyak.Recorder(model, tmp_path, block=2)
    for _ in range(9):
        run.update()
    path = tmp_path / run.trajectory.blocks[1].file_name
    data = bytearray(path.read_bytes())
    data[-3:-1] = [damage(data)] * 2
    data[-1] |= 0x7F * (damage(data) == 0xFF)
    path.write_bytes(data)
    before = state_of(model)
    with (
        pytest.raises(CheckpointError, match=rf"{path.name} is corrupt.*block \(2, 4\]"),
        run.applied("uniform"),
    ):
        pass
    assert same(state_of(model), before)
    assert same(put_in(run, "tail:steps=4"), before)  # does not count it
    run._release()


def test_it_waits_for_the_block_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(1, 1, bias=False)
    run = polyak.Recorder(model, tmp_path, block=2, keep_in_memory="1MB")
    commit = run._folder.commit

    def slow(*args: object) -> None:
        time.sleep(0.1)
        commit(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(run._folder, "commit", slow)
    for value in range(1, 8):
        model.weight.data.fill_(value)
        run.update()
        assert put_in(run, "uniform")["weight"].item() == pytest.approx((value + 1) / 2)
    run.close()


def test_statistics_may_be_recomputed_inside_and_a_warning_says_where_they_were_not(tmp_path: Path) -> None:
    walk = RecordedWalk(tmp_path / "copied", block=2)
    walk.run(7)
    run, model = walk.recorder, walk.model
    before = state_of(model)
    with run.applied("tail:0.5"):
        polyak.update_bn([torch.randn(16, 3)], model)
        assert not torch.equal(model[1].running_mean, before["1.running_mean"])
    assert same(state_of(model), before)
    with pytest.warns(UserWarning, match="update_bn") as found, run.applied("tail:0.5"):
        pass
    assert found[0].filename == __file__
    with run.applied("tail:0.5"):  # once is enough
        pass
    run.close()
    walk = RecordedWalk(tmp_path / "averaged", block=2, buffers="average")
    walk.run(3)
    with walk.recorder, walk.recorder.applied("uniform"):
        pass


def test_blocks_that_are_too_long_for_a_profile_are_told_of_once(tmp_path: Path) -> None:
    model = nn.Linear(1, 1, bias=False)
    with polyak.Recorder(model, tmp_path, block=8) as run:
        for value in range(1, 25):
            model.weight.data.fill_(value)
            run.update()
        too_long = (
            r"tail:steps=4: 50% of its weight.*up to 8 optimizer steps.*shorter block=.*larger max_blocks="
        )
        with pytest.warns(UserWarning, match=too_long) as found:
            assert run.average("tail:steps=4")["weight"].item() == 20.5  # and not 22.5
        assert found[0].filename == __file__
        assert put_in(run, "tail:steps=4")["weight"].item() == 20.5
        with pytest.warns(UserWarning, match="decay:sqrt:0.1") as found, run.applied("decay:sqrt:0.1"):
            pass
        assert found[0].filename == __file__
        assert put_in(run, "tail:steps=16")["weight"].item() == 16.5
    trajectory = run.trajectory
    for use in (trajectory.average, lambda profile: trajectory.write(profile, tmp_path / "tail.pt")):
        with pytest.warns(UserWarning, match=too_long) as found:
            use("tail:steps=4")
        assert found[0].filename == __file__
    assert trajectory.average("tail:steps=16")["weight"].item() == 16.5
    (among_many,) = trajectory.average_many(["tail:steps=4"])  # `explain` has what there is to say
    assert among_many["weight"].item() == 20.5


@STATISTICS
def test_half_precision_is_averaged_in_full_and_rounded_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(50, 20).bfloat16()
    samples = []
    with polyak.Recorder(model, tmp_path, block=2, dtype=None) as run:
        for _ in range(9):
            model.weight.data.add_(torch.randn(20, 50).bfloat16(), alpha=0.1)
            run.update()
            samples.append(model.weight.detach().double().clone())
        mean = torch.stack(samples).mean(0)
        assert run.average("uniform")["weight"].dtype == torch.float32
        assert (run.average("uniform")["weight"].double() - mean).abs().max() < 1e-6
        assert torch.equal(put_in(run, "uniform")["weight"], run.average("uniform")["weight"].bfloat16())


@pytest.mark.parametrize("keep_in_memory", [0, "1MB"])
@STATISTICS
def test_a_run_that_was_resumed_averages_what_it_resumed(tmp_path: Path, keep_in_memory: int | str) -> None:
    walk = RecordedWalk(tmp_path, block=4, keep_in_memory=keep_in_memory)
    walk.run(10)
    state = {**walk.recorder.state_dict()}
    state["open_block"] = {name: mean.clone() for name, mean in state["open_block"].items()}
    weights = state_of(walk.model)
    walk.run(9)
    put_in(walk.recorder, "uniform")
    # Within one recorder, whose blocks in memory are then of steps that were taken back.
    walk.recorder.load_state_dict(state)
    for _ in range(2):
        walk.model.load_state_dict(weights)
        del walk.walk.visited[10:]
        walk.run(14)
        assert largest_error(put_in(walk.recorder, "uniform"), expected(walk, "uniform")) < 1e-6
        walk.recorder.close()
        walk.recorder = polyak.Recorder(
            walk.model, tmp_path, block=4, keep_in_memory=keep_in_memory, resume=True
        )
        walk.recorder.load_state_dict(state)
    walk.recorder.close()


def test_the_tensors_of_the_whole_model(tmp_path: Path) -> None:
    """Tied names share one, frozen parameters and buffers are the live ones, which `applied` leaves alone."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.frozen = (nn.Linear(2, 2, bias=False) for _ in range(3))
            self.b.weight = self.a.weight
            self.frozen.requires_grad_(False)
            self.register_buffer("calls", torch.tensor(3))
            self.register_buffer("cache", torch.ones(1), persistent=False)

    model = Net()
    with polyak.Recorder(model, tmp_path, block=1) as run:
        for value in (1.0, 3.0):
            model.a.weight.data.fill_(value)
            run.update()
        found = run.average("uniform")
        assert found.keys() == model.state_dict().keys()
        assert found["a.weight"] is found["b.weight"] and found["a.weight"].unique().tolist() == [2.0]
        assert found["frozen.weight"].data_ptr() == model.frozen.weight.data_ptr()
        assert found["calls"].item() == 3
        assert same(found, {**run.trajectory.average("uniform"), "calls": torch.tensor(3)})
        with run.applied("uniform"):
            model.calls += 1
        assert model.calls == 3
