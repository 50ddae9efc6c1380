"""Checkpoints and folders as training tools leave them, in miniature.

Each case writes into the current folder. Its docstring says which tool leaves such files, which commands a person types
there, and what is right. Every tensor has one value throughout, so that an average shows what it was made of. Where
several outcomes are safe, all are named; the wording of a message is free, as long as it names the file at fault or the
cure.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import struct

import numpy as np
import torch
from safetensors.torch import save_file

CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


def full(value, *shape):
    return torch.full(shape or (2,), float(value))


def w(value):
    return {"w": full(value)}


def put(tree, path):
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    torch.save(tree, path)


def put_safe(tensors, path):
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    save_file(tensors, path, metadata={"format": "pt"})


def put_text(what, path):
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    pathlib.Path(path).write_text(what if isinstance(what, str) else json.dumps(what))


def prefixed(tensors, prefix):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def hf(value, folder, step=None, stem="model"):
    """A folder of transformers or diffusers, with the Trainer's state if a step is given."""
    put_safe(w(value), f"{folder}/{stem}.safetensors")
    put_text({"model_type": "tiny"}, f"{folder}/config.json")
    if step is not None:
        put_text({"global_step": step}, f"{folder}/trainer_state.json")


def lightning(value, step, **more):
    rest = {"loops": {}, "callbacks": {}, "optimizer_states": [], "lr_schedulers": []}
    return (
        {"global_step": step, "pytorch-lightning_version": "2.6.0", "state_dict": {"net.weight": full(value)}}
        | rest
        | more
    )


def two(build, name="ckpt_{}.pt"):
    """Two files of a run: the live weights are 1 and 3, with mean 2, their EMA is 0.5 and 1.5, with mean 1."""
    for number, value in ((1, 1.0), (2, 3.0)):
        live, ema = ({"conv.weight": full(v), "conv.bias": full(v, 1)} for v in (value, value / 2))
        put(build(live, ema), name.format(number))


# Two files of one step.


@case
def lightning_last():
    """Lightning's ModelCheckpoint(save_last=True): last.ckpt is the newest checkpoint once more (or a link to it).

    Wanted: `polyak average ckpts -o avg.ckpt --profile tail:steps=10`, the mean over the last 10 steps.
    Right: 40; or a refusal that names last.ckpt.
    """
    for step in (10, 20, 30, 40):
        put(lightning(step, step), f"ckpts/epoch={step // 10 - 1}-step={step}.ckpt")
    shutil.copy("ckpts/epoch=3-step=40.ckpt", "ckpts/last.ckpt")


@case
def timm_links():
    """timm's CheckpointSaver: last.pth.tar and model_best.pth.tar are hard links to two of the checkpoints.

    Wanted: `polyak average timm -o avg.pt`, the mean of the four.
    Right: 1.5, each epoch once; or a refusal that names last or model_best.
    """
    for epoch in range(4):
        entries = {
            "epoch": epoch,
            "arch": "tiny",
            "state_dict": w(10 * epoch),
            "state_dict_ema": w(epoch),
            "metric": 80.0,
        }
        put(entries, f"timm/checkpoint-{epoch}.pth.tar")
    os.link("timm/checkpoint-3.pth.tar", "timm/last.pth.tar")
    os.link("timm/checkpoint-2.pth.tar", "timm/model_best.pth.tar")


# The EMA and the live weights as two files or folders.


@case
def nemo_twins():
    """NeMo's EMA callback: NAME.ckpt holds the live weights, NAME-EMA.ckpt the average, and both have a -last copy.

    Wanted: `polyak average checkpoints -o all.ckpt`, and the last half of the averaged ones: `polyak average
    'checkpoints/*-EMA.ckpt' -o tail.ckpt --profile tail:0.5`.
    Right: 2 and 8/3, of the -EMA files alone, each step once; or refusals that name -EMA and -last.
    """

    def save(value, step, name):
        put(lightning(value, step), f"checkpoints/asr--val_wer={name}.ckpt")

    for epoch, wer in ((1, 0.31), (2, 0.25), (3, 0.23)):
        save(10 * epoch, 100 * epoch, f"{wer}-epoch={epoch}")
        save(epoch, 100 * epoch, f"{wer}-epoch={epoch}-EMA")
    save(30, 300, "0.23-epoch=3-last")
    save(3, 300, "0.23-epoch=3-last-EMA")


