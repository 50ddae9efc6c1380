"""A model as named tensors: canonical names, ties, wrappers, sharding and changes of structure.

Everything above this layer works on plain lists of local tensors; what a model *is* is known here only.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import chain
from operator import attrgetter, is_, methodcaller
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from polyak.errors import OptionError, StructureError, name_list

__all__ = [
    "ModelTensors",
    "NamedTensor",
    "bare_model",
    "is_sharded",
    "local",
    "meshes",
    "shape_of",
    "sharded_like",
]

# Child names that only wrappers use; what they hold keeps the name it had before it was wrapped.
_WRAPPED = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# Wrappers whose child is called `module`, a name that a user's own model may have as well.
_PARALLEL = (nn.parallel.DistributedDataParallel, nn.DataParallel)

# Read one after the other: tuples of all three would be as many objects for the garbage collector to count.
_DESCRIPTION = (attrgetter("shape"), attrgetter("dtype"), attrgetter("device"))
_is_contiguous = methodcaller("is_contiguous")
_END = object()


@dataclass(frozen=True, slots=True)
class NamedTensor:
    """One tensor of a model under its canonical name, with the other names it is tied under."""

    name: str
    tensor: Tensor
    kind: Literal["parameter", "buffer"]
    persistent: bool
    place: dict[str, Any]  # the module's own dictionary, in which the tensor stands under ``key``
    key: str
    aliases: list[str] = field(default_factory=list)


class ModelTensors:
    """The parameters and buffers of a model by canonical name, each tied tensor once.

    Canonical names are those of the bare model: what ``DistributedDataParallel``, ``torch.compile``,
    activation checkpointing and FSDP put in front of them is left out. A tensor that the model holds
    under several names stands under the first of them in the model's own order.

    >>> decoder = nn.Linear(2, 2, bias=False)
    >>> encoder = nn.Linear(2, 2, bias=False)
    >>> encoder.weight = decoder.weight
    >>> tied = ModelTensors(nn.Sequential(decoder, encoder))
    >>> [(entry.name, entry.aliases) for entry in tied.values()]
    [('0.weight', ['1.weight'])]
    """

    def __init__(self, model: nn.Module, *, watch_buffers: bool = False):
        if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
            raise OptionError(f"a plain torch.nn.Module is needed, got {type(model).__name__}")
        modules = list(_named_modules(model))
        _refuse_flattened(modules)
        # Sharded modules may hold gathered parameters between forward and backward; the shards count.
        self._sharded = [module for _, module in modules if isinstance(module, _fsdp_modules())]
        self.reshard()
        self._entries = _entries(modules)
        self._dicts = [d for _, module in modules for d in (module._parameters, module._modules)]
        if watch_buffers:
            self._dicts += [module._buffers for _, module in modules]
        self._held = list(self._walk())
        kinds = ("parameter", "buffer") if watch_buffers else ("parameter",)
        self._described = [e.tensor for e in self.values() if e.kind in kinds and _has_shape(e.tensor)]
        self._descriptions = [list(map(read, self._described)) for read in _DESCRIPTION]
        # What has an order in memory; the rest costs nothing, as where a model is a thousand vectors.
        self._matrices = [t for t in self._described if t.ndim > 1 and t.layout == torch.strided]
        self._contiguous = list(map(_is_contiguous, self._matrices))

    def __getitem__(self, name: str) -> NamedTensor:
        return self._entries[name]

    def values(self) -> Iterable[NamedTensor]:
        """Every tensor once, in the model's own order."""
        return self._entries.values()

    def all_names(self) -> dict[str, str]:
        """Every name, tied ones included, to its canonical name."""
        return {n: e.name for e in self.values() for n in (e.name, *e.aliases)}

    def matching(self, patterns: str | Iterable[str] | None, option: str) -> set[str]:
        """Canonical names of the tensors with a name that matches one of the names or glob patterns.

        A pattern that matches nothing is an :class:`OptionError`: it is a slip more often than an intention.

        >>> sorted(ModelTensors(nn.Linear(2, 2)).matching("b*", "exclude"))
        ['bias']
        """
        canonical = self.all_names()
        matched: set[str] = set()
        for pattern in [patterns] if isinstance(patterns, str) else patterns or ():
            hits = {canonical[name] for name in canonical if fnmatchcase(name, pattern)}
            if not hits:
                raise OptionError(
                    f"{option}={pattern!r} matches no tensor of the model; "
                    f"its tensors are {name_list(list(canonical))}"
                )
            matched |= hits
        return matched

    def changed(self) -> bool:
        """Whether a module or parameter was added, removed, replaced, reshaped, retyped, moved or laid out anew.

        A walk over the modules' own dictionaries by identity, a few hundred microseconds for a thousand
        tensors. Buffers are left out unless watched, since models may replace theirs at every step.
        """
        self.reshard()
        if not all(map(is_, self._walk(), self._held)):
            return True
        return any(
            list(map(read, self._described)) != before
            for read, before in zip(_DESCRIPTION, self._descriptions, strict=True)
        ) or self._contiguous != list(map(_is_contiguous, self._matrices))

    def reshard(self) -> None:
        """Put sharded parameters back where FSDP gathered them for a forward pass."""
        for module in self._sharded:
            module.reshard()  # type: ignore[operator]

    def unmaterialised(self) -> list[str]:
        """Names of parameters that have no data yet: on the meta device, or lazy before the first forward."""
        return [e.name for e in self.values() if e.kind == "parameter" and not _has_data(e.tensor)]

    def _walk(self) -> Iterator[object]:
        values = chain.from_iterable(map(dict.values, self._dicts))  # type: ignore[arg-type]
        return chain(values, (_END,))  # so that a walk that goes on where another ends differs from it


