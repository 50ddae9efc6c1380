"""The demo's files: TASK.json, TASK.png and TASK.txt in one folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from polyak.checkpoints.atomic import write_file, writing
from polyak.demo.report import MADE_BY
from polyak.errors import OutputExistsError

__all__ = ["Outputs"]


@dataclass(frozen=True)
class Outputs:
    """The three files of a task. A former demo's are rewritten; files that no demo made are left alone."""

    folder: Path
    task: str

    @property
    def paths(self) -> list[Path]:
        """Numbers, figure, and the table and verdict as text, in the order in which they are written."""
        return [self.folder / f"{self.task}.{suffix}" for suffix in ("json", "png", "txt")]

    def claim(self) -> None:
        """Make the folder, before hours of training find that it cannot be written.

        Raises:
            OutputExistsError: if one of the files is there and is not a former demo's.
            CheckpointError: if the folder cannot be made.
        """
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        present = [path.name for path in self.paths if path.exists()]
        if present and not self._made_by_demo():
            raise OutputExistsError(
                f"{self.folder} has {', '.join(present)}, not made by a former demo: "
                f"name another folder with --output, or move them away"
            )

    def write(self, numbers: dict[str, object], png: bytes, text: str) -> None:
        """Write all three, each whole or not at all."""
        # The JSON file goes first: it is what marks the others as the demo's own.
        as_json = json.dumps(numbers, indent=1, allow_nan=False) + "\n"
        for path, content in zip(self.paths, (as_json.encode(), png, text.encode()), strict=True):
            write_file(path, content, overwrite=True)

    def _made_by_demo(self) -> bool:
        try:
            former = json.loads(self.paths[0].read_bytes())
        except (OSError, ValueError):
            return False
        return isinstance(former, dict) and former.get("made_by") == MADE_BY
