"""One checkpoint, opened or begun: which format its path is of, and where among all that it holds the weights lie."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from polyak._checks import checked
from polyak._distributed import RankGroup, refuse_unplaced, shard_runs
from polyak._model import local
from polyak.checkpoints import _dcp, _pt
from polyak.checkpoints._base import (
    FORMATS,
    Contents,
    ConvertedTensor,
    Layout,
    Location,
    StoredTensor,
    TensorInfo,
    Writer,
    on_host,
    written_together,
)
from polyak.checkpoints._dialects import STEP_KEYS
from polyak.checkpoints._io import DataFile
from polyak.checkpoints._tree import find_weights
from polyak.errors import CheckpointError, OptionError, OutputExistsError, StructureError, name_list

__all__ = [
    "FORMATS",
    "RECORDING_NAME",
    "Checkpoint",
    "checkpoint_paths",
    "create",
    "format_for",
    "is_checkpoint_folder",
    "is_recording",
    "natural_order",
    "open",
    "recognise",
    "write",
    "write_sharded",
]

# Which format a path is in, or is to be written in.

# No format needs more to know its own.
_START_BYTES = 512


def format_for(path: Path, format: str | None) -> str:
    """The format to write: the one named, or the one of the suffix.

    >>> format_for(Path("average.ckpt"), None)
    'pt'

    Raises ``OptionError`` for unknown names and suffixes.
    """
    if format is not None:
        if format not in FORMATS:
            raise OptionError(f"unknown format {format!r}: choose from {name_list(sorted(FORMATS), most=10)}")
        return format
    for name, known in FORMATS.items():
        if path.suffix in known.suffixes:
            return name
    usual = [known.suffixes[0] for known in FORMATS.values() if known.suffixes and known.suffixes[0]]
    raise OptionError(
        f"{path} has a suffix of no known format: name it {' or '.join(sorted(usual))}",
        ", or say which format it is",
        "",
    )


def recognise(path: Path) -> str:
    """The format of what is there, from its contents. Raises ``CheckpointError`` if it is none."""
    start = b""
    if not path.is_dir():
        file = DataFile(path)
        start = file.read(0, min(_START_BYTES, file.size))
    # Most files are what their suffix says; but the contents decide.
    for format in sorted(
        FORMATS.values(), key=lambda format: not start or path.suffix not in format.suffixes
    ):
        if format.recognises(path, start):
            return format.name
    looks = ", ".join(format.looks for format in FORMATS.values())
    raise CheckpointError(f"{path} is {_seen(path, start)}: expected {looks}")


def _seen(path: Path, start: bytes) -> str:
    """What there is instead of a checkpoint."""
    if start[:4] == _pt.ZIP_MAGIC:
        names = list(_pt.read_directory(DataFile(path)))
        return f"a zip file with no weights in it (it holds {name_list(names)})"
    if start:
        return f"no checkpoint that is known (it begins with {start[:9].hex(' ')})"
    try:
        names = sorted(item.name for item in path.iterdir())
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    return f"a folder with no checkpoint (it {f'holds {name_list(names)}' if names else 'is empty'})"


# Finding the checkpoints in a folder of them.

# The list of the blocks of a recorded trajectory.
RECORDING_NAME = "manifest.json"


def is_checkpoint_folder(path: Path) -> bool:
    """Whether a folder is itself one checkpoint."""
    try:
        return path.is_dir() and bool(recognise(path))
    except CheckpointError:
        return False
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error


def is_recording(folder: Path) -> bool:
    """Whether a folder is what a :class:`polyak.Recorder` wrote."""
    return (folder / RECORDING_NAME).is_file() and any(folder.glob("block-*.safetensors"))


def checkpoint_paths(folder: Path) -> list[Path]:
    """What looks like a checkpoint directly inside a folder, in natural order.

    Raises ``CheckpointError`` if the folder cannot be read.
    """
    try:
        found = [item for item in folder.iterdir() if not item.name.startswith(".") and _is_candidate(item)]
    except OSError as error:
        raise CheckpointError(f"cannot read {folder}: {error.strerror}") from error
    return sorted(found, key=lambda item: natural_order(item.name))


def _is_candidate(path: Path) -> bool:
    if path.is_dir():
        return is_checkpoint_folder(path)
    suffix = path.suffix.lower()
    return bool(suffix) and any(suffix in format.suffixes for format in FORMATS.values())


def natural_order(name: str) -> list[tuple[int, str]]:
    """A sort key that orders names as people count.

    >>> sorted(["step-10.pt", "step-9.pt"], key=natural_order)
    ['step-9.pt', 'step-10.pt']
    """
    return [(int(part) if part.isdecimal() else -1, part) for part in re.split(r"(\d+)", name)]


# An opened checkpoint: names, shapes and dtypes at once, values when asked for.


class Checkpoint:
    """The weights in a checkpoint, none of them read yet. Made by ``polyak.checkpoints.open``.

    Attributes:
        path: what was opened.
        format: the name of its format, such as ``"safetensors"``.
        key: the nested key under which the weights lay, dotted; None if they were at the top.
        found_keys: all the well-known keys with weights, the preferred one first.
        note: what was chosen, as a sentence; empty where there was nothing to choose.
        ignored: entries that are no weights, or belong to another key.
        tensors: name to shape and dtype, under every name of tied tensors.
        ties: further name to first name, for tensors that are one; reading the first names reads each once.
        metadata: text beside the weights.
        step: the training step, where the checkpoint says it in a plain integer.
        kind: ``"averaged"`` or ``"live"`` where its keys say so, else the empty string.
        siblings: keys of other weights that may be parts of the same model.
        step_key: the entry that says it, such as ``"global_step"`` or ``"epoch"``.
        is_lazy: False if the format forced the whole file into memory (torch files from before 1.6).
        parts: those of a checkpoint that is one file for each rank, by their names; none of a whole one.
    """

    def __init__(self, path: Path, format: str, contents: Contents, key: str | None = None) -> None:
        weights = find_weights(contents, key, path)
        self.path = path
        self.format = format
        self.key = weights.key
        self.found_keys = weights.found_keys
        self.note = weights.note
        self.kind = weights.kind
        self.ignored = weights.ignored
        self.siblings = weights.siblings
        self.metadata = contents.metadata
        self.step, self.step_key = weights.step, weights.step_key
        if self.step is None:
            self.step, self.step_key = _text_step(contents.metadata)
        self.is_lazy = contents.is_lazy
        self.tensors: dict[str, TensorInfo] = {name: stored.info for name, stored in weights.tensors.items()}
        self._stored = weights.tensors
        self._files = contents.files
        self.ties = _ties(weights.tensors)
        self.parts: Mapping[str, Checkpoint] = {}
        if not contents.exact:
            _refuse_empty(path, self.tensors)

    @classmethod
    def joined(cls, path: Path, parts: Mapping[str, Checkpoint], what: str) -> Self:
        """One checkpoint of several that hold parts of it, which are ``what``: tensor ``w`` of part ``p`` is ``p/w``.

        The parts have their weights under one key; what they say of the step and in metadata must be the same.
        """
        first = next(iter(parts.values()))
        joined = cls.__new__(cls)
        joined.path, joined.parts = path, parts
        joined.format, joined.key, joined.kind = first.format, first.key, first.kind
        joined.found_keys = first.found_keys
        notes = dict.fromkeys(part.note for part in parts.values() if part.note)
        joined.note = "; ".join((f"{what}, {name_list(list(parts))}", *notes))
        joined.ignored = tuple(dict.fromkeys(entry for part in parts.values() for entry in part.ignored))
        joined.metadata = {
            key: text
            for key, text in first.metadata.items()
            if all(part.metadata.get(key) == text for part in parts.values())
        }
        told = [part for part in parts.values() if part.step is not None]
        joined.step, joined.step_key = (told[0].step, told[0].step_key) if told else (None, None)
        joined.is_lazy = all(part.is_lazy for part in parts.values())
        joined._stored = {
            f"{place}/{name}": stored
            for place, part in parts.items()
            for name, stored in part._stored.items()
        }
        joined.tensors = {name: stored.info for name, stored in joined._stored.items()}
        joined._files = [file for part in parts.values() for file in part._files]
        joined.ties = _ties(joined._stored)
        return joined

    @property
    def paths(self) -> list[Path]:
        """The files, or the folder, that it was opened from."""
        return [part.path for part in self.parts.values()] or [self.path]

    def read(self, name: str) -> Tensor:
        """The whole tensor, in its own dtype, in memory of its own."""
        info = self._find(name).info
        return self.read_slice(name, 0, info.numel).view(info.shape)

    def read_slice(self, name: str, start: int, stop: int) -> Tensor:
        """Elements ``[start, stop)`` of the flattened tensor, 1-D, in its own dtype; nothing else is read."""
        info = self._find(name).info
        if not 0 <= start <= stop <= info.numel:
            raise OptionError(f"[{start}, {stop}) is not inside the {info.numel} elements of {name!r}")
        out = torch.empty(stop - start, dtype=info.dtype)
        self.read_into(name, start, out)
        return out

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Fill the contiguous 1-D ``out`` with elements from ``start`` on, in the tensor's own dtype.

        May be called from several threads. Raises ``CheckpointError`` if the file cannot be read to that place.
        """
        stored = self._find(name)
        fits = out.ndim == 1 and out.is_contiguous() and out.dtype == stored.info.dtype
        if not fits or not 0 <= start <= start + out.numel() <= stored.info.numel:
            raise OptionError(
                f"a buffer of shape {tuple(out.shape)} and {out.dtype} cannot take elements from {start} on "
                f"of {name!r}, {stored.info}"
            )
        stored.read_into(start, out)

    def location(self, name: str) -> Location | None:
        """The file and byte offset where the tensor lies row-major, little-endian and plain, or None."""
        return self._find(name).location

    def widen(self, dtypes: Mapping[str, torch.dtype]) -> None:
        """Read the tensors of these names in wider dtypes from now on."""
        stored: dict[int, StoredTensor] = {}
        for name, dtype in dtypes.items():
            one = self._stored.get(name)
            if one is not None and one.info.dtype != dtype:
                # Tied names stay one.
                self._stored[name] = stored.setdefault(id(one), ConvertedTensor(one, dtype))
                self.tensors[name] = self._stored[name].info

    def take_in(self, names: Iterable[str], other: Checkpoint) -> None:
        """Read the tensors of these names, which it lacks, from ``other`` from now on."""
        self._stored |= {name: other._find(name) for name in names}
        self.tensors |= {name: self._stored[name].info for name in names}
        self.ties = _ties(self._stored)

    def close(self) -> None:
        """Let go of its open files. Reading afterwards opens them again."""
        for file in self._files:
            file.close()

    def _find(self, name: str) -> StoredTensor:
        if name not in self._stored:
            raise StructureError(
                f"{self.path} has no tensor {name!r}; it has {name_list(list(self._stored))}"
            )
        return self._stored[name]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, format={self.format!r}, tensors={len(self.tensors)})"


