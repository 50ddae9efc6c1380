"""What the callbacks of transformers share, and all that is used of its Trainer beyond the documentation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from polyak._distributed import RankGroup
from polyak.errors import OptionError, PolyakError
from polyak.integrations._following import Following, Scored, undocumented
from polyak.integrations._recorded import save_state

__all__ = [
    "AVERAGE",
    "Annealed",
    "Watching",
    "callbacks_of",
    "refuse_upside_down",
    "save_swapped",
    "steps_per_epoch",
]


# What is used of the Trainer beyond its documentation.


def callbacks_of(trainer: Trainer) -> list[TrainerCallback]:
    return undocumented("transformers", trainer, "callback_handler").callbacks


class _Around:
    """A method of a Trainer, with the callbacks that watch it; it is copied and pickled with the Trainer."""

    name: str

    def __init__(self, trainer: Trainer):
        self._trainer = trainer
        self._before: Callable[..., Any] | None = vars(trainer).get(self.name)
        self.goes_through_polyak = True  # as functools.wraps tells of whatever is put around this

    @classmethod
    def put(cls, trainer: Trainer) -> None:
        """Once a Trainer."""
        method = undocumented("transformers", trainer, cls.name)
        if not hasattr(method, "goes_through_polyak"):
            setattr(trainer, cls.name, cls(trainer))

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The method itself, by whose signature the Trainer calls it."""
        return self._before or getattr(type(self._trainer), self.name).__get__(self._trainer)

    def watching(self) -> list[Watching]:
        """The callbacks, which belong to this Trainer, be it a copy."""
        found = [callback for callback in callbacks_of(self._trainer) if isinstance(callback, Watching)]
        for callback in found:
            callback._trainer = self._trainer
        return found


