"""What is used of Lightning beyond its documentation, and what the callbacks ask of a Trainer."""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import accumulate
from math import ceil, inf
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.optim import Optimizer

from polyak.batchnorm import call_model, tracks_statistics
from polyak.errors import OptionError, PolyakError, StructureError
from polyak.integrations._following import Forward, Scored, is_sharded_model, undocumented
from polyak.integrations._sampling import RunLength

__all__ = [
    "COUNT",
    "LIVE",
    "SHARDED",
    "Validation",
    "batch_runner",
    "callbacks_of",
    "chosen_optimizer",
    "ends_within_epoch",
    "keep_sharded",
    "kept_sharded",
    "load_live",
    "refuse_gathered",
    "refuse_unread",
    "replace_state",
    "run_length",
    "without_tensors",
]

# WeightAveraging's names for the live weights, and for the count of the average that then is "state_dict".
LIVE, COUNT = "current_model_state", "averaging_state"


def callbacks_of(trainer: Trainer) -> list[Callback]:
    return undocumented("lightning", trainer, "callbacks")


def _batch_hook(trainer: Trainer) -> Callable[..., Any]:
    """``on_before_batch_transfer``, of the module or the data module, whichever has it."""
    return undocumented("lightning", trainer.lightning_module, "_on_before_batch_transfer")


def replace_state(strategy: Any, state: Callable[[Callable[[], Any]], Any]) -> Callable[..., Any]:
    """Checkpoints hold what ``state`` makes of the function that reads the weights, until what is returned is called.

    There, as for checkpoints of weights only Lightning calls no callback.
    """
    read = undocumented("lightning", strategy, "lightning_module_state_dict")
    strategy.lightning_module_state_dict = partial(state, read)
    return partial(vars(strategy).pop, "lightning_module_state_dict", None)


def refuse_unread(live: object) -> None:
    if live is None:
        raise PolyakError(
            "this lightning does not read a checkpoint's weights by strategy.lightning_module_state_dict(), so it "
            "would hold the live ones; use a newer polyak or an older lightning"
        )


@contextmanager
def _replaced(owner: object, **values: Any) -> Iterator[None]:
    """Attributes of an object that are others for a while."""
    before = {name: vars(owner)[name] for name in values if name in vars(owner)}
    vars(owner).update(values)
    try:
        yield
    finally:
        for name in values:
            del vars(owner)[name]
        vars(owner).update(before)


# Where Lightning's logger connector collects a validation's metrics, and by what it names the three kinds.
_METRICS = {"_callback_metrics": "callback", "_progress_bar_metrics": "pbar", "_logged_metrics": "log"}
_HOOKS = [name for name in dir(Callback) if name.startswith("on_")]


class Validation:
    """The ``run`` of a validation loop: other weights are scored first, without a sound, then the live ones as ever.

    So callbacks and loggers see one validation, which ends with the metrics of all.
    """

    def __init__(self, trainer: Trainer, loop: Any):
        self._trainer, self._loop = trainer, loop
        self._connector = undocumented("lightning", trainer, "_logger_connector")
        for name in ("log_metrics", "log_eval_end_metrics", *_METRICS):
            undocumented("lightning", self._connector, name)
        self._scored: list[Scored] = []

    @classmethod
    def score(cls, trainer: Trainer, scored: Sequence[Scored]) -> Callable[[], None]:
        """Have validations of ``fit`` score these too, until what is returned is called."""
        loop = undocumented("lightning", trainer.fit_loop.epoch_loop, "val_loop")
        run = vars(loop).get("run")
        validation = run if isinstance(run, cls) else cls(trainer, loop)
        if twice := {one.name for one in scored} & {one.name for one in validation._scored}:
            raise OptionError(f"two averages would be scored as {sorted(twice)[0]!r}: leave one of them out")
        validation._scored += scored
        loop.run = validation

        def undo() -> None:
            validation._scored = [one for one in validation._scored if one not in scored]
            if not validation._scored:
                vars(loop).pop("run", None)

        return undo

    def __call__(self) -> Any:
        run = partial(type(self._loop).run, self._loop)
        if self._trainer.sanity_checking:
            return run()
        found = [(scored, self._metrics_with(scored, run)) for scored in self._scored]
        log = self._connector.log_eval_end_metrics

        def log_all(metrics: dict[str, Any]) -> None:
            live = self._connector.metrics
            for attribute, kind in _METRICS.items():
                for scored, of_all_kinds in found:
                    named = scored.named((of_all_kinds or live)[kind])
                    getattr(self._connector, attribute).update(named)
                    metrics = metrics | named if kind == "log" else metrics
            log(metrics)

        with _replaced(self._connector, log_eval_end_metrics=log_all):
            return run()

    def _metrics_with(self, scored: Scored, run: Callable[[], Any]) -> dict[str, dict[str, Any]] | None:
        """What the validation finds with these weights, by kind; None while there are none."""
        loop, connector = self._loop, self._connector
        as_it_was = {
            name: copy.deepcopy(vars(loop)[name])
            for name in ("batch_progress", "_seen_batches_per_dataloader", "_restarting")
            if name in vars(loop)
        }
        device = self._trainer.lightning_module.device
        # A progress bar draws on a thread of its own, which looks for it among the callbacks.
        bar = self._trainer.progress_bar_callback
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            scored.applied() as is_applied,
            _replaced(loop, **as_it_was),
            _replaced(self._trainer, callbacks=[bar] if bar else []),
            _replaced(bar, **dict.fromkeys(_HOOKS, _nothing)) if bar else nullcontext(),
            _replaced(connector, log_metrics=_nothing, **{name: {} for name in _METRICS}),
        ):
            if not is_applied:
                return None
            run()
            return {kind: getattr(connector, name) for name, kind in _METRICS.items()}


