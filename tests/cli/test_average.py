"""``polyak average``: what it does, prints and refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import polyak
from polyak import checkpoints
from polyak.cli import main
from recorded_runs import RecordedWalk


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Three checkpoints in a folder, which is where the command runs."""
    (tmp_path / "ckpts").mkdir()
    for step in (10, 9, 11):
        model = {"w": torch.full((4,), float(step)), "n": torch.tensor(step)}
        torch.save({"model": model, "lr": 0.1}, tmp_path / "ckpts" / f"step{step}.pt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def weight(path):
    return checkpoints.open(path).read("w")[0].item()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["ckpts"], 10),
        (["ckpts/*.pt"], 10),
        (["ckpts/step1?.pt", "ckpts/step9.pt", "ckpts/step9.pt"], 10.0),  # named twice, it counts once
        (["ckpts", "--profile", "tail:steps=1"], 11),
        (["ckpts", "--profile", "blend:0.5:tail:steps=2"], 10.75),
        (["ckpts", "--weights", "0,0,1"], 11),
        (["ckpts/step11.pt", "ckpts/step9.pt", "--weights", "3,1"], 10.5),
        (["ckpts", "--key", "model", "--max-memory", "1GB", "--dtype", "bf16", "--hash"], 10),
    ],
)
@pytest.mark.parametrize("output", ["out.pt", "out.safetensors", "out"])
def test_averages(run, capsys, arguments, expected, output):
    assert main(["average", *arguments, "-o", output]) == 0
    assert weight(output) == expected
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    differ = [] if expected == 11 else ["of these the inputs differ in 'n'"]  # 11: only the last one counts
    tensors = [
        "1 tensor averaged",
        "1 copied from the last input: 'n'",
        *differ,
        "ignored: 'lr'",
    ]
    assert lines[-1 - len(tensors) : -1] == tensors
    assert lines[-1].startswith(f"wrote {output}: ") and lines[-1].endswith("/s)")


