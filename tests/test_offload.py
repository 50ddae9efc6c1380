"""Means on the host of an accelerator's weights, copied while training goes on, with stand-ins for streams."""

from __future__ import annotations

import copy
import gc
import json
import os
import pickle
import signal
import threading
import time
from importlib import import_module
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import polyak
from devices import SlowStream, as_if_offloaded
from polyak import _offload, _torch
from polyak._mean import Accumulator
from polyak._offload import SideStream
from polyak.errors import NonFiniteError, NotStartedError


class Writing(torch.optim.Optimizer):
    """An optimizer whose step writes the numbers that it is given."""

    def __init__(self, params):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, seed, bad=False):
        generator = torch.Generator().manual_seed(seed)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        if bad:
            self.param_groups[-1]["params"][-1].view(-1)[0] = float("nan")


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 150), nn.Linear(150, 150))


@pytest.fixture(autouse=True)
def offloaded():
    """Parameters are on an accelerator, all else is on the host."""
    with as_if_offloaded(lambda tensor: isinstance(tensor, nn.Parameter) or tensor.is_meta):
        yield


def attached(scheme="ema:decay=0.9", model=None, **options):
    model = model or network()
    average = polyak.Average(model, scheme, device="cpu", **options)
    optimizer = Writing(model.parameters())
    polyak.attach(optimizer, average)
    return model, optimizer, average


