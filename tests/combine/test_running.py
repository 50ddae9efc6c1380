"""The running mean, one input at a time."""

from __future__ import annotations

import pytest
import torch

import polyak
from combine_inputs import combined, random, saved
from polyak.combine._engine import fold
from polyak.errors import NonFiniteError


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


# NaN and infinities: named, and nothing written.

BAD = {"nan": torch.nan, "infinity": torch.inf}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("culprit", [0, 2])
def test_file_and_tensor_are_named_and_nothing_is_written(tmp_path, dtype, bad, culprit):
    models = [{"fine": random(dtype, seed), "layer.w": random(dtype, seed)} for seed in range(3)]
    models[culprit]["layer.w"][3, 5] = bad
    saved(tmp_path, models)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(NonFiniteError, match=rf"step{culprit + 1}\.pt: tensor 'layer\.w' holds"):
        polyak.average_checkpoints(tmp_path, tmp_path / "average.safetensors")
    assert sorted(tmp_path.iterdir()) == before


def test_nan_in_the_float_that_has_no_infinity(tmp_path):
    models = [{"w": random(torch.float8_e4m3fn, seed).float()} for seed in range(2)]
    models[1]["w"][0, 0] = torch.nan
    models = [{"w": model["w"].to(torch.float8_e4m3fn)} for model in models]
    with pytest.raises(NonFiniteError, match="step2.pt: tensor 'w' holds NaN"):
        combined(saved(tmp_path, models), [0.5, 0.5])


def test_infinities_of_different_sign_are_not_shared(tmp_path):
    models = [{"w": torch.tensor([1.0, sign * torch.inf])} for sign in (1, -1)]
    with pytest.raises(NonFiniteError, match="tensor 'w' holds infinities"):
        combined(saved(tmp_path, models), [0.5, 0.5])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_values_too_large_for_the_chosen_dtype_are_refused(tmp_path, dtype):
    inputs = saved(tmp_path, [{"w": torch.tensor([1.0, 1e5])}] * 2)
    with pytest.raises(NonFiniteError, match=rf"'w' is too large for {dtype}, it comes out as 1e\+05"):
        combined(inputs, [0.5, 0.5], dtype=dtype)


def test_values_that_round_to_the_largest_number_are_kept(tmp_path):
    inputs = saved(tmp_path, [{"w": torch.tensor([65_510.0])}] * 2)
    assert combined(inputs, [0.5, 0.5], dtype=torch.float16)["w"].item() == 65_504


def test_a_sum_that_overflows_float32_is_refused_and_float64_is_the_cure(tmp_path):
    inputs = saved(tmp_path, [{"w": torch.tensor([3e38])}, {"w": torch.tensor([-3e38])}])
    with pytest.raises(NonFiniteError, match="'w' is too large for torch.float32"):
        combined(inputs, [0.5, 0.5])
    assert combined(inputs, [0.5, 0.5], accumulate=torch.float64)["w"].item() == 0
    polyak.average_checkpoints(tmp_path, tmp_path / "wide.pt", dtype="fp64")
    assert torch.load(tmp_path / "wide.pt")["w"].item() == 0


def test_infinities_need_a_dtype_that_has_them(tmp_path):
    inputs = saved(tmp_path, [{"w": torch.tensor([1.0, torch.inf])}] * 2)
    assert combined(inputs, [0.5, 0.5], dtype=torch.float8_e5m2)["w"].float()[1] == torch.inf
    with pytest.raises(NonFiniteError, match="too large for torch.float8_e4m3fn"):
        combined(inputs, [0.5, 0.5], dtype=torch.float8_e4m3fn)
