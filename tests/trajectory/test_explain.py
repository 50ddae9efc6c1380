"""What a profile comes to on blocks, counted by hand."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest

from polyak import EMA, Blend, Decay, Tail, Weights, Window
from polyak.profiles import Profile
from polyak.trajectory import Block, Summary
from polyak.trajectory._explain import explain

EVEN = [Block(0, 60, count=60), Block(60, 100, count=40)]
UNEVEN = [Block(0, 60, count=6), Block(60, 100, count=40)]


@pytest.mark.parametrize(
    ("profile", "blocks", "coefficients", "misplaced", "partly"),
    [
        # Of the last 50 samples 10 lie in the first block, whose 60 take their weight: 50 of them for nothing.
        (Tail(0.5), EVEN, [0.2, 0.8], 0.2 * 50 / 60, 0.2),
        (Tail(0.4), EVEN, [0.0, 1.0], 0.0, 0.0),
        (Tail(steps=20), EVEN, [0.0, 1.0], 0.5, 1.0),
        (Window(30, 80), EVEN, [0.6, 0.4], 0.5, 1.0),
        (Tail(0.5), UNEVEN, [0.0, 1.0], 1 - 23 / 40, 1.0),
        (Tail(steps=50), UNEVEN, [0.2, 0.8], 0.2 * 5 / 6, 0.2),
        (EMA(half_life=1e6), EVEN, [0.6, 0.4], 0.0, 0.0),
        (Weights([1, 3]), UNEVEN, [0.25, 0.75], 0.0, 0.0),
        (Weights([0, 3]), UNEVEN, [0.0, 1.0], 0.0, 0.0),
        (Weights([-1, 3]), UNEVEN, [-0.5, 1.5], 0.0, 0.0),
        (Blend("tail:0.5", 0.25), EVEN, [0.05, 0.95], 0.25 * 0.2 * 50 / 60, 0.05),
    ],
)
def test_where_the_weight_lies(
    profile: Profile, blocks: list[Block], coefficients: list[float], misplaced: float, partly: float
) -> None:
    found = explain(profile, blocks)
    assert found.coefficients.tolist() == pytest.approx(coefficients, abs=1e-4)
    assert found.misplaced_weight == pytest.approx(misplaced, abs=2e-3)
    assert found.partly_covered_weight == pytest.approx(partly, abs=1e-6)
    assert found.exact == (misplaced == 0 and not isinstance(profile, EMA))
    counts = [block.count for block in blocks]
    effective = 1 / sum(a * a / n for a, n in zip(coefficients, counts, strict=True))
    assert found.effective_samples == pytest.approx(effective, rel=1e-3)


def test_live_weights_beside_the_blocks_count_as_one_sample() -> None:
    found = explain(Blend("tail:0.4", 0.25), EVEN, beside=True)
    assert found.coefficients.tolist() == [0.0, 0.25] and found.live == 0.75
    assert found.effective_samples == pytest.approx(1 / (0.25**2 / 40 + 0.75**2))
    with pytest.raises(FrozenInstanceError):
        found.live = 0.5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("rates", "warned"),
    [((0.1, 0.1), False), ((0.1, 0.05), True), ((0.1, 0.1 + 1e-12), False), ((None, 0.1), False)],
)
def test_a_decay_of_a_run_whose_rate_fell_is_warned_of(
    rates: tuple[float | None, float], warned: bool
) -> None:
    blocks = [
        Block(at, at + 50, count=50, lr=None if rate is None else Summary.of(rate))
        for at, rate in zip((0, 50), rates, strict=True)
    ]
    assert any("decaying twice" in text for text in explain(Decay("sqrt", 1.0), blocks).warnings) == warned
    assert not any("decaying twice" in text for text in explain(Decay("sqrt", 0.5), blocks).warnings)
    assert not any("decaying twice" in text for text in explain(Tail(1.0), blocks).warnings)
