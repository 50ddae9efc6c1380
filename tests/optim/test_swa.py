"""SWA follows torchcontrib's rule: options, samples, learning rate, swapping, BatchNorm."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from polyak.errors import OptionError, SwapError
from polyak.optim import SWA
from swa_training import equal, gradients, network, parameter, train, weights

SGD = torch.optim.SGD


# Options.


def test_automatic_only_if_start_and_freq_are_both_given() -> None:
    inner = SGD([parameter(1.0)], lr=0.1)
    for lr in (None, 0.01):
        assert SWA(inner, swa_start=5, swa_freq=2, swa_lr=lr)._auto_mode is True
    manual = SWA(inner)
    assert (manual._auto_mode, manual.swa_start, manual.swa_freq, manual.swa_lr) == (False, None, None, None)


@pytest.mark.parametrize(
    ("options", "ignored"),
    [
        ({"swa_start": 5}, ["other"]),
        ({"swa_freq": 5}, ["other"]),
        ({"swa_lr": 0.1}, ["swa_lr"]),
        ({"swa_start": 5, "swa_lr": 0.1}, ["other", "swa_lr"]),
    ],
)
def test_missing_options_warn_and_leave_manual_mode(options: dict[str, Any], ignored: list[str]) -> None:
    with pytest.warns(UserWarning) as caught:
        opt = SWA(SGD([parameter(1.0)], lr=0.1), **options)
    assert [str(w.message) for w in caught] == [
        f"Some of swa_start, swa_freq is None, ignoring {what}" for what in ignored
    ]
    assert {w.filename for w in caught} == {__file__}
    assert (opt._auto_mode, opt.swa_start, opt.swa_freq, opt.swa_lr) == (False, None, None, None)


def test_numbers_that_are_not_int_are_cast_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="Casting swa_start, swa_freq to int") as caught:
        opt = SWA(SGD([parameter(1.0)], lr=0.1), swa_start=5.7, swa_freq=2.0)  # type: ignore[arg-type]
    assert (opt.swa_start, opt.swa_freq) == (5, 2) and type(opt.swa_start) is int
    assert {w.filename for w in caught} == {__file__}


@pytest.mark.parametrize(
    ("start", "freq", "lr", "message"),
    [
        (-1, 0, None, "Invalid swa_start: -1"),
        (-0.5, 1, None, "Invalid swa_start: -0.5"),
        (1, 0, -1e-4, "Invalid swa_freq: 0"),
        (1, 0.5, None, "Invalid swa_freq: 0.5"),
        (1, float("nan"), None, "Invalid swa_freq: nan"),
        (1, 2, -1e-4, "Invalid SWA learning rate: -0.0001"),
        (1, 2, float("nan"), "Invalid SWA learning rate: nan"),
    ],
)
def test_bad_options_are_value_errors(start: Any, freq: Any, lr: Any, message: str) -> None:
    inner = SGD([parameter(1.0)], lr=0.1)
    for kind in (ValueError, OptionError):
        with pytest.raises(kind, match=f"^{message}"):
            SWA(inner, swa_start=start, swa_freq=freq, swa_lr=lr)
    assert "n_avg" not in inner.param_groups[0]


def test_something_that_is_no_optimizer_is_refused() -> None:
    with pytest.raises(OptionError, match="wraps a torch optimizer, got list"):
        SWA([parameter(1.0)])  # type: ignore[arg-type]


# The rule, against float64 and against torchcontrib.


@settings(deadline=None, max_examples=30)
@given(
    start=st.integers(0, 12), freq=st.integers(1, 6), steps=st.integers(1, 25), added_at=st.integers(0, 25)
)
def test_automatic_mode_follows_torchcontribs_rule(start: int, freq: int, steps: int, added_at: int) -> None:
    """Every value is computed here in float64 from SGD's own formula; a second group is added on the way."""
    x, y = parameter(5.0, 2.0, dtype=torch.float64), parameter(3.0, 7.0, dtype=torch.float64)
    opt = SWA(SGD([x], lr=0.01), swa_start=start, swa_freq=freq, swa_lr=0.003)
    runs = [{"w": [5.0, 2.0], "lr": 0.01, "t": 0, "samples": []}]
    for step in range(steps):
        if step == added_at:
            opt.add_param_group({"params": y, "lr": 0.02})
            runs.append({"w": [3.0, 7.0], "lr": 0.02, "t": 0, "samples": []})
        opt.zero_grad()
        (x.pow(2).sum() / 2 + y.pow(2).sum() / 2).backward()
        opt.step()
        for run in runs:
            run["lr"] = 0.003 if run["t"] >= start else run["lr"]
            run["w"] = [w - run["lr"] * w for w in run["w"]]
            run["t"] += 1
            if run["t"] > start and run["t"] % freq == 0:
                run["samples"].append(run["w"])
    for group, run in zip(opt.param_groups, runs, strict=True):
        p = group["params"][0]
        assert (group["lr"], group["step_counter"], group["n_avg"]) == (
            run["lr"],
            run["t"],
            len(run["samples"]),
        )
        torch.testing.assert_close(p.data, torch.tensor(run["w"], dtype=torch.float64))
        assert ("swa_buffer" in opt.state[p]) == bool(run["samples"])
        if run["samples"]:
            mean = torch.tensor(run["samples"], dtype=torch.float64).mean(0)
            torch.testing.assert_close(opt.state[p]["swa_buffer"], mean, rtol=1e-14, atol=0)


