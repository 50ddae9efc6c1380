"""A bar on stderr while weights are tried, which takes as long as the user's own score does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from polyak.distributed import is_main_rank

__all__ = ["bar"]


@contextmanager
def bar(what: str, shown: bool) -> Iterator[Callable[..., Iterator[Any]]]:
    """A bar on stderr of the main rank, or nothing; yields what wraps an iterable of known length.

    >>> with bar("candidates", shown=False) as advance:
    ...     list(advance([1, 2], 2))
    [1, 2]
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    hidden = not (shown and is_main_rank())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=hidden) as progress:
        yield lambda items, total: iter(progress.track(items, total=total))
