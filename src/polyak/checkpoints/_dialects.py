"""Where training tools keep things in their checkpoints, as data: one entry for each tool.

An entry says under which keys the averaged and the live weights lie, which entries tell the step, and which files of
the tool's folders hold no weights. How this is used is in ``_tree`` (inside a file) and in ``polyak.combine._reading``
(in folders). Keys are dotted where they are nested. A tool without an entry is read like the others, by the same words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import translate
from pathlib import Path

__all__ = [
    "DIALECTS",
    "LIVE_BESIDE",
    "PIPELINE_FILES",
    "STEP_KEYS",
    "STEP_PATHS",
    "Dialect",
    "is_average_beside",
    "is_no_weights_file",
    "key_rank",
    "rank_part",
]


@dataclass(frozen=True)
class Dialect:
    """What one tool writes.

    Attributes:
        tool: its name.
        averaged: keys of averaged weights, the best first.
        live: keys of the weights that were trained.
        marks: entries by which a checkpoint is known to be the tool's; then only its own keys count, averaged ones
            first. Without marks the keys are looked for in every checkpoint.
        averaged_prefix: in a flat dict, how the names of averaged weights begin; it is left out of names.
        live_prefix: how those of the live weights beside them begin.
        counters: names beside averaged weights that are no weights.
        without_dots: averaged names lack the dots of the live ones.
        steps: entries that tell the step, the best first; those that end in ``epoch`` count epochs.
        no_weights: patterns of files of its folders that hold no weights.
        averages_beside: patterns of files and folders that may hold averages, in the folder of a checkpoint's weights.
        live_beside: files and folders of weights in such a folder, where it is not itself what a library loads.
        ranks: where each rank writes a file of its own, patterns of what in its path says of which rank it is; the
            rest is the path of the whole checkpoint: its folder, or a file that is not there.
    """

    tool: str
    averaged: tuple[str, ...] = ()
    live: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()
    averaged_prefix: str = ""
    live_prefix: str = ""
    counters: tuple[str, ...] = ()
    without_dots: bool = False
    steps: tuple[str, ...] = ()
    no_weights: tuple[str, ...] = ()
    averages_beside: tuple[str, ...] = ()
    live_beside: tuple[str, ...] = ()
    ranks: tuple[str, ...] = ()


DIALECTS = (
    Dialect("polyak", averaged=("average",), steps=("step",), averages_beside=("polyak-*",)),
    # Lightning's WeightAveraging and polyak's Averaging exchange the two when they save.
    Dialect(
        "Lightning averaging",
        averaged=("state_dict",),
        live=("current_model_state",),
        marks=("state_dict", "current_model_state"),
        steps=("global_step", "epoch"),
    ),
    Dialect("Lightning", live=("state_dict",), steps=("global_step", "epoch")),
    # Its EMAHook exchanges the two as well; without the counter they are what they are called.
    Dialect(
        "MMEngine",
        averaged=("state_dict",),
        live=("ema_state_dict",),
        marks=("state_dict", "ema_state_dict.steps"),
        counters=("steps",),
        steps=("meta.iter", "meta.epoch"),
    ),
    Dialect("MMEngine without EMA", live=("state_dict",), steps=("meta.iter", "meta.epoch")),
    Dialect(
        "timm",
        averaged=("state_dict_ema",),
        live=("state_dict",),
        steps=("epoch",),
    ),
    Dialect(
        "ema-pytorch",
        averaged=("ema",),
        live=("model",),
        averaged_prefix="ema_model.",
        live_prefix="online_model.",
        counters=("initted", "step"),
    ),
    Dialect(
        "F5-TTS", averaged=("ema_model_state_dict",), live=("model_state_dict",), steps=("update", "step")
    ),
    Dialect(
        "diffusers",
        averaged=("shadow_params",),
        steps=("optimization_step",),
        no_weights=("optimizer*.bin", "scheduler*.bin", "random_states_*.pkl", "sampler*.bin"),
    ),
    Dialect("BasicSR", averaged=("params_ema",), live=("params",), steps=("iter",)),
    Dialect("StyleGAN", averaged=("g_ema", "G_ema"), live=("g", "G", "generator")),
    Dialect(
        "latent-diffusion",
        averaged_prefix="model_ema.",
        live_prefix="model.",
        counters=("model_ema.decay", "model_ema.num_updates"),
        without_dots=True,
    ),
    Dialect("cosmos", averaged_prefix="net_ema.", live_prefix="net."),
    Dialect("Unbiased Teacher", averaged_prefix="modelTeacher.", live_prefix="modelStudent."),
    Dialect("DINO", averaged=("teacher",), live=("student",), steps=("epoch",)),
    Dialect(
        "fairseq",
        averaged=("extra_state.ema",),
        live=("model",),
        steps=("extra_state.train_iterator.epoch", "extra_state.epoch"),
        ranks=(r"-model_part-\d+(?:-shard\d+)?(?=\.\w+$)", r"-shard\d+(?=\.\w+$)"),
    ),
    Dialect(
        "Megatron",
        live=("model",),
        steps=("iteration",),
        no_weights=("distrib_optim.pt", "common.pt"),
        ranks=(r"(?<=/)mp_rank_\d+(?:_\d+)*/model_(?:optim_)?rng\.pt$",),
    ),
    Dialect("NeMo", ranks=(r"(?<=/)(?:mp_rank_\d+(?:_\d+)*|tp_rank_\d+_pp_rank_\d+)/(?=[^/]+$)",)),
    Dialect("Llama", ranks=(r"(?<=/)consolidated\.\d+\.\w+$",)),
    Dialect(
        "DeepSpeed",
        live=("module",),
        steps=("global_steps",),
        no_weights=("*_optim_states.pt",),
        # The second are the layers of a pipeline, each in a file of its own for each rank.
        ranks=(
            r"(?<=/)(?:layer_\d+_expert_\d+_)?mp_rank_\d+_model_states\.pt$",
            r"(?<=/)layer_\d+-model_\d+-model_states\.pt$",
        ),
    ),
    Dialect(
        "transformers",
        no_weights=(
            "optimizer.pt",
            "optimizer.bin",
            "scheduler.pt",
            "scaler.pt",
            "rng_state*.pth",
            "training_args.bin",
        ),
    ),
    Dialect("detectron2", averaged=("ema_state",), live=("model",), steps=("iteration",)),
    Dialect("nnU-Net", live=("network_weights",), steps=("current_epoch",)),
    Dialect("espnet", live=("model",)),
    # The mean since the beginning is of use in differences of two, with weights; by itself it looks back too far.
    Dialect(
        "icefall",
        live=("model", "model_avg"),
        marks=("model", "model_avg", "batch_idx_train"),
        steps=("batch_idx_train",),
    ),
    Dialect(
        "SpeechBrain",
        no_weights=(
            "*optimizer*.ckpt",
            "brain.ckpt",
            "*counter.ckpt",
            "dataloader*.ckpt",
            "*scheduler*.ckpt",
        ),
    ),
    Dialect("OLMo", live=("model",), no_weights=("optim.pt", "train.pt", "optim.safetensors", "other.pt")),
    Dialect("guided-diffusion", no_weights=("opt[0-9][0-9][0-9][0-9][0-9][0-9].pt",)),
    Dialect("Composer", live=("state.model",), steps=("state.timestamp.Timestamp.batch",)),
    Dialect("Marian", no_weights=("*.npz.optimizer.npz",)),
    Dialect("nanoGPT and litgpt", live=("model",), steps=("iter_num", "step_count")),
    Dialect(
        "k-diffusion and DiT",
        averaged=("model_ema", "ema"),
        live=("model",),
        steps=("step", "train_steps", "epoch"),
    ),
    Dialect(
        "accelerate",
        no_weights=("optimizer_[0-9]*", "custom_checkpoint_*.pkl", "dl_state_dict*.bin"),
        averages_beside=("custom_checkpoint_*.pkl",),
        live_beside=("pytorch_model_fsdp_0", "pytorch_model_fsdp.bin"),
    ),
)

# Keys of tools without an entry are read by the words that they are made of; averaged ones first, as who saved an
# average wants it used.
_MODEL_WORD = "(?:model|net|network|weights?|params?|state|dict|g|generator|unet|module|dit|transformer)"
_AVERAGED_KEY = re.compile(
    rf"(?:{_MODEL_WORD}_?)*(?:ema|swa|averaged?|moving_?average|shadow)(?:_?{_MODEL_WORD})*(?:_?0?\.\d+)?",
    re.IGNORECASE,
)
_UNMARKED = [dialect for dialect in DIALECTS if not dialect.marks]


def _last_parts(keys: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(key.rpartition(".")[2] for key in keys))


AVERAGED_KEYS = _last_parts(key for dialect in _UNMARKED for key in dialect.averaged)
LIVE_KEYS = _last_parts(
    [
        *("state_dict", "model_state_dict", "model", "module"),
        *(key for dialect in _UNMARKED for key in dialect.live),
        *("model_state", "net", "network", "weights"),
    ]
)
# Entries that tell the step, at the top or beside the weights; and those that the tools have in other places.
STEP_KEYS = ("global_step", "optimization_step", "num_updates", "step", "iteration", "epoch")
STEP_PATHS = tuple(dict.fromkeys(path for dialect in DIALECTS for path in dialect.steps))


def key_rank(key: str) -> tuple[bool, int] | None:
    """How much a key promises weights: averaged ones before live ones, known ones before others; None if it does not.

    >>> key_rank("ema") < key_rank("ema_0.9999") < key_rank("state_dict"), key_rank("optimizer")
    (True, None)
    """
    if key in AVERAGED_KEYS:
        return False, AVERAGED_KEYS.index(key)
    if key in LIVE_KEYS:
        return True, LIVE_KEYS.index(key)
    return (False, len(AVERAGED_KEYS)) if _AVERAGED_KEY.fullmatch(key) else None


# Files by which diffusers and sentence-transformers say that the folders beside them are the models of one pipeline.
PIPELINE_FILES = ("model_index.json", "modules.json")


def _any_of(patterns: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(translate, patterns)))


_NO_WEIGHTS = _any_of(pattern for dialect in DIALECTS for pattern in dialect.no_weights)
_AVERAGES_BESIDE = _any_of(pattern for dialect in DIALECTS for pattern in dialect.averages_beside)
LIVE_BESIDE = tuple(name for dialect in DIALECTS for name in dialect.live_beside)


def is_no_weights_file(name: str) -> bool:
    """Whether a file of this name in a tool's folder is known to hold no weights.

    >>> is_no_weights_file("rng_state_0.pth"), is_no_weights_file("opt-125m.pt")
    (True, False)
    """
    return _NO_WEIGHTS.fullmatch(name) is not None


def is_average_beside(name: str) -> bool:
    """Whether what is called so in the folder of a checkpoint may be an average of its weights.

    >>> is_average_beside("polyak-ema.pt"), is_average_beside("model.safetensors")
    (True, False)
    """
    return _AVERAGES_BESIDE.fullmatch(name) is not None


_RANKS = [re.compile(pattern) for dialect in DIALECTS for pattern in dialect.ranks]


def rank_part(path: Path) -> tuple[str, Path] | None:
    """Which rank's part a path is of, and the path of the whole checkpoint; None where it is no such part.

    >>> rank_part(Path("run/iter_0000100/mp_rank_00/model_optim_rng.pt"))
    ('mp_rank_00/model_optim_rng.pt', PosixPath('run/iter_0000100'))
    >>> rank_part(Path("run/checkpoint_3-model_part-1.pt"))
    ('model_part-1', PosixPath('run/checkpoint_3.pt'))
    """
    text = path.as_posix()
    found = next((match for pattern in _RANKS if (match := pattern.search(text))), None)
    return (
        None if found is None else (found[0].strip("-/"), Path(text[: found.start()] + text[found.end() :]))
    )
