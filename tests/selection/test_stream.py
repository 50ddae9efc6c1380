"""Averages made one after the other equal those made alone, and are never all in memory."""

import gc
import weakref

import pytest
import torch

from polyak import Decay, Power, Tail, Uniform, Weights
from polyak.selection._select import averages
from polyak.trajectory import Trajectory
from recorded_runs import RecordedWalk, largest_error


@pytest.fixture
def recorded(tmp_path):
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


def test_nested_tails_are_the_averages_that_the_trajectory_makes_alone(recorded, little_memory):
    tails = [Tail(1.0), Tail(0.02), Tail(steps=3), Tail(0.31), Tail(0.3), Tail(steps=200)]
    found = dict(streamed(recorded, tails))
    assert set(found) == set(tails)
    for tail, weights in found.items():
        alone = recorded.average(tail)
        assert weights.keys() == alone.keys()
        assert largest_error(weights, {n: t.double() for n, t in alone.items()}) < 2e-7
        assert weights["1.num_batches_tracked"] == alone["1.num_batches_tracked"]


def test_nested_tails_read_each_block_about_once(recorded, monkeypatch, little_memory):
    reads = []
    coefficients = Trajectory._coefficients

    def watched(self, profile):
        found = coefficients(self, profile)
        reads.extend(index for index, a in enumerate(found) if a)
        return found

    monkeypatch.setattr(Trajectory, "_coefficients", watched)
    tails = [Tail(f / 20) for f in range(1, 21)]
    assert len(list(streamed(recorded, tails))) == 20
    # A tail that ends inside a block reads that block again for the next one.
    assert set(reads) == set(range(len(recorded.blocks)))
    assert len(reads) <= len(recorded.blocks) + len(tails)


def test_what_fits_the_memory_is_made_in_one_pass(recorded, passes):
    profiles = [Tail(0.5), Power(gamma=1), Tail(0.25)]
    found = dict(streamed(recorded, profiles))
    assert passes == [3] and list(found) == profiles
    for profile in profiles:
        alone = recorded.average(profile)
        assert largest_error(found[profile], {n: t.double() for n, t in alone.items()}) == 0


def test_the_others_come_in_chunks_that_fit_the_memory(recorded, passes, monkeypatch):
    monkeypatch.setattr("polyak.selection._select._TOGETHER_BYTES", 1000)
    size = sum(tensor.nbytes for tensor in recorded.average(Uniform()).values())
    assert recorded.average_bytes == size
    together = 1000 // size
    assert 1 < together < 10
    profiles = [Power(gamma=gamma) for gamma in range(1, 8)] + [
        Decay("sqrt", 0.4),
        Weights([1.0] * len(recorded)),
    ]
    found = dict(streamed(recorded, profiles))
    assert list(found) == profiles and max(passes) == together
    for profile in profiles:
        alone = recorded.average(profile)
        assert largest_error(found[profile], {n: t.double() for n, t in alone.items()}) == 0


def test_of_tails_one_is_in_memory_at_a_time(recorded, little_memory):
    seen = []
    explained = [recorded.explain(Tail(f / 10)) for f in range(1, 11)]
    for _, weights in averages(recorded, explained):
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
