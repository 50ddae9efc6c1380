"""A run of three checkpoints as each training tool leaves it: those that the tool itself writes, where it is installed.

The tools train nothing here: before each checkpoint the weights are set to the values that show every mixture.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import polyak
from dialects import (
    HUNDREDS,
    NAMES,
    VALUES,
    Expectation,
    adam,
    averaged,
    dialect,
    fill,
    live,
    put,
    put_text,
    refused,
    weights,
)

BUFFERS = {"bn.running_mean": 50.0, "bn.running_var": 100.0, "bn.num_batches_tracked": 3.0}
FROZEN = {"frozen.weight": 7.0}
TRAINED = (*NAMES, "bn.weight", "bn.bias")


class Net(nn.Module):
    """A layer that is trained, BatchNorm with statistics of its own, and a frozen layer."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(2, 2)
        self.bn = nn.BatchNorm1d(2)
        self.frozen = nn.Linear(2, 1, bias=False).requires_grad_(False)
        self.frozen.weight.fill_(7)
        self.bn.running_mean.fill_(50)
        self.bn.running_var.fill_(100)

    def advance(self, epoch: int) -> None:
        """Become the model after an epoch, counted from 0."""
        fill(self, VALUES[epoch])
        self.bn.num_batches_tracked.fill_(epoch + 1)


def whole_model(kind: str, *names: str, prefix: str = "", **more) -> Expectation:
    """The trained parameters of one kind, with the statistics and the frozen layer of the newest model."""
    sign = -1 if kind == "averaged" else 1
    trained = dict.fromkeys(TRAINED, sign * VALUES[-1])
    tensors = {prefix + name: value for name, value in (trained | BUFFERS | FROZEN).items()}
    constant = tuple(prefix + name for name in BUFFERS | FROZEN)
    return Expectation(kind, names, tensors, constant=constant, **more)


# Lightning.


def lightning_run(folder: Path, *callbacks, on_epoch=lambda epoch: None) -> None:
    """Three epochs of one step, each saved by ModelCheckpoint, with the last once more."""
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def training_step(self, batch, index):
            return sum(parameter.sum() for parameter in self.parameters() if parameter.requires_grad)

        def on_before_zero_grad(self, optimizer):
            self.net.advance(self.current_epoch)

        def on_train_batch_end(self, *_):
            self.net.advance(self.current_epoch)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

        def train_dataloader(self):
            return torch.utils.data.DataLoader(torch.zeros(1, 2))

    class BeforeSaving(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            on_epoch(trainer.current_epoch)

    saving = ModelCheckpoint(
        folder, save_top_k=-1, save_last=True, every_n_epochs=1, save_on_train_epoch_end=True
    )
    options = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            accelerator="cpu", max_epochs=3, callbacks=[*callbacks, BeforeSaving(), saving],
            default_root_dir=folder, **options,
        )  # fmt: skip
        trainer.fit(Module())


LIGHTNING_NAMES = tuple(f"epoch={epoch}-step={epoch + 1}.ckpt" for epoch in range(3))


@dialect
def lightning(folder: Path) -> Expectation:
    """ModelCheckpoint with ``save_last=True``."""
    lightning_run(folder)
    return whole_model(
        "live", *LIGHTNING_NAMES, prefix="net.", steps=((1, 2, 3),), key="state_dict", left_out=("last.ckpt",)
    )


@dialect
def lightning_weight_averaging(folder: Path) -> Expectation:
    """Lightning's own callback, which puts the averaged model into ``state_dict``."""
    from lightning.pytorch.callbacks import WeightAveraging

    def negative(average, current, n_averaged):
        return -current

    class Negative(WeightAveraging):
        def on_train_epoch_end(self, trainer, pl_module):
            """The average of a model whose values are set is set likewise, buffers and frozen layers not."""
            net = self._average_model.module.net
            net.load_state_dict(pl_module.net.state_dict())
            fill(net, -VALUES[trainer.current_epoch])

    lightning_run(folder, Negative(avg_fn=negative))
    return lightning_average()


