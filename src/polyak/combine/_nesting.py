"""An average nested as a checkpoint of the run is: which of its entries stay true, and which do not."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from polyak import checkpoints
from polyak.checkpoints import Layout
from polyak.checkpoints._base import FORMATS, Contents, Envelope
from polyak.checkpoints._checkpoint import format_for, recognise
from polyak.checkpoints._tree import bare_names
from polyak.errors import OptionError, StructureError, name_list

__all__ = ["nested_like"]


def nested_like(layout: Layout, like: Path, key: str | None, output: Path) -> tuple[Layout, str]:
    """The layout of an output that is nested as ``like`` is, and a note of what it keeps and leaves out.

    Raises:
        OptionError: the output or ``like`` is no torch file, or has nothing around its weights.
        StructureError: ``like`` holds other tensors than the layout.
        CheckpointError: ``like`` cannot be read.
    """
    _refuse_other_formats(like, output)
    with checkpoints.open(like, key) as opened:
        found_key = opened.key
    contents = FORMATS["pt"].read(like)
    try:
        place = () if found_key is None else _place(contents.tree, found_key)
        if not place:
            raise OptionError(
                f"{like} has no weights under a key, so that nothing lies around them: leave out ",
                "like",
                "--like",
            )
        names, left_out = _names(contents, place, layout, like)
        kept = _Kept(place)
        entries = kept.of(contents.tree)
        left_out += kept.left_out
    finally:
        for file in contents.files:
            file.close()
    note = f"nested as {like.name} is: the weights under {found_key!r}"
    if entries:
        note += f", beside {name_list([str(name) for name in entries], most=10)}"
    if left_out:
        note += f"; left out: {name_list(left_out, most=10)}"
    return replace(layout, envelope=Envelope(place, entries, names)), note


def _refuse_other_formats(like: Path, output: Path) -> None:
    if format_for(output, None) != "pt":
        raise OptionError(
            f"{output} cannot be nested like {like}: name a torch file, such as {output.with_suffix('.pt').name}"
        )
    if recognise(like) != "pt":
        raise OptionError(
            f"{like} is no torch file, and only those are nested: name one, or leave out ", "like", "--like"
        )


def _place(tree: Mapping[Any, Any], key: str) -> tuple[Any, ...]:
    """The keys that ``key`` joins with dots; none where there are no such."""
    for name, child in tree.items():
        if not isinstance(child, Mapping):
            continue
        if str(name) == key:
            return (name,)
        if key.startswith(f"{name}.") and (below := _place(child, key[len(str(name)) + 1 :])):
            return (name, *below)
    return ()


def _names(
    contents: Contents, place: tuple[Any, ...], layout: Layout, like: Path
) -> tuple[dict[str, tuple[Any, ...]], list[str]]:
    """Names of the average to keys in ``like``, with its wrappers' prefixes, and the entries that are no weights."""
    node: Any = contents.tree
    for key in place:
        node = node[key]
    leaves = dict(_leaves(node))
    weights = {
        _dotted(keys): keys for keys, value in leaves.items() if isinstance(value, contents.leaf_types)
    }
    names = bare_names(weights)
    ours = {*layout.tensors, *layout.ties}
    if set(names) != ours:
        differences = [
            f"{verb} {name_list(sorted(those))}"
            for verb, those in (("lacks", ours - set(names)), ("has", set(names) - ours))
            if those
        ]
        raise StructureError(
            f"{like} does not hold the tensors that are averaged: it {' and '.join(differences)}. Name a checkpoint of "
            "the same model"
        )
    return names, sorted(_dotted((*place, *keys)) for keys in leaves.keys() - set(names.values()))


def _leaves(node: Mapping[Any, Any], keys: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """What lies in dicts of dicts, such as Megatron's weights, with the keys that lead there."""
    for name, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*keys, name))
        else:
            yield (*keys, name), value


def _dotted(keys: tuple[Any, ...]) -> str:
    return ".".join(map(str, keys))


# Entries that are not true of an average, at the top of a checkpoint or right below.

_COUNTERS = re.compile(
    r"(global_?|optimization_?|current_?|last_?|n_?|num_?|total_?|train_?)?"
    r"(steps?|epochs?|iter|iters|iterations?|updates|averaged)",
    re.IGNORECASE,
)
_STATE = re.compile(
    r"opt|.*optim.*|.*sched.*|.*scaler.*|.*rng.*|.*random_state.*|.*callback.*|.*loop.*|.*best.*|.*metric.*"
    r"|.*score.*|.*loss.*|message_hub|polyak",
    re.IGNORECASE,
)
# What is set before the training, where a number of epochs is a setting.
_SETTINGS = re.compile(r".*(param|config|cfg|arg|option|setting).*", re.IGNORECASE)
_PLAIN = (str, int, float, bool, bytes, type(None))
_NOT_PLAIN = object()


class _Kept:
    """Collects the entries around the weights that are kept, and the names of those that are not."""

    def __init__(self, place: tuple[Any, ...]) -> None:
        self._place = place
        self.left_out: list[str] = []

    def of(self, tree: Mapping[Any, Any], parts: tuple[Any, ...] = (), settings: bool = False) -> dict:
        """The plain entries of ``tree``, which lies at ``parts``; those in settings are never counters."""
        kept = {}
        for name, value in tree.items():
            here, n_left_out = (*parts, name), len(self.left_out)
            if here == self._place:
                continue
            is_state = not settings and (_COUNTERS.fullmatch(str(name)) or _STATE.fullmatch(str(name)))
            is_wrong = is_state or type(name) not in _PLAIN
            plain = _NOT_PLAIN if is_wrong else self._plain(value, here, settings)
            if plain is _NOT_PLAIN:
                self.left_out[n_left_out:] = [_dotted(here)]
            elif here != self._place[: len(here)] or plain:
                kept[name] = plain
        return kept

    def _plain(self, value: Any, here: tuple[Any, ...], settings: bool) -> Any:
        if isinstance(value, Mapping):
            plain = self.of(value, here, settings or _SETTINGS.fullmatch(str(here[-1])) is not None)
            is_empty = not plain and value and here != self._place[: len(here)]
            return _NOT_PLAIN if is_empty else plain
        return _plain_sequence(value)


def _plain_sequence(value: Any) -> Any:
    """A plain value, or a list or tuple of such, dicts included; ``_NOT_PLAIN`` where anything in it is not."""
    if type(value) in _PLAIN:
        return value
    if type(value) in (list, tuple):
        items = [_plain_sequence(item) for item in value]
        return _NOT_PLAIN if any(item is _NOT_PLAIN for item in items) else type(value)(items)
    if isinstance(value, Mapping):
        items = {name: _plain_sequence(item) for name, item in value.items()}
        return _NOT_PLAIN if any(item is _NOT_PLAIN for item in items.values()) else items
    return _NOT_PLAIN
