"""Checkpoints that are one file for each rank: which files belong together, and the folder that their average is.

Each element of a model lies in the file of one rank, or is the same in several, so that the mean of each file is the
mean of the model. Files are grouped by their paths (``polyak.checkpoints._dialects``), and each group is opened as one
checkpoint, whose tensors are named after their file; from there on it is averaged like any other.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from polyak import checkpoints
from polyak.checkpoints import Checkpoint, Layout
from polyak.checkpoints._base import FORMATS
from polyak.checkpoints._checkpoint import format_for
from polyak.checkpoints._dialects import is_no_weights_file, rank_part
from polyak.checkpoints._folder import FolderFile, FolderWriter
from polyak.checkpoints._tree import NoWeightsError
from polyak.combine import _nesting, _outputs
from polyak.combine._roles import Item
from polyak.errors import CheckpointError, OptionError, name_list

__all__ = [
    "RankFolder",
    "opened_parts",
    "part_notes",
    "refuse_missing_parts",
    "refuse_parts",
    "refuse_ranks",
    "with_ranks_together",
]

# Which files belong together.

_LAYER = "layer"
# A part of one model: the number is that of a rank, of a shard, or of a part.
_PART = re.compile(
    r"consolidated\.(\d+)|(?:^|_)mp_rank_(\d+(?:_\d+)*)|tp_rank_(\d+_pp_rank_\d+)|zero_pp_rank_(\d+)|"
    r"-shard(\d+)|model_part-(\d+)|-(\d{5}-of-\d{5})(?=\.)"
)
# Perhaps a part: the best checkpoints are ranked too, from 1 on, and adapters have ranks.
_RANK = re.compile(r"(?:^|[_-])rank[_-]?(\d+)")


def with_ranks_together(items: list[Item]) -> list[Item]:
    """The same, where the files of several ranks that are one checkpoint are one item.

    >>> names = ("10/consolidated.00.pth", "10/consolidated.01.pth", "20/consolidated.00.pth")
    >>> [(item.name, len(item.parts)) for item in with_ranks_together([Item(Path(n), n, False) for n in names])]
    [('10', 2), ('20', 1)]
    """
    found = {item: known for item in items if item.taken and (known := _rank_part(item)) is not None}
    if len({part for part, _ in found.values()}) < 2:
        return items
    whole: dict[Path, Item] = {}
    together = []
    for item in items:
        if item not in found:
            if is_no_weights_file(item.path.name) and not item.given:
                item.why = item.why or "holds no weights"
            together.append(item)
            continue
        part, path = found[item]
        if path not in whole:
            whole[path] = Item(path, _name(item, path), True)
            together.append(whole[path])
        # Both relative or both absolute.
        whole[path].parts[part] = item.path.absolute() if path.is_absolute() else item.path
        whole[path].given &= item.given
    return together


def _rank_part(item: Item) -> tuple[str, Path] | None:
    if is_no_weights_file(item.path.name):
        return None
    return rank_part(item.path) or rank_part(item.path.absolute())


def _name(item: Item, whole: Path) -> str:
    """The name of a checkpoint as that of its part is shown: from the input on in which it was found."""
    shown = rank_part(Path(f"/{item.name}"))
    return (shown[1].as_posix().strip("/") if shown else "") or whole.name


def refuse_ranks(items: list[Item]) -> None:
    """Refuse parts of one model, of different ranks or shards, that are not known to belong together."""
    whole = [item for item in items if item.taken and not item.parts]
    parted = [item.name for item in items if item.parts]
    if parted and any(not is_no_weights_file(item.path.name) for item in whole):
        raise OptionError(
            f"{name_list(parted)} are in parts, one a rank, and {name_list([item.name for item in whole])} are not: "
            "take the one or the other, by a pattern"
        )
    ranks = _by_number(whole, _PART)
    if len(ranks) < 2:
        ranks = _by_number(whole, _RANK)
        if len(ranks) < 2 or all(int(rank) > 0 for rank in ranks):
            return
    names = [item.name for item in ranks.values()]
    cure = (
        "gather DeepSpeed's weights first, with the zero_to_fp32.py beside them"
        if any("zero_pp_rank" in name for name in names)
        else "average the files of each rank by themselves, by a pattern for each, or gather the model first"
    )
    raise OptionError(
        f"{name_list(names)} are parts of one model, of different ranks or shards of it: {cure}"
    )


def _by_number(items: list[Item], pattern: re.Pattern[str]) -> dict[str, Item]:
    """The first item of each number that ``pattern`` finds in a name, or in the names of the two folders above."""
    found: dict[str, Item] = {}
    for item in items:
        for part in (*item.path.parts[-3:-1], item.path.name):
            if match := pattern.search(part):
                found.setdefault(next(filter(None, match.groups())), item)
                break
    return found


def opened_parts(item: Item, key: str | None, allow: Sequence[str]) -> Checkpoint:
    """The files of all ranks, as one checkpoint; those without weights are passed over.

    Raises as ``polyak.checkpoints.open``; ``CheckpointError`` where the parts are of several steps, or hold other
    weights.
    """
    opened: dict[str, Checkpoint] = {}
    empty: list[NoWeightsError] = []
    for part, path in sorted(item.parts.items()):
        try:
            opened[part] = checkpoints.open(path, key, allow=allow)
        except NoWeightsError as error:
            empty.append(error)
    if not opened:
        raise empty[0]
    _refuse_unlike(item, opened)
    return Checkpoint.joined(item.path, opened, _counted(opened))


def _counted(parts: Sequence[str] | Mapping[str, object]) -> str:
    """How many ranks there are; a pipeline's layers have files of their own for each."""
    is_of_layers = any(part.startswith(_LAYER) for part in parts)
    return f"{len(parts)} {'files of ranks and layers' if is_of_layers else 'ranks'}"


