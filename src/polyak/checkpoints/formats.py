"""Which format a path is in, or is to be written in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from polyak.checkpoints import dcp, huggingface, npz, pickled, safetensors
from polyak.checkpoints.base import Contents
from polyak.checkpoints.regions import DataFile
from polyak.checkpoints.writer import Layout, Writer
from polyak.checkpoints.zipped import ZIP_MAGIC, read_directory
from polyak.errors import CheckpointError, OptionError, name_list

__all__ = ["FORMATS", "Format", "format_for", "recognise"]

_LEGACY_TORCH = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@dataclass(frozen=True)
class Format:
    """A reader, a writer, and the suffixes that ask for it."""

    read: Callable[[Path], Contents]
    writer: Callable[[Path, Layout, bool], Writer]
    suffixes: tuple[str, ...] = ()


FORMATS: dict[str, Format] = {
    "safetensors": Format(safetensors.read, safetensors.SafetensorsWriter, (".safetensors",)),
    "pt": Format(pickled.read, pickled.PickledWriter, (".pt", ".pth", ".bin", ".ckpt", ".tar")),
    "npz": Format(npz.read, npz.NpzWriter, (".npz",)),
    "huggingface": Format(huggingface.read, huggingface.HuggingFaceWriter, ("",)),
    "huggingface-bin": Format(huggingface.read, partial(huggingface.HuggingFaceWriter, kind=huggingface.BIN)),
    "dcp": Format(dcp.read, dcp.DcpWriter),
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
        f"{path} has a suffix of no known format: name it .safetensors, .pt or .npz, or say which format it is"
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
    if (path / dcp.METADATA).is_file():
        return "dcp"
    found = huggingface.find_weights_file(path)
    if found is not None:
        return "huggingface" if found[1].suffix == huggingface.SAFETENSORS.suffix else "huggingface-bin"
    try:
        names = sorted(item.name for item in path.iterdir())
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    there = f"it holds {name_list(names)}" if names else "it is empty"
    raise CheckpointError(
        f"{path} is a folder with no checkpoint ({there}): expected model.safetensors, pytorch_model.bin, "
        f"an index of either, or a torch.distributed.checkpoint"
    )
