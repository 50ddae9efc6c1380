"""The compiled mean on the host: the bits of torch's operations, refusals, threads, forks, and life without numba."""

from __future__ import annotations

import copy
import inspect
import math
import os
import pickle
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from devices import as_if_on
from polyak import _host_jobs, _host_kernel
from polyak._mean import Accumulator
from polyak.errors import NonFiniteError
from polyak.profiles import EMA, Uniform, as_scheme
from test_accidents import interrupted, interrupted_at

pytestmark = pytest.mark.skipif(not _host_jobs.are_possible(), reason="numba is not installed")

LEAST_NUMEL = 1 << 18
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# On both sides of a chunk and of what is gathered; the last is cut into batches.
SHAPES = [(3,), (), (0,), (2, 5), (8191,), (8192,), (8193,), (130, 129), (300, 400)]


@pytest.fixture(autouse=True)
def small_shares(monkeypatch):
    monkeypatch.setattr(_host_kernel, "_LEAST_NUMEL_OF_A_THREAD", 1000)


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def accumulator(tensors, scheme="ema:decay=0.9", device="compiled", **options):
    with as_if_on(device):
        return Accumulator(tensors, list(map(str, range(len(tensors)))), as_scheme(scheme), **options)


def sample_of(shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def test_the_loops_take_small_weights_that_are_channels_last_too():
    """One left to torch's operations, whose threads go on spinning, makes the loops half as slow again."""
    weights = [w.to(memory_format=torch.channels_last) for w in sample_of([(64, 3, 7, 7), (512, 512, 3, 3)])]
    mean = accumulator(weights)
    assert sum(batch.numel for batch in mean._kernel.covered) == sum(w.numel() for w in weights)
    mean.add([w.clone() for w in weights])
    mean.add([w + 1 for w in weights])
    means = accumulator([w.contiguous() for w in weights], device="host")
    means.add([w.contiguous() for w in weights])
    means.add([w.contiguous() + 1 for w in weights])
    assert all(map(torch.equal, mean.means, means.means))


def bits(tensors):
    return [t.contiguous().view(torch.int32).clone() for t in tensors]


def same_bits(one, other):
    return all(map(torch.equal, bits(one), bits(other)))


# Numbers


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_accepted_samples_give_the_bits_of_torchs_operations(dtype, check):
    first = sample_of(SHAPES, dtype)
    ours, theirs = (accumulator(first, device=d, check_finite=check) for d in ("compiled", "host"))
    assert (ours.backend, theirs.backend) == ("numba", "torch")
    with threads(2):
        for seed in range(6):
            sample = [w * (1000 if seed == 4 else 1) for w in sample_of(SHAPES, dtype, seed)]
            ours.add(sample)
            theirs.add(sample)
            assert same_bits(ours._means, theirs._means)
    assert ours._sizes == theirs._sizes


def laid_out(weight, layout):
    if layout == "strided":
        return torch.stack([weight, weight], dim=-1)[..., 0]
    return weight.t().contiguous().t() if layout == "transposed" and weight.ndim == 2 else weight


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_sample_is_folded_in_or_left_out_as_by_torchs_operations(data):
    n_tensors = data.draw(st.integers(1, 5))
    shapes = data.draw(st.lists(st.sampled_from(SHAPES[:-1]), min_size=n_tensors, max_size=n_tensors))
    kinds = data.draw(
        st.lists(st.sampled_from([*DTYPES, torch.float64]), min_size=n_tensors, max_size=n_tensors)
    )
    layouts = data.draw(
        st.lists(st.sampled_from(["plain", "transposed", "strided"]), min_size=n_tensors, max_size=n_tensors)
    )
    scheme = data.draw(
        st.sampled_from(["uniform", "ema:decay=0.9", "ema:decay=0.3,debias=false", "power:gamma=3"])
    )
    about = list(zip(kinds, layouts, strict=True))

    def drawn(seed):
        weights = sample_of(shapes, seed=seed)
        return [laid_out(w.to(k), layout) for w, (k, layout) in zip(weights, about, strict=True)]

    ours, theirs = (accumulator(drawn(0), scheme, device=d) for d in ("compiled", "host"))
    refused = 0
    with threads(data.draw(st.sampled_from([1, 3]))):
        for seed in range(data.draw(st.integers(1, 5))):
            sample = drawn(seed)
            if data.draw(st.booleans()) and any(w.numel() for w in sample):
                bad = data.draw(st.sampled_from([w for w in sample if w.numel()]))
                place = data.draw(st.integers(0, bad.numel() - 1))
                bad[tuple(torch.unravel_index(torch.tensor(place), bad.shape))] = data.draw(
                    st.sampled_from([math.nan, math.inf, -math.inf])
                )
                refused += 1
            ours.add(sample)
            theirs.add(sample)
    assert ours.n_skipped == theirs.n_skipped == refused
    assert ours.n_averaged == theirs.n_averaged
    for one, other in zip(ours._means, theirs._means, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=0, atol=2e-6 * refused)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_half_number_is_converted_as_torch_does(dtype):
    """Infinities, NaNs, numbers below the normal ones and -0.0 too; whatever the processor is told to take for 0."""
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16)
    weight = patterns.view(dtype) if dtype != torch.float32 else patterns.view(torch.float16).float() * 1e-38
    for share in (0.25, 0.75):
        mean, expected = torch.ones(1 << 16), torch.ones(1 << 16).lerp_(weight.float(), share)
        kernel = kernel_of([weight], [mean])
        flushing = torch.set_flush_denormal(True)
        try:
            assert kernel.take([weight])
            if dtype != torch.float32:
                kernel.fold(share)
        finally:
            torch.set_flush_denormal(False)
        if dtype == torch.float32:
            kernel.fold(share)
        assert flushing
        assert torch.equal(mean.isnan(), expected.isnan())
        assert same_bits([mean.nan_to_num(0.5)], [expected.nan_to_num(0.5)])


