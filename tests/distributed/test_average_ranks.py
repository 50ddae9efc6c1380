"""`Average` on two gloo ranks: DDP, FSDP2, and state through torch.distributed.checkpoint."""

from __future__ import annotations

import errno
import json
import resource
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

import oracles
import polyak
from polyak.checkpoints import _base
from polyak.errors import OptionError, OutputExistsError, StructureError
from ranks import run_on_ranks


def model_of(width=5):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 1))


def sharded_model():
    model = model_of()
    for layer in (model[0], model[2]):
        fully_shard(layer)
    return fully_shard(model)


def train(model, averages, steps=10, after=0):
    """SGD on data that depends on the step alone, so that every way of splitting it gives the same weights."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    visited = []
    for step in range(after, after + steps):
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        visited.append({name: full(p).double() for name, p in model.named_parameters()})
        for average in averages:
            average.update()
    return visited


def full(tensor):
    tensor = tensor.detach()
    return tensor.full_tensor().clone() if hasattr(tensor, "full_tensor") else tensor.clone()


def expected_mean(visited, weights):
    return {name: oracles.mean_of([v[name] for v in visited], weights) for name in visited[0]}


def ddp():
    model = model_of()
    wrapped = DistributedDataParallel(model)
    average = polyak.Average(wrapped, polyak.EMA(decay=0.8))
    visited = train(wrapped, [average])
    x = torch.ones(1, 3)
    before = wrapped(x).item()
    with average.applied():
        inside = wrapped(x).item()
    assert wrapped(x).item() == before != inside
    return {n: t.clone() for n, t in average.named_tensors().items()}, expected_mean(
        visited, oracles.ema_decay(0.8)(10)
    )


def test_ddp_averages_under_bare_names_and_sees_the_swap():
    for found, expected in run_on_ranks(ddp):
        assert list(found) == ["0.weight", "0.bias", "2.weight", "2.bias"]
        for name, value in found.items():
            torch.testing.assert_close(value.double(), expected[f"module.{name}"], rtol=0, atol=1e-6)


def fsdp():
    model = sharded_model()
    averages = [
        polyak.Average(model, polyak.Uniform()),
        polyak.Average(model, polyak.EMA(decay=0.8), compensated=True),
    ]
    visited = train(model, averages)
    held = sum(t.to_local().numel() for t in averages[0].named_tensors().values())
    found = [{n: full(t) for n, t in a.named_tensors().items()} for a in averages]
    x = torch.ones(1, 3)
    before, live = model(x).item(), {n: full(p) for n, p in model.named_parameters()}
    with averages[0].applied():
        inside = model(x).item()
    reference = model_of()
    reference.load_state_dict(found[0])
    assert inside == pytest.approx(reference(x).item(), abs=1e-6)
    with averages[0].applied(share=0.25):
        blend = {n: full(p) for n, p in model.named_parameters()}
    for name, value in blend.items():
        torch.testing.assert_close(value, 0.25 * found[0][name] + 0.75 * live[name], rtol=0, atol=1e-6)
    model(x)  # leaves the root gathered
    averages[0].update()
    assert model(x).item() == before
    assert all(torch.equal(full(p), live[n]) for n, p in model.named_parameters())
    return held, found, [expected_mean(visited, w(10)) for w in (oracles.uniform, oracles.ema_decay(0.8))]


def test_fsdp2_averages_each_shard_where_it_is():
    results = run_on_ranks(fsdp)
    total = sum(p.numel() for p in model_of().parameters())
    assert sum(held for held, _, _ in results) == total, "every element is held on exactly one rank"
    for _, found, expected in results:
        for one, other in zip(found, expected, strict=True):
            for name, value in one.items():
                torch.testing.assert_close(value.double(), other[name], rtol=0, atol=1e-6)


def poisoned_shard():
    model = sharded_model()
    average = polyak.Average(model, polyak.Uniform())
    train(model, [average], steps=2)
    before = {n: full(t) for n, t in average.named_tensors().items()}
    if dist.get_rank() == 1:
        with torch.no_grad():
            model[0].weight.to_local()[0, 0] = float("nan")
    average.update()
    assert (average.n_averaged, average.n_skipped) == (2, 1)
    assert all(torch.equal(full(t), before[n]) for n, t in average.named_tensors().items())
    return True


def test_a_nan_on_one_rank_is_skipped_on_all():
    assert run_on_ranks(poisoned_shard) == [True, True]


def followers(folder, model, resume=False):
    average = polyak.Average(model, polyak.EMA(half_life=5), every=2)
    return average, polyak.Recorder(model, Path(folder) / "run", every=2, block=8, resume=resume)


def state_of(model, average, recorder):
    return {"average": average.state_dict(), "recording": recorder.state_dict(), "model": model.state_dict()}


def save_sharded(folder):
    model = sharded_model()
    average, recorder = followers(folder, model)
    train(model, [average, recorder])
    dcp.save(state_of(model, average, recorder), checkpoint_id=folder)
    visited = train(model, [average, recorder], after=10)
    recorder.close()
    return found(average, recorder), visited[-1]


def found(average, recorder):
    return {n: full(t) for n, t in average.named_tensors().items()}, recorder.trajectory.average("uniform")


def load_sharded(folder):
    return resume(folder, sharded_model())


def resume(folder, model):
    average, recorder = followers(folder, model, resume=True)
    state = state_of(model, average, recorder)
    dcp.load(state, checkpoint_id=folder)
    model.load_state_dict(state["model"])
    average.load_state_dict(state["average"])
    recorder.load_state_dict(state["recording"])
    assert average.n_averaged == 5
    visited = train(model, [average, recorder], after=10)
    recorder.close()
    return found(average, recorder), visited[-1]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # the load in this one process
def test_state_goes_through_distributed_checkpoints_to_another_number_of_ranks(tmp_path):
    """As torchtitan's loop does it: the model, its average and the recording of its run in one checkpoint."""
    ((whole, recorded), last), _ = run_on_ranks(save_sharded, str(tmp_path))
    for (resumed, again), end in run_on_ranks(load_sharded, str(tmp_path)):
        assert all(torch.equal(end[n], last[n]) for n in last)
        assert all(torch.equal(resumed[n], whole[n]) for n in whole), "bitwise as if never interrupted"
        assert all(torch.equal(again[n], recorded[n]) for n in recorded)
    (alone, again), end = resume(str(tmp_path), model_of())
    for name in whole:
        torch.testing.assert_close(alone[name], whole[name], rtol=0, atol=1e-6)
        torch.testing.assert_close(again[name], recorded[name], rtol=0, atol=1e-6)