def bare_model(model: nn.Module) -> nn.Module:
    """``model`` without the wrappers of ``torch.compile``, DDP and the like; OptionError for anything but a module.

    >>> linear = nn.Linear(1, 1)
    >>> bare_model(nn.DataParallel(linear)) is linear
    True
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"a torch.nn.Module is needed as the model, got {type(model).__name__}")
    for name, child in model._modules.items():
        if child is not None and _is_wrapping(model, name):
            return bare_model(child)
    return model


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which every rank holds its own part.

    >>> is_sharded(torch.ones(1))
    False
    """
    return hasattr(tensor, "to_local")


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This rank's part of each tensor: the shard of a DTensor, the tensor itself otherwise."""
    with torch.no_grad():  # with gradients enabled a DTensor gives out a new view of its shard each time
        return [_to_local(t) if is_sharded(t) else t for t in tensors]


def meshes(tensors: Iterable[Tensor]) -> list[Any]:
    """The device meshes that the DTensors among ``tensors`` are spread over, each once."""
    found = {t.device_mesh for t in tensors if is_sharded(t)}  # type: ignore[attr-defined]
    return sorted(found, key=lambda mesh: str(mesh))


def shape_of(tensor: Tensor) -> str:
    """Shape and sharding in words, which are equal for tensors whose local parts match.

    >>> shape_of(torch.ones(2, 3))
    '(2, 3)'
    """
    if not is_sharded(tensor):
        return f"{tuple(tensor.shape)}"
    return f"{tuple(tensor.shape)} sharded as {tensor.placements} on {tensor.device_mesh}"  # type: ignore[attr-defined]


def sharded_like(shard: Tensor, whole: Tensor) -> Tensor:
    """``shard`` as a tensor that is distributed as ``whole`` is; no data moves."""
    if not is_sharded(whole):
        return shard
    from torch.distributed.tensor import DTensor

    whole = cast(DTensor, whole)
    return DTensor.from_local(
        shard,
        whole.device_mesh,
        whole.placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )


def _is_wrapping(parent: nn.Module, child_name: str) -> bool:
    return child_name in _WRAPPED or (child_name == "module" and isinstance(parent, _PARALLEL))


def _named_modules(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    # nn.Module.named_modules leaves out a shared module's second name, which ties need.
    yield prefix, module
    for name, child in module._modules.items():
        if child is not None:
            yield from _named_modules(child, prefix if _is_wrapping(module, name) else f"{prefix}{name}.")


def _entries(modules: list[tuple[str, nn.Module]]) -> dict[str, NamedTensor]:
    by_id: dict[int, NamedTensor] = {}
    for prefix, module in modules:
        for key, tensor in module._parameters.items():
            if tensor is not None:
                _add(by_id, NamedTensor(prefix + key, tensor, "parameter", True, module._parameters, key))
        for key, tensor in module._buffers.items():
            if tensor is not None:
                persistent = key not in module._non_persistent_buffers_set
                _add(by_id, NamedTensor(prefix + key, tensor, "buffer", persistent, module._buffers, key))
    names = [name for entry in by_id.values() for name in (entry.name, *entry.aliases)]
    if clashes := [name for name, count in Counter(names).items() if count > 1]:
        raise StructureError(
            f"{name_list(clashes)} would name two tensors once wrappers are left out of names; rename what the "
            "wrapper holds besides the model"
        )
    return {entry.name: entry for entry in by_id.values()}


def _add(by_id: dict[int, NamedTensor], entry: NamedTensor) -> None:
    tensor = entry.tensor
    if id(tensor) in by_id:
        by_id[id(tensor)].aliases.append(entry.name)
    else:
        by_id[id(tensor)] = entry


def _has_shape(tensor: Tensor) -> bool:
    return not isinstance(tensor, (UninitializedParameter, UninitializedBuffer))


def _has_data(tensor: Tensor) -> bool:
    return _has_shape(tensor) and not tensor.is_meta


def _refuse_flattened(modules: list[tuple[str, nn.Module]]) -> None:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and any(isinstance(m, fsdp.FullyShardedDataParallel) for _, m in modules):
        raise StructureError(
            "FullyShardedDataParallel flattens parameters, so that their names and shapes are lost; shard the "
            "model with torch.distributed.fsdp.fully_shard instead"
        )


def _fsdp_modules() -> tuple[type, ...]:
    # Where torch's FSDP was never imported no module can be sharded, and importing it takes long.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return (fsdp.FSDPModule,) if fsdp is not None else ()


def _to_local(tensor: Tensor) -> Tensor:
    return tensor.to_local()  # type: ignore[attr-defined]
