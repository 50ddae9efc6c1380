"""Training steps in the names of checkpoints, read as a person reads them; no file is opened."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

from polyak.errors import OptionError

__all__ = [
    "NamedSteps",
    "counted_from_one",
    "number_in_name",
    "steps_in_names",
    "words_in_name",
]


@dataclass(frozen=True)
class NamedSteps:
    """What the names of checkpoints say about their order.

    Attributes:
        values: the training step of each name, in the order of the names; None where only the order is known. Two
            names have the same one where they say so, such as ``epoch_3.pt`` and ``epoch_3-v1.pt``.
        order: positions of the names, oldest first.
        unit: what is counted: ``"step"``, ``"epoch"``, ``"number"`` where no word says which, ``"time"``, or
            ``"epoch and step"`` where the step begins again in each epoch.
    """

    values: tuple[int, ...] | None
    order: tuple[int, ...]
    unit: str


def steps_in_names(paths: Sequence[Path]) -> NamedSteps | None:
    """The training steps that tell the names apart, or their order; None where the names say no order.

    A number with a word for steps comes first, then one with a word for epochs, then one that stands by itself, the
    last where there are several, then dates and times. Names of the two folders above are read where those of the
    files say less. Metrics, rates, hashes, seeds, ranks, versions and sizes are no steps. Where epochs, or numbers
    that nothing says to be steps, begin at 0, they are counted from 1.

    Raises ``OptionError`` where numbers contradict each other about the order and nothing says which of them counts,
    and where ``step_1_500.pt`` may be of step 1 or of step 1500.

    >>> steps_in_names([Path("epoch=1-step=500.ckpt"), Path("epoch=2-step=1000.ckpt")]).values
    (500, 1000)
    >>> steps_in_names([Path("epoch1_loss0.90.pt"), Path("epoch2_loss0.50.pt")]).values
    (1, 2)
    >>> steps_in_names([Path("run/9/model_bf16.pt"), Path("run/10/model_bf16.pt")]).values
    (9, 10)
    >>> steps_in_names([Path("epoch_1_step_50.pt"), Path("epoch_0_step_900.pt")])
    NamedSteps(values=None, order=(1, 0), unit='epoch and step')
    >>> steps_in_names([Path("best.pt"), Path("last.pt")])
    """
    if not paths:
        return None
    moments, levels = _without_moments([_last_names(path) for path in paths])
    _refuse_unclear_thousands(levels[0], paths)
    levels = [_columns(_without_separators(names)) for names in levels]
    if len(paths) == 1:
        columns = [column for column in levels[0] if not _is_size(column.word, column.values[0])]
        columns += [column for level in levels[1:] for column in level if column.word in _WORDS]
    else:
        columns = [column for level in [*levels, moments] for column in level if not column.is_constant]
    steps = [column for word in _STEP_WORDS for column in columns if column.word == word]
    epochs = [column for column in columns if column.word == "epoch"]
    # Steps and epochs may begin again in each stage of a training.
    for stage in (column for column in columns if column.word == "stage"):
        for column in (*steps, *epochs):
            _refuse_contradiction(column, stage, paths)
    if steps:
        return _of_steps(steps, epochs, paths)
    numbers = [column for column in columns if column.word in ("number", "stage")]
    if epochs:
        return _of_epochs(epochs, numbers, paths)
    return _of_numbers(numbers, [column for column in columns if column.word == "time"], paths)


def number_in_name(name: str) -> int | None:
    """The number in one name that could be its training step; None for names such as ``best.pt``.

    Dates are none, and neither is what belongs to the name of a model in ``gpt2-best.pt`` and ``olmo-1B.pt``.

    >>> number_in_name("checkpoint_0500.pth"), number_in_name("ckpt_1.5M.pt"), number_in_name("best_0.91_fp16.pt")
    (500, 1500000, None)
    """
    stem = _NO_YEAR.sub(_BLANK, _stem(name))
    for moment in _MOMENTS:
        stem = moment.sub(_BLANK, stem)
    found = _readings(*_without_separators([stem]))
    said = [number for word in _WORDS for number in reversed(found) if number.word == word]
    if not said:
        stands_apart = _APART.search(stem) is not None
        said = [
            number
            for number in reversed(found)
            if number.word == "number"
            and not (number.is_attached and stands_apart)
            and not _is_size(number.word, number.value)
        ]
    return int(said[0].value) if said else None


def words_in_name(name: str) -> tuple[str, ...]:
    """The words of a name that are not those of numbers, as units and ordinals are, nor a version's.

    >>> words_in_name("runA_step_1M-v1.pt"), words_in_name("3rd_epoch_0.91.pt")
    (('runa', 'step'), ('epoch',))
    """
    words = _FREE_WORD.findall(_BLANKED.sub(_BLANK, _stem(name)).lower())
    return tuple(word for word in words if word != "v")


def _is_size(word: str, value: Fraction) -> bool:
    """Whether a number may be that of a model's parameters; only other names tell whether ``1B`` counts anything."""
    return word == "number" and value >= _UNITS["B"]


