"""What is read: discover what lies at the paths, say of each what it is, then take it, leave it out, or refuse.

Other people's folders hold more than the checkpoints of a run: links and copies, the best and the last, averages beside
the live weights, one rank's part of a model, the state of an optimizer. One plan decides for every command what is
meant, and can be shown. What is not certain is refused, with what to type instead.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

from polyak import checkpoints
from polyak._checks import warn_user, whole_within
from polyak.checkpoints import Checkpoint, _checkpoint
from polyak.checkpoints._base import NoWeightsError
from polyak.checkpoints._dialects import is_no_weights_file
from polyak.combine import _beside, _runs
from polyak.combine._ranks import (
    opened_parts,
    refuse_missing_parts,
    refuse_parts,
    refuse_ranks,
    with_ranks_together,
)
from polyak.combine._roles import (
    Item,
    is_special,
    leave_out_averages_of_others,
    leave_out_copies,
    leave_out_half_precision,
    leave_out_links,
    leave_out_live_twins,
    leave_out_specials,
    leave_out_unfinished,
    refuse_mixed_kinds,
    refuse_pipeline,
    refuse_quantised,
    refuse_several_widths,
    refuse_siblings,
    refuse_without_names,
    same_weights,
)
from polyak.combine._steps import counted_from_one, number_in_name, steps_in_names
from polyak.errors import OptionError, PolyakError, name_list

__all__ = ["Reading", "read_inputs"]

_MAX_FOLDER_DEPTH = 4


@dataclass(eq=False)
class Reading:
    """The plan of what is read.

    Attributes:
        items: everything that was found; those that are taken come in step order where it is known, else as given.
        steps: the training step of each that is taken; None where they are not known for all.
        refusal: why nothing can be decided; None where it is.
        order_known: whether the items are in the order of training by their own word.
        unordered: why there is no order, which every profile but the uniform one needs; None where there is.
        of_two_runs: one line where steps say that files which were named one by one are of two runs; else empty.
    """

    items: list[Item] = field(default_factory=list)
    steps: list[int] | None = None
    refusal: PolyakError | None = None
    order_known: bool = False
    unordered: OptionError | None = None
    of_two_runs: str = ""

    @property
    def taken(self) -> list[Item]:
        """What is averaged."""
        return [item for item in self.items if item.taken]

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """Those of :attr:`taken`."""
        return [item.opened for item in self.taken]

    @property
    def left_out(self) -> str:
        """One line about what is not taken; empty where all is.

        >>> reading = Reading([Item(Path("last.ckpt"), "last.ckpt", False, why="the same file as step=40.ckpt")])
        >>> reading.left_out
        "left out: 'last.ckpt' (the same file as step=40.ckpt)"
        """
        reasons: dict[str, list[str]] = defaultdict(list)
        for item in self.items:
            if not item.taken:
                reasons[item.why].append(item.name)
        parts = [f"{name_list(names)} ({why})" for why, names in reasons.items()]
        return f"left out: {'; '.join(parts)}" if parts else ""

    @property
    def of_several_runs(self) -> str:
        """One line where what is taken is of several runs, by names as of seeds and folds or by steps; else empty."""
        return _runs.said_of_several([item.path for item in self.taken]) or self.of_two_runs

    def warn(self) -> None:
        """Say what is to be said on every run."""
        for line in filter(None, (self.left_out, self.of_several_runs)):
            warn_user(line)

    def refuse_unordered(self) -> None:
        """Raise ``OptionError`` where no order is known: a profile is about one run."""
        if self.unordered is not None:
            raise self.unordered

    def required(self, *, by_rank: bool = False) -> Reading:
        """Itself; raises the refusal where there is one, or where checkpoints are in parts, unless ``by_rank``."""
        if self.refusal is not None:
            raise self.refusal
        if not by_rank:
            refuse_parts(self.taken)
        return self


Paths = Iterable[str | PathLike[str]] | str | PathLike[str]


def read_inputs(
    paths: Paths,
    key: str | None = None,
    *,
    found: Collection[Path] = (),
    steps: Sequence[int] | None = None,
    last: int | None = None,
    all_count: bool = False,
    allow: Sequence[str] = (),
    keep_going: bool = False,
) -> Reading:
    """Plan what is read of ``paths``; nothing but headers is, unless two files may be copies of one.

    Args:
        paths: checkpoints, and folders of them.
        key: the nested key of the weights.
        found: those of ``paths`` that a pattern matched.
        steps: the training step of each that is taken, in the order of paths.
        last: take only the newest so many.
        all_count: every input has a weight of its own, so none is left out.
        allow: types that torch files may hold, see ``polyak.checkpoints.open``.
        keep_going: leave out what cannot be read, instead of refusing everything.
    """
    given = [Path(paths)] if isinstance(paths, str | PathLike) else [Path(path) for path in paths]
    reading = Reading()
    try:
        reading.items = with_ranks_together(_discovered(given, set(found)))
        refuse_ranks(reading.items)
        leave_out_links(reading.items, all_count)
        leave_out_unfinished(reading.items)
        _open(reading.items, key, allow, keep_going)
        reading.items = _beside.with_those_beside(reading.items)
        if not all_count:
            _beside.leave_out_averages_beside(reading.taken)
            leave_out_copies(reading.taken)
            leave_out_half_precision(reading.taken)
            leave_out_averages_of_others(reading.taken)
            leave_out_live_twins(reading.taken)
            if steps is None:
                leave_out_specials(reading.taken)
            refuse_several_widths(reading.taken)
        refuse_mixed_kinds(reading.taken, all_count)
        if key is None:
            _beside.complete_averages(reading.taken)
        _order(reading, steps, all_count)
        _take_last(reading, last)
        refuse_missing_parts(reading.taken)
        for item in reading.taken:
            for checkpoint in item.opened.parts.values() or (item.opened,):
                refuse_quantised(checkpoint)
                if key is None:
                    refuse_siblings(checkpoint)
            if key is None:
                refuse_without_names(item.opened)
    except PolyakError as error:
        reading.refusal = error
    return reading


# Discovering.


def _discovered(paths: list[Path], found: set[Path]) -> list[Item]:
    if not paths:
        raise OptionError("there is nothing to average: name one or more checkpoints, or a folder of them")
    items: list[Item] = []
    for path in paths:
        is_folder = path.is_dir()
        if is_folder and _checkpoint.is_recording(path):
            raise OptionError(
                f"{path} is a recorded run, whose blocks stand for unlike numbers of samples: "
                "take averages of it alone, ",
                f"by polyak.Trajectory({str(path)!r}).write, or let polyak.select choose one",
                "by polyak average, or let polyak select choose one",
            )
        if is_folder:
            refuse_pipeline(path)
        if is_folder and _checkpoint.is_checkpoint_folder(path):
            items += _with_those_below(path, alone=len(paths) == 1, given=path not in found)
        elif is_folder:
            inside = _inside(path)
            if not inside and path in found:
                continue
            if not inside:
                _checkpoint.recognise(path)  # says what the folder holds instead
            items += [
                Item(each, _below(each, path, len(paths)), False, why=why)
                for each, why in (*((one, "") for one in inside), *_without_weights(inside))
            ]
        else:
            items.append(Item(path, path.name, path not in found))
    return _with_distinct_names(items)


def _with_those_below(path: Path, alone: bool, given: bool) -> list[Item]:
    """A model's folder; where it is the only input and has checkpoints of the run below it, these."""
    below = _beside.checkpoints_below(path) if alone else []
    if not below:
        return [Item(path, path.name, given)]
    final = Item(
        path,
        path.name,
        False,
        why="the model above the checkpoints of its run: name it with others to take it",
    )
    return [final, *(Item(item, item.name, False) for item in below)]


