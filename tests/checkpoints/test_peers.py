"""Checkpoints written by the tools people use are recognised, and the right weights come out of them."""

import logging
import os
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

import polyak
from peers import timm_model_ema
from polyak import checkpoints
from polyak.errors import CheckpointError, OptionError


def small_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))


def moved(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    return model


def assert_holds(checkpoint, state):
    assert list(checkpoint.tensors) == list(state)
    for name, tensor in state.items():
        assert torch.equal(checkpoint.read(name), tensor), name


def test_torch_averaged_model(tmp_path):
    model = small_model()
    averaged = AveragedModel(model)
    averaged.update_parameters(moved(model))
    torch.save(averaged.state_dict(), tmp_path / "swa.pt")
    with checkpoints.open(tmp_path / "swa.pt") as opened:
        assert_holds(opened, averaged.module.state_dict())
        assert opened.ignored == ("n_averaged",)
        assert opened.note == "the prefix 'module.' was left out of the names"


def test_training_script_with_optimizer(tmp_path):
    model = small_model()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    saved = {
        "epoch": 3,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "args": {"lr": 0.1},
    }
    torch.save(saved, tmp_path / "last.pth")
    with checkpoints.open(tmp_path / "last.pth") as opened:
        assert_holds(opened, model.state_dict())
        assert (opened.key, opened.step, opened.ignored) == ("model", 3, ("epoch", "optimizer", "args"))
        assert opened.note == "weights found under 'model'"


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, partial(torch.compile, backend="eager")])
def test_wrapped_models(tmp_path, wrap):
    model = small_model()
    torch.save({"state_dict": wrap(model).state_dict()}, tmp_path / "wrapped.pt")
    with checkpoints.open(tmp_path / "wrapped.pt") as opened:
        assert_holds(opened, model.state_dict())


def test_timm_model_ema(tmp_path):
    model = small_model()
    ema = timm_model_ema().ModelEmaV3(model, decay=0.5)
    ema.update(moved(model))
    saved = {"epoch": 7, "arch": "mlp", "state_dict": model.state_dict(), "state_dict_ema": ema.state_dict()}
    torch.save(saved, tmp_path / "model_best.pth.tar")
    with checkpoints.open(tmp_path / "model_best.pth.tar") as opened:
        assert_holds(opened, ema.module.state_dict())
        assert opened.note.startswith("weights found under 'state_dict_ema'; also present: 'state_dict'")
        assert (opened.step, opened.metadata["arch"]) == (7, "mlp")
    with checkpoints.open(tmp_path / "model_best.pth.tar", key="state_dict") as opened:
        assert_holds(opened, model.state_dict())
    with pytest.raises(
        OptionError, match="no weights under 'ema': choose from 'state_dict_ema', 'state_dict'"
    ):
        checkpoints.open(tmp_path / "model_best.pth.tar", key="ema")