def counted_from_one(values: Sequence[int], unit: str) -> tuple[int, ...]:
    """Values of which the first stands for one that was trained, where it is an epoch or a number of unknown unit.

    >>> counted_from_one([0, 1], "epoch"), counted_from_one([0, 50], "step")
    ((1, 2), (0, 50))
    """
    if unit in ("epoch", "number") and min(values) <= 0:
        return tuple(value + 1 for value in values)
    return tuple(values)


# From columns, each a number that all names have, to steps.


@dataclass(frozen=True)
class _Column:
    """One number of every name: what the word beside it says, and values that can be compared."""

    word: str
    values: tuple[Any, ...]
    has_units: bool = False

    @property
    def is_constant(self) -> bool:
        return len(set(self.values)) == 1

    @property
    def is_distinct(self) -> bool:
        return len(set(self.values)) == len(self.values)

    @property
    def unit(self) -> str:
        if self.word in _STEP_WORDS or self.has_units:
            return "step"
        return "number" if self.word == "stage" else self.word

    def named_steps(self, paths: Sequence[Path]) -> NamedSteps:
        order = _order(self.values, paths)
        if self.word == "time" or any(value.denominator != 1 for value in self.values):
            return NamedSteps(None, order, self.unit)
        return NamedSteps(
            counted_from_one([int(value) for value in self.values], self.unit), order, self.unit
        )


def _order(values: Sequence[Any], paths: Sequence[Path]) -> tuple[int, ...]:
    def rank(index: int) -> tuple[Any, ...]:
        # Equal ones by name, the plain one before its -v1.
        path = paths[index]
        return values[index], str(path.parent / _stem(path.name)), path.name

    return tuple(sorted(range(len(paths)), key=rank))


def _of_steps(steps: Sequence[_Column], epochs: Sequence[_Column], paths: Sequence[Path]) -> NamedSteps:
    for other in steps[1:]:
        _refuse_contradiction(steps[0], other, paths)
    step = _first_distinct(steps)
    if not epochs:
        return step.named_steps(paths)
    epoch = _first_distinct(epochs)
    pairs = _Column("epoch and step", tuple(zip(epoch.values, step.values, strict=True)))
    begins_again = _contradiction(epoch, step) is not None
    if not begins_again and len(set(pairs.values)) == len(set(step.values)):
        return step.named_steps(paths)
    if not pairs.is_distinct:
        _refuse_equal(pairs, paths)
    return NamedSteps(None, _order(pairs.values, paths), pairs.word)


def _of_epochs(epochs: Sequence[_Column], numbers: Sequence[_Column], paths: Sequence[Path]) -> NamedSteps:
    epoch = _first_distinct(epochs)
    if not epoch.is_distinct:
        # Several in one epoch, which another number counts through.
        for number in numbers:
            if number.is_distinct and _contradiction(epoch, number) is None:
                return number.named_steps(paths)
    return epoch.named_steps(paths)


def _of_numbers(
    numbers: Sequence[_Column], times: Sequence[_Column], paths: Sequence[Path]
) -> NamedSteps | None:
    columns = [*numbers, *times]
    if not columns:
        return None
    for index, column in enumerate(columns):
        for other in columns[:index]:
            _refuse_contradiction(other, column, paths)
    chosen = _first_distinct(columns)
    if not chosen.is_distinct and len(columns) > 1:
        return None
    if chosen.word == "number":
        _refuse_strangers(paths)
    return chosen.named_steps(paths)


