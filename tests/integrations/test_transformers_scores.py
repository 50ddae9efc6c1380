"""In the Trainer of transformers: both metrics, previews, units, SWALR, and averages in checkpoints."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from torch.optim.swa_utils import SWALR
from torch.utils.data import IterableDataset
from transformers import EarlyStoppingCallback, GPT2Config, GPT2LMHeadModel, TrainerCallback

import polyak
from polyak.errors import OptionError, StateError
from polyak.integrations.transformers import Averaging, Recording
from transformers_runs import Net, mean, rows, trainer_for, weights

pytestmark = pytest.mark.filterwarnings("ignore:.*(pin_memory|generation|lr_scheduler|stand in)")


def evaluations(trainer):
    return [entry for entry in trainer.state.log_history if "eval_loss" in entry]


# Both metrics, and previews.


def test_live_averaged_and_decayed_are_scored_each_by_its_own_weights(tmp_path):
    trainer, steps = trainer_for(tmp_path)
    plain, plain_steps = trainer_for(tmp_path)
    Averaging(trainer, polyak.Uniform(), start=4, validate="both")
    Averaging(trainer, polyak.EMA(decay=0.5), validate="both", apply=False)
    Recording(trainer, tmp_path / "run", block=2, preview=["decay:linear:0.5", "tail:steps=2"])
    trainer.train()
    plain.train()
    seen = trainer.model.evaluated
    # Callbacks are asked the newest first; before step 5 the average has no sample, and is not evaluated.
    assert len(seen) == 4 + 5 + 5
    live, linear, tail, ema, uniform = seen[-5:]
    assert torch.equal(live, steps.weights[-1])
    torch.testing.assert_close(tail, mean(steps.weights[-2:]))
    torch.testing.assert_close(uniform, mean(steps.weights[4:]))
    assert not torch.equal(linear, tail) and not torch.equal(ema, uniform)
    first, *_, last = evaluations(trainer)
    names = {
        "eval_loss",
        "eval_loss/average",
        "eval_loss/ema:decay=0.5",
        "eval_loss/decayed",
        "eval_loss/tail:steps=2",
    }
    assert names <= last.keys() and len({last[name] for name in names}) == 5
    assert first["eval_loss/average"] == first["eval_loss"], "the live weights stand in"
    assert not any(name.endswith("_time/average") for name in last)
    assert all(map(torch.equal, steps.weights, plain_steps.weights)), "training is what it was"


def test_monitors_use_either_metric(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 4, "load_best_model_at_end": True}
    metric = {"metric_for_best_model": "eval_loss/average"}
    upside_down, _ = trainer_for(tmp_path, **options, **metric)
    with pytest.raises(OptionError, match="transformers would take the greatest"):
        Averaging(upside_down, polyak.Uniform(), validate="both")
    decayed, _ = trainer_for(tmp_path, **options, metric_for_best_model="loss/decayed")
    with pytest.raises(OptionError, match="greater_is_better=False"):
        Recording(decayed, tmp_path / "run", preview="decay:sqrt:0.4")
    trainer, steps = trainer_for(tmp_path, **options, **metric, greater_is_better=False, learning_rate=5.0)
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=1))
    Averaging(trainer, polyak.Uniform(), validate="both")
    trainer.train()
    scored = [entry["eval_loss/average"] for entry in evaluations(trainer)]
    assert trainer.state.best_metric == min(scored)
    assert len(scored) == next((n for n, loss in enumerate(scored[1:], 2) if loss >= min(scored[: n - 1])), 3)
    best = 4 * (1 + scored.index(min(scored)))
    torch.testing.assert_close(weights(trainer.model), mean(steps.weights[:best]))


# Units.


def sampled(tmp_path, n_rows=16, data=None, **options):
    """The weights after each step, and the mean of those sampled; 4 steps an epoch, 3 epochs."""
    trainer, steps = trainer_for(
        tmp_path, eval_strategy="no", **({"max_steps": -1, "num_train_epochs": 3} if data is None else {})
    )
    trainer.train_dataset = data or trainer.train_dataset
    averaging = Averaging(trainer, polyak.Uniform(), **options)
    trainer.train()
    return steps.weights, averaging.average


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"start": 0.75}, [9, 10, 11]),
        ({"start": 0.5, "every": 2}, [7, 9, 11]),
        ({"start_epoch": 1}, [4, 5, 6, 7, 8, 9, 10, 11]),
        ({"start_epoch": 1, "every_epochs": 1}, [7, 11]),
        ({"every_epochs": 2}, [7]),
        ({"start": 0.34, "every_epochs": 1}, [7, 11]),
    ],
)
def test_the_units_of_start_and_every(tmp_path, options, steps):
    seen, average = sampled(tmp_path, **options)
    assert average.n_averaged == len(steps)
    torch.testing.assert_close(average.named_tensors()["body.0.weight"], mean([seen[step] for step in steps]))


def test_an_epoch_that_the_run_ends_within_does_not_count(tmp_path):
    trainer, steps = trainer_for(tmp_path, eval_strategy="no", max_steps=6)
    averaging = Averaging(trainer, "uniform", every_epochs=1)
    trainer.train()
    assert averaging.average.n_averaged == 1
    assert torch.equal(weights(trainer.model), steps.weights[3])


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield from rows()


def test_data_without_a_length_go_by_steps(tmp_path):
    seen, average = sampled(tmp_path, data=Endless(), start=0.75)
    torch.testing.assert_close(average.named_tensors()["body.0.weight"], mean(seen[9:]))
    with pytest.raises(OptionError, match="the data have no length"):
        sampled(tmp_path, data=Endless(), swa_lr=0.1)


def test_should_update_may_be_overridden(tmp_path):
    class Mine(Averaging):
        def should_update(self, step_idx=None, epoch_idx=None):
            return step_idx in (2, 5)

    trainer, steps = trainer_for(tmp_path, eval_strategy="no")
    averaging = Mine(trainer, polyak.Uniform())
    trainer.train()
    assert averaging.average.n_averaged == 2
    torch.testing.assert_close(weights(trainer.model), mean([steps.weights[2], steps.weights[5]]))


@pytest.mark.parametrize("saved_by", ["steps", "epoch"])
def test_resuming_by_epochs_at_another_rate_is_bitwise_the_same(tmp_path, saved_by):
    """Also from the end of an epoch, which the checkpoint of its last step does not know to be one."""

    class Rates(TrainerCallback):
        def __init__(self):
            self.rates = []

        def on_step_end(self, args, state, control, *, optimizer, **kwargs):
            self.rates.append(optimizer.param_groups[0]["lr"])

    def trained(folder, **resume):
        trainer, _ = trainer_for(
            tmp_path / folder,
            max_steps=-1,
            num_train_epochs=3,
            eval_strategy="no",
            save_strategy=saved_by,
            save_steps=4,
        )
        trainer.add_callback(rates := Rates())
        averaging = Averaging(
            trainer,
            polyak.Uniform(),
            start_epoch=1,
            every_epochs=1,
            swa_lr=0.01,
            anneal_epochs=1,
            anneal_strategy="linear",
        )
        trainer.train(**resume)
        assert type(trainer.lr_scheduler).__name__ == "LambdaLR", "the Trainer has its own again"
        return averaging.average, rates.rates

    whole, rates = trained("whole")
    # As torch's own SWALR goes on from the rate that the fourth step left.
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=rates[3])
    schedule = SWALR(optimizer, 0.01, 4, "linear")
    for rate in rates[4:]:
        optimizer.step()
        schedule.step()
        assert rate == pytest.approx(schedule.get_last_lr()[0])
    assert whole.n_averaged == 2 and rates[-1] == pytest.approx(0.01)
    for step in (4, 8):
        resumed, again = trained(
            "again", resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}")
        )
        assert again == rates[step:]
        assert resumed.n_averaged == 2
        for name, tensor in whole.named_tensors().items():
            assert torch.equal(tensor, resumed.named_tensors()[name])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"start": 1.5}, "start"),
        ({"every": 0}, "every"),
        ({"start": 3, "start_epoch": 1}, "give one of them"),
        ({"swa_lr": -1.0}, "swa_lr"),
        ({"anneal_epochs": 3}, "swa_lr"),
        ({"validate": "live"}, "validate"),
        ({"dtype": "float31"}, "dtype"),
        ({"buffers": "move"}, "buffers"),
    ],
)
def test_bad_options_are_refused_at_once(tmp_path, options, said):
    trainer, _ = trainer_for(tmp_path)
    with pytest.raises(OptionError, match=said):
        Averaging(trainer, polyak.Uniform(), **options)
    assert not any(isinstance(callback, Averaging) for callback in trainer.callback_handler.callbacks)


@pytest.mark.parametrize("options", [{"save_average": True}, {"swa_lr": 0.1}])
def test_what_only_one_of_several_may_do(tmp_path, options):
    trainer, _ = trainer_for(tmp_path)
    Averaging(trainer, polyak.Uniform(), **options)
    with pytest.raises(OptionError, match="to one of them"):
        Averaging(trainer, polyak.EMA(decay=0.9), apply=False, **options)


# Averages in checkpoints.


# Of transformers 5.1 and before, which takes checkpoints of one second for those of a broken clock.
@pytest.mark.filterwarnings("ignore:mtime may not be reliable")
def test_checkpoints_have_the_averaged_model_and_take_it_with_them(tmp_path):
    config = GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=16, n_positions=8)
    model = GPT2LMHeadModel(config).bfloat16()
    trainer, _ = trainer_for(
        tmp_path, model, save_strategy="steps", save_steps=4, save_total_limit=1, eval_strategy="no"
    )
    trainer.callback_handler.callbacks.pop()  # that looks at a layer which this model has not
    trainer.train_dataset = [{"input_ids": torch.arange(8), "labels": torch.arange(8)} for _ in range(16)]
    averaging = Averaging(trainer, polyak.EMA(half_life=2), start=5, save_average=True)
    kept = []
    trainer.add_callback(seen := TrainerCallback())
    seen.on_save = lambda args, state, control, **kwargs: kept.append(
        {p.parent.name: p.is_dir() for p in tmp_path.glob("checkpoint-*/average")}
    )
    trainer.train()
    assert kept == [{}, {"checkpoint-8": True}, {"checkpoint-12": True}], (
        "none before its first sample, none left"
    )
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-12"]
    folder = tmp_path / "checkpoint-12" / "average"
    assert json.loads((folder / "config.json").read_bytes())["architectures"] == ["GPT2LMHeadModel"]
    averaged = GPT2LMHeadModel.from_pretrained(folder)
    assert averaged.lm_head.weight is averaged.transformer.wte.weight and averaged.dtype == torch.bfloat16
    for name, tensor in averaging.average.named_tensors().items():
        assert torch.equal(averaged.state_dict()[name], tensor.bfloat16())


def test_a_run_with_averages_in_its_checkpoints_is_averaged_afterwards(tmp_path):
    """The folder of the run means the live weights; the averages are taken where they are named."""
    config = GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=16, n_positions=8)
    run = tmp_path / "run"
    trainer, _ = trainer_for(
        run, GPT2LMHeadModel(config), save_strategy="steps", save_steps=4, eval_strategy="no"
    )
    trainer.callback_handler.callbacks.pop()  # that looks at a layer which this model has not
    trainer.train_dataset = [{"input_ids": torch.arange(8), "labels": torch.arange(8)} for _ in range(16)]
    Averaging(trainer, polyak.EMA(half_life=2), save_average=True)
    trainer.train()
    trainer.save_model()
    for given, within in (([run], "."), (sorted(run.glob("checkpoint-*/average")), "average")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the model above the checkpoints is left out
            report = polyak.average_checkpoints(given, tmp_path / f"{within}-averaged")
        assert report.steps == (4, 8, 12)
        models = [GPT2LMHeadModel.from_pretrained(run / f"checkpoint-{step}" / within) for step in (4, 8, 12)]
        averaged = GPT2LMHeadModel.from_pretrained(tmp_path / f"{within}-averaged")
        for name, parameter in averaged.named_parameters():
            torch.testing.assert_close(
                parameter, mean([dict(m.named_parameters())[name].detach() for m in models])
            )


def test_another_half_life_is_taken_up_only_if_asked_for(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 6, "eval_strategy": "no"}
    first, steps = trainer_for(tmp_path / "out", **options)
    Averaging(first, polyak.EMA(half_life=2))
    first.train()
    checkpoint = str(tmp_path / "out" / "checkpoint-6")

    def resumed(*averages):
        trainer, _ = trainer_for(tmp_path / "again", **(options | {"save_strategy": "no"}))
        averaging = [Averaging(trainer, scheme, **keywords) for scheme, keywords in averages]
        trainer.train(resume_from_checkpoint=checkpoint)
        return averaging[-1].average

    with pytest.raises(StateError, match=r"holds 'polyak-ema-half_life-2\.pt'.* change_scheme=True"):
        resumed(("ema:half_life=9", {}))
    changed = resumed(("ema:half_life=9", {"change_scheme": True}))
    average = polyak.Average(model := Net(), "ema:half_life=2")
    for step, seen in enumerate(steps.weights):
        if step == 6:
            average.scheme = "ema:half_life=9"
        model.body[0].weight.data.copy_(seen)
        average.update()
    assert changed.scheme == polyak.EMA(half_life=9)
    assert torch.equal(changed.named_tensors()["body.0.weight"], average.named_tensors()["body.0.weight"])
    # One more beside the one that is there is new, and said to be.
    with pytest.warns(UserWarning, match="the average begins anew"):
        assert resumed(("ema:half_life=2", {}), ("uniform", {"apply": False})).n_averaged == 6
