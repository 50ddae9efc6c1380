"""Other weights in a live model for a trial: the score they get, and how sure it is."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from os import PathLike
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from polyak._checks import Difference, warn_user
from polyak._model import ModelTensors, NamedTensor, bare_model, local
from polyak._swap import Swap, modes, undoing
from polyak.batchnorm import tracks_statistics, update_bn
from polyak.checkpoints import Checkpoint
from polyak.combine import write_completed
from polyak.errors import NotStartedError, OptionError, StructureError, name_list
from polyak.trajectory import Trajectory

__all__ = [
    "Mode",
    "Prepare",
    "Score",
    "ScoreFunction",
    "apply_weights",
    "averaged",
    "badness",
    "check_statistics",
    "lacks_frozen",
    "live_weights",
    "matched",
    "read_score",
    "refuse_incomplete",
    "refuse_no_trajectory",
    "refuse_one_pass",
    "refuse_unknown_mode",
    "resolved_mode",
    "simultaneous_intervals",
    "trial",
    "try_weights",
    "write_weights",
]

# How sure a score is: what ``score(model)`` returned, standard errors, paired bootstrap intervals.

Floats = NDArray[np.float64]

# More examples than this are resampled in this many groups of neighbours. That bounds the cost whatever the
# data, and is right where neighbours are alike, as the tokens of one text are.
_MOST_GROUPS = 1024
# Fewer say nothing of how much they vary.
_LEAST_EXAMPLES = 5
# Of the standard error, what that of a resample counts as at least.
_LEAST_ERROR = 1 / 16
_RESAMPLES = 2000
_SEED = 0
_ROUNDING = 1e-12
# Errors of an example, or right answers, are fewer; beyond it every number in single precision is a whole one.
_LARGEST_COUNT = 2**24


@dataclass(frozen=True)
class Score:
    """One result of ``score(model)``.

    ``value`` is the score. Where ``score`` gave a loss per example it is their mean, and ``group_sums`` [G]
    are their sums over groups of ``group_sizes`` [G] neighbouring examples; otherwise both are None. ``counts`` says
    that they are whole numbers: errors, or right answers.
    """

    value: float
    group_sums: Floats | None = None
    group_sizes: Floats | None = None
    counts: bool = False

    @property
    def examples(self) -> int | None:
        """How many losses there were; None for a number."""
        return None if self.group_sizes is None else int(self.group_sizes.sum())

    @property
    def stderr(self) -> float | None:
        """The standard error of the mean over groups, √(Σ (s_g - n_g μ)² G/(G-1)) / N; None for a number."""
        if self.group_sums is None or self.group_sizes is None:
            return None
        groups = len(self.group_sums)
        with np.errstate(invalid="ignore"):
            residuals = self.group_sums - self.value * self.group_sizes
            return float(np.sqrt(np.sum(residuals**2) * groups / (groups - 1)) / self.group_sizes.sum())


@dataclass(frozen=True)
class Interval:
    """A 95% interval of a difference."""

    low: float
    high: float


def read_score(result: object, called: str = "score") -> Score:
    """What a score function returned, as a :class:`Score`.

    Args:
        result: a number, a tensor or array of one element, or one of shape [N] with the losses of N examples.
        called: what the function is called in messages.

    Raises:
        OptionError: anything else, or no examples.

    >>> read_score(torch.tensor([1.0, 2.0, 3.0])).value, read_score(0.5).value
    (2.0, 0.5)
    """
    if isinstance(result, torch.Tensor) and not result.is_complex():
        result = result.detach().cpu().to(torch.float64).numpy()
    # NumPy would make numbers of these, or of (loss, accuracy).
    if result is None or isinstance(result, str | tuple) or _is_complex(result):
        raise OptionError(_not_a_score(called, f"a {type(result).__name__}"))
    try:
        losses = np.asarray(result, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError):  # the last of tensors in a list that need gradients
        raise OptionError(_not_a_score(called, f"a {type(result).__name__}")) from None
    if losses.ndim > 1 or not losses.size:
        raise OptionError(_not_a_score(called, f"an array of shape {losses.shape}"))
    if losses.size == 1:
        return Score(float(losses.item()))
    groups = min(len(losses), _MOST_GROUPS)
    starts = np.arange(groups) * len(losses) // groups
    sizes = np.diff(starts, append=len(losses)).astype(np.float64)
    counts = bool((losses == np.floor(losses)).all() and np.abs(losses).max() < _LARGEST_COUNT)
    return Score(float(losses.mean()), np.add.reduceat(losses, starts), sizes, counts)


def simultaneous_intervals(scores: Sequence[Score], *baselines: Score) -> list[list[Interval | None]]:
    """Intervals of each score minus a baseline, all of which hold at once with 95%, for one baseline after the other.

    With the mean paired differences d_c of C candidates and their standard errors s_c, and d_cb and s_cb of a resample
    of the examples, t_cb = (d_cb - d_c) / s_cb. The interval is [d_c - h s_c, d_c - l s_c], where h is the 97.5%
    quantile over b of max_c t_cb, and l the 2.5% quantile of min_c t_cb. So the best of many candidates seems to beat
    the baseline, where none does, in about 5% of cases at most, whichever way it was chosen from among them. A resample
    is measured by its own error: where a few examples make most of a difference, so that those scored may lack them,
    or where examples are few, the interval is longer on that side. Where examples hardly differ in a resample, s_cb
    counts as a sixteenth of s_c. 2,000 resamples are drawn, with a fixed seed. None where scores are single numbers, or
    of fewer than five examples.

    Raises:
        OptionError: scores of different numbers of examples.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, section 12.5 (bootstrap-t); Westfall and
    Young 1993, Resampling-Based Multiple Testing; Romano and Wolf 2005.

    >>> live, other = read_score([1.0, 2.0, 3.0, 4.0, 5.0]), read_score([0.5, 1.5, 2.5, 3.5, 4.5])
    >>> simultaneous_intervals([live, other], live)
    [[Interval(low=0.0, high=0.0), Interval(low=-0.5, high=-0.5)]]
    """
    return [_intervals(scores, baseline) for baseline in baselines]


def _intervals(scores: Sequence[Score], baseline: Score) -> list[Interval | None]:
    _refuse_other_examples(scores, baseline)
    sums, sizes = baseline.group_sums, baseline.group_sizes
    if sums is None or sizes is None or len(sums) < _LEAST_EXAMPLES:
        return [None for _ in scores]
    # A loss that is not finite, or its square, makes its own candidate's interval NaN or endless, and no other's.
    with np.errstate(invalid="ignore", over="ignore"):
        differences = np.array([score.value for score in scores]) - baseline.value
        # Of each group, what it deviates by from the mean difference, [C, G].
        rest = np.array([score.group_sums for score in scores]) - sums - np.outer(differences, sizes)
        (_,), (errors,) = _deviations_and_errors(rest, sizes, np.ones((1, len(sizes))))
        rounding = [_ROUNDING * (abs(score.value) + abs(baseline.value)) for score in scores]
        errors = np.where(errors <= rounding, 0.0, errors)
        varying = np.isfinite(errors) & (errors > 0)
        least, most = _quantiles(rest[varying], sizes, errors[varying]) if varying.any() else (0.0, 0.0)
        bounds = zip(differences - most * errors, differences - least * errors, strict=True)
    return [Interval(float(low), float(high)) for low, high in bounds]


def _quantiles(rest: Floats, sizes: Floats, errors: Floats) -> tuple[float, float]:
    """The 2.5% quantile of the least deviation of any candidate, in its own errors, and the 97.5% one of the most."""
    deviations, own = _deviations_and_errors(rest, sizes, _times_drawn(len(sizes)))
    measured = deviations / np.maximum(own, _LEAST_ERROR * errors)
    return float(np.quantile(measured.min(axis=1), 0.025)), float(np.quantile(measured.max(axis=1), 0.975))


def _deviations_and_errors(rest: Floats, sizes: Floats, times_drawn: Floats) -> tuple[Floats, Floats]:
    """Of the mean of each candidate in each resample, [B, C]: what it deviates by, and its standard error."""
    groups, examples = len(sizes), (times_drawn @ sizes)[:, None]
    means = times_drawn @ rest.T / examples
    squares = (
        times_drawn @ np.square(rest).T
        - 2 * means * (times_drawn @ (rest * sizes).T)
        + np.square(means) * (times_drawn @ np.square(sizes))[:, None]
    )
    return means, np.sqrt(np.maximum(squares, 0) * groups / (groups - 1)) / examples


def _times_drawn(groups: int) -> Floats:
    """How often each group is in each resample, [resamples, groups]."""
    generator = np.random.default_rng(_SEED)
    draws = (generator.integers(groups, size=groups) for _ in range(_RESAMPLES))
    return np.array([np.bincount(drawn, minlength=groups) for drawn in draws], dtype=np.float64)


def _refuse_other_examples(scores: Sequence[Score], baseline: Score) -> None:
    counts = {0 if s.group_sizes is None else int(s.group_sizes.sum()) for s in (*scores, baseline)}
    if len(counts) > 1:
        shown = " and ".join("one number" if n == 0 else f"{n} examples" for n in sorted(counts))
        raise OptionError(
            f"score returned {shown} for different weights, which cannot be paired: it must look at the same "
            "examples in the same order each time"
        )


def _is_complex(result: object) -> bool:
    dtype = getattr(result, "dtype", None)
    return dtype.is_complex if isinstance(dtype, torch.dtype) else getattr(dtype, "kind", "") == "c"


def _not_a_score(called: str, got: str) -> str:
    return f"{called} must return a number, or a tensor [N] with one loss per example; it returned {got}"


# Averaged weights in a live model: for the length of a trial, for good, or on disk.


def live_weights(trajectory: Trajectory) -> dict[str, Tensor]:
    """The weights that the run ended with; empty, which stands for those in the model, where none were kept."""
    return trajectory.live() if trajectory.has_live else {}


@contextmanager
def averaged(
    model: nn.Module, weights: Mapping[str, Tensor], recalibrate: Iterable[Any] | None = None
) -> Iterator[Swap]:
    """``weights`` in the model, with BatchNorm statistics to match; everything is as before on leaving.

    Args:
        weights: by name; what the model has besides (frozen parameters, buffers) stays. Empty: the live ones.
        recalibrate: batches for :func:`polyak.update_bn`.

    Raises:
        StructureError: a name or shape does not fit the model, or a trainable parameter is missing.
        SwapError: averaged weights are in the model already.
    """
    pairs = matched(model, weights)
    entries = list(ModelTensors(model).values())
    places = [(entry.place, entry.key, entry.tensor) for entry in entries]
    targets = [entry.tensor for entry, _ in pairs]
    # Also what is not exchanged comes back, should a trial change it; frozen parameters are left to its care.
    swapped = set(map(id, targets))
    keep = [
        e.tensor
        for e in entries
        if (e.kind == "buffer" or e.tensor.requires_grad) and id(e.tensor) not in swapped
    ]
    swap = Swap(targets, keep=local(keep), free=_buffers(model), places=places)
    with undoing(swap.undo):
        swap.put_in([value for _, value in pairs])
        if recalibrate is not None:
            update_bn(recalibrate, model)
        yield swap


@contextmanager
def trial(
    model: nn.Module, weights: Mapping[str, Tensor], recalibrate: Iterable[Any] | None = None
) -> Iterator[None]:
    """:func:`averaged`, in evaluation mode and without gradients."""
    with torch.no_grad(), averaged(model, weights, recalibrate), modes(model):
        yield


def apply_weights(
    model: nn.Module, weights: Mapping[str, Tensor], recalibrate: Iterable[Any] | None = None
) -> None:
    """Copy ``weights`` into the model for good, all or nothing; raises as :func:`averaged` does."""
    with averaged(model, weights, recalibrate) as swap:
        swap.keep()


def write_weights(
    path: str | PathLike[str],
    model: nn.Module,
    weights: Mapping[str, Tensor],
    *,
    inputs: Sequence[Checkpoint | None] = (),
    recalibrate: Iterable[Any] | None = None,
    metadata: Mapping[str, str],
    like: str | PathLike[str] | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Write the whole model with ``weights`` in it; averaged parameters keep the average's dtype.

    What lies beside the checkpoints that were averaged comes along where the output needs it. Returns notes about the
    output, one sentence each. Raises as :func:`averaged` and ``combine.write_completed`` do.
    """
    canonical = ModelTensors(model).all_names()
    ours = {canonical.get(name, name): value for name, value in weights.items()}
    with averaged(model, weights, recalibrate):
        tensors: dict[str, Tensor] = {}
        for entry in ModelTensors(model).values():
            if entry.persistent:
                averaged_here = entry.kind == "parameter" and entry.name in ours
                value = ours[entry.name] if averaged_here else entry.tensor.detach()
                tensors |= dict.fromkeys((entry.name, *entry.aliases), value)
        opened = [checkpoint for checkpoint in inputs if checkpoint is not None]
        return write_completed(path, tensors, opened, metadata=metadata, like=like, overwrite=overwrite)


