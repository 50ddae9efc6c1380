"""Hugging Face folders: shards, indices that lie, and folders that are none."""

import json

import pytest
import torch

from library_models import tiny_gpt2, tiny_unet
from polyak import checkpoints
from polyak.errors import CheckpointError

TENSORS = {f"layer.{number}": torch.full((10,), float(number)) for number in range(6)}


@pytest.fixture(params=["huggingface", "huggingface-bin"])
def folder(request, tmp_path, monkeypatch):
    monkeypatch.setattr("polyak.checkpoints._huggingface.MAX_SHARD_BYTES", 90)
    path = tmp_path / "model"
    checkpoints.write(path, TENSORS | {"tied": TENSORS["layer.3"]}, format=request.param)
    return path


def change_index(folder, change):
    (index,) = folder.glob("*.index.json")
    content = json.loads(index.read_text())
    change(content)
    index.write_text(json.dumps(content))


def test_shards(folder):
    files = sorted(item.name for item in folder.iterdir())
    assert len(files) == 4 and sum("-of-00003" in name for name in files) == 3
    (index,) = folder.glob("*.index.json")
    content = json.loads(index.read_text())
    assert content["metadata"]["total_size"] == 240
    assert content["weight_map"]["tied"] == content["weight_map"]["layer.3"]
    with checkpoints.open(folder) as opened:
        assert opened.ties == {"tied": "layer.3"}
        for name, tensor in TENSORS.items():
            assert torch.equal(opened.read(name), tensor)


def test_missing_shards_are_all_named(folder):
    first, second = sorted(folder.glob("*-of-*"))[:2]
    first.unlink()
    second.unlink()
    with pytest.raises(
        CheckpointError, match=f"lacks '{first.name}', '{second.name}': fetch the shards again"
    ):
        checkpoints.open(folder)


def test_names_that_no_shard_holds(folder):
    change_index(folder, lambda content: content["weight_map"].update(ghost=content["weight_map"]["layer.0"]))
    with pytest.raises(CheckpointError, match="promises tensors that its shards do not hold: 'ghost'"):
        checkpoints.open(folder)


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "sub/model.bin", 3, None])
def test_indices_that_point_elsewhere(folder, shard):
    change_index(folder, lambda content: content["weight_map"].update({"layer.0": shard}))
    with pytest.raises(CheckpointError, match="weight_map must give the file name"):
        checkpoints.open(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', "[" * 100_000])
def test_damaged_indices(folder, text):
    (index,) = folder.glob("*.index.json")
    index.write_text(text)
    with pytest.raises(CheckpointError, match="is damaged: its weight_map"):
        checkpoints.open(folder)


def test_folders_that_are_none(tmp_path):
    with pytest.raises(CheckpointError, match="folder with no checkpoint .it is empty."):
        checkpoints.open(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        CheckpointError, match=r"no checkpoint .it holds 'config\.json'.: expected .*model\.safetensors"
    ):
        checkpoints.open(tmp_path)


@pytest.mark.parametrize("text", ['{"global_step": "many"}', '{"global_step": Infinity}', "[]", "{"])
def test_a_damaged_trainer_state_is_no_obstacle(tmp_path, text):
    checkpoints.write(tmp_path / "model", TENSORS)
    (tmp_path / "model" / "trainer_state.json").write_text(text)
    with checkpoints.open(tmp_path / "model") as opened:
        assert opened.step is None


def test_diffusers_and_single_bin_folders(tmp_path):
    from safetensors.torch import save_file

    save_file(TENSORS, tmp_path / "diffusion_pytorch_model.safetensors")
    torch.save({"w": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with checkpoints.open(tmp_path) as opened:
        assert opened.format == "huggingface"
        assert set(opened.tensors) == set(TENSORS)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    with checkpoints.open(tmp_path) as opened:
        assert opened.format == "huggingface-bin"
        assert set(opened.tensors) == {"w"}


def resaved(save, folder, max_shard_size, stem):
    """Save in one layout, and put the files of another model of another layout beside it, as older versions did."""
    other = folder.with_name("other")
    save(1.0).save_pretrained(other, max_shard_size=max_shard_size)
    save(5.0).save_pretrained(folder)
    assert len(list(other.glob(f"{stem}-*.safetensors"))) > 1 and (folder / f"{stem}.safetensors").is_file()
    for file in other.glob(f"{stem}*"):
        file.rename(folder / file.name)


def test_an_index_beside_a_whole_file_is_read_as_transformers_does(tmp_path):
    from transformers import GPT2Model

    resaved(tiny_gpt2, tmp_path / "model", 500, "model")
    loaded = GPT2Model.from_pretrained(tmp_path / "model")
    with checkpoints.open(tmp_path / "model") as opened:
        values = opened.read(next(iter(opened.tensors)))
    assert torch.all(values == 5) and torch.all(loaded.wte.weight == 5)


def test_an_index_beside_a_whole_file_is_read_as_diffusers_does(tmp_path):
    from diffusers import UNet2DModel

    resaved(tiny_unet, tmp_path / "model", 500, "diffusion_pytorch_model")
    loaded = UNet2DModel.from_pretrained(tmp_path / "model")
    with checkpoints.open(tmp_path / "model") as opened:
        values = opened.read("conv_in.weight")
    assert torch.all(values == loaded.conv_in.weight) and torch.all(values == 1)
