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

from polyak.inspection._describe import (
    FolderRow,
    FolderSummary,
    Summary,
    TrajectorySummary,
    compare,
    describe,
    summarise_folder,
    summarise_trajectory,
)
from polyak.inspection._measure import (
    CheckpointSummary,
    Comparison,
    LayoutDifference,
    Movement,
    Neighbour,
    TensorDifference,
    TensorSummary,
    compare_checkpoints,
    compare_layouts,
    measure_movement,
    summarise_checkpoint,
)

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