@pytest.mark.parametrize("kept", [None, 0])
def test_manual_mode_equals_the_real_torchcontrib(kept: int | None) -> None:
    """Its step() fails on today's torch, so its wrapped optimizer steps; the averaging is its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchcontrib = pytest.importorskip("torchcontrib.optim", reason="torchcontrib is not installed")
    mine, theirs = network(), network()
    ours = SWA(SGD([{"params": m.parameters()} for m in (mine[0], mine[2])], lr=0.05, momentum=0.9))
    peer = torchcontrib.SWA(
        SGD([{"params": m.parameters()} for m in (theirs[0], theirs[2])], lr=0.05, momentum=0.9)
    )
    for step in range(40):
        train(ours, mine, range(step, step + 1))
        train(peer.optimizer, theirs, range(step, step + 1))
        if step % 3 == 0:
            for opt in (ours, peer):
                opt.update_swa() if kept is None else opt.update_swa_group(opt.param_groups[kept])
    assert equal(weights(mine), weights(theirs))
    assert [g["n_avg"] for g in ours.param_groups] == [g["n_avg"] for g in peer.param_groups]
    for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert ("swa_buffer" in ours.state[p]) == ("swa_buffer" in peer.state[q])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours.swap_swa_sgd()
        peer.swap_swa_sgd()
    for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_updating_one_group_leaves_the_others_alone() -> None:
    x, y = parameter(1.0), parameter(2.0)
    opt = SWA(SGD([{"params": [x]}, {"params": [y]}], lr=0.1))
    opt.update_swa_group(opt.param_groups[1])
    assert [group["n_avg"] for group in opt.param_groups] == [0, 1]
    with pytest.raises(OptionError, match="one of this optimizer's param_groups"):
        opt.update_swa_group({"params": [x], "n_avg": 0})


def test_n_avg_set_to_zero_begins_a_new_mean() -> None:
    x = parameter(1.0)
    opt = SWA(SGD([x], lr=0.1))
    opt.update_swa()
    opt.param_groups[0]["n_avg"] = 0
    x.data.fill_(7.0)
    opt.update_swa()
    assert (opt.param_groups[0]["n_avg"], opt.state[x]["swa_buffer"].item()) == (1, 7.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_averaged_in_fp32(dtype: torch.dtype) -> None:
    model = network(dtype)
    opt = SWA(SGD(model.parameters(), lr=0.01), swa_start=0, swa_freq=1)
    visited = []
    for _ in gradients(model, range(200)):
        opt.step()
        visited.append([p.detach().double() for p in model.parameters()])
    for i, p in enumerate(model.parameters()):
        mean = torch.stack([sample[i] for sample in visited]).mean(0)
        assert opt.state[p]["swa_buffer"].dtype == torch.float32
        torch.testing.assert_close(opt.state[p]["swa_buffer"].double(), mean, rtol=0, atol=1e-5)


def test_a_sample_that_is_not_finite_is_skipped_and_counted() -> None:
    x, y = parameter(1.0, 2.0), parameter(3.0)
    opt = SWA(SGD([{"params": [x]}, {"params": [y]}], lr=0.1))
    for value in (1.0, float("nan"), float("inf"), 3.0):
        x.data[1] = value
        opt.update_swa()
    assert [(g["n_avg"], g["n_skipped"]) for g in opt.param_groups] == [(2, 2), (4, 0)]
    assert opt.state[x]["swa_buffer"].tolist() == [1.0, 2.0]


def test_a_group_with_only_skipped_samples_was_never_averaged() -> None:
    x = parameter(float("nan"))
    opt = SWA(SGD([x], lr=0.1))
    opt.update_swa()
    assert opt.state_dict()["swa_state"] == {} and opt.param_groups[0]["n_skipped"] == 1
    with pytest.warns(UserWarning, match="SWA wasn't applied to param"):
        opt.swap_swa_sgd()
    x.data.fill_(4.0)
    opt.update_swa()
    assert opt.state[x]["swa_buffer"].item() == 4.0 and opt.param_groups[0]["n_skipped"] == 1


# swa_lr.


def test_swa_lr_holds_from_swa_start_on() -> None:
    opt = SWA(SGD([parameter(1.0)], lr=0.1), swa_start=5, swa_freq=2, swa_lr=0.01)
    rates = []
    for _ in range(8):
        opt.step()
        rates.append(opt.param_groups[0]["lr"])
    assert rates == [0.1] * 5 + [0.01] * 3


def test_a_learning_rate_that_is_a_tensor_is_filled() -> None:
    rate = torch.tensor(0.1)
    opt = SWA(SGD([parameter(1.0)], lr=rate, foreach=False), swa_start=0, swa_freq=1, swa_lr=0.01)
    opt.step()
    assert opt.param_groups[0]["lr"] is rate and rate.item() == pytest.approx(0.01)


# Swapping.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_two_swaps_lose_nothing(dtype: torch.dtype) -> None:
    model, twin = network(dtype), network(dtype)
    opt, undisturbed = (
        SWA(torch.optim.Adam(m.parameters(), lr=0.01), swa_start=3, swa_freq=2) for m in (model, twin)
    )
    train(opt, model, range(10))
    train(undisturbed, twin, range(10))
    live, places = weights(model), [p.data_ptr() for p in model.parameters()]
    means = [opt.state[p]["swa_buffer"].clone() for p in model.parameters()]
    for _ in range(2):
        opt.swap_swa_sgd()
        assert equal(weights(model), [m.to(dtype) for m in means])
        opt.swap_swa_sgd()
        assert equal(weights(model), live)
    assert equal([opt.state[p]["swa_buffer"] for p in model.parameters()], means)
    assert [p.data_ptr() for p in model.parameters()] == places
    assert all("live_buffer" not in opt.state[p] for p in model.parameters())
    train(opt, model, range(10, 20))
    train(undisturbed, twin, range(10, 20))
    assert equal(weights(model), weights(twin))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(opt.state[p]["swa_buffer"], undisturbed.state[q]["swa_buffer"])


def test_while_swapped_nothing_goes_on_from_the_average() -> None:
    x = parameter(1.0)
    opt = SWA(SGD([x], lr=0.1))
    opt.update_swa()
    saved = copy.deepcopy(opt.state_dict())
    x.data.fill_(5.0)
    opt.swap_swa_sgd()
    x.grad = torch.ones(1)
    calls: list[Callable[[], None]] = [opt.step, opt.update_swa, lambda: opt.load_state_dict(saved)]
    for call in calls:
        with pytest.raises(SwapError, match=r"swap_swa_sgd\(\) again"):
            call()
    assert (x.item(), opt.param_groups[0]["n_avg"], opt.param_groups[0]["step_counter"]) == (1.0, 1, 0)
    opt.swap_swa_sgd()
    opt.step()
    assert x.item() == pytest.approx(4.9)


def test_a_new_optimizer_may_go_on_from_the_averaged_weights() -> None:
    x = parameter(1.0)
    first = SWA(SGD([x], lr=0.1))
    first.update_swa()
    first.swap_swa_sgd()
    second = SWA(SGD([x], lr=0.1), swa_start=0, swa_freq=1)
    x.grad = torch.ones(1)
    second.step()
    second.swap_swa_sgd()
    assert x.item() == pytest.approx(0.9)


def test_weights_changed_while_swapped_are_lost_with_a_warning() -> None:
    x = parameter(1.0)
    opt = SWA(SGD([x], lr=0.1))
    opt.update_swa()
    opt.swap_swa_sgd()
    with torch.no_grad():
        x.mul_(2)
    with pytest.warns(UserWarning, match="those changes are gone") as caught:
        opt.swap_swa_sgd()
    assert x.item() == 1.0 and caught[0].filename == __file__


def test_groups_without_a_sample_are_skipped_with_a_warning() -> None:
    x, y, z = parameter(1.0), parameter(2.0), parameter(4.0)
    opt = SWA(SGD([{"params": [("x", x)]}, {"params": [("y", y), ("z", z)]}], lr=0.1))
    opt.update_swa_group(opt.param_groups[0])
    x.data.fill_(3.0)
    with pytest.warns(UserWarning) as caught:
        opt.swap_swa_sgd()
    # As torchcontrib words it, which callers match on, and then which it is.
    assert [str(warning.message) for warning in caught] == [
        f"SWA wasn't applied to param {p}; skipping it, as group 1 has no sample: its name or place there is {name!r}"
        for name, p in (("y", y), ("z", z))
    ]
    assert "tensor([2.], requires_grad=True)" in str(caught[0].message) and caught[0].filename == __file__
    assert (x.item(), y.item(), z.item()) == (1.0, 2.0, 4.0)
    opt.swap_swa_sgd()
    assert (x.item(), y.item(), z.item()) == (3.0, 2.0, 4.0)


def test_an_interrupt_while_the_averages_go_in_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = parameter(1.0), parameter(2.0)
    opt = SWA(SGD([{"params": [x]}, {"params": [y]}], lr=0.1))
    opt.update_swa()
    x.data.fill_(3.0)
    y.data.fill_(4.0)

    def interrupted(targets: list[Tensor], values: list[Tensor]) -> None:
        targets[0].data.fill_(99.0)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("polyak.optim._swa.copy_into", interrupted)
        opt.swap_swa_sgd()
    with pytest.raises(SwapError):
        opt.step()
    opt.swap_swa_sgd()
    assert (x.item(), y.item()) == (3.0, 4.0)


# BatchNorm.


def test_bn_update_gives_the_statistics_of_all_samples() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=0.3))
    data = torch.randn(50, 3)
    SWA.bn_update([(batch, None) for batch in data.split(7)], model, device="cpu")
    features = model[0](data).detach()
    torch.testing.assert_close(model[1].running_mean, features.mean(0))
    torch.testing.assert_close(model[1].running_var, features.var(0, unbiased=False), rtol=1e-3, atol=0)
    assert model[1].momentum == 0.3 and model.training
