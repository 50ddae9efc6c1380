"""`attach` under everything that calls, skips or doubles an optimizer's step."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
import torch._dynamo.testing
from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import polyak
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
    counter = Counter()
    polyak.attach(optimizer, counter)
    for number, copied in enumerate((copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer)))):
        copied.step()
        assert (average.n_averaged, counter.steps) == (0, number)
        polyak.attach(copied, counter)  # no copy counts as one that it follows already
        copied.step()
        assert (average.n_averaged, counter.steps) == (0, number + 1)


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
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    average = polyak.Average(model, polyak.Uniform())
    run = polyak.Recorder(model, tmp_path, block=1)
    with polyak.attach(optimizer, average, run):
        backward(model)
        optimizer.step()
        for follower in (average, run):
            with pytest.raises(OptionError, match="would count the step twice"):
                follower.update()
        with pytest.raises(OptionError, match=r"note\(loss=loss\) for metrics"):
            run.update(loss=1.0)
        run.note(loss=2.0)
        run.note(loss=4.0)
        backward(model)
        optimizer.step()
    assert average.n_averaged == 2
    average.update()
    run.update()
    run.close()
    assert average.n_averaged == 3
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
    """One optimizer is at work while another's step begins and ends."""
    inside, go_on = threading.Event(), threading.Event()

    class Slow(polyak.Average):
        def update(self):
            inside.set()
            assert go_on.wait(30)
            super().update()

    class Around(polyak.Average):
        def update(self):
            with pytest.raises(OptionError, match="would count the step twice"):
                slow.update()
            go_on.set()
            thread.join(30)
            super().update()

    def trained(kind):
        model = nn.Linear(3, 1)
        average = kind(model, polyak.Uniform())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        polyak.attach(optimizer, average)
        return average, optimizer

    (slow, slow_optimizer), (around, around_optimizer) = trained(Slow), trained(Around)
    thread = threading.Thread(target=slow_optimizer.step)
    thread.start()
    assert inside.wait(30)
    inside.clear()
    slow_update, slow.update = slow.update, polyak.Average.update.__get__(slow)  # by hand, from this thread
    around_optimizer.step()
    slow.update = slow_update
    assert slow.n_averaged == around.n_averaged == 1