def _inside(folder: Path, depth: int = 1) -> list[Path]:
    """Checkpoints in a folder; where there are none, those in its folders, a few levels down."""
    direct = [item for item in _checkpoint.checkpoint_paths(folder) if not is_no_weights_file(item.name)]
    # A single file may lie above the run: the best, the last, or something else.
    is_one_file = len(direct) == 1 and direct[0].is_file()
    if (direct and not is_one_file) or depth == _MAX_FOLDER_DEPTH:
        return direct
    folders = [item for item in folder.iterdir() if item.is_dir() and not item.name.startswith(".")]
    for sub in folders:
        refuse_pipeline(sub)
    return direct + [
        each
        for sub in sorted(folders, key=lambda item: _checkpoint.natural_order(item.name))
        if sub not in direct and not is_no_weights_file(sub.name)
        for each in _inside(sub, depth + 1)
    ]


def _without_weights(inside: list[Path]) -> list[tuple[Path, str]]:
    """Numbered folders beside those of checkpoints that are none, as a save that was cut off leaves them, and why."""
    kinds = {(path.parent, re.sub(r"\d+", "", path.name)) for path in inside if path.is_dir()}
    return [
        (folder, "a folder without a whole checkpoint, as of a save that was cut off")
        for parent in dict.fromkeys(parent for parent, _ in kinds)
        for folder in sorted(parent.iterdir())
        if folder not in inside and folder.is_dir() and (parent, re.sub(r"\d+", "", folder.name)) in kinds
    ]


