"""``average_checkpoints``: what is written, and what is refused before anything is touched."""

import hashlib
import json

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open

import polyak
from combine_inputs import random, same_bits, saved
from polyak import checkpoints
from polyak.combine._offline import process_group
from polyak.errors import CheckpointError, OptionError, OutputExistsError, PolyakError, StructureError


def models(n=3):
    made = [{"w": random(torch.bfloat16, seed), "n": torch.tensor(7)} for seed in range(n)]
    for model in made:
        model["tied"] = model["w"]
    return made


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".npz", ""])
def test_every_output_format(tmp_path, suffix):
    saved(tmp_path, models())
    report = polyak.average_checkpoints(tmp_path, tmp_path / f"average{suffix}", dtype="fp32")
    expected = sum(model["w"].double() for model in models()) / 3
    with checkpoints.open(tmp_path / f"average{suffix}") as average:
        torch.testing.assert_close(average.read("w").double(), expected, rtol=0, atol=1e-6)
        assert average.tensors["w"].dtype == torch.float32 and average.read("n") == 7
        assert average.ties == {"tied": "w"}
    assert (report.averaged, report.copied, report.differing) == (("w",), ("n",), ())
    assert report.bytes_read == 3 * (2 * 2100 + 8) and report.bytes_written == 4 * 2100 + 8


def test_mixed_formats_and_nested_keys(tmp_path):
    (model,) = models(1)
    torch.save({"state_dict": model, "ema": {"w": model["w"]}, "epoch": 3}, tmp_path / "a.pt")
    checkpoints.write(tmp_path / "b.safetensors", model)
    paths = [tmp_path / "a.pt", tmp_path / "b.safetensors"]
    report = polyak.average_checkpoints(paths[:1], tmp_path / "c.pt", key="state_dict")
    assert report.ignored == ("ema", "epoch") and "also present: 'ema'" in report.notes[0]
    polyak.average_checkpoints([tmp_path / "c.pt", paths[1]], tmp_path / "d.pt")
    assert same_bits(torch.load(tmp_path / "d.pt")["w"], model["w"])


def test_weights_follow_the_given_order_and_profiles_the_steps(tmp_path):
    saved(tmp_path, [{"w": torch.tensor([float(value)])} for value in (1, 2, 4)])
    backwards = [tmp_path / f"step{step}.pt" for step in (3, 2, 1)]
    weighted = polyak.average_checkpoints(backwards, tmp_path / "a.pt", weights=[1, 0, 1])
    assert weighted.coefficients == (0.5, 0, 0.5) and weighted.steps == (3, 2, 1)
    weighted = polyak.average_checkpoints(backwards, tmp_path / "b.pt", weights=[3, 1, 0])
    assert torch.load(tmp_path / "b.pt")["w"].item() == 3.5
    tail = polyak.average_checkpoints(backwards, tmp_path / "c.pt", profile=polyak.Tail(steps=1))
    assert tail.inputs == ("step1.pt", "step2.pt", "step3.pt") and tail.coefficients == (0, 0, 1)
    assert torch.load(tmp_path / "c.pt")["w"].item() == 4


def test_negative_weights_extrapolate(tmp_path):
    saved(tmp_path, [{"w": torch.tensor([1.0])}, {"w": torch.tensor([2.0])}])
    polyak.average_checkpoints(tmp_path, tmp_path / "out.pt", weights=[-1, 2])
    assert torch.load(tmp_path / "out.pt")["w"].item() == 3


def test_provenance(tmp_path):
    saved(tmp_path, models(2))
    output = tmp_path / "average.safetensors"
    polyak.average_checkpoints(tmp_path, output, profile="tail:0.5", hashes=True)
    with safe_open(output, "pt") as opened:
        record = json.loads(opened.metadata()["polyak"])
    assert record == {
        "version": polyak.__version__,
        "inputs": ["step1.pt", "step2.pt"],
        "coefficients": [0.0, 1.0],
        "profile": "tail:0.5",
        "steps": [1, 2],
        "sha256": {
            name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
            for name in ("step1.pt", "step2.pt")
        },
    }
    assert str(tmp_path) not in output.read_bytes().decode("latin-1")


def test_metadata_that_all_inputs_share_is_kept(tmp_path):
    for step in (1, 2):
        metadata = {"architecture": "mlp", "step": str(step), "polyak": "an average of averages"}
        checkpoints.write(tmp_path / f"{step}.safetensors", {"w": torch.ones(1)}, metadata=metadata)
    polyak.average_checkpoints(tmp_path, tmp_path / "average.safetensors")
    metadata = checkpoints.open(tmp_path / "average.safetensors").metadata
    assert metadata["architecture"] == "mlp" and "step" not in metadata and metadata["polyak"].startswith("{")


def test_inputs_of_one_name_are_told_apart(tmp_path):
    for step in (1, 2):
        checkpoints.write(tmp_path / f"checkpoint-{step}", {"w": torch.ones(1)})
    files = [tmp_path / f"checkpoint-{step}" / "model.safetensors" for step in (1, 2)]
    report = polyak.average_checkpoints(files, tmp_path / "average.pt", hashes=True)
    assert report.inputs == ("checkpoint-1/model.safetensors", "checkpoint-2/model.safetensors")
    assert report.steps == (1, 2)


