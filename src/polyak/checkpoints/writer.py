"""What every format's writer does: take slices of tensors whose layout is known beforehand, then commit or abort."""

from __future__ import annotations

import json
import mmap
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from polyak.checkpoints.atomic import AtomicOutput, writing
from polyak.checkpoints.base import Location, TensorInfo, byte_view
from polyak.checkpoints.passing import write_all
from polyak.errors import CheckpointError, OptionError, StructureError

__all__ = ["SIDECAR", "Layout", "SpooledWriter", "Writer", "on_host", "read_sidecar", "sidecar_text"]

# Formats with no place for metadata and ties carry them in a file of this name.
SIDECAR = "polyak.json"
_ALIGNMENT = 64


@dataclass(frozen=True)
class Layout:
    """What will be written, known before the first value is.

    Args:
        tensors: name to shape and dtype, each tied tensor under one name only.
        ties: further name to the name in ``tensors`` that holds its values.
        metadata: free text entries.

    Raises ``StructureError`` if a tie leads nowhere, ``OptionError`` if metadata is not text.
    """

    tensors: Mapping[str, TensorInfo]
    ties: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for tied, name in self.ties.items():
            if name not in self.tensors or tied in self.tensors:
                raise StructureError(
                    f"{tied!r} cannot be tied to {name!r}: one must be written and the other not"
                )
        if not all(isinstance(text, str) for entry in self.metadata.items() for text in entry):
            raise OptionError("metadata must map text to text: convert numbers with str()")

    def check_slice(self, name: str, start: int, values: Tensor) -> None:
        """Raise ``StructureError`` unless ``values`` is a 1-D contiguous part of the tensor in its dtype."""
        info = self.tensors.get(name)
        fits = (
            info is not None
            and values.dtype == info.dtype
            and values.ndim == 1
            and values.is_contiguous()
            and 0 <= start <= start + values.numel() <= info.numel
        )
        if not fits:
            raise StructureError(
                f"{tuple(values.shape)} values of {values.dtype} at element {start} are no part of {name!r}, "
                f"which was laid out as {info}"
            )


class Writer(ABC):
    """A checkpoint being written. As a context manager it commits at the end, and aborts on any exception.

    ``write`` may be called from several threads for different slices. Every element must be written once.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Put the 1-D ``values`` at elements ``[start, start + values.numel())`` of the flattened tensor.

        Raises ``StructureError`` if they are no part of it, ``CheckpointError`` if the disk does not take them.
        """
        self.layout.check_slice(name, start, values)
        self._write(name, start, values)

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Write whole tensors, of any device; those that the layout has by these names."""
        for name in self.layout.tensors:
            self.write(name, 0, on_host(tensors[name]))

    @abstractmethod
    def _write(self, name: str, start: int, values: Tensor) -> None:
        """The same for a slice that fits."""

    @abstractmethod
    def location(self, name: str) -> Location | None:
        """Where the tensor's bytes go (in the temporary file), or None where only ``write`` can tell."""

    @abstractmethod
    def commit(self) -> None:
        """Sync, and give the output its name."""

    @abstractmethod
    def abort(self) -> None:
        """Leave nothing behind."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.commit()
        finally:
            self.abort()


class SpooledWriter(Writer):
    """For formats that are written in one go: slices wait in an unnamed file on the same disk, not in memory.

    A subclass says how to ``save`` the tensors, which are then views of that file.
    """

    def __init__(self, path: Path, layout: Layout, overwrite: bool = False) -> None:
        super().__init__(layout)
        self._output = AtomicOutput(path, overwrite)
        self._offsets: dict[str, int] = {}
        position = 0
        for name, info in layout.tensors.items():
            self._offsets[name] = position
            position += info.nbytes + (-info.nbytes % _ALIGNMENT)
        with writing(path):
            self._spool = tempfile.TemporaryFile(dir=path.parent, buffering=0)  # noqa: SIM115 (closed in abort)
            try:
                self._spool.truncate(max(position, 1))
            except BaseException:
                self._spool.close()
                raise

    def _write(self, name: str, start: int, values: Tensor) -> None:
        offset = self._offsets[name] + start * values.element_size()
        with writing(self._output.path):
            write_all(self._spool.fileno(), byte_view(values), offset)

    def location(self, name: str) -> None:
        return None

    def commit(self) -> None:
        with writing(self._output.path):
            self._save(self._spooled(), self._output.temporary)
        self._output.commit()

    def abort(self) -> None:
        self._spool.close()
        self._output.abort()

    @abstractmethod
    def _save(self, tensors: dict[str, Tensor], target: Path) -> None:
        """Write all ``tensors``, ties included as the same object, to the file or folder ``target``."""

    def _spooled(self) -> dict[str, Tensor]:
        memory = mmap.mmap(self._spool.fileno(), 0)
        tensors = {}
        for name, info in self.layout.tensors.items():
            # A storage of its own for each: torch saves whole storages, whatever part a tensor shows.
            flat = (
                torch.frombuffer(memory, dtype=info.dtype, count=info.numel, offset=self._offsets[name])
                if info.numel
                else torch.empty(0, dtype=info.dtype)
            )
            tensors[name] = flat.view(info.shape)
        return tensors | {tied: tensors[name] for tied, name in self.layout.ties.items()}


def on_host(tensor: Tensor) -> Tensor:
    """The values of a tensor of any device, as 1-D contiguous memory of the host."""
    return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().view(-1)


def sidecar_text(layout: Layout, **more: Mapping[str, str]) -> str:
    """Metadata and ties as JSON, with anything ``more`` that a format must remember."""
    return json.dumps({"metadata": dict(layout.metadata), "ties": dict(layout.ties), **more}, indent=1)


def read_sidecar(path: Path, text: bytes) -> dict[str, dict[str, str]]:
    """The sections of a sidecar. Raises ``CheckpointError`` unless each maps text to text."""
    try:
        sections = json.loads(text)
        maps = [entry for section in sections.values() for entry in section.items()]
        if all(isinstance(word, str) for entry in maps for word in entry):
            return {section: sections.get(section, {}) for section in ("metadata", "ties", "dtypes")}
    except (ValueError, AttributeError, RecursionError):
        pass
    raise CheckpointError(f"{path}: its {SIDECAR} is damaged; use another copy")
