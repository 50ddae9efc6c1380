"""Checkpoints of any tool: open one without reading it, write one that appears whole or not at all.

=====================  ==========================================================================
format                 recognised by, and written for
=====================  ==========================================================================
``"safetensors"``      ``.safetensors``
``"pt"``               ``.pt``, ``.pth``, ``.bin``, ``.ckpt``, ``.tar``: what ``torch.save`` writes
``"npz"``              ``.npz``
``"huggingface"``      a folder with ``model.safetensors`` or its index; written where there is no suffix
``"huggingface-bin"``  a folder with ``pytorch_model.bin`` or its index
``"dcp"``              a folder of ``torch.distributed.checkpoint``
=====================  ==========================================================================

>>> import tempfile, torch
>>> from pathlib import Path
>>> folder = tempfile.TemporaryDirectory()
>>> path = Path(folder.name) / "model.safetensors"
>>> write(path, {"weight": torch.arange(6.0).view(2, 3)}, metadata={"step": "7"})
>>> with open(path) as checkpoint:
...     checkpoint.tensors["weight"].shape, checkpoint.step, checkpoint.read_slice("weight", 2, 5)
((2, 3), 7, tensor([2., 3., 4.]))
>>> folder.cleanup()
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from polyak.checkpoints._base import Location, TensorInfo
from polyak.checkpoints._dcp import write_sharded
from polyak.checkpoints._formats import FORMATS, Checkpoint, format_for, recognise
from polyak.checkpoints._writer import Layout, Writer
from polyak.errors import StructureError, name_list

__all__ = [
    "Checkpoint",
    "Layout",
    "Location",
    "TensorInfo",
    "Writer",
    "create",
    "open",
    "write",
    "write_sharded",
]


def open(path: str | PathLike[str], key: str | None = None) -> Checkpoint:
    """Open a checkpoint without reading its tensors.

    Args:
        path: a file or folder; its contents, not its name, say what it is.
        key: the nested key to take the weights from, such as ``"state_dict_ema"``; by default the best known.

    Raises ``CheckpointError`` for anything that is no whole, safe checkpoint, ``OptionError`` for a key that is
    not there (the message lists those that are).
    """
    path = Path(path)
    format = recognise(path)
    return Checkpoint(path, format, FORMATS[format].read(path), key)


def create(
    path: str | PathLike[str], layout: Layout, *, format: str | None = None, overwrite: bool = False
) -> Writer:
    """Begin a checkpoint whose values come later, slice by slice; use it as a context manager.

    Args:
        path: the output; its folder must exist.
        layout: names, shapes, dtypes, ties and metadata.
        format: one of the names above; by default what the suffix says.
        overwrite: replace an output that is there.

    Raises ``OutputExistsError``, ``StructureError`` for dtypes that the format cannot hold, ``CheckpointError``
    if nothing can be written there.

    >>> import tempfile, torch
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = Path(folder.name) / "out.pt"
    >>> with create(path, Layout({"w": TensorInfo((4,), torch.float32)})) as writer:
    ...     writer.write("w", 2, torch.tensor([2.0, 3.0]))
    ...     writer.write("w", 0, torch.tensor([0.0, 1.0]))
    >>> torch.load(path)["w"]
    tensor([0., 1., 2., 3.])
    >>> folder.cleanup()
    """
    path = Path(path)
    return FORMATS[format_for(path, format)].writer(path, layout, overwrite)


def write(
    path: str | PathLike[str],
    tensors: Mapping[str, Tensor],
    *,
    format: str | None = None,
    ties: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a flat dict of tensors.

    Args:
        path: the output, as for ``create``.
        tensors: name to dense tensor, on any device.
        ties: further name to name in ``tensors``; names that share the same memory are found without it.
        format: as for ``create``.
        metadata: text entries.
        overwrite: as for ``create``.

    Raises as ``create``; ``StructureError`` also for sparse and meta tensors.
    """
    unwritable = [
        name for name, tensor in tensors.items() if tensor.is_meta or tensor.layout != torch.strided
    ]
    if unwritable:
        raise StructureError(
            f"{path}: {name_list(unwritable)} are sparse or on the meta device: make them dense"
        )
    shared = _shared(tensors)
    infos = {name: TensorInfo.of(tensor) for name, tensor in tensors.items() if name not in shared}
    layout = Layout(infos, {**shared, **(ties or {})}, metadata or {})
    with create(path, layout, format=format, overwrite=overwrite) as writer:
        writer.fill(tensors)


def _shared(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Names of tensors that lie where an earlier one does, with its name."""
    first_names: dict[tuple, str] = {}
    shared = {}
    for name, tensor in tensors.items():
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        first = first_names.setdefault(place, name) if tensor.numel() else name
        if first != name:
            shared[name] = first
    return shared