def save_average(folder):
    model = sharded_model()
    average = polyak.Average(model, polyak.Uniform())
    train(model, [average], steps=3)
    average.save(folder)
    with pytest.raises(FileExistsError):
        average.save(folder)
    return {n: full(t) for n, t in average.named_tensors().items()}


@pytest.mark.slow
def test_a_sharded_average_is_saved_without_gathering(tmp_path):
    from polyak import checkpoints

    expected, _ = run_on_ranks(save_average, str(tmp_path / "average"))
    with checkpoints.open(tmp_path / "average") as saved:
        assert list(saved.tensors) == list(expected)
        assert all(torch.equal(saved.read(name), value) for name, value in expected.items())


class Tied(nn.Module):
    """Rows that two ranks cannot share evenly, one weight under two names, a single number, and a buffer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Embedding(7, 4)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.tensor([0.5]))
        self.register_buffer("n_seen", torch.tensor(4))

    def forward(self, tokens):
        return self.head(self.mix(self.embed(tokens)) * self.scale)


def save_file(folder):
    folder = Path(folder)
    model = Tied()
    fully_shard(model, shard_placement_fn=lambda p: Shard(1) if p is model.mix.weight else Shard(0))
    average = polyak.Average(model, polyak.EMA(half_life=3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(4):
        model(torch.arange(7)).square().mean().backward()
        optimizer.step()
        average.update()
    average.save(folder / "average.safetensors")
    with pytest.raises(OutputExistsError, match="exists already"):
        average.save(folder / "average.safetensors")
    average.save(folder / "average.safetensors", overwrite=True)
    with pytest.raises(OptionError, match=r"only one process can write: write \.safetensors"):
        average.save(folder / "average.pt")
    refuse_stages(folder / "stages.safetensors")
    return {n: full(t) for n, t in average.named_tensors().items()}


def refuse_stages(path):
    """Two stages of a pipeline, each with a mesh of its own."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("stage", "shard"))["shard"]
    model = nn.Sequential(OrderedDict([(f"stage{dist.get_rank()}", nn.Linear(2, 2))]))
    average = polyak.Average(fully_shard(model, mesh=mesh), polyak.Uniform())
    average.update()
    with pytest.raises(StructureError, match="ranks hold different tensors, as the stages of a pipeline"):
        average.save(path)