def refuse_one_pass(recalibrate: Iterable[Any] | None) -> None:
    """Refuse (``OptionError``) batches that are gone after the first candidate, and what are no batches."""
    if callable(recalibrate) and not isinstance(recalibrate, Iterable):
        raise OptionError("recalibrate is a function: call it, and give the batches that it returns")
    if isinstance(recalibrate, Iterator):
        raise OptionError(
            f"recalibrate is a {type(recalibrate).__name__}, which can be gone through only once, and every "
            "evaluation needs a pass of its own: give a list or a DataLoader"
        )


def check_statistics(model: nn.Module, recalibrate: Iterable[Any] | None) -> None:
    """Warn where BatchNorm statistics would be of other weights, and refuse batches as ``refuse_one_pass``."""
    bare_model(model)  # refuses what is none
    refuse_one_pass(recalibrate)
    if recalibrate is None and tracks_statistics(model):
        warn_user(
            "the model has BatchNorm layers, whose statistics do not fit the weights that are tried: the results are "
            "not those the weights can have. Give recalibrate the batches to recompute them from"
        )


def refuse_incomplete(trajectory: Trajectory, model: nn.Module) -> None:
    """Refuse (``StructureError``) averages that would be scored with tensors of whatever model they are put into.

    Those are floating-point buffers that a state dict has, such as BatchNorm statistics, and frozen parameters where
    some are held and some are not. What is trained and lacks is refused by :func:`matched`, which has more to say.
    """
    lacking = _lacking(trajectory, model)
    if lacks_frozen(trajectory, model):
        lacking = [entry for entry in lacking if not _is_frozen(entry)]
    if lacking and not any(entry.tensor.requires_grad for entry in lacking):
        raise StructureError(
            f"the checkpoints lack {name_list([entry.name for entry in lacking])}, which would be scored as they "
            "happen to be in the given model. Give checkpoints of the whole model; constants are registered with "
            "persistent=False",
            "; key= names another part of the files",
            "; --key names another part of the files",
        )