def _below(path: Path, folder: Path, n_inputs: int) -> str:
    relative = path.relative_to(folder).as_posix()
    return relative if n_inputs == 1 else f"{folder.name}/{relative}"


def _with_distinct_names(items: list[Item]) -> list[Item]:
    """Names that more than one has get that of the folder around them."""
    counts = Counter(item.name for item in items)
    for item in items:
        if counts[item.name] > 1 and item.path.name == item.name:
            item.name = f"{item.path.absolute().parent.name}/{item.name}"
    return items


def _open(items: list[Item], key: str | None, allow: Sequence[str], keep_going: bool) -> None:
    for item in items:
        if not item.taken:
            continue
        try:
            item.checkpoint = (
                opened_parts(item, key, allow)
                if item.parts
                else checkpoints.open(item.path, key, allow=allow)
            )
            item.step = item.checkpoint.step
        except PolyakError as error:
            item.error = error
            if item.given:
                raise
            if not (keep_going or isinstance(error, NoWeightsError)):
                cure = "; to leave it out, name the others" if len(items) > 1 else ""
                raise type(error)("", f"{error}{cure}", error.for_command + cure) from error
            item.why = "holds no weights" if isinstance(error, NoWeightsError) else "cannot be read"
    errors = [item.error for item in items if item.error is not None]
    if errors and not any(item.taken for item in items):
        raise errors[0]


# Steps.


def _order(reading: Reading, steps: Sequence[int] | None, all_count: bool) -> None:
    """Put what is taken into step order; each step once."""
    if not all_count and steps is None:
        _leave_out_copies(reading.taken)
    items = reading.taken
    if not items:
        raise OptionError("there is nothing to average: name one or more checkpoints, or a folder of them")
    if steps is not None and len(steps) != len(items):
        raise OptionError(f"{len(steps)} steps were given for {len(items)} checkpoints: give one for each")
    if not all_count and steps is None:
        _refuse_several_nets(items)
    order: Sequence[int] | None = None
    given = None if steps is None else [whole_within("[0, inf)", "each of steps", step) for step in steps]
    try:
        known = _saved_steps(items) if given is None else given
    except OptionError as error:
        reading.unordered = error
        return
    if known is None:
        order, known = _order_in_names(reading, items)
    pair = None if known is None else _runs.of_two([item.path for item in items], known)
    if known is not None and pair is not None and (given is None or known[pair[0]] == known[pair[1]]):
        names, folders = [item.name for item in items], {item.path.parent for item in items}
        reading.unordered = _runs.refused_as_two(names, known, pair)
        if len(set(known)) > 1 or len(folders) < len(items):  # else a soup, a file of each run
            _refuse_what_was_found(reading, items, all_count)
            if len(set(known)) > 1 and not all_count:  # else files of one step that somebody chose
                reading.of_two_runs = _runs.said_of_two(names, known, pair)
        known = order = None
    elif known is None and order is None and reading.unordered is not None:
        _refuse_what_was_found(reading, items, all_count)
    for item, step in zip(items, known or [None] * len(items), strict=True):
        item.step = step
    if known is not None and not all_count:
        order = sorted(range(len(items)), key=known.__getitem__)
    reading.order_known = order is not None or (
        all(item.given for item in items) and not _runs.in_order_of_letters([item.path for item in items])
    )
    if not reading.order_known and reading.unordered is None:
        reading.unordered = _no_order(items)
    if order is not None and not all_count:
        ordered = [items[index] for index in order]
        reading.items = [*ordered, *(item for item in reading.items if not item.taken)]
        known = None if known is None else [known[index] for index in order]
    reading.steps = known