@case
def unet_and_unet_ema():
    """The training scripts of diffusers with --use_ema: each checkpoint-N holds unet/ and unet_ema/.

    Wanted: `polyak average out/checkpoint-500 out/checkpoint-1000 -o avg.safetensors`, one model.
    Right: -750, of the unet_ema folders; or a refusal that names unet_ema.
    """
    for step in (500, 1000):
        hf(step, f"out/checkpoint-{step}/unet", stem="diffusion_pytorch_model")
        hf(-step, f"out/checkpoint-{step}/unet_ema", stem="diffusion_pytorch_model")


# Which entry of one file is the EMA.


@case
def mmengine_hook():
    """mmengine's EMAHook exchanges the two: state_dict is the EMA, ema_state_dict the live weights and a counter.

    Wanted: `polyak average epoch_1.pth epoch_2.pth -o avg.pt`, of the EMA.
    Right: 1, of state_dict; or a refusal that names it.
    """
    counter = {"steps": torch.tensor(100)}
    two(
        lambda live, ema: {
            "meta": {"iter": 100},
            "state_dict": ema,
            "ema_state_dict": counter | prefixed(live, "module."),
        },
        "epoch_{}.pth",
    )


@case
def f5_tts():
    """F5-TTS: model_state_dict beside ema_model_state_dict, an ema-pytorch EMA with its counters and its own prefix.

    Wanted: `polyak average ckpt_1.pt ckpt_2.pt -o avg.pt`, of the EMA, as a file that the model loads.
    Right: conv.weight is 1; or a refusal that names ema_model_state_dict.
    """

    def averaged(ema):
        return {"initted": torch.tensor(True), "step": torch.tensor(7)} | prefixed(ema, "ema_model.")

    two(lambda live, ema: {"model_state_dict": live, "ema_model_state_dict": averaged(ema), "update": 7})


@case
def basicsr_params():
    """BasicSR and Real-ESRGAN: params beside params_ema.

    Wanted: `polyak average net_g_1.pth net_g_2.pth -o avg.pt`, of the EMA.
    Right: conv.weight is 1; or a refusal that names params_ema.
    """
    two(lambda live, ema: {"params": live, "params_ema": ema}, "net_g_{}.pth")


@case
def cosmos_key():
    """cosmos-predict2: one flat state dict, the live weights under the prefix net., the EMA under net_ema.

    Wanted: `polyak average iter_000000001.pt iter_000000002.pt -o avg.pt --key net_ema`.
    Right: blk.weight is 1, and nothing else; or a refusal that says that this is a prefix of names.
    """
    for number, value in ((1, 1.0), (2, 3.0)):
        put({"net.blk.weight": full(value), "net_ema.blk.weight": full(value / 2)}, f"iter_{number:09d}.pt")


# Parts of one model are no checkpoints of it.


@case
def llama_consolidated():
    """Llama's original files: consolidated.NN.pth are tensor-parallel shards, with the same names and shapes.

    Wanted: `polyak average A B -o soup.pth`, the soup of two models.
    Right: a refusal that names consolidated.01, ranks or shards. (The average of each rank alone is right.)
    """
    for model, base in (("A", 1), ("B", 3)):
        for rank in (0, 1):
            put(
                {"wq.weight": full(base + 10 * rank, 2, 4), "norm.weight": full(base, 4)},
                f"{model}/consolidated.{rank:02d}.pth",
            )
        put_text("{}", f"{model}/params.json")


@case
def nemo_mp_rank():
    """NeMo and Megatron with model parallelism: a folder for each rank, mp_rank_00/ and mp_rank_01/, with all steps.

    Wanted: `polyak average checkpoints/mp_rank_00 checkpoints/mp_rank_01 -o both.ckpt --profile tail:steps=250`,
    and rank by rank `polyak average checkpoints/mp_rank_00 -o one.ckpt --profile tail:steps=250`.
    Right: a refusal that names ranks for the first; 2500 for the second.
    """
    for rank in (0, 1):
        for step in (2250, 2500):
            put(
                {"global_step": step, "state_dict": w(step + 1e6 * rank)},
                f"checkpoints/mp_rank_{rank:02d}/step={step:05d}.ckpt",
            )


