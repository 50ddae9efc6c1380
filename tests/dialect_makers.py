"""A run of three checkpoints as each training tool leaves it: those written by hand, in the tool's layout.

Each maker writes into a folder and says what is right. Here are those of vision and image generation; those of speech
and language are in ``dialect_texts``, and ``dialect_tools`` has the makers that let the tool itself write.

| written by the tool itself | written by hand |
|---|---|
| Lightning: ModelCheckpoint, WeightAveraging | MMEngine, detectron2, Unbiased Teacher, DINO |
| polyak: Averaging, Average.state_dict() | BasicSR, StyleGAN2, guided-diffusion, k-diffusion |
| timm: CheckpointSaver | DiT, latent-diffusion, kohya, ultralytics, nnU-Net |
| ema-pytorch: EMA, also in the loop of F5-TTS | fairseq, NeMo, Megatron, DeepSpeed |
| diffusers: EMAModel, ModelMixin | wenet, espnet, icefall, SpeechBrain |
| transformers: Trainer | OLMo without shards, litgpt, nanoGPT |
| PEFT: save_pretrained | Composer |
| accelerate: save_state | |
| torch.distributed.checkpoint, for torchtitan and OLMo-core | |
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from dialects import (
    EPOCHS,
    HUNDREDS,
    VALUES,
    Expectation,
    adam,
    averaged,
    dialect,
    foreign_class,
    live,
    put,
    put_text,
    refused,
    weights,
)

# Vision.


@dialect
def mmengine(folder: Path) -> Expectation:
    """Epochs with an EMAHook, which exchanges the two kinds of weights; a best one, and a text that names the last."""
    for epoch, v in EPOCHS:
        meta = {
            "epoch": epoch,
            "iter": 100 * epoch,
            "cfg": "model = dict()",
            "time": "20240501_105841",
            "seed": 1,
        }
        message_hub = {"log_scalars": {}, "runtime_info": {"epoch": epoch - 1}, "resumed_keys": {}}
        ema = {"steps": torch.tensor(100 * epoch)} | weights(v, "module.")
        tree = {"meta": meta, "state_dict": weights(-v), "ema_state_dict": ema, "message_hub": message_hub}
        put(
            tree | {"optimizer": adam(v), "param_schedulers": [{"last_step": epoch}]},
            folder / f"epoch_{epoch}.pth",
        )
    shutil.copy(folder / "epoch_2.pth", folder / "best_coco_bbox_mAP_epoch_2.pth")
    put_text(str(folder / "epoch_3.pth"), folder / "last_checkpoint")
    put_text("model = dict()", folder / "config.py")
    names = [f"epoch_{epoch}.pth" for epoch, _ in EPOCHS]
    return averaged(
        *names,
        steps=((1, 2, 3), (100, 200, 300)),
        key="state_dict",
        left_out=("best_coco_bbox_mAP_epoch_2.pth",),
    )


@dialect
def detectron2(folder: Path) -> Expectation:
    """Checkpoints named by the iteration, which counts from 0, with the state of an EMA beside the model."""
    names = [f"model_{iteration - 1:07d}.pth" for iteration in (5000, 10000, 15000)]
    for name, v in zip(names, VALUES, strict=True):
        iteration = int(name[6:13])
        tree = {"model": weights(v), "optimizer": adam(v), "scheduler": {"last_epoch": iteration}}
        put(tree | {"ema_state": weights(-v), "iteration": iteration}, folder / name)
    shutil.copy(folder / names[-1], folder / "model_final.pth")
    put_text("model_final.pth", folder / "last_checkpoint")
    return averaged(*names, steps=((4999, 9999, 14999),), key="ema_state", left_out=("model_final.pth",))


@dialect
def unbiased_teacher(folder: Path) -> Expectation:
    """Student and teacher in one flat dict of detectron2; the teacher is the average."""
    names = [f"model_{iteration:07d}.pth" for iteration in (4999, 9999, 14999)]
    for name, v in zip(names, VALUES, strict=True):
        model = weights(-v, "modelTeacher.") | weights(v, "modelStudent.")
        put({"model": model, "optimizer": adam(v), "iteration": int(name[6:13])}, folder / name)
    return averaged(*names, steps=((4999, 9999, 14999),), words=("modelTeacher",))


@dialect
def dino(folder: Path) -> Expectation:
    """Student, under the prefix of DDP, and teacher; ``checkpoint.pth`` is the newest once more."""
    names = [f"checkpoint{epoch:04d}.pth" for epoch in (20, 40, 60)]
    for name, v in zip(names, VALUES, strict=True):
        tree = {
            "student": weights(v, "module.backbone."),
            "teacher": weights(-v, "backbone."),
            "optimizer": adam(v),
        }
        loss = {"center": torch.full((1, 2), 100.0)}
        args = argparse.Namespace(arch="vit_small", lr=5e-4)
        rest = {"epoch": int(name[10:14]) + 1, "args": args, "dino_loss": loss}
        put(tree | rest, folder / name)
    shutil.copy(folder / names[-1], folder / "checkpoint.pth")
    tensors = ("backbone.lin.weight", "backbone.lin.bias")
    return averaged(
        *names,
        tensors=tensors,
        steps=((20, 40, 60), (21, 41, 61)),
        key="teacher",
        left_out=("checkpoint.pth",),
    )


@dialect
def ultralytics(folder: Path) -> Expectation:
    """The module of the EMA, pickled whole: it cannot be read without the package's code."""
    for name, epoch in (
        ("epoch0.pt", 0),
        ("epoch10.pt", 10),
        ("epoch20.pt", 20),
        ("last.pt", -1),
        ("best.pt", -1),
    ):
        with foreign_class("ultralytics.nn.tasks", "DetectionModel", nn.Linear) as cls:
            tree = {"epoch": epoch, "best_fitness": np.float64(0.5), "model": None, "ema": cls(2, 2).half()}
            put(
                tree | {"updates": 100, "optimizer": None, "train_args": {}, "version": "8.3.0"},
                folder / name,
            )
    return refused("epoch0.pt", "epoch10.pt", "epoch20.pt", words=("ultralytics.nn.tasks.DetectionModel",))


