"""What lies in a library's folder beside the weights that it loads: the same in half precision, and averages."""

from __future__ import annotations

import re
from pathlib import Path

from polyak import checkpoints
from polyak.checkpoints import Checkpoint, _checkpoint
from polyak.checkpoints._dialects import LIVE_BESIDE, is_average_beside, is_no_weights_file
from polyak.combine._roles import Item, called_average, is_half_precision
from polyak.combine._steps import number_in_name
from polyak.errors import PolyakError, name_list

__all__ = ["checkpoints_below", "complete_averages", "leave_out_averages_beside", "with_those_beside"]


def checkpoints_below(path: Path) -> list[Path]:
    """The numbered checkpoints of the run inside the folder of a model, as transformers' Trainer leaves them."""
    return [
        item
        for item in _checkpoint.checkpoint_paths(path)
        if item.is_dir() and number_in_name(item.name) is not None and not is_average_beside(item.name)
    ]


def with_those_beside(items: list[Item]) -> list[Item]:
    """The items, and what their folders hold beside the weights that are loaded from them, which is not taken."""
    halved = [
        _beside(item, file, "half precision, beside the weights in full")
        for item in items
        if item.path.is_dir()
        for file in _checkpoint.checkpoint_paths(item.path)
        if is_half_precision(file.name) and not is_no_weights_file(file.name)
    ]
    averages = [
        _beside(item, path, "an average")
        for item in items
        if item.checkpoint is not None and not item.parts and item.path.is_dir()
        for path in sorted(item.path.iterdir())
        if _is_average_of(path, item.checkpoint)
    ]
    _say_together(averages)
    return [*items, *halved, *averages]


def _beside(item: Item, path: Path, why: str) -> Item:
    return Item(path, (Path(item.name) / path.name).as_posix(), False, why=why)


def _is_average_of(path: Path, live: Checkpoint) -> bool:
    """Whether a file or folder beside live weights is an average, by what it holds where its name may say so."""
    known = is_average_beside(path.name)
    if not (known or called_average(path.name)) or path.is_symlink():
        return False
    try:
        with checkpoints.open(path) as found:
            return found.kind == "averaged" or (not known and _fits(found, live))
    except PolyakError:
        return False


def _fits(average: Checkpoint, live: Checkpoint) -> bool:
    """Whether each of its tensors is one of the live weights, of the same shape."""
    return all(
        name in live.tensors and info.shape == live.tensors[name].shape
        for name, info in average.tensors.items()
    )


def leave_out_averages_beside(items: list[Item]) -> None:
    """Averages that were found beside the weights of a checkpoint in one folder, under the names of known tools."""
    live = {item.path.parent for item in items if item.opened.kind != "averaged"}
    averages = [
        item
        for item in items
        if not item.given
        and item.path.parent in live
        and item.opened.kind == "averaged"
        and is_average_beside(item.path.name)
    ]
    _say_together(averages)


def _say_together(averages: list[Item]) -> None:
    """One reason for all averages of one name, as one pattern takes them."""
    same: dict[tuple[Path, str], list[Item]] = {}
    for item in averages:
        same.setdefault((item.path.parent.parent, item.path.name), []).append(item)
    for those in same.values():
        why = _pattern_for([item.path for item in those])
        for item in those:
            item.why = why


def _pattern_for(paths: list[Path]) -> str:
    """What to name instead: the path, or, of several folders, a pattern for their numbers."""
    first = paths[0]
    folder = first.parent.name if len(paths) == 1 else re.sub(r"\d+", "*", first.parent.name)
    pattern = first.parent.parent / folder / first.name
    return f"averages beside live weights: name '{pattern}' to take these"


def complete_averages(items: list[Item]) -> None:
    """Read what an average in the folder of a checkpoint lacks, buffers and frozen layers, from the weights there."""
    for item in items:
        average = item.opened
        if average.kind != "averaged" or item.parts:
            continue
        live = _live_beside(item.path) if is_average_beside(item.path.name) else None
        if live is not None and _fits(average, live):
            lacking = [name for name in live.tensors if name not in average.tensors]
            average.take_in(lacking, live)
            if lacking:
                average.note += (
                    f"; what that lacks, {name_list(lacking)}, is taken from the weights beside it"
                )
        elif average.key == "average" and "frozen" in average.ignored:
            average.note += (
                "; parameters that were frozen, and buffers, are not among them: those of the model stay"
            )


def _live_beside(path: Path) -> Checkpoint | None:
    folder = path.parent
    places = [folder, *(folder / name for name in LIVE_BESIDE)]
    found = next((place for place in places if place.exists() and _is_checkpoint(place)), None)
    return None if found is None else checkpoints.open(found)


def _is_checkpoint(place: Path) -> bool:
    return place.is_file() or _checkpoint.is_checkpoint_folder(place)
