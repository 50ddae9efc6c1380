"""Averages and recordings under the Trainer of transformers: callbacks that add themselves."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from polyak._checks import require, warn_user
from polyak._mean import CheckFinite
from polyak.average import Average
from polyak.batchnorm import call_model
from polyak.errors import OptionError, StateError, name_list
from polyak.integrations import _following
from polyak.integrations._following import Following, Forward, Scored, validates_both
from polyak.integrations._recorded import RecordedRun, is_saved, saved_state
from polyak.integrations._sampling import RunLength, Sampling, SWARate
from polyak.profiles import Profile, Scheme
from polyak.trajectory import Trajectory

require("transformers", extra="transformers", purpose="polyak.integrations.transformers")

from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments  # noqa: E402

from polyak.integrations import _transformers  # noqa: E402
from polyak.integrations._transformers import Watching, callbacks_of  # noqa: E402

__all__ = ["Averaging", "Recording"]


class Averaging(Watching):
    """Average the weights that ``trainer.train`` passes through, evaluate with the average, and end with it.

    - Each optimizer step counts once; those that GradScaler skipped do not.
    - ``evaluate`` and ``predict`` see the averaged weights while training is under way, called by the Trainer or by
      you; the live ones are back afterwards, also after an exception. With ``validate="both"`` both are scored.
    - Checkpoints hold the live weights, and beside them the average's state; ``train(resume_from_checkpoint=…)`` takes
      it up, bitwise as if training had never stopped.
    - When training ends the model has the averaged weights; with ``load_best_model_at_end`` those of the checkpoint
      that the metric chose.
    - A model that is sharded by FSDP2 is averaged shard by shard, and its state saved by all ranks.

    It adds itself to the Trainer: making it is all there is to do. Any number may follow one Trainer; all but one
    then only follow (``apply=False``).

    Args:
        trainer: a Trainer, or one of another library's that derives from it.
        scheme: any :class:`polyak.Scheme`, or its text, such as ``"ema:half_life=2000"``.
        start: optimizer steps before averaging begins, or, as a float in [0, 1), their share of the run.
        every: optimizer steps between samples.
        start_epoch: epochs before averaging begins, in place of ``start``.
        every_epochs: epochs between samples, taken at the ends of epochs, in place of ``every``.
        swa_lr: the learning rate, or one for each parameter group, to which torch's ``SWALR`` takes the optimizer from
            the start of averaging on, in place of the Trainer's scheduler.
        anneal_epochs: how long the way there is; 0: at once.
        anneal_strategy: ``"cos"`` or ``"linear"``.
        validate: ``"average"``: evaluations see the average. ``"both"``: they see the live weights and then the
            average, whose metrics have names of their own, as ``eval_loss/average``; those of an average that only
            follows end in its scheme.
        recalibrate: for models with BatchNorm: batches for :func:`polyak.update_bn`, a pass over which precedes each
            evaluation that follows new samples.
        forward: how :func:`polyak.update_bn` runs such a batch, if not by ``model(**batch)`` or ``model(batch[0])``.
        apply: False: only follow; evaluations and the final model are the live weights.
        save_average: put the averaged model into each checkpoint as well, as a folder ``average`` that
            ``from_pretrained`` loads, in the model's dtype, once there is a sample; not for sharded adapters.
        change_scheme: go on from the average of a checkpoint that was made under another scheme; see
            :attr:`polyak.Average.scheme`.
        dtype: as for :class:`polyak.Average`, like all that follow.
        device: where the average is kept.
        buffers: "copy" or "average".
        include: names or patterns of what is averaged.
        exclude: names or patterns of what is not.
        check_finite: what becomes of samples that are not finite.
        compensated: for a million samples and more.

    Raises:
        OptionError: an option is out of range, or another average stands in already.
        StateError: when training resumes: the checkpoint's average is of another scheme, or does not fit.
        StructureError: FSDP1 and DeepSpeed's ZeRO-3, which leave no parameter as it is.

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
        start: int | float = 0,
        every: int = 1,
        start_epoch: int | None = None,
        every_epochs: int | None = None,
        swa_lr: float | Sequence[float] | None = None,
        anneal_epochs: int = 10,
        anneal_strategy: Literal["cos", "linear"] = "cos",
        validate: Literal["average", "both"] = "average",
        recalibrate: Iterable[Any] | None = None,
        forward: Forward | None = None,
        apply: bool = True,
        save_average: bool = False,
        change_scheme: bool = False,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        buffers: Literal["copy", "average"] = "copy",
        include: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] | None = None,
        check_finite: CheckFinite = True,
        compensated: bool = False,
    ):
        options = {
            "dtype": dtype,
            "device": device,
            "buffers": buffers,
            "include": include,
            "exclude": exclude,
            "check_finite": check_finite,
            "compensated": compensated,
        }
        overridden = type(self).should_update is not Averaging.should_update
        self._following = Following(
            scheme,
            recalibrate,
            options,
            sampling=Sampling(start, every, start_epoch, every_epochs),
            rate=SWARate.of(swa_lr, anneal_epochs, anneal_strategy),
            should_update=self.should_update if overridden else None,
        )
        self._apply, self._save_average, self._change_scheme = apply, save_average, change_scheme
        self._scored = "average" if apply else str(self._following.scheme)
        self._validates_both = validates_both(validate)
        self.file_name = f"polyak-{re.sub(r'[^A-Za-z0-9_.]+', '-', str(self._following.scheme))}.pt"
        self._refuse_beside([other for other in callbacks_of(trainer) if isinstance(other, Averaging)])
        _transformers.refuse_upside_down(trainer.args, [self._scored])
        super().__init__(trainer)
        self._forward = forward or call_model
        self._epoch = 0
        self._annealed: _transformers.Annealed | None = None

    def _refuse_beside(self, others: list[Averaging]) -> None:
        if self._apply and any(other._apply for other in others):
            raise OptionError("two averages would stand in for one model: give all but one apply=False")
        if any(other.file_name == self.file_name for other in others):
            raise OptionError(f"the Trainer has an average of {self._following.scheme} already")
        if self._save_average and any(other._save_average for other in others):
            raise OptionError(
                "two averages would be saved as one folder: give save_average=True to one of them"
            )
        if self._following.rate and any(other._following.rate for other in others):
            raise OptionError("two averages would set the learning rate: give swa_lr to one of them")

    @property
    def average(self) -> Average:
        """The average; ``NotStartedError`` before training begins."""
        return self._following.average

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether the weights now are a sample: after each optimizer step, and at the end of each epoch.

        To be overridden; by itself it does what the keywords say.

        Args:
            step_idx: the step, counted from 0.
            epoch_idx: the epoch, counted from 0.
        """
        return self._following.is_due(step_idx, epoch_idx)

    def stop(self, error: BaseException | None = None) -> None:
        """Follow no longer; the live weights are in the model."""
        self._following.stop()
        if self._annealed is not None:
            self._trainer.lr_scheduler, self._annealed = self._annealed.before, None

    def standing_in(self) -> AbstractContextManager[Any]:
        """The average in the model, if evaluations see it alone."""
        stands_in = self._apply and not self._validates_both and self._following.following
        return self._following.applied() if stands_in else nullcontext()

    def scored(self) -> Sequence[Scored]:
        """The average, if both are scored."""
        is_scored = self._validates_both and self._following.following
        return [self._following.scored(self._scored)] if is_scored else ()

    # As training goes on.

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
        # Where the data have no length the Trainer counts epochs without end.
        epochs = state.num_train_epochs if state.num_train_epochs < sys.maxsize else None
        self._following.begin(model, optimizer, self._run, RunLength(state.max_steps, epochs))
        if self._save_average and self._adapters and self._following.sharded:
            raise OptionError(
                "save_average=True does not write the folder of a sharded adapter: leave it out, and have all "
                "processes call averaging.average.save('average.safetensors') when training is over"
            )
        self._epoch = int(state.epoch or 0)
        if resumed_from is not None:
            self._resume(resumed_from)
        if state.epoch and state.epoch == self._epoch:
            self._following.epoch_ended(self._epoch - 1)  # the checkpoint may be from before it was said
        self._anneal_if_begun()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Averaging may begin with the epoch."""
        self._following.epoch_began(self._epoch)
        self._anneal_if_begun()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Averaging may have begun with the step."""
        self._anneal_if_begun()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sample, where epochs count and this one was not cut short."""
        if not control.should_training_stop or (state.epoch or 0) >= self._epoch + 1:
            self._following.epoch_ended(self._epoch)
            self._epoch += 1

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the average's state into the checkpoint, and the averaged model if asked for."""
        folder = self._save(args, state, self._state, self._following.sharded)
        if folder is not None and self._save_average and self.average.n_averaged:
            self._save_model(args, folder)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the averaged weights the model's: the last, or those that were best."""
        self.stop()
        if not self._apply:
            return
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        if best is not None and not self._load_best(Path(best)):
            warn_user(
                f"the best checkpoint, {best}, has no {self.file_name}, so the model has that checkpoint's live weights"
            )
            return
        self._following.apply()

    # How it works inside.

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_annealed": None}

    def _run(self, model: nn.Module, batch: Any) -> None:
        with self._trainer.compute_loss_context_manager():
            self._forward(model, batch)

    def _state(self) -> dict[str, Any]:
        rate = {"swa_rate": self._annealed.schedule.state_dict()} if self._annealed else {}
        return self.average.state_dict() | rate

    def _load(self, checkpoint: str | PathLike[str], name: str) -> bool:
        saved = saved_state(Path(checkpoint) / name, self.average.state_dict)
        if saved is None:
            return False
        rate = saved.pop("swa_rate", None)
        self._following.load(saved)
        if rate and self._following.following and self._following.rate:
            self._anneal_if_begun()
            assert self._annealed is not None
            self._annealed.schedule.load_state_dict(rate)
        return True

    def _resume(self, checkpoint: Path) -> None:
        if self._load(checkpoint, self.file_name):
            return
        others = self._of_other_schemes(checkpoint)
        if not others:
            warn_user(
                f"training goes on from {checkpoint}, where there is no {self.file_name}: the average begins "
                "anew"
            )
        elif not self._change_scheme or len(others) > 1:
            raise StateError(
                f"{checkpoint} holds {name_list(others)}, and no average of {self._following.scheme}: resume under "
                "the scheme that it has; or pass change_scheme=True to go on from the only one that is there under "
                "the new scheme; or remove it to begin anew"
            )
        else:
            self._load(checkpoint, others[0])
            self.average.scheme = self._following.scheme

    def _load_best(self, checkpoint: Path) -> bool:
        """Take up the average of the best checkpoint, which may be from before the scheme was changed."""
        others = self._of_other_schemes(checkpoint) if self._change_scheme else []
        names = [self.file_name, *(others if len(others) == 1 else [])]
        return any(self._load(checkpoint, name) for name in names)

    def _of_other_schemes(self, checkpoint: Path) -> list[str]:
        """The averages in a checkpoint that no callback takes up."""
        callbacks = callbacks_of(self._trainer)
        taken = {Recording.file_name, *(c.file_name for c in callbacks if isinstance(c, Watching))}
        found = {f"{path.name.removesuffix('.pt')}.pt" for path in checkpoint.glob("polyak-*")}
        return sorted(found - taken)

    def _anneal_if_begun(self) -> None:
        rate, trainer = self._following.rate, self._trainer
        optimizer: Any = trainer.optimizer
        if rate is None or self._annealed is not None or not self._following.begun:
            return
        steps = _transformers.steps_per_epoch(trainer) if rate.anneal_epochs else 1
        schedule = rate.scheduler(optimizer, "the Trainer's scheduler", steps_per_epoch=steps)
        self._annealed = _transformers.Annealed(trainer.lr_scheduler, schedule)
        trainer.lr_scheduler = self._annealed

    def _save_model(self, args: TrainingArguments, folder: Path) -> None:
        """The averaged model as a folder in the checkpoint, which appears whole."""
        target, temporary = folder / _transformers.AVERAGE, folder / ".average.tmp"
        if args.should_save:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        with self._following.applied():
            _transformers.save_swapped(self._trainer, self._following, temporary)
        if args.should_save:
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)


