"""The engine against an obvious float64 sum."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import polyak.combine._inputs as budget
from combine_inputs import FLOATS, combined, random, same_bits, saved
from polyak import checkpoints
from polyak.combine import MemoryWriter, combine, common_layout
from polyak.errors import CheckpointError, OptionError

COEFFICIENTS = ([0.25] * 4, [0.1, 0.0, 0.2, 0.7], [0.0, 0.0, 1.0, 0.0], [1.5, -1.0, -0.5, 1.0])
# What rounding to the dtype alone may do to a number near 4.
ROUNDING = {
    torch.float64: 1e-15,
    torch.complex128: 1e-15,
    torch.float32: 1e-6,
    torch.complex64: 1e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 2e-2,
    torch.float8_e4m3fn: 0.3,
    torch.float8_e4m3fnuz: 0.3,
    torch.float8_e5m2: 0.6,
    torch.float8_e5m2fnuz: 0.6,
}


def wide(tensor):
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def reference(models, coefficients, name="w"):
    return sum(a * wide(model[name]) for a, model in zip(coefficients, models, strict=True))


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_equals_the_float64_sum(tmp_path, dtype, coefficients):
    models = [{"w": random(dtype, seed)} for seed in range(4)]
    average = combined(saved(tmp_path, models), coefficients)["w"]
    assert average.dtype == dtype
    error = (wide(average) - reference(models, coefficients)).abs().max()
    assert error <= 2 * ROUNDING[dtype] * sum(map(abs, coefficients))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e5m2])
def test_half_precision_is_summed_in_float32(tmp_path, dtype):
    models = [{"w": random(dtype, seed)} for seed in range(4)]
    average = combined(saved(tmp_path, models), [0.25] * 4, dtype=torch.float32)["w"]
    assert average.dtype == torch.float32
    torch.testing.assert_close(average.double(), reference(models, [0.25] * 4), rtol=0, atol=1e-6)


def test_float64_on_request(tmp_path):
    models = [{"w": random(torch.float32, seed)} for seed in range(4)]
    inputs = saved(tmp_path, models)
    average = combined(inputs, COEFFICIENTS[1], dtype=torch.float64, accumulate=torch.float64)["w"]
    torch.testing.assert_close(average, reference(models, COEFFICIENTS[1]), rtol=0, atol=1e-15)


def every_number(dtype):
    """All finite numbers of a dtype of up to 16 bits, thousands of random bit patterns of a wider one."""
    if dtype.itemsize <= 2:
        bits = torch.arange(256**dtype.itemsize).to(torch.uint8 if dtype.itemsize == 1 else torch.int16)
    else:
        bits = torch.randint(256, (4096 * dtype.itemsize,), dtype=torch.uint8)
    numbers = bits.view(dtype)
    return (
        numbers.view(torch.uint8).view(-1, dtype.itemsize)[numbers.double().isfinite()].view(dtype).view(-1)
    )


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_identical_inputs_come_back_bit_for_bit(tmp_path, dtype, coefficients):
    part = dtype.to_real()
    values = torch.cat([every_number(part), torch.tensor([0.0, -0.0]).to(part)])
    values = values[: len(values) // 2 * 2].view(dtype)
    model = {"w": values}
    assert same_bits(combined(saved(tmp_path, [model] * 4), coefficients)["w"], values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e5m2, torch.complex64])
def test_infinities_that_all_inputs_share_stay(tmp_path, dtype):
    models = [{"w": random(dtype, seed)} for seed in range(3)]
    for model in models:
        view = torch.view_as_real(model["w"]).view(-1) if dtype.is_complex else model["w"].view(-1)
        view[5], view[301] = torch.inf, -torch.inf
    average = combined(saved(tmp_path, models), [0.5, 0.25, 0.25])["w"]
    reals = (torch.view_as_real(average) if dtype.is_complex else average).reshape(-1).double()
    assert reals[5] == torch.inf and reals[301] == -torch.inf
    assert reals.isfinite().sum() == len(reals) - 2


@settings(deadline=None, max_examples=25)
@given(
    raw=st.lists(st.floats(0, 1), min_size=3, max_size=3).filter(lambda raw: sum(raw) > 1e-3),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e30]),
)
def test_the_average_lies_in_the_hull(tmp_path_factory, raw, scale):
    models = [{"w": random(torch.float32, seed, (101,)) * scale} for seed in range(3)]
    inputs = saved(tmp_path_factory.mktemp("hull"), models)
    average = combined(inputs, [a / sum(raw) for a in raw])["w"]
    stack = torch.stack([model["w"] for model in models])
    slack = 4 * torch.finfo(torch.float32).eps * stack.abs().amax(0)
    assert (average >= stack.amin(0) - slack).all() and (average <= stack.amax(0) + slack).all()


def test_several_outputs_in_one_pass_equal_one_after_the_other(tmp_path):
    models = [{"w": random(torch.float32, seed), "n": torch.tensor([seed])} for seed in range(4)]
    inputs = saved(tmp_path, models)
    dtypes = (None, torch.bfloat16, torch.float64, None)
    writers = [MemoryWriter(common_layout(inputs, dtype)) for dtype in dtypes]
    assert combine(inputs, COEFFICIENTS, writers) == ["n"]
    for writer, row, dtype in zip(writers, COEFFICIENTS, dtypes, strict=True):
        alone = combined(inputs, row, dtype)
        assert all(same_bits(writer.tensors[name], alone[name]) for name in ("w", "n"))


class CountingWriter(MemoryWriter):
    def __init__(self, layout):
        super().__init__(layout)
        self.starts = []

    def _write(self, name, start, values):
        self.starts.append(start)
        super()._write(name, start, values)


def test_neither_slices_nor_threads_nor_shares_change_a_bit(tmp_path, monkeypatch):
    # An odd length: the elements that fall out of step with vector instructions must be the same ones.
    models = [
        {"w": random(torch.float32, seed, (100_003,)), "h": random(torch.bfloat16, seed)} for seed in range(3)
    ]
    inputs = saved(tmp_path, models)
    expected = combined(inputs, [0.2, 0.3, 0.5])
    for slice_bytes, workers, ranks in itertools.product((1_000, 100_000), (1, 3), (1, 4)):
        monkeypatch.setattr(budget, "_BEST_SLICE_BYTES", slice_bytes)
        monkeypatch.setattr(budget, "_BEST_WORKERS", workers)
        monkeypatch.setattr(budget, "_usable_cores", lambda: 8)
        writer = CountingWriter(common_layout(inputs))
        for rank in range(ranks):
            combine(inputs, [[0.2, 0.3, 0.5]], [writer], share=(rank, ranks))
        assert len(writer.starts) > 4
        assert all(same_bits(writer.tensors[name], expected[name]) for name in expected)


def test_small_tensors_that_are_summed_together_come_out_as_alone(tmp_path):
    dtypes = [torch.float32] * 4 + [torch.int64, torch.bfloat16, torch.bfloat16, torch.complex64] * 2
    sizes = [1, 63, 64, 65, 3, 300, 0, 7, 2, 128, 5, 1000]
    models = [
        {f"{i}": (10 * random(torch.float64, 50 * i + seed, (size,))).to(dtype)
         for i, (dtype, size) in enumerate(zip(dtypes, sizes, strict=True))}
        for seed in range(3)
    ]  # fmt: skip
    for model in models:
        model["1"][5] = torch.inf  # the others in its bundle are looked at one by one
    folder = tmp_path / "together"
    folder.mkdir()
    together = combined(saved(folder, models), [0.2, 0.05, 0.75])
    assert together["1"].isinf().nonzero().tolist() == [[5]]
    for name in models[0]:
        folder = tmp_path / name
        folder.mkdir()
        alone = combined(saved(folder, [{name: model[name]} for model in models]), [0.2, 0.05, 0.75])
        assert same_bits(together[name], alone[name])


def test_ties_are_read_once_and_kept_where_all_inputs_have_them(tmp_path):
    models = [{"a": random(torch.float32, seed)} for seed in range(3)]
    for model in models:
        model |= {"b": model["a"], "c": model["a"].clone()}
    models[0]["c"] = models[0]["a"]
    inputs = saved(tmp_path, models)
    layout = common_layout(inputs)
    assert layout.ties == {"b": "a"} and list(layout.tensors) == ["a", "c"]
    average = combined(inputs, [0.2, 0.3, 0.5])
    assert average["b"] is average["a"] and same_bits(average["c"], average["a"])


def test_integers_and_bools_come_from_the_last_input_that_counts(tmp_path):
    models = [
        {"n": torch.tensor([seed, 7]), "mask": torch.tensor([True, seed == 2]), "same": torch.arange(5)}
        for seed in range(4)
    ]
    inputs = saved(tmp_path, models)
    with MemoryWriter(common_layout(inputs, torch.bfloat16)) as writer:
        assert combine(inputs, [[0.0, 0.5, 0.5, 0.0]], [writer]) == ["n", "mask"]
    assert all(same_bits(writer.tensors[name], models[2][name]) for name in models[2])


def test_inputs_with_coefficient_zero_are_not_read(tmp_path):
    inputs = saved(tmp_path, [{"w": torch.full((3,), torch.nan)}, {"w": torch.ones(3)}])
    assert torch.equal(combined(inputs, [0.0, 1.0])["w"], torch.ones(3))


def test_scalars_and_empty_tensors(tmp_path):
    inputs = saved(
        tmp_path,
        [{"s": torch.tensor(1.0), "e": torch.empty(0, 3)}, {"s": torch.tensor(2.0), "e": torch.empty(0, 3)}],
    )
    average = combined(inputs, [0.5, 0.5])
    assert average["s"] == 1.5 and average["s"].shape == () and average["e"].shape == (0, 3)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ""])
def test_every_format_gives_the_same_bits(tmp_path, suffix):
    models = [
        {"w": random(torch.bfloat16, seed), "v": random(torch.float32, seed, (3, 5)).t()} for seed in range(3)
    ]
    expected = combined(saved(tmp_path, models), [0.2, 0.3, 0.5])
    average = combined(saved(tmp_path, models, suffix), [0.2, 0.3, 0.5])
    assert all(same_bits(average[name], expected[name]) for name in expected)


def test_progress_ends_at_the_total(tmp_path):
    seen = []
    inputs = saved(tmp_path, [{"w": random(torch.float32, seed, (1_500_000,))} for seed in range(3)])
    combined(inputs, [0.5, 0.0, 0.5], progress=lambda done, total: seen.append((done, total)))
    assert len(seen) > 1 and seen == sorted(seen)
    assert seen[-1] == (3 * 6_000_000,) * 2


def test_progress_counts_the_bytes_read_and_written(tmp_path):
    seen = []
    inputs = saved(tmp_path, [{"w": random(torch.float32, seed, (5,))} for seed in range(3)])
    combined(inputs, [0.2, 0.3, 0.5], torch.bfloat16, progress=lambda *at: seen.append(at))
    assert seen == [(5 * (3 * 4 + 2),) * 2]


@pytest.mark.parametrize(
    "coefficients", [[0.5, 0.4], [1.0], [float("nan"), 1.0], [float("inf"), -float("inf")]]
)
def test_coefficients_that_are_no_average_are_refused(tmp_path, coefficients):
    with pytest.raises(OptionError, match="coefficients"):
        combined(saved(tmp_path, [{"w": torch.ones(2)}] * 2), coefficients)


def test_an_error_in_one_worker_stops_the_others(tmp_path):
    inputs = saved(tmp_path, [{"w": torch.ones(5_000_000)}] * 2)
    calls = []

    class Failing(MemoryWriter):
        def _write(self, name, start, values):
            calls.append(start)
            if start == 0:
                raise CheckpointError("the disk is gone")
            time.sleep(0.05)

    with pytest.raises(CheckpointError, match="the disk is gone"):
        combine(inputs, [[0.5, 0.5]], [Failing(common_layout(inputs))])
    assert len(calls) <= 5  # of 20 slices


THREADS = """
    import os, sys, threading, torch
    import polyak
    from polyak import checkpoints
    from polyak.combine import MemoryWriter, combine, common_layout

    torch.set_num_threads(5)
    inputs = [checkpoints.open(path) for path in sys.argv[1:]]
    n_running = lambda: len(os.listdir("/proc/self/task"))
    before, more, of_others = n_running(), set(), set()

    def look(done, total):
        more.add(n_running() - before)
        thread = threading.Thread(target=lambda: of_others.add(torch.get_num_threads()))
        thread.start()
        thread.join()

    with MemoryWriter(common_layout(inputs, torch.float64)) as writer:
        combine(inputs, [[0.7, 0.2, 0.1]], [writer], progress=look, workers=1)
    # A thread that has just ended may still be counted; torch would start four.
    print(max(more) <= 1, of_others, torch.get_num_threads())
