"""Averages made from blocks, against direct float64 means of the samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import polyak
from polyak import checkpoints
from polyak.errors import CheckpointError, OptionError, OutputExistsError, StructureError
from recorded_runs import RecordedWalk, largest_error

POISONED = frozenset({7, 8, 100, 101, 102, 155})
STEPS, EVERY = 300, 2


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RecordedWalk:
    """300 steps in 10 blocks, most of them merged."""
    recorded = RecordedWalk(tmp_path_factory.mktemp("run"), POISONED, every=EVERY, block=6, max_blocks=10)
    recorded.run(STEPS)
    recorded.recorder.close()
    return recorded


@pytest.fixture
def trajectory(run: RecordedWalk) -> polyak.Trajectory:
    return polyak.Trajectory(run.recorder.directory)


def all_samples(run: RecordedWalk) -> list[int]:
    return [step for block in run.recorder.trajectory.blocks for step in run.samples(block)]


def test_any_window_on_borders_is_the_mean_of_its_samples(run, trajectory) -> None:
    edges = [0, *(block.stop for block in trajectory.blocks)]
    assert len(edges) == 11
    samples = all_samples(run)
    for first, start in enumerate(edges[:-1]):
        for stop in edges[first + 1 :]:
            inside = [step for step in samples if start < step <= stop]
            # A window in steps weighs each step alike; one in samples, each sample.
            tail = polyak.Tail(fraction=sum(step > start for step in samples) / len(samples))
            if stop == edges[-1]:
                assert largest_error(trajectory.average(tail), run.mean(inside)) < 1e-6
            found = trajectory.explain(polyak.Window(start, stop))
            blocks = [b for b in trajectory.blocks if start <= b.start and b.stop <= stop]
            shares = [b.steps / (stop - start) / b.count for b in blocks for _ in range(b.count)]
            assert (
                largest_error(trajectory.average(polyak.Window(start, stop)), run.mean(inside, shares)) < 1e-6
            )
            assert found.misplaced_weight == pytest.approx(0, abs=1e-12) and found.exact


@pytest.mark.filterwarnings("ignore:the blocks are too long")
@settings(deadline=None, max_examples=30)
@given(
    profile=st.one_of(
        st.floats(0.05, 1).map(polyak.Tail),
        st.floats(30, 500).map(lambda h: polyak.EMA(half_life=h)),
        st.floats(0.93, 0.975).map(lambda d: polyak.EMA(decay=d, debias=False)),
        st.floats(0, 6).map(lambda g: polyak.Power(gamma=g)),
        st.floats(0, 6).map(lambda e: polyak.Polynomial(eta=e)),
        st.sampled_from(["linear", "sqrt", "1-sqrt", "cosine"]).map(lambda s: polyak.Decay(s, 0.4)),
    )
)
def test_other_profiles_are_within_the_stated_error(run, profile) -> None:
    trajectory = run.recorder.trajectory
    samples = all_samples(run)
    if profile.unit == "samples":
        shares = profile.weights(np.arange(len(samples) + 1))
    else:
        # Each sample stands for the steps of its block in equal parts.
        lengths = [b.steps / b.count for b in trajectory.blocks for _ in range(b.count)]
        shares = profile.weights(np.cumsum([0, *lengths]))
    reference = run.mean(samples, shares.tolist())
    found = trajectory.explain(profile)
    for name, tensor in trajectory.average(profile).items():
        if name not in reference:
            continue
        ranges = []
        for block in trajectory.blocks:
            seen = torch.stack([run.walk.visited[step - 1][name] for step in run.samples(block)])
            ranges.append(seen.amax(0) - seen.amin(0))
        allowed = found.misplaced_weight * torch.stack(ranges).amax(0) + 1e-6
        assert ((tensor.double() - reference[name]).abs() <= allowed).all()
    assert found.exact == (found.misplaced_weight < 1e-9)


def test_several_profiles_in_one_pass(trajectory) -> None:
    profiles = [polyak.Uniform(), polyak.Tail(0.2), polyak.Weights([0.5, *[0] * 8, 0.5])]
    together = trajectory.average_many(profiles)
    for profile, average in zip(profiles, together, strict=True):
        alone = trajectory.average(profile)
        assert alone.keys() == average.keys()
        assert all(torch.equal(alone[name], average[name]) for name in alone)


@pytest.mark.filterwarnings("ignore:.* are BatchNorm statistics of other weights")
def test_write(trajectory, tmp_path: Path) -> None:
    profile = polyak.Tail(0.3)
    average = trajectory.average(profile)
    for name in ("a.safetensors", "a.pt"):
        trajectory.write(profile, tmp_path / name)
        with checkpoints.open(tmp_path / name) as written:
            assert all(torch.equal(written.read(n), tensor) for n, tensor in average.items())
            assert written.tensors.keys() == average.keys()
    with pytest.raises(OutputExistsError):
        trajectory.write(profile, tmp_path / "a.pt")
    trajectory.write(profile, tmp_path / "a.pt", overwrite=True)
    with pytest.raises(OptionError, match="shortest possible"):
        trajectory.write(polyak.EMA(half_life=1), tmp_path / "b.pt")
    assert not (tmp_path / "b.pt").exists()


def test_writing_statistics_of_other_weights_is_warned_of(trajectory, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"'1\.running_mean', .* recompute them with polyak\.update_bn"):
        trajectory.write(polyak.Tail(0.3), tmp_path / "a.pt")
    torch.save(torch.nn.BatchNorm1d(2).state_dict(), tmp_path / "step-1.pt")
    single = polyak.Trajectory.from_checkpoints([tmp_path / "step-1.pt"])
    single.write(polyak.Uniform(), tmp_path / "b.pt")  # its own weights and statistics


@pytest.mark.parametrize(
    "profile",
    [
        polyak.EMA(half_life=0.5),
        polyak.EMA(decay=0.1),
        polyak.EMA(decay=0.1, debias=False),
        polyak.Power(gamma=2000),
        polyak.Power(sigma_rel=0.0005),
        polyak.Polynomial(eta=1000),
    ],
)
def test_horizons_that_blocks_cannot_resolve(trajectory, profile) -> None:
    """The shortest that the message names is possible, and half of it is not."""
    with pytest.raises(OptionError, match="shortest possible here is") as raised:
        trajectory.average(profile)
    text = str(raised.value).partition("shortest possible here is ")[2].partition(";")[0]
    shortest = polyak.parse(text)
    assert trajectory.explain(shortest).misplaced_weight == pytest.approx(0.1, abs=0.01)
    with pytest.raises(OptionError, match="shortest possible"):
        trajectory.explain(profile)


def test_a_first_sample_that_no_block_holds_alone(trajectory) -> None:
    with pytest.raises(OptionError, match="take it debiased"):
        trajectory.average(polyak.EMA(decay=0.999, debias=False))
    trajectory.average(polyak.EMA(decay=0.999))


def test_a_decay_after_a_decay_is_warned_about(tmp_path: Path) -> None:
    run = RecordedWalk(tmp_path, block=10)
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1)
    run.recorder._optimizer = optimizer
    run.run(100)
    optimizer.param_groups[0]["lr"] = 0.01
    run.run(20)
    run.recorder.close()
    trajectory = run.recorder.trajectory
    assert "learning rate was not constant" in trajectory.explain(polyak.Decay("sqrt", 0.4)).warnings[0]
    assert not any("rate" in warning for warning in trajectory.explain(polyak.Decay("sqrt", 0.1)).warnings)
    assert trajectory.explain(polyak.Tail(0.4)).warnings == ()


def test_explanation_in_words(trajectory) -> None:
    found = trajectory.explain(polyak.Tail(0.15))
    assert found.coefficients.sum() == pytest.approx(1)
    assert 0 < found.partly_covered_weight < 1 and 0 < found.misplaced_weight < 0.5
    text = str(found)
    assert text.startswith("tail:0.15: ") and "samples" in text and str(trajectory.blocks[-1]) in text
    uniform = trajectory.explain(polyak.Uniform())
    assert uniform.effective_samples == pytest.approx(sum(block.count for block in trajectory.blocks))
    assert "exact" in str(uniform) and uniform.partly_covered_weight == 0


def flipped(path: Path, position: int) -> bytes:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    return bytes(data)


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove"])
def test_a_corrupt_block_is_named_and_the_rest_usable(tmp_path: Path, harm: str) -> None:
    run = RecordedWalk(tmp_path, block=10)
    run.run(40)
    run.recorder.close()
    victim = tmp_path / polyak.Trajectory(tmp_path).blocks[1].file_name
    if harm == "remove":
        victim.unlink()
    else:
        victim.write_bytes(flipped(victim, -3) if harm == "flip" else victim.read_bytes()[:-40])
    trajectory = polyak.Trajectory(tmp_path)
    assert len(trajectory) == 4
    with pytest.raises(CheckpointError, match=rf"{victim.name}.*\(10, 20\].*other 3 blocks.*usable"):
        trajectory.average(polyak.Uniform())
    assert list(trajectory.damaged) == [1]
    assert largest_error(trajectory.average(polyak.Tail(0.5)), run.mean(range(21, 41))) < 1e-6
    rest = polyak.Trajectory(tmp_path).usable
    assert [block.stop for block in rest.blocks] == [10, 30, 40] and not rest.damaged
    samples = [*range(1, 11), *range(21, 41)]
    assert largest_error(rest.average(polyak.Uniform()), run.mean(samples)) < 1e-6
    # Recording can go on beside it.
    polyak.Recorder(run.model, tmp_path, resume=True).close()


def test_read_while_it_is_recorded(tmp_path: Path) -> None:
    run = RecordedWalk(tmp_path, block=2, max_blocks=8)
    for _ in range(20):
        run.run(7)
        trajectory = run.recorder.trajectory
        samples = [step for block in trajectory.blocks for step in run.samples(block)]
        assert largest_error(trajectory.average(polyak.Uniform()), run.mean(samples)) < 1e-6
    run.recorder.close()


# Checkpoints of other tools.


def saved(folder: Path, names: list[str], **more: object) -> list[Path]:
    for index, name in enumerate(names):
        state = {"w": torch.full((2,), float(index)), "n": torch.tensor(index)}
        torch.save({"model": state, **{k: v[index] for k, v in more.items()}}, folder / name)
    return [folder / name for name in names]


def test_steps_from_names(tmp_path: Path) -> None:
    saved(tmp_path, ["epoch=1-step=900.ckpt", "epoch=2-step=1000.ckpt", "epoch=3-step=1100.ckpt"])
    run = polyak.Trajectory.from_checkpoints(tmp_path.glob("*.ckpt"))
    assert [(b.start, b.stop, b.count) for b in run.blocks] == [
        (800, 900, 1),
        (900, 1000, 1),
        (1000, 1100, 1),
    ]
    average = run.average(polyak.Tail(steps=200))
    assert average["w"].tolist() == [1.5, 1.5] and average["n"] == 2
    assert run.explain(polyak.EMA(half_life=1)).exact  # single samples have nothing to misplace
    assert run.live()["w"].tolist() == [2, 2] and run.live()["n"] == 2


def test_steps_from_metadata_come_first(tmp_path: Path) -> None:
    paths = saved(tmp_path, ["a-3.pt", "b-2.pt", "c-1.pt"], step=[10, 20, 40])
    run = polyak.Trajectory.from_checkpoints(reversed(paths))
    assert [block.stop for block in run.blocks] == [10, 20, 40]
    assert run.average(polyak.Tail(steps=20))["w"].tolist() == [2, 2]


def test_steps_that_nobody_knows(tmp_path: Path) -> None:
    paths = saved(tmp_path, ["early.pt", "late.pt"])
    run = polyak.Trajectory.from_checkpoints(paths)
    assert [block.stop for block in run.blocks] == [1, 2]
    with pytest.raises(OptionError, match="in no order"):
        polyak.Trajectory.from_checkpoints(tmp_path.glob("*.pt"))
    given = polyak.Trajectory.from_checkpoints(paths, steps=[50, 20])
    assert [block.stop for block in given.blocks] == [20, 50]
    assert given.average(polyak.Tail(steps=30))["w"].tolist() == [0, 0]


def test_bad_checkpoints(tmp_path: Path) -> None:
    paths = saved(tmp_path, ["1.pt", "2.pt"])
    for call, error, words in (
        (lambda: polyak.Trajectory.from_checkpoints([]), OptionError, "empty"),
        (
            lambda: polyak.Trajectory.from_checkpoints(paths, steps=[1]),
            OptionError,
            "1 steps were given for 2",
        ),
        (lambda: polyak.Trajectory.from_checkpoints(paths, steps=[1, 1]), OptionError, "both of step 1"),
        (lambda: polyak.Trajectory.from_checkpoints([*paths, tmp_path / "none"]), CheckpointError, "none"),
    ):
        with pytest.raises(error, match=words):
            call()
    torch.save({"w": torch.zeros(3)}, tmp_path / "3.pt")
    with pytest.raises(StructureError, match="3.pt"):
        polyak.Trajectory.from_checkpoints([*paths, tmp_path / "3.pt"])


def test_steps_in_another_order_than_the_names_are_warned_of(tmp_path):
    """Sorted as text epoch-10 comes before epoch-9."""
    for epoch in (8, 9, 10):
        checkpoints.write(tmp_path / f"epoch-{epoch}.pt", {"w": torch.full((1,), float(epoch))})
    paths = sorted(tmp_path.glob("*.pt"))
    with pytest.warns(UserWarning, match="epoch-9.pt is of step 300 and epoch-10.pt of 100"):
        polyak.Trajectory.from_checkpoints(paths, steps=[100, 200, 300])
    polyak.Trajectory.from_checkpoints(paths, steps=[300, 100, 200])


def test_half_precision_checkpoints_may_be_averaged_into_fp32(tmp_path):
    for step, value in enumerate((1.0, 1.0078125), 1):  # neighbours in bf16
        tensors = {
            "w": torch.full((2,), value).bfloat16(),
            "n": torch.tensor(step),
            "d": torch.ones(1).double(),
        }
        checkpoints.write(tmp_path / f"step-{step}.safetensors", tensors)
    run = polyak.Trajectory.from_checkpoints(tmp_path.glob("*.safetensors"))
    wide = run.average("uniform", dtype=torch.float32)
    assert wide["w"].dtype == torch.float32 and wide["w"].tolist() == [1.00390625] * 2
    assert wide["n"].dtype == torch.int64 and wide["d"].dtype == torch.float64
    assert run.average("uniform")["w"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "names", [("model_ema", "model"), ("module",), ("ema", "model"), ("exp_avg", "state")]
)
def test_names_are_the_models_own_whatever_other_tools_mean_by_them(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    """As of a student beside its teacher: neither is the other's average."""
    model = torch.nn.ModuleDict({name: torch.nn.Linear(2, 1) for name in names})
    with polyak.Recorder(model, tmp_path, block=1, max_blocks=8) as run:
        for step in range(1, 21):
            for i, parameter in enumerate(model.parameters()):
                parameter.data.fill_(step + i)
            run.update()
        preview = run.average("uniform")
    found = polyak.Trajectory(tmp_path).average("uniform")
    assert list(found) == list(preview) == list(model.state_dict())
    assert [value.unique().item() for value in found.values()] == [10.5 + i for i in range(len(found))]
    assert polyak.Trajectory(tmp_path).live().keys() == found.keys()
    polyak.Recorder(model, tmp_path, resume=True, block=1).close()


def test_checkpoints_without_steps_are_of_one_step_each(tmp_path):
    for folder, name in (("one", "b"), ("two", "a")):
        (tmp_path / folder).mkdir()
        torch.save({"w": torch.ones(2)}, tmp_path / folder / f"{name}.pt")
    both = polyak.Trajectory.from_checkpoints([tmp_path / "one" / "b.pt", tmp_path / "two" / "a.pt"])
    assert [(block.start, block.stop) for block in both.blocks] == [(0, 1), (1, 2)]
    assert both.name == "one" and repr(both).endswith("one', 2 blocks, steps 0 to 2)")
    assert polyak.Trajectory.from_checkpoints([tmp_path / "two" / "a.pt"]).name == "two"
