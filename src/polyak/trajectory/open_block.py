"""The block that is being filled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from polyak.accumulator import Accumulator
from polyak.binding import Binding
from polyak.errors import OptionError, name_list
from polyak.profiles import Uniform
from polyak.swap import copy_into
from polyak.tensors import local, sharded_like
from polyak.trajectory.manifest import Block
from polyak.trajectory.summaries import Meter, Summary

__all__ = ["OpenBlock"]


class OpenBlock:
    """Samples, learning rates and metrics since ``start``.

    Two accumulators take turns: the means of the block before stay as they are while this one fills.

    Attributes:
        start: the optimizer step after which the block begins.
        last_sample: the step of the last sample, accepted or not.
    """

    def __init__(self, binding: Binding, dtype: torch.dtype | None, device: torch.device | str | None):
        self._binding = binding
        agree = binding.agree if binding.sharded else None
        self._filling, self._resting = (
            Accumulator(binding.live, binding.names, Uniform(), dtype=dtype, device=device, agree=agree)
            for _ in range(2)
        )
        self.begin(0)

    def refuse_unstorable(self) -> None:
        """Raise OptionError for means that the blocks' format cannot hold."""
        wide = [
            n
            for n, m in zip(self._binding.names, self._filling.means, strict=True)
            if m.dtype == torch.complex128
        ]
        if wide:
            raise OptionError(
                f"{name_list(wide)} would be complex128, which blocks cannot hold: pass dtype=torch.float32"
            )

    def begin(self, start: int) -> None:
        """Empty it, for a block after ``start``."""
        self.start = self.last_sample = start
        self._filling.restart()
        self._metrics, self._lr = Meter(), Meter()

    def rebind(self) -> None:
        """Take up tensors that the model has in the place of those before."""
        for accumulator in (self._filling, self._resting):
            accumulator.bind(self._binding.live)

    def note(self, metrics: Mapping[str, Any], lr: float | Tensor | None) -> None:
        """Take the numbers of one optimizer step."""
        if metrics:
            self._metrics.add(metrics)
        if lr is not None:
            self._lr.add({"lr": lr})

    def sample(self, step: int) -> None:
        """Take the weights as they are after ``step``."""
        self._filling.add(self._binding.live)
        self.last_sample = step

    @property
    def count(self) -> int:
        """Accepted samples; on an accelerator reading it waits for the device."""
        return self._filling.n_averaged

    def take(self) -> tuple[Block, list[Tensor]]:
        """What was filled, up to the last sample, and its means; the next block begins there."""
        block = Block(
            self.start,
            self.last_sample,
            self._filling.n_averaged,
            self._filling.n_skipped,
            self._lr.summaries().get("lr"),
            self._metrics.summaries(),
        )
        means = self._filling.means
        self._filling, self._resting = self._resting, self._filling
        self.begin(block.stop)
        return block, means

    def state_dict(self) -> dict[str, Any]:
        """Plain values, and the means by name, which are not copied."""
        self._filling.look_anew()
        return {
            "start": self.start,
            "last_sample": self.last_sample,
            "n_averaged": self._filling.n_averaged,
            "n_skipped": self._filling.n_skipped,
            "summaries": json.dumps({"lr": self._lr.to_json(), "metrics": self._metrics.to_json()}),
            "open_block": self._named_means(),
        }

    def _named_means(self) -> dict[str, Tensor]:
        binding, means = self._binding, self._filling.means
        return {n: sharded_like(m, w) for n, m, w in zip(binding.names, means, binding.whole, strict=True)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state that fits."""
        copy_into(self._filling.means, local(state["open_block"][name] for name in self._binding.names))
        self._filling.restart(state["n_averaged"], state["n_skipped"])
        self.start, self.last_sample = state["start"], state["last_sample"]
        summaries = json.loads(state["summaries"])
        self._lr, self._metrics = (_meter(summaries[kind]) for kind in ("lr", "metrics"))


def _meter(entries: Mapping[str, dict[str, Any]]) -> Meter:
    return Meter({name: Summary(**numbers) for name, numbers in entries.items()})