def _order_in_names(reading: Reading, items: list[Item]) -> tuple[Sequence[int] | None, list[int] | None]:
    """The order and the steps that names tell; where they tell none, the reading says why not."""
    paths = [item.path for item in items]
    try:
        named = steps_in_names(paths)
    except OptionError as error:
        reading.unordered = error
        return None, None
    if named is None or (named.unit == "number" and _runs.shared_by_folders(paths, named.values or ())):
        reading.unordered = _of_one_step(items) or _partly_known(items)
        return None, None
    return named.order, None if named.values is None else list(named.values)


def _refuse_what_was_found(reading: Reading, items: list[Item], all_count: bool) -> None:
    """Refuse files without an order that nobody named one by one: they may be of several kinds."""
    if not all_count and any(not item.given for item in items):
        reading.refuse_unordered()


def _saved_steps(items: list[Item]) -> list[int] | None:
    """The steps that all checkpoints say themselves, in one unit; None where they do not tell the checkpoints apart."""
    steps = [item.step for item in items]
    known = [step for step in steps if step is not None]
    epochs = [(item.opened.step_key or "").endswith("epoch") for item in items]
    if len(known) < len(steps) or len(set(epochs)) > 1:
        return None
    if len(set(known)) == len(known):
        _refuse_contradiction(items, known)
        return list(counted_from_one(known, "epoch" if epochs[0] else "step"))
    # Where several are of one epoch, or all of one step, the names may say more.
    try:
        named = steps_in_names([item.path for item in items])
    except OptionError:
        named = None
    if named is not None and (epochs[0] or len(set(known)) == 1):
        return None
    return known


def _refuse_contradiction(items: list[Item], known: list[int]) -> None:
    """Entries that order the checkpoints otherwise than a word in their names does."""
    try:
        named = steps_in_names([item.path for item in items])
    except OptionError:
        return
    if named is None or named.unit not in ("step", "epoch"):
        return
    told = [known[index] for index in named.order]
    if told != sorted(told):
        at = next(place for place in range(1, len(told)) if told[place - 1] > told[place])
        first, second = items[named.order[at - 1]], items[named.order[at]]
        raise _asking_for_steps(
            f"{first.name} is of step {first.step} by its entries and {second.name} of {second.step}, which is not the "
            "order of their names:"
        )


def _leave_out_copies(items: list[Item]) -> None:
    """Files of one folder that say one step: one of them if they hold equal weights, else refused."""
    by_step: dict[tuple[Path, int], list[Item]] = defaultdict(list)
    for item in items:
        if item.step is not None:
            by_step[item.path.parent, item.step].append(item)
    if len(by_step) < 2:
        shared = next(iter(by_step.values()), [])
        for item in [] if _are_numbered(items) else shared[1:]:
            if any(same_weights(one, item) for one in shared if one.taken and one is not item):
                item.why = f"the same weights as {shared[0].name}"
        return
    for same in by_step.values():
        kept = min(same, key=lambda item: is_special(item.name))
        for item in same:
            if item is kept:
                continue
            if not same_weights(kept, item):
                if _tell_apart(items):
                    return
                raise _asking_for_steps(
                    f"{kept.name} and {item.name} are both of step {item.step}, and hold different weights: name "
                    "one of them, or"
                )
            item.why = f"the same weights as {kept.name}"


