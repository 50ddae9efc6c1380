"""`fit`: the weights of a run's blocks, by gradient descent on given batches or by a search for a score."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.func import functional_call

from polyak._checks import checked, whole_within
from polyak._evaluate import Mode, ScoreFunction, matched, refuse_no_trajectory
from polyak._mean import mean_dtype
from polyak._model import ModelTensors, bare_model
from polyak.errors import BatchError, NonFiniteError, OptionError
from polyak.profiles import Decay, Profile, Weights, as_profile
from polyak.selection._fit_score import ScoreFit, fit_to_score
from polyak.trajectory import Trajectory

__all__ = ["Fit", "fit"]

LossFunction = Callable[[nn.Module, Any], Tensor]

# Adam moves every logit by about its learning rate: 200 steps that decay linearly to zero can change a weight
# by a factor of e^5. Signed weights move by such parts of 1/√K along axes of length 1: of 1/K each.
_LOGIT_RATE = 0.05
_SIGNED_RATE = 0.05
# Of the most: along other axes the blocks differ by rounding.
_LEAST_VARIANCE = 1e-10
# Of each block, of which differences are held at once.
_PART_NUMEL = 1 << 20
# The share of the weight that starts spread over all blocks: a logit of -inf would never move.
_SPREAD = 0.01


@dataclass(frozen=True)
class Fit:
    """Fitted weights, and what they cost.

    Attributes:
        profile: the weights; score them with :func:`polyak.select` on other data before they are used.
        losses: the loss of each step's batch.
        run_steps: optimizer steps of the run that was averaged.
    """

    profile: Weights
    losses: Sequence[float]
    run_steps: int

    @property
    def extra_steps(self) -> int:
        """Forward and backward passes made, each as dear as a training step on the same batch."""
        return len(self.losses)

    def __str__(self) -> str:
        share = self.extra_steps / self.run_steps
        tenth = max(1, len(self.losses) // 10)
        first, last = (sum(part) / len(part) for part in (self.losses[:tenth], self.losses[-tenth:]))
        return (
            f"{len(self.profile.a)} weights fitted in {self.extra_steps} forward and backward passes, {share:.1%} "
            f"of the run's {self.run_steps} steps; mean loss of the first tenth {first:.5g}, of the last {last:.5g}"
        )


@overload
def fit(
    trajectory: Trajectory,
    model: nn.Module,
    batches: Iterable[Any],
    loss: LossFunction,
    *,
    start: Profile | str | None = None,
    signed: bool = False,
    steps: int = 200,
) -> Fit: ...
@overload
def fit(
    trajectory: Trajectory,
    model: nn.Module,
    *,
    score: ScoreFunction,
    mode: Mode,
    start: Profile | str | None = None,
    evaluations: int = 200,
    recalibrate: Iterable[Any] | None = None,
    seed: int = 0,
) -> ScoreFit: ...
@checked
def fit(
    trajectory: Trajectory,
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    loss: LossFunction | None = None,
    *,
    start: Profile | str | None = None,
    signed: bool | None = None,
    steps: int | None = None,
    score: ScoreFunction | None = None,
    mode: Mode | None = None,
    evaluations: int | None = None,
    recalibrate: Iterable[Any] | None = None,
    seed: int | None = None,
) -> Fit | ScoreFit:
    """Fit the weight of each block: minimise the loss of Σ a_k · block_k over a, or find the best score.

    **By gradients**, with ``batches`` and ``loss``. The weights are a softmax, a = exp(θ) / Σ exp(θ), or with
    ``signed`` any numbers that sum to 1, a = start + U θ, where the columns of U are the principal axes of the blocks;
    θ follows Adam with a learning rate that falls linearly to zero. All K blocks are held in memory, beside the model.

    Steps of this kind are not free, and as many more steps of training may do more good: compare. Fit signed weights on
    examples that the run was not trained on: to those that it was they soon fit too well. What was fitted is evidence
    of nothing; score it with :func:`polyak.select` on data that it has not seen.

    **For a score without gradients**, such as an accuracy or BLEU, with ``score`` and ``mode``: a_k = s_k exp(θ_g),
    divided by their sum, where s is the start and g one of at most ten groups of neighbouring blocks, of equal numbers
    of blocks; θ is searched by CMA-ES. The best that was evaluated is given back, which is the start if nothing was
    better; its score is optimistic, as the best of many. Ten models are held in memory. It needs
    ``pip install 'polyak[fit]'``.

    It is worth its evaluations where what counts has no gradient and what has one does not follow it, and the score is
    of many examples: differences below its noise are fitted like any others. :func:`polyak.select` comes first, with
    fewer evaluations, and what is fitted here is one more candidate for it, on other data.

    Args:
        trajectory: a recorded run, or a folder of checkpoints.
        model: called in the mode it is in, on copies of its buffers; it is left as it is.
        batches: one for each step, from the beginning again when they run out.
        loss: ``loss(model, batch)`` returns a scalar tensor.
        start: the profile to start from, or its text; None: ``Decay("sqrt", 0.4)``.
        signed: with batches: allow negative weights; the average may then leave the hull of the blocks.
        steps: with batches: forward and backward passes, 200 if not given.
        score: ``score(model)`` returns a number, or one for each example, whose mean counts.
        mode: with a score, and needed there: "min" if lower scores are better, "max" if higher ones are.
        evaluations: with a score: calls of it, 200 if not given.
        recalibrate: with a score: batches for :func:`polyak.update_bn` before each call.
        seed: with a score: that of the search, 0 if not given.

    Returns:
        A ``Fit``, or with ``score`` a ``ScoreFit``; the weights are its ``profile``.

    Raises:
        OptionError: ``steps``, ``evaluations`` or ``seed`` is out of range, ``mode`` is missing, the first arguments
            are no trajectory and no model, the start is a blend with the live weights of a recording, or the loss is
            no scalar with a gradient.
        TypeError: options of the one kind were given for the other.
        MissingExtraError: cma is not installed, and ``score`` needs it.
        NotStartedError: the trajectory holds no block yet.
        BatchError: there are no batches.
        NonFiniteError: a loss was NaN or infinite, or no score was finite.
        StructureError: the trajectory is that of another model.

    Source: TWA, Li et al. 2023, arXiv:2205.13104, which trains the weights of a trajectory's points.

    >>> import tempfile, torch, polyak
    >>> folder = tempfile.TemporaryDirectory()
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> run = polyak.Recorder(model, folder.name, block=1)
    >>> for value in (0.0, 1.0, 4.0):
    ...     _ = model.weight.data.fill_(value)
    ...     run.update()
    >>> run.close()
    >>> fitted = polyak.fit(run.trajectory, model, [torch.tensor([[3.0]])],
    ...                     lambda model, target: (model.weight - target).square().sum(), start="uniform")
    >>> weights = run.trajectory.average(fitted.profile)
    >>> fitted.extra_steps, round(weights["weight"].item(), 2)
    (200, 3.0)
    >>> folder.cleanup()
    """
    refuse_no_trajectory(trajectory)
    start = Decay("sqrt", 0.4) if start is None else as_profile(start)
    if trajectory.explain(start).live:
        raise OptionError(
            f"{start} counts the live weights, and what is fitted are the weights of blocks: start from the profile of "
            "its average, and blend what was fitted"
        )
    asked = {
        "signed": signed,
        "steps": steps,
        "mode": mode,
        "evaluations": evaluations,
        "recalibrate": recalibrate,
        "seed": seed,
    }
    options: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    if score is not None:
        if batches is not None or loss is not None:
            raise TypeError("fit takes either batches and a loss, or a score")
        _refuse_other_options(fit_to_score, "a score", options)
        return fit_to_score(trajectory, model, score, start, **options)
    if batches is None or loss is None:
        raise TypeError("fit needs batches and a loss, or a score")
    _refuse_other_options(_fit_to_batches, "batches and a loss", options)
    return _fit_to_batches(trajectory, model, batches, loss, start, **options)


def _refuse_other_options(way: Callable[..., object], given: str, options: Mapping[str, Any]) -> None:
    known = [name for name, one in signature(way).parameters.items() if one.kind is one.KEYWORD_ONLY]
    if other := [name for name in options if name not in known]:
        raise TypeError(f"fit with {given} takes {', '.join(known)}, not {', '.join(other)}")


def _fit_to_batches(
    trajectory: Trajectory,
    model: nn.Module,
    batches: Iterable[Any],
    loss: LossFunction,
    start: Profile,
    *,
    signed: bool = False,
    steps: int = 200,
) -> Fit:
    steps = whole_within("[1, inf)", "steps", steps)
    network = bare_model(model)
    begin = torch.tensor(trajectory.explain(start).coefficients, dtype=torch.float64)
    stacks = _stacked_blocks(trajectory, model)
    coefficients = _Signed(begin, stacks) if signed else _Softmax(begin)
    losses = _descend(coefficients, stacks, _Objective(network, loss), _endless(batches), steps)
    run_steps = trajectory.blocks[-1].stop - trajectory.blocks[0].start
    return Fit(Weights(coefficients.weights().tolist()), losses, run_steps)


class _Softmax:
    """Weights that are positive and sum to 1."""

    def __init__(self, start: Tensor):
        self.rate = _LOGIT_RATE
        spread = (1 - _SPREAD) * start.clamp(min=0) / start.clamp(min=0).sum() + _SPREAD / len(start)
        self.theta = spread.log().requires_grad_()

    def weights(self) -> Tensor:
        return torch.softmax(self.theta, dim=0)


class _Signed:
    """Weights of either sign that sum to 1, moved along the principal axes of the blocks.

    Blocks are nearly parallel: what one weight does its neighbours do, too. Adam moves every coordinate at the same
    rate, so coordinates should do different things.
    """

    def __init__(self, start: Tensor, stacks: Mapping[str, Tensor]):
        count = len(start)
        variances, axes = torch.linalg.eigh(_products(stacks.values(), count))
        axes = axes[:, variances > _LEAST_VARIANCE * variances[-1]]
        self._axes = axes - axes.mean(dim=0)  # along them weights sum to what they did
        self._start = start + (1 - start.sum()) / count
        self.rate = _SIGNED_RATE / math.sqrt(count)
        self.theta = torch.zeros(self._axes.shape[1], dtype=torch.float64, requires_grad=True)

    def weights(self) -> Tensor:
        return self._start + self._axes @ self.theta


def _products(stacks: Iterable[Tensor], count: int) -> Tensor:
    """The inner products of the blocks' differences from their mean, [K, K]."""
    products = torch.zeros(count, count, dtype=torch.float64)
    for stack in stacks:
        reals = torch.view_as_real(stack) if stack.is_complex() else stack
        for part in reals.flatten(1).split(_PART_NUMEL, dim=1):
            difference = part - part.mean(dim=0)
            products += (difference @ difference.T).to(products)
    return products


