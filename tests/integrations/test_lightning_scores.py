"""Scores of averages beside those of the live weights, in Lightning's validations."""

from __future__ import annotations

import csv

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, ProgressBar
from lightning.pytorch.loggers import CSVLogger

import polyak
from lightning_runs import QUIET, Net, batches, fit, mean, weights
from polyak.errors import OptionError, PolyakError
from polyak.integrations.lightning import Averaging, Recording

pytestmark = [pytest.mark.filterwarnings(quiet) for quiet in QUIET]
DATA = torch.cat([batch for (batch,) in batches()])


class Scored(Net):
    """Notes the metrics there are when callbacks look at them, and what its hooks were called for."""

    def __init__(self, **options):
        super().__init__(**options)
        self.seen, self.hooks = [], []

    def on_validation_epoch_start(self):
        self.hooks.append(weights(self))

    def validation_step(self, batch, index):
        loss = self(batch[0]).square().mean()
        self.log("val_loss", loss, prog_bar=True)
        self.log("noise", torch.rand(()), on_step=True, on_epoch=True)

    def on_validation_epoch_end(self):
        self.log("late", weights(self).sum())


class Watch(EarlyStopping):
    """Sees what an early stopping that comes first sees, and counts validations."""

    def __init__(self):
        super().__init__("val_loss/average", patience=100)
        self.seen, self.batches = [], 0

    def on_validation_batch_end(self, *_):
        self.batches += 1

    def on_validation_end(self, trainer, pl_module):
        super().on_validation_end(trainer, pl_module)
        if not trainer.sanity_checking:
            self.seen.append({name: value.item() for name, value in trainer.callback_metrics.items()})


def loss(weight, model):
    """Of the data with another first layer."""
    with torch.no_grad():
        kept = model.body[0].weight.data
        model.body[0].weight.data = weight
        value = model(DATA).square().mean().item()
        model.body[0].weight.data = kept
    return value