def kernel_of(weights, means):
    from polyak._batches import plan_batches

    with as_if_on("compiled"):
        return _host_kernel.HostKernel(weights, means, plan_batches(weights, means))


def test_an_unchecked_mean_takes_what_it_is_given():
    weight = torch.ones(70_000)
    mean = accumulator([weight], check_finite=False)
    mean.add([weight])
    bad = weight.clone()
    bad[5] = math.nan
    mean.add([bad])
    assert mean.n_averaged == 2 and int(mean.means[0].isnan().sum()) == 1


# Refusals


@pytest.mark.parametrize("where", [0, 8191, 8192, -1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_refused_sample_is_taken_back_to_the_rounding_and_exactly_once_the_means_were_read(dtype, where):
    sample = sample_of(SHAPES, dtype)
    mean = accumulator(sample)
    for seed in range(3):
        mean.add(sample_of(SHAPES, dtype, seed))
    bad = sample_of(SHAPES, dtype, 9)
    bad[-1].view(-1)[where] = math.inf
    before = [m.clone() for m in mean._means]
    mean.add(bad)
    for value, old in zip(mean._means, before, strict=True):
        torch.testing.assert_close(value, old, rtol=0, atol=1e-6)
    before = [m.clone() for m in mean.means]  # which may be saved now
    mean.add(bad)
    assert same_bits(mean._means, before)
    assert (mean.n_averaged, mean.n_skipped) == (3, 2)


def test_a_diverging_sample_with_a_nan_leaves_no_trace_of_its_size():
    weight = torch.randn(100_000)
    mean = accumulator([weight])
    for _ in range(3):
        mean.add([weight])
    huge = weight * 1e30
    huge[70_000] = math.nan
    mean.add([huge])
    assert torch.equal(mean._means[0], weight)  # every number of it was above the limit
    mean.add([weight * 1e30])
    assert mean.n_averaged == 4


def test_below_a_negative_limit_not_even_zeros_are_folded_in():
    weight, mean = torch.zeros(9000), torch.ones(9000)
    kernel = kernel_of([weight], [mean])
    assert kernel.take([weight])
    assert kernel.fold_fitting(0.25, [-1.0]) == [0.0] and torch.equal(mean, torch.ones(9000))
    assert kernel.fold_fitting(0.25, [0.0]) == [0.0] and torch.equal(mean, torch.full((9000,), 0.75))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_chunk_just_above_its_limit_is_left_out_and_one_at_it_is_not(dtype):
    at, above = torch.ones(9000, dtype=dtype), torch.ones(9000, dtype=dtype)
    above[8191] = above[8191] + torch.finfo(dtype).eps  # the last of the first of two chunks
    for weight, first in ((at, 0.25), (above, 0.0)):
        mean = torch.zeros(9000)
        kernel = kernel_of([weight], [mean])
        assert kernel.take([weight])
        assert kernel.fold_fitting(0.25, [1.0]) == [float(weight.max())]
        assert mean[:8192].unique().tolist() == [first] and mean[8192:].unique().tolist() == [0.25]
        kernel.fold_rest(0.25)
        assert torch.equal(mean, weight.float() / 4)


@pytest.mark.parametrize("bad", [False, True])
def test_the_number_of_threads_changes_no_bit(bad):
    samples = [sample_of([*SHAPES, (1100, 1000)], seed=seed) for seed in range(4)]
    if bad:
        samples[3][4][17] = math.nan
    found = []
    for count in (1, 2, 5):
        with threads(count):
            mean = accumulator(samples[0])
            for sample in samples:
                mean.add(sample)
            found.append(mean._means)
    assert same_bits(found[0], found[1]) and same_bits(found[0], found[2])


def test_raise_names_the_tensor_and_keeps_the_mean():
    good, bad = torch.ones(9000), torch.ones(9000)
    mean = accumulator([good, good], "uniform", check_finite="raise")
    mean.add([good, good])
    bad[8500] = math.nan
    with pytest.raises(NonFiniteError, match="'1' holds a NaN"):
        mean.add([good, bad])
    assert torch.equal(mean.means[0], good) and mean.n_averaged == 1


# What lies elsewhere


def test_a_sample_that_lies_otherwise_goes_through_torchs_operations():
    weight = torch.randn(120, 120)
    mean = accumulator([weight], "ema:decay=0.5,debias=false")
    mean.add([weight])
    for other in (weight.t().contiguous().t(), torch.stack([weight, -weight], -1)[..., 0]):
        mean.add([other])
        assert torch.equal(mean.means[0], weight)


@pytest.mark.parametrize("offset", [0, 1, 9000])
def test_weights_whose_memory_was_freed_are_not_read(offset):
    """A view of what FSDP freed for a while has an address, which is its offset."""
    flat = torch.ones(40_000)
    weights = [torch.ones(20_000), flat[offset:][:20_000]]
    mean = accumulator(weights)
    mean.add(weights)
    flat.untyped_storage().resize_(0)
    assert not mean._kernel.take(weights)
    with pytest.raises(RuntimeError, match="not allocated"):
        mean.add(weights)
    assert torch.equal(mean.means[0], torch.ones(20_000)) and mean.n_averaged == 1


def test_means_in_shared_memory_are_found_again():
    weight = torch.ones(9000)
    mean = accumulator([weight], "ema:decay=0.5,debias=false")
    mean.add([weight])
    mean._means[0].share_memory_()
    mean.add([weight * 3])
    assert torch.equal(mean.means[0], weight * 2)


def test_autograd_sees_that_a_mean_has_changed():
    weight = torch.ones(9000)
    mean = accumulator([weight, weight], "ema:decay=0.5,debias=false")
    mean.add([weight, weight])
    scale = torch.ones(9000, requires_grad=True)
    loss = (scale * mean.means[0]).sum()
    mean.add([weight * 2, weight])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda mean: pickle.loads(pickle.dumps(mean))])