def test_a_sharded_average_becomes_one_file(tmp_path):
    """Uneven shards, columns, a number that one rank has nothing of, ties and buffers."""
    expected, _ = run_on_ranks(save_file, str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["average.safetensors"]
    found = load_file(tmp_path / "average.safetensors")
    assert found.keys() == expected.keys() and "n_seen" in found
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    with polyak.checkpoints.open(tmp_path / "average.safetensors") as checkpoint:
        assert checkpoint.ties == {"head.weight": "embed.weight"}
        assert json.loads(checkpoint.metadata["polyak"])["scheme"] == "ema:half_life=3"


def write_unwritable(folder):
    """What each rank is told where the second one alone holds what cannot be written."""
    tensors, wrong = {"a": torch.ones(2), "step": torch.ones(2)}, [3, torch.ones(2).to_sparse()]
    calls = [(tensors | {"step": value}, {}) for value in wrong] + [(tensors, {"b": "none"})]
    told = []
    for name in ("out", "out.safetensors"):
        for call, ties in calls if dist.get_rank() == 1 else [(tensors, {})] * len(calls):
            with pytest.raises(polyak.PolyakError) as caught:
                polyak.checkpoints.write_sharded(Path(folder) / name, call, ties=ties)
            told.append(str(caught.value))
    return told


def test_what_one_rank_cannot_write_is_refused_on_all(tmp_path):
    others, own = run_on_ranks(write_unwritable, str(tmp_path))
    reasons = [
        "'step' are no tensors",
        "'step' are sparse or on the meta device",
        "'b' cannot be tied to 'none'",
    ]
    for reason, refused, given_up in zip(2 * reasons, own, others, strict=True):
        assert reason in refused and reason in given_up
        assert "given up on every rank, because it failed on rank 1" in given_up
    assert not list(tmp_path.iterdir())


def save_and_fail(folder):
    model = sharded_model()
    average = polyak.Average(model, polyak.Uniform())
    train(model, [average], steps=1)
    path, original = Path(folder) / "average.safetensors", _base.write_all
    path.write_text("what was there")

    def disk_full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    if dist.get_rank() == 1:
        _base.write_all = disk_full
    with pytest.raises(polyak.PolyakError) as caught:
        average.save(path, overwrite=True)
    _base.write_all = original
    left = [entry.name for entry in Path(folder).iterdir()], path.read_text()
    dist.barrier()
    average.save(path, overwrite=True)  # also has all imported and set up once that a save needs
    return str(caught.value), left, save_large(Path(folder) / "large.safetensors")


def save_large(path):
    """How much a save has the process grow."""
    average = polyak.Average(
        fully_shard(nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(16)))), polyak.Uniform()
    )
    average.update()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    average.save(path)
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


@pytest.mark.slow
def test_a_rank_that_fails_leaves_no_file_and_none_takes_a_copy_of_the_model(tmp_path):
    (first, left, grown), (second, _, other_grown) = run_on_ranks(save_and_fail, str(tmp_path))
    assert "given up on every rank, because it failed on rank 1" in first
    assert "No space left" in first and "No space left" in second
    assert left == (["average.safetensors"], "what was there")
    assert load_file(tmp_path / "average.safetensors")
    size = (tmp_path / "large.safetensors").stat().st_size
    assert size > 64e6 and max(grown, other_grown) < 0.1 * size


def shard_after_start():
    model = model_of()
    average = polyak.Average(model, polyak.Uniform())
    average.update()
    for layer in (model[0], model[2]):
        fully_shard(layer)
    assert isinstance(fully_shard(model), FSDPModule)
    with pytest.raises(StructureError, match=r"has .0\.weight. as \(5, 3\) sharded as"):
        average.update()
    fresh = polyak.Average(model, polyak.Uniform())
    fresh.update()
    return fresh.n_averaged


@pytest.mark.slow
def test_a_model_sharded_halfway_is_refused():
    assert run_on_ranks(shard_after_start) == [1, 1]


def hybrid():
    model = model_of()
    fully_shard(model, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard")))
    average = polyak.Average(model, polyak.Uniform())
    visited = train(model, [average], steps=4)
    return {n: full(t) for n, t in average.named_tensors().items()}, expected_mean(
        visited, oracles.uniform(4)
    )


@pytest.mark.slow
def test_hybrid_sharding():
    for found, expected in run_on_ranks(hybrid):
        for name, value in found.items():
            torch.testing.assert_close(value.double(), expected[name], rtol=0, atol=1e-6)
