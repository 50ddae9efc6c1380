"""Averages of a run that goes on: its blocks, in memory or on disk, and the one that is being filled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from polyak._checks import whole_within
from polyak._distributed import RankGroup, held_runs
from polyak._model import Binding, is_sharded
from polyak.checkpoints import Checkpoint, TensorInfo, _safetensors
from polyak.checkpoints._base import Contents, LoadedTensor, StoredTensor
from polyak.combine import MemoryWriter, combine, common_layout
from polyak.combine._inputs import parse_bytes
from polyak.profiles import Profile
from polyak.trajectory._blocks import Block, CheckedFile, refuse_damaged, refuse_other_checksum
from polyak.trajectory._explain import block_coefficients

__all__ = ["BlockMeans"]

# A few buffers, and what the descriptions of tensors take: there is no budget that these must fit.
_ANY_MEMORY = "1TB"

# Names to tensors; on ranks to this rank's part of each.
Means = Mapping[str, Tensor]


class PartOfTensor(StoredTensor):
    """What this rank holds of a tensor in a file.

    Args:
        stored: the tensor.
        part: what this rank holds of it; its values are not looked at.
        whole: the DTensor that ``part`` belongs to.
    """

    def __init__(self, stored: StoredTensor, part: Tensor, whole: Tensor) -> None:
        self.info = TensorInfo(tuple(part.shape), stored.info.dtype)
        self._stored = stored
        self._runs = [(start, values.numel()) for start, values in held_runs(part, whole)]

    def read_into(self, start: int, out: Tensor) -> None:
        length = self._runs[0][1]  # which all of them have
        done = 0
        while done < out.numel():
            run, offset = divmod(start + done, length)
            piece = out[done : done + length - offset]
            self._stored.read_into(self._runs[run][0] + offset, piece)
            done += piece.numel()


class BlockMeans:
    """The means of a recording's blocks, of which the newest are kept in memory beside their files.

    Args:
        folder: where the files are.
        keep_in_memory: how much of the host's memory the means may take, on each rank: bytes, or text.
        group: the ranks that record together; :meth:`average` is a collective call.

    Raises:
        OptionError: a size that cannot be read.
    """

    def __init__(self, folder: Path, keep_in_memory: int | str, group: RankGroup) -> None:
        self._folder, self._group = folder, group
        self._most_bytes = whole_within("[0, inf)", "keep_in_memory", parse_bytes(keep_in_memory))
        self._kept: dict[str, tuple[Block, Means]] = {}
        self._found_whole: set[tuple[str, int | None]] = set()

    def keep(self, block: Block, means: Means) -> None:
        """Take copies of the means of a new block; :meth:`follow` comes next."""
        if self._most_bytes:
            self._kept[block.file_name] = block, {name: _on_host(mean) for name, mean in means.items()}

    def follow(self, blocks: Sequence[Block]) -> None:
        """Do with what is kept as the recording did with its files: merge, and forget; ``blocks`` are there now."""
        kept: dict[str, tuple[Block, Means]] = {}
        free_bytes = self._most_bytes
        for block in reversed(blocks):
            means = self._kept_means(block)
            free_bytes -= sum(mean.nbytes for mean in means.values()) if means else 0
            if means is None or free_bytes < 0:
                break
            kept[block.file_name] = block, means
        self._kept = kept

    def average(
        self,
        profile: Profile,
        blocks: Sequence[Block],
        filling: tuple[Block, Means] | None,
        step: int,
        binding: Binding,
    ) -> list[Tensor]:
        """Σ a_k · block_k for the tensors of ``binding``, on the host; on ranks this one's part of each.

        Args:
            profile: gives the a_k for a run that ends now.
            blocks: those that are recorded.
            filling: the open block and its means, where it has any; there is one block at least.
            step: the optimizer step now, up to which the newest of them stands.
            binding: whose tensors the means are of, and are distributed as.

        Raises:
            OptionError: the profile does not fit the run, or looks back less far than the blocks resolve.
            CheckpointError: a block that counts is damaged; the message names it.
        """
        *earlier, newest = [*blocks, filling[0]] if filling else blocks
        row = block_coefficients(profile, [*earlier, replace(newest, stop=step)]).tolist()
        counted = [block for block, a in zip(blocks, row, strict=False) if a]
        if self._group.size > 1:
            self._refuse_damaged(counted)
        with self._group.all_or_none(f"averaging {self._folder}"), ExitStack() as stack:
            files = {block.file_name: self._file(block, stack) for block in counted if not self._keeps(block)}
            inputs = [self._input(block, files.get(block.file_name), binding) for block in counted]
            if filling and row[-1]:
                inputs.append(_in_memory(self._folder, filling[1]))
            # Who checks a file while it is read does so on one thread.
            means = _combined(inputs, [a for a in row if a], workers=1 if files else None)
            for block in counted if self._group.size == 1 else ():
                if block.file_name in files:
                    refuse_other_checksum(files[block.file_name], block.checksum, f"block {block}")
        return [means[name] for name in binding.names]

    def _kept_means(self, block: Block) -> Means | None:
        """Those that are kept of ``block``, or are the mean of those kept of all its parts."""
        parts = [
            (part, means)
            for part, means in self._kept.values()
            if block.start <= part.start and part.stop <= block.stop
        ]
        if sum(part.steps for part, _ in parts) < block.steps:
            return None
        if len(parts) == 1:
            return parts[0][1]
        inputs = [_in_memory(self._folder, means) for _, means in parts]
        # One thread: the training that goes on beside this has use for the other cores.
        return _combined(inputs, [part.count / block.count for part, _ in parts], workers=1)

    def _keeps(self, block: Block) -> bool:
        return block.file_name in self._kept

    def _file(self, block: Block, stack: ExitStack) -> CheckedFile:
        file = CheckedFile(self._folder / block.file_name)
        stack.callback(file.close)
        return file

    def _input(self, block: Block, file: CheckedFile | None, binding: Binding) -> Checkpoint:
        if file is None:
            return _in_memory(self._folder, self._kept[block.file_name][1])
        stored = _safetensors.read_file(file).tree
        tensors = zip(binding.names, binding.live, binding.whole, strict=True)
        parts = {
            name: PartOfTensor(stored[name], part, whole) if is_sharded(whole) else stored[name]
            for name, part, whole in tensors
            if name in stored  # what is missing is found when the blocks are compared
        }
        return Checkpoint(file.path, "safetensors", Contents(parts, exact=True))

    def _refuse_damaged(self, blocks: Sequence[Block]) -> None:
        """Have the first rank look at the files that any rank reads, each once: nobody reads the whole of one."""
        read = set().union(*self._group.gather({b.file_name for b in blocks if not self._keeps(b)}))
        new = [
            b for b in blocks if b.file_name in read and (b.file_name, b.checksum) not in self._found_whole
        ]

        def look() -> None:
            for block in new:
                refuse_damaged(self._folder / block.file_name, block.checksum, f"block {block}")

        self._group.first(look)
        self._found_whole.update((block.file_name, block.checksum) for block in new)


def _on_host(mean: Tensor) -> Tensor:
    """A copy in the host's memory, row by row."""
    return torch.empty(mean.shape, dtype=mean.dtype).copy_(mean)


def _in_memory(folder: Path, means: Means) -> Checkpoint:
    """Means as what the sum takes them from; ``folder`` is named in messages."""
    tensors = {name: LoadedTensor(mean) for name, mean in means.items()}
    return Checkpoint(folder, "safetensors", Contents(tensors, exact=True))


def _combined(inputs: Sequence[Checkpoint], row: Sequence[float], workers: int | None) -> dict[str, Tensor]:
    with MemoryWriter(common_layout(inputs)) as writer:
        combine(inputs, [row], [writer], max_memory=_ANY_MEMORY, workers=workers)
    return writer.tensors