def test_dry_run_reads_headers_only(run, capsys):
    names = sorted(path.name for path in run.rglob("*"))
    assert main(["average", "ckpts", "-o", "out.pt", "--profile", "tail:0.5", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert sorted(path.name for path in run.rglob("*")) == names
    rows = [line.split() for line in out.splitlines() if line.startswith("step")]
    assert rows == [
        ["step9.pt", "9", "0", "model"],
        ["step10.pt", "10", "0.333333", "model"],
        ["step11.pt", "11", "0.666667", "model"],
    ]
    assert out.count("weights found under 'model'") == 1 and "ignored: 'lr'" in out
    assert out.splitlines()[-1].startswith(
        "would write out.pt: 48 bytes to read and 24 bytes to write in at most "
    )


def test_json(run, capsys):
    assert main(["average", "ckpts", "-o", "out.pt", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["inputs"] == ["step9.pt", "step10.pt", "step11.pt"] and report["steps"] == [9, 10, 11]
    assert report["coefficients"] == pytest.approx([1 / 3] * 3)
    assert (report["averaged"], report["copied"], report["differing"]) == (["w"], ["n"], ["n"])
    assert report["dry_run"] is False and report["bytes_read"] == 72


def write_bad(name):
    path = f"ckpts/{name}.pt"
    model = {"w": torch.ones(4), "n": torch.tensor(1)}
    if name == "nan":
        model["w"][2] = torch.nan
    elif name == "reshaped":
        model["w"] = torch.ones(5)
    elif name == "missing":
        del model["n"]
    torch.save(model, path)
    if name == "truncated":
        os.truncate(path, 500)
    elif name == "empty":
        os.truncate(path, 0)
    return path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nan", "ckpts/nan.pt: tensor 'w' holds NaN"),
        ("reshaped", "'w' as (5,) torch.float32, not (4,) torch.float32"),
        ("missing", "ckpts/missing.pt lacks 'n'"),
        ("truncated", "ckpts/truncated.pt"),
        ("empty", "ckpts/empty.pt is empty"),
    ],
)
def test_bad_inputs_are_one_line_and_code_2(run, capsys, name, message):
    bad = write_bad(name)
    assert_refused(run, capsys, ["average", "ckpts/step9.pt", bad, "-o", "out.safetensors"], message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing argument"),
        (["ckpts"], "'--output'"),
        (["nowhere.pt", "-o", "out.pt"], "cannot read nowhere.pt"),
        (["ckpts/*.bin", "-o", "out.pt"], "nothing matches the pattern ckpts/*.bin"),
        (["ckpts", "-o", "out.xyz"], "a suffix of no known format"),
        (["ckpts", "-o", "ckpts/step9.pt", "--force"], "name another output"),
        (["ckpts", "-o", "ckpts/step9.pt"], "name another output"),
        (["ckpts", "-o", "out.pt", "--weights", "1,2"], "one weight for each of 3 blocks or inputs, got 2"),
        (["ckpts", "-o", "out.pt", "--weights", "1,x,2"], "--weights takes numbers between commas"),
        (["ckpts", "-o", "out.pt", "--weights", "1,nan,2"], "a weight must be a number"),
        (
            ["ckpts", "-o", "out.pt", "--weights", "1,1,1", "--profile", "uniform"],
            "two ways to say one thing",
        ),
        (["ckpts", "-o", "out.pt", "--profile", "tali:0.4"], "did you mean 'tail'?"),
        (["ckpts", "-o", "out.pt", "--dtype", "int8"], "no floating-point dtype"),
        (["ckpts", "-o", "out.pt", "--max-memory", "1MB"], "allow "),
        (["ckpts", "-o", "out.pt", "--max-memory", "lots"], "as a size in bytes"),
        (["ckpts", "-o", "out.pt", "--key", "ema"], "choose from 'model'"),
        (["ckpts", "-o", "no/where/out.pt"], "there is no folder no/where"),
    ],
)
def test_wrong_use_is_one_line_and_code_2(run, capsys, arguments, message):
    assert_refused(run, capsys, ["average", *arguments], message)


def assert_refused(folder, capsys, arguments, message):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("polyak: error: ") and message in captured.err
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_nothing_is_overwritten_unasked(run, capsys):
    (run / "out.pt").write_bytes(b"mine")
    assert_refused(run, capsys, ["average", "ckpts", "-o", "out.pt"], "out.pt exists already")
    assert main(["average", "ckpts", "-o", "out.pt", "--force"]) == 0
    assert weight("out.pt") == 10


def test_names_in_files_cannot_move_the_terminal(run, capsys):
    name = "evil\x1b[2J"
    checkpoints.write("evil.safetensors", {name: torch.tensor(1), "w": torch.ones(1)})
    assert main(["average", "evil.safetensors", "-o", "out.safetensors"]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_names_of_files_cannot_move_the_terminal(run, capsys):
    name = "a\x1b[2J\u202e[bold].safetensors"
    checkpoints.write(name, {"w": torch.ones(1)})
    os.rename(name, name + ".bin")
    (run / name).write_bytes(b"no checkpoint")
    for command in (["average", name], ["average", "ckpts", "--force", name + ".bin"]):
        main([*command, "-o", "out" + name])
    assert main(["average", "ckpts", "-o", "out" + name, "--force"]) == 0
    said = "".join(capsys.readouterr())
    assert said.count("a\\x1b[2J\\u202e[bold].safetensors") >= 3
    assert all(letter.isprintable() for letter in said.replace("\n", ""))


def test_sigterm_leaves_nothing_behind(run):
    for step in range(2):
        checkpoints.write(run / f"{step}.safetensors", {"w": torch.ones(30_000_000)})
    process = subprocess.Popen(
        [sys.executable, "-m", "polyak", "average", "[01].safetensors", "-o", "out.safetensors"]
    )
    while process.poll() is None and not list(run.glob(".polyak-*")):
        time.sleep(1e-3)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 130
    assert not list(run.glob(".polyak-*")) and not (run / "out.safetensors").exists()


def test_help_teaches_by_example_and_waits_for_no_torch():
    code = (
        "import sys; from polyak.cli import main; assert main(['average', '--help']) == 0;"
        "assert not {'torch', 'numpy', 'rich.progress'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "polyak average 'run/step-*.pt' -o average.pt --profile tail:0.4" in result.stdout


def test_a_profile_among_the_paths_is_told_from_a_path(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"w": torch.ones(2)}, "a.pt")
    assert main(["average", "a.pt", "tail:0.4", "-o", "out.pt"]) == 2
    assert "tail:0.4 is a profile, not a path: write --profile tail:0.4" in capsys.readouterr().err


# ``polyak average`` on what a recorder wrote.


@pytest.fixture
def run_recording(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    walk = RecordedWalk(tmp_path / "recording", block=10)
    walk.run(40)
    walk.recorder.close()
    return polyak.Trajectory("recording")


@pytest.mark.parametrize(
    ("options", "profile"),
    [
        ([], "uniform"),
        (["--profile", "tail:0.5"], "tail:0.5"),
        (["--profile", "blend:0.25:tail:0.5"], "blend:0.25:tail:0.5"),
    ],
)
def test_it_is_the_average_of_the_trajectory(run_recording, capsys, options, profile):
    assert main(["average", "recording", "-o", "out.safetensors", *options]) == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"{profile}: exact") and said.out.endswith("wrote out.safetensors\n")
    assert "warning: '1.running_mean'" in said.out and "polyak.update_bn" in said.out
    assert said.err == ""
    written = checkpoints.open("out.safetensors")
    for name, tensor in run_recording.average(profile).items():
        assert torch.equal(written.read(name), tensor)
    assert main(["average", "recording", "-o", "out.safetensors", *options]) == 2, "it is there already"
    assert main(["average", "recording", "-o", "out.safetensors", "--force", *options]) == 0


def test_a_dry_run_writes_nothing(run_recording, capsys, tmp_path):
    assert main(["average", "recording", "-o", "out.pt", "--profile", "tail:0.5", "--dry-run", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["coefficients"] == [0, 0, 0.5, 0.5] and said["live"] == 0
    assert said["dry_run"] and not said["warnings"]
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "1,2"], "takes no --weights"),
        (["--dtype", "bf16", "--hash"], "takes no --dtype, --hash"),
        (["--profile", "tail:7"], "fraction"),
        (["--profile", "blend:7:uniform"], "part must be a number in [0, 1], got 7.0"),
        (["recording"], "take averages of it alone"),
    ],
)
def test_what_does_not_fit_is_one_line(run_recording, capsys, arguments, message):
    assert main(["average", "recording", "-o", "out.pt", *arguments]) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and said.out == ""


