"""A run of three checkpoints as each training tool leaves it: those written by hand, in the tool's layout.

Each maker writes into a folder and says what is right. ``dialect_tools`` has the makers that let the tool itself write.

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
import random
import shutil
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from dialects import (
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

HUNDREDS = tuple(zip((100, 200, 300), VALUES, strict=True))
EPOCHS = tuple(zip((1, 2, 3), VALUES, strict=True))

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


# Speech.


@dialect
def wenet(folder: Path) -> Expectation:
    """State dicts of epochs with a text each, the weights before the first, a link to the last, an earlier average."""
    put(weights(-100.0), folder / "init.pt")
    for epoch, v in EPOCHS:
        put(weights(v), folder / f"{epoch}.pt")
        put_text(f"cv_loss: {1 / epoch}\nepoch: {epoch}\nstep: {100 * epoch}\n", folder / f"{epoch}.yaml")
    (folder / "final.pt").symlink_to("3.pt")
    put(weights(50.0), folder / "avg_2.pt")
    return live(
        "1.pt",
        "2.pt",
        "3.pt",
        steps=((1, 2, 3), (100, 200, 300)),
        left_out=("init.pt", "final.pt", "avg_2.pt"),
    )


@dialect
def espnet2(folder: Path) -> Expectation:
    """State dicts of epochs, links to the latest and the best, an average with a link to it, and a file to resume."""
    for epoch, v in EPOCHS:
        put(weights(v), folder / f"{epoch}epoch.pth")
    (folder / "latest.pth").symlink_to("3epoch.pth")
    (folder / "valid.acc.best.pth").symlink_to("2epoch.pth")
    put(weights(50.0), folder / "valid.acc.ave_2best.pth")
    (folder / "valid.acc.ave.pth").symlink_to("valid.acc.ave_2best.pth")
    resume = {
        "model": weights(VALUES[-1]),
        "reporter": {"epoch": 3},
        "optimizers": [adam(4.0)],
        "scaler": None,
    }
    put(resume | {"schedulers": [{"last_epoch": 300}]}, folder / "checkpoint.pth")
    put_text("optim: adam\n", folder / "config.yaml")
    return live(
        "1epoch.pth",
        "2epoch.pth",
        "3epoch.pth",
        steps=((1, 2, 3),),
        left_out=("latest.pth", "valid.acc.best.pth"),
    )


@dialect
def icefall(folder: Path) -> Expectation:
    """The model beside its mean since the beginning, which is for differences of two; copies of the best."""
    for epoch, v in EPOCHS:
        tree = {
            "model": weights(v),
            "model_avg": weights(-v),
            "optimizer": adam(v),
            "scheduler": {"epoch": epoch},
        }
        rest = {"grad_scaler": {}, "sampler": None, "batch_idx_train": 100 * epoch, "best_train_loss": 0.5}
        put(tree | rest, folder / f"epoch-{epoch}.pt")
    shutil.copy(folder / "epoch-3.pt", folder / "best-train-loss.pt")
    shutil.copy(folder / "epoch-2.pt", folder / "best-valid-loss.pt")
    return live(
        "epoch-1.pt",
        "epoch-2.pt",
        "epoch-3.pt",
        steps=((1, 2, 3), (100, 200, 300)),
        key="model",
        left_out=("best-train-loss.pt",),
    )


@dialect
def speechbrain(folder: Path) -> Expectation:
    """A folder for each checkpoint, named by its moment, with a file for each thing that is resumed."""
    times = ("10-58-41", "11-40-13", "13-02-52")
    for epoch, (time, v) in enumerate(zip(times, VALUES, strict=True), 1):
        checkpoint = folder / "save" / f"CKPT+2024-05-01+{time}+00"
        put(weights(v, "0."), checkpoint / "model.ckpt")
        put(adam(v), checkpoint / "optimizer.ckpt")
        put_text(str(epoch), checkpoint / "counter.ckpt")
        put_text(
            f"avg_train_loss: 0.5\noptimizer_step: {100 * epoch}\nstep: 100\n", checkpoint / "brain.ckpt"
        )
        put_text("4711", checkpoint / "dataloader-TRAIN.ckpt")
        unixtime = datetime.strptime(f"2024-05-01 {time} +0000", "%Y-%m-%d %H-%M-%S %z").timestamp()
        put_text(
            f"# yamllint disable\nWER: 7.5\nend-of-epoch: true\nunixtime: {unixtime}\n",
            checkpoint / "CKPT.yaml",
        )
    put_text("a,b,c\n", folder / "save" / "label_encoder.txt")
    return live(*times, folder="save", tensors=("0.lin.weight", "0.lin.bias"))


@dialect
def nemo(folder: Path) -> Expectation:
    """NeMo's EMA callback: the averaged twin of each checkpoint is a file of its own, and the last is there twice."""

    def save(value: float, epoch: int, name: str) -> None:
        tree = {"epoch": epoch, "global_step": 100 * epoch, "pytorch-lightning_version": "2.4.0"}
        put(tree | {"state_dict": weights(value), "callbacks": {}, "optimizer_states": []}, folder / name)

    names = []
    for (epoch, v), wer in zip(EPOCHS, (0.31, 0.25, 0.23), strict=True):
        stem = f"asr--val_wer={wer}-epoch={epoch}"
        save(v, epoch, f"{stem}.ckpt")
        save(-v, epoch, f"{stem}-EMA.ckpt")
        names.append(f"{stem}-EMA.ckpt")
    save(4.0, 3, "asr--val_wer=0.23-epoch=3-last.ckpt")
    save(-4.0, 3, "asr--val_wer=0.23-epoch=3-last-EMA.ckpt")
    return averaged(
        *names,
        steps=((1, 2, 3), (100, 200, 300)),
        key="state_dict",
        words=("-EMA",),
        left_out=("asr--val_wer=0.31-epoch=1.ckpt",),
    )


