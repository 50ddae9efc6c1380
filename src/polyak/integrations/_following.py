"""What every framework needs of an average or a recording: follow the optimizer, stand in, become the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from polyak._attach import AttachHandle, attach
from polyak._checks import Difference, warn_user
from polyak._evaluate import refuse_one_pass
from polyak._model import ModelTensors, is_sharded
from polyak._swap import copy_into, modes, undoing
from polyak.average import Average
from polyak.batchnorm import call_model, statistics, tracks_statistics, update_bn
from polyak.checkpoints import write_sharded
from polyak.errors import NotStartedError, OptionError, PolyakError, StateError
from polyak.integrations._sampling import NOT_YET, UNKNOWN, RunLength, Sampling, ShouldUpdate, SWARate
from polyak.profiles import Scheme, as_scheme

__all__ = ["Following", "Forward", "Recalibration", "Scored", "undocumented"]


def undocumented(framework: str, holder: object, name: str) -> Any:
    """What a framework's object has without promising it; :class:`PolyakError` before training where it is gone."""
    found = getattr(holder, name, None)
    if found is None:
        raise PolyakError(
            f"{type(holder).__name__} of this {framework} has no {name}, on which polyak's callbacks rest: use a newer "
            f"polyak, an older {framework}, or polyak.attach in a loop of your own"
        )
    return found


# Scores of other weights beside the live ones.


