"""The folder of a recording: what may be in it, who may write to it, and how blocks come into it.

Blocks go in, neighbours merge, and a crash at any moment leaves the last whole state.
"""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from polyak._checks import Difference
from polyak._distributed import RankGroup
from polyak.checkpoints._io import writing
from polyak.errors import CheckpointError, StateError, name_list
from polyak.trajectory import _blocks
from polyak.trajectory._blocks import FROZEN_NAME, Block, Manifest, Snapshot
from polyak.trajectory._policy import pair_to_merge

__all__ = ["TrajectoryFolder"]

_TRANSIENT = re.compile(r"(block-\d{12}-\d{12}|live-\d{12})\.safetensors|\.polyak-[0-9a-f]{12}\.tmp")

Shape = tuple[int, ...]

_log = logging.getLogger("polyak")


class TrajectoryFolder:
    """A folder that this process alone writes to, or a group of ranks, until :meth:`close`.

    In a group every method that changes something is a collective call. All ranks write tensors, each its own part;
    the first rank alone does the rest, and the others take up the manifest that it comes to.

    Args:
        path: a folder, made where it does not exist; one that holds a trajectory goes on, if ``goes_on``.
        fresh: the manifest to begin with where there is none.
        given_block_steps: the block length that the caller insists on, if any.
        goes_on: whether the caller knows of a run that is there.
        group: the ranks that write together; they must share the folder.

    Raises:
        StateError: it holds a run and ``goes_on`` is False, it was recorded with other options, or somebody is
            recording it now.
        CheckpointError: its manifest is damaged.
    """

    def __init__(
        self, path: Path, fresh: Manifest, given_block_steps: int | None, goes_on: bool, group: RankGroup
    ):
        self.path, self._group = path, group
        self._damaged: set[str] = set()
        # One for all threads: a recorder may be closed, or collected, on another than it was made on. And none of the
        # kind that outlives a process that was killed, where the file system knows no other.
        self._lock = FileLock(path / "lock", thread_local=False, fallback_to_soft=False)
        self.manifest = fresh
        self._on_first(lambda: self._open(fresh, given_block_steps, goes_on))
        try:
            with group.all_or_none(f"recording into {path}"):
                self._refuse_other_folder()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let other writers in; more than once is harmless."""
        self._lock.release()

    def _open(self, fresh: Manifest, given_block_steps: int | None, goes_on: bool) -> None:
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
        try:
            if not Manifest.exists(self.path):
                self._refuse_orphans()
            self.manifest = Manifest.read(self.path) if Manifest.exists(self.path) else fresh
            if self.manifest.blocks:
                if not goes_on:
                    self._refuse_unasked()
                self._refuse_other_options(fresh.options, given_block_steps)
            else:
                self.manifest = fresh
            self.manifest.save(self.path)
            self._remove_unlisted()
        except BaseException:
            self._lock.release()
            raise

    def _take_lock(self) -> None:
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise StateError(
                f"{self.path} is being recorded by another recorder: close that one first, give each run a folder "
                "of its own, and in a job of several processes record on rank 0 only"
            ) from None

    def _refuse_other_folder(self) -> None:
        if not self._group.is_first and not (
            Manifest.exists(self.path) and Manifest.read(self.path) == self.manifest
        ):
            raise CheckpointError(
                f"{self.path} is not the folder that the first rank records into: give all ranks one folder, on a file "
                "system that they share"
            )

    def _on_first(self, change: Callable[[], object]) -> None:
        """Run ``change`` on the first rank; all have its manifest afterwards, or raise what it raised."""

        def changed() -> Manifest:
            change()
            return self.manifest

        self.manifest = self._group.first(changed)

    def refuse_other_model(
        self, averaged: Mapping[str, Shape], frozen: Mapping[str, Shape]
    ) -> frozenset[str]:
        """Compare a model, name to shape, with the newest block that can be read and the frozen parameters.

        Which of them are frozen may differ. What the newest block averages is given back: it has thawed, and goes on
        being averaged where it is frozen again.

        Raises:
            StateError: the folder holds the trajectory of another model.
        """
        return self._group.first(lambda: self._refuse_other_shapes(averaged, frozen))

    def _refuse_other_shapes(
        self, averaged: Mapping[str, Shape], frozen: Mapping[str, Shape]
    ) -> frozenset[str]:
        recorded = self._averaged_shapes()
        if recorded is None:
            return frozenset()
        recorded_frozen = self._frozen_shapes()
        both = {*recorded, *recorded_frozen} & {*averaged, *frozen}

        def named(averaged: Mapping[str, Shape], frozen: Mapping[str, Shape]) -> dict[str, Shape]:
            return {n if n in both else f"{n} (frozen)": shape for n, shape in frozen.items()} | dict(
                averaged
            )

        if found := Difference.of(named(recorded, recorded_frozen), named(averaged, frozen)):
            raise StateError(
                f"{self.path} holds the trajectory of another model: this one {found}. Give each model a directory of "
                "its own"
            )
        return frozenset(recorded)

    def refuse_gap_before(self, start: int) -> None:
        """Raise StateError unless the recorded blocks reach to ``start``, or there are none."""
        if self.manifest.blocks and self.manifest.stop < start:
            raise StateError(
                f"the state goes on from step {start}, but the last block of {self.path} ends at step "
                f"{self.manifest.stop}: give the directory of the same run, or a new one; nothing was loaded"
            )

    def settle(self, block_steps: int, settled: bool) -> None:
        """Change the length of the first blocks; it is saved with the next block."""
        self.manifest = replace(self.manifest, block_steps=block_steps, settled=settled)

    def begin_at(self, step: int, live_step: int) -> None:
        """Go on after ``step``: blocks after it are dropped, and live weights of any step but ``live_step``.

        Raises:
            StateError: a block lies across ``step``; nothing was changed.
        """
        self._on_first(lambda: self._begin_at(step, live_step))

    def _begin_at(self, step: int, live_step: int) -> None:
        manifest = self.manifest
        across = next((block for block in manifest.blocks if block.start < step < block.stop), None)
        if across is not None:
            raise StateError(
                f"{self.path} cannot go on from step {step}: its block {across} lies across it, as blocks merge "
                "while the run grows. Load the recorder's own state_dict(), saved with the training state, which "
                f"keeps a border where it was taken; or resume from step {across.start} or {across.stop}; or "
                "record into a new folder"
            )
        kept = tuple(block for block in manifest.blocks if block.stop <= step)
        if len(kept) < len(manifest.blocks):
            _log.info(
                "%s: dropped %d blocks after step %d", self.path, len(manifest.blocks) - len(kept), step
            )
        start = manifest.start if kept else step
        goes_on = replace(manifest, blocks=kept, start=start)
        self._save(goes_on if manifest.live_step == live_step else goes_on.without_live())
        self._remove_unlisted()

    def commit(self, block: Block, snapshot: Snapshot, max_blocks: int, kept_edges: Collection[int]) -> None:
        """Add a block, then merge neighbours until no more than ``max_blocks`` are left.

        Args:
            block: begins where the newest one ends; if a block between them was lost, as to an interrupt, its
                samples stand for those steps too.
            snapshot: the model, with the block's means.
            max_blocks: how many blocks may remain.
            kept_edges: optimizer steps at which a border between blocks stays.
        """
        block = replace(block, start=self.manifest.stop)
        if snapshot.frozen and not self.manifest.blocks:
            self._write_frozen(snapshot)
        checksum = _blocks.write_block(self._file(block), snapshot, self._group)
        self._on_first(lambda: self._add(replace(block, checksum=checksum), max_blocks, kept_edges))

    def _add(self, block: Block, max_blocks: int, kept_edges: Collection[int]) -> None:
        manifest = self.manifest.with_block(block)
        try:
            manifest = self._merged(manifest, max_blocks, kept_edges)
        finally:
            # Also where a merge fails, as on a full disk: the new block is not lost with it.
            self._save(manifest)
        self._remove_unlisted()

    def write_live(self, snapshot: Snapshot, step: int) -> None:
        """Keep the live weights of ``step``, in the place of those before.

        Parameters that the optimizer leaves alone may have been moved by hand, as a momentum encoder is; they are
        kept once, as they are now.
        """
        path = self.path / FROZEN_NAME
        if snapshot.frozen and not _blocks.holds_frozen(path, snapshot, self._group):
            self._write_frozen(_blocks.with_thawed(path, snapshot, self._group))
        # A file must not be replaced while it is listed with its checksum.
        if self.manifest.live_step == step:
            self._on_first(lambda: self._save(self.manifest.without_live()))
        manifest = replace(self.manifest, live_step=step)
        checksum = _blocks.write_block(self.path / str(manifest.live_name), snapshot, self._group)
        self._on_first(lambda: self._keep_live(replace(manifest, live_checksum=checksum)))

    def _keep_live(self, manifest: Manifest) -> None:
        self._save(manifest)
        self._remove_unlisted()

    def _write_frozen(self, snapshot: Snapshot) -> None:
        if self.manifest.has_frozen:  # a file must not be replaced while it is listed with its checksum
            self._on_first(lambda: self._save(replace(self.manifest, frozen_checksum=None)))
        checksum = _blocks.write_frozen(self.path / FROZEN_NAME, snapshot, self._group)
        # Listed with the block or the live weights that they are written for.
        self.manifest = replace(self.manifest, has_frozen=True, frozen_checksum=checksum)

    def _frozen_shapes(self) -> dict[str, Shape]:
        if not self.manifest.has_frozen:
            return {}
        with _blocks.open_stored(self.path / FROZEN_NAME) as stored:
            return {name: info.shape for name, info in stored.tensors.items() if name not in stored.ties}

    def _averaged_shapes(self) -> dict[str, Shape] | None:
        for block in reversed(self.manifest.blocks):
            with suppress(CheckpointError), _blocks.open_stored(self._file(block)) as checkpoint:
                others = {*_blocks.copied_names(checkpoint), *checkpoint.ties}
                return {name: info.shape for name, info in checkpoint.tensors.items() if name not in others}
        return None

    def _merged(self, manifest: Manifest, max_blocks: int, kept_edges: Collection[int]) -> Manifest:
        """``manifest`` after merges, whose files are written; those that were merged are left in place."""
        while (index := self._pair_to_merge(manifest.blocks, max_blocks, kept_edges)) is not None:
            pair = manifest.blocks[index : index + 2]
            both = pair[0] + pair[1]
            try:
                frozen = self.path / FROZEN_NAME if manifest.has_frozen else None
                files = {self._file(block): block for block in pair}
                checksum = _blocks.merge_files(files, self._file(both), frozen)
            except Exception:  # a damaged header can provoke any
                if not any(self._found_damage(block) for block in pair):
                    raise
                continue
            manifest = manifest.with_merged(index, replace(both, checksum=checksum))
        return manifest

    def _pair_to_merge(
        self, blocks: Sequence[Block], max_blocks: int, kept_edges: Collection[int]
    ) -> int | None:
        kept = {
            index
            for index, (block, later) in enumerate(pairwise(blocks))
            if block.stop in kept_edges or self._damaged & {block.file_name, later.file_name}
        }
        return pair_to_merge([block.steps for block in blocks], max_blocks, kept)

    def _found_damage(self, block: Block) -> bool:
        """Whether a block is not what was written; it is kept as it is, and the recording goes on without it."""
        try:
            _blocks.refuse_damaged(self._file(block), block.checksum, f"block {block}")
        except CheckpointError as error:
            warnings.warn(f"{error}; it is left alone, and the recording goes on", UserWarning, stacklevel=2)
            self._damaged.add(block.file_name)
        return block.file_name in self._damaged

    def _save(self, manifest: Manifest) -> None:
        manifest.save(self.path)
        self.manifest = manifest

    def _file(self, block: Block) -> Path:
        return self.path / block.file_name

    def _remove_unlisted(self) -> None:
        listed = self.manifest.checksums
        unlisted = [n for n in os.listdir(self.path) if _TRANSIENT.fullmatch(n) and n not in listed]
        for name in unlisted:
            if not (self.path / name).is_dir():  # nobody writes folders of such names but somebody else
                with suppress(OSError):  # no manifest lists it, and it is tried again with the next block
                    (self.path / name).unlink()

    def _refuse_orphans(self) -> None:
        orphans = [name for name in sorted(os.listdir(self.path)) if name.startswith("block-")]
        if orphans := [name for name in orphans if _TRANSIENT.fullmatch(name)]:
            raise CheckpointError(
                f"{self.path} holds the blocks of a recording, {name_list(orphans)}, but its manifest is missing: "
                "restore manifest.json, move the blocks away, or record into a new folder"
            )

    def _refuse_unasked(self) -> None:
        raise StateError(
            f"{self.path} holds a run already, of {len(self.manifest.blocks)} blocks up to optimizer step "
            f"{self.manifest.stop}. A new run needs another folder, or step=0 to replace that one. To go on with it, "
            "resume from a Trainer's checkpoint, in a loop of your own pass resume=True and load the recorder's saved "
            "state with load_state_dict(), or pass step= with the optimizer steps taken so far"
        )

    def _refuse_other_options(self, options: Mapping[str, Any], given_block_steps: int | None) -> None:
        recorded: dict[str, Any] = {**self.manifest.options, "block": self.manifest.block_steps}
        asked = {**options, "block": given_block_steps or self.manifest.block_steps}
        other = [
            f"{key}={recorded.get(key)!r}, not {asked[key]!r}"
            for key in asked
            if asked[key] != recorded.get(key)
        ]
        if other:
            raise StateError(
                f"{self.path} was recorded with {'; '.join(other)}: use the same options to go on, "
                "or record into a new folder"
            )