@case
def trainer_output_folder():
    """transformers' Trainer after save_model(): the output folder holds the final model, and checkpoint-N below it.

    Wanted: `polyak average out -o avg.safetensors`, the mean of the checkpoints.
    Right: 5, of the checkpoints; or a refusal that names checkpoint-*; or 8 with a note that the checkpoints below
    are left out.
    """
    hf(8, "out")
    for step in (2, 4, 6, 8):
        hf(step, f"out/checkpoint-{step}", step)
        put({"last_epoch": step}, f"out/checkpoint-{step}/scheduler.pt")


# Tensors that mean something only together.


@case
def peft_adapters():
    """PEFT: LoRA adapters, whose update is B A alpha / r; alpha and r are in adapter_config.json.

    Wanted: `polyak average a b -o ab.safetensors`, the mean of two updates; `polyak average c d -o cd.safetensors`.
    Right: for a and b the mean update, or the mean of the factors with a note that it is not that, or a refusal;
    for c and d a refusal or a note that names alpha.
    """
    for folder, seed, alpha in (("a", 1, 4), ("b", 2, 4), ("c", 3, 4), ("d", 3, 32)):
        torch.manual_seed(seed)
        name = "base_model.model.attn.c_attn.lora_"
        put_safe(
            {f"{name}A.weight": torch.randn(2, 8), f"{name}B.weight": torch.randn(24, 2)},
            f"{folder}/adapter_model.safetensors",
        )
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": alpha, "target_modules": ["c_attn"]}
        put_text(config, f"{folder}/adapter_config.json")


@case
def gptq():
    """GPTQ and AWQ: integer codes (qweight, qzeros) and half-precision scales; config.json says quantization_config.

    Wanted: `polyak average a b -o avg.safetensors`.
    Right: a refusal that says that the weights are quantised; or the mean of what the codes stand for.
    """
    name = "mlp.up_proj."
    for seed, folder in enumerate("ab", 1):
        weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(seed))
        scale = weight.abs().amax(0) / 7
        codes = (weight / scale).round().clamp(-8, 7).to(torch.int32) + 8
        zeros = {
            name + "qzeros": torch.full((1, 8), 8, dtype=torch.int32),
            name + "g_idx": torch.zeros(8, dtype=torch.int32),
        }
        plain = {name + "scales": scale[None].half(), "norm.weight": torch.ones(8).half()}
        put_safe({name + "qweight": codes} | zeros | plain, f"{folder}/model.safetensors")
        put_text({"quantization_config": {"quant_method": "gptq", "bits": 4}}, f"{folder}/config.json")


@case
def fp8_with_scales():
    """FP8 checkpoints as those of DeepSeek-V3: a float8 weight, and weight_scale_inv by which it is multiplied.

    Wanted: `polyak average a.safetensors b.safetensors -o avg.safetensors`.
    Right: a refusal that names the scales; or the mean of the products. (float8 without scales is averaged as it
    is.)
    """
    name = "mlp.gate_proj.weight"
    for seed, (file, gain) in enumerate((("a", 1.0), ("b", 4.0)), 1):
        weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(seed)) * gain
        scale = weight.abs().max() / 448
        put_safe(
            {name: (weight / scale).to(torch.float8_e4m3fn), name + "_scale_inv": scale.view(1, 1)},
            f"{file}.safetensors",
        )


@case
def stale_index_and_shards():
    """A model saved in shards, and later into the same folder as one file: index and old shards are still there.

    Wanted: `polyak average a -o avg.safetensors`, the model that from_pretrained loads.
    Right: 5; or a refusal that names the index.
    """
    shards = {"u": "model-00001-of-00002.safetensors", "w": "model-00002-of-00002.safetensors"}
    for name, file in shards.items():
        put_safe({name: full(1)}, f"a/{file}")
    put_text({"metadata": {"total_size": 16}, "weight_map": shards}, "a/model.safetensors.index.json")
    put_safe({"u": full(5), "w": full(5)}, "a/model.safetensors")


