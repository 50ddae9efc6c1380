"""A recorded trajectory: its blocks, and how the run moved from one to the next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from polyak.inspection.movement import Movement, measure_movement
from polyak.trajectory import Block, Trajectory

__all__ = ["TrajectorySummary", "summarise_trajectory"]


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
    movement: Movement | None

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
    """Describe a recorded trajectory; all blocks are read to measure how they lie to each other.

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
    movement = measure_movement(opened) if opened else None
    return TrajectorySummary(str(path), trajectory.blocks, trajectory.damaged, nbytes, movement)