class _TrainingLoop(_Around):
    name = "_inner_training_loop"

    def __call__(self, *args: Any, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        checkpoint = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        with ExitStack() as stack:
            for callback in self.watching():
                stack.enter_context(callback._watched(checkpoint))
            return self.__wrapped__(*args, resume_from_checkpoint=resume_from_checkpoint, **kwargs)


class _EvaluationLoop(_Around):
    """Around the loop, not at its events: those know no exception, and one of them ends each of several data sets."""

    name = "evaluation_loop"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        watching = [callback for callback in self.watching() if callback._is_watched]
        return _evaluated(partial(self.__wrapped__, *args, **kwargs), watching)


def _refuse_unwatched(is_watched: bool) -> None:
    if not is_watched:
        raise PolyakError(
            "the training loop of this Trainer is not watched, so whether it resumes is not seen: it is another than "
            "the callback was made for, or one of a transformers that does not train by "
            "Trainer._inner_training_loop(). Make the callback for the Trainer that trains"
        )


AVERAGE = "average"  # the folder of the averaged model in a checkpoint


def _adapters_of(trainer: Trainer) -> set[str]:
    """The names of PEFT's adapters in the model."""
    return set(getattr(trainer.model, "peft_config", ()))


def _without_averaged_adapter(model: Any, checkpoint: Path | None) -> None:
    """The Trainer takes the averaged adapter in a checkpoint for one of several that are to be trained.

    Where there are several, a Trainer before transformers 5.11 at least leaves out the one that lies beside them.
    """
    undocumented("PEFT", model, "delete_adapter")(AVERAGE)
    if checkpoint is not None and any(checkpoint.glob("adapter_model.*")):
        trained = "default" in model.active_adapters
        undocumented("PEFT", model, "load_adapter")(str(checkpoint), "default", is_trainable=trained)


# What the callbacks share: where training resumes, that it failed, what evaluations score, states in checkpoints.


class Watching(TrainerCallback):
    """A callback that adds itself, and knows what the events do not say: where training resumes, and that it failed."""

    file_name: str

    def __init__(self, trainer: Trainer):
        # First, so that others, which may upload what they see, find its work done.
        callbacks_of(trainer).insert(0, self)
        self._trainer = trainer
        self._adapters = _adapters_of(trainer)
        self._checkpoint: Path | None = None
        self._is_watched = False
        _TrainingLoop.put(trainer)
        _EvaluationLoop.put(trainer)

    def __getstate__(self) -> dict[str, Any]:
        # Pickled between runs, perhaps without the Trainer, which says who it is when it trains.
        return vars(self) | {"_trainer": None, "_checkpoint": None, "_is_watched": False}

    @property
    def _resumed_from(self) -> Path | None:
        """The checkpoint that the training under way went on from."""
        _refuse_unwatched(self._is_watched)
        return self._checkpoint

    @contextmanager
    def _watched(self, checkpoint: Path | None) -> Iterator[None]:
        self._checkpoint, self._is_watched = checkpoint, True
        if AVERAGE in _adapters_of(self._trainer) - self._adapters:
            _without_averaged_adapter(self._trainer.model, checkpoint)
        try:
            yield
        except BaseException as error:
            self.stop(error)
            raise
        finally:
            self._is_watched = False

    def stop(self, error: BaseException | None = None) -> None:
        """Training has ended, or failed."""
        raise NotImplementedError

    def standing_in(self) -> AbstractContextManager[Any]:
        """Around an evaluation while training is under way."""
        return nullcontext()

    def scored(self) -> Sequence[Scored]:
        """The weights that such an evaluation scores beside those in the model."""
        return ()

    def _save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        what: Callable[[], Mapping[str, Any]],
        sharded: bool,
    ) -> Path | None:
        """Put a state into the checkpoint that was just written, all ranks alike; its folder, None where it is gone."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if sharded:
            _agree_on_best(args, state)
        if not RankGroup.of_all().first(folder.is_dir):
            return None
        if sharded or args.should_save:
            save_state(folder / self.file_name, what, sharded)
        return folder


def _evaluated(loop: Callable[[], Any], watching: list[Watching]) -> Any:
    """What ``loop`` gives with the weights that stand in, and the metrics of those that are scored beside them."""
    with ExitStack() as stack:
        for callback in watching:
            stack.enter_context(callback.standing_in())
        output = loop()
    own = _metrics(output)
    for scored in (scored for callback in watching for scored in callback.scored()):
        # A pass over the data draws random numbers, which must not change the training.
        with torch.random.fork_rng(devices=[]), scored.applied() as there:
            output.metrics.update(scored.named(_metrics(loop()) if there else own))
    return output


def _metrics(output: Any) -> dict[str, Any]:
    return {name: value for name, value in output.metrics.items() if not name.endswith("_time")}


def refuse_upside_down(args: TrainingArguments, names: Iterable[str]) -> None:
    """Refuse (``OptionError``) that the worst loss is taken for the best.

    transformers takes lower for better where the name of a metric ends in "loss", which ours do not.
    """
    metric = args.metric_for_best_model or ""
    if args.greater_is_better and any(metric.endswith(f"loss/{name}") for name in names):
        raise OptionError(
            f"metric_for_best_model={metric!r} is a loss, of which transformers would take the greatest, as its name "
            "does not end in 'loss': pass greater_is_better=False to TrainingArguments"
        )


def _agree_on_best(args: TrainingArguments, state: TrainerState) -> None:
    """Have all ranks know the same best checkpoint, now that the last one is there.

    The Trainer has each rank look for its folder, where shards are saved before it is made. Ranks that come to another
    answer would wait for each other when they load it, or load different ones.
    """
    if not args.load_best_model_at_end or not state.best_global_step:
        return
    best = Path(str(args.output_dir)) / f"checkpoint-{state.best_global_step}"
    if RankGroup.of_all().first(best.is_dir):
        state.best_model_checkpoint = str(best)


# The learning rate to average at.


def steps_per_epoch(trainer: Trainer) -> int:
    """How many optimizer steps a pass over the training data is; ``OptionError`` where the data have no length."""
    loader = undocumented("transformers", trainer, "callback_handler").train_dataloader
    try:
        n_batches = len(loader)
    except TypeError:
        raise OptionError(
            "anneal_epochs counts epochs, and the data have no length: pass anneal_epochs=0, or data with one"
        ) from None
    return max(-(-n_batches // trainer.args.gradient_accumulation_steps), 1)


class Annealed:
    """torch's SWALR in the place of the Trainer's scheduler, whose state stays what checkpoints hold of it."""

    def __init__(self, before: Any, schedule: Any):
        self.before, self.schedule = before, schedule
        self.get_last_lr, self.state_dict = schedule.get_last_lr, before.state_dict

    def step(self, *_: Any) -> None:
        """The optimizer has taken a step."""
        self.schedule.step()


# The averaged model as a folder.


def save_swapped(trainer: Trainer, following: Following, folder: Path) -> None:
    """The model with the averaged weights, which are in it, as a folder that ``from_pretrained`` loads."""
    if not following.sharded:
        trainer.save_model(str(folder), _internal_call=True)
        return
    # What the Trainer would gather on one rank, if it saved it at all.
    following.write(folder / "model.safetensors")
    if not trainer.args.should_save:
        return
    model: Any = trainer.model
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    for part in (config, getattr(model, "generation_config", None), trainer.processing_class):
        if part is not None:
            part.save_pretrained(folder)