def lightning_average() -> Expectation:
    """The whole averaged model, which both callbacks put in the place of the live one."""
    return whole_model(
        "averaged",
        *LIGHTNING_NAMES,
        prefix="net.",
        steps=((1, 2, 3),),
        key="state_dict",
        left_out=("last.ckpt",),
    )


def set_average(average: polyak.Average, value: float) -> None:
    """Make what is averaged have one value; buffers and frozen layers stay those of the model."""
    tensors = average.named_tensors()
    for name in (name for name in tensors if name.endswith(TRAINED)):
        tensors[name].fill_(value)


@dialect
def polyak_lightning(folder: Path) -> Expectation:
    """polyak's callback, which does as Lightning's."""
    from polyak.integrations.lightning import Averaging

    averaging = Averaging("ema:half_life=3")
    lightning_run(folder, averaging, on_epoch=lambda epoch: set_average(averaging.average, -VALUES[epoch]))
    return lightning_average()


@dialect
def polyak_beside_the_model(folder: Path) -> Expectation:
    """A loop that saves ``average.state_dict()`` beside the model, as the page on training loops does."""
    model = Net()
    average = polyak.Average(model, polyak.EMA(half_life=3))
    for epoch, v in enumerate(VALUES):
        model.advance(epoch)
        average.update()
        set_average(average, -v)
        step = 100 * (epoch + 1)
        put(
            {"step": step, "model": model.state_dict(), "ema": average.state_dict()},
            folder / f"step-{step}.pt",
        )
    names = ("step-100.pt", "step-200.pt", "step-300.pt")
    return whole_model("averaged", *names, steps=((100, 200, 300),))


# Vision and image generation.


def timm_saver() -> type:
    """timm's CheckpointSaver, without the rest of timm, which needs torchvision."""
    spec = importlib.util.find_spec("timm")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("timm is not installed")
    file = Path(spec.submodule_search_locations[0]) / "utils" / "checkpoint_saver.py"
    package, helpers = types.ModuleType("timm_utils"), types.ModuleType("timm_utils.model")
    helpers.unwrap_model = lambda model: model
    helpers.get_state_dict = lambda model, unwrap: unwrap(model).state_dict()
    package.__path__ = []
    module_spec = importlib.util.spec_from_file_location("timm_utils.checkpoint_saver", file)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules.update({"timm_utils": package, "timm_utils.model": helpers})
    try:
        module_spec.loader.exec_module(module)
    finally:
        del sys.modules["timm_utils"], sys.modules["timm_utils.model"]
    return module.CheckpointSaver


