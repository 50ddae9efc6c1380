"""A recorded run, or a folder of checkpoints, to be averaged afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from polyak import checkpoints
from polyak._checks import checked, warn_user
from polyak.checkpoints import Checkpoint, Layout, TensorInfo, Writer
from polyak.combine import MemoryWriter, _inputs, batchnorm_statistics, combine, common_layout, is_averaged
from polyak.combine._outputs import completed
from polyak.combine._reading import Reading, read_inputs
from polyak.errors import CheckpointError, NotStartedError, OptionError, name_list
from polyak.profiles import Profile, Weights, as_profile, without_live
from polyak.trajectory._blocks import (
    FROZEN_NAME,
    Block,
    Manifest,
    complete,
    copied_names,
    open_stored,
    refuse_damaged,
)
from polyak.trajectory._explain import Explanation, block_coefficients, explain, warn_if_coarse

__all__ = ["Trajectory"]

# In which order checkpoints of other tools were saved, and at which optimizer steps.


def _warn_of_other_order(
    reading: Reading, steps: Sequence[int], paths: Sequence[str | PathLike[str]]
) -> None:
    """Paths sorted as text put epoch-10 before epoch-9, and then the steps given are those of other files."""
    other_way = read_inputs(paths)
    if other_way.refusal is not None or other_way.steps is None:
        return
    told = {item.path: step for item, step in zip(other_way.taken, other_way.steps, strict=True)}
    pairs = sorted((told.get(item.path, 0), item.step or 0, item.name) for item in reading.taken)
    for (number, step, first), (other, later, second) in pairwise(pairs):
        if number < other and step > later:
            warn_user(
                f"steps say that {first} is of step {step} and {second} of {later}, which is not the order of "
                "their names or metadata: give one step for each path, in the order of paths"
            )
            return


# Putting averaged models together: combined block means, copied buffers, frozen parameters.

_COPY_NUMEL = 1 << 20

# One coefficient per block; zero for those that do not count.
Row = Sequence[float]


class Assembly:
    """Makes models of blocks, for any number of rows of coefficients in one pass.

    Args:
        blocks: the opened block of each coefficient; None may stand where no row counts it.
        frozen: what all blocks share, if anything.
    """

    def __init__(self, blocks: Sequence[Checkpoint | None], frozen: Checkpoint | None):
        self._blocks = blocks
        self._frozen = frozen

    def layout(self, row: Row, dtype: torch.dtype | None = None) -> Layout:
        """Names, shapes and ties of the model that ``row`` gives: tied is what is tied in every block.

        ``dtype`` is the narrowest of what is averaged; None: that of the newest block.
        """
        blocks = list(self._counted([row]).values())
        newest = blocks[-1]
        ties = {t: n for t, n in newest.ties.items() if all(b.ties.get(t) == n for b in blocks)}
        copied = copied_names(newest)
        tensors = {
            name: info if dtype is None or name in copied else _at_least(info, dtype)
            for name, info in newest.tensors.items()
            if name not in ties
        }
        if self._frozen is not None:
            ties |= self._frozen.ties
            frozen = {n: info for n, info in self._frozen.tensors.items() if n not in newest.tensors}
            tensors |= {n: info for n, info in frozen.items() if n not in ties}
        return Layout(tensors, ties)

    def fill(self, rows: Sequence[Row], writers: Sequence[Writer], max_memory: int | str) -> None:
        """Write the model of each row to its writer, which was begun with its layout."""
        # What is averaged is the same in all blocks of a run, so in all rows.
        averaged, *_ = [self._copy_rest(row, writer) for row, writer in zip(rows, writers, strict=True)]
        blocks = self._counted(rows)
        coefficients = [[row[index] for index in blocks] for row in rows]
        combine(list(blocks.values()), coefficients, writers, max_memory=max_memory, names=averaged)

    def _copy_rest(self, row: Row, writer: Writer) -> list[str]:
        """Copy what is not averaged; the names that remain to be written. Buffers are those of the newest block."""
        newest, stored = list(self._counted([row]).values())[-1], writer.layout.tensors
        copied = copied_names(newest).intersection(stored)
        _copy(newest, copied, writer)
        if self._frozen is not None:
            frozen = self._frozen.tensors.keys() - newest.tensors.keys()
            _copy(self._frozen, stored.keys() & frozen, writer)
        return [name for name in stored if name in newest.tensors and name not in copied]

    def _counted(self, rows: Sequence[Row]) -> dict[int, Checkpoint]:
        """The blocks with a coefficient in any of ``rows``, by position."""
        return {
            index: block
            for index, block in enumerate(self._blocks)
            if block is not None and any(row[index] for row in rows)
        }


def _at_least(info: TensorInfo, dtype: torch.dtype) -> TensorInfo:
    if not is_averaged(info.dtype):
        return info
    # torch promotes no 8-bit floats, than which all that can be asked for is wider.
    wider = dtype if info.dtype.itemsize == 1 else torch.promote_types(info.dtype, dtype)
    return TensorInfo(info.shape, wider)


def _copy(source: Checkpoint, names: Iterable[str], writer: Writer) -> None:
    """Copy tensors as they are, slice by slice."""
    for name in names:
        numel = source.tensors[name].numel
        for start in range(0, numel, _COPY_NUMEL):
            stop = min(start + _COPY_NUMEL, numel)
            writer.write(name, start, source.read_slice(name, start, stop))


# The trajectory itself.

_MAX_MEMORY = "1GB"


class Trajectory:
    """The block means of a run, oldest first.

    The average under a profile F is Σ a_k · block_k with a_k = F(stop_k) - F(start_k), over optimizer steps or
    samples, as the profile's unit says. It is exact where F is straight within each block, as for any window
    between borders of blocks; :meth:`explain` says how far it is from exact elsewhere. The live weights that the
    recorder kept when it was closed are one more input of the sum, which a :class:`polyak.Blend` counts.

    Args:
        directory: what a :class:`polyak.Recorder` wrote, or is still writing: blocks that come later are not
            seen.

    Attributes:
        blocks: with ``start``, ``stop``, ``count``, ``skipped``, ``lr`` and ``metrics``.
        damaged: position in ``blocks`` to what is wrong with it; see :attr:`usable`.

    Raises:
        CheckpointError: there is no trajectory, or its manifest is damaged.

    >>> import tempfile, torch, polyak
    >>> from polyak import checkpoints
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for step in (100, 200, 300):
    ...         checkpoints.write(f"{folder}/step-{step}.pt", {"w": torch.full((2,), float(step))})
    ...     run = polyak.Trajectory.from_checkpoints(Path(folder).glob("*.pt"))
    ...     run.average(polyak.Tail(steps=200))
    {'w': tensor([250., 250.])}
    """

    blocks: tuple[Block, ...]
    damaged: dict[int, str]
    _live: Path | Weights | None
    _live_beside: Checkpoint | None = None  # opened for a sum that counts it

    @checked
    def __init__(self, directory: str | PathLike[str]):
        folder = Path(directory)
        manifest, self._inputs, self.damaged = _read(folder)
        self._place = str(folder)
        self.blocks = manifest.blocks
        self._unchecked = {index for index in range(len(self.blocks)) if index not in self.damaged}
        self._frozen = open_stored(folder / FROZEN_NAME) if manifest.has_frozen else None
        complete([block for block in self._inputs if block is not None], self._frozen)
        self._live = None if manifest.live_name is None else folder / manifest.live_name
        self._live_checksum = manifest.live_checksum
        self._frozen_checksum = manifest.frozen_checksum

    @classmethod
    @checked
    def from_checkpoints(
        cls,
        paths: Iterable[str | PathLike[str]],
        steps: Sequence[int] | None = None,
        *,
        key: str | None = None,
        last: int | None = None,
        allow: Sequence[str] = (),
    ) -> Self:
        """Checkpoints of any tool as a trajectory: each is a block with one sample.

        One saved at step s stands for the steps since the one before; the first takes the length of the next
        gap. Tensors that are not averaged, such as counters, are those of the newest that counts.

        Args:
            paths: files or folders of the formats that :mod:`polyak.checkpoints` reads.
            steps: the optimizer step of each; None: as the checkpoints say, or else the number in each name
                (the one after "step", or the last), or else 1, 2, … in the order of ``paths``.
            key: the nested key that holds the weights; None: the best known.
            last: take only the newest so many.
            allow: types that a torch file may hold beside tensors, see :func:`polyak.checkpoints.open`.

        What lies at the paths and is not taken (a link to another, the best beside a numbered series, the live weights
        beside their average) is named in a warning.

        Raises:
            OptionError: no paths; steps that do not fit; or none known, and paths in no order, as from a glob.
            CheckpointError: one is corrupt.
            StructureError: they do not hold the same tensors.
        """
        if isinstance(paths, str | PathLike):
            raise OptionError(
                f"paths must be a list, got {str(paths)!r}: write [...] or Path({str(paths)!r}).glob('*.pt')"
            )
        ordered = isinstance(paths, Sequence)
        paths = [Path(path) for path in paths]
        if not paths:
            raise OptionError("there are no checkpoints: paths is empty")
        found = () if ordered else paths
        reading = read_inputs(paths, key, found=found, steps=steps, last=last, allow=allow).required()
        reading.refuse_unordered()
        if steps is not None:
            _warn_of_other_order(reading, steps, paths)
        reading.warn()
        return cls._of_reading(reading)

    @classmethod
    def _of_reading(cls, reading: Reading) -> Self:
        inputs = reading.checkpoints
        trajectory = cls.__new__(cls)
        trajectory._place = str(inputs[0].path.parent)
        trajectory._inputs = list(inputs)
        spans = _inputs.spans_of_steps(reading.steps or range(1, len(inputs) + 1))
        trajectory.blocks = tuple(Block(span.start, span.stop, span.count) for span in spans)
        trajectory.damaged, trajectory._unchecked = {}, set()
        trajectory._frozen = trajectory._frozen_checksum = None
        trajectory._live = Weights([float(index == len(inputs) - 1) for index in range(len(inputs))])
        common_layout(inputs)  # refuses checkpoints of different models
        return trajectory

    @property
    def usable(self) -> Self:
        """The trajectory without its damaged blocks, whose weight goes to the others in proportion."""
        self._check(range(len(self.blocks)))
        rest = object.__new__(type(self))
        rest.__dict__.update(self.__dict__)
        kept = [index for index in range(len(self.blocks)) if index not in self.damaged]
        rest.blocks = tuple(self.blocks[index] for index in kept)
        rest._inputs = [self._inputs[index] for index in kept]
        rest.damaged, rest._unchecked = {}, set()
        return rest

    @property
    def name(self) -> str:
        """The name of the folder that it was opened from."""
        return Path(self._place).absolute().name

    @property
    def checkpoints(self) -> tuple[Checkpoint | None, ...]:
        """The opened file of each block, None where it is damaged."""
        return tuple(self._inputs)

    def average(
        self,
        profile: Profile | str,
        *,
        dtype: torch.dtype | None = None,
        max_memory: int | str = _MAX_MEMORY,
    ) -> dict[str, Tensor]:
        """The averaged model under ``profile``: name to tensor on the host, tied names sharing one.

        Tensors that are not averaged are those of the newest block that counts, or the live ones of a blend. Where
        blocks are too long for the profile, a warning says so.

        Args:
            profile: any profile, or its text such as ``"tail:0.4"``.
            dtype: the narrowest that averaged tensors may have, such as ``torch.float32`` for bf16 checkpoints;
                None: that of the blocks, to which averages are rounded.
            max_memory: bytes, or text such as ``"512MB"``: the most memory used beside the result.

        Raises:
            OptionError: the profile does not fit the run, or looks back less far than the blocks resolve.
            CheckpointError: a block that counts is damaged; the message names it.
            NotStartedError: there are no blocks yet, or the live weights that a blend counts were not kept.
        """
        (averaged,) = self.average_many([profile], dtype=dtype, max_memory=max_memory)
        warn_if_coarse(self.explain(profile))
        return averaged

    @checked
    def average_many(
        self,
        profiles: Sequence[Profile | str],
        *,
        dtype: torch.dtype | None = None,
        max_memory: int | str = _MAX_MEMORY,
    ) -> list[dict[str, Tensor]]:
        """As :meth:`average` for each profile, in one pass over the blocks; :meth:`explain` has the warnings."""
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise OptionError(
                f"dtype must be a floating-point torch.dtype, such as torch.float32, got {dtype!r}"
            )
        rows = [self._coefficients(profile) for profile in profiles]
        if not rows:
            raise OptionError("profiles is empty: give at least one")
        writers = [MemoryWriter(self._assembly.layout(row, dtype)) for row in rows]
        self._fill(rows, writers, max_memory)
        return [writer.tensors for writer in writers]

    @checked
    def write(
        self,
        profile: Profile | str,
        path: str | PathLike[str],
        *,
        overwrite: bool = False,
        max_memory: int | str = _MAX_MEMORY,
    ) -> None:
        """Write the averaged model as a checkpoint, whole or not at all, without holding it in memory.

        Of checkpoints in folders of transformers, diffusers or PEFT, an output without a suffix is a folder with their
        configs, which ``from_pretrained`` loads. BatchNorm statistics in it are not those of the averaged weights,
        which a warning says, as it does where blocks are too long for the profile.

        Args:
            profile: any profile.
            path: the ending chooses the format, as for :func:`polyak.checkpoints.write`.
            overwrite: replace an output that is there.
            max_memory: as for :meth:`average`.

        Raises as :meth:`average`; ``OutputExistsError``.
        """
        row = self._coefficients(profile)
        inputs = [checkpoint for checkpoint in self._inputs if checkpoint is not None]
        layout, _ = completed(self._assembly.layout(row), inputs, Path(path))
        layout = replace(layout, metadata={"polyak.profile": str(profile)})
        counts = [*(block.count for block in self.blocks), 1]
        n_samples = sum(count for count, a in zip(counts, row, strict=False) if a)
        if n_samples > 1 and (statistics := batchnorm_statistics(layout.tensors)):
            warn_user(
                f"{name_list(statistics)} in {path} are BatchNorm statistics of other weights than the average: "
                "recompute them with polyak.update_bn, or let polyak select choose, which recalibrates and writes an "
                "average with its own"
            )
        with checkpoints.create(path, layout, overwrite=overwrite) as writer:
            self._fill([row], [writer], max_memory)
        warn_if_coarse(self.explain(profile))

    def explain(self, profile: Profile | str) -> Explanation:
        """Where the weight of ``profile`` lies, and how far the blocks are from what it asks for.

        Raises:
            OptionError, NotStartedError: as for :meth:`average`.
        """
        return explain(self._fitting(profile), self.blocks, beside=self._has_live_beside)

    @property
    def averaged_names(self) -> frozenset[str]:
        """Names of the tensors that are averaged, tied ones under each name; the rest are those of one block."""
        self._refuse_empty()
        newest = next(checkpoint for checkpoint in reversed(self._inputs) if checkpoint is not None)
        copied = copied_names(newest)
        return frozenset(
            name
            for name, info in newest.tensors.items()
            if is_averaged(info.dtype) and newest.ties.get(name, name) not in copied
        )

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors of an average, averaged or not, tied ones under each name; raises as the next."""
        layout = self._layout()
        return frozenset({*layout.tensors, *layout.ties})

    @property
    def average_bytes(self) -> int:
        """Bytes that an average takes in memory, tied tensors once.

        Raises:
            NotStartedError: there are no blocks yet.
            CheckpointError: none can be read.
        """
        return sum(info.nbytes for info in self._layout().tensors.values())

    @property
    def has_live(self) -> bool:
        """Whether :meth:`live` has the weights that the run ended with: not while it is still being recorded."""
        return self._live is not None

    def live(self) -> dict[str, Tensor]:
        """The weights that the run ended with: as they were when the recorder was closed, or the newest checkpoint's.

        Raises:
            NotStartedError: they were not kept, as the recording was not closed, or goes on.
            CheckpointError: they are damaged.
        """
        if self._live is None:
            raise NotStartedError(
                f"{self._place} held no live weights when it was opened, which a recorder writes when it is closed; "
                "take them from the model, or from the training's own last checkpoint"
            )
        if isinstance(self._live, Weights):
            return self.average(self._live)
        live = self._open_live(self._live)
        self._check_frozen()
        if self._frozen is not None:
            live.take_in([name for name in self._frozen.tensors if name not in live.tensors], self._frozen)
        return {name: live.read(name) for name in live.tensors}

    def __len__(self) -> int:
        return len(self.blocks)

    def __repr__(self) -> str:
        reach = f", steps {self.blocks[0].start} to {self.blocks[-1].stop}" if self.blocks else ""
        return f"Trajectory({self._place!r}, {len(self.blocks)} blocks{reach})"

    # How it works inside.

    def _layout(self) -> Layout:
        """That of an average which the newest block that can be read counts in."""
        self._refuse_empty()
        readable = [index for index, checkpoint in enumerate(self._inputs) if checkpoint is not None]
        if not readable:
            raise CheckpointError(
                f"no block of {self._place} can be read: {next(iter(self.damaged.values()))}"
            )
        return self._assembly.layout([float(index == readable[-1]) for index in range(len(self) + 1)])

    @property
    def _has_live_beside(self) -> bool:
        """Whether the live weights are an input of their own, and not the last block: those of a recording are."""
        return isinstance(self._live, Path)

    def _fitting(self, profile: Profile | str) -> Profile:
        """The profile, refused where it counts what there is not."""
        self._refuse_empty()
        profile = as_profile(profile)
        inner, live = without_live(profile)
        if live and not self.has_live:
            raise NotStartedError(
                f"{profile} counts the weights that the run ended with, and {self._place} held none when it was "
                f"opened: its recorder writes them when it is closed. Close it, and open this again; or take {inner}, "
                "which counts blocks alone"
            )
        return profile

    def _coefficients(self, profile: Profile | str) -> list[float]:
        """One for each block, and one for the live weights where they lie beside the blocks."""
        found = block_coefficients(self._fitting(profile), self.blocks, beside=self._has_live_beside)
        used = [index for index, a in enumerate(found[: len(self.blocks)]) if a]
        self._check(used)
        self._check_frozen()
        broken = [index for index in used if index in self.damaged]
        if broken:
            others = len(self.blocks) - len(self.damaged)
            raise CheckpointError(
                f"{self.damaged[broken[0]]}. {profile} needs this block, {self.blocks[broken[0]]}; the other "
                f"{others} blocks can be used",
                ": trajectory.usable leaves the damaged ones out",
                ", by a profile that does not reach it",
            )
        if isinstance(self._live, Path) and found[-1] and self._live_beside is None:
            self._live_beside = self._as_block(self._open_live(self._live))
        return found

    def _open_live(self, path: Path) -> Checkpoint:
        try:
            refuse_damaged(path, self._live_checksum, "the live weights")
        except CheckpointError:
            self._refuse_outdated()
            raise
        return open_stored(path)

    def _as_block(self, live: Checkpoint) -> Checkpoint:
        """The live weights, with what blocks hold and in their dtypes, to be summed with them."""
        blocks = [block for block in self._inputs if block is not None]
        complete([*blocks, live], self._frozen)
        dtypes = {name: info.dtype for block in blocks for name, info in block.tensors.items()}
        live.widen(dtypes)
        return live

    def _fill(self, rows: list[list[float]], writers: Sequence[Writer], max_memory: int | str) -> None:
        try:
            self._assembly.fill(rows, writers, max_memory)
        except CheckpointError:
            self._refuse_outdated()
            raise

    def _check(self, indices: Iterable[int]) -> None:
        """Compare files with their checksums, each once: what lies on a disk for long may change."""
        for index in sorted(self._unchecked.intersection(indices)):
            checkpoint = self._inputs[index]
            assert checkpoint is not None, "what could not be opened is not checked"
            try:
                refuse_damaged(checkpoint.path, self.blocks[index].checksum, f"block {self.blocks[index]}")
            except CheckpointError as error:
                self._refuse_outdated()
                self.damaged[index] = str(error)
            self._unchecked.remove(index)

    def _check_frozen(self) -> None:
        if self._frozen is None or self._frozen_checksum is None:
            return
        try:
            refuse_damaged(self._frozen.path, self._frozen_checksum, "the frozen parameters")
        except CheckpointError:
            self._refuse_outdated()
            raise
        self._frozen_checksum = None  # once is enough

    def _refuse_outdated(self) -> None:
        """A missing file is no damage where the recording has gone on, merged blocks, and has other live weights."""
        folder = Path(self._place)
        if not Manifest.exists(folder):
            return
        then = {block.file_name: block.checksum for block in self.blocks}
        if isinstance(self._live, Path):
            then[self._live.name] = self._live_checksum
        if self._frozen_checksum is not None:
            then[FROZEN_NAME] = self._frozen_checksum
        if not then.items() <= Manifest.read(folder).checksums.items():
            raise CheckpointError(
                f"{self._place} has been recorded further since this trajectory was opened, and files of it were "
                "replaced: open it again"
            )

    @property
    def _assembly(self) -> Assembly:
        beside = [self._live_beside] if self._has_live_beside else []
        return Assembly([*self._inputs, *beside], self._frozen)

    def _refuse_empty(self) -> None:
        if not self.blocks:
            raise NotStartedError(f"{self._place} holds no block yet: the first one is not full")


def _read(folder: Path) -> tuple[Manifest, list[Checkpoint | None], dict[int, str]]:
    """The manifest, its blocks opened, and what is wrong with those that could not be."""
    while True:
        manifest = Manifest.read(folder)
        inputs: list[Checkpoint | None] = []
        damaged: dict[int, str] = {}
        for index, block in enumerate(manifest.blocks):
            try:
                inputs.append(open_stored(folder / block.file_name))
            except CheckpointError as error:
                inputs.append(None)
                damaged[index] = str(error)
        # A recorder at work may have merged blocks away before they were opened.
        if not damaged or Manifest.read(folder) == manifest:
            return manifest, inputs, damaged
