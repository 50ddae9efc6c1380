"""Everything that reads files or saved states, as functions of bytes: what ``fuzz.py`` and ``test_readers.py`` feed.

A reader is given bytes that anybody may have written. It returns where they were read, having compared what it got
with an oracle, or raises PolyakError.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

import polyak
from damaged_files import NESTED, TENSORS, WRITERS
from polyak import checkpoints
from polyak.errors import PolyakError
from polyak.profiles._base import _REGISTRY
from torture.calls import Setting
from torture.damage import in_legacy, in_npz, places_of, read_all, reference, same_values
from torture.harness import near, small_model, walk

__all__ = ["CONFIGS", "CORPUS", "READERS", "Reader", "corpus", "read"]

CORPUS = Path(__file__).parent / "corpus"
READERS: dict[str, Reader] = {}
# Files of libraries that lie beside the weights.
CONFIGS = ("config.json", "trainer_state.json", "adapter_config.json")


@dataclass(frozen=True)
class Reader:
    """What reads bytes.

    Args:
        prepare: makes what lies around them, in an empty folder; what it returns is given to ``take``.
        take: reads the bytes there, any number of times.
        seeds: right inputs to begin with, and hostile ones that no chance comes upon.
    """

    prepare: Callable[[Path], Any]
    take: Callable[[bytes, Path, Any], None]
    seeds: Callable[[], dict[str, bytes]]


def read(name: str, folder: Path) -> Callable[[bytes], bool]:
    """A function that gives bytes to a reader that was prepared in ``folder``: whether they were read."""
    reader = READERS[name]
    around = reader.prepare(folder)

    def take(data: bytes) -> bool:
        try:
            reader.take(data, folder, around)
        except PolyakError as error:
            assert str(error), "a refusal without words"
            return False
        return True

    return take


def corpus(name: str) -> dict[str, bytes]:
    """The inputs that are kept for a reader: its seeds, and what fuzzing found."""
    return {path.name: path.read_bytes() for path in sorted((CORPUS / name.replace(" ", "-")).iterdir())}


# Checkpoints of one file.


def _written(write: Callable[[Path], object]) -> bytes:
    """What ``write`` writes to a path."""
    with TemporaryDirectory() as folder:
        write(path := Path(folder) / "x")
        return path.read_bytes()


def _nothing(folder: Path) -> None:
    return None


def _as_the_library(path: Path) -> None:
    """Read a file whole; what its format's own library has at the same place, by the same name, is the same."""
    with checkpoints.open(path) as opened:
        found = {name: opened.read(name) for name in opened.tensors}
        place = opened.key
    theirs = (reference(path) or {}) if place in (None, "state_dict") else {}
    for name in found.keys() & theirs.keys():
        if found[name].dtype != theirs[name].dtype:
            continue  # torch gives a storage the dtype that is said of it first, where a damaged pickle says two
        assert same_values({name: found[name]}, {name: theirs[name]}), (
            f"{name!r} is {found[name]}, and for the library {theirs[name]}"
        )


def _file(put: Callable[[Path, bytes], object], data: bytes, folder: Path, around: None) -> None:
    put(folder / "x", data)
    _as_the_library(folder / "x")


