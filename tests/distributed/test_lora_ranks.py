"""Averages of LoRA adapters on several ranks."""

import torch

import polyak
from polyak import checkpoints
from polyak.combine import Plan, _offline
from ranks import run_on_ranks


def inputs(folder):
    return [f"{folder}/{name}.safetensors" for name in "ab"]


def average_on_this_rank(folder):
    return _offline.run_on_ranks(Plan(inputs(folder), f"{folder}/ranks.safetensors")).notes


def test_ranks_write_what_one_process_does(tmp_path):
    for seed, path in enumerate(inputs(tmp_path)):
        torch.manual_seed(seed)
        factors = {"q.lora_down.weight": torch.randn(2, 30), "q.lora_up.weight": torch.randn(20, 2)}
        checkpoints.write(path, factors | {"q.bias": torch.randn(20), "norm.bias": torch.randn(500)})
    notes = run_on_ranks(average_on_this_rank, str(tmp_path))
    alone = polyak.average_checkpoints(inputs(tmp_path), tmp_path / "one.safetensors")
    assert notes[0] == alone.notes and "keeps" in alone.notes[0]
    many, one = (checkpoints.open(tmp_path / f"{name}.safetensors") for name in ("ranks", "one"))
    for name in one.tensors:
        torch.testing.assert_close(many.read(name), one.read(name), rtol=0, atol=1e-5)
