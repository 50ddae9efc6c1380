"""Numbers that are followed beside the weights: learning rates and metrics, each as a summary per block."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any

from torch import Tensor

from polyak.errors import OptionError

__all__ = ["Meter", "Summary", "merged"]

# A long block of metrics on an accelerator must not hold on to a million tensors.
_MOST_WAITING = 4096


@dataclass(frozen=True)
class Summary:
    """The finite values of one number over a block: how many, their mean, the least and the greatest.

    >>> summary = Summary.of(1.0) + Summary.of(3.0)
    >>> summary.count, summary.mean, summary.min, summary.max
    (2, 2.0, 1.0, 3.0)
    """

    count: int
    mean: float
    min: float
    max: float

    @classmethod
    def of(cls, value: float) -> Summary:
        """The summary of one value."""
        return cls(1, value, value, value)

    def __add__(self, later: Summary) -> Summary:
        count = self.count + later.count
        return Summary(
            count,
            # Not sums divided in the end: those of huge values would overflow.
            self.mean + (later.mean - self.mean) * (later.count / count),
            min(self.min, later.min),
            max(self.max, later.max),
        )


def merged(earlier: Mapping[str, Summary], later: Mapping[str, Summary]) -> dict[str, Summary]:
    """The summaries of two neighbouring blocks together; a number that only one of them has stays as it is."""
    both = {name: earlier[name] + later[name] for name in earlier if name in later}
    return {**earlier, **later, **both}


class Meter:
    """Collects named numbers. Values on an accelerator are read when somebody asks, not when they are given.

    >>> meter = Meter()
    >>> meter.add({"loss": 2.0}); meter.add({"loss": float("nan")}); meter.add({"loss": 4.0})
    >>> meter.summaries()["loss"].mean
    3.0
    """

    def __init__(self, summaries: Mapping[str, Summary] | None = None):
        self._summaries = dict(summaries or {})
        self._waiting: list[tuple[str, float | Tensor]] = []

    def add(self, values: Mapping[str, Any]) -> None:
        """Take one value of each number.

        Raises:
            OptionError: a value is neither a real number nor a tensor of one element.
        """
        self._waiting += [(name, _scalar(name, value)) for name, value in values.items()]
        if len(self._waiting) >= _MOST_WAITING:
            self.summaries()

    def summaries(self) -> dict[str, Summary]:
        """Name to summary, of the numbers that had a finite value."""
        for name, value in self._waiting:
            number = float(value)
            if math.isfinite(number):
                one = Summary.of(number)
                self._summaries[name] = self._summaries[name] + one if name in self._summaries else one
        self._waiting.clear()
        return dict(self._summaries)

    def to_json(self) -> dict[str, dict[str, float]]:
        """The summaries as plain values."""
        return {name: asdict(summary) for name, summary in self.summaries().items()}


def _scalar(name: str, value: Any) -> float | Tensor:
    if type(value) is float:  # the usual case; the checks below are slow beside a training step
        return value
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        # The caller may go on writing into the tensor, as into a running loss.
        return value.detach().clone()
    if isinstance(value, Real):
        return float(value)
    raise OptionError(f"the metric {name!r} must be a number or a tensor of one element, got {value!r}")
