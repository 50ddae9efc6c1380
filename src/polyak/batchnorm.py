"""BatchNorm statistics for averaged weights: those of the whole data, not of the last batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from operator import length_hint
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from polyak import _distributed, _terminal, _torch
from polyak._checks import checked, whole_within
from polyak._distributed import is_distributed, is_main_rank, sum_over_ranks
from polyak._model import bare_model
from polyak._swap import modes, undoing
from polyak.errors import BatchError, NonFiniteError, StructureError, name_list

__all__ = ["call_model", "statistics", "tracks_statistics", "update_bn"]

# Count, mean and variance of many samples from those of their parts: the merge that loses nothing.


class PooledMoments:
    """Mean and variance per channel of several streams of batches, pooled in float64.

    A batch of n elements with mean μ_b and variance v_b (divided by n) joins the N elements before it as ::

        s = n / (N + n)
        v ← v + s (v_b - v + (1 - s) (μ_b - μ)²)
        μ ← μ + s (μ_b - μ)

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
        _torch.foreach_copy_(mean_steps, list(means))
        _torch.foreach_copy_(variance_steps, list(variances))
        _torch.foreach_sub_(mean_steps, pooled_means)
        _torch.foreach_sub_(variance_steps, pooled_variances)
        _torch.foreach_addcmul_(variance_steps, mean_steps, mean_steps, [1 - share for share in shares])
        _torch.foreach_mul_(mean_steps, shares)
        _torch.foreach_mul_(variance_steps, shares)
        _torch.foreach_add_(pooled_means, mean_steps)
        _torch.foreach_add_(pooled_variances, variance_steps)

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
        _torch.foreach_copy_(self.means, means.split(channels))
        _torch.foreach_copy_(self.variances, variances.split(channels))


def _float64_zeros(stream: Tensor) -> Tensor:
    device = stream.device if _torch.widest_float(stream.device) == torch.float64 else "cpu"
    return torch.zeros(stream.shape, dtype=torch.float64, device=device)


def _per_channel(counts: Sequence[int], streams: Sequence[Tensor]) -> Tensor:
    """Each stream's count as float64 (exact to 2⁵³), repeated for each of its channels."""
    channels = torch.tensor([len(stream) for stream in streams])
    return torch.tensor(counts, dtype=torch.float64).repeat_interleave(channels)


# The BatchNorm layers of a model: which are refreshed, and how they borrow buffers and get their own back unharmed.


class BatchNormLayer:
    """A BatchNorm module, the state of it that measuring would disturb, and buffers for it to borrow meanwhile."""

    def __init__(self, name: str, module: _torch.BatchNorm, mean: Tensor, variance: Tensor) -> None:
        self.name = name
        self.module = module
        self.mean = mean
        self.variance = variance
        self.n_batches = module.num_batches_tracked
        self.momentum = module.momentum
        # Not copies of the old ones: a momentum of 1 still multiplies those by 0, and 0 · NaN is NaN.
        self.borrowed_mean = torch.zeros_like(mean)
        self.borrowed_variance = torch.ones_like(variance)

    @property
    def is_synchronised(self) -> bool:
        """Whether a step in training mode waits for other ranks, for ever if they have fewer batches."""
        return isinstance(self.module, nn.SyncBatchNorm)

    @property
    def yields_moments(self) -> bool:
        """Whether a step in training mode leaves this rank's moments behind, in fp32 at least."""
        return not self.is_synchronised and self.mean.element_size() >= 4

    def borrow(self) -> None:
        self.module.running_mean = self.borrowed_mean
        self.module.running_var = self.borrowed_variance
        if self.n_batches is not None:
            self.module.num_batches_tracked = torch.zeros_like(self.n_batches)
        self.module.momentum = 1.0

    def give_back(self) -> None:
        self.module.running_mean = self.mean
        self.module.running_var = self.variance
        self.module.num_batches_tracked = self.n_batches
        self.module.momentum = self.momentum

    def normalise_by(self, mean: Tensor, variance: Tensor) -> None:
        self.borrowed_mean.copy_(mean)
        self.borrowed_variance.copy_(variance)


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


def _tracks(module: nn.Module) -> TypeGuard[_torch.BatchNorm]:
    return _torch.is_batchnorm(module) and module.track_running_stats


