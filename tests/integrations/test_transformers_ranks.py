"""The callbacks of transformers on two gloo ranks: DDP, and FSDP2 by both ways that the Trainer has."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.distributed import DistributedConfig

import polyak
from polyak.errors import OptionError
from polyak.integrations.transformers import Averaging, Recording
from ranks import run_on_ranks
from sharded_accelerate import as_torchrun, sharding_on_cpu


def language_model():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=17,
            max_position_embeddings=16,
            tie_word_embeddings=True,
        )
    )


class Visited(TrainerCallback):
    def __init__(self):
        self.weights = []

    def on_step_end(self, args, state, control, *, model, **kwargs):
        self.weights.append({name: full(p) for name, p in model.named_parameters()})


def full(tensor):
    tensor = tensor.detach()
    return tensor.full_tensor().clone() if hasattr(tensor, "full_tensor") else tensor.clone()


def trainer_for(folder, model, **options):
    """A Trainer as torchrun starts it, on CPU; a batch of four however many ranks there are."""
    warnings.simplefilter("ignore")
    as_torchrun()
    ranks = dist.get_world_size()
    tokens = [
        # The first token is not predicted; transformers 5.0 would divide by it too.
        {
            "input_ids": (torch.arange(6) + i) % 17,
            "labels": torch.tensor([-100, *((torch.arange(1, 6) + i) % 17)]),
        }
        for i in range(16)
    ]
    arguments = {
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4 // ranks,
    }
    args = TrainingArguments(
        str(folder), report_to=[], use_cpu=True, disable_tqdm=True, **(arguments | options)
    )
    trainer = Trainer(model, args, train_dataset=tokens, eval_dataset=tokens)
    trainer.add_callback(visited := Visited())
    return trainer, visited


def scores(trainer):
    entries = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    return [{name: value for name, value in entry.items() if "loss" in name} for entry in entries]


def mean_of(visited):
    return {name: torch.stack([weights[name] for weights in visited]).double().mean(0) for name in visited[0]}


def assert_close(found, expected, atol=1e-6):
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value.double(), rtol=0, atol=atol, msg=name)


def by_ddp(folder):
    folder = Path(folder)
    trainer, visited = trainer_for(folder / "out", language_model())
    averaging = Averaging(trainer, polyak.Uniform(), validate="both", save_average=True)
    recording = Recording(trainer, folder / "run", block=2, preview="tail:steps=2")
    trainer.train()
    expected = mean_of(visited.weights)
    assert_close(averaging.average.named_tensors(), expected)
    assert_close(dict(trainer.model.named_parameters()), expected)
    saved = LlamaForCausalLM.from_pretrained(folder / "out" / "checkpoint-6" / "average")
    assert_close(dict(saved.named_parameters()), expected)
    if dist.get_rank() == 0:
        assert recording.trajectory.blocks[-1].stop == 6
    return scores(trainer), visited.weights[3:]


def sharded_at_load(folder):
    """transformers' own FSDP2, which trains on CPUs as it is; it writes no checkpoints that training resumes from."""
    folder = Path(folder)
    if dist.get_rank() == 0:
        language_model().save_pretrained(folder / "base")
    dist.barrier()
    config = DistributedConfig(fsdp_size=2)
    model = LlamaForCausalLM.from_pretrained(folder / "base", distributed_config=config)
    trainer, visited = trainer_for(folder / "native", model, save_only_model=True)
    averaging = Averaging(trainer, polyak.Uniform(), save_average=True)
    trainer.train()
    expected = mean_of(visited.weights)
    assert averaging._following.sharded
    assert_close({n: full(t) for n, t in averaging.average.named_tensors().items()}, expected)
    saved = LlamaForCausalLM.from_pretrained(folder / "native" / "checkpoint-6" / "average")
    assert_close(dict(saved.named_parameters()), expected)
    return scores(trainer)


@pytest.mark.skipif(
    not hasattr(DistributedConfig, "fsdp_size"), reason="this transformers has no FSDP2 of its own"
)
def test_fsdp_of_transformers_itself(tmp_path):
    first, second = run_on_ranks(sharded_at_load, str(tmp_path))
    assert first == second


@pytest.mark.filterwarnings("ignore:.*pin_memory")
def test_ddp(tmp_path):
    (first, tail), (second, _) = run_on_ranks(by_ddp, str(tmp_path))
    assert first == second
    assert first[-1].keys() == {"eval_loss", "eval_loss/average", "eval_loss/tail:steps=2"}
    # What the ranks scored together is what one model scores.
    tokens = torch.stack([(torch.arange(6) + i) % 17 for i in range(16)])
    for name, samples in (("eval_loss", tail[-1:]), ("eval_loss/tail:steps=2", tail[-2:])):
        model = language_model()
        model.load_state_dict({k: v.float() for k, v in mean_of(samples).items()}, strict=False)
        assert first[-1][name] == pytest.approx(model(tokens, labels=tokens).loss.item(), abs=1e-5)


