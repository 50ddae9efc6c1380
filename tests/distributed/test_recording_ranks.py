"""`Recorder` on gloo ranks: a sharded model in one folder, like any other recording once it is written."""

from __future__ import annotations

import itertools
import os
import signal
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import polyak
from polyak import checkpoints
from polyak._distributed import shard_runs
from polyak.errors import CheckpointError, StateError, StructureError
from polyak.trajectory import _blocks
from ranks import run_on_ranks


def plain_model():
    """Sizes that two ranks share unevenly, ties, a frozen layer and buffers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 5), nn.Linear(5, 1))
    model[2].weight.requires_grad_(False)
    model[3].register_buffer("calls", torch.tensor(0))
    return model


def sharded(model):
    for layer in (model[0], model[2]):
        fully_shard(layer)
    return fully_shard(model)


def train(model, recorder, steps, after=0, poisoned=()):
    """SGD on data that depends on the step alone; in steps that are poisoned one rank's shard has a NaN."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(after + 1, after + steps + 1):
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        model[3].calls += 1
        if step in poisoned:
            part = model[0].weight.data
            part = part.to_local() if hasattr(part, "to_local") else part
            kept = part.clone()
            if not dist.is_initialized() or dist.get_rank() == 1:
                part[0, 0] = float("nan")
        recorder.update(loss=loss.detach())
        if step in poisoned:
            part.copy_(kept)


def record(folder, build, steps=23, poisoned=(), **options):
    model = build(plain_model())
    with polyak.Recorder(model, folder, every=2, block=4, max_blocks=8, **options) as run:
        train(model, run, steps, poisoned=poisoned)
    return model


def recorded_by_ranks(folder, poisoned):
    record(folder, sharded, steps=70, poisoned=poisoned)
    trajectory = polyak.Trajectory(folder)
    return trajectory.average("blend:0.7:tail:0.5"), trajectory.live()


@pytest.mark.parametrize(
    "poisoned",
    [pytest.param((), marks=pytest.mark.slow), (6, 42)],
    ids=["whole", "with NaNs on one rank"],
)
def test_a_sharded_run_is_recorded_as_a_whole_one(tmp_path, poisoned):
    found = run_on_ranks(recorded_by_ranks, str(tmp_path / "sharded"), poisoned)
    record(tmp_path / "plain", lambda model: model, steps=70, poisoned=poisoned)
    plain, together = (polyak.Trajectory(tmp_path / name) for name in ("plain", "sharded"))
    assert [(str(b), b.count, b.skipped) for b in together.blocks] == [
        (str(b), b.count, b.skipped) for b in plain.blocks
    ]
    assert len(together.blocks) == 8 and sum(block.skipped for block in together.blocks) == len(poisoned)
    assert sorted(p.name for p in (tmp_path / "plain").iterdir()) == sorted(
        p.name for p in (tmp_path / "sharded").iterdir()
    )
    expected = plain.average("blend:0.7:tail:0.5"), plain.live()
    for weights, reference in zip(
        [*found, (together.average("blend:0.7:tail:0.5"), together.live())], [expected] * 3, strict=True
    ):
        for ours, theirs in zip(weights, reference, strict=True):
            assert list(ours) == list(theirs)
            for name, value in ours.items():
                torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-6, msg=name)
    loss = [block.metrics["loss"].mean for block in together.blocks]
    assert loss == pytest.approx([block.metrics["loss"].mean for block in plain.blocks], rel=1e-4)
    choice = polyak.select(
        together,
        plain_model(),
        score=lambda m: m(torch.ones(1, 3)).sum(),
        mode="min",
        recalibrate=[torch.randn(8, 3)],
        progress=False,
    )
    assert choice.table


def resumed_by_ranks(folder):
    model = sharded(plain_model())
    run = polyak.Recorder(model, folder, every=2, block=4)
    train(model, run, 11)
    state = run.state_dict()
    assert hasattr(state["open_block"]["0.weight"], "full_tensor")
    weights = get_model_state_dict(model)
    state, weights = ({**s} for s in (state, weights))
    state["open_block"] = {name: value.clone() for name, value in state["open_block"].items()}
    weights = {name: value.clone() for name, value in weights.items()}
    train(model, run, 12, after=11)
    run.close()
    uninterrupted = polyak.Trajectory(folder).average("uniform")

    again = sharded(plain_model())
    with polyak.Recorder(again, folder, every=2, block=4, resume=True) as second:
        set_model_state_dict(again, weights)
        second.load_state_dict(state)
        train(again, second, 12, after=11)
    resumed = polyak.Trajectory(folder).average("uniform")
    return all(torch.equal(value, resumed[name]) for name, value in uninterrupted.items())


