"""A model as named tensors: canonical names, ties, wrappers and shards, and which of them are averaged.

Everything above this layer works on plain lists of local tensors; what a model *is* is known here only.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from itertools import chain
from operator import attrgetter, is_
from typing import Any, Literal, cast
from weakref import WeakMethod

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils.weak import WeakIdKeyDictionary

from polyak import _torch
from polyak._checks import Difference
from polyak.errors import OptionError, PolyakError, StateError, StructureError, SwapError, name_list

__all__ = [
    "Binding",
    "ModelTensors",
    "NamedTensor",
    "Place",
    "bare_model",
    "is_sharded",
    "local",
    "note_swapped",
    "note_unswapped",
    "refuse_swapped",
    "shape_of",
    "sharded_like",
    "watch_for_thaws",
]

# A model as named tensors: canonical names, ties, wrappers, sharding and changes of structure.

# The module's own dictionary, the key, and the tensor that stands there.
Place = tuple[dict[str, Any], str, Tensor]

_is_thawed = attrgetter("requires_grad")
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
        _torch.refuse_flattened(module for _, module in modules)
        # Sharded modules may hold gathered parameters between forward and backward; the shards count.
        self._sharded = list(_torch.fsdp_modules(module for _, module in modules))
        self.reshard()
        self._entries = _entries(modules)
        self._dicts = [
            d for _, module in modules for d in (_torch.parameters_of(module), _torch.children_of(module))
        ]
        if watch_buffers:
            self._dicts += [_torch.buffers_of(module) for _, module in modules]
        self._held = list(self._walk())
        kinds = ("parameter", "buffer") if watch_buffers else ("parameter",)
        self._described = [e.tensor for e in self.values() if e.kind in kinds and _has_shape(e.tensor)]
        self._layout = _torch.Layout(self._described)

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

        A walk over the modules' own dictionaries by identity, a hundred microseconds for a thousand
        tensors. Buffers are left out unless watched, since models may replace theirs at every step.
        """
        self.reshard()
        return not (all(map(is_, self._walk(), self._held)) and self._layout.is_that_of(self._described))

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
    for name, child in _torch.children_of(model).items():
        if child is not None and _torch.is_wrapped(model, name):
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