def test_diffusers_ema_model(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers.training_utils import EMAModel
    model = small_model()
    ema = EMAModel(model.parameters(), decay=0.5)
    ema.step(moved(model).parameters())
    torch.save(ema.state_dict(), tmp_path / "ema.pt")
    with checkpoints.open(tmp_path / "ema.pt") as opened:
        assert_holds(
            opened, {f"shadow_params.{index}": value for index, value in enumerate(ema.shadow_params)}
        )
        assert (opened.key, opened.step) == ("shadow_params", 1)
    torch.save({"model": model.state_dict(), "ema": ema.state_dict()}, tmp_path / "both.pt")
    with checkpoints.open(tmp_path / "both.pt") as opened:
        assert (opened.key, opened.found_keys) == ("ema.shadow_params", ("ema.shadow_params", "model"))
        assert opened.step == 1


def test_diffusers_ema_model_has_the_numbers_of_a_scheme():
    """Beside the test above, as importing diffusers takes seconds; the other tools' are in test_peer_laws.py."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers.training_utils import EMAModel
    model = torch.nn.Linear(2, 3).double()
    ratio, power = polyak.WarmupEMA(decay=0.9), polyak.WarmupEMA(decay=0.9, power=0.75, inv_gamma=2)
    warm = {"use_ema_warmup": True, "inv_gamma": 2.0, "power": 0.75}
    cases = [
        (EMAModel(model.parameters(), decay=0.9), polyak.Average(model, ratio)),
        (EMAModel(model.parameters(), decay=0.9, **warm), polyak.Average(model, power)),
        (
            EMAModel(model.parameters(), decay=0.9, min_decay=0.5, **warm),
            polyak.Average(model, replace(power, min_decay=0.5)),
        ),
        (
            EMAModel(model.parameters(), update_after_step=20),
            polyak.Average(model, "warmup-ema:decay=0.9999", start=20),
        ),
    ]
    for _ in range(60):
        moved(model)
        for theirs, average in cases:
            theirs.step(model.parameters())
            average.update()
    for theirs, average in cases:
        for own, their in zip(average.named_tensors().values(), theirs.shadow_params, strict=True):
            torch.testing.assert_close(own, their, rtol=1e-12, atol=1e-12)


def test_lightning_weight_averaging(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        import lightning
        from lightning.pytorch.callbacks import WeightAveraging

        class Module(lightning.LightningModule):
            def __init__(self):
                super().__init__()
                self.net = torch.nn.Linear(3, 2)

            def training_step(self, batch, batch_idx):
                return self.net(batch[0]).pow(2).mean()

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), 0.1)

        data = torch.utils.data.TensorDataset(torch.randn(8, 3))
        trainer = lightning.Trainer(
            max_epochs=2,
            accelerator="cpu",
            callbacks=[WeightAveraging()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        module = Module()
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4))
        trainer.save_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    with checkpoints.open(tmp_path / "last.ckpt") as opened:
        assert opened.found_keys == ("state_dict", "current_model_state")
        assert_holds(opened, saved["state_dict"])
        assert opened.step == 4
    with checkpoints.open(tmp_path / "last.ckpt", key="current_model_state") as opened:
        assert_holds(opened, saved["current_model_state"])


@pytest.fixture(scope="module")
def gpt2():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
    transformers.utils.logging.disable_progress_bar()
    config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=50, n_positions=8)
    return transformers.GPT2LMHeadModel(config)


@pytest.mark.parametrize("max_shard_size", ["5GB", "5KB"])
def test_transformers_folder(tmp_path, gpt2, max_shard_size):
    gpt2.save_pretrained(tmp_path / "checkpoint-50", max_shard_size=max_shard_size)
    (tmp_path / "checkpoint-50" / "trainer_state.json").write_text('{"global_step": 50}')
    with checkpoints.open(tmp_path / "checkpoint-50") as opened:
        state = gpt2.state_dict()
        assert opened.format == "huggingface"
        assert opened.step == 50
        assert set(opened.tensors) == set(state) - {"lm_head.weight"}
        for name in opened.tensors:
            assert torch.equal(opened.read(name), state[name])


@pytest.mark.parametrize("format", ["huggingface", "huggingface-bin"])
def test_transformers_reads_what_is_written(tmp_path, gpt2, format, monkeypatch):
    monkeypatch.setattr("polyak.checkpoints._huggingface.MAX_SHARD_BYTES", 5_000)
    checkpoints.write(tmp_path / "model", gpt2.state_dict(), format=format)
    gpt2.config.save_pretrained(tmp_path / "model")
    assert len(list((tmp_path / "model").glob("*-of-*"))) > 2
    loaded = type(gpt2).from_pretrained(tmp_path / "model")
    for name, tensor in gpt2.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_safetensors_save_model_ties(tmp_path, gpt2):
    from safetensors.torch import load_model, save_model

    save_model(gpt2, str(tmp_path / "theirs.safetensors"))
    with checkpoints.open(tmp_path / "theirs.safetensors") as opened:
        assert set(opened.tensors) == set(gpt2.state_dict())
        assert opened.ties == {"transformer.wte.weight": "lm_head.weight"}
    checkpoints.write(tmp_path / "ours.safetensors", gpt2.state_dict())
    assert load_model(gpt2, str(tmp_path / "ours.safetensors")) == (set(), [])


def test_pickles_with_code_are_never_run(tmp_path):
    class Harmful:
        def __reduce__(self):
            return os.mkdir, (tmp_path / "harm was done",)

    torch.save({"state_dict": small_model().state_dict(), "note": Harmful()}, tmp_path / "bad.pt")
    with pytest.raises(
        CheckpointError, match=r"would need posix\.mkdir, and no code from a checkpoint is run"
    ):
        checkpoints.open(tmp_path / "bad.pt")
    torch.save(small_model(), tmp_path / "module.pt")
    with pytest.raises(CheckpointError, match=r"more than tensors: loading it would need torch\.nn"):
        checkpoints.open(tmp_path / "module.pt")
    assert not (tmp_path / "harm was done").exists()
