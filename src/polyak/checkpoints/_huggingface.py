"""Folders as the Hugging Face libraries write them: one file, or several with an index."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from polyak.checkpoints._base import Contents, Format, Layout
from polyak.checkpoints._folder import FolderFile, FolderWriter
from polyak.checkpoints._io import SIDECAR
from polyak.checkpoints._pt import TorchFormat
from polyak.checkpoints._safetensors import SafetensorsFormat
from polyak.errors import CheckpointError, name_list

# Above this many bytes a folder gets several files; the usual choice of the hub's tools.
MAX_SHARD_BYTES = 5_000_000_000
_INDEX = ".index.json"
# A model saved again in another number of files leaves an index or a whole file behind that is stale. transformers
# and PEFT load the whole file where there is one, diffusers what the index names.
_INDEX_FIRST = "diffusion_pytorch_model"
_TRAINER_STATE = "trainer_state.json"


# transformers, diffusers and PEFT; the first is the one that is written.
_STEMS = ("model", "diffusion_pytorch_model", "adapter_model", "pytorch_lora_weights")


class _Folder(Format):
    """A folder with a weights file of one of these names, or with its shards and their index."""

    file_format: Format
    stems: ClassVar[tuple[str, ...]]
    suffix: ClassVar[str]

    def recognises(self, path: Path, start: bytes) -> bool:
        return self._weights_file(path) is not None

    def _weights_file(self, path: Path) -> Path | None:
        for stem in self.stems:
            whole, index = path / f"{stem}{self.suffix}", path / f"{stem}{self.suffix}{_INDEX}"
            for file in (index, whole) if stem == _INDEX_FIRST else (whole, index):
                if file.is_file():
                    return file
        return None

    def allowing(self, names: Sequence[str]) -> Format:
        format = copy.copy(self)
        format.file_format = self.file_format.allowing(names)
        return format

    def read(self, path: Path) -> Contents:
        """Raises ``CheckpointError`` also for a damaged index, and for missing shards or names, all at once."""
        file = self._weights_file(path)
        assert file is not None, "the format was recognised by this file"
        _refuse_another_model(path, file)
        read = self.file_format.read
        contents = _sharded(file, self.file_format) if file.name.endswith(_INDEX) else read(file)
        step = _trainer_step(path)
        return (
            contents
            if step is None
            else replace(contents, metadata={"global_step": step} | contents.metadata)
        )

    def writer(self, path: Path, layout: Layout, overwrite: bool) -> FolderWriter:
        """One weights file, or shards and an index where there are too many bytes for one."""
        stem = layout.stem or self.stems[0]
        parts = _split(layout)
        files = []
        for number, part in enumerate(parts, 1):
            shard = f"-{number:05d}-of-{len(parts):05d}" if len(parts) > 1 else ""
            files.append(FolderFile(stem + shard + self.suffix, self.file_format, part))
        index = {stem + self.suffix + _INDEX: _index(files, layout)} if len(files) > 1 else None
        return FolderWriter(path, layout, overwrite, files, more=index)


class HuggingFaceFormat(_Folder):
    """With safetensors files."""

    name = "huggingface"
    looks = "a folder with model.safetensors or its index"
    suffixes = ("",)
    own_files = ("*.safetensors", f"*{_INDEX}", SIDECAR)
    file_format, stems, suffix = SafetensorsFormat(), _STEMS, ".safetensors"


class HuggingFaceBinFormat(_Folder):
    """With torch files."""

    name = "huggingface-bin"
    looks = "a folder with pytorch_model.bin or its index"
    own_files = ("*.bin", f"*{_INDEX}", SIDECAR)
    file_format, stems, suffix = TorchFormat(), ("pytorch_model", *_STEMS[1:]), ".bin"


def library_stem(folder: Path) -> str | None:
    """The name of the safetensors file, without its suffix, that the library of ``folder`` looks for.

    None where the folder holds weights of no such library.
    """
    for format in (HuggingFaceFormat(), HuggingFaceBinFormat()):
        file = format._weights_file(folder)
        if file is not None:
            stem = file.name.partition(".")[0]
            return stem if stem in _STEMS else _STEMS[0]
    return None


# What accelerate calls the second of several models, and the adapters of PEFT and diffusers.
_SECOND = ("model_1", "pytorch_model_1")
_ADAPTERS = ("adapter_model", "pytorch_lora_weights")


def _refuse_another_model(folder: Path, file: Path) -> None:
    """Refuse a folder in which several models lie side by side, or an adapter beside a whole model."""
    stem = file.name.partition(".")[0]
    others = _SECOND if stem in _ADAPTERS else (*_SECOND, *_ADAPTERS)
    for other in (folder / (name + suffix) for name in others for suffix in (".safetensors", ".bin")):
        if other.is_file():
            raise CheckpointError(
                f"{folder} holds two models, {file.name} and {other.name}: average each by itself, by a pattern of its "
                f"files such as '*/{other.name}'"
            )


def _trainer_step(path: Path) -> str | None:
    """The step as transformers' Trainer keeps it, beside the weights."""
    try:
        return str(int(json.loads((path / _TRAINER_STATE).read_bytes())["global_step"]))
    except (OSError, ValueError, OverflowError, TypeError, KeyError, RecursionError):
        return None


