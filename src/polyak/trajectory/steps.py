"""In which order checkpoints of other tools were saved, and at which optimizer steps."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import pairwise

from polyak.checkpoints import Checkpoint
from polyak.combine import known_steps, refuse_partly_known
from polyak.errors import OptionError, name_list

__all__ = ["checkpoint_steps"]


def checkpoint_steps(
    inputs: Sequence[Checkpoint], steps: Sequence[int] | None, ordered: bool
) -> list[tuple[int, Checkpoint]]:
    """Checkpoints with the optimizer step of each, by step.

    Steps are those given, which should order the checkpoints as their names do; or those that all checkpoints say
    in their metadata; or those in the names, if all have one; or 1, 2, … in the order given.

    Raises:
        OptionError: steps of another number than the checkpoints, or the same one twice; or steps known of some
            only; or no steps, and paths whose order means nothing.
    """
    chosen = list(steps) if steps is not None else known_steps(inputs)
    if chosen is None:
        refuse_partly_known(inputs)
    if chosen is None and not ordered:
        raise OptionError(
            f"no step is known for {name_list([c.path.name for c in inputs])}, and the paths come in no order: give "
            "steps, or a list from the oldest to the newest"
        )
    chosen = chosen or list(range(1, len(inputs) + 1))
    if len(chosen) != len(inputs):
        raise OptionError(f"{len(chosen)} steps were given for {len(inputs)} checkpoints: give one for each")
    if steps is not None:
        _warn_of_other_order(inputs, chosen)
    found = sorted(zip(chosen, inputs, strict=True), key=lambda pair: pair[0])
    for (step, first), (other, second) in pairwise(found):
        if step == other:
            raise OptionError(
                f"{first.path} and {second.path} are both of step {step}: give steps, or one of them"
            )
    return found


def _warn_of_other_order(inputs: Sequence[Checkpoint], steps: Sequence[int]) -> None:
    """Paths sorted as text put epoch-10 before epoch-9, and then the steps given are those of other files."""
    known = known_steps(inputs)
    if known is None:
        return
    pairs = sorted(zip(known, steps, inputs, strict=True), key=lambda pair: pair[0])
    for (number, step, first), (other, later, second) in pairwise(pairs):
        if number < other and step > later:
            warnings.warn(
                f"steps say that {first.path.name} is of step {step} and {second.path.name} of {later}, which is not "
                "the order of their names or metadata: give one step for each path, in the order of paths",
                UserWarning,
                stacklevel=4,
            )
            return