def bits(average):
    return {name: tensor.clone() for name, tensor in average.named_tensors().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def expected(seeds, scheme="ema:decay=0.9", bad=()):
    """What the same samples give with nothing under way."""
    model = network()
    average, optimizer = polyak.Average(model, scheme, device="cpu"), Writing(model.parameters())
    for seed in seeds:
        optimizer.step(seed, bad=seed in bad)
        average.update()
    return bits(average)


@pytest.mark.parametrize("fenced", [True, False])
def test_a_copy_slower_than_the_next_step_is_torn_without_the_fence(monkeypatch, fenced):
    if not fenced:
        monkeypatch.setattr(SlowStream, "hold_back", lambda self, copied: None)
    _, optimizer, average = attached()
    for seed in range(12):
        optimizer.step(seed)
    assert average.n_averaged == 12
    assert same(bits(average), expected(range(12))) == fenced


def test_training_goes_on_while_a_sample_is_copied(monkeypatch):
    _, optimizer, average = attached()
    optimizer.step(0)
    optimizer.step(1)
    let_go = threading.Event()
    copying = SlowStream.copy

    def copy_later(self, targets, sources):
        self._pool.submit(let_go.wait)
        return copying(self, targets, sources)

    monkeypatch.setattr(SlowStream, "copy", copy_later)
    optimizer.step(2)  # returns although nothing is copied yet
    reading = threading.Thread(target=lambda: average.n_averaged)
    reading.start()
    reading.join(0.05)
    assert reading.is_alive()
    let_go.set()
    reading.join()
    assert same(bits(average), expected(range(3)))


@pytest.mark.parametrize("options", [{}, {"check_finite": "raise"}, {"buffers": "average"}], ids=str)
def test_without_attach_nothing_is_under_way_when_an_update_returns(options):
    model = network()
    if options:
        _, optimizer, average = attached(model=model, **options)
        if "check_finite" not in options:
            assert not average._overlaps
    else:
        average, optimizer = polyak.Average(model, "ema:decay=0.9", device="cpu"), Writing(model.parameters())
    for seed in range(4):
        optimizer.step(seed)
        if not options:
            average.update()
        job = average._accumulator._offload._job
        assert job is None or job._work is None
    assert same(bits(average), expected(range(4)))


# Whatever is called in between.


def read_counts(average, state):
    return average.n_averaged, average.n_skipped, repr(average), average.backend


def read_state(average, state):
    return {k: v for k, v in average.state_dict().items() if k != "average"}


def read_means(average, state):
    return bits(average)


def swap(average, state):
    with average.applied() as model:
        return {name: p.detach().clone() for name, p in model.named_parameters()}


def copy_out(average, state):
    other = network()
    average.copy_to(other)
    return {name: p.detach().clone() for name, p in other.named_parameters()}


def twin(average, state):
    return bits(copy.deepcopy(average))


def pickled(average, state):
    other = pickle.loads(pickle.dumps(average))
    other.update_now()
    return bits(other)


def resume(average, state):
    average.load_state_dict(copy.deepcopy(average.state_dict()))


def other_scheme(average, state):
    average.scheme = "ema:decay=0.5" if str(average.scheme) == "uniform" else "uniform"


def widen(average, state):
    average._binding.model.double()


def narrow(average, state):
    average._binding.model.float()


def as_module(average, state):
    state.append(average.module())


def read_modules(average, state):
    return {f"{n}.{name}": p.clone() for n, m in enumerate(state) for name, p in m.named_parameters()}


def sample_now(average, state):
    average.update_now()


def thaw(average, state):
    average._binding.model[0].bias.requires_grad_(True)


CALLS = [
    read_counts, read_state, read_means, swap, copy_out, twin, pickled, resume, other_scheme, widen, narrow, as_module,
    read_modules, sample_now, thaw,
]  # fmt: skip
STEPS = st.tuples(st.just("step"), st.integers(0, 99), st.sampled_from([False, False, False, True]))


@pytest.mark.parametrize("examples", [20, pytest.param(500, marks=pytest.mark.slow)])
def test_the_mean_is_the_same_bit_for_bit_whatever_is_called_in_between(examples):
    calls = st.lists(STEPS | st.sampled_from(CALLS), max_size=14)
    settings(max_examples=examples, deadline=None)(given(calls, st.sampled_from([1, 2]))(is_the_same))()


def is_the_same(calls, every):
    with mock.patch.object(SlowStream, "seconds", 1e-4):
        models = [network() for _ in range(2)]
        for model in models:
            model[0].bias.requires_grad_(False)
        averages = [polyak.Average(m, "ema:half_life=3", every=every, device="cpu") for m in models]
        optimizers = [Writing(model.parameters()) for model in models]
        polyak.attach(optimizers[0], averages[0])
        for optimizer in optimizers:
            optimizer.step(
                0
            )  # which the second average does not see, nor the copies a model that was never written
        averages[1].update()
        states = [], []

        def outcome(call, average, state):
            try:
                return call(average, state)
            except NotStartedError as error:
                return str(error)

        for call in [*calls, read_counts, read_state, read_means]:
            if isinstance(call, tuple):
                for optimizer in optimizers:
                    optimizer.step(*call[1:])
                averages[1].update()
                continue
            first, second = (outcome(call, a, s) for a, s in zip(averages, states, strict=True))
            if isinstance(first, dict) and all(isinstance(v, torch.Tensor) for v in first.values()):
                assert first.keys() == second.keys()
                for name in first:
                    torch.testing.assert_close(first[name], second[name], rtol=0, atol=0, equal_nan=True)
            else:
                assert first == second


def test_other_optimizers_and_other_averages_wait_for_the_copy_too():
    model, optimizer, average = attached()
    other, second = polyak.Average(model, "uniform"), Writing(model[1].parameters())
    other.update_now()
    for seed in range(4):
        optimizer.step(seed)
        with other.applied():
            pass
        optimizer.step(10 + seed)
        second.step(20 + seed)
    seeds = [seed for n in range(4) for seed in (n, 10 + n)]
    assert average.n_averaged == 8 and average._accumulator._offload._only_optimizers_write
    model = network()
    sync, optimizer = polyak.Average(model, "ema:decay=0.9", device="cpu"), Writing(model.parameters())
    second = Writing(model[1].parameters())
    for seed in seeds:
        optimizer.step(seed)
        sync.update()
    assert same(bits(average), bits(sync))


def filled(weight, value):
    _offload.fence()
    weight.data.fill_(value)
    return weight


def bind_wider(mean, weight):
    mean.bind([nn.Parameter(weight.detach().double())])
    return mean


def restart(mean, weight):
    mean.restart()
    mean._offload.join()
    return mean


def add(mean, weight):
    mean.add([filled(weight, 5)])
    return mean


def read(name):
    def call(mean, weight):
        getattr(mean, name)
        return mean

    return pytest.param(call, id=name)


@pytest.mark.parametrize(
    "call",
    [bind_wider, restart, add, lambda mean, weight: copy.deepcopy(mean)]
    + [read(name) for name in ("means", "memory", "n_averaged", "n_skipped", "position", "clock")],
)
def test_who_comes_before_the_thread_takes_the_sample_first(monkeypatch, call):
    monkeypatch.setattr(_offload.Offload, "_begin", lambda offload, job: None)  # no thread ever comes to it
    found = []
    for overlaps in (True, False):
        weight = nn.Parameter(torch.ones(40))
        mean = Accumulator([weight], ["w"], polyak.Uniform(), device="cpu")
        mean._offload._only_optimizers_write = True
        mean.add([weight])
        mean.add([filled(weight, 3)], overlaps=overlaps)
        if overlaps:
            assert mean._offload._job._work is not None
        after = call(mean, weight)
        found.append((after._counts, after._means[0]))
    (counts, mean), (expected_counts, expected_mean) = found
    assert counts == expected_counts and torch.equal(mean, expected_mean)


# Weights that something else than an optimizer writes.


def clip(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.clamp_(-0.1, 0.1)


def test_where_weights_are_clipped_after_each_step_every_copy_is_waited_for():
    model, optimizer, average = attached()
    for seed in range(6):
        optimizer.step(seed)
        clip(model)
    assert same(bits(average), expected(range(6)))


def test_a_later_change_is_warned_of_and_ends_it():
    model, optimizer, average = attached()
    for seed in range(3):
        optimizer.step(seed)
    clip(model)
    with pytest.warns(UserWarning, match="each update waits for its copy"):
        optimizer.step(3)
    for seed in range(4, 7):
        optimizer.step(seed)
        clip(model)
    assert average.n_averaged == 7 and not average._accumulator._offload._only_optimizers_write


# Samples that are refused, and failures.


def test_a_refused_sample_stays_refused():
    _, optimizer, average = attached()
    for seed in range(6):
        optimizer.step(seed, bad=seed in (0, 3))
    assert (average.n_averaged, average.n_skipped) == (4, 2)
    assert same(bits(average), expected(range(6), bad=(0, 3)))


def test_raise_names_the_tensor_at_once():
    _, optimizer, average = attached(check_finite="raise")
    optimizer.step(0)
    optimizer.step(1)
    with pytest.raises(NonFiniteError, match=r"2\.bias"):
        optimizer.step(2, bad=True)
    assert (average.n_averaged, average.n_skipped) == (2, 1)


def test_an_error_on_the_thread_is_raised_by_the_next_call_and_once():
    _, optimizer, average = attached()
    optimizer.step(0)
    optimizer.step(1)
    _offload._settle_all()
    accumulator = average._accumulator
    with mock.patch.object(accumulator, "_fold_all", side_effect=MemoryError("no memory")):
        optimizer.step(2)
        _offload._settle_all()
    with pytest.raises(MemoryError, match="no memory"):
        average.state_dict()
    assert average.n_averaged == 2
    optimizer.step(3)
    assert same(bits(average), expected([0, 1, 3]))


@pytest.mark.parametrize("follows", [True, False])
def test_a_sample_that_was_waited_for_fails_at_once_and_lets_its_weights_go(follows):
    """So does the first one that follows an optimizer, whose copy is waited for too."""
    model, optimizer, average = attached()
    if not follows:
        average, optimizer = polyak.Average(model, "ema:decay=0.9", device="cpu"), Writing(model.parameters())
    update = (lambda: optimizer.step(0)) if follows else average.update
    accumulator = average._accumulator
    with (
        mock.patch.object(accumulator, "_fold_all", side_effect=MemoryError("no memory")),
        pytest.raises(MemoryError, match="no memory"),
    ):
        update()
    offload = accumulator._offload
    assert not offload._sources and not offload._copies and offload not in _offload._under_way
    update()
    assert average.n_averaged == 1
    assert not offload._sources and not offload._copies and offload not in _offload._under_way


def test_an_interrupt_while_it_is_waited_for_loses_nothing():
    _, optimizer, average = attached()
    optimizer.step(0)
    optimizer.step(1)
    optimizer.step(2)
    with (
        mock.patch.object(_offload._Job, "run", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        average.named_tensors()
    optimizer.step(3)
    assert same(bits(average), expected(range(4)))


def test_where_no_thread_begins_any_more_reading_does_it():
    _, optimizer, average = attached()
    for seed in range(2):
        optimizer.step(seed)
    average._accumulator._offload._pool.shutdown()
    for seed in range(2, 4):
        optimizer.step(seed)
    assert same(bits(average), expected(range(4)))


# Threads and processes.


def test_the_thread_ends_with_the_average():
    model, optimizer, average = attached()
    for seed in range(3):
        optimizer.step(seed)
    [thread] = average._accumulator._offload._pool._threads
    assert thread.is_alive()
    del model, optimizer, average
    for _ in range(200):  # while it folds the last sample it holds on to all of them
        gc.collect()
        thread.join(timeout=0.05)
        if not thread.is_alive():
            return
    pytest.fail("the thread goes on")


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
warned_of = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def holds_in_a_child(condition):
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # as torch's own workers do: OpenMP's threads are the parent's
        os._exit(0 if condition() else 1)
    deadline = time.monotonic() + 10
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    if ended == (0, 0):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return ended == (child, 0)


@forks
@warned_of
@pytest.mark.parametrize("times", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_a_child_that_was_forked_has_the_sample_that_was_under_way(times):
    wanted = expected(range(3))
    for _ in range(times):
        _, optimizer, average = attached()
        for seed in range(3):
            optimizer.step(seed)
        assert holds_in_a_child(lambda: average.n_averaged == 3 and same(bits(average), wanted))  # noqa: B023
        optimizer.step(3)
        assert same(bits(average), expected(range(4)))


@forks
@warned_of
def test_a_child_waits_for_no_thread_that_is_not_there():
    """The gate of a sample is shut for a moment when its thread finds it done, that of all by whoever joins one."""
    _, optimizer, average = attached()
    for seed in range(3):
        optimizer.step(seed)
    settling, ended = _offload.Offload.settle, threading.Event()

    def settle_and_shut(offload):
        settling(offload)
        offload._job._gate.acquire()
        thread.start()
        time.sleep(0.03)

    def shut_again_and_again():
        while not ended.is_set():
            with _offload._gate:
                time.sleep(0.01)

    def is_open():
        opened = []
        other = threading.Thread(target=lambda: opened.append(_offload._gate.acquire(timeout=1)), daemon=True)
        other.start()
        other.join()
        return opened == [True]

    thread = threading.Thread(target=shut_again_and_again, daemon=True)
    with mock.patch.object(_offload.Offload, "settle", settle_and_shut):
        held = holds_in_a_child(lambda: average.n_averaged == 3 and is_open())
    average._accumulator._offload._job._gate.release()
    ended.set()
    thread.join(timeout=5)
    assert held and not thread.is_alive()


# Recordings.


@pytest.mark.parametrize("bad", [(), (2, 3, 9)])
def test_a_recording_is_the_same_bit_for_bit(tmp_path, bad):
    recordings = []
    for name, follows in (("under way", True), ("waited for", False)):
        model = network()
        optimizer = Writing(model.parameters())
        recorder = polyak.Recorder(model, tmp_path / name, block=3, device="cpu")
        if follows:
            polyak.attach(optimizer, recorder)
        for seed in range(13):
            optimizer.step(seed, bad=seed in bad)
            if not follows:
                recorder.update()
            if seed == 7:
                recorder.average("uniform")
        recorder.close()
        recordings.append(recorder.trajectory)
        if follows:
            assert recorder._open_block._filling._offload._only_optimizers_write
    one, other = recordings
    assert one.blocks == other.blocks and sum(block.skipped for block in one.blocks) == len(bad)
    for profile in ("uniform", "power:gamma=2"):
        assert same(one.average(profile), other.average(profile))


def test_a_block_is_read_by_its_writer_once_it_is_computed(tmp_path, monkeypatch):
    """Its thread computes on another stream than training does, which knows nothing of what that queued."""
    written, log = [], []

    class Event:
        def synchronize(self):
            log.append("computed")

    monkeypatch.setattr(polyak._torch, "queued_for", lambda tensors: [Event() for _ in tensors][:1])
    model = network()
    recorder = polyak.Recorder(model, tmp_path / "run", block=1)
    commit = recorder._folder.commit
    monkeypatch.setattr(recorder._folder, "commit", lambda *given: (log.append("written"), commit(*given)))
    recorder.update()
    recorder.update()
    recorder.close()
    assert log == ["computed", "written"] * 2 and not written


# What is asked of an accelerator's streams.


class Stream:
    """Notes what is asked of it."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for what {other.name} has")

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for {event}")

    def record_event(self):
        self.log.append(f"event of {self.name}")
        return f"the event of {self.name}"

    def __enter__(self):
        self.log.append(f"{self.name} is asked")

    def __exit__(self, *error):
        self.log.append(f"{self.name} was asked")


@pytest.fixture
def streams(monkeypatch):
    log = []
    monkeypatch.setattr(torch, "Stream", lambda device: Stream("the side stream", log))
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: Stream("training", log))
    return log


def test_a_copy_comes_after_what_was_computed_and_before_what_is_written(streams, monkeypatch):
    targets, sources = [torch.zeros(3)], [torch.ones(3)]
    copying = _torch.foreach_copy_

    def copy_noted(targets, sources, non_blocking):
        streams.append(f"copies with non_blocking={non_blocking}")
        copying(targets, sources, non_blocking)

    monkeypatch.setattr(_torch, "foreach_copy_", copy_noted)
    stream = SideStream(torch.device("cpu"))
    stream.hold_back(stream.copy(targets, sources))
    assert targets[0].tolist() == [1, 1, 1]
    assert streams == [
        "the side stream waits for what training has",
        "the side stream is asked",
        "copies with non_blocking=True",
        "the side stream was asked",
        "event of the side stream",
        "training waits for the event of the side stream",
    ]


def test_a_writer_waits_for_each_device_once(streams):
    assert _torch.queued_for([torch.ones(1), torch.ones(2)]) == ["the event of training"]


# The benchmark, which waits for a GPU.


def test_the_benchmark_runs_to_its_end(monkeypatch, capsys):
    accelerator = import_module("accelerator")
    shapes = import_module("shapes")
    monkeypatch.setattr(accelerator, "_MATRIX_WIDTH", 8)
    monkeypatch.setattr(accelerator, "UPDATES_PER_ROUND", 3)
    small = accelerator.Case(lambda: [(3, 4), (5,), *[(2,)] * 9])
    monkeypatch.setattr(accelerator, "MODELS", {"small": small})
    monkeypatch.setattr(accelerator, "CASES", {"small": small})
    assert shapes.number_of_elements(small.shapes()) == 35
    accelerator.main(["--device", "cpu", "--rounds", "1", "--only", "small"])
    found = json.loads(capsys.readouterr().out)["cases"]["small"]
    assert {"polyak EMA", "polyak EMA, checked", "ema-pytorch foreach"} <= found["contenders"].keys()
    assert found["graph"] == {"averaged": 4, "skipped": 1, "largest_error": 0}
    assert found["offload"]["same_bits"] and found["offload"]["step_microseconds"].keys() == {
        "none", "waits", "meanwhile"
    }  # fmt: skip
    with pytest.raises(SystemExit):
        accelerator.main(["--device", "cpu", "--output", "figures.json"])
