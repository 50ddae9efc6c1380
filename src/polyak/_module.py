"""The averaged model as a module of its own: copied without its weights, which are the average's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from polyak._checks import Difference
from polyak._mean import Accumulator
from polyak._model import Binding, ModelTensors, NamedTensor, bare_model, shape_of
from polyak.errors import StructureError, name_list

__all__ = ["AverageModules", "module_without_weights"]


def module_without_weights(model: nn.Module, factory: Callable[[], nn.Module] | None) -> nn.Module:
    """A module like ``model``, in evaluation mode, without gradients: a copy that has its parameters in common, or new.

    Of a copy only the buffers take memory. Hooks are copied as well, as some compute weights; wrappers around the model
    are left out.

    Raises:
        StructureError: it cannot be copied, or what ``factory`` gave is another model, or has no data.
        OptionError: ``factory`` gave no module.
    """
    made = _copied(bare_model(model)) if factory is None else _made_by(factory, ModelTensors(model))
    # The flags, not `eval()`: some modules merge weights there, and would do so in the live model's memory.
    for module in made.modules():
        module.training = False
    return made.requires_grad_(False)


def _copied(model: nn.Module) -> nn.Module:
    # What the memo holds is not copied, but stands for what it is a copy of.
    memo: dict[int, Any] = {
        id(entry.tensor): nn.Parameter(entry.tensor.detach(), requires_grad=False)
        for entry in ModelTensors(model).values()
        if entry.kind == "parameter" and _is_dense(entry.tensor)
    }
    memo |= {id(tensor): tensor.detach().clone() for tensor in _computed_tensors(model)}
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # whatever a model holds that is no weight: locks, generators, connections
        raise StructureError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}): pass module(factory=…), a "
            "function that makes such a model anew"
        ) from error


def _made_by(factory: Callable[[], nn.Module], ours: ModelTensors) -> nn.Module:
    made = factory()
    theirs = ModelTensors(made)
    if waiting := theirs.unmaterialised():
        raise StructureError(
            f"{name_list(waiting)} of what factory() gave have no data yet: materialise it first"
        )
    if found := Difference.of(_shapes(ours), _shapes(theirs)):
        raise StructureError(f"what factory() gave is another model than the averaged one: it {found}")
    return made


def _shapes(tensors: ModelTensors) -> dict[str, str]:
    return {n: shape_of(e.tensor) for e in tensors.values() for n in (e.name, *e.aliases) if e.persistent}


def _computed_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Tensors beside parameters and buffers that torch refuses to copy, as the weight that weight_norm computes."""
    for module in model.modules():
        yield from (v for v in vars(module).values() if isinstance(v, Tensor) and not v.is_leaf)


@dataclass(slots=True)
class _Link:
    """One tensor of a module, by the place that it stands in, and the live tensor that it stands for."""

    place: dict[str, Any]
    key: str
    name: str  # of the live tensor
    shared: int | None = None  # where the memory lies that it was given

    @property
    def tensor(self) -> Tensor:
        return self.place[self.key]

    def share(self, source: Tensor) -> None:
        """Stand for ``source`` in its very memory, or with a copy where dtype, device or layout do not allow it."""
        tensor = self.tensor
        if (tensor.dtype, tensor.device) != (source.dtype, source.device) or not _is_dense(source):
            self.copy(source)
            return
        if tensor.data_ptr() != source.data_ptr():
            tensor.data = source.detach()
        self.shared = source.data_ptr()

    def copy(self, source: Tensor) -> None:
        """Stand for ``source`` with its values, in memory of its own."""
        tensor = self.tensor
        is_given = self.shared is not None and tensor.data_ptr() == self.shared
        if is_given or tensor.shape != source.shape:  # a module may replace its buffers
            tensor.data = torch.empty_like(source, dtype=tensor.dtype, device=tensor.device)
        self.shared = None
        tensor.data.copy_(source)


class AverageModules:
    """The modules that an average gave out, each for as long as somebody holds it. Copies of an average have none."""

    def __init__(self) -> None:
        self._links: list[tuple[ref[nn.Module], list[_Link]]] = []
        self._has_started = False

    def add(self, module: nn.Module, binding: Binding, accumulator: Accumulator, *, is_copy: bool) -> None:
        """Have ``module``, which :func:`module_without_weights` made of the model, follow the average from now on."""
        names = binding.tensors.all_names()
        theirs = [entry for entry in ModelTensors(module).values() if entry.name in names]
        links = [_link(entry, names[entry.name], is_copy) for entry in theirs]
        self._has_started = accumulator.n_averaged > 0
        self._take(links, binding, accumulator, with_buffers=True)
        self._links.append((ref(module), links))

    def refuse_trained(self) -> None:
        """Raise :class:`StructureError` for a module whose parameters are trained: they are the average's own."""
        alive = (links for module, links in self._links if module() is not None)
        trained = [link.name for links in alive for link in links if link.tensor.requires_grad]
        if trained:
            raise StructureError(
                f"{name_list(trained)} of a module() of this average require gradients, and training them changes the "
                "average: call requires_grad_(False) on it, or train a copy.deepcopy of it"
            )

    def follow(self, binding: Binding, accumulator: Accumulator, *, with_buffers: bool = False) -> None:
        """Hold the averaged model as it is now; before its first sample the live one, whose memory it then shares."""
        self._links = [(module, links) for module, links in self._links if module() is not None]
        if (
            self._links and not self._has_started
        ):  # read no more often than needed, as on an accelerator it waits
            self._has_started = accumulator.n_averaged > 0
        for _, links in self._links:
            self._take(links, binding, accumulator, with_buffers)

    def restart(self) -> None:
        """The average may have no samples any more."""
        self._has_started = False

    @torch.no_grad()
    def _take(
        self, links: list[_Link], binding: Binding, accumulator: Accumulator, with_buffers: bool
    ) -> None:
        averaged = zip(binding.names, accumulator.memory, strict=True) if self._has_started else ()
        means = dict(averaged)
        for link in links:
            live, mean = binding.tensors[link.name], means.get(link.name)
            if live.kind == "parameter":
                link.share(live.tensor if mean is None else mean)
            elif with_buffers and (live.persistent or mean is not None):
                link.copy(live.place[live.key] if mean is None else mean)

    def __reduce__(self) -> tuple[Any, ...]:
        return AverageModules, ()


def _link(entry: NamedTensor, name: str, is_copy: bool) -> _Link:
    is_given = is_copy and entry.kind == "parameter" and _is_dense(entry.tensor)
    return _Link(entry.place, entry.key, name, entry.tensor.data_ptr() if is_given else None)


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided
