"""What every framework needs of an average or a recording: follow the optimizer, stand in, become the model."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from polyak._attach import AttachHandle, attach
from polyak._evaluate import refuse_one_pass
from polyak._model import ModelTensors, is_sharded
from polyak._swap import copy_into, modes, undoing
from polyak.average import Average
from polyak.batchnorm import call_model, statistics, tracks_statistics, update_bn
from polyak.errors import NotStartedError, OptionError, PolyakError, StructureError
from polyak.profiles import Scheme, as_scheme
from polyak.trajectory import Recorder, Trajectory

__all__ = ["Following", "Forward", "undocumented"]


def undocumented(framework: str, holder: object, name: str) -> Any:
    """What a framework's object has without promising it; :class:`PolyakError` before training where it is gone."""
    found = getattr(holder, name, None)
    if found is None:
        raise PolyakError(
            f"{type(holder).__name__} of this {framework} has no {name}, on which polyak's callbacks rest: use a newer "
            f"polyak, an older {framework}, or polyak.attach in a loop of your own"
        )
    return found


# What every framework needs of an average: follow the optimizer, stand in for evaluation, become the model.

Forward = Callable[[nn.Module, Any], object]


class Following:
    """An average of a model that somebody else trains.

    Until its first sample, evaluations see the live weights, and a warning says so.

    Args:
        scheme: of the :class:`~polyak.Average`, which is made by :meth:`begin`.
        recalibrate: batches for :func:`polyak.update_bn`, which can be gone through many times; None: none.
        options: the keywords of :class:`~polyak.Average`.

    Raises:
        OptionError: batches that are gone after the first evaluation, or whose workers are shared.
        TypeError: an unknown option.
    """

    def __init__(self, scheme: Scheme | str, recalibrate: Iterable[Any] | None, options: Mapping[str, Any]):
        # What can be refused is refused here, not hours later when the framework begins.
        inspect.signature(Average).bind(None, scheme, **options)
        refuse_one_pass(recalibrate)
        if getattr(recalibrate, "persistent_workers", False):
            raise OptionError(
                "recalibrate has persistent_workers, which a pass over it takes from whoever else iterates it, as an "
                "epoch of training: give a loader of its own, without them"
            )
        self.scheme = as_scheme(scheme)
        self._recalibrate = recalibrate
        self._forward: Forward = call_model
        self._options = dict(options)
        self._average: Average | None = None
        self._handle: AttachHandle | None = None
        self._model: nn.Module | None = None
        self._training: set[nn.Module] = set()  # modules in training mode while it trains
        self._statistics: tuple[int, list[Tensor]] | None = None

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

    def begin(self, model: nn.Module, optimizer: Optimizer, forward: Forward) -> None:
        """Make a new average of ``model`` and follow ``optimizer``.

        Args:
            model: the one that trains.
            optimizer: whose steps count.
            forward: runs ``model`` on a batch of ``recalibrate`` as training would.

        Raises:
            StructureError: the model is sharded, whose checkpoints the frameworks write in ways of their own.
        """
        self.stop()
        refuse_sharded(model, "Average")
        self._average = Average(model, self.scheme, **self._options)
        self._model, self._forward, self._statistics, self._training = model, forward, None, set()
        if (
            self._recalibrate is None
            and tracks_statistics(model)
            and self._options.get("buffers") != "average"
        ):
            warnings.warn(
                "the model has BatchNorm, whose statistics do not fit averaged weights: pass recalibrate=loader, "
                "or its evaluations are worthless",
                UserWarning,
                stacklevel=2,
            )
        self._handle = attach(optimizer, self._average, self)

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up a saved state of this average, and its scheme, which ``average.scheme = …`` may have changed."""
        current = str(self.average.scheme)
        if state.get("scheme", current) != current:
            self.average.scheme = state["scheme"]
        self.average.load_state_dict(dict(state))

    def update(self) -> None:
        """Note which layers train and which are frozen: by the time of an evaluation the model does not show it."""
        if self._recalibrate is not None and self._model is not None and not self._training:
            self._training = {module for module in self._model.modules() if module.training}

    def stop(self) -> None:
        """Follow the optimizer no longer; live weights are in the model."""
        self.swap_out()
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    @contextmanager
    def applied(self) -> Iterator[None]:
        """:meth:`swap_in`, and on leaving, however it is left, :meth:`swap_out`; inside another one, nothing."""
        if self.swapped:
            yield
            return
        with undoing(self.swap_out):
            self.swap_in()
            yield

    def swap_in(self) -> None:
        """Put the averaged weights into the model, with BatchNorm statistics to match, or warn and leave it."""
        if self._average is None or self.swapped:
            return
        if not self._average.n_averaged:
            warnings.warn(
                f"{self._average!r} has no sample yet, so the live weights stand in for it",
                UserWarning,
                stacklevel=2,
            )
            return
        try:
            self._average.swap_in()
            self._refresh_statistics()
        except BaseException:
            self.swap_out()
            raise

    def swap_out(self) -> None:
        """Bring the live weights back, if they are out."""
        if self.swapped:
            self.average.swap_out()

    def averaged_state(self, read: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """What ``read()``, a state dict of the model, is with the averaged weights in it.

        Names are its own; averaged tensors are the average's, in its dtype, the rest copies.
        """
        assert self._model is not None
        with self.applied():
            means = self.average.named_tensors()
            in_full = {
                entry.tensor.data_ptr(): means[entry.name]
                for entry in ModelTensors(self._model).values()
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

    def apply(self) -> None:
        """Make the averaged weights the model's for good, or warn and leave the live ones."""
        with self.applied():
            if self._model is None or not self.swapped:
                return
            found = [buffer.clone() for buffer in statistics(self._model)]
        self.average.copy_to(self._model)
        copy_into(statistics(self._model), found)

    def _refresh_statistics(self) -> None:
        """A pass over the data, or what the last one found if there was no sample since."""
        if self._recalibrate is None:
            return
        model, n_averaged = self._model, self.average.n_averaged
        assert model is not None
        if self._statistics is not None and self._statistics[0] == n_averaged:
            copy_into(statistics(model), self._statistics[1])
            return
        # A loader that shuffles must not change the training.
        with modes(model, self._training), torch.random.fork_rng(devices=[]):
            update_bn(self._recalibrate, model, next(model.parameters()).device, forward=self._forward)
        self._statistics = (n_averaged, [buffer.clone() for buffer in statistics(model)])


