"""The averaging functions of ``polyak.optim.swa_utils``.

They are plain data, so they pickle and compare equal, and work in torch's own ``AveragedModel`` as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from polyak.errors import OptionError
from polyak.optim.module_mean import can_be_lerped
from polyak.profiles import EMA, Scheme, Uniform

__all__ = [
    "AvgFn",
    "AvgLaw",
    "MultiAvgFn",
    "get_ema_avg_fn",
    "get_ema_multi_avg_fn",
    "get_swa_avg_fn",
    "get_swa_multi_avg_fn",
]

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
        """None for the decays 0 and 1, which keep one sample and so are no average."""
        if self.decay is None:
            return Uniform()
        return EMA(decay=self.decay, debias=False) if 0 < self.decay < 1 else None

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
            torch._foreach_lerp_(averaged, current, weight)
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