def _refuse_unlike(item: Item, opened: Mapping[str, Checkpoint]) -> None:
    steps = {one.step: part for part, one in reversed(list(opened.items())) if one.step is not None}
    if len(steps) > 1:
        told = [f"{part} is of step {step}" for step, part in sorted(steps.items())]
        raise CheckpointError(
            f"the files of {item.path} are not of one moment: {'; '.join(told[:3])}. It was cut off while it was "
            "saved, or saved over another: leave it out"
        )
    keys = {one.key: part for part, one in reversed(list(opened.items()))}
    if len(keys) > 1:
        told = [f"{part} under {key!r}" if key else f"{part} at the top" for key, part in keys.items()]
        raise CheckpointError(
            f"the files of {item.path} hold unlike weights: {' and '.join(told[:3])}; choose one for all with ",
            "key",
            "--key",
        )


def part_notes(items: Sequence[Item]) -> Iterator[str]:
    """What to know where one rank's part is taken, and those of other ranks lie beside it."""
    for item in items:
        known = None if item.parts else _rank_part(item)
        if known is None:
            continue
        folder = item.path.absolute().parent
        near = [rank_part(path) for path in (*folder.iterdir(), *folder.parent.glob(f"*/{item.path.name}"))]
        others = sorted(
            {one[0] for one in near if one and one[1] == known[1].absolute() and one[0] != known[0]}
        )
        if others:
            yield (
                f"{item.name} is one part of a checkpoint, whose others are {name_list(others)}: what is written is "
                "that part of the model alone; name the folders around the ranks to average all of it"
            )
            return


# What is refused.


def refuse_missing_parts(items: Sequence[Item]) -> None:
    """Refuse checkpoints of which one lacks the file of a rank that another has, or all lack one between others."""
    holders = {part: item for item in items for part in item.opened.parts}
    for item in items:
        lacking = sorted(part for part in holders if part not in item.opened.parts)
        if lacking:
            raise OptionError(
                f"{item.name} lacks {name_list(lacking)}, which {holders[lacking[0]].name} has: all checkpoints must "
                "have the same ranks, so fetch the files or leave the checkpoint out"
            )
    if missing := list(itertools.islice(_missing(holders), 3)):
        raise OptionError(
            f"no checkpoint has {name_list(missing)}, the file of a rank beside {name_list(sorted(holders))}: an "
            "average of the others would be no model, so fetch the files"
        )


def _missing(parts: Mapping[str, Item]) -> Iterator[str]:
    """Names between those of parts: their numbers are all combinations of 0, 1, …; only layers may be left out."""
    ranks: dict[str, dict[tuple[int, ...], str]] = defaultdict(dict)
    for part in parts:
        ranks[re.sub(r"\d+", "#", part)][tuple(map(int, re.findall(r"\d+", part)))] = part
    for template, names in ranks.items():
        if template.startswith(_LAYER):
            continue
        sizes = [max(axis) + 1 for axis in zip(*names, strict=True)]
        example = next(iter(names.values()))
        for index in range(math.prod(sizes)):
            numbers = _place(index, sizes)
            if numbers not in names:
                yield _numbered(example, numbers)


def _place(index: int, sizes: Sequence[int]) -> tuple[int, ...]:
    """Where the element ``index`` of a grid lies; ``np.unravel_index`` for sizes that a file name may claim."""
    numbers: list[int] = []
    for size in reversed(sizes):
        index, number = divmod(index, size)
        numbers.insert(0, number)
    return tuple(numbers)


def _numbered(example: str, numbers: Sequence[int]) -> str:
    """The name with other numbers, as wide as its own."""
    rest = iter(numbers)
    return re.sub(r"\d+", lambda match: f"{next(rest):0{len(match[0])}d}", example)


