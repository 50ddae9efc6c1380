"""The reading plan: folders of every kind, composed at random, never mix and never lose a step."""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import polyak
from polyak import checkpoints
from polyak.cli import main
from polyak.combine._reading import read_inputs
from polyak.errors import OptionError


def put(path: Path, value: float, **more) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": {"w": torch.full((2,), float(value))}} | more, path)


NAMES = ("step_{}.pt", "epoch={}-step={}.ckpt", "ckpt_{}.pt", "iter_{:07d}.pth", "model_{}.pt")
SPECIAL = ("best.pt", "last.ckpt", "model_best.pth", "init.pt", "final.pt", "latest.pt", "checkpoint.pth")


@st.composite
def folders(draw):
    return {
        "steps": draw(st.lists(st.integers(1, 10**6), min_size=2, max_size=6, unique=True)),
        "name": draw(st.sampled_from(NAMES)),
        "saved": draw(st.booleans()),
        "links": draw(st.lists(st.sampled_from(SPECIAL), max_size=2, unique=True)),
        "copies": draw(st.lists(st.sampled_from(SPECIAL), max_size=2, unique=True)),
        "strangers": draw(st.lists(st.sampled_from(SPECIAL), max_size=2, unique=True)),
        "averages": draw(st.booleans()),
        "optimizer": draw(st.booleans()),
        "ranks": draw(st.sampled_from((0, 0, 0, 2))),
    }


def build(folder: Path, plan: dict) -> None:
    for place, step in enumerate(sorted(plan["steps"])):
        path = folder / plan["name"].format(*[place, step][-plan["name"].count("{") :])
        put(path, step, **({"global_step": step} if plan["saved"] else {}))
        if plan["averages"]:
            put(
                path.with_name(f"{path.stem}-EMA{path.suffix}"),
                -step,
                **({"global_step": step} if plan["saved"] else {}),
            )
    first = min(folder.iterdir())
    for name in plan["links"]:
        if not (folder / name).exists():
            os.link(first, folder / name)
    for name in plan["copies"]:
        if not (folder / name).exists():
            shutil.copy(first, folder / name)
    for name in plan["strangers"]:
        if not (folder / name).exists():
            put(folder / name, 1e9)
    if plan["optimizer"]:
        state = {0: {"exp_avg": torch.full((2,), 1e12)}}
        torch.save({"state": state, "param_groups": [{"params": [0]}]}, folder / "optimizer_state.pt")
    for rank in range(plan["ranks"]):
        put(folder / f"weights_rank_{rank}.pt", 1e15)


@settings(max_examples=60, deadline=None)
@given(folders())
def test_a_folder_is_read_as_one_run_or_refused(plan):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(folder, plan)
        reading = read_inputs(folder)
        if plan["ranks"]:
            assert isinstance(reading.refusal, OptionError) and "ranks" in str(reading.refusal)
            return
        assert reading.refusal is None, reading.refusal
        sign = -1 if plan["averages"] else 1
        values = [item.opened.read("w")[0].item() for item in reading.taken]
        assert values == [sign * step for step in sorted(plan["steps"])]
        assert reading.steps == sorted(plan["steps"])
        # All that is there is either taken or named with the reason.
        assert {path.name for path in folder.iterdir()} == {item.name for item in reading.items}


def test_the_newest_are_taken_by_last(tmp_path, capsys):
    for step in (9, 10, 100):
        put(tmp_path / f"step_{step}.pt", step)
    put(tmp_path / "best.pt", -1)
    assert main(["average", str(tmp_path), "-o", str(tmp_path.parent / "out.npz"), "--last", "2"]) == 0
    out = capsys.readouterr().out
    assert (
        "'best.pt' (no part of the numbered series)" in out and "'step_9.pt' (older than the last 2)" in out
    )
    assert checkpoints.open(tmp_path.parent / "out.npz").read("w")[0] == 55
    assert main(["average", str(tmp_path), "-o", "x.npz", "--last", "4"]) == 2
    assert "give 1 to 3" in capsys.readouterr().err
    with pytest.raises(OptionError, match="--last 5, or last=5 in Python"):
        polyak.parse("tail:5")


