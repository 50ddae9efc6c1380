"""`attach` under everything that calls, skips or doubles an optimizer's step."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn

import polyak
from polyak._attach import refuse_by_hand
from polyak.errors import OptionError, StateError


class Counter:
    def __init__(self):
        self.steps = 0

    def update(self):
        self.steps += 1


def backward(model, scale=1.0):
    (model(torch.ones(2, 3)).sum() * scale).backward()


def test_each_step_counts_until_removed():
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first, second = Counter(), Counter()
    with polyak.attach(optimizer, first, second):
        for _ in range(3):
            backward(model)
            optimizer.step()
    optimizer.step()
    assert first.steps == second.steps == 3


def test_gradient_accumulation_counts_steps_not_backward_passes():
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    average = polyak.Average(model, polyak.Uniform())
    polyak.attach(optimizer, average)
    for micro in range(8):
        backward(model)
        if micro % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
    assert average.n_averaged == 2


@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
def test_steps_that_grad_scaler_skipped_do_not_count(fused):
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    average = polyak.Average(model, polyak.Uniform())
    polyak.attach(optimizer, average)
    for step in range(6):
        optimizer.zero_grad()
        loss = model(torch.ones(2, 3)).sum() * (float("inf") if step in (1, 4) else 1.0)
        scaler.scale(loss).backward()
        before = model.weight.clone()
        scaler.step(optimizer)
        assert torch.equal(before, model.weight) == (step in (1, 4))
        scaler.update()
    assert average.n_averaged == 4


def test_lbfgs_closures_and_schedulers_count_once_a_step():
    model = nn.Linear(3, 1)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    counter = Counter()
    polyak.attach(optimizer, counter)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(2, 3)).square().sum()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
        scheduler.step()
    assert counter.steps == 3


class Doubling(torch.optim.SGD):
    """torch wraps step once a class, so that both this and the parent's fire the hooks."""

    fail = False

    def step(self, closure=None):
        result = super().step(closure)
        if self.fail:
            raise RuntimeError("after the parent's step")
        return result


def test_a_subclass_that_calls_its_parent_counts_once():
    model = nn.Linear(3, 1)
    torch.optim.SGD(model.parameters(), lr=0.1)  # makes torch wrap the parent's step as well
    optimizer = Doubling(model.parameters(), lr=0.1)
    fired = []
    optimizer.register_step_post_hook(lambda *_: fired.append(1))
    counter = Counter()
    polyak.attach(optimizer, counter)
    optimizer.step()
    assert len(fired) == 2 and counter.steps == 1
    optimizer.fail = True
    with pytest.raises(RuntimeError):
        optimizer.step()
    optimizer.fail = False
    optimizer.step()
    assert counter.steps == 2, "a step that raised does not silence those after it"


def test_accelerates_wrapper():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = nn.Linear(3, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    average = polyak.Average(model, polyak.Uniform())
    polyak.attach(optimizer, average)
    for _ in range(6):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(2, 3)).sum())
            optimizer.step()
            optimizer.zero_grad()
    assert average.n_averaged == 3


def test_the_classic_wrapper_can_be_attached_to():
    model = nn.Linear(3, 1)
    optimizer = polyak.optim.SWA(torch.optim.SGD(model.parameters(), lr=0.1))
    counter = Counter()
    polyak.attach(optimizer, counter)
    backward(model)
    optimizer.step()
    assert counter.steps == 1


def test_a_removed_attachment_keeps_nothing_alive():
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    average = polyak.Average(model, polyak.Uniform())
    handle = polyak.attach(optimizer, average)
    optimizer.step()
    handle.remove()
    handle.remove()
    alive = weakref.ref(average)
    del average, handle
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda o: (o,), "at least one average"),
        (lambda o: (o, object()), "update"),
        (lambda o: (nn.Linear(1, 1), Counter()), "takes a torch optimizer first, got Linear"),
    ],
)
def test_misuse_is_refused(arguments, message):
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    with pytest.raises(OptionError, match=message):
        polyak.attach(*arguments(optimizer))


