"""Commands speak of commands: no Python in what they refuse, and one word for what they wrote."""

import re

import pytest
import torch

import polyak
from polyak.cli import main
from polyak.errors import CheckpointError, OptionError, OutputExistsError

# Keywords and values of Python, attributes and calls of this package, its classes, and what pydantic says.
PYTHON = re.compile(
    r"\w=(True|False|None|\.\.\.)|\bNone\b|max_memory|overwrite|usable|say which format|polyak\.\w+[.(]"
    r"|[Tt]rajectory|Recorder|Value error"
)
MODEL = """
import torch

def build():
    return torch.nn.Linear(2, 1, bias=False)

def losses(model):
    return (model.weight - 10).abs().flatten() + 0.25
"""
USE = ["--model", "user_words:build", "--score", "user_words:losses"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Checkpoints, a recorded run and one with a damaged block, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "user_words.py").write_text(MODEL)
    (tmp_path / "ckpts").mkdir()
    for step, value in ((9, 14.0), (10, 8.0)):
        torch.save({"weight": torch.full((1, 2), value)}, tmp_path / "ckpts" / f"step{step}.pt")
    torch.save({"other": torch.ones(3)}, tmp_path / "step12.pt")
    for name in ("run", "broken", "lost"):
        model = torch.nn.Linear(2, 1, bias=False)
        with polyak.Recorder(model, name, block=2) as run:
            for value in (9.0, 9.0, 11.0, 11.0, 10.0, 10.0):
                model.weight.data.fill_(value)
                run.update()
    min((tmp_path / "broken").glob("block-*")).write_bytes(b"")
    (tmp_path / "lost" / "manifest.json").write_text("{}")
    (tmp_path / "there.pt").write_text("mine")
    (tmp_path / "there.html").write_text("mine")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["average", "ckpts", "-o", "there.pt"],
            "there.pt exists already: name another output, or give --force",
        ),
        (["average", "run", "-o", "there.pt"], "or give --force"),
        (["select", "ckpts", *USE, "-o", "there.pt"], "or give --force"),
        (["report", "ckpts", "-o", "there.html"], "or give --force"),
        (["average", "ckpts", "-o", "out.doc"], "out.doc has a suffix of no known format: name it "),
        (
            ["average", "ckpts", "-o", "out.pt", "--weights", "1,1", "--profile", "uniform"],
            "--weights or --profile",
        ),
        (["average", "ckpts", "-o", "out.pt", "--max-memory", "1MB"], "a memory of 1MB is too little"),
        (["average", "ckpts", "step12.pt", "-o", "out.pt"], "choose the right weights with --key"),
        (["average", "ckpts", "run", "-o", "out.pt"], "run is a recorded run"),
        (
            ["average", "broken", "-o", "out.pt"],
            "the other 2 blocks can be used, by a profile that does not reach it",
        ),
        (["average", "lost", "-o", "out.pt"], "copied to another folder they can be averaged"),
        (["inspect", "lost"], "copied to another folder they can be averaged"),
        (["select", "lost", *USE], "copied to another folder they can be averaged"),
        (["average", "run", "-o", "out.pt", "--profile", "ema:half_life=0.2"], "record shorter blocks"),
        (["select", "ckpts", *USE, "--mode", "least"], "'least' is not one of 'min', 'max'"),
        (["demo", "--task", "chess"], "'chess' is not one of 'digits', 'text'"),
    ],
)
def test_what_a_command_refuses_is_said_in_its_own_words(folder, capsys, arguments, message):
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert message in said and not PYTHON.search(said), PYTHON.search(said)


def test_the_blocks_of_a_lost_run_can_be_averaged_where_the_message_says(folder, capsys):
    (folder / "copies").mkdir()
    for block in (folder / "lost").glob("block-*"):
        (folder / "copies" / block.name).write_bytes(block.read_bytes())
    assert main(["average", "copies", "-o", "out.pt"]) == 0
    assert torch.load("out.pt")["weight"].tolist() == [[10, 10]]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: polyak.average_checkpoints("ckpts", "there.pt"),
            OutputExistsError,
            "or pass overwrite=True$",
        ),
        (
            lambda: polyak.average_checkpoints("ckpts", "out.pt", weights=[1, 1], profile="uniform"),
            OptionError,
            "weights or profile$",
        ),
        (lambda: polyak.Trajectory("lost"), CheckpointError, r"Trajectory\.from_checkpoints\(.* reads them"),
        (lambda: polyak.Trajectory("broken").average("uniform"), CheckpointError, r"trajectory\.usable"),
    ],
)
def test_who_calls_from_python_reads_python(folder, call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("arguments", "path"),
    [
        (["average", "ckpts"], "out.pt"),
        (["average", "run"], "out.pt"),
        (["select", "ckpts", *USE, "--profiles", "uniform"], "out.pt"),
        (["report", "ckpts"], "out.html"),
    ],
)
def test_what_was_written_is_said_in_one_word(folder, capsys, arguments, path):
    assert main([*arguments, "-o", path]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.partition(":")[0] == f"wrote {path}"
