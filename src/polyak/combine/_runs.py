"""Which checkpoints are of one run and which of several, by their names and folders; no file is opened."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from polyak.checkpoints._checkpoint import natural_order
from polyak.combine._steps import number_in_name, words_in_name
from polyak.errors import OptionError, name_list

__all__ = [
    "in_order_of_letters",
    "of_two",
    "refused_as_two",
    "said_of_several",
    "said_of_two",
    "shared_by_folders",
]


def of_two(paths: Sequence[Path], steps: Sequence[int]) -> tuple[int, int] | None:
    """Positions of two checkpoints that are of two runs: of one step, or of series whose steps lie between each other.

    A series is what lies in one folder under names that differ in numbers alone, that of a run not among them. Two of
    which one begins where the other ends are of one run that was gone on with.

    >>> of_two([Path("a/1.pt"), Path("a/3.pt"), Path("b/2.pt"), Path("b/4.pt")], [1, 3, 2, 4])
    (2, 1)
    >>> of_two([Path("run1_1.pt"), Path("run1_3.pt"), Path("run2_2.pt"), Path("run2_4.pt")], [1, 3, 2, 4])
    (2, 1)
    >>> of_two([Path("a/1.pt"), Path("a/2.pt"), Path("b/3.pt"), Path("b/4.pt")], [1, 2, 3, 4])
    """
    order = sorted(range(len(paths)), key=steps.__getitem__)
    for one, other in pairwise(order):
        if steps[one] == steps[other]:
            return one, other
    folders = _folders_of_runs(paths, steps)
    runs = [(folder, _name_of_run(path.name)) for folder, path in zip(folders, paths, strict=True)]
    oldest: dict[object, int] = {}
    newest: dict[object, int] = {}
    for at in order:
        oldest.setdefault(runs[at], at)
        newest[runs[at]] = at
    several = [run for run, at in oldest.items() if newest[run] != at]
    for run in several:
        begin, end = oldest[run], newest[run]
        for at in order:
            if runs[at] != run and runs[at] in several and steps[begin] < steps[at] < steps[end]:
                return at, end
    return None


def _folders_of_runs(paths: Sequence[Path], steps: Sequence[int]) -> list[tuple[str, ...]]:
    """The folders of each checkpoint, without those that are named after its step."""
    folders = [path.parent.parts for path in paths]
    of_runs = [
        depth
        for depth in range(max(map(len, folders)))
        if not all(
            depth < len(parts) and number_in_name(parts[depth]) in (step, step - 1)
            for parts, step in zip(folders, steps, strict=True)
        )
    ]
    return [tuple(parts[depth] for depth in of_runs if depth < len(parts)) for parts in folders]


def _name_of_run(name: str) -> tuple[str, ...]:
    """What a file's name says of its run: numbers of runs, and its words."""
    return (*(match[0].lower() for match in _NUMBERED_RUN.finditer(name)), *words_in_name(name))


def refused_as_two(names: Sequence[str], steps: Sequence[int], pair: tuple[int, int]) -> OptionError:
    """What is said where :func:`of_two` found a ``pair``."""
    return OptionError(
        f"{_as_of_two(names, steps, pair)}: name the files of one, or name each file and no profile, or give the step "
        "of each with ",
        "steps",
        "--steps",
    )


def said_of_two(names: Sequence[str], steps: Sequence[int], pair: tuple[int, int]) -> str:
    """One line about such a pair among files that were named one by one."""
    return f"{_as_of_two(names, steps, pair)}: {_TRAINED_APART}"


def _as_of_two(names: Sequence[str], steps: Sequence[int], pair: tuple[int, int]) -> str:
    first, other = (names[index] for index in pair)
    at, end = (steps[index] for index in pair)
    how = (
        f"are both of step {at}"
        if at == end
        else f"are of steps {at} and {end}, which overlap with each other's"
    )
    return f"{first} and {other} {how}, as of two runs"


def shared_by_folders(paths: Sequence[Path], values: Sequence[int]) -> bool:
    """Whether numbers that several have are those of folders, while the files have numbers of their own."""
    return len(set(values)) < len(values) and any(number_in_name(path.stem) is not None for path in paths)


def in_order_of_letters(paths: Sequence[Path]) -> bool:
    """Whether paths come as a shell's pattern gives them, with 10 before 9, which nobody means by an order.

    >>> in_order_of_letters([Path("10B.pt"), Path("4B.pt")]), in_order_of_letters([Path("4B.pt"), Path("10B.pt")])
    (True, False)
    """
    names = [str(path) for path in paths]
    return names == sorted(names) != sorted(names, key=natural_order)


_TRAINED_APART = (
    "the average of networks that were trained apart is worthless, unless all began from the same trained weights, as "
    "fine-tuned ones may"
)
_NUMBER_OF_RUN = r"s?)[-_= ]?(\d+)(?!\d)"
_NUMBERED_RUN = re.compile(
    rf"(?<![a-z])((?:seed|fold|trial|member|run|exp|experiment){_NUMBER_OF_RUN}", re.IGNORECASE
)
# Names of runs that began apart; run-2 may as well go on with run-1.
_OF_A_RUN = re.compile(rf"(?<![a-z])((?:seed|fold|trial|member){_NUMBER_OF_RUN}", re.IGNORECASE)


def said_of_several(paths: Sequence[Path]) -> str:
    """One line where names say that paths are of different runs, whose average seldom means anything; else empty.

    >>> said_of_several([Path("fold_0/final.pt"), Path("fold_1/final.pt")])
    "by their names these are runs of their own, 'fold_0', 'fold_1': the average of networks that were trained apart..."
    """
    numbers: dict[str, dict[str, str]] = defaultdict(dict)
    for path in paths:
        for match in _OF_A_RUN.finditer(str(path)):
            numbers[match[1].lower()].setdefault(match[2], match[0])
    several = next((list(found.values()) for found in numbers.values() if len(found) > 1), None)
    if several is None:
        return ""
    return f"by their names these are runs of their own, {name_list(several)}: {_TRAINED_APART}"
