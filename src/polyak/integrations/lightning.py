"""Averages and recordings in Lightning: callbacks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from os import PathLike
from typing import Any

import torch
from torch import nn

from polyak._checks import require
from polyak.average import Average
from polyak.batchnorm import call_model
from polyak.errors import OptionError, PolyakError
from polyak.integrations import _following
from polyak.integrations._following import Following, Forward, undocumented
from polyak.integrations._sampling import Sampling
from polyak.profiles import Scheme
from polyak.trajectory import Trajectory

require("lightning", extra="lightning", purpose="polyak.integrations.lightning")

from lightning.pytorch import Callback, LightningModule, Trainer  # noqa: E402
from lightning.pytorch.callbacks import WeightAveraging  # noqa: E402
from lightning.pytorch.trainer.states import TrainerFn  # noqa: E402

__all__ = ["Averaging", "Recording"]


# What is used of Lightning beyond its documentation.

# Its own name for the live weights in a checkpoint whose "state_dict" is the average.
_LIVE = "current_model_state"


def _callbacks(trainer: Trainer) -> list[Callback]:
    return undocumented("lightning", trainer, "callbacks")


def _batch_hook(trainer: Trainer) -> Callable[..., Any]:
    """``on_before_batch_transfer``, of the module or the data module, whichever has it."""
    return undocumented("lightning", trainer.lightning_module, "_on_before_batch_transfer")


def _replace_state(strategy: Any, state: Callable[[Callable[[], Any]], Any]) -> Callable[..., Any]:
    """Checkpoints hold what ``state`` makes of the function that reads the weights, until what is returned is called.

    There, as for checkpoints of weights only Lightning calls no callback.
    """
    read = undocumented("lightning", strategy, "lightning_module_state_dict")
    strategy.lightning_module_state_dict = partial(state, read)
    return partial(vars(strategy).pop, "lightning_module_state_dict", None)


def _refuse_unread(live: object) -> None:
    if live is None:
        raise PolyakError(
            "this lightning does not read a checkpoint's weights by strategy.lightning_module_state_dict(), so it "
            "would hold the live ones; use a newer polyak or an older lightning"
        )


# Averages.


class Averaging(Callback):
    """Average the weights that ``trainer.fit`` passes through, validate with the average, and end with it.

    - Each step that the last optimizer takes counts once; those that GradScaler skipped do not.
    - Validation during ``fit`` sees the averaged weights. They come back out afterwards, also after an exception.
    - In a checkpoint ``state_dict`` is the averaged model, so what a monitored metric chose is what is loaded from it;
      the live weights are beside it, and ``fit(ckpt_path=…)`` goes on from them, exactly where Lightning itself does.
    - When ``fit`` ends the model has the averaged weights.

    Any number of these may run side by side; all but one then only follow (``apply=False``).

    Args:
        scheme: any :class:`polyak.Scheme`, or its text, such as ``"ema:half_life=2000"``.
        recalibrate: for models with BatchNorm: batches for :func:`polyak.update_bn`, a pass over which precedes each
            evaluation that follows new samples. They go through the module's transfer hooks and precision.
        forward: how :func:`polyak.update_bn` runs such a batch, if not by ``model(batch[0])`` or ``model(**batch)``.
        apply: False: only follow; validation, checkpoints' ``state_dict`` and the final model are the live weights.
        options: the other keywords of :class:`polyak.Average`: ``start``, ``every``, ``device``, ...

    Raises:
        OptionError: an option is out of range, or two averages would stand in.
        StructureError: a sharded model.
        TypeError: an unknown option.

    >>> import torch, polyak
    >>> from polyak.integrations.lightning import Averaging
    >>> averaging = Averaging(polyak.EMA(half_life=500), start=100)    # Trainer(callbacks=[averaging])
    >>> averaging.state_key
    'polyak.Averaging[ema:half_life=500]'
    """

    def __init__(
        self,
        scheme: Scheme | str,
        *,
        recalibrate: Iterable[Any] | None = None,
        forward: Forward | None = None,
        apply: bool = True,
        **options: Any,
    ):
        sampling = Sampling(options.pop("start", 0), options.pop("every", 1))
        self._following = Following(scheme, recalibrate, options, sampling=sampling)
        self._apply = apply
        self._given_forward = forward
        self._state: dict[str, Any] | None = None
        self._resumed = False
        self._live: dict[str, Any] | None = None
        self._undo: Callable[..., Any] = _nothing

    @property
    def average(self) -> Average:
        """The average; ``NotStartedError`` before training begins."""
        return self._following.average

    @property
    def state_key(self) -> str:
        """The name under which a checkpoint holds the average's state."""
        return f"polyak.Averaging[{self._following.scheme}]"

    # Following.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of a run that failed, before a checkpoint is loaded for the next."""
        if stage == TrainerFn.FITTING:
            self._stop()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the average."""
        callbacks = _callbacks(trainer)
        if sum(isinstance(callback, Averaging) and callback._apply for callback in callbacks) > 1:
            raise OptionError("two averages would stand in for one model: give all but one apply=False")
        if self._apply and any(isinstance(callback, WeightAveraging) for callback in callbacks):
            raise OptionError(
                "Lightning's WeightAveraging would stand in for the model too: leave one of them out"
            )
        _following.refuse_sharded(pl_module, "Average")
        self._following.begin(pl_module, trainer.optimizers[-1], self._forward(trainer))
        if self._apply:
            self._undo = _replace_state(trainer.strategy, self._averaged_state)
        self._take_up()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if a run goes on without its average."""
        if trainer.global_step and not self._resumed:
            warnings.warn(
                f"training goes on from step {trainer.global_step} without a saved {self.state_key}: the average "
                "begins anew",
                UserWarning,
                stacklevel=2,
            )

    # Standing in.

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the averaged weights in."""
        if self._apply and trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._following.swap_in()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring the live weights back."""
        self._following.swap_out()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Bring the live weights back; a checkpoint of the failed run is still to be written, perhaps."""
        self._following.swap_out()
        self._state = None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the averaged weights the model's."""
        self._stop()
        # Not at the end of training: a last checkpoint, which is written there, needs the live weights too.
        if self._apply:
            self._following.apply()

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """The average's state; nothing once it is the model, which then is all there is to go on from."""
        return self.average.state_dict() if self._following.following else {}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on from the live weights, and keep the average's state until there is an average to take it up."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if _LIVE in checkpoint:
            pl_module.load_state_dict(checkpoint[_LIVE], strict=pl_module.strict_loading)
        self._state = checkpoint.get("callbacks", {}).get(self.state_key)
        if self._following.following:
            self._take_up()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the live weights beside the averaged ones."""
        if self._apply and self._following.following and self.average.n_averaged:
            _refuse_unread(self._live)
            checkpoint[_LIVE], self._live = self._live, None

    def _averaged_state(self, read: Callable[[], Any]) -> Any:
        if not self.average.n_averaged:
            self._live = None
            return read()
        self._live = self._following.live_state(read)
        return self._following.averaged_state(read)

    def _stop(self) -> None:
        self._following.stop()
        self._undo()
        self._undo, self._live = _nothing, None

    def _take_up(self) -> None:
        state, self._state = self._state, None
        self._resumed = bool(state)
        if state:
            self._following.load(state)

    def _forward(self, trainer: Trainer) -> Forward:
        """Runs a batch as a training step would get it."""
        forward, precision = self._given_forward or call_model, trainer.precision_plugin
        before_transfer = _batch_hook(trainer)

        def run(model: nn.Module, batch: Any) -> None:
            batch = before_transfer(precision.convert_input(batch), dataloader_idx=0)
            batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
            with precision.forward_context():
                forward(model, batch)

        return run


def _nothing() -> None:
    pass


class Recording(Callback):
    """Record the run that ``trainer.fit`` makes, to choose the average when it is over.

    The last optimizer's steps are counted, and the loss that ``training_step`` returns is kept with the blocks, a step
    late. Checkpoints carry what is not on disk yet, and ``fit(ckpt_path=…)`` goes on from there. When training ends,
    or fails, the last block and the live weights are written. With several processes the first one records.

    Args:
        directory: where the blocks go.
        options: the other keywords of :class:`polyak.Recorder`: ``every``, ``block``, ``device``, ...

    Raises:
        TypeError: an unknown option. When ``fit`` begins, what :class:`polyak.Recorder` raises.

    >>> from polyak.integrations.lightning import Recording
    >>> recording = Recording("run/trajectory", every=10)    # Trainer(callbacks=[recording])
    >>> # polyak.select(recording.trajectory, model, score=...)
    """

    def __init__(self, directory: str | PathLike[str], **options: Any):
        self._recording = _following.RecordedRun(directory, options)
        self._state: dict[str, Any] | None = None

    @property
    def trajectory(self) -> Trajectory:
        """What was recorded so far; ``NotStartedError`` before training begins."""
        return self._recording.trajectory

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, or go on."""
        if trainer.is_global_zero:
            _following.refuse_sharded(pl_module, "Recorder")
            self._recording.begin(pl_module, trainer.optimizers[-1], self._state)
        self._state = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the loss; Lightning has divided it by the batches that are accumulated."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, torch.Tensor) and loss.numel() == 1:
            self._recording.note({"loss": loss * trainer.accumulate_grad_batches})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what is left, while the live weights are in the model."""
        self._recording.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write what is left, once the live weights are in the model."""
        for callback in _callbacks(trainer):
            if isinstance(callback, Averaging):
                callback.on_exception(trainer, pl_module, exception)
        self._state = None
        self._recording.close()

    def state_dict(self) -> dict[str, Any]:
        """What is not on disk yet."""
        return self._recording.state_dict()

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the state until training begins."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._state = checkpoint.get("callbacks", {}).get(self.state_key)
