"""An opened checkpoint: names, shapes and dtypes at once, values when asked for."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from polyak.checkpoints.base import Contents, Location, StoredTensor, TensorInfo
from polyak.checkpoints.nesting import STEP_KEYS, find_weights
from polyak.checkpoints.regions import DataFile
from polyak.errors import OptionError, StructureError, name_list

__all__ = ["Checkpoint"]


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