def test_copies_go_on_by_themselves(copied):
    weight = torch.ones(20_000)
    mean = accumulator([weight], "ema:decay=0.5,debias=false")
    mean.add([weight])
    other = copied(mean)
    other.add([weight * 3])
    assert torch.equal(mean.means[0], weight) and torch.equal(other.means[0], weight * 2)


# Threads, interrupts and forks


@interrupted
def test_interrupts_at_any_moment_leave_every_number_old_or_new_and_no_thread_at_work():
    weight = torch.ones(400_000)
    mean = accumulator([weight], "ema:decay=0.5,debias=false", check_finite=False)
    with threads(3):
        mean.add([weight])
        for i in range(50):
            mean._means[0].fill_(1)
            weight.fill_(3)
            interrupted_at(2e-5 * (i + 1), lambda: mean.add([weight]))
            weight.fill_(100)  # seen in the mean if a thread were still folding
            assert set(mean._means[0].unique().tolist()) <= {1, 2}
        mean.add([weight])


SCRIPT = """
import torch
from polyak import _host_jobs, _host_kernel
from polyak._mean import Accumulator
from polyak.profiles import Uniform

_host_kernel._LEAST_NUMEL, _host_kernel._LEAST_NUMEL_OF_A_THREAD = 0, 1000
assert _host_jobs.are_ready(wait=True)
torch.set_num_threads(3)
weights = [torch.ones(100_000), torch.ones(100_000)]
mean = Accumulator(weights, ["0", "1"], Uniform())
for value in (1, 2, 6):
    mean.add([weight * value for weight in weights])
assert len(mean._kernel._shares()) == 3 and mean.backend == "numba"
assert all(torch.equal(one, weights[0] * 3) for one in mean.means), mean.means
"""


