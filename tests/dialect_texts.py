"""Runs of speech and language tools, written by hand in their layouts, as ``dialect_makers`` says."""

from __future__ import annotations

import argparse
import random
import shutil
from datetime import datetime
from pathlib import Path

import numpy as np
import torch

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
