"""What an average is written with, so that the library of its inputs loads it: the files beside its weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyak.checkpoints import Checkpoint, Layout, create
from polyak.checkpoints._checkpoint import format_for, layout_of
from polyak.checkpoints._huggingface import library_stem
from polyak.checkpoints._io import SIDECAR
from polyak.combine._nesting import nested_like
from polyak.errors import CheckpointError, name_list

__all__ = ["completed", "small_files", "write_completed"]


def write_completed(
    path: str | PathLike[str],
    tensors: Mapping[str, Tensor],
    inputs: Sequence[Checkpoint],
    *,
    metadata: Mapping[str, str],
    like: str | PathLike[str] | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Write tensors as a model of the ``inputs``, to be loaded where they are; the notes of :func:`completed`.

    Raises as ``checkpoints.write`` and :func:`completed`.
    """
    output = Path(path)
    layout, notes = completed(layout_of(tensors, path, metadata=metadata), inputs, output, like=like)
    with create(path, layout, overwrite=overwrite) as writer:
        writer.fill(tensors)
    return notes


def completed(
    layout: Layout,
    inputs: Sequence[Checkpoint],
    output: Path,
    *,
    like: str | PathLike[str] | None = None,
    key: str | None = None,
) -> tuple[Layout, list[str]]:
    """The layout with what else ``output`` needs to be loaded, and notes about it, one sentence each.

    Raises ``CheckpointError`` if a file beside the inputs cannot be read; with ``like`` as ``nested_like`` does.
    """
    format = format_for(output, None)
    notes = list(_ties_note(layout, output)) if format == "safetensors" else []
    folders = _library_folders(inputs)
    if folders and format == "huggingface":
        layout, folder_notes = _as_library_folder(layout, inputs[0], folders)
        notes += folder_notes
    elif folders and format in ("safetensors", "pt"):
        notes.append(
            f"{output.name} has no {name_list(_configs(folders[0]))} beside it: where it is to be loaded by "
            "from_pretrained, name an output without a suffix, which becomes a folder"
        )
    if like is not None:
        layout, note = nested_like(layout, Path(like), key, output)
        notes.append(note)
    return layout, notes


def _ties_note(layout: Layout, output: Path) -> Iterator[str]:
    if layout.ties:
        pairs = [f"{tied} = {name}" for tied, name in layout.ties.items()]
        yield (
            f"tied, and stored once: {name_list(pairs)}. Load with safetensors.torch.load_model(model, "
            f"{output.name!r}), which ties them; load_state_dict(load_file(...)) would lack the first names"
        )


# Folders of transformers, diffusers and PEFT: weights, beside a config that says which model they are of.

_TRANSFORMERS_CONFIG = "config.json"
_CONFIGS = (_TRANSFORMERS_CONFIG, "adapter_config.json")


def _library_folders(inputs: Sequence[Checkpoint]) -> list[Path]:
    """The folders that the inputs are, or whose weights' file they are."""
    folders = [one.path if one.path.is_dir() else one.path.absolute().parent for one in inputs]
    return [
        folder
        for folder, one in zip(folders, inputs, strict=True)
        if _configs(folder) and _holds_weights(folder, one)
    ]


def _holds_weights(folder: Path, checkpoint: Checkpoint) -> bool:
    stem = library_stem(folder)
    return stem is not None and (checkpoint.path.is_dir() or checkpoint.path.name == f"{stem}.safetensors")


def _configs(folder: Path) -> list[str]:
    return [name for name in _CONFIGS if (folder / name).is_file()]


def _as_library_folder(
    layout: Layout, first: Checkpoint, folders: Sequence[Path]
) -> tuple[Layout, list[str]]:
    home = folders[0]
    copied, left_out = small_files(home)
    beside: dict[str, Path | bytes] = {file.name: file for file in copied}
    notes = [f"copied from {home.name}: {name_list(list(beside), most=20)}"]
    if left_out:
        notes.append(f"not copied from {home.name}: {name_list(left_out, most=20)}")
    notes += _differences(folders, set(layout.beside))
    dtype = _changed_dtype(layout, first)
    if dtype is not None and _TRANSFORMERS_CONFIG in beside:
        config = _with_dtype(_read_json(home / _TRANSFORMERS_CONFIG), dtype)
        beside[_TRANSFORMERS_CONFIG] = json.dumps(config, indent=2).encode() + b"\n"
    return replace(layout, beside=beside | dict(layout.beside), stem=library_stem(home)), notes