# Words that checkpoints of any model have.
_OF_ANY_MODEL = {"checkpoint", "ckpt", "model", "net", "network", "params", "state", "weights"}


def _refuse_strangers(paths: Sequence[Path]) -> None:
    """Refuse the number of another model beside a series of several: that of ``resnet50.pt`` beside ``run_1.pt``."""
    names = [_CAMEL.findall(_BLANKED.sub(_BLANK, _stem(path.name))) for path in paths]
    # Single letters are units.
    words = [
        frozenset(word.lower() for word in name if len(word) > 1 and not _word(word)) - _OF_ANY_MODEL
        for name in names
    ]
    series = [path for path, own in zip(paths, words, strict=True) if words.count(own) > 1]
    shared = set().union(*(own for own in words if words.count(own) > 1))
    for path, own in zip(paths, words, strict=True):
        if series and own and path not in series and not own & shared:
            raise OptionError(
                f"{path.name} has, by its name, no part in the series of {series[0].name}: leave it out, by a pattern "
                "of the others, or ",
                "give the step of each with steps",
                "give the step of each with --steps",
            )


def _first_distinct(columns: Sequence[_Column]) -> _Column:
    return next((column for column in columns if column.is_distinct), columns[0])


def _contradiction(first: _Column, second: _Column) -> tuple[int, int] | None:
    """Two positions of which one column puts the first before, and the other after."""
    pairs = list(zip(first.values, second.values, strict=True))
    for index, other in pairwise(sorted(range(len(pairs)), key=pairs.__getitem__)):
        if pairs[index][1] > pairs[other][1]:
            return index, other
    return None


def _refuse_contradiction(first: _Column, second: _Column, paths: Sequence[Path]) -> None:
    found = _contradiction(first, second)
    if found is None:
        return
    index, other = found
    says = [
        f"{_shown(column.values[index])} and {_shown(column.values[other])}" for column in (first, second)
    ]
    raise OptionError(
        f"the numbers in the names contradict each other: {paths[index]} comes before {paths[other]} by "
        f"{says[0]}, and after it by {says[1]}, and nothing says which of them is the training step: ",
        "give one for each checkpoint with steps=[…]",
        "give one for each checkpoint with --steps",
    )


def _refuse_equal(pairs: _Column, paths: Sequence[Path]) -> None:
    order = _order(pairs.values, paths)
    index, other = next(
        (index, other) for index, other in pairwise(order) if pairs.values[index] == pairs.values[other]
    )
    raise OptionError(
        f"{paths[index]} and {paths[other]} are of the same epoch and step: leave one of them out, or ",
        "give one training step for each checkpoint with steps=[…]",
        "give one training step for each checkpoint with --steps",
    )


def _shown(value: Any) -> str:
    return "-".join(map(str, value)) if isinstance(value, tuple) else str(value)


# From names to columns.


def _last_names(path: Path) -> str:
    """The name of a file after those of the two folders above it."""
    path = path.absolute()
    return _NO_YEAR.sub(_BLANK, f"{path.parent.parent.name}/{path.parent.name}/{_stem(path.name)}")


def _without_moments(names: Sequence[str]) -> tuple[list[_Column], list[list[str]]]:
    """Dates and times that all names have, and the rest of the names: of the files, and of each folder above."""
    columns: list[_Column] = []
    for moment in _MOMENTS:
        found = [list(moment.finditer(name)) for name in names]
        if all(found):
            matched = zip(*([_parts(match) for match in matches] for matches in found), strict=False)
            columns = [_Column("time", column) for column in reversed(list(matched))]
            # A date may be the name of a folder, and the time that of one in it.
            names = [moment.sub(lambda match: _BLANK + "/" * match[0].count("/") + _BLANK, n) for n in names]
            break
    levels = zip(*(reversed(name.split("/")) for name in names), strict=True)
    return columns, [list(level) for level in levels]