def test_one_optimizer_stepped_by_several_threads_counts_every_step():
    lock = threading.Lock()

    class Locked(Counter):
        def update(self):
            with lock:
                super().update()

    optimizer, counter = Doubling(nn.Linear(3, 1).parameters(), lr=0.1), Locked()
    polyak.attach(optimizer, counter)
    threads = [threading.Thread(target=lambda: [optimizer.step() for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert counter.steps == 200


# What it refuses, before anything is counted.


def test_an_average_on_two_optimizers_is_refused():
    """Both would count, as where matrices and the rest of a model have an optimizer each."""
    model = nn.Linear(3, 1)
    matrices, rest = torch.optim.SGD([model.weight], lr=0.1), torch.optim.AdamW([model.bias], lr=0.1)
    average, other = polyak.Average(model, polyak.Uniform()), Counter()
    handle = polyak.attach(matrices, average)
    with pytest.raises(OptionError, match="attached to another optimizer, and would count the steps of both"):
        polyak.attach(rest, other, average)
    backward(model)
    matrices.step()
    rest.step()
    assert (average.n_averaged, other.steps) == (1, 0)
    handle.remove()
    polyak.attach(rest, other, average)
    matrices.step()
    rest.step()
    assert (average.n_averaged, other.steps) == (2, 1)


def test_an_optimizer_that_is_gone_leaves_its_average_to_the_next():
    model = nn.Linear(3, 1)
    average = polyak.Average(model, polyak.Uniform())
    old = polyak.attach(torch.optim.SGD(model.parameters(), lr=0.1), average)
    gc.collect()
    optimizer = torch.optim.AdamW(model.parameters())
    polyak.attach(optimizer, average)
    old.remove()
    optimizer.step()
    assert average.n_averaged == 1
    with pytest.raises(OptionError, match="would count the step twice"):
        average.update()


def test_an_optimizer_of_another_model_is_refused(tmp_path):
    generator, discriminator = nn.Linear(3, 3), nn.Linear(3, 1)
    optimizer = torch.optim.SGD(discriminator.parameters(), lr=0.1)
    run = polyak.Recorder(generator, tmp_path, block=1)
    for follower in (polyak.Average(generator, polyak.Uniform()), run):
        with pytest.raises(
            OptionError, match=f"no parameter of the model that this {type(follower).__name__}"
        ):
            polyak.attach(optimizer, Counter(), follower)
        follower.update()
    run.close()
    assert not vars(optimizer).get("step"), "nothing was attached"


def test_an_optimizer_of_a_part_of_the_model_is_taken():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    for params in (model[1].parameters(), [model[0].bias]):
        average = polyak.Average(torch.compile(nn.DataParallel(model), backend="eager"), polyak.Uniform())
        optimizer = torch.optim.SGD(params, lr=0.1)
        polyak.attach(optimizer, average)
        optimizer.step()
        assert average.n_averaged == 1


def test_parameters_that_were_replaced_are_those_that_count():
    model = nn.Linear(3, 1)
    average, old = polyak.Average(model, polyak.Uniform()), torch.optim.SGD(model.parameters(), lr=0.1)
    model.weight, model.bias = (nn.Parameter(p.detach().clone()) for p in (model.weight, model.bias))
    with pytest.raises(OptionError, match="made after the model was last changed"):
        polyak.attach(old, average)
    new = torch.optim.SGD(model.parameters(), lr=0.1)
    polyak.attach(new, average)
    new.step()
    assert average.n_averaged == 1


# Around the optimizer's own step.


def schedulers(optimizer):
    yield torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=20)
    yield torch.optim.lr_scheduler.StepLR(optimizer, 1)


@pytest.mark.parametrize("order", ["scheduler first", "attach first"])
@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, Doubling], ids=["plain", "doubling"])
def test_schedulers_made_before_or_after(order, optimizer_class):
    """Schedulers wrap step too, and warn where they do not find their mark on it; warnings are errors here."""
    model, counter = nn.Linear(3, 1), Counter()
    optimizer = optimizer_class(model.parameters(), lr=0.1, momentum=0.9)
    if order == "attach first":
        handle = polyak.attach(optimizer, counter)
    made = list(schedulers(optimizer))
    if order == "scheduler first":
        handle = polyak.attach(optimizer, counter)
    for _ in range(3):
        backward(model)
        optimizer.step()
        for scheduler in made:
            scheduler.step()
    assert counter.steps == 3
    handle.remove()
    optimizer.step()
    made[0].step()
    assert counter.steps == 3
    with polyak.attach(optimizer, counter):
        optimizer.step()
        made[0].step()
    assert counter.steps == 4


def test_the_optimizer_is_as_it_was_once_nothing_follows():
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = dict(vars(optimizer))
    first, second, third = (polyak.attach(optimizer, Counter()) for _ in range(3))
    for handle in (second, first, third):
        assert "step" in vars(optimizer)
        handle.remove()
    assert vars(optimizer) == before
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    scheduled = optimizer.step
    for _ in range(3):
        with polyak.attach(optimizer, Counter()):
            assert optimizer.step is not scheduled
        assert optimizer.step is scheduled


def test_a_scheduler_around_what_was_removed_goes_on():
    """Its wrapper keeps ours, whose removal it cannot see."""
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    counters = [Counter() for _ in range(3)]
    handles = [polyak.attach(optimizer, counter) for counter in counters[:2]]
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    optimizer.step()
    handles[0].remove()
    optimizer.step()
    handles[1].remove()
    optimizer.step()
    handles.append(polyak.attach(optimizer, counters[2]))
    optimizer.step()
    handles[2].remove()
    optimizer.step()
    scheduler.step()
    assert [counter.steps for counter in counters] == [1, 2, 1]


def test_an_attached_optimizer_is_let_go_without_the_garbage_collector():
    """Its state may be gigabytes, so no cycle may hold it."""
    model = nn.Linear(3, 1)
    average = polyak.Average(model, polyak.Uniform())
    gc.disable()
    try:
        optimizer = torch.optim.Adam(model.parameters())
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
        handle = polyak.attach(optimizer, average)
        backward(model)
        optimizer.step()
        gone = weakref.ref(optimizer)
        del optimizer
        assert gone() is None
        handle.remove()
    finally:
        gc.enable()


