"""The recorder: a training run as block means on disk, written beside the training."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from os import PathLike
from pathlib import Path
from threading import RLock
from types import TracebackType
from typing import Any, Concatenate, Literal, ParamSpec, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from polyak import _torch
from polyak._attach import Attachment
from polyak._checks import TOO_MANY, checked, refuse_other_state, warn_user, whole_within
from polyak._distributed import RankGroup, refuse_unplaced
from polyak._model import Binding, ModelTensors, refuse_swapped, watch_for_thaws
from polyak._swap import Swap, undoing
from polyak.batchnorm import statistics
from polyak.errors import NotStartedError, OptionError, StateError, StructureError, SwapError
from polyak.profiles import Profile, as_profile
from polyak.trajectory._blocks import Block, Manifest, Snapshot
from polyak.trajectory._policy import BackgroundWriter, Pace, block_steps_after
from polyak.trajectory._so_far import BlockMeans, OpenBlock, named, numbers_of
from polyak.trajectory._store import TrajectoryFolder
from polyak.trajectory._trajectory import Trajectory

__all__ = ["Recorder"]

_LEAST_MAX_BLOCKS = 8
# Where the length of a block follows the pace of the run: samples in the first one, and blocks until it is final.
_FIRST_SAMPLES = 4
_PACED_BLOCKS = 8
# A training state may be lost while it is saved, so that its owner goes back to the one before.
_KEPT_STATES = 2

_log = logging.getLogger("polyak")

P = ParamSpec("P")
R = TypeVar("R")


def _one_thread(call: Callable[Concatenate[Recorder, P], R]) -> Callable[Concatenate[Recorder, P], R]:
    """One thread at a time: a recorder may be saved and closed on others than the one that trains.

    Whatever changes the recorder, or hands over its block, is such a call. The writer's thread makes none, as it is
    waited for in them.
    """

    @wraps(call)
    def alone(self: Recorder, *arguments: P.args, **named: P.kwargs) -> R:
        with self._lock:
            return call(self, *arguments, **named)

    return alone


class Recorder:
    """Records a run as block means, so that the average is chosen after training.

    A block is the mean of the samples taken in the optimizer steps (start, stop]. Blocks are kept in fp32 (the
    default), as files of ``directory`` that are whole checkpoints. Once there are more than ``max_blocks``,
    neighbours merge, exactly; blocks are short near the end of the run and longer in proportion to their age,
    whatever its length turns out to be (see ``polyak.trajectory._policy``). Memory: two copies of the
    parameters, one that fills and one that is written on a thread of its own; the training waits rather than
    queue more. Any thread may call its methods; those that change it take turns.

    Args:
        model: as for :class:`polyak.Average`. A model sharded by ``fully_shard`` is recorded by all its ranks, each
            writing its own part of every file, without gathering. Every method that records, saves or loads is then a
            collective call, metrics and learning rates are the first rank's, and all must share ``directory``.
        directory: made if need be. One that holds a run already is refused, unless ``resume`` or ``step`` says that
            this is to go on with it.
        every: optimizer steps between samples.
        block: length of the first blocks in optimizer steps, a multiple of ``every``; it doubles whenever the
            run exceeds 1,024 of them. None: lengthened over the first blocks until writing one takes at most a
            fiftieth of the time of training it. Then the borders depend on the machine's speed.
        max_blocks: blocks kept, at least 8.
        dtype: of the blocks: float32, float64, or None for that of each parameter but at least float32.
        device: where both copies are kept; None: beside each parameter; "cpu" as for :class:`polyak.Average`.
        buffers: "copy" stores them as they are at the end of each block; "average" averages the floating ones.
        optimizer: whose learning rate is kept with each block, the largest where parameter groups differ.
        keep_in_memory: how much of the host's memory, on each rank, block means may take that are kept beside their
            files, as bytes or text such as ``"2GB"``, so that :meth:`applied` need not read them: a model of the
            parameters in ``dtype`` each, the newest first. 0: all are read.
        resume: whether to go on with the run that ``directory`` holds, if it holds one: from the state that
            :meth:`load_state_dict` is given next, or else, with a warning, after the last block.
        step: the optimizer steps already taken, where training is resumed and :meth:`load_state_dict` is not
            used: later blocks are dropped, all of them where it is 0.

    Attributes:
        directory: where the blocks are.
        every: as given.
        max_blocks: as given.

    Raises:
        OptionError: an option is out of range, or nothing would be averaged.
        StateError: the directory holds a run and neither ``resume`` nor ``step`` is given, is that of another model
            or of other options, is being recorded by somebody else, or has a block that lies across ``step``.
        CheckpointError: the directory cannot be read or written.

    >>> import tempfile, torch, polyak
    >>> folder = tempfile.TemporaryDirectory()
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> with polyak.Recorder(model, folder.name, block=2) as run:
    ...     for value in (1.0, 3.0, 5.0, 9.0):                  # the weights after four optimizer steps
    ...         _ = model.weight.data.fill_(value)
    ...         run.update(loss=1 / value)
    >>> [(str(block), block.count, round(block.metrics["loss"].mean, 2)) for block in run.trajectory.blocks]
    [('(0, 2]', 2, 0.67), ('(2, 4]', 2, 0.16)]
    >>> run.trajectory.average(polyak.Tail(0.5))
    {'weight': tensor([[7., 7.]])}
    >>> folder.cleanup()
    """

    _attachment: Attachment | None = None  # to the optimizer that calls update()

    @checked
    def __init__(
        self,
        model: nn.Module,
        directory: str | PathLike[str],
        *,
        every: int = 1,
        block: int | None = None,
        max_blocks: int = 64,
        dtype: torch.dtype | None = torch.float32,
        device: torch.device | str | None = None,
        buffers: Literal["copy", "average"] = "copy",
        optimizer: Optimizer | None = None,
        keep_in_memory: int | str = 0,
        resume: bool = False,
        step: int | None = None,
    ):
        self.directory = Path(directory)
        self.every = whole_within("[1, inf)", "every", every)
        self.max_blocks = whole_within(f"[{_LEAST_MAX_BLOCKS}, inf)", "max_blocks", max_blocks)
        if dtype not in (None, torch.float32, torch.float64):
            raise OptionError(f"dtype must be torch.float32, torch.float64 or None, got {dtype}")
        if step is not None:
            step = whole_within(f"[0, {TOO_MANY})", "step", step)
        self._lock = RLock()
        self._options = {"every": self.every, "dtype": str(dtype), "buffers": buffers}
        self._optimizer = optimizer
        self._binding = Binding(model, buffers=buffers)
        self._group = RankGroup.of(self._binding.ranks) if self._binding.sharded else RankGroup()
        self._accumulation = {"dtype": dtype, "device": device}
        self._means = BlockMeans(self.directory, keep_in_memory, self._group)
        self._swap: Swap | None = None
        self._warned_of_statistics = False
        self._open_block: OpenBlock | None = None
        self._writer = BackgroundWriter()
        self._pace = Pace(_FIRST_SAMPLES * self.every)
        given = _given_steps(block, self.every)
        fresh = Manifest(self._options, given or self._pace.block_steps(), settled=given is not None)
        goes_on = resume or step is not None
        self._folder = TrajectoryFolder(self.directory, fresh, given, goes_on, self._group)
        self._is_open = True
        try:
            self._begin(step)
        except BaseException:
            self._release()
            raise

    # Following the model.

    def update(self, **metrics: float | Tensor) -> None:
        """Count one optimizer step, and take a sample if one is due.

        Args:
            metrics: numbers, or tensors of one element, whose means over each block are kept with it; values
                that are not finite are left out. Tensors on an accelerator are read at the end of the block.

        Raises:
            OptionError: a metric is not a number, or an optimizer calls this already, by :func:`polyak.attach`.
            StructureError: the model's tensors are no longer those it was made for, or have no data yet.
            StateError: the recorder is closed.
            CheckpointError: writing a block failed; blocks written before are safe, nothing more is recorded.
        """
        if self._attachment is not None:
            self._attachment.refuse_by_hand(self, instead=", with note(loss=loss) for metrics")
        with self._lock:  # as _one_thread does, without its call
            self._refuse_closed("update()")
            self._refuse_while_swapped("update() would record the averaged weights")
            if self._group.size == 1:  # ranks find a failure together, where they hand the next block over
                self._writer.raise_if_failed()
            if self._goes_on_blindly:
                self._warn_of_going_on()
            block = self._open_block or self._follow_model()
            block.note(metrics, self._learning_rate())
            self._pace.tick()
            self._step += 1
            if self._step % self.every == 0:
                self._sample()

    @_one_thread
    def note(self, **metrics: float | Tensor) -> None:
        """Keep metrics with the block that is being filled, as :meth:`update` does; no step is counted.

        For a recorder that is attached to an optimizer, or numbers that come at other times than steps.
        """
        self._refuse_closed("note()")
        (self._open_block or self._follow_model()).note(metrics, None)

    @property
    def block_steps(self) -> int:
        """The length of the block that is being filled, in optimizer steps."""
        manifest = self._folder.manifest
        return block_steps_after(self._start - manifest.start, manifest.block_steps)

    @property
    def _start(self) -> int:
        """Where the open block begins; the manifest may be behind by the block under way."""
        return self._folder.manifest.stop if self._open_block is None else self._open_block.start

    @property
    def trajectory(self) -> Trajectory:
        """What was recorded so far, without the block that is being filled; waits for the one under way."""
        self._writer.wait()
        return Trajectory(self.directory)

    @_one_thread
    def close(self) -> None:
        """Write the block that is being filled and the live weights, and let go of the directory.

        A ``with`` statement does so at its end; left by an error, it does so as well, but for a sharded model only
        lets go, as the other ranks may not come along.

        Calling it again does nothing. Raises CheckpointError as :meth:`update` does; the directory is let go
        all the same. While averaged weights are in the model it raises SwapError, and stays open. A
        model that is no longer the recorded one raises StructureError once its blocks are written.
        """
        if not self._is_open:
            return
        refuse_swapped(self._binding.live)
        try:
            if self._open_block is not None and self._open_block.count:
                self._hand_over(self._open_block)
            self._writer.wait()
            # Without a step since, the model may not even be the trained one.
            if self._step > self._began_at and self._folder.manifest.blocks:
                self._follow_model()
                self._folder.write_live(Snapshot.of(self._binding, self._binding.live), self._step)
        finally:
            self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self._group.size > 1:
            self._release()  # the other ranks may know nothing of the error, and would not come to close together
        else:
            self.close()

    def __repr__(self) -> str:
        blocks = len(self._folder.manifest.blocks)
        return f"Recorder({str(self.directory)!r}, every={self.every}, block_steps={self.block_steps}, blocks={blocks})"

    # Averages of the run so far.

    @contextmanager
    def applied(self, profile: Profile | str) -> Iterator[nn.Module]:
        """An average of the run up to now in the model; the live weights are back on leaving, however it is left.

        What would the run score if its learning rate were decayed now? ::

            with run.applied("decay:sqrt:0.4"):
                evaluate(model)

        The profile is that of a run that ends with this optimizer step. The block that is being filled counts with
        the samples that it has. Blocks that ``keep_in_memory`` does not hold are read once; the average takes a
        model of the parameters in the host's memory. Buffers come back too, so BatchNorm statistics may be
        recomputed inside by :func:`polyak.update_bn`; where they were not, a warning says so.

        Args:
            profile: any profile, or its text such as ``"tail:0.4"``.

        Raises:
            NotStartedError: before the first sample.
            OptionError: the profile does not fit the run, or looks back less far than the blocks resolve.
            SwapError: averaged weights are in the model already.
            CheckpointError: a block that counts is damaged, or writing one failed.
            StateError: the recorder is closed.
        """
        swap, means = self._prepared_swap(profile)
        with undoing(partial(self._swap_out, swap)):
            self._swap_in(swap, means)
            before = _torch.versions(statistics(self._binding.model))
            yield self._binding.model
            self._warn_of_statistics(before)

    @_one_thread
    def average(self, profile: Profile | str) -> dict[str, Tensor]:
        """What :meth:`applied` puts into the model: name to tensor, tied names sharing one; raises as it does.

        Averaged tensors are the caller's, in the blocks' dtype and on the host, for a sharded model on ranks as it
        is; the rest are the live model's own.
        """
        means = named(self._binding, self._average("average()", profile))
        tensors = ModelTensors(self._binding.model)
        return {
            name: means.get(first, tensors[first].tensor.detach())
            for name, first in tensors.all_names().items()
            if tensors[first].persistent
        }

    # Saving and resuming.

    @_one_thread
    def state_dict(self) -> dict[str, Any]:
        """The open block, to be saved with the training state; waits for the block under way.

        The border at which that block begins is kept, also by later merges, until two more states were asked
        for. It loads with ``torch.load(weights_only=True)``; tensors are not copied.
        """
        self._refuse_closed("state_dict()")
        self._writer.wait()
        block = self._follow_model()
        if block.start not in self._kept_edges:
            self._kept_edges.append(block.start)
        return {**self._options, "step": self._step, **block.state_dict()}

    @checked
    @_one_thread
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state: the clock is that of the state, and blocks recorded after it are dropped.

        Raises:
            StateError: it belongs to another model, other options or another directory, or a block lies across
                its border; nothing was changed.
        """
        self._refuse_closed("load_state_dict()")
        self._writer.wait()
        block = self._follow_model()
        with self._binding.choosing_as(state, partial(self._rebind, block)) as names:
            current = {**self._options, "step": self._step, **block.state_dict()}
            current["open_block"] = {name: current["open_block"][name] for name in names}
            counts = [("start", "last_sample", "step"), ("n_averaged",), ("n_skipped",)]
            refuse_other_state(current, state, list(self._options), counts)
            numbers = numbers_of(state["summaries"])
            self._folder.refuse_gap_before(state["start"])
            self._folder.begin_at(state["start"], live_step=state["step"])
        self._means.follow(self._folder.manifest.blocks)
        block.load_state_dict(state, *numbers)
        self._watch()
        self._go_on_from(state["step"])
        self._goes_on_blindly = False

    # How it works inside.

    def _average(self, call: str, profile: Profile | str) -> list[Tensor]:
        self._refuse_closed(call)
        self._refuse_while_swapped(f"{call} cannot be nested")
        profile = as_profile(profile)
        self._writer.wait()
        block, blocks = self._follow_model(), self._folder.manifest.blocks
        filling = block.so_far()
        if not blocks and filling is None:
            raise NotStartedError(
                f"{call} needs at least one sample; they are taken after each {self.every} optimizer steps, and the "
                f"last step was {self._step} (is update() called?)"
            )
        return self._means.average(profile, blocks, filling, self._step, self._binding)

    @_one_thread
    def _prepared_swap(self, profile: Profile | str) -> tuple[Swap, list[Tensor]]:
        means = self._average("applied()", profile)
        return Swap.of(self._binding, self._accumulation["device"]), means

    @_one_thread
    def _swap_in(self, swap: Swap, means: list[Tensor]) -> None:
        swap.put_in(means)
        self._swap = swap

    @_one_thread
    def _swap_out(self, swap: Swap) -> None:
        if swap.active:
            self._binding.tensors.reshard()
            swap.undo()
            self._swap = None
            self._pace.restart()

    def _refuse_while_swapped(self, why: str) -> None:
        if self._swap is not None and self._swap.active:
            raise SwapError(f"an average of the run is in the model: {why}. Leave applied() first")

    def _warn_of_statistics(self, before: list[int]) -> None:
        model = self._binding.model
        copied = self._options["buffers"] == "copy"
        if (
            copied
            and before
            and not self._warned_of_statistics
            and before == _torch.versions(statistics(model))
        ):
            self._warned_of_statistics = True
            warn_user(
                "the model has BatchNorm, whose statistics were those of the live weights inside applied(): call "
                "polyak.update_bn(loader, model) there first, or what is evaluated is worthless"
            )

    def _begin(self, step: int | None) -> None:
        if self._binding.ready:
            self._allocate()
        if step is not None:
            self._warn_of_gap(step)
            self._folder.begin_at(step, live_step=step)
        if self._open_block is not None:
            self._open_block.begin(self._folder.manifest.stop)
        self._go_on_from(self._folder.manifest.stop if step is None else step)
        self._goes_on_blindly = step is None and bool(self._folder.manifest.blocks)
        self._watch()

    def _warn_of_going_on(self) -> None:
        """From here, one that was resumed at its last block looks the same as one that went back."""
        self._goes_on_blindly = False
        warn_user(
            f"{self.directory}: the recording goes on after its last block, optimizer step {self._step}. Where "
            "training went back to an earlier step, the steps since are in the run twice: load_state_dict() or step= "
            "says from where it goes on"
        )

    def _warn_of_gap(self, step: int) -> None:
        """The open block of a process that was killed is lost as a matter of course; more than that is not."""
        manifest = self._folder.manifest
        if manifest.blocks and step - manifest.stop > self.block_steps:
            warn_user(
                f"{self.directory}: optimizer steps {manifest.stop} to {step} were not recorded, so the samples of the "
                "next block stand for them too"
            )

    def _go_on_from(self, step: int) -> None:
        self._step = self._began_at = step
        self._kept_edges = deque([self._start], maxlen=_KEPT_STATES)
        self._pace.restart()
        self._plan_stop()
        if self._folder.manifest.blocks:
            _log.info("%s: goes on after optimizer step %d", self.directory, step)

    def _plan_stop(self) -> None:
        """Blocks end at multiples of their length, so that a run that was resumed has the same borders."""
        self._stop = (self._step // self.block_steps + 1) * self.block_steps

    def _sample(self) -> None:
        block = self._follow_model()
        self._take_up_thawed()
        # Averaged buffers are written by forward passes too, of which nobody tells.
        attached = self._attachment is not None and self._attachment.holds
        block.sample(self._step, overlaps=attached and self._options["buffers"] == "copy")
        # A block without an accepted sample goes on until it has one.
        if self._step >= self._stop and block.count:
            self._hand_over(block)

    def _hand_over(self, block: OpenBlock) -> None:
        """Give what was filled to the writer, once it has written the block before."""
        self._pace.stop()
        self._pace.wrote(self._writer.wait())
        self._follow_pace()
        filled, means = block.take()
        snapshot = Snapshot.of(self._binding, means)
        edges = frozenset(self._kept_edges)
        queued = _torch.queued_for([*means, *snapshot.copied.values()])
        self._writer.submit(partial(self._write, filled, snapshot, edges, queued))
        self._plan_stop()

    def _write(
        self, block: Block, snapshot: Snapshot, kept_edges: frozenset[int], queued: list[torch.Event]
    ) -> None:
        for event in queued:
            event.synchronize()
        self._folder.commit(block, snapshot, self.max_blocks, kept_edges)
        self._means.keep(block, snapshot.averaged)
        self._means.follow(self._folder.manifest.blocks)

    def _follow_pace(self) -> None:
        manifest = self._folder.manifest
        if manifest.settled:
            return
        settled = len(manifest.blocks) >= _PACED_BLOCKS
        self._folder.settle(self._group.first(self._pace.block_steps), settled)
        if settled:
            steps = self._folder.manifest.block_steps
            _log.info("%s: blocks of %d optimizer steps, which take %s", self.directory, steps, self._pace)

    def _learning_rate(self) -> float | Tensor | None:
        if self._optimizer is None:
            return None
        return max(group["lr"] for group in self._optimizer.param_groups)

    def _follow_model(self) -> OpenBlock:
        refuse_swapped(self._binding.live)
        replaced = self._binding.follow()
        if self._open_block is None:
            return self._allocate()
        if replaced:
            self._rebind(self._open_block)
        return self._open_block

    def _rebind(self, block: OpenBlock) -> None:
        self._writer.wait()  # it reads the means of the block before
        block.rebind()

    @_one_thread
    def _take_up_thawed(self) -> None:
        if self._is_open and self._binding.thawed():
            block = self._follow_model()
            self._binding.average_also(self._binding.thawed(), partial(self._rebind, block))

    def _watch(self) -> None:
        if self._binding.frozen:
            watch_for_thaws(self._take_up_thawed)

    def _allocate(self) -> OpenBlock:
        binding = self._binding
        if binding.sharded and self._group.size == 1 < len(binding.ranks):
            raise StructureError("the model was sharded after its Recorder was made: make a new one")
        refuse_unplaced({e.name: e.tensor for e in binding.tensors.values() if e.persistent})
        shapes = {e.name: tuple(e.tensor.shape) for e in binding.tensors.values() if e.kind == "parameter"}
        averaged = dict(zip(binding.names, map(_shape, binding.whole), strict=True))
        frozen = {name: shape for name, shape in shapes.items() if name not in averaged}
        # What was trained once stays averaged: blocks hold no more of what is frozen than its first value.
        binding.average_also(self._folder.refuse_other_model(averaged, frozen))
        self._open_block = OpenBlock(binding, **self._accumulation)
        self._open_block.refuse_unstorable()
        self._open_block.begin(self._folder.manifest.stop)
        return self._open_block

    @_one_thread
    def _release(self) -> None:
        self._is_open = False
        self._writer.stop()
        self._folder.close()

    def _refuse_closed(self, call: str) -> None:
        if not self._is_open:
            raise StateError(
                f"{call} after close(): averages are those of its trajectory now. To record more, make a new Recorder "
                f"on {self.directory} with resume=True; otherwise remove the hook that calls it"
            )


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _given_steps(block: int | None, every: int) -> int | None:
    if block is None:
        return None
    steps = whole_within(f"[1, {TOO_MANY})", "block", block)
    if steps % every:
        raise OptionError(
            f"block must be a multiple of every={every}, the steps between samples, got {block}"
        )
    return steps