def test_a_blend_of_a_run_that_was_not_closed_says_what_to_do(tmp_path, capsys):
    walk = RecordedWalk(tmp_path / "recording", block=10)
    walk.run(20)
    walk.recorder._writer.wait()
    arguments = ["average", str(tmp_path / "recording"), "-o", str(tmp_path / "out.pt")]
    assert main([*arguments, "--profile", "blend:0.5:uniform"]) == 2
    said = capsys.readouterr()
    assert "when it is closed" in said.err and "or take uniform" in said.err and said.err.count("\n") == 1
    walk.recorder.close()


USER_CODE = """
import torch

def build():
    return torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.BatchNorm1d(2))

def batches():
    return [torch.tensor([[1.0, 0.0], [3.0, 4.0]]), torch.tensor([[8.0, 2.0]])]

def plain():
    return torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Identity())

def broken():
    raise RuntimeError("no data")

def broken_later():
    yield torch.zeros(2, 2)
    raise RuntimeError("no more data")

def number():
    return 7
"""


@pytest.fixture
def batchnorm(tmp_path, monkeypatch):
    """Checkpoints of a model with BatchNorm, whose weights average to twos, and the user's module."""
    for step, value in ((1, 1.0), (2, 3.0)):
        model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.BatchNorm1d(2))
        model[0].weight.data.fill_(value)
        model[1].running_mean.fill_(100 * value)
        torch.save({"model": model.state_dict(), "arch": "mlp"}, tmp_path / f"step{step}.pt")
    (tmp_path / "bn_code.py").write_text(USER_CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "bn_code", raising=False)
    return tmp_path


