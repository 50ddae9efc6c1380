"""The running mean, one input at a time."""

import pytest
import torch

from polyak.combine._running import fold


def folded(mean, values, ratio, dtype=torch.float32, numel=37):
    result = torch.full((numel,), mean, dtype=dtype)
    fold(result, torch.full((numel,), values, dtype=dtype), ratio, torch.empty(numel, dtype=dtype))
    return result


@pytest.mark.parametrize(
    "ratio", [1.0, 1 - 1e-9, 0.75, 0.5, 1 / 3, 0.125, 0.1, 1e-3, 1e-7, 3e-8, 1e-9, -0.25, -3.0]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_numbers_stay_to_the_bit(ratio, dtype):
    for number in (0.0, -0.0, 1e-40, 1 / 3, -7e30):
        result = folded(number, number, ratio, dtype)
        same = torch.full_like(result, number)
        assert torch.equal(result, same) and torch.equal(result.signbit(), same.signbit())


@pytest.mark.parametrize("ratio", [0.9, 0.5, 1 / 3, 0.125, 0.1, 1e-3, 1e-7, 3e-8, 1e-9])
def test_small_ratios_count_in_full(ratio):
    assert folded(1.0, 1 + 1 / ratio, ratio) == pytest.approx(2.0, rel=1e-6)


def test_a_thousand_inputs_are_as_exact_as_a_few():
    inputs = torch.randn(1_000, 4_096, generator=torch.Generator().manual_seed(0))
    mean, scratch = torch.empty(4_096), torch.empty(4_096)
    for index, values in enumerate(inputs):
        fold(mean, values, 1 / (index + 1), scratch)
    assert (mean.double() - inputs.double().mean(0)).abs().max() < 2e-7
