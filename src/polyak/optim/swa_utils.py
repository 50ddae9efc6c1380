"""A drop-in for ``torch.optim.swa_utils``: the same names, under which half precision does not stall."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR

from polyak.accumulator import mean_dtype
from polyak.batchnorm import update_bn
from polyak.errors import OptionError, StructureError
from polyak.optim.avg_fns import (
    AvgFn,
    AvgLaw,
    MultiAvgFn,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_avg_fn,
    get_swa_multi_avg_fn,
)
from polyak.optim.module_mean import ModuleMean, Pairing, are_finite, can_be_lerped, refuse_sharded
from polyak.swap import copy_into, refuse_swapped
from polyak.tensors import ModelTensors

__all__ = [
    "SWALR",
    "AveragedModel",
    "get_ema_avg_fn",
    "get_ema_multi_avg_fn",
    "get_swa_avg_fn",
    "get_swa_multi_avg_fn",
    "update_bn",
]


class AveragedModel(nn.Module):
    """A copy of a model that holds the average of the weights which the model passes through.

    The first sample is copied; after it m += c (w - m), with c = 1/n (SWA) unless a function is given. With none,
    or with those of this module, tensors are averaged in fp32 at least, and a sample with a NaN or an infinity is
    left out and not counted. Tensors are matched by name, tied ones averaged once, and integers copied. Modules
    in half precision hold the average rounded; ``state_dict()`` holds it in fp32 under the same keys, and
    loading such a state keeps every bit of it.

    For anything but a whole copy of the model, :class:`polyak.Average` does without one.

    Args:
        model: the model; it is deep-copied.
        device: where the copy is kept; None: beside each of the model's tensors.
        avg_fn: takes the average, the current value and the number of samples so far, and returns the new average.
        multi_avg_fn: takes the same as lists, of one device and dtype, and changes the first in place.
        use_buffers: floating buffers are averaged too; else they are copied, as after each sample in torch.

    Functions of your own are called as torch calls them, in the module's dtype, and with every sample.

    Raises:
        OptionError: both functions are given, or ``model`` is no plain module.
        StructureError: the model cannot be copied, or is sharded.

    Source: the interface is that of ``torch.optim.swa_utils``; SWA is Izmailov et al. 2018, arXiv:1803.05407.

    >>> import torch
    >>> from polyak.optim.swa_utils import AveragedModel
    >>> model = torch.nn.Linear(1, 1)
    >>> swa_model = AveragedModel(model)
    >>> for value in (1.0, 3.0):
    ...     _ = model.weight.data.fill_(value)
    ...     swa_model.update_parameters(model)
    >>> swa_model.module.weight.data, swa_model.n_averaged
    (tensor([[2.]]), tensor(2))
    """

    n_averaged: Tensor

    def __init__(
        self,
        model: nn.Module,
        device: torch.device | str | int | None = None,
        avg_fn: AvgFn | None = None,
        multi_avg_fn: MultiAvgFn | None = None,
        use_buffers: bool = False,
    ):
        super().__init__()
        if avg_fn is not None and multi_avg_fn is not None:
            raise OptionError("avg_fn and multi_avg_fn were both given; give only one of them")
        self.module = _copied(model)
        if device is not None:
            self.module.to(device)
        self.register_buffer("n_averaged", torch.tensor(0, dtype=torch.long, device=device))
        self.avg_fn = avg_fn
        self.multi_avg_fn = multi_avg_fn
        self.use_buffers = use_buffers
        # Means that are wider than the module's own tensors, by canonical name.
        self._wide: dict[str, Tensor] = {}
        self._forget_model()
        self.register_state_dict_post_hook(_save_wide)
        self.register_load_state_dict_pre_hook(_load_wide)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the averaged module returns."""
        return self.module(*args, **kwargs)

    @torch._disable_dynamo
    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take the weights of ``model`` as a sample.

        Args:
            model: the model that was copied, perhaps inside DistributedDataParallel or ``torch.compile``.

        Raises:
            StructureError: its tensors are not those that were copied, or have no data.
            SwapError: another average's weights are in it.
        """
        pairing = self._paired_with(model)
        refuse_swapped(pairing.live)
        if self._take_sample(pairing):
            pairing.copy_others()
            pairing.mark()
            self.n_averaged += 1

    def __getstate__(self) -> dict[str, Any]:
        # Accumulators work on views, which pickle would tear from their means: they are made anew.
        self._look_anew()
        state = {key: value for key, value in self.__dict__.items() if key not in ("_pairings", "_mean")}
        return state | {"_wide": {name: _apart(mean) for name, mean in self._wide.items()}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget_model()

    # How it works inside.

    def _forget_model(self) -> None:
        # Weakly, so that the model's memory is free once its owner lets go of it.
        self._pairings: WeakKeyDictionary[nn.Module, Pairing] = WeakKeyDictionary()
        self._mean: ModuleMean | None = None

    def _paired_with(self, model: nn.Module) -> Pairing:
        pairing = self._pairings.get(model)
        if pairing is None or pairing.changed():
            self._forget_model()
            pairing = self._pairings[model] = Pairing(self.module, model, self.use_buffers)
        return pairing

    def _mean_of(self, pairing: Pairing) -> ModuleMean:
        if self._mean is None:
            self._mean = ModuleMean(pairing, self._wide_means())
            self._wide = self._mean.wide
        return self._mean

    def _wide_means(self) -> dict[str, Tensor]:
        """Those that the module still holds rounded: where somebody wrote to it, what was written counts."""
        own = ModelTensors(self.module).values() if self._wide else ()
        pairs = [(e.name, e.tensor, self._wide[e.name]) for e in own if e.name in self._wide]
        return {name: mean for name, tensor, mean in pairs if _is_rounded(mean, tensor)}

    def _take_sample(self, pairing: Pairing) -> bool:
        function = self.avg_fn if self.multi_avg_fn is None else self.multi_avg_fn
        law = AvgLaw() if function is None else function
        if not isinstance(law, AvgLaw):
            self._call_functions(pairing)
            return True
        if law.scheme is not None:
            return self._mean_of(pairing).add(pairing.live, int(self.n_averaged), law.scheme)
        finite = are_finite(pairing.live)
        if finite:
            self._call_functions(pairing)
        return finite

    def _call_functions(self, pairing: Pairing) -> None:
        self._mean = None  # what it keeps apart from the module is out of date from here on
        own = pairing.own
        live = [tensor.detach().to(o.device) for tensor, o in zip(pairing.live, own, strict=True)]
        if self.n_averaged == 0:
            copy_into(own, live)
        elif self.multi_avg_fn is not None:
            for device, averaged, current in _by_kind(own, live):
                self.multi_avg_fn(averaged, current, self.n_averaged.to(device))
        elif self.avg_fn is not None:
            for averaged, current in zip(own, live, strict=True):
                averaged.copy_(self.avg_fn(averaged, current, self.n_averaged.to(averaged.device)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        wide = self._wide_means()
        super()._apply(fn, recurse)
        tensors = {e.name: e.tensor.detach() for e in ModelTensors(self.module).values()}
        for name, mean in wide.items():
            tensors[name].copy_(mean)  # a wider dtype then holds all of the mean
        wider = [n for n, m in wide.items() if m.dtype != tensors[n].dtype and not tensors[n].is_meta]
        self._wide = {name: wide[name].to(tensors[name].device) for name in wider}
        self._forget_model()
        return self

    def _look_anew(self) -> None:
        if self._mean is not None:
            self._mean.look_anew()

    def _state_names(self) -> Iterator[tuple[str, str, Tensor]]:
        """The key in ``module.state_dict()``, the canonical name and the tensor, for each key."""
        names = {id(e.tensor): e.name for e in ModelTensors(self.module).values()}
        for named in (self.module.named_parameters, self.module.named_buffers):
            for key, tensor in named(remove_duplicate=False):
                yield key, names[id(tensor)], tensor


def _save_wide(averaged: AveragedModel, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Put means that the module holds rounded into a state dict, in full."""
    averaged._look_anew()
    wide = averaged._wide_means()
    for key, name, _tensor in averaged._state_names() if wide else ():
        if name in wide and f"{prefix}module.{key}" in state:
            state[f"{prefix}module.{key}"] = _apart(wide[name])


