"""One average shared out over processes and machines: each rank fills its bytes of the one output file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial

import torch.distributed as dist

from polyak import checkpoints
from polyak.checkpoints import Writer
from polyak.checkpoints.atomic import Observer
from polyak.checkpoints.shared import written_together
from polyak.combine.engine import Progress
from polyak.combine.plan import AverageReport, Plan
from polyak.distributed import Team
from polyak.errors import PolyakError

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
    team = Team.of_all()
    try:
        with written_together(team, plan.output, plan.layout, partial(_created, plan)) as target:
            differing = plan.fill(target, progress, share=(dist.get_rank(), dist.get_world_size()))
        return plan.report(sorted(set().union(*team.gather(differing))))
    finally:
        # A launcher ends all ranks when one leaves with an error: the temporary file must be gone by then.
        with suppress(PolyakError):
            team.gather(None)


def _created(plan: Plan, _observe: Observer | None) -> Writer:
    return checkpoints.create(plan.output, plan.with_provenance(), overwrite=plan.overwrite)
