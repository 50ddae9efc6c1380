"""Finding the weights in what a training script saved beside them.

A checkpoint is a tree: a flat ``state_dict`` at best, often one or several of them among optimizer state, step
counters and settings. ``find_weights`` chooses one, says which, and leaves the wrappers' prefixes out of names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from polyak.checkpoints._base import Contents, StoredTensor
from polyak.errors import CheckpointError, OptionError, name_list

__all__ = ["STEP_KEYS", "bare_names", "find_weights"]

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
        if isinstance(node, Mapping):
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
