"""Files that are cut off, flipped, exchanged, of something else, strangely named, or that would run code."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

import polyak
from damaged_files import TENSORS, WRITERS, damaged
from polyak import checkpoints
from polyak.errors import PolyakError
from torture.calls import made
from torture.harness import Case, contents, family, near

DAMAGES = ("flip", "cut off", "take out", "put in")
PER_KIND = 5


def read_all(path: Path) -> dict[str, Tensor]:
    with checkpoints.open(path) as opened:
        return {name: opened.read(name) for name in opened.tensors}


def same_values(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    def bits(tensor: Tensor) -> bytes:
        return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()

    return found.keys() == wanted.keys() and all(
        (t.shape, t.dtype, bits(t)) == (wanted[n].shape, wanted[n].dtype, bits(wanted[n]))
        for n, t in found.items()
    )


# Bytes that changed. Files of other tools have no checksum for all of them, so what is read is what torch reads.


def reference(path: Path) -> dict[str, Tensor] | None:
    """What the format's own library makes of a single file; None where it refuses."""
    try:
        with path.open("rb") as stream:
            start = stream.read(9)
        if start[:2] == b"PK" or start[:1] == b"\x80":
            try:
                tree = torch.load(path, weights_only=True)
            except Exception:
                return {name: torch.from_numpy(array) for name, array in np.load(path).items()}
            return {n: t for n, t in tree.get("state_dict", tree).items() if isinstance(t, Tensor)}
        return load_file(path)
    except Exception:
        return None


def changed_bytes(kind: str, how: str, share: float, value: Any, folder: Path) -> None:
    path, copy = folder / "good", folder / "bad"
    WRITERS[kind](path)
    wanted = read_all(path)
    if path.is_dir():
        shutil.copytree(path, copy)
        files = sorted(file.name for file in path.iterdir())
        name = files[int(share * 7919) % len(files)]
    else:
        files, name = [], ""
    (copy / name).write_bytes(damaged((path / name).read_bytes(), how, share, value))
    found = read_all(copy)
    for tensor, there in found.items():
        if tensor not in wanted or there.shape != wanted[tensor].shape or there.dtype != wanted[tensor].dtype:
            # A folder says the names of its tensors twice, unless one file is all that lies in it.
            assert path.is_file() or len(files) == 1, f"{tensor!r} became {tuple(there.shape)} {there.dtype}"
            assert (theirs := reference(copy / name)) is not None, (
                f"{tensor!r} became {tuple(there.shape)} {there.dtype}"
            )
            assert tensor in theirs and theirs[tensor].shape == there.shape, (
                f"{tensor!r} is read as by nobody else"
            )


@family("bytes changed in checkpoints", apart=40)
def bytes_changed(rng: random.Random) -> Iterator[Case]:
    for kind in WRITERS:
        for how in DAMAGES:
            for number in range(PER_KIND):
                share = rng.random()
                value = rng.randbytes(rng.randint(1, 9)) if how == "put in" else rng.randint(1, 9)
                run = partial(changed_bytes, kind, how, share, value)
                yield Case(f"{kind}, {how} {number}", run, names=("bad",))


# Text files that steer the reading of others: every value replaced by one that it must not be.

ODD_VALUES = (None, -1, 2**70, float("nan"), 1e308, "../x", "", [], {}, [[]], True, "0" * 2000)


def places_of(tree: Any, above: tuple = ()) -> Iterator[tuple]:
    """The way to every value in a tree of JSON."""
    for key, value in (
        tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    ):
        yield (*above, key)
        yield from places_of(value, (*above, key))


def with_value(tree: Any, place: tuple, value: Any) -> Any:
    tree = json.loads(json.dumps(tree))
    node = tree
    for key in place[:-1]:
        node = node[key]
    if value is KeyError:
        del node[place[-1]]
    else:
        node[place[-1]] = value
    return tree


