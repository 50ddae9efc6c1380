"""Checkpoints of any tool: open one without reading it, write one that appears whole or not at all.

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

# Every module of a format makes it known.
from polyak.checkpoints import _dcp, _huggingface, _npz, _pt, _safetensors  # noqa: F401
from polyak.checkpoints._base import FORMATS, Format, Layout, Location, TensorInfo, Writer
from polyak.checkpoints._checkpoint import Checkpoint, create, open, write, write_sharded

__all__ = [
    "Checkpoint",
    "Format",
    "Layout",
    "Location",
    "TensorInfo",
    "Writer",
    "create",
    "open",
    "write",
    "write_sharded",
]

# What the formats are, as they say it themselves.
__doc__ = (
    (__doc__ or "")
    + "\nThe formats, and the suffixes that they are written for:\n\n"
    + "".join(
        f"- ``{format.name!r}``: {format.looks}; {', '.join(map(repr, format.suffixes)) or 'none'}\n"
        for format in FORMATS.values()
    )
)
