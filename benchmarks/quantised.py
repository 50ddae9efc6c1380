"""Whether averages survive quantisation better, and whether to choose them quantised, on small networks for digits.

    python benchmarks/quantised.py [--seeds 20] [--output benchmarks/results/quantised.json]

The runs and the rounding are those of examples/quantised_choice.py. Each seed trains once at a constant rate and once
with a rate that decays; that rate and how long it decays are tuned on seeds of their own, by the validation loss of
the unquantised weights. Test losses at 8, 4 and 3 bits are compared, and by how much each rises over that of the same
weights unquantised, paired over seeds. About 2 minutes on two idle cores.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import harness
import polyak
from polyak.demo._study import paired_difference

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
example = import_module("quantised_choice")

LIVE, DECAYED = "live weights", "decayed run"
AVERAGE, CHOSEN = "average chosen unquantised", "average chosen quantised"
FULL = "32"

# What the decayed run is tuned over, on seeds that are not reported on.
DECAYS, RATES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8), (0.03, 0.1, 0.15, 0.3)
TUNING_SEEDS = range(1000, 1005)

# Test losses by bits, then by what is shipped.
Losses = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Decay:
    """A rate, and the share of the run over which it falls to zero at the end."""

    rate: float
    share: float


def tuned() -> tuple[Decay, dict[str, float]]:
    """The decay of the lowest mean validation loss over the tuning seeds, and the losses of all."""
    grid = [Decay(rate, share) for rate in RATES for share in DECAYS]
    losses = harness.on_two_processes(validation_losses, [(seed, grid) for seed in TUNING_SEEDS])
    means = [sum(one) / len(one) for one in zip(*losses, strict=True)]
    named = {f"{decay.rate:g}, {decay.share:g}": mean for decay, mean in zip(grid, means, strict=True)}
    return grid[means.index(min(means))], named


def validation_losses(job: tuple[int, list[Decay]]) -> list[float]:
    """Of the weights that a seed ends with under each decay."""
    seed, grid = job
    torch.set_num_threads(1)
    training, validation, _ = example.digits(seed)
    found = []
    for decay in grid:
        with tempfile.TemporaryDirectory() as folder:
            model, _ = example.train(training, seed, folder, decay.share, decay.rate)
        found.append(shipped_loss(model, None, validation))
    return found


def run(seed: int, decay: Decay) -> Losses:
    """Train, choose with and without quantisation, and score on test what would be shipped."""
    torch.set_num_threads(1)
    training, validation, test = example.digits(seed)
    with tempfile.TemporaryDirectory() as folder:
        decayed, _ = example.train(training, seed, f"{folder}/decayed", decay.share, decay.rate)
        model, trajectory = example.train(training, seed, f"{folder}/constant")

        def chosen(prepare: Callable[[nn.Module], None] | None) -> nn.Module:
            choice = polyak.select(
                trajectory, model, score=example.losses(validation), prepare=prepare, progress=False
            )
            best = deepcopy(model)
            choice.apply(best)
            return best

        shipped = {LIVE: model, DECAYED: decayed, AVERAGE: chosen(None)}
        found: Losses = {FULL: {name: shipped_loss(weights, None, test) for name, weights in shipped.items()}}
        for bits in example.BITS:
            prepare = example.quantised(bits)
            found[str(bits)] = {
                name: shipped_loss(weights, prepare, test)
                for name, weights in (shipped | {CHOSEN: chosen(prepare)}).items()
            }
    return found


@torch.no_grad()
def shipped_loss(
    model: nn.Module, prepare: Callable[[nn.Module], None] | None, test: tuple[Tensor, Tensor]
) -> float:
    """The mean test loss of a copy of the model, quantised."""
    copy = deepcopy(model).eval()
    if prepare is not None:
        prepare(copy)
    return example.losses(test)(copy).mean().item()


def summary(seeds: list[Losses]) -> dict[str, Any]:
    """Losses by bits and weights, rises over the unquantised, and paired differences of both."""

    def at(bits: str, name: str) -> list[float]:
        return [seed[bits][name] for seed in seeds]

    def rises(bits: str, name: str) -> list[float]:
        return [one - full for one, full in zip(at(bits, name), at(FULL, name), strict=True)]

    found: dict[str, Any] = {}
    for bits, names in seeds[0].items():
        entry: dict[str, Any] = {"loss": {name: at(bits, name) for name in names}}
        entry["average_minus_live"] = asdict(paired_difference(at(bits, AVERAGE), at(bits, LIVE)))
        entry["average_minus_decayed"] = asdict(paired_difference(at(bits, AVERAGE), at(bits, DECAYED)))
        if bits != FULL:
            entry["rise"] = {name: rises(bits, name) for name in (LIVE, DECAYED, AVERAGE)}
            entry["rise_minus_live"] = asdict(paired_difference(rises(bits, AVERAGE), rises(bits, LIVE)))
            entry["rise_minus_decayed"] = asdict(
                paired_difference(rises(bits, AVERAGE), rises(bits, DECAYED))
            )
            entry["quantised_minus_unquantised_choice"] = asdict(
                paired_difference(at(bits, CHOSEN), at(bits, AVERAGE))
            )
        found[bits] = entry
    return found


def main(arguments: list[str] | None = None) -> None:
    options = harness.study_parser(__doc__, seeds=20).parse_args(arguments)
    environment = harness.environment(("polyak", "scipy", "scikit-learn"))
    decay, tried = tuned()
    found = summary(harness.on_two_processes(partial(run, decay=decay), range(options.seeds)))
    for bits, entry in found.items():
        means = {name: sum(values) / len(values) for name, values in entry["loss"].items()}
        print(f"{bits} bits: " + ", ".join(f"{name} {mean:.4f}" for name, mean in means.items()))
    if options.output is not None:
        settings = {
            "seeds": options.seeds,
            "steps": example.STEPS,
            "rate": example.RATE,
            "decay": asdict(decay),
            "tuning_seeds": list(TUNING_SEEDS),
            "tried": tried,
        }
        record = {"benchmark": "quantised", "environment": environment, "settings": settings, "bits": found}
        harness.write_json(options.output, record)


if __name__ == "__main__":
    main()
