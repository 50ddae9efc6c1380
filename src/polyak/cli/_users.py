"""What the user names on the command line: functions in modules of their own, and what is done with them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from traceback import print_exception
from typing import TYPE_CHECKING, Any

from polyak.errors import OptionError, PolyakError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from polyak import combine
    from polyak.combine._engine import Progress

__all__ = ["built", "imported", "recalibrated_report", "run_recalibrated"]


def imported(option: str, text: str) -> Callable[..., Any]:
    """The function that ``package.module:function`` names; modules in the working directory are found too.

    Raises ``OptionError`` if there is none. An error inside the module is the user's own, with its traceback. So
    is one inside the function, whose traceback goes to stderr before an ``OptionError`` says what was called.

    >>> imported("--score", "math:fsum")([0.5, 0.25])
    0.75
    """
    module_name, colon, name = text.partition(":")
    if not (module_name and colon and name) or module_name.startswith(".") or module_name.endswith(".py"):
        raise OptionError(
            f"{option} takes package.module:function, such as my.model:build for build in my/model.py, got {text!r}"
        )
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        raise OptionError(f"{option} {text}: there is no module {error.name!r} here or installed") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise OptionError(f"{option} {text}: {module_name} has no function {name!r}")
    return _guarded(f"{option} {text}", function)


def _guarded(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        try:
            with redirect_stdout(sys.stderr):  # what it prints is no part of a result, least of all of JSON
                return function(*arguments)
        except PolyakError:
            raise
        except Exception as error:
            print_exception(error)
            raise OptionError(f"{what} raised {type(error).__name__}: {error}") from error

    return call


def built(text: str, build: Callable[[], Any]) -> nn.Module:
    """The model that the function named ``text`` builds. Raises ``OptionError`` if it is none."""
    from torch import nn

    network = build()
    if not isinstance(network, nn.Module):
        raise OptionError(
            f"--model {text} must return a torch.nn.Module, it returned a {type(network).__name__}"
        )
    return network


# An average whose BatchNorm statistics are those of its own weights.


def recalibrated_report(plan: combine.Plan, differing: Sequence[str] = ()) -> combine.AverageReport:
    """``plan.report`` for an average with new statistics, which is held in memory, as the model is.

    Raises ``OptionError`` where the average is one file for each rank.
    """
    _refuse_ranks(plan)
    report = plan.report(differing, recalibrated=True)
    return replace(report, memory_bytes=report.memory_bytes + 2 * report.bytes_written)


def run_recalibrated(
    plan: combine.Plan, model: str, recalibrate: str, progress: Progress | None = None
) -> combine.AverageReport:
    """``plan.run`` with the statistics that the batches of ``recalibrate`` have in the averaged ``model``.

    Nothing is written if anything fails, the user's code included.

    Raises as ``plan.run`` and :func:`polyak.update_bn`; ``StructureError`` if the average does not fit the model;
    ``OptionError`` if the user's functions return no model, no batches, or a model without such statistics.
    """
    from polyak._evaluate import apply_weights
    from polyak.combine._engine import MemoryWriter

    _refuse_ranks(plan)
    batches = imported("--recalibrate", recalibrate)()
    if not isinstance(batches, Iterable):
        raise OptionError(
            f"--recalibrate {recalibrate} must return batches, such as a DataLoader, it returned a "
            f"{type(batches).__name__}"
        )
    network = built(model, imported("--model", model))
    with plan.create() as writer:
        average = MemoryWriter(plan.layout)
        differing = plan.fill(average, progress)
        apply_weights(network, average.tensors, batches)
        found = {name: tensor for name, tensor in _statistics(network).items() if name in average.tensors}
        if not found:
            raise OptionError(
                f"--model {model} returned a {type(network).__name__} with no BatchNorm statistics that the "
                "checkpoints hold: leave out --model and --recalibrate"
            )
        for name, statistic in found.items():
            average.tensors[name].copy_(statistic)
        writer.fill(average.tensors)
    return recalibrated_report(plan, differing)


def _refuse_ranks(plan: combine.Plan) -> None:
    if plan.ranks is not None:
        raise OptionError(
            f"{plan.output} is in parts, one a rank, which no model in one process takes: "
            "leave out --model and --recalibrate"
        )


def _statistics(network: nn.Module) -> dict[str, Tensor]:
    """What BatchNorm layers know of the data, under every name."""
    from polyak import batchnorm
    from polyak._model import ModelTensors

    wanted = set(map(id, batchnorm.statistics(network)))
    return {
        name: entry.tensor
        for entry in ModelTensors(network).values()
        if id(entry.tensor) in wanted
        for name in (entry.name, *entry.aliases)
    }