def test_integers_that_differ_are_warned_about(tmp_path):
    saved(tmp_path, [{"w": torch.ones(1), "n": torch.tensor(step)} for step in (1, 2)])
    with pytest.warns(UserWarning, match="the inputs differ in 'n'"):
        polyak.average_checkpoints(tmp_path, tmp_path / "average.pt")
    assert torch.load(tmp_path / "average.pt")["n"] == 2


def test_all_differences_are_named_at_once(tmp_path):
    first = {"a": torch.ones(2), "b": torch.ones(2), "c": torch.ones(2), "d": torch.ones(1)}
    second = {"b": torch.ones(3), "c": torch.ones(2).int(), "d": torch.ones(1), "e": torch.ones(1)}
    third = {**first, "f": torch.ones(1)}
    saved(tmp_path, [first, second, third])
    with pytest.raises(StructureError) as caught:
        polyak.average_checkpoints(tmp_path, tmp_path / "average.pt")
    for part in (
        "step2.pt lacks 'a'",
        "has 'e' besides",
        "has 'b' as (3,) torch.float32, not (2,) torch.float32",
        "'c' as (2,) torch.int32, not (2,) torch.float32",
        "step3.pt has 'f' besides",
    ):
        assert part in str(caught.value)
    assert not (tmp_path / "average.pt").exists()


REFUSED = {
    "weights and profile": (OptionError, {"weights": [1, 1], "profile": "uniform"}),
    "another number of weights": (OptionError, {"weights": [1, 2, 3]}),
    "weights that sum to zero": (OptionError, {"weights": [1, -1]}),
    "no such profile": (OptionError, {"profile": "emma"}),
    "no such dtype": (OptionError, {"dtype": "int8"}),
    "no such key": (OptionError, {"key": "nope"}),
    "too little memory": (OptionError, {"max_memory": "1MB"}),
    "no size": (OptionError, {"max_memory": "lots"}),
    "dtype that the format lacks": (
        StructureError,
        {"output": "average.safetensors", "dtype": "float4_e2m1fn_x2"},
    ),
    "no known suffix": (OptionError, {"output": "average.onnx"}),
    "no folder": (CheckpointError, {"output": "nowhere/average.pt"}),
    "existing output": (OutputExistsError, {"output": "there.pt"}),
    "output is an input": (OptionError, {"output": "run/step1.pt", "overwrite": True}),
    "output is an input by another name": (OptionError, {"output": "link.pt", "overwrite": True}),
    "output holds the inputs": (OptionError, {"output": "run", "overwrite": True}),
}


@pytest.mark.parametrize(("error", "options"), REFUSED.values(), ids=REFUSED)
def test_refused_before_anything_is_touched(tmp_path, error, options):
    (tmp_path / "run").mkdir()
    saved(tmp_path / "run", models(2))
    (tmp_path / "there.pt").write_bytes(b"mine")
    (tmp_path / "link.pt").symlink_to(tmp_path / "run" / "step2.pt")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    output = tmp_path / options.get("output", "average.pt")
    rest = {name: value for name, value in options.items() if name != "output"}
    with pytest.raises(error) as caught:
        polyak.average_checkpoints(tmp_path / "run", output, **rest)
    assert isinstance(caught.value, PolyakError)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_overwrite(tmp_path):
    (tmp_path / "run").mkdir()
    saved(tmp_path / "run", models(2))
    (tmp_path / "average.pt").write_bytes(b"old")
    polyak.average_checkpoints(tmp_path / "run", tmp_path / "average.pt", overwrite=True)
    assert "w" in torch.load(tmp_path / "average.pt")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_an_input_cut_short_while_it_is_read(tmp_path, suffix):
    inputs = saved(tmp_path, [{"w": torch.ones(3_000_000)}] * 2, suffix)
    size = inputs[1].path.stat().st_size

    def cut(done, total):
        with inputs[1].path.open("r+b") as file:
            file.truncate(size // 2)

    with pytest.raises(CheckpointError, match="step2"):
        polyak.average_checkpoints(tmp_path, tmp_path / f"average{suffix}", progress=cut)
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["step1", "step2"]


def test_an_output_in_float64_is_summed_in_it(tmp_path):
    values = [torch.tensor([1.0, 1e-4]) / (k + 1) for k in range(7)]
    for k, value in enumerate(values):
        checkpoints.write(tmp_path / f"{k}.safetensors", {"w": value})
    inputs = sorted(tmp_path.glob("*.safetensors"))
    polyak.average_checkpoints(inputs, tmp_path / "out.pt", dtype="fp64")
    expected = torch.stack(values).double().mean(0)
    torch.testing.assert_close(checkpoints.open(tmp_path / "out.pt").read("w"), expected, rtol=1e-14, atol=0)


def test_the_group_of_processes_is_as_long_as_its_block(monkeypatch):
    for name, value in (
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", "0"),
        ("RANK", "0"),
        ("WORLD_SIZE", "1"),
    ):
        monkeypatch.setenv(name, value)
    with process_group():
        assert dist.get_backend() == "gloo" and dist.get_world_size() == 1
    assert not dist.is_initialized()


def test_arguments_of_other_types_are_refused(tmp_path):
    with pytest.raises(OptionError, match="key must be of type"):
        polyak.average_checkpoints(tmp_path, tmp_path / "out", key=3)  # type: ignore[arg-type]