def test_an_average_follows_an_optimizer_once():
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first, second = polyak.Average(model, polyak.Uniform()), polyak.Average(model, polyak.Uniform())
    handle = polyak.attach(optimizer, first)
    with pytest.raises(OptionError, match="same average twice"):
        polyak.attach(optimizer, second, first)
    polyak.attach(optimizer, second)
    handle.remove()
    handle.remove()
    handle = polyak.attach(optimizer, first)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert (first.n_averaged, second.n_averaged) == (1, 1)
    with pytest.raises(OptionError, match="same average twice"):
        polyak.attach(optimizer, first)


def test_copies_of_an_optimizer_are_followed_by_nothing():
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    average = polyak.Average(model, polyak.Uniform())
    polyak.attach(optimizer, average)
    for number, copied in enumerate((copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer)))):
        copied.step()
        assert average.n_averaged == number
        polyak.attach(copied, average)  # no copy counts as one that the average follows already
        copied.step()
        assert average.n_averaged == number + 1


def test_a_recorder_with_its_optimizer_is_let_go(tmp_path):
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with polyak.Recorder(model, tmp_path, block=1, optimizer=optimizer) as run:
        polyak.attach(optimizer, run)
    gone = weakref.ref(run)
    del run, optimizer
    gc.collect()
    assert gone() is None


def test_what_is_attached_is_not_updated_by_hand_too(tmp_path):
    """Each step would count twice."""
    model = nn.Linear(3, 1)
    optimizer, other = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    average = polyak.Average(model, polyak.Uniform())
    run = polyak.Recorder(model, tmp_path, block=1)
    with polyak.attach(optimizer, average, run), polyak.attach(other, average):
        backward(model)
        optimizer.step()
        other.step()
        for follower in (average, run):
            with pytest.raises(OptionError, match="would count the step twice"):
                follower.update()
        with pytest.raises(OptionError, match=r"note\(loss=loss\) for metrics"):
            run.update(loss=1.0)
        run.note(loss=2.0)
        run.note(loss=4.0)
        backward(model)
        optimizer.step()
    assert average.n_averaged == 3
    average.update()
    run.update()
    run.close()
    assert average.n_averaged == 4
    assert [block.metrics["loss"].mean for block in run.trajectory.blocks if block.metrics] == [3.0]
    with pytest.raises(StateError, match="after close"):
        run.note(loss=1.0)


def test_followers_of_any_class_are_taken():
    class Slotted:
        __slots__ = ("steps",)

        def __init__(self):
            self.steps = 0

        def update(self):
            self.steps += 1

    model, follower = nn.Linear(3, 1), Slotted()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with polyak.attach(optimizer, follower):
        optimizer.step()
    assert follower.steps == 1


def test_an_optimizer_that_is_gone_calls_nothing():
    """The next phase of training may have another optimizer, and calls of its own, though nobody kept the handle."""
    model = nn.Linear(3, 1)
    average = polyak.Average(model, polyak.Uniform())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    polyak.attach(optimizer, average)
    with pytest.raises(OptionError, match="would count the step twice"):
        average.update()
    del optimizer
    gc.collect()
    average.update()
    assert average.n_averaged == 1


def test_trainings_in_several_threads_do_not_meet():
    """One hook is at work while another begins and ends."""
    inside, go_on = threading.Event(), threading.Event()

    class Slow(Counter):
        def update(self):
            inside.set()
            assert go_on.wait(30)
            refuse_by_hand(self)
            super().update()

    class Around(Counter):
        def update(self):
            go_on.set()
            thread.join(30)
            refuse_by_hand(self)
            super().update()

    def optimizer_for(follower):
        optimizer = torch.optim.SGD(nn.Linear(3, 1).parameters(), lr=0.1)
        polyak.attach(optimizer, follower)
        return optimizer

    slow, around = Slow(), Around()
    thread = threading.Thread(target=optimizer_for(slow).step)
    thread.start()
    assert inside.wait(30)
    optimizer_for(around).step()
    assert slow.steps == around.steps == 1
