"""SWAG: a normal distribution over weights from the same run that was averaged, and predictions averaged over it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from polyak import _terminal
from polyak._checks import checked, whole_within, within
from polyak._distributed import is_main_rank
from polyak._evaluate import check_statistics, refuse_no_trajectory, trial
from polyak._mean import mean_dtype
from polyak.combine import is_statistic
from polyak.errors import OptionError
from polyak.profiles import Profile, Weights, as_profile
from polyak.trajectory import Trajectory

__all__ = ["SWAG"]

# Samples of a small model are made in one pass over the blocks; this many bytes of them at once.
_TOGETHER_BYTES = 64 << 20
_MOST_TOGETHER = 256
# Of 1 - Σ a²: below it a single block has nearly all the weight.
_LEAST_SCATTER = 1e-6


class SWAG:
    """SWA-Gaussian: weights drawn around an average, as widely as the run scattered there.

    With blocks b_k and the profile's coefficients a_k, Σ a_k = 1, the mean is μ = Σ a_k b_k. With d_k = b_k - μ,

        Σ_diag = diag(Σ a_k d_k²) / (1 - Σ a_k²)
        Σ_low  = Σ' a_k d_k d_kᵀ / (1 - Σ' a_k²), over the newest ``rank`` blocks, their a_k rescaled to sum to 1
        w ~ N(μ, scale · (Σ_diag + Σ_low) / 2)

    which for equal weights are the paper's moments, both divided by n - 1. A draw of the second part is a signed
    combination of blocks, so deviations are never stored: memory is the mean and the variances, two models more while
    these are worked out, and two and a half while draws are made and used, whatever the rank.

    A block of a recording is a mean of ``count`` samples and scatters less than they do, the less the longer it
    is. So take ``scale`` from validation, or record with ``block`` equal to ``every``; checkpoints are samples.

    Args:
        trajectory: a recorded run, or a folder of checkpoints.
        profile: where the distribution lies; one that covers the part of the run with a high learning rate.
        rank: how many of the newest blocks give the correlations between weights.
        scale: of the covariance, above 0. The reference code's ``scale=0.5`` is 1 here.

    Attributes:
        profile, rank, scale: as given.
        mean: μ by name; averaged tensors in fp32 at least.
        variance: the diagonal of Σ_diag, by name, for the tensors that are drawn: the averaged ones other than
            BatchNorm statistics. The rest is the mean's.

    Raises:
        OptionError: an option is out of range, or the profile covers fewer than two blocks, has negative weights or
            is a blend with the live weights of a recording.
        NotStartedError: the trajectory holds no block yet.
        CheckpointError: a block or checkpoint is damaged.

    References:
        Maddox et al. 2019, A Simple Baseline for Bayesian Uncertainty in Deep Learning.

    >>> import tempfile, torch, polyak
    >>> folder = tempfile.TemporaryDirectory()
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> with polyak.Recorder(model, folder.name, block=1) as run:
    ...     for value in (1.0, 3.0, 1.0, 3.0):
    ...         _ = model.weight.data.fill_(value)
    ...         run.update()
    >>> posterior = polyak.SWAG(run.trajectory, "uniform")
    >>> posterior.mean["weight"].item(), round(posterior.variance["weight"].item(), 4)
    (2.0, 1.3333)
    >>> [weights["weight"].shape for weights in posterior.samples(2, seed=0)]
    [torch.Size([1, 1]), torch.Size([1, 1])]
    >>> spread = posterior.predict(model, lambda m: (m.weight - 2) ** 2, samples=500, progress=False)
    >>> 1 < spread.item() < 1.7
    True
    >>> folder.cleanup()
    """

    mean: dict[str, Tensor]
    variance: dict[str, Tensor]

    @checked
    def __init__(self, trajectory: Trajectory, profile: Profile | str, *, rank: int = 20, scale: float = 1.0):
        refuse_no_trajectory(trajectory)
        self._trajectory = trajectory
        self.profile = as_profile(profile)
        self.rank = whole_within("[2, inf)", "rank", rank)
        self.scale = _scale(scale)
        explained = trajectory.explain(self.profile)
        self._coefficients = explained.coefficients
        self._refuse_coefficients(explained.live)
        self.mean = trajectory.average(self.profile, dtype=torch.float32)
        self.variance = self._variances()

    def samples(
        self, count: int, *, seed: int = 0, scale: float | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """Draw weights: name to tensor on the host, averaged ones in fp32 at least, tied names sharing one.

        The same ``seed`` gives the same draws, the first few of them whatever ``count`` is. Each draw is a pass
        over the blocks; of a small model there is one for many. Blocks were compared with their checksums when this
        was made.

        Args:
            count: how many draws.
            seed: of the draws.
            scale: in the place of that which this was made with, to try several on validation data.

        Raises:
            OptionError: an option is out of range.
            CheckpointError: a block cannot be read, or the recording went on and merged it.
        """
        count, seed = whole_within("[1, inf)", "samples", count), whole_within("[0, 1e18]", "seed", seed)
        return self._drawn(count, seed, self.scale if scale is None else _scale(scale))

    @checked
    def predict(
        self,
        model: nn.Module,
        function: Callable[[nn.Module], Tensor],
        *,
        samples: int = 30,
        seed: int = 0,
        scale: float | None = None,
        recalibrate: Iterable[Any] | None = None,
        progress: bool = True,
    ) -> Tensor:
        """The mean of ``function(model)`` over draws of the weights: the Bayesian model average.

        Args:
            model: takes each draw, in evaluation mode and without gradients; it is as before when this returns
                or raises.
            function: what to average, always of one shape. For a classifier its probabilities, not its logits.
            samples: how many draws.
            seed: of the draws.
            scale: as for :meth:`samples`.
            recalibrate: batches for :func:`polyak.update_bn` for each draw; BatchNorm needs them.
            progress: show a bar on stderr.

        Raises:
            OptionError: an option is out of range, or ``function`` returns no tensor or another shape.
            StructureError: the trajectory is that of another model.
        """
        check_statistics(model, recalibrate)
        mean: Tensor | None = None
        draws = self.samples(samples, seed=seed, scale=scale)
        with _terminal.progress_bar("draws", shown=progress and is_main_rank()) as bar:
            for n, weights in enumerate(bar.over(draws, samples), 1):
                with trial(model, weights, recalibrate):
                    value = _checked(function(model), mean)
                # Equal infinities, as of the logarithm of 0, stay what they are.
                mean = value if mean is None else mean + (value - mean).masked_fill(value == mean, 0) / n
        assert mean is not None, "there is at least one sample"
        return mean

    def __repr__(self) -> str:
        return f"SWAG({self._trajectory!r}, {str(self.profile)!r}, rank={self.rank}, scale={self.scale:g})"

    # How it works inside.

    def _refuse_coefficients(self, live: float) -> None:
        if live:
            raise OptionError(
                f"{self.profile} counts the live weights, of which there is one sample: take the profile of its "
                "average, as what scatters are the blocks"
            )
        if (self._coefficients < 0).any():
            raise OptionError(
                f"{self.profile} has negative weights, which have no variance: take another profile"
            )
        newest = self._coefficients[self._newest]
        if min(_unbiased(self._coefficients), _unbiased(newest / newest.sum())) < _LEAST_SCATTER:
            raise OptionError(
                f"{self.profile} rests on a single block of this run, which shows no scatter: take a longer profile, "
                "or record shorter blocks"
            )

    def _variances(self) -> dict[str, Tensor]:
        drawn = _first_of_each(
            self.mean, [n for n in self.mean if n in self._trajectory.averaged_names and not is_statistic(n)]
        )
        variances = {name: torch.zeros_like(self.mean[name], dtype=_real(self.mean[name])) for name in drawn}
        for index in np.flatnonzero(self._coefficients):
            block = self._trajectory.average(Weights(np.eye(len(self._coefficients))[index]))
            for name, variance in variances.items():
                distance = _distance(block[name].to(self.mean[name].dtype), self.mean[name])
                variance.addcmul_(distance, distance, value=float(self._coefficients[index]))
            del block  # before the next one is read
        return {name: variance / _unbiased(self._coefficients) for name, variance in variances.items()}

    def _drawn(self, count: int, seed: int, scale: float) -> Iterator[dict[str, Tensor]]:
        seeds = torch.Generator().manual_seed(seed)
        together = min(_MOST_TOGETHER, max(1, _TOGETHER_BYTES // max(1, self._trajectory.average_bytes)))
        for first in range(0, count, together):
            generators = [_reseeded(seeds) for _ in range(min(together, count - first))]
            rows = [Weights(self._row(generator, scale)) for generator in generators]
            for generator, low_rank in zip(
                generators, self._trajectory.average_many(rows, dtype=torch.float32), strict=True
            ):
                yield self._with_diagonal(low_rank, generator, scale)

    def _row(self, generator: torch.Generator, scale: float) -> NDArray[np.float64]:
        """Coefficients of the blocks whose combination is μ plus a draw of the low-rank part; they sum to 1."""
        shares = self._coefficients[self._newest] / self._coefficients[self._newest].sum()
        drawn = torch.randn(len(shares), generator=generator, dtype=torch.float64, device="cpu").numpy()
        along = drawn * np.sqrt(scale / 2 * shares / _unbiased(shares))
        row = self._coefficients * (1 - along.sum())
        row[self._newest] += along
        return row

    @property
    def _newest(self) -> NDArray[np.intp]:
        """The blocks of the low-rank part."""
        return np.flatnonzero(self._coefficients)[-self.rank :]

    def _with_diagonal(
        self, low_rank: dict[str, Tensor], generator: torch.Generator, scale: float
    ) -> dict[str, Tensor]:
        by_tensor: dict[int, Tensor] = {}
        for name, variance in self.variance.items():
            by_tensor[id(self.mean[name])] = _noisy(low_rank.pop(name), variance * (scale / 2), generator)
        for value in self.mean.values():  # copies: what is drawn may be trained on
            if id(value) not in by_tensor:
                by_tensor[id(value)] = value.clone()
        return {name: by_tensor[id(value)] for name, value in self.mean.items()}


def _scale(scale: float) -> float:
    return within("(0, 1e6]", "scale", scale)


def _noisy(low_rank: Tensor, variance: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers that never changed stay, infinities of a mask among them."""
    noise = torch.randn(low_rank.shape, generator=generator, dtype=low_rank.dtype, device="cpu")
    return low_rank.add_(noise.mul_(variance.sqrt()).masked_fill_(variance == 0, 0))


def _distance(block: Tensor, mean: Tensor) -> Tensor:
    """|block - mean|, 0 where both are the same infinity."""
    return (block - mean).masked_fill(block == mean, 0).abs()


def _unbiased(shares: NDArray[np.float64]) -> float:
    return 1 - float((shares**2).sum())


def _first_of_each(tensors: dict[str, Tensor], names: Sequence[str]) -> list[str]:
    """Of tied names the first."""
    return list({id(tensors[name]): name for name in reversed(names)}.values())[::-1]


def _real(tensor: Tensor) -> torch.dtype:
    return mean_dtype(tensor.real.dtype if tensor.is_complex() else tensor.dtype)


def _reseeded(seeds: torch.Generator) -> torch.Generator:
    return torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=seeds, device="cpu")))


def _checked(value: object, mean: Tensor | None) -> Tensor:
    if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
        kind = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise OptionError(
            f"function must return a floating-point tensor, such as probabilities; it returned {kind}"
        )
    if mean is not None and value.shape != mean.shape:
        raise OptionError(
            f"function returned the shapes {tuple(mean.shape)} and {tuple(value.shape)} for two draws, which have no "
            "mean: it must look at the same examples each time"
        )
    return value.detach().to(mean_dtype(value.dtype), copy=True)