def lacks_frozen(trajectory: Trajectory, model: nn.Module) -> bool:
    """Whether the trajectory has none of the model's frozen parameters, as where only what is trained is saved."""
    frozen = [entry for entry in ModelTensors(model).values() if _is_frozen(entry)]
    lacking = {entry.name for entry in _lacking(trajectory, model)}
    return bool(frozen) and all(entry.name in lacking for entry in frozen)


def _lacking(trajectory: Trajectory, model: nn.Module) -> list[NamedTensor]:
    """The floating-point tensors of the model's state dict that averages have no value for."""
    tensors = ModelTensors(model)
    canonical = tensors.all_names()
    held = {canonical.get(name, name) for name in trajectory.names}
    return [
        e for e in tensors.values() if e.persistent and e.tensor.is_floating_point() and e.name not in held
    ]


def _is_frozen(entry: NamedTensor) -> bool:
    return entry.kind == "parameter" and not entry.tensor.requires_grad


def _buffers(model: nn.Module) -> list[Tensor]:
    return [entry.tensor for entry in ModelTensors(model).values() if entry.kind == "buffer"]


def matched(model: nn.Module, weights: Mapping[str, Tensor]) -> list[tuple[NamedTensor, Tensor]]:
    """Each tensor of the model that ``weights`` holds, once, with its new value."""
    if not weights:
        return []
    tensors = ModelTensors(model)
    canonical = tensors.all_names()
    values = {canonical.get(name, name): value for name, value in weights.items()}
    wanted = {e.name: e.tensor for e in tensors.values() if e.tensor.requires_grad or e.name in values}
    asked, given = ({name: tuple(value.shape) for name, value in named.items()} for named in (wanted, values))
    if asked != given:
        unfit = Difference.of(asked, given)
        raise StructureError(
            f"the averaged weights do not fit this model: what was given {unfit}. Give the model that was "
            "trained; this one was left as it is"
        )
    return [(entry, values[entry.name]) for entry in tensors.values() if entry.name in values]


