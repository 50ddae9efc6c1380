"""What comes out loads: folders by the library that wrote the inputs, with the files that it needs."""

import json
import os

import pytest
import torch

import polyak
from library_models import filled, tiny_gpt2, tiny_unet
from polyak import checkpoints
from polyak.errors import CheckpointError, OutputExistsError

VALUES = (1.0, 4.0)


@pytest.fixture
def folders(tmp_path):
    """Two checkpoints as transformers' Trainer leaves them, with a tokenizer."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a")))
    for step, value in enumerate(VALUES, 1):
        folder = tmp_path / f"checkpoint-{step}"
        tiny_gpt2(value).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        torch.save({"state": {}}, folder / "optimizer.pt")
        torch.save({}, folder / "training_args.bin")
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        (folder / "modeling_own.py").write_text("raise SystemExit")
    return [tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"]


def test_transformers_loads_model_and_tokenizer(folders, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    report = polyak.average_checkpoints(folders, tmp_path / "average")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "average")
    assert all(torch.all(parameter == 2.5) for parameter in model.parameters())
    assert model.lm_head.weight is model.transformer.wte.weight
    assert AutoTokenizer.from_pretrained(tmp_path / "average").encode("b") == [1]
    copied = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    own = ["model.safetensors", "polyak.json"]
    assert sorted(os.listdir(tmp_path / "average")) == sorted(copied + own)
    assert f"copied from checkpoint-1: {', '.join(map(repr, copied))}" in report.notes
    assert (
        "not copied from checkpoint-1: 'modeling_own.py', 'optimizer.pt', 'trainer_state.json', 'training_args.bin'"
        in report.notes
    )


def test_the_weights_files_named_one_by_one_make_the_same_folder(folders, tmp_path):
    files = [folder / "model.safetensors" for folder in folders]
    polyak.average_checkpoints(files, tmp_path / "of_files")
    polyak.average_checkpoints(folders, tmp_path / "of_folders")
    assert sorted(os.listdir(tmp_path / "of_files")) == sorted(os.listdir(tmp_path / "of_folders"))


def test_the_config_says_the_dtype_that_was_written(folders, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    before = json.loads((folders[0] / "config.json").read_text())
    polyak.average_checkpoints(folders, tmp_path / "average", dtype="bf16")
    after = json.loads((tmp_path / "average" / "config.json").read_text())
    assert {key for key in before if before[key] != after[key]} == {"dtype"}
    assert AutoConfig.from_pretrained(tmp_path / "average").dtype == torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "average", dtype="auto")
    assert model.dtype == torch.bfloat16 and torch.all(model.lm_head.weight == 2.5)


def test_configs_that_differ_are_said(folders, tmp_path):
    tiny_gpt2(4.0, layer_norm_epsilon=0.5).save_pretrained(folders[1])
    report = polyak.average_checkpoints(folders, tmp_path / "average")
    (note,) = [note for note in report.notes if "differ" in note]
    assert note.startswith("the inputs' config.json differ in 'layer_norm_epsilon': what checkpoint-1 says")


def test_diffusers_loads_a_folder_under_its_own_name(tmp_path):
    from diffusers import UNet2DModel

    for name, value in zip("ab", VALUES, strict=True):
        tiny_unet(value).save_pretrained(tmp_path / name)
    polyak.average_checkpoints([tmp_path / "a", tmp_path / "b"], tmp_path / "average")
    names = ["config.json", "diffusion_pytorch_model.safetensors", "polyak.json"]
    assert sorted(os.listdir(tmp_path / "average")) == names
    model = UNet2DModel.from_pretrained(tmp_path / "average")
    assert all(torch.all(parameter == 2.5) for parameter in model.parameters())


# PEFT asks transformers by a name that is to go.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_keeps_its_name_and_config(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    for name in "ab":
        adapted = get_peft_model(
            tiny_gpt2(1.0), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
        )
        filled(adapted, 3.0).save_pretrained(tmp_path / name)
    polyak.average_checkpoints([tmp_path / "a", tmp_path / "b"], tmp_path / "average")
    names = ["adapter_config.json", "adapter_model.safetensors", "polyak.json"]
    assert sorted(os.listdir(tmp_path / "average")) == names
    loaded = PeftModel.from_pretrained(tiny_gpt2(1.0), tmp_path / "average")
    layer = loaded.base_model.model.transformer.h[0].attn.c_attn
    # Both updates are s B A with B and A of threes, and so is their mean.
    assert torch.allclose(layer.get_delta_weight("default"), torch.tensor(layer.scaling["default"] * 2 * 9.0))


def test_torch_files_of_transformers_become_a_folder_that_it_loads(tmp_path):
    from transformers import GPT2LMHeadModel

    for name, value in zip("ab", VALUES, strict=True):
        model = tiny_gpt2(value)
        (tmp_path / name).mkdir()
        model.config.save_pretrained(tmp_path / name)
        torch.save(model.state_dict(), tmp_path / name / "pytorch_model.bin")
    polyak.average_checkpoints([tmp_path / "a", tmp_path / "b"], tmp_path / "average")
    assert (tmp_path / "average" / "model.safetensors").is_file()
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "average")
    assert all(torch.all(parameter == 2.5) for parameter in model.parameters())


def test_an_earlier_average_is_replaced_until_somebody_changes_it(folders, tmp_path):
    for _ in range(2):
        polyak.average_checkpoints(folders, tmp_path / "average", overwrite=True)
    (tmp_path / "average" / "config.json").write_text("{}")
    with pytest.raises(OutputExistsError, match="also holds 'config.json', which would be lost"):
        polyak.average_checkpoints(folders, tmp_path / "average", overwrite=True)
    assert (tmp_path / "average" / "config.json").read_text() == "{}"


def test_a_record_of_copies_that_is_none_protects_the_folder(folders, tmp_path):
    polyak.average_checkpoints(folders, tmp_path / "average")
    for text in ("[]", "{}", '{"copied": ["config.json"]}', "{"):
        (tmp_path / "average" / "polyak.json").write_text(text)
        with pytest.raises(OutputExistsError, match="also holds 'config.json', 'generation_config.json'"):
            polyak.average_checkpoints(folders, tmp_path / "average", overwrite=True)


def test_a_single_file_says_where_a_config_is_wanted(folders, tmp_path):
    report = polyak.average_checkpoints(folders, tmp_path / "average.safetensors")
    assert any("average.safetensors has no 'config.json' beside it" in note for note in report.notes)
    assert not (tmp_path / "config.json").exists()
    report = polyak.average_checkpoints(folders, tmp_path / "average.npz")
    assert not any("config.json" in note for note in report.notes)


def test_damaged_configs_are_refused_before_anything_is_written(folders, tmp_path):
    (folders[1] / "config.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"checkpoint-2/config\.json is damaged"):
        polyak.average_checkpoints(folders, tmp_path / "average")
    assert not (tmp_path / "average").exists()


def test_nothing_is_copied_where_no_config_says_what_the_folder_is(tmp_path):
    for name in "ab":
        checkpoints.write(tmp_path / name, {"w": torch.ones(2)})
        (tmp_path / name / "notes.txt").write_text("mine")
    report = polyak.average_checkpoints([tmp_path / "a", tmp_path / "b"], tmp_path / "average")
    assert os.listdir(tmp_path / "average") == ["model.safetensors"] and report.notes == ()


def test_only_small_files_of_the_first_folder_are_copied(tmp_path):
    for name in "ab":
        checkpoints.write(tmp_path / name, {"w": torch.ones(2)})
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "b" / "adapter_config.json").write_text("{}")
    with (tmp_path / "a" / "tokenizer.json").open("wb") as file:
        file.truncate(50_000_001)
    report = polyak.average_checkpoints([tmp_path / "a", tmp_path / "b"], tmp_path / "average")
    assert sorted(os.listdir(tmp_path / "average")) == ["config.json", "model.safetensors", "polyak.json"]
    assert report.notes == ("copied from a: 'config.json'", "not copied from a: 'tokenizer.json'")


def tied_model():
    model = torch.nn.Sequential(torch.nn.Embedding(4, 2), torch.nn.Linear(2, 4, bias=False))
    model[1].weight = model[0].weight
    return model


def test_tied_weights_load_as_the_readme_says(tmp_path):
    from safetensors.torch import load_file, load_model

    for name, value in zip("ab", VALUES, strict=True):
        torch.save(filled(tied_model(), value).state_dict(), tmp_path / f"{name}.pt")
    paths, output = [tmp_path / "a.pt", tmp_path / "b.pt"], tmp_path / "average.safetensors"
    report = polyak.average_checkpoints(paths, output)
    (note,) = report.notes
    assert note.startswith(
        "tied, and stored once: '1.weight = 0.weight'. Load with safetensors.torch.load_model("
    )
    assert set(load_file(output)) == {"0.weight"}
    model = tied_model()
    assert load_model(model, output) == (set(), [])
    assert torch.all(model[1].weight == 2.5) and model[1].weight is model[0].weight

    assert polyak.average_checkpoints(paths, tmp_path / "average.pt").notes == ()
    model = filled(tied_model(), 0)
    model.load_state_dict(torch.load(tmp_path / "average.pt"))
    assert torch.all(model[1].weight == 2.5)