def test_steps_may_be_given(tmp_path):
    paths = [tmp_path / name for name in ("b.pt", "a.pt")]
    for path, value in zip(paths, (1, 3), strict=True):
        put(path, value)
    report = polyak.average_checkpoints(paths, tmp_path / "out.pt", profile="tail:steps=1", steps=[20, 10])
    assert report.steps == (10, 20) and report.coefficients == (0, 1)
    with pytest.raises(OptionError, match="1 steps were given for 2 checkpoints"):
        polyak.average_checkpoints(paths, tmp_path / "again.pt", steps=[1])
    for wrong in ([1.5, 2], ["a", "b"], [-1, 2], [True, 2]):
        with pytest.raises(OptionError, match="each of steps must be a whole number"):
            polyak.average_checkpoints(paths, tmp_path / "again.pt", steps=wrong)
    assert not (tmp_path / "again.pt").exists()


@pytest.mark.parametrize("last", ["x", 2.5, True, 0, -1])
def test_last_is_a_count(tmp_path, last):
    run_of(tmp_path, "step_{}.pt")
    with pytest.raises(OptionError, match="last must be a whole number"):
        read_inputs(tmp_path, last=last).required()


def test_every_command_reads_the_same(tmp_path, capsys):
    for step in (1, 2):
        put(tmp_path / f"step_{step}.pt", step)
    os.link(tmp_path / "step_2.pt", tmp_path / "last.pt")
    reading = read_inputs(tmp_path)
    with pytest.warns(UserWarning, match=r"left out: 'last\.pt' \(the same file as step_2\.pt\)"):
        trajectory = polyak.Trajectory.from_checkpoints(tmp_path.glob("*.pt"))
    assert [block.stop for block in trajectory.blocks] == reading.steps == [1, 2]
    assert main(["inspect", str(tmp_path)]) == 0
    assert "the same file as step_2.pt" in " ".join(capsys.readouterr().out.split())


def test_a_soup_of_two_runs_of_one_step_has_no_profile(tmp_path):
    for run, value in (("a", 1), ("b", 3)):
        put(tmp_path / run / "step_10.pt", value, global_step=10)
    paths = [tmp_path / "a" / "step_10.pt", tmp_path / "b" / "step_10.pt"]
    polyak.average_checkpoints(paths, tmp_path / "soup.npz")
    assert checkpoints.open(tmp_path / "soup.npz").read("w")[0] == 2
    with pytest.raises(OptionError, match="are both of step 10, as of two runs"):
        polyak.average_checkpoints(paths, tmp_path / "tail.npz", profile="tail:0.5")


@pytest.mark.parametrize(
    "beside",
    [{"attn.logit_scale": torch.ones(3)}, {"attn.scale": torch.ones(1)}, {"mask_token": torch.ones(2)}],
)
def test_buffers_of_integers_beside_a_scale_are_no_codes(tmp_path, beside):
    for number in (1, 2):
        tensors = {"attn.weight": torch.ones(2), "attn.relative_position_index": torch.arange(4), **beside}
        torch.save(tensors | {"attn.mask": torch.ones(2, dtype=torch.uint8)}, tmp_path / f"{number}.pt")
    assert read_inputs(tmp_path).refusal is None


def run_of(folder: Path, name: str, values=(1, 2)) -> None:
    for number, value in enumerate(values, 1):
        put(folder / name.format(number), value)


