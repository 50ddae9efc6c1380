"""What every format speaks: tensors that lie in files, the contents of a checkpoint, its writer, the format itself."""

from __future__ import annotations

import json
import math
import mmap
import os
import tempfile
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from polyak._distributed import RankGroup
from polyak.checkpoints import _io
from polyak.checkpoints._io import O_BINARY, SIDECAR, AtomicOutput, DataFile, Observer, write_all, writing
from polyak.errors import CheckpointError, OptionError, StructureError

__all__ = [
    "FORMATS",
    "SIDECAR",
    "Contents",
    "ConvertedTensor",
    "Envelope",
    "Format",
    "Layout",
    "LoadedTensor",
    "Location",
    "NoWeightsError",
    "SpooledWriter",
    "StoredTensor",
    "StridedRegion",
    "TensorInfo",
    "Writer",
    "byte_view",
    "contiguous_stride",
    "is_shape",
    "on_host",
    "read_sidecar",
    "sidecar_text",
    "written_together",
]

# Tensors that have not been read.


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor that has not been read.

    >>> info = TensorInfo((2, 3), torch.bfloat16)
    >>> info.numel, info.nbytes
    (6, 12)
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        """What a checkpoint will hold of ``tensor``."""
        return cls(tuple(tensor.shape), tensor.dtype)

    def __str__(self) -> str:
        return f"{self.shape} {self.dtype}"

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of a contiguous copy."""
        return self.numel * self.dtype.itemsize


class Location(NamedTuple):
    """Where the contiguous little-endian bytes of a tensor begin: a file, and an offset in bytes."""

    path: Path
    offset: int


class StoredTensor(ABC):
    """One tensor inside a checkpoint; reading it touches only the elements asked for.

    Two names that hold the same ``StoredTensor`` object are tied.
    """

    info: TensorInfo

    @abstractmethod
    def read_into(self, start: int, out: Tensor) -> None:
        """Fill the 1-D ``out`` with the elements ``[start, start + out.numel())`` in row-major order.

        ``out`` has the tensor's own dtype and is contiguous; the range is inside the tensor.
        """

    @property
    def location(self) -> Location | None:
        """Where the plain bytes lie, or None if they are packed, strided or in several pieces."""
        return None


class LoadedTensor(StoredTensor):
    """A tensor that its format could only give in memory."""

    def __init__(self, tensor: Tensor) -> None:
        self.info = TensorInfo.of(tensor)
        self._flat = tensor.reshape(-1)

    def read_into(self, start: int, out: Tensor) -> None:
        out.copy_(self._flat[start : start + out.numel()])


class ConvertedTensor(StoredTensor):
    """A tensor that is read in another dtype than it has."""

    def __init__(self, stored: StoredTensor, dtype: torch.dtype) -> None:
        self.info = TensorInfo(stored.info.shape, dtype)
        self._stored = stored

    def read_into(self, start: int, out: Tensor) -> None:
        own = torch.empty(out.numel(), dtype=self._stored.info.dtype)
        self._stored.read_into(start, own)
        out.copy_(own)


# What torch counts elements and strides in.
_MOST_ELEMENTS = (1 << 63) - 1


def is_shape(sizes: Iterable[object]) -> bool:
    """Whether torch can have a tensor of these sizes; it counts strides also where one of them is 0.

    >>> is_shape((2, 0)), is_shape((2, -1)), is_shape((0, 1 << 40, 1 << 40))
    (True, False, False)
    """
    count = 1
    for size in sizes:
        if type(size) is not int or not 0 <= size <= _MOST_ELEMENTS:
            return False
        count *= size or 1
        if count > _MOST_ELEMENTS:
            return False
    return True


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides, in elements.

    >>> contiguous_stride((2, 3, 4))
    (12, 4, 1)
    """
    stride = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        stride[axis] = stride[axis + 1] * shape[axis + 1]
    return tuple(stride)