# Steps in names. The value is the true step.


def steps(folder, **values):
    for name, value in values.items():
        put(w(value), f"{folder}/{name}")


@case
def thousands_and_millions():
    """Names with units, as many training loops write them.

    Wanted: `polyak average run -o run.npz --profile tail:steps=1`, the newest.
    Right: 1,000,000; or a refusal because steps cannot be told.
    """
    steps("run", **{"ckpt_500k.pt": 5e5, "ckpt_750k.pt": 7.5e5, "ckpt_1M.pt": 1e6})


@case
def step_within_its_epoch():
    """Names with an epoch and a step that begins again in each epoch.

    Wanted: `polyak average run -o run.npz --profile tail:steps=1`, the newest.
    Right: 2050, of epoch 2; or a refusal because steps cannot be told.
    """
    steps("run", **{"epoch_0_step_900.pt": 900, "epoch_1_step_300.pt": 1300, "epoch_2_step_50.pt": 2050})


@case
def speechbrain_dates():
    """SpeechBrain: a folder for each checkpoint, named by date and time, CKPT+2024-05-01+10-58-41+00.

    Wanted: `polyak average 'save/*/model.ckpt' -o avg.ckpt --profile tail:0.5`, the last two.
    Right: 3.5; or a refusal because steps cannot be told.
    """
    for number, time in enumerate(("10-58-41", "11-40-13", "12-21-05", "13-02-52"), 1):
        put({"enc.weight": full(number)}, f"save/CKPT+2024-05-01+{time}+00/model.ckpt")


@case
def usual_names():
    """Names of Lightning and of common loops: epoch and step, thousands throughout, a metric or a seed behind.

    Wanted: the newest: `polyak average a -o a.npz --profile tail:steps=1`, `polyak average b -o b.npz --profile
    tail:steps=1`, `polyak average c -o c.npz --profile tail:steps=1` and `polyak average d -o d.npz --profile
    tail:steps=1`.
    Right: 4400, 100, 20 and 20.
    """
    steps(
        "a", **{"epoch=0-step=400.ckpt": 400, "epoch=2-step=1200.ckpt": 1200, "epoch=10-step=4400.ckpt": 4400}
    )
    steps("b", **{"model_9k.pt": 9, "model_10k.pt": 10, "model_100k.pt": 100})
    steps("c", **{"model_10_0.91.pth": 10, "model_20_0.87.pth": 20})
    steps("d", **{"ep10_seed42.pt": 10, "ep20_seed42.pt": 20})


# Pickles.


@case
def timm_with_its_arguments():
    """timm's train.py puts its argparse.Namespace into each checkpoint, as most research code does.

    Wanted: the example in the command's own help: `polyak average timm/*.pth.tar -o avg.pt --key
    state_dict_ema`.
    Right: 1.5. A class that is plain data needs no code.
    """
    for epoch in range(4):
        entries = {
            "epoch": epoch,
            "args": argparse.Namespace(lr=0.1),
            "state_dict": w(10 * epoch),
            "state_dict_ema": w(epoch),
        }
        put(entries, f"timm/checkpoint-{epoch}.pth.tar")


@case
def nnunet_folds():
    """nnU-Net: logs with numpy scalars beside network_weights, as any metric from numpy in other tools' files.

    Wanted: `polyak average 'fold_*/checkpoint_final.pth' -o avg.pth --key network_weights`.
    Right: encoder.conv.weight is 0.5; or a refusal that names an option by which it is read all the same.
    """
    for fold in (0, 1):
        logs = {"mean_fg_dice": [np.float64(0.8)], "train_losses": [np.float32(-0.5)]}
        rest = {
            "optimizer_state": {"state": {}},
            "logging": logs,
            "_best_ema": np.float64(0.8),
            "current_epoch": 1000,
        }
        put(
            {"network_weights": {"encoder.conv.weight": full(fold)}} | rest,
            f"fold_{fold}/checkpoint_final.pth",
        )


class Net(torch.nn.Linear):
    """A module pickled whole: its class is not where the file is read."""