class _Objective(nn.Module):
    """The loss as a module, so that ``functional_call`` exchanges the parameters inside the user's own model."""

    def __init__(self, model: nn.Module, loss: LossFunction):
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self, batch: Any) -> Tensor:
        return self._loss(self.model, batch)


def _stacked_blocks(trajectory: Trajectory, model: nn.Module) -> dict[str, Tensor]:
    """Each averaged parameter over the blocks, [K, ...], in fp32 at least, on the parameter's device."""
    count = len(trajectory.blocks)
    stacks: dict[str, Tensor] = {}
    for index in range(count):
        one_block = trajectory.average(Weights([float(k == index) for k in range(count)]))
        for entry, value in matched(model, one_block):
            numeric = entry.tensor.is_floating_point() or entry.tensor.is_complex()
            if entry.kind == "parameter" and numeric:
                if index == 0:
                    stacks[entry.name] = torch.empty(
                        (count, *value.shape), dtype=mean_dtype(value.dtype), device=entry.tensor.device
                    )
                stacks[entry.name][index] = value
    return stacks


@torch.enable_grad()
def _descend(
    coefficients: _Softmax | _Signed,
    stacks: dict[str, Tensor],
    objective: _Objective,
    batches: Iterator[Any],
    steps: int,
) -> list[float]:
    entries = ModelTensors(objective.model).values()
    dtypes = {entry.name: entry.tensor.dtype for entry in entries}
    buffers = {f"model.{e.name}": e.tensor.clone() for e in entries if e.kind == "buffer"}
    optimizer = torch.optim.Adam([coefficients.theta], lr=coefficients.rate)
    losses: list[float] = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = coefficients.rate * (1 - step / steps)
        weights = coefficients.weights()
        parameters = {
            f"model.{name}": torch.tensordot(weights.to(stack), stack, dims=1).to(dtypes[name])
            for name, stack in stacks.items()
        }
        value = functional_call(objective, {**parameters, **buffers}, (next(batches),))
        losses.append(_checked(value, step))
        (coefficients.theta.grad,) = torch.autograd.grad(value, [coefficients.theta])
        optimizer.step()
    return losses


def _checked(value: object, step: int) -> float:
    if not isinstance(value, Tensor) or value.ndim or not value.requires_grad:
        kind = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise OptionError(f"loss(model, batch) must return a scalar tensor with a gradient, got {kind}")
    number = value.item()
    if not math.isfinite(number):
        raise NonFiniteError(
            f"the loss of step {step + 1} is {number}: a batch or the start profile's average is broken; "
            "score that profile with select first"
        )
    return number


def _endless(batches: Iterable[Any]) -> Iterator[Any]:
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise BatchError(
                "there are no more batches: give at least one, or as many as steps if they can be gone through once"
            )