"""


def test_torch_keeps_its_threads_and_starts_none(tmp_path):
    """Neither threads that begin during an average nor the caller's own find another number of them."""
    paths = []
    for seed in range(3):
        paths.append(tmp_path / f"{seed}.safetensors")
        checkpoints.write(paths[-1], {"w": random(torch.bfloat16, seed, (3_000_000,))})
    script = [sys.executable, "-c", textwrap.dedent(THREADS), *map(str, paths)]
    result = subprocess.run(script, check=True, capture_output=True, text=True)
    assert result.stdout == "True {5} 5\n"


def test_an_interrupt_stops_it(tmp_path):
    inputs = saved(tmp_path, [{"w": torch.ones(3_000_000)}] * 2)
    calls = []

    def interrupt(done, total):
        calls.append(done)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        combined(inputs, [0.5, 0.5], progress=interrupt)
    assert len(calls) <= 2


# Peak anonymous memory stays within ``max_memory`` beside what a bare interpreter with torch takes.

MB = 10**6
MEASURE = """
    import sys, threading, torch
    from pathlib import Path

    def anonymous_bytes():
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) * 1024

    bare = anonymous_bytes()
    seen, finished = [bare], threading.Event()

    def sample():
        while not finished.wait(1e-3):
            seen.append(anonymous_bytes())

    sampler = threading.Thread(target=sample)
    sampler.start()
    import polyak
    folder, budget, profile = sys.argv[1:]
    polyak.average_checkpoints(folder, f"{folder}/out/average.safetensors", max_memory=budget, profile=profile)
    finished.set()
    sampler.join()
    print(max(seen) - bare)
"""

pytestmark = pytest.mark.skipif(
    not os.path.exists("/proc/self/status"), reason="needs Linux's account of memory"
)


def peak_bytes(folder, max_memory):
    (folder / "out").mkdir()
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEASURE), str(folder), max_memory, "uniform"],
        check=True,
        capture_output=True,
        text=True,
    )
    return int(result.stdout)


@pytest.mark.parametrize("suffix", [pytest.param(".safetensors", marks=pytest.mark.slow), ".pt"])
@pytest.mark.parametrize(
    ("n_inputs", "tensors", "elements"),
    [
        pytest.param(2, 1, 24_000_000, id="one tensor larger than the budget"),
        pytest.param(8, 400, 16_000, id="8 inputs"),
        pytest.param(64, 150, 4_000, id="64 inputs"),
    ],
)
def test_peak_is_within_max_memory(tmp_path, n_inputs, tensors, elements, suffix):
    model = {f"layers.{index}.weight": torch.ones(elements, dtype=torch.bfloat16) for index in range(tensors)}
    for step in range(n_inputs):
        checkpoints.write(tmp_path / f"{step}{suffix}", model)
    assert peak_bytes(tmp_path, "32MB") <= 32 * MB
