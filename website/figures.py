"""The figures of the results page, from benchmarks/results: `python website/figures.py FOLDER [NAME …]` writes them.

Those that the README shows lie in docs/figures as well.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from polyak._plots import Dot, Line, Panel, Role, dot_chart, line_panels, svg_bytes

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


ROLES: dict[str, Role] = {"live weights": "live", "chosen by select": "chosen"}
# Averages with statistics of other weights would set the scale; the table has them.
BROKEN = "no update_bn"


def demo(data: dict[str, Any]) -> Any:
    dots = [
        Dot(
            label,
            *(entry["test_nll"]["minus_tuned_decay"][key] for key in ("mean", "low", "high")),
            _role(label),
        )
        for label, entry in data["summary"].items()
        if BROKEN not in label
    ]
    return dot_chart(
        "Against the best tuned decay: left is better", "test NLL minus that of the tuned decay", dots
    )


def _role(label: str) -> Role:
    return ROLES.get(label, "other")


def no_harm(data: dict[str, Any]) -> Any:
    dots = [
        Dot(label, *(entry["best_minus_live"][key] for key in ("mean", "low", "high")))
        for label, entry in data["cells"].items()
    ]
    return dot_chart("What select chose", "test NLL minus that of the live weights", dots)


def preview(data: dict[str, Any]) -> Any:
    shares = list(data["shares"].values())
    names = {"live": "live weights", "ema": "EMA", "preview": "decay:sqrt:0.4", "decayed": "really decayed"}
    by_seed = {key: list(zip(*(share[key] for share in shares), strict=True)) for key in names}
    steps = [share["steps"] for share in shares]
    lines = [Line(name, steps, by_seed[key], _role(name)) for key, name in names.items()]
    return line_panels("If the rate were decayed now", "optimizer steps", [Panel("test NLL", lines)])


def valley(data: dict[str, Any]) -> Any:
    panels = [
        Panel(f"{name}, loss", [_means("test", data, task), _means("train", data, task)])
        for name, task in data["tasks"].items()
    ]
    return line_panels("From the live weights (0) to the chosen average (1)", "position", panels)


def _means(on: str, data: dict[str, Any], task: dict[str, Any]) -> Line:
    return Line(on, data["positions"], [[mean for mean, _ in task[on]["path"]]])


def update_cost(data: dict[str, Any]) -> Any:
    contenders = data["cases"]["resnet50"]["contenders"]
    return _ratios(
        "One update of a ResNet-50's average",
        "time over that of one flat lerp_",
        contenders,
        "time_over_limit",
    )


def offline(data: dict[str, Any]) -> Any:
    return _ratios("Averaging 8 files", "time over reading all and writing one", data["cases"])


def batchnorm_cost(data: dict[str, Any]) -> Any:
    return _ratios("update_bn, batches of 32", "time over the forward passes", data["cases"]["batches of 32"])


def _ratios(title: str, x_label: str, contenders: dict[str, Any], ratio: str = "over_limit") -> Any:
    dots = [
        Dot(name, *(entry[ratio][key] for key in ("median", "lower_quartile", "upper_quartile")))
        for name, entry in contenders.items()
    ]
    return dot_chart(title, x_label, dots)


# Name of the picture to the file that it is drawn from, and how.
FIGURES: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "demo_digits": ("demo_digits", demo),
    "demo_text": ("demo_text", demo),
    "no_harm": ("no_harm", no_harm),
    "preview": ("preview", preview),
    "valley": ("valley", valley),
    "update_cost": ("update_cost", update_cost),
    "offline": ("offline", offline),
    "batchnorm_cost": ("batchnorm_cost", batchnorm_cost),
}
# Heading of docs/results.md to the picture that belongs under it.
PLACES = {
    "Does it help? Digits, BatchNorm": "demo_digits",
    "Does it help? Text": "demo_text",
    "Does choosing ever do harm?": "no_harm",
    "What would it score if I decayed now?": "preview",
    "Does the average lie wider?": "valley",
    "What an update costs": "update_cost",
    "What averaging checkpoint files costs": "offline",
    "What update_bn costs": "batchnorm_cost",
}


def pictures() -> Iterator[tuple[str, bytes]]:
    """Each figure's name, and the figure as an SVG file."""
    for name, (file, draw) in FIGURES.items():
        yield name, svg_bytes(draw(json.loads((RESULTS / f"{file}.json").read_text())))


if __name__ == "__main__":
    wanted = sys.argv[2:] or list(FIGURES)
    for name, picture in pictures():
        if name in wanted:
            Path(sys.argv[1], f"{name}.svg").write_bytes(picture)
