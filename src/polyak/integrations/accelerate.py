"""Averages and recordings in the states that accelerate saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from polyak._checks import require
from polyak.average import Average
from polyak.errors import OptionError, StateError
from polyak.integrations._recorded import save_state, saved_state
from polyak.trajectory import Recorder

require("accelerate", extra="transformers", purpose="polyak.integrations.accelerate")

from accelerate import Accelerator  # noqa: E402

__all__ = ["register"]


def register(accelerator: Accelerator, **followers: Average | Recorder) -> None:
    """Have ``save_state`` and ``load_state`` carry averages and recorders, under the names that they are given.

    ``Accelerator.register_for_checkpointing`` does so as well, but for models sharded by FSDP2 (``fsdp_version: 2``):
    of those the main process would save its own part only. Here every rank saves its own into one folder of
    ``torch.distributed.checkpoint``, and a run goes on from it on any number of ranks.

    Call it once :meth:`Accelerator.prepare` has made the model what it is, on all processes; a recorder that one
    process has alone is registered there.

    Args:
        accelerator: whose states they are part of.
        followers: name to average or recorder.

    Raises:
        OptionError: one is neither an average nor a recorder.
        StateError: from ``load_state``, where one is not in the folder, or is not what was saved.

    >>> import torch, polyak
    >>> from accelerate import Accelerator
    >>> from polyak.integrations.accelerate import register
    >>> accelerator = Accelerator(cpu=True)
    >>> model = torch.nn.Linear(3, 1)
    >>> model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    >>> ema = polyak.Average(model, polyak.EMA(half_life=500))
    >>> handle = polyak.attach(optimizer, ema)
    >>> register(accelerator, ema=ema)                  # accelerator.save_state(folder) writes polyak-ema.pt as well
    """
    for name, follower in followers.items():
        if not isinstance(follower, Average | Recorder):
            raise OptionError(f"{name} is neither an Average nor a Recorder, but {type(follower).__name__}")

    def path_of(folder: str, name: str) -> Path:
        return Path(folder) / f"polyak-{name}.pt"

    def save(models: list[Any], weights: list[Any], folder: str) -> None:
        for name, follower in followers.items():
            sharded = follower._binding.sharded
            if sharded or accelerator.is_main_process:
                save_state(path_of(folder, name), follower.state_dict, sharded)

    def load(models: list[Any], folder: str) -> None:
        for name, follower in followers.items():
            saved = saved_state(path_of(folder, name), follower.state_dict)
            if saved is None:
                raise StateError(
                    f"{folder} holds no {path_of(folder, name).name}: it was saved without it, or under another name. "
                    "Load it before register(), where it begins anew"
                )
            follower.load_state_dict(saved)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