# The digits of a large number in threes, as in 10_000 and 10,000; where a step is said to be such a number.
_THOUSANDS = re.compile(r"(?<!\d)(?<!\d[_,.])[1-9]\d{0,2}(?:[_,]\d{3})+(?!\d)(?![_,]\d+(?![\d.]))")
_STEP_OF_THOUSANDS = re.compile(
    rf"(?:step|iter|iteration|update)s?[-_=]?(?:{_THOUSANDS.pattern})", re.IGNORECASE
)
_PAIR = re.compile(r"\d_\d")


def _without_separators(names: Sequence[str]) -> list[str]:
    """The names with ``10_000`` as ``10000``, where they show that it is one number, and no epoch and update.

    A second number seldom begins with a zero, and its digits do not come in threes as often as there are.

    >>> _without_separators(["900", "1_000"]), _without_separators(["1_500", "2_500"]), _without_separators(["1,500"])
    (['900', '1000'], ['1_500', '2_500'], ['1500'])
    """
    found = [_THOUSANDS.findall(name) for name in names]
    groups = [re.split("[_,]", number) for numbers in found for number in numbers]
    is_one_number = (
        any("," in number for numbers in found for number in numbers)
        or any(group.startswith("0") for _, *rest in groups for group in rest)
        or len({len(those) for those in groups}) > 1
    )
    has_pairs = any(not numbers and _PAIR.search(name) for name, numbers in zip(names, found, strict=True))
    if not is_one_number or has_pairs:
        return list(names)
    return [_THOUSANDS.sub(lambda match: re.sub("[_,]", "", match[0]), name) for name in names]


def _refuse_unclear_thousands(names: Sequence[str], paths: Sequence[Path]) -> None:
    """Refuse ``step_1_500`` and ``step_2_750`` where nothing shows whether the first number is the step."""
    joined = _without_separators(names)
    unclear = [path for path, name in zip(paths, joined, strict=True) if _STEP_OF_THOUSANDS.search(name)]
    if len(unclear) == len(paths):
        number = _THOUSANDS.findall(unclear[0].name)[-1]
        raise OptionError(
            f"{number!r} in {unclear[0]} may be the step {re.sub('[_,]', '', number)}, or a step and another number: ",
            "give one for each checkpoint with steps=[…]",
            "give one for each checkpoint with --steps",
        )


def _parts(moment: re.Match[str]) -> tuple[int, ...]:
    return tuple(int(part) for part in moment.groups() if part and part.isdecimal())


def _stem(name: str) -> str:
    """The name without its suffixes; a number is none, such as that of ``snapshot.ep.10``."""
    return _SUFFIX.sub("", name)


def _columns(names: Sequence[str]) -> list[_Column]:
    columns = []
    read = [_readings(name) for name in names]
    for word in _WORDS:
        columns += _aligned(word, [[number for number in found if number.word == word] for found in read])
    numbers = [[number for number in found if number.word == "number"] for found in read]
    if len({len(found) for found in numbers}) == 1:
        columns += _aligned("number", numbers)
    return columns


def _aligned(word: str, numbers: Sequence[Sequence[_Number]]) -> list[_Column]:
    """The last first."""
    columns = zip(*numbers, strict=False)
    return [
        _Column(word, tuple(number.value for number in column), any(number.has_unit for number in column))
        for column in reversed(list(columns))
    ]


# From one name to the numbers in it.


@dataclass(frozen=True)
class _Number:
    """A number that could be a step: what the word beside it says, and whether it is part of another word, ``gpt2``."""

    word: str
    value: Fraction
    has_unit: bool = False
    is_attached: bool = False


