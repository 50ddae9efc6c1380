"""Public reports of people whose average of checkpoints was wrong, confusing or an error: their folders, tried here.

Each maker writes what its report is about, in the layout of the tool, and says in its docstring where the report is and
what it is about. Every tensor has one value throughout.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path

import numpy as np
import pytest
import torch
from ema_pytorch import PostHocEMA
from safetensors.torch import save_file
from torch import nn

from polyak import Trajectory, checkpoints
from polyak.cli import main
from polyak.errors import PolyakError


@dataclass(frozen=True)
class Right:
    """What a command comes to: the values written and words that are said, or words of the refusal."""

    command: str
    values: dict[str, float] = field(default_factory=dict)
    words: tuple[str, ...] = ()


REPORTS: dict[str, tuple[Callable[[], None], list[Right]]] = {}


def report(*right: Right):
    def add(make):
        REPORTS[make.__name__] = make, list(right)
        return make

    return add


def full(value, *shape):
    return torch.full(shape or (2, 2), float(value))


def put(tree, path):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    torch.save(tree, path)


def put_safe(tensors, path, metadata=None):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata)


def put_json(content, path):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(content))


# Parts of one model.


@report(
    Right("average 'm_step_*.pt' -o out.npz", words=("under 'generator'", "--key model or --key generator")),
    Right("average 'm_step_*.pt' -o out.npz --key model", {"encoder.weight": 2}, ("'generator'",)),
    Right("average 'm_step_*.pt' -o out.npz --key generator", {"0.weight": -2}),
)
def opennmt_keeps_the_generator_apart():
    """https://github.com/OpenNMT/OpenNMT-py/issues/859: tools/average_models.py on checkpoints of OpenNMT-py.

    The last layer lies under a key of its own. Of the model alone nothing can be translated.
    """
    for step, value in ((1000, 1), (2000, 3)):
        model, generator = {"encoder.weight": full(value)}, {"0.weight": full(-value)}
        rest = {"vocab": {}, "opt": argparse.Namespace(layers=6), "optim": {"state": {}, "param_groups": []}}
        put({"model": model, "generator": generator, **rest}, f"m_step_{step}.pt")


@report(
    Right("average a b -o out", words=("pipeline of several models", "2_Dense")),
    Right("average a/2_Dense b/2_Dense -o out", {"linear.weight": -2}),
)
def sentence_transformers_has_a_dense_layer():
    """https://github.com/arcee-ai/mergekit/issues/286: a merge of sentence-transformers loses its other modules.

    The number in 2_Dense is that of the module, and no step.
    """
    for name, value in (("a", 1), ("b", 3)):
        put_safe({"embeddings.weight": full(value)}, f"{name}/model.safetensors")
        put_safe({"linear.weight": full(-value)}, f"{name}/2_Dense/model.safetensors")
        modules = [{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}, {"idx": 2, "path": "2_Dense"}]
        put_json(modules, f"{name}/modules.json")
        for folder in ("", "1_Pooling", "2_Dense"):
            put_json({}, f"{name}/{folder}/config.json")


@report(
    Right(
        "average pipeA pipeB -o out",
        words=("pipeA is a pipeline of several models", "pipeA/vae of every input"),
    ),
    Right("average pipeA/unet pipeB/unet -o out", {"conv.weight": 2}),
)
def two_pipelines_of_diffusers():
    """https://github.com/huggingface/diffusers/issues/8977: how to merge two Stable Diffusion pipelines."""
    for name, value in (("pipeA", 1), ("pipeB", 3)):
        put_json({"_class_name": "StableDiffusionPipeline"}, f"{name}/model_index.json")
        for part, stem in (
            ("unet", "diffusion_pytorch_model"),
            ("vae", "diffusion_pytorch_model"),
            ("text_encoder", "model"),
        ):
            put_safe({"conv.weight": full(value)}, f"{name}/{part}/{stem}.safetensors")
            put_json({}, f"{name}/{part}/config.json")


@report(
    Right("average . -o ../out.npz", words=("are both of step 5", "'*_net_D_A.pth'")),
    Right("average '*_net_G_A.pth' -o ../out.npz", {"w": 2}, ("latest_net_G_A.pth",)),
)
def cyclegan_has_four_nets():
    """https://github.com/junyanz/pytorch-CycleGAN-and-pix2pix/issues/1374: which of the files belong together."""
    for epoch, value in ((5, 1), (10, 3), ("latest", 3)):
        for place, net in enumerate(("D_A", "D_B", "G_A", "G_B")):
            put({"w": full(value + 100 * (place != 2))}, f"{epoch}_net_{net}.pth")


# Several states or averages of one run.