REFUSED = {
    "two widths of one average": (
        ["network-snapshot-{:07d}-0.050.pt", "network-snapshot-{:07d}-0.100.pt"],
        "of one step and differ in 0.050 and 0.100 alone, as averages of two widths do: choose one by a pattern such "
        "as '*0.050.*'",
    ),
    "the nets of a CycleGAN": (
        ["{}_net_G_A.pth", "{}_net_G_B.pth"],
        "both of step 1, and differ in their names as different networks or runs do: choose one by a pattern such as "
        "'*_net_G_A.pth'",
    ),
    "two models, one with SWA layers": (["gemma-swa-{}.pt", "llama-{}.pt"], "are both of step 1"),
    "the average of a run": (["resnet_{}.pt", "resnet_swa.pt"], "'resnet_swa.pt' are averages and"),
    "two models, one a teacher": (["teacher-b-{}.pt", "assistant-{}.pt"], "are both of step 1"),
    "live beside averages, in folders": (["live/step{}.pt", "ema/step{}.pt"], "are averages and"),
    "two models of each step": (["checkpoint_{}/gen.pt", "checkpoint_{}/disc.pt"], "are both of step 1"),
    "a pretrained model": (["epoch_{}.pth", "resnet50.pth"], "resnet50"),
    "a pretrained model beside bare numbers": (
        ["ckpt_{}.pth", "vit_b_16-0f3a9c1d.pth"],
        "no part in the series",
    ),
    "a pretrained model beside a series": (
        ["tuned_{}.pth", "resnet50.pth"],
        "resnet50.pth has, by its name, no part",
    ),
    "a target network": (["actor_{}.pt", "actor_target_{}.pt"], "are both of step 1"),
    "parts of ranks": (["iter_{}/model_rank_0.pt", "iter_{}/model_rank_1.pt"], "parts of one model"),
    "two runs in folders": (["a/step_{}0.pt", "b/step_{}5.pt"], "as of two runs"),
    "two runs in one folder": (
        ["run1_step{}0.pt", "run2_step{}5.pt"],
        "run2_step15.pt and run1_step20.pt are of steps 15 and 20, which overlap with each other's, as of two runs",
    ),
    "two runs of equal steps": (
        ["lr0.1_epoch{}.pt", "lr0.01_epoch{}.pt"],
        "are both of step 1, as of two runs",
    ),
    "two runs by their names": (["a_{}0.pt", "b_{}5.pt"], "as of two runs"),
    "averages of some": (["model_{}.pt", "modelEMA_2.pt"], "are averages and 'model_1.pt'"),
}