# Which files are copied: those that say what the model and its tokenizer are. Never weights, state or records of the
# training, and no code, which nobody has looked at.

_COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "*.spm", "*.tiktoken")
_NEVER_COPIED = (
    "*.index.json",
    "*_results.json",
    "latest*",
    "*optim*",
    "*sched*",
    "manifest.json",
    "random_states*",
    "rng_state*",
    "scaler*",
    "trainer_state*",
    "training_args*",
    SIDECAR,
)
_WEIGHTS = ("*.safetensors", "*model*.bin", "*.index.json", SIDECAR)
# The largest tokenizers have 35 MB.
_MOST_BYTES = 50_000_000


def small_files(folder: Path) -> tuple[list[Path], list[str]]:
    """What is copied, and the names of what else there is beside the weights; hidden files are passed over."""
    copied, left_out = [], []
    try:
        for item in sorted(folder.iterdir()):
            if _is_copied(item):
                copied.append(item)
            elif not item.name.startswith(".") and not _fits(item.name, _WEIGHTS):
                left_out.append(item.name)
    except OSError as error:
        raise CheckpointError(f"cannot read {folder}: {error.strerror}") from error
    return copied, left_out


def _is_copied(item: Path) -> bool:
    is_small = not item.name.startswith(".") and item.is_file() and item.stat().st_size <= _MOST_BYTES
    return is_small and _fits(item.name, _COPIED) and not _fits(item.name, _NEVER_COPIED)


def _fits(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


# What the config says of the weights, where that is no longer true, or not of every input.

_DTYPES = ("torch_dtype", "dtype")
# These say nothing about what the model computes.
_TRIVIAL = {
    *_DTYPES,
    "_name_or_path",
    "transformers_version",
    "_diffusers_version",
    "peft_version",
    "use_cache",
}


def _changed_dtype(layout: Layout, first: Checkpoint) -> torch.dtype | None:
    """The one dtype of the floating-point tensors written, where the first input has another."""
    written = {info.dtype for info in layout.tensors.values() if info.dtype.is_floating_point}
    before = {name: info.dtype for name, info in first.tensors.items()}
    is_changed = any(info.dtype != before.get(name, info.dtype) for name, info in layout.tensors.items())
    return written.pop() if is_changed and len(written) == 1 else None


def _with_dtype(config: Any, dtype: torch.dtype) -> Any:
    """The config, and those of the models inside it, with ``dtype`` wherever it names one."""
    if not isinstance(config, Mapping):
        return config
    return {
        key: str(dtype).removeprefix("torch.") if key in _DTYPES and value else _with_dtype(value, dtype)
        for key, value in config.items()
    }


# What is written anew where it is not the same in all adapters.
_OF_RANKS = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"}


def _differences(folders: Sequence[Path], rewritten: set[str]) -> Iterator[str]:
    for name in _configs(folders[0]):
        first = _read_json(folders[0] / name)
        others = [_read_json(folder / name) for folder in folders[1:] if (folder / name).is_file()]
        differing = sorted(
            key
            for key in set(first).union(*others) - _TRIVIAL - (_OF_RANKS if name in rewritten else set())
            if any(other.get(key) != first.get(key) for other in others)
        )
        if differing:
            yield (
                f"the inputs' {name} differ in {name_list(differing)}: what {folders[0].name} says was copied, so "
                "see that it is right for the average"
            )


def _read_json(file: Path) -> dict[str, Any]:
    """A config. Raises ``CheckpointError`` if it is none."""
    try:
        config = json.loads(file.read_bytes())
        if isinstance(config, dict):
            return config
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, RecursionError):
        pass
    raise CheckpointError(f"{file} is damaged: it must be a JSON object, as save_pretrained writes it")
