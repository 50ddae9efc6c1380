"""The averaging functions of ``polyak.optim.swa_utils``.

They are plain data, so they pickle and compare equal, and work in torch's own ``AveragedModel`` as well.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR

from polyak import _torch, batchnorm
from polyak._batches import in_place_of
from polyak._checks import Difference
from polyak._device_mean import are_finite
from polyak._mean import Accumulator, mean_dtype
from polyak._model import ModelTensors, NamedTensor, is_sharded, refuse_swapped, shape_of
from polyak._swap import copy_into
from polyak._torch import refuse_unseen_conversions
from polyak.errors import OptionError, StructureError, name_list
from polyak.profiles import EMA, Scheme, Uniform

__all__ = [
    "SWALR",
    "AveragedModel",
    "get_ema_avg_fn",
    "get_ema_multi_avg_fn",
    "get_swa_avg_fn",
    "get_swa_multi_avg_fn",
    "update_bn",
]

# The averaging functions of ``polyak.optim.swa_utils``.

Count = Tensor | int
Tensors = list[Tensor] | tuple[Tensor, ...]
AvgFn = Callable[[Tensor, Tensor, Count], Tensor]
MultiAvgFn = Callable[[Tensors, Tensors, Count], None]


@dataclass(frozen=True)
class AvgLaw:
    """The weight of the newest sample: 1 - decay, or 1/n where there is no decay; what this module's functions are.

    >>> AvgLaw(0.75).weight(3), AvgLaw().weight(3)
    (0.25, 0.25)
    """

    decay: float | None = None

    def __post_init__(self) -> None:
        if self.decay is not None and not 0 <= self.decay <= 1:
            raise OptionError(f"decay must lie in [0, 1], got {self.decay!r}; 0.999 is usual")

    @property
    def scheme(self) -> Scheme | None:
        """None for the decay 1, which keeps the first sample for ever and so is no average."""
        if self.decay is None:
            return Uniform()
        return EMA(decay=self.decay, debias=False) if self.decay < 1 else None

    def weight(self, num_averaged: Count) -> float:
        """Of a sample that comes after ``num_averaged`` others."""
        return 1 / (float(num_averaged) + 1) if self.decay is None else 1 - self.decay


class _Single(AvgLaw):
    @torch.no_grad()
    def __call__(self, averaged: Tensor, current: Tensor, num_averaged: Count) -> Tensor:
        return _between(averaged, current, self.weight(num_averaged))


class _Multi(AvgLaw):
    @torch.no_grad()
    def __call__(self, averaged: Tensors, current: Tensors, num_averaged: Count) -> None:
        weight = self.weight(num_averaged)
        if can_be_lerped(averaged[0]):
            _torch.foreach_lerp_(averaged, current, weight)
            return
        for target, source in zip(averaged, current, strict=True):
            target.copy_(_between(target, source, weight))


def get_ema_multi_avg_fn(decay: float = 0.999) -> MultiAvgFn:
    """The exponential moving average of lists of tensors, in place: m += (1 - decay) (w - m).

    Args:
        decay: the weight that the average keeps at each sample, in [0, 1].

    Raises:
        OptionError: ``decay`` is outside [0, 1].

    >>> mean = [torch.tensor([0.0])]
    >>> get_ema_multi_avg_fn(0.75)(mean, [torch.tensor([4.0])], 1)
    >>> mean
    [tensor([1.])]
    """
    return _Multi(decay)


def get_swa_multi_avg_fn() -> MultiAvgFn:
    """The uniform average of lists of tensors, in place: m += (w - m) / (n + 1), with n samples in m.

    >>> mean = [torch.tensor([0.0])]
    >>> get_swa_multi_avg_fn()(mean, [torch.tensor([4.0])], 1)
    >>> mean
    [tensor([2.])]
    """
    return _Multi()


def get_ema_avg_fn(decay: float = 0.999) -> AvgFn:
    """The exponential moving average of one tensor, as a new tensor: m + (1 - decay) (w - m).

    Args:
        decay: the weight that the average keeps at each sample, in [0, 1].

    Raises:
        OptionError: ``decay`` is outside [0, 1].

    >>> get_ema_avg_fn(0.75)(torch.tensor([0.0]), torch.tensor([4.0]), 1)
    tensor([1.])
    """
    return _Single(decay)


def get_swa_avg_fn() -> AvgFn:
    """The uniform average of one tensor, as a new tensor: m + (w - m) / (n + 1), with n samples in m.

    >>> get_swa_avg_fn()(torch.tensor([0.0]), torch.tensor([4.0]), 1)
    tensor([2.])
    """
    return _Single()


def _between(averaged: Tensor, current: Tensor, weight: float) -> Tensor:
    if can_be_lerped(averaged):
        return torch.lerp(averaged, current, weight)
    return averaged + (current - averaged) * weight


def update_bn(
    loader: Iterable[Any], model: nn.Module, device: torch.device | str | int | None = None
) -> None:
    """Set BatchNorm statistics to those of all samples in ``loader``, calling the model as torch's function does.

    That is ``model(batch[0])`` for a list or tuple and ``model(batch)`` for all else, a dict too, which
    :func:`polyak.update_bn` unpacks. The rest is as there, and not as in torch:

    - mean and variance are those of all samples together, over all ranks: the variance is divided by their number,
      the spread between batches counts, and a short last batch counts for what it holds. In torch each batch counts
      the same, and variances within batches are averaged;
    - only BatchNorm layers run in training mode, so dropout is off; those that are in evaluation mode while the model
      trains are left alone;
    - DDP and ``torch.compile`` are seen through;
    - a loader without samples is an error, and after a failure statistics, momenta and modes are those of before.

    Args:
        loader: batches.
        model: updated in place.
        device: where tensors in the batches are moved, also those in a dict; None leaves them where they are.

    Raises:
        BatchError: no sample reached a BatchNorm layer; and what :func:`polyak.update_bn` raises.

    >>> class Model(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.norm = nn.BatchNorm1d(1)
    ...     def forward(self, batch):
    ...         return self.norm(batch["x"])
    >>> model = Model()
    >>> update_bn([{"x": torch.tensor([[0.0], [2.0]]), "y": "labels"}], model)
    >>> model.norm.running_mean
    tensor([1.])
    """
    batchnorm.update_bn(loader, model, device, forward=_call_as_torch)


def _call_as_torch(model: nn.Module, batch: Any) -> object:
    return model(batch[0] if isinstance(batch, (list, tuple)) else batch)


# The running mean of a model in a module that is a copy of it: what stands behind ``AveragedModel``.


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

    def copy_others(self, refused: bool | Tensor) -> None:
        """Copy what is not averaged from the model into the module; nothing where ``refused`` is 1."""
        live = self._live_others
        if isinstance(refused, Tensor):
            live = [
                torch.where(refused.to(own.device, torch.bool), own, value.to(own.device))
                for own, value in zip(self._own_others, live, strict=True)
            ]
        copy_into(self._own_others, live)

    def mark(self) -> None:
        """Take the values in the module as written by its owner."""
        self._written = self._state()

    def changed(self) -> bool:
        """Whether either side has other tensors than before, or somebody else wrote to the averaged ones."""
        return self._written != self._state() or any(side.changed() for side in self._sides)

    def _state(self) -> list[tuple[int, int]]:
        addresses = map(Tensor.data_ptr, self._parameters)
        return list(zip(addresses, _torch.versions(self._parameters), strict=True))


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
    ...     refused = mean.add(pairing.live, count, Uniform())
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
        self._count: int | None = 0  # of the samples in the means; None where only an accelerator knows it
        means = self._accumulator.means
        apart = [(o, m) for o, m in zip(pairing.own, means, strict=True) if o.data_ptr() != m.data_ptr()]
        self._copies, self._kept_apart = [own for own, _ in apart], [mean for _, mean in apart]
        self.wide = {
            name: mean for (name, own), mean in zip(named, means, strict=True) if own.dtype != mean.dtype
        }

    @property
    def counts_there(self) -> bool:
        """Whether the means have samples that an accelerator counts."""
        return self._count is None

    def add(self, live: Sequence[Tensor], count: int | None, scheme: Scheme) -> bool | Tensor:
        """Fold in the model as sample ``count + 1``, None where :attr:`counts_there`: as the next one.

        Returns whether it was refused, as not finite; on an accelerator as a 0-dim tensor, which nobody waits for.
        """
        accumulator = self._accumulator
        accumulator.scheme = scheme
        # Looked at before the restart, which may forget the values that the module began with.
        if count == 0 and not are_finite(live):
            return True
        if count is not None and (count == 0 or count != self._count):
            accumulator.restart(count)
        accumulator.add(live)
        refused = accumulator.refused_there
        self._count = accumulator.n_averaged if refused is None else None
        if self._copies and (refused is not None or self._count != count):
            _torch.foreach_copy_(self._copies, self._kept_apart)
        return self._count == count if refused is None else refused


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
    if found := Difference.of(_shapes(own), _shapes(live)):
        raise StructureError(
            f"the model is not the one that AveragedModel is a copy of: it {found}. Make a new "
            "AveragedModel of the changed model"
        )


def _shapes(tensors: ModelTensors) -> dict[str, str]:
    return {entry.name: shape_of(entry.tensor) for entry in tensors.values()}


# A drop-in for ``torch.optim.swa_utils``: the same names, under which half precision does not stall.


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
        refuse_unseen_conversions()
        self.module = _copied(model)
        if device is not None:
            self.module.to(device)
        self.register_buffer(
            "n_averaged", torch.tensor(0, dtype=torch.long, device=_beside(self.module, device))
        )
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

    @_torch.uncompiled
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
        refused = self._take_sample(pairing)
        if refused is not True:
            pairing.copy_others(refused)
            pairing.mark()
            self._count_sample(refused)

    def __getstate__(self) -> dict[str, Any]:
        # Accumulators work on views, which pickle would tear from their means: they are made anew.
        wide = self._wide_means()
        state = {
            key: value
            for key, value in self.__dict__.items()
            if key not in ("_pairings", "_mean", "_counted")
        }
        return state | {"_wide": {name: _apart(mean) for name, mean in wide.items()}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget_model()

    # How it works inside.

    def _forget_model(self) -> None:
        # Weakly, so that the model's memory is free once its owner lets go of it.
        self._pairings: WeakKeyDictionary[nn.Module, Pairing] = WeakKeyDictionary()
        self._mean: ModuleMean | None = None
        self._counted: tuple[Tensor | None, int, int | None] = (None, 0, 0)

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
        """Those that the module still holds rounded: where somebody wrote to it, what was written counts.

        Whoever asks may save them, so the mean is made anew for the next sample, as it is of what was saved.
        """
        self._mean = None
        own = ModelTensors(self.module).values() if self._wide else ()
        pairs = [(e.name, e.tensor, self._wide[e.name]) for e in own if e.name in self._wide]
        return {name: mean for name, tensor, mean in pairs if _is_rounded(mean, tensor)}

    def _take_sample(self, pairing: Pairing) -> bool | Tensor:
        """Returns whether it was refused; where only an accelerator knows, its tensor that says so."""
        function = self.avg_fn if self.multi_avg_fn is None else self.multi_avg_fn
        law = AvgLaw() if function is None else function
        if not isinstance(law, AvgLaw):
            self._call_functions(pairing)
            return False
        if law.scheme is not None:
            mean = self._mean_of(pairing)
            count = None if mean.counts_there and self._is_own_count() else self._samples()
            return mean.add(pairing.live, count, law.scheme)
        finite = are_finite(pairing.live)
        if finite:
            self._call_functions(pairing)
        return not finite

    def _call_functions(self, pairing: Pairing) -> None:
        self._mean = None  # what it keeps apart from the module is out of date from here on
        own = pairing.own
        live = [tensor.detach().to(o.device) for tensor, o in zip(pairing.live, own, strict=True)]
        if self._samples() == 0:
            copy_into(own, live)
        elif self.multi_avg_fn is not None:
            for device, averaged, current in _by_kind(own, live):
                self.multi_avg_fn(averaged, current, self.n_averaged.to(device))
        elif self.avg_fn is not None:
            for averaged, current in zip(own, live, strict=True):
                averaged.copy_(self.avg_fn(averaged, current, self.n_averaged.to(averaged.device)))

    def _is_own_count(self) -> bool:
        """Whether nobody else wrote to ``n_averaged`` since the last sample."""
        counter, version, _ = self._counted
        return counter is self.n_averaged and version >= 0 and [version] == _torch.versions([self.n_averaged])

    def _samples(self) -> int:
        """``n_averaged``; on an accelerator it is waited for only where it is not known here."""
        count = self._counted[-1] if self._is_own_count() and not _torch.on_host(self.n_averaged) else None
        return int(self.n_averaged) if count is None else count

    def _count_sample(self, refused: bool | Tensor) -> None:
        if isinstance(refused, Tensor):
            count = None
            self.n_averaged.add_(1 - refused.to(self.n_averaged))
        else:
            count = self._samples() + 1
            self.n_averaged += 1
        [version] = _torch.versions([self.n_averaged])
        self._counted = (self.n_averaged, version, count)

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

    def _state_names(self) -> Iterator[tuple[str, str, Tensor]]:
        """The key in ``module.state_dict()``, the canonical name and the tensor, for each key."""
        names = {id(e.tensor): e.name for e in ModelTensors(self.module).values()}
        for named in (self.module.named_parameters, self.module.named_buffers):
            for key, tensor in named(remove_duplicate=False):
                yield key, names[id(tensor)], tensor


def _save_wide(averaged: AveragedModel, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Put means that the module holds rounded into a state dict, in full."""
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


def _beside(module: nn.Module, device: torch.device | str | int | None) -> torch.device | str | int | None:
    """Where samples are counted: where the means are, so that counting waits for no accelerator."""
    first = next(module.parameters(), None)
    return device if device is not None or first is None or first.is_meta else first.device


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