@pytest.mark.parametrize(("names", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_series_is_refused(tmp_path, names, message):
    for name in names:
        run_of(tmp_path, name)
    refusal = read_inputs(tmp_path).refusal
    assert refusal is not None and message in str(refusal)


TAKEN = {
    "a model with SWA layers": (["gemma-swa-{}.pt", "last.pt"], {"gemma-swa-1.pt", "gemma-swa-2.pt"}),
    "twins in camel case": (["net_{}.pt", "netEMA_{}.pt"], {"netEMA_1.pt", "netEMA_2.pt"}),
    "a last one above the run": (["last.pt", "checkpoints/epoch_{}.pt"], {"epoch_1.pt", "epoch_2.pt"}),
    "the best by rank": (["rank1_epoch10.pt", "rank2_epoch8.pt"], {"rank1_epoch10.pt", "rank2_epoch8.pt"}),
    "a save that was cut off": (
        ["step_{}.pt", "tmp-step_9.pt", "~step_2.pt", "step_8.tmp.pt"],
        {"step_1.pt", "step_2.pt"},
    ),
    "a run that was gone on with": (
        ["version_0/step_{}.pt", "version_1/step_3{}.pt"],
        {"step_1.pt", "step_2.pt", "step_31.pt", "step_32.pt"},
    ),
    "a run that was gone on with in its folder": (
        ["run1_step{}.pt", "run2_step3{}.pt"],
        {"run1_step1.pt", "run1_step2.pt", "run2_step31.pt", "run2_step32.pt"},
    ),
    "rates and scores that come back": (
        ["epoch{}_lr0.1_acc91.pt", "epoch{}1_lr0.01_acc92.pt", "epoch3{}_lr0.1_acc91-v1.pt"],
        {
            *("epoch1_lr0.1_acc91.pt", "epoch2_lr0.1_acc91.pt", "epoch11_lr0.01_acc92.pt"),
            *("epoch21_lr0.01_acc92.pt", "epoch31_lr0.1_acc91-v1.pt", "epoch32_lr0.1_acc91-v1.pt"),
        },
    ),
    "a suffix in capitals": (
        ["step_{}.PT", "step_{}0.pt"],
        {"step_1.PT", "step_2.PT", "step_10.pt", "step_20.pt"},
    ),
    "names of two phases": (["phaseA_{}.pt", "phaseB_3.pt"], {"phaseA_1.pt", "phaseA_2.pt", "phaseB_3.pt"}),
    "a resume file": (["epoch_{}.pt", "checkpoint.pt"], {"epoch_1.pt", "epoch_2.pt"}),
}


@pytest.mark.parametrize(("names", "taken"), TAKEN.values(), ids=TAKEN)
def test_what_is_meant_is_taken(tmp_path, names, taken):
    for name in names:
        run_of(tmp_path, name)
    reading = read_inputs(tmp_path).required()
    assert {item.path.name for item in reading.taken} == taken


def test_one_width_is_a_series_and_two_may_be_weighted(tmp_path):
    for step in (1000, 2000):
        for width, value in (("0.050", step), ("0.100", -step)):
            put(tmp_path / f"network-snapshot-{step:07d}-{width}.pt", value)
    reading = read_inputs(sorted(tmp_path.glob("*0.050.*"))).required()
    assert reading.steps == [1000, 2000]
    pair = sorted(tmp_path.glob("*0001000*"))
    assert "alone, as averages of two widths" in str(read_inputs(pair).refusal)
    polyak.average_checkpoints(pair, tmp_path / "out.npz", weights=[3, 1])
    assert checkpoints.open(tmp_path / "out.npz").read("w")[0] == 500


def test_two_nets_at_several_steps_are_refused_also_by_name(tmp_path):
    for name in ("{}_net_G_A.pth", "{}_net_G_B.pth", "seed1_{}.pt", "seed2_{}.pt"):
        run_of(tmp_path, name)
    assert "both of step 1" in str(read_inputs(sorted(tmp_path.glob("*_G_?.pth"))).refusal)
    # One step, typed file by file, and runs that differ in their number: soups.
    assert read_inputs([tmp_path / "1_net_G_A.pth", tmp_path / "1_net_G_B.pth"]).refusal is None
    assert read_inputs(sorted(tmp_path.glob("seed*.pt"))).refusal is None


def test_the_best_and_the_last_alone_are_no_series(tmp_path):
    for name in ("best.pt", "last.pt"):
        put(tmp_path / "run" / name, len(name))
    refusal = str(read_inputs(tmp_path / "run").refusal)
    assert "best.pt and last.pt are, by their names, two states of one run" in refusal
    # Who names both wants both; and one of them is what a folder with one holds.
    assert (
        len(read_inputs([tmp_path / "run" / name for name in ("best.pt", "last.pt")]).required().taken) == 2
    )
    (tmp_path / "run" / "best.pt").unlink()
    assert len(read_inputs(tmp_path / "run").required().taken) == 1
    run_of(tmp_path / "tops", "best_epoch_{}.pt")
    assert read_inputs(tmp_path / "tops").required().steps == [1, 2]


def test_what_is_no_checkpoint_is_left_out_of_a_folder(tmp_path):
    run_of(tmp_path, "step_{}.pt")
    torch.save(torch.ones(3), tmp_path / "val_preds.pt")
    torch.save(torch.ones(3, dtype=torch.uint8), tmp_path / "rng_1.pt")
    torch.save(argparse.Namespace(lr=1), tmp_path / "hparams.pt")
    torch.save([torch.ones(2)], tmp_path / "features.pt")
    (tmp_path / "best.pt").symlink_to("gone.pt")
    reading = read_inputs(tmp_path).required()
    assert [item.name for item in reading.taken] == ["step_1.pt", "step_2.pt"]
    assert "'best.pt' (a link to what is not there)" in reading.left_out
    assert "'features.pt', 'hparams.pt', 'rng_1.pt', 'val_preds.pt' (holds no weights)" in reading.left_out
    assert "holds a Tensor, not a dict" in str(read_inputs(tmp_path / "rng_1.pt").refusal)
    assert "cannot read" in str(read_inputs(tmp_path / "best.pt").refusal)


def test_weights_in_half_precision_beside_the_full_ones(tmp_path):
    run_of(tmp_path / "run", "step_{}.pt")
    half = {"model": {"w": torch.full((2,), 9.0).half()}}
    for name in ("step_1_fp16.pt", "step_2.fp16.pt", "step_2_bf16.pt"):
        torch.save(half, tmp_path / "run" / name)
    reading = read_inputs(tmp_path / "run").required()
    assert reading.steps == [1, 2] and "'step_1_fp16.pt' (step_1.pt in half precision)" in reading.left_out
    # A library's folder.
    for value in (1, 2):
        folder = tmp_path / f"checkpoint-{value}" / "unet"
        put_hf(folder, "diffusion_pytorch_model.safetensors", torch.full((2,), float(value)))
        put_hf(folder, "diffusion_pytorch_model.fp16.safetensors", torch.full((2,), 9.0).half())
    reading = read_inputs([tmp_path / f"checkpoint-{value}" / "unet" for value in (1, 2)]).required()
    assert [item.opened.read("w")[0] for item in reading.taken] == [1, 2]
    assert "checkpoint-1/unet/diffusion_pytorch_model.fp16.safetensors" in reading.left_out


def put_hf(folder: Path, name: str, tensor: torch.Tensor) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"w": tensor}, folder / name)


