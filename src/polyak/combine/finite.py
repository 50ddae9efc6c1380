"""What becomes of a slice whose result is not finite or does not fit: the slow path, taken when a check fails."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from polyak.errors import NonFiniteError

__all__ = ["fits", "refuse_overflow", "restore_infinities"]


def fits(mean: Tensor, dtype: torch.dtype) -> bool:
    """Whether every number of ``mean`` is finite and in the range of ``dtype``."""
    limit = torch.finfo(dtype).max
    # Comparing with NaN is False, and NaN is what the extremes of numbers with a NaN are.
    return bool(mean.amax() <= limit) and bool(mean.amin() >= -limit)


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