class Verbatim(torch.optim.SGD):
    """Copies every attribute, as wrappers of optimizers do."""

    def __getstate__(self):
        return vars(self).copy()


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, Doubling, Verbatim])
def test_copies_and_saved_states_know_nothing_of_it(optimizer_class):
    model = nn.Linear(3, 1)
    optimizer = optimizer_class(model.parameters(), lr=0.1)
    backward(model)
    optimizer.step()
    plain = optimizer.state_dict().keys()
    average = polyak.Average(model, polyak.Uniform())
    polyak.attach(optimizer, average)
    assert optimizer.state_dict().keys() == plain
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # goes through __setstate__
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        before = model.weight.detach().clone(), copied.param_groups[0]["params"][0].detach().clone()
        copied.param_groups[0]["params"][0].grad = torch.ones(1, 3)
        copied.step()
        assert torch.equal(model.weight, before[0]), "the copy stepped the original"
        assert not torch.equal(copied.param_groups[0]["params"][0], before[1])
        counter = Counter()
        with polyak.attach(copied, counter):
            copied.step()
        assert counter.steps == 1
    assert average.n_averaged == 0
    optimizer.step()
    assert average.n_averaged == 1


def test_copies_of_an_attached_average_are_attached_to_nothing():
    model = nn.Linear(3, 1)
    optimizer, average = torch.optim.SGD(model.parameters(), lr=0.1), polyak.Average(model, polyak.Uniform())
    polyak.attach(optimizer, average)
    for copied in (copy.deepcopy(average), pickle.loads(pickle.dumps(average))):
        copied.update()
        assert (copied.n_averaged, average.n_averaged) == (1, 0)


