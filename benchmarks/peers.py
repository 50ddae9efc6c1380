"""Contenders of the update benchmarks: one builder each, all with the same work in every update.

A builder takes the model and returns an `Averager`. Warm-up schedules of the peers are set to end within two
updates. A peer that is not installed raises ImportError when it is built.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal
from unittest import mock

import torch
from torch import nn
from torch.optim import swa_utils

__all__ = ["AS_ON_ACCELERATOR", "CONTENDERS", "DECAY", "LIMIT", "PREBUILT", "Averager", "Contender"]

DECAY = 0.999
_PIECE_NUMEL = 1 << 20
LIMIT = "flat lerp_ (the limit)"
PREBUILT = "foreach, lists built once"


@dataclass(frozen=True)
class Averager:
    """A running average of one model: the call that updates it, and its tensors once it has begun."""

    update: Callable[[], object]
    tensors: Callable[[], list[torch.Tensor]]


@dataclass(frozen=True)
class Contender:
    """A named way to average; ``mixed`` says that it can hold an fp32 average of a bf16 model."""

    name: str
    kind: Literal["limit", "reference", "polyak", "peer"]
    build: Callable[[nn.Module], Averager]
    mixed: bool = True


def _flat(model: nn.Module) -> Averager:
    """The physical limit: the same number of fp32 elements in one tensor, whatever the model's dtype."""
    average, live = _flat_pair(model)
    return Averager(lambda: average.lerp_(live, 1 - DECAY), lambda: [average])


def _flat_checked(model: nn.Module) -> Averager:
    """What looking before adding costs without a model: flat memory, in pieces that the cache holds."""
    average, live = _flat_pair(model)
    pieces = list(zip(average.split(_PIECE_NUMEL), live.split(_PIECE_NUMEL), strict=True))

    def update() -> None:
        for mean, value in pieces:
            low, high = torch.aminmax(value)
            if math.isfinite(low.item()) and math.isfinite(high.item()):
                mean.lerp_(value, 1 - DECAY)

    return Averager(update, lambda: [average])


