"""`update_bn`: passes over the data, and what they leave behind."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from polyak import distributed
from polyak.batchnorm.calls import call_model, moved, progress_bar
from polyak.batchnorm.layers import BatchNormLayer, layers_to_refresh, lent, store
from polyak.batchnorm.meter import Meter
from polyak.batchnorm.moments import PooledMoments
from polyak.errors import BatchError, OptionError, StructureError
from polyak.tensors import bare_model

__all__ = ["update_bn"]


@torch.no_grad()
def update_bn(
    loader: Iterable[Any],
    model: nn.Module,
    device: torch.device | str | int | None = None,
    *,
    forward: Callable[[nn.Module, Any], object] | None = None,
    passes: int = 1,
    progress: bool = False,
) -> None:
    r"""Set the running statistics of every BatchNorm layer to those of all the data in ``loader``.

    Averaged weights have never seen a batch, so their running statistics belong to other weights. Here
    each layer gets, per channel, the mean and the variance (divided by :math:`N`) of all :math:`N`
    elements that reach it. With :math:`n_b`, :math:`\mu_b`, :math:`v_b` the elements per channel of batch
    :math:`b`, their mean and their variance,

    .. math::
        \mu = \frac{1}{N} \sum_b n_b\,\mu_b, \qquad
        v = \frac{1}{N} \sum_b n_b \bigl(v_b + (\mu_b - \mu)^2\bigr), \qquad N = \sum_b n_b

    so the spread between batches counts as well as that within, and a short batch counts for what it
    holds.

    **Modes.** BatchNorm layers run in training mode, everything else as in evaluation (dropout is off). If
    the model is in training mode, BatchNorm layers that were put in ``eval()`` are frozen and left alone;
    if it is in evaluation mode, all are refreshed. Layers with ``track_running_stats=False``, InstanceNorm
    layers and layers that no sample reaches keep what they have. Modes and momenta are restored always;
    after a failure, an interrupt included, the statistics are the old ones bit for bit.

    **Passes.** In the first pass each batch is normalised by its own statistics, as in training, so what
    deeper layers see depends on how the data is batched. (A batch of one element per channel has no spread
    to be normalised by; the statistics pooled so far stand in.) In later passes batches are normalised by
    the statistics found so far, as they will be in evaluation, and the layers measured anew: after
    ``passes=k`` the first k BatchNorm layers in depth have exactly the statistics of their inputs in
    evaluation mode, whatever the batch size and order. Take more passes if batches are small or not
    shuffled.

    **Ranks.** Where a ``torch.distributed`` group is initialised, every rank makes this call with its own
    share of the data, which may be empty; the statistics are those of all shares, equal on every rank, and
    a failure on one rank is an error on all. SyncBatchNorm layers normalise by their rank's batch
    meanwhile, so that ranks may have different numbers of batches.

    **Dtypes.** Moments are taken in fp32 at least, also in fp16 and bf16 layers, pooled in float64, and
    stored in the layer's dtype. ``num_batches_tracked`` becomes the number of batches pooled, over all
    ranks.

    **Wrappers.** Inside ``DistributedDataParallel``, ``DataParallel`` and ``torch.compile``, it is the
    module within that runs, eagerly.

    Args:
        loader: batches. A tensor is run as ``model(x)``, a list or tuple as ``model(batch[0])``, a mapping as
            ``model(**batch)``; batches without samples are skipped.
        model: updated in place.
        device: where tensors in the batches are moved; ``None`` leaves them where they are.
        forward: called as ``forward(model, batch)`` instead of the above, with the model out of its wrappers.
        passes: number of passes over the loader; more than 1 need one that can be iterated again.
        progress: show a bar on stderr, on rank 0 only.

    Raises:
        OptionError: ``passes`` is not a whole number of at least 1, or ``model`` is no module.
        BatchError: the loader can be iterated only once and ``passes`` is more, or no sample reached any
            BatchNorm layer.
        StructureError: a layer has no memory yet (lazy, or on the meta device), or ranks have different ones.
        NonFiniteError: the statistics of a layer came out as NaN or infinite.
        PolyakError: another rank failed.

    References:
        Ioffe & Szegedy, Batch Normalization, 2015: population statistics for inference.
        Izmailov et al., Averaging Weights Leads to Wider Optima and Better Generalization, 2018.

    >>> model = nn.Sequential(nn.BatchNorm1d(1))
    >>> sorted_data = [torch.tensor([[0.0], [2.0]]), torch.tensor([[10.0]])]
    >>> update_bn(sorted_data, model)
    >>> model[0].running_mean, model[0].running_var
    (tensor([4.]), tensor([18.6667]))
    """
    if not isinstance(passes, int) or passes < 1:
        raise OptionError(f"passes is {passes!r}; it must be a whole number of at least 1")
    if passes > 1 and isinstance(loader, Iterator):
        raise BatchError(
            f"passes is {passes}, but the loader is a {type(loader).__name__}, which can be iterated only "
            "once; give a list or a DataLoader, or set passes=1"
        )
    network = bare_model(model)  # DistributedDataParallel would wait for the other ranks in every forward
    layers = layers_to_refresh(network, keep_frozen=network.training)
    if not layers:
        return
    _require_equal_on_ranks(layers, passes)

    call = forward or call_model
    with lent(layers, network), _eager(), progress_bar(loader, passes, progress) as advance:

        def run(batch: Any) -> None:
            call(network, batch if device is None else moved(batch, device))
            advance()

        moments = _measure(layers, loader, run, normalise_by_batch=True)
        for _ in range(passes - 1):
            for layer, mean, variance in zip(layers, moments.means, moments.variances, strict=True):
                layer.normalise_by(mean, variance)
            moments = _measure(layers, loader, run, normalise_by_batch=False)
    store(moments, layers)


def _measure(
    layers: list[BatchNormLayer],
    loader: Iterable[Any],
    run: Callable[[Any], None],
    normalise_by_batch: bool,
) -> PooledMoments:
    """The moments of what reaches each layer in one pass over the data of all ranks."""
    meter = Meter(layers, normalise_by_batch)
    with meter.attached(), distributed.Team.of_all().all_or_none("update_bn"):
        for batch in loader:
            run(batch)
            meter.end_batch()
    meter.moments.merge_ranks()
    if not any(meter.moments.counts):
        raise BatchError(
            "no sample reached any BatchNorm layer: the loader gave none, or `forward` does not call the "
            "model; the running statistics are as they were"
        )
    return meter.moments


def _require_equal_on_ranks(layers: list[BatchNormLayer], passes: int) -> None:
    job = (passes, [(layer.name, len(layer.mean)) for layer in layers])
    for rank, other in enumerate(distributed.Team.of_all().gather(job)):
        if other != job:
            raise StructureError(
                f"rank {rank} would refresh other BatchNorm layers than this rank, or take other passes; "
                "call update_bn with the same model, in the same mode, and the same passes on all ranks"
            )


def _eager() -> AbstractContextManager[object]:
    """Compiled parts run eagerly, as graphs compiled earlier do not call new hooks."""
    if "torch._dynamo" not in sys.modules:  # then nothing is compiled, and loading it takes seconds
        return nullcontext()
    return torch.compiler.set_stance("force_eager")