def test_a_resumed_sharded_recording_is_bitwise_the_same(tmp_path):
    assert run_on_ranks(resumed_by_ranks, str(tmp_path / "run")) == [True, True]


def columns(model):
    """Sharded by columns where a matrix has an even number of them, so that a rank's part lies in many places."""

    def placed(parameter):
        return Shard(1) if parameter.ndim == 2 and parameter.shape[1] % 2 == 0 else None

    return fully_shard(model, shard_placement_fn=placed)


def wide_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 6), nn.Linear(6, 1))
    model[3].register_buffer("calls", torch.tensor(0))
    return model


def previewed(folder, build, model, keep_in_memory):
    """What ``applied`` shows of a run under way, as whole tensors, and whether it left the model as it was."""
    warnings.simplefilter("ignore")
    model = build(model)
    run = polyak.Recorder(model, folder, every=2, block=4, max_blocks=8, keep_in_memory=keep_in_memory)
    found = []
    for done, steps in ((0, 7), (7, 43)):
        train(model, run, steps, after=done)
        before = [p.detach().clone() for p in model.parameters()]
        for profile in ("uniform", "decay:sqrt:0.4", "blend:0.3:tail:steps=3"):
            with run.applied(profile):
                weights = {name: whole(p.detach()).clone() for name, p in model.named_parameters()}
                model(torch.ones(2, 3))
            averaged = {name: whole(tensor) for name, tensor in run.average(profile).items()}
            assert all(torch.equal(averaged[name], value) for name, value in weights.items())
            found.append(weights)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    run.close()
    return found


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def previews_by_ranks(folder):
    return [
        previewed(f"{folder}-{keep}-{build.__name__}", build, model(), keep)
        for build, model in ((sharded, plain_model), (columns, wide_model))
        for keep in (0, "1MB")
    ]


@pytest.mark.slow
def test_an_average_of_the_run_so_far_is_put_into_a_sharded_model_part_by_part(tmp_path):
    by_rank = run_on_ranks(previews_by_ranks, str(tmp_path / "run"))
    plain = [
        previewed(tmp_path / name, lambda model: model, model(), 0)
        for name, model in (("plain", plain_model), ("wide", wide_model))
    ]
    for found in by_rank:
        for one, expected in zip(found, [plain[0], plain[0], plain[1], plain[1]], strict=True):
            for ours, theirs in zip(one, expected, strict=True):
                assert ours.keys() == theirs.keys()
                for name, value in ours.items():
                    torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-6, msg=name)


def damaged_previews(folder):
    model = sharded(plain_model())
    run = polyak.Recorder(model, folder, every=2, block=4)
    train(model, run, 14)
    path = run.directory / run.trajectory.blocks[1].file_name
    dist.barrier()
    if dist.get_rank() == 0:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    dist.barrier()
    before = [p.to_local().clone() for p in model.parameters()]
    try:
        with run.applied("uniform"):
            pass
    except CheckpointError as error:
        same = all(torch.equal(p.to_local(), q) for p, q in zip(model.parameters(), before, strict=True))
        return f"{path.name} is corrupt" in str(error) and same
    finally:
        run._release()


@pytest.mark.slow
def test_a_damaged_block_is_found_by_all_ranks_though_each_reads_a_part(tmp_path):
    assert run_on_ranks(damaged_previews, str(tmp_path / "run")) == [True, True]


def refused_by_ranks(folder):
    messages = []

    def refused(error, call):
        try:
            call()
        except error as found:
            messages.append(str(found))
        else:
            raise AssertionError("nothing was refused")

    model = sharded(plain_model())
    run = polyak.Recorder(model, folder, every=2, block=4)
    refused(StateError, lambda: polyak.Recorder(model, folder, every=2, block=4))
    train(model, run, 10)
    run.close()
    refused(StateError, lambda: polyak.Recorder(model, folder, every=2, block=4))
    refused(StateError, lambda: polyak.Recorder(model, folder, every=1, block=4, resume=True))
    other = fully_shard(nn.Linear(2, 2))
    refused(StateError, lambda: polyak.Recorder(other, folder, every=2, block=4, resume=True))
    refused(StateError, lambda: polyak.Recorder(model, folder, every=2, block=4, step=5))
    elsewhere = f"{folder}-{dist.get_rank()}"
    refused(polyak.PolyakError, lambda: polyak.Recorder(model, elsewhere, every=2, block=4, resume=True))
    later = plain_model()
    run = polyak.Recorder(later, f"{folder}-{dist.get_rank()}", every=2, block=4)
    sharded(later)
    refused(StructureError, lambda: train(later, run, 2))
    run._release()
    return messages