def _sharded(index: Path, format: Format) -> Contents:
    shard_of = _weight_map(index)
    shards = sorted(set(shard_of.values()))
    missing = [shard for shard in shards if not os.path.isfile(index.parent / shard)]
    if missing:
        raise CheckpointError(f"{index.parent} lacks {name_list(missing, most=20)}: fetch the shards again")
    contents = [format.read(index.parent / shard) for shard in shards]
    tree: dict[str, Any] = {}
    for shard, part in zip(shards, contents, strict=True):
        # Tied names are in a shard without being in the index.
        tree |= {
            name: part.stored(leaf)
            for name, leaf in part.tree.items()
            if isinstance(leaf, part.leaf_types) and shard_of.get(name, shard) == shard
        }
    absent = [name for name in shard_of if name not in tree]
    if absent:
        raise CheckpointError(f"{index} promises tensors that its shards do not hold: {name_list(absent)}")
    metadata = {name: text for part in contents for name, text in part.metadata.items()}
    is_lazy = all(part.is_lazy for part in contents)
    return Contents(tree, metadata, is_lazy, files=[file for part in contents for file in part.files])


def _weight_map(index: Path) -> dict[str, str]:
    try:
        shard_of = json.loads(index.read_bytes())["weight_map"]
        if all(Path(shard).name == shard for shard in shard_of.values()):
            return shard_of
    except OSError as error:
        raise CheckpointError(f"cannot read {index}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    raise CheckpointError(
        f"{index} is damaged: its weight_map must give the file name of each tensor's shard"
    )


def _index(files: Sequence[FolderFile], layout: Layout) -> bytes:
    """Which tensor is in which file."""
    total_bytes = sum(info.nbytes for info in layout.tensors.values())
    file_of = {name: file.name for file in files for name in [*file.layout.tensors, *file.layout.ties]}
    return json.dumps({"metadata": {"total_size": total_bytes}, "weight_map": file_of}, indent=2).encode()


def _split(layout: Layout) -> list[Layout]:
    """Layouts of at most ``MAX_SHARD_BYTES`` each, in order; a larger tensor has a shard of its own."""
    parts: list[list[str]] = [[]]
    filled = 0
    for name, info in layout.tensors.items():
        if parts[-1] and filled + info.nbytes > MAX_SHARD_BYTES:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += info.nbytes
    return [
        Layout(
            {name: layout.tensors[name] for name in part},
            {tied: name for tied, name in layout.ties.items() if name in part},
            layout.metadata,
        )
        for part in parts
    ]
