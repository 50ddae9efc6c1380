"""Every folder of ``checkpoint_cases``, with the very commands of its docstring: right, or refused with the cure."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from glob import glob
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from checkpoint_cases import CASES, PARAMETERS
from polyak.cli import main

# What a command may come to.


@dataclass(frozen=True)
class Written:
    """The output holds these tensors and no others, and stdout has one of the words of ``note``, if there are any."""

    values: Mapping[str, float] | Callable[[dict[str, Tensor], str], bool]
    note: tuple[str, ...] = ()
    files: tuple[str, ...] = ()

    def holds(self, tensors: dict[str, Tensor], output: Path, out: str) -> bool:
        if not all((output / file).exists() for file in self.files):
            return False
        if self.note and not any(word.lower() in out.lower() for word in self.note):
            return False
        if callable(self.values):
            return self.values(tensors, out)
        return tensors.keys() == self.values.keys() and all(
            torch.allclose(tensor.double(), torch.full_like(tensor, self.values[name], dtype=torch.float64))
            for name, tensor in tensors.items()
        )


@dataclass(frozen=True)
class Shown:
    """Nothing is written, and stdout has one of the words."""

    words: tuple[str, ...]


@dataclass(frozen=True)
class Refused:
    """Exit code 2, nothing is written, and stderr has one of the words."""

    words: tuple[str, ...]


def written(*, note: tuple[str, ...] = (), files: tuple[str, ...] = (), **values: float) -> Written:
    return Written(values, note, files)


def refused(*words: str) -> Refused:
    return Refused(words)


def conv(value: float) -> Written:
    return Written({"conv.weight": value, "conv.bias": value})


def averaged_model(batches: int) -> Written:
    """The trained parameters averaged, with the buffers and the frozen layer of the last model."""
    rest = {"1.running_mean": 50, "1.running_var": 100, "frozen.weight": 7, "1.num_batches_tracked": batches}
    return Written(dict.fromkeys(PARAMETERS, 2) | rest)


# The mean of two adapters.


def update(tensors: Mapping[str, Tensor]) -> Tensor:
    (a,) = (tensor.double() for name, tensor in tensors.items() if "lora_A" in name)
    (b,) = (tensor.double() for name, tensor in tensors.items() if "lora_B" in name)
    return b @ a


def is_a_mean_of_adapters(tensors: dict[str, Tensor], out: str) -> bool:
    """The mean update, or its best approximation of lower rank, up to scale; or the mean of the factors, and said."""
    a, b = (load_file(f"{folder}/adapter_model.safetensors") for folder in "ab")
    got, mean = update(tensors), (update(a) + update(b)) / 2
    rank = next(tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name)
    u, s, vh = torch.linalg.svd(mean, full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ vh[:rank]
    if torch.nn.functional.cosine_similarity(got.flatten(), best.flatten(), dim=0) > 1 - 1e-6:
        return rank >= 4 or any(word in out for word in ("rank", "norm"))
    factors = update({name: (tensor + b[name]) / 2 for name, tensor in a.items()})
    return torch.allclose(got, factors, rtol=1e-5) and "factors" in out


def is_the_mean_of_c_and_d(tensors: dict[str, Tensor], out: str) -> bool:
    """The same factors with alpha 4 and 32 of rank 2: the mean is 9 B A, and c's config scales by 2."""
    c = update(load_file("c/adapter_model.safetensors"))
    return torch.allclose(2 * update(tensors), 9 * c, rtol=1e-5, atol=1e-5)


# What is right, for each command of a case's docstring in turn: any of these.