def _refuse_empty(path: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """Refuse what DeepSpeed ZeRO-3 leaves where the weights were: tensors without a value, in their place."""
    empty = [name for name, info in tensors.items() if info.shape == (0,)]
    if len(tensors) > 1 and 2 * len(empty) > len(tensors):
        raise CheckpointError(
            f"{path} holds empty tensors in place of weights ({name_list(empty)}), as DeepSpeed ZeRO-3 leaves them: "
            "gather the weights first, with the zero_to_fp32.py that it puts beside its checkpoints"
        )


def _ties(tensors: dict[str, StoredTensor]) -> dict[str, str]:
    first_names: dict[int, str] = {}
    ties = {}
    for name, stored in tensors.items():
        first = first_names.setdefault(id(stored), name)
        if first != name:
            ties[name] = first
    return ties


def _text_step(metadata: dict[str, str]) -> tuple[int, str] | tuple[None, None]:
    for key in STEP_KEYS:
        text = metadata.get(key, "")
        if text.isdecimal() and len(text) < 19:
            return int(text), key
    return None, None


# The verbs.


@checked
def open(path: str | PathLike[str], key: str | None = None, *, allow: Sequence[str] = ()) -> Checkpoint:
    """Open a checkpoint without reading its tensors.

    Args:
        path: a file or folder; its contents, not its name, say what it is.
        key: the nested key to take the weights from, such as ``"state_dict_ema"``; by default the best known.
        allow: full names of classes, such as ``"my.module.Config"``, that a torch file may hold objects of beside
            the weights. They are read as data that does nothing: no class is imported, and no code is run.

    Raises ``CheckpointError`` for anything that is no whole, safe checkpoint, ``OptionError`` for a key that is
    not there (the message lists those that are), or for names in ``allow`` that are no full ones.
    """
    path = Path(path)
    if isinstance(allow, str) or not all("." in name for name in allow):
        raise OptionError(f"allow is a list of full names, such as ['my.module.Config'], and not {allow!r}")
    format = FORMATS[recognise(path)].allowing(allow)
    return Checkpoint(path, format.name, format.read(path), key)


@checked
def create(
    path: str | PathLike[str], layout: Layout, *, format: str | None = None, overwrite: bool = False
) -> Writer:
    """Begin a checkpoint whose values come later, slice by slice; use it as a context manager.

    Args:
        path: the output; its folder must exist.
        layout: names, shapes, dtypes, ties and metadata.
        format: the name of one; by default the one that its suffix asks for.
        overwrite: replace an output that is there.

    Raises ``OutputExistsError``, ``StructureError`` for dtypes that the format cannot hold, ``CheckpointError``
    if nothing can be written there.

    >>> import tempfile, torch
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = Path(folder.name) / "out.pt"
    >>> with create(path, Layout({"w": TensorInfo((4,), torch.float32)})) as writer:
    ...     writer.write("w", 2, torch.tensor([2.0, 3.0]))
    ...     writer.write("w", 0, torch.tensor([0.0, 1.0]))
    >>> torch.load(path)["w"]
    tensor([0., 1., 2., 3.])
    >>> folder.cleanup()
    """
    path = Path(path)
    return FORMATS[format_for(path, format)].writer(path, layout, overwrite)


@checked
def write(
    path: str | PathLike[str],
    tensors: Mapping[str, Tensor],
    *,
    format: str | None = None,
    ties: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a flat dict of tensors.

    Args:
        path: the output, as for ``create``.
        tensors: name to dense tensor, on any device.
        ties: further name to name in ``tensors``; names that share the same memory are found without it.
        format: as for ``create``.
        metadata: text entries.
        overwrite: as for ``create``.

    Raises as ``create``; ``StructureError`` also for sparse and meta tensors and for what is none.
    """
    layout = layout_of(tensors, path, ties=ties, metadata=metadata)
    with create(path, layout, format=format, overwrite=overwrite) as writer:
        writer.fill(tensors)


def layout_of(
    tensors: Mapping[str, Tensor],
    path: str | PathLike[str],
    *,
    ties: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Layout:
    """How ``write`` lays these out; raises ``StructureError`` for sparse and meta tensors and for what is none."""
    _refuse_unwritable(tensors, path)
    shared = _shared(tensors)
    infos = {name: TensorInfo.of(tensor) for name, tensor in tensors.items() if name not in shared}
    return Layout(infos, {**shared, **(ties or {})}, metadata or {})


def _refuse_unwritable(tensors: Mapping[str, Tensor], path: str | PathLike[str]) -> None:
    others = [name for name, value in tensors.items() if not isinstance(value, Tensor)]
    if others:
        raise StructureError(f"{path}: {name_list(others)} are no tensors: leave them out")
    unwritable = [
        name for name, tensor in tensors.items() if tensor.is_meta or tensor.layout != torch.strided
    ]
    if unwritable:
        raise StructureError(
            f"{path}: {name_list(unwritable)} are sparse or on the meta device: make them dense"
        )


@checked
def write_sharded(
    path: str | PathLike[str],
    tensors: Mapping[str, Tensor],
    *,
    ties: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write DTensors from all ranks, each its own shards, without gathering; a collective call of all ranks.

    A name with the suffix of a format becomes one such file, which the first rank lays out and every rank writes its
    own elements into: all must share its folder. Any other becomes a folder of ``torch.distributed.checkpoint``, in
    which ties are names like any other, and which has no metadata.

    Args:
        path: the output.
        tensors: name to DTensor, or to a plain tensor that is the same on all ranks.
        ties: as for ``write``.
        metadata: as for ``write``.
        overwrite: as for ``create``.

    Raises ``OutputExistsError``; ``OptionError`` for a format that several processes cannot write; ``StructureError``
    where ranks hold other tensors than each other, or parts whose place in the whole cannot be told, for sparse and
    meta tensors and for what is none; ``PolyakError`` where another rank failed. All ranks raise, and nothing is left
    behind.
    """
    path, ties, group = Path(path), dict(ties or {}), RankGroup.of_all()
    if any(group.gather(path.exists())) and not overwrite:
        raise OutputExistsError(f"{path} exists already: name another output, or pass overwrite=True")
    is_folder = not path.suffix or not any(path.suffix in format.suffixes for format in FORMATS.values())
    with group.all_or_none(f"writing {path}"):
        _refuse_unwritable(tensors, path)
        if not is_folder:
            refuse_unplaced(tensors)
        layout = Layout({name: TensorInfo.of(t) for name, t in tensors.items()}, ties, metadata or {})
    if is_folder:
        tied = {further: tensors[name] for further, name in ties.items()}
        _dcp.write_folder(path, {**tensors, **tied}, group, overwrite)
        return
    if any(other != layout.tensors for other in group.gather(layout.tensors)):
        raise StructureError(
            f"{path}: ranks hold different tensors, as the stages of a pipeline do, which one file does not take "
            "together: name a folder"
        )
    with written_together(group, path, layout, lambda _: create(path, layout, overwrite=overwrite)) as writer:
        for name, whole in tensors.items():
            (part,) = local([whole])
            for start, values in shard_runs(on_host(part).view(part.shape), whole, group.is_first):
                writer.write(name, start, values)


def _shared(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Names of tensors that lie where an earlier one does, with its name."""
    first_names: dict[tuple, str] = {}
    shared = {}
    for name, tensor in tensors.items():
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        first = first_names.setdefault(place, name) if tensor.numel() else name
        if first != name:
            shared[name] = first
    return shared