_STEP_WORDS = {
    "step": r".*steps?",
    "iteration": r"(?:.*[^br])?iter(?:ation)?s?|its?",
    "update": r".*updates?|upd",
    "batch": r"(?:mini)?batch(?:es)?|ba",
}
_WORDS = {
    word: re.compile(pattern, re.IGNORECASE)
    for word, pattern in {
        **_STEP_WORDS,
        "epoch": r".*epochs?|ep|e",
        "stage": r"stage|phase|cycle|round|task",
    }.items()
}
# What numbers after these words are: metrics, hyper-parameters, sizes, dtypes, versions, one of several runs or ranks.
_OTHER_WORDS = re.compile(
    r"loss|acc|accuracy|wer|cer|bleu|rouge|ppl|perplexity|auc|miou|iou|dice|psnr|ssim|lpips|fid|mse|mae|rmse|err|error"
    r"|score|reward|return|metric|recall|precision|nll|kl|elbo|bpc"
    r"|lr|wd|decay|dropout|beta|gamma|alpha|temp|bs|r|layers?|dim|hidden|heads|size|res|tokens"
    r"|fp|bf|tf|f|u?int|float|q|v|ver|version|rev"
    r"|seed|rank|fold|worker|gpu|shard|replica|run|trial|exp|experiment",
    re.IGNORECASE,
)
# Names of single checkpoints, outside a series.
_APART = re.compile(
    r"(?<![a-z])(?:best|last|latest|final|init|initial|average|averaged|avg|ema|swa|pretrained)(?![a-z])",
    re.IGNORECASE,
)

_SUFFIX = re.compile(r"(?:\.(?!(?:steps?|epochs?|iters?|ep|it)$)(?:[A-Za-z_]+|h5|t7)){1,2}$", re.IGNORECASE)

_DATE = r"(?<!\d)((?:19|20)\d\d)([-_.]?)(0[1-9]|1[0-2])\2(0[1-9]|[12]\d|3[01])"
_CLOCK = (
    r"(?:[-_+T. /]{0,3}([01]\d|2[0-3])([-:_.h]?)([0-5]\d)\6([0-5]\d)(?:[+.](\d{1,6}))?"
    r"|[-_+T. /]{1,3}([01]\d|2[0-3])[-:_.h]([0-5]\d))"
)
# A time alone, and seconds or milliseconds since 1970.
_CLOCK_ALONE = r"(?<!\d)([01]\d|2[0-3])([-:])([0-5]\d)\2([0-5]\d)"
_SINCE_1970 = r"(?<!\d)(1[4-9]\d{8}(?:\d{3})?)"
_NO_STEP_BEFORE = r"(?<!step)(?<!step[-_=.])(?<!iter)(?<!iter[-_=.])(?<!epoch)(?<!epoch[-_=.])"
# TensorBoard's May01_10-58-41, of which nothing says whether December comes before January.
_NO_YEAR = re.compile(
    r"(?<![a-z])(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]{0,6}[-_. ]?\d{1,2}"
    r"[-_T. ]\d\d[-:_.]\d\d(?:[-:_.]\d\d)?(?!\d)",
    re.IGNORECASE,
)
_MOMENTS = [
    re.compile(rf"{_NO_STEP_BEFORE}{moment}(?!\d)", re.IGNORECASE)
    for moment in (_DATE + _CLOCK, _DATE, _CLOCK_ALONE, _SINCE_1970)
]

# Put in the place of what is no number to be read: hashes, rates, versions, k of n, names of metrics, moments.
_BLANK = "\0"
_HASH = (
    r"(?<![0-9a-z])(?!(?:(?:ba|e)\d+|\d{1,3}e\d\d?)(?![0-9a-z]))"
    r"(?=[0-9a-f]*\d)(?=\d*[a-f])[0-9a-f]{6,}(?![0-9a-z])"
)
_BLANKED = re.compile(
    rf"{_HASH}|\d+(?:\.\d+)?e-\d{{1,2}}(?!\d)|\d{{19,}}"
    # The metric in 10.0.91, and versions.
    r"|(?<=\d)\.0\.\d+(?![.\d])|\d+(?!\.0\.\d+(?![.\d]))(?:\.\d+){2,}"
    # Shards, and the number of all epochs.
    rf"|{_NO_STEP_BEFORE}(?<!\d)\d+[-_]?of[-_]?\d+|(?<=\d)[-_]?of[-_]?\d+"
    r"|(?<![a-z])(?:f1|r2|top[-_]?[15]|map[-@]?50(?:-95)?)(?!\d)",
    re.IGNORECASE,
)
_TOKEN = re.compile(
    r"(?P<number>(?<![0-9A-Za-z])\d{1,3}(?:\.\d+)?e\d\d?(?![0-9A-Za-z])|\d+(?:\.\d+)?(?:(?:[km]|(?-i:B))(?![0-9A-Za-z]))?)"
    r"|(?P<word>[A-Za-z]+)|(?P<gap>[^0-9A-Za-z]+)",
    re.IGNORECASE,
)
_FREE_WORD = re.compile(r"(?<![0-9a-z])[a-z]+")
_CAMEL = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
# Billions are written with a capital; a small b is a letter behind an a.
_UNITS = {"k": 10**3, "K": 10**3, "m": 10**6, "M": 10**6, "B": 10**9}
# More signs than this between a word and a number, as in a blank, and they do not belong together.
_MOST_SIGNS = 3


