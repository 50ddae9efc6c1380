"""The callback of transformers in the real Trainer."""

from __future__ import annotations

import copy
import pickle
import shutil

import pytest
import torch
from accelerate.state import GradientState
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

import polyak
from polyak.errors import NotStartedError, OptionError, PolyakError
from polyak.integrations.transformers import Averaging, Recording
from transformers_runs import Net, mean, rows, trainer_for, weights

pytestmark = pytest.mark.filterwarnings("ignore:.*(pin_memory|generation|lr_scheduler)")


def test_it_follows_stands_in_and_becomes_the_model(tmp_path):
    trainer, steps = trainer_for(tmp_path)
    averaging = Averaging(trainer, polyak.Uniform(), start=4)
    with pytest.warns(UserWarning, match="no sample yet") as found:
        trainer.train()
    assert found[-1].filename == __file__
    first, second, third = trainer.model.evaluated
    assert torch.equal(first, steps.weights[3])
    torch.testing.assert_close(second, mean(steps.weights[4:8]))
    torch.testing.assert_close(third, mean(steps.weights[4:12]))
    torch.testing.assert_close(weights(trainer.model), third)
    assert averaging.average.n_averaged == 8
    trainer.evaluate()
    assert torch.equal(trainer.model.evaluated[-1], weights(trainer.model))


def test_a_scheme_may_be_given_as_text_or_be_ones_own(tmp_path, own_scheme):
    for given in (own_scheme(3.0), "early:3"):
        trainer, steps = trainer_for(tmp_path, eval_strategy="no")
        averaging = Averaging(trainer, given)
        assert averaging.file_name == "polyak-early-3.pt"
        trainer.train()
        shares = torch.from_numpy(own_scheme(3.0).weights(range(13)))
        expected = torch.einsum("n,nij->ij", shares, torch.stack(steps.weights).double())
        torch.testing.assert_close(weights(trainer.model), expected.float())
    with pytest.raises(OptionError, match="follows a scheme"):
        Averaging(trainer, "tail:0.4")
    with pytest.raises(OptionError, match="the Trainer has an average of early:3 already"):
        Averaging(trainer, "early:3", apply=False)