def _header(header: Any, body: bytes = bytes(64)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def _f32(shape: list[int], nbytes: int) -> dict[str, Any]:
    return {"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, nbytes]}}


def _safetensors() -> dict[str, bytes]:
    return {
        "plain": _written(
            partial(checkpoints.write, tensors=TENSORS, format="safetensors", metadata={"step": "3"})
        ),
        "huge-header": (1 << 60).to_bytes(8, "little") + b"{}",
        "huge-tensor": _header(_f32([1 << 30, 1 << 30], 1 << 62)),
        "overflow": _header(_f32([1 << 32, 1 << 32], 0)),
        "deep": _header(b"[" * 2000),
        "twice": _header(b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"w":1}'),
        "hole": _header(_f32([1], 4), bytes(8)),
        "no-elements": _header(_f32([0, 1 << 62], 0), b""),
        "no-elements-overflow": _header(_f32([0, 1 << 80], 0), b""),
    }


def _headers() -> dict[str, bytes]:
    """What lies in a file of safetensors between the length and the values."""
    return {
        name: data[8 : 8 + int.from_bytes(data[:8], "little")]
        for name, data in _safetensors().items()
        if name != "huge-header"
    }


def _pickles() -> dict[str, bytes]:
    """What lies in a torch archive as ``data.pkl``."""
    with zipfile.ZipFile(io.BytesIO(_nested())) as archive:
        plain = next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    return {
        "plain": plain,
        "deep-tuples": b"\x80\x02" + b"(" * 3000 + b"t" * 3000 + b".",
        "deep-lists": b"\x80\x02" + b"]" * 3000 + b"a" * 2999 + b".",
        "doubling": b"\x80\x02]" + b"".join(b"q%c(h%ch%ce" % (n, n, n) for n in range(12)) + b".",
        "huge-text": b"\x80\x04\x8d" + (1 << 60).to_bytes(8, "little") + b"x.",
        "huge-bytes": b"\x80\x02T" + (1 << 30).to_bytes(4, "little") + b"x.",
        "huge-number": b"\x80\x02\x8b" + (1 << 30).to_bytes(4, "little") + b"x.",
        "huge-memo": b"\x80\x02}r\xff\xff\xff\x7f.",
        "long-text-number": b"I" + b"9" * 5000 + b"\n.",
        # Of more digits than Python writes, and of more levels.
        "endless-number": b"\x80\x02}X\x04\0\0\0step%bs." % _ENDLESS,
        "endless-key": b"\x80\x02}%bK\x01s." % _ENDLESS,
        "deep-key": b"\x80\x02})" + b"\x85" * 3000 + b"K\x01s.",
        "endless-shape": b"\x80\x02}X\x01\0\0\0wctorch._utils\n_rebuild_sparse_tensor\n(%b\x85tRs."
        % _ENDLESS,
        "storage-a-list": _pickled_storage(b"]"),
        "storage-deep": _pickled_storage(b")" + b"\x85" * 3000),
        "storage-endless": _pickled_storage(_ENDLESS),
    }


_ENDLESS = b"\x8b" + (2000).to_bytes(4, "little") + b"\x7f" * 2000


def _pickled_storage(key: bytes) -> bytes:
    """A tensor of one element in a storage of this name."""
    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\n" + key + b"X\x03\0\0\0cpuK\x01tQ"
    return (
        b"\x80\x02}X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + b"K\0K\x01\x85K\x01\x85\x89}tRs."
    )


def _archive(path: Path, data: bytes) -> None:
    """A torch archive whose storages are there, with another pickle."""
    with zipfile.ZipFile(io.BytesIO(_nested())) as archive, zipfile.ZipFile(path, "w") as changed:
        for name in archive.namelist():
            changed.writestr(name, data if name.endswith("data.pkl") else archive.read(name))


@cache
def _nested() -> bytes:
    return _written(partial(torch.save, NESTED))


def _zip_bomb(name: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, bytes(1 << 24))
    return stream.getvalue()


def _pt() -> dict[str, bytes]:
    return {
        "plain": _written(partial(torch.save, TENSORS)),
        "nested": _nested(),
        "bomb": _zip_bomb("x/data.pkl"),
    }


def _legacy() -> dict[str, bytes]:
    old = {"_use_new_zipfile_serialization": False}
    return {
        "plain": _written(lambda path: torch.save(NESTED, path, **old)),
        "cut": b"\x80\x02\x8a\x0al\xfc\x9cF",
    } | {
        name: _written(partial(in_legacy, data=data)) for name, data in _pickles().items() if name != "plain"
    }


def _npz() -> dict[str, bytes]:
    return {
        "plain": _written(
            partial(checkpoints.write, tensors={"a": torch.ones(2), "n": torch.tensor(3)}, format="npz")
        ),
        "compressed": _written(WRITERS["compressed npz"]),
        "objects": _written(partial(in_npz, data=pickle.dumps([1]))),
        "bomb": _zip_bomb("w.npy"),
    }


def _npy(path: Path, data: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w.npy", data)


def _npy_header(header: str, body: bytes = bytes(8)) -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + body


def _npys() -> dict[str, bytes]:
    stream = io.BytesIO()
    np.save(stream, np.arange(6.0).reshape(2, 3))
    return {
        "plain": stream.getvalue(),
        "fortran": _npy_header("{'descr': '>f8', 'fortran_order': True, 'shape': (1,)}"),
        "huge": _npy_header("{'descr': '<f8', 'fortran_order': False, 'shape': (1152921504606846976,)}"),
        "deep": _npy_header("(" * 900),
        "no-elements": _npy_header(
            "{'descr': '<f8', 'fortran_order': True, 'shape': (0, 0x%s)}" % ("f" * 40), b""
        ),
        "endless": _npy_header("{'descr': '<f8', 'fortran_order': False, 'shape': (0x%s,)}" % ("f" * 4000)),
        "endless-kind": _npy_header("{'descr': 0x%s, 'fortran_order': True, 'shape': (1,)}" % ("f" * 4000)),
        "fields": _npy_header("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (2,)}"),
    }


READERS["safetensors"] = Reader(_nothing, partial(_file, Path.write_bytes), _safetensors)
READERS["safetensors header"] = Reader(
    _nothing, partial(_file, lambda path, data: path.write_bytes(_header(data, bytes(42)))), _headers
)
READERS["pt zip"] = Reader(_nothing, partial(_file, Path.write_bytes), _pt)
READERS["pt pickle"] = Reader(_nothing, partial(_file, _archive), _pickles)
READERS["legacy pt"] = Reader(_nothing, partial(_file, Path.write_bytes), _legacy)
READERS["npz"] = Reader(_nothing, partial(_file, Path.write_bytes), _npz)
READERS["npy"] = Reader(_nothing, partial(_file, _npy), _npys)


# One file of a folder: what is read is what was written, whatever the file says.


def _tensors_in(kind: str, folder: Path) -> dict[str, Tensor]:
    WRITERS[kind](folder / "x")
    return read_all(folder / "x")


def _no_other_values(file: str, data: bytes, folder: Path, wanted: dict[str, Tensor]) -> None:
    (folder / "x" / file).write_bytes(data)
    for name, tensor in read_all(folder / "x").items():
        assert name not in wanted or same_values({name: tensor}, {name: wanted[name]}), (
            f"other values of {name!r}"
        )


def _file_of(kind: str, file: str) -> bytes:
    with TemporaryDirectory() as folder:
        WRITERS[kind](Path(folder) / "x")
        return (Path(folder) / "x" / file).read_bytes()


_INDEX, _SIDECAR = "model.safetensors.index.json", "polyak.json"


def _metadata() -> dict[str, bytes]:
    hostile = {name: data for name, data in _pickles().items() if name != "plain"}
    return {"plain": _file_of("dcp", ".metadata")} | hostile


def _indices() -> dict[str, bytes]:
    return {
        "plain": _file_of("huggingface shards", _INDEX),
        "outside": b'{"weight_map": {"a": "../x"}}',
        "deep": b"[" * 2000,
    }


def _with_config(name: str, folder: Path) -> Path:
    """Two folders of one library, of which the second has the file that is fuzzed."""
    for number in (1, 2):
        (here := folder / f"step-{number}").mkdir()
        if name == "adapter_config.json":
            factors = {f"base_model.model.l.lora_{n}.weight": torch.ones(2, 2) for n in "AB"}
            checkpoints.write(here / "adapter_model.safetensors", factors)
        else:
            checkpoints.write(here / "model.safetensors", {"w": torch.ones(2)})
        (here / name).write_bytes(_configs(name)["plain"])
    return here / name


def _averaged_folders(data: bytes, folder: Path, config: Path) -> None:
    config.write_bytes(data)
    polyak.average_checkpoints([folder / "step-1", folder / "step-2"], folder / "out", overwrite=True)
    with checkpoints.open(folder / "out") as opened:
        assert all(opened.read(name).isfinite().all() for name in opened.tensors)


@cache
def _configs(name: str) -> dict[str, bytes]:
    plain: dict[str, dict[str, Any]] = {
        "config.json": {"architectures": ["X"], "torch_dtype": "float32", "dtype": "float32"},
        "trainer_state.json": {"global_step": 1, "log_history": []},
        "adapter_config.json": {
            "peft_type": "LORA",
            "r": 2,
            "lora_alpha": 4,
            "rank_pattern": {},
            "alpha_pattern": {"l": 8},
            "use_rslora": False,
        },
    }
    text = json.dumps(plain[name]).encode()
    odd = {"list": b"[1]", "deep": b"[" * 2000, "huge": b'{"global_step": 1e999, "r": -1, "lora_alpha": NaN}'}
    if name == "adapter_config.json":
        odd["beyond floats"] = text.replace(b'"l": 8', b'"l": 1' + b"0" * 400)
    return {"plain": text} | odd


READERS["dcp metadata"] = Reader(
    partial(_tensors_in, "dcp"), partial(_no_other_values, ".metadata"), _metadata
)
READERS["huggingface index"] = Reader(
    partial(_tensors_in, "huggingface shards"), partial(_no_other_values, _INDEX), _indices
)
READERS["sidecar"] = Reader(
    partial(_tensors_in, "dcp"),
    partial(_no_other_values, _SIDECAR),
    lambda: {"plain": _file_of("dcp", _SIDECAR), "ties": b'{"ties": {"t": "b"}, "metadata": {}}'},
)
for _name in CONFIGS:
    READERS[_name] = Reader(partial(_with_config, _name), _averaged_folders, partial(_configs, _name))


# Recordings.


def _recording(folder: Path) -> Setting:
    setting = Setting(folder)
    setting.close()
    return setting


def _manifest(data: bytes, folder: Path, setting: Setting) -> None:
    (folder / "run" / "manifest.json").write_bytes(data)
    run = polyak.Trajectory(folder / "run")
    if run.has_live:
        with suppress(PolyakError):
            run.live()
    found = run.usable.average("uniform")
    assert all(found[name].isfinite().all() for name in setting.samples[0])


def _block(data: bytes, folder: Path, setting: Setting) -> None:
    """Blocks have checksums: one is read as it was written, or not at all."""
    first = next(iter(sorted((folder / "run").glob("block-*"))))
    first.write_bytes(data)
    run = polyak.Trajectory(folder / "run")
    near(run.average("weights:1,0,0,0"), setting.samples[0])


def _in_recording(pattern: str) -> bytes:
    with TemporaryDirectory() as folder:
        _recording(Path(folder))
        return next(iter(sorted(Path(folder, "run").glob(pattern)))).read_bytes()


READERS["manifest"] = Reader(
    _recording,
    _manifest,
    lambda: {
        "plain": _in_recording("manifest.json"),
        "deep": b"[" * 2000,
        "list": b"[]",
        "beyond-floats": re.sub(
            rb'"mean": [^,}]+', b'"mean": 1' + b"0" * 400, _in_recording("manifest.json")
        ),
    },
)
READERS["block"] = Reader(_recording, _block, lambda: {"plain": _in_recording("block-*")})


# Saved states: the input is JSON, pairs of where a value is replaced and what by.


def _changed(state: dict[str, Any], data: bytes) -> dict[str, Any]:
    """The state with values replaced; lists of numbers with ``"shape"`` before them are tensors."""
    try:
        changes = [(float(place), value) for place, value in json.loads(data)]
    except (ValueError, TypeError, RecursionError):
        return state
    for place, value in changes:
        places = [*_places(state)]
        *above, last = places[int(abs(place) * len(places)) % len(places)] if abs(place) < 1e9 else places[0]
        state = node = dict(state)
        for key in above:
            node[key] = dict(node[key])
            node = node[key]
        node[last] = _tensor(value[1:]) if isinstance(value, list) and value[:1] == ["shape"] else value
    return state


def _places(state: dict[str, Any]) -> list[tuple]:
    return [place for place in places_of(state) if not any(isinstance(key, int) for key in place)]


def _tensor(sizes: list[Any]) -> Any:
    small = len(sizes) <= 4 and all(type(size) is int and 0 <= size < 9 for size in sizes)
    return torch.ones(sizes) if small else None


@contextmanager
def _taken_up() -> Iterator[None]:
    """What a state was taken up by goes on: it is too late to refuse it."""
    try:
        yield
    except PolyakError as error:
        raise AssertionError("taken up, and of no use") from error


def _average_state(data: bytes, folder: Path, around: None) -> None:
    """A state is taken up, or refused with nothing of it taken up."""
    model = small_model()
    average = polyak.Average(model, "ema:half_life=2", buffers="average")
    walk(model, 1)
    average.update()
    before = {name: tensor.clone() for name, tensor in average.named_tensors().items()}
    state = average.state_dict()
    try:
        average.load_state_dict(_changed(state, data))
    except PolyakError:
        assert same_values(dict(average.named_tensors()), before) and average.n_averaged == 1, "partly loaded"
        raise
    with _taken_up():
        average.update()
        average.state_dict()


def _recorder_state(data: bytes, folder: Path, around: None) -> None:
    shutil.rmtree(folder / "run", ignore_errors=True)
    model = small_model()
    with polyak.Recorder(model, folder / "run", block=2) as run:
        for step in range(1, 4):
            walk(model, step)
            run.update(loss=1.0)
        blocks = run.trajectory.blocks
        try:
            run.load_state_dict(_changed(run.state_dict(), data))
        except PolyakError:
            assert run.trajectory.blocks == blocks, "partly loaded"
            raise
        with _taken_up():
            run.update(loss=1.0)
    with _taken_up():
        found = polyak.Trajectory(folder / "run").average("uniform")
    assert all(tensor.isfinite().all() for tensor in found.values())


def _states() -> dict[str, bytes]:
    return {
        "nothing": b"[]",
        "a number": b"[[0.3, 7]]",
        "no number": b"[[0.1, null], [0.9, NaN]]",
        "a tensor": b'[[0.7, ["shape", 4, 3]], [0.5, -1]]',
        "a tensor for an option": b'[[0.05, ["shape", 4, 3]]]',
        "beyond floats": b"".join([b"[[0.27, 1", b"0" * 400, b"]]"]),
        "a dict": b'[[0.5, {"x": []}], [0.99, "x"]]',
    }


READERS["Average state"] = Reader(_nothing, _average_state, _states)
READERS["Recorder state"] = Reader(_nothing, _recorder_state, _states)


# Profiles.


def _profile(data: bytes, folder: Path, around: None) -> None:
    """A text that is understood is printed as one that means the same, and gives weights of a run that sum to 1."""
    profile = polyak.parse(data.decode("utf-8", "replace"))
    assert polyak.parse(str(profile)) == profile, f"{profile} is read as another one"
    try:
        weights = np.asarray(profile.weights(np.arange(5.0)))
    except PolyakError:
        return  # it does not fit a run of four steps
    assert np.isfinite(weights).all() and abs(weights.sum() - 1) < 1e-9, f"{profile}: {weights}"


READERS["profile"] = Reader(
    _nothing,
    _profile,
    lambda: {
        f"{profile.name}-{number}": text.encode()
        for profile in _REGISTRY.values()
        for number, text in enumerate(profile.examples, 1)
    },
)
