"""What is written of a model: its block means, the buffers beside them, and what never changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from polyak.binding import Binding
from polyak.tensors import ModelTensors, NamedTensor, is_sharded, local

__all__ = ["Snapshot"]


@dataclass(frozen=True)
class Snapshot:
    """A model at the end of a block, in the parts that are stored apart.

    Attributes:
        averaged: name to live tensor, or to its mean.
        copied: the persistent buffers that are not averaged, as copies, since training goes on.
        frozen: parameters that are not averaged; not copied.
        ties: further name of a tied tensor to its first name, over all parts.
        wholes: of a sharded model, name to the tensor that this rank's part in the dictionaries above belongs to.
    """

    averaged: dict[str, Tensor]
    copied: dict[str, Tensor]
    frozen: dict[str, Tensor]
    ties: dict[str, str]
    wholes: dict[str, Tensor]

    @classmethod
    def of(cls, binding: Binding, averaged: list[Tensor]) -> Snapshot:
        """The model behind ``binding``, with ``averaged`` in the place of the tensors it averages."""
        means = dict(zip(binding.names, averaged, strict=True))
        tensors = ModelTensors(binding.model)
        others = [e for e in tensors.values() if e.persistent and e.name not in means]
        buffers, parameters = ([e for e in others if e.kind == kind] for kind in ("buffer", "parameter"))
        return cls(
            means,
            {e.name: part.detach().clone() for e, part in _parts(buffers)},
            {e.name: part.detach() for e, part in _parts(parameters)},
            {tied: name for tied, name in tensors.all_names().items() if tied != name},
            {e.name: e.tensor.detach() for e in tensors.values() if is_sharded(e.tensor)},
        )

    def ties_of(self, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """The ties that lead to one of ``tensors``."""
        return {tied: name for tied, name in self.ties.items() if name in tensors}

    def whole(self, name: str, part: Tensor) -> Tensor:
        """What ``part``, the tensor of that name, is a part of: itself, unless the model is sharded."""
        return self.wholes.get(name, part)


def _parts(entries: list[NamedTensor]) -> Iterator[tuple[NamedTensor, Tensor]]:
    return zip(entries, local(entry.tensor for entry in entries), strict=True)