def runs(**environment):
    """Run the script; what it says of errors."""
    environment = os.environ | environment
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, timeout=240, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_where_openmp_has_fewer_threads_than_were_asked_for_all_is_done():
    runs(OMP_THREAD_LIMIT="2")


def test_where_numba_watches_bounds_all_is_done(tmp_path):
    """What it raises on another thread reaches nobody, and the rest of a share is not done."""
    assert runs(NUMBA_CACHE_DIR=str(tmp_path), NUMBA_BOUNDSCHECK="1") == ""


def test_without_memory_nothing_is_folded_in_and_that_is_said(monkeypatch):
    weight = torch.ones(20_000)
    mean = accumulator([weight])
    mean.add([weight])
    mean.add([weight])

    def full(*_):
        raise MemoryError

    monkeypatch.setattr(_host_jobs.np, "empty", full)
    with pytest.raises(MemoryError):
        mean.add([weight * 3])
    monkeypatch.undo()
    assert torch.equal(mean.means[0], weight) and (mean.n_averaged, mean.n_skipped) == (2, 0)


def test_without_the_threads_of_torchs_openmp_there_are_no_loops(monkeypatch):
    assert _host_jobs.are_possible.__wrapped__()

    def not_there(path):
        raise OSError("no such library")

    monkeypatch.setattr(_host_jobs.ctypes, "CDLL", not_there)
    assert _host_jobs._parallel.__wrapped__() is None
    monkeypatch.setattr(_host_jobs, "_parallel", lambda: None)
    assert not _host_jobs.are_possible.__wrapped__()