def refuse_parts(items: Sequence[Item]) -> None:
    """Refuse what is one file for each rank, for those who need a whole model."""
    if parted := [item for item in items if item.parts]:
        raise OptionError(
            f"{name_list([item.name for item in parted])} are in parts, {_counted(parted[0].parts)}, which "
            f"no model loads by itself: 'polyak average {parted[0].name} ... -o average/' averages such checkpoints "
            "rank by rank; for anything else make whole ones first, with the converter of the tool that wrote them"
        )


# The folder that an average is.


@dataclass(eq=False)
class RankFolder:
    """The output for inputs that are one file for each rank: a folder with a file for each.

    Attributes:
        layout: of all files together, with the small files beside them.
        files: the name of each rank's file in the folder, and its layout.
        notes: what to know about it, one sentence each.
    """

    inputs: Sequence[Checkpoint]
    output: Path
    layout: Layout
    files: dict[str, tuple[str, Layout]] = field(init=False)
    notes: list[str] = field(init=False)

    def __post_init__(self) -> None:
        first = self.inputs[0]
        if self.output.suffix and any(self.output.suffix in known.suffixes for known in FORMATS.values()):
            raise OptionError(
                f"{name_list([one.path.name for one in self.inputs])} are in parts, {_counted(first.parts)} "
                f"({name_list(list(first.parts))}), and so is their average, a folder: name an output without a "
                f"suffix, such as -o {self.output.stem}/, or average the files of one rank alone"
            )
        self.files = {}
        for part, one in first.parts.items():
            name = self._file_name(one.path)
            format_for(self.output / name, None)
            self.files[part] = name, _of_part(self.layout, part)
        self.notes = [f"written for each rank: {name_list([name for name, _ in self.files.values()])}"]
        if first.path.is_dir():
            self._copy_from([one.path for one in self.inputs])

    def _file_name(self, file: Path) -> str:
        """As in the inputs; where a folder has files of several steps, the output's name is in the place of theirs."""
        whole = self.inputs[0].path
        if file.is_relative_to(whole):
            return file.relative_to(whole).as_posix()
        names = {one.path.name for one in self.inputs}
        own = file.name if len(names) == 1 else self.output.name + file.name.removeprefix(whole.stem)
        return (file.parent.relative_to(whole.parent) / own).as_posix()

    def _copy_from(self, folders: Sequence[Path]) -> None:
        copied, left_out = _outputs.small_files(folders[0])
        own = {name.partition("/")[0] for name, _ in self.files.values()}
        self.layout = replace(self.layout, beside={file.name: file for file in copied})
        home = folders[0].name
        if copied:
            self.notes.append(f"copied from {home}: {name_list([file.name for file in copied], most=20)}")
        if others := [name for name in left_out if name not in own]:
            self.notes.append(f"not copied from {home}: {name_list(others, most=20)}")
        for file in copied:
            others = [folder / file.name for folder in folders[1:] if (folder / file.name).is_file()]
            if any(other.read_bytes() != file.read_bytes() for other in others):
                self.notes.append(f"the inputs' {file.name} differ: what {home} says was copied")

    def nest(self, found: Sequence[Item], like: Path, key: str | None) -> None:
        """Nest each file as that of the same rank of what was ``found`` at ``like``. Raises as ``nested_like``."""
        if len(found) != 1 or any(part not in found[0].parts for part in self.files):
            raise OptionError(
                f"{like} is not one checkpoint with a file for each of the ranks {name_list(list(self.files))}: "
                "name one to nest as, or leave out ",
                "like",
                "--like",
            )
        notes = {}
        for part, (name, layout) in self.files.items():
            nested, note = _nesting.nested_like(layout, found[0].parts[part], key, self.output / name)
            self.files[part] = name, nested
            notes[note] = None
        self.notes += notes

    def create(self, metadata: Mapping[str, str], overwrite: bool) -> FolderWriter:
        """Begin the folder; ``metadata`` go into each file."""
        files = [
            FolderFile(
                name,
                FORMATS[format_for(self.output / name, None)],
                replace(layout, metadata=metadata),
                f"{part}/",
            )
            for part, (name, layout) in self.files.items()
        ]
        return FolderWriter(self.output, self.layout, overwrite, files, notes_names=True)


def _of_part(layout: Layout, part: str) -> Layout:
    begin = f"{part}/"
    return Layout(
        {name.removeprefix(begin): info for name, info in layout.tensors.items() if name.startswith(begin)},
        {
            tied.removeprefix(begin): name.removeprefix(begin)
            for tied, name in layout.ties.items()
            if tied.startswith(begin)
        },
    )
