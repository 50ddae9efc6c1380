"""``polyak average`` on what a recorder wrote."""

from __future__ import annotations

import json

import pytest
import torch

import polyak
from polyak import checkpoints
from polyak.cli import main
from recorded_runs import RecordedWalk


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    walk = RecordedWalk(tmp_path / "recording", block=10)
    walk.run(40)
    walk.recorder.close()
    return polyak.Trajectory("recording")


@pytest.mark.parametrize(("options", "profile"), [([], "uniform"), (["--profile", "tail:0.5"], "tail:0.5")])
def test_it_is_the_average_of_the_trajectory(run, capsys, options, profile):
    assert main(["average", "recording", "-o", "out.safetensors", *options]) == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"{profile}: exact") and said.out.endswith("wrote out.safetensors\n")
    assert "warning: '1.running_mean'" in said.out and "polyak.update_bn" in said.out
    assert said.err == ""
    written = checkpoints.open("out.safetensors")
    for name, tensor in run.average(profile).items():
        assert torch.equal(written.read(name), tensor)
    assert main(["average", "recording", "-o", "out.safetensors", *options]) == 2, "it is there already"
    assert main(["average", "recording", "-o", "out.safetensors", "--force", *options]) == 0


def test_a_dry_run_writes_nothing(run, capsys, tmp_path):
    assert main(["average", "recording", "-o", "out.pt", "--profile", "tail:0.5", "--dry-run", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["coefficients"] == [0, 0, 0.5, 0.5] and said["dry_run"] and not said["warnings"]
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "1,2"], "takes no --weights"),
        (["--dtype", "bf16", "--hash"], "takes no --dtype, --hash"),
        (["--profile", "tail:7"], "fraction"),
        (["recording"], "take averages of it alone"),
    ],
)
def test_what_does_not_fit_is_one_line(run, capsys, arguments, message):
    assert main(["average", "recording", "-o", "out.pt", *arguments]) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and said.out == ""
