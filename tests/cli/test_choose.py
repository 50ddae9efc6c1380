"""``polyak select``: what it chooses, prints, writes and refuses."""

from __future__ import annotations

import json
import re
import shlex
import sys
from html import unescape

import pytest
import torch

import polyak
from polyak import checkpoints
from polyak.cli import main

MODULE = """
import torch

def build():
    return torch.nn.Linear(2, 1, bias=False)

def losses(model):
    assert not model.training
    return (model.weight - 10).abs().flatten() + torch.tensor([0.0, 0.5])

def goodness(model):
    return -losses(model).mean().item()

def unseen(model):
    return goodness(model) - 1

def broken(model):
    return losses(model) * float("nan")

def no_model():
    return 7

answer = 42
"""
USE = ["--model", "user_code:build", "--score", "user_code:losses"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Checkpoints that circle around 10, and the user's module, in the working directory."""
    (tmp_path / "ckpts").mkdir()
    for step, value in ((9, 14.0), (10, 8.0), (11, 12.0), (100, 9.0)):
        weights = {"weight": torch.full((1, 2), value)}
        torch.save({"model": weights, "ema": weights}, tmp_path / "ckpts" / f"step{step}.pt")
    (tmp_path / "user_code.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "user_code", raising=False)
    return tmp_path


def chosen(capsys, *arguments):
    assert main(["select", *arguments, *USE, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("inputs", [["ckpts"], ["ckpts/*.pt"], ["ckpts", "--key", "model"]])
def test_the_newest_checkpoint_is_live_and_the_best_average_is_written(folder, capsys, inputs):
    profiles = ["--profiles", "window:10,11 tail:steps=1", "--profiles", "uniform"]
    found = chosen(capsys, *inputs, *profiles, "-o", "best.safetensors")
    scores = {candidate["name"]: candidate["score"] for candidate in found["candidates"]}
    # The mean of 14, 8, 12 and 9 is 10.75; half a loss comes on top for one of the two examples.
    assert scores == pytest.approx({"window:10,11": 2.25, "tail:steps=1": 1.25, "live": 1.25, "uniform": 1.0})
    assert found["best"] == "uniform"
    best = checkpoints.open("best.safetensors")
    assert best.read("weight").tolist() == [[10.75, 10.75]]
    assert best.metadata["polyak.profile"] == "uniform"


def test_a_recorded_run_brings_its_live_weights(folder, capsys):
    model = torch.nn.Linear(2, 1, bias=False)
    with polyak.Recorder(model, "run", block=1) as run:
        for value in (9.0, 11.0, 9.0, 11.0):
            model.weight.data.fill_(value)
            run.update()
    found = chosen(capsys, "run")
    live = next(candidate for candidate in found["candidates"] if candidate["name"] == "live")
    assert live["score"] == pytest.approx(1.25)
    assert found["best"] == "tail:0.5" and found["candidates"][0]["score"] == pytest.approx(0.25)


def test_the_table_and_the_verdict_are_printed(folder, capsys):
    arguments = ["--model", "user_code:build", "--score", "user_code:goodness", "--mode", "max"]
    assert main(["select", "ckpts", *arguments, "--holdout", "user_code:unseen"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    legend, head, *_ = captured.out.splitlines()
    assert legend == "Higher is better; differences are to live"
    assert head.split()[:3] == ["candidate", "≈", "score"]
    assert "scores best" in captured.out and "On the holdout" in captured.out
    assert re.search(r"\d more candidates scored worse", " ".join(captured.out.split()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ckpts", "--model", "user_code:build"], "--score"),
        (["ckpts", "--model", "user_code", "--score", "user_code:losses"], "package.module:function"),
        (["ckpts", "--model", "user_code.py:build", "--score", "user_code:losses"], "my.model:build"),
        (["ckpts", "--model", "no_such:build", "--score", "user_code:losses"], "no module 'no_such'"),
        (["ckpts", "--model", "user_code:gone", "--score", "user_code:losses"], "no function 'gone'"),
        (["ckpts", "--model", "user_code:answer", "--score", "user_code:losses"], "no function 'answer'"),
        (["ckpts", "--model", "user_code:no_model", "--score", "user_code:losses"], "torch.nn.Module"),
        (["nothing", *USE], "nothing"),
        (["ckpts/*.bin", *USE], "nothing matches"),
        (["ckpts", *USE, "--profiles", "emma:1"], "emma"),
        (["ckpts", *USE, "--mode", "least"], "least"),
        (["ckpts", *USE, "-o", "best.doc"], "suffix of no known format"),
        (["ckpts", *USE, "-o", "user_code.py"], "user_code.py"),
        (["ckpts", *USE, "--holdout", "user_code:losses"], "the very losses that score gives"),
        (
            [
                "ckpts",
                *USE[:3],
                "user_code:broken",
                "-o",
                "best.safetensors",
                "--profiles",
                "uniform, tail:0.5",
            ],
            "no candidate has a finite score",
        ),
    ],
)
def test_bad_input_is_one_line(folder, capsys, arguments, message):
    before = sorted(folder.rglob("*.safetensors"))
    assert main(["select", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert message in captured.err
    assert sorted(folder.rglob("*.safetensors")) == before


def test_a_number_without_a_mode_is_refused_in_words_of_the_command(folder, capsys):
    assert main(["select", "ckpts", "--model", "user_code:build", "--score", "user_code:goodness"]) == 2
    assert "give --mode min if lower is better, or --mode max if higher is" in capsys.readouterr().err


def test_candidates_are_prepared_by_a_function_of_the_user(folder, capsys):
    (folder / "user_code.py").write_text(
        MODULE + "\ndef rounded(model):\n    model.weight.div_(4).round_().mul_(4)\n"
    )
    found = chosen(capsys, "ckpts", "--prepare", "user_code:rounded", "--profiles", "uniform")
    scores = {candidate["name"]: candidate["score"] for candidate in found["candidates"]}
    assert scores == pytest.approx({"live": 2.25, "uniform": 2.25})  # 9 becomes 8, and 10.75 becomes 12


def test_an_output_that_is_there_is_kept_unless_forced(folder, capsys):
    (folder / "best.pt").write_text("precious")
    assert main(["select", "ckpts", *USE, "-o", "best.pt"]) == 2
    assert "best.pt exists" in capsys.readouterr().err
    assert (folder / "best.pt").read_text() == "precious"
    assert main(["select", "ckpts", *USE, "-o", "best.pt", "--force"]) == 0
    assert checkpoints.open(folder / "best.pt").read("weight").shape == (1, 2)


def test_an_error_in_the_users_own_code_keeps_its_traceback(folder):
    (folder / "user_code.py").write_text("raise ZeroDivisionError('yours')")
    with pytest.raises(ZeroDivisionError, match="yours"):
        main(["select", "ckpts", *USE])


def test_an_error_in_the_users_own_function_shows_its_frames_and_what_was_called(folder, capsys):
    with (folder / "user_code.py").open("a") as file:
        file.write("\ndef broken(model):\n    return model.wait\n")
    assert main(["select", "ckpts", "--model", "user_code:build", "--score", "user_code:broken"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert any("user_code.py" in line for line in lines) and len(lines) < 20
    assert lines[-1].startswith("polyak: error: --score user_code:broken raised AttributeError")


def test_a_profile_among_the_paths_is_told_from_a_path(folder, capsys):
    assert main(["select", "ckpts", *USE, "--profiles", "tail:0.5", "tail:0.2"]) == 2
    assert "tail:0.2 is a profile, not a path: write --profiles tail:0.2" in capsys.readouterr().err


def test_the_files_of_a_recording_are_no_checkpoints(folder, capsys):
    model = torch.nn.Linear(2, 1, bias=False)
    with polyak.Recorder(model, "run", block=1) as run:
        for value in (9.0, 11.0):
            model.weight.data.fill_(value)
            run.update()
    assert main(["select", "run/*.safetensors", *USE]) == 2
    assert "a part of a recorded run: give run alone" in capsys.readouterr().err


# ``polyak report``: the page it writes, with and without scores, and what it refuses.

MODULE_REPORT = """
import torch

def build():
    return torch.nn.Linear(2, 1, bias=False)

def losses(model):
    return (model.weight - 10).abs().flatten() + torch.tensor([0.0, 0.5])
"""
SCORE = ["--model", "user_code:build", "--score", "user_code:losses"]


@pytest.fixture
def folder_report(tmp_path, monkeypatch):
    (tmp_path / "ckpts").mkdir()
    for step, value in ((9, 14.0), (10, 8.0), (11, 12.0), (12, 9.0)):
        torch.save({"model": {"weight": torch.full((1, 2), value)}}, tmp_path / "ckpts" / f"step{step}.pt")
    (tmp_path / "user_code.py").write_text(MODULE_REPORT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "user_code", raising=False)
    return tmp_path


def test_a_page_without_scores(folder_report, capsys):
    assert main(["report", "ckpts", "-o", "page.html"]) == 0
    assert capsys.readouterr().out == "wrote page.html\n"
    page = (folder_report / "page.html").read_text()
    assert "<h1>Nothing was scored yet</h1>" in page and '<p class="run">ckpts</p>' in page


def test_a_page_and_what_it_says_as_json(folder_report, capsys):
    assert main(["report", "ckpts", "-o", "page.html", *SCORE, "--profiles", "uniform", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["output"] == "page.html" and "uniform scores best" in said["verdict"]


def test_a_page_with_a_choice_and_the_line_to_it(folder_report, capsys):
    assert (
        main(["report", "ckpts/*.pt", "-o", "page.html", *SCORE, "--title", "mine", "--profiles", "uniform"])
        == 0
    )
    printed = capsys.readouterr().out
    assert "uniform scores best" in printed and printed.endswith("wrote page.html\n")
    page = (folder_report / "page.html").read_text()
    # From 9 to the mean of all, 10.75, the best is 10: at 4/7 of the way; 1/2 and 5/8 are looked at.
    assert '<p class="run">mine</p>' in page and "lies at 0.625 of the way to uniform" in page
    command = "polyak select 'ckpts/*.pt' --model user_code:build --score user_code:losses --profiles uniform"
    assert f"{command} --output averaged.safetensors" in unescape(page)


def test_the_page_is_about_what_is_prepared(folder_report):
    with (folder_report / "user_code.py").open("a") as code:
        code.write("\ndef rounded(model):\n    model.weight.data.div_(2).round_().mul_(2)\n")
    prepared = ["--prepare", "user_code:rounded"]
    assert main(["report", "ckpts", "-o", "page.html", *SCORE, "--profiles", "uniform", *prepared]) == 0
    page = unescape((folder_report / "page.html").read_text())
    # 9 is scored as 8, and the mean of all, 10.75, as 10; along the line too.
    assert "each as prepare made it" in page and "The best score on the line, 0.25," in page
    assert "--prepare user_code:rounded --profiles uniform" in page


def test_the_line_on_the_page_writes_the_average_it_shows(folder_report):
    score = ["--model", "user_code:build", "--score", "user_code:shifted", "--profiles", "uniform tail:0.5"]
    with (folder_report / "user_code.py").open("a") as code:
        code.write(
            "\ndef shifted(model):\n    return losses(model) + (model.weight - 10.75).abs().flatten() * 9\n"
        )
    assert main(["report", "ckpts", "-o", "page.html", *score]) == 0
    (pasted,) = re.findall("<pre>(.*?)</pre>", (folder_report / "page.html").read_text(), re.DOTALL)
    assert main(shlex.split(unescape(pasted))[1:]) == 0
    assert checkpoints.open(folder_report / "averaged.safetensors").read("weight").tolist() == [
        [10.75, 10.75]
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "page.txt"], "must end in .html"),
        (["-o", "page.html", "--model", "user_code:build"], "belong together"),
        (["-o", "page.html", "--holdout", "user_code:losses"], "are about scores"),
        (["-o", "page.html", "--mode", "max"], "are about scores"),
        (["-o", "page.html", "--prepare", "user_code:losses"], "are about scores"),
        (["-o", "no/page.html"], "no folder no"),
        (["-o", "user_code.html"], "--force"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(folder_report, capsys, arguments, message):
    (folder_report / "user_code.html").write_text("mine")
    assert main(["report", "ckpts", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("polyak: error: ") and message in line
    assert (
        not (folder_report / "page.html").exists()
        and (folder_report / "user_code.html").read_text() == "mine"
    )


def test_a_page_is_replaced_only_by_force(folder_report):
    (folder_report / "page.html").write_text("what was there")
    assert main(["report", "ckpts", "-o", "page.html", "--force"]) == 0
    assert "what was there" not in (folder_report / "page.html").read_text()


def test_the_line_is_scored_as_the_candidates_are(folder_report, capsys):
    """Accuracies, BatchNorm, and live weights that no average beats."""
    code = (
        MODULE_REPORT
        + """
def gain(model):
    return -(model[0].weight - 9).abs().mean().item()

def build_normed():
    return torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False), torch.nn.BatchNorm1d(1))

def batches():
    return [torch.randn(8, 2)]
"""
    )
    (folder_report / "normed.py").write_text(code)
    (folder_report / "states").mkdir()
    for step, value in enumerate((14.0, 8.0, 12.0, 9.0)):
        model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False), torch.nn.BatchNorm1d(1))
        model[0].weight.data.fill_(value)
        torch.save(model.state_dict(), folder_report / "states" / f"step{step}.pt")
    score = [
        "--model",
        "normed:build_normed",
        "--score",
        "normed:gain",
        "--mode",
        "max",
        "--profiles",
        "uniform",
    ]
    assert main(["report", "states", "-o", "page.html", *score, "--recalibrate", "normed:batches"]) == 0
    assert "Keep the live weights" in capsys.readouterr().out
    page = (folder_report / "page.html").read_text()
    assert "lies at live" in page and "recomputed everywhere" in page
