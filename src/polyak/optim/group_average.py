"""The running mean of one parameter group of an optimizer, and its exchange with the live weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

from torch import Tensor

from polyak.accumulator import Accumulator
from polyak.errors import StateError, StructureError, name_list
from polyak.profiles import Uniform
from polyak.swap import copy_into

__all__ = ["GroupAverage", "all_params", "saved_buffers"]


class GroupAverage:
    """The uniform mean of a group's parameters, in fp32 at least; integer ones are left out.

    The group's ``n_avg`` and ``n_skipped`` follow its counts. Reading those waits for an accelerator once a
    sample, the price of plain numbers in a dict.

    >>> import torch
    >>> group = {"params": [torch.tensor([1.0])], "n_avg": 0, "n_skipped": 0}
    >>> average = GroupAverage(group)
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

    def __init__(self, group: Mapping[str, Any]):
        self.params = _to_average(group)
        self.live: list[Tensor] = []  # copies of the live weights, while the average is in the model
        self._accumulator = Accumulator(self.params, [f"param {i}" for i in range(len(self.params))], Uniform())
        self._placed = self._placing()
        self._versions: list[int] = []

    def update(self, group: dict[str, Any]) -> None:
        """Take a sample of ``group``; its ``n_avg`` set to 0 begins a new mean.

        Raises:
            StructureError: its parameters are no longer those, or not of the shapes, of the first sample.
        """
        self._follow(group)
        if not group["n_avg"]:
            self._accumulator.restart(n_skipped=group["n_skipped"])
        self._accumulator.add(self.params)
        group["n_avg"], group["n_skipped"] = self._accumulator.n_averaged, self._accumulator.n_skipped

    def swap_in(self) -> None:
        """Put the averages into the parameters."""
        # All copies are there before the first parameter changes, so that an interrupt loses nothing.
        self.live = [parameter.detach().clone() for parameter in self.params]
        copy_into(self.params, self._accumulator.means)
        self._versions = [parameter._version for parameter in self.params]

    def swap_out(self) -> None:
        """Bring the live weights back; without :meth:`swap_in` nothing happens."""
        ...

    def buffers(self) -> dict[Tensor, dict[str, Tensor]]:
        """To each parameter its ``swa_buffer``, and while swapped its ``live_buffer``; no copies."""
        buffers = {p: {"swa_buffer": m} for p, m in zip(self.params, self._accumulator.means, strict=True)}
        for parameter, live in zip(self.params, self.live, strict=False):
            buffers[parameter]["live_buffer"] = live
        return buffers
