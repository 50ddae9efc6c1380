"""The ways to a mean, run on the host: those of an accelerator are the same operations, a graph is a tape of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from polyak import _host_kernel, _torch

DEVICES = ("host", "compiled", "accelerator")


@contextmanager
def as_if_on(device: str) -> Iterator[None]:
    """CPU tensors that a mean is made of inside count as an accelerator's; "compiled" is the host, with loops."""
    if device == "host":
        yield
        return
    if device == "compiled":
        if not _host_kernel.loops_are_ready(wait=True):
            pytest.skip("numba is not installed")
        with mock.patch.multiple(_host_kernel, _LEAST_NUMEL=0, _LEAST_NUMEL_OF_A_THREAD=1000):
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