class Region(Protocol):
    """A file, or a part of one: ``size`` bytes, of which the first is at ``start`` of ``file``."""

    @property
    def file(self) -> DataFile: ...
    @property
    def start(self) -> int: ...
    @property
    def size(self) -> int: ...
    def read_into(self, offset: int, buffer: memoryview) -> None: ...
    def mapped(self) -> mmap.mmap | memoryview: ...


class StridedRegion(StoredTensor):
    """A dense tensor with any strides in a file.

    Args:
        region: the file, or the part of it that the tensor lies in.
        offset: where element (0, …, 0) lies in that, in bytes.
        info: shape and dtype.
        stride: in elements; row-major if left out.

    Raises ``CheckpointError`` if the tensor would reach beyond the region.
    """

    def __init__(
        self, region: Region, offset: int, info: TensorInfo, stride: tuple[int, ...] | None = None
    ) -> None:
        self.info = info
        self._region, self._offset = region, offset
        row_major = contiguous_stride(info.shape)
        self._stride = row_major if stride is None else stride
        self._contiguous = self._stride == row_major or all(
            ours == wanted
            for ours, wanted, size in zip(self._stride, row_major, info.shape, strict=True)
            if size > 1
        )
        self._check()

    def _check(self) -> None:
        shape, stride, nbytes = self.info.shape, self._stride, self.info.nbytes
        if min((*shape, *stride, self._offset), default=0) < 0:
            raise CheckpointError(f"{self._region.file.path} is corrupt: a tensor of shape {list(shape)}")
        if nbytes == 0:
            return
        span_nbytes = nbytes
        if not self._contiguous:
            last = sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
            span_nbytes = (last + 1) * self.info.dtype.itemsize
        # A tensor expanded by zero strides could claim any size; real ones are no larger than their file.
        if self._offset + span_nbytes > self._region.size or nbytes > self._region.file.size:
            raise CheckpointError(
                f"{self._region.file.path} is truncated or corrupt: a tensor of shape {list(shape)} "
                f"reaches beyond its data"
            )

    @property
    def location(self) -> Location | None:
        if not self._contiguous:
            return None
        return Location(self._region.file.path, self._region.start + self._offset)

    def read_into(self, start: int, out: Tensor) -> None:
        if self._contiguous:
            self._region.read_into(self._offset + start * out.element_size(), byte_view(out))
        elif out.numel():
            self._gather(start, byte_view(out))

    def _gather(self, start: int, buffer: memoryview) -> None:
        width = self.info.dtype.itemsize
        # Elements are moved as opaque bytes: NumPy's flat iterator walks any strides without a copy of the rest.
        view = np.ndarray(
            self.info.shape,
            dtype=f"V{width}",
            buffer=self._region.mapped(),
            offset=self._offset,
            strides=tuple(step * width for step in self._stride),
        )
        count = len(buffer) // width
        buffer[:] = memoryview(view.flat[start : start + count].tobytes())


def byte_view(flat: Tensor) -> memoryview:
    """The memory of a contiguous 1-D CPU tensor as writable bytes, in any dtype.

    >>> byte_view(torch.ones(2, dtype=torch.bfloat16)).tobytes().hex()
    '803f803f'
    """
    # NumPy knows neither bfloat16 nor the 8-bit floats, but every dtype can be seen as bytes.
    return flat.detach().view(torch.uint8).numpy().data


# What is found in a checkpoint.


class NoWeightsError(CheckpointError):
    """A file that is whole and holds no weights, as that of an optimizer."""


