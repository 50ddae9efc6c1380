"""The formats there are, which of them a path is of, and a checkpoint opened in one."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from polyak.checkpoints import _dcp, _huggingface, _npz, _pt, _safetensors
from polyak.checkpoints._base import Contents, Location, StoredTensor, TensorInfo
from polyak.checkpoints._io import DataFile
from polyak.checkpoints._tree import STEP_KEYS, find_weights
from polyak.checkpoints._writer import Layout, Writer
from polyak.checkpoints._zip import ZIP_MAGIC, read_directory
from polyak.errors import CheckpointError, OptionError, StructureError, name_list

__all__ = [
    "FORMATS",
    "RECORDING_NAME",
    "Checkpoint",
    "checkpoint_paths",
    "format_for",
    "is_checkpoint_folder",
    "is_recording",
    "natural_order",
    "recognise",
]

# Which format a path is in, or is to be written in.

_LEGACY_TORCH = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@dataclass(frozen=True)
class Format:
    """A reader, a writer, and the suffixes that ask for it."""

    read: Callable[[Path], Contents]
    writer: Callable[[Path, Layout, bool], Writer]
    suffixes: tuple[str, ...] = ()


FORMATS: dict[str, Format] = {
    "safetensors": Format(_safetensors.read, _safetensors.SafetensorsWriter, (".safetensors",)),
    "pt": Format(_pt.read, _pt.PickledWriter, (".pt", ".pth", ".bin", ".ckpt", ".tar")),
    "npz": Format(_npz.read, _npz.NpzWriter, (".npz",)),
    "huggingface": Format(_huggingface.read, _huggingface.HuggingFaceWriter, ("",)),
    "huggingface-bin": Format(
        _huggingface.read, partial(_huggingface.HuggingFaceWriter, kind=_huggingface.BIN)
    ),
    "dcp": Format(_dcp.read, _dcp.DcpWriter),
}


def format_for(path: Path, format: str | None) -> str:
    """The format to write: the one named, or the one of the suffix.

    >>> format_for(Path("average.ckpt"), None)
    'pt'

    Raises ``OptionError`` for unknown names and suffixes.
    """
    if format is not None:
        if format not in FORMATS:
            raise OptionError(f"unknown format {format!r}: choose from {name_list(list(FORMATS), most=10)}")
        return format
    for name, known in FORMATS.items():
        if path.suffix in known.suffixes:
            return name
    raise OptionError(
        f"{path} has a suffix of no known format: name it .safetensors, .pt or .npz",
        ", or say which format it is",
        "",
    )


def recognise(path: Path) -> str:
    """The format of what is there, from its contents. Raises ``CheckpointError`` if it is none."""
    if path.is_dir():
        return _recognise_folder(path)
    file = DataFile(path)
    start = file.read(0, min(9, file.size))
    if start[:4] == ZIP_MAGIC:
        return _recognise_zip(file)
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        return "safetensors"
    if start[:2] in _LEGACY_TORCH:
        return "pt"
    raise CheckpointError(
        f"{path} is no checkpoint that is known: it begins with {start.hex(' ')}; "
        f"expected safetensors, a torch file, npz, or a folder of one"
    )


def _recognise_zip(file: DataFile) -> str:
    names = list(read_directory(file))
    if any(name.endswith("/data.pkl") for name in names):
        return "pt"
    if any(name.endswith(".npy") for name in names):
        return "npz"
    raise CheckpointError(f"{file.path} is a zip file with no weights in it: it holds {name_list(names)}")


def _recognise_folder(path: Path) -> str:
    if (path / _dcp.METADATA).is_file():
        return "dcp"
    found = _huggingface.find_weights_file(path)
    if found is not None:
        return "huggingface" if found[1].suffix == _huggingface.SAFETENSORS.suffix else "huggingface-bin"
    try:
        names = sorted(item.name for item in path.iterdir())
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    there = f"it holds {name_list(names)}" if names else "it is empty"
    raise CheckpointError(
        f"{path} is a folder with no checkpoint ({there}): expected model.safetensors, pytorch_model.bin, "
        f"an index of either, or a torch.distributed.checkpoint"
    )


# Finding the checkpoints in a folder of them.

# The list of the blocks of a recorded trajectory.
RECORDING_NAME = "manifest.json"

_SUFFIXES = {suffix for format in FORMATS.values() for suffix in format.suffixes if suffix}


def is_checkpoint_folder(path: Path) -> bool:
    """Whether a folder is itself one checkpoint."""
    try:
        return path.is_dir() and bool(recognise(path))
    except CheckpointError:
        return False


def is_recording(folder: Path) -> bool:
    """Whether a folder is what a :class:`polyak.Recorder` wrote."""
    return (folder / RECORDING_NAME).is_file() and any(folder.glob("block-*.safetensors"))


def checkpoint_paths(folder: Path) -> list[Path]:
    """What looks like a checkpoint directly inside a folder, in natural order.

    Raises ``CheckpointError`` if the folder cannot be read.
    """
    try:
        found = [item for item in folder.iterdir() if not item.name.startswith(".") and _is_candidate(item)]
    except OSError as error:
        raise CheckpointError(f"cannot read {folder}: {error.strerror}") from error
    return sorted(found, key=lambda item: natural_order(item.name))


def _is_candidate(path: Path) -> bool:
    return is_checkpoint_folder(path) if path.is_dir() else path.suffix in _SUFFIXES


def natural_order(name: str) -> list[tuple[int, str]]:
    """A sort key that orders names as people count.

    >>> sorted(["step-10.pt", "step-9.pt"], key=natural_order)
    ['step-9.pt', 'step-10.pt']
    """
    return [(int(part) if part.isdecimal() else -1, part) for part in re.split(r"(\d+)", name)]


# An opened checkpoint: names, shapes and dtypes at once, values when asked for.


class Checkpoint:
    """The weights in a checkpoint, none of them read yet. Made by ``polyak.checkpoints.open``.

    Attributes:
        path: what was opened.
        format: ``"safetensors"``, ``"pt"``, ``"npz"``, ``"huggingface"``, ``"huggingface-bin"`` or ``"dcp"``.
        key: the nested key under which the weights lay, dotted; None if they were at the top.
        found_keys: all the well-known keys with weights, the preferred one first.
        note: what was chosen, as a sentence; empty where there was nothing to choose.
        ignored: entries that are no weights, or belong to another key.
        tensors: name to shape and dtype, under every name of tied tensors.
        ties: further name to first name, for tensors that are one; reading the first names reads each once.
        metadata: text beside the weights.
        step: the training step, where the checkpoint says it in a plain integer.
        step_key: the entry that says it, such as ``"global_step"`` or ``"epoch"``.
        is_lazy: False if the format forced the whole file into memory (torch files from before 1.6).
    """

    def __init__(self, path: Path, format: str, contents: Contents, key: str | None = None) -> None:
        weights = find_weights(contents, key, path)
        self.path = path
        self.format = format
        self.key = weights.key
        self.found_keys = weights.found_keys
        self.note = weights.note
        self.ignored = weights.ignored
        self.metadata = contents.metadata
        self.step, self.step_key = weights.step, weights.step_key
        if self.step is None:
            self.step, self.step_key = _text_step(contents.metadata)
        self.is_lazy = contents.is_lazy
        self.tensors: dict[str, TensorInfo] = {name: stored.info for name, stored in weights.tensors.items()}
        self._stored = weights.tensors
        self.ties = _ties(weights.tensors)

    def read(self, name: str) -> Tensor:
        """The whole tensor, in its own dtype, in memory of its own."""
        info = self._find(name).info
        return self.read_slice(name, 0, info.numel).view(info.shape)

    def read_slice(self, name: str, start: int, stop: int) -> Tensor:
        """Elements ``[start, stop)`` of the flattened tensor, 1-D, in its own dtype; nothing else is read."""
        info = self._find(name).info
        if not 0 <= start <= stop <= info.numel:
            raise OptionError(f"[{start}, {stop}) is not inside the {info.numel} elements of {name!r}")
        out = torch.empty(stop - start, dtype=info.dtype)
        self.read_into(name, start, out)
        return out

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Fill the contiguous 1-D ``out`` with elements from ``start`` on, in the tensor's own dtype.

        May be called from several threads. Raises ``CheckpointError`` if the file cannot be read to that place.
        """
        stored = self._find(name)
        fits = out.ndim == 1 and out.is_contiguous() and out.dtype == stored.info.dtype
        if not fits or not 0 <= start <= start + out.numel() <= stored.info.numel:
            raise OptionError(
                f"a buffer of shape {tuple(out.shape)} and {out.dtype} cannot take elements from {start} on "
                f"of {name!r}, {stored.info}"
            )
        stored.read_into(start, out)

    def location(self, name: str) -> Location | None:
        """The file and byte offset where the tensor lies row-major, little-endian and plain, or None."""
        return self._find(name).location

    def close(self) -> None:
        """Let go of open files. Reading afterwards opens them again."""
        DataFile.release()

    def _find(self, name: str) -> StoredTensor:
        if name not in self._stored:
            raise StructureError(
                f"{self.path} has no tensor {name!r}; it has {name_list(list(self._stored))}"
            )
        return self._stored[name]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, format={self.format!r}, tensors={len(self.tensors)})"


def _ties(tensors: dict[str, StoredTensor]) -> dict[str, str]:
    first_names: dict[int, str] = {}
    ties = {}
    for name, stored in tensors.items():
        first = first_names.setdefault(id(stored), name)
        if first != name:
            ties[name] = first
    return ties


def _text_step(metadata: dict[str, str]) -> tuple[int, str] | tuple[None, None]:
    for key in STEP_KEYS:
        text = metadata.get(key, "")
        if text.isdecimal() and len(text) < 19:
            return int(text), key
    return None, None