@dialect
def nnunet(folder: Path) -> Expectation:
    """The final checkpoint of each of three folds, with the best beside it; there are no steps."""
    for fold, v in enumerate(VALUES):
        logging = {"mean_fg_dice": [np.float64(0.8)], "train_losses": [np.float32(-0.5)], "lrs": [1e-2]}
        tree = {"network_weights": weights(v), "optimizer_state": adam(v), "grad_scaler_state": None}
        init = {"plans": {"plans_name": "nnUNetPlans"}, "configuration": "3d_fullres", "fold": fold}
        rest = {"logging": logging, "_best_ema": np.float64(0.8), "current_epoch": 1000, "init_args": init}
        trainer = {"trainer_name": "nnUNetTrainer", "inference_allowed_mirroring_axes": (0, 1, 2)}
        put(tree | rest | trainer, folder / f"fold_{fold}" / "checkpoint_final.pth")
        put(
            tree | rest | {"network_weights": weights(16 * v)},
            folder / f"fold_{fold}" / "checkpoint_best.pth",
        )
    names = ("fold_0", "fold_1", "fold_2")
    return live(*names, inputs=("fold_*/checkpoint_final.pth",), steps=None, key="network_weights")


# Image generation.


@dialect
def basicsr(folder: Path) -> Expectation:
    """``models`` with both kinds of weights in each file, and the states of the optimizers in a folder beside it."""
    for step, v in HUNDREDS:
        put({"params": weights(v), "params_ema": weights(-v)}, folder / "models" / f"net_g_{step}.pth")
        state = {"epoch": 0, "iter": step, "optimizers": [adam(v)], "schedulers": [{"last_epoch": step}]}
        put(state, folder / "training_states" / f"{step}.state")
    shutil.copy(folder / "models" / "net_g_300.pth", folder / "models" / "net_g_latest.pth")
    names = [f"net_g_{step}.pth" for step, _ in HUNDREDS]
    return averaged(
        *names, folder="models", steps=((100, 200, 300),), key="params_ema", left_out=("net_g_latest.pth",)
    )


@dialect
def stylegan2_pytorch(folder: Path) -> Expectation:
    """Generator, discriminator and the average of the generator."""
    for step, v in HUNDREDS:
        tree = {
            "g": weights(v),
            "d": weights(8 * v),
            "g_ema": weights(-v),
            "g_optim": adam(v),
            "d_optim": adam(v),
        }
        put(tree | {"args": argparse.Namespace(size=256), "ada_aug_p": 0.0}, folder / f"{step:06d}.pt")
    return averaged("000100.pt", "000200.pt", "000300.pt", steps=((100, 200, 300),), key="g_ema")