def _readings(stem: str) -> list[_Number]:
    tokens = [(match.lastgroup or "", match[0]) for match in _TOKEN.finditer(_BLANKED.sub(_BLANK, stem))]
    words_follow = _words_follow(tokens)
    found = (
        _reading(tokens, index, words_follow) for index, (kind, _) in enumerate(tokens) if kind == "number"
    )
    return [number for number in found if number is not None]


def _reading(tokens: Sequence[tuple[str, str]], index: int, words_follow: bool) -> _Number | None:
    text = tokens[index][1]
    before, is_before_glued = _neighbour(tokens, index, -1)
    after, is_after_glued = _neighbour(tokens, index, 1)
    digits, scale = (text[:-1], _UNITS[text[-1]]) if text[-1] in _UNITS else (text, 1)
    if is_after_glued:
        unit = _unit(after)
        if unit is None:
            return None
        scale, word = unit
    else:
        word = _word(after) if words_follow else None
    word = word or _word(before)
    has_unit = scale > 1 or "e" in text.lower()
    value = Fraction(digits) * scale
    if word is not None:
        return _Number(word, value, has_unit)
    is_decimal = value.denominator != 1 or ("." in text and not has_unit)
    # Letters between digits are those of an identifier.
    is_inside = is_before_glued and index >= 2 and tokens[index - 2][0] == "number"
    if is_decimal or is_inside or _is_other(before):
        return None
    return _Number("number", value, has_unit, is_before_glued or scale > 1)


def _neighbour(tokens: Sequence[tuple[str, str]], index: int, side: int) -> tuple[str, bool]:
    """The word beside a token, and whether nothing lies between them."""
    at = index + side
    if not 0 <= at < len(tokens):
        return "", False
    kind, text = tokens[at]
    if kind == "word":
        return text, True
    at += side
    if _BLANK in text or len(text) > _MOST_SIGNS or not 0 <= at < len(tokens) or tokens[at][0] != "word":
        return "", False
    return tokens[at][1], False


def _unit(letters: str) -> tuple[int, str] | None:
    """What letters behind a number say, as in 10epoch, 5ksteps and 10kimg; None for anything else, as in 7b."""
    scale, rest = _UNITS.get(letters[0]), letters[1:]
    if scale is not None and (word := "step" if rest.lower() == "img" else _word(rest)):
        return scale, word
    word = _word(letters)
    return None if word is None else (1, word)


def _word(letters: str) -> str | None:
    parts = [letters, *_CAMEL.findall(letters)[-1:]]
    return next((word for part in parts for word, pattern in _WORDS.items() if pattern.fullmatch(part)), None)


def _is_other(letters: str) -> bool:
    parts = [letters, *_CAMEL.findall(letters)[-1:]]
    return any(_OTHER_WORDS.fullmatch(part) for part in parts)


def _words_follow(tokens: Sequence[tuple[str, str]]) -> bool:
    """Whether words stand behind their numbers throughout, as in ``3_epoch_500_step``."""
    sides: list[tuple[bool, bool]] = []
    for index, (kind, text) in enumerate(tokens):
        if kind == "word" and _word(text):
            sides.append((_has_number(tokens, index, -1), _has_number(tokens, index, 1)))
    return bool(sides) and all(before for before, _ in sides) and not sides[-1][1]


def _has_number(tokens: Sequence[tuple[str, str]], index: int, side: int) -> bool:
    at = index + side
    if 0 <= at < len(tokens) and tokens[at][0] == "gap":
        at += side
    return 0 <= at < len(tokens) and tokens[at][0] == "number"
