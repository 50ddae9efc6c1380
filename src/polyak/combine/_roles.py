"""What each file or folder is: links, averages beside live weights, best and last, one rank's part, codes of weights.

Each rule says of what was found why it is not taken, or refuses what is not certain, with what to type instead.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from polyak.checkpoints import Checkpoint, _checkpoint
from polyak.checkpoints._dialects import PIPELINE_FILES
from polyak.combine._inputs import averaged_inputs
from polyak.combine._steps import number_in_name, steps_in_names
from polyak.errors import CheckpointError, OptionError, PolyakError, name_list

__all__ = [
    "Item",
    "called_average",
    "is_half_precision",
    "is_special",
    "leave_out_averages_of_others",
    "leave_out_copies",
    "leave_out_half_precision",
    "leave_out_links",
    "leave_out_live_twins",
    "leave_out_specials",
    "leave_out_unfinished",
    "refuse_mixed_kinds",
    "refuse_pipeline",
    "refuse_quantised",
    "refuse_several_widths",
    "refuse_siblings",
    "refuse_without_names",
    "same_weights",
]

# Names beside a numbered series that are no part of it.
_SPECIAL = {
    "best",
    "last",
    "latest",
    "init",
    "initial",
    "final",
    "avg",
    "ave",
    "average",
    "averaged",
    "soup",
    "merged",
}
_BARE = {"checkpoint", "ckpt", "model", "state"}
_AVERAGED = {"ema", "swa", "teacher"}
# The others are words of models and tasks as well.
_SURELY_AVERAGED = {"ema"}
# What else is in the names of checkpoints whatever the model.
_PLAIN = {
    "step",
    "steps",
    "epoch",
    "epochs",
    "ep",
    "iter",
    "iteration",
    "update",
    "weights",
    "pt",
    "pth",
    "bin",
    "tar",
}
_PLAIN |= {"safetensors", "npz", "params", "net", "network", "run", "checkpoints", "ckpts", "models"}
_RATE = re.compile(r"(?<!\d)0\.\d+")
_RATE_OF_EMA = re.compile(r"ema[^a-z\d]*(0\.\d+)", re.IGNORECASE)
_WORD = r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+"
_COMPARED_NUMEL = 1 << 20


@dataclass(eq=False)
class Item:
    """One file or folder, what it is, and whether it is taken.

    Attributes:
        path: where it lies.
        name: as it is shown: from the input on in which it was found.
        given: whether the user named it, rather than a folder or a pattern that it was found by.
        checkpoint: opened; None where it cannot be used.
        error: why it cannot.
        step: the training step, where it is known.
        why: why it is not taken; empty for what is.
        parts: the files of a checkpoint that is one for each rank, by the names of these.
    """

    path: Path
    name: str
    given: bool
    checkpoint: Checkpoint | None = None
    error: PolyakError | None = None
    step: int | None = None
    why: str = ""
    parts: dict[str, Path] = field(default_factory=dict)

    @property
    def taken(self) -> bool:
        """Whether it is a part of the average."""
        return not self.why

    @property
    def opened(self) -> Checkpoint:
        """The checkpoint of what is taken."""
        assert self.checkpoint is not None, "what cannot be opened is not taken"
        return self.checkpoint

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        key = self.checkpoint.key if self.checkpoint else None
        return {
            "name": self.name,
            "taken": self.taken,
            "why": self.why,
            "step": self.step,
            "key": key,
            "ranks": sorted(self.parts),
        }


def leave_out_links(items: list[Item], all_count: bool) -> None:
    """The same file under several names counts once, under the name that is numbered."""
    places: dict[Any, list[Item]] = defaultdict(list)
    for item in items:
        try:
            statuses = [os.stat(path) for path in item.parts.values() or (item.path,)]
        except OSError:
            if item.path.is_symlink() and not item.given:
                item.why = "a link to what is not there"
            continue  # opening it says so
        if item.taken and not all_count:
            places[tuple((status.st_dev, status.st_ino) for status in statuses)].append(item)
    for same in places.values():
        kept = min(same, key=lambda item: is_special(item.name))
        for item in same:
            if item is not kept:
                item.why = f"the same file as {kept.name}"


# What saving leaves behind when it is cut off: tmp-checkpoint-500, step_4.tmp.pt, and office programs' ~step_4.pt.
_UNFINISHED = re.compile(r"^~|(?<![a-z])(?:tmp|incomplete|unfinished)(?![a-z])", re.IGNORECASE)
# step_3 (1).pt, step_3 - Copy (2).pt, step_3 copy 2.pt, step_3 2.pt, step_3 (Ann's conflicted copy 2026-03-01).pt.
_COPY = re.compile(
    r"(?: ?\(\d+\)|(?<=\d) [2-9]|[ _]?-? ?copy(?: ?\(?\d+\)?)?| ?\([^()]*(?:conflict|copy)[^()]*\))(?=(?:\.[a-z]+)*$)",
    re.IGNORECASE,
)


def leave_out_unfinished(items: list[Item]) -> None:
    """Files and folders that are, by their names, of a save that was cut off."""
    whole = [item for item in items if item.taken and not _UNFINISHED.search(item.path.name)]
    for item in items:
        if whole and item.taken and not item.given and item not in whole:
            item.why = "by its name of a save that was cut off"


def leave_out_copies(items: list[Item]) -> None:
    """Copies that a file manager or a browser named, or the cloud after a conflict; refused if they differ.

    And the same weights in two formats.
    """
    by_path = {item.path: item for item in items}
    for item in items:
        mark = _COPY.search(item.path.name)
        name = mark and item.path.name[: mark.start()] + item.path.name[mark.end() :]
        twin = by_path.get(item.path.with_name(name)) if name and name != item.path.suffix else None
        if item.given:
            continue
        saved_twice = by_path.get(item.path.with_suffix(".safetensors"), item)
        if saved_twice is not item and same_weights(saved_twice, item):
            item.why = f"the same weights as {saved_twice.name}"
        if twin is None or item.why:
            continue
        if not same_weights(twin, item):
            raise OptionError(
                f"{item.name} is, by its name, a copy of {twin.name}, and holds other weights: move away the one that "
                "is not meant, or name the files that are"
            )
        item.why = f"the same weights as {twin.name}"


def _words(name: str) -> set[str]:
    return {word.lower() for word in re.findall(_WORD, name)}


def is_special(name: str) -> bool:
    """Whether a name is that of the best, the last, an average, or of nothing in particular, beside a numbered series.

    >>> is_special("model_best.pth"), is_special("checkpoint.pth"), is_special("checkpoint_3.pth")
    (True, True, False)
    """
    stem = name.rpartition("/")[2].partition(".")[0]
    is_bare = bool(stem) and _words(stem) <= _BARE and not re.search(r"\d", stem)
    is_bare = is_bare and "/" not in name and number_in_name(name) is None
    return is_bare or bool(_SPECIAL & _words(name))


def called_average(name: str) -> bool:
    """Whether a word of a name says that it is an average, which may be a word of the model's too.

    >>> called_average("ema_model.pt"), called_average("average"), called_average("model.safetensors")
    (True, True, False)
    """
    return bool({*_AVERAGED, "average", "averaged"} & _words(name))


_HALF = re.compile(r"(?<![a-z0-9])(?:b?fp?16|float16|bfloat16|half(?!_life))(?![a-z0-9])", re.IGNORECASE)


def is_half_precision(name: str) -> bool:
    """Whether a file's name says that it holds weights in half precision.

    >>> [is_half_precision(name) for name in ("model.fp16.safetensors", "halfway.pt", "ema-half_life-2000.pt")]
    [True, False, False]
    """
    return _HALF.search(name) is not None


def leave_out_half_precision(items: list[Item]) -> None:
    """The same weights in fewer bits: ``model.fp16.safetensors`` beside ``model.safetensors``."""
    full = {item.path: item for item in items if not is_half_precision(item.path.name)}
    for item in items:
        halved = _HALF.search(item.path.name)
        if item.given or halved is None:
            continue
        before, after = item.path.name[: halved.start()], item.path.name[halved.end() :]
        names = {before[:-1] + after, before + after[1:], before + after}
        twin = next(
            (full[path] for name in names if name and (path := item.path.with_name(name)) in full), None
        )
        if twin is not None and _is_narrower(item.opened, twin.opened):
            item.why = f"{twin.name} in half precision"


def _is_narrower(one: Checkpoint, other: Checkpoint) -> bool:
    shapes = [{name: info.shape for name, info in each.tensors.items()} for each in (one, other)]
    return shapes[0] == shapes[1] and all(
        info.dtype.itemsize <= other.tensors[name].dtype.itemsize for name, info in one.tensors.items()
    )


def leave_out_averages_of_others(items: list[Item]) -> None:
    """What an earlier call wrote into the folder of what it was made of."""
    names = {item.path.name for item in items}
    for item in items:
        made_of = names.intersection(Path(name).name for name in averaged_inputs(item.opened)) - {
            item.path.name
        }
        if made_of and not item.given:
            item.why = f"itself an average, of {name_list(sorted(made_of, key=_checkpoint.natural_order))}"


def leave_out_live_twins(items: list[Item]) -> None:
    """Averages beside the live weights, told by their names: only the averages are taken."""
    averaged = _averages(items)
    _refuse_several_rates(averaged)
    live = [item for item in items if item not in averaged]
    if not averaged or not live:
        return
    twins = {_without_average(item): item for item in averaged}
    alone = [item for item in live if _without_average(item) not in twins and not is_special(item.name)]
    if alone and not all(is_special(item.name) for item in averaged):
        raise OptionError(
            f"{name_list([item.name for item in averaged])} are averages and "
            f"{name_list([item.name for item in alone])} are not, by their names: "
            "take the one or the other, by a pattern"
        )
    for item in averaged if alone else live:
        twin = twins.get(_without_average(item))
        item.why = (
            "an average, beside checkpoints of the run"
            if alone
            else f"live weights; {twin.name} is their average"
            if twin
            else "live weights, beside averages"
        )


# EDM2 writes the averages of each step beside one another, network-snapshot-0001000-0.050 and -0.100, and ema-pytorch's
# PostHocEMA 0.1000.pt and 1.1000.pt; which of them are averages of one step is in their names alone.
_WIDTH = re.compile(r"(?<=\d)[-_](?P<width>0\.\d+)(?=\.[a-z])", re.IGNORECASE)
_INDEX_OF_WIDTH = re.compile(r"^(?P<width>\d+)(?=\.\d+\.[a-z]+$)", re.IGNORECASE)
_EMA_PYTORCH = {"initted", "step"}


def refuse_several_widths(items: list[Item]) -> None:
    """Refuse averages of one step that differ in how far they look back; their sum needs a weight for each."""
    found: dict[tuple[Path, str, int | None], dict[str, Item]] = defaultdict(dict)
    for item in items:
        is_posthoc = set(item.opened.ignored) >= _EMA_PYTORCH
        pattern = _INDEX_OF_WIDTH if is_posthoc else _WIDTH
        if match := pattern.search(item.path.name):
            rest = pattern.sub("", item.path.name)
            found[item.path.parent, rest, item.step].setdefault(match["width"], item)
    for one, other, *_ in (list(widths.items()) for widths in found.values() if len(widths) > 1):
        start = "" if _INDEX_OF_WIDTH.search(one[1].path.name) else "*"
        raise OptionError(
            f"{one[1].name} and {other[1].name} are of one step and differ in {one[0]} and {other[0]} alone, as "
            f"averages of two widths do: choose one by a pattern such as '{start}{one[0]}.*', or say how much each "
            "counts, as post-hoc EMA does, with ",
            "weights",
            "--weights",
        )


def _averages(items: list[Item]) -> list[Item]:
    """Those whose names call them averages: of another item, or by words of these names and of checkpoints alone.

    In ``gemma-swa-1.pt`` the letters are those of the model's sliding windows.
    """

    # The folders above say it too, of what was found in them.
    def words(item: Item) -> set[str]:
        return _words(item.path.name if item.given else item.name)

    called = [item for item in items if _AVERAGED & words(item)]
    others = [item for item in items if item not in called]
    twins = {_without_average(item) for item in others}
    known = _AVERAGED.union(_SPECIAL, _BARE, _PLAIN, *map(words, others))
    return [
        item
        for item in called
        if _SURELY_AVERAGED & words(item) or _without_average(item) in twins or words(item) <= known
    ]


def _refuse_several_rates(averaged: list[Item]) -> None:
    rates = {match[1]: item.name for item in averaged if (match := _RATE_OF_EMA.search(item.path.name))}
    if len(rates) > 1:
        raise OptionError(
            f"{name_list(list(rates.values()))} are averages of different rates: choose one, by a pattern such as "
            f"'*{next(iter(rates))}*'"
        )


def _without_average(item: Item) -> tuple[Path, tuple[str, ...]]:
    """What a live file and its average have in common: the folder, and the name without the words that say so."""
    words = re.findall(
        rf"{_WORD}|\d+",
        _RATE.sub("", item.path.name) if _AVERAGED & _words(item.path.name) else item.path.name,
    )
    drop = {*_AVERAGED, "model", "ckpt", "checkpoint"}
    return item.path.parent, tuple(word for word in words if word.lower() not in drop)


def leave_out_specials(items: list[Item]) -> None:
    """Best, last, initial and averaged weights beside a series of numbered checkpoints."""
    series = [item for item in items if not is_special(item.name)]
    if len(series) < 2 or not (all(map(_is_numbered, series)) or _are_ordered(series)):
        for item in items:
            twin = next((one for one in series if item not in series and same_weights(one, item)), None)
            if twin is not None:
                item.why = f"the same weights as {twin.name}"
        _refuse_roles_alone([item for item in items if item.taken and item not in series])
        return
    steps = {item.step for item in series}
    named = []
    for item in items:
        if item in series:
            continue
        if not item.given:
            item.why = "no part of the numbered series"
        elif twin := next(
            (one for one in series if one.step == item.step is not None and same_weights(one, item)), None
        ):
            item.why = f"the same weights as {twin.name}"
        elif item.step is None or item.step in steps:
            named.append(item.name)
    if named:
        raise OptionError(
            f"no part of the numbered series from {series[0].name} to {series[-1].name}: {name_list(named)}; name the "
            "folder or a pattern of the series to leave them out, or say how much each counts "
            "with ",
            "weights",
            "--weights",
        )


def _is_numbered(item: Item) -> bool:
    return (
        item.step is not None
        or number_in_name(item.path.stem) is not None
        or number_in_name(item.path.parent.name) is not None
    )


def _are_ordered(items: list[Item]) -> bool:
    """Whether names say together what one of them does not: ``1B`` among other counts, and dates."""
    try:
        return steps_in_names([item.path for item in items]) is not None
    except OptionError:
        return False


def _refuse_roles_alone(specials: list[Item]) -> None:
    """Refuse the best and the last of one run, found without any series: they are no checkpoints in a row."""
    folders: dict[Path, list[Item]] = defaultdict(list)
    for item in specials:
        # Numbers tell apart the best ones of several epochs.
        if not item.given and not re.search(r"\d", item.path.name):
            folders[item.path.parent].append(item)
    for first, second, *_ in (those for those in folders.values() if len(those) > 1):
        raise OptionError(
            f"{first.name} and {second.name} are, by their names, two states of one run, and there are no numbered "
            "checkpoints beside them: name one of them, or, to average them, each of them"
        )


def refuse_pipeline(folder: Path) -> None:
    """Refuse several models that work together, each in a folder of its own: they are no checkpoints of one another."""
    if not any((folder / name).is_file() for name in PIPELINE_FILES):
        return
    parts = [item.name for item in _checkpoint.checkpoint_paths(folder) if item.is_dir()]
    if _checkpoint.is_checkpoint_folder(folder):
        parts = ["its own weights", *parts]
    if len(parts) > 1:
        raise OptionError(
            f"{folder} is a pipeline of several models ({name_list(parts)}): average each of them by itself, as "
            f"{Path(folder.name) / parts[-1]} of every input, into a folder of its own"
        )


def refuse_mixed_kinds(items: list[Item], all_count: bool) -> None:
    """Refuse live weights of some files with the averaged ones of others, as their keys say."""
    kinds = {kind: [item for item in items if item.opened.kind == kind] for kind in ("live", "averaged")}
    live, averaged = kinds["live"], kinds["averaged"]
    if live and averaged and not all_count:
        key = live[0].opened.key
        raise OptionError(
            f"{name_list([item.name for item in live])} hold live weights only ({key!r}), and "
            f"{name_list([item.name for item in averaged])} averaged ones ({averaged[0].opened.key!r}): leave "
            "the first out, or take the live weights of all with ",
            f"key={key!r}",
            f"--key {key}",
        )


def same_weights(one: Item, other: Item) -> bool:
    """Whether two checkpoints hold the same tensors, bit for bit; they are read up to the first difference."""
    first, second = one.opened, other.opened
    if first.tensors != second.tensors:
        return False
    return all(
        torch.equal(
            first.read_slice(name, start, min(start + _COMPARED_NUMEL, info.numel)).view(torch.uint8),
            second.read_slice(name, start, min(start + _COMPARED_NUMEL, info.numel)).view(torch.uint8),
        )
        for name, info in first.tensors.items()
        if name not in first.ties
        for start in range(0, info.numel, _COMPARED_NUMEL)
    )


def refuse_without_names(checkpoint: Checkpoint) -> None:
    """Refuse averages that are a list, as torch_ema and diffusers keep them: no model loads them by name."""
    if (checkpoint.key or "").rpartition(".")[2] == "shadow_params":
        raise CheckpointError(
            f"{checkpoint.path} keeps its averaged weights as a list without names, {checkpoint.key!r}, which no model "
            "loads: load it with the tool that saved it and save the model's state_dict(); to average the lists as "
            "they are, choose them with ",
            f"key={checkpoint.key!r}",
            f"--key {checkpoint.key}",
        )


def refuse_siblings(checkpoint: Checkpoint) -> None:
    """Refuse to take one of several state dicts that may be parts of one model, such as an encoder beside a decoder."""
    if checkpoint.siblings:
        there = name_list(list(checkpoint.siblings))
        raise OptionError(
            f"{checkpoint.path} holds weights under {checkpoint.key!r} and, with other names, under {there}, which may "
            "be parts of one model: say which are meant, and average each by itself where several are, ",
            f"by key={checkpoint.key!r} or key={checkpoint.siblings[0]!r}",
            f"by --key {checkpoint.key} or --key {checkpoint.siblings[0]}",
        )


# Weights that mean something only together with others.

_CODES = re.compile(r"(?:^|\.)(qweight|qzeros|W_q|weight_packed|int_weight|.*_blocks|.*_q?data)$")
_SCALES = {"_scale_inv", "_scale", "_scales", ".absmax", ".quant_map"}
_MODULE_SCALES = {
    "scales",
    "scale",
    "weight_scale",
    "weight_scale_inv",
    "scale_weight",
    "dequant_scale",
    "SCB",
}


def refuse_quantised(checkpoint: Checkpoint) -> None:
    """Refuse codes that stand for weights by scales beside them (GPTQ, AWQ, bitsandbytes, FP8 and MX formats)."""
    names = checkpoint.tensors
    for name, info in names.items():
        is_narrow = info.dtype.itemsize == 1 and info.dtype != torch.bool
        is_code = bool(_CODES.search(name)) and not info.dtype.is_floating_point
        if not (is_narrow or is_code):
            continue
        scales = [
            other for other in _scales_of(name, is_code or info.dtype.is_floating_point) if other in names
        ]
        if scales:
            raise CheckpointError(
                f"{checkpoint.path} is quantised: {name!r} holds codes, which mean something only with "
                f"{name_list(scales)}; the average of codes and of scales is no average of weights: dequantise it first"
            )
        if not info.dtype.is_floating_point and len(info.shape) > 1 and name.rpartition(".")[2] == "weight":
            raise CheckpointError(
                f"{checkpoint.path} is quantised: {name!r} holds codes in {info.dtype}, and no scales are there that "
                "say what they stand for: dequantise it first"
            )


def _scales_of(name: str, is_surely_code: bool) -> list[str]:
    """Where the scales of a tensor of codes would be; a buffer of small integers may lie beside a layer's own scale."""
    module, dot, leaf = name.rpartition(".")
    beside = _MODULE_SCALES if is_surely_code or leaf == "weight" else ()
    own = {f"{leaf.removesuffix('_blocks')}_scales", *beside} - {leaf}
    own.add(re.sub("_q?data$", "_scale", leaf))
    own.discard(leaf)
    return [name + suffix for suffix in _SCALES] + [f"{module}{dot}{other}" for other in sorted(own)]
