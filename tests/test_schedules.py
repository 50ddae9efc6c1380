import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyak.errors import OptionError
from polyak.schedules import cyclical_schedule, swa_schedule


def sgd(*rates: float) -> torch.optim.SGD:
    return torch.optim.SGD(
        [{"params": [torch.zeros(1, requires_grad=True)], "lr": rate} for rate in rates], lr=1.0
    )


def used_rates(optimizer, scheduler, steps: int) -> list[list[float]]:
    """The learning rates that steps 1, 2, ... are taken with, one list for each parameter group."""
    used = []
    for _ in range(steps):
        used.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return [list(rates) for rates in zip(*used, strict=True)]


def paper_swa_rate(steps_done: int, swa_start: int, lr: float, swa_lr: float) -> float:
    t = steps_done / swa_start
    if t <= 0.5:
        return lr
    if t <= 0.9:
        return lr * (1 - (1 - swa_lr / lr) * (t - 0.5) / 0.4)
    return swa_lr


def paper_cyclical_rate(i: int, c: int, lr: float, lr_min: float) -> float:
    t = ((i - 1) % c + 1) / c
    return (1 - t) * lr + t * lr_min


@settings(deadline=None, max_examples=50)
@given(
    swa_start=st.integers(1, 60),
    lr=st.floats(1e-3, 1.0),
    swa_lr=st.floats(1e-4, 2.0),
)
def test_swa_schedule_is_the_papers(swa_start, lr, swa_lr):
    optimizer = sgd(lr)
    (rates,) = used_rates(optimizer, swa_schedule(optimizer, swa_start=swa_start, swa_lr=swa_lr), 70)
    expected = [paper_swa_rate(steps_done, swa_start, lr, swa_lr) for steps_done in range(70)]
    assert rates == pytest.approx(expected, rel=1e-9)


@settings(deadline=None, max_examples=50)
@given(
    cycle_steps=st.integers(1, 20), start=st.integers(0, 25), lr=st.floats(1e-3, 1.0), part=st.floats(0, 1)
)
def test_cyclical_schedule_is_the_papers(cycle_steps, start, lr, part):
    optimizer = sgd(lr)
    scheduler = cyclical_schedule(optimizer, lr_min=lr * part, cycle_steps=cycle_steps, start=start)
    (rates,) = used_rates(optimizer, scheduler, 70)
    assert rates[:start] == [lr] * start
    expected = [paper_cyclical_rate(i, cycle_steps, lr, lr * part) for i in range(1, 71 - start)]
    assert rates[start:] == pytest.approx(expected, rel=1e-9)


def test_the_hold_starts_at_nine_tenths_although_that_is_no_float():
    for swa_start in range(10, 500, 10):
        optimizer = sgd(0.1)
        (rates,) = used_rates(optimizer, swa_schedule(optimizer, swa_start=swa_start, swa_lr=0.03), swa_start)
        assert rates[swa_start // 10 * 9] == pytest.approx(0.03, rel=1e-15)
        assert rates[swa_start // 10 * 9 - 1] > 0.03
        assert rates[swa_start // 2] == 0.1


def test_cycles_end_where_the_average_samples():
    start, cycle_steps = 7, 5
    optimizer = sgd(0.1)
    scheduler = cyclical_schedule(optimizer, lr_min=0, cycle_steps=cycle_steps, start=start)
    (rates,) = used_rates(optimizer, scheduler, 40)
    lowest = [step for step, rate in enumerate(rates, 1) if rate == 0]
    assert lowest == list(range(start + cycle_steps, 41, cycle_steps))


def test_each_group_goes_to_the_same_swa_lr_from_its_own_rate_or_to_its_own():
    optimizer = sgd(0.1, 0.4)
    first, second = used_rates(optimizer, swa_schedule(optimizer, swa_start=10, swa_lr=0.05), 11)
    assert first[0] == 0.1 and second[0] == 0.4
    assert first[-1] == pytest.approx(0.05) and second[-1] == pytest.approx(0.05)

    optimizer = sgd(0.1, 0.4)
    first, second = used_rates(optimizer, cyclical_schedule(optimizer, lr_min=[0.05, 0.2], cycle_steps=3), 3)
    assert first[-1] == pytest.approx(0.05) and second[-1] == pytest.approx(0.2)


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: swa_schedule(optimizer, swa_start=20, swa_lr=0.02),
        lambda optimizer: cyclical_schedule(optimizer, lr_min=0.01, cycle_steps=6, start=3),
    ],
)
def test_a_resumed_schedule_goes_on_as_if_uninterrupted(schedule):
    whole = sgd(0.1)
    expected = used_rates(whole, schedule(whole), 30)

    optimizer = sgd(0.1)
    scheduler = schedule(optimizer)
    before = used_rates(optimizer, scheduler, 13)
    saved = pickle.loads(pickle.dumps((optimizer.state_dict(), scheduler.state_dict())))
    resumed = sgd(0.1)
    resumed_scheduler = schedule(resumed)
    resumed.load_state_dict(saved[0])
    resumed_scheduler.load_state_dict(saved[1])
    after = used_rates(resumed, resumed_scheduler, 17)
    assert [a + b for a, b in zip(before, after, strict=True)] == expected


def test_a_schedule_made_for_a_run_in_progress_scales_the_initial_rate():
    optimizer = sgd(0.1)
    used_rates(optimizer, swa_schedule(optimizer, swa_start=4, swa_lr=0.05), 6)
    swa_schedule(optimizer, swa_start=10, swa_lr=0.02)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def test_schedules_pickle():
    optimizer = sgd(0.1)
    scheduler = pickle.loads(pickle.dumps(swa_schedule(optimizer, swa_start=10, swa_lr=0.02)))
    assert scheduler.lr_lambdas[0](10) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("schedule", "options", "message"),
    [
        (swa_schedule, {"swa_start": 0, "swa_lr": 0.1}, "swa_start"),
        (swa_schedule, {"swa_start": 2.5, "swa_lr": 0.1}, "swa_start"),
        (swa_schedule, {"swa_start": True, "swa_lr": 0.1}, "swa_start"),
        (swa_schedule, {"swa_start": 5, "swa_lr": 0.0}, "swa_lr must be above 0"),
        (swa_schedule, {"swa_start": 5, "swa_lr": float("nan")}, "finite"),
        (swa_schedule, {"swa_start": 5, "swa_lr": "0.1"}, "swa_lr"),
        (swa_schedule, {"swa_start": 5, "swa_lr": [0.1, 0.1]}, "2 values for 1 parameter groups"),
        (cyclical_schedule, {"lr_min": 0.2, "cycle_steps": 5}, "lr_min must lie between"),
        (cyclical_schedule, {"lr_min": -0.1, "cycle_steps": 5}, "lr_min must lie between"),
        (cyclical_schedule, {"lr_min": 0.01, "cycle_steps": 0}, "cycle_steps"),
        (cyclical_schedule, {"lr_min": 0.01, "cycle_steps": 5, "start": -1}, "start"),
    ],
)
def test_bad_options_are_refused_before_the_optimizer_is_touched(schedule, options, message):
    optimizer = sgd(0.1)
    with pytest.raises(OptionError, match=message):
        schedule(optimizer, **options)
    assert "initial_lr" not in optimizer.param_groups[0]


def test_a_rate_of_zero_cannot_be_scaled():
    with pytest.raises(OptionError, match="above 0"):
        swa_schedule(sgd(0.1, 0.0), swa_start=5, swa_lr=0.1)
