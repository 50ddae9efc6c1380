"""In which order checkpoints of other tools were saved, and at which optimizer steps."""

from __future__ import annotations

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

    Steps are those given; or those that all checkpoints say in their metadata; or those in the names, if all
    have one; or 1, 2, … in the order given.

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
    found = sorted(zip(chosen, inputs, strict=True), key=lambda pair: pair[0])
    for (step, first), (other, second) in pairwise(found):
        if step == other:
            raise OptionError(
                f"{first.path} and {second.path} are both of step {step}: give steps, or one of them"
            )
    return found