def accelerated(optimizer_class, attach_to):
    """An optimizer under accelerate's gradient scaling, which puts other functions in the place of ``step``."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.Accelerator(cpu=True)
    model, counter = nn.Linear(3, 1), Counter()
    optimizer = optimizer_class(model.parameters(), lr=0.1)
    if attach_to == "before":
        polyak.attach(optimizer, counter)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    prepared = accelerate.optimizer.AcceleratedOptimizer(optimizer, scaler=scaler)
    if attach_to != "before":
        polyak.attach({"prepared": prepared, "inner": optimizer}[attach_to], counter)

    def run(*scales):
        for scale in scales:
            scaler.scale(model(torch.ones(2, 3)).sum() * scale).backward()
            prepared.step()
            prepared.zero_grad()

    return run, counter, prepared


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, Doubling], ids=["plain", "doubling"])
@pytest.mark.parametrize("attach_to", ["before", "prepared"])
def test_accelerates_wrapper_with_scaled_gradients(optimizer_class, attach_to):
    run, counter, prepared = accelerated(optimizer_class, attach_to)
    run(1.0, 1.0, float("inf"), 1.0)
    assert counter.steps == 3
    torch.optim.lr_scheduler.StepLR(prepared, 1)
    run(1.0)
    assert counter.steps == 4
    copied = copy.deepcopy(prepared)
    copied.step_was_skipped  # noqa: B018
    assert counter.steps == 4


def test_accelerates_wrapper_around_what_is_attached_to():
    run, counter, _ = accelerated(torch.optim.SGD, "inner")
    run(1.0, float("inf"), 1.0)
    assert counter.steps == 2
    run, counter, _ = accelerated(Doubling, "inner")
    with pytest.raises(OptionError, match=r"step\(\) of Doubling was called as it was before attach"):
        run(1.0)
    assert counter.steps == 0


def test_a_wrapper_that_steps_several_times_counts_each():
    class Twice(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer = optimizer
            super().__init__(optimizer.param_groups, {})

        def step(self, closure=None):
            self.optimizer.step(closure)
            return self.optimizer.step(closure)

    model, counter = nn.Linear(3, 1), Counter()
    optimizer = Twice(Doubling(model.parameters(), lr=0.1))
    with polyak.attach(optimizer, counter):
        optimizer.step()
        optimizer.optimizer.step()
    optimizer.step()
    assert counter.steps == 3


class Forwarding(torch.optim.Optimizer):
    """What is set on it is set on what it holds."""

    def __init__(self, optimizer):
        vars(self)["optimizer"] = optimizer

    def __getattr__(self, name):
        return getattr(vars(self)["optimizer"], name)

    def __setattr__(self, name, value):
        setattr(self.optimizer, name, value)

    def step(self, closure=None):
        return self.optimizer.step(closure)


class Slotted:
    """Holds an optimizer, is none, and has no dictionary to put anything into."""

    __slots__ = ("optimizer",)

    def __init__(self, optimizer):
        self.optimizer = optimizer


@pytest.mark.parametrize("wrapper", [Forwarding, Slotted])
def test_wrappers_of_all_kinds(wrapper):
    model, average = nn.Linear(3, 1), None
    optimizer = Doubling(model.parameters(), lr=0.1)
    average = polyak.Average(model, polyak.Uniform())
    wrapped = wrapper(optimizer)
    handle = polyak.attach(wrapped, average)
    for step in (optimizer.step, getattr(wrapped, "step", optimizer.step)):
        step()
    assert average.n_averaged == 2
    handle.remove()
    optimizer.step()
    assert average.n_averaged == 2 and "step" not in vars(optimizer)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch itself, while it loads its compiler
def count_compiled_steps():
    """Samples of three compiled steps, and operations that were compiled."""
    compiled = torch._dynamo.testing.CompileCounter()
    model = nn.Linear(3, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    average = polyak.Average(model, polyak.Uniform())
    polyak.attach(optimizer, average)
    step = torch.compile(lambda: optimizer.step(), backend=compiled)
    for _ in range(3):
        backward(model)
        step()
    return average.n_averaged, compiled.op_count


def test_compiled_steps_count_and_stay_compiled():
    # In a process of its own: what other tests have compiled, or interrupted, can keep torch from compiling at all.
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        n_averaged, n_operations = pool.submit(count_compiled_steps).result()
    assert n_averaged == 3 and n_operations > 10


def test_a_step_that_raised_counts_nothing_anywhere():
    model, counter = nn.Linear(3, 1), Counter()
    torch.optim.SGD(model.parameters(), lr=0.1)  # makes torch wrap the parent's step as well
    optimizer = Doubling(model.parameters(), lr=0.1, fused=True)
    outer = polyak.optim.SWA(optimizer)
    polyak.attach(outer, counter)
    optimizer.fail = True
    for step in (outer.step, optimizer.step):
        try:
            step()
        except RuntimeError as error:
            kept = error  # its traceback keeps the frames of the failed step
    assert kept is not None and counter.steps == 0
    optimizer.fail = False
    optimizer.found_inf = torch.tensor(1.0)  # as GradScaler does: the next step is skipped
    optimizer.step()
    del optimizer.found_inf
    assert counter.steps == 0
    outer.step()
    optimizer.step()
    assert counter.steps == 2


def test_an_update_that_raises_or_steps_does_not_upset_the_count():
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    class Odd(Counter):
        def update(self):
            super().update()
            if self.steps == 1:
                raise RuntimeError("once")
            optimizer.step()  # part of the step that is being counted

    odd = Odd()
    polyak.attach(polyak.optim.SWA(optimizer), odd)
    with pytest.raises(RuntimeError, match="once"):
        optimizer.step()
    optimizer.step()
    optimizer.step()
    assert odd.steps == 3


@pytest.mark.parametrize("prepared", [False, True])
def test_the_step_by_which_distributed_checkpoints_make_state_is_none(prepared):
    """They do so before state is saved or loaded that is not there: of SGD without momentum, each time."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if prepared:
        optimizer = Accelerator(cpu=True).prepare(optimizer)
    average = polyak.Average(model, polyak.Uniform())
    handle = polyak.attach(optimizer, average)
    state = get_optimizer_state_dict(model, optimizer)
    set_optimizer_state_dict(model, optimizer, state)
    assert average.n_averaged == 0
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    assert average.n_averaged == 1
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # as a warm-up begins
    optimizer.step()
    assert average.n_averaged == 2
    handle.remove()
