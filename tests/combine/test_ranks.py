"""Checkpoints that are one file for each rank, in the layouts of the tools that leave such: averaged rank by rank."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import polyak
from combine_inputs import random, same_bits
from polyak import checkpoints
from polyak.cli import main
from polyak.combine import Plan
from polyak.combine._ranks import _place
from polyak.combine._reading import read_inputs
from polyak.errors import CheckpointError, NonFiniteError, OptionError, OutputExistsError, StructureError

pytestmark = [
    pytest.mark.filterwarnings("ignore:integer and bool tensors were copied from the last"),
    pytest.mark.filterwarnings("ignore:left out"),
]

STEPS = (100, 200, 400)
RANKS = (0, 1, 2)


def put(tree: object, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(tree, path)


def part(step: int, rank: int) -> dict[str, Tensor]:
    """A rank's part of a model at a step: its own slice in two dtypes, a tensor that all have, and a counter."""
    seed = 10 * step + rank
    return {
        "wq.weight": random(torch.float32, seed, (3, 5)),
        "wo.weight": random(torch.bfloat16, seed, (5, 2)),
        "norm.weight": random(torch.float32, step, (5,)),
        "count": torch.tensor(step),
    }


# Who writes which files, and what is around the weights.


@dataclass(frozen=True)
class Layout:
    """A tool's layout.

    Attributes:
        file: the path of a rank's file at a step.
        tree: what is in it.
        written: the path of the average's file in a folder called ``average``.
        checkpoint: how a checkpoint is called.
    """

    file: Callable[[int, int], str]
    tree: Callable[[int, int, Mapping[str, Tensor]], object]
    written: Callable[[int], str]
    checkpoint: str


def lightning(step: int, rank: int, weights: Mapping[str, Tensor]) -> object:
    return {"state_dict": dict(weights), "global_step": step, "epoch": 1, "optimizer_states": []}


def megatron(step: int, rank: int, weights: Mapping[str, Tensor]) -> object:
    args = argparse.Namespace(tensor_model_parallel_size=len(RANKS))
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}}
    return {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": step,
        "model": weights,
        "optimizer": optimizer,
    }


def deepspeed(step: int, rank: int, weights: Mapping[str, Tensor]) -> object:
    return {"module": weights, "global_steps": step, "mp_world_size": len(RANKS), "optimizer": None}


def fairseq(step: int, rank: int, weights: Mapping[str, Tensor]) -> object:
    return {"model": weights, "extra_state": {"train_iterator": {"epoch": step}}, "last_optimizer_state": {}}


LAYOUTS = {
    "Llama": Layout(
        lambda step, rank: f"step-{step}/consolidated.{rank:02d}.pth",
        lambda step, rank, weights: weights,
        lambda rank: f"consolidated.{rank:02d}.pth",
        "step-{}",
    ),
    "DeepSpeed": Layout(
        lambda step, rank: f"global_step{step}/mp_rank_{rank:02d}_model_states.pt",
        deepspeed,
        lambda rank: f"mp_rank_{rank:02d}_model_states.pt",
        "global_step{}",
    ),
    "DeepSpeed's pipeline": Layout(
        lambda step, rank: f"global_step{step}/layer_{2 * rank:02d}-model_00-model_states.pt",
        lambda step, rank, weights: weights,
        lambda rank: f"layer_{2 * rank:02d}-model_00-model_states.pt",
        "global_step{}",
    ),
    "Megatron": Layout(
        lambda step, rank: f"iter_{step:07d}/mp_rank_{rank:02d}/model_optim_rng.pt",
        megatron,
        lambda rank: f"mp_rank_{rank:02d}/model_optim_rng.pt",
        "iter_{:07d}",
    ),
    "Megatron's pipeline": Layout(
        lambda step, rank: f"iter_{step:07d}/mp_rank_00_{rank:03d}/model_optim_rng.pt",
        megatron,
        lambda rank: f"mp_rank_00_{rank:03d}/model_optim_rng.pt",
        "iter_{:07d}",
    ),
    "NeMo": Layout(
        lambda step, rank: f"mp_rank_{rank:02d}/gpt--val_loss=2.10-step={step}.ckpt",
        lightning,
        lambda rank: f"mp_rank_{rank:02d}/average.ckpt",
        "gpt--val_loss=2.10-step={}.ckpt",
    ),
    "NeMo's pipeline": Layout(
        lambda step, rank: f"tp_rank_00_pp_rank_{rank:03d}/gpt-step={step}.ckpt",
        lightning,
        lambda rank: f"tp_rank_00_pp_rank_{rank:03d}/average.ckpt",
        "gpt-step={}.ckpt",
    ),
    "fairseq": Layout(
        lambda step, rank: f"checkpoint{step}-model_part-{rank}.pt",
        fairseq,
        lambda rank: f"average-model_part-{rank}.pt",
        "checkpoint{}.pt",
    ),
    "fairseq's FSDP": Layout(
        lambda step, rank: f"checkpoint{step}-shard{rank}.pt",
        fairseq,
        lambda rank: f"average-shard{rank}.pt",
        "checkpoint{}.pt",
    ),
}


