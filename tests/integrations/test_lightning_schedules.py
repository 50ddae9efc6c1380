"""When averages in Lightning sample and at which rate; checkpoints of and for Lightning's own; the command line."""

from __future__ import annotations

import copy
import pickle

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    WeightAveraging,
)
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR
from torch.optim.swa_utils import SWALR

import polyak
from lightning_runs import QUIET, Gan, Net, batches, fit, mean, trainer, weights
from polyak.errors import OptionError, StateError
from polyak.integrations.lightning import Averaging, Recording

pytestmark = [pytest.mark.filterwarnings(quiet) for quiet in QUIET]
EARLY = pytest.mark.filterwarnings("ignore:.* has no sample yet")


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(torch.cat([batch for (batch,) in batches()]))


class Streamed(Net):
    """Trained on a loader without a length, 4 batches an epoch."""

    def training_step(self, batch, index):
        return super().training_step([batch], index)


def fit_stream(folder, *callbacks, **options):
    model, run = Streamed(), trainer(folder, *callbacks, **options)
    run.fit(model, torch.utils.data.DataLoader(Stream(), batch_size=8))
    return model


@EARLY
@pytest.mark.parametrize(
    ("options", "first", "step"),
    [
        ({"start": 0.5}, 6, 1),
        ({"start_epoch": 1, "every": 2}, 5, 2),
        ({"every_epochs": 1}, 3, 4),
        ({"start": 0.4, "every_epochs": 1}, 7, 4),
    ],
)
@pytest.mark.parametrize("has_length", [True, False])
def test_samples_in_epochs_and_shares(tmp_path, options, first, step, has_length):
    averaging = Averaging("uniform", **options)
    model = fit(tmp_path, averaging)[0] if has_length else fit_stream(tmp_path, averaging)
    # Without a length half of three epochs is the first one.
    first = 4 if options == {"start": 0.5} and not has_length else first
    torch.testing.assert_close(weights(model), mean(model.stepped[first::step]))


def test_a_validation_sees_the_sample_of_the_epoch_before_it(tmp_path):
    model, _ = fit(tmp_path, Averaging("uniform", every_epochs=1))
    torch.testing.assert_close(model.validated[-1], mean(model.stepped[3::4]))


class Leaving(Net):
    def on_train_batch_start(self, batch, index):
        return -1 if (self.trainer.current_epoch, index) == (1, 2) else None


@pytest.mark.parametrize(
    ("model", "max_steps", "ends"), [(Net, 6, [3]), (Net, 8, [3, 7]), (Leaving, -1, [3, 5, 9])]
)
def test_an_epoch_that_the_run_ends_within_does_not_count(tmp_path, model, max_steps, ends):
    """As under the Trainer of transformers; one that is left early, while the run goes on, does."""
    model, _ = fit(tmp_path, Averaging("uniform", every_epochs=1), model=model(), max_steps=max_steps)
    torch.testing.assert_close(weights(model), mean([model.stepped[step] for step in ends]))


@EARLY
@pytest.mark.parametrize(("options", "n_averaged"), [({}, 5), ({"max_steps": 6}, 3)])
def test_a_share_knows_how_much_later_epochs_accumulate(tmp_path, options, n_averaged):
    scheduler = GradientAccumulationScheduler({0: 1, 1: 2, 2: 4})
    averaging = Averaging("uniform", start=0.5)
    _, run = fit(tmp_path, averaging, scheduler, epochs=6, **options)
    assert run.global_step == options.get("max_steps", 10)
    assert averaging.average.n_averaged == n_averaged
    by_epoch = Averaging("uniform", start=0.5, every_epochs=1)
    fit(tmp_path, by_epoch, GradientAccumulationScheduler({0: 1, 1: 2, 2: 4}), epochs=6, **options)
    assert by_epoch.average.n_averaged == (1 if options else 3)


