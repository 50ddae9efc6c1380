"""Outputs nested as an input is: what they keep, and that the tools load them."""

import argparse

import pytest
import torch

import polyak
from library_models import filled
from polyak import checkpoints
from polyak.errors import OptionError, StructureError


def nested(value, step):
    weights = {"w": torch.full((2,), value), "n": torch.tensor(3)}
    return {
        "arch": "resnet",
        "model": weights,
        "ema": {"w": torch.zeros(2), "n": torch.tensor(3)},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]},
        "lr_scheduler": {"last_epoch": 3},
        "step": step,
        "best_accuracy": 0.5,
        "hyper_parameters": {
            "width": 4,
            "epochs": 10,
            "betas": (0.9, 0.99),
            "steps": [1, 2],
            "init": torch.ones(1),
        },
        "meta": {"epoch": 3, "classes": ["cat", "dog"]},
    }


@pytest.fixture
def paths(tmp_path):
    for step, value in ((1, 1.0), (2, 4.0)):
        torch.save(nested(value, step), tmp_path / f"{step}.pt")
    return [tmp_path / "1.pt", tmp_path / "2.pt"]


@pytest.mark.parametrize("legacy", [False, True])
def test_settings_stay_and_state_goes(paths, tmp_path, legacy):
    if legacy:
        torch.save(torch.load(paths[1]), paths[1], _use_new_zipfile_serialization=False)
    report = polyak.average_checkpoints(paths, tmp_path / "average.pt", key="model", like=paths[1])
    written = torch.load(tmp_path / "average.pt")
    weights = written.pop("model")
    assert torch.all(weights["w"] == 2.5) and weights["n"] == 3
    settings = {"width": 4, "epochs": 10, "betas": (0.9, 0.99), "steps": [1, 2]}
    assert written == {"arch": "resnet", "hyper_parameters": settings, "meta": {"classes": ["cat", "dog"]}}
    assert report.notes[-1] == (
        "nested as 2.pt is: the weights under 'model', beside 'arch', 'hyper_parameters', 'meta'; left out: 'ema', "
        "'optimizer', 'lr_scheduler', 'step', 'best_accuracy', 'hyper_parameters.init', 'meta.epoch'"
    )
    with checkpoints.open(tmp_path / "average.pt") as opened:
        assert opened.key == "model" and opened.step is None
        assert "inputs" in opened.metadata["polyak"]


def test_wrappers_names_come_back_under_a_deep_key(tmp_path):
    state = {"train": {"state": {"state_dict": {"module.w": torch.ones(2)}, "seed": 1}}}
    torch.save(state, tmp_path / "a.pt")
    polyak.average_checkpoints([tmp_path / "a.pt"], tmp_path / "average.pt", like=tmp_path / "a.pt")
    written = torch.load(tmp_path / "average.pt")
    assert written["train"]["state"]["seed"] == 1
    assert list(written["train"]["state"]["state_dict"]) == ["module.w"]


def test_tied_weights_stay_tied(tmp_path):
    weight = torch.ones(2)
    torch.save({"model": {"a": weight, "b": weight}}, tmp_path / "a.pt")
    polyak.average_checkpoints([tmp_path / "a.pt"], tmp_path / "average.pt", like=tmp_path / "a.pt")
    with checkpoints.open(tmp_path / "average.pt") as opened:
        assert opened.ties == {"b": "a"}


def test_what_holds_code_is_left_out(tmp_path):
    with torch.serialization.safe_globals([argparse.Namespace]):
        torch.save({"model": {"w": torch.ones(2)}, "args": argparse.Namespace(lr=0.1)}, tmp_path / "a.pt")
        report = polyak.average_checkpoints([tmp_path / "a.pt"], tmp_path / "b.pt", like=tmp_path / "a.pt")
    assert list(torch.load(tmp_path / "b.pt")) == ["model"]
    assert report.notes[-1].endswith("left out: 'args'")


@pytest.mark.parametrize("name", ["images", "views"])  # before and behind that of the weights
def test_a_dict_of_which_nothing_is_kept_is_left_out(tmp_path, name):
    path = tmp_path / "a.pt"
    torch.save({"model": {"w": torch.ones(2)}, name: {"first": torch.ones(1)}}, path)
    report = polyak.average_checkpoints(path, tmp_path / "b.pt", key="model", like=path)
    assert list(torch.load(tmp_path / "b.pt")) == ["model"]
    assert report.notes[-1].endswith(f"left out: '{name}'")


