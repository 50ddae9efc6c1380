"""Weight averaging for PyTorch: SWA, EMA and every window between them.

Names are loaded on first use, so that ``import polyak`` and ``polyak --help`` do not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from polyak._version import __version__

if TYPE_CHECKING:
    from polyak._attach import attach
    from polyak.average import Average
    from polyak.batchnorm import update_bn
    from polyak.combine import average_checkpoints
    from polyak.errors import PolyakError
    from polyak.posterior import SWAG
    from polyak.profiles import (
        EMA,
        Blend,
        Decay,
        Polynomial,
        Power,
        Profile,
        Scheme,
        Tail,
        Uniform,
        WarmupEMA,
        Weights,
        Window,
        parse,
    )
    from polyak.selection import Selection, fit, select, soup
    from polyak.trajectory import Recorder, Trajectory

# Where each public name lives; `dir(polyak)` and `__all__` follow from it.
_HOMES = {
    "Average": "average",
    "average_checkpoints": "combine",
    "update_bn": "batchnorm",
    "PolyakError": "errors",
    "attach": "_attach",
    "EMA": "profiles",
    "Blend": "profiles",
    "Decay": "profiles",
    "Polynomial": "profiles",
    "Power": "profiles",
    "Profile": "profiles",
    "Scheme": "profiles",
    "Tail": "profiles",
    "Uniform": "profiles",
    "WarmupEMA": "profiles",
    "Weights": "profiles",
    "Window": "profiles",
    "parse": "profiles",
    "SWAG": "posterior",
    "Selection": "selection",
    "fit": "selection",
    "select": "selection",
    "soup": "selection",
    "Recorder": "trajectory",
    "Trajectory": "trajectory",
}
_MODULES = ("errors", "integrations", "landscape", "optim", "report", "schedules")

__all__ = [
    "EMA",
    "SWAG",
    "Average",
    "Blend",
    "Decay",
    "PolyakError",
    "Polynomial",
    "Power",
    "Profile",
    "Recorder",
    "Scheme",
    "Selection",
    "Tail",
    "Trajectory",
    "Uniform",
    "WarmupEMA",
    "Weights",
    "Window",
    "__version__",
    "attach",
    "average_checkpoints",
    "fit",
    "parse",
    "select",
    "soup",
    "update_bn",
]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        value = getattr(import_module(f"polyak.{_HOMES[name]}"), name)
    elif name in _MODULES:
        value = import_module(f"polyak.{name}")
    else:
        raise AttributeError(f"module 'polyak' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES, *(name for name in globals() if name.startswith("__"))})