@dataclass
class Contents:
    """What a format's reader found.

    Args:
        tree: names to tensors, nested trees, lists of them, and plain values.
        metadata: text entries beside the tensors.
        is_lazy: whether the tensors are still in the file.
        stored: turns a leaf that is a tensor into a ``StoredTensor``.
        leaf_types: the classes of leaves that are tensors.
        files: those that the tensors are read from; they are closed with the checkpoint.
        exact: whether ``tree`` is a model's own names to its tensors, of which nothing is to be chosen or renamed.
    """

    tree: Mapping[Any, Any]
    metadata: dict[str, str] = field(default_factory=dict)
    is_lazy: bool = True
    stored: Callable[[Any], StoredTensor] = lambda leaf: leaf
    leaf_types: tuple[type, ...] = (StoredTensor, Tensor)
    files: Sequence[DataFile] = ()
    exact: bool = False


# What is written: slices of tensors whose layout is known beforehand, then all or nothing.

_ALIGNMENT = 64


@dataclass(frozen=True)
class Envelope:
    """What lies around the weights in a nested torch file.

    Args:
        place: the keys that lead to the weights.
        entries: the tree around them, of plain values, without the weights.
        names: name in the layout to the keys in the file, below ``place``: one, or several where dicts nest.
    """

    place: tuple[Any, ...]
    entries: Mapping[Any, Any]
    names: Mapping[str, tuple[Any, ...]]

    def around(self, tensors: Mapping[str, Tensor]) -> dict[Any, Any]:
        """The whole tree, with ``tensors`` at their place.

        >>> around = Envelope(("a", "b"), {"a": {"seed": 1}}, {"w": ("module.w",)}).around({"w": torch.ones(1)})
        >>> around["a"]["seed"], around["a"]["b"]["module.w"]
        (1, tensor([1.]))
        """
        tree = node = dict(self.entries)
        for key in self.place[:-1]:
            node[key] = dict(node.get(key, {}))
            node = node[key]
        weights = node[self.place[-1]] = OrderedDict()
        for name, tensor in tensors.items():
            *keys, last = self.names[name]
            below = weights
            for key in keys:
                below = below.setdefault(key, OrderedDict())
            below[last] = tensor
        return tree


