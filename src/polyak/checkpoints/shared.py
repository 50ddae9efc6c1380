"""One file that several ranks write, each its own slices."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from polyak.checkpoints.atomic import Observer, writing
from polyak.checkpoints.base import Location, byte_view
from polyak.checkpoints.passing import write_all
from polyak.checkpoints.writer import Layout, Writer
from polyak.distributed import Team
from polyak.errors import CheckpointError, OptionError

__all__ = ["written_together"]


@contextmanager
def written_together(
    team: Team,
    output: Path,
    layout: Layout,
    create: Callable[[Observer | None], Writer],
    observe: Observer | None = None,
) -> Iterator[Writer]:
    """A writer on each rank; the first rank lays the file out, and commits it when all have written and synced.

    The body holds no collective call. If it fails on one rank, it fails on all and nothing is left behind.

    Args:
        team: the ranks, whose folder of ``output`` must be the same.
        output: the file.
        layout: what is written, the same on all ranks.
        create: makes the whole file's writer, with ``observe``; called on the first rank.
        observe: called with the offset and the bytes of all that this rank writes.

    Raises:
        OptionError: a format whose bytes have no place before all are known, for more ranks than one.
        PolyakError: on the ranks that did not fail, or if one was lost.
    """
    whole: Writer | None = None
    locations: dict[str, Location] = {}
    try:
        with team.all_or_none(f"laying out {output}"):
            if team.is_first:
                whole = create(observe)
                if team.size > 1:
                    locations = _locations(whole, output)
        locations = team.first(lambda: locations)
        with team.all_or_none(f"writing {output}"):
            if whole is not None:
                yield whole
            else:
                with _PartWriter(layout, locations, output, observe) as part:
                    yield part
        with team.all_or_none(f"committing {output}"):
            if whole is not None:
                whole.commit()
    finally:
        if whole is not None:
            whole.abort()


def _locations(writer: Writer, output: Path) -> dict[str, Location]:
    found = {name: writer.location(name) for name in writer.layout.tensors}
    known = {name: location for name, location in found.items() if location is not None}
    if len(known) < len(found):
        raise OptionError(
            f"{output} is of a format that only one process can write: write .safetensors, which several can"
        )
    return known


class _PartWriter(Writer):
    """Writes into files that another rank has laid out."""

    def __init__(
        self, layout: Layout, locations: Mapping[str, Location], output: Path, observe: Observer | None
    ) -> None:
        super().__init__(layout)
        self._locations, self._output, self._observe = locations, output, observe
        self._numbers: dict[Path, int] = {}
        for path in {location.path for location in locations.values()}:
            try:
                self._numbers[path] = os.open(path, os.O_WRONLY)
            except OSError as error:
                self.abort()
                raise CheckpointError(
                    f"{path}, which the first rank has made, cannot be opened on another ({error.strerror}): all ranks "
                    "must share the folder of the output"
                ) from error

    def _write(self, name: str, start: int, values: Tensor) -> None:
        path, begin = self._locations[name]
        data, offset = byte_view(values), begin + start * values.element_size()
        with writing(self._output):
            write_all(self._numbers[path], data, offset, passing=True)
        if self._observe is not None:
            self._observe(offset, data)

    def location(self, name: str) -> Location:
        return self._locations[name]

    def commit(self) -> None:
        """Sync what this rank has written; the file gets its name from the rank that laid it out."""
        with writing(self._output):
            for number in self._numbers.values():
                os.fsync(number)
        self.abort()

    def abort(self) -> None:
        """Close the files; removing them is up to the rank that laid them out."""
        while self._numbers:
            os.close(self._numbers.popitem()[1])
