"""What the makers of checkpoints share: values by which every mixture shows, and what is expected of a run."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

# The live weights of the three checkpoints of a run; their averaged weights are the negatives. No other choice of
# files, weights or steps has the same mean.
VALUES = (1.0, 2.0, 4.0)
NAMES = ("lin.weight", "lin.bias")
HUNDREDS = tuple(zip((100, 200, 300), VALUES, strict=True))
EPOCHS = tuple(zip((1, 2, 3), VALUES, strict=True))


@dataclass(frozen=True)
class Expectation:
    """What is right for a run.

    Attributes:
        kind: which weights are meant; or that the run is refused.
        folder: what to average, in the maker's folder; ``inputs`` instead where that is no folder.
        newest: the value of each tensor of the newest checkpoint.
        constant: names of those of them that are the same in an average: frozen, or counters.
        steps: the steps that may be told, any of these; empty where only the order is known; None where no order is.
        names: how the three checkpoints are called in a summary of the folder.
        left_out: what else lies in the folder; one of these is named when the others are averaged.
        words: of the refusal, any of these; where ``kind`` is not "refused", a refusal with them is right too.
        key: under which the weights lie, where they do.
        update: for adapters, the entries of the mean update; its tensors are then not looked at by name.
    """

    kind: Literal["averaged", "live", "refused"]
    names: tuple[str, ...]
    newest: Mapping[str, float] = field(default_factory=dict)
    constant: tuple[str, ...] = ()
    steps: tuple[tuple[int, ...], ...] | None = ()
    folder: str = "."
    inputs: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    key: str | None = None
    update: float | None = None

    def mean(self) -> dict[str, float]:
        """The value of each tensor of the uniform mean."""
        share = sum(VALUES) / len(VALUES) / VALUES[-1]
        return {name: value * (1 if name in self.constant else share) for name, value in self.newest.items()}


Maker = Callable[[Path], Expectation]
MAKERS: dict[str, Maker] = {}


def dialect(maker: Maker) -> Maker:
    """Make a maker known to the contract suite."""
    MAKERS[maker.__name__] = maker
    return maker


def averaged(*names: str, tensors: tuple[str, ...] = NAMES, **more) -> Expectation:
    """The averaged weights of three checkpoints are right."""
    return Expectation("averaged", names, dict.fromkeys(tensors, -VALUES[-1]), **more)


def live(*names: str, tensors: tuple[str, ...] = NAMES, **more) -> Expectation:
    """The live weights of three checkpoints are right, as there are no others."""
    return Expectation("live", names, dict.fromkeys(tensors, VALUES[-1]), **more)


def refused(*names: str, words: tuple[str, ...], **more) -> Expectation:
    return Expectation("refused", names, words=words, **more)


# Weights.


def weights(value: float, prefix: str = "") -> dict[str, Tensor]:
    """A linear layer of one value throughout."""
    return {f"{prefix}lin.weight": torch.full((2, 2), value), f"{prefix}lin.bias": torch.full((2,), value)}


def fill(model: nn.Module, value: float) -> None:
    """Make all parameters of a model that are trained have one value."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(value)


def adam(value: float) -> dict[str, object]:
    """The state of an optimizer, whose moments look like weights and are none."""
    moments = {"step": torch.tensor(5.0), "exp_avg": torch.full((2, 2), 100 * value)}
    return {"state": {0: moments}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "params": [0]}]}


def put(tree: object, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(tree, path)


def put_text(text: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@contextlib.contextmanager
def foreign_class(module: str, name: str, base: type = object) -> Iterator[type]:
    """A class of a package that is not there: what is pickled of it names it, and cannot be read without it."""
    made = types.ModuleType(module)
    cls = type(name, (base,), {"__module__": module})
    setattr(made, name, cls)
    parts = module.split(".")
    parents = {".".join(parts[:end]): types.ModuleType(parts[end - 1]) for end in range(1, len(parts))}
    sys.modules.update(parents | {module: made})
    try:
        yield cls
    finally:
        for name in [*parents, module]:
            del sys.modules[name]
