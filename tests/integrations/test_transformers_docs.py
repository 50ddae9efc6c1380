"""The code in the pages on transformers, accelerate and PEFT runs as it is pasted."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import polyak
from pages import run
from polyak.integrations.transformers import Averaging

pytestmark = pytest.mark.filterwarnings("ignore")  # pin_memory, no CUDA, the names of a tiny model's data


def language_model():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=16, n_positions=8))


TOKENS = [{"input_ids": torch.arange(8), "labels": torch.arange(8)} for _ in range(16)]


def test_the_page_on_transformers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yours = run("transformers.md", model=language_model(), train=TOKENS, validation=TOKENS)
    assert len(yours["recording"].trajectory.blocks) > 1
    logged = {name for entry in yours["trainer"].state.log_history for name in entry}
    assert {"eval_loss", "eval_loss/average"} <= logged
    assert isinstance(yours["averaged"], GPT2LMHeadModel)


def test_the_page_on_accelerate(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, seen = nn.Linear(3, 1), []
    yours = run(
        "accelerate.md",
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        loader=torch.utils.data.DataLoader(torch.randn(8, 3), batch_size=2),
        loss_of=lambda model, batch: model(batch).square().mean(),
        evaluate=lambda model: seen.append(model.weight.clone()),
    )
    average = yours["average"]
    assert average.n_averaged == 4 and torch.equal(seen[0], average.named_tensors()["weight"])
    assert (tmp_path / "state" / "polyak-ema.pt").is_file()


def test_the_page_on_peft(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bases = {name: language_model() for name in ("base", "base_again", "base_once_more")}
    yours = run("peft.md", **bases, train=TOKENS)
    ended = {name: p for name, p in yours["adapted"].named_parameters() if "lora" in name}
    for name, parameter in yours["averaged"].named_parameters():
        if "lora" in name:
            torch.testing.assert_close(parameter, ended[name])
    assert any(p.abs().sum() > 0 for name, p in yours["adapter"].named_parameters() if "lora_B" in name)


def test_an_adapter_is_resumed_beside_its_saved_average(tmp_path):
    def trained(**resume):
        adapted = get_peft_model(language_model(), LoraConfig(r=2, target_modules=["c_attn"]))
        arguments = TrainingArguments(str(tmp_path), max_steps=6, save_steps=3, report_to=[], use_cpu=True)
        trainer = Trainer(adapted, arguments, train_dataset=TOKENS)
        Averaging(trainer, polyak.EMA(half_life=2), save_average=True)
        trainer.train(**resume)
        return {name: parameter for name, parameter in adapted.named_parameters() if "lora" in name}

    whole, resumed = trained(), trained(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(parameter, resumed[name]) for name, parameter in whole.items())
