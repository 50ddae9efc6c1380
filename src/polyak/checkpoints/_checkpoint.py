"""One checkpoint, opened or begun: which format its path is of, and where among all that it holds the weights lie."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from polyak.checkpoints import _pt
from polyak.checkpoints._base import FORMATS, Contents, Layout, Location, StoredTensor, TensorInfo, Writer
from polyak.checkpoints._io import DataFile
from polyak.checkpoints._pickle import Record
from polyak.errors import CheckpointError, OptionError, StructureError, name_list

__all__ = [
    "FORMATS",
    "RECORDING_NAME",
    "STEP_KEYS",
    "Checkpoint",
    "bare_names",
    "checkpoint_paths",
    "create",
    "find_weights",
    "format_for",
    "is_checkpoint_folder",
    "is_recording",
    "natural_order",
    "open",
    "recognise",
    "write",
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
    return bool(path.suffix) and any(path.suffix in format.suffixes for format in FORMATS.values())


def natural_order(name: str) -> list[tuple[int, str]]:
    """A sort key that orders names as people count.

    >>> sorted(["step-10.pt", "step-9.pt"], key=natural_order)
    ['step-9.pt', 'step-10.pt']
    """
    return [(int(part) if part.isdecimal() else -1, part) for part in re.split(r"(\d+)", name)]


# Finding the weights in what a training script saved beside them.
#
# A checkpoint is a tree: a flat ``state_dict`` at best, often one or several of them among optimizer state, step
# counters and settings. ``find_weights`` chooses one, says which, and leaves the wrappers' prefixes out of names.

_Path = tuple[str, ...]
Value = TypeVar("Value")

# Where the tools put weights, averaged ones first: who saved an average wants it used.
_WEIGHT_KEYS = (
    "average",  # in the state of polyak.Average, wherever that lies
    "state_dict_ema",
    "ema_state_dict",
    "model_ema",
    "ema",
    "shadow_params",
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "current_model_state",
    "averaging_state",
)
STEP_KEYS = ("global_step", "optimization_step", "num_updates", "step", "iteration", "epoch")
_NOT_WEIGHTS = re.compile(r"opt|.*optim.*|.*sched.*|.*scaler.*|.*rng.*")
_WRAPPERS = re.compile(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_MODULE = "module."
# A damaged pickle may hold itself, or the same list many times over.
_MAX_DEPTH = 32
_MAX_ENTRIES = 1_000_000


@dataclass
class FoundWeights:
    """The tensors chosen, the key they lay under and the keys there were, what was left out, and the step."""

    tensors: dict[str, StoredTensor]
    key: str | None
    found_keys: tuple[str, ...]
    ignored: tuple[str, ...] = ()
    dropped_prefix: str = ""
    step: int | None = None
    step_key: str | None = None

    @property
    def note(self) -> str:
        """One sentence for the user, or the empty string where there was nothing to choose.

        >>> FoundWeights({}, "state_dict_ema", ("state_dict_ema", "state_dict")).note
        "weights found under 'state_dict_ema'; also present: 'state_dict'"
        """
        parts = []
        if self.key is not None:
            parts.append(f"weights found under {self.key!r}")
            others = [key for key in self.found_keys if key != self.key]
            if others:
                parts.append(f"also present: {name_list(others)}")
        if self.dropped_prefix:
            parts.append(f"the prefix {self.dropped_prefix!r} was left out of the names")
        return "; ".join(parts)


def find_weights(contents: Contents, key: str | None, path: Path) -> FoundWeights:
    """Choose the weights of a checkpoint.

    Args:
        contents: what the format's reader found.
        key: a key to choose, dotted where it is nested; by default the best known one, else the whole tree.
        path: the file, for messages.

    Raises ``OptionError`` for a key that is not there, ``CheckpointError`` if there are no tensors at all.
    """
    entries = dict(_walk(contents.tree, path))
    tensor_paths = [parts for parts, leaf in entries.items() if isinstance(leaf, contents.leaf_types)]
    found = _known_places(tensor_paths)
    place = _chosen_place(key, tensor_paths, found, path)
    named, prefix = _without_wrappers(_named(tensor_paths, place, path))
    if not named:
        raise CheckpointError(
            f"{path} holds no weights; its entries are {name_list([*map(str, contents.tree)])}"
        )
    step, step_key = _step(entries, place)
    return FoundWeights(
        tensors={name: contents.stored(entries[parts]) for name, parts in named.items()},
        key=".".join(place) or None,
        found_keys=tuple(".".join(other) for other in found),
        ignored=_ignored(entries, set(named.values())),
        dropped_prefix=prefix,
        step=step,
        step_key=step_key,
    )


def _walk(tree: Mapping[Any, Any], path: Path) -> Iterator[tuple[_Path, Any]]:
    stack: list[tuple[_Path, Any]] = [((), tree)]
    for _ in range(_MAX_ENTRIES):
        if not stack:
            return
        parts, node = stack.pop()
        if isinstance(node, Mapping) and (node or not isinstance(node, Record)):
            children = list(node.items())
        elif isinstance(node, list | tuple):
            children = list(enumerate(node))
        else:
            yield parts, node
            continue
        if len(parts) == _MAX_DEPTH:
            break
        stack.extend(((*parts, str(name)), child) for name, child in reversed(children))
    raise CheckpointError(f"{path} is nested too deeply or too widely to be a checkpoint: it is damaged")


def _known_places(tensor_paths: list[_Path]) -> list[_Path]:
    """The places under well-known keys that hold tensors, the best first."""
    places: dict[_Path, int] = {}
    for parts in tensor_paths:
        length = _known_length(parts)
        if length:
            places.setdefault(parts[:length], _WEIGHT_KEYS.index(parts[length - 1]))
    return sorted(places, key=lambda place: (places[place], len(place)))


def _known_length(parts: _Path) -> int:
    """How many leading parts lead to the first known key, and on through known keys right below it."""
    length = 0
    for depth, part in enumerate(parts[:-1], 1):
        if part in _WEIGHT_KEYS:
            length = depth
        elif length or _NOT_WEIGHTS.fullmatch(part):
            break
    return length


def _chosen_place(key: str | None, tensor_paths: list[_Path], found: list[_Path], path: Path) -> _Path:
    if key is None:
        return found[0] if found else ()
    for parts in tensor_paths:
        for length in range(1, len(parts)):
            if ".".join(parts[:length]) == key:
                return parts[:length]
    there = name_list([".".join(place) for place in found])
    cure = f"choose from {there}" if found else "leave the key out, the weights are at the top"
    raise OptionError(f"{path} has no weights under {key!r}: {cure}")


def _named(tensor_paths: list[_Path], place: _Path, path: Path) -> dict[str, _Path]:
    named: dict[str, _Path] = {}
    # An ordered list has no names of its own: its key makes them readable.
    skip = len(place) - (place[-1:] == ("shadow_params",))
    for parts in tensor_paths:
        inside = parts[: len(place)] == place
        if not inside or (not place and any(_NOT_WEIGHTS.fullmatch(part) for part in parts[:-1])):
            continue
        name = ".".join(parts[skip:])
        if name in named:
            raise CheckpointError(
                f"{path} has two tensors named {name!r}; choose one set of weights with a key"
            )
        named[name] = parts
    return named


def _without_wrappers(named: dict[str, Value]) -> tuple[dict[str, Value], str]:
    """Leave out the prefixes of DDP, ``torch.compile``, FSDP and ``AveragedModel``, with its counter."""
    plain = {_WRAPPERS.sub("", name): parts for name, parts in named.items()}
    if len(plain) < len(named):
        plain = dict(named)
    dropped = ""
    while True:
        weights = [name for name in plain if name != "n_averaged"]
        if not weights or not all(name.startswith(_MODULE) for name in weights):
            return plain, dropped
        plain = {name.removeprefix(_MODULE): plain[name] for name in weights}
        dropped += _MODULE


def bare_names(named: Mapping[str, Value]) -> dict[str, Value]:
    """The entries of a state dict, without wrappers' prefixes and without modules' extra state.

    >>> bare_names({"_orig_mod.module.weight": 1, "_orig_mod.module._extra_state": 2})
    {'weight': 1}
    """
    kept = {name: value for name, value in named.items() if name.rpartition(".")[2] != "_extra_state"}
    plain, _ = _without_wrappers(kept)
    return plain


def _ignored(entries: dict[_Path, Any], taken: set[_Path]) -> tuple[str, ...]:
    """What was not taken, each branch by its top."""
    shared = {parts[:length] for parts in taken for length in range(1, len(parts))}
    tops: dict[str, None] = {}
    for parts in entries:
        if parts not in taken:
            length = next(n for n in range(1, len(parts) + 1) if parts[:n] not in shared)
            tops[".".join(parts[:length])] = None
    return tuple(tops)


def _step(entries: dict[_Path, Any], place: _Path) -> tuple[int, str] | tuple[None, None]:
    for depth in range(len(place) + 1):
        for key in STEP_KEYS:
            value = entries.get((*place[:depth], key))
            if type(value) is int and value >= 0:
                return value, key
    return None, None


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
        step_key: the entry that says it, such as ``"global_step"`` or ``"epoch"``.
        is_lazy: False if the format forced the whole file into memory (torch files from before 1.6).
    """

    def __init__(self, path: Path, format: str, contents: Contents, key: str | None = None) -> None:
        weights = find_weights(contents, key, path)
        self.path = path
        self.format = format
        self.key = weights.key
        self.found_keys = weights.found_keys
        self.note = weights.note
        self.ignored = weights.ignored
        self.metadata = contents.metadata
        self.step, self.step_key = weights.step, weights.step_key
        if self.step is None:
            self.step, self.step_key = _text_step(contents.metadata)
        self.is_lazy = contents.is_lazy
        self.tensors: dict[str, TensorInfo] = {name: stored.info for name, stored in weights.tensors.items()}
        self._stored = weights.tensors
        self._files = contents.files
        self.ties = _ties(weights.tensors)

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

    Raises as ``create``; ``StructureError`` also for sparse and meta tensors.
    """
    unwritable = [
        name for name, tensor in tensors.items() if tensor.is_meta or tensor.layout != torch.strided
    ]
    if unwritable:
        raise StructureError(
            f"{path}: {name_list(unwritable)} are sparse or on the meta device: make them dense"
        )
    shared = _shared(tensors)
    infos = {name: TensorInfo.of(tensor) for name, tensor in tensors.items() if name not in shared}
    layout = Layout(infos, {**shared, **(ties or {})}, metadata or {})
    with create(path, layout, format=format, overwrite=overwrite) as writer:
        writer.fill(tensors)


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