class Recording(Watching):
    """Record the run that ``trainer.train`` makes, to choose the average when it is over.

    It adds itself to the Trainer. The loss and the size of gradients that the Trainer logs are kept with each block.
    Checkpoints carry what is not on disk yet, and ``train(resume_from_checkpoint=…)`` goes on from there. When
    training ends, or fails, the last block and the live weights are written. With several processes the first one
    records; a model that is sharded by FSDP2 all of them.

    Args:
        trainer: a Trainer, or one of another library's that derives from it.
        directory: where the blocks go.
        preview: averages of the run so far that evaluations during training score as well: a profile, its text, or
            several. ``"decay:sqrt:0.4"`` gives ``eval_loss/decayed``, what the run would score if its learning rate
            were decayed now; profiles that are no such decay are called as they are written.
        recalibrate: batches for the BatchNorm statistics of those, as for :class:`Averaging`.
        forward: as for :class:`Averaging`.
        every: as for :class:`polyak.Recorder`, like all that follow.
        block: length of the first blocks, in optimizer steps.
        max_blocks: blocks kept.
        dtype: of the blocks.
        device: where both copies are kept.
        buffers: "copy" or "average".
        keep_in_memory: how much memory blocks may take that previews need not read again.
        resume: go on with the run that the directory holds; a checkpoint's state says so by itself.
        step: the optimizer steps already taken.

    Raises:
        OptionError: an option is out of range. When training begins, what :class:`polyak.Recorder` raises.

    >>> from polyak.integrations.transformers import Recording
    >>> # recording = Recording(trainer, "run/trajectory", every=10, preview="decay:sqrt:0.4")
    >>> # trainer.train()
    >>> # polyak.select(recording.trajectory, trainer.model, score=...)
    """

    file_name = "polyak-recording.pt"

    def __init__(
        self,
        trainer: Trainer,
        directory: str | PathLike[str],
        *,
        preview: Profile | str | Iterable[Profile | str] | None = None,
        recalibrate: Iterable[Any] | None = None,
        forward: Forward | None = None,
        every: int = 1,
        block: int | None = None,
        max_blocks: int = 64,
        dtype: torch.dtype | str | None = torch.float32,
        device: torch.device | str | None = None,
        buffers: Literal["copy", "average"] = "copy",
        keep_in_memory: int | str = 0,
        resume: bool = False,
        step: int | None = None,
    ):
        options = {
            "every": every,
            "block": block,
            "max_blocks": max_blocks,
            "dtype": dtype,
            "device": device,
            "buffers": buffers,
            "keep_in_memory": keep_in_memory,
            "resume": resume,
            "step": step,
        }
        self._recording = RecordedRun(directory, options, preview=preview, recalibrate=recalibrate)
        _transformers.refuse_upside_down(trainer.args, self._recording.previews)
        self._forward = forward or call_model
        super().__init__(trainer)

    @property
    def trajectory(self) -> Trajectory:
        """What was recorded so far; ``NotStartedError`` before training begins."""
        return self._recording.trajectory

    def stop(self, error: BaseException | None = None) -> None:
        """Write the last block and the live weights; calling it again does nothing."""
        self._recording.close(error)

    def scored(self) -> Sequence[Scored]:
        """The previews."""
        return self._recording.scored()

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
        records = state.is_world_process_zero or _following.is_sharded_model(model)
        checkpoint = self._resumed_from
        path = None if checkpoint is None or not records else checkpoint / self.file_name
        resumes = path is not None and is_saved(path)
        self._recording.begin(model, optimizer, None, self._forward, records=records, resumes=resumes)
        if path is not None and (saved := saved_state(path, self._recording.state_dict)) is not None:
            self._recording.load(saved)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put what is not on disk yet into the checkpoint."""
        self._save(args, state, self._recording.state_dict, self._recording.sharded)

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