@report(
    Right("average results -o out.npz", words=("0.2.pt and 1.2.pt are of one step", "'0.*'", "--weights")),
    Right("average 'results/0.*' -o out.npz", {"bias": 2}),
    Right("average results/0.2.pt results/1.2.pt -o out.npz --weights 2,-1", {"bias": 1}),
)
def ema_pytorch_writes_two_widths():
    """https://github.com/lucidrains/ema-pytorch/issues/14: post-hoc EMA, which keeps two averages at every step.

    A plain mean of both is neither of them.
    """
    net = nn.Linear(1, 1)
    ema = PostHocEMA(
        net,
        sigma_rels=(0.05, 0.2),
        checkpoint_every_num_steps=2,
        checkpoint_folder="results",
        checkpoint_dtype=torch.float32,
    )
    for step in range(1, 5):
        # The averages of one value are this value.
        nn.init.constant_(net.bias, 1.0 if step < 3 else 3.0)
        ema.update()
        if step % 2 == 0:
            for index in (0, 1):
                path = f"results/{index}.{step}.pt"
                saved = torch.load(path)
                saved["ema_model.bias"].fill_(step - 1)
                saved["ema_model.weight"].fill_(0)
                torch.save(saved, path)


@report(
    Right(
        "average results -o out.npz", words=("fold_0/checkpoint_best.pth and fold_0/checkpoint_final.pth",)
    ),
    Right("average 'results/*/checkpoint_final.pth' -o out.npz", {"conv.weight": 2}),
)
def nnunet_has_a_best_and_a_final_model_of_every_fold():
    """https://github.com/MIC-DKFZ/nnUNet/issues/2030: where is the checkpoint of the ensemble of folds."""
    for fold, value in ((0, 1), (1, 3)):
        for name, epoch, weights in (("best", 700 + fold, full(50)), ("final", 1000, full(value))):
            tree = {
                "network_weights": {"conv.weight": weights},
                "current_epoch": epoch,
                "trainer_name": "nnUNetTrainer",
            }
            put(tree | {"_best_ema": np.float64(0.8)}, f"results/fold_{fold}/checkpoint_{name}.pth")


@report(
    Right("average . -o ../out.npz", {"encoder_W": 2}, ("model.npz.orig.npz",)),
    Right("average model.iter10000.npz model.iter30000.npz -o ../out.npz", words=("model.iter30000.npz",)),
)
def marian_has_smoothed_and_original_weights():
    """https://github.com/marian-nmt/marian/issues/77: average.py fails on a name that is not there, without saying so.

    With exponential smoothing model.npz is an average, and model.npz.orig.npz the live weights.
    """
    config = np.frombuffer(b"type: transformer\0", np.int8)

    def save(name, value):
        np.savez(name, **{"encoder_W": np.full((2, 2), value, np.float32), "special:model.yml": config})

    for name, value in (("model.iter10000.npz", 1), ("model.iter20000.npz", 3), ("model.npz", 3)):
        save(name, value)
    for name in ("model.npz.orig.npz", "model.npz.best-cross-entropy.npz"):
        save(name, 50)
    np.savez(
        "model.npz.optimizer.npz", adam_mt=np.ones((1, 4), np.float32), adam_vt=np.ones((1, 4), np.float32)
    )


@report(
    Right("average . -o ../out.npz", words=("'swa_model_epoch=5.ckpt'", "averages")),
    Right("average 'epoch=*.ckpt' -o ../out.npz", {"w": 2}),
)
def lightning_with_a_file_of_swa_beside():
    """https://github.com/Lightning-AI/pytorch-lightning/issues/1329: SWA weights saved as one more checkpoint."""
    for epoch, value, name in ((3, 1, "epoch=3"), (4, 3, "epoch=4"), (5, 50, "swa_model_epoch=5")):
        put({"state_dict": {"w": full(value)}, "epoch": epoch, "global_step": 10 * epoch}, f"{name}.ckpt")


@report(
    Right("average outputs -o out", {"model.w": 2}, ("checkpoints/last/pretrained_model",)),
    Right("average outputs -o out --last 1", {"model.w": 3}),
)
def lerobot_numbers_of_two_widths():
    """https://github.com/strands-labs/robots/pull/3165: a prolonged run has 020000 beside 0100000; last is a link."""
    for step, value in (("020000", 1), ("0100000", 3)):
        folder = f"outputs/checkpoints/{step}"
        put_safe({"model.w": full(value)}, f"{folder}/pretrained_model/model.safetensors")
        put_json({"type": "act"}, f"{folder}/pretrained_model/config.json")
        put_safe({"state/0/exp_avg": full(99)}, f"{folder}/training_state/optimizer_state.safetensors")
        put_safe({"torch_rng_state": torch.ones(8)}, f"{folder}/training_state/rng_state.safetensors")
        put_json({"step": int(step)}, f"{folder}/training_state/training_step.json")
    os.symlink("0100000", "outputs/checkpoints/last")


# Formats and dtypes.


@report(
    Right("average run -o out", {"w": 2}, ("diffusion_pytorch_model.fp16.safetensors",)),
)
def diffusers_variants_beside_the_full_weights():
    """https://github.com/huggingface/diffusers/pull/2305: fp16 variants lie in the folder of the full weights."""
    for step, value in ((500, 1), (1000, 3)):
        folder = f"run/checkpoint-{step}/unet"
        put_safe({"w": full(value)}, f"{folder}/diffusion_pytorch_model.safetensors")
        put_safe({"w": full(50).half()}, f"{folder}/diffusion_pytorch_model.fp16.safetensors")
        put_json({"_class_name": "UNet2DConditionModel"}, f"{folder}/config.json")