def test_weights_in_dicts_of_dicts_stay_there(tmp_path):
    # As Megatron's classic models do, below module. where they are wrapped.
    for step, value in ((1, 1.0), (2, 4.0)):
        embedding = {"word_embeddings": {"weight": torch.full((2,), value)}, "scale": 0.5}
        layers = {"layers.0.weight": torch.full((2,), 2 * value)}
        model = {"language_model": {"embedding": embedding, "encoder": layers}, "head": {}}
        torch.save({"model": model, "iteration": step, "args": {"layers": 1}}, tmp_path / f"{step}.pt")
    like = tmp_path / "2.pt"
    report = polyak.average_checkpoints([tmp_path / "1.pt", like], tmp_path / "out.pt", like=like)
    tree = torch.load(tmp_path / "out.pt")
    language = tree["model"]["language_model"]
    assert list(tree) == ["args", "model"] and list(tree["model"]) == ["language_model"]
    assert language["embedding"]["word_embeddings"]["weight"].tolist() == [2.5, 2.5]
    assert list(language["embedding"]) == ["word_embeddings"]
    assert language["encoder"]["layers.0.weight"].tolist() == [5.0, 5.0]
    assert "'model.head', 'model.language_model.embedding.scale'" in report.notes[-1]


def test_what_cannot_be_nested_is_refused_before_anything_is_written(paths, tmp_path):
    checkpoints.write(tmp_path / "flat.pt", {"w": torch.ones(2)})
    checkpoints.write(tmp_path / "flat.safetensors", {"w": torch.ones(2)})
    torch.save({"model": {"v": torch.ones(2)}}, tmp_path / "other.pt")
    torch.save({"model": {"w": torch.ones(2), "b": {"v": torch.ones(2)}}}, tmp_path / "more.pt")
    flat = [tmp_path / "flat.pt"]
    for inputs, output, like, error, message in (
        (
            paths,
            "out.safetensors",
            paths[0],
            OptionError,
            r"nested like .*: name a torch file, such as out\.pt",
        ),
        (paths, "out", paths[0], OptionError, "cannot be nested like"),
        (flat, "out.pt", flat[0], OptionError, "no weights under a key, .*: leave out like"),
        (flat, "out.pt", tmp_path / "flat.safetensors", OptionError, "is no torch file, .* leave out like"),
        (flat, "out.pt", tmp_path / "other.pt", StructureError, r"it lacks 'w' and has 'v'\. Name"),
        (flat, "out.pt", tmp_path / "more.pt", StructureError, r"averaged: it has 'b\.v'\. Name"),
    ):
        with pytest.raises(error, match=message):
            polyak.average_checkpoints(inputs, tmp_path / output, like=like)
        assert not (tmp_path / output).exists()


@pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")
@pytest.mark.filterwarnings("ignore:.*(TensorBoard|LeafSpec|tree_|num_workers)")
def test_lightning_loads_an_average_like_its_checkpoint(tmp_path):
    import lightning

    class Net(lightning.LightningModule):
        def __init__(self, width, names=("a",)):
            super().__init__()
            self.save_hyperparameters()
            self.layer = torch.nn.Linear(width, 1)

        def training_step(self, batch, _):
            return self.layer(batch).mean()

        def configure_optimizers(self):
            optimizer = torch.optim.Adam(self.parameters())
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    trainer = lightning.Trainer(
        max_steps=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        default_root_dir=tmp_path,
    )
    model = Net(3)
    trainer.fit(model, torch.utils.data.DataLoader([torch.ones(3)] * 2))
    for name, value in (("a", 1.0), ("b", 4.0)):
        filled(model, value)
        trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
    paths = [tmp_path / "a.ckpt", tmp_path / "b.ckpt"]
    report = polyak.average_checkpoints(paths, tmp_path / "average.ckpt", like=paths[0])
    loaded = Net.load_from_checkpoint(tmp_path / "average.ckpt")
    assert all(torch.all(parameter == 2.5) for parameter in loaded.parameters())
    assert loaded.hparams == model.hparams
    left_out = report.notes[-1].partition("left out: ")[2]
    assert all(
        f"'{name}'" in left_out for name in ("epoch", "global_step", "optimizer_states", "callbacks", "loops")
    )
