"""One average shared out over processes and machines: each rank fills its bytes of the one output file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from polyak import checkpoints
from polyak.checkpoints import Layout, Location, Writer
from polyak.checkpoints.atomic import writing
from polyak.checkpoints.base import byte_view
from polyak.checkpoints.passing import write_all
from polyak.combine.engine import Progress
from polyak.combine.plan import AverageReport, Plan
from polyak.distributed import all_or_none, gather, is_main_rank
from polyak.errors import CheckpointError, OptionError, PolyakError

__all__ = ["launched_on_ranks", "process_group", "run_on_ranks"]

# Ranks that die are noticed by their closed connections; ranks that are slow may be so for hours.
_TIMEOUT = timedelta(days=1)


def launched_on_ranks() -> bool:
    """Whether a launcher such as ``torchrun`` started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


@contextmanager
def process_group() -> Iterator[None]:
    """A gloo process group as the launcher's environment describes it."""
    dist.init_process_group("gloo", timeout=_TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def run_on_ranks(plan: Plan, progress: Progress | None = None) -> AverageReport:
    """``plan.run`` on all ranks of the default process group, bit for bit the same; a collective call.

    Rank 0 lays the file out and commits it when all have written and synced their part. If one rank fails, all
    raise and nothing is left behind.

    Raises as ``Plan.run``; ``OptionError`` for formats whose bytes have no place before all are known;
    ``PolyakError`` on the ranks that did not fail, or if one was lost.
    """
    writer: Writer | None = None
    locations: dict[str, Location] = {}
    try:
        with _lost_ranks_noticed():
            with all_or_none("laying out the average"):
                if is_main_rank():
                    writer = checkpoints.create(plan.output, plan.with_provenance(), overwrite=plan.overwrite)
                    locations = _locations(writer, plan.output)
            locations = gather(locations)[0]
            with all_or_none("averaging"):
                differing = _fill_share(plan, writer, locations, progress)
            with all_or_none("committing the average"):
                if writer:
                    writer.commit()
            return plan.report(sorted(set().union(*gather(differing))))
    finally:
        if writer:
            writer.abort()
        # A launcher ends all ranks when one leaves with an error: the temporary file must be gone by then.
        with suppress(RuntimeError):
            gather(None)


def _locations(writer: Writer, output: Path) -> dict[str, Location]:
    found = {name: writer.location(name) for name in writer.layout.tensors}
    known = {name: location for name, location in found.items() if location is not None}
    if len(known) < len(found):
        raise OptionError(
            f"{output} is of a format that only one process can write: write .safetensors, which several can"
        )
    return known


def _fill_share(
    plan: Plan, writer: Writer | None, locations: dict[str, Location], progress: Progress | None
) -> list[str]:
    with nullcontext(writer) if writer else _PartWriter(plan.layout, locations, plan.output) as target:
        return plan.fill(target, progress, share=(dist.get_rank(), dist.get_world_size()))


@contextmanager
def _lost_ranks_noticed() -> Iterator[None]:
    try:
        yield
    except PolyakError:
        raise
    except RuntimeError as error:  # gloo has no class of its own for closed connections
        raise PolyakError(f"another rank was lost ({error}): nothing was written; start again") from error


class _PartWriter(Writer):
    """Writes into files that another rank has laid out."""

    def __init__(self, layout: Layout, locations: Mapping[str, Location], output: Path) -> None:
        super().__init__(layout)
        self._locations, self._output = locations, output
        self._numbers: dict[Path, int] = {}
        for path in {location.path for location in locations.values()}:
            try:
                self._numbers[path] = os.open(path, os.O_WRONLY)
            except OSError as error:
                self.abort()
                raise CheckpointError(
                    f"{path}, which rank 0 has made, cannot be opened on rank {dist.get_rank()} "
                    f"({error.strerror}): all ranks must share the folder of the output"
                ) from error

    def _write(self, name: str, start: int, values: Tensor) -> None:
        path, offset = self._locations[name]
        with writing(self._output):
            write_all(
                self._numbers[path], byte_view(values), offset + start * values.element_size(), passing=True
            )

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