def test_names_without_an_order_have_no_newest(tmp_path):
    run_of(tmp_path, "alpha.pt"), run_of(tmp_path, "beta.pt")
    assert read_inputs(tmp_path).refusal is None
    with pytest.raises(OptionError, match="no step is known for 'alpha.pt', 'beta.pt'"):
        read_inputs(tmp_path, last=1).required()


@pytest.mark.parametrize(
    ("beside", "key"),
    [
        ({"average_precision": {"car": torch.ones(1)}}, "model"),
        ({"loss_ema": {"l": torch.ones(1)}}, "model"),
        ({"ema": {"num_updates": torch.tensor(1), "module": {"w": torch.ones(2)}}}, "ema.module"),
        ({"ema_0.999": {"w": torch.ones(2)}}, "ema_0.999"),
    ],
)
def test_the_key_is_that_of_a_model(tmp_path, beside, key):
    torch.save({"model": {"w": torch.ones(2)}} | beside, tmp_path / "a.pt")
    assert checkpoints.open(tmp_path / "a.pt").key == key


def test_two_rates_in_one_file_are_refused(tmp_path):
    torch.save({name: {"w": torch.ones(2)} for name in ("model", "ema_0.99", "ema_0.999")}, tmp_path / "a.pt")
    with pytest.raises(OptionError, match="several averages of one model, 'ema_0.99', 'ema_0.999'"):
        checkpoints.open(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "tensors",
    [
        {"l.weight._data": torch.ones(2, 2, dtype=torch.int8), "l.weight._scale": torch.ones(2)},
        {"l.weight": torch.ones(2, 2).to(torch.float8_e4m3fn), "l.scale_weight": torch.ones(1)},
        {"l.weight": torch.ones(2, 2, dtype=torch.int8), "l.SCB": torch.ones(2)},
        {"l.weight": torch.ones(2, 2, dtype=torch.int8), "l.bias": torch.ones(2)},
        {"l.weight": torch.ones(4, 1, dtype=torch.uint8), "l.weight.absmax": torch.ones(2)},
        {"l.up_proj_blocks": torch.ones(4, 1, dtype=torch.uint8), "l.up_proj_scales": torch.ones(2)},
    ],
)
def test_codes_are_refused(tmp_path, tensors):
    torch.save(tensors, tmp_path / "a.pt")
    refusal = read_inputs([tmp_path / "a.pt"]).refusal
    assert refusal is not None and "is quantised" in str(refusal) and "dequantise it first" in str(refusal)


@pytest.mark.parametrize("mark", [" (1)", " - Copy", " copy 2", " 2", " (Ann's conflicted copy 2026-03-01)"])
def test_copies_by_name_are_left_out_or_refused(tmp_path, mark):
    run_of(tmp_path, "step_{}.pt")
    copy = tmp_path / f"step_2{mark}.pt"
    shutil.copy(tmp_path / "step_2.pt", copy)
    (left_out,) = (item for item in read_inputs(tmp_path).required().items if not item.taken)
    assert (left_out.path, left_out.why) == (copy, "the same weights as step_2.pt")
    put(copy, 50)
    assert f"step_2{mark}.pt is, by its name, a copy of step_2.pt, and holds" in str(
        read_inputs(tmp_path).refusal
    )


def test_the_pattern_that_is_advised_tells_the_two_apart(tmp_path):
    run_of(tmp_path, "step_{}.pt")
    put(tmp_path / "step_2_old.pt", 50)
    assert "by a pattern such as 'step_*[0-9].pt'" in str(read_inputs(tmp_path).refusal)
    assert not read_inputs(sorted(tmp_path.glob("step_*[0-9].pt"))).required().left_out


