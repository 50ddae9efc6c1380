"""The running mean of a model in a module that is a copy of it: what stands behind ``AveragedModel``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from polyak.accumulator import Accumulator, mean_dtype
from polyak.batches import in_place_of
from polyak.binding import differences
from polyak.errors import OptionError, StructureError, name_list
from polyak.profiles import Scheme, Uniform
from polyak.swap import copy_into
from polyak.tensors import ModelTensors, NamedTensor, is_sharded, shape_of

__all__ = ["ModuleMean", "Pairing", "are_finite", "can_be_lerped", "refuse_sharded"]


class Pairing:
    """The tensors of a module and of the model that it is a copy of, side by side by canonical name.

    Args:
        module: the copy, whose tensors are written to.
        model: the model that trains.
        use_buffers: floating buffers are averaged too; else they are copied, as integers always are.

    Raises:
        StructureError: the two differ in a name or shape, are sharded, or have no data yet.
        OptionError: they have nothing that can be averaged.

    >>> averaged, live = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
    >>> Pairing(averaged, live, use_buffers=True).names
    ['weight', 'bias', 'running_mean', 'running_var']
    """

    def __init__(self, module: nn.Module, model: nn.Module, use_buffers: bool):
        self._sides = [ModelTensors(side, watch_buffers=True) for side in (module, model)]
        own, live = self._sides
        for side in self._sides:
            refuse_sharded(side)
            _refuse_without_data(side)
        _refuse_different(own, live)
        self.names = [e.name for e in own.values() if _is_averaged(e, use_buffers)]
        if not self.names:
            raise OptionError("nothing to average: the model has no floating-point parameter")
        self._parameters = [own[name].tensor for name in self.names]
        self.own = [tensor.detach() for tensor in self._parameters]
        self.live = [live[name].tensor for name in self.names]
        others = [e.name for e in own.values() if not _is_averaged(e, use_buffers)]
        self._own_others = [own[name].tensor for name in others]
        self._live_others = [live[name].tensor for name in others]
        self.mark()

    def copy_others(self) -> None:
        """Copy what is not averaged from the model into the module."""
        copy_into(self._own_others, self._live_others)

    def mark(self) -> None:
        """Take the values in the module as written by its owner."""
        self._written = self._state()

    def changed(self) -> bool:
        """Whether either side has other tensors than before, or somebody else wrote to the averaged ones."""
        return self._written != self._state() or any(side.changed() for side in self._sides)

    def _state(self) -> list[tuple[int, int]]:
        return [(tensor.data_ptr(), tensor._version) for tensor in self._parameters]


class ModuleMean:
    """Running means that live in a module, in fp32 at least.

    A mean *is* the module's own tensor where that is large and of the mean's dtype. The others are kept apart and
    copied into the module after each sample: those of half-precision tensors, which would round them, and those
    of small ones, which lie side by side to be updated as one.

    Args:
        pairing: the module and the model that it follows.
        wide: by name, means that are wider than the module's tensors, which hold them rounded.

    >>> module, model = nn.Linear(1, 1).bfloat16(), nn.Linear(1, 1).bfloat16()
    >>> pairing = Pairing(module, model, use_buffers=False)
    >>> mean = ModuleMean(pairing, {})
    >>> for count, value in enumerate((1.0, 1.0078125)):
    ...     _ = model.weight.data.fill_(value)
    ...     accepted = mean.add(pairing.live, count, Uniform())
    >>> mean.wide["weight"], module.weight.data
    (tensor([[1.0039]]), tensor([[1.]], dtype=torch.bfloat16))
    """

    def __init__(self, pairing: Pairing, wide: Mapping[str, Tensor]):
        named = list(zip(pairing.names, pairing.own, strict=True))
        values = [wide.get(name, own) for name, own in named]
        dtypes = [
            torch.promote_types(mean_dtype(v.dtype), mean_dtype(w.dtype))
            for v, w in zip(values, pairing.live, strict=True)
        ]
        devices = {own.device for own in pairing.own}
        self._accumulator = Accumulator(
            pairing.live,
            pairing.names,
            Uniform(),
            device=devices.pop() if len(devices) == 1 else None,
            means=in_place_of(values, dtypes),
        )
        means = self._accumulator.means
        apart = [(o, m) for o, m in zip(pairing.own, means, strict=True) if o.data_ptr() != m.data_ptr()]
        self._copies, self._kept_apart = [own for own, _ in apart], [mean for _, mean in apart]
        self.wide = {
            name: mean for (name, own), mean in zip(named, means, strict=True) if own.dtype != mean.dtype
        }

    def add(self, live: Sequence[Tensor], count: int, scheme: Scheme) -> bool:
        """Fold in the model as sample ``count + 1``; False where it is not finite, and all is as it was."""
        accumulator = self._accumulator
        accumulator.scheme = scheme
        # Looked at before the restart, which may forget the values that the module began with.
        if count == 0 and not are_finite(live):
            return False
        if count == 0 or count != accumulator.n_averaged:
            accumulator.restart(count)
        accumulator.add(live)
        accepted = accumulator.n_averaged > count
        if accepted and self._copies:
            torch._foreach_copy_(self._copies, self._kept_apart)
        return accepted

    def look_anew(self) -> None:
        """Forget what is not in a saved state; to be called where one is saved."""
        self._accumulator.look_anew()


def are_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no tensor holds a NaN or an infinity.

    >>> are_finite([torch.ones(2)]), are_finite([torch.ones(2), torch.tensor(float("inf"))])
    (True, False)
    """
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def can_be_lerped(tensor: Tensor) -> bool:
    """Whether means of tensors like this one can be taken: floating or complex.

    >>> can_be_lerped(torch.ones(1)), can_be_lerped(torch.ones(1, dtype=torch.long))
    (True, False)
    """
    return tensor.is_floating_point() or tensor.is_complex()


def refuse_sharded(tensors: ModelTensors) -> None:
    """Whole tensors are averaged here, and a copy of a sharded module would be out of step with its mesh."""
    if sharded := [e.name for e in tensors.values() if is_sharded(e.tensor)]:
        raise StructureError(
            f"{name_list(sharded)} are sharded, and AveragedModel is a whole copy of the model; use "
            "polyak.Average(model, scheme), which averages every shard where it is"
        )


def _is_averaged(entry: NamedTensor, use_buffers: bool) -> bool:
    return can_be_lerped(entry.tensor) and (use_buffers or entry.kind == "parameter")


def _refuse_without_data(tensors: ModelTensors) -> None:
    if waiting := tensors.unmaterialised():
        raise StructureError(
            f"{name_list(waiting)} have no data yet; materialise the model (to_empty() for the meta device, one "
            "forward pass for lazy modules) before AveragedModel copies it"
        )


def _refuse_different(own: ModelTensors, live: ModelTensors) -> None:
    if complaints := differences(_shapes(own), _shapes(live)):
        raise StructureError(
            f"the model is not the one that AveragedModel is a copy of: {'; '.join(complaints)}. Make a new "
            "AveragedModel of the changed model"
        )


def _shapes(tensors: ModelTensors) -> dict[str, str | None]:
    return {entry.name: shape_of(entry.tensor) for entry in tensors.values()}