def test_what_is_refused_is_refused_on_all_ranks_alike(tmp_path):
    first, second = run_on_ranks(refused_by_ranks, str(tmp_path / "run"))
    assert "not the folder that the first rank records into" in first[5] and first[5] != second[5]
    del first[5], second[5]
    assert first == second
    for message, expected in zip(
        first,
        [
            "is being recorded by another",
            "holds a run already",
            "every=2, not 1",
            "another model",
            "lies across",
            "no longer the one",
        ],
        strict=True,
    ):
        assert expected in message


def adapters_by_ranks(folder):
    """Trained plain tensors on a frozen base that is sharded, as LoRA over FSDP2 has them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 5))
    base = {name: value.clone() for name, value in model[0].state_dict().items()}
    model[0].requires_grad_(False)
    fully_shard(model, ignored_params=set(model[1].parameters()))
    average = polyak.Average(model, polyak.Uniform())
    with polyak.Recorder(model, folder, block=2) as run:
        for value in (1.0, 3.0, 5.0, 7.0):
            model[1].weight.data.fill_(value)
            average.update()
            run.update()
    average.save(f"{folder}-average")
    found = polyak.Trajectory(folder).average("tail:0.5")
    kept = checkpoints.open(f"{folder}-average")
    return (
        found["1.weight"].unique().tolist(),
        all(torch.equal(found[f"0.{name}"], value) for name, value in base.items()),
        kept.read("1.weight").unique().tolist(),
        all(torch.equal(kept.read(f"0.{name}"), value) for name, value in base.items()),
    )


@pytest.mark.slow
def test_plain_adapters_of_a_sharded_base_are_recorded_with_all_of_it(tmp_path):
    assert run_on_ranks(adapters_by_ranks, str(tmp_path / "run")) == [([6.0], True, [4.0], True)] * 2


def twice_sharded(folder):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = nn.Sequential(nn.Linear(4, 8, bias=False))
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    try:
        polyak.Recorder(model, folder)
    except StructureError as error:
        return str(error)


@pytest.mark.slow
def test_a_dimension_that_is_sharded_twice_is_refused_at_once(tmp_path):
    for message in run_on_ranks(twice_sharded, str(tmp_path / "run"), ranks=4):
        assert "0.weight" in message and "only of Shard and Replicate can it be told" in message


def failing_by_ranks(folder):
    model = sharded(plain_model())
    run = polyak.Recorder(model, folder, every=2, block=4)
    train(model, run, 8)
    run.trajectory  # noqa: B018 (waits)
    if dist.get_rank() == 1:  # the disk is full there

        def full(*_):
            raise CheckpointError("no space left")

        checkpoints._base._PartWriter._write = full
    kinds = []
    for call in (lambda: train(model, run, 8, after=8), run.close):
        try:
            call()
        except polyak.PolyakError as error:
            kinds.append((type(error).__name__, "no space left" in str(error)))
    return kinds


@pytest.mark.slow
def test_a_rank_that_cannot_write_stops_all_and_what_was_written_stays(tmp_path):
    first, second = run_on_ranks(failing_by_ranks, str(tmp_path / "run"))
    assert second == [("CheckpointError", True)] * 2
    assert first == [("PolyakError", True)] * 2  # which names the rank and what it said
    assert [str(block) for block in polyak.Trajectory(tmp_path / "run").blocks] == ["(0, 4]", "(4, 8]"]
    assert not list((tmp_path / "run").glob(".polyak-*"))


def frozen_parameters_moved(folder):
    model = sharded(plain_model())
    first = polyak.Recorder(model, folder, every=2, block=4)
    train(model, first, 8)
    before = model[2].weight.to_local().clone()
    with torch.no_grad():  # as a momentum encoder is, by hand
        model[2].weight.to_local().add_(1.0)
    first.close()
    kept = polyak.Trajectory(folder).live()["2.weight"]
    changed = torch.equal(model[2].weight.full_tensor(), kept)
    with torch.no_grad():
        model[2].weight.to_local().copy_(before)

    again = polyak.Recorder(model, folder, every=2, block=4, step=8)
    train(model, again, 8, after=8)
    again.trajectory  # noqa: B018 (waits)
    if dist.get_rank() == 1:  # its disk is gone

        def unreadable(*_, **__):
            raise CheckpointError("cannot read")

        _blocks.open_stored = unreadable
    try:
        again.close()
    except polyak.PolyakError as error:
        return changed, type(error).__name__, "cannot read" in str(error)


@pytest.mark.slow
def test_frozen_parameters_that_were_moved_are_written_anew_or_all_ranks_raise(tmp_path):
    first, second = run_on_ranks(frozen_parameters_moved, str(tmp_path / "run"))
    assert first == (True, "PolyakError", True) and second == (True, "CheckpointError", True)


def left_by_an_error(folder):
    model = sharded(plain_model())
    try:
        with polyak.Recorder(model, folder, every=2, block=4) as run:
            train(model, run, 10)
            if dist.get_rank() == 0:
                raise ValueError("on one rank only")
            run.trajectory  # noqa: B018 (the others go on)
    except ValueError:
        return "left"
    finally:
        run._release()
    return "closed"


def test_an_error_on_one_rank_does_not_wait_for_the_others(tmp_path):
    # Rank 1 closes alone, and learns that the other one is gone.
    with pytest.raises(AssertionError, match="another rank was lost"):
        run_on_ranks(left_by_an_error, str(tmp_path / "run"), timeout_seconds=60)
    assert [str(block) for block in polyak.Trajectory(tmp_path / "run").blocks] == ["(0, 4]", "(4, 8]"]


PLACEMENTS = [
    ([Shard(0)], (4,)),
    ([Shard(1)], (4,)),
    ([Replicate()], (4,)),
    ([Shard(0), Shard(1)], (2, 2)),
    ([Shard(1), Shard(0)], (2, 2)),
    ([Replicate(), Shard(0)], (2, 2)),
    ([Shard(2), Replicate()], (2, 2)),
    ([Shard(0), Shard(0)], (2, 2)),
]
SHAPES = [(7,), (5, 3), (3, 5, 2), (1, 9), (4, 4, 4)]


def runs_of_ranks():
    found = []
    for (placements, sizes), shape in itertools.product(PLACEMENTS, SHAPES):
        if any(p.is_shard() and p.dim >= len(shape) for p in placements):
            continue
        mesh = init_device_mesh("cpu", sizes)
        whole = torch.arange(float(torch.Size(shape).numel())).view(shape)
        tensor = distribute_tensor(whole, mesh, placements)
        parts = [
            (start, values.tolist())
            for start, values in shard_runs(tensor.to_local(), tensor, dist.get_rank() == 0)
        ]
        found.append(((str(placements), shape), parts))
    return found


def test_every_element_of_a_sharded_tensor_is_given_out_once_by_its_place():
    by_rank = run_on_ranks(runs_of_ranks, ranks=4)
    for cases in zip(*by_rank, strict=True):
        (what, shape) = cases[0][0]
        numel = torch.Size(shape).numel()
        values = [None] * numel
        for _, parts in cases:
            for start, run in parts:
                assert values[start : start + len(run)] == [None] * len(run), (what, shape)
                values[start : start + len(run)] = run
        assert values == list(map(float, range(numel))), (what, shape)


def killed_by_rank(folder, rank):
    model = sharded(plain_model())
    run = polyak.Recorder(model, folder, every=2, block=4)
    train(model, run, 9)
    run.trajectory  # noqa: B018 (waits)
    dist.barrier()
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(model, run, 9, after=9)


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_rank_loses_the_open_block_at_most(tmp_path, rank):
    with pytest.raises(AssertionError, match="failed"):
        run_on_ranks(killed_by_rank, str(tmp_path / "run"), rank, timeout_seconds=60)
    trajectory = polyak.Trajectory(tmp_path / "run")
    assert [str(block) for block in trajectory.blocks] == ["(0, 4]", "(4, 8]"]
    record(tmp_path / "plain", lambda model: model, steps=8)
    expected = polyak.Trajectory(tmp_path / "plain").average("uniform")
    for name, value in trajectory.average("uniform").items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
