"""Recording a training run as a short list of block means on disk."""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from functools import partial
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from polyak.accumulator import Accumulator
from polyak.binding import Binding
from polyak.errors import OptionError, StateError, StructureError, name_list
from polyak.profiles import Uniform
from polyak.profiles.base import whole_within
from polyak.state import refuse_other_state
from polyak.swap import copy_into
from polyak.trajectory.folder import TrajectoryFolder
from polyak.trajectory.manifest import Block, Manifest
from polyak.trajectory.policy import block_steps_after, steps_worth_writing
from polyak.trajectory.snapshot import Snapshot
from polyak.trajectory.summaries import Meter, Summary
from polyak.trajectory.writer import BackgroundWriter

if TYPE_CHECKING:
    from polyak.trajectory.trajectory import Trajectory

__all__ = ["Recorder"]

_LEAST_MAX_BLOCKS = 8
# Where the length of a block follows the pace of the run: samples in the first one, and blocks until it is final.
_FIRST_SAMPLES = 4
_PACED_BLOCKS = 8
# A training state may be lost while it is saved, so that its owner goes back to the one before.
_KEPT_STATES = 2

_log = logging.getLogger("polyak")


class Recorder:
    """Records a run as block means, so that the average is chosen after training.

    A block is the mean of the samples taken in the optimizer steps (start, stop]. Blocks are kept in fp32 (the
    default), as files of ``directory`` that are whole checkpoints. Once there are more than ``max_blocks``,
    neighbours merge, exactly; blocks are short near the end of the run and longer in proportion to their age,
    whatever its length turns out to be (see :mod:`polyak.trajectory.policy`). Memory: two copies of the
    parameters, one that fills and one that is written on a thread of its own; the training waits rather than
    queue more.

    Args:
        model: as for :class:`polyak.Average`; models sharded by ``fully_shard`` are refused.
        directory: made if need be. One that holds a trajectory of the same model is continued after its last
            block; see ``step``.
        every: optimizer steps between samples.
        block: length of the first blocks in optimizer steps, a multiple of ``every``; it doubles whenever the
            run exceeds 1,024 of them. None: lengthened over the first blocks until writing one takes at most a
            quarter of the time of training it. Then the borders depend on the machine's speed.
        max_blocks: blocks kept, at least 8.
        dtype: of the blocks: float32, float64, or None for that of each parameter but at least float32.
        device: where both copies are kept; None: beside each parameter.
        buffers: "copy" stores them as they are at the end of each block; "average" averages the floating ones.
        optimizer: whose learning rate is kept with each block, the largest where parameter groups differ.
        step: the optimizer steps already taken, where training is resumed and :meth:`load_state_dict` is not
            used: later blocks are dropped. None: continue after the last block.

    Attributes:
        directory: where the blocks are.
        every: as given.
        max_blocks: as given.

    Raises:
        OptionError: an option is out of range, or nothing would be averaged.
        StateError: the directory is that of another model or of other options, is being recorded by somebody
            else, or has a block that lies across ``step``.
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
        step: int | None = None,
    ):
        self.directory = Path(directory)
        self.every = whole_within("[1, inf)", "every", every)
        self.max_blocks = whole_within(f"[{_LEAST_MAX_BLOCKS}, inf)", "max_blocks", max_blocks)
        if dtype not in (None, torch.float32, torch.float64):
            raise OptionError(f"dtype must be torch.float32, torch.float64 or None, got {dtype}")
        if step is not None:
            step = whole_within("[0, inf)", "step", step)
        self._law = {"every": self.every, "dtype": str(dtype), "buffers": buffers}
        self._optimizer = optimizer
        self._binding = _bound(model, buffers)
        self._make_accumulator = partial(Accumulator, scheme=Uniform(), dtype=dtype, device=device)
        self._filling: Accumulator | None = None
        self._spare: Accumulator | None = None
        self._writer = BackgroundWriter()
        self._write_seconds: float | None = None
        block_steps = _block_steps(block, self.every)
        fresh = Manifest(
            self._law, block_steps or _FIRST_SAMPLES * self.every, settled=block_steps is not None
        )
        self._folder = TrajectoryFolder(self.directory, fresh, block_steps)
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
            OptionError: a metric is not a number.
            StructureError: the model's tensors are no longer those it was made for, or have no data yet.
            StateError: the recorder is closed.
            CheckpointError: writing a block failed; blocks written before are safe, nothing more is recorded.
        """
        self._refuse_closed("update()")
        self._writer.raise_if_failed()
        self._metrics.add(metrics)
        if self._optimizer is not None:
            self._lr.add({"lr": max(group["lr"] for group in self._optimizer.param_groups)})
        if self._timed_from is None:
            self._timed_from = time.perf_counter(), self._step
        self._step += 1
        if self._step % self.every == 0:
            self._sample()

    @property
    def block_steps(self) -> int:
        """The length of the block that is being filled, in optimizer steps."""
        manifest = self._folder.manifest
        return block_steps_after(self._start - manifest.start, manifest.block_steps)

    @property
    def trajectory(self) -> Trajectory:
        """What was recorded so far, without the block that is being filled; waits for the one under way."""
        from polyak.trajectory.trajectory import Trajectory

        self._writer.wait()
        return Trajectory(self.directory)

    def close(self) -> None:
        """Write the block that is being filled and the live weights, and let go of the directory.

        Calling it again does nothing. Raises CheckpointError as :meth:`update` does; the directory is let go
        all the same.
        """
        if not self._is_open:
            return
        try:
            if self._filling is not None and self._filling.n_averaged:
                self._hand_over()
            self._writer.wait()
            if self._step > self._began_at and self._folder.manifest.blocks:
                self._folder.write_live(Snapshot.of(self._binding, self._binding.live), self._step)
        finally:
            self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        blocks = len(self._folder.manifest.blocks)
        return f"Recorder({str(self.directory)!r}, every={self.every}, block_steps={self.block_steps}, blocks={blocks})"

    # Saving and resuming.

    def state_dict(self) -> dict[str, Any]:
        """The open block, to be saved with the training state; waits for the block under way.

        The border at which that block begins is kept, also by later merges, until two more states were asked
        for. It loads with ``torch.load(weights_only=True)``; tensors are not copied.
        """
        self._refuse_closed("state_dict()")
        self._writer.wait()
        filling = self._follow_model()
        self._kept_edges.append(self._start)
        return {
            **self._law,
            "step": self._step,
            "start": self._start,
            "n_averaged": filling.n_averaged,
            "n_skipped": filling.n_skipped,
            "summaries": json.dumps({"lr": self._lr.to_json(), "metrics": self._metrics.to_json()}),
            "open_block": dict(zip(self._binding.names, filling.means, strict=True)),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state: the clock is that of the state, and blocks recorded after it are dropped.

        Raises:
            StateError: it belongs to another model, other options or another directory, or a block lies across
                its border; nothing was changed.
        """
        self._refuse_closed("load_state_dict()")
        self._writer.wait()
        filling = self._follow_model()
        current = self.state_dict()
        refuse_other_state(current, state, law=list(self._law))
        self._refuse_gap(state["start"])
        self._folder.begin_at(state["start"])
        copy_into(filling.means, [state["open_block"][name] for name in self._binding.names])
        filling.restart(state["n_averaged"], state["n_skipped"])
        self._open(state["start"], state["step"])
        self._take_up_summaries(json.loads(state["summaries"]))
        self._kept_edges.clear()
        self._kept_edges.append(self._start)
        self._began_at = self._step

    # How it works inside.

    def _begin(self, step: int | None) -> None:
        if self._binding.ready:
            self._allocate()
        if step is not None:
            self._folder.begin_at(step)
        start = self._folder.manifest.stop
        self._open(start, start if step is None else step)
        self._began_at = self._step
        self._kept_edges = deque([start], maxlen=_KEPT_STATES)
        if self._folder.manifest.blocks:
            _log.info("%s: goes on after optimizer step %d", self.directory, self._step)

    def _open(self, start: int, step: int) -> None:
        """Begin a block after ``start``, the clock being at ``step``."""
        self._start, self._step, self._sampled_at = start, step, start
        self._metrics, self._lr = Meter(), Meter()
        self._stop = (step // self.block_steps + 1) * self.block_steps
        self._timed_from: tuple[float, int] | None = None

    def _sample(self) -> None:
        filling = self._follow_model()
        filling.add(self._binding.live)
        self._sampled_at = self._step
        # A block without an accepted sample goes on until it has one.
        if self._step >= self._stop and filling.n_averaged:
            self._hand_over()

    def _hand_over(self) -> None:
        """Give the filled block to the writer, and go on with the other accumulator."""
        assert self._filling is not None and self._spare is not None
        filled, stop, step = self._filling, self._sampled_at, self._step
        seconds_per_step = self._seconds_per_step()
        write_seconds = self._writer.wait()
        if not self._folder.manifest.settled and write_seconds and seconds_per_step:
            self._follow_pace(write_seconds, seconds_per_step)
        lr = self._lr.summaries().get("lr")
        metrics = self._metrics.summaries()
        block = Block(self._start, stop, filled.n_averaged, filled.n_skipped, lr, metrics)
        snapshot = Snapshot.of(self._binding, filled.means)
        edges = frozenset(self._kept_edges)
        self._writer.submit(partial(self._folder.commit, block, snapshot, self.max_blocks, edges))
        self._filling, self._spare = self._spare, filled
        self._filling.restart()
        self._open(stop, step)
        self._timed_from = time.perf_counter(), step

    def _seconds_per_step(self) -> float | None:
        if self._timed_from is None or self._timed_from[1] == self._step:
            return None
        seconds, step = self._timed_from
        return (time.perf_counter() - seconds) / (self._step - step)

    def _follow_pace(self, write_seconds: float, seconds_per_step: float) -> None:
        # The fastest write counts: one that the disk kept waiting must not make all blocks long.
        self._write_seconds = min(write_seconds, self._write_seconds or write_seconds)
        steps = steps_worth_writing(_FIRST_SAMPLES * self.every, seconds_per_step, self._write_seconds)
        settled = len(self._folder.manifest.blocks) >= _PACED_BLOCKS
        self._folder.settle(steps, settled)
        if settled:
            message = "%s: blocks of %d optimizer steps, which take %.3g s to train and %.3g s to write"
            _log.info(message, self.directory, steps, steps * seconds_per_step, self._write_seconds)

    def _follow_model(self) -> Accumulator:
        replaced = self._binding.follow()
        if self._filling is None or self._spare is None:
            return self._allocate()
        if replaced:
            self._writer.wait()  # it reads the other accumulator
            for accumulator in (self._filling, self._spare):
                accumulator.bind(self._binding.live)
        return self._filling

    def _allocate(self) -> Accumulator:
        self._refuse_other_model()
        live, names = self._binding.live, self._binding.names
        self._filling = self._make_accumulator(live, names)
        self._spare = self._make_accumulator(live, names)
        return self._filling

    def _take_up_summaries(self, summaries: dict[str, dict[str, dict[str, float]]]) -> None:
        loaded = {
            kind: {name: Summary(**numbers) for name, numbers in entries.items()}
            for kind, entries in summaries.items()
        }
        self._lr, self._metrics = Meter(loaded["lr"]), Meter(loaded["metrics"])

    def _release(self) -> None:
        self._is_open = False
        self._writer.stop()
        self._folder.close()

    def _refuse_closed(self, call: str) -> None:
        if not self._is_open:
            raise StateError(
                f"{call} after close(): remove its hook, or make a new Recorder on {self.directory} to go on"
            )

    def _refuse_gap(self, start: int) -> None:
        manifest = self._folder.manifest
        if manifest.blocks and manifest.stop < start:
            raise StateError(
                f"the state goes on from step {start}, but the last block of {self.directory} ends at step "
                f"{manifest.stop}: give the directory of the same run, or a new one; nothing was loaded"
            )

    def _refuse_other_model(self) -> None:
        recorded = self._folder.averaged_shapes()
        ours = {n: tuple(t.shape) for n, t in zip(self._binding.names, self._binding.live, strict=True)}
        if recorded is None or recorded == ours:
            return
        other = [name for name in {**recorded, **ours} if recorded.get(name) != ours.get(name)]
        raise StateError(
            f"{self.directory} holds the trajectory of another model: {name_list(other)} are missing in one of "
            "them or have other shapes. Give each model a directory of its own"
        )


def _bound(model: nn.Module, buffers: Literal["copy", "average"]) -> Binding:
    binding = Binding(model, buffers=buffers)
    if binding.sharded:
        raise StructureError(
            "a Recorder cannot record a model that is sharded over ranks: use polyak.Average, or save checkpoints "
            "while training and read them with Trajectory.from_checkpoints"
        )
    return binding


def _block_steps(block: int | None, every: int) -> int | None:
    if block is None:
        return None
    block = whole_within("[1, inf)", "block", block)
    if block % every:
        raise OptionError(
            f"block must be a multiple of every={every}, the steps between samples, got {block}"
        )
    return block