def run_of(folder: Path, layout: Layout, steps=STEPS, ranks=RANKS) -> Path:
    for step in steps:
        for rank in ranks:
            put(layout.tree(step, rank, part(step, rank)), folder / layout.file(step, rank))
    return folder


@pytest.fixture
def llama(tmp_path) -> Path:
    return run_of(tmp_path / "run", LAYOUTS["Llama"])


def mean(rank: int, weights: Mapping[int, float]) -> dict[str, Tensor]:
    """The mean of one rank's parts in float64, rounded once; counters are those of the last that counts."""
    parts = {step: part(step, rank) for step in weights}
    total, last = sum(weights.values()), list(weights)[-1]
    averaged = {
        name: sum(a / total * parts[step][name].double() for step, a in weights.items()).to(tensor.dtype)
        for name, tensor in parts[last].items()
        if tensor.is_floating_point()
    }
    return averaged | {"count": parts[last]["count"]}


def assert_holds(file: Path, expected: Mapping[str, Tensor]) -> None:
    tensors = torch.load(file)
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype
        # float32 sums are rounded once more than the reference.
        torch.testing.assert_close(tensors[name], tensor, rtol=1e-2 if "wo" in name else 1e-6, atol=1e-6)


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def refusal(*paths: Path, **options) -> str:
    found = read_inputs(list(paths), **options).refusal
    assert found is not None
    return found.for_command


