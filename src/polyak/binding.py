"""The tensors of a live model that an average or a recorder follows, through every change that allows it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from polyak.errors import OptionError, StructureError, name_list
from polyak.swap import Place
from polyak.tensors import ModelTensors, NamedTensor, local, meshes, shape_of

__all__ = ["Binding", "differences"]


class Binding:
    """Which tensors of ``model`` are averaged, under their canonical names, and where they are now.

    Averaged are the trainable parameters, or those that ``include`` matches, less those that ``exclude``
    matches; with ``buffers="average"`` floating buffers count as trainable. Everything else is read from the
    live model when it is needed.

    The names and shapes are fixed when the binding is made. :meth:`follow` takes up parameters that were
    replaced by others of the same names and shapes, and refuses any other change.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    >>> Binding(model, exclude="*.bias").names
    ['0.weight', '1.weight']
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        buffers: Literal["copy", "average"] = "copy",
        include: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] | None = None,
    ):
        if buffers not in ("copy", "average"):
            raise OptionError(f"buffers must be 'copy' or 'average', got {buffers!r}")
        self.model = model
        self._watch_buffers = buffers == "average"
        self.tensors = ModelTensors(model, watch_buffers=self._watch_buffers)
        self.names = self._choose(include, exclude)
        # Where the user named what to average, a frozen parameter that is thawed was left out on purpose.
        left_out = self.tensors.matching(exclude, "exclude")
        self._frozen_names = [
            e.name
            for e in self.tensors.values()
            if include is None
            and e.kind == "parameter"
            and not e.tensor.requires_grad
            and e.name not in left_out
        ]
        self._take_up()

    @property
    def ready(self) -> bool:
        """Whether every parameter has data: none is on the meta device or lazy."""
        return self._ready

    @property
    def live(self) -> list[Tensor]:
        """The live tensors, or this rank's shards of them, in the order of ``names``."""
        return local(self._live) if self._meshes else self._live

    @property
    def whole(self) -> list[Tensor]:
        """The live tensors as the model holds them, DTensors where it is sharded."""
        return self._live

    def other_buffers(self) -> list[Tensor]:
        """The model's buffers that are not averaged, as they are now, non-persistent ones included."""
        averaged = set(self.names)
        fresh = ModelTensors(self.model)
        return local(e.tensor for e in fresh.values() if e.kind == "buffer" and e.name not in averaged)

    def averaged_buffers(self) -> list[Tensor]:
        """The model's buffers that are averaged."""
        return local(e.tensor for e in self.tensors.values() if e.kind == "buffer" and e.name in self.names)

    def places(self) -> list[Place]:
        """Where every tensor of the model stands now."""
        return [(e.place, e.key, e.tensor) for e in ModelTensors(self.model).values()]

    def follow(self) -> bool:
        """Notice what changed in the model; True where its tensors were replaced, retyped or moved.

        Raises:
            StructureError: tensors were added, removed or reshaped, a frozen parameter is trained now, or
                some have no data yet. The message names them.
        """
        self._refuse_thawed()
        if self._ready and not self.tensors.changed():
            return False
        tensors = ModelTensors(self.model, watch_buffers=self._watch_buffers)
        waiting = tensors.unmaterialised()
        if waiting:
            raise StructureError(
                f"{name_list(waiting)} have no data yet; materialise the model (to_empty() for the meta "
                "device, one forward pass for lazy modules) before its weights are averaged"
            )
        self._refuse_restructured(tensors)
        self.tensors = tensors
        self._take_up()
        return True

    def agree(self, finite: Tensor) -> Tensor:
        """Whether all ranks found a sample finite, of which each has seen its own shards; a collective call."""
        verdict = finite.to(torch.uint8)
        for mesh in self._meshes:
            verdict = verdict.to(mesh.device_type)
            for dim in range(mesh.ndim):
                dist.all_reduce(verdict, dist.ReduceOp.MIN, group=mesh.get_group(dim))
        return verdict.to(finite.device, torch.bool)

    @property
    def sharded(self) -> bool:
        """Whether tensors are split over ranks."""
        return bool(self._meshes)

    @property
    def ranks(self) -> list[int]:
        """The ranks that the model is sharded over, none where it is not.

        Raises:
            StructureError: some tensors are spread over other ranks than others.
        """
        found = {tuple(sorted(mesh.mesh.flatten().tolist())) for mesh in self._meshes}
        if len(found) > 1:
            raise StructureError(
                f"tensors of the model are spread over different ranks: {', '.join(map(str, sorted(found)))}; all must "
                "be on one device mesh"
            )
        return list(*found)

    def _take_up(self) -> None:
        self._live = [self.tensors[name].tensor for name in self.names]
        # Also of what is not averaged: adapters may be plain tensors beside a frozen model that is sharded.
        self._meshes = meshes(e.tensor for e in self.tensors.values())
        self._ready = not self.tensors.unmaterialised()
        self._shapes = self._describe(self.tensors)
        self._frozen = [self.tensors[n].tensor for n in self._frozen_names]

    def _choose(self, include: str | Iterable[str] | None, exclude: str | Iterable[str] | None) -> list[str]:
        included = self.tensors.matching(include, "include")
        excluded = self.tensors.matching(exclude, "exclude")
        chosen = [
            entry.name
            for entry in self.tensors.values()
            if self._can_be_averaged(entry)
            and (entry.name in included if include is not None else _is_trained(entry))
            and entry.name not in excluded
        ]
        if not chosen:
            raise OptionError(
                "nothing to average: the model has no trainable floating-point parameter"
                + ("" if include is None and exclude is None else " that include and exclude leave")
            )
        sparse = [name for name in chosen if self.tensors[name].tensor.layout != torch.strided]
        if sparse:
            raise StructureError(f"{name_list(sparse)} are sparse; make them dense, or name them in exclude=")
        return chosen

    def _can_be_averaged(self, entry: NamedTensor) -> bool:
        numeric = entry.tensor.dtype.is_floating_point or entry.tensor.dtype.is_complex
        return numeric and (entry.kind == "parameter" or self._watch_buffers)

    def _refuse_thawed(self) -> None:
        if any(tensor.requires_grad for tensor in self._frozen):
            names = [n for n in self._frozen_names if self.tensors[n].tensor.requires_grad]
            raise StructureError(
                f"{name_list(names)} were frozen when the average was made and are trained now; what they were "
                "before is not in it. Name them in include= from the start, or make a new average"
            )

    def _refuse_restructured(self, tensors: ModelTensors) -> None:
        complaints = differences(self._shapes, self._describe(tensors))
        if complaints:
            raise StructureError(
                f"the model is no longer the one that is averaged: {'; '.join(complaints)}. "
                "Make a new average for the changed model"
            )

    def _describe(self, tensors: ModelTensors) -> dict[str, str | None]:
        """Parameters and averaged buffers to their shapes in words, None for one that is still lazy."""
        lazy = {name for name in tensors.unmaterialised() if not tensors[name].tensor.is_meta}
        return {
            e.name: None if e.name in lazy else shape_of(e.tensor)
            for e in tensors.values()
            if e.kind == "parameter" or e.name in self.names
        }


def _is_trained(entry: NamedTensor) -> bool:
    return entry.kind == "buffer" or entry.tensor.requires_grad


def differences(before: dict[str, str | None], now: dict[str, str | None]) -> list[str]:
    """What differs between two models, in words, from names to shapes; a lazy tensor (None) may take any shape.

    >>> differences({"a": "(2,)", "b": "(2,)"}, {"b": "(3,)"})
    ["missing 'a'", "reshaped 'b (2,) -> (3,)'"]
    """
    missing = [n for n in before if n not in now]
    added = [n for n in now if n not in before]
    reshaped = [
        f"{n} {before[n]} -> {now[n]}" for n in before if n in now and before[n] not in (None, now[n])
    ]
    return [
        f"{what} {name_list(names)}"
        for what, names in (("missing", missing), ("added", added), ("reshaped", reshaped))
        if names
    ]
