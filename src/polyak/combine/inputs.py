"""Which checkpoints are averaged, and at which training steps they were saved."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path

from polyak import checkpoints
from polyak.checkpoints import Checkpoint
from polyak.checkpoints.folders import (
    checkpoint_paths,
    is_checkpoint_folder,
    is_recording,
    natural_order,
)
from polyak.checkpoints.formats import recognise
from polyak.combine.provenance import averaged_inputs
from polyak.errors import OptionError, name_list

__all__ = ["in_step_order", "known_steps", "open_inputs", "refuse_partly_known"]

# A number after one of these words, the first that all names have; else one that stands by itself, not in 0.90.
_AFTER_WORDS = [
    re.compile(rf"{word}\D?(\d{{1,18}})(?!\d)", re.IGNORECASE) for word in ("step", "iter(?:ation)?", "epoch")
]
_AFTER_EPOCH = _AFTER_WORDS[-1]
_NUMBER = re.compile(r"(?<!\d)(?<!\d\.)\d{1,18}(?!\d)(?!\.\d)")


def open_inputs(
    paths: Iterable[str | PathLike[str]] | str | PathLike[str], key: str | None = None
) -> list[Checkpoint]:
    """Open checkpoints, and all those in folders of checkpoints.

    Raises ``OptionError`` if there is none, or a folder holds an average of others in it, and what
    ``polyak.checkpoints.open`` raises.
    """
    if isinstance(paths, str | PathLike):
        paths = [paths]
    opened: list[Checkpoint] = []
    for path in map(Path, paths):
        files = _expanded(path)
        found = [checkpoints.open(file, key) for file in files]
        if files != [path]:
            _refuse_average_of_others(found)
        opened += found
    if not opened:
        raise OptionError("there is nothing to average: name one or more checkpoints, or a folder of them")
    return opened


def _refuse_average_of_others(siblings: Sequence[Checkpoint]) -> None:
    """Refuse what an earlier call wrote into the folder of what it was made of: these would count twice."""
    names = {checkpoint.path.name for checkpoint in siblings}
    for checkpoint in siblings:
        made_of = names.intersection(Path(name).name for name in averaged_inputs(checkpoint))
        if made_of - {checkpoint.path.name}:
            raise OptionError(
                f"{checkpoint.path} is itself an average, of {name_list(sorted(made_of, key=natural_order))} beside "
                "it: move it to another folder, or name the checkpoints to average"
            )


def _expanded(path: Path) -> list[Path]:
    if not path.is_dir() or is_checkpoint_folder(path):
        return [path]
    if is_recording(path):
        raise OptionError(
            f"{path} is a recorded trajectory, whose blocks stand for unlike numbers of samples: take averages of it "
            f"alone, by polyak average or polyak.Trajectory({str(path)!r}).write, or let polyak select choose one"
        )
    files = checkpoint_paths(path)
    if not files:
        recognise(path)  # says what the folder holds instead
    return files


def known_steps(inputs: Sequence[Checkpoint]) -> list[int] | None:
    """The training step of each checkpoint, or None where they are not known for all, or not all different.

    They are taken from the checkpoints themselves, else from their names.
    """
    saved = [checkpoint.step for checkpoint in inputs]
    known = [step for step in saved if step is not None]
    if len(known) == len(saved) == len(set(known)):
        return _counted_from_one(known, any(checkpoint.step_key != "epoch" for checkpoint in inputs))
    return steps_in_names([checkpoint.path for checkpoint in inputs])


def steps_in_names(paths: Sequence[Path]) -> list[int] | None:
    """The number that tells the names apart: after ``step``, ``iter`` or ``epoch``, else the last that always differs.

    A name without numbers, such as ``model.safetensors``, is taken with that of its folder. Where epochs, or
    numbers that nothing says to be steps, begin at 0, the first stands for one that was trained: they are
    counted from 1.

    >>> steps_in_names([Path("epoch=1-step=500.ckpt"), Path("epoch=2-step=1000.ckpt")])
    [500, 1000]
    >>> steps_in_names([Path("epoch1_loss0.90.pt"), Path("epoch2_loss0.50.pt")])
    [1, 2]
    >>> steps_in_names([Path("run/9/model_bf16.pt"), Path("run/10/model_bf16.pt")])
    [9, 10]
    >>> steps_in_names([Path("epoch0.pt"), Path("epoch1.pt")])
    [1, 2]
    >>> steps_in_names([Path("best.pt"), Path("last.pt")])
    """
    for names in ([path.stem for path in paths], [path.absolute().parent.name for path in paths]):
        for column, are_steps in _columns(names):
            numbers = [int(number) for number in column]
            if len(set(numbers)) == len(numbers):
                return _counted_from_one(numbers, are_steps)
    return None


def _counted_from_one(numbers: list[int], are_steps: bool) -> list[int]:
    return numbers if are_steps or min(numbers) > 0 else [number + 1 for number in numbers]


def _columns(names: Sequence[str]) -> Iterator[tuple[Sequence[str], bool]]:
    """Numbers that all ``names`` have, those that most likely are steps first, and whether a word says so."""
    for word in _AFTER_WORDS:
        found = [match[1] for name in names if (match := word.search(name))]
        if len(found) == len(names):
            yield found, word is not _AFTER_EPOCH
    numbers = [_NUMBER.findall(name) for name in names]
    if len({len(found) for found in numbers}) == 1:
        for column in reversed(list(zip(*numbers, strict=True))):
            yield column, False


def in_step_order(inputs: Sequence[Checkpoint]) -> tuple[list[Checkpoint], list[int] | None]:
    """Checkpoints by rising step, with the steps; in the order given, with None, where they are not known.

    Raises ``OptionError`` where they are known of some only.
    """
    steps = known_steps(inputs)
    if steps is None:
        refuse_partly_known(inputs)
        return list(inputs), None
    order = sorted(range(len(steps)), key=steps.__getitem__)
    return [inputs[index] for index in order], [steps[index] for index in order]


def refuse_partly_known(inputs: Sequence[Checkpoint]) -> None:
    """Refuse (``OptionError``) inputs of which only some say a step.

    A ``best.pt`` beside ``epoch_1.pt``, ``epoch_2.pt``, … has no place in their order.
    """
    without = [c.path.name for c in inputs if c.step is None and not _NUMBER.search(c.path.stem)]
    if 0 < len(without) < len(inputs):
        raise OptionError(
            f"no training step is known of {name_list(without)}, as it is of the others: leave those out, for example "
            "by a pattern such as 'run/epoch_*.pt'"
        )