# Language models.


@dialect
def fairseq(folder: Path) -> Expectation:
    """Epochs with an EMA in ``extra_state``; the best and the last are copies."""
    for epoch, v in zip((12, 13, 14), VALUES, strict=True):
        extra = {
            "train_iterator": {"epoch": epoch + 1, "iterations_in_epoch": 0},
            "val_loss": 4.2,
            "ema": weights(-v),
        }
        history = [{"optimizer_name": "FairseqAdam", "num_updates": 100 * epoch, "lr_scheduler_state": {}}]
        tree = {
            "args": argparse.Namespace(arch="transformer"),
            "cfg": None,
            "model": weights(v),
            "criterion": {},
        }
        rest = {
            "optimizer_history": history,
            "task_state": {},
            "extra_state": extra,
            "last_optimizer_state": adam(v),
        }
        put(tree | rest, folder / f"checkpoint{epoch}.pt")
    shutil.copy(folder / "checkpoint13.pt", folder / "checkpoint_best.pt")
    shutil.copy(folder / "checkpoint14.pt", folder / "checkpoint_last.pt")
    steps = ((12, 13, 14), (13, 14, 15), (1200, 1300, 1400))
    return averaged(
        "checkpoint12.pt",
        "checkpoint13.pt",
        "checkpoint14.pt",
        steps=steps,
        key="extra_state.ema",
        left_out=("checkpoint_best.pt",),
    )


def megatron_rank(folder: Path, step: int, rank: int, value: float) -> None:
    args = argparse.Namespace(num_layers=1, params_dtype=torch.float32, tensor_model_parallel_size=1)
    states = {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "rng_tracker_states": {},
    }
    tree = {"args": args, "checkpoint_version": 3.0, "iteration": step, "model": weights(value, "decoder.")}
    rest = {"optimizer": {"optimizer": adam(value)}, "opt_param_scheduler": {"num_steps": step}}
    put(
        tree | rest | {"rng_state": [states | {"torch_rng_state": torch.get_rng_state()}]},
        folder / f"iter_{step:07d}" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt",
    )


@dialect
def megatron(folder: Path) -> Expectation:
    """A folder for each iteration with one for each rank, here one; the random states are numpy's and Python's."""
    for step, v in HUNDREDS:
        megatron_rank(folder, step, 0, v)
    put_text("300", folder / "latest_checkpointed_iteration.txt")
    names = [f"iter_{step:07d}" for step, _ in HUNDREDS]
    return live(
        *names, tensors=("decoder.lin.weight", "decoder.lin.bias"), steps=((100, 200, 300),), key="model"
    )


@dialect
def megatron_two_ranks(folder: Path) -> Expectation:
    """The same with tensor parallelism: two parts of one model."""
    for step, v in HUNDREDS:
        for rank in (0, 1):
            megatron_rank(folder, step, rank, v + 10 * rank)
    put_text("300", folder / "latest_checkpointed_iteration.txt")
    return refused(*(f"iter_{step:07d}" for step, _ in HUNDREDS), words=("rank", "mp_rank_01"))


