"""What was chosen is written as its inputs are, so that their library loads it."""

import json

import pytest
import torch
from torch import nn

import polyak
from library_models import filled, tiny_gpt2
from polyak.cli import main
from polyak.errors import OptionError, StructureError


def distance_to(target):
    def losses(model):
        return torch.stack([(p.detach() - target).square().mean() for p in model.parameters()])

    return losses


@pytest.fixture
def gpt2_run(tmp_path):
    for step, value in ((100, 1.0), (200, 3.0)):
        tiny_gpt2(value).save_pretrained(tmp_path / f"checkpoint-{step}")
    folders = [tmp_path / "checkpoint-100", tmp_path / "checkpoint-200"]
    return polyak.Trajectory.from_checkpoints(folders)


def chosen(trajectory, model):
    return polyak.select(
        trajectory, model, score=distance_to(2.0), mode="min", profiles=["uniform"], progress=False
    )


def test_a_choice_among_folders_of_transformers_is_one_more(gpt2_run, tmp_path):
    choice = chosen(gpt2_run, tiny_gpt2(3.0))
    choice.write(tmp_path / "best")
    loaded = type(tiny_gpt2(0.0)).from_pretrained(tmp_path / "best")
    assert choice.best.name == "uniform" and {p.mean().item() for p in loaded.parameters()} == {2.0}


def test_an_average_that_a_trajectory_writes_is_one_too(gpt2_run, tmp_path):
    gpt2_run.write("uniform", tmp_path / "average")
    loaded = type(tiny_gpt2(0.0)).from_pretrained(tmp_path / "average")
    assert {p.mean().item() for p in loaded.parameters()} == {2.0}


@pytest.fixture
def nested_run(tmp_path):
    for epoch, value in ((1, 1.0), (2, 3.0)):
        state = {"model": filled(nn.Linear(2, 1), value).state_dict(), "epoch": epoch, "config": {"width": 2}}
        torch.save(state, tmp_path / f"epoch_{epoch}.pt")
    return polyak.Trajectory.from_checkpoints(sorted(tmp_path.glob("*.pt")))


def test_a_choice_is_nested_like_a_checkpoint(nested_run, tmp_path):
    choice = chosen(nested_run, nn.Linear(2, 1))
    choice.write(tmp_path / "best.pt", like=tmp_path / "epoch_2.pt")
    written = torch.load(tmp_path / "best.pt")
    assert written["config"] == {"width": 2} and written["model"]["weight"].tolist() == [[2.0, 2.0]]


def test_what_does_not_nest_is_refused_and_nothing_is_written(nested_run, tmp_path):
    choice = chosen(nested_run, nn.Linear(2, 1))
    torch.save({"model": nn.Linear(2, 1, bias=False).state_dict(), "step": 1}, tmp_path / "other.pth")
    with pytest.raises(StructureError, match="other.pth"):
        choice.write(tmp_path / "best.pt", like=tmp_path / "other.pth")
    with pytest.raises(OptionError, match="name a torch file"):
        choice.write(tmp_path / "best.safetensors", like=tmp_path / "epoch_2.pt")
    assert not list(tmp_path.glob("best*"))


def test_the_command_says_what_came_along(gpt2_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom transformers import GPT2LMHeadModel\n"
        "def build(): return GPT2LMHeadModel.from_pretrained('checkpoint-100')\n"
        "def losses(model):\n"
        "    print('validating')\n"
        "    return torch.stack([(p.detach() - 2).square().mean() for p in model.parameters()])\n"
    )
    asked = "select checkpoint-100 checkpoint-200 --model mine:build --score mine:losses --mode min --profiles uniform"
    assert main([*asked.split(), "--json", "-o", "best"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert "validating" in captured.err
    assert found["best"] == "uniform" and (tmp_path / "best" / "config.json").exists()
    assert any(note.startswith("copied from checkpoint-100") for note in found["notes"])
