"""What is written of a model: its block means, the buffers beside them, and what never changes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from polyak.binding import Binding
from polyak.tensors import ModelTensors

__all__ = ["Snapshot"]


@dataclass(frozen=True)
class Snapshot:
    """A model at the end of a block, in the parts that are stored apart.

    Attributes:
        averaged: name to live tensor, or to its mean.
        copied: the persistent buffers that are not averaged, as copies, since training goes on.
        frozen: parameters that are not averaged; not copied.
        ties: further name of a tied tensor to its first name, over all parts.
    """

    averaged: dict[str, Tensor]
    copied: dict[str, Tensor]
    frozen: dict[str, Tensor]
    ties: dict[str, str]

    @classmethod
    def of(cls, binding: Binding, averaged: list[Tensor]) -> Snapshot:
        """The model behind ``binding``, with ``averaged`` in the place of the tensors it averages."""
        means = dict(zip(binding.names, averaged, strict=True))
        tensors = ModelTensors(binding.model)
        others = [e for e in tensors.values() if e.persistent and e.name not in means]
        return cls(
            means,
            {e.name: e.tensor.detach().clone() for e in others if e.kind == "buffer"},
            {e.name: e.tensor.detach() for e in others if e.kind == "parameter"},
            {tied: name for tied, name in tensors.all_names().items() if tied != name},
        )

    def ties_of(self, tensors: dict[str, Tensor]) -> dict[str, str]:
        """The ties that lead to one of ``tensors``."""
        return {tied: name for tied, name in self.ties.items() if name in tensors}