RECALIBRATE = ["--model", "bn_code:build", "--recalibrate", "bn_code:batches"]


@pytest.mark.parametrize(("output", "more"), [("out.safetensors", []), ("out.pt", ["--like", "step1.pt"])])
def test_batchnorm_statistics_of_the_average_are_written_with_it(batchnorm, capsys, output, more):
    assert main(["average", "step1.pt", "step2.pt", "-o", output, *RECALIBRATE, *more, "--json"]) == 0
    (note,) = [note for note in json.loads(capsys.readouterr().out)["notes"] if "BatchNorm" in note]
    assert note.endswith("computed anew for the averaged weights")
    inputs = torch.tensor([[1.0, 0.0], [3.0, 4.0], [8.0, 2.0]], dtype=torch.float64)
    seen = inputs @ torch.full((2, 2), 2.0, dtype=torch.float64)
    with checkpoints.open(output) as average:
        assert torch.all(average.read("0.weight") == 2)
        torch.testing.assert_close(average.read("1.running_mean").double(), seen.mean(0))
        torch.testing.assert_close(average.read("1.running_var").double(), seen.var(0, correction=0))
        assert average.read("1.num_batches_tracked") == 2
        assert json.loads(average.metadata["polyak"])["coefficients"] == [0.5, 0.5]


def test_without_it_the_note_says_the_command_line(batchnorm, capsys):
    assert main(["average", "step1.pt", "step2.pt", "-o", "out.pt"]) == 0
    assert "--model module:factory --recalibrate module:batches" in capsys.readouterr().out
    assert main(["average", "step1.pt", "step2.pt", "-o", "dry.pt", *RECALIBRATE, "--dry-run"]) == 0
    assert "computed anew" in capsys.readouterr().out and not os.path.exists("dry.pt")


@pytest.mark.parametrize(
    ("model", "batches", "message"),
    [
        ("bn_code:build", None, "--model and --recalibrate belong together"),
        (None, "bn_code:batches", "--model and --recalibrate belong together"),
        ("bn_code:build", "bn_code:broken", "--recalibrate bn_code:broken raised RuntimeError: no data"),
        ("bn_code:build", "bn_code:number", "must return batches, such as a DataLoader, it returned a int"),
        ("bn_code:number", "bn_code:batches", "must return a torch.nn.Module, it returned a int"),
        ("bn_code:plain", "bn_code:batches", "'1.weight'"),
        ("torch.nn:Identity", "bn_code:batches", "'0.weight'"),
    ],
)
def test_recalibration_that_cannot_be_done_writes_nothing(batchnorm, capsys, model, batches, message):
    options = [*(["--model", model] if model else []), *(["--recalibrate", batches] if batches else [])]
    before = sorted(os.listdir())
    assert main(["average", "step1.pt", "step2.pt", "-o", "out.pt", *options]) != 0
    assert message in " ".join(capsys.readouterr().err.split())
    assert sorted({*os.listdir()} - {"__pycache__"}) == before


def test_a_model_without_batchnorm_is_refused(batchnorm, capsys):
    torch.save({"0.weight": torch.ones(2, 2)}, "plain.pt")
    options = ["--model", "bn_code:plain", "--recalibrate", "bn_code:batches"]
    assert main(["average", "plain.pt", "-o", "out.pt", *options]) != 0
    assert "no BatchNorm statistics that the checkpoints hold" in " ".join(capsys.readouterr().err.split())
    assert not os.path.exists("out.pt")


def test_batches_that_break_off_leave_nothing_behind(batchnorm):
    before = sorted(os.listdir())
    options = ["--model", "bn_code:build", "--recalibrate", "bn_code:broken_later"]
    with pytest.raises(RuntimeError, match="no more data"):
        main(["average", "step1.pt", "step2.pt", "-o", "out.pt", *options])
    assert sorted({*os.listdir()} - {"__pycache__"}) == before