@dialect
def timm(folder: Path) -> Expectation:
    """CheckpointSaver with the arguments of train.py: the last and the best are links."""
    model, ema = Net(), Net()
    args = argparse.Namespace(model="resnet18", lr=0.1, opt_betas=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    saver = timm_saver()(model, optimizer, args, model_ema=ema, checkpoint_dir=str(folder))
    for epoch, metric in enumerate((70.0, 72.0, 71.0)):
        model.advance(epoch)
        ema.advance(epoch)
        fill(ema, -VALUES[epoch])
        saver.save_checkpoint(epoch + 1, metric=metric)
    names = [f"checkpoint-{epoch}.pth.tar" for epoch in (1, 2, 3)]
    return whole_model(
        "averaged",
        *names,
        steps=((1, 2, 3),),
        key="state_dict_ema",
        left_out=("last.pth.tar", "model_best.pth.tar"),
    )


@dialect
def ema_pytorch(folder: Path) -> Expectation:
    """The Trainer of denoising-diffusion-pytorch: an EMA of ema-pytorch holds both models and two counters."""
    ema_pytorch = pytest.importorskip("ema_pytorch")
    model = nn.ModuleDict({"lin": nn.Linear(2, 2)})
    ema = ema_pytorch.EMA(model)
    for milestone, v in enumerate(VALUES, 1):
        fill(model, v)
        fill(ema.ema_model.requires_grad_(True), -v)
        ema.step.fill_(1000 * milestone)
        tree = {
            "step": 1000 * milestone,
            "model": model.state_dict(),
            "opt": adam(v),
            "ema": ema.state_dict(),
        }
        put(tree | {"scaler": None, "version": "2.2.5"}, folder / f"model-{milestone}.pt")
    names = ("model-1.pt", "model-2.pt", "model-3.pt")
    return averaged(*names, steps=((1, 2, 3), (1000, 2000, 3000)), key="ema")


@dialect
def f5_tts(folder: Path) -> Expectation:
    """A loop with an EMA of ema-pytorch that leaves the online model out; the last is there under two names."""
    ema_pytorch = pytest.importorskip("ema_pytorch")
    model = nn.ModuleDict({"lin": nn.Linear(2, 2)})
    ema = ema_pytorch.EMA(model, include_online_model=False)
    for step, v in HUNDREDS:
        fill(model, v)
        fill(ema.ema_model.requires_grad_(True), -v)
        ema.step.fill_(step)
        tree = {"model_state_dict": model.state_dict(), "optimizer_state_dict": adam(v)}
        rest = {"scheduler_state_dict": {"last_epoch": step}, "update": step}
        put(tree | {"ema_model_state_dict": ema.state_dict()} | rest, folder / f"model_{step}.pt")
    shutil.copy(folder / "model_300.pt", folder / "model_last.pt")
    names = ("model_100.pt", "model_200.pt", "model_300.pt")
    return averaged(*names, steps=((100, 200, 300),), key="ema_model_state_dict", left_out=("model_last.pt",))


def diffusers_model() -> nn.Module:
    """A model of diffusers, as small as can be."""
    from diffusers import ConfigMixin, ModelMixin
    from diffusers.configuration_utils import register_to_config

    class Tiny(ModelMixin, ConfigMixin):
        @register_to_config
        def __init__(self, width: int = 2):
            super().__init__()
            self.lin = nn.Linear(width, width)

    return Tiny()


@dialect
def diffusers_folders(folder: Path) -> Expectation:
    """The training scripts with ``--use_ema``: ``unet`` and ``unet_ema`` in each checkpoint, and the optimizer's."""
    pytest.importorskip("diffusers")
    from diffusers.training_utils import EMAModel

    model = diffusers_model()
    ema = EMAModel(model.parameters(), model_cls=type(model), model_config=model.config)
    for step, v in HUNDREDS:
        fill(model, v)
        ema.shadow_params = [torch.full_like(parameter, -v) for parameter in model.parameters()]
        checkpoint = folder / f"checkpoint-{step}"
        ema.save_pretrained(checkpoint / "unet_ema")
        model.save_pretrained(checkpoint / "unet")
        put(adam(v), checkpoint / "optimizer.bin")
        put({"last_epoch": step}, checkpoint / "scheduler.bin")
        put({"step": 0, "torch_manual_seed": torch.get_rng_state()}, checkpoint / "random_states_0.pkl")
    names = ("checkpoint-100", "checkpoint-200", "checkpoint-300")
    return averaged(*names, steps=((100, 200, 300),), words=("unet_ema",))


@dialect
def diffusers_state_dict(folder: Path) -> Expectation:
    """``EMAModel.state_dict()`` beside the model: a list of tensors without names, which only the model can place."""
    pytest.importorskip("diffusers")
    from diffusers.training_utils import EMAModel

    model = diffusers_model()
    ema = EMAModel(model.parameters())
    for step, v in HUNDREDS:
        fill(model, v)
        ema.shadow_params = [torch.full_like(parameter, -v) for parameter in model.parameters()]
        put({"step": step, "model": model.state_dict(), "ema": ema.state_dict()}, folder / f"step_{step}.pt")
    return refused("step_100.pt", "step_200.pt", "step_300.pt", words=("shadow_params",))


# Language models.


@dialect
def transformers_trainer(folder: Path) -> Expectation:
    """The Trainer's output folder: its checkpoints below the final model, with all that is resumed."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=1, n_head=1, n_embd=4, n_positions=8, vocab_size=6)
    model = transformers.GPT2LMHeadModel(config)

    class SetValues(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            fill(model, VALUES[state.global_step - 1])

    data = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 3
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=3, save_steps=1, per_device_train_batch_size=1, report_to=[], use_cpu=True,
        disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=[SetValues()])
        trainer.train()
        trainer.save_model()
    tensors = tuple(name for name in model.state_dict() if name != "lm_head.weight")
    names = ("checkpoint-1", "checkpoint-2", "checkpoint-3")
    return live(*names, tensors=tensors, steps=((1, 2, 3),), words=("checkpoint-",))


@dialect
def peft(folder: Path) -> Expectation:
    """Adapters of ``save_pretrained()``, in checkpoints as the Trainer names them."""
    peft = pytest.importorskip("peft")
    base = nn.Sequential(nn.Linear(4, 4))
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["0"])
    model = peft.get_peft_model(base, config)
    factors = dict(model.named_parameters())
    for step, v in HUNDREDS:
        for name, factor in factors.items():
            if "lora_" in name:
                factor.data.fill_(1 if "lora_A" in name else v)
        model.save_pretrained(str(folder / f"checkpoint-{step}"))
    names = ("checkpoint-100", "checkpoint-200", "checkpoint-300")
    # Of rank 2 and alpha 4, an entry of an update is 2 · 2 v.
    return Expectation("live", names, steps=((100, 200, 300),), update=4 * sum(VALUES) / 3)


@dialect
def accelerate(folder: Path) -> Expectation:
    """``save_state()`` with automatic names: model, optimizer and random states in a folder each."""
    accelerate = pytest.importorskip("accelerate")
    from accelerate.utils import ProjectConfiguration

    project = ProjectConfiguration(str(folder), automatic_checkpoint_naming=True, iteration=1)
    accelerator = accelerate.Accelerator(cpu=True, project_config=project)
    model = Net()
    model, _ = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    for epoch in range(3):
        accelerator.unwrap_model(model).advance(epoch)
        accelerator.save_state()
    names = ("checkpoint_1", "checkpoint_2", "checkpoint_3")
    return whole_model("live", *names, folder="checkpoints", steps=((1, 2, 3),))


def save_sharded(tree: dict[str, object], path: Path) -> None:
    from torch.distributed import checkpoint

    path.mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint.save(tree, checkpoint_id=str(path), no_dist=True)


@dialect
def torchtitan(folder: Path) -> Expectation:
    """A sharded checkpoint for each step: the model's names at the top, the optimizer and counters beside them."""
    for step, v in HUNDREDS:
        optimizer = {f"state.{name}.exp_avg": 100 * tensor for name, tensor in weights(v).items()}
        state = {"train_state": {"step": torch.tensor(step), "ntokens_seen": torch.tensor(10 * step)}}
        rest = {
            "optimizer": optimizer,
            "lr_scheduler": {"last_epoch": step},
            "dataloader": {"dp_rank_0": b"state"},
        }
        save_sharded(weights(v) | rest | state, folder / "checkpoint" / f"step-{step}")
    return live("step-100", "step-200", "step-300", folder="checkpoint", steps=((100, 200, 300),))


@dialect
def olmo_core(folder: Path) -> Expectation:
    """A sharded checkpoint of model and optimizer in each step's folder, beside the trainer's state."""
    for step, v in HUNDREDS:
        optimizer = {f"state.{name}.exp_avg": 100 * tensor for name, tensor in weights(v).items()}
        save_sharded({"model": weights(v), "optim": optimizer}, folder / f"step{step}" / "model_and_optim")
        put(
            {"global_step": step, "rng": torch.get_rng_state()}, folder / f"step{step}" / "train" / "rank0.pt"
        )
        put_text("{}", folder / f"step{step}" / "config.json")
        put_text('{"version": "2.0"}', folder / f"step{step}" / ".metadata.json")
    return live("step100", "step200", "step300", steps=((100, 200, 300),), key="model")