@contextmanager
def borrowed_buffers(layers: list[BatchNormLayer], network: nn.Module) -> Iterator[None]:
    """The network in evaluation mode and the layers on borrowed buffers; all is given back at the end, always."""

    def give_back() -> None:
        for layer in layers:
            layer.give_back()

    with modes(network), undoing(give_back):
        for layer in layers:
            layer.borrow()
        yield


def store(moments: PooledMoments, layers: list[BatchNormLayer]) -> None:
    """Write the moments into the layers' own buffers, all of them or none.

    Raises:
        NonFiniteError: a mean or variance is NaN, or infinite in the layer's dtype.
    """
    olds: list[Tensor] = []
    news: list[Tensor] = []
    finite: dict[str, Tensor] = {}
    for index, layer in enumerate(layers):
        if moments.counts[index] == 0:
            continue
        mean = moments.means[index].to(layer.mean.dtype)
        variance = moments.variances[index].to(layer.variance.dtype)
        finite[layer.name] = (mean.isfinite() & variance.isfinite()).all().to(moments.means[0].device)
        olds += [layer.mean, layer.variance]
        news += [mean, variance]
        if layer.n_batches is not None:
            olds.append(layer.n_batches)
            news.append(torch.full_like(layer.n_batches, moments.batches[index]))
    # One read for all, as each would wait for the device.
    verdicts = torch.stack(list(finite.values())).tolist() if finite else []
    if broken := [name for name, is_finite in zip(finite, verdicts, strict=True) if not is_finite]:
        raise NonFiniteError(
            f"the statistics of BatchNorm layers {name_list(broken)} came out as NaN or infinite, because a "
            "batch or a weight is not finite, or is too large for the layer's dtype; look for it with "
            "torch.isfinite. The running statistics are as they were"
        )
    _torch.foreach_copy_(olds, news)  # one call, which no interrupt can split


# What reaches each BatchNorm layer, measured as it passes.


class InputMoments:
    """A hook before each layer's forward that pools the moments of its inputs.

    In training mode with momentum 1, a layer's running statistics *are* the moments of its last batch, so
    mostly they are just read. Where they will not do, the inputs are measured: in layers of 16 bits, in
    SyncBatchNorm, for single elements, and when normalising as in evaluation.

    Args:
        layers: the layers, on borrowed buffers.
        normalise_by_batch: whether batches are normalised by their own statistics, as in training, or by
            those in the borrowed buffers.
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
        with undoing(lambda: [hook.remove() for hook in hooks]):
            for index, layer in enumerate(self.layers):
                observe = partial(self._observe, index)
                hooks.append(layer.module.register_forward_pre_hook(observe, with_kwargs=True))
            yield

    def end_batch(self) -> None:
        """Pool what this batch left in the running statistics; all layers at once, in few kernels."""
        if self._unread:
            self._read(list(self._unread))

    def _observe(
        self, index: int, module: _torch.BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
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
        means = [self.layers[index].borrowed_mean for index in indices]
        unbiased = [self.layers[index].borrowed_variance for index in indices]
        variances = _torch.foreach_mul(unbiased, [(count - 1) / count for count in counts])
        self.moments.merge(indices, counts, means, list(variances))


def _moments_of(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (divided by the count) over all but the channels, in fp32 at least."""
    inputs = inputs if inputs.element_size() >= 4 else inputs.float()
    all_but_channels = [dim for dim in range(inputs.dim()) if dim != 1]
    variance, mean = torch.var_mean(inputs, all_but_channels, correction=0)
    return mean, variance


# From whatever a loader yields to a call of the model.


def call_model(model: nn.Module, batch: Any) -> None:
    """Call ``model(x)``, ``model(batch[0])`` or ``model(**batch)``, unless the batch is empty.

    >>> call_model(nn.Identity(), (torch.ones(2, 3), "labels"))
    """
    if isinstance(batch, Mapping):
        args, kwargs = [], dict(batch)
    elif isinstance(batch, (list, tuple)):
        args, kwargs = list(batch[:1]), {}
    else:
        args, kwargs = [batch], {}
    inputs = [*args, *kwargs.values()]
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    has_samples = any(tensor.numel() for tensor in tensors) if tensors else bool(inputs)
    if not has_samples:
        return
    try:
        model(*args, **kwargs)
    except TypeError as error:
        call = "**batch" if kwargs else "batch[0]" if isinstance(batch, (list, tuple)) else "batch"
        error.add_note(
            f"The model was called as model({call}); forward=lambda model, batch: ... calls it another way."
        )
        raise


