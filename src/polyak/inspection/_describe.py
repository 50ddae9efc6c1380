"""What is at a path, and what differs between two: the answers behind ``polyak inspect``, as plain data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from polyak import checkpoints
from polyak._checks import checked
from polyak.checkpoints import Checkpoint
from polyak.checkpoints._base import NoWeightsError
from polyak.checkpoints._checkpoint import is_checkpoint_folder, is_recording
from polyak.combine._beside import checkpoints_below
from polyak.combine._reading import read_inputs
from polyak.combine._roles import Item
from polyak.errors import OptionError
from polyak.inspection import _measure
from polyak.trajectory import Block, Trajectory

__all__ = ["FolderRow", "FolderSummary", "TrajectorySummary", "summarise_folder", "summarise_trajectory"]

# A folder of checkpoints: one row for each, from headers alone.


@dataclass(frozen=True)
class FolderRow:
    """One checkpoint of a folder.

    Attributes:
        name: its file or folder name.
        error: why it cannot be used, one sentence; None if it can, and only then the rest is known.
        format, note, step: as the checkpoint says them.
        tensors: how many, tied ones once.
        nbytes: of all tensors.
        dtypes: the dtypes, most bytes first.
        layout: how it differs from the folder's ``reference``.
        taken: whether an average of the folder takes it.
        why: why it does not.
        key: the nested key of its weights.
    """

    name: str
    error: str | None = None
    format: str = ""
    note: str = ""
    step: int | None = None
    tensors: int = 0
    nbytes: int = 0
    dtypes: tuple[str, ...] = ()
    layout: _measure.LayoutDifference | None = None
    taken: bool = True
    why: str = ""
    key: str | None = None


@dataclass(frozen=True)
class FolderSummary:
    """A folder of checkpoints, ordered by step where all readable ones have one (the others last), else by name.

    Attributes:
        path: the folder.
        reference: the name of the checkpoint that the others' layouts are compared with; None if none is readable.
        rows: one for each checkpoint.
        movement: how the readable ones lie to each other; None unless it was asked for.
        refusal: why no average of the folder is made; None where one can be.
        of_several_runs: what is said of checkpoints of runs that began apart; empty where they are of one.
    """

    path: str
    reference: str | None
    rows: tuple[FolderRow, ...]
    movement: _measure.Movement | None = None
    refusal: str | None = None
    of_several_runs: str = ""

    @property
    def readable(self) -> tuple[FolderRow, ...]:
        """The checkpoints that can be used."""
        return tuple(row for row in self.rows if row.error is None)

    @property
    def taken(self) -> tuple[FolderRow, ...]:
        """The checkpoints that an average of the folder takes."""
        return tuple(row for row in self.readable if row.taken)

    @property
    def unreadable(self) -> tuple[FolderRow, ...]:
        """The checkpoints that cannot."""
        return tuple(row for row in self.rows if row.error is not None)

    @property
    def same_layout(self) -> bool:
        """Whether all readable checkpoints have the same names, shapes, dtypes and ties."""
        return not any(row.layout for row in self.taken)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "kind": "folder",
            "path": self.path,
            "reference": self.reference,
            "same_layout": self.same_layout,
            "refusal": self.refusal,
            "of_several_runs": self.of_several_runs,
            "checkpoints": [asdict(row) for row in self.rows],
            "movement": self.movement.to_dict() if self.movement else None,
        }


def summarise_folder(
    path: Path,
    key: str | None = None,
    *,
    movement: bool = False,
    allow: Sequence[str] = (),
) -> FolderSummary:
    """Describe every checkpoint in a folder; those that cannot be read are named with the reason.

    Args:
        path: the folder.
        key: the nested key to take weights from, in each of them.
        movement: also read all weights and measure how they moved.
        allow: types that torch files may hold, see :func:`polyak.checkpoints.open`.

    Raises ``CheckpointError`` if there is none, and for ``movement`` what ``measure_movement`` raises.

    >>> import tempfile, torch
    >>> folder = tempfile.TemporaryDirectory()
    >>> for step in (100, 20):
    ...     torch.save({"model": {"w": torch.ones(3)}, "step": step}, Path(folder.name) / f"{step}.pt")
    >>> summary = summarise_folder(Path(folder.name))
    >>> [(row.name, row.step, row.nbytes) for row in summary.rows], summary.same_layout
    ([('20.pt', 20, 12), ('100.pt', 100, 12)], True)
    >>> folder.cleanup()
    """
    reading = read_inputs(path, key, allow=allow, keep_going=True)
    rows = list(_rows(reading.items))
    if not rows:
        reading.required()
    reference = next((row.name for row in rows if row.taken and row.error is None), None)
    opened = reading.checkpoints if movement and reading.refusal is None else []
    return FolderSummary(
        str(path),
        reference,
        tuple(rows),
        _measure.measure_movement(opened) if opened else None,
        None if reading.refusal is None else reading.refusal.for_command,
        reading.of_several_runs,
    )


def _rows(items: Sequence[Item]) -> Iterator[FolderRow]:
    reference: Checkpoint | None = None
    for item in items:
        if item.checkpoint is not None:
            reference = reference or item.checkpoint
            yield _row(item, item.checkpoint, reference)
        else:
            is_broken = item.error is not None and not isinstance(item.error, NoWeightsError)
            error = " ".join(str(item.error).split()) if is_broken else None
            yield FolderRow(item.name, error, taken=item.taken, why=item.why)


def _row(item: Item, checkpoint: Checkpoint, reference: Checkpoint) -> FolderRow:
    summary = _measure.summarise_checkpoint(checkpoint)
    return FolderRow(
        name=item.name,
        taken=item.taken,
        why=item.why,
        key=checkpoint.key,
        format=checkpoint.format,
        note=checkpoint.note,
        step=item.step,
        tensors=len(summary.stored),
        nbytes=summary.nbytes,
        dtypes=tuple(summary.dtypes),
        layout=_measure.compare_layouts(reference, checkpoint),
    )


# A recorded run: its blocks, and how the run moved from one to the next.


@dataclass(frozen=True)
class TrajectorySummary:
    """What a :class:`polyak.Recorder` wrote.

    Attributes:
        path: the folder.
        blocks: oldest first.
        damaged: position in ``blocks`` to what is wrong with it.
        nbytes: of the tensors of all blocks that can be read.
        movement: how the readable blocks lie to each other; None where there are none.
    """

    path: str
    blocks: tuple[Block, ...]
    damaged: Mapping[int, str]
    nbytes: int
    movement: _measure.Movement | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "kind": "trajectory",
            "path": self.path,
            "nbytes": self.nbytes,
            "blocks": [asdict(block) for block in self.blocks],
            "damaged": {str(index): problem for index, problem in self.damaged.items()},
            "movement": self.movement.to_dict() if self.movement else None,
        }


def summarise_trajectory(path: Path) -> TrajectorySummary:
    """Describe a recorded run; all blocks are read to measure how they lie to each other.

    Raises ``CheckpointError`` where its manifest is damaged.

    >>> import tempfile, torch, polyak
    >>> folder = tempfile.TemporaryDirectory()
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> with polyak.Recorder(model, folder.name, block=2) as run:
    ...     for value in (1.0, 3.0, 2.0, 2.0):
    ...         _ = model.weight.data.fill_(value)
    ...         run.update()
    >>> summary = summarise_trajectory(Path(folder.name))
    >>> [str(block) for block in summary.blocks], summary.nbytes, summary.movement.neighbours[0].relative_distance
    (['(0, 2]', '(2, 4]'], 16, 0.0)
    >>> folder.cleanup()
    """
    trajectory = Trajectory(path)
    # Damage may show by the checksum only, and would be measured as a great leap.
    opened = [checkpoint for checkpoint in trajectory.usable.checkpoints if checkpoint is not None]
    nbytes = sum(
        info.nbytes
        for checkpoint in opened
        for name, info in checkpoint.tensors.items()
        if name not in checkpoint.ties
    )
    movement = _measure.measure_movement(opened) if opened else None
    return TrajectorySummary(str(path), trajectory.blocks, trajectory.damaged, nbytes, movement)


Summary = _measure.CheckpointSummary | FolderSummary | TrajectorySummary | _measure.Comparison
"""What ``describe`` and ``compare`` return; each has ``to_dict``."""


@checked
def describe(
    path: str | PathLike[str],
    key: str | None = None,
    *,
    movement: bool = False,
    allow: Sequence[str] = (),
) -> _measure.CheckpointSummary | FolderSummary | TrajectorySummary:
    """Say what is at a path: one checkpoint, a folder of them, or a recorded run.

    Args:
        path: a file or folder.
        key: the nested key to take weights from.
        movement: for a folder, also read all weights and measure how they moved; for a trajectory always.
        allow: types that a torch file may hold, see :func:`polyak.checkpoints.open`.

    Raises ``CheckpointError`` for what is no whole, safe checkpoint, ``OptionError`` for a key that is not there
    and for ``movement`` of a single checkpoint, ``StructureError`` for ``movement`` between different models.
    """
    path = Path(path)
    if is_recording(path):
        if key is not None:
            raise OptionError(
                f"{path} is a recorded run, whose blocks have no nested keys: leave the key out"
            )
        return summarise_trajectory(path)
    if path.is_dir() and (not is_checkpoint_folder(path) or checkpoints_below(path)):
        return summarise_folder(path, key, movement=movement, allow=allow)
    if movement:
        raise OptionError(f"{path} is one checkpoint: movement is measured along a folder of several")
    with checkpoints.open(path, key, allow=allow) as checkpoint:
        return _measure.summarise_checkpoint(checkpoint)


@checked
def compare(
    path: str | PathLike[str],
    other: str | PathLike[str],
    key: str | None = None,
    other_key: str | None = None,
    *,
    allow: Sequence[str] = (),
) -> _measure.Comparison:
    """Say what differs between two checkpoints, and by how much.

    Args:
        path: a file or folder.
        other: another.
        key: the nested key to take weights from in the first of them; the best known one by default.
        other_key: the same for the second.
        allow: as for :func:`describe`.

    Raises as ``describe``, and ``StructureError`` if the two have no tensor in common.
    """
    with (
        _one(path, key, allow) as first,
        _one(other, other_key, allow) as second,
    ):
        return _measure.compare_checkpoints(first, second)


def _one(path: str | PathLike[str], key: str | None, allow: Sequence[str]) -> Checkpoint:
    """The checkpoint at a path; where that is a folder of one that is a file for each rank, these."""
    folder = Path(path)
    if folder.is_dir() and not is_checkpoint_folder(folder):
        reading = read_inputs(folder, key, allow=allow)
        if reading.refusal is None and len(reading.taken) == 1:
            return reading.checkpoints[0]
    return checkpoints.open(path, key, allow=allow)
