"""The BatchNorm layers of a model: which are refreshed, and how they are lent out and given back unharmed."""

# torch._foreach_*, on which torch's own optimizers rest, are missing from its type stubs' exports.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from polyak.batchnorm.moments import PooledMoments
from polyak.errors import NonFiniteError, StructureError, name_list

__all__ = ["BatchNormLayer", "layers_to_refresh", "lent", "statistics", "store", "tracks_statistics"]


class BatchNormLayer:
    """A BatchNorm module, the state of it that measuring would disturb, and buffers to lend it meanwhile."""

    def __init__(self, name: str, module: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
        self.name = name
        self.module = module
        self.mean = mean
        self.variance = variance
        self.n_batches = module.num_batches_tracked
        self.momentum = module.momentum
        # Not copies of the old ones: a momentum of 1 still multiplies those by 0, and 0 · NaN is NaN.
        self.lent_mean = torch.zeros_like(mean)
        self.lent_variance = torch.ones_like(variance)

    @property
    def is_synchronised(self) -> bool:
        """Whether a step in training mode waits for other ranks, for ever if they have fewer batches."""
        return isinstance(self.module, nn.SyncBatchNorm)

    @property
    def yields_moments(self) -> bool:
        """Whether a step in training mode leaves this rank's moments behind, in fp32 at least."""
        return not self.is_synchronised and self.mean.element_size() >= 4

    def lend(self) -> None:
        self.module.running_mean = self.lent_mean
        self.module.running_var = self.lent_variance
        if self.n_batches is not None:
            self.module.num_batches_tracked = torch.zeros_like(self.n_batches)
        self.module.momentum = 1.0

    def give_back(self) -> None:
        self.module.running_mean = self.mean
        self.module.running_var = self.variance
        self.module.num_batches_tracked = self.n_batches
        self.module.momentum = self.momentum

    def normalise_by(self, mean: Tensor, variance: Tensor) -> None:
        self.lent_mean.copy_(mean)
        self.lent_variance.copy_(variance)


def layers_to_refresh(network: nn.Module, keep_frozen: bool) -> list[BatchNormLayer]:
    """Every BatchNorm layer that tracks statistics, but none in evaluation mode if ``keep_frozen``.

    Raises:
        StructureError: a layer has no memory yet.
    """
    tracking = [
        (name, module, module.running_mean, module.running_var)
        for name, module in network.named_modules()
        if _tracks(module)
        and module.running_mean is not None
        and module.running_var is not None
        and (module.training or not keep_frozen)
    ]
    homeless = [name for name, _, mean, _ in tracking if is_lazy(mean) or mean.is_meta]
    if homeless:
        raise StructureError(
            f"BatchNorm layers {name_list(homeless)} have no memory yet (lazy, or on the meta device); "
            "run one batch through the model, or load its weights, first"
        )
    return [BatchNormLayer(*found) for found in tracking]


def tracks_statistics(model: nn.Module) -> bool:
    """Whether a BatchNorm layer of ``model`` has running statistics, which fit only the weights they are of.

    >>> tracks_statistics(nn.Sequential(nn.BatchNorm1d(1))), tracks_statistics(nn.LayerNorm(1))
    (True, False)
    """
    return any(map(_tracks, model.modules()))


def statistics(model: nn.Module) -> list[Tensor]:
    """The buffers of every BatchNorm layer of ``model``: means, variances and counts of batches.

    >>> statistics(nn.Sequential(nn.BatchNorm1d(1), nn.BatchNorm1d(2, track_running_stats=False)))
    [tensor([0.]), tensor([1.]), tensor(0)]
    """
    return [
        buffer for module in model.modules() if _tracks(module) for buffer in module.buffers(recurse=False)
    ]


def _tracks(module: nn.Module) -> TypeGuard[_BatchNorm]:
    return isinstance(module, _BatchNorm) and module.track_running_stats


@contextmanager
def lent(layers: list[BatchNormLayer], network: nn.Module) -> Iterator[None]:
    """The network in evaluation mode and the layers on lent buffers; all is given back at the end, always."""
    modes = {module: module.training for module in network.modules()}

    def give_back() -> None:
        for layer in layers:
            layer.give_back()
        for module, mode in modes.items():
            module.training = mode

    try:
        # The flags, not `eval()`: some modules merge weights there, which restoring a flag would not undo.
        for module in modes:
            module.training = False
        for layer in layers:
            layer.lend()
        yield
    finally:
        try:
            give_back()
        except BaseException:  # an interrupt may fall into giving back
            give_back()
            raise


def store(moments: PooledMoments, layers: list[BatchNormLayer]) -> None:
    """Write the moments into the layers' own buffers, all of them or none.

    Raises:
        NonFiniteError: a mean or variance is NaN, or infinite in the layer's dtype.
    """
    olds: list[Tensor] = []
    news: list[Tensor] = []
    broken: list[str] = []
    for index, layer in enumerate(layers):
        if moments.counts[index] == 0:
            continue
        mean = moments.means[index].to(layer.mean.dtype)
        variance = moments.variances[index].to(layer.variance.dtype)
        if not (mean.isfinite().all() and variance.isfinite().all()):
            broken.append(layer.name)
        olds += [layer.mean, layer.variance]
        news += [mean, variance]
        if layer.n_batches is not None:
            olds.append(layer.n_batches)
            news.append(torch.tensor(moments.batches[index]))
    if broken:
        raise NonFiniteError(
            f"the statistics of BatchNorm layers {name_list(broken)} came out as NaN or infinite, because a "
            "batch or a weight is not finite, or is too large for the layer's dtype; look for it with "
            "torch.isfinite. The running statistics are as they were"
        )
    torch._foreach_copy_(olds, news)  # one call, which no interrupt can split