def test_a_scheme_changed_on_the_way_is_taken_up_on_resuming(tmp_path):
    class Change(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                self.averaging.average.scheme = "ema:half_life=2"

    def trained(folder, **resume):
        trainer, _ = trainer_for(tmp_path / folder, save_strategy="steps", save_steps=6)
        trainer.add_callback(change := Change())
        change.averaging = Averaging(trainer, "ema:half_life=9")
        trainer.train(**resume)
        return trainer, change.averaging

    whole, _ = trained("whole")
    resumed, averaging = trained("resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert averaging.average.scheme == polyak.EMA(half_life=2)
    assert torch.equal(weights(resumed.model), weights(whole.model))


def test_training_goes_on_from_the_live_weights(tmp_path):
    averaged, steps = trainer_for(tmp_path)
    Averaging(averaged, polyak.EMA(decay=0.9))
    averaged.train()
    plain, plain_steps = trainer_for(tmp_path)
    plain.train()
    assert all(map(torch.equal, steps.weights, plain_steps.weights))


def test_every_one_of_several_data_sets_sees_the_average(tmp_path):
    trainer, steps = trainer_for(tmp_path, eval_steps=12)
    trainer.eval_dataset = {"one": rows(), "two": rows()}
    Averaging(trainer, polyak.Uniform())
    trainer.train()
    for seen in trainer.model.evaluated:
        torch.testing.assert_close(seen, mean(steps.weights))


def test_live_weights_return_when_an_evaluation_fails(tmp_path):
    trainer, steps = trainer_for(tmp_path)
    Averaging(trainer, polyak.Uniform())
    trainer.model.fail = True
    with pytest.raises(ValueError, match="evaluation failed"):
        trainer.train()
    assert torch.equal(weights(trainer.model), steps.weights[-1])
    trainer.model.fail = False
    trainer.evaluate()
    assert torch.equal(trainer.model.evaluated[-1], steps.weights[-1]), "what save_model would save"


def test_an_evaluation_within_another_leaves_it_the_average(tmp_path):
    class Predict(TrainerCallback):
        def on_prediction_step(self, args, state, control, **kwargs):
            if not self.inside:
                self.inside = True
                trainer.predict(rows()[:4])

    trainer, steps = trainer_for(tmp_path, eval_steps=12, per_device_eval_batch_size=4)
    Averaging(trainer, polyak.Uniform())
    trainer.add_callback(predict := Predict())
    predict.inside = False
    trainer.train()
    assert predict.inside and len(trainer.model.evaluated) == 5
    for seen in trainer.model.evaluated:
        torch.testing.assert_close(seen, mean(steps.weights))


def test_what_was_removed_stands_in_no_longer(tmp_path):
    class Remove(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                trainer.remove_callback(averaging)

    trainer, steps = trainer_for(tmp_path)
    averaging = Averaging(trainer, polyak.Uniform())
    trainer.add_callback(Remove())
    trainer.train()
    assert torch.equal(trainer.model.evaluated[-1], steps.weights[-1])
    assert torch.equal(weights(trainer.model), steps.weights[-1])


def test_other_callbacks_find_its_work_done(tmp_path):
    class Upload(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            self.found = (tmp_path / f"checkpoint-{state.global_step}" / averaging.file_name).is_file()

        def on_train_end(self, args, state, control, *, model, **kwargs):
            self.final = weights(model)

    trainer, steps = trainer_for(tmp_path, save_strategy="steps", save_steps=4)
    trainer.add_callback(upload := Upload())
    averaging = Averaging(trainer, polyak.Uniform())
    trainer.train()
    assert upload.found
    torch.testing.assert_close(upload.final, mean(steps.weights))


def test_resuming_is_bitwise_the_uninterrupted_run(tmp_path):
    whole, _ = trainer_for(tmp_path / "whole")
    Averaging(whole, polyak.EMA(half_life=3))
    whole.train()

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 6

    options = {"save_strategy": "steps", "save_steps": 6}
    half, _ = trainer_for(tmp_path / "half", **options)
    half.add_callback(Stop())
    Averaging(half, polyak.EMA(half_life=3))
    half.train()
    resumed, _ = trainer_for(tmp_path / "half", **options)
    averaging = Averaging(resumed, polyak.EMA(half_life=3))
    resumed.train(resume_from_checkpoint=True)
    assert averaging.average.n_averaged == 12
    assert torch.equal(weights(resumed.model), weights(whole.model))


def test_a_checkpoint_without_the_average_is_said(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 6}
    trainer_for(tmp_path, **options)[0].train()
    resumed, _ = trainer_for(tmp_path, **options)
    Averaging(resumed, polyak.Uniform())
    with pytest.warns(UserWarning, match="the average begins anew"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


def test_the_average_is_that_of_the_checkpoint_that_is_resumed(tmp_path):
    for name, lr in (("mine", 0.05), ("other", 0.5)):
        trainer, _ = trainer_for(tmp_path / name, save_strategy="steps", save_steps=6, learning_rate=lr)
        Averaging(trainer, polyak.Uniform())
        trainer.train()
        if name == "mine":
            final = weights(trainer.model)
    resumed, _ = trainer_for(tmp_path / "other")
    Averaging(resumed, polyak.Uniform())
    resumed.train(resume_from_checkpoint=str(tmp_path / "mine" / "checkpoint-6"))
    assert torch.equal(weights(resumed.model), final)


def test_the_best_checkpoint_gives_the_average_that_was_best(tmp_path):
    trainer, steps = trainer_for(
        tmp_path,
        save_strategy="steps",
        save_steps=4,
        load_best_model_at_end=True,
        metric_for_best_model="distance",
    )
    losses = iter([3.0, 1.0, 2.0])
    trainer.compute_metrics = lambda _: {"distance": next(losses)}
    trainer.args.greater_is_better = False
    averaging = Averaging(trainer, polyak.Uniform())
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-8")
    torch.testing.assert_close(weights(trainer.model), mean(steps.weights[:8]))
    assert averaging.average.n_averaged == 8


def test_a_lost_average_of_the_best_checkpoint_is_said(tmp_path):
    class Lose(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            (tmp_path / f"checkpoint-{state.global_step}" / averaging.file_name).unlink()

    trainer, steps = trainer_for(
        tmp_path, save_strategy="steps", save_steps=12, eval_steps=12, load_best_model_at_end=True
    )
    averaging = Averaging(trainer, polyak.Uniform())
    trainer.add_callback(Lose())
    with pytest.warns(UserWarning, match="the model has that checkpoint's live weights"):
        trainer.train()
    assert torch.equal(weights(trainer.model), steps.weights[-1])


def test_the_best_checkpoint_may_be_from_before_the_scheme_was_changed(tmp_path):
    options = {
        "save_strategy": "steps",
        "save_steps": 4,
        "load_best_model_at_end": True,
        "metric_for_best_model": "distance",
        "greater_is_better": False,
    }
    losses = iter([1.0, 2.0, 3.0, 2.0, 3.0])
    for scheme in ("uniform", "ema:half_life=9"):
        trainer, steps = trainer_for(tmp_path, **options)
        trainer.compute_metrics = lambda _: {"distance": next(losses)}
        averaging = Averaging(trainer, scheme, change_scheme=True)
        checkpoint = tmp_path / "checkpoint-4"
        goes_on = checkpoint.exists()
        trainer.train(resume_from_checkpoint=str(checkpoint) if goes_on else None)
        assert trainer.state.best_model_checkpoint == str(checkpoint)
        if not goes_on:
            best = mean(steps.weights[:4])
        torch.testing.assert_close(weights(trainer.model), best)
        assert averaging.average.n_averaged == 4


def test_statistics_are_those_of_the_averaged_weights(tmp_path):
    trainer, _ = trainer_for(tmp_path, Net(norm=True))
    batches = [{"x": torch.stack([row["x"] for row in rows()]), "labels": torch.ones(16)}]
    Averaging(trainer, polyak.Uniform(), recalibrate=batches)
    trainer.train()
    shipped = {name: buffer.clone() for name, buffer in trainer.model.named_buffers()}
    polyak.update_bn(batches, trainer.model.train())
    for name, buffer in trainer.model.named_buffers():
        torch.testing.assert_close(shipped[name], buffer)


def test_several_averages_one_of_which_stands_in(tmp_path):
    trainer, steps = trainer_for(tmp_path)
    Averaging(trainer, polyak.Uniform())
    followers = [Averaging(trainer, polyak.EMA(decay=d), apply=False) for d in (0.5, 0.9)]
    with pytest.raises(OptionError, match="apply=False"):
        Averaging(trainer, polyak.EMA(decay=0.7))
    with pytest.raises(OptionError, match="already"):
        Averaging(trainer, polyak.EMA(decay=0.9), apply=False)
    trainer.train()
    assert [f.average.n_averaged for f in followers] == [12, 12]
    torch.testing.assert_close(weights(trainer.model), mean(steps.weights))


def test_accumulation_counts_steps(tmp_path):
    trainer, _ = trainer_for(tmp_path, gradient_accumulation_steps=2, max_steps=3)
    averaging = Averaging(trainer, polyak.Uniform())
    trainer.train()
    assert averaging.average.n_averaged == 3


def test_what_cannot_work_is_refused(tmp_path):
    trainer, _ = trainer_for(tmp_path)
    with pytest.raises(TypeError, match="evry"):
        Averaging(trainer, polyak.Uniform(), evry=2)
    averaging = Averaging(trainer, polyak.Uniform())
    with pytest.raises(NotStartedError, match="when training begins"):
        _ = averaging.average


def test_a_language_model_keeps_its_ties_and_is_saved_as_the_average(tmp_path):
    config = GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=16, n_positions=8, dtype="bfloat16")
    tokens = [{"input_ids": torch.arange(8), "labels": torch.arange(8)} for _ in range(16)]
    args = TrainingArguments(
        str(tmp_path), max_steps=4, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no"
    )
    trainer = Trainer(GPT2LMHeadModel(config).bfloat16(), args, train_dataset=tokens)
    averaging = Averaging(trainer, polyak.EMA(half_life=2))
    trainer.train()
    trainer.save_model(tmp_path / "final")
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "final")
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    average = averaging.average.named_tensors()["transformer.wte.weight"]
    assert average.dtype == torch.float32
    assert torch.equal(loaded.lm_head.weight, average.bfloat16())


@pytest.mark.parametrize("beside", [False, True])
def test_a_recording_is_the_run(tmp_path, beside):
    trainer, steps = trainer_for(
        tmp_path,
        save_strategy="steps",
        save_steps=4,
        load_best_model_at_end=True,
        logging_strategy="steps",
        logging_steps=1,
    )
    if beside:
        Averaging(trainer, polyak.Uniform())
    recording = Recording(trainer, tmp_path / "run", block=2)
    trainer.train()
    trajectory = recording.trajectory
    assert [str(block) for block in trajectory.blocks] == [f"({k}, {k + 2}]" for k in range(0, 12, 2)]
    assert trajectory.blocks[0].lr.max > 0
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert trajectory.blocks[1].metrics["loss"].mean == pytest.approx(sum(logged[1:3]) / 2)
    assert "grad_norm" in trajectory.blocks[1].metrics
    torch.testing.assert_close(trajectory.average("tail:steps=4")["body.0.weight"], mean(steps.weights[8:]))
    assert torch.equal(trajectory.live()["body.0.weight"], steps.weights[-1])


def test_a_recording_goes_on_with_its_checkpoint(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 5}
    whole, _ = trainer_for(tmp_path / "a", **options)
    Recording(whole, tmp_path / "whole", block=4)
    whole.train()
    resumed, _ = trainer_for(tmp_path / "a", **options)
    recording = Recording(resumed, tmp_path / "whole", block=4)
    assert (tmp_path / "a" / "checkpoint-5" / "polyak-recording.pt").is_file()
    before = polyak.Trajectory(tmp_path / "whole").average("uniform")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-5"))
    assert recording.trajectory.blocks[-1].stop == 12
    for name, tensor in recording.trajectory.average("uniform").items():
        assert torch.equal(tensor, before[name])


def test_a_recording_is_whole_when_training_fails(tmp_path):
    trainer, steps = trainer_for(tmp_path)
    recording = Recording(trainer, tmp_path / "run", block=3)
    trainer.model.fail = True
    with pytest.raises(ValueError, match="evaluation failed"):
        trainer.train()
    assert recording.trajectory.blocks[-1].stop == 4
    assert torch.equal(recording.trajectory.live()["body.0.weight"], steps.weights[-1])


# What callbacks are before and after a run.


def test_callbacks_pickle_and_copy_with_their_trainer(tmp_path):
    GradientState._reset_state()  # where accelerate keeps what another Trainer of this process left
    trainer, _ = trainer_for(tmp_path / "out")
    averaging = Averaging(trainer, polyak.Uniform(), validate="both", recalibrate=[torch.randn(4, 3)])
    recording = Recording(trainer, tmp_path / "run", block=2)
    before = weights(trainer.model)
    for again in (pickle.loads(pickle.dumps(trainer)), copy.deepcopy(trainer)):
        again.train()
        theirs = again.callback_handler.callbacks
        average = next(callback.average for callback in theirs if isinstance(callback, Averaging))
        assert average.n_averaged == 12
        torch.testing.assert_close(weights(again.model), average.named_tensors()["body.0.weight"])
        assert "eval_loss/average" in again.state.log_history[0]
        shutil.rmtree(tmp_path / "run")
        assert torch.equal(weights(trainer.model), before)
    trainer.train()
    assert averaging.average.n_averaged == 12
    for callback in (averaging, recording):
        copied = copy.deepcopy(callback)
        other, _ = trainer_for(tmp_path / "out")
        other.add_callback(pickle.loads(pickle.dumps(copied)))
        with pytest.raises(PolyakError, match="Make the callback for the Trainer that trains"):
            other.train()


# Releases of transformers that lack what is not documented.


def test_a_trainer_without_its_training_loop_is_refused(tmp_path, monkeypatch):
    trainer, _ = trainer_for(tmp_path)
    monkeypatch.delattr(Trainer, "_inner_training_loop")
    with pytest.raises(PolyakError, match="Trainer of this transformers has no _inner_training_loop"):
        Averaging(trainer, polyak.Uniform())


def test_training_by_another_loop_is_refused(tmp_path, monkeypatch):
    """Where it resumes from would not be seen, and the average would begin anew without a word."""
    trainer, steps = trainer_for(tmp_path)
    Averaging(trainer, polyak.Uniform())

    def train(self):
        Trainer._inner_training_loop(self, batch_size=self.args.train_batch_size, args=self.args)

    monkeypatch.setattr(Trainer, "train", train)
    with pytest.raises(PolyakError, match=r"does not train by Trainer\._inner_training_loop\(\)"):
        trainer.train()
    assert not steps.weights