# Trying weights in a live model: the score they get, and which of two scores is better.

Mode = Literal["min", "max"]
ScoreFunction = Callable[[nn.Module], object]
Prepare = Callable[[nn.Module], nn.Module | None]


def try_weights(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    score: ScoreFunction,
    recalibrate: Iterable[Any] | None = None,
    prepare: Prepare | None = None,
    called: str = "score",
) -> Score:
    """``score(model)`` in evaluation mode with ``weights`` in the model, which is as before afterwards.

    Empty ``weights`` are those that the model has. With ``prepare`` a copy of the model with these weights is scored,
    as ``prepare(copy)`` returns it, or has changed it where it returns None. Random numbers that are drawn meanwhile
    are drawn again by the next trial, so that luck is no part of a difference. ``called`` is the name in messages.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> _ = model.weight.data.fill_(3.0)
    >>> try_weights(model, {"weight": torch.tensor([[2.0]])}, lambda m: m.weight.item()).value
    2.0
    >>> model.weight.item()
    3.0
    """
    with _random_numbers_come_back(model), trial(model, weights, recalibrate):
        if prepare is None:
            return read_score(score(model), called)
        prepared = _prepared(model, prepare)
        with modes(prepared):
            return read_score(score(prepared), called)


@contextmanager
def _random_numbers_come_back(model: nn.Module) -> Iterator[None]:
    """torch's generators, of the model's devices too, NumPy's and Python's own are as before on leaving."""
    places = {
        e.tensor.device for e in ModelTensors(model).values() if e.tensor.device.type not in ("cpu", "meta")
    }
    kind = next((place.type for place in places), "cuda")
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([place for place in places if place.type == kind], device_type=kind):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _prepared(model: nn.Module, prepare: Prepare) -> nn.Module:
    try:
        copy = deepcopy(model)
    except Exception as error:
        raise OptionError(
            f"prepare is given a copy of the model, and this {type(model).__name__} cannot be copied: {error}"
        ) from error
    prepared = prepare(copy)
    if prepared is None:
        return copy
    if not isinstance(prepared, nn.Module):
        raise OptionError(
            f"prepare must return a module, or None if it changed the one it was given, got {prepared!r}"
        )
    return prepared


