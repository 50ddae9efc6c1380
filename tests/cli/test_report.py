"""``polyak report``: the page it writes, with and without scores, and what it refuses."""

import sys

import pytest
import torch

from polyak.cli import main

MODULE = """
import torch

def build():
    return torch.nn.Linear(2, 1, bias=False)

def losses(model):
    return (model.weight - 10).abs().flatten() + torch.tensor([0.0, 0.5])
"""
SCORE = ["--model", "user_code:build", "--score", "user_code:losses"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "ckpts").mkdir()
    for step, value in ((9, 14.0), (10, 8.0), (11, 12.0), (12, 9.0)):
        torch.save({"model": {"weight": torch.full((1, 2), value)}}, tmp_path / "ckpts" / f"step{step}.pt")
    (tmp_path / "user_code.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "user_code", raising=False)
    return tmp_path


def test_a_page_without_scores(folder, capsys):
    assert main(["report", "ckpts", "-o", "page.html"]) == 0
    assert capsys.readouterr().out == "Written: page.html\n"
    page = (folder / "page.html").read_text()
    assert "Nothing was scored" in page and "<h1>ckpts</h1>" in page


def test_a_page_with_a_choice_and_the_line_to_it(folder, capsys):
    assert (
        main(["report", "ckpts/*.pt", "-o", "page.html", *SCORE, "--title", "mine", "--profiles", "uniform"])
        == 0
    )
    printed = capsys.readouterr().out
    assert "uniform scores best" in printed and printed.endswith("Written: page.html\n")
    page = (folder / "page.html").read_text()
    # From 9 to the mean of all, 10.75, the best is 10: at 4/7 of the way; 1/2 and 5/8 are looked at.
    assert "<h1>mine</h1>" in page and "From live to uniform" in page and "lies at 0.625 of the way" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "page.txt"], "must end in .html"),
        (["-o", "page.html", "--model", "user_code:build"], "belong together"),
        (["-o", "page.html", "--holdout", "user_code:losses"], "are about scores"),
        (["-o", "page.html", "--mode", "max"], "are about scores"),
        (["-o", "no/page.html"], "no folder"),
        (["-o", "user_code.html"], "--force"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(folder, capsys, arguments, message):
    (folder / "user_code.html").write_text("mine")
    assert main(["report", "ckpts", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("polyak: error: ") and message in line
    assert not (folder / "page.html").exists() and (folder / "user_code.html").read_text() == "mine"


def test_a_page_is_replaced_only_by_force(folder):
    (folder / "page.html").write_text("what was there")
    assert main(["report", "ckpts", "-o", "page.html", "--force"]) == 0
    assert "what was there" not in (folder / "page.html").read_text()


def test_the_line_is_scored_as_the_candidates_are(folder, capsys):
    """Accuracies, BatchNorm, and live weights that no average beats."""
    code = (
        MODULE
        + """
def gain(model):
    return -(model[0].weight - 9).abs().mean().item()

def build_normed():
    return torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False), torch.nn.BatchNorm1d(1))

def batches():
    return [torch.randn(8, 2)]
"""
    )
    (folder / "normed.py").write_text(code)
    (folder / "states").mkdir()
    for step, value in enumerate((14.0, 8.0, 12.0, 9.0)):
        model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False), torch.nn.BatchNorm1d(1))
        model[0].weight.data.fill_(value)
        torch.save(model.state_dict(), folder / "states" / f"step{step}.pt")
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
    page = (folder / "page.html").read_text()
    assert "lies at live" in page and "recomputed everywhere" in page
