"""``.safetensors``: a JSON header and plain bytes, so that any part is read and written at a known offset.

The header is ``{name: {dtype, shape, data_offsets}, "__metadata__": {str: str}}``. Tied tensors follow the
convention of ``safetensors.torch.save_model``: stored once, with ``{tied name: stored name}`` in the metadata.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyak.checkpoints import _base
from polyak.checkpoints._base import Contents, Format, Layout, StoredTensor, TensorInfo
from polyak.checkpoints._io import AtomicOutput, DataFile, Observer
from polyak.errors import CheckpointError, StructureError, name_list, shown

# https://huggingface.co/docs/safetensors: 8 bytes of little-endian header length, at most 100 MB of header.
_LENGTH = struct.Struct("<Q")
_MAX_HEADER_BYTES = 100_000_000
_METADATA = "__metadata__"
_FRAMEWORK = "format"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class SafetensorsFormat(Format):
    """Tensors under their names, and text."""

    name = "safetensors"
    looks = "a safetensors file"
    suffixes = (".safetensors",)

    def recognises(self, path: Path, start: bytes) -> bool:
        return bool(start) and (path.suffix == ".safetensors" or start[8:9] == b"{")

    def read(self, path: Path) -> Contents:
        return read_file(DataFile(path))

    def writer(self, path: Path, layout: Layout, overwrite: bool) -> SafetensorsWriter:
        return SafetensorsWriter(path, layout, overwrite)


def read_file(file: DataFile) -> Contents:
    """The tensors of a safetensors file that is open, none of them read.

    Raises ``CheckpointError`` if the header is not what the format allows: every byte must belong to just one
    tensor.
    """
    path = file.path
    header, data_start = _header(file)
    metadata = header.pop(_METADATA, {})
    if not _is_text_map(metadata):
        raise CheckpointError(f"{path} is corrupt: its metadata must be text")
    spans = {name: _span(path, name, entry) for name, entry in header.items()}
    _check_coverage(path, spans, file.size - data_start)
    tree: dict[str, StoredTensor] = {
        name: _base.StridedRegion(file, data_start + begin, info) for name, (info, begin, _) in spans.items()
    }
    ties = {tied: name for tied, name in metadata.items() if name in tree and tied not in {_FRAMEWORK, *tree}}
    tree.update({tied: tree[name] for tied, name in ties.items()})
    return Contents(tree, {name: text for name, text in metadata.items() if name not in ties}, files=(file,))


def _header(file: DataFile) -> tuple[dict[str, Any], int]:
    if file.size < _LENGTH.size:
        raise CheckpointError(f"{file.path} is truncated: {file.size} bytes are no safetensors file")
    (nbytes,) = _LENGTH.unpack(file.read(0, _LENGTH.size))
    if nbytes > _MAX_HEADER_BYTES or _LENGTH.size + nbytes > file.size:
        raise CheckpointError(
            f"{file.path} is truncated or no safetensors file: it claims a header of {nbytes:,} bytes "
            f"in a file of {file.size:,}"
        )
    try:
        header = json.loads(file.read(_LENGTH.size, nbytes), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file.path} has a damaged safetensors header ({error})") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file.path} has a damaged safetensors header (not a JSON object)")
    return header, _LENGTH.size + nbytes


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{max(names, key=names.count)!r} stands there twice")
    return entries


def _is_text_map(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _is_sizes(value: object) -> bool:
    return isinstance(value, list) and _base.is_shape(value)


def _span(path: Path, name: str, entry: Any) -> tuple[TensorInfo, int, int]:
    problem = None
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        problem = "its entry must have dtype, shape and data_offsets"
    elif not isinstance(entry["dtype"], str):
        problem = f"dtype {shown(entry['dtype'])} is not one that torch can hold"
    elif not _is_sizes(entry["shape"]):
        problem = f"shape {shown(entry['shape'])} is impossible"
    elif not _is_sizes(entry["data_offsets"]) or len(entry["data_offsets"]) != 2:
        problem = f"data_offsets {shown(entry['data_offsets'])} are impossible"
    if problem is not None:
        raise CheckpointError(f"{path} has a damaged safetensors header: tensor {name!r}: {problem}")
    if entry["dtype"] not in _DTYPES:
        raise CheckpointError(
            f"{path}: tensor {name!r}: dtype {shown(entry['dtype'])} is not one that torch can hold; "
            f"dequantise it first, with the tool that wrote it"
        )
    info = TensorInfo(tuple(entry["shape"]), _DTYPES[entry["dtype"]])
    begin, end = entry["data_offsets"]
    if end - begin != info.nbytes:
        raise CheckpointError(
            f"{path} is corrupt: tensor {name!r} of shape {list(info.shape)} needs {info.nbytes:,} bytes "
            f"and has {end - begin:,}"
        )
    return info, begin, end


def _check_coverage(path: Path, spans: dict[str, tuple[TensorInfo, int, int]], data_nbytes: int) -> None:
    position = 0
    for name, (_, begin, end) in sorted(spans.items(), key=lambda item: item[1][1:]):
        if begin != position:
            problem = "overlaps the one before" if begin < position else "leaves a hole before it"
            raise CheckpointError(f"{path} is corrupt: tensor {name!r} {problem}")
        position = end
    if position != data_nbytes:
        problem = "truncated" if position > data_nbytes else "corrupt"
        raise CheckpointError(
            f"{path} is {problem}: its tensors take {position:,} bytes and {data_nbytes:,} are there"
        )


class SafetensorsWriter(_base.Writer):
    """Writes slices at their places in the file; any process may do so at ``location``.

    ``observe`` is called with the offset and the bytes of all that is written here.
    """

    def __init__(
        self, path: Path, layout: Layout, overwrite: bool = False, observe: Observer | None = None
    ) -> None:
        super().__init__(layout)
        header, self._offsets = _laid_out(path, layout)
        self._output = AtomicOutput(path, overwrite)
        nbytes = len(header) + sum(info.nbytes for info in layout.tensors.values())
        self._file = self._output.create_file(nbytes, observe)
        try:
            self._file.write(0, memoryview(header))
        except BaseException:
            self.abort()
            raise

    def _write(self, name: str, start: int, values: Tensor) -> None:
        self._file.write(self._offsets[name] + start * values.element_size(), _base.byte_view(values))

    def location(self, name: str) -> _base.Location:
        return _base.Location(self._file.path, self._offsets[name])

    def commit(self) -> None:
        self._file.close()
        self._output.commit()

    def abort(self) -> None:
        self._file.close()
        self._output.abort()


def _laid_out(path: Path, layout: Layout) -> tuple[bytes, dict[str, int]]:
    """The header, and each tensor's offset in the file: widest dtypes first, so that all are aligned."""
    unknown = [name for name, info in layout.tensors.items() if info.dtype not in _NAMES]
    if unknown:
        dtypes = sorted({str(layout.tensors[name].dtype) for name in unknown})
        raise StructureError(f"{path}: safetensors cannot hold {', '.join(dtypes)}; write a .pt file instead")
    misleading = [
        key for key, text in layout.metadata.items() if text in layout.tensors and key != _FRAMEWORK
    ]
    if misleading:
        raise StructureError(
            f"{path}: the metadata {name_list(misleading)} would read as tied tensors, being names of tensors; "
            f"word them differently"
        )
    # transformers refuses files that do not say which framework they are for.
    entries: dict[str, Any] = {_METADATA: {_FRAMEWORK: "pt"} | dict(layout.metadata) | dict(layout.ties)}
    begins, position = {}, 0
    for name in sorted(layout.tensors, key=lambda name: -layout.tensors[name].dtype.itemsize):
        info = layout.tensors[name]
        begins[name] = position
        entries[name] = {
            "dtype": _NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [position, position + info.nbytes],
        }
        position += info.nbytes
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data_start = _LENGTH.size + len(text)
    return _LENGTH.pack(len(text)) + text, {name: data_start + begin for name, begin in begins.items()}
