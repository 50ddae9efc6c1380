"""The list of a trajectory's blocks: a small file, and the point at which a block counts as recorded.

A block's file is written first and the manifest after it, each under a temporary name, synced and renamed.
What the manifest does not list does not exist.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from polyak.checkpoints.atomic import write_file
from polyak.checkpoints.folders import RECORDING_NAME
from polyak.errors import CheckpointError
from polyak.trajectory.summaries import Summary, merged

__all__ = ["FROZEN_NAME", "Block", "Manifest"]

FROZEN_NAME = "frozen.safetensors"
_FORMAT = "polyak trajectory 1"


@dataclass(frozen=True)
class Block:
    """The mean of the ``count`` samples taken in the optimizer steps (start, stop].

    Attributes:
        start: the optimizer step after which the block begins.
        stop: its last optimizer step.
        count: samples in the mean, at least 1.
        skipped: samples left out because they held a NaN or an infinity.
        lr: the learning rate over the block, the largest where parameter groups differ; None if it is unknown.
        metrics: the metrics given over the block, by name.
        checksum: CRC-32 of the block's file; None for a checkpoint that another tool saved.

    >>> block = Block(0, 100, count=10) + Block(100, 200, count=8, skipped=2)
    >>> block.start, block.stop, block.count, block.skipped
    (0, 200, 18, 2)
    """

    start: int
    stop: int
    count: int
    skipped: int = 0
    lr: Summary | None = None
    metrics: Mapping[str, Summary] = field(default_factory=dict)
    checksum: int | None = None

    @property
    def steps(self) -> int:
        """Its length in optimizer steps."""
        return self.stop - self.start

    @property
    def file_name(self) -> str:
        """The name of its file, from its range."""
        return f"block-{self.start:012d}-{self.stop:012d}.safetensors"

    def __add__(self, later: Block) -> Block:
        return Block(
            self.start,
            later.stop,
            self.count + later.count,
            self.skipped + later.skipped,
            self.lr + later.lr if self.lr and later.lr else self.lr or later.lr,
            merged(self.metrics, later.metrics),
        )

    def __str__(self) -> str:
        return f"({self.start}, {self.stop}]"


@dataclass(frozen=True)
class Manifest:
    """What a folder holds.

    Attributes:
        law: the options that all blocks were recorded with: ``every``, ``dtype`` and ``buffers``.
        block_steps: the length of the first blocks.
        settled: whether that length is final; otherwise it still follows the pace of training and writing.
        start: the optimizer step at which the recording began.
        blocks: oldest first, each beginning where the one before ends.
        has_frozen: whether the frozen parameters are kept beside the blocks.
        frozen_checksum: CRC-32 of their file; None while it is replaced.
        live_step: the step of the live weights that are kept; None where there are none.
        live_checksum: CRC-32 of their file.
    """

    law: Mapping[str, Any]
    block_steps: int
    settled: bool
    start: int = 0
    blocks: tuple[Block, ...] = ()
    has_frozen: bool = False
    frozen_checksum: int | None = None
    live_step: int | None = None
    live_checksum: int | None = None

    @property
    def stop(self) -> int:
        """The last recorded step."""
        return self.blocks[-1].stop if self.blocks else self.start

    @property
    def live_name(self) -> str | None:
        """The file name of the live weights."""
        return None if self.live_step is None else f"live-{self.live_step:012d}.safetensors"

    @property
    def checksums(self) -> dict[str, int | None]:
        """File names of all that is listed, to what is known of their contents."""
        checksums = {block.file_name: block.checksum for block in self.blocks}
        frozen = {FROZEN_NAME: self.frozen_checksum} if self.has_frozen else {}
        live = {self.live_name: self.live_checksum} if self.live_name else {}
        return checksums | frozen | live

    def with_block(self, block: Block) -> Manifest:
        """With one more block at the end; live weights from before its end are no longer the last ones."""
        manifest = self if self.live_step == block.stop else self.without_live()
        return replace(manifest, blocks=(*self.blocks, block))

    def without_live(self) -> Manifest:
        """With no live weights."""
        return replace(self, live_step=None, live_checksum=None)

    def with_merged(self, index: int, block: Block) -> Manifest:
        """With ``block`` in the place of the blocks ``index`` and ``index + 1``."""
        return replace(self, blocks=(*self.blocks[:index], block, *self.blocks[index + 2 :]))

    def save(self, folder: Path) -> None:
        """Write it, whole or not at all."""
        path = folder / RECORDING_NAME
        # Compact and without asdict's deep copies: a small model may write hundreds of blocks a minute.
        entries = {**vars(self), "law": dict(self.law), "blocks": [_entry(block) for block in self.blocks]}
        data = json.dumps({"format": _FORMAT, **entries}, allow_nan=False).encode()
        write_file(path, data, overwrite=True)

    @classmethod
    def exists(cls, folder: Path) -> bool:
        """Whether ``folder`` holds a trajectory."""
        return (folder / RECORDING_NAME).is_file()

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a folder.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        path = folder / RECORDING_NAME
        if not cls.exists(folder):
            raise CheckpointError(
                f"{folder} holds no trajectory: there is no {RECORDING_NAME} in it. Give the folder that a Recorder "
                "wrote, or use Trajectory.from_checkpoints for checkpoints of other tools"
            )
        try:
            return _parsed(path.read_bytes())
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{path} is damaged ({error}). The blocks beside it are whole checkpoints: "
                f"Trajectory.from_checkpoints(sorted(Path({str(folder)!r}).glob('block-*'))) reads them, "
                "one sample each"
            ) from error


def _entry(block: Block) -> dict[str, Any]:
    metrics = {name: vars(summary) for name, summary in block.metrics.items()}
    return {**vars(block), "lr": vars(block.lr) if block.lr else None, "metrics": metrics}


def _parsed(data: bytes) -> Manifest:
    entries = json.loads(data)
    if entries.pop("format") != _FORMAT:
        raise ValueError(f"it is not of the format {_FORMAT!r}")
    blocks = tuple(_parsed_block(entry) for entry in entries.pop("blocks"))
    manifest = Manifest(**entries, blocks=blocks)
    edges = [manifest.start, *(block.stop for block in blocks)]
    if [block.start for block in blocks] != edges[:-1] or any(b.steps < 1 or b.count < 1 for b in blocks):
        raise ValueError("its blocks do not follow each other")
    return manifest


def _parsed_block(entry: dict[str, Any]) -> Block:
    lr = entry.pop("lr")
    metrics = {name: Summary(**summary) for name, summary in entry.pop("metrics").items()}
    return Block(**entry, lr=Summary(**lr) if lr else None, metrics=metrics)