class Evil:
    def __reduce__(self):
        return os.system, ("touch ran",)


@case
def code_is_not_run():
    """A pickle that runs a command, and one of a whole module, as ultralytics saves them.

    Wanted: `polyak average evil_1.pt evil_2.pt -o a.pt` and `polyak average epoch1.pt epoch2.pt -o b.pt`.
    Right: both are refused, naming what they would need; or 2 for the first, from the weights beside the command.
    There is never a file named ran.
    """
    for number, value in ((1, 1), (2, 3)):
        put({"model": w(value), "hook": Evil()}, f"evil_{number}.pt")
        put({"epoch": number, "model": None, "ema": Net(2, 1).half()}, f"epoch{number}.pt")


# Weights that are elsewhere.


@case
def zero3_model_states():
    """DeepSpeed ZeRO-3: the weights are in the optimizer's files, and model_states holds empty tensors in their place.

    Wanted: `polyak average 'ckpt/*/zero_pp_rank_0_mp_rank_00_model_states.pt' -o a.pt`, or of the folders: `polyak
    average ckpt/global_step1000 ckpt/global_step2000 -o b.pt`.
    Right: refusals that name ZeRO-3, empty tensors, or zero_to_fp32.py, which gathers the weights.
    """
    for step in (1000, 2000):
        for rank in (0, 1):
            start = f"ckpt/global_step{step}/zero_pp_rank_{rank}_mp_rank_00_"
            module = {"lin.weight": torch.empty(0), "lin.bias": torch.empty(0)}
            shapes = [{"lin.weight": torch.Size([2, 2]), "lin.bias": torch.Size([2])}]
            put(
                {"module": module, "param_shapes": shapes, "global_steps": step, "ds_version": "0.14"},
                start + "model_states.pt",
            )
            put(
                {"optimizer_state_dict": {"zero_stage": 3, "fp32_flat_groups": [full(step, 3)]}},
                start + "optim_states.pt",
            )


@case
def zero2_folders():
    """DeepSpeed ZeRO-1 and 2: the whole model in mp_rank_00_model_states.pt, beside the optimizer's partitions.

    Wanted: `polyak average z2/global_step1000 z2/global_step2000 -o a.pt`, or of the files: `polyak average
    'z2/*/mp_rank_00_model_states.pt' -o b.pt --profile ema:half_life=1000 --dtype fp32`.
    Right: 2, or a refusal that names mp_rank_00_model_states.pt; 7/3 for the files.
    """
    for step, value in ((1000, 1), (2000, 3)):
        folder = f"z2/global_step{step}"
        module = {"lin.weight": full(value).bfloat16()}
        put(
            {"module": module, "optimizer": None, "global_steps": step, "ds_version": "0.14"},
            f"{folder}/mp_rank_00_model_states.pt",
        )
        for rank in (0, 1):
            partition = {"single_partition_of_fp32_groups": [full(value)], "zero_stage": 2}
            put(
                {"optimizer_state_dict": partition},
                f"{folder}/bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
            )


@case
def optimizer_alone():
    """torch.save(optimizer.state_dict()): moments, and no weights at all. The name of the file need not say so.

    Wanted: nobody wants it; the files were named by mistake: `polyak average state_1.pt state_2.pt -o avg.pt`.
    Right: a refusal that names the optimizer.
    """
    for number in (1, 2):
        state = {0: {"step": torch.tensor(5.0), "exp_avg": full(number), "exp_avg_sq": full(number)}}
        put({"state": state, "param_groups": [{"lr": 1e-3, "params": [0]}]}, f"state_{number}.pt")


# Files without a step of their own.


@case
def wenet():
    """WeNet: init.pt before the first epoch, 0.pt to 3.pt, and final.pt, a link to the last.

    Wanted: `polyak average exp -o avg.pt`, the mean of the epochs.
    Right: 1.5; or a refusal that names init.pt or final.pt.
    """
    put(w(-100), "exp/init.pt")
    for epoch in range(4):
        put(w(epoch), f"exp/{epoch}.pt")
        put_text("cv_loss: 1\n", f"exp/{epoch}.yaml")
    os.symlink("3.pt", "exp/final.pt")