def test_a_run_saved_in_two_formats_counts_once(tmp_path):
    run_of(tmp_path, "step_{}.pt")
    for path in sorted(tmp_path.glob("*.pt")):
        with checkpoints.open(path) as opened:
            save_file({name: opened.read(name) for name in opened.tensors}, path.with_suffix(".safetensors"))
    items = read_inputs(tmp_path).required().items
    assert {item.path.suffix for item in items if item.taken} == {".safetensors"}
    assert "the same weights as step_2.safetensors" in {item.why for item in items}
    put(tmp_path / "step_2.pt", 50)
    assert "step_2.pt and step_2.safetensors are both of step 2" in str(read_inputs(tmp_path).refusal)


def test_numbered_folders_without_weights_are_named(tmp_path):
    for step in (100, 200):
        (tmp_path / f"checkpoint-{step}").mkdir()
        save_file({"w": torch.ones(2)}, tmp_path / f"checkpoint-{step}" / "model.safetensors")
    for name in ("checkpoint-300", "logs"):
        (tmp_path / name).mkdir()
    save_file({"w": torch.ones(2)}, tmp_path / "checkpoint-300" / "model-00001-of-00002.safetensors")
    reading = read_inputs(tmp_path).required()
    assert reading.steps == [100, 200]
    assert reading.left_out.startswith("left out: 'checkpoint-300' (a folder without a whole checkpoint")


@pytest.mark.parametrize("other", ["model_1.safetensors", "adapter_model.safetensors", "pytorch_model_1.bin"])
def test_two_models_in_one_folder_are_refused(tmp_path, other):
    for step in (1, 2):
        folder = tmp_path / f"checkpoint_{step}"
        folder.mkdir()
        for name in ("model.safetensors", other):
            save_file({"w": torch.full((2,), float(step))}, folder / name)
    message = f"checkpoint_1 holds two models, model.safetensors and {other}: average each by itself"
    assert message in str(read_inputs(tmp_path).refusal)
    found = sorted(tmp_path.glob("*/model.safetensors"))
    polyak.average_checkpoints(found, tmp_path / "out.npz")
    assert checkpoints.open(tmp_path / "out.npz").read("w")[0] == 1.5


def test_the_cure_for_a_broken_file_in_a_folder(tmp_path):
    run_of(tmp_path, "step_{}.pt")
    (tmp_path / "step_3.pt").write_bytes(b"PK\3\4")
    refusal = read_inputs(tmp_path).refusal
    assert str(refusal).endswith("use another copy; to leave it out, name the others")
    assert read_inputs(sorted(tmp_path.glob("step_[12].pt"))).refusal is None


@pytest.mark.parametrize("key", ["modelEma", "moving_average"])
def test_averages_under_keys_of_other_spellings(tmp_path, key):
    for step in (1, 2):
        put(tmp_path / f"{step}.pt", 50, **{key: {"w": torch.full((2,), float(step))}})
    polyak.average_checkpoints(tmp_path, tmp_path / "out.npz")
    assert checkpoints.open(tmp_path / "out.npz").read("w")[0] == 1.5


def test_the_order_in_which_a_shell_gives_numbers_that_are_no_steps_is_none(tmp_path):
    paths = [tmp_path / f"tokens_{name}.pt" for name in ("10B", "4B")]
    for value, path in enumerate(paths):
        put(path, value)
    polyak.average_checkpoints(paths, tmp_path / "mean.npz")
    with pytest.raises(OptionError, match=r"no step is known for .* in no order of training"):
        polyak.average_checkpoints(paths, tmp_path / "tail.npz", profile="tail:0.5")
    report = polyak.average_checkpoints(reversed(paths), tmp_path / "tail.npz", profile="tail:0.5")
    assert report.coefficients == (0, 1)


@pytest.mark.parametrize(
    "names",
    [
        ("ckpt_500M.pt", "ckpt_1B.pt", "ckpt_1500M.pt"),
        ("1B/model.pt", "2B/model.pt"),
        ("2026-03-01.pt", "2026-03-02.pt"),
    ],
)
def test_the_best_beside_counts_in_billions_or_dates_is_no_part_of_them(tmp_path, names):
    for value, name in enumerate(names):
        put(tmp_path / "run" / name, value)
    put(tmp_path / "run" / "best.pt", 9)
    reading = read_inputs(tmp_path / "run").required()
    assert [item.opened.read("w")[0].item() for item in reading.taken] == list(range(len(names)))
    assert reading.left_out == "left out: 'best.pt' (no part of the numbered series)"
    paths = [tmp_path / "run" / name for name in (*names, "best.pt")]
    assert "'best.pt'; name the folder" in str(read_inputs(paths).refusal)


