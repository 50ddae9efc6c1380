"""Averages and recordings in Lightning: callbacks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from typing import Any, Literal

import torch

from polyak._checks import require, warn_user, whole_within
from polyak._mean import CheckFinite
from polyak.average import Average
from polyak.errors import OptionError, StateError, name_list
from polyak.integrations import _following
from polyak.integrations._following import Following, Forward
from polyak.integrations._recorded import RecordedRun
from polyak.integrations._sampling import UNKNOWN, Sampling, SWARate
from polyak.profiles import Profile, Scheme
from polyak.trajectory import Trajectory

require("lightning", extra="lightning", purpose="polyak.integrations.lightning")

from lightning.pytorch import Callback, LightningModule, Trainer  # noqa: E402
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging  # noqa: E402
from lightning.pytorch.trainer.states import TrainerFn  # noqa: E402
from lightning.pytorch.utilities.types import LRSchedulerConfig  # noqa: E402

from polyak.integrations import _lightning  # noqa: E402

__all__ = ["Averaging", "Recording"]

# Averages.

_OURS = "polyak.Averaging["  # how their names in checkpoints begin


class Averaging(Callback):
    """Average the weights that ``trainer.fit`` passes through, validate with the average, and end with it.

    - Each step of the optimizer counts once; those that GradScaler skipped do not.
    - Validation during ``fit`` sees the averaged weights. They come back out afterwards, also after an exception.
      With ``validate="both"`` it sees the live ones and then the averaged ones, whose metrics are ``val_loss/average``
      where the live ones' are ``val_loss``.
    - In a checkpoint ``state_dict`` is the averaged model, so what a monitored metric chose is what is loaded from it;
      the live weights are beside it, and ``fit(ckpt_path=…)`` goes on from them, exactly where Lightning itself does.
    - When ``fit`` ends the model has the averaged weights.

    Any number of these may run side by side; all but one then only follow (``apply=False``). They differ in scheme, or
    in what they include and exclude.

    Args:
        scheme: any :class:`polyak.Scheme`, or its text, such as ``"ema:half_life=2000"``.
        recalibrate: for models with BatchNorm: batches for :func:`polyak.update_bn`, a pass over which precedes each
            evaluation that follows new samples. They go through the module's transfer hooks and precision.
        forward: how :func:`polyak.update_bn` runs such a batch, if not by ``model(batch[0])`` or ``model(**batch)``.
        apply: False: only follow; validation, checkpoints' ``state_dict`` and the final model are the live weights.
        validate: ``"average"``: validations see the average; ``"both"``: they score it beside the live weights, under
            ``/average``, or, where it only follows, under its scheme, as ``val_loss/ema:decay=0.9``. That is one more
            pass over the validation data, with the module's hooks but without other callbacks.
        start: optimizer steps before averaging begins, or, as a float below 1, their share of the run; its epochs'
            where steps are not known.
        every: optimizer steps between samples.
        start_epoch: epochs before averaging begins, instead of ``start``.
        every_epochs: epochs between samples, taken at the end of an epoch, before its validation, instead of ``every``.
        swa_lr: a learning rate to average at, or one for each parameter group: from the start of averaging on, torch's
            ``SWALR``, stepped at the end of epochs, takes the place of the optimizer's schedulers.
        anneal_epochs: how long it takes to get to ``swa_lr``; 0: at once.
        anneal_strategy: ``"cos"`` or ``"linear"``.
        optimizer: whose steps count, as ``configure_optimizers`` orders them; the last one.
        change_scheme: go on from the average of a checkpoint that was made under another scheme; see
            :attr:`polyak.Average.scheme`.
        dtype: as for :class:`polyak.Average`, or its name, as ``"float32"``.
        device: as for :class:`polyak.Average`.
        buffers: as for :class:`polyak.Average`.
        include: as for :class:`polyak.Average`.
        exclude: as for :class:`polyak.Average`.
        check_finite: as for :class:`polyak.Average`.
        compensated: as for :class:`polyak.Average`.

    Raises:
        OptionError: an option is out of range. When ``fit`` begins: two averages would stand in, there is no such
            optimizer, or the length of the run of which ``start`` is a share is not known.
        StateError: when training resumes: the checkpoint's average is of another scheme, or does not fit.
        StructureError: a sharded model whose checkpoints one rank writes alone, FSDP1, or DeepSpeed's ZeRO-3.
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
        validate: Literal["average", "both"] = "average",
        start: int | float = 0,
        every: int = 1,
        start_epoch: int | None = None,
        every_epochs: int | None = None,
        swa_lr: float | list[float] | None = None,
        anneal_epochs: int = 10,
        anneal_strategy: Literal["cos", "linear"] = "cos",
        optimizer: int = -1,
        change_scheme: bool = False,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        buffers: Literal["copy", "average"] = "copy",
        include: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        check_finite: CheckFinite = True,
        compensated: bool = False,
    ):
        self._following = Following(
            scheme,
            recalibrate,
            {
                "dtype": dtype,
                "device": device,
                "buffers": buffers,
                "include": include,
                "exclude": exclude,
                "check_finite": check_finite,
                "compensated": compensated,
            },
            sampling=Sampling(start, every, start_epoch, every_epochs),
            rate=SWARate.of(swa_lr, anneal_epochs, anneal_strategy),
            should_update=None if type(self).should_update is Averaging.should_update else self.should_update,
        )
        self._is_share = isinstance(start, float)
        parts = [
            f"{name}={_text(given)}" for name, given in (("include", include), ("exclude", exclude)) if given
        ]
        self._name = ",".join([str(self._following.scheme), *parts])
        self._change_scheme = change_scheme
        self._apply = apply
        self._both = _following.validates_both(validate)
        self._index = whole_within("(-inf, inf)", "optimizer", optimizer)
        self._recalibrate, self._given_forward = recalibrate, forward
        self._state: dict[str, Any] | None = None
        self._saved_as = self.state_key
        self._theirs: dict[str, Any] | None = None
        self._resumed = False
        self._resumes_rate = self._rate_is_in = False
        self._live: dict[str, Any] | None = None
        self._undo: list[Callable[[], Any]] = []

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether the weights are a sample; override it to decide in the place of ``start``, ``every`` and so on.

        It is asked after each step of the optimizer, with ``step_idx``, and at the end of each epoch, before its
        validation, with ``epoch_idx``; both are counted from 0. A step is sampled once at most.
        """
        return self._following.is_due(step_idx, epoch_idx)

    @property
    def average(self) -> Average:
        """The average; ``NotStartedError`` before training begins."""
        return self._following.average

    @property
    def state_key(self) -> str:
        """The name under which a checkpoint holds the average's state."""
        return f"{_OURS}{self._name}]"

    # Following.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of a run that failed, before a checkpoint is loaded for the next."""
        if stage == TrainerFn.FITTING:
            self._stop()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the average."""
        _lightning.refuse_gathered(trainer, pl_module)
        self._refuse_others(_lightning.callbacks_of(trainer))
        self._refuse_no_rate(trainer)
        optimizer = _lightning.chosen_optimizer(trainer, self._index)
        forward = _lightning.batch_runner(trainer, self._given_forward, self._recalibrate)
        run = _lightning.run_length(trainer) if self._is_share else UNKNOWN
        self._following.begin(pl_module, optimizer, forward, run)
        if self._apply:
            self._undo.append(_lightning.replace_state(trainer.strategy, self._averaged_state))
        if self._both:
            name = "average" if self._apply else self._name
            self._undo.append(_lightning.Validation.score(trainer, [self._following.scored(name)]))
        self._take_up(trainer)
        if self._resumes_rate:  # before Lightning loads the state of its scheduler
            self._put_in_rate(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if a run goes on without its average; begin."""
        if trainer.global_step and not self._resumed:
            warn_user(
                f"training goes on from step {trainer.global_step} without a saved {self.state_key}: the average "
                "begins anew"
            )

        self._put_in_rate(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, if this is the epoch to begin with."""
        self._following.epoch_began(trainer.current_epoch)
        self._put_in_rate(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Sample after the last step of an epoch, which its validation then sees."""
        if trainer.is_last_batch:
            self._following.epoch_ended(trainer.current_epoch)
        self._put_in_rate(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sample, where the epoch ended before its last batch, and the run did not."""
        if not _lightning.ends_within_epoch(trainer):
            self._following.epoch_ended(trainer.current_epoch)

    # Standing in.

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the averaged weights in."""
        if (
            self._apply
            and not self._both
            and trainer.state.fn == TrainerFn.FITTING
            and not trainer.sanity_checking
        ):
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
        if not self._following.following:
            return {}
        state = self.average.state_dict()
        return _lightning.without_tensors(state) if self._following.sharded else state

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on from the live weights, and keep the average's state until there is an average to take it up."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        saved = {name: state for name, state in checkpoint.get("callbacks", {}).items() if state}
        self._saved_as = self._found_in(saved, trainer)
        if checkpoint.get(_lightning.LIVE) == _lightning.SHARDED:
            _lightning.load_live(trainer, pl_module)
        elif _lightning.LIVE in checkpoint:
            pl_module.load_state_dict(checkpoint[_lightning.LIVE], strict=pl_module.strict_loading)
        self._state = saved.get(self._saved_as)
        is_theirs = _lightning.LIVE in checkpoint and not any(name.startswith(_OURS) for name in saved)
        if self._apply and is_theirs and _lightning.COUNT in checkpoint:
            self._theirs = checkpoint
        self._resumes_rate = any("_anneal_strategy" in state for state in checkpoint.get("lr_schedulers", ()))
        if self._following.following:
            self._take_up(trainer)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the live weights beside the averaged ones, all as WeightAveraging would look for them."""
        if not self._following.following:
            return
        if self._following.sharded:
            _lightning.keep_sharded(checkpoint, self.state_key, self.average.state_dict())
        if self._apply and self.average.n_averaged:
            _lightning.refuse_unread(self._live)
            live, self._live = self._live, None
            if self._following.sharded:
                checkpoint["state_dict"][_lightning.LIVE], live = live, _lightning.SHARDED
            checkpoint[_lightning.LIVE] = live
            checkpoint[_lightning.COUNT] = {"n_averaged": torch.tensor(self.average.n_averaged)}

    # How it works inside.

    def _found_in(self, saved: Mapping[str, Any], trainer: Trainer) -> str:
        """The name under which a checkpoint holds this average, if it does, or the one that it may change from."""
        callbacks = [c for c in _lightning.callbacks_of(trainer) if isinstance(c, Averaging)]
        taken = {callback.state_key for callback in callbacks}
        others = sorted(name for name in saved if name.startswith(_OURS) and name not in taken)
        if self.state_key in saved or not others:
            return self.state_key
        if not self._change_scheme or len(others) > 1:
            raise StateError(
                f"the checkpoint holds {name_list(others)}, and no {self.state_key}: resume under the scheme that it "
                "has; or pass change_scheme=True to go on from the only one that is there under the new scheme; to "
                "begin anew, load_from_checkpoint() and fit() without ckpt_path"
            )
        return others[0]

    def _refuse_others(self, callbacks: list[Callback]) -> None:
        ours = [callback for callback in callbacks if isinstance(callback, Averaging)]
        if sum(callback._apply for callback in ours) > 1:
            raise OptionError("two averages would stand in for one model: give all but one apply=False")
        if sum(callback._following.rate is not None for callback in ours) > 1:
            raise OptionError("two averages would set the learning rate: give swa_lr to one of them")
        theirs = [c for c in callbacks if isinstance(c, WeightAveraging | StochasticWeightAveraging)]
        if self._apply and theirs:
            raise OptionError(
                f"Lightning's {type(theirs[0]).__name__} would stand in for the model too: leave one of them out"
            )

    def _refuse_no_rate(self, trainer: Trainer) -> None:
        if self._following.rate is not None and not trainer.lightning_module.automatic_optimization:
            raise OptionError(
                "swa_lr is set by a scheduler that Lightning steps, which it does not under manual optimization: leave "
                "swa_lr out, and step a torch.optim.swa_utils.SWALR in training_step or on_train_epoch_end"
            )

    def _put_in_rate(self, trainer: Trainer) -> None:
        """Put SWALR in the place of the optimizer's schedulers, once averaging has begun."""
        rate = self._following.rate
        if rate is None or self._rate_is_in or not self._following.begun:
            return
        optimizer, configs = _lightning.chosen_optimizer(trainer, self._index), trainer.lr_scheduler_configs
        own = [k for k, config in enumerate(configs) if config.scheduler.optimizer is optimizer]
        place = own[0] if own else len(configs)
        before = [type(configs.pop(k).scheduler).__name__ for k in reversed(own)]
        schedule = rate.scheduler(optimizer, name_list(before) or "a constant one")
        configs.insert(place, LRSchedulerConfig(schedule, interval="epoch"))
        self._rate_is_in = True

    def _averaged_state(self, read: Callable[[], Any]) -> Any:
        if not self.average.n_averaged:
            self._live = None
            return read()
        self._live = self._following.live_state(read)
        return self._following.averaged_state(read)

    def _stop(self) -> None:
        self._following.stop()
        for undo in self._undo:
            undo()
        self._undo, self._live, self._rate_is_in = [], None, False

    def _take_up(self, trainer: Trainer) -> None:
        state, self._state = self._state, None
        theirs, self._theirs = self._theirs, None
        self._resumed = bool(state or theirs)
        if state and self._following.sharded:
            state = _lightning.kept_sharded(trainer, self._saved_as, state, self.average.state_dict())
        if state:
            self._following.load(state)
            if self._saved_as != self.state_key:
                self.average.scheme = self._following.scheme
        elif theirs and (n_averaged := int(theirs[_lightning.COUNT]["n_averaged"])):
            # Where several optimizers train by hand, global_step counts the steps of all.
            steps = theirs["global_step"] // len(trainer.optimizers)
            self._following.adopt(theirs["state_dict"], n_averaged, steps)


def _text(names: str | list[str]) -> str:
    return names if isinstance(names, str) else "+".join(names)


class Recording(Callback):
    """Record the run that ``trainer.fit`` makes, to choose the average when it is over.

    The loss that ``training_step`` returns is kept with the blocks, a step late. Checkpoints carry what is not on disk
    yet, and ``fit(ckpt_path=…)`` goes on from there. When training ends, or fails, the last block and the live weights
    are written. With several processes the first one records.

    Args:
        directory: where the blocks go.
        every: as for :class:`polyak.Recorder`.
        block: as for :class:`polyak.Recorder`.
        max_blocks: as for :class:`polyak.Recorder`.
        dtype: as for :class:`polyak.Recorder`, or its name, as ``"float32"``.
        device: as for :class:`polyak.Recorder`.
        buffers: as for :class:`polyak.Recorder`.
        keep_in_memory: as for :class:`polyak.Recorder`.
        resume: as for :class:`polyak.Recorder`; a checkpoint's state says so by itself.
        step: as for :class:`polyak.Recorder`: 0 replaces a run that the directory holds, unless a checkpoint goes on
            with it.
        preview: an average of the run so far, or several, that validations during ``fit`` score beside the weights
            that they score anyway: profiles or their texts. ``"decay:sqrt:0.4"`` gives ``val_loss/decayed``, what the
            run would score if its learning rate were decayed now; other profiles, and decays where there are several,
            are called as they are written. Each is one more pass over the validation data.
        recalibrate: for previews of models with BatchNorm: as for :class:`Averaging`.
        forward: as for :class:`Averaging`.
        optimizer: whose steps are counted, as ``configure_optimizers`` orders them; the last one.

    Raises:
        OptionError: an option is out of range.
        TypeError: an unknown option. When ``fit`` begins, what :class:`polyak.Recorder` raises.

    >>> from polyak.integrations.lightning import Recording
    >>> recording = Recording("run/trajectory", every=10)    # Trainer(callbacks=[recording])
    >>> # polyak.select(recording.trajectory, model, score=...)
    """

    def __init__(
        self,
        directory: str | PathLike[str],
        *,
        every: int = 1,
        block: int | None = None,
        max_blocks: int = 64,
        dtype: torch.dtype | str | None = torch.float32,
        device: torch.device | str | None = None,
        buffers: Literal["copy", "average"] = "copy",
        keep_in_memory: int | str = 0,
        resume: bool = False,
        step: int | None = None,
        preview: Profile | str | list[Profile | str] | None = None,
        recalibrate: Iterable[Any] | None = None,
        forward: Forward | None = None,
        optimizer: int = -1,
    ):
        self._recording = RecordedRun(
            directory,
            {
                "every": every,
                "block": block,
                "max_blocks": max_blocks,
                "dtype": dtype,
                "device": device,
                "buffers": buffers,
                "keep_in_memory": keep_in_memory,
                "resume": resume,
                "step": step,
            },
            preview=preview,
            recalibrate=recalibrate,
        )
        self._recalibrate, self._given_forward = recalibrate, forward
        self._index = whole_within("(-inf, inf)", "optimizer", optimizer)
        self._state: dict[str, Any] | None = None
        self._has_begun = False
        self._undo: list[Callable[[], Any]] = []

    @property
    def trajectory(self) -> Trajectory:
        """What was recorded so far; ``NotStartedError`` before training begins."""
        return self._recording.trajectory

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, or go on; with a sharded model that is once its checkpoint is there."""
        self._stop()
        _lightning.refuse_gathered(trainer, pl_module)
        if not _following.is_sharded_model(pl_module):
            self._begin(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, where no checkpoint came."""
        if not self._has_begun:
            self._begin(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the loss; Lightning has divided it by the batches that are accumulated."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, torch.Tensor) and loss.numel() == 1:
            self._recording.note({"loss": loss * trainer.accumulate_grad_batches})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what is left, while the live weights are in the model."""
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write what is left, once the live weights are in the model."""
        for callback in _lightning.callbacks_of(trainer):
            if isinstance(callback, Averaging):
                callback.on_exception(trainer, pl_module, exception)
        self._state = None
        self._stop(exception)

    def state_dict(self) -> dict[str, Any]:
        """What is not on disk yet."""
        state = self._recording.state_dict()
        return _lightning.without_tensors(state) if self._recording.sharded else state

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Have every rank write its part of what is spread over them."""
        if self._recording.sharded:
            _lightning.keep_sharded(checkpoint, self.state_key, self._recording.state_dict())

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the state until training begins; that of a sharded model comes when it is there."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._state = checkpoint.get("callbacks", {}).get(self.state_key)
        if self._state and _following.is_sharded_model(pl_module):
            state, self._state = self._state, None
            self._begin(trainer, pl_module, resumes=True)
            current = self._recording.state_dict()
            self._recording.load(_lightning.kept_sharded(trainer, self.state_key, state, current))

    def _begin(self, trainer: Trainer, pl_module: LightningModule, *, resumes: bool = False) -> None:
        forward = _lightning.batch_runner(trainer, self._given_forward, self._recalibrate)
        optimizer = _lightning.chosen_optimizer(trainer, self._index)
        records = trainer.is_global_zero or _following.is_sharded_model(pl_module)
        self._recording.begin(pl_module, optimizer, self._state, forward, records=records, resumes=resumes)
        self._state, self._has_begun = None, True
        if self._recording.previews:
            self._undo.append(_lightning.Validation.score(trainer, self._recording.scored()))

    def _stop(self, error: BaseException | None = None) -> None:
        for undo in self._undo:
            undo()
        self._undo, self._has_begun = [], False
        self._recording.close(error)
