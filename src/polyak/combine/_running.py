"""The running mean m -= (a_k/A_k)(m - x_k), A_k = a_1 + … + a_k: its steps, its inner loop, and what may go wrong.

It gives Σ a_k x_k / Σ a_k and leaves identical inputs as they are, bit for bit in every dtype, which a plain sum
of products does not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from polyak.errors import NonFiniteError, OptionError

__all__ = [
    "accumulation_dtype",
    "as_reals",
    "copy",
    "fits",
    "fold",
    "folds",
    "is_averaged",
    "refuse_overflow",
    "restore_infinities",
    "runs",
]

_SUM_TOLERANCE = 1e-6
# One operation instead of two, which takes 1 - ratio instead of the ratio: the rounding of that is as large as the
# ratio's own share of it, and lost beside a large ratio only.
_LEAST_LERP_RATIO = 1 / 8
# From 32,768 elements on (its GRAIN_SIZE) torch shares a call out to threads of its own. They would take what is summed
# out of the cache of the core that works on it, and the elements where their shares end may be rounded differently.
# Setting their number to one would reach other threads: torch keeps it for all that begin meanwhile.
_RUN_NUMEL = 32_768 - 64


@dataclass(frozen=True)
class Fold:
    """One input that is read, and the ratios a_k/A_k at which it goes into each output that counts it.

    Attributes:
        index: which input.
        ratios: pairs of output and ratio.
    """

    index: int
    ratios: tuple[tuple[int, float], ...]


def folds(coefficients: Sequence[Sequence[float]], n_inputs: int) -> list[Fold]:
    """The reads and ratios that give every output its combination.

    Zero coefficients are left out. Positive ones come before negative ones, so that A_k never crosses zero; an
    input is read twice only where outputs disagree about its sign.

    Args:
        coefficients: for each output one number per input, which sum to 1.
        n_inputs: how many inputs there are.

    Raises ``OptionError`` for coefficients of another number, or that are not finite or do not sum to 1.

    >>> folds([[0.5, 0.0, 0.5], [2.0, 0.0, -1.0]], n_inputs=3)
    [Fold(index=0, ratios=((0, 1.0), (1, 1.0))),
     Fold(index=2, ratios=((0, 0.5),)), Fold(index=2, ratios=((1, -1.0),))]
    """
    for row in coefficients:
        _check(row, n_inputs)
    sums = [0.0] * len(coefficients)
    steps = []
    for sign in (1, -1):
        for index in range(n_inputs):
            ratios = []
            for output, row in enumerate(coefficients):
                if row[index] * sign > 0:
                    sums[output] += row[index]
                    ratios.append((output, float(row[index] / sums[output])))
            if ratios:
                steps.append(Fold(index, tuple(ratios)))
    return steps


def _check(row: Sequence[float], n_inputs: int) -> None:
    if len(row) != n_inputs:
        raise OptionError(f"{len(row)} coefficients for {n_inputs} inputs: give one for each")
    if not math.isclose(sum(row), 1, abs_tol=_SUM_TOLERANCE * max(1, *map(abs, row))):
        raise OptionError(f"coefficients must be finite and sum to 1, got {sum(row)}")


def runs(tensor: Tensor) -> tuple[Tensor, ...]:
    """A 1-D tensor in runs that torch leaves to the thread that calls it."""
    return tensor.split(_RUN_NUMEL) if len(tensor) > _RUN_NUMEL else (tensor,)


def fold(mean: Sequence[Tensor], values: Sequence[Tensor], ratio: float) -> None:
    """``mean -= ratio * (mean - values)`` in place, run by run; ratio 1 replaces ``mean``.

    Where both are equal the result is ``mean`` to the bit, the sign of zero included: in each form a multiple of
    their difference is added whose sign makes a zero of it -0.0, and adding that changes nothing.
    """
    replaces = ratio > 0.5 and torch.tensor(ratio, dtype=mean[0].dtype) == 1
    for m, x in zip(mean, values, strict=True):
        if replaces:
            m.copy_(x)
        elif ratio > 0.5 or ratio < 0:
            m.lerp_(x, ratio)
        elif ratio >= _LEAST_LERP_RATIO:
            torch.lerp(x, m, 1 - ratio, out=m)
        else:
            m.sub_(m - x, alpha=ratio)


def copy(values: Sequence[Tensor], target: Sequence[Tensor]) -> None:
    """Fill ``target`` with ``values``, converted, run by run."""
    for x, place in zip(values, target, strict=True):
        place.copy_(x)


def is_averaged(dtype: torch.dtype) -> bool:
    """Whether tensors of this dtype are averaged; integer and bool ones are copied."""
    return dtype.is_floating_point or dtype.is_complex


def accumulation_dtype(dtype: torch.dtype, wanted: torch.dtype | None = None) -> torch.dtype:
    """The real dtype in which the parts of a ``dtype`` are summed: float32, or float64 if it or ``wanted`` is.

    >>> accumulation_dtype(torch.bfloat16), accumulation_dtype(torch.complex128)
    (torch.float32, torch.float64)
    """
    return torch.float64 if torch.float64 in (dtype.to_real(), wanted) else torch.float32


def as_reals(values: Tensor) -> Tensor:
    """A 1-D tensor as it is, a complex one as twice as many real numbers in the same memory."""
    return torch.view_as_real(values).view(-1) if values.is_complex() else values


# What becomes of a slice whose result is not finite or does not fit: the slow path.


def fits(mean: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether every number of the runs of ``mean`` is finite and in the range of ``dtype``."""
    limit = torch.finfo(dtype).max
    # Comparing with NaN is False, and NaN is what the extremes of numbers with a NaN are.
    return all(bool(m.amax() <= limit) and bool(m.amin() >= -limit) for m in mean)