@pytest.mark.parametrize(
    "name", ["fold_{}/final.pth", "seed{}/model.pt", "model_seed{}.pt", "Trial-{}/weights.pt"]
)
def test_runs_that_began_apart_are_said_to_be_so_by_every_command(tmp_path, capsys, name):
    paths = [tmp_path / "runs" / name.format(number) for number in (0, 1)]
    for path in paths:
        put(path, 1)
    with pytest.warns(UserWarning, match="by their names these are runs of their own"):
        polyak.average_checkpoints(paths, tmp_path / "out.npz")
    with pytest.warns(UserWarning, match="by their names these are runs of their own"):
        polyak.Trajectory.from_checkpoints(paths)
    assert main(["average", *map(str, paths), "-o", str(tmp_path / "out.pt")]) == 0
    assert main(["inspect", str(tmp_path / "runs")]) == 0
    assert capsys.readouterr().out.count("trained apart") == 2


@pytest.mark.parametrize("name", ["seed1/step_{}.pt", "step_{}_seed1.pt", "unfold_{}.pt", "run_{}.pt"])
def test_a_run_is_not_taken_for_several(tmp_path, name):
    paths = [tmp_path / name.format(number) for number in (0, 1)]
    for value, path in enumerate(paths):
        put(path, value)
    polyak.average_checkpoints(paths, tmp_path / "out.npz")  # warnings are errors


@pytest.mark.skipif(os.getuid() == 0, reason="the administrator reads everything")
def test_a_folder_that_cannot_be_read_is_named(tmp_path):
    run_of(tmp_path, "step_{}.pt")
    (tmp_path / "closed").mkdir(mode=0)
    assert str(read_inputs(tmp_path).refusal) == f"cannot read {tmp_path / 'closed'}: Permission denied"


def test_runs_of_one_step_each_are_said_to_be_two(tmp_path):
    paths = [tmp_path / f"trial-{number}" / "step_5.pt" for number in (0, 1)]
    for path in paths:
        put(path, 1)
    unordered = read_inputs(paths).unordered
    assert "trial-0/step_5.pt and trial-1/step_5.pt are both of step 5, as of two runs" in str(unordered)


@pytest.mark.parametrize("name", ["run{}_step{}.pt", "{}/step_{}.pt"])
def test_files_of_two_runs_that_were_named_one_by_one_are_averaged_and_said_to_be_of_two(tmp_path, name):
    paths = [tmp_path / name.format(run, step) for run in (1, 2) for step in (5, 6)]
    for value, path in enumerate(paths):
        put(path, value)
    with pytest.warns(
        UserWarning, match="are both of step 5, as of two runs: the average of networks that were"
    ):
        polyak.average_checkpoints(paths, tmp_path / "out.npz")
    assert checkpoints.open(tmp_path / "out.npz").read("w")[0] == 1.5
    polyak.average_checkpoints(paths, tmp_path / "weighted.npz", weights=[1, 1, 1, 1])  # warnings are errors


def test_steps_that_were_given_are_of_one_run(tmp_path):
    paths = [tmp_path / f"trial-{run}" / f"step_{step}.pt" for run in (0, 1) for step in (5, 6)]
    for path in paths:
        put(path, 1)
    assert "as of two runs" in str(read_inputs(paths).refusal or read_inputs(paths).unordered)
    reading = read_inputs(paths, steps=[10, 30, 20, 40]).required()
    assert reading.steps == [10, 20, 30, 40] and reading.unordered is None


def test_live_weights_are_not_mixed_with_averages_of_other_files_unless_all_count(tmp_path):
    put(tmp_path / "step_1.pt", 1)
    put(tmp_path / "step_2.pt", 2, ema={"w": torch.ones(2)})
    paths = [tmp_path / "step_1.pt", tmp_path / "step_2.pt"]
    refusal = str(read_inputs(paths).refusal)
    assert "step_1.pt' hold live weights only ('model'), and 'step_2.pt' averaged ones ('ema')" in refusal
    assert read_inputs(paths, all_count=True).refusal is None


