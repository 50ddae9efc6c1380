"""Averages and recordings under the Trainer of transformers: callbacks that add themselves."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from polyak.average import Average
from polyak.checkpoints.atomic import AtomicOutput
from polyak.errors import OptionError
from polyak.extras import require
from polyak.integrations import recording
from polyak.integrations.following import Following
from polyak.profiles import Scheme
from polyak.trajectory import Trajectory

require("transformers", extra="transformers", purpose="polyak.integrations.transformers")

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments  # noqa: E402

__all__ = ["Averaging", "Recording"]


class Averaging(TrainerCallback):
    """Average the weights that ``trainer.train`` passes through, evaluate with the average, and end with it.

    - Each optimizer step counts once; those that GradScaler skipped do not.
    - ``evaluate`` and ``predict`` see the averaged weights while training is under way, called by the Trainer or by
      you; the live ones are back afterwards, also after an exception.
    - Checkpoints hold the live weights, and beside them the average's state; ``train(resume_from_checkpoint=…)`` takes
      it up, bitwise as if training had never stopped.
    - When training ends the model has the averaged weights; with ``load_best_model_at_end`` those of the checkpoint
      that the metric chose.

    It adds itself to the Trainer: making it is all there is to do. Any number may follow one Trainer; all but one
    then only follow (``apply=False``).

    Args:
        trainer: a Trainer, or one of another library's that derives from it.
        scheme: :class:`polyak.Uniform` (SWA), :class:`polyak.EMA`, :class:`polyak.Power`, :class:`polyak.Polynomial`.
        recalibrate: for models with BatchNorm: batches for :func:`polyak.update_bn`, a pass over which precedes each
            evaluation that follows new samples.
        apply: False: only follow; evaluations and the final model are the live weights.
        options: the other keywords of :class:`polyak.Average`: ``start``, ``every``, ``device``, ...

    Raises:
        OptionError: an option is out of range, or another average stands in already.
        StructureError: a sharded model.
        TypeError: an unknown option.

    >>> import tempfile, polyak, transformers
    >>> from polyak.integrations.transformers import Averaging
    >>> config = transformers.GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=16, n_positions=8)
    >>> folder = tempfile.TemporaryDirectory()
    >>> arguments = transformers.TrainingArguments(folder.name, report_to=[])
    >>> trainer = transformers.Trainer(transformers.GPT2LMHeadModel(config), arguments)
    >>> averaging = Averaging(trainer, polyak.EMA(half_life=500), start=100)
    >>> averaging.file_name
    'polyak-ema-half_life-500.pt'
    >>> folder.cleanup()
    """

    def __init__(
        self,
        trainer: Trainer,
        scheme: Scheme,
        *,
        recalibrate: Iterable[Any] | None = None,
        apply: bool = True,
        **options: Any,
    ):
        self._following = Following(scheme, recalibrate, options)
        self._apply = apply
        others = [
            callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Averaging)
        ]
        if apply and any(other._apply for other in others):
            raise OptionError("two averages would stand in for one model: give all but one apply=False")
        if any(other.file_name == self.file_name for other in others):
            raise OptionError(f"the Trainer has an average of {scheme} already")
        if apply:
            self._stand_in(trainer)
        trainer.callback_handler.callbacks.append(self)  # add_callback would warn of a second one

    @property
    def average(self) -> Average:
        """The average; ``NotStartedError`` before training begins."""
        return self._following.average

    @property
    def file_name(self) -> str:
        """The file in each checkpoint that holds the average's state."""
        return f"polyak-{re.sub(r'[^A-Za-z0-9_.]+', '-', str(self._following.scheme))}.pt"

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        **kwargs: Any,
    ) -> None:
        """Make the average, and take up its state where training goes on."""
        if state.is_hyper_param_search:
            raise OptionError(
                "averages do not follow a hyper-parameter search: add them to the run that is kept"
            )
        self._following.begin(model, optimizer)
        if state.global_step and not self._load(_checkpoint(args, state)):
            warnings.warn(
                f"training goes on from step {state.global_step}, but there is no {self.file_name} in "
                f"{_checkpoint(args, state)}: the average begins anew",
                UserWarning,
                stacklevel=2,
            )

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the average's state into the checkpoint."""
        _save(args, state, self.file_name, self.average)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the averaged weights the model's: the last, or those that were best."""
        self._following.stop()
        if not self._apply:
            return
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        if best is not None and not self._load(Path(best)):
            warnings.warn(
                f"there is no {self.file_name} in {best}, so the model has the live weights of that checkpoint",
                UserWarning,
                stacklevel=2,
            )
            return
        self._following.ship()

    def _load(self, checkpoint: Path) -> bool:
        """Take up the state in a checkpoint, if there is one."""
        saved = _saved(checkpoint / self.file_name)
        if saved is not None:
            self.average.load_state_dict(saved)
        return saved is not None

    def _stand_in(self, trainer: Trainer) -> None:
        # Around the loop, not at its events: those know no exception, and one of them ends each of several data sets.
        loop = trainer.evaluation_loop

        def evaluation_loop(*args: Any, **kwargs: Any) -> Any:
            if not self._following.following:
                return loop(*args, **kwargs)
            with self._following.applied():
                return loop(*args, **kwargs)

        trainer.evaluation_loop = evaluation_loop


