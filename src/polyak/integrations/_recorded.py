"""What every framework needs of a recording, and states of it and of averages in a framework's checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from polyak._attach import AttachHandle, attach
from polyak._checks import warn_user
from polyak._distributed import RankGroup
from polyak._model import ModelTensors
from polyak._swap import Swap, undoing
from polyak.batchnorm import call_model
from polyak.checkpoints._io import AtomicOutput
from polyak.errors import NotStartedError, OptionError
from polyak.integrations._following import (
    Forward,
    Recalibration,
    Scored,
    one_number,
    read_options,
    without_places,
)
from polyak.profiles import Decay, Profile, as_profile
from polyak.trajectory import Recorder, Trajectory

__all__ = ["RecordedRun", "is_saved", "save_state", "saved_state"]

# States in the folders of a framework's checkpoints: a file, or of a sharded model a folder of
# torch.distributed.checkpoint, which loads on any number of ranks.


def save_state(path: Path, state: Callable[[], Mapping[str, Any]], sharded: bool) -> None:
    """Write a state as the file ``path``; a sharded one, by a call of all ranks, as a folder without its ending."""
    if sharded:
        save(dict(state()), checkpoint_id=_folder_of(path))
        return
    output = AtomicOutput(path, overwrite=True)
    try:
        torch.save(state(), output.temporary)
        output.commit()
    finally:
        output.abort()


def saved_state(path: Path, current: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """What :meth:`save_state` wrote as ``path``, if it did; the tensors may be those of the ``current`` state."""
    if path.is_file():
        return torch.load(path, map_location="cpu", weights_only=True)
    if not is_saved(path):
        return None
    state = current()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each rank reads what it needs on its own, which is what is wanted
        load(state, checkpoint_id=_folder_of(path), no_dist=True)
    return state


def is_saved(path: Path) -> bool:
    """Whether there is anything for :meth:`saved_state`."""
    return path.is_file() or (_folder_of(path) / ".metadata").is_file()


def _folder_of(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(".pt"))


def preview_names(preview: Profile | str | Iterable[Profile | str] | None) -> dict[str, Profile]:
    """The profiles to score, by the names that metrics have: the only :class:`~polyak.Decay` is ``"decayed"``.

    The others are called as they are written, as all are where there are several decays.

    Raises:
        OptionError: one is no profile.

    >>> list(preview_names(["decay:sqrt:0.4", "tail:0.2"]))
    ['decayed', 'tail:0.2']
    """
    several = isinstance(preview, Iterable) and not isinstance(preview, str)
    given: Iterable[object] = () if preview is None else preview if several else [preview]  # type: ignore[assignment]
    profiles = [as_profile(one) for one in given]
    decays = [profile for profile in profiles if isinstance(profile, Decay)]
    return {"decayed" if [profile] == decays else str(profile): profile for profile in profiles}


# What every framework needs of a recorder: one that follows the optimizer, and survives with the
# checkpoints.


class RecordedRun:
    """A recorder of a model that somebody else trains.

    Args:
        directory: of the :class:`~polyak.Recorder`, which is made by :meth:`begin`.
        options: the keywords of :class:`~polyak.Recorder`, but for ``optimizer``.
        preview: averages of the run so far that validations score: profiles, or their texts.
        recalibrate: batches for the BatchNorm statistics of those, as for :class:`Following`.

    Attributes:
        previews: the profiles by the names that their metrics have.

    Raises:
        OptionError: an option is out of range.
        TypeError: an unknown option.
    """

    def __init__(
        self,
        directory: str | PathLike[str],
        options: Mapping[str, Any],
        *,
        preview: Profile | str | Iterable[Profile | str] | None = None,
        recalibrate: Iterable[Any] | None = None,
    ):
        self._directory = directory
        self._options = read_options(options)
        with TemporaryDirectory() as folder:
            Recorder(one_number(), folder, **without_places(self._options)).close()
        self.previews = preview_names(preview)
        self.recalibration = Recalibration(recalibrate)
        self._recorder: Recorder | None = None
        self._model: nn.Module | None = None
        self._handle: AttachHandle | None = None
        self._last_state: dict[str, Any] = {}

    def begin(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        state: Mapping[str, Any] | None,
        forward: Forward = call_model,
        *,
        records: bool = True,
        resumes: bool = False,
    ) -> None:
        """Follow ``optimizer``, from a saved state where there is one.

        Args:
            model: the one that trains.
            optimizer: whose steps count.
            state: of :meth:`state_dict`.
            forward: as for :class:`Following`.
            resumes: whether :meth:`load` will be given one.
            records: False on a rank whose model another one records, but which scores the previews with it.
        """
        self.close()
        self._model, self._recorder = model, None
        if self.previews:
            self.recalibration.begin(model, forward, is_averaged=self._options.get("buffers") == "average")
        if not records:
            self._handle = attach(optimizer, self.recalibration)
            return
        # A state says more than resume= and step= do.
        options = {**self._options, **({"resume": True, "step": None} if state or resumes else {})}
        recorder = self._recorder = Recorder(model, self._directory, optimizer=optimizer, **options)
        recorder._warned_of_statistics = True  # recalibration says it, in words of this framework
        try:
            if state:
                recorder.load_state_dict(dict(state))
        except BaseException:
            recorder.close()  # lets go of the directory
            raise
        self._handle = attach(optimizer, recorder, self.recalibration)

    @property
    def sharded(self) -> bool:
        """Whether the model is spread over ranks, all of which record it together."""
        return self._recorder is not None and self._recorder._binding.sharded

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        assert self._recorder is not None
        self._recorder.load_state_dict(dict(state))

    def note(self, metrics: Mapping[str, Any]) -> None:
        """Keep what a framework says of the training with the block under way."""
        if self._recorder is not None and self._handle is not None:
            self._recorder.note(**metrics)

    def scored(self) -> list[Scored]:
        """The previews as weights that validations score beside the live ones."""
        return [Scored(name, partial(self._applied, name)) for name in self.previews]

    @contextmanager
    def _applied(self, name: str) -> Iterator[bool]:
        model = self._model
        assert model is not None
        group = RankGroup() if self.sharded else RankGroup.of_all()
        with ExitStack() as stack:
            try:
                step = group.first(partial(self._enter, stack, name))
            except (NotStartedError, OptionError) as error:
                warn_user(
                    f"the live weights stand in for {name}: {error}"
                )  # early in a run, or for as long as its blocks are too long for a scheme
                yield False
                return
            if group.size > 1:
                stack.enter_context(_as_on_first(model, group))
            self.recalibration.refresh((name, step))
            yield True

    def _enter(self, stack: ExitStack, name: str) -> int:
        """Put a preview into the model until the stack unwinds; the step at which it is."""
        assert self._recorder is not None
        stack.enter_context(self._recorder.applied(self.previews[name]))
        return self._recorder._step

    def state_dict(self) -> dict[str, Any]:
        """The recorder's state; once it is closed, that in which it was."""
        if self._recorder is not None and self._handle is not None:
            return self._recorder.state_dict()
        return self._last_state

    def close(self, error: BaseException | None = None) -> None:
        """Write the last block and the live weights; calling it again does nothing.

        After an ``error``, of which the other ranks of a sharded model may not know, those only let go.
        """
        if self._handle is None:
            return
        self._handle.remove()
        self._handle = None
        recorder = self._recorder
        if recorder is None:
            return
        try:
            if error is None or not self.sharded:
                self._last_state = recorder.state_dict()
        finally:
            recorder.__exit__(error and type(error), error, None)

    @property
    def trajectory(self) -> Trajectory:
        """What was recorded so far; ``NotStartedError`` before training begins."""
        if self._recorder is None:
            raise NotStartedError("nothing is recorded yet: that begins when training does")
        return self._recorder.trajectory

    def __getstate__(self) -> dict[str, Any]:
        # Pickled between runs: the recorder, its folder and the model are those of the next one.
        return vars(self) | {"_recorder": None, "_handle": None, "_model": None}


@contextmanager
def _as_on_first(model: nn.Module, group: RankGroup) -> Iterator[None]:
    """What the first rank has in its model, in those of the others as well; they are alike but for that."""
    entries = [
        e for e in ModelTensors(model).values() if e.tensor.is_floating_point() or e.tensor.is_complex()
    ]
    live = [entry.tensor for entry in entries]
    swap = Swap(live, free=[entry.tensor for entry in entries if entry.kind == "buffer"])
    sent = [tensor.detach().clone(memory_format=torch.contiguous_format) for tensor in live]
    for tensor in sent:
        dist.broadcast(tensor, 0)
    if group.is_first:
        yield
        return
    with undoing(swap.undo):
        swap.put_in(sent)
        yield
