"""The merge policy, on lengths alone: its bounds hold for any run."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyak import EMA, Tail
from polyak.trajectory import Block
from polyak.trajectory._explain import explain
from polyak.trajectory._policy import (
    BackgroundWriter,
    Pace,
    block_steps_after,
    pair_to_merge,
    steps_worth_writing,
)

FLOOR = 0.02


class Simulation:
    """What a recorder does to lengths, without the weights."""

    def __init__(self, first: int = 1, max_blocks: int = 64):
        self.first, self.max_blocks = first, max_blocks
        self.lengths: list[int] = []
        self.writes = 0
        self.kept_edge = 0

    @property
    def base(self) -> int:
        return block_steps_after(sum(self.lengths), self.first)

    def record(self, partial: int | None = None) -> None:
        run = sum(self.lengths)
        self.lengths.append(partial or self.base - run % self.base)
        self.writes += 1
        while (index := self._pair()) is not None:
            self.lengths[index : index + 2] = [self.lengths[index] + self.lengths[index + 1]]
            self.writes += 1

    def _pair(self) -> int | None:
        kept = set(np.flatnonzero(np.cumsum(self.lengths)[:-1] == self.kept_edge).tolist())
        return pair_to_merge(self.lengths, self.max_blocks, kept)

    def coarseness(self) -> float:
        """The largest len/(d + 0.02 T) of a block that is longer than a new one."""
        lengths = np.array(self.lengths)
        run = lengths.sum()
        distance = run - np.cumsum(lengths)
        long = lengths > self.base
        return float((lengths / (distance + FLOOR * run))[long].max(initial=0))


def test_a_million_base_blocks() -> None:
    run = Simulation()
    worst = 0.0
    while sum(run.lengths) < 1_000_000:
        run.record()
        worst = max(worst, run.coarseness())
        assert len(run.lengths) <= 64
    assert worst <= 0.131
    assert run.writes <= 12_300
    assert sum(run.lengths) / 1024 <= run.base <= sum(run.lengths) / 512


@settings(deadline=None, max_examples=25)
@given(
    first=st.integers(1, 1000),
    max_blocks=st.integers(32, 128),
    blocks=st.integers(1, 1500),
    interruptions=st.sets(st.integers(1, 1500), max_size=5),
    seed=st.integers(0, 99),
)
def test_bounds(first: int, max_blocks: int, blocks: int, interruptions: set[int], seed: int) -> None:
    """Also where blocks were cut short because the run was interrupted."""
    run = Simulation(first, max_blocks)
    short = np.random.default_rng(seed).integers(1, first + 1, size=blocks + 1)
    for number in range(1, blocks + 1):
        run.record(int(short[number]) if number in interruptions else None)
        assert len(run.lengths) <= max_blocks
        assert run.coarseness() <= 8.4 / max_blocks


@settings(deadline=None, max_examples=15)
@given(blocks=st.integers(100, 1500), edge=st.floats(0, 1))
def test_an_edge_that_stays_costs_little(blocks: int, edge: float) -> None:
    run = Simulation()
    run.kept_edge = int(edge * blocks)
    for _ in range(blocks):
        run.record()
        stops = np.cumsum(run.lengths)
        assert run.kept_edge == 0 or run.kept_edge > stops[-1] or run.kept_edge in stops or run.base > 1
        assert len(run.lengths) <= 64
        assert run.coarseness() <= 0.14


@pytest.mark.parametrize("steps", [5_000, 70_000])
def test_what_profiles_lose(steps: int) -> None:
    run = Simulation()
    while sum(run.lengths) < steps:
        run.record()
    stops = np.cumsum(run.lengths).tolist()
    blocks = [
        Block(stop - length, stop, count=length) for stop, length in zip(stops, run.lengths, strict=True)
    ]
    for fraction in np.linspace(0.03, 1, 50):
        assert explain(Tail(float(fraction)), blocks).misplaced_weight <= 0.06
    for half_life, most in ((0.01, 0.05), (0.05, 0.03), (0.2, 0.025)):
        assert explain(EMA(half_life=half_life * steps), blocks).misplaced_weight <= most


def test_the_newest_merge_where_they_are_fine_beside_the_length_of_the_run() -> None:
    assert pair_to_merge([100, 100, 1, 1], 3) == 2
    assert pair_to_merge([100, 100, 40, 40], 3) == 0


def test_nothing_to_merge() -> None:
    assert pair_to_merge([1] * 64, 64) is None
    assert pair_to_merge([1, 1, 1], 2, kept={0, 1}) is None


@settings(deadline=None, max_examples=50)
@given(lengths=st.lists(st.integers(1, 60), min_size=2, max_size=9), kept=st.sets(st.integers(0, 7)))
def test_the_finest_pair_for_its_age_merges(lengths: list[int], kept: set[int]) -> None:
    run = sum(lengths)
    coarseness = {
        i: Fraction(lengths[i] + lengths[i + 1]) / (sum(lengths[i + 2 :]) + Fraction(run, 50))
        for i in range(len(lengths) - 1)
        if i not in kept
    }
    chosen = pair_to_merge(lengths, len(lengths) - 1, kept & set(range(len(lengths) - 1)))
    assert pair_to_merge(lengths, len(lengths)) is None
    assert (chosen is None) == (not coarseness)
    if chosen is not None:
        assert float(coarseness[chosen]) == pytest.approx(float(min(coarseness.values())), rel=1e-12)


@pytest.mark.parametrize(
    ("seconds_per_step", "write_seconds", "steps"),
    [
        (0.25, 0.02, 4),
        (0.25, 0.021, 8),
        (0.25, 0.16, 32),
        (0.0, 1.0, 4),
        (-1.0, 1.0, 4),
        (1.0, 0.0, 4),
        (1.0, -1.0, 4),
    ],
)
def test_blocks_take_fifty_times_longer_to_train_than_to_write(
    seconds_per_step: float, write_seconds: float, steps: int
) -> None:
    assert steps_worth_writing(4, seconds_per_step, write_seconds) == steps


def test_the_pace_is_that_of_the_steps_since_the_last_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    pace = Pace(4)
    for _ in range(2):  # what comes between is no step
        for _ in range(5):
            pace.tick()
            now += 0.25
        now += 1000
        pace.restart()
    assert (pace.block_steps(), str(pace)) == (4, "0 s to train and 0 s to write")
    pace.stop()
    now = 1.0
    for _ in range(5):
        pace.tick()
        now += 0.25
    now -= 0.25
    pace.stop()
    assert pace.block_steps() == 4
    for seconds in (None, 0.16, 5.0, None, 0.021):
        pace.wrote(seconds)
        assert pace.block_steps() == {None: 4, 0.16: 32, 5.0: 32, 0.021: 8}[seconds] or seconds is None
    assert str(pace) == "2 s to train and 0.021 s to write"
    pace.tick()
    pace.stop()  # not one step was taken
    assert pace.block_steps() == 8


def test_a_job_says_how_long_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 10.0
    monkeypatch.setattr("time.perf_counter", lambda: now)

    def job() -> None:
        nonlocal now
        now += 2.5

    writer = BackgroundWriter()
    assert writer.wait() is None
    writer.submit(job)
    assert writer.wait() == 2.5
    writer.stop()