@dialect
def guided_diffusion(folder: Path) -> Expectation:
    """Live weights, averaged weights and the optimizer in a file each, of one step."""
    for step, v in HUNDREDS:
        put(weights(v), folder / f"model{step:06d}.pt")
        put(weights(-v), folder / f"ema_0.9999_{step:06d}.pt")
        put(adam(v), folder / f"opt{step:06d}.pt")
    names = [f"ema_0.9999_{step:06d}.pt" for step, _ in HUNDREDS]
    return averaged(*names, steps=((100, 200, 300),), words=("ema_0.9999",), left_out=("model000100.pt",))


@dialect
def k_diffusion(folder: Path) -> Expectation:
    """The model and its EMA, with the states of two schedules."""
    for step, v in HUNDREDS:
        tree = {"config": {"model": {}}, "model": weights(v), "model_ema": weights(-v), "opt": adam(v)}
        schedules = {"sched": {"last_epoch": step}, "ema_sched": {"inv_gamma": 1.0, "last_epoch": step}}
        put(tree | schedules | {"epoch": step // 100, "step": step}, folder / f"name_{step:08d}.pth")
    names = [f"name_{step:08d}.pth" for step, _ in HUNDREDS]
    put_text(json.dumps({"latest_checkpoint": names[-1]}), folder / "name_state.json")
    return averaged(*names, steps=((100, 200, 300),), key="model_ema")


@dialect
def dit(folder: Path) -> Expectation:
    """Research code: the model, its EMA, the optimizer and the arguments."""
    for step, v in HUNDREDS:
        args = argparse.Namespace(model="DiT-XL/2", data_path="data", epochs=1400)
        tree = {"model": weights(v), "ema": weights(-v), "opt": adam(v), "args": args}
        put(tree, folder / "checkpoints" / f"{step:07d}.pt")
    put_text("step=0000300", folder / "log.txt")
    names = [f"{step:07d}.pt" for step, _ in HUNDREDS]
    return averaged(*names, folder="checkpoints", steps=((100, 200, 300),), key="ema")


@dialect
def latent_diffusion(folder: Path) -> Expectation:
    """Lightning, with a LitEma in the model: its names are those of the live weights without their dots."""
    for epoch, v in EPOCHS:
        ema = {
            f"model_ema.{name.replace('.', '')}": tensor
            for name, tensor in weights(-v, "diffusion_model.").items()
        }
        counters = {
            "model_ema.decay": torch.tensor(0.9999),
            "model_ema.num_updates": torch.tensor(100 * epoch),
        }
        frozen = {"first_stage_model.conv.weight": torch.full((2,), 9.0)}
        model = weights(v, "model.diffusion_model.") | ema | counters | frozen
        tree = {
            "epoch": epoch,
            "global_step": 100 * epoch,
            "pytorch-lightning_version": "1.4.2",
            "state_dict": model,
        }
        put(tree | {"callbacks": {}, "optimizer_states": [adam(v)]}, folder / f"epoch={epoch:06d}.ckpt")
    shutil.copy(folder / "epoch=000003.ckpt", folder / "last.ckpt")
    tensors = ("model.diffusion_model.lin.weight", "model.diffusion_model.lin.bias")
    return Expectation(
        "averaged",
        tuple(f"epoch={epoch:06d}.ckpt" for epoch, _ in EPOCHS),
        dict.fromkeys(tensors, -4.0) | {"first_stage_model.conv.weight": 9.0},
        constant=("first_stage_model.conv.weight",),
        steps=((1, 2, 3), (100, 200, 300)),
        left_out=("last.ckpt",),
        words=("model_ema",),
    )


@dialect
def kohya(folder: Path) -> Expectation:
    """LoRA of image models: down, up and alpha of each layer, and what was trained in the metadata."""
    for epoch, v in EPOCHS:
        layer = "lora_unet_down_blocks_0_attentions_0_proj_in"
        factors = {
            f"{layer}.lora_down.weight": torch.ones(2, 3),
            f"{layer}.lora_up.weight": torch.full((4, 2), v),
        }
        metadata = {"ss_network_dim": "2", "ss_network_alpha": "1.0", "ss_epoch": str(epoch)}
        metadata |= {"ss_network_module": "networks.lora", "ss_steps": str(100 * epoch)}
        tensors = factors | {f"{layer}.alpha": torch.tensor(1.0)}
        save_file(tensors, folder / f"style-{epoch:06d}.safetensors", metadata=metadata)
    names = [f"style-{epoch:06d}.safetensors" for epoch, _ in EPOCHS]
    # Of rank 2 and alpha 1, an entry of an update is 2 v / 2.
    return Expectation("live", tuple(names), steps=((1, 2, 3), (100, 200, 300)), update=sum(VALUES) / 3)