@dialect
def deepspeed_zero2(folder: Path) -> Expectation:
    """The whole model in one file, the optimizer's parts in others, a text that names the last, a script."""
    for step, v in HUNDREDS:
        checkpoint = folder / f"global_step{step}"
        module = {name: tensor.bfloat16() for name, tensor in weights(v).items()}
        shapes = [{name: tensor.shape for name, tensor in module.items()}]
        tree = {
            "module": module,
            "buffer_names": [],
            "optimizer": None,
            "param_shapes": shapes,
            "shared_params": {},
        }
        rest = {"frozen_param_shapes": None, "lr_scheduler": None, "sparse_tensor_module_names": set()}
        counts = {"skipped_steps": 0, "global_steps": step, "global_samples": 8 * step, "dp_world_size": 2}
        version = {
            "mp_world_size": 1,
            "ds_config": {"zero_optimization": {"stage": 2}},
            "ds_version": "0.16.3",
        }
        put(tree | rest | counts | version, checkpoint / "mp_rank_00_model_states.pt")
        for rank in (0, 1):
            with foreign_class("deepspeed.runtime.fp16.loss_scaler", "LossScaler") as cls:
                state = {
                    "loss_scaler": cls(),
                    "zero_stage": 2,
                    "single_partition_of_fp32_groups": [torch.ones(3)],
                }
                optimizer = {
                    "optimizer_state_dict": state | {"base_optimizer_state": adam(v)},
                    "ds_version": "0.16.3",
                }
                put(optimizer, checkpoint / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    put_text("global_step300", folder / "latest")
    put_text("#!/usr/bin/env python\n", folder / "zero_to_fp32.py")
    return live(*(f"global_step{step}" for step, _ in HUNDREDS), steps=((100, 200, 300),), key="module")


@dialect
def olmo_unsharded(folder: Path) -> Expectation:
    """OLMo without shards: model, optimizer and trainer in a file each, and a link to the latest folder."""
    for step, v in HUNDREDS:
        checkpoint = folder / f"step{step}-unsharded"
        put(weights(v, "transformer."), checkpoint / "model.pt")
        put(adam(v), checkpoint / "optim.pt")
        rng = {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "torch": torch.random.get_rng_state(),
        }
        put({"epoch": 0, "global_step": step, "rng": rng, "checkpoints": []}, checkpoint / "train.pt")
        put_text("run_name: tiny\n", checkpoint / "config.yaml")
    (folder / "latest-unsharded").symlink_to("step300-unsharded")
    names = [f"step{step}-unsharded" for step, _ in HUNDREDS]
    return live(
        *names,
        tensors=("transformer.lin.weight", "transformer.lin.bias"),
        steps=((100, 200, 300),),
        left_out=("latest-unsharded",),
    )


@dialect
def litgpt(folder: Path) -> Expectation:
    """A folder for each step with the model's configuration and tokenizer beside the weights."""
    for step, v in HUNDREDS:
        checkpoint = folder / f"step-{step:08d}"
        counts = {"iter_num": 4 * step, "step_count": step, "hparams": {"lr": 1e-3}}
        put({"model": weights(v), "optimizer": adam(v)} | counts, checkpoint / "lit_model.pth")
        put_text("n_layer: 1\n", checkpoint / "model_config.yaml")
        put_text("{}", checkpoint / "tokenizer.json")
    names = [f"step-{step:08d}" for step, _ in HUNDREDS]
    return live(*names, steps=((100, 200, 300), (400, 800, 1200)), key="model")


@dialect
def nanogpt(folder: Path) -> Expectation:
    """A compiled model with its arguments and configuration; the file of the script's own name is the last of them,
    and either may be taken for it."""
    for step, v in HUNDREDS:
        tree = {"model": weights(v, "_orig_mod."), "optimizer": adam(v), "model_args": {"n_layer": 1}}
        loss = {"iter_num": step, "best_val_loss": torch.tensor(3.2), "config": {"lr": 6e-4}}
        put(tree | loss, folder / f"ckpt_{step}.pt")
    shutil.copy(folder / "ckpt_300.pt", folder / "ckpt.pt")
    return live(
        "ckpt_100.pt",
        "ckpt_200.pt",
        "ckpt",
        steps=((100, 200, 300),),
        key="model",
        left_out=("ckpt.pt", "ckpt_300.pt"),
    )


@dialect
def composer(folder: Path) -> Expectation:
    """The state of a Trainer, named by epoch, batch and rank, with a link to the latest."""
    for step, v in HUNDREDS:
        timestamp = {"Timestamp": {"epoch": 1, "batch": step, "sample": 8 * step, "token": 0}}
        state = {"model": weights(v), "optimizers": {"DecoupledAdamW": adam(v)}, "timestamp": timestamp}
        rest = {"run_name": "tiny", "schedulers": {}, "algorithms": [], "dataset_state": {"train": None}}
        rng = [{"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}]
        put({"state": state | rest, "rng": rng}, folder / f"ep1-ba{step}-rank0.pt")
    (folder / "latest-rank0.pt").symlink_to("ep1-ba300-rank0.pt")
    names = [f"ep1-ba{step}-rank0.pt" for step, _ in HUNDREDS]
    return live(*names, steps=((100, 200, 300),), key="state.model", left_out=("latest-rank0.pt",))