RIGHT: dict[str, list[list[Written | Shown | Refused]]] = {
    "lightning_last": [[Written({"net.weight": 40}), refused("last.ckpt")]],
    "timm_links": [[written(w=1.5), refused("last.pth.tar", "model_best")]],
    "nemo_twins": [
        [Written({"net.weight": 2}), refused("-EMA")],
        [Written({"net.weight": 8 / 3}), refused("-last")],
    ],
    "unet_and_unet_ema": [[written(w=-750), refused("unet_ema")]],
    "mmengine_hook": [[conv(1), refused("state_dict")]],
    "f5_tts": [[conv(1), refused("ema_model_state_dict")]],
    "basicsr_params": [[conv(1), refused("params_ema")]],
    "cosmos_key": [[Written({"blk.weight": 1}), refused("prefix")]],
    "llama_consolidated": [[refused("consolidated.01", "rank", "shard")]],
    "nemo_mp_rank": [[refused("rank")], [written(w=2500)]],
    "trainer_output_folder": [[written(w=5), refused("checkpoint-"), written(w=8, note=("checkpoint-",))]],
    "peft_adapters": [
        [Written(is_a_mean_of_adapters), refused("adapter")],
        [Written(is_the_mean_of_c_and_d, ("alpha",))],
    ],
    "gptq": [[refused("quanti")]],
    "fp8_with_scales": [[refused("scale")]],
    "stale_index_and_shards": [[written(u=5, w=5), refused("model.safetensors.index.json")]],
    "thousands_and_millions": [[written(w=1e6), refused("step")]],
    "step_within_its_epoch": [[written(w=2050), refused("step")]],
    "speechbrain_dates": [[Written({"enc.weight": 3.5}), refused("step")]],
    "usual_names": [[written(w=4400)], [written(w=100)], [written(w=20)], [written(w=20)]],
    "timm_with_its_arguments": [[written(w=1.5)]],
    "nnunet_folds": [[Written({"encoder.conv.weight": 0.5}), refused("--")]],
    "code_is_not_run": [[refused("system"), written(w=2)], [refused("Net")]],
    "zero3_model_states": [[refused("ZeRO-3", "empty tensors", "zero_to_fp32.py")]] * 2,
    "zero2_folders": [
        [Written({"lin.weight": 2}), refused("mp_rank_00_model_states.pt")],
        [Written({"lin.weight": 7 / 3})],
    ],
    "optimizer_alone": [[refused("optimizer")]],
    "wenet": [[written(w=1.5), refused("init.pt", "final.pt")]],
    "fairseq": [[written(w=2.5), refused("checkpoint_best", "checkpoint_last")]],
    "ema_begins_later": [
        [
            refused("ckpt_100.pt", "--key"),
            written(w=200, note=("'model'",)),
            written(w=2.5, note=("ckpt_100.pt",)),
        ]
    ],
    "transformers_folder": [[written(w=2, files=("config.json",)), written(w=2, note=("config.json",))]],
    "bf16_and_fp32": [
        [written(w=2, norm=1), refused("bfloat16", "bf16")],
        [written(w=2, norm=1), refused("bfloat16", "bf16")],
    ],
    "tied_embedding": [
        [
            Written({"wte.weight": 2, "ln.weight": 2, "lm_head.weight": 2}),
            Written({"wte.weight": 2, "ln.weight": 2}, note=("lm_head.weight",)),
        ]
    ],
    "own_state_beside_the_model": [[averaged_model(300), refused("running_mean", "frozen.weight")]],
    "own_lightning_checkpoints": [[averaged_model(3), refused("running_mean", "frozen.weight")]],
    "new_dtype_and_dtensor": [
        [Shown(("F8_E8M0", "float8_e8m0fnu")), refused("F8_E8M0")],
        [written(w=2), refused("DTensor")],
    ],
    "broken_files": [[refused(file)] for file in ("cut.pt", "empty.pt", "pointer.safetensors", "page.pt")],
    "icefall_running_means": [[written(w=7.5)]],
    "wrappers_and_nesting": [[Written({"net.0.weight": 4.5, "net.0.bias": 4.5})], [conv(1)]],
}


def commands(name: str) -> list[str]:
    """What a person types, as the case's docstring says it."""
    return [" ".join(text.split()) for text in re.findall(r"`polyak\s+([^`]+)`", CASES[name].__doc__ or "")]


def as_a_shell_would(command: str) -> list[str]:
    """The arguments: a pattern in quotes is passed on, another is replaced by what it matches."""
    arguments: list[str] = []
    for word in shlex.split(command, posix=False):
        bare = word.strip("'")
        matches = sorted(glob(word)) if word == bare and "*" in word else []
        arguments += matches or [bare]
    return arguments


def read(output: Path) -> dict[str, Tensor]:
    """The tensors of an output by their own libraries' readers, so that polyak cannot hide what is wrong with it."""
    if output.is_dir():
        return {
            name: tensor for file in output.glob("*.safetensors") for name, tensor in load_file(file).items()
        }
    if output.suffix == ".safetensors":
        return load_file(output)
    if output.suffix == ".npz":
        with np.load(output) as arrays:
            return {
                name: torch.from_numpy(arrays[name])
                for name in arrays.files
                if name + ".npy" in arrays.zip.namelist()
            }
    return dict(torch.load(output, weights_only=True))


def state(folder: Path) -> dict[Path, int]:
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*") if not path.is_dir()}


EACH_COMMAND = [(name, number) for name, right in RIGHT.items() for number in range(len(right))]


@pytest.mark.parametrize(("name", "number"), EACH_COMMAND)
def test_right_or_refused(tmp_path, monkeypatch, capsys, name, number):
    monkeypatch.chdir(tmp_path)
    CASES[name]()
    before = state(tmp_path)
    command = commands(name)[number]
    arguments = as_a_shell_would(command)
    code = main(arguments)
    captured = capsys.readouterr()
    outcome = f"polyak {command}\n{captured.out}{captured.err}"
    assert "Traceback" not in captured.err and "damaged" not in captured.err * (
        name == "new_dtype_and_dtensor"
    )
    assert code in (0, 2), outcome
    assert not Path("ran").exists()
    right = RIGHT[name][number]
    if code == 0 and "-o" in arguments:
        output = Path(arguments[arguments.index("-o") + 1])
        tensors = read(output)
        values = {tensor: round(value.double().mean().item(), 4) for tensor, value in tensors.items()}
        accepted = [result for result in right if isinstance(result, Written)]
        assert any(result.holds(tensors, output, captured.out) for result in accepted), f"{outcome}{values}"
        assert {path: time for path, time in state(tmp_path).items() if path in before} == before
        return
    expected, said = (Shown, captured.out) if code == 0 else (Refused, captured.err)
    words = [word for result in right if isinstance(result, expected) for word in result.words]
    assert any(word.lower() in said.lower() for word in words), outcome
    assert state(tmp_path) == before, "something was written"


def test_every_command_of_every_case_has_its_result():
    assert {name: len(commands(name)) for name in CASES} == {
        name: len(right) for name, right in RIGHT.items()
    }


def test_a_file_that_runs_a_command_is_made(tmp_path, monkeypatch):
    """What the commands of ``code_is_not_run`` leave unrun does run where pickles are trusted."""
    monkeypatch.chdir(tmp_path)
    CASES["code_is_not_run"]()
    assert not Path("ran").exists()
    torch.load("evil_1.pt", weights_only=False)
    assert Path("ran").exists()
