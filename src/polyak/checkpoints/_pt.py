"""What ``torch.save`` writes: ``.pt``, ``.pth``, ``.bin``, ``.ckpt``, ``.tar``.

The pickle is read by ``torch.load(weights_only=True)``, which runs no code, and with ``map_location="meta"``, which
reads no tensor: each then knows the offset of its bytes, and is read from there. Files from before torch 1.6 are
not zips; their tensors can only be loaded whole.
"""

from __future__ import annotations

import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyak.checkpoints._base import Contents, LoadedTensor, StoredTensor, TensorInfo
from polyak.checkpoints._io import DataFile, StridedRegion
from polyak.checkpoints._writer import SpooledWriter
from polyak.checkpoints._zip import ZIP_MAGIC, read_directory
from polyak.errors import CheckpointError

__all__ = ["load_archive"]

# `load_state_dict` looks into this attribute of a state dict for the versions of modules; an entry that
# belongs to no module is free, and the dict itself keeps nothing but tensors.
_ATTRIBUTE, _ENTRY = "_metadata", "polyak"
# Both are words of torch.load's own messages, which are otherwise a page of advice.
_FORBIDDEN = re.compile(r"GLOBAL (\S+)")
_REASON = "WeightsUnpickler error:"


def read(path: Path) -> Contents:
    """The tree that was saved, its tensors not read.

    Raises ``CheckpointError`` if the file is damaged, or holds anything that needs code to be loaded.
    """
    file = DataFile(path)
    is_lazy = file.read(0, min(4, file.size)) == ZIP_MAGIC
    if is_lazy:
        state, stored = load_archive(file)
    else:
        state, stored = _load(file, 0, None, "cpu"), _Loaded(path).stored
    if not isinstance(state, Mapping):
        raise CheckpointError(
            f"{path} holds a {type(state).__name__}, not a dict: save the model's state_dict()"
        )
    return Contents(state, _metadata(state), is_lazy, stored)


def load_archive(
    file: DataFile, start: int = 0, nbytes: int | None = None
) -> tuple[Any, Callable[[Tensor], StoredTensor]]:
    """The object in a torch archive, with meta tensors, and what turns those into tensors of the file."""
    members = read_directory(file, start, nbytes)
    if any(name.endswith("/constants.pkl") for name in members):
        raise CheckpointError(
            f"{file.path} is a TorchScript archive, which is code: load it with torch.jit.load and save "
            f"its state_dict()"
        )
    if not all(member.is_stored for member in members.values()):
        raise CheckpointError(f"{file.path} was compressed after torch.save: save it again with torch.save")
    for name, member in members.items():
        if name.endswith("/byteorder") and file.read(member.offset, member.nbytes) != b"little":
            raise CheckpointError(
                f"{file.path} is big-endian: load it on the machine that wrote it and convert it"
            )
    with _keeping_offsets():
        state = _load(file, start, nbytes, "meta")
    ends = {member.offset: member.end for member in members.values()}
    return state, _Archived(file, start, ends).stored


def _keeping_offsets() -> AbstractContextManager[object]:
    """In which torch.load notes where each storage lies in the file: from torch 2.11 on it does so by itself."""
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 11):
        return nullcontext()
    from torch._subclasses import FakeTensorMode

    return FakeTensorMode()


def _load(file: DataFile, start: int, nbytes: int | None, device: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch has some for tensors that are refused here, with a reason
            return torch.load(file.window(start, nbytes), map_location=device, weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # torch.load lets whatever the damaged bytes provoke escape
        raise CheckpointError(_why(file.path, error)) from error


def _why(path: Path, error: Exception) -> str:
    message = str(error)
    forbidden = _FORBIDDEN.search(message)
    if forbidden:
        return (
            f"{path} holds more than tensors: loading it would need {forbidden[1]}, and no code from a checkpoint "
            f"is run. Where you trust it, load it with torch.load and save its state_dict() alone"
        )
    reason = message.rpartition(_REASON)[2].strip().split("\n", 1)[0][:200] or type(error).__name__
    return f"{path} is truncated, damaged or not a torch file ({reason}); use another copy"


class _Archived:
    """Gives each region of the file one ``StoredTensor``, so that tied tensors are the same object."""

    def __init__(self, file: DataFile, start: int, ends: dict[int, int]) -> None:
        self._file, self._start, self._ends = file, start, ends
        self._regions: dict[tuple, StridedRegion] = {}

    def stored(self, tensor: Tensor) -> StoredTensor:
        _refuse_unusual(self._file.path, tensor)
        offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
        end = None if offset is None else self._ends.get(self._start + offset)
        if offset is None or end is None:
            raise CheckpointError(f"{self._file.path} is corrupt: a tensor has no data")
        begin = self._start + offset + tensor.storage_offset() * tensor.element_size()
        info = TensorInfo.of(tensor)
        region = (begin, info, tensor.stride())
        if region not in self._regions:
            self._regions[region] = StridedRegion(self._file, begin, info, tensor.stride(), limit=end)
        return self._regions[region]


class _Loaded:
    """The same for tensors in memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tensors: dict[tuple, LoadedTensor] = {}

    def stored(self, tensor: Tensor) -> StoredTensor:
        _refuse_unusual(self._path, tensor)
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        return self._tensors.setdefault(place, LoadedTensor(tensor.detach()))


def _refuse_unusual(path: Path, tensor: Tensor) -> None:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
        raise CheckpointError(
            f"{path} holds a sparse, quantised or lazily conjugated tensor of shape {list(tensor.shape)}: "
            f"save it dense, with dequantize() or resolve_conj()"
        )


def _metadata(state: Any) -> dict[str, str]:
    attribute = getattr(state, _ATTRIBUTE, None)
    ours = attribute.get(_ENTRY) if isinstance(attribute, Mapping) else None
    scalars = state if isinstance(state, Mapping) else {}
    found = {str(name): str(value) for name, value in scalars.items() if isinstance(value, str | int | float)}
    if isinstance(ours, Mapping):
        found |= {str(name): str(text) for name, text in ours.items()}
    return found


class PickledWriter(SpooledWriter):
    """``torch.save`` of a flat dict of tensors; ties share their storage."""

    def _save(self, tensors: dict[str, Tensor], target: Path) -> None:
        state = OrderedDict(tensors)
        if self.layout.metadata:
            setattr(state, _ATTRIBUTE, OrderedDict({_ENTRY: dict(self.layout.metadata)}))
        try:
            # Given a file and not its name, torch writes the same bytes whatever the file is called.
            with target.open("xb") as stream:
                torch.save(state, stream)
        except RuntimeError as error:  # torch's writer hides the reason in its message
            raise OSError(str(error).split("\n", 1)[0]) from error