def refuse_sharded(model: nn.Module, ours: str) -> None:
    """Refuse (``StructureError``) what cannot be followed under a framework; ``ours`` is what can do it elsewhere."""
    if any(is_sharded(entry.tensor) for entry in ModelTensors(model).values()):
        raise StructureError(
            f"the model is sharded, and the framework's checkpoints would not hold what resumes: call polyak.{ours} "
            "yourself, and save its state_dict with torch.distributed.checkpoint"
        )


def _in_full(value: Any, in_full: Mapping[int, Tensor]) -> Any:
    if not isinstance(value, Tensor):
        return value
    mean = in_full.get(value.data_ptr())
    return value.clone() if mean is None or mean.shape != value.shape else mean


# What every framework needs of a recorder: one that follows the optimizer, and survives with the
# checkpoints.


class RecordedRun:
    """A recorder of a model that somebody else trains.

    Args:
        directory: of the :class:`~polyak.Recorder`, which is made by :meth:`begin`.
        options: the keywords of :class:`~polyak.Recorder`, but for ``optimizer``.

    Raises:
        TypeError: an unknown option.
    """

    def __init__(self, directory: str | PathLike[str], options: Mapping[str, Any]):
        inspect.signature(Recorder).bind(None, directory, optimizer=None, **options)
        self._directory = directory
        self._options = dict(options)
        self._recorder: Recorder | None = None
        self._handle: AttachHandle | None = None
        self._last_state: dict[str, Any] = {}

    def begin(self, model: nn.Module, optimizer: Optimizer, state: Mapping[str, Any] | None) -> None:
        """Follow ``optimizer``, from a saved state where there is one; ``StructureError`` for a sharded model."""
        self.close()
        refuse_sharded(model, "Recorder")
        # A state says more than resume= and step= do.
        options = {**self._options, **({"resume": True, "step": None} if state else {})}
        recorder = self._recorder = Recorder(model, self._directory, optimizer=optimizer, **options)
        try:
            if state:
                recorder.load_state_dict(dict(state))
        except BaseException:
            recorder.close()  # lets go of the directory
            raise
        self._handle = attach(optimizer, recorder)

    def note(self, metrics: Mapping[str, Any]) -> None:
        """Keep what a framework says of the training with the block under way."""
        if self._recorder is not None and self._handle is not None:
            self._recorder.note(**metrics)

    def state_dict(self) -> dict[str, Any]:
        """The recorder's state; once it is closed, that in which it was."""
        if self._recorder is not None and self._handle is not None:
            return self._recorder.state_dict()
        return self._last_state

    def close(self) -> None:
        """Write the last block and the live weights; calling it again does nothing."""
        if self._recorder is None or self._handle is None:
            return
        self._handle.remove()
        self._handle = None
        try:
            self._last_state = self._recorder.state_dict()
        finally:
            self._recorder.close()

    @property
    def trajectory(self) -> Trajectory:
        """What was recorded so far; ``NotStartedError`` before training begins."""
        if self._recorder is None:
            raise NotStartedError("nothing is recorded yet: that begins when training does")
        return self._recorder.trajectory