def sharded_trainer(folder, model, **options):
    config = {
        "version": 2,
        "state_dict_type": "SHARDED_STATE_DICT",
        "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
    }
    with sharding_on_cpu():
        return trainer_for(folder / "out", model, fsdp=True, fsdp_config=config, **options)


def best_by(metric):
    return {"load_best_model_at_end": True, "metric_for_best_model": metric, "greater_is_better": False}


def fsdp_trainer(folder, name):
    trainer, visited = sharded_trainer(folder, language_model(), **best_by("eval_loss/average"))
    averaging = Averaging(trainer, polyak.EMA(half_life=2), validate="both", save_average=True)
    recording = Recording(trainer, folder / name, block=2, preview="decay:sqrt:0.4")
    return trainer, visited, averaging, recording


def results(trainer, averaging, recording):
    means = {name: full(tensor) for name, tensor in averaging.average.named_tensors().items()}
    model = {name: full(p) for name, p in trainer.model.named_parameters()}
    return means, model, recording.trajectory.average("uniform"), scores(trainer)


def by_fsdp(folder):
    folder = Path(folder)
    trainer, visited, averaging, recording = fsdp_trainer(folder, "run")
    trainer.train()
    assert hasattr(next(trainer.model.parameters()), "full_tensor")
    held = sum(t.to_local().numel() for t in averaging.average.named_tensors().values())
    whole = results(trainer, averaging, recording)
    return held, visited.weights, whole


def resumed_by_fsdp(folder):
    folder = Path(folder)
    trainer, _, averaging, recording = fsdp_trainer(folder, "run")
    trainer.train(resume_from_checkpoint=str(folder / "out" / "checkpoint-3"))
    return results(trainer, averaging, recording)


def recorded_by_fsdp(folder):
    trainer, _ = sharded_trainer(Path(folder), language_model(), **best_by("eval_loss/tail:steps=2"))
    Recording(trainer, Path(folder) / "run", block=1, preview="tail:steps=2")
    trainer.train()
    return trainer.state.best_model_checkpoint


def adapted_by_fsdp(folder):
    adapted = get_peft_model(language_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    trainer, _ = sharded_trainer(Path(folder), adapted, save_strategy="no")
    Averaging(trainer, "uniform", save_average=True)
    with pytest.raises(OptionError) as refused:
        trainer.train()
    return "save_average" in str(refused.value)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*pin_memory")
def test_ranks_that_record_alone_agree_on_the_best_checkpoint(tmp_path):
    assert (
        run_on_ranks(recorded_by_fsdp, str(tmp_path), timeout_seconds=240)
        == [str(tmp_path / "out" / "checkpoint-6")] * 2
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*pin_memory")
def test_a_folder_of_a_sharded_adapter_is_refused(tmp_path):
    assert run_on_ranks(adapted_by_fsdp, str(tmp_path), timeout_seconds=240) == [True, True]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*pin_memory")
def test_fsdp_of_accelerate_with_checkpoints_that_other_numbers_of_ranks_resume(tmp_path):
    (held, visited, whole), (other_held, _, other) = run_on_ranks(by_fsdp, str(tmp_path), timeout_seconds=240)
    means, model, recorded, scored = whole
    assert held + other_held == sum(value.numel() for value in visited[0].values()), "nothing is held twice"
    assert scored == other[3] and scored[1]["eval_loss/average"] < scored[0]["eval_loss/average"]
    assert scored[-1].keys() == {"eval_loss", "eval_loss/average", "eval_loss/decayed"}
    weights = torch.from_numpy(polyak.EMA(half_life=2).weights(range(7)))
    expected = {
        name: torch.einsum("n,n...->...", weights, torch.stack([v[name] for v in visited]).double())
        for name in visited[0]
    }
    for found in (means, model):
        assert_close(found, expected)
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-6" / "average")
    assert saved.lm_head.weight is saved.model.embed_tokens.weight
    assert_close(dict(saved.named_parameters()), expected)
    assert_close(recorded, mean_of(visited))
    for ranks, atol in ((2, 0), (1, 1e-4)):
        again = run_on_ranks(resumed_by_fsdp, str(tmp_path), ranks=ranks, timeout_seconds=240)[0]
        for found, before in zip(again[:3], whole[:3], strict=True):
            assert_close(found, before, atol=atol)
