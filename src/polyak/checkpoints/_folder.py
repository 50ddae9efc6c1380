"""One checkpoint in several files: written together into a folder that appears whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from polyak.checkpoints._base import Format, Layout, Location, Writer
from polyak.checkpoints._io import SIDECAR, AtomicOutput, sha256, writing
from polyak.errors import CheckpointError, StructureError

__all__ = ["FolderFile", "FolderWriter"]


class FolderFile(NamedTuple):
    """One file of a folder: its name there, how it is written, what it holds.

    Where names in the folder's layout have a ``prefix``, the file has them without it.
    """

    name: str
    format: Format
    layout: Layout
    prefix: str = ""


class FolderWriter(Writer):
    """A new folder with several files of tensors, and with the small files of ``layout.beside``.

    Args:
        path: the folder.
        layout: all that the files hold.
        overwrite: replace a folder that a writer made.
        files: between them they hold the tensors of ``layout``.
        more: further small files, which belong to the format: name to content.
        notes_names: note what was written, as no format knows the files by their names.
    """

    def __init__(
        self,
        path: Path,
        layout: Layout,
        overwrite: bool,
        files: Sequence[FolderFile],
        *,
        more: Mapping[str, bytes] | None = None,
        notes_names: bool = False,
    ) -> None:
        super().__init__(layout)
        self._output = AtomicOutput(path, overwrite)
        self._notes_names = notes_names
        self._writers: dict[str, Writer] = {}
        # In which file each tensor is, and under which name.
        self._places: dict[str, tuple[Writer, str]] = {}
        folder = self._output.create_folder()
        try:
            with self._under_its_name():
                self._put(folder, dict(layout.beside) | dict(more or {}))
                for file in files:
                    self._begin(folder / file.name, file)
        except BaseException:
            self.abort()
            raise

    def _put(self, folder: Path, small: Mapping[str, Path | bytes]) -> None:
        with writing(self._output.path):
            for name, source in small.items():
                if isinstance(source, Path):
                    shutil.copyfile(source, folder / name)
                else:
                    (folder / name).write_bytes(source)

    def _begin(self, path: Path, file: FolderFile) -> None:
        with writing(self._output.path):
            path.parent.mkdir(parents=True, exist_ok=True)
        writer = self._writers[file.name] = file.format.writer(path, file.layout, False)
        self._places |= {
            file.prefix + name: (writer, name) for name in [*file.layout.tensors, *file.layout.ties]
        }

    @contextmanager
    def _under_its_name(self) -> Iterator[None]:
        """Errors of the files name the folder as it was asked for, not the temporary one."""
        try:
            yield
        except (CheckpointError, StructureError) as error:
            text = str(error).replace(str(self._output.temporary), str(self._output.path))
            raise type(error)(text) from error

    def _write(self, name: str, start: int, values: Tensor) -> None:
        with self._under_its_name():
            writer, own = self._places[name]
            writer._write(own, start, values)

    def location(self, name: str) -> Location | None:
        writer, own = self._places[name]
        return writer.location(own)

    def commit(self) -> None:
        with self._under_its_name():
            for writer in self._writers.values():
                writer.commit()
                writer.abort()  # what waited to be written makes room for the next
        with writing(self._output.path):
            self._note(self._output.temporary)
        self._output.commit()

    def _note(self, folder: Path) -> None:
        """Say what was put into the folder, so that a later average may replace it."""
        notes = {}
        if self.layout.beside:
            notes["copied"] = {name: sha256(folder / name) for name in self.layout.beside}
        if self._notes_names:
            notes["written"] = {name: str((folder / name).stat().st_size) for name in self._writers}
        if notes:
            (folder / SIDECAR).write_text(json.dumps(notes, indent=1))

    def abort(self) -> None:
        for writer in self._writers.values():
            writer.abort()
        self._output.abort()
