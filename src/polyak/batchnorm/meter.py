"""What reaches each BatchNorm layer, measured as it passes."""

# torch._foreach_*, on which torch's own optimizers rest, are missing from its type stubs' exports.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from polyak.batchnorm.layers import BatchNormLayer
from polyak.batchnorm.moments import PooledMoments

__all__ = ["Meter"]


class Meter:
    """A hook before each layer's forward that pools the moments of its inputs.

    In training mode with momentum 1, a layer's running statistics *are* the moments of its last batch, so
    mostly they are just read. Where they will not do, the inputs are measured: in layers of 16 bits, in
    SyncBatchNorm, for single elements, and when normalising as in evaluation.

    Args:
        layers: the layers, on lent buffers.
        normalise_by_batch: whether batches are normalised by their own statistics, as in training, or by
            those in the lent buffers.
    """

    def __init__(self, layers: list[BatchNormLayer], normalise_by_batch: bool) -> None:
        self.layers = layers
        self.normalise_by_batch = normalise_by_batch
        self.moments = PooledMoments([layer.mean for layer in layers])
        # Layer index to elements per channel, where the moments wait in the running statistics.
        self._unread: dict[int, int] = {}

    @contextmanager
    def attached(self) -> Iterator[None]:
        hooks: list[RemovableHandle] = []
        try:
            for index, layer in enumerate(self.layers):
                observe = partial(self._observe, index)
                hooks.append(layer.module.register_forward_pre_hook(observe, with_kwargs=True))
            yield
        finally:
            try:
                _remove(hooks)
            except BaseException:  # an interrupt may fall into removing them
                _remove(hooks)
                raise

    def end_batch(self) -> None:
        """Pool what this batch left in the running statistics; all layers at once, in few kernels."""
        if self._unread:
            self._read(list(self._unread))

    def _observe(self, index: int, module: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if index in self._unread:  # a shared layer, called again in one batch
            self._read([index])
        layer = self.layers[index]
        inputs: Tensor = args[0] if args else kwargs["input"]
        count = inputs.numel() // module.num_features
        # A single element has no spread to be normalised by, and torch refuses it in training mode.
        by_own_moments = self.normalise_by_batch and count > 1
        module.training = by_own_moments and not layer.is_synchronised
        if module.training and layer.yields_moments:
            self._unread[index] = count
        elif count > 0:
            mean, variance = _moments_of(inputs)
            self.moments.merge([index], [count], [mean], [variance])
            if by_own_moments:
                layer.normalise_by(mean, variance)
            elif self.normalise_by_batch:
                layer.normalise_by(self.moments.means[index], self.moments.variances[index])

    def _read(self, indices: list[int]) -> None:
        counts = [self._unread.pop(index) for index in indices]
        means = [self.layers[index].lent_mean for index in indices]
        unbiased = [self.layers[index].lent_variance for index in indices]
        variances = torch._foreach_mul(unbiased, [(count - 1) / count for count in counts])
        self.moments.merge(indices, counts, means, list(variances))


def _remove(hooks: list[RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()


def _moments_of(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (divided by the count) over all but the channels, in fp32 at least."""
    inputs = inputs if inputs.element_size() >= 4 else inputs.float()
    all_but_channels = [dim for dim in range(inputs.dim()) if dim != 1]
    variance, mean = torch.var_mean(inputs, all_but_channels, correction=0)
    return mean, variance
