"""Finding the weights in what a training script saved beside them.

A checkpoint is a tree: a flat ``state_dict`` at best, often one or several of them among optimizer state, step counters
and settings. ``find_weights`` chooses one, says which, and leaves the wrappers' prefixes out of names. Where tools keep
what is data in ``_dialects``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from polyak.checkpoints._base import Contents, NoWeightsError, StoredTensor
from polyak.checkpoints._dialects import DIALECTS, STEP_KEYS, STEP_PATHS, Dialect, key_rank
from polyak.checkpoints._pickle import Record
from polyak.errors import CheckpointError, OptionError, name_list

__all__ = ["FoundWeights", "bare_names", "find_weights"]

_Path = tuple[str, ...]
Value = TypeVar("Value")
Named = dict[str, _Path]

_NOT_WEIGHTS = re.compile(r"opt|.*optim.*|.*sched.*|.*scaler.*|.*rng.*|train_state|dataloader.*")
# What optimizers keep for each parameter, in whatever their state is called.
_MOMENTS = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "acc_delta"}
# Stands for all of them.
_STATE = object()
_WRAPPERS = re.compile(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_MODULE = "module."
# A damaged pickle may hold itself, or the same list many times over.
_MAX_DEPTH = 32
_TOO_LARGE = 10**18  # for a step, which is counted in 64 bits
_MAX_ENTRIES = 1_000_000


@dataclass
class FoundWeights:
    """The tensors chosen, the key they lay under and the keys there were, what was left out, and the step.

    ``kind`` is ``"averaged"`` or ``"live"`` where the checkpoint says so by its keys, else the empty string; ``beside``
    are keys of other weights that were not taken, and ``siblings`` those of them that may be of the same model.
    """

    tensors: dict[str, StoredTensor]
    key: str | None
    found_keys: tuple[str, ...]
    ignored: tuple[str, ...] = ()
    dropped_prefix: str = ""
    step: int | None = None
    step_key: str | None = None
    kind: str = ""
    completed: str = ""
    beside: tuple[str, ...] = ()
    siblings: tuple[str, ...] = ()

    @property
    def note(self) -> str:
        """One sentence for the user, or the empty string where there was nothing to choose.

        >>> FoundWeights({}, "state_dict_ema", ("state_dict_ema", "state_dict")).note
        "weights found under 'state_dict_ema'; also present: 'state_dict'"
        """
        parts = []
        if self.key is not None:
            parts.append(f"weights found under {self.key!r}")
            others = dict.fromkeys(key for key in (*self.found_keys, *self.beside) if key != self.key)
            if others:
                parts.append(f"also present: {name_list(list(others))}")
        if self.completed:
            parts.append(self.completed)
        if self.dropped_prefix:
            parts.append(f"the prefix {self.dropped_prefix!r} was left out of the names")
        return "; ".join(parts)


def find_weights(contents: Contents, key: str | None, path: Path) -> FoundWeights:
    """Choose the weights of a checkpoint.

    Args:
        contents: what the format's reader found.
        key: a key to choose, dotted where it is nested, or a prefix of names; by default the best known one, else the
            whole tree. Averaged weights that lack tensors of the live ones beside them are completed by these.
        path: the file, for messages.

    Raises ``OptionError`` for a key that is not there, and where a file holds several averages and none was chosen;
    ``CheckpointError`` if there are no weights at all.
    """
    if contents.exact:
        return FoundWeights(dict(contents.tree), None, ())
    entries = dict(_walk(contents.tree, path, with_moments=key is not None))
    tensor_paths = [parts for parts, leaf in entries.items() if isinstance(leaf, contents.leaf_types)]
    if key is None:
        tensor_paths = [parts for parts in tensor_paths if not _is_moment(parts)]
    found = _places(contents.tree, tensor_paths)
    place, name_prefix = _chosen(key, tensor_paths, found, path)
    named = _named(tensor_paths, place, path)
    if not named:
        raise _no_weights(contents, entries, path)
    named, kind, prefix = _of_prefix(named, name_prefix)
    by_prefix = bool(kind)
    named, wrappers = _without_wrappers(named)
    kind = kind or _kind(place, found)
    completed = ""
    if key is None and kind == "averaged" and not by_prefix:
        named, completed = _completed(named, tensor_paths, found, contents, entries)
    beside = {} if by_prefix else _beside(entries, tensor_paths, place, named)
    step, step_key = _step(entries, place, contents)
    return FoundWeights(
        tensors={name: contents.stored(entries[parts]) for name, parts in named.items()},
        key=".".join(place) or None,
        found_keys=tuple(".".join(other.parts) for other in found),
        ignored=_ignored(entries, set(named.values())),
        dropped_prefix=prefix + wrappers,
        step=step,
        step_key=step_key,
        kind=kind,
        completed=completed,
        beside=tuple(beside),
        siblings=tuple(key for key, is_part in beside.items() if is_part),
    )


def _no_weights(contents: Contents, entries: Mapping[_Path, Any], path: Path) -> NoWeightsError:
    there = name_list([*map(str, contents.tree)])
    if any(leaf is _STATE for leaf in entries.values()) or any(
        _NOT_WEIGHTS.fullmatch(str(entry)) for entry in contents.tree
    ):
        return NoWeightsError(
            f"{path} holds the state of an optimizer and no weights; its entries are {there}: "
            "name the file that holds the model"
        )
    return NoWeightsError(f"{path} holds no weights; its entries are {there}")


def _walk(tree: Mapping[Any, Any], path: Path, with_moments: bool) -> Iterator[tuple[_Path, Any]]:
    """Every leaf. The state of an optimizer, the most of many files, is one leaf unless its moments are wanted."""
    stack: list[tuple[_Path, Any]] = [((), dict(tree))]
    for _ in range(_MAX_ENTRIES):
        if not stack:
            return
        parts, node = stack.pop()
        if isinstance(node, dict) and (node or not isinstance(node, Record)):
            children = list(node.items())
            if not with_moments and "param_groups" in node:
                children = [(name, _STATE if name == "state" else child) for name, child in children]
        elif isinstance(node, list | tuple):
            children = list(enumerate(node))
        else:
            yield parts, node
            continue
        if len(parts) == _MAX_DEPTH:
            break
        try:
            stack.extend(((*parts, str(name)), child) for name, child in reversed(children))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{path} is damaged: it has a key that cannot be written ({error})"
            ) from error
    raise CheckpointError(f"{path} is nested too deeply or too widely to be a checkpoint: it is damaged")


def _is_moment(parts: _Path) -> bool:
    return len(parts) > 1 and (parts[-1] in _MOMENTS or parts[-1].rpartition(".")[2] in _MOMENTS)


# Which of several sets of weights.


@dataclass(frozen=True)
class _Place:
    """A place in the tree that holds weights, and of which kind its key says that they are."""

    parts: _Path
    is_live: bool


def _places(tree: Mapping[Any, Any], tensor_paths: list[_Path]) -> list[_Place]:
    """The places that hold tensors under keys that promise weights, the best first."""
    for dialect in DIALECTS:
        if dialect.marks and all(_is_there(mark, tree) for mark in dialect.marks):
            keys = [(key, False) for key in dialect.averaged] + [(key, True) for key in dialect.live]
            marked = [_Place(tuple(key.split(".")), is_live) for key, is_live in keys]
            return [place for place in marked if _holds(place.parts, tensor_paths)]
    ranked: dict[_Path, tuple[bool, int]] = {}
    for above in dict.fromkeys(parts[:-1] for parts in tensor_paths):
        length, rank = _known_length(above)
        if rank is not None:
            ranked.setdefault(above[:length], rank)
    order = sorted(_without_shells(ranked, tensor_paths), key=lambda place: (ranked[place], len(place)))
    return [_Place(place, ranked[place][0]) for place in order]


def _without_shells(places: Iterable[_Path], tensor_paths: list[_Path]) -> list[_Path]:
    """The places without those that hold another one and, beside it, nothing but counters."""
    kept = list(places)
    for outer in list(kept):
        inner = [place for place in kept if len(place) > len(outer) and place[: len(outer)] == outer]
        own = [
            parts
            for parts in tensor_paths
            if parts[: len(outer)] == outer and not any(parts[: len(place)] == place for place in inner)
        ]
        if inner and all(len(parts) == len(outer) + 1 and "." not in parts[-1] for parts in own):
            kept.remove(outer)
    return kept


def _is_there(key: str, tree: Any) -> bool:
    for part in key.split("."):
        if not isinstance(tree, Mapping) or part not in tree:
            return False
        tree = tree[part]
    return True


def _holds(place: _Path, tensor_paths: list[_Path]) -> bool:
    return any(len(parts) > len(place) and parts[: len(place)] == place for parts in tensor_paths)


def _known_length(above: _Path) -> tuple[int, tuple[bool, int] | None]:
    """How many parts lead to the first known key, and on through those right below it, and the best of their ranks."""
    length, best = 0, None
    for depth, part in enumerate(above, 1):
        rank = key_rank(part)
        if rank is not None:
            length, best = depth, rank if best is None else min(best, rank)
        elif length or _NOT_WEIGHTS.fullmatch(part):
            break
    return length, best


def _chosen(
    key: str | None, tensor_paths: list[_Path], found: list[_Place], path: Path
) -> tuple[_Path, str | None]:
    """The place to take weights from, and the prefix of names that was asked for."""
    if key is None:
        _refuse_several_averages(found, tensor_paths, path)
        return (found[0].parts if found else _only_key(tensor_paths)), None
    for parts in tensor_paths:
        for length in range(1, len(parts)):
            if ".".join(parts[:length]) == key:
                inner = next((place.parts for place in found if place.parts[:length] == parts[:length]), None)
                return (inner or parts[:length]), None
    default = found[0].parts if found else ()
    prefix = key.removesuffix(".") + "."
    if any(parts[-1].startswith(prefix) for parts in tensor_paths if parts[: len(default)] == default):
        return default, prefix
    there = name_list([".".join(place.parts) for place in found])
    cure = f"choose from {there}" if found else "leave the key out, the weights are at the top"
    raise OptionError(f"{path} has no weights under {key!r}: {cure}")


def _only_key(tensor_paths: list[_Path]) -> _Path:
    """The one key under which all weights lie, where there is just one, whatever it is called."""
    tops = {
        parts[:1] for parts in tensor_paths if not any(_NOT_WEIGHTS.fullmatch(part) for part in parts[:-1])
    }
    is_one = len(tops) == 1 and all(len(parts) == 2 for parts in tensor_paths if parts[:1] in tops)
    (top,) = tops.pop() if is_one else ("",)
    return () if top.isdecimal() or not top else (top,)


def _refuse_several_averages(found: list[_Place], tensor_paths: list[_Path], path: Path) -> None:
    """Two averages of one model, as of two rates, and nothing says which is meant."""
    averages = [place.parts for place in found if not place.is_live]
    names = [
        {parts[len(place) :] for parts in tensor_paths if parts[: len(place)] == place} for place in averages
    ]
    alike = [".".join(place) for place, those in zip(averages, names, strict=True) if those == names[0]]
    if len(alike) > 1:
        raise OptionError(
            f"{path} holds several averages of one model, {name_list(alike)}: choose one, ",
            f"key={alike[0]!r}",
            f"--key {alike[0]}",
        )


def _kind(place: _Path, found: list[_Place]) -> str:
    for known in found:
        if known.parts == place:
            return "live" if known.is_live else "averaged"
    return ""


def _completed(
    named: Named,
    tensor_paths: list[_Path],
    found: list[_Place],
    contents: Contents,
    entries: Mapping[_Path, Any],
) -> tuple[Named, str]:
    """Averaged weights, and what they lack of the live ones beside them: an average of parameters has no buffers."""
    for place in found:
        if not place.is_live:
            continue
        live, _ = _without_wrappers(_inside(tensor_paths, place.parts))
        lacking = [name for name in live if name not in named]
        same = all(
            name in live
            and contents.stored(entries[live[name]]).info.shape == contents.stored(entries[parts]).info.shape
            for name, parts in named.items()
        )
        if same and lacking:
            note = f"what that lacks, {name_list(lacking)}, is taken from {'.'.join(place.parts)!r}"
            return {name: named.get(name, parts) for name, parts in live.items()}, note
    return named, ""


# Nets that train another one, or follow it: they are no part of it.
_OTHER_NETS = re.compile(
    r"(?:net_?|model_?)?d(?:is|isc|iscriminators?)?(?:_.*)?|(?:.*_)?d|.*(?:discriminator|critic|loss|criterion|metric).*"
    r"|.*(?:teacher|student|target|old|prev|best|ref(?:erence)?)(?:_.*)?|m[psr]d|callbacks|loops|hyper_parameters|lpips|vgg.*",
    re.IGNORECASE,
)
_PARAMETERS = ("weight", "bias")


def _beside(
    entries: Mapping[_Path, Any], tensor_paths: list[_Path], place: _Path, named: Named
) -> dict[str, bool]:
    """Keys beside the chosen one that hold weights, and whether they may be parts of the same model.

    Other values of the same tensors are none, such as those of a second average.
    """
    taken = set(named.values())
    found: dict[str, list[bool]] = {}
    for parts in tensor_paths:
        shared = next((n for n, part in enumerate(place) if parts[n : n + 1] != (part,)), len(parts))
        if parts in taken or shared >= len(parts) - 1 or any(map(_NOT_WEIGHTS.fullmatch, parts[:-1])):
            continue
        is_another = _is_another(parts, named)
        if is_another or parts[-1].rpartition(".")[2] in _PARAMETERS or len(_shape(entries[parts])) > 1:
            found.setdefault(".".join(parts[: shared + 1]), []).append(is_another)
    return {
        key: not any(are_others) and not _OTHER_NETS.fullmatch(key.rpartition(".")[2])
        for key, are_others in found.items()
    }


def _shape(leaf: Any) -> Sequence[int]:
    return leaf.info.shape if isinstance(leaf, StoredTensor) else leaf.shape


def _is_another(parts: _Path, named: Named) -> bool:
    """Whether a tensor is, by its name, another value of one of those that were chosen."""
    name = parts[-1].replace(_MODULE, "")
    ends = (".".join([*parts[start:-1], name]) for start in range(1, len(parts)))
    return any(end in named for end in ends)


# The names of weights.


def _inside(tensor_paths: list[_Path], place: _Path) -> Named:
    return {".".join(parts[len(place) :]): parts for parts in tensor_paths if parts[: len(place)] == place}


def _named(tensor_paths: list[_Path], place: _Path, path: Path) -> Named:
    named: Named = {}
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


def _of_prefix(named: Named, asked: str | None) -> tuple[Named, str, str]:
    """Of a flat dict that holds averaged and live weights under prefixes, the averaged ones; their kind; the prefix."""
    if asked is not None:
        chosen = {name.removeprefix(asked): parts for name, parts in named.items() if name.startswith(asked)}
        return chosen, "averaged" if _is_averaged_prefix(asked) else "", asked
    for dialect in (*(one for one in DIALECTS if one.averaged_prefix), *_mirrored(named)):
        taken = _of_dialect(named, dialect)
        if taken is not None:
            return taken, "averaged", "" if dialect.without_dots else dialect.averaged_prefix
    return named, "", ""


def _is_averaged_prefix(prefix: str) -> bool:
    rank = key_rank(prefix.removesuffix("."))
    return rank is not None and not rank[0]


def _mirrored(named: Named) -> Iterator[Dialect]:
    """Prefixes of the names where there is ``net_ema.`` beside ``net.``, whatever ``net`` is."""
    tops = dict.fromkeys(name.partition(".")[0] for name in named if "." in name)
    for top in tops:
        for averaged in (f"{top}_ema", f"ema_{top}", f"{top}_averaged"):
            if averaged in tops:
                yield Dialect("", averaged_prefix=f"{averaged}.", live_prefix=f"{top}.")


def _of_dialect(named: Named, dialect: Dialect) -> Named | None:
    """The averaged weights where the names are just those that the dialect tells of, else None."""
    start, live_start = dialect.averaged_prefix, dialect.live_prefix
    averaged = {
        name.removeprefix(start): parts
        for name, parts in named.items()
        if name.startswith(start) and name not in dialect.counters
    }
    if not averaged:
        return None
    live = {
        name.removeprefix(live_start)
        for name in named
        if name.startswith(live_start) and not name.startswith(start)
    }
    if dialect.without_dots:
        dotted = {name.replace(".", ""): live_start + name for name in live}
        if not all(name in dotted for name in averaged):
            return None
        rest = {name: parts for name, parts in named.items() if not name.startswith(start)}
        return rest | {dotted[name]: parts for name, parts in averaged.items()}
    others = [
        name for name in named if name not in dialect.counters and not name.startswith((start, live_start))
    ]
    is_whole = not others and (live == set(averaged) or (not live and dialect.counters))
    return averaged if is_whole else None


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


def _step(
    entries: Mapping[_Path, Any], place: _Path, contents: Contents
) -> tuple[int, str] | tuple[None, None]:
    levels = [(*place[:depth], key) for depth in range(len(place) + 1) for key in STEP_KEYS]
    known = [tuple(path.split(".")) for path in STEP_PATHS]
    # Counts of epochs are coarser than those of steps, wherever these stand.
    for parts in sorted([*levels[: len(STEP_KEYS)], *known, *levels[len(STEP_KEYS) :]], key=_counts_epochs):
        value = entries.get(parts)
        # A counter among the weights is one of the model's.
        if isinstance(value, contents.leaf_types) and parts[:-1] != place:
            value = _number(contents.stored(value))
        if type(value) is int and 0 <= value < _TOO_LARGE:
            return value, ".".join(parts[-1:])
    return None, None


def _number(stored: StoredTensor) -> int | None:
    """The whole number in a tensor of one element; None for other tensors."""
    if stored.info.shape not in ((), (1,)):
        return None
    out = torch.empty(1, dtype=stored.info.dtype)
    stored.read_into(0, out)
    value = out.item()
    return int(value) if type(value) in (int, float) and value == value // 1 else None


def _counts_epochs(parts: _Path) -> bool:
    return parts[-1].endswith("epoch")
