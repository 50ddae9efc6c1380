"""The running mean of one parameter group of an optimizer, and its exchange with the live weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from polyak.accumulator import Accumulator
from polyak.errors import StateError, StructureError, name_list
from polyak.profiles import Uniform
from polyak.swap import copy_into, refuse_swapped
from polyak.tensors import is_sharded

__all__ = ["GroupAverage", "all_params", "averageable", "refuse_sharded", "saved_buffers"]

Buffers = dict[str, Tensor]


class GroupAverage:
    """The uniform mean of parameters, in fp32 at least.

    The counts are those of the group, ``n_avg`` and ``n_skipped``. Keeping them there as plain numbers waits
    for an accelerator once a sample.

    >>> group = {"params": [torch.tensor([1.0])], "n_avg": 0, "n_skipped": 0}
    >>> average = GroupAverage(averageable(group))
    >>> for value in (1.0, float("inf"), 3.0):
    ...     _ = group["params"][0].fill_(value)
    ...     average.update(group)
    >>> average.swap_in()
    >>> group
    {'params': [tensor([2.])], 'n_avg': 2, 'n_skipped': 1}
    >>> average.swap_out()
    >>> group["params"]
    [tensor([3.])]
    """

    def __init__(self, params: list[Tensor]):
        self.params = params
        self.live: list[Tensor] = []  # copies of the live weights, while the averages are in their place
        self._versions: list[int] = []
        self._kinds = _kinds(params)
        self._accumulator = Accumulator(params, list(map(str, range(len(params)))), Uniform())

    def update(self, group: dict[str, Any]) -> None:
        """Take a sample of ``group``; if its ``n_avg`` was set to 0, of a new mean.

        Raises:
            StructureError: its parameters or their shapes are not those of the first sample.
        """
        self._follow(averageable(group))
        refuse_swapped(self.params)
        if not group["n_avg"]:
            self._accumulator.restart(n_skipped=group["n_skipped"])
        self._accumulator.add(self.params)
        group["n_avg"], group["n_skipped"] = self._accumulator.n_averaged, self._accumulator.n_skipped

    def swap_in(self) -> None:
        """Put the averages into the parameters; raises :class:`SwapError` inside another average's swap."""
        refuse_swapped(self.params)
        # All copies are made before the first parameter changes: an interrupt loses nothing.
        self.live = [parameter.detach().clone() for parameter in self.params]
        copy_into(self.params, self._accumulator.means)
        self._versions = _versions(self.params)

    def swap_out(self) -> None:
        """Bring the live weights back; raises :class:`SwapError` inside another average's swap."""
        refuse_swapped(self.params)
        # No versions: it was swapped in before it was saved, and the model loaded since.
        changed = self._versions and self._versions != _versions(self.params)
        copy_into(self.params, self.live)
        self.live, self._versions = [], []
        if changed:
            warnings.warn(
                "the weights were changed while the averaged ones were in the model; those changes are gone, as "
                "the live weights are back",
                UserWarning,
                stacklevel=3,
            )

    def buffers(self) -> dict[Tensor, Buffers]:
        """To each parameter its ``swa_buffer``, and while swapped its ``live_buffer``; no copies."""
        self._accumulator.look_anew()  # they may be about to be saved
        kept = {"swa_buffer": self._accumulator.means} | ({"live_buffer": self.live} if self.live else {})
        return {p: {key: kept[key][i] for key in kept} for i, p in enumerate(self.params)}

    @classmethod
    def loaded(
        cls, params: list[Tensor], saved: Mapping[Tensor, Buffers], counts: Mapping[str, int]
    ) -> GroupAverage:
        """An average with the saved buffers and the counts ``n_avg`` and ``n_skipped``."""
        average = cls(params)
        copy_into(average._accumulator.means, [saved[p]["swa_buffer"] for p in params])
        average._accumulator.restart(counts["n_avg"], counts["n_skipped"])
        average.live = [saved[p]["live_buffer"] for p in params if "live_buffer" in saved[p]]
        return average

    def __reduce__(self) -> tuple[Any, ...]:
        # Piece by piece: the accumulator works on views, which pickle would tear from their means.
        counts = {"n_avg": self._accumulator.n_averaged, "n_skipped": self._accumulator.n_skipped}
        return GroupAverage.loaded, (self.params, self.buffers(), counts)

    def _follow(self, params: list[Tensor]) -> None:
        if list(map(id, params)) != list(map(id, self.params)):
            raise StructureError(
                "the group's parameters are not those of its first sample; add new ones as a new group"
            )
        kinds = _kinds(params)
        if kinds == self._kinds:
            return
        if [shape for shape, *_ in kinds] != [shape for shape, *_ in self._kinds]:
            raise StructureError(
                "a parameter of the group has another shape than at its first sample; make a new optimizer"
            )
        self._accumulator.bind(params)
        self._kinds = kinds


