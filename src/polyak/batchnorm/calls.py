"""From whatever a loader yields to a call of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from operator import length_hint
from typing import Any

import torch
from torch import Tensor, nn

from polyak.distributed import is_main_rank

__all__ = ["call_model", "moved", "progress_bar"]


def call_model(model: nn.Module, batch: Any) -> None:
    """Call ``model(x)``, ``model(batch[0])`` or ``model(**batch)``, unless the batch is empty.

    >>> call_model(nn.Identity(), (torch.ones(2, 3), "labels"))
    """
    if isinstance(batch, Mapping):
        args, kwargs = [], dict(batch)
    elif isinstance(batch, (list, tuple)):
        args, kwargs = list(batch[:1]), {}
    else:
        args, kwargs = [batch], {}
    inputs = [*args, *kwargs.values()]
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    has_samples = any(tensor.numel() for tensor in tensors) if tensors else bool(inputs)
    if not has_samples:
        return
    try:
        model(*args, **kwargs)
    except TypeError as error:
        call = "**batch" if kwargs else "batch[0]" if isinstance(batch, (list, tuple)) else "batch"
        error.add_note(
            f"The model was called as model({call}); forward=lambda model, batch: ... calls it another way."
        )
        raise


def moved(batch: Any, device: torch.device | str | int) -> Any:
    """The batch with its tensors, however nested, on ``device``.

    >>> moved({"x": torch.ones(1), "name": "a"}, "meta")["x"].device
    device(type='meta')
    """
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(moved(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(moved(value, device) for value in batch)
    return batch


@contextmanager
def progress_bar(loader: Iterable[Any], passes: int, shown: bool) -> Iterator[Callable[[], object]]:
    """A bar on stderr of the main rank, or nothing; yields the function to call after each batch."""
    if not (shown and is_main_rank()):
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("BatchNorm statistics"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=length_hint(loader) * passes or None)
        yield lambda: bar.advance(task)