def _flat_pair(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    live = torch.cat([parameter.detach().float().flatten() for parameter in model.parameters()])
    average = live.clone()
    live += 1
    return average, live


def _prebuilt_lists(model: nn.Module) -> Averager:
    """What a foreach kernel reaches when nothing is looked up between updates."""
    live = [parameter.detach() for parameter in model.parameters()]
    average = [tensor.clone() for tensor in live]
    lerp = torch._foreach_lerp_
    return Averager(lambda: lerp(average, live, 1 - DECAY), lambda: average)


def _polyak(model: nn.Module, scheme: str, check_finite: bool = True, fast: bool = False) -> Averager:
    """``fast`` is with the loops of polyak[fast]; without them even where numba is installed."""
    import polyak
    from polyak import _host_jobs, _host_kernel

    with mock.patch.object(_host_kernel, "_LEAST_NUMEL", 0 if fast else sys.maxsize):
        average = polyak.Average(model, scheme, check_finite=check_finite)
    if fast and not _host_jobs.are_ready(wait=True):
        raise ModuleNotFoundError("No module named 'numba'", name="numba")
    return Averager(average.update, lambda: list(average.named_tensors().values()))


def _polyak_as_on_accelerator(model: nn.Module) -> Averager:
    """By the operations of an accelerator, on the host: what the host has to do for them, and a little arithmetic."""
    from polyak import _torch

    with mock.patch.object(_torch, "on_host", lambda tensor: False):
        return _polyak(model, f"ema:decay={DECAY}")


def _ema_pytorch(model: nn.Module) -> Averager:
    from ema_pytorch import EMA

    average = copy.deepcopy(model).float()
    ema = EMA(
        model,
        ema_model=average,
        beta=DECAY,
        min_value=DECAY,
        update_after_step=0,
        update_every=1,
        use_foreach=True,
        coerce_dtype=_is_half_precision(model),
    )
    return Averager(ema.update, lambda: list(average.parameters()))


def _timm(model: nn.Module) -> Averager:
    ema = timm_model_ema().ModelEmaV3(model, decay=DECAY, dtype=torch.float32, foreach=True)
    return Averager(partial(ema.update, model), lambda: list(ema.module.parameters()))


def timm_model_ema() -> ModuleType:
    """timm's module of averages by its path, since importing timm itself needs torchvision."""
    package = importlib.util.find_spec("timm")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("No module named 'timm'", name="timm")
    path = Path(package.origin).parent / "utils" / "model_ema.py"
    spec = importlib.util.spec_from_file_location("timm_model_ema", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _torch_averaged_model(model: nn.Module, **averaging: Any) -> Averager:
    average = swa_utils.AveragedModel(model, **averaging)
    return Averager(partial(average.update_parameters, model), lambda: list(average.parameters()))


def _torch_ema(model: nn.Module) -> Averager:
    from torch_ema import ExponentialMovingAverage

    ema = ExponentialMovingAverage(model.parameters(), decay=DECAY, use_num_updates=False)
    ema.to(dtype=torch.float32)
    return Averager(ema.update, lambda: ema.shadow_params)


def _diffusers(model: nn.Module, foreach: bool) -> Averager:
    from diffusers.training_utils import EMAModel

    ema = EMAModel(model.parameters(), decay=DECAY, min_decay=DECAY, foreach=foreach)
    ema.to(dtype=torch.float32)
    return Averager(lambda: ema.step(model.parameters()), lambda: ema.shadow_params)


def _torchcontrib(model: nn.Module) -> Averager:
    from torchcontrib.optim import SWA

    swa = SWA(torch.optim.SGD(model.parameters(), lr=0.1))
    return Averager(swa.update_swa, lambda: [swa.state[p]["swa_buffer"] for p in model.parameters()])


def _is_half_precision(model: nn.Module) -> bool:
    return next(model.parameters()).dtype != torch.float32


def _contenders() -> list[Contender]:
    ema = swa_utils.get_ema_multi_avg_fn(DECAY)
    swa = swa_utils.get_swa_multi_avg_fn()
    default = _torch_averaged_model
    ours = f"ema:decay={DECAY}"
    return [
        Contender(LIMIT, "limit", _flat),
        Contender("flat aminmax, then lerp_", "reference", _flat_checked),
        Contender(PREBUILT, "reference", _prebuilt_lists, mixed=False),
        Contender("polyak EMA", "polyak", partial(_polyak, scheme=ours, check_finite=False)),
        Contender("polyak EMA, checked", "polyak", partial(_polyak, scheme=ours)),
        Contender("polyak Uniform, checked", "polyak", partial(_polyak, scheme="uniform")),
        Contender("polyak[fast] EMA", "polyak", partial(_polyak, scheme=ours, check_finite=False, fast=True)),
        Contender("polyak[fast] EMA, checked", "polyak", partial(_polyak, scheme=ours, fast=True)),
        Contender("ema-pytorch foreach", "peer", _ema_pytorch),
        Contender("timm ModelEmaV3", "peer", _timm),
        Contender("torch AveragedModel, EMA", "peer", partial(default, multi_avg_fn=ema), mixed=False),
        Contender("torch AveragedModel, SWA", "peer", partial(default, multi_avg_fn=swa), mixed=False),
        Contender("torch AveragedModel", "peer", default, mixed=False),
        Contender("torch_ema", "peer", _torch_ema),
        Contender("diffusers foreach", "peer", partial(_diffusers, foreach=True)),
        Contender("diffusers", "peer", partial(_diffusers, foreach=False)),
        Contender("torchcontrib SWA", "peer", _torchcontrib, mixed=False),
    ]


CONTENDERS = {contender.name: contender for contender in _contenders()}
# Timed where nothing but overhead is.
AS_ON_ACCELERATOR = Contender(
    "polyak EMA, checked, an accelerator's operations", "polyak", _polyak_as_on_accelerator
)
