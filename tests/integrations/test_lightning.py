"""The Lightning callback in the real Trainer."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)

import polyak
from lightning_runs import QUIET, Net, batches, fit, mean, trainer, weights
from polyak.errors import NotStartedError, OptionError, PolyakError, StateError
from polyak.integrations.lightning import Averaging, Recording

pytestmark = [pytest.mark.filterwarnings(quiet) for quiet in QUIET]


def test_it_follows_stands_in_and_becomes_the_model(tmp_path):
    averaging = Averaging(polyak.Uniform(), start=4)
    with pytest.warns(UserWarning, match="no sample yet"):  # the first epoch
        model, _ = fit(tmp_path, averaging)
    assert averaging.average.n_averaged == 8
    assert torch.equal(model.validated[0], Net().body[0].weight), "the sanity check"
    torch.testing.assert_close(model.validated[-1], mean(model.stepped[4:12]))
    torch.testing.assert_close(model.validated[-5], mean(model.stepped[4:8]))
    torch.testing.assert_close(model.validated[-9], model.stepped[3])
    torch.testing.assert_close(weights(model), mean(model.stepped[4:]))


def test_a_scheme_may_be_given_as_text_or_be_ones_own(tmp_path, own_scheme):
    for given in (own_scheme(3.0), "early:3"):
        model, _ = fit(tmp_path, averaging := Averaging(given), epochs=1)
        assert averaging.state_key == "polyak.Averaging[early:3]"
        shares = torch.from_numpy(own_scheme(3.0).weights(range(5)))
        expected = torch.einsum("n,nij->ij", shares, torch.stack(model.stepped).double())
        torch.testing.assert_close(weights(model), expected.float())
    with pytest.raises(OptionError, match="follows a scheme"):
        Averaging("tail:0.4")


def test_a_scheme_changed_on_the_way_is_taken_up_on_resuming(tmp_path):
    class Change(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                next(
                    c for c in trainer.callbacks if isinstance(c, Averaging)
                ).average.scheme = "ema:half_life=2"

    whole, _ = fit(tmp_path, Averaging("ema:half_life=9"), Change(), epochs=4)
    saving = ModelCheckpoint(tmp_path, filename="at")
    fit(tmp_path, Averaging("ema:half_life=9"), Change(), saving, epochs=2)
    resumed = Averaging("ema:half_life=9")
    model, _ = fit(tmp_path, resumed, saving, epochs=4, ckpt_path=tmp_path / "at.ckpt")
    assert resumed.average.scheme == polyak.EMA(half_life=2)
    assert torch.equal(weights(model), weights(whole))


def test_an_average_under_another_scheme_is_not_taken_up_unasked(tmp_path):
    saving = ModelCheckpoint(tmp_path, filename="at")
    fit(tmp_path, Averaging("uniform"), saving, epochs=2)
    resume = {"epochs": 3, "ckpt_path": tmp_path / "at.ckpt"}
    for options in ({}, {"apply": False}):
        with pytest.raises(
            StateError, match=r"holds 'polyak.Averaging\[uniform\]', and no .*change_scheme=True"
        ):
            fit(tmp_path, Averaging("ema:decay=0.5,debias=false", **options), **resume)
    changed = Averaging("ema:decay=0.5,debias=false", change_scheme=True)
    model, _ = fit(tmp_path, changed, **resume)
    whole, _ = fit(tmp_path, Averaging("uniform"), epochs=3)
    expected = mean(whole.stepped[:8])
    for sample in whole.stepped[8:]:
        expected = (expected + sample) / 2
    torch.testing.assert_close(weights(model), expected)
    assert str(changed.average.scheme) == "ema:decay=0.5,debias=false"


def test_one_more_average_does_not_take_up_that_of_another(tmp_path):
    saving = ModelCheckpoint(tmp_path, filename="at")
    fit(tmp_path, Averaging("ema:decay=0.5"), saving, epochs=2)
    swa = Averaging("uniform")
    with pytest.warns(UserWarning, match="begins anew"):
        model, _ = fit(
            tmp_path, Averaging("ema:decay=0.5", apply=False), swa, epochs=3, ckpt_path=tmp_path / "at.ckpt"
        )
    torch.testing.assert_close(weights(model), mean(model.stepped))
    assert swa.average.n_averaged == 4


def test_training_goes_on_from_the_live_weights(tmp_path):
    averaged, _ = fit(tmp_path, Averaging(polyak.EMA(decay=0.9)))
    plain, _ = fit(tmp_path)
    assert all(map(torch.equal, averaged.stepped, plain.stepped))


def test_a_checkpoint_is_the_average_and_resumes_from_the_live_weights(tmp_path):
    whole, _ = fit(tmp_path, first := Averaging(polyak.EMA(half_life=3)), epochs=4)
    saving = ModelCheckpoint(tmp_path, filename="at")
    half, _ = fit(tmp_path, Averaging(polyak.EMA(half_life=3)), saving, epochs=2)
    saved = torch.load(tmp_path / "at.ckpt", weights_only=True)
    assert torch.equal(saved["state_dict"]["body.0.weight"], weights(half))
    assert torch.equal(saved["current_model_state"]["body.0.weight"], half.stepped[-1])

    resumed, _ = fit(
        tmp_path,
        second := Averaging(polyak.EMA(half_life=3)),
        saving,
        epochs=4,
        ckpt_path=tmp_path / "at.ckpt",
    )
    assert all(map(torch.equal, resumed.stepped, whole.stepped[8:]))
    assert torch.equal(weights(resumed), weights(whole))
    assert second.average.n_averaged == first.average.n_averaged == 16


def test_a_checkpoint_written_at_the_end_of_training_resumes_too(tmp_path):
    saving = ModelCheckpoint(tmp_path, save_last=True, every_n_epochs=5)
    model, _ = fit(tmp_path, Averaging(polyak.Uniform()), saving, epochs=2)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert torch.equal(saved["current_model_state"]["body.0.weight"], model.stepped[-1])
    assert torch.equal(saved["state_dict"]["body.0.weight"], weights(model))


def test_a_checkpoint_of_weights_only_is_the_average_too(tmp_path):
    saving = ModelCheckpoint(tmp_path, filename="at", save_weights_only=True)
    model, _ = fit(tmp_path, Averaging(polyak.Uniform()), saving)
    saved = torch.load(tmp_path / "at.ckpt", weights_only=True)
    assert torch.equal(saved["state_dict"]["body.0.weight"], weights(model))
    assert "current_model_state" not in saved


@pytest.mark.parametrize("first", [True, False])
def test_averages_that_only_follow_leave_checkpoints_alone(tmp_path, first):
    averages = [Averaging(polyak.Uniform()), Averaging(polyak.EMA(decay=0.9), apply=False)]
    saving = ModelCheckpoint(tmp_path, filename="at")
    model, _ = fit(tmp_path, *(averages if first else averages[::-1]), saving)
    saved = torch.load(tmp_path / "at.ckpt", weights_only=True)
    assert torch.equal(saved["state_dict"]["body.0.weight"], weights(model))
    assert torch.equal(saved["current_model_state"]["body.0.weight"], model.stepped[-1])


def test_checkpoints_have_the_modules_own_names(tmp_path):
    class Renamed(Net):
        def __init__(self):
            super().__init__()
            self.body[0].weight.requires_grad_(False)

        def state_dict(self, *args, **kwargs):
            return {
                f"my.{n}": t for n, t in super().state_dict(*args, **kwargs).items() if n != "body.0.bias"
            }

    saving = ModelCheckpoint(tmp_path, filename="at")
    averaging = Averaging(polyak.Uniform())
    model, run = fit(tmp_path, averaging, saving, model=Renamed())
    saved = torch.load(tmp_path / "at.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == saved["current_model_state"].keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(saved["state_dict"][name], value)
    assert "lightning_module_state_dict" not in vars(run.strategy)


def test_the_checkpoint_of_a_run_that_failed_is_the_average_too(tmp_path):
    model = Net(fail_in_validation=True)
    saving = OnExceptionCheckpoint(tmp_path, "failed")
    with pytest.raises(RuntimeError, match="validation failed"):
        fit(tmp_path, Averaging(polyak.Uniform()), saving, model=model)
    saved = torch.load(tmp_path / "failed.ckpt", weights_only=True)
    torch.testing.assert_close(saved["state_dict"]["body.0.weight"], mean(model.stepped))
    assert torch.equal(saved["current_model_state"]["body.0.weight"], model.stepped[-1])


def test_a_failed_resume_leaves_nothing_behind(tmp_path):
    class Fails(Net):
        def configure_optimizers(self):
            raise RuntimeError("no optimizer")

    saving = ModelCheckpoint(tmp_path, filename="at")
    fit(tmp_path, averaging := Averaging(polyak.Uniform()), saving)
    with pytest.raises(RuntimeError, match="no optimizer"):
        fit(tmp_path, averaging, saving, model=Fails(), epochs=4, ckpt_path=tmp_path / "at.ckpt")
    fit(tmp_path, averaging, epochs=1)
    assert averaging.average.n_averaged == 4


def test_a_run_that_failed_is_resumed_with_the_same_callback(tmp_path):
    saving = ModelCheckpoint(tmp_path, filename="at", save_on_train_epoch_end=True)
    averaging = Averaging(polyak.Uniform())
    fit(tmp_path, averaging, saving, epochs=2)
    with pytest.raises(RuntimeError, match="validation failed"):
        fit(tmp_path / "other", averaging, model=Net(fail_in_validation=True))
    fit(tmp_path, averaging, saving, epochs=3, ckpt_path=tmp_path / "at.ckpt")
    assert averaging.average.n_averaged == 12


def test_a_checkpoint_without_the_average_is_said(tmp_path):
    saving = ModelCheckpoint(tmp_path, filename="at")
    fit(tmp_path, saving, epochs=1)
    averaging = Averaging(polyak.Uniform())
    with pytest.warns(UserWarning, match="the average begins anew"):
        fit(tmp_path, averaging, saving, epochs=2, ckpt_path=tmp_path / "at.ckpt")
    assert averaging.average.n_averaged == 4


def test_live_weights_return_when_validation_fails(tmp_path):
    model = Net(fail_in_validation=True)
    with pytest.raises(RuntimeError, match="validation failed"):
        fit(tmp_path, Averaging(polyak.Uniform()), model=model)
    assert torch.equal(weights(model), model.stepped[-1])


def test_statistics_are_those_of_the_averaged_weights(tmp_path):
    saving = ModelCheckpoint(tmp_path, filename="at")
    model, _ = fit(tmp_path, Averaging(polyak.Uniform(), recalibrate=batches()), saving, model=Net(norm=True))
    shipped = {name: buffer.clone() for name, buffer in model.named_buffers()}
    saved = torch.load(tmp_path / "at.ckpt", weights_only=True)
    polyak.update_bn(batches(), model.train())
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(shipped[name], buffer)
        torch.testing.assert_close(saved["state_dict"][name], buffer)
        if "running" in name:
            assert not torch.equal(saved["current_model_state"][name], buffer)


def test_other_buffers_are_those_of_the_end(tmp_path):
    class Counting(Net):
        def __init__(self):
            super().__init__(norm=True)
            self.register_buffer("steps", torch.tensor(0))

        def training_step(self, batch, index):
            self.steps += 1
            return super().training_step(batch, index)

    averaging = Averaging(polyak.Uniform(), every=10, recalibrate=batches())
    with pytest.warns(UserWarning, match="no sample yet"):  # two of three epochs
        model, _ = fit(tmp_path, averaging, model=Counting(), val_check_interval=1)
    assert averaging.average.n_averaged == 1
    assert model.steps == 12


def test_a_model_with_batch_norm_is_told_about_its_statistics(tmp_path):
    with pytest.warns(UserWarning, match="pass recalibrate=loader"):
        fit(tmp_path, Averaging(polyak.Uniform()), model=Net(norm=True), epochs=1)


def test_batches_for_the_statistics_are_those_that_a_step_gets(tmp_path):
    class Shifted(Net):
        def on_after_batch_transfer(self, batch, index):
            return [batch[0] + 100]

        def forward(self, x):
            assert x.dtype == self.body[0].weight.dtype
            return super().forward(x)

    averaging = Averaging(polyak.Uniform(), recalibrate=batches())
    model, _ = fit(tmp_path, averaging, model=Shifted(norm=True), precision="bf16-true")
    shifted = [(batch + 100).bfloat16() for (batch,) in batches()]
    shipped = model.body[1].running_mean.clone()
    polyak.update_bn(shifted, model)
    torch.testing.assert_close(shipped, model.body[1].running_mean)


def test_batches_may_be_passed_another_way(tmp_path):
    averaging = Averaging(
        polyak.Uniform(), recalibrate=batches(), forward=lambda model, batch: model(batch[0] + 100)
    )
    model, _ = fit(tmp_path, averaging, model=Net(norm=True), epochs=1)
    shipped = model.body[1].running_mean.clone()
    polyak.update_bn([batch + 100 for (batch,) in batches()], model)
    torch.testing.assert_close(shipped, model.body[1].running_mean)


def test_a_loader_that_shuffles_leaves_training_as_it_is(tmp_path):
    def run(*callbacks):
        torch.manual_seed(3)
        data = torch.utils.data.TensorDataset(torch.randn(32, 3))
        loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True)
        model = Net(norm=True)
        trainer(tmp_path, *(make(loader) for make in callbacks)).fit(model, loader, batches())
        return model.stepped

    averaged = run(lambda loader: Averaging(polyak.Uniform(), recalibrate=loader))
    assert all(map(torch.equal, averaged, run()))


def test_frozen_statistics_stay(tmp_path):
    class Frozen(Net):
        def on_train_epoch_start(self):
            self.body[1].eval()

    model = Frozen(norm=True)
    model.body[1].running_mean.fill_(3.0)
    fit(tmp_path, Averaging(polyak.Uniform(), recalibrate=batches()), model=model, epochs=1)
    assert torch.equal(model.body[1].running_mean, torch.full((4,), 3.0))


def test_several_averages_one_of_which_stands_in(tmp_path):
    swa = Averaging(polyak.Uniform())
    emas = [Averaging(polyak.EMA(decay=d), apply=False) for d in (0.5, 0.9)]
    model, _ = fit(tmp_path, swa, *emas)
    assert [c.average.n_averaged for c in (swa, *emas)] == [12, 12, 12]
    torch.testing.assert_close(weights(model), mean(model.stepped))
    with pytest.raises(OptionError, match="apply=False"):
        fit(tmp_path, Averaging(polyak.Uniform()), Averaging(polyak.EMA(decay=0.9)))


def test_gradient_accumulation_counts_steps(tmp_path):
    averaging = Averaging(polyak.Uniform())
    fit(tmp_path, averaging, epochs=1, accumulate_grad_batches=2)
    assert averaging.average.n_averaged == 2


def test_a_checkpoint_saved_within_a_validation_holds_the_live_weights(tmp_path):
    class Saving(pl.Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                trainer.save_checkpoint(tmp_path / "within.ckpt")

    model, _ = fit(tmp_path, Saving(), Averaging(polyak.Uniform()))
    saved = torch.load(tmp_path / "within.ckpt", weights_only=True)
    assert torch.equal(saved["current_model_state"]["body.0.weight"], model.stepped[-1])
    assert torch.equal(saved["state_dict"]["body.0.weight"], model.validated[-1])


def test_validating_alone_changes_nothing(tmp_path):
    averaging = Averaging(polyak.Uniform())
    model, run = fit(tmp_path, averaging)
    before = weights(model)
    run.validate(model, batches(), verbose=False)
    assert torch.equal(model.validated[-1], before) and torch.equal(weights(model), before)


def test_what_cannot_work_is_refused(tmp_path):
    with pytest.raises(TypeError, match="evry"):
        Averaging(polyak.Uniform(), evry=2)
    with pytest.raises(OptionError, match="only once"):
        Averaging(polyak.Uniform(), recalibrate=iter([]))
    loader = torch.utils.data.DataLoader([1], num_workers=1, persistent_workers=True)
    with pytest.raises(OptionError, match="persistent_workers"):
        Averaging(polyak.Uniform(), recalibrate=loader)
    for theirs in (WeightAveraging(), StochasticWeightAveraging(0.1)):
        with pytest.raises(OptionError, match=f"Lightning's {type(theirs).__name__}"):
            fit(tmp_path, Averaging(polyak.Uniform()), theirs)
    for index in (1, -2):
        with pytest.raises(OptionError, match=f"optimizer={index} names none of the 1"):
            fit(tmp_path, Averaging(polyak.Uniform(), optimizer=index))
    with pytest.raises(NotStartedError, match="when training begins"):
        _ = Averaging(polyak.Uniform()).average


@pytest.mark.parametrize("beside", [[], [Averaging(polyak.Uniform())]], ids=["alone", "beside an average"])
def test_a_recording_is_the_run(tmp_path, beside):
    recording = Recording(tmp_path / "run", block=2)
    model, _ = fit(tmp_path, *beside, recording)
    trajectory = recording.trajectory
    assert [str(block) for block in trajectory.blocks] == [f"({k}, {k + 2}]" for k in range(0, 12, 2)]
    assert trajectory.blocks[0].lr.mean == pytest.approx(0.1)
    assert [block.metrics["loss"].count for block in trajectory.blocks] == [1, 2, 2, 2, 2, 2]
    assert trajectory.blocks[1].metrics["loss"].mean == pytest.approx(sum(model.losses[1:3]) / 2)
    torch.testing.assert_close(trajectory.average("tail:steps=4")["body.0.weight"], mean(model.stepped[8:]))
    assert torch.equal(trajectory.live()["body.0.weight"], model.stepped[-1])


@pytest.mark.filterwarnings("ignore:the blocks are too long")
def test_a_recording_goes_on_with_its_checkpoint(tmp_path):
    whole, _ = fit(tmp_path, Recording(tmp_path / "whole", block=6), epochs=4)
    saving = ModelCheckpoint(tmp_path, filename="at", save_last=True)
    fit(tmp_path, Recording(tmp_path / "run", block=6), saving, epochs=2)
    fit(tmp_path, Recording(tmp_path / "run", block=6), saving, epochs=4, ckpt_path=tmp_path / "last.ckpt")
    resumed, once = polyak.Trajectory(tmp_path / "run"), polyak.Trajectory(tmp_path / "whole")
    assert resumed.blocks[0].stop == once.blocks[0].stop == 6
    for profile in ("uniform", "tail:steps=6"):
        assert torch.equal(resumed.average(profile)["body.0.weight"], once.average(profile)["body.0.weight"])


def test_a_recording_is_replaced_if_it_is_said(tmp_path):
    saving = ModelCheckpoint(tmp_path, filename="at")
    fit(tmp_path, Recording(tmp_path / "run", block=2), saving, epochs=1)
    with pytest.raises(StateError, match="step=0"):
        fit(tmp_path, Recording(tmp_path / "run", block=2), epochs=1)
    again = Recording(tmp_path / "run", block=2, step=0)
    fit(tmp_path, again, epochs=1)
    assert again.trajectory.blocks[-1].stop == 4
    fit(tmp_path, again, epochs=2, ckpt_path=tmp_path / "at.ckpt")  # which says more
    assert [block.start for block in again.trajectory.blocks] == [0, 2, 4, 6]


def test_a_recording_is_whole_when_training_fails(tmp_path):
    model = Net(fail_in_validation=True)
    recording = Recording(tmp_path / "run", block=3)
    with pytest.raises(RuntimeError, match="validation failed"):
        fit(tmp_path, recording, Averaging(polyak.Uniform()), model=model)
    trajectory = recording.trajectory
    assert trajectory.blocks[-1].stop == 4
    assert torch.equal(trajectory.live()["body.0.weight"], model.stepped[-1])


def test_a_recording_that_cannot_go_on_lets_go_of_its_directory(tmp_path):
    saving = ModelCheckpoint(tmp_path, filename="at")
    fit(tmp_path, Recording(tmp_path / "run", block=2), saving, epochs=1)
    other = Recording(tmp_path / "other", block=2, every=2)
    with pytest.raises(StateError, match="every=1"):
        fit(tmp_path, other, saving, epochs=2, ckpt_path=tmp_path / "at.ckpt")
    fit(tmp_path, Recording(tmp_path / "other", block=2), epochs=1)


def test_a_recording_refuses_what_it_does_not_know(tmp_path):
    with pytest.raises(TypeError, match="blok"):
        Recording(tmp_path, blok=2)
    with pytest.raises(NotStartedError, match="when training does"):
        _ = Recording(tmp_path).trajectory


# Releases of Lightning that lack what is not documented.


def test_a_module_without_its_batch_hook_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.delattr(pl.LightningModule, "_on_before_batch_transfer")
    model = Net()
    with pytest.raises(PolyakError, match="Net of this lightning has no _on_before_batch_transfer"):
        fit(tmp_path, Averaging(polyak.Uniform()), model=model)
    assert not model.stepped


def test_a_checkpoint_that_would_hold_the_live_weights_is_refused(tmp_path, monkeypatch):
    connector = type(trainer(tmp_path)._checkpoint_connector)
    read = lambda self: self.trainer.lightning_module.state_dict()  # noqa: E731
    monkeypatch.setattr(connector, "_get_lightning_module_state_dict", read)
    saving = ModelCheckpoint(tmp_path, filename="at")
    with pytest.raises(PolyakError, match="does not read a checkpoint's weights"):
        fit(tmp_path, Averaging(polyak.Uniform()), saving)
    assert not (tmp_path / "at.ckpt").exists()
