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

from polyak.inspection._describe import FolderSummary, Summary, compare, describe
from polyak.inspection._measure import CheckpointSummary, Movement, measure_movement

__all__ = [
    "CheckpointSummary",
    "FolderSummary",
    "Movement",
    "Summary",
    "compare",
    "describe",
    "measure_movement",
]