def test_of_one_saved_step_one_file_counts(tmp_path):
    for name, step in (("a", 1), ("b", 2), ("c", 2)):
        put(tmp_path / f"{name}.pt", step, global_step=step)
    reading = read_inputs(tmp_path).required()
    assert reading.steps == [1, 2] and "'c.pt' (the same weights as b.pt)" in reading.left_out
    put(tmp_path / "c.pt", 3, global_step=2)
    assert "b.pt and c.pt are both of step 2, and hold different weights" in str(
        read_inputs(tmp_path).refusal
    )


def test_only_numbered_folders_below_a_model_are_checkpoints_of_its_run(tmp_path):
    for folder in (tmp_path, tmp_path / "before"):
        put_hf(folder, "model.safetensors", torch.ones(2))
    put(tmp_path / "step_5.pt", 5)
    assert [item.path for item in read_inputs(tmp_path).required().taken] == [tmp_path]
    for step in (1, 2):
        put_hf(tmp_path / f"checkpoint-{step}", "model.safetensors", torch.ones(2))
    taken = read_inputs(tmp_path).required().taken
    assert [item.name for item in taken] == ["checkpoint-1", "checkpoint-2"]


def test_averages_beside_live_weights_are_named_by_a_pattern_and_completed(tmp_path):
    for step in (1, 2):
        folder = tmp_path / f"checkpoint-{step}"
        put_hf(folder, "model.safetensors", torch.full((2,), float(step)))
        torch.save({"average": {"w": torch.ones(2)}}, folder / "polyak-ema.pt")
        torch.save({"average": {"other": torch.ones(2)}}, folder / "polyak-swa.pt")
    reading = read_inputs(tmp_path).required()
    assert [item.opened.read("w")[0].item() for item in reading.taken] == [1, 2]
    assert f"name '{tmp_path}/checkpoint-*/polyak-ema.pt' to take these" in reading.left_out
    one = read_inputs(tmp_path / "checkpoint-1").required()
    assert [item.name for item in one.taken] == [
        "checkpoint-1"
    ] and "checkpoint-1/polyak-ema.pt'" in one.left_out


def test_what_is_called_an_average_beside_live_weights_is_one_where_it_fits(tmp_path):
    folder = tmp_path / "checkpoint-1"
    put_hf(folder, "model.safetensors", torch.ones(2))
    for name, size in (("ema_model.pt", 2), ("ema_longer.pt", 3), ("ema_shorter.pt", 1)):
        torch.save({"w": torch.ones(size)}, folder / name)
    (folder / "ema_damaged.pt").write_bytes(b"cut off")
    items = read_inputs(folder).required().items
    assert {item.name: item.why for item in items} == {
        "checkpoint-1": "",
        "checkpoint-1/ema_model.pt": f"averages beside live weights: name '{folder}/ema_model.pt' to take these",
    }


def test_averages_are_left_out_where_live_weights_are_beside_them(tmp_path):
    for name in ("polyak-1.pt", "polyak-2.pt"):
        torch.save({"average": {"w": torch.ones(2)}}, tmp_path / name)
    assert len(read_inputs(tmp_path).required().taken) == 2
    run_of(tmp_path, "step_{}.pt")
    reading = read_inputs(tmp_path).required()
    assert [item.name for item in reading.taken] == ["step_1.pt", "step_2.pt"]
    assert f"name '{tmp_path}/polyak-2.pt' to take these" in reading.left_out


def test_what_an_average_lacks_comes_from_the_weights_beside_it(tmp_path):
    average = tmp_path / "polyak-ema.pt"
    torch.save({"average": {"w": torch.full((2,), 9.0)}}, average)
    assert list(read_inputs(average).required().checkpoints[0].tensors) == ["w"]
    save_file({"w": torch.ones(2), "frozen": torch.full((1,), 5.0)}, tmp_path / "model.safetensors")
    (found,) = read_inputs(average).required().checkpoints
    assert {name: found.read(name)[0].item() for name in found.tensors} == {"w": 9, "frozen": 5}
