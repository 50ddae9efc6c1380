"""What `update_bn` costs, beside the forward passes alone that any way of doing it must run.

    python benchmarks/batchnorm_cost.py [--rounds 15] [--device cpu] [--output FILE]

The model is a ResNet-18 for 32x32 images, half as wide. The limit runs it over the same batches without
gradients, BatchNorm layers in training mode. All contenders take turns; ratios are taken round by round.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim import swa_utils

import harness
import polyak

THREADS = 1
LEAST_SECONDS = 0.1
N_BATCHES = 12
AT_MOST = 1.1
LIMIT = "forward passes alone (the limit)"
OURS = "polyak update_bn"
DEFAULT_OUTPUT = Path(__file__).parent / "results" / "batchnorm_cost.json"


class Residual(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a shortcut, as in ResNet-18 (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet() -> nn.Module:
    """20 BatchNorm layers, 2.8 million parameters."""
    widths = (32, 64, 128, 256)
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0])]
    inputs = widths[0]
    for stage, width in enumerate(widths):
        layers += [Residual(inputs, width, stride=1 if stage == 0 else 2), Residual(width, width, stride=1)]
        inputs = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


def contenders(batch_size: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """Each does all batches once, and waits for the device."""
    torch.manual_seed(0)
    batches = [torch.randn(batch_size, 3, 32, 32, device=device) for _ in range(N_BATCHES)]
    model = resnet().to(device)

    @torch.no_grad()
    def forward_alone() -> None:
        for batch in batches:
            model(batch)

    calls = {
        LIMIT: forward_alone,
        OURS: lambda: polyak.update_bn(batches, model),
        "polyak update_bn, 2 passes": lambda: polyak.update_bn(batches, model, passes=2),
        "torch update_bn (keeps graphs)": lambda: swa_utils.update_bn(batches, model),
    }
    return {name: lambda call=call: _finished(call, device) for name, call in calls.items()}


def _finished(call: Callable[[], object], device: torch.device) -> None:
    call()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=15, help="measurements a contender (default 15)")
    parser.add_argument("--device", type=torch.device, default="cpu", help="where the model runs")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="file for the figures, as JSON")
    options = parser.parse_args(arguments)
    torch.set_num_threads(THREADS)
    environment = harness.environment(("polyak",))  # before the work, whose own load it would show

    cases = {}
    for batch_size in (8, 32):
        name = f"batches of {batch_size}"
        calls = contenders(batch_size, options.device)
        seconds = harness.time_rounds(calls, options.rounds, LEAST_SECONDS, description=name)
        cases[name] = _record(seconds)
        Console().print(_table(name, cases[name]))
    harness.write_json(
        options.output,
        {
            "benchmark": "batchnorm_cost",
            "environment": environment,
            "settings": {
                "device": str(options.device),
                "rounds": options.rounds,
                "batches": N_BATCHES,
                "model": resnet.__doc__,
                "promise": f"{OURS}: at most {AT_MOST} of the limit",
            },
            "cases": cases,
        },
    )


def _record(seconds: dict[str, list[float]]) -> dict[str, Any]:
    return {
        name: {
            "seconds_by_round": values,
            "seconds": asdict(harness.Spread.of(values)),
            "over_limit": asdict(harness.ratios(values, seconds[LIMIT])),
        }
        for name, values in seconds.items()
    }


def _table(title: str, case: dict[str, Any]) -> Table:
    table = Table("contender", "ms", "over limit (quartiles)", title=title)
    for name, record in case.items():
        ratio = harness.Spread(**record["over_limit"])
        table.add_row(
            name,
            f"{1000 * record['seconds']['median']:.1f}",
            f"{ratio.median:.3f} ({ratio.lower_quartile:.3f} to {ratio.upper_quartile:.3f})",
        )
    return table


if __name__ == "__main__":
    main()