class Recording(TrainerCallback):
    """Record the run that ``trainer.train`` makes, to choose the average when it is over.

    It adds itself to the Trainer. Checkpoints carry what is not on disk yet, and ``train(resume_from_checkpoint=…)``
    goes on from there. When training ends the last block and the live weights are written; after an exception
    :meth:`close` does that. With several processes the first one records.

    Args:
        trainer: a Trainer, or one of another library's that derives from it.
        directory: where the blocks go.
        options: the other keywords of :class:`polyak.Recorder`: ``every``, ``block``, ``device``, ...

    Raises:
        TypeError: an unknown option. When training begins, what :class:`polyak.Recorder` raises.

    >>> from polyak.integrations.transformers import Recording
    >>> # recording = Recording(trainer, "run/trajectory", every=10)
    >>> # trainer.train()
    >>> # polyak.select(recording.trajectory, trainer.model, score=...)
    """

    file_name = "polyak-recording.pt"

    def __init__(self, trainer: Trainer, directory: str | PathLike[str], **options: Any):
        self._recording = recording.Recording(directory, options)
        trainer.add_callback(self)

    @property
    def trajectory(self) -> Trajectory:
        """What was recorded so far; ``NotStartedError`` before training begins."""
        return self._recording.trajectory

    def close(self) -> None:
        """Write the last block and the live weights; calling it again does nothing."""
        self._recording.close()

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        **kwargs: Any,
    ) -> None:
        """Begin, or go on."""
        if state.is_world_process_zero:
            saved = _saved(_checkpoint(args, state) / self.file_name) if state.global_step else None
            self._recording.begin(model, optimizer, saved)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put what is not on disk yet into the checkpoint."""
        if state.is_world_process_zero:
            _save(args, state, self.file_name, self._recording)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        logs: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        """Write what is left at the last log, as the best checkpoint or an average may enter the model after it."""
        if "train_runtime" in logs:
            self.close()


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def _saved(path: Path) -> dict[str, Any] | None:
    return torch.load(path, map_location="cpu", weights_only=True) if path.is_file() else None


def _save(
    args: TrainingArguments, state: TrainerState, file_name: str, what: Average | recording.Recording
) -> None:
    folder = _checkpoint(args, state)
    if not (args.should_save and folder.is_dir()):
        return
    output = AtomicOutput(folder / file_name, overwrite=True)
    try:
        torch.save(what.state_dict(), output.temporary)
        output.commit()
    finally:
        output.abort()