def _are_numbered(items: list[Item]) -> bool:
    """Whether the names have numbers that tell them apart."""
    numbers = [number_in_name(item.path.stem) for item in items]
    return None not in numbers and len(set(numbers)) == len(numbers)


def _tell_apart(items: list[Item]) -> bool:
    """Whether the names tell apart what the entries do not: several checkpoints of one epoch."""
    if not all((item.opened.step_key or "").endswith("epoch") for item in items):
        return False
    named = steps_in_names([item.path for item in items])
    return named is not None and named.values is not None and named.unit != "epoch"


def _refuse_several_nets(items: list[Item]) -> None:
    """Refuse two nets at each of several steps, also where they were named one by one, as by a shell's pattern."""
    numbers = {number_in_name(item.path.stem) for item in items}
    kinds = {re.sub(r"\d+", "", item.path.name) for item in items}
    is_known = any(item.step is not None for item in items)
    shared = None if is_known or len(numbers) < 2 or len(kinds) < 2 else _of_one_step(items)
    if shared is not None:
        raise shared


def _of_one_step(items: list[Item]) -> OptionError | None:
    """Where files of one folder have the number of one step, and names of different nets."""
    first: dict[tuple[Path, int], Item] = {}
    for item in items:
        number = number_in_name(item.path.stem)
        if number is None:
            return None
        other = first.setdefault((item.path.parent, number), item)
        if other is not item:
            pattern = re.sub(rf"(?<!\d)0*{number}(?!\d)", "*", other.path.name)
            # The other one's too where its name is longer: step_*.pt is that of step_3_old.pt.
            pattern = pattern.replace("*", "*[0-9]") if item.path.match(pattern) else pattern
            return _asking_for_steps(
                f"{other.name} and {item.name} are both of step {number}, and differ in their names as different "
                f"networks or runs do: choose one by a pattern such as {pattern!r}, or, where they are one run,"
            )
    return None


def _partly_known(items: list[Item]) -> OptionError | None:
    """Where some say a step, in an entry or in the name, and the others do not, or not alike."""
    without = [item.name for item in items if item.step is None]
    if len(without) == len(items):
        without = [item.name for item in items if number_in_name(item.path.stem) is None]
        if len(without) == len(items):
            return None
    if not without:
        numbers = [number_in_name(item.path.stem) or 0 for item in items]
        pair = _runs.of_two([item.path for item in items], numbers)
        return (
            _runs.refused_as_two([item.name for item in items], numbers, pair) if pair else _no_order(items)
        )
    return _asking_for_steps(
        f"no training step is known of {name_list(without)}, as it is of the others: leave those out, for example by a "
        "pattern such as 'run/epoch_*.pt', or"
    )


def _asking_for_steps(message: str) -> OptionError:
    return OptionError(f"{message} give the step of each with ", "steps", "--steps")


def _no_order(items: list[Item]) -> OptionError:
    return OptionError(
        f"no step is known for {name_list([item.name for item in items])}, and the paths come in no order "
        "of training: ",
        "give steps, or a list from the oldest to the newest",
        "give the step of each with --steps",
    )


def _take_last(reading: Reading, last: int | None) -> None:
    if last is None:
        return
    reading.refuse_unordered()
    items = reading.taken
    last = whole_within("[1, inf)", "last", last)
    if last > len(items):
        raise OptionError(
            f"the last {last} of {len(items)} checkpoints cannot be taken: give 1 to {len(items)}"
        )
    for item in items[:-last]:
        item.why = f"older than the last {last}"
    reading.steps = None if reading.steps is None else reading.steps[-last:]