# What comes out.


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_run_is_averaged_rank_by_rank(tmp_path, layout, capsys):
    run, output = run_of(tmp_path / "run", layout), tmp_path / "average"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    code = main(["average", str(run), "-o", str(output), "--profile", "ema:half_life=100", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert code == 0 and report["steps"] == list(STEPS)
    assert [item["name"] for item in report["plan"]] == [layout.checkpoint.format(step) for step in STEPS]
    assert all(len(item["ranks"]) == len(RANKS) for item in report["plan"])
    assert files_of(output) == {"polyak.json", *map(layout.written, RANKS)}
    coefficients = dict(zip(STEPS, report["coefficients"], strict=True))
    assert len(set(coefficients.values())) == 3
    for rank in RANKS:
        assert_holds(output / layout.written(rank), mean(rank, coefficients))
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_the_files_of_one_rank_are_said_to_be_a_part(llama, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(llama)
    assert main(["average", "step-*/consolidated.00.pth", "-o", "../average"]) == 0
    assert "whose others are 'consolidated.01.pth'" in " ".join(capsys.readouterr().out.split())
    for path in llama.glob("step-*/consolidated.0[12].pth"):
        path.unlink()
    assert main(["average", "step-*/consolidated.00.pth", "-o", "../alone"]) == 0
    assert "one part" not in capsys.readouterr().out


def test_parts_of_other_checkpoints_in_the_folder_are_no_parts_of_this_one(tmp_path):
    run_of(tmp_path, LAYOUTS["fairseq"], steps=(100,), ranks=(0,))
    run_of(tmp_path, LAYOUTS["fairseq"], steps=(200,), ranks=(1,))
    report = polyak.average_checkpoints(tmp_path / "checkpoint100-model_part-0.pt", tmp_path / "out.pt")
    assert not any("one part" in note for note in report.notes)


def test_folders_one_by_one_count_as_weights_say(llama, tmp_path):
    folders = [llama / "step-400", llama / "step-100"]
    report = polyak.average_checkpoints(folders, tmp_path / "out", weights=[3, 1])
    assert report.coefficients == (0.75, 0.25)
    for rank in RANKS:
        assert_holds(tmp_path / "out" / f"consolidated.{rank:02d}.pth", mean(rank, {400: 0.75, 100: 0.25}))


def test_the_files_one_by_one_are_the_same_checkpoints(llama, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(llama)
    assert main(["average", "step-*/consolidated.*.pth", "-o", "../files", "--last", "2"]) == 0
    assert "left out: 'step-100' (older than the last 2)" in capsys.readouterr().out
    monkeypatch.chdir(llama / "step-200")
    # The folder that one stands in, and one beside it.
    names = [f"consolidated.{rank:02d}.pth" for rank in RANKS]
    assert main(["average", *names, "../step-400", "-o", "../../folders", "--steps", "1,2"]) == 0
    for rank in RANKS:
        for output in ("files", "folders"):
            assert_holds(tmp_path / output / f"consolidated.{rank:02d}.pth", mean(rank, {200: 1, 400: 1}))


def test_the_plan_says_how_many_ranks_there_are(llama, tmp_path, capsys):
    assert main(["average", str(llama), "-o", str(tmp_path / "out"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "3 ranks, 'consolidated.00.pth', 'consolidated.01.pth', 'consolidated.02.pth'" in out
    assert "would write" in out and not (tmp_path / "out").exists()
    assert main(["inspect", str(llama)]) == 0
    assert "3 ranks" in capsys.readouterr().out
    assert main(["inspect", str(llama / "step-100"), str(llama / "step-200")]) == 0
    assert "consolidated.02.pth/wq.weight" in capsys.readouterr().out
    assert main(["inspect", str(llama), str(llama / "step-200")]) == 2


def test_a_checkpoint_with_itself_is_itself_in_little_memory(tmp_path):
    for rank in range(2):
        put({"w": random(torch.bfloat16, rank, (300_000,))}, tmp_path / "a" / f"consolidated.{rank:02d}.pth")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    paths = [tmp_path / "a", tmp_path / "b"]
    report = polyak.average_checkpoints(paths, tmp_path / "out", weights=[1, 2], max_memory="20MB")
    assert report.memory_bytes <= 20_000_000
    for rank in range(2):
        name = f"consolidated.{rank:02d}.pth"
        assert same_bits(
            torch.load(tmp_path / "out" / name)["w"], torch.load(paths[0] / name, mmap=True)["w"]
        )


def test_safetensors_and_another_dtype(tmp_path):
    for step in (1, 2):
        for rank in RANKS:
            path = tmp_path / f"step-{step}" / f"consolidated.{rank:02d}.safetensors"
            path.parent.mkdir(exist_ok=True)
            checkpoints.write(path, {"w": torch.full((2,), step + 10.0 * rank)})
    polyak.average_checkpoints([tmp_path / "step-1", tmp_path / "step-2"], tmp_path / "out", dtype="bf16")
    for rank in RANKS:
        tensor = checkpoints.open(tmp_path / "out" / f"consolidated.{rank:02d}.safetensors").read("w")
        assert tensor.dtype == torch.bfloat16 and torch.all(tensor == 1.5 + 10 * rank)


def test_small_files_beside_are_copied_where_they_are_of_the_model(llama, tmp_path):
    for step in STEPS:
        (llama / f"step-{step}" / "params.json").write_text(json.dumps({"dim": 5, "step": step}))
        (llama / f"step-{step}" / "tokenizer.model").write_bytes(b"tokens")
        (llama / f"step-{step}" / "train.log").write_text("log")
        (llama / f"step-{step}" / "latest_checkpointed_iteration.txt").write_text("1")
    (llama / "latest_checkpointed_iteration.txt").write_text("400")
    report = polyak.average_checkpoints(llama, tmp_path / "out")
    names = {f"consolidated.{rank:02d}.pth" for rank in RANKS}
    assert files_of(tmp_path / "out") == {"params.json", "tokenizer.model", "polyak.json", *names}
    assert "copied from step-100: 'params.json', 'tokenizer.model'" in report.notes
    assert "not copied from step-100: 'latest_checkpointed_iteration.txt', 'train.log'" in report.notes
    assert "the inputs' params.json differ: what step-100 says was copied" in report.notes
    assert json.loads((tmp_path / "out" / "params.json").read_text())["step"] == 100


def test_the_average_says_what_it_is_made_of_and_may_be_replaced(llama, tmp_path):
    output = tmp_path / "run" / "soup"
    polyak.average_checkpoints([llama / f"step-{step}" for step in STEPS], output, hashes=True)
    with checkpoints.open(output / "consolidated.01.pth") as one:
        record = json.loads(one.metadata["polyak"])
    assert record["inputs"] == [f"step-{step}" for step in STEPS]
    assert len(record["sha256"]) == 9 and "step-100/consolidated.01.pth" in record["sha256"]
    # An average in the folder of what it was made of is none of them.
    (soup,) = (item for item in read_inputs(llama).required(by_rank=True).items if not item.taken)
    assert soup.name == "soup" and soup.why.startswith("itself an average, of 'step-100'")
    with pytest.raises(OutputExistsError, match="exists already"):
        polyak.average_checkpoints([llama / "step-100"], output)
    polyak.average_checkpoints([llama / "step-100"], output, overwrite=True)
    assert_holds(output / "consolidated.00.pth", mean(0, {100: 1}))
    put(part(1, 1), output / "consolidated.02.pth")
    with pytest.raises(OutputExistsError, match=r"also holds 'consolidated\.02\.pth'"):
        polyak.average_checkpoints([llama / "step-100"], output, overwrite=True)


def test_folders_in_the_output_are_replaced_if_they_are_its_own(tmp_path):
    run, output = run_of(tmp_path / "run", LAYOUTS["Megatron"]), tmp_path / "out"
    polyak.average_checkpoints(run, output)
    polyak.average_checkpoints(run, output, overwrite=True, last=1)
    assert_holds(output / "mp_rank_01" / "model_optim_rng.pt", mean(1, {400: 1}))
    (output / "mine").mkdir()
    with pytest.raises(OutputExistsError, match="also holds 'mine'"):
        polyak.average_checkpoints(run, output, overwrite=True)
    (output / "mine").rmdir()
    (output / "mp_rank_01" / "notes").write_text("mine")
    with pytest.raises(OutputExistsError, match="also holds 'mp_rank_01/notes'"):
        polyak.average_checkpoints(run, output, overwrite=True)


@pytest.mark.parametrize("like", ["iter_0000200", "elsewhere"])
def test_each_file_is_nested_as_that_of_its_rank(tmp_path, like):
    run = run_of(tmp_path / "run", LAYOUTS["Megatron"])
    run_of(tmp_path / "elsewhere", LAYOUTS["Megatron"], steps=(7,))
    like = tmp_path / like if like == "elsewhere" else run / like
    report = polyak.average_checkpoints(run, tmp_path / "out", like=like)
    for rank in RANKS:
        tree = torch.load(tmp_path / "out" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt")
        assert tree["checkpoint_version"] == 3.0 and "iteration" not in tree and "optimizer" not in tree
        torch.testing.assert_close(
            tree["model"]["wq.weight"], mean(rank, dict.fromkeys(STEPS, 1))["wq.weight"]
        )
    assert any("nested as model_optim_rng.pt is" in note for note in report.notes)


# What is read, and what is not.


def test_averages_beside_live_weights_and_copies_are_told_apart(tmp_path):
    layout = LAYOUTS["NeMo"]
    for step in STEPS:
        for rank in RANKS:
            file = tmp_path / layout.file(step, rank)
            put(lightning(step, rank, {"w": torch.ones(2)}), file)
            put(
                lightning(step, rank, {"w": torch.full((2,), -1.0 * step - rank)}),
                file.with_name(f"{file.stem}-EMA.ckpt"),
            )
    for rank in RANKS:
        newest = tmp_path / layout.file(400, rank)
        os.link(newest, newest.with_name("gpt--last.ckpt"))
    reading = read_inputs(tmp_path).required(by_rank=True)
    assert [item.name for item in reading.taken] == [
        f"gpt--val_loss=2.10-step={step}-EMA.ckpt" for step in STEPS
    ]
    assert reading.steps == list(STEPS)
    assert [item.opened.read("mp_rank_02/w")[0] for item in reading.taken] == [-102, -202, -402]


def test_links_and_copies_are_those_of_all_ranks(tmp_path):
    layout = LAYOUTS["fairseq"]
    run_of(tmp_path, layout)
    for rank in RANKS:
        shutil.copy(tmp_path / layout.file(400, rank), tmp_path / f"checkpoint_extra400-model_part-{rank}.pt")
        os.link(tmp_path / layout.file(200, rank), tmp_path / f"checkpoint_other200-model_part-{rank}.pt")
    reading = read_inputs(tmp_path).required(by_rank=True)
    assert reading.steps == list(STEPS)
    assert {item.why for item in reading.items if not item.taken} == {
        "the same weights as checkpoint400.pt",
        "the same file as checkpoint200.pt",
    }
    put(fairseq(400, 1, part(1, 1)), tmp_path / "checkpoint_extra400-model_part-1.pt")
    assert "checkpoint_extra400.pt" in refusal(tmp_path)


def test_a_link_to_the_file_of_one_rank_is_no_copy_of_all(tmp_path):
    layout = LAYOUTS["Llama"]
    run_of(tmp_path, layout, ranks=(0, 1))
    file = tmp_path / layout.file(200, 0)
    file.unlink()
    os.link(tmp_path / layout.file(100, 0), file)
    assert read_inputs(tmp_path).required(by_rank=True).steps == list(STEPS)


def test_optimizers_beside_are_left_out(tmp_path, monkeypatch, capsys):
    run = run_of(tmp_path, LAYOUTS["DeepSpeed"], ranks=(0, 1))
    for step in STEPS:
        for rank in (0, 1):
            name = f"global_step{step}/bf16_zero_pp_rank_0_mp_rank_{rank:02d}_optim_states.pt"
            put({"optimizer_state_dict": {"zero_stage": 1}}, run / name)
        (run / f"global_step{step}" / "expert").mkdir()
    assert [len(item.parts) for item in read_inputs(run).items] == [2, 2, 2]
    monkeypatch.chdir(tmp_path)
    assert main(["average", "global_step*/*.pt", "-o", "../out", "--dry-run"]) == 0
    assert "(holds no weights)" in capsys.readouterr().out
    given = sorted(map(str, run.glob("global_step*/*.pt")))
    assert main(["average", *given, "-o", "../out"]) == 2
    assert "holds the state of an optimizer and no weights" in capsys.readouterr().err


def test_optimizers_beside_ranks_are_not_opened(tmp_path):
    run_of(tmp_path, LAYOUTS["DeepSpeed"], ranks=(0, 1))
    (tmp_path / "global_step100" / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"cut off")
    files = sorted(tmp_path.rglob("*.pt"))
    assert read_inputs(files, found=files).required(by_rank=True).steps == list(STEPS)


def test_ranks_that_were_all_named_are_a_checkpoint_that_was(tmp_path):
    for name, epoch in (("1", 1), ("2", 2), ("_best", 2)):
        for rank in (0, 1):
            tree = fairseq(epoch, rank, part(len(name), rank))
            put(tree, tmp_path / f"checkpoint{name}-model_part-{rank}.pt")
    files = sorted(tmp_path.iterdir())
    assert "no part of the numbered series" in refusal(*files)
    found = [file for file in files if file.name == "checkpoint_best-model_part-1.pt"]
    assert read_inputs(files, found=found).required(by_rank=True).steps == [1, 2]


def test_a_pipeline_of_deepspeed_keeps_the_weights_in_the_files_of_layers(tmp_path):
    layout = LAYOUTS["DeepSpeed's pipeline"]
    run_of(tmp_path, layout)
    for step in STEPS:
        for rank in (0, 1):
            put(
                {"module": None, "global_steps": step},
                tmp_path / f"global_step{step}/mp_rank_{rank:02d}_model_states.pt",
            )
    reading = read_inputs(tmp_path).required(by_rank=True)
    assert [list(item.opened.parts) for item in reading.taken] == [
        [Path(layout.file(1, r)).name for r in RANKS]
    ] * 3
    assert "3 files of ranks and layers" in reading.checkpoints[0].note


def test_one_rank_alone_is_averaged_as_a_file(llama, tmp_path):
    paths = [llama / f"step-{step}" / "consolidated.01.pth" for step in STEPS]
    polyak.average_checkpoints(paths, tmp_path / "one.pt")
    assert_holds(tmp_path / "one.pt", mean(1, dict.fromkeys(STEPS, 1)))


# What is refused.


def test_a_rank_that_one_lacks(llama):
    (llama / "step-200" / "consolidated.01.pth").unlink()
    assert "step-200 lacks 'consolidated.01.pth', which step-400 has" in refusal(llama)
    assert read_inputs(llama, last=1).refusal is None


def test_a_rank_that_all_lack(tmp_path):
    layout = LAYOUTS["Megatron's pipeline"]
    run_of(tmp_path / "a", layout, ranks=(0, 2))
    assert "no checkpoint has 'mp_rank_00_001/model_optim_rng.pt'" in refusal(tmp_path / "a")
    run_of(tmp_path / "b", layout, ranks=(1, 2))
    assert "no checkpoint has 'mp_rank_00_000/model_optim_rng.pt'" in refusal(tmp_path / "b")
    run_of(tmp_path / "c", LAYOUTS["Llama"], ranks=(0, 10**12))
    assert "no checkpoint has 'consolidated.01.pth', 'consolidated.02.pth'" in refusal(tmp_path / "c")


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_ranks_are_counted_as_a_grid_is(sizes, data):
    index = data.draw(st.integers(0, math.prod(sizes) - 1))
    assert _place(index, sizes) == np.unravel_index(index, sizes)


def test_parts_of_several_moments_or_keys(tmp_path):
    layout = LAYOUTS["Megatron"]
    run_of(tmp_path, layout)
    put(megatron(300, 1, part(300, 1)), tmp_path / layout.file(400, 1))
    said = refusal(tmp_path)
    assert (
        "mp_rank_01/model_optim_rng.pt is of step 300; mp_rank_00/model_optim_rng.pt is of step 400" in said
    )
    put({"ema": part(400, 1), "model": part(400, 1), "iteration": 400}, tmp_path / layout.file(400, 1))
    assert "'model' and mp_rank_01/model_optim_rng.pt under 'ema'; choose one for all with --key" in refusal(
        tmp_path
    )
    assert read_inputs(tmp_path, "model").refusal is None


def test_parts_beside_whole_files(llama):
    put(part(1, 1), llama / "step-500" / "model.pt")
    assert "are in parts, one a rank, and 'step-500/model.pt' are not" in refusal(llama)


def test_ranks_of_other_sizes(llama, tmp_path):
    put({"w": torch.ones(3)}, llama / "step-400" / "consolidated.02.pth")
    with pytest.raises(StructureError, match=r"step-400 .*'consolidated\.02\.pth/wq\.weight'"):
        polyak.average_checkpoints(llama, tmp_path / "out")


def test_a_weight_that_is_not_finite_names_its_file(llama, tmp_path):
    put(part(400, 2) | {"norm.weight": torch.full((5,), torch.nan)}, llama / "step-400/consolidated.02.pth")
    with pytest.raises(NonFiniteError, match=r"step-400: tensor 'consolidated\.02\.pth/norm\.weight'"):
        polyak.average_checkpoints(llama, tmp_path / "out")
    assert os.listdir(tmp_path) == ["run"]


def test_codes_in_any_rank(llama):
    codes = {"l.qweight": torch.ones(2, dtype=torch.int32), "l.scales": torch.ones(2)}
    put(codes, llama / "step-400" / "consolidated.02.pth")
    assert "consolidated.02.pth is quantised" in refusal(llama)


def test_empty_tensors_of_zero3(tmp_path):
    for step in (1, 2):
        for rank in (0, 1):
            module = {"w": torch.empty(0), "b": torch.empty(0)}
            put(
                {"module": module, "global_steps": step},
                tmp_path / f"global_step{step}/mp_rank_0{rank}_model_states.pt",
            )
    assert "zero_to_fp32.py" in refusal(tmp_path)


@pytest.mark.parametrize(
    "name", ["step_{}/model_state_rank_{}.pt", "ep1-ba{}-rank{}.pt", "step_{}/weights-0000{}-of-00002.bin"]
)
def test_a_layout_that_is_not_known(tmp_path, name):
    for step in (100, 200):
        for rank in (0, 1):
            put(part(step, rank), tmp_path / name.format(step, rank))
    said = refusal(tmp_path)
    assert "are parts of one model" in said and "average the files of each rank by themselves" in said


def test_outputs_that_cannot_be(llama, tmp_path, capsys):
    for suffix in (".pth", ".safetensors", ".npz"):
        assert main(["average", str(llama), "-o", str(tmp_path / f"out{suffix}")]) == 2
        err = capsys.readouterr().err
        assert "3 ranks" in err and "name an output without a suffix, such as -o out/" in err
    fairseq_run = run_of(tmp_path / "fairseq", LAYOUTS["fairseq"])
    for output, run in ((llama / "step-100", llama), (fairseq_run, fairseq_run)):
        with pytest.raises(OptionError, match="is the input"):
            polyak.average_checkpoints(run, output, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["fairseq", "run"]


def test_like_is_a_checkpoint_of_the_same_ranks(llama, tmp_path):
    run_of(tmp_path / "less", LAYOUTS["Llama"], steps=(1,), ranks=(0, 1))
    for like in (llama, tmp_path / "less", llama / "step-100" / "consolidated.00.pth"):
        with pytest.raises(OptionError):
            Plan(llama, tmp_path / "out", like=like)


def test_adapters_in_parts(tmp_path):
    for step in (1, 2):
        for rank in (0, 1):
            factors = {"l.lora_A.weight": torch.ones(2, 4), "l.lora_B.weight": torch.ones(4, 2)}
            put(factors, tmp_path / f"step-{step}" / f"consolidated.{rank:02d}.pth")
    with pytest.raises(OptionError) as caught:
        Plan(tmp_path, tmp_path / "out")
    assert "average the factors with --lora factors" in caught.value.for_command


def test_what_needs_a_whole_model(llama, tmp_path, capsys):
    with pytest.raises(OptionError, match="3 ranks, which no model loads by itself: 'polyak average"):
        polyak.Trajectory.from_checkpoints([llama / f"step-{step}" for step in STEPS])
    user = ["--model", "user:build", "--score", "user:score"]
    for command in (["select", str(llama), *user], ["report", str(llama), "-o", str(tmp_path / "r.html")]):
        assert main(command) == 2
        assert "averages such checkpoints rank by rank" in capsys.readouterr().err
    user = ["--model", "user:build", "--recalibrate", "user:batches"]
    for more in ([], ["--dry-run"]):
        assert main(["average", str(llama), "-o", str(tmp_path / "out"), *user, *more]) == 2
        assert "leave out --model and --recalibrate" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["run"]


# Nothing is half-written.


def test_a_broken_part_leaves_nothing(llama, tmp_path):
    file = llama / "step-400" / "consolidated.02.pth"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match=r"step-400/consolidated\.02\.pth"):
        polyak.average_checkpoints(llama, tmp_path / "out")
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("before", [0, 5, 11])
def test_cut_off_while_it_is_written(tmp_path, monkeypatch, error, before):
    run, written = run_of(tmp_path / "run", LAYOUTS["Megatron"]), []

    def write(number, data, offset, pwrite=os.pwrite):
        written.append(offset)
        if len(written) > before:
            raise error
        return pwrite(number, data, offset)

    monkeypatch.setattr(os, "pwrite", write)
    with pytest.raises(CheckpointError if isinstance(error, OSError) else KeyboardInterrupt):
        polyak.average_checkpoints(run, tmp_path / "out")
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize("rank", RANKS)
def test_cut_off_while_a_rank_is_finished(llama, tmp_path, monkeypatch, rank):
    def save(state, stream, save=torch.save, saved=[]):  # noqa: B006
        saved.append(state)
        if len(saved) > rank:
            raise KeyboardInterrupt
        return save(state, stream)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(KeyboardInterrupt):
        polyak.average_checkpoints(llama, tmp_path / "out")
    assert os.listdir(tmp_path) == ["run"]


KILLED = """
    import os, sys, time
    from pathlib import Path
    import polyak, torch
    torch.set_num_threads(1)
    run, output, kills = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])

    def in_child(seconds=None):
        child = os.fork()
        if child == 0:
            polyak.average_checkpoints(run, output)
            os._exit(0)
        if seconds is not None:
            time.sleep(seconds)
            os.kill(child, 9)
        return os.waitpid(child, 0)[1] == 0

    def found():
        return {file.name: file.read_bytes() for file in output.iterdir()} if output.exists() else None

    import polyak.combine
    started = time.perf_counter()
    assert in_child()
    duration, complete = time.perf_counter() - started, found()
    for number in range(kills):
        for file in output.iterdir() if output.exists() else ():
            file.unlink()
        output.rmdir() if output.exists() else None
        in_child((number + 0.5) / kills * duration)
        assert found() in (None, complete), "half-written"
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed(tmp_path):
    for step in STEPS:
        for rank in RANKS:
            weights = {"w": torch.full((100_000,), float(step + rank))}
            put(weights, tmp_path / "run" / f"step-{step}" / f"consolidated.{rank:02d}.pth")
    code = ["-W", "ignore", "-c", textwrap.dedent(KILLED), str(tmp_path / "run"), str(tmp_path / "out"), "4"]
    result = subprocess.run([sys.executable, *code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_terminated_from_the_command_line(llama, tmp_path, monkeypatch):
    def save(*args):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(torch, "save", save)
    assert main(["average", str(llama), "-o", str(tmp_path / "out")]) != 0
    assert os.listdir(tmp_path) == ["run"]


# Folders composed at random.


@settings(max_examples=40, deadline=None)
@given(
    layout=st.sampled_from(list(LAYOUTS.values())),
    steps=st.lists(st.integers(1, 10**6), min_size=2, max_size=4, unique=True),
    n_ranks=st.integers(2, 4),
    lost=st.none() | st.tuples(st.integers(0, 3), st.integers(0, 3)),
    special=st.sampled_from(["", "best", "last"]),
    whole=st.booleans(),
)
def test_ranks_are_never_mixed_and_steps_never_lost(
    tmp_path_factory, layout, steps, n_ranks, lost, special, whole
):
    folder, ranks = tmp_path_factory.mktemp("run"), range(n_ranks)
    for step in steps:
        for rank in ranks:
            values = {"w": torch.tensor([float(step), float(rank)])}
            put(layout.tree(step, rank, values), folder / layout.file(step, rank))
            if special and step == steps[0]:
                file = layout.file(step, rank).replace(layout.checkpoint.format(step), special, 1)
                file = file.replace(
                    layout.checkpoint.format(step).removesuffix(".pt"), f"checkpoint_{special}"
                )
                put(layout.tree(step, rank, {"w": torch.full((2,), -1.0)}), folder / file)
    if whole:
        put({"w": torch.ones(2)}, folder / f"whole_{steps[0]}.pt")
    is_lost = lost is not None and lost[0] < len(steps) and lost[1] < n_ranks
    if is_lost:
        (folder / layout.file(steps[lost[0]], lost[1])).unlink()
    reading = read_inputs(folder)
    if whole or is_lost:
        assert reading.refusal is not None
        return
    assert reading.refusal is None, reading.refusal
    assert reading.steps == sorted(steps)
    for item, step in zip(reading.taken, sorted(steps), strict=True):
        parts = sorted(item.opened.parts)
        values = [item.opened.read(f"{name}/w").tolist() for name in parts]
        assert values == [[step, rank] for rank in ranks]