def moved(batch: Any, device: torch.device | str | int) -> Any:
    """The batch with its tensors, however nested, on ``device``.

    >>> moved({"x": torch.ones(1), "name": "a"}, "meta")["x"].device
    device(type='meta')
    """
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(moved(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(moved(value, device) for value in batch)
    return batch


# `update_bn`: passes over the data, and what they leave behind.


@torch.no_grad()
@checked
def update_bn(
    loader: Iterable[Any],
    model: nn.Module,
    device: torch.device | str | int | None = None,
    *,
    forward: Callable[[nn.Module, Any], object] | None = None,
    passes: int = 1,
    progress: bool = False,
) -> None:
    """Set the running statistics of every BatchNorm layer to those of all the data in ``loader``.

    Averaged weights have never seen a batch, so their running statistics belong to other weights. Here
    each layer gets, per channel, the mean and the variance (divided by N) of all N elements that reach it. With
    n_b, μ_b, v_b the elements per channel of batch b, their mean and their variance, ::

        N = Σ n_b        μ = (1/N) Σ n_b μ_b        v = (1/N) Σ n_b (v_b + (μ_b - μ)²)

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
    if not (isinstance(passes, int) and passes == 1):
        passes = _checked_passes(passes, loader)
    network = bare_model(model)  # DistributedDataParallel would wait for the other ranks in every forward
    layers = layers_to_refresh(network, keep_frozen=network.training)
    if not layers:
        return
    _require_equal_on_ranks(layers, passes)

    call = forward or call_model
    bar = _terminal.progress_bar(
        "BatchNorm statistics", shown=progress and is_main_rank(), total=length_hint(loader) * passes or None
    )
    with borrowed_buffers(layers, network), _torch.without_graphs(), bar as shown:

        def run(batch: Any) -> None:
            call(network, batch if device is None else moved(batch, device))
            shown.advance()

        moments = _measure(layers, loader, run, normalise_by_batch=True)
        for _ in range(passes - 1):
            for layer, mean, variance in zip(layers, moments.means, moments.variances, strict=True):
                layer.normalise_by(mean, variance)
            moments = _measure(layers, loader, run, normalise_by_batch=False)
    store(moments, layers)


def _checked_passes(passes: int, loader: Iterable[Any]) -> int:
    passes = whole_within("[1, inf)", "passes", passes)
    if passes > 1 and isinstance(loader, Iterator):
        raise BatchError(
            f"passes is {passes}, but the loader is a {type(loader).__name__}, which can be iterated only "
            "once; give a list or a DataLoader, or set passes=1"
        )
    return passes


def _measure(
    layers: list[BatchNormLayer],
    loader: Iterable[Any],
    run: Callable[[Any], None],
    normalise_by_batch: bool,
) -> PooledMoments:
    """The moments of what reaches each layer in one pass over the data of all ranks."""
    meter = InputMoments(layers, normalise_by_batch)
    with meter.attached(), _distributed.RankGroup.of_all().all_or_none("update_bn"):
        for batch in loader:
            run(batch)
            meter.end_batch()
    meter.moments.merge_ranks()
    if not any(meter.moments.counts):
        raise BatchError(
            "no sample reached any BatchNorm layer, and the running statistics are as they were: the loader gave none",
            ", or `forward` does not call the model",
            "",
        )
    return meter.moments


def _require_equal_on_ranks(layers: list[BatchNormLayer], passes: int) -> None:
    job = (passes, [(layer.name, len(layer.mean)) for layer in layers])
    for rank, other in enumerate(_distributed.RankGroup.of_all().gather(job)):
        if other != job:
            raise StructureError(
                f"rank {rank} would refresh other BatchNorm layers than this rank, or take other passes; "
                "call update_bn with the same model, in the same mode, and the same passes on all ranks"
            )
