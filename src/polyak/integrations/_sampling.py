"""When an average samples, and at which learning rate, in the units of frameworks."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from torch.optim import Optimizer
from torch.optim.swa_utils import SWALR

from polyak._checks import whole_within, within
from polyak.errors import OptionError

__all__ = ["NOT_YET", "UNKNOWN", "RunLength", "SWARate", "Sampling", "ShouldUpdate"]

_log = logging.getLogger("polyak")

# The start of an average that has not begun, in optimizer steps.
NOT_YET = sys.maxsize


class RunLength(NamedTuple):
    """How long a run will be, as far as its framework knows: optimizer steps, and epochs."""

    steps: int | None = None
    epochs: int | None = None


UNKNOWN = RunLength()


@dataclass(frozen=True)
class Sampling:
    """Which steps of a run an average samples.

    Args:
        start: optimizer steps before averaging begins, or, as a float in [0, 1), their share of the run.
        every: optimizer steps between samples.
        start_epoch: epochs before averaging begins, in place of ``start``.
        every_epochs: epochs between samples, which are then taken at their ends, in place of ``every``: after epochs
            start_epoch + every_epochs, start_epoch + 2·every_epochs, …, counted from 1.

    Raises:
        OptionError: an option is out of range, or two say the same thing.

    >>> Sampling(start=0.75).begins(RunLength(steps=1000, epochs=10))
    (750, 0)
    >>> Sampling(start=0.75, every_epochs=1).begins(RunLength(steps=1000, epochs=10))[1]
    7
    """

    start: int | float = 0
    every: int = 1
    start_epoch: int | None = None
    every_epochs: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.start, float):
            within("[0, 1)", "start, as a share of the run,", self.start)
        else:
            whole_within("[0, inf)", "start", self.start)
        whole_within("[1, inf)", "every", self.every)
        for name, low in (("start_epoch", 0), ("every_epochs", 1)):
            if (value := getattr(self, name)) is not None:
                whole_within(f"[{low}, inf)", name, value)
        if self.start and self.start_epoch is not None:
            raise OptionError("start and start_epoch both say when averaging begins: give one of them")
        if self.every != 1 and self.every_epochs is not None:
            raise OptionError("every and every_epochs both say when samples are taken: give one of them")

    @property
    def is_fixed(self) -> bool:
        """Whether the step at which averaging begins is known whatever the run."""
        return self.start_epoch is None and not isinstance(self.start, float)

    @property
    def says_all(self) -> bool:
        """Whether what is sampled is known whatever the run."""
        return self.is_fixed or (self.start_epoch is not None and self.every_epochs is not None)

    def begins(self, run: RunLength) -> tuple[int, int]:
        """The optimizer step, and the epoch counted from 0, after which averaging begins in a run.

        Raises:
            OptionError: it is a share of a run that may be of any length.
        """
        if self.start_epoch is not None:
            return NOT_YET, self.start_epoch
        if not isinstance(self.start, float):
            return self.start, 0
        if run.steps is not None and self.every_epochs is None:
            return int(self.start * run.steps), 0
        if run.epochs is not None:
            return NOT_YET, int(self.start * run.epochs)
        raise OptionError(
            f"start={self.start} is a share of the run, but how long it will be is not known: limit its "
            f"{'epochs' if self.every_epochs else 'steps or epochs'}, or give start in optimizer steps or start_epoch"
        )


@dataclass(frozen=True)
class SWARate:
    """The learning rate to average at, to which torch's ``SWALR`` anneals from the start of averaging on.

    Args:
        swa_lr: one for all parameter groups, or one for each.
        anneal_epochs: how long the way there is; 0: at once.
        anneal_strategy: ``"cos"`` or ``"linear"``.

    Raises:
        OptionError: an option is out of range.
    """

    swa_lr: float | Sequence[float]
    anneal_epochs: int = 10
    anneal_strategy: Literal["cos", "linear"] = "cos"

    def __post_init__(self) -> None:
        for rate in self.swa_lr if isinstance(self.swa_lr, list | tuple) else [self.swa_lr]:
            within("(0, inf)", "swa_lr", rate)
        whole_within("[0, inf)", "anneal_epochs", self.anneal_epochs)
        if self.anneal_strategy not in ("cos", "linear"):
            raise OptionError(f"anneal_strategy must be 'cos' or 'linear', got {self.anneal_strategy!r}")

    @classmethod
    def of(
        cls,
        swa_lr: float | Sequence[float] | None,
        anneal_epochs: int,
        anneal_strategy: Literal["cos", "linear"],
    ) -> SWARate | None:
        """None where no rate is given; then there is nothing to anneal to either."""
        if swa_lr is not None:
            return cls(swa_lr, anneal_epochs, anneal_strategy)
        if (anneal_epochs, anneal_strategy) != (cls.anneal_epochs, cls.anneal_strategy):
            raise OptionError("anneal_epochs and anneal_strategy say how to get to swa_lr: give it too")
        return None

    def scheduler(self, optimizer: Optimizer, before: object, *, steps_per_epoch: int = 1) -> SWALR:
        """A new one in the place of those ``before``, to be stepped ``steps_per_epoch`` times an epoch from now on.

        Raises:
            OptionError: the optimizer has another number of parameter groups than there are rates.
        """
        groups = len(optimizer.param_groups)
        rates = list(self.swa_lr) if isinstance(self.swa_lr, list | tuple) else [self.swa_lr] * groups
        if len(rates) != groups:
            raise OptionError(
                f"swa_lr has {len(rates)} learning rates, and the optimizer {groups} parameter groups"
            )
        _log.info(
            "averaging begins, and SWALR takes the learning rate to %s in the place of %s", rates, before
        )
        anneal = self.anneal_epochs * steps_per_epoch
        return _Schedule(optimizer, rates, anneal, self.anneal_strategy)  # pyright: ignore[reportArgumentType]


class _Schedule(SWALR):
    """torch's own; but torch 2.9 puts a function into the state, which ``torch.load(weights_only=True)`` refuses."""

    def state_dict(self) -> dict[str, Any]:
        return {key: value for key, value in super().state_dict().items() if key != "anneal_func"}


class ShouldUpdate(Protocol):
    """What may be overridden: whether the weights after a step, or an epoch, both counted from 0, are a sample."""

    def __call__(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool: ...
