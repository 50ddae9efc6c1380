"""An output that stays in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from polyak.checkpoints import Layout, Writer

__all__ = ["MemoryWriter"]


class MemoryWriter(Writer):
    """Collects tensors instead of writing a file.

    Attributes:
        tensors: name to tensor; tied names are the same tensor.

    >>> from polyak.checkpoints import TensorInfo
    >>> writer = MemoryWriter(Layout({"w": TensorInfo((2,), torch.float32)}))
    >>> writer.write("w", 0, torch.tensor([1.0, 2.0]))
    >>> writer.tensors
    {'w': tensor([1., 2.])}
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        self.tensors: dict[str, Tensor] = {
            name: torch.empty(info.shape, dtype=info.dtype) for name, info in layout.tensors.items()
        }
        self.tensors |= {tied: self.tensors[name] for tied, name in layout.ties.items()}

    def _write(self, name: str, start: int, values: Tensor) -> None:
        self.tensors[name].view(-1)[start : start + values.numel()] = values

    def location(self, name: str) -> None:
        return None

    def commit(self) -> None:
        """Nothing is left to do."""

    def abort(self) -> None:
        """The tensors go with the writer."""