@dataclass(frozen=True)
class Scored:
    """Weights that validations score beside the live ones.

    Attributes:
        name: of them, as metrics have it: ``val_loss/average``.
        applied: a context in which they are in the model, with BatchNorm statistics to match; it gives False while
            there are none yet, and the metrics of the live weights, which are in the model then, stand in for theirs.
    """

    name: str
    applied: Callable[[], AbstractContextManager[bool]]

    def named(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Metrics of the model with these weights, under names of their own."""
        return {f"{metric}/{self.name}": value for metric, value in metrics.items()}


def validates_both(validate: str) -> bool:
    """Whether ``validate`` is ``"both"``; ``OptionError`` unless it is that or ``"average"``."""
    if validate not in ("average", "both"):
        raise OptionError(f"validate must be 'average' or 'both', got {validate!r}")
    return validate == "both"


Forward = Callable[[nn.Module, Any], object]


class Recalibration:
    """BatchNorm statistics for weights that are in a model for a while.

    Args:
        batches: for :func:`polyak.update_bn`, which can be gone through many times; None: statistics stay.

    Raises:
        OptionError: batches that are gone after the first evaluation, or whose workers are shared.
    """

    def __init__(self, batches: Iterable[Any] | None):
        refuse_one_pass(batches)
        if getattr(batches, "persistent_workers", False):
            raise OptionError(
                "recalibrate has persistent_workers, which a pass over it takes from whoever else iterates it, as an "
                "epoch of training: give a loader of its own, without them"
            )
        self._batches = batches
        self._model: nn.Module | None = None
        self._forward: Forward = call_model
        self._training: set[nn.Module] = set()  # modules in training mode while it trains
        self._found: tuple[object, list[Tensor]] | None = None

    def begin(self, model: nn.Module, forward: Forward, *, is_averaged: bool = False) -> None:
        """Refresh those of ``model``, whose batches ``forward`` runs; warn if they will not fit unless averaged."""
        self._model, self._forward, self._found, self._training = model, forward, None, set()
        if self._batches is None and tracks_statistics(model) and not is_averaged:
            warn_user(
                "the model has BatchNorm, whose statistics do not fit averaged weights: pass recalibrate=loader, "
                "or its evaluations are worthless"
            )

    def update(self) -> None:
        """Note which layers train and which are frozen: by the time of an evaluation the model does not show it."""
        if self._batches is not None and self._model is not None and not self._training:
            self._training = {module for module in self._model.modules() if module.training}

    def refresh(self, weights: object) -> None:
        """A pass over the data, or what the last one found if it was for the same ``weights``."""
        model = self._model
        if self._batches is None or model is None:
            return
        if self._found is not None and self._found[0] == weights:
            copy_into(statistics(model), self._found[1])
            return
        # A loader that shuffles must not change the training.
        with modes(model, self._training), torch.random.fork_rng(devices=[]):
            update_bn(self._batches, model, next(model.parameters()).device, forward=self._forward)
        self._found = (weights, [buffer.clone() for buffer in statistics(model)])

    def __getstate__(self) -> dict[str, Any]:
        # Pickled between runs: the model and its ways are those of the next one.
        return vars(self) | {"_model": None, "_forward": call_model, "_training": set(), "_found": None}


# What every framework needs of an average: follow the optimizer, stand in for evaluation, become the model.


class Following:
    """An average of a model that somebody else trains.

    Until its first sample, evaluations see the live weights, and a warning says so.

    Args:
        scheme: of the :class:`~polyak.Average`, which is made by :meth:`begin`.
        recalibrate: batches for :func:`polyak.update_bn`, which can be gone through many times; None: none.
        options: the keywords of :class:`~polyak.Average`, but for ``start`` and ``every``.
        sampling: when it samples.
        rate: the learning rate to average at; whoever trains puts its scheduler in once :attr:`begun`.
        should_update: decides on samples in the place of ``sampling``, at each step and end of an epoch.

    Raises:
        OptionError: batches that are gone after the first evaluation, or whose workers are shared; an option that is
            out of range.
        TypeError: an unknown option.
    """

    def __init__(
        self,
        scheme: Scheme | str,
        recalibrate: Iterable[Any] | None,
        options: Mapping[str, Any],
        *,
        sampling: Sampling | None = None,
        rate: SWARate | None = None,
        should_update: ShouldUpdate | None = None,
    ):
        # What can be refused is refused here, not hours later when the framework begins.
        self.scheme = as_scheme(scheme)
        self.rate = rate
        self.recalibration = Recalibration(recalibrate)
        self._options = read_options(options)
        Average(one_number(), self.scheme, **without_places(self._options))
        self._sampling = sampling or Sampling()
        self._should_update = should_update
        self._average: Average | None = None
        self._handle: AttachHandle | None = None
        self._model: nn.Module | None = None
        self._first_epoch = self._sampling.start_epoch or 0
        self._ended_epoch = -1

    @property
    def average(self) -> Average:
        """The average; it is there from the begin of training on."""
        if self._average is None:
            raise NotStartedError("there is no average yet: it is made when training begins")
        return self._average

    @property
    def following(self) -> bool:
        """Whether training is under way."""
        return self._handle is not None

    @property
    def swapped(self) -> bool:
        """Whether the averaged weights are in the model."""
        return self._average is not None and self._average.swapped

    @property
    def sharded(self) -> bool:
        """Whether the model is spread over ranks, so that all of them must save and load together."""
        return self.average._binding.sharded

    @property
    def begun(self) -> bool:
        """Whether the steps before averaging begins are over."""
        return self._average is not None and self._average._step >= self._average.start

    def begin(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        forward: Forward,
        run: RunLength = UNKNOWN,
    ) -> None:
        """Make a new average of ``model`` and follow ``optimizer``.

        Args:
            model: the one that trains.
            optimizer: whose steps count.
            forward: runs ``model`` on a batch of ``recalibrate`` as training would.
            run: of which ``start`` may be a share.

        Raises:
            OptionError: ``start`` is a share of a run of no known length.
        """
        self.stop()
        start, self._first_epoch = self._sampling.begins(run)
        by_itself = start != NOT_YET and self._sampling.every_epochs is None and self._should_update is None
        every = self._sampling.every if by_itself else None
        self._average = Average(model, self.scheme, start=start, every=every, **self._options)
        self._model, self._ended_epoch = model, -1
        self.recalibration.begin(model, forward, is_averaged=self._options.get("buffers") == "average")
        self._handle = attach(optimizer, self._average, self)

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up a saved state of this average, and its scheme, which ``average.scheme = …`` may have changed.

        Where the step at which averaging begins depends on the run, the one of an average that has begun stays.
        """
        average, state = self.average, dict(state)
        if state.get("scheme", str(average.scheme)) != str(average.scheme):
            average.scheme = state["scheme"]
        start = average.start
        if not self._sampling.is_fixed and "start" in state:
            if state["step"] >= state["start"]:
                average.start = state["start"]
            else:
                state["start"] = start
        try:
            average.load_state_dict(state)
        except BaseException:
            average.start = start
            raise

    def adopt(self, weights: Mapping[str, Tensor], n_averaged: int, step: int) -> None:
        """Take up an average that another tool kept.

        Args:
            weights: the averaged model under the live one's names.
            n_averaged: the samples in it, taken at the distance at which this average samples, the last one now.
            step: optimizer steps taken so far.

        Raises:
            StateError: a tensor is missing or has another shape; nothing was loaded.
        """
        average, model = self.average, self._model
        assert model is not None
        names = ModelTensors(model).all_names()
        means = {names[name]: value for name, value in weights.items() if name in names}
        state = average.state_dict()
        shapes = {name: tuple(mean.shape) for name, mean in state["average"].items()}
        if unfit := Difference.of(shapes, {n: tuple(means[n].shape) for n in shapes.keys() & means.keys()}):
            raise StateError(f"the average in the checkpoint {unfit}; nothing was loaded")
        start = min(average.start, max(step - n_averaged * (average.every or 1), 0))
        average.load_state_dict(
            state
            | {"average": {name: means[name].to(mean.dtype) for name, mean in state["average"].items()}}
            | {
                "n_averaged": n_averaged,
                "step": step,
                "sampled_at": step,
                "origin": start,
                "position": step - start,
            }
        )
        average.start = start if average.start == NOT_YET else average.start

    # Called as training goes on.

    def update(self) -> None:
        """The optimizer has taken a step, which the average has counted."""
        self.recalibration.update()
        if self.average.every is None:
            self._sample_if_due(step_idx=self.average._step - 1)

    def epoch_began(self, epoch: int) -> None:
        """An epoch begins, counted from 0; saying so again does nothing."""
        if self.average.start == NOT_YET and epoch >= self._first_epoch:
            self.average.start = self.average._step

    def epoch_ended(self, epoch: int) -> None:
        """An epoch has had its last step; saying so again does nothing."""
        if epoch > self._ended_epoch:
            self._ended_epoch = epoch
            if self.average.every is None:
                self._sample_if_due(epoch_idx=epoch)

    def is_due(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether the sampling takes the weights after a step, or an epoch, both counted from 0.

        Raises:
            NotStartedError: that depends on a run, and none has begun.
        """
        sampling = self._sampling
        average = None if self._average is None and sampling.says_all else self.average
        if sampling.every_epochs is not None:
            past = 0 if epoch_idx is None else epoch_idx + 1 - self._first_epoch
            return past > 0 and past % sampling.every_epochs == 0 and (average is None or self.begun)
        start = sampling.start if average is None else average.start
        past = 0 if step_idx is None else step_idx + 1 - start
        return past > 0 and past % sampling.every == 0

    def _sample_if_due(self, step_idx: int | None = None, epoch_idx: int | None = None) -> None:
        average, is_due = self.average, self._should_update or self.is_due
        # One sample a step, also where the end of an epoch is told again after resuming.
        if is_due(step_idx=step_idx, epoch_idx=epoch_idx) and average._step != average._sampled_at:
            average.update_now()

    def stop(self) -> None:
        """Follow the optimizer no longer; live weights are in the model."""
        self.swap_out()
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    # Standing in.

    def scored(self, name: str) -> Scored:
        """This average as weights that validations score beside the live ones."""
        return Scored(name, self.applied)

    @contextmanager
    def applied(self) -> Iterator[bool]:
        """:meth:`swap_in`, and on leaving, however it is left, :meth:`swap_out`; inside another one, nothing.

        It gives whether the averaged weights are in the model.
        """
        if self.swapped:
            yield True
            return
        with undoing(self.swap_out):
            self.swap_in()
            yield self.swapped

    def swap_in(self) -> None:
        """Put the averaged weights into the model, with BatchNorm statistics to match, or warn and leave it."""
        if self._average is None or self.swapped:
            return
        if not self._average.n_averaged:
            warn_user(
                f"the average ({self._average.scheme}) has no sample yet, so the live weights stand in for it"
            )
            return
        try:
            self._average.swap_in()
            self.recalibration.refresh(self._average.n_averaged)
        except BaseException:
            self.swap_out()
            raise

    def swap_out(self) -> None:
        """Bring the live weights back, if they are out."""
        if self.swapped:
            self.average.swap_out()

    def averaged_state(self, read: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """What ``read()``, a state dict of the model, is with the averaged weights in it.

        Names are its own; averaged tensors are the average's, in its dtype, the rest copies, as all are of a sharded
        model, whose state dict need not hold the model's own tensors.
        """
        assert self._model is not None
        with self.applied():
            means = self.average.named_tensors()
            entries = ModelTensors(self._model).values() if not self.sharded else ()
            in_full = {
                entry.tensor.data_ptr(): means[entry.name]
                for entry in entries
                if entry.name in means and entry.tensor.data_ptr() != means[entry.name].data_ptr()
            }
            return {name: _in_full(value, in_full) for name, value in read().items()}

    def live_state(self, read: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """What ``read()`` is with the live weights in the model."""
        if not self.swapped:
            return dict(read())
        self.swap_out()
        try:
            return {name: _in_full(value, {}) for name, value in read().items()}
        finally:
            self.swap_in()

    def write(self, path: Path) -> None:
        """Write the model that is swapped in as a file, without gathering one that is sharded."""
        assert self._model is not None
        entries = [entry for entry in ModelTensors(self._model).values() if entry.persistent]
        tensors = {entry.name: entry.tensor.detach() for entry in entries}
        write_sharded(path, tensors, ties={alias: e.name for e in entries for alias in e.aliases})

    def apply(self) -> None:
        """Make the averaged weights the model's for good, or warn and leave the live ones."""
        with self.applied():
            if self._model is None or not self.swapped:
                return
            found = [buffer.clone() for buffer in statistics(self._model)]
        self.average.copy_to(self._model)
        copy_into(statistics(self._model), found)

    def __getstate__(self) -> dict[str, Any]:
        # Pickled between runs: the average and its model are those of the next one.
        return vars(self) | {"_average": None, "_handle": None, "_model": None}


def one_number() -> nn.Module:
    """A model to try options on, made without drawing a random number."""
    model = nn.Module()
    model.register_parameter("weight", nn.Parameter(torch.zeros(1)))
    return model


def read_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as :class:`~polyak.Average` takes them, whose dtype may be text, as in files; ``OptionError``."""
    dtype, device = options.get("dtype"), options.get("device")
    if isinstance(dtype, str):
        found = getattr(torch, dtype.removeprefix("torch."), None)
        if not isinstance(found, torch.dtype):
            raise OptionError(f"dtype must be a torch.dtype, or the name of one as 'float32', got {dtype!r}")
        options = {**options, "dtype": found}
    try:
        _ = None if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise OptionError(f"device must be a torch.device, or its text as 'cpu', got {device!r}") from error
    for name in ("include", "exclude"):
        patterns = options.get(name) or ()
        if not all(isinstance(pattern, str) for pattern in patterns):
            raise OptionError(f"{name} must be names or patterns of tensors, got {options[name]!r}")
    return dict(options)


def without_places(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that mean the same for any model on any machine."""
    return {name: value for name, value in options.items() if name not in ("device", "include", "exclude")}


def is_sharded_model(model: nn.Module) -> bool:
    """Whether tensors of a model are spread over ranks."""
    return any(is_sharded(entry.tensor) for entry in ModelTensors(model).values())


def _in_full(value: Any, in_full: Mapping[int, Tensor]) -> Any:
    if not isinstance(value, Tensor):
        return value
    mean = in_full.get(value.data_ptr()) if in_full else None
    return value.clone() if mean is None or mean.shape != value.shape else mean