def badness(value: float, mode: Mode) -> float:
    """A number that is lower the better the score; a score that is not finite is the worst.

    >>> badness(0.9, "max"), badness(math.nan, "max"), badness(-math.inf, "min")
    (-0.9, inf, inf)
    """
    if not math.isfinite(value):
        return math.inf
    return value if mode == "min" else -value


def refuse_unknown_mode(mode: str | None) -> None:
    """Refuse (``OptionError``) anything but ``"min"``, ``"max"`` and None, which :func:`resolved_mode` is for."""
    if mode not in ("min", "max", None):
        raise OptionError(f"mode must be 'min' (a loss) or 'max' (an accuracy), got {mode!r}")


def resolved_mode(mode: Mode | None, first: Score) -> Mode:
    """``mode``, or "min" where the first score is a mean of losses.

    Raises:
        OptionError: ``mode`` is None and the score may as well be an accuracy: one number, or whole numbers.

    >>> resolved_mode(None, read_score([0.2, 1.5])), resolved_mode("max", read_score(0.9))
    ('min', 'max')
    """
    if mode is not None:
        return mode
    if first.group_sums is not None and not first.counts:
        return "min"
    what = "whole numbers, such as 0 and 1," if first.counts else f"one number ({first.value:.5g})"
    raise OptionError(
        f"score returned {what} for the first weights, and whether that is a loss or an accuracy cannot be told: ",
        'give mode="min" if lower is better, or mode="max" if higher is',
        "give --mode min if lower is better, or --mode max if higher is",
    )


def refuse_no_trajectory(given: object) -> None:
    """Refuse (``OptionError``) anything but a trajectory, and (``NotStartedError``) one without blocks."""
    if not isinstance(given, Trajectory):
        raise OptionError(
            f"the first argument must be a Trajectory, got {given!r}: open it with polyak.Trajectory(directory), or "
            "checkpoints with polyak.Trajectory.from_checkpoints(paths)"
        )
    if not given.blocks:
        raise NotStartedError(f"{given} has no block to average yet: its first one is not full")
