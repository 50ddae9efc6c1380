"""Count, mean and variance of many samples from those of their parts: the merge that loses nothing."""

# torch._foreach_*, on which torch's own optimizers rest, are missing from its type stubs' exports.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polyak.distributed import is_distributed, sum_over_ranks

__all__ = ["PooledMoments"]


class PooledMoments:
    r"""Mean and variance per channel of several streams of batches, pooled in float64.

    A batch of :math:`n` elements with mean :math:`\mu_b` and variance :math:`v_b` (divided by :math:`n`)
    joins the :math:`N` elements before it as

    .. math::
        s = \frac{n}{N + n}, \qquad
        v \leftarrow v + s\,\bigl(v_b - v + (1 - s)(\mu_b - \mu)^2\bigr), \qquad
        \mu \leftarrow \mu + s\,(\mu_b - \mu)

    Attributes:
        batches: number of batches merged, one ``int`` a stream.
        counts: number of elements per channel merged, one ``int`` a stream.
        means: float64 tensors of shape ``(channels,)``, one a stream.
        variances: as ``means``, divided by the count.

    References:
        Chan, Golub & LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample Variances,
        1979.

    >>> pool = PooledMoments([torch.empty(1)])
    >>> pool.merge([0], [2], [torch.tensor([1.0])], [torch.tensor([1.0])])  # the elements 0 and 2
    >>> pool.merge([0], [1], [torch.tensor([10.0])], [torch.tensor([0.0])])  # the element 10
    >>> pool.counts, pool.means[0], pool.variances[0]
    ([3], tensor([4.], dtype=torch.float64), tensor([18.6667], dtype=torch.float64))
    """

    def __init__(self, streams: Sequence[Tensor]) -> None:
        """Start empty, with the shapes and devices of ``streams``."""
        self.batches = [0] * len(streams)
        self.counts = [0] * len(streams)
        self.means = [_float64_zeros(stream) for stream in streams]
        self.variances = [_float64_zeros(stream) for stream in streams]

    def merge(
        self,
        streams: Sequence[int],
        counts: Sequence[int],
        means: Sequence[Tensor],
        variances: Sequence[Tensor],
    ) -> None:
        """Merge one batch into each of ``streams`` (distinct indices), without waiting for the device.

        Args:
            streams: which streams the batches belong to.
            counts: elements per channel of each batch, at least 1.
            means: of any floating dtype, shape ``(channels,)``.
            variances: as ``means``, divided by the count.
        """
        shares = []
        for stream, count in zip(streams, counts, strict=True):
            self.batches[stream] += 1
            self.counts[stream] += count
            shares.append(count / self.counts[stream])
        pooled_means = [self.means[stream] for stream in streams]
        pooled_variances = [self.variances[stream] for stream in streams]

        mean_steps = [torch.empty_like(mean) for mean in pooled_means]
        variance_steps = [torch.empty_like(variance) for variance in pooled_variances]
        torch._foreach_copy_(mean_steps, list(means))
        torch._foreach_copy_(variance_steps, list(variances))
        torch._foreach_sub_(mean_steps, pooled_means)
        torch._foreach_sub_(variance_steps, pooled_variances)
        torch._foreach_addcmul_(variance_steps, mean_steps, mean_steps, [1 - share for share in shares])
        torch._foreach_mul_(mean_steps, shares)
        torch._foreach_mul_(variance_steps, shares)
        torch._foreach_add_(pooled_means, mean_steps)
        torch._foreach_add_(pooled_variances, variance_steps)

    def merge_ranks(self) -> None:
        """Pool what all ranks hold, on every rank and to the same bits; a collective call."""
        if not is_distributed():
            return
        totals = sum_over_ranks(torch.tensor([self.batches, self.counts]))
        own_counts = _per_channel(self.counts, self.means)
        all_counts = _per_channel(totals[1].tolist(), self.means).clamp(min=1)
        own_means = torch.cat([mean.cpu() for mean in self.means])
        own_variances = torch.cat([variance.cpu() for variance in self.variances])

        means = sum_over_ranks(own_counts * own_means) / all_counts
        squares = own_variances + (own_means - means).square()
        variances = sum_over_ranks(own_counts * squares) / all_counts

        self.batches, self.counts = totals.tolist()
        channels = [len(mean) for mean in self.means]
        torch._foreach_copy_(self.means, means.split(channels))
        torch._foreach_copy_(self.variances, variances.split(channels))


def _float64_zeros(stream: Tensor) -> Tensor:
    # Apple's MPS has no float64.
    device = "cpu" if stream.device.type == "mps" else stream.device
    return torch.zeros(stream.shape, dtype=torch.float64, device=device)


def _per_channel(counts: Sequence[int], streams: Sequence[Tensor]) -> Tensor:
    """Each stream's count as float64 (exact to 2⁵³), repeated for each of its channels."""
    channels = torch.tensor([len(stream) for stream in streams])
    return torch.tensor(counts, dtype=torch.float64).repeat_interleave(channels)
