"""The ways to a mean, run on the host: those of an accelerator are the same operations, a graph is a tape of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from polyak import _host_jobs, _host_kernel, _offload, _torch

DEVICES = ("host", "compiled", "accelerator")


@contextmanager
def as_if_on(device: str) -> Iterator[None]:
    """CPU tensors that a mean is made of inside count as an accelerator's; "compiled" is the host, with loops."""
    if device == "host":
        yield
        return
    if device == "compiled":
        if not _host_jobs.are_ready(wait=True):
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


class Copied:
    """Stands for an event: it comes when the copies are done."""

    def __init__(self, copies: Future[None]) -> None:
        self._copies = copies

    def synchronize(self) -> None:
        self._copies.result()


class SlowStream:
    """Stands for a stream beside the one that computes, which is the calling thread here: a copy takes its time."""

    seconds = 5e-4  # before each tensor

    def __init__(self, device: torch.device) -> None:
        self._pool = ThreadPoolExecutor(1, "side-stream")

    def copy(self, targets: list[Tensor], sources: list[Tensor]) -> Copied:
        def run() -> None:
            for target, source in zip(targets, sources, strict=True):
                time.sleep(self.seconds)
                target.copy_(source)

        return Copied(self._pool.submit(run))

    def hold_back(self, copied: Copied) -> None:
        copied.synchronize()  # the host does not wait on an accelerator; here it computes itself


@contextmanager
def as_if_offloaded(is_there: Callable[[Tensor], bool]) -> Iterator[None]:
    """CPU tensors count as an accelerator's where ``is_there`` says so, and are copied to the host by slow streams."""
    with (
        mock.patch.object(_torch, "on_host", lambda tensor: not is_there(tensor)),
        mock.patch.object(_offload, "SideStream", SlowStream),
    ):
        yield