class Averaging(torch.utils.data.Dataset):
    """Items that a worker process averages."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        with threads(2):
            weight = torch.full(
                (20_000,), float(index)
            )  # of more torch would wake threads that did not come along
            mean = accumulator([weight], "uniform")
            mean.add([weight])
            mean.add([weight + 2])
            return mean.backend, mean.means[0][-1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_workers_that_were_forked_average_too():
    weight = torch.ones(20_000)
    mean = accumulator([weight], "uniform")
    with threads(2):
        mean.add([weight])
        mean.add([weight])
    loader = DataLoader(
        Averaging(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    found = [(backend, float(value)) for backend, value in loader]
    assert found == [("numba", 1.0), ("numba", 2.0), ("numba", 3.0), ("numba", 4.0)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_fork_waits_for_the_compiler():
    compiled_at = []

    def compile_slowly():
        with _host_jobs._compiling:
            begun.set()
            time.sleep(0.2)
            compiled_at.append(time.perf_counter())

    begun = threading.Event()
    thread = threading.Thread(target=compile_slowly)
    thread.start()
    begun.wait()
    child = os.fork()
    if child == 0:
        os._exit(0 if _host_jobs._compiling.acquire(timeout=1) else 1)
    assert compiled_at and os.waitpid(child, 0)[1] == 0
    thread.join()
    assert not _host_jobs._compiling.locked()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_fork_that_gave_up_waiting_for_the_compiler_has_no_loops_and_ends(monkeypatch):
    weight = torch.ones(9000)
    mean = accumulator([weight])
    monkeypatch.setattr(_host_jobs, "_PATIENCE_SECONDS", 0.01)
    with _host_jobs._compiling:
        child = os.fork()
        if child == 0:
            grandchild = os.fork()  # which has nothing to wait for
            mean.add([weight])
            mine = 0 if mean.backend == "torch" and threading.active_count() == 1 else 1
            os._exit(mine if grandchild == 0 else mine or os.waitpid(grandchild, 0)[1])
        assert os.waitpid(child, 0)[1] == 0
    assert mean.backend == "numba"


# With and without numba


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_loops_are_tried_in_fp32_whatever_the_default_is(dtype):
    torch.set_default_dtype(dtype)
    try:
        assert _host_jobs._are_right(_host_jobs._loader(os.getpid()).loops)
    finally:
        torch.set_default_dtype(torch.float32)


def test_where_no_thread_can_begin_torchs_operations_run(monkeypatch):
    """As in what runs when Python ends, from 3.12 on, and where a system allows no more."""

    def start(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_host_jobs._Loader, "start", start)
    monkeypatch.setattr(_host_jobs, "_loader", lru_cache(_host_jobs._loader.__wrapped__))
    monkeypatch.setattr(_host_kernel, "_LEAST_NUMEL", 0)
    assert not _host_jobs.are_ready(wait=True)
    weight = torch.ones(9000)
    mean = Accumulator([weight], ["w"], Uniform())
    mean.add([weight])
    assert mean.backend == "torch" and torch.equal(mean.means[0], weight)


def about():
    """Numba is imported, and loops are compiled, by the time this is asked for."""
    assert _host_jobs.are_ready(wait=True)
    return _host_jobs._loader(os.getpid()).loops._about()


def test_compiled_code_is_kept_for_this_source_compiler_and_processor_and_a_damaged_file_is_left(tmp_path):
    runs(NUMBA_CACHE_DIR=str(tmp_path))
    code, index = sorted(tmp_path.rglob("*.nb[ic]"))
    assert all(f"run-{about()}-" in path.name for path in (code, index))
    index.write_bytes(index.read_bytes()[:100])
    runs(NUMBA_CACHE_DIR=str(tmp_path))


def test_other_sources_compilers_and_processors_have_other_files(monkeypatch):
    numba = pytest.importorskip("numba")
    found = {about()}
    monkeypatch.setattr(numba, "__version__", "0.0.1")
    found.add(about())
    codegen = numba.core.registry.cpu_target.target_context.codegen()
    monkeypatch.setattr(type(codegen), "magic_tuple", lambda self: ("riscv64", "", ""))
    found.add(about())
    monkeypatch.setattr(inspect, "getsource", lambda module: "another")
    found.add(about())
    assert len(found) == 4


def test_until_the_loops_are_compiled_torchs_operations_run(monkeypatch):
    samples = [sample_of(SHAPES[:-1], seed=seed) for seed in range(4)]
    mean, expected = accumulator(samples[0]), accumulator(samples[0], device="host")
    waiting = _host_jobs._Loader()
    ready = _host_jobs._loader(os.getpid())
    for n, sample in enumerate(samples):
        monkeypatch.setattr(_host_jobs, "_loader", lambda _: waiting if n < 2 else ready)  # noqa: B023
        assert mean.backend == ("torch" if n < 2 else "numba")
        mean.add(sample)
        expected.add(sample)
    assert same_bits(mean.means, expected.means)


@pytest.mark.parametrize("fault", ["not there", "broken", "interpreted", "wrong"])
def test_without_loops_that_work_torchs_operations_run(fault, monkeypatch):
    numba = pytest.importorskip("numba")

    def broken(name):
        raise RuntimeError("no such processor")

    if fault == "not there":
        monkeypatch.setattr(_host_jobs, "are_possible", lambda: False)
    elif fault == "broken":
        monkeypatch.setattr(_host_jobs, "import_module", broken)
    elif fault == "interpreted":
        monkeypatch.setattr(numba.config, "DISABLE_JIT", True)
    else:
        monkeypatch.setattr(_host_jobs, "_agrees", lambda *_: False)
    loader = _host_jobs._Loader()
    monkeypatch.setattr(_host_jobs, "_loader", lambda _: loader)
    monkeypatch.setattr(_host_kernel, "_LEAST_NUMEL", 0)
    loader.start()
    loader.join()
    weight = torch.ones(9000)
    mean = Accumulator([weight], ["w"], Uniform())
    for value in (1, 3):
        mean.add([weight * value])
    assert mean.backend == "torch" and torch.equal(mean.means[0], weight * 2)


def test_where_no_folder_can_be_written_to_code_is_kept_in_memory(monkeypatch):
    import numba

    from polyak import _host_loops

    def cfunc(*args, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return compiles(*args, **options)

    compiles = numba.cfunc
    monkeypatch.setattr(_host_loops.numba, "cfunc", cfunc)
    assert _host_loops._callable_from_c("int64(int64)")(lambda number: number + 1).ctypes(1) == 2


def test_large_averages_take_the_loops_by_themselves_and_small_ones_compile_nothing(monkeypatch):
    assert _host_jobs.are_ready(wait=True)
    monkeypatch.setattr(_host_kernel, "_LEAST_NUMEL", LEAST_NUMEL)
    weight = torch.ones(LEAST_NUMEL)
    assert Accumulator([weight], ["w"], EMA(decay=0.9)).backend == "numba"
    monkeypatch.setattr(_host_jobs, "_loader", None)
    assert Accumulator([weight[1:]], ["w"], EMA(decay=0.9)).backend == "torch"
    assert Accumulator([weight], ["w"], EMA(decay=0.9), compensated=True).backend == "torch"
    assert Accumulator([weight], ["w"], EMA(decay=0.9), dtype=torch.float64).backend == "torch"
