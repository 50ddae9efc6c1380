"""Averaged weights in a live model: for the length of a trial, for good, or on disk."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from typing import Any

from torch import Tensor, nn

from polyak import checkpoints
from polyak.batchnorm import tracks_statistics, update_bn
from polyak.errors import OptionError, StructureError, name_list
from polyak.swap import Swap, copy_into
from polyak.tensors import ModelTensors, NamedTensor, local
from polyak.trajectory import Trajectory

__all__ = [
    "apply_weights",
    "averaged",
    "check_statistics",
    "evaluation",
    "live_weights",
    "matched",
    "refuse_one_pass",
    "write_weights",
]


def live_weights(trajectory: Trajectory) -> dict[str, Tensor]:
    """The weights that the run ended with; empty, which stands for those in the model, where none were kept."""
    return trajectory.live() if trajectory.has_live else {}


@contextmanager
def averaged(
    model: nn.Module, weights: Mapping[str, Tensor], recalibrate: Iterable[Any] | None = None
) -> Iterator[None]:
    """``weights`` in the model, with BatchNorm statistics to match; everything is as before on leaving.

    Args:
        weights: by name; what the model has besides (frozen parameters, buffers) stays. Empty: the live ones.
        recalibrate: batches for :func:`polyak.update_bn`.

    Raises:
        StructureError: a name or shape does not fit the model, or a trainable parameter is missing.
        SwapError: averaged weights are in the model already.
    """
    pairs = matched(model, weights)
    entries = list(ModelTensors(model).values())
    places = [(entry.place, entry.key, entry.tensor) for entry in entries]
    targets = [entry.tensor for entry, _ in pairs]
    # Also what is not exchanged comes back, should a trial change it; frozen parameters are left to its care.
    swapped = set(map(id, targets))
    keep = [
        e.tensor
        for e in entries
        if (e.kind == "buffer" or e.tensor.requires_grad) and id(e.tensor) not in swapped
    ]
    swap = Swap(targets, keep=local(keep), free=_buffers(model), places=places)
    try:
        swap.put_in([value for _, value in pairs])
        if recalibrate is not None:
            update_bn(recalibrate, model)
        yield
    finally:
        if swap.active:
            swap.undo()


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; every module's mode is as before on leaving."""
    modes = {module: module.training for module in model.modules()}
    try:
        # The flags, not `eval()`: some modules merge weights there, which restoring a flag would not undo.
        for module in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def apply_weights(
    model: nn.Module, weights: Mapping[str, Tensor], recalibrate: Iterable[Any] | None = None
) -> None:
    """Copy ``weights`` into the model for good, all or nothing; raises as :func:`averaged` does."""
    with averaged(model, weights, recalibrate):
        buffers = [buffer.clone() for buffer in _buffers(model)]
    pairs = matched(model, weights)
    copy_into([entry.tensor for entry, _ in pairs], [value for _, value in pairs])
    copy_into(_buffers(model), buffers)


def write_weights(
    path: str | PathLike[str],
    model: nn.Module,
    weights: Mapping[str, Tensor],
    *,
    recalibrate: Iterable[Any] | None = None,
    metadata: Mapping[str, str],
    overwrite: bool = False,
) -> None:
    """Write the whole model with ``weights`` in it; averaged parameters keep the average's dtype.

    Raises as :func:`averaged` and :func:`polyak.checkpoints.write` do.
    """
    canonical = ModelTensors(model).all_names()
    ours = {canonical.get(name, name): value for name, value in weights.items()}
    with averaged(model, weights, recalibrate):
        tensors: dict[str, Tensor] = {}
        for entry in ModelTensors(model).values():
            if entry.persistent:
                averaged_here = entry.kind == "parameter" and entry.name in ours
                value = ours[entry.name] if averaged_here else entry.tensor.detach()
                tensors |= dict.fromkeys((entry.name, *entry.aliases), value)
        checkpoints.write(path, tensors, metadata=metadata, overwrite=overwrite)


def refuse_one_pass(recalibrate: Iterable[Any] | None) -> None:
    """Refuse (``OptionError``) batches that are gone after the first candidate, and what are no batches."""
    if callable(recalibrate) and not isinstance(recalibrate, Iterable):
        raise OptionError("recalibrate is a function: call it, and give the batches that it returns")
    if isinstance(recalibrate, Iterator):
        raise OptionError(
            f"recalibrate is a {type(recalibrate).__name__}, which can be gone through only once, and every "
            "evaluation needs a pass of its own: give a list or a DataLoader"
        )


def check_statistics(model: nn.Module, recalibrate: Iterable[Any] | None) -> None:
    """Warn where BatchNorm statistics would be of other weights, and refuse batches as ``refuse_one_pass``."""
    refuse_one_pass(recalibrate)
    if recalibrate is None and tracks_statistics(model):
        warnings.warn(
            "the model has BatchNorm layers, whose statistics do not fit the weights that are tried: the results are "
            "not those the weights can have. Give recalibrate the batches to recompute them from",
            UserWarning,
            stacklevel=3,
        )


def _buffers(model: nn.Module) -> list[Tensor]:
    return [entry.tensor for entry in ModelTensors(model).values() if entry.kind == "buffer"]


def matched(model: nn.Module, weights: Mapping[str, Tensor]) -> list[tuple[NamedTensor, Tensor]]:
    """Each tensor of the model that ``weights`` holds, once, with its new value."""
    if not weights:
        return []
    tensors = ModelTensors(model)
    canonical = tensors.all_names()
    _refuse_mismatch(tensors, canonical, weights)
    values = {canonical[name]: value for name, value in weights.items()}
    return [(entry, values[entry.name]) for entry in tensors.values() if entry.name in values]


def _refuse_mismatch(
    tensors: ModelTensors, canonical: Mapping[str, str], weights: Mapping[str, Tensor]
) -> None:
    unknown = [name for name in weights if name not in canonical]
    here = {canonical[name] for name in weights if name in canonical}
    missing = [
        entry.name for entry in tensors.values() if entry.tensor.requires_grad and entry.name not in here
    ]
    reshaped = [
        n for n in weights if n in canonical and weights[n].shape != tensors[canonical[n]].tensor.shape
    ]
    complaints = [
        f"{what} {name_list(names)}"
        for what, names in (
            ("the model has no", unknown),
            ("there is no average of", missing),
            ("shapes differ for", reshaped),
        )
        if names
    ]
    if complaints:
        raise StructureError(
            f"the averaged weights do not fit this model: {'; '.join(complaints)}. Give the model that was "
            "trained; it was left as it is"
        )
