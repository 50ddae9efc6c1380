"""Learning-rate schedules to average along, counted in optimizer steps.

Both are plain :class:`torch.optim.lr_scheduler.LambdaLR` objects: call ``scheduler.step()`` after each
``optimizer.step()``; ``state_dict`` and ``load_state_dict`` are torch's own.

torch's schedulers serve too. :class:`torch.optim.swa_utils.SWALR` anneals to ``swa_lr`` from where any other
schedule stopped, and holds it there while the average samples:

>>> import torch, polyak
>>> from torch.optim.lr_scheduler import CosineAnnealingLR, SequentialLR
>>> from torch.optim.swa_utils import SWALR
>>> model = torch.nn.Linear(2, 1)
>>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
>>> decay = CosineAnnealingLR(optimizer, T_max=100)
>>> hold = SWALR(optimizer, swa_lr=0.05, anneal_epochs=10)
>>> scheduler = SequentialLR(optimizer, [decay, hold], milestones=[60])
>>> swa = polyak.Average(model, polyak.Uniform(), start=60, every=10)
>>> for _ in range(100):
...     optimizer.step(); scheduler.step(); swa.update()
>>> swa.n_averaged, optimizer.param_groups[0]["lr"]
(4, 0.05)

:class:`torch.optim.lr_scheduler.CyclicLR` goes up as well as down. Its cycle is ``step_size_up +
step_size_down`` steps and ends at ``base_lr``, which is where the average should sample:

>>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
>>> scheduler = torch.optim.lr_scheduler.CyclicLR(
...     optimizer, base_lr=0.01, max_lr=0.1, step_size_up=4, step_size_down=16, cycle_momentum=False)
>>> swa = polyak.Average(model, polyak.Uniform(), every=4 + 16)
>>> for _ in range(100):
...     optimizer.step(); scheduler.step(); swa.update()
>>> swa.n_averaged
5
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from polyak._checks import checked, whole_within
from polyak.errors import OptionError

__all__ = ["cyclical_schedule", "swa_schedule"]


@checked
def swa_schedule(optimizer: Optimizer, *, swa_start: int, swa_lr: float | Sequence[float]) -> LambdaLR:
    """The SWA paper's schedule: hold the learning rate, go down linearly to ``swa_lr``, hold that.

    With t = (steps done) / ``swa_start``, a group of initial learning rate lr_0 has ::

        lr(t) = lr_0                                          t ≤ 0.5
        lr(t) = lr_0 + (swa_lr - lr_0) (t - 0.5) / 0.4        0.5 < t < 0.9
        lr(t) = swa_lr                                        t ≥ 0.9

    so the last tenth before ``swa_start`` already runs at ``swa_lr``.

    Args:
        optimizer: any torch optimizer; every group's own learning rate must be above 0.
        swa_start: optimizer steps before averaging starts; give ``Average`` the same ``start``.
        swa_lr: the learning rate to average at, one for all groups or one for each.

    Raises:
        OptionError: if an option is out of range; the optimizer is then as it was.

    References:
        Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better Generalization",
        appendix.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        >>> scheduler = swa_schedule(optimizer, swa_start=10, swa_lr=0.02)
        >>> for step in range(12):
        ...     print(f"{scheduler.get_last_lr()[0]:.2f}", end=" ")
        ...     optimizer.step(); scheduler.step()
        0.10 0.10 0.10 0.10 0.10 0.10 0.08 0.06 0.04 0.02 0.02 0.02
    """
    swa_start = whole_within("[1, inf)", "swa_start", swa_start)
    rates = _initial_rates(optimizer)
    targets = _per_group("swa_lr", swa_lr, rates)
    if min(targets) <= 0:
        raise OptionError(f"swa_lr must be above 0: at 0 every sample is the same. Got {swa_lr}.")
    factors = [
        partial(_swa_factor, swa_start=swa_start, ratio=target / rate)
        for target, rate in zip(targets, rates, strict=True)
    ]
    return LambdaLR(optimizer, factors)


@checked
def cyclical_schedule(
    optimizer: Optimizer, *, lr_min: float | Sequence[float], cycle_steps: int, start: int = 0
) -> LambdaLR:
    """The SWA paper's cyclical schedule: down linearly to ``lr_min`` in each cycle, then jump back up.

    Step i = 1, 2, … of a cycle of c = ``cycle_steps`` steps is taken with ::

        lr(i) = lr_0 + (lr_min - lr_0) · i / c

    where lr_0 is the group's own learning rate, so that the last step of each cycle is taken with exactly
    ``lr_min``. Up to ``start`` the learning rate is lr_0. Sample at the ends of the cycles::

        Average(model, Uniform(), start=start, every=cycle_steps)

    Args:
        optimizer: any torch optimizer; every group's own learning rate, above 0, is the top of its cycle.
        lr_min: learning rate at the end of a cycle, one for all groups or one for each; from 0 to lr_0.
        cycle_steps: optimizer steps in a cycle; with 1, all steps from ``start`` on have ``lr_min``.
        start: optimizer steps before the first cycle.

    Raises:
        OptionError: if an option is out of range; the optimizer is then as it was.

    References:
        Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better Generalization",
        section 3.1.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        >>> scheduler = cyclical_schedule(optimizer, lr_min=0.02, cycle_steps=4, start=2)
        >>> for step in range(10):
        ...     print(f"{scheduler.get_last_lr()[0]:.2f}", end=" ")
        ...     optimizer.step(); scheduler.step()
        0.10 0.10 0.08 0.06 0.04 0.02 0.08 0.06 0.04 0.02
    """
    cycle_steps = whole_within("[1, inf)", "cycle_steps", cycle_steps)
    start = whole_within("[0, inf)", "start", start)
    rates = _initial_rates(optimizer)
    lows = _per_group("lr_min", lr_min, rates)
    if any(not 0 <= low <= rate for low, rate in zip(lows, rates, strict=True)):
        raise OptionError(f"lr_min must lie between 0 and each group's own lr, {rates}. Got {lr_min}.")
    factors = [
        partial(_cyclical_factor, cycle_steps=cycle_steps, start=start, ratio=low / rate)
        for low, rate in zip(lows, rates, strict=True)
    ]
    return LambdaLR(optimizer, factors)


# Module-level functions under `partial` rather than closures: a scheduler must pickle with its trainer.


def _swa_factor(steps_done: int, *, swa_start: int, ratio: float) -> float:
    # In whole steps, since 0.9 as a float would start the hold one step late at some swa_start.
    down = min(max(10 * steps_done - 5 * swa_start, 0), 4 * swa_start) / (4 * swa_start)
    return 1 + (ratio - 1) * down if down < 1 else ratio


def _cyclical_factor(steps_done: int, *, cycle_steps: int, start: int, ratio: float) -> float:
    if steps_done < start:
        return 1.0
    step_in_cycle = (steps_done - start) % cycle_steps + 1
    return 1 + (ratio - 1) * step_in_cycle / cycle_steps if step_in_cycle < cycle_steps else ratio


def _initial_rates(optimizer: Optimizer) -> list[float]:
    """Each group's learning rate as the run began, which is the one that LambdaLR multiplies."""
    rates = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
    if min(rates) <= 0:
        raise OptionError(f"every group needs an lr above 0 to scale. The groups have {rates}.")
    return rates


def _per_group(option: str, value: float | Sequence[float], rates: list[float]) -> list[float]:
    values = list(value) if isinstance(value, Sequence) else [value] * len(rates)
    if len(values) != len(rates):
        raise OptionError(f"{option} has {len(values)} values for {len(rates)} parameter groups.")
    # An int may be finite and too large for a float.
    if not all(isinstance(one, int | float) and abs(one) <= sys.float_info.max for one in values):
        raise OptionError(f"{option} must be finite: one number, or one for each group. Got {value!r}.")
    return [float(one) for one in values]