def _named_modules(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    # nn.Module.named_modules leaves out a shared module's second name, which ties need.
    yield prefix, module
    for name, child in _torch.children_of(module).items():
        if child is not None:
            yield from _named_modules(
                child, prefix if _torch.is_wrapped(module, name) else f"{prefix}{name}."
            )


def _entries(modules: list[tuple[str, nn.Module]]) -> dict[str, NamedTensor]:
    by_id: dict[int, NamedTensor] = {}
    for prefix, module in modules:
        for key, tensor in (own := _torch.parameters_of(module)).items():
            if tensor is not None:
                _add(by_id, NamedTensor(prefix + key, tensor, "parameter", True, own, key))
        for key, tensor in (own := _torch.buffers_of(module)).items():
            if tensor is not None:
                persistent = _torch.is_persistent(module, key)
                _add(by_id, NamedTensor(prefix + key, tensor, "buffer", persistent, own, key))
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


def _to_local(tensor: Tensor) -> Tensor:
    return tensor.to_local()  # type: ignore[attr-defined]


# Live tensors that hold an average's values now: whatever wrapper it is reached through, one model has one swap.
# Models are trained in several threads, so what is noted is noted under a lock; a reader looks up single tensors.
_swapped_in = WeakIdKeyDictionary()
_swapping = threading.Lock()


def refuse_swapped(tensors: Sequence[Tensor]) -> None:
    """Raise :class:`SwapError` if live tensors hold averaged values now, whichever average swapped them in."""
    if _swapped_in and any(tensor in _swapped_in for tensor in tensors):
        raise SwapError(
            "this model holds averaged weights already, perhaps another average's; leave applied() or call "
            "swap_out() there first"
        )


def note_swapped(tensors: Sequence[Tensor]) -> None:
    """From here on ``tensors`` hold averaged values; :class:`SwapError` if one of them does already."""
    with _swapping:
        refuse_swapped(tensors)
        _swapped_in.update(dict.fromkeys(tensors, True))


def note_unswapped(tensors: Sequence[Tensor]) -> None:
    """They hold live values again."""
    with _swapping:
        for tensor in tensors:
            _swapped_in.pop(tensor, None)


# Parameters that thaw are taken up before the optimizer's next step changes them, while they are what they were for all
# samples before: after it only a copy, which frozen parameters are spared, would know.
_watching: set[WeakMethod[Callable[[], object]]] = set()
_watched = threading.Lock()


def watch_for_thaws(take_up: Callable[[], object]) -> None:
    """Call a method before each step of any torch optimizer, which then takes up what thaws; not kept alive."""
    _hook_into_optimizers()
    with _watched:
        _watching.difference_update([method for method in _watching if method() is None])
        _watching.add(WeakMethod(take_up))


@cache
def _hook_into_optimizers() -> None:
    _torch.before_optimizer_steps(_take_up_thawed)


def _take_up_thawed() -> None:
    with _watched:
        methods = [method() for method in _watching]
    for take_up in methods:
        if take_up is not None:
            with suppress(PolyakError):  # the next update says so, to whom it concerns
                take_up()


# The tensors of a live model that an average or a recorder follows, through every change that allows it.


class Binding:
    """Which tensors of ``model`` are averaged, under their canonical names, and where they are now.

    Averaged are the trainable parameters, or those that ``include`` matches, less those that ``exclude``
    matches; with ``buffers="average"`` floating buffers count as trainable. Everything else is read from the
    live model when it is needed.

    The names and shapes of the model are fixed when the binding is made. :meth:`follow` takes up parameters that were
    replaced by others of the same names and shapes, and refuses any other change. Parameters that thaw join those
    that are averaged, unless ``include`` says which these are; those that freeze stay among them.

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
        # Where the user named what to average, a frozen parameter that is thawed was left out on purpose.
        self._choosable = self._choose(include, exclude)
        chosen = [n for n in self._choosable if include is not None or _is_trained(self.tensors[n])]
        if not chosen:
            raise OptionError(
                "nothing to average: the model has no trainable floating-point parameter"
                + ("" if include is None and exclude is None else " that include and exclude leave")
            )
        self._refuse_sparse(chosen)
        self.names = chosen
        self._follows_thaws = include is None
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
        averaged = set(self.names)
        return local(e.tensor for e in self.tensors.values() if e.kind == "buffer" and e.name in averaged)

    def places(self) -> list[Place]:
        """Where every tensor of the model stands now."""
        return [(e.place, e.key, e.tensor) for e in ModelTensors(self.model).values()]

    @property
    def frozen(self) -> list[str]:
        """Names of the parameters that are averaged from when they thaw on."""
        averaged = set(self.names)
        return [n for n in self._choosable if self._follows_thaws and n not in averaged]

    @contextmanager
    def choosing_as(self, state: Mapping[str, Any], rebind: Callable[[], object]) -> Iterator[list[str]]:
        """Average what a saved state does, which was frozen then and which is frozen here may differ; their names.

        Until all of the state was looked at, inside, what is averaged now is averaged as well. An error leaves
        everything as it was.

        Args:
            state: names what was frozen and not averaged as ``"frozen"``.
            rebind: called after each change of :attr:`names`.
        """
        before = self.names
        frozen = state.get("frozen", self.frozen)
        if not (isinstance(frozen, list) and all(isinstance(name, str) for name in frozen)):
            raise StateError(
                f"the saved frozen must be a list of names, got {frozen!r:.60}; nothing was loaded"
            )
        left_out = set(frozen) if self._follows_thaws else set()
        names = [name for name in self._choosable if name not in left_out]
        try:
            self._average_these([*before, *names], rebind)
            yield names
        except BaseException:
            self._average_these(before, rebind)
            raise
        self._average_these(names, rebind)

    def thawed(self) -> list[str]:
        """Those of them that are trained now; not while another average is swapped in, whose values they may hold."""
        if not any(map(_is_thawed, self._frozen)):
            return []
        return [n for n in self.frozen if self.tensors[n].tensor.requires_grad and not self._is_swapped(n)]

    def average_also(self, names: Iterable[str], rebind: Callable[[], object] = lambda: None) -> None:
        """Average ``names`` as well from now on, as far as they may be averaged; ``rebind()`` if they are more."""
        self._refuse_sparse(names := [name for name in self._choosable if name in names])
        self._average_these([*self.names, *names], rebind)

    def follow(self) -> bool:
        """Notice what changed in the model; True where its tensors were replaced, retyped or moved.

        Raises:
            StructureError: tensors were added, removed or reshaped, or some have no data yet. The message names
                them.
        """
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

    def agree(self, refused: Tensor) -> None:
        """Make a 0-dim tensor, 1 where this rank refuses a sample, 1 in place if any rank does; a collective call.

        Each rank has seen its own shards. Nothing is copied where the tensor is on the ranks' kind of device.
        """
        for mesh in self._meshes:
            verdict = refused.to(mesh.device_type)
            for dim in range(mesh.ndim):
                dist.all_reduce(verdict, dist.ReduceOp.MAX, group=mesh.get_group(dim))
            if verdict is not refused:
                refused.copy_(verdict)

    @property
    def sharded(self) -> bool:
        """Whether tensors are split over ranks."""
        return bool(self._meshes)

    @property
    def watches_memory(self) -> bool:
        """Whether :meth:`follow` sees it where live tensors lie otherwise in memory; not in shards of them."""
        return not self.sharded

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

    def _average_these(self, names: Iterable[str], rebind: Callable[[], object]) -> None:
        wanted, before = set(names), self.names
        self.names = [name for name in self._choosable if name in wanted]
        if self.names != before:
            self._take_up()
            rebind()

    def _take_up(self) -> None:
        self._live = [self.tensors[name].tensor for name in self.names]
        # Also of what is not averaged: adapters may be plain tensors beside a frozen model that is sharded.
        self._meshes = meshes(e.tensor for e in self.tensors.values())
        self._ready = not self.tensors.unmaterialised()
        self._shapes = self._describe(self.tensors)
        self._frozen = [self.tensors[name].tensor for name in self.frozen]

    def _choose(self, include: str | Iterable[str] | None, exclude: str | Iterable[str] | None) -> list[str]:
        """What may be averaged, at once or from when it thaws on."""
        included = self.tensors.matching(include, "include")
        excluded = self.tensors.matching(exclude, "exclude")
        return [
            entry.name
            for entry in self.tensors.values()
            if self._can_be_averaged(entry)
            and (include is None or entry.name in included)
            and entry.name not in excluded
        ]

    def _is_swapped(self, name: str) -> bool:
        return any(tensor in _swapped_in for tensor in local([self.tensors[name].tensor]))

    def _refuse_sparse(self, names: list[str]) -> None:
        sparse = [name for name in names if self.tensors[name].tensor.layout != torch.strided]
        if sparse:
            raise StructureError(f"{name_list(sparse)} are sparse; make them dense, or name them in exclude=")

    def _can_be_averaged(self, entry: NamedTensor) -> bool:
        numeric = entry.tensor.dtype.is_floating_point or entry.tensor.dtype.is_complex
        return numeric and (entry.kind == "parameter" or self._watch_buffers)

    def _refuse_restructured(self, tensors: ModelTensors) -> None:
        if found := Difference.of(self._shapes, self._describe(tensors)):
            raise StructureError(
                f"the model is no longer the one that is averaged: it {found}. "
                "Make a new average for the changed model"
            )

    def _describe(self, tensors: ModelTensors) -> dict[str, str | None]:
        """Parameters and averaged buffers to their shapes in words, None for one that is still lazy."""
        lazy = {name for name in tensors.unmaterialised() if not tensors[name].tensor.is_meta}
        averaged = set(self.names)
        return {
            e.name: None if e.name in lazy else shape_of(e.tensor)
            for e in tensors.values()
            if e.kind == "parameter" or e.name in averaged
        }


def _is_trained(entry: NamedTensor) -> bool:
    return entry.kind == "buffer" or entry.tensor.requires_grad