def write_header(path: Path, header: Any) -> None:
    """A safetensors file with another header."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    new = json.dumps(header).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + data[8 + length :])


def odd_header(share: float, value: Any, folder: Path) -> None:
    path = folder / "a.safetensors"
    checkpoints.write(path, TENSORS, metadata={"step": "3"})
    wanted, data = read_all(path), path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    places = list(places_of(header))
    write_header(path, with_value(header, places[int(share * len(places))], value))
    found = read_all(path)
    assert all(n in wanted for n in found) or (reference(path) or {}).keys() == found.keys()


def odd_index(share: float, value: Any, folder: Path) -> None:
    path = folder / "hf"
    WRITERS["huggingface shards"](path)
    wanted = read_all(path)
    (index,) = path.glob("*.index.json")
    tree = json.loads(index.read_text())
    places = list(places_of(tree))
    index.write_text(json.dumps(with_value(tree, places[int(share * len(places))], value)))
    found = read_all(path)
    assert all(same_values({n: t}, {n: wanted[n]}) for n, t in found.items()), "values of another tensor"


def odd_manifest(share: float, value: Any, folder: Path) -> None:
    with made(folder) as setting:
        setting.recorder.close()
        path = folder / "run" / "manifest.json"
        tree = json.loads(path.read_text())
        places = list(places_of(tree))
        path.write_text(json.dumps(with_value(tree, places[int(share * len(places))], value)))
        before = contents(folder)
        run = polyak.Trajectory(folder / "run")
        assert contents(folder) == before
        polyak.Trajectory.live(run) if run.has_live else None
        found = run.average("weights:" + ",".join(["1"] * len(run)))
        counts = [block.count for block in run.blocks]
        shares = [1 / len(counts)] * len(counts)
        wanted = {
            n: sum(share * s[n] for share, s in zip(shares, [*setting.samples[:4]], strict=True))
            for n in setting.samples[0]
        }
        near(found, wanted)
        polyak.Recorder(setting.model, folder / "run", resume=True, block=1).close()


@family("odd values in headers and manifests", apart=45)
def odd_values(rng: random.Random) -> Iterator[Case]:
    readers = {"safetensors header": odd_header, "huggingface index": odd_index, "manifest": odd_manifest}
    for label, reader in readers.items():
        for number in range(40):
            value = rng.choice((*ODD_VALUES, KeyError))
            yield Case(f"{label} {number}, {str(value)[:9]}", partial(reader, rng.random(), value))


# Files of something else, and things that are no files.


def _zip(path: Path, name: str = "word/document.xml") -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, "<x/>")


def _sparse(path: Path) -> None:
    with path.open("wb") as stream:
        stream.truncate(1 << 40)


def _doubled(times: int) -> dict[str, list]:
    value: list = []
    for _ in range(times):
        value = [value, value]
    return {"w": value}


FOREIGN: dict[str, Callable[[Path], object]] = {
    "empty": lambda p: p.write_bytes(b""),
    "one byte": lambda p: p.write_bytes(b"\x80"),
    "text": lambda p: p.write_text("hello\n"),
    "html": lambda p: p.write_text("<!DOCTYPE html><html>404</html>"),
    "json": lambda p: p.write_text('{"weight": [1, 2]}'),
    "json list": lambda p: p.write_text("[1, 2]"),
    "deep json": lambda p: p.write_text("[" * 100_000),
    "lfs pointer": lambda p: p.write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
    ),
    "docx": _zip,
    "zip with a data.pkl of text": lambda p: _zip(p, "a/data.pkl"),
    "png": lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50)),
    "gzip": lambda p: p.write_bytes(b"\x1f\x8b\x08" + bytes(50)),
    "npy": lambda p: np.save(p.open("wb"), np.arange(6.0)),
    "hdf5": lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(200)),
    "gguf": lambda p: p.write_bytes(b"GGUF" + bytes(200)),
    "zeros": lambda p: p.write_bytes(bytes(4096)),
    "ones": lambda p: p.write_bytes(b"\xff" * 4096),
    "a terabyte of nothing": _sparse,
    "empty folder": lambda p: p.mkdir(),
    "folder of text": lambda p: (p.mkdir(), (p / "notes.txt").write_text("x")),
    "link to nothing": lambda p: p.symlink_to("nowhere"),
    "link to itself": lambda p: p.symlink_to(p.name),
    "pipe": lambda p: os.mkfifo(p),
    "a device": lambda p: p.symlink_to("/dev/zero"),
    "pickled number": lambda p: p.write_bytes(pickle.dumps(3)),
    "pickled numpy": lambda p: p.write_bytes(pickle.dumps({"w": np.arange(3.0)})),
    "torch script of text": lambda p: torch.save("only text", p),
    "the same list many times over": lambda p: torch.save(_doubled(40), p),
    "a tensor alone": lambda p: torch.save(torch.ones(3), p),
    "nothing in a dict": lambda p: torch.save({}, p),
    "safetensors header too long": lambda p: p.write_bytes((2**62).to_bytes(8, "little") + b"{}"),
    "safetensors header of 0": lambda p: p.write_bytes(bytes(8) + b"{}"),
    "missing": lambda p: None,
}


def foreign(make: Callable[[Path], object], call: str, folder: Path) -> None:
    checkpoints.write(folder / "a.safetensors", TENSORS)
    path = folder / "foreign.safetensors"
    make(path)
    before = set(os.listdir(folder))
    try:
        if call == "open":
            read_all(path)
            assert path.is_file() or (path / "x").exists() or path.is_dir()
        elif call == "average":
            polyak.average_checkpoints([folder / "a.safetensors", path], folder / "out.pt")
        else:
            polyak.Trajectory.from_checkpoints([folder / "a.safetensors", path]).average("uniform")
    except PolyakError:
        assert set(os.listdir(folder)) == before, "a refusal left files"
        raise
    raise AssertionError("it was taken for a checkpoint")


@family("files of something else", apart=30)
def files_of_something_else(rng: random.Random) -> Iterator[Case]:
    for label, make in FOREIGN.items():
        for call in ("open", "average", "trajectory"):
            yield Case(f"{label}, {call}", partial(foreign, make, call), names=("foreign.safetensors",))


# Right files in the wrong place.


def exchanged(first: str, second: str, folder: Path) -> None:
    """Two files of a recording change places: its checksums say so."""
    with made(folder) as setting:
        setting.recorder.close()
        one, other = (next(iter(sorted((folder / "run").glob(p)))) for p in (first, second))
        kept = one.read_bytes()
        one.write_bytes(other.read_bytes())
        other.write_bytes(kept)
        run = polyak.Trajectory(folder / "run")
        if first.startswith("live"):
            run.live()
        run.average("uniform")
        raise AssertionError("they were taken for each other")


def exchanged_shards(folder: Path) -> None:
    path = folder / "hf"
    WRITERS["huggingface shards"](path)
    one, other = sorted(path.glob("*.safetensors"))[:2]
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)
    read_all(path)
    raise AssertionError("they were taken for each other")


def other_name(suffix: str, kind: str, folder: Path) -> None:
    """A checkpoint under the suffix of another format is read as what it is."""
    path = folder / f"model{suffix}"
    plain = {name: tensor for name, tensor in TENSORS.items() if name != "b"}  # NumPy has no bfloat16
    checkpoints.write(folder / f"true{kind}", plain)
    (folder / f"true{kind}").rename(path)
    assert same_values(read_all(path), plain)


@family("right files in the wrong place", apart=20)
def exchanged_files(rng: random.Random) -> Iterator[Case]:
    ends = [f"*00000000000{n}.safetensors" for n in (1, 2, 3, 4)]
    for number, first in enumerate(ends):
        for second in ends[number + 1 :]:
            run = partial(exchanged, f"block-{first}", f"block-{second}")
            yield Case(f"blocks {first[12]} and {second[12]}", run, names=("block",))
    yield Case("live weights and a block", partial(exchanged, "live-*", f"block-{ends[0]}"), names=("live",))
    yield Case("shards", exchanged_shards, names=("safetensors",))
    suffixes = (".pt", ".safetensors", ".npz")
    for kind in suffixes:
        for suffix in (*suffixes, ".bin", ".ckpt", ".txt", ""):
            yield Case(f"{kind} named {suffix or 'nothing'}", partial(other_name, suffix, kind))


# Pickles that would run code: each would write a file.

CODE = (
    ("os", "system", "touch {0}"),
    ("posix", "system", "touch {0}"),
    ("builtins", "eval", "open({0!r}, 'w')"),
    ("builtins", "exec", "open({0!r}, 'w')"),
    ("builtins", "open", "{0}", "w"),
    ("builtins", "compile", "open({0!r}, 'w')", "x", "exec"),
    ("io", "open", "{0}", "w"),
    ("os", "mkdir", "{0}"),
    ("os", "popen", "touch {0}"),
    ("subprocess", "call", ["touch", "{0}"]),
    ("subprocess", "Popen", ["touch", "{0}"]),
    ("pathlib", "Path.touch", "{0}"),
    ("builtins", "getattr", "{0}", "upper"),
    ("builtins", "__import__", "this"),
    ("importlib", "import_module", "this"),
    ("runpy", "run_path", "{0}"),
    ("shutil", "rmtree", "{0}"),
    ("numpy", "save", "{0}", [1]),
    ("numpy.core.multiarray", "fromfile", "{0}"),
    ("torch", "save", [1], "{0}"),
    ("torch", "load", "{0}"),
    ("torch.hub", "load_state_dict_from_url", "file://{0}"),
    ("torch.utils.cpp_extension", "load_inline", "x", "y"),
    ("torch._utils", "_rebuild_tensor_v2.__globals__", "x"),
    ("collections", "OrderedDict.fromkeys", "{0}"),
    ("functools", "partial", "{0}"),
    ("operator", "attrgetter", "{0}"),
    ("pickle", "loads", b"cos\nsystem\n(S'true'\ntR."),
    ("code", "InteractiveInterpreter.runcode", "x"),
    ("_io", "FileIO", "{0}", "w"),
)


class Op:
    """An object whose pickle calls any function by its name."""

    def __init__(self, module: str, name: str, arguments: tuple):
        self.parts = (module, name, arguments)


def pickle_of(code: tuple, target: Path, protocol: int) -> bytes:
    """A pickle of a dict with a number, and a call instead of a tensor."""
    module, name, *arguments = code

    def filled(value: Any) -> Any:
        if isinstance(value, str):
            return value.format(str(target))
        return [filled(v) for v in value] if isinstance(value, list) else value

    body = pickle.dumps(tuple(map(filled, arguments)), protocol)
    start = 2 if protocol >= 2 else 0
    skip = 11 if protocol >= 4 else start  # the frame
    inner = body[skip:-1]
    call = f"c{module}\n{name}\n".encode() + inner + b"R"
    return (b"\x80" + bytes([protocol]) if protocol >= 2 else b"") + b"}X\x01\x00\x00\x00w" + call + b"s."


def in_pt(path: Path, data: bytes) -> None:
    torch.save({"w": torch.ones(2)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, data if name.endswith("data.pkl") else content)


def in_legacy(path: Path, data: bytes) -> None:
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    magic = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001})]
    path.write_bytes(b"".join(magic) + data + pickle.dumps([], 2))


def in_npz(path: Path, data: bytes) -> None:
    np.savez(path.open("wb"), w=np.ones(2), o=np.array([None], dtype=object))
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    header = entries["o.npy"][: entries["o.npy"].index(b"\n") + 1]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("o.npy", header + data)


def in_dcp(path: Path, data: bytes) -> None:
    checkpoints.write(path, {"w": torch.ones(2)}, format="dcp")
    (path / ".metadata").write_bytes(data)


PLACES_OF_PICKLES = {
    "pt": in_pt,
    "legacy pt": in_legacy,
    "npz": in_npz,
    "dcp": in_dcp,
    "bare": Path.write_bytes,
}


def runs_code(code: tuple, place: str, protocol: int, folder: Path) -> None:
    target, path = folder / "was-run", folder / "evil"
    PLACES_OF_PICKLES[place](path, pickle_of(code, target, protocol))
    try:
        with checkpoints.open(path) as opened:
            for name in opened.tensors:
                opened.read(name)
    finally:
        assert not target.exists(), "code was run"
    assert "w" not in opened.tensors, "a call was taken for a tensor"


@family("pickles that run code", apart=45)
def pickles(rng: random.Random) -> Iterator[Case]:
    for code in CODE:
        for place in PLACES_OF_PICKLES:
            protocol = rng.choice((0, 2, 4))
            run = partial(runs_code, code, place, protocol)
            yield Case(f"{code[0]}.{code[1]}, {place}", run, names=("evil",))


# Names with odd characters, of tensors and of files.

ODD_NAMES = {
    "empty": "",
    "space": " ",
    "line break": "a\nb",
    "tab": "a\tb",
    "nothing": "a\0b",
    "escape": "\x1b[2Jx",
    "up": "../w",
    "root": "/w",
    "backslash": "a\\b",
    "dots": "..",
    "dot": ".",
    "leading dot": ".w",
    "trailing dot": "w.",
    "emoji": "w😀",
    "Hebrew": "\u202eאבג",
    "combined": "e\u0301",
    "surrogate": "\udc80",
    "long": "n" * 10_000,
    "quote": "a'b\"c",
    "percent": "%s{0}",
    "markup": "[bold]w[/bold]",
    "metadata": "__metadata__",
    "module": "module.w",
    "compiled": "_orig_mod.w",
    "fsdp": "_fsdp_wrapped_module.w",
    "state_dict": "state_dict",
    "step": "step",
    "epoch": "epoch",
    "ema": "ema.w",
    "number": "0",
    "file": "w.npy",
    "slash": "a/b",
    "star": "*",
    "NaN": "nan",
}


def odd_tensor_name(name: str, suffix: str, folder: Path) -> None:
    """Written and read again it has its name, or a wrapper's prefix less; or it is refused by its name."""
    values = {name: torch.arange(3.0), "other": torch.arange(2.0)}
    path = folder / f"out{suffix}"
    checkpoints.write(path, values)
    found = read_all(path)
    bare = {
        n.replace("module.", "").replace("_orig_mod.", "").replace("_fsdp_wrapped_", ""): t
        for n, t in values.items()
    }
    assert same_values(found, values) or same_values(found, bare), sorted(found)


def odd_file_name(name: str, folder: Path) -> None:
    """A folder of such a name is recorded into, and a file of such a name averaged."""
    if name in (".", "..", "") or "/" in name:
        return
    inputs = [folder / f"{n}.pt" for n in (1, 2)]
    for number, path in enumerate(inputs):
        checkpoints.write(path, {"w": torch.full((2,), float(number))})
    place = folder / name
    with polyak.Recorder(model := torch.nn.Linear(1, 1), place, block=1) as run:
        run.update()
    assert torch.equal(polyak.Trajectory(place).average("uniform")["weight"], model.weight.detach())
    odd = folder / f"{name}x.pt"
    polyak.average_checkpoints(inputs, odd)
    assert torch.equal(read_all(odd)["w"], torch.full((2,), 0.5))


@family("names with odd characters", apart=45)
def odd_names(rng: random.Random) -> Iterator[Case]:
    for label, name in ODD_NAMES.items():
        for suffix in (".pt", ".safetensors", ".npz", ""):
            yield Case(f"tensor {label}, {suffix or 'folder'}", partial(odd_tensor_name, name, suffix))
        yield Case(f"file {label}", partial(odd_file_name, name))
