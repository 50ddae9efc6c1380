"""What an averaged checkpoint says about where it comes from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from polyak._version import __version__
from polyak.checkpoints import Checkpoint
from polyak.errors import CheckpointError

__all__ = ["METADATA_KEY", "averaged_inputs", "input_names", "provenance"]

# The one entry of the output's metadata that is ours: JSON.
METADATA_KEY = "polyak"


def provenance(
    inputs: Sequence[Checkpoint],
    coefficients: Sequence[float],
    profile: str | None,
    steps: Sequence[int] | None,
    *,
    hashes: bool = False,
) -> dict[str, str]:
    """Metadata for the average of ``inputs``: what all of them say alike, and one JSON entry about the average.

    Args:
        inputs: the checkpoints, in the order of their coefficients.
        coefficients: one for each.
        profile: the profile as text, None if weights were given.
        steps: the training step of each, if known.
        hashes: add the SHA-256 of every input file, which takes reading them once more.
    """
    record: dict[str, object] = {
        "version": __version__,
        "inputs": input_names(inputs),
        "coefficients": list(coefficients),
        "profile": profile,
        "steps": None if steps is None else list(steps),
    }
    if hashes:
        record["sha256"] = {
            file.relative_to(checkpoint.path.parent).as_posix(): _sha256(file)
            for checkpoint in inputs
            for file in _files(checkpoint.path)
        }
    return _agreed(inputs) | {METADATA_KEY: json.dumps(record)}


def input_names(inputs: Sequence[Checkpoint]) -> list[str]:
    """File or folder names; with that of the folder they are in where they would be the same.

    Absolute paths would say more about the machine than about the weights.
    """
    names = [checkpoint.path.name for checkpoint in inputs]
    if len(set(names)) == len(names):
        return names
    return [f"{checkpoint.path.absolute().parent.name}/{checkpoint.path.name}" for checkpoint in inputs]


def averaged_inputs(checkpoint: Checkpoint) -> list[str]:
    """What the checkpoint was made of, as :func:`provenance` noted it; nothing where it did not."""
    try:
        return [str(name) for name in json.loads(checkpoint.metadata[METADATA_KEY])["inputs"]]
    except (KeyError, TypeError, ValueError, RecursionError):
        return []


def _agreed(inputs: Sequence[Checkpoint]) -> dict[str, str]:
    """Metadata that every input has. Text that is the name of a tensor is left out: it would read as a tie."""
    return {
        key: text
        for key, text in inputs[0].metadata.items()
        if key != METADATA_KEY
        and text not in inputs[0].tensors
        and all(checkpoint.metadata.get(key) == text for checkpoint in inputs)
    }


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _sha256(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