def averageable(group: Mapping[str, Any]) -> list[Tensor]:
    """The parameters of a group that have a mean; integer ones, as of quantised models, have none."""
    return [p for p in group["params"] if p.is_floating_point() or p.is_complex()]


def all_params(groups: Iterable[Mapping[str, Any]]) -> list[Any]:
    """The parameters of all groups in one list, or their indices where the groups are saved ones."""
    return list(chain.from_iterable(group["params"] for group in groups))


def refuse_sharded(groups: Iterable[Mapping[str, Any]]) -> None:
    """Whole parameters are averaged here, and the ranks would not agree on which samples are finite."""
    if any(is_sharded(parameter) for parameter in all_params(groups)):
        raise StructureError(
            "the parameters are sharded, which SWA cannot average; polyak.Average with polyak.Uniform() can"
        )


def saved_buffers(state: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[Tensor, Buffers]:
    """The buffers in a saved state of SWA, by the parameters of ``groups`` that they belong to.

    Raises:
        StateError: the state is of another kind, or of other groups or shapes, or lacks averages.
    """
    if lacking := [key for key in ("opt_state", "swa_state", "param_groups") if key not in state]:
        raise StateError(f"this is not a state of SWA: it lacks {name_list(lacking)}; nothing was loaded")
    saved_sizes = [len(group["params"]) for group in state["param_groups"]]
    sizes = [len(group["params"]) for group in groups]
    if saved_sizes != sizes:
        raise StateError(
            f"the state has groups of {saved_sizes} parameters, this optimizer of {sizes}; nothing was loaded"
        )
    buffers = {
        parameter: state["swa_state"].get(index, {})
        for index, parameter in zip(all_params(state["param_groups"]), all_params(groups), strict=True)
    }
    for number, (saved, group) in enumerate(zip(state["param_groups"], groups, strict=True)):
        if saved.get("n_avg"):
            _refuse_unfit(number, averageable(group), buffers)
    return buffers


def _refuse_unfit(number: int, params: list[Tensor], buffers: Mapping[Tensor, Buffers]) -> None:
    for index, parameter in enumerate(params):
        if "swa_buffer" not in buffers[parameter]:
            raise StateError(
                f"the state has no average of parameter {index} in group {number}, though it counts samples of "
                "it (torchcontrib loses them when it saves); nothing was loaded"
            )
        saved = {key: tuple(buffer.shape) for key, buffer in buffers[parameter].items()}
        if set(saved.values()) != {tuple(parameter.shape)}:
            raise StateError(
                f"parameter {index} of group {number} has shape {tuple(parameter.shape)}, and the state's "
                f"buffers have {saved}; nothing was loaded"
            )


def _kinds(params: list[Tensor]) -> list[tuple[torch.Size, torch.dtype, torch.device, bool]]:
    return [(p.shape, p.dtype, p.device, p.is_contiguous()) for p in params]


def _versions(params: list[Tensor]) -> list[int]:
    return [p._version for p in params]