@report(Right("average a.safetensors b.safetensors -o out.safetensors", words=("position_ids", "int64")))
def position_ids_became_numbers():
    """https://github.com/AUTOMATIC1111/stable-diffusion-webui/pull/6728: merges made CLIP's position_ids floats."""
    for name, ids in (("a", torch.arange(4)), ("b", torch.arange(4) + 0.04)):
        put_safe({"w": full(1), "text_model.embeddings.position_ids": ids[None]}, f"{name}.safetensors")


@report(
    Right(
        "average 'epoch_*.pt' -o out.npz",
        {"bn.running_mean": 2, "bn.num_batches_tracked": 20},
        ("update_bn",),
    )
)
def batchnorm_counts_batches_in_integers():
    """https://github.com/rwth-i6/returnn/pull/1509: an int64 buffer cannot be divided in place."""
    for epoch, value in ((1, 1), (2, 3)):
        buffers = {"bn.running_mean": full(value), "bn.num_batches_tracked": torch.tensor(10 * epoch)}
        put({"model": buffers, "epoch": epoch}, f"epoch_{epoch}.pt")


# Adapters.


@report(
    Right(
        "average antiblur.safetensors ultimator.safetensors -o out.safetensors --rank 3",
        words=("LoRA: the mean of 2 updates", "keeps 100.0%"),
    )
)
def flux_adapters_under_the_names_of_diffusers():
    """https://github.com/bmaltais/kohya_ss/issues/2975: adapters with names of transformer blocks are passed over."""
    module = "transformer.single_transformer_blocks.0.attn.to_k"
    for name, rank in (("antiblur", 1), ("ultimator", 2)):
        factors = {f"{module}.lora_A.weight": full(1, rank, 4), f"{module}.lora_B.weight": full(1, 4, rank)}
        put_safe(factors, f"{name}.safetensors", {"format": "pt"})


@report(
    Right("average a.safetensors b.safetensors -o out.safetensors --rank 1", words=("the mean of 2 updates",))
)
def alphas_of_kohya_count():
    """https://github.com/cloneofsimo/lora/issues/187: the alphas of the files are not seen by the merge."""
    for name, alpha in (("a", 1), ("b", 3)):
        factors = {"lora_unet_q.lora_down.weight": full(1, 1, 4), "lora_unet_q.lora_up.weight": full(1, 4, 1)}
        put_safe(factors | {"lora_unet_q.alpha": torch.tensor(float(alpha))}, f"{name}.safetensors")


COMMANDS = [(name, number) for name, (_, right) in REPORTS.items() for number in range(len(right))]


@pytest.mark.parametrize(("name", "number"), COMMANDS)
def test_right_or_refused(tmp_path, monkeypatch, capsys, name, number):
    make, right = REPORTS[name][0], REPORTS[name][1][number]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    make()
    capsys.readouterr()
    arguments = shlex.split(right.command)
    output = Path(arguments[arguments.index("-o") + 1])
    code = main(arguments)
    printed = capsys.readouterr()
    said = " ".join((printed.out + printed.err).split())
    assert "Traceback" not in said and all(word in said for word in right.words), said
    assert (code, output.exists()) in ((0, True), (2, False))
    if right.values:
        opened = checkpoints.open(output)
        for tensor, value in right.values.items():
            assert opened.read(tensor).double().mean().item() == pytest.approx(value), said


@pytest.mark.parametrize("name", REPORTS)
def test_every_command_reads_the_same(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    make, right = REPORTS[name]
    make()
    words = shlex.split(right[0].command)[1:]
    inputs = [path for word in words[: words.index("-o")] for path in sorted(glob(word))]
    is_refused = main(["average", *inputs, "-o", str(tmp_path.parent / "dry.npz"), "--dry-run"]) == 2
    assert main(["inspect", inputs[0] if len(inputs) == 1 else "."]) in (0, 2)
    assert "Traceback" not in "".join(capsys.readouterr())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what was left out
        if is_refused:
            with pytest.raises(PolyakError):
                Trajectory.from_checkpoints(inputs)
            return
        try:
            Trajectory.from_checkpoints(inputs)
        except PolyakError as error:
            assert "no step is known" in str(error) or "lora_A" in str(error)  # unlike ranks have no blocks


def test_the_update_of_a_merge_is_scaled_by_alpha(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    alphas_of_kohya_count()
    assert main(["average", "a.safetensors", "b.safetensors", "-o", "out.safetensors"]) == 0
    read = checkpoints.open("out.safetensors").read
    up, down, alpha = (
        read(f"lora_unet_q.{name}") for name in ("lora_up.weight", "lora_down.weight", "alpha")
    )
    torch.testing.assert_close(up @ down * alpha, full(2, 4, 4))
