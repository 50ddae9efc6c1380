"""Finding the checkpoints in a folder of them."""

from __future__ import annotations

import re
from pathlib import Path

from polyak.checkpoints.formats import FORMATS, recognise
from polyak.errors import CheckpointError

__all__ = ["RECORDING_NAME", "checkpoint_paths", "is_checkpoint_folder", "is_recording", "natural_order"]

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