def test_a_share_of_a_run_without_an_end_is_refused(tmp_path):
    class Stop(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = True

    with pytest.raises(OptionError, match="how long it will be is not known"):
        fit_stream(tmp_path, Averaging("uniform", start=0.5), Stop(), epochs=-1)
    with pytest.warns(UserWarning, match="no sample yet"):
        fit_stream(tmp_path, Averaging("uniform", start_epoch=1), Stop(), epochs=-1)
    averaging = Averaging("uniform", start=0.5)
    fit_stream(tmp_path, averaging, epochs=-1, max_steps=10)
    assert averaging.average.start == 5


def test_should_update_may_be_overridden(tmp_path):
    class Chosen(Averaging):
        def should_update(self, step_idx=None, epoch_idx=None):
            return step_idx in (1, 6) or epoch_idx == 2

    model, _ = fit(tmp_path, Chosen("uniform"))
    torch.testing.assert_close(weights(model), mean([model.stepped[k] for k in (1, 6, 11)]))


class Scheduled(Net):
    """With a scheduler of its own, which goes down at every step or epoch; notes the rate of each step."""

    def __init__(self, interval="step", **options):
        super().__init__(**options)
        self.interval, self.rates = interval, []

    def on_before_optimizer_step(self, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        scheduler = {"scheduler": ExponentialLR(optimizer, 0.9), "interval": self.interval}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


def recipe(**options):
    return Averaging(
        "uniform", **{"start": 0.5, "every_epochs": 1, "swa_lr": 0.5, "anneal_epochs": 2} | options
    )


def expected_rates(start, epochs, anneal_epochs=2, swa_lr=0.5, strategy="cos"):
    """torch's schedulers in a loop of 4 steps an epoch, switched after ``start`` steps."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    own, swa, rates = ExponentialLR(optimizer, 0.9), None, []
    for step in range(4 * epochs):
        if step == start:
            swa = SWALR(optimizer, swa_lr, anneal_epochs, strategy)
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if swa is None:
            own.step()
        elif step % 4 == 3:
            swa.step()
    return rates


@EARLY
@pytest.mark.parametrize(
    ("options", "start"),
    [
        ({}, 8),
        ({"start": 0}, 0),
        ({"start": 6, "every_epochs": None}, 6),
        ({"anneal_strategy": "linear"}, 8),
        ({"anneal_epochs": 0}, 8),
    ],
)
def test_the_recipe_of_the_paper_in_one_callback(tmp_path, options, start):
    model, run = fit(tmp_path, averaging := recipe(**options), model=Scheduled(), epochs=4)
    strategy = options.get("anneal_strategy", "cos")
    rates = expected_rates(start, 4, options.get("anneal_epochs", 2), strategy=strategy)
    assert model.rates == pytest.approx(rates)
    assert [isinstance(config.scheduler, SWALR) for config in run.lr_scheduler_configs] == [True]
    assert averaging.average.n_averaged == {0: 4, 6: 10, 8: 2}[start]


@EARLY
@pytest.mark.parametrize("saved_after", [1, 2, 3])
def test_the_recipe_is_resumed_as_if_never_stopped(tmp_path, saved_after):
    whole, _ = fit(tmp_path, recipe(start_epoch=2, start=0), model=Scheduled(), epochs=4)
    saving = ModelCheckpoint(tmp_path, filename="at")
    fit(tmp_path, recipe(start_epoch=2, start=0), saving, model=Scheduled(), epochs=saved_after)
    resumed = Scheduled()
    path = tmp_path / "at.ckpt"
    fit(tmp_path, recipe(start_epoch=2, start=0), model=resumed, epochs=4, ckpt_path=path)
    assert resumed.rates == whole.rates[4 * saved_after :]
    assert all(map(torch.equal, resumed.stepped, whole.stepped[4 * saved_after :]))
    assert torch.equal(weights(resumed), weights(whole))


def test_a_rate_that_a_resumed_run_is_given_begins_where_it_is(tmp_path):
    saving = ModelCheckpoint(tmp_path, filename="at")
    fit(tmp_path, Averaging("uniform"), saving, model=Scheduled(), epochs=1)
    model = Scheduled()
    resumed = Averaging("uniform", swa_lr=0.5, anneal_epochs=2)
    fit(tmp_path, resumed, model=model, epochs=4, ckpt_path=tmp_path / "at.ckpt")
    lr = 0.1 * 0.9**4
    rates = [lr, (lr + 0.5) / 2, 0.5]
    assert model.rates == pytest.approx([rate for rate in rates for _ in range(4)])


def test_the_rate_is_monitored_and_is_one_a_group(tmp_path):
    class Groups(Scheduled):
        def configure_optimizers(self):
            layers = (self.body[0], self.body[2])
            return torch.optim.SGD([{"params": list(layer.parameters())} for layer in layers], lr=0.1)

    logger = pl.loggers.CSVLogger(tmp_path)
    averaging = Averaging("uniform", swa_lr=[0.2, 0.3], anneal_epochs=0)
    model, run = fit(
        tmp_path,
        averaging,
        LearningRateMonitor(),
        model=Groups(),
        logger=logger,
        log_every_n_steps=1,
        limit_val_batches=0,
    )
    assert [group["lr"] for group in run.optimizers[0].param_groups] == [0.2, 0.3]
    assert run.callback_metrics["lr-SGD/pg2"] == pytest.approx(0.3)
    with pytest.raises(OptionError, match="swa_lr has 3 learning rates, and the optimizer 1"):
        fit(tmp_path, Averaging("uniform", swa_lr=[0.1] * 3), model=Scheduled())
    rates = [Averaging(scheme, swa_lr=0.1, apply=False) for scheme in ("uniform", "ema:decay=0.5")]
    with pytest.raises(OptionError, match="would set the learning rate"):
        fit(tmp_path, *rates)


# Several optimizers.


def test_the_steps_of_the_optimizer_that_is_named_count(tmp_path):
    averaging = Averaging("uniform", optimizer=0, include="generator.*", every=2)
    critic = Averaging("ema:decay=0.5", optimizer=1, include="critic.*", apply=False)
    recording = Recording(tmp_path / "run", optimizer=0, block=4)
    model, run = Gan(), trainer(tmp_path, averaging, critic, recording, epochs=2)
    run.fit(model, batches())
    assert averaging.average.n_averaged == 4 and critic.average.n_averaged == 16
    torch.testing.assert_close(model.generator.weight.detach(), mean(model.stepped[1::2]))
    assert [str(block) for block in recording.trajectory.blocks] == ["(0, 4]", "(4, 8]"]
    share = Averaging("uniform", start=0.5, optimizer=0)
    with pytest.raises(OptionError, match="counted in epochs, and max_epochs sets no end"):
        trainer(tmp_path, share, epochs=None, max_steps=9).fit(model, batches())
    with pytest.raises(OptionError, match="under manual optimization"):
        trainer(tmp_path, Averaging("uniform", swa_lr=0.1, optimizer=0, include="generator.*")).fit(
            model, batches()
        )


def test_averages_of_parts_may_share_a_scheme(tmp_path):
    def parts():
        generator = Averaging("ema:decay=0.5", optimizer=0, include="generator.*")
        return generator, Averaging("ema:decay=0.5", optimizer=1, include="critic.*", apply=False)

    saving = ModelCheckpoint(tmp_path, filename="at")
    trainer(tmp_path, *parts(), saving, epochs=2).fit(Gan(), batches())
    resumed = parts()
    trainer(tmp_path, *resumed, epochs=3).fit(Gan(), batches(), ckpt_path=tmp_path / "at.ckpt")
    assert [callback.average.n_averaged for callback in resumed] == [12, 24]
    assert [set(callback.average.state_dict()["average"]) for callback in resumed] == [
        {f"{part}.weight", f"{part}.bias"} for part in ("generator", "critic")
    ]


# Checkpoints of Lightning's own averages, and for them.


@pytest.mark.parametrize(
    ("theirs", "scheme"),
    [(WeightAveraging(), "uniform"), (EMAWeightAveraging(decay=0.8), "ema:decay=0.8,debias=false")],
)
def test_a_checkpoint_of_theirs_is_taken_up(tmp_path, theirs, scheme):
    whole, _ = fit(tmp_path, ours := Averaging(scheme), epochs=3)
    saving = ModelCheckpoint(tmp_path, filename="at", save_on_train_epoch_end=True)
    fit(tmp_path, theirs, saving, epochs=2)
    model, _ = fit(tmp_path, resumed := Averaging(scheme), epochs=3, ckpt_path=tmp_path / "at.ckpt")
    assert resumed.average.n_averaged == ours.average.n_averaged == 12
    assert all(map(torch.equal, model.stepped, whole.stepped[8:]))
    torch.testing.assert_close(weights(model), weights(whole))


@pytest.mark.parametrize("model", [Net, lambda: Net(norm=True)], ids=["plain", "BatchNorm"])
def test_a_checkpoint_of_ours_is_taken_up_by_theirs(tmp_path, model):
    saving = ModelCheckpoint(tmp_path, filename="at", save_on_train_epoch_end=True)
    fit(tmp_path, Averaging("uniform", recalibrate=batches()), saving, model=model(), epochs=2)
    theirs = WeightAveraging()
    resumed, _ = fit(tmp_path, theirs, model=model(), epochs=3, ckpt_path=tmp_path / "at.ckpt")
    whole, _ = fit(tmp_path, WeightAveraging(), model=model(), epochs=3)
    assert theirs._average_model.n_averaged == 12
    torch.testing.assert_close(weights(resumed), weights(whole))


def test_a_checkpoint_of_theirs_that_does_not_fit_is_refused(tmp_path):
    saving = ModelCheckpoint(tmp_path, filename="at", save_on_train_epoch_end=True)
    fit(tmp_path, WeightAveraging(), saving, epochs=1)
    saved = torch.load(tmp_path / "at.ckpt", weights_only=True)
    saved["state_dict"].pop("body.0.bias")
    torch.save(saved, tmp_path / "at.ckpt")
    model = Net()
    model.strict_loading = False
    with pytest.raises(StateError, match=r"lacks 'body.0.bias'"):
        fit(tmp_path, Averaging("uniform"), model=model, epochs=2, ckpt_path=tmp_path / "at.ckpt")


# What a callback is before and after a run.


@EARLY
def test_callbacks_pickle_and_copy_after_fit_and_train_again(tmp_path):
    averaging = Averaging("uniform", recalibrate=batches(), validate="both", start_epoch=1, swa_lr=0.1)
    recording = Recording(tmp_path / "run", preview="uniform", recalibrate=batches())
    model, _ = fit(tmp_path, averaging, recording, model=Scheduled(norm=True))
    for again in (pickle.loads(pickle.dumps(averaging)), copy.deepcopy(averaging)):
        pickle.dumps(copy.deepcopy(recording))
        other, _ = fit(tmp_path, again, model=Scheduled(norm=True))
        torch.testing.assert_close(weights(other), weights(model))


def test_a_module_without_forward_is_told_what_to_give(tmp_path):
    class NoForward(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.head, self.body = nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 1), nn.BatchNorm1d(1))

        def training_step(self, batch, index):
            return self.body(self.head(batch[0])).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    run = trainer(tmp_path, Averaging("uniform", recalibrate=batches()))
    with pytest.raises(OptionError, match=r"forward=lambda model, batch: model.body\(batch\[0\]\)"):
        run.fit(NoForward(), batches())
    forward = lambda model, batch: model.body(model.head(batch[0]))  # noqa: E731
    trainer(tmp_path, Averaging("uniform", recalibrate=batches(), forward=forward)).fit(
        NoForward(), batches()
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"start": -1}, "start"),
        ({"validate": "live"}, "validate"),
        ({"swa_lr": -0.1}, "swa_lr"),
        ({"anneal_epochs": 3}, "swa_lr"),
        ({"optimizer": 0.5}, "optimizer"),
        ({"every_epochs": 0}, "every_epochs"),
        ({"dtype": "int7"}, "dtype"),
        ({"check_finite": 3}, "check_finite"),
    ],
)
def test_bad_options_are_refused_at_construction(options, words):
    with pytest.raises(OptionError, match=words):
        Averaging("uniform", **options)


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return batches()

    val_dataloader = train_dataloader


@EARLY
def test_the_command_line_and_files_take_every_option(tmp_path, monkeypatch):
    pytest.importorskip(
        "jsonargparse", reason="LightningCLI needs it: pip install 'jsonargparse[signatures]'"
    )
    monkeypatch.setattr("sys.argv", ["train"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of how Lightning calls it
    from lightning.pytorch.cli import LightningCLI

    config = tmp_path / "config.yaml"
    config.write_text(f"""
trainer:
  max_epochs: 3
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  default_root_dir: {tmp_path}
  callbacks:
    - class_path: polyak.integrations.lightning.Averaging
      init_args:
        scheme: ema:decay=0.9
        start: 0.5
        every_epochs: 1
        swa_lr: 0.05
        anneal_epochs: 2
        anneal_strategy: linear
        validate: both
        dtype: float64
        device: cpu
        include: ["body.*"]
    - class_path: polyak.integrations.lightning.Recording
      init_args:
        directory: {tmp_path}/run
        block: 1
        dtype: float64
        keep_in_memory: 1MB
        preview: [decay:sqrt:0.4, "tail:0.5"]
""")
    args = ["fit", "--config", str(config)]
    cli = LightningCLI(Net, Data, args=args, save_config_callback=None, seed_everything_default=False)
    averaging, recording = cli.trainer.callbacks[:2]
    average = averaging.average
    assert (str(average.scheme), average.n_averaged) == ("ema:decay=0.9", 2)
    assert average.named_tensors()["body.0.weight"].dtype == torch.float64
    assert cli.trainer.callback_metrics.keys() == {
        f"loss{w}" for w in ("", "/average", "/decayed", "/tail:0.5")
    }
    assert recording.trajectory.blocks[0].stop == 1
    assert isinstance(polyak.parse("ema:decay=0.9"), polyak.EMA)
