"""One average shared out over ranks: the bits of one process, or nothing at all."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import polyak
from combine_inputs import random, saved
from polyak.combine._offline import Plan, run_on_ranks
from polyak.errors import PolyakError
from ranks import run_on_ranks as on_ranks


def make_inputs(folder):
    models = [
        {
            "first": random(torch.float32, seed, (300_007,)),
            "half": random(torch.bfloat16, seed, (300, 301)),
            "n": torch.tensor([seed] * 5),
            "last": random(torch.float32, seed, (70_001,)),
        }
        for seed in range(3)
    ]
    for model in models:
        model["tied"] = model["half"]
    saved(folder, models, ".safetensors")


def average(folder, output):
    try:
        return run_on_ranks(Plan(folder, output)).to_dict()
    except PolyakError as error:
        return str(error)


def hold_the_line(folder, output):
    """Rank 1 dies in the middle of its share."""
    plan = Plan(folder, output)

    def die(done, total):
        if torch.distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        run_on_ranks(plan, die)
    except PolyakError as error:
        Path(folder, "message").write_text(str(error))


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_bits_of_one_process(tmp_path, ranks):
    run = tmp_path / "run"
    run.mkdir()
    make_inputs(run)
    reports = on_ranks(average, run, tmp_path / "shared.safetensors", ranks=ranks)
    with pytest.warns(UserWarning, match="'n'"):
        alone = polyak.average_checkpoints(run, tmp_path / "alone.safetensors")
    assert (tmp_path / "alone.safetensors").read_bytes() == (tmp_path / "shared.safetensors").read_bytes()
    notes = tuple(note.replace("alone.", "shared.") for note in alone.notes)
    expected = alone.to_dict() | {"output": str(tmp_path / "shared.safetensors"), "notes": notes}
    assert reports == [expected] * ranks


@pytest.mark.parametrize("place", ["first", "last"])
def test_if_one_rank_fails_all_do_and_nothing_is_left(tmp_path, place):
    make_inputs(tmp_path)
    opened = polyak.checkpoints.open(tmp_path / "step2.safetensors")
    model = {name: opened.read(name) for name in opened.tensors}
    model[place][-1] = torch.nan
    polyak.checkpoints.write(tmp_path / "step2.safetensors", model, overwrite=True)
    messages = on_ranks(average, tmp_path, tmp_path / "average.safetensors")
    assert all(f"tensor {place!r} holds NaN" in message for message in messages)
    assert sum("given up on every rank" in message for message in messages) == 1
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["step1", "step2", "step3"]


def test_formats_that_one_process_writes_are_refused(tmp_path):
    make_inputs(tmp_path)
    messages = on_ranks(average, tmp_path, tmp_path / "average.pt")
    assert all("write .safetensors" in message for message in messages)
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["step1", "step2", "step3"]


def test_a_folder_of_shards_can_be_shared_too(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    make_inputs(run)
    on_ranks(average, run, tmp_path / "shared")
    with pytest.warns(UserWarning, match="'n'"):
        polyak.average_checkpoints(run, tmp_path / "alone")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("shared", "alone")]
    assert files[0] == files[1]


def test_a_rank_that_dies_leaves_nothing_behind(tmp_path):
    make_inputs(tmp_path)
    with pytest.raises(AssertionError, match="rank 1 failed"):
        on_ranks(hold_the_line, tmp_path, tmp_path / "average.safetensors")
    assert "another rank was lost" in (tmp_path / "message").read_text()
    assert not list(tmp_path.glob(".polyak-*")) and not (tmp_path / "average.safetensors").exists()


def torchrun(folder, *arguments):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [sys.executable, *launcher, "-m", "polyak", "average", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_torchrun(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    make_inputs(run)
    result = torchrun(tmp_path, "run", "-o", "shared.safetensors")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("3 tensors averaged") == 1
    with pytest.warns(UserWarning, match="'n'"):
        polyak.average_checkpoints(run, tmp_path / "alone.safetensors")
    assert (tmp_path / "shared.safetensors").read_bytes() == (tmp_path / "alone.safetensors").read_bytes()


@pytest.mark.slow
def test_torchrun_with_bad_input(tmp_path):
    make_inputs(tmp_path)
    os.truncate(tmp_path / "step3.safetensors", 1_000_000)
    result = torchrun(tmp_path, ".", "-o", "average.safetensors")
    assert result.returncode != 0
    assert "polyak: error: step3.safetensors is truncated" in result.stderr
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["step1", "step2", "step3"]
