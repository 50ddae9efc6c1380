"""What every framework needs of a recorder: one that follows the optimizer, and survives with the checkpoints."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from os import PathLike
from typing import Any

from torch import nn
from torch.optim import Optimizer

from polyak.errors import NotStartedError
from polyak.hooks import AttachHandle, attach
from polyak.integrations.following import refuse_sharded
from polyak.trajectory import Recorder, Trajectory

__all__ = ["Recording"]


class Recording:
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
        recorder = self._recorder = Recorder(model, self._directory, optimizer=optimizer, **self._options)
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