def restore_infinities(mean: Tensor, sources: Iterable[tuple[Path, Tensor]], name: str) -> Tensor:
    """Put the infinities that all sources share into ``mean``, where summing has left NaN.

    Args:
        mean: the result, 1-D; changed in place.
        sources: path and values of each input that counts, one at a time: the values may share one buffer.
        name: of the tensor, for messages.

    Returns:
        A mask of the places that are infinite.

    Raises ``NonFiniteError``, naming file and tensor, for NaN and for infinities that not all sources share.
    """
    shared, first = None, None
    for path, values in sources:
        if values.isnan().any():
            raise NonFiniteError(f"{path}: tensor {name!r} holds NaN; leave this checkpoint out")
        infinities = torch.where(values.isinf(), values, 0)
        if shared is None:
            shared, first = infinities, path
        elif not torch.equal(shared, infinities):
            holder = path if infinities.count_nonzero() >= shared.count_nonzero() else first
            raise NonFiniteError(
                f"{holder}: tensor {name!r} holds infinities that are not in every input; "
                f"leave this checkpoint out"
            )
    assert shared is not None, "every output counts at least one input"
    mask = shared != 0
    mean[mask] = shared[mask]
    return mask


def refuse_overflow(values: Tensor, infinite: Tensor, mean: Tensor, name: str) -> None:
    """Raise ``NonFiniteError`` if ``values``, which is ``mean`` as it will be written, has lost large numbers.

    ``infinite`` masks the infinities that belong there.
    """
    written, finfo = values.to(mean.dtype), torch.finfo(values.dtype)
    # Some conversions give infinity or NaN for what is too large, others the largest number there is.
    is_near = (written - mean).abs() <= finfo.eps * mean.abs()
    kept = torch.where(infinite, written.isinf(), (mean.abs() <= finfo.max) | is_near)
    if not kept.all():
        raise NonFiniteError(
            f"the average of tensor {name!r} is too large for {values.dtype}, it comes out as "
            f"{mean[~kept][0].item():.3g}: choose a wider dtype"
        )
