"""Averages and recordings under the Trainer of transformers: callbacks that add themselves."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from polyak._checks import require
from polyak.average import Average
from polyak.batchnorm import call_model
from polyak.checkpoints._io import AtomicOutput
from polyak.errors import OptionError, PolyakError
from polyak.integrations import _following
from polyak.integrations._following import Following, Forward, undocumented
from polyak.integrations._sampling import Sampling
from polyak.profiles import Scheme
from polyak.trajectory import Trajectory

require("transformers", extra="transformers", purpose="polyak.integrations.transformers")

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments  # noqa: E402

__all__ = ["Averaging", "Recording"]


# What is used of the Trainer beyond its documentation.


def _callbacks(trainer: Trainer) -> list[TrainerCallback]:
    return undocumented("transformers", trainer, "callback_handler").callbacks


def _watch_training(trainer: Trainer, watched: Callable[[Path | None], AbstractContextManager[None]]) -> None:
    """Enter ``watched``, given the checkpoint that training resumes from, around each run of the training loop."""
    loop = undocumented("transformers", trainer, "_inner_training_loop")

    @wraps(loop)
    def inner_training_loop(*args: Any, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        with watched(Path(resume_from_checkpoint) if resume_from_checkpoint else None):
            return loop(*args, resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    trainer._inner_training_loop = inner_training_loop


def _refuse_unwatched(is_watched: bool) -> None:
    if not is_watched:
        raise PolyakError(
            "this transformers does not train by Trainer._inner_training_loop(), so whether it resumes is not seen; "
            "use a newer polyak or an older transformers"
        )


# Averages.


class _Watching(TrainerCallback):
    """A callback that adds itself, and knows what the events do not say: where training resumes, and that it failed."""

    file_name: str

    def __init__(self, trainer: Trainer):
        # First, so that others, which may upload what they see, find its work done.
        _callbacks(trainer).insert(0, self)
        self._checkpoint: Path | None = None
        self._is_watched = False
        _watch_training(trainer, self._watched)

    @property
    def _resumed_from(self) -> Path | None:
        """The checkpoint that the training under way went on from."""
        _refuse_unwatched(self._is_watched)
        return self._checkpoint

    @contextmanager
    def _watched(self, checkpoint: Path | None) -> Iterator[None]:
        self._checkpoint, self._is_watched = checkpoint, True
        try:
            yield
        except BaseException:
            self.stop()
            raise
        finally:
            self._is_watched = False

    def stop(self) -> None:
        """Training has ended, or failed."""
        raise NotImplementedError

    def _saved(self, checkpoint: str | PathLike[str] | None) -> dict[str, Any] | None:
        """The state in a checkpoint, if there is one."""
        path = None if checkpoint is None else Path(checkpoint) / self.file_name
        if path is None or not path.is_file():
            return None
        return torch.load(path, map_location="cpu", weights_only=True)

    def _save(self, args: TrainingArguments, state: TrainerState, what: Mapping[str, Any]) -> None:
        """Put a state into the checkpoint that was just written."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if not folder.is_dir():
            return
        output = AtomicOutput(folder / self.file_name, overwrite=True)
        try:
            torch.save(what, output.temporary)
            output.commit()
        finally:
            output.abort()


class Averaging(_Watching):
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
        scheme: any :class:`polyak.Scheme`, or its text, such as ``"ema:half_life=2000"``.
        recalibrate: for models with BatchNorm: batches for :func:`polyak.update_bn`, a pass over which precedes each
            evaluation that follows new samples.
        forward: how :func:`polyak.update_bn` runs such a batch, if not by ``model(**batch)`` or ``model(batch[0])``.
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
        self.file_name = f"polyak-{re.sub(r'[^A-Za-z0-9_.]+', '-', str(self._following.scheme))}.pt"
        others = [callback for callback in _callbacks(trainer) if isinstance(callback, Averaging)]
        if apply and any(other._apply for other in others):
            raise OptionError("two averages would stand in for one model: give all but one apply=False")
        if any(other.file_name == self.file_name for other in others):
            raise OptionError(f"the Trainer has an average of {self._following.scheme} already")
        super().__init__(trainer)

        def run(model: nn.Module, batch: Any) -> None:
            with trainer.compute_loss_context_manager():
                (forward or call_model)(model, batch)

        self._forward = run
        if apply:
            self._stand_in(trainer)

    @property
    def average(self) -> Average:
        """The average; ``NotStartedError`` before training begins."""
        return self._following.average

    def stop(self) -> None:
        """Follow no longer; the live weights are in the model."""
        self._following.stop()

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
        resumed_from = self._resumed_from
        self._following.begin(model, optimizer, self._forward)
        if resumed_from is not None and not self._load(resumed_from):
            warnings.warn(
                f"training goes on from {resumed_from}, where there is no {self.file_name}: the average begins "
                "anew",
                UserWarning,
                stacklevel=2,
            )

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the average's state into the checkpoint."""
        if args.should_save:
            self._save(args, state, self.average.state_dict())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the averaged weights the model's: the last, or those that were best."""
        self.stop()
        if not self._apply:
            return
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        if best is not None and not self._load(best):
            warnings.warn(
                f"there is no {self.file_name} in {best}, so the model has the live weights of that checkpoint",
                UserWarning,
                stacklevel=2,
            )
            return
        self._following.apply()

    def _load(self, checkpoint: str | PathLike[str]) -> bool:
        saved = self._saved(checkpoint)
        if saved is not None:
            self._following.load(saved)
        return saved is not None

    def _stand_in(self, trainer: Trainer) -> None:
        # Around the loop, not at its events: those know no exception, and one of them ends each of several data sets.
        loop = trainer.evaluation_loop

        def evaluation_loop(*args: Any, **kwargs: Any) -> Any:
            if not self._following.following or self not in _callbacks(trainer):
                return loop(*args, **kwargs)
            with self._following.applied():
                return loop(*args, **kwargs)

        trainer.evaluation_loop = evaluation_loop


class Recording(_Watching):
    """Record the run that ``trainer.train`` makes, to choose the average when it is over.

    It adds itself to the Trainer. The loss and the size of gradients that the Trainer logs are kept with each block.
    Checkpoints carry what is not on disk yet, and ``train(resume_from_checkpoint=…)`` goes on from there. When
    training ends, or fails, the last block and the live weights are written. With several processes the first one
    records.

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
        self._recording = _following.RecordedRun(directory, options)
        super().__init__(trainer)

    @property
    def trajectory(self) -> Trajectory:
        """What was recorded so far; ``NotStartedError`` before training begins."""
        return self._recording.trajectory

    def stop(self) -> None:
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
            self._recording.begin(model, optimizer, self._saved(self._resumed_from))

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put what is not on disk yet into the checkpoint."""
        if state.is_world_process_zero:
            self._save(args, state, self._recording.state_dict())

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        logs: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        """Keep what is logged of training.

        At the last log write what is left, as the best checkpoint or an average may enter the model after it.
        """
        if "train_runtime" in logs:
            self.stop()
        else:
            self._recording.note({name: logs[name] for name in ("loss", "grad_norm") if name in logs})