def _load_wide(averaged: AveragedModel, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Keep in full what loading is about to round."""
    for key, name, tensor in averaged._state_names():
        value = state.get(f"{prefix}module.{key}")
        if value is None:
            continue
        averaged._wide.pop(name, None)
        dtype = mean_dtype(tensor.dtype) if can_be_lerped(tensor) else tensor.dtype
        if dtype != tensor.dtype and value.dtype != tensor.dtype and value.shape == tensor.shape:
            averaged._wide[name] = value.detach().to(tensor.device, dtype, copy=True)


def _copied(model: nn.Module) -> nn.Module:
    refuse_sharded(ModelTensors(model))
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise StructureError(
            f"{type(model).__name__} cannot be deep-copied ({error}), and AveragedModel is a copy; use "
            "polyak.Average(model, scheme), which never copies the model"
        ) from error


def _apart(mean: Tensor) -> Tensor:
    """A small mean without those that lie beside it, which would be saved along with it."""
    return mean if mean.untyped_storage().nbytes() == mean.nbytes else mean.clone()


def _is_rounded(mean: Tensor, tensor: Tensor) -> bool:
    return mean.dtype != tensor.dtype and mean.shape == tensor.shape and torch.equal(mean.to(tensor), tensor)


def _by_kind(
    averaged: list[Tensor], current: list[Tensor]
) -> Iterator[tuple[torch.device, list[Tensor], list[Tensor]]]:
    """The pairs in lists of one device and dtype of the average, as functions on many tensors take them."""
    groups: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for a, c in zip(averaged, current, strict=True):
        group = groups.setdefault((a.device, a.dtype), ([], []))
        group[0].append(a)
        group[1].append(c)
    return ((device, *group) for (device, _), group in groups.items())