@dataclass(frozen=True)
class Layout:
    """What will be written, known before the first value is.

    Args:
        tensors: name to shape and dtype, each tied tensor under one name only.
        ties: further name to the name in ``tensors`` that holds its values.
        metadata: free text entries.
        beside: name to small file, or to its content, that a folder of a Hugging Face library also gets.
        envelope: what a torch file holds around the weights, where they are nested.
        stem: the name of the weights' file in such a folder, without its suffix; by default that of transformers.

    Raises ``StructureError`` if a tie leads nowhere, ``OptionError`` if metadata is not text.
    """

    tensors: Mapping[str, TensorInfo]
    ties: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    beside: Mapping[str, Path | bytes] = field(default_factory=dict)
    envelope: Envelope | None = None
    stem: str | None = None

    def __post_init__(self) -> None:
        for tied, name in self.ties.items():
            if name not in self.tensors or tied in self.tensors:
                raise StructureError(
                    f"{tied!r} cannot be tied to {name!r}: one must be written and the other not"
                )
        for name in (*self.tensors, *self.ties):
            if "\0" in name or name != name.encode("utf-8", "replace").decode():
                raise StructureError(
                    f"a tensor cannot be named {name!r}: files take names of Unicode without a null"
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
        """The same for a slice that fits: the outermost writer has looked."""

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


# One file that several ranks write, each its own slices.


@contextmanager
def written_together(
    group: RankGroup,
    output: Path,
    layout: Layout,
    create: Callable[[Observer | None], Writer],
    observe: Observer | None = None,
) -> Iterator[Writer]:
    """A writer on each rank; the first rank lays the file out, and commits it when all have written and synced.

    The body holds no collective call. If it fails on one rank, it fails on all and nothing is left behind.

    Args:
        group: the ranks, whose folder of ``output`` must be the same.
        output: the file.
        layout: what is written, the same on all ranks.
        create: makes the whole file's writer, with ``observe``; called on the first rank.
        observe: called with the offset and the bytes of all that this rank writes.

    Raises:
        OptionError: a format whose bytes have no place before all are known, for more ranks than one.
        PolyakError: on the ranks that did not fail, or if one was lost.
    """
    whole: Writer | None = None

    def lay_out() -> dict[str, Location]:
        nonlocal whole
        whole = create(observe)
        return _locations(whole, output) if group.size > 1 else {}

    try:
        locations = group.first(lay_out)
        with group.all_or_none(f"writing {output}"):
            if whole is not None:
                yield whole
            else:
                with _PartWriter(layout, locations, output, observe) as part:
                    yield part
        with group.all_or_none(f"committing {output}"):
            if whole is not None:
                whole.commit()
    finally:
        if whole is not None:
            whole.abort()


def _locations(writer: Writer, output: Path) -> dict[str, Location]:
    found = {name: writer.location(name) for name in writer.layout.tensors}
    known = {name: location for name, location in found.items() if location is not None}
    if len(known) < len(found):
        raise OptionError(
            f"{output} is of a format that only one process can write: write .safetensors, which several can, or "
            "start one process"
        )
    return known


class _PartWriter(Writer):
    """Writes into files that another rank has laid out."""

    def __init__(
        self, layout: Layout, locations: Mapping[str, Location], output: Path, observe: Observer | None
    ) -> None:
        super().__init__(layout)
        self._locations, self._output, self._observe = locations, output, observe
        self._numbers: dict[Path, int] = {}
        for path in {location.path for location in locations.values()}:
            try:
                self._numbers[path] = os.open(path, os.O_WRONLY | O_BINARY)
            except OSError as error:
                self.abort()
                raise CheckpointError(
                    f"{path}, which the first rank has made, cannot be opened on another ({error.strerror}): all ranks "
                    "must share the folder of the output"
                ) from error

    def _write(self, name: str, start: int, values: Tensor) -> None:
        path, begin = self._locations[name]
        data, offset = byte_view(values), begin + start * values.element_size()
        with writing(self._output):
            write_all(self._numbers[path], data, offset, uncached=True)
        if self._observe is not None:
            self._observe(offset, data)

    def location(self, name: str) -> Location:
        return self._locations[name]

    def commit(self) -> None:
        """Sync what this rank has written; the file gets its name from the rank that laid it out."""
        with writing(self._output):
            for number in self._numbers.values():
                os.fsync(number)
        self.abort()

    def abort(self) -> None:
        """Close the files; removing them is up to the rank that laid them out."""
        while self._numbers:
            os.close(self._numbers.popitem()[1])


# A format, and all that there are.

# By name, in the order in which they are asked whether a path is theirs.
FORMATS: dict[str, Format] = {}


class Format(ABC):
    """One way to keep tensors in a file or a folder. A subclass with a name is known from its definition on.

    Attributes:
        name: what ``format=`` and ``Checkpoint.format`` call it.
        looks: what a path of this format is, in words.
        suffixes: those that ask for it when a path is written; the empty one is a path without any.
        own_files: patterns of the files that its writer puts into a folder.
    """

    name: ClassVar[str]
    looks: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]] = ()
    own_files: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        if "name" in vars(cls):
            FORMATS[cls.name] = cls()
            _io.OWN_FILES.update(cls.own_files)

    @abstractmethod
    def recognises(self, path: Path, start: bytes) -> bool:
        """Whether ``path`` is of this format; ``start`` are its first bytes, none for a folder."""

    @abstractmethod
    def read(self, path: Path) -> Contents:
        """What is there, the tensors left unread. Raises ``CheckpointError`` for what is damaged or unsafe."""

    def allowing(self, names: Sequence[str]) -> Format:
        """The format that reads objects of classes with these full names as plain data: itself, if it has none."""
        return self

    @abstractmethod
    def writer(self, path: Path, layout: Layout, overwrite: bool) -> Writer:
        """A writer that is begun. Raises as ``polyak.checkpoints.create``."""