class FirstLayer(Scored):
    """Only the first layer trains, so that losses at other weights are worked out from it alone."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.body[0].parameters(), lr=0.1)

    def __init__(self):
        super().__init__()
        self.body[0].bias.requires_grad_(False)
        self.body[2].requires_grad_(False)


def test_both_are_scored_and_whoever_looks_sees_both(tmp_path):
    watch = Watch()
    saving = ModelCheckpoint(tmp_path, filename="best", monitor="val_loss/average")
    logger = CSVLogger(tmp_path)
    averaging = Averaging("uniform", start=4, validate="both")
    with pytest.warns(UserWarning, match="no sample yet"):  # in the first epoch
        model, run = fit(tmp_path, watch, averaging, saving, model=FirstLayer(), logger=logger)
    ends = [model.stepped[k] for k in (3, 7, 11)]
    means = [ends[0], mean(model.stepped[4:8]), mean(model.stepped[4:12])]
    for seen, live, averaged in zip(watch.seen, ends, means, strict=True):
        assert seen["val_loss"] == pytest.approx(loss(live, model))
        assert seen["val_loss/average"] == pytest.approx(loss(averaged, model))
        assert seen["late/average"] == pytest.approx(averaged.sum().item(), rel=1e-5)
        assert seen["noise_epoch"] == seen["noise_epoch/average"], "both draw the same random numbers"
    assert watch.batches == 4 * 3 + 2, "callbacks see one validation, and the sanity check"
    assert saving.best_model_score == min(seen["val_loss/average"] for seen in watch.seen)
    assert run.progress_bar_metrics["val_loss/average"] == pytest.approx(watch.seen[-1]["val_loss/average"])
    rows = list(csv.DictReader((tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()))
    logged = [row for row in rows if row["val_loss"]]
    assert [float(row["val_loss/average"]) for row in logged] == pytest.approx(
        [seen["val_loss/average"] for seen in watch.seen]
    )
    assert len([row for row in rows if row["noise_step"]]) == 12, "steps are logged for the live weights"


def test_training_and_random_numbers_are_as_without(tmp_path):
    plain, _ = fit(tmp_path, model=Scored())
    both, _ = fit(tmp_path, Averaging("uniform", validate="both"), model=Scored())
    assert all(map(torch.equal, plain.stepped, both.stepped))
    torch.testing.assert_close(weights(both), mean(both.stepped))


def test_a_progress_bar_is_in_reach_of_its_thread_and_sees_one_validation(tmp_path):
    class Bar(ProgressBar):
        validated = 0

        def on_validation_start(self, trainer, pl_module):
            self.validated += 1

    class Looking(Scored):
        def validation_step(self, batch, index):
            super().validation_step(batch, index)
            self.seen.append(self.trainer.progress_bar_callback)

    bar, model = Bar(), Looking()
    fit(tmp_path, Averaging("uniform", validate="both"), bar, model=model, enable_progress_bar=True)
    assert len(model.seen) > 12 and set(model.seen) == {bar}
    assert bar.validated == 3 + 1 and not {"on_validation_start", "on_train_end"} & vars(bar).keys()


def test_averages_that_only_follow_are_scored_under_their_schemes(tmp_path):
    saving = ModelCheckpoint(tmp_path, filename="best", monitor="val_loss/ema:decay=0.5")
    follows = Averaging("ema:decay=0.5", apply=False, validate="both")
    _, run = fit(tmp_path, Averaging("uniform", validate="both"), follows, saving, model=Scored())
    names = {name for name in run.callback_metrics if name.startswith("val_loss")}
    assert names == {"val_loss", "val_loss/average", "val_loss/ema:decay=0.5"}
    assert "run" not in vars(run.fit_loop.epoch_loop.val_loop)


def test_statistics_are_those_of_the_weights_that_are_scored(tmp_path):
    averaging = Averaging("uniform", recalibrate=batches(), validate="both")
    recording = Recording(tmp_path / "run", preview="uniform", recalibrate=batches())
    model, run = fit(tmp_path, averaging, recording, model=Scored(norm=True))
    model.eval()
    expected = torch.stack([model(batch).square().mean() for (batch,) in batches()]).mean().item()
    assert run.callback_metrics["val_loss/average"].item() == pytest.approx(expected, rel=1e-5)
    assert run.callback_metrics["val_loss/uniform"].item() == pytest.approx(expected, rel=1e-4)
    assert run.callback_metrics["val_loss"].item() != pytest.approx(expected, rel=1e-2)


def test_that_statistics_do_not_fit_is_said_once_and_in_words_of_the_callback(tmp_path):
    recording = Recording(tmp_path / "run", preview="uniform")
    with pytest.warns(UserWarning, match="pass recalibrate=loader") as caught:
        fit(tmp_path, recording, model=Scored(norm=True))
    assert not [warning for warning in caught if "applied()" in str(warning.message)]


@pytest.mark.filterwarnings("ignore:the blocks are too long")
def test_a_run_is_scored_as_if_it_ended_now(tmp_path):
    previews = ["decay:sqrt:0.5", "tail:steps=2"]
    recording = Recording(tmp_path / "run", block=2, preview=previews)
    with pytest.warns(UserWarning, match=r"too long for decay:sqrt:0\.5"):  # early on
        model, run = fit(tmp_path, recording, model=FirstLayer())
    average = recording.trajectory.average("decay:sqrt:0.5")["body.0.weight"]
    assert run.callback_metrics["val_loss/decayed"].item() == pytest.approx(loss(average, model), rel=1e-5)
    tail = mean(model.stepped[-2:])
    assert run.callback_metrics["val_loss/tail:steps=2"].item() == pytest.approx(loss(tail, model), rel=1e-5)
    assert run.callback_metrics["val_loss"].item() == pytest.approx(loss(model.stepped[-1], model), rel=1e-5)
    assert torch.equal(weights(model), model.stepped[-1])


def test_before_the_first_sample_the_live_weights_stand_in(tmp_path):
    recording = Recording(tmp_path / "run", every=100, preview="decay:sqrt:0.5")
    with pytest.warns(UserWarning, match="live weights stand in for decayed: .* needs at least one sample"):
        _, run = fit(tmp_path, recording, model=Scored(), epochs=1)
    assert run.callback_metrics["val_loss/decayed"] == run.callback_metrics["val_loss"]


@pytest.mark.parametrize("quiet", [True, False])
def test_live_weights_and_loops_are_back_when_a_validation_fails(tmp_path, quiet):
    class Fails(Scored):
        def validation_step(self, batch, index):
            if self.trainer.sanity_checking or quiet is not torch.equal(weights(self), self.stepped[-1]):
                return
            raise RuntimeError("validation failed")

    model = Fails()
    callbacks = [Averaging("uniform", every=2, start=1, validate="both"), Recording(tmp_path / "run")]
    with pytest.raises(RuntimeError, match="validation failed"):
        fit(tmp_path, *callbacks, model=model)
    assert torch.equal(weights(model), model.stepped[-1])
    assert model.trainer.callbacks[0] in callbacks


def test_a_validation_of_its_own_or_a_skipped_one_is_as_ever(tmp_path):
    model, run = fit(tmp_path, Averaging("uniform", validate="both"), model=Scored(), limit_val_batches=0)
    assert "val_loss/average" not in run.callback_metrics
    run = fit(tmp_path, Averaging("uniform", validate="both"), model=Scored())[1]
    assert set(run.validate(model, batches(), verbose=False)[0]) == {"val_loss", "noise_epoch", "late"}


def test_two_of_one_name_are_refused(tmp_path):
    follows = Averaging("uniform", validate="both", apply=False)
    with pytest.raises(OptionError, match="scored as 'uniform'"):
        fit(tmp_path, follows, Recording(tmp_path / "run", preview="uniform"))


def test_a_release_without_what_validations_are_scored_by_is_refused(tmp_path, monkeypatch):
    from lightning.pytorch.trainer.connectors.logger_connector import _LoggerConnector

    monkeypatch.delattr(_LoggerConnector, "log_eval_end_metrics")
    model = Net()
    with pytest.raises(PolyakError, match="no log_eval_end_metrics"):
        fit(tmp_path, Averaging("uniform", validate="both"), model=model)
    assert not model.stepped
    fit(tmp_path, Averaging(polyak.Uniform()), limit_val_batches=0, num_sanity_val_steps=0, epochs=1)