# Sharded models: every rank writes its part of what is in a checkpoint's "state_dict", and of the rest the first one
# alone. So what is spread over ranks goes in there, under names of its own.

# What a checkpoint has in the place of live weights that are there.
SHARDED = "state_dict"


def refuse_gathered(trainer: Trainer, model: nn.Module) -> None:
    """Refuse (``StructureError``) sharded models whose checkpoints the first rank would write alone."""
    if is_sharded_model(model) and not getattr(trainer.strategy, "_save_distributed_checkpoint", False):
        raise StructureError(
            f"the model is sharded, and checkpoints of this {type(trainer.strategy).__name__} are written by one rank, "
            "which does not have the others' parts of an average: use "
            "ModelParallelStrategy(save_distributed_checkpoint=True)"
        )


def keep_sharded(checkpoint: dict[str, Any], name: str, state: Mapping[str, Any]) -> None:
    """Put the tensors of a state where every rank writes its part of them."""
    checkpoint["state_dict"][name] = {
        key: value for key, value in state.items() if isinstance(value, Mapping)
    }


def without_tensors(state: Mapping[str, Any]) -> dict[str, Any]:
    """What is left of a state for the first rank to write."""
    return {key: value for key, value in state.items() if not isinstance(value, Mapping)}


def kept_sharded(
    trainer: Trainer, name: str, state: Mapping[str, Any], current: Mapping[str, Any]
) -> dict[str, Any]:
    """A state as it was, with the tensors of the ``current`` one, which are filled from the checkpoint."""
    tensors = {key: value for key, value in current.items() if isinstance(value, Mapping)}
    load({"state_dict": {name: tensors}}, checkpoint_id=str(trainer.ckpt_path))
    return {**state, **tensors}


def load_live(trainer: Trainer, module: LightningModule) -> None:
    """Load the live weights of a sharded model from beside the averaged ones."""
    live = get_model_state_dict(module)
    load({"state_dict": {LIVE: live}}, checkpoint_id=str(trainer.ckpt_path))
    module.load_state_dict(live, strict=module.strict_loading)


def chosen_optimizer(trainer: Trainer, index: int) -> Optimizer:
    optimizers = trainer.optimizers
    if not -len(optimizers) <= index < len(optimizers):
        raise OptionError(
            f"optimizer={index} names none of the {len(optimizers)} optimizers: they are counted from 0"
        )
    return optimizers[index]


def run_length(trainer: Trainer) -> RunLength:
    """As far as Lightning knows it. It counts one step a batch, which only automatic optimization takes.

    It does not know how many batches a step will accumulate in later epochs, where a callback says so.
    """
    by_hand = not trainer.lightning_module.automatic_optimization
    steps = inf if by_hand else trainer.estimated_stepping_batches
    epochs = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else None
    if by_hand and epochs is None:
        raise OptionError(
            "start is a share of the run, which under manual optimization is counted in epochs, and max_epochs sets no "
            "end: limit them, or give start in optimizer steps or start_epoch"
        )
    if not 0 < steps < inf:
        return RunLength(None, epochs)
    batches = trainer.num_training_batches
    scheduled = [c for c in callbacks_of(trainer) if isinstance(c, GradientAccumulationScheduler)]
    if batches != inf and scheduled and epochs:
        accumulated = map(scheduled[0].get_accumulate_grad_batches, range(epochs))
        ends = list(accumulate(ceil(batches / n_batches) for n_batches in accumulated))
        steps = min(ends[-1], trainer.max_steps if trainer.max_steps > 0 else inf)
        epochs = bisect_left(ends, steps) + 1
    elif batches != inf:
        epochs = ceil(steps / ceil(batches / trainer.accumulate_grad_batches))
    return RunLength(int(steps), epochs)


def ends_within_epoch(trainer: Trainer) -> bool:
    """Whether the run ends before the last batch of the epoch, whose hooks Lightning calls all the same."""
    is_over = trainer.should_stop or -1 < trainer.max_steps <= trainer.global_step
    return is_over and not trainer.is_last_batch


def _nothing(*_: Any, **__: Any) -> None:
    pass


def batch_runner(trainer: Trainer, given: Forward | None, recalibrate: object) -> Forward:
    """Runs a batch of ``recalibrate`` as a training step would get it."""
    module, precision = trainer.lightning_module, trainer.precision_plugin
    if recalibrate is not None and given is None and not is_overridden("forward", module, LightningModule):
        names = [name for name, child in module.named_children() if tracks_statistics(child)]
        raise OptionError(
            f"recalibrate runs batches through {type(module).__name__}, which has no forward(): give the callback "
            f"forward=lambda model, batch: model.{names[0] if names else 'part'}(batch[0]), or whatever runs its "
            "BatchNorm layers on a batch"
        )
    before_transfer = _batch_hook(trainer)

    def run(model: nn.Module, batch: Any) -> None:
        batch = before_transfer(precision.convert_input(batch), dataloader_idx=0)
        batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
        with precision.forward_context():
            (given or call_model)(model, batch)

    return run
