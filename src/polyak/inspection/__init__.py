"""What is at a path, and what differs between two: the answers behind ``polyak inspect``, as plain data.

>>> import tempfile, torch
>>> from pathlib import Path
>>> folder = tempfile.TemporaryDirectory()
>>> path = Path(folder.name) / "last.pth"
>>> torch.save({"epoch": 3, "state_dict": {"w": torch.ones(2)}, "state_dict_ema": {"w": torch.zeros(2)}}, path)
>>> summary = describe(path)
>>> summary.origin.note, summary.origin.step
("weights found under 'state_dict_ema'; also present: 'state_dict'", 3)
>>> compare(path, path, key="state_dict", other_key="state_dict_ema").relative_distance
1.0
>>> folder.cleanup()
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from polyak import checkpoints
from polyak.checkpoints.folders import is_checkpoint_folder, is_recording
from polyak.errors import OptionError
from polyak.inspection.comparison import Comparison, TensorDifference, compare_checkpoints
from polyak.inspection.contents import CheckpointSummary, TensorSummary, summarise_checkpoint
from polyak.inspection.folder import FolderRow, FolderSummary, summarise_folder
from polyak.inspection.layouts import LayoutDifference, compare_layouts
from polyak.inspection.movement import Movement, Neighbour, measure_movement
from polyak.inspection.trajectory import TrajectorySummary, summarise_trajectory

__all__ = [
    "CheckpointSummary",
    "Comparison",
    "FolderRow",
    "FolderSummary",
    "LayoutDifference",
    "Movement",
    "Neighbour",
    "Summary",
    "TensorDifference",
    "TensorSummary",
    "TrajectorySummary",
    "compare",
    "compare_checkpoints",
    "compare_layouts",
    "describe",
    "measure_movement",
    "summarise_checkpoint",
    "summarise_folder",
    "summarise_trajectory",
]

Summary = CheckpointSummary | FolderSummary | TrajectorySummary | Comparison


def describe(
    path: str | PathLike[str], key: str | None = None, *, movement: bool = False
) -> CheckpointSummary | FolderSummary | TrajectorySummary:
    """Say what is at a path: one checkpoint, a folder of them, or a recorded trajectory.

    Args:
        path: a file or folder.
        key: the nested key to take weights from.
        movement: for a folder, also read all weights and measure how they moved; for a trajectory always.

    Raises ``CheckpointError`` for what is no whole, safe checkpoint, ``OptionError`` for a key that is not there
    and for ``movement`` of a single checkpoint, ``StructureError`` for ``movement`` between different models.
    """
    path = Path(path)
    if is_recording(path):
        if key is not None:
            raise OptionError(
                f"{path} is a recorded trajectory, whose blocks have no nested keys: leave the key out"
            )
        return summarise_trajectory(path)
    if path.is_dir() and not is_checkpoint_folder(path):
        return summarise_folder(path, key, movement=movement)
    if movement:
        raise OptionError(f"{path} is one checkpoint: movement is measured along a folder of several")
    with checkpoints.open(path, key) as checkpoint:
        return summarise_checkpoint(checkpoint)


def compare(
    path: str | PathLike[str],
    other: str | PathLike[str],
    key: str | None = None,
    other_key: str | None = None,
) -> Comparison:
    """Say what differs between two checkpoints, and by how much.

    Args:
        path, other: a file or folder each.
        key, other_key: the nested key to take weights from in each of them; the best known one by default.

    Raises as ``describe``, and ``StructureError`` if the two have no tensor in common.
    """
    with checkpoints.open(path, key) as first, checkpoints.open(other, other_key) as second:
        return compare_checkpoints(first, second)