@case
def fairseq():
    """fairseq: checkpoint_best.pt and checkpoint_last.pt are copies of two of the epochs.

    Wanted: `polyak average checkpoints -o avg.pt`, the mean of the epochs.
    Right: 2.5; or a refusal that names checkpoint_best or checkpoint_last.
    """
    for epoch in (1, 2, 3, 4):
        put(
            {"model": w(epoch), "args": None, "extra_state": {"epoch": epoch}},
            f"checkpoints/checkpoint{epoch}.pt",
        )
    shutil.copy("checkpoints/checkpoint3.pt", "checkpoints/checkpoint_best.pt")
    shutil.copy("checkpoints/checkpoint4.pt", "checkpoints/checkpoint_last.pt")


@case
def ema_begins_later():
    """Any loop whose EMA was switched on at a restart: the first file has no EMA, the others have.

    Wanted: `polyak average ckpt_*.pt -o avg.pt`, of one kind of weights.
    Right: a refusal that names ckpt_100.pt or --key; or 200, all live, or 2.5, the EMA of the last two, and said.
    """
    for number in (1, 2, 3):
        ema = {"ema": w(number)} if number > 1 else {}
        put({"step": 100 * number, "model": w(100 * number), **ema}, f"ckpt_{number * 100}.pt")


# What is written.


@case
def transformers_folder():
    """transformers' save_pretrained(): model.safetensors, config.json, generation_config.json.

    Wanted: `polyak average a b -o avg`, a folder for from_pretrained().
    Right: 2, with config.json of the inputs; or a note that it is to be copied.
    """
    for folder, value in (("a", 1), ("b", 3)):
        hf(value, folder)
        put_text({"eos_token_id": 0}, f"{folder}/generation_config.json")


@case
def bf16_and_fp32():
    """One model saved in bf16 by one run and in fp32 by another.

    Wanted: `polyak average a.safetensors b.safetensors -o avg.safetensors`, and `polyak average a.safetensors
    b.safetensors -o fp32.safetensors --dtype fp32`.
    Right: 2; or refusals that name the dtypes, with --dtype also the cure.
    """
    put_safe({"w": full(1).bfloat16(), "norm": full(1)}, "a.safetensors")
    put_safe({"w": full(3), "norm": full(1)}, "b.safetensors")


@case
def tied_embedding():
    """torch.save of a model whose head is its embedding: two names, one storage.

    Wanted: `polyak average a.pt b.pt -o avg.safetensors`, and then model.load_state_dict(load_file(...)), as the
    README does.
    Right: both names load; or a note that says how.
    """
    for name, value in (("a", 1), ("b", 3)):
        embedding = full(value, 4, 2)
        put({"wte.weight": embedding, "ln.weight": full(value), "lm_head.weight": embedding}, f"{name}.pt")


# What polyak itself wrote.

PARAMETERS = ("0.weight", "1.weight", "1.bias", "2.weight")


def trained(value):
    buffers = {
        "1.running_mean": full(50),
        "1.running_var": full(100),
        "1.num_batches_tracked": torch.tensor(int(value)),
    }
    return {name: full(value) for name in PARAMETERS} | buffers | {"frozen.weight": full(7)}


def averages_state(value, step):
    """`polyak.Average.state_dict()`: the trained parameters, without buffers and frozen layers."""
    settings = {"scheme": "ema:half_life=3", "start": 0, "every": 1, "buffers": "copy", "compensated": False}
    counts = {
        "step": step,
        "sampled_at": step,
        "origin": 0,
        "n_averaged": step,
        "n_skipped": 0,
        "position": float(step),
    }
    return settings | counts | {"average": {name: full(value) for name in PARAMETERS}}


@case
def own_state_beside_the_model():
    """A loop that saves average.state_dict() beside a model with BatchNorm, as docs/training-loops.md says.

    Wanted: `polyak average step-10.pt step-20.pt step-30.pt -o avg.pt`, a model of the averaged weights.
    Right: parameters 2, and the rest from the model beside them; or a refusal that names what lacks.
    """
    for step in (10, 20, 30):
        put(
            {"step": step, "model": trained(10 * step), "ema": averages_state(step / 10, step)},
            f"step-{step}.pt",
        )


