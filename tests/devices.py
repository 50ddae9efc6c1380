"""The ways of an accelerator, run on the host: the operations are the same ones, and a graph is a tape of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from polyak import _torch

DEVICES = ("host", "accelerator")


@contextmanager
def as_if_on(device: str) -> Iterator[None]:
    """CPU tensors that a mean is made of inside count as an accelerator's, unless the device is the host."""
    if device == "host":
        yield
        return
    with mock.patch.object(_torch, "on_host", lambda tensor: False):
        yield


class Tape(TorchDispatchMode):
    """The operations that run inside, to be run again on the same memory: what a CUDA graph does.

    A number that is read by the host inside would be the same at each replay, so reading one raises.
    """

    def __init__(self) -> None:
        super().__init__()
        self._operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("the host reads a number of the device")
        result = func(*args, **(kwargs or {}))
        self._operations.append((func, args, kwargs or {}, tree_leaves(result)))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, before in self._operations:
            for old, new in zip(before, tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
