"""Folders as the Hugging Face libraries write them: one file, or several with an index."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from polyak.checkpoints import _pt, _safetensors
from polyak.checkpoints._base import Contents, Location, StoredTensor
from polyak.checkpoints._io import AtomicOutput, writing
from polyak.checkpoints._writer import Layout, Writer
from polyak.errors import CheckpointError, StructureError, name_list

# Above this many bytes a folder gets several files; the usual choice of the hub's tools.
MAX_SHARD_BYTES = 5_000_000_000
_INDEX = ".index.json"
_TRAINER_STATE = "trainer_state.json"


@dataclass(frozen=True)
class _Kind:
    """How the shards of a folder are called, read and written."""

    stem: str
    suffix: str
    read: Callable[[Path], Contents]
    writer: Callable[[Path, Layout], Writer]


SAFETENSORS = _Kind("model", ".safetensors", _safetensors.read, _safetensors.SafetensorsWriter)
BIN = _Kind("pytorch_model", ".bin", _pt.read, _pt.PickledWriter)
# transformers, diffusers and PEFT; an index before a single file, safetensors before pickles.
_KINDS = tuple(
    replace(kind, stem=stem)
    for kind, stems in (
        (SAFETENSORS, ("model", "diffusion_pytorch_model", "adapter_model")),
        (BIN, ("pytorch_model", "diffusion_pytorch_model", "adapter_model")),
    )
    for stem in stems
)


def find_weights_file(path: Path) -> tuple[Path, _Kind] | None:
    """The index or the single weights file of a folder, or None."""
    for kind in _KINDS:
        for name in (kind.stem + kind.suffix + _INDEX, kind.stem + kind.suffix):
            if (path / name).is_file():
                return path / name, kind
    return None


def read(path: Path) -> Contents:
    """The tensors of all shards.

    Raises ``CheckpointError`` for a damaged index, and for missing shards or names, all at once.
    """
    found = find_weights_file(path)
    assert found is not None, "the format was recognised by this file"
    file, kind = found
    contents = _sharded(file, kind) if file.name.endswith(_INDEX) else kind.read(file)
    step = _trainer_step(path)
    return contents if step is None else replace(contents, metadata={"global_step": step} | contents.metadata)


def _trainer_step(path: Path) -> str | None:
    """The step as transformers' Trainer keeps it, beside the weights."""
    try:
        return str(int(json.loads((path / _TRAINER_STATE).read_bytes())["global_step"]))
    except (OSError, ValueError, OverflowError, TypeError, KeyError, RecursionError):
        return None


def _sharded(index: Path, kind: _Kind) -> Contents:
    shard_of = _weight_map(index)
    shards = sorted(set(shard_of.values()))
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise CheckpointError(f"{index.parent} lacks {name_list(missing, most=20)}: fetch the shards again")
    contents = [kind.read(index.parent / shard) for shard in shards]
    tree: dict[str, Any] = {}
    for shard, part in zip(shards, contents, strict=True):
        # Tied names are in a shard without being in the index.
        tree |= {
            name: part.stored(leaf)
            for name, leaf in part.tree.items()
            if isinstance(leaf, StoredTensor | Tensor) and shard_of.get(name, shard) == shard
        }
    absent = [name for name in shard_of if name not in tree]
    if absent:
        raise CheckpointError(f"{index} promises tensors that its shards do not hold: {name_list(absent)}")
    metadata = {name: text for part in contents for name, text in part.metadata.items()}
    return Contents(tree, metadata, all(part.is_lazy for part in contents))


def _weight_map(index: Path) -> dict[str, str]:
    try:
        shard_of = json.loads(index.read_bytes())["weight_map"]
        if all(Path(shard).name == shard for shard in shard_of.values()):
            return shard_of
    except OSError as error:
        raise CheckpointError(f"cannot read {index}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    raise CheckpointError(
        f"{index} is damaged: its weight_map must give the file name of each tensor's shard"
    )


class HuggingFaceWriter(Writer):
    """A new folder with one weights file, or with shards and an index where there are too many bytes for one."""

    def __init__(
        self, path: Path, layout: Layout, overwrite: bool = False, kind: _Kind = SAFETENSORS
    ) -> None:
        super().__init__(layout)
        self._output = AtomicOutput(path, overwrite)
        self._kind = kind
        parts = _split(layout)
        self._writers: dict[str, Writer] = {}
        self._file_of: dict[str, str] = {}
        folder = self._output.create_folder()
        try:
            with self._under_its_name():
                for number, part in enumerate(parts, 1):
                    shard = f"-{number:05d}-of-{len(parts):05d}" if len(parts) > 1 else ""
                    file = kind.stem + shard + kind.suffix
                    self._writers[file] = kind.writer(folder / file, part)
                    self._file_of |= dict.fromkeys([*part.tensors, *part.ties], file)
        except BaseException:
            self.abort()
            raise

    @contextmanager
    def _under_its_name(self) -> Iterator[None]:
        """Errors of the shards name the folder as it was asked for, not the temporary one."""
        try:
            yield
        except (CheckpointError, StructureError) as error:
            text = str(error).replace(str(self._output.temporary), str(self._output.path))
            raise type(error)(text) from error

    def _write(self, name: str, start: int, values: Tensor) -> None:
        with self._under_its_name():
            self._writers[self._file_of[name]].write(name, start, values)

    def location(self, name: str) -> Location | None:
        return self._writers[self._file_of[name]].location(name)

    def commit(self) -> None:
        with self._under_its_name():
            for writer in self._writers.values():
                writer.commit()
        if len(self._writers) > 1:
            total_bytes = sum(info.nbytes for info in self.layout.tensors.values())
            index = {"metadata": {"total_size": total_bytes}, "weight_map": self._file_of}
            name = self._kind.stem + self._kind.suffix + _INDEX
            with writing(self._output.path):
                (self._output.temporary / name).write_text(json.dumps(index, indent=2))
        self._output.commit()

    def abort(self) -> None:
        for writer in self._writers.values():
            writer.abort()
        self._output.abort()


def _split(layout: Layout) -> list[Layout]:
    """Layouts of at most ``MAX_SHARD_BYTES`` each, in order; a larger tensor has a shard of its own."""
    parts: list[list[str]] = [[]]
    filled = 0
    for name, info in layout.tensors.items():
        if parts[-1] and filled + info.nbytes > MAX_SHARD_BYTES:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += info.nbytes
    return [
        Layout(
            {name: layout.tensors[name] for name in part},
            {tied: name for tied, name in layout.ties.items() if name in part},
            layout.metadata,
        )
        for part in parts
    ]