@case
def own_lightning_checkpoints():
    """polyak's Lightning callback: state_dict is the averaged model, current_model_state the live one.

    Wanted: `polyak average ckpts -o avg.ckpt`, a model of the averaged weights.
    Right: parameters 2, with the rest of state_dict; or a refusal that names what lacks.
    """
    for step in (10, 20, 30):
        callbacks = {"polyak.Averaging[ema:half_life=3]": averages_state(step / 10, step)}
        models = {"state_dict": trained(step / 10), "current_model_state": trained(10 * step)}
        put(
            lightning(0, step, callbacks=callbacks, **models),
            f"ckpts/epoch={step // 10 - 1}-step={step}.ckpt",
        )


# Messages.


@case
def new_dtype_and_dtensor():
    """A safetensors file with scales of MX formats (F8_E8M0), and FSDP2 state dicts with DTensors, as by verl.

    Wanted: `polyak inspect mx.safetensors`; `polyak average step1.pt step2.pt -o avg.pt`.
    Right: the dtype is shown, and 2; or refusals that name F8_E8M0 and DTensor, and do not call the file damaged.
    """
    from torch import distributed
    from torch.distributed.tensor import Shard, distribute_tensor

    header = json.dumps({"w": {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]}}).encode()
    pathlib.Path("mx.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
    for number, value in ((1, 1), (2, 3)):
        put({"w": distribute_tensor(full(value), mesh, [Shard(0)])}, f"step{number}.pt")
    distributed.destroy_process_group()


@case
def broken_files():
    """Downloads and copies that went wrong: cut short, empty, a git-lfs pointer, an HTML page.

    Wanted: `polyak average step-1.pt cut.pt -o avg.pt`, `polyak average step-1.pt empty.pt -o avg.pt`, `polyak
    average step-1.pt pointer.safetensors -o avg.pt` and `polyak average step-1.pt page.pt -o avg.pt`.
    Right: refusals that name the file, and nothing is written.
    """
    put({"w": torch.randn(3000)}, "step-1.pt")
    pathlib.Path("cut.pt").write_bytes(pathlib.Path("step-1.pt").read_bytes()[:5000])
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 1234\n"
    for content, file in (
        ("", "empty.pt"),
        (pointer, "pointer.safetensors"),
        ("<!DOCTYPE html>404", "page.pt"),
    ):
        put_text(content, file)


# What is right and stays right.


@case
def icefall_running_means():
    """icefall keeps the mean since the beginning in each checkpoint; a mean over (4, 10] is the difference of two.

    Wanted: `polyak average epoch-4.pt epoch-10.pt -o avg.pt --key model_avg --weights=-4,10`.
    Right: 7.5.
    """
    for number in (4, 10):
        since_the_start = w(sum(range(1, number + 1)) / number)
        put(
            {"model": w(number), "model_avg": since_the_start, "optimizer": None, "batch_idx_train": number},
            f"epoch-{number}.pt",
        )


@case
def wrappers_and_nesting():
    """One model under the prefixes of DDP, compile, FSDP and activation checkpointing; and fairseq's extra_state.ema.

    Wanted: `polyak average 'run-*.pt' -o a.pt`; `polyak average ckpt_1.pt ckpt_2.pt -o avg.pt`.
    Right: 4.5 under net.0.weight and net.0.bias; conv.weight is 1.
    """
    prefixes = (
        "",
        "_orig_mod.",
        "module.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "_fsdp_wrapped_module.",
        "module.module.",
    )
    for number, prefix in enumerate(prefixes, 1):
        put(
            {"model": prefixed({"net.0.weight": full(number), "net.0.bias": full(number)}, prefix)},
            f"run-{number}.pt",
        )
    put(
        {"state_dict": {"net._orig_mod.0.weight": full(8), "net._checkpoint_wrapped_module.0.bias": full(8)}},
        "run-8.pt",
    )
    two(
        lambda live, ema: {
            "model": live,
            "args": None,
            "extra_state": {"train_iterator": {"epoch": 1}, "ema": ema},
        }
    )
