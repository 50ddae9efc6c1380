"""When averages under a framework sample, and at which rate, against what the options say."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import polyak
from polyak.batchnorm import call_model
from polyak.errors import NotStartedError, OptionError, StateError
from polyak.integrations._following import Following, validates_both
from polyak.integrations._recorded import RecordedRun, preview_names
from polyak.integrations._sampling import RunLength, Sampling, SWARate

EPOCHS, STEPS = 6, 5  # of a run, and of each of its epochs
RUN = RunLength(EPOCHS * STEPS, EPOCHS)


class Run:
    """A model whose weight after step n is n, trained by the calls that a framework makes."""

    def __init__(self, scheme="uniform", run=RUN, should_update=None, **options):
        self.model = nn.Linear(1, 1, bias=False)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)
        self.following = Following(
            scheme, None, {}, sampling=Sampling(**options), should_update=should_update
        )
        self.following.begin(self.model, self.optimizer, call_model, run)
        self.step = 0

    def train(self, epochs=EPOCHS, first=0):
        for epoch in range(first, epochs):
            self.following.epoch_began(epoch)
            for _ in range(STEPS):
                self.step += 1
                self.model.weight.grad = self.model.weight.detach() - self.step
                self.optimizer.step()
            self.following.epoch_ended(epoch)
            self.following.epoch_ended(epoch)
        return self

    @property
    def mean(self):
        return self.following.average.named_tensors()["weight"].item()


def mean(samples):
    return pytest.approx(sum(samples) / len(samples))


@pytest.mark.parametrize(
    ("options", "samples"),
    [
        ({}, range(1, 31)),
        ({"start": 7, "every": 4}, range(11, 31, 4)),
        ({"start": 0.5}, range(16, 31)),
        ({"start": 0.5, "every": 5}, range(20, 31, 5)),
        ({"start_epoch": 2}, range(11, 31)),
        ({"start_epoch": 2, "every": 3}, range(13, 31, 3)),
        ({"every_epochs": 1}, range(5, 31, 5)),
        ({"start": 0.5, "every_epochs": 1}, [20, 25, 30]),
        ({"start_epoch": 1, "every_epochs": 2}, [15, 25]),
        ({"start": 7, "every_epochs": 2}, [10, 20, 30]),
    ],
)
def test_samples_are_those_that_the_options_name(options, samples):
    run = Run(**options).train()
    assert run.following.average.n_averaged == len(samples)
    assert run.mean == mean(list(samples))


def test_a_share_of_a_run_without_known_steps_is_one_of_its_epochs():
    assert Run(start=0.5, run=RunLength(None, EPOCHS)).train().mean == mean(range(16, 31))
    for options, run in (({}, RunLength()), ({"every_epochs": 1}, RunLength(steps=30))):
        with pytest.raises(OptionError, match="start=0.5 is a share"):
            Run(start=0.5, run=run, **options)


@given(st.floats(0, 1, exclude_max=True), st.integers(1, 10**9), st.integers(1, 10**6))
def test_a_share_lies_in_the_run(share, steps, epochs):
    assert 0 <= Sampling(start=share).begins(RunLength(steps, epochs))[0] < steps
    assert 0 <= Sampling(start=share, every_epochs=1).begins(RunLength(steps, epochs))[1] < epochs


@pytest.mark.parametrize("scheme", ["power:gamma=2", "ema:half_life=4"])
def test_samples_stand_for_the_steps_since_averaging_began(scheme):
    run = Run(scheme, start_epoch=2, every_epochs=2).train()
    shares = polyak.parse(scheme).weights([0, 2 * STEPS, 4 * STEPS])
    assert run.mean == pytest.approx(shares @ [20, 30])


@pytest.mark.parametrize("by", ["step_idx", "epoch_idx"])
def test_should_update_decides_in_the_place_of_the_options(by):
    asked = []

    def should_update(step_idx=None, epoch_idx=None):
        asked.append((step_idx, epoch_idx))
        return (step_idx if by == "step_idx" else epoch_idx) in (1, 3)

    run = Run(should_update=should_update).train()
    assert run.mean == mean([2, 4] if by == "step_idx" else [10, 20])
    assert [step for step, _ in asked if step is not None] == list(range(30))
    assert [epoch for _, epoch in asked if epoch is not None] == list(range(6))


def test_a_step_is_sampled_once():
    run = Run(should_update=lambda step_idx=None, epoch_idx=None: True).train()
    assert run.following.average.n_averaged == 30


@pytest.mark.parametrize("saved_after", [1, 2, 4])
@pytest.mark.parametrize(
    "options",
    [{"start": 0.5}, {"start_epoch": 3, "every": 2}, {"start": 0.5, "every_epochs": 1}, {"start": 15}],
)
def test_it_is_resumed_as_if_never_stopped(options, saved_after):
    whole = Run("ema:half_life=6", **options).train()
    half = Run("ema:half_life=6", **options).train(saved_after)
    resumed = Run("ema:half_life=6", **options)
    resumed.following.load(half.following.average.state_dict())
    resumed.model.load_state_dict(half.model.state_dict())
    resumed.step = half.step
    resumed.following.epoch_ended(saved_after - 1)  # told again, as Lightning does
    resumed.train(first=saved_after)
    assert resumed.mean == whole.mean
    assert (
        resumed.following.begun and resumed.following.average.n_averaged == whole.following.average.n_averaged
    )


def test_a_longer_run_keeps_the_start_of_an_average_that_has_begun():
    state = Run(start=0.5).train().following.average.state_dict()
    longer = Run(start=0.5, run=RunLength(60, 12))
    longer.following.load(state)
    assert longer.following.average.start == 15
    early = Run(start=0.5).train(1).following.average.state_dict()
    longer = Run(start=0.5, run=RunLength(60, 12))
    longer.following.load(early)
    assert longer.following.average.start == 30


def test_another_schedule_in_steps_is_refused_on_resuming():
    state = Run(start=5).train().following.average.state_dict()
    for options, word in (({"start": 6}, "start=6"), ({"start": 5, "every_epochs": 1}, "every=None")):
        run = Run(**options)
        with pytest.raises(StateError, match=word):
            run.following.load(state)
        assert run.following.average.start == options["start"]


def test_the_rate_is_that_of_torch():
    run = Run()
    scheduler = SWARate([0.25], anneal_epochs=2, anneal_strategy="linear").scheduler(
        run.optimizer, "StepLR", steps_per_epoch=2
    )
    rates = []
    for _ in range(6):
        rates.append(run.optimizer.param_groups[0]["lr"])
        run.optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([1.0, 0.8125, 0.625, 0.4375, 0.25, 0.25])
    with pytest.raises(OptionError, match="2 learning rates, and the optimizer 1 "):
        SWARate([0.1, 0.2]).scheduler(run.optimizer, "StepLR")
    assert SWARate.of(None, 10, "cos") is None
    assert SWARate.of(0.1, 10, "cos") == SWARate(0.1)


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        (lambda: Sampling(start=-1), "start must be a whole number"),
        (lambda: Sampling(start=1.0), "share of the run"),
        (lambda: Sampling(start="3"), "start must be"),
        (lambda: Sampling(every=0), "every must be"),
        (lambda: Sampling(start_epoch=-1), "start_epoch must be"),
        (lambda: Sampling(every_epochs=0), "every_epochs must be"),
        (lambda: Sampling(start=3, start_epoch=1), "give one of them"),
        (lambda: Sampling(every=3, every_epochs=1), "give one of them"),
        (lambda: SWARate(0.0), "swa_lr must be"),
        (lambda: SWARate([0.1, -1]), "swa_lr must be"),
        (lambda: SWARate(0.1, anneal_epochs=-1), "anneal_epochs must be"),
        (lambda: SWARate(0.1, anneal_strategy="slow"), "'cos' or 'linear'"),
        (lambda: SWARate.of(None, 3, "cos"), "give it too"),
        (lambda: validates_both("live"), "'average' or 'both'"),
        (lambda: Following("uniform", None, {"dtype": "float23"}), "dtype must be"),
        (lambda: Following("uniform", None, {"dtype": torch.int32}), "dtype"),
        (lambda: Following("uniform", None, {"device": "warp"}), "device must be"),
        (lambda: Following("uniform", None, {"buffers": "burn"}), "buffers"),
        (lambda: Following("uniform", None, {"check_finite": "maybe"}), "check_finite"),
        (lambda: Following("uniform", None, {"include": [3]}), "include must be"),
        (lambda: RecordedRun("run", {"every": 0}), "every must be"),
        (lambda: RecordedRun("run", {"every": 2, "block": 3}), "block"),
        (lambda: RecordedRun("run", {}, preview="tail"), "tail"),
        (lambda: RecordedRun("run", {}, preview=3), "a profile is needed"),
        (lambda: RecordedRun("run", {}, recalibrate=iter([])), "only once"),
    ],
)
def test_bad_options_are_refused_at_construction(refused, words):
    state = torch.get_rng_state()
    with pytest.raises(OptionError, match=words):
        refused()
    assert torch.equal(state, torch.get_rng_state())


def test_previews_are_called_by_what_they_are():
    assert list(preview_names(polyak.Decay("sqrt", 0.4))) == ["decayed"]
    assert list(preview_names(["decay:sqrt:0.4", "decay:linear:0.2"])) == [
        "decay:sqrt:0.4",
        "decay:linear:0.2",
    ]
    assert preview_names(None) == {}


def test_what_is_due_is_told_before_a_run_where_it_does_not_depend_on_one():
    def following(**options):
        return Following("uniform", None, {}, sampling=Sampling(**options))

    every = following(start=6, every=5)
    assert [step for step in range(20) if every.is_due(step_idx=step)] == [10, 15]
    by_epochs = following(start_epoch=2, every_epochs=1)
    assert [epoch for epoch in range(5) if by_epochs.is_due(epoch_idx=epoch)] == [2, 3, 4]
    for options in ({"start": 0.5}, {"start": 0.5, "every_epochs": 1}, {"start_epoch": 2}):
        with pytest.raises(NotStartedError, match="when training begins"):
            following(**options).is_due(step_idx=9)


def test_it_pickles_and_copies_between_runs():
    run = Run(start_epoch=1).train()
    run.following.stop()
    for again in (pickle.loads(pickle.dumps(run.following)), copy.deepcopy(run.following)):
        again.begin(run.model, run.optimizer, call_model)
        assert again.average.n_averaged == 0
