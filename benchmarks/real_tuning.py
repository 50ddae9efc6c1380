"""What `real_tasks` tunes on seeds of their own: the grid of settings, and the best of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from real_runs import CONSTANT, COSINE, SWA_START

__all__ = ["FAMILIES", "Setting", "Tuning"]


@dataclass(frozen=True)
class Setting:
    """A schedule, and which weights of such a run: "live", "selected", "ema:0.05" or "swa:0.75".

    The half-life of an EMA, and where SWA begins to sample, are shares of the run's steps.
    """

    schedule: str
    weights: str

    def __str__(self) -> str:
        if self.weights == "live":
            return self.schedule
        return self.weights if self.schedule == CONSTANT else f"{self.schedule} and {self.weights}"


DECAYS = [
    Setting(schedule, "live")
    for schedule in (CONSTANT, *(f"linear:{share}" for share in (0.05, 0.1, 0.2, 0.4, 0.7)), COSINE)
]
SWAS = [
    *(Setting(CONSTANT, f"swa:{start}") for start in (0.25, 0.5, 0.75, 0.9, 0.95)),
    *(Setting(f"swa:{factor}", f"swa:{SWA_START}") for factor in (0.5, 0.2, 0.05)),
]
EMAS = [Setting(CONSTANT, f"ema:{share}") for share in (0.015, 0.02, 0.05, 0.1, 0.2, 0.4)]
FAMILIES = {"decay": DECAYS, "SWA": SWAS, "EMA": EMAS, "selected": [Setting(CONSTANT, "selected")]}
# What a wider grid would go beyond. There is no decay shorter than none or longer than a cosine over the whole run.
EDGES = {SWAS[0], SWAS[4], SWAS[-1], EMAS[0], EMAS[-1]}


class Tuning:
    """Mean validation losses over the tuning seeds, of every setting at every rate and number of steps."""

    def __init__(self, tried: Iterable[Mapping[str, Any]]):
        losses: dict[tuple[float, int, Setting], list[float]] = defaultdict(list)
        for one in tried:
            losses[one["rate"], one["steps"], Setting(one["schedule"], one["weights"])].append(
                one["validation"]
            )
        self.losses = {place: float(np.mean(found)) for place, found in losses.items()}
        self.rates = sorted({rate for rate, _, _ in losses})

    def best(self, family: str, steps: int, rate: float | None = None) -> tuple[float, Setting]:
        """The rate and the setting of the lowest loss, at ``rate`` or over all."""
        places = product(self.rates if rate is None else [rate], FAMILIES[family])
        return min(places, key=lambda place: self.losses[place[0], steps, place[1]])

    def on_edge(self, rate: float, setting: Setting) -> bool:
        """Whether a wider grid would go beyond these, in the rate or in the setting."""
        return setting in EDGES or rate in (self.rates[0], self.rates[-1])
