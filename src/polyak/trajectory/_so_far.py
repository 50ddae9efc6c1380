"""A run so far: the block that is being filled, those before it, in memory or on disk, and averages of all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyak._checks import whole_within
from polyak._distributed import RankGroup, held_runs
from polyak._mean import Accumulator
from polyak._model import Binding, is_sharded, local, sharded_like
from polyak._offload import Offload
from polyak._swap import copy_into
from polyak.checkpoints import Checkpoint, TensorInfo, _safetensors
from polyak.checkpoints._base import Contents, LoadedTensor, StoredTensor
from polyak.checkpoints._io import DataFile
from polyak.combine import MemoryWriter, combine, common_layout
from polyak.combine._inputs import parse_bytes
from polyak.errors import NonFiniteError, OptionError, StateError, name_list
from polyak.profiles import Profile, Uniform
from polyak.trajectory import _blocks
from polyak.trajectory._blocks import FROZEN_NAME, Block, CheckedFile, Metrics, Summary
from polyak.trajectory._explain import Explanation, explain, warn_if_coarse

__all__ = ["BlockMeans", "OpenBlock", "named", "numbers_of"]

# The block that is being filled.


class OpenBlock:
    """Samples, learning rates and metrics since ``start``.

    Two accumulators take turns: the means of the block before stay as they are while this one fills.

    Attributes:
        start: the optimizer step after which the block begins.
        last_sample: the step of the last sample, accepted or not.
    """

    def __init__(self, binding: Binding, dtype: torch.dtype | None, device: torch.device | str | None):
        self._binding = binding
        options = {"dtype": dtype, "device": device, "offload": Offload(), "watched": binding.watches_memory}
        agree = binding.agree if binding.sharded else None
        self._filling, self._resting = (
            Accumulator(binding.live, binding.names, Uniform(), agree=agree, **options) for _ in range(2)
        )
        self.begin(0)

    def refuse_unstorable(self) -> None:
        """Raise OptionError for means that the blocks' format cannot hold."""
        wide = [
            n
            for n, m in zip(self._binding.names, self._filling.means, strict=True)
            if m.dtype == torch.complex128
        ]
        if wide:
            raise OptionError(
                f"{name_list(wide)} would be complex128, which blocks cannot hold: pass dtype=torch.float32"
            )

    def begin(self, start: int) -> None:
        """Empty it, for a block after ``start``."""
        self.start = self.last_sample = start
        self._filling.restart()
        self._metrics, self._lr = Metrics(), Metrics()

    def rebind(self) -> None:
        """Take up tensors that the model has in the place of those before, and those that thawed."""
        for accumulator in (self._filling, self._resting):
            accumulator.bind(self._binding.live, self._binding.names)

    def note(self, metrics: Mapping[str, Any], lr: float | Tensor | None) -> None:
        """Take the numbers of one optimizer step."""
        if metrics:
            self._metrics.add(metrics)
        if lr is not None:
            self._lr.add({"lr": lr})

    def sample(self, step: int, *, overlaps: bool = False) -> None:
        """Take the weights as they are after ``step``; see :meth:`Accumulator.add`."""
        self.last_sample = step  # first: an interrupt must leave no sample that lies outside the block
        self._filling.add(self._binding.live, overlaps=overlaps)

    @property
    def count(self) -> int:
        """Accepted samples; on an accelerator reading it waits for the device."""
        return self._filling.n_averaged

    def take(self) -> tuple[Block, list[Tensor]]:
        """What was filled, up to the last sample, and its means; the next block begins there."""
        block = Block(
            self.start,
            self.last_sample,
            self._filling.n_averaged,
            self._filling.n_skipped,
            self._lr.summaries().get("lr"),
            self._metrics.summaries(),
        )
        means = self._filling.means
        self._resting.restart()  # before it fills: an interrupt must leave nothing of an older block in it
        self._filling, self._resting = self._resting, self._filling
        self.begin(block.stop)
        return block, means

    def so_far(self) -> tuple[Block, dict[str, Tensor]] | None:
        """What was filled until now and its means, on ranks this one's part of each; None before a sample."""
        if not self.count:
            return None
        block = Block(self.start, self.last_sample, self.count)
        return block, dict(zip(self._binding.names, self._filling.means, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Plain values, and the means by name, which are not copied."""
        return {
            "start": self.start,
            "last_sample": self.last_sample,
            "n_averaged": self._filling.n_averaged,
            "n_skipped": self._filling.n_skipped,
            "summaries": json.dumps({"lr": self._lr.to_json(), "metrics": self._metrics.to_json()}),
            "frozen": self._binding.frozen,
            "open_block": named(self._binding, self._filling.means),
        }

    def load_state_dict(self, state: Mapping[str, Any], lr: Metrics, metrics: Metrics) -> None:
        """Take up a state that fits, with the numbers of its summaries."""
        copy_into(self._filling.means, local(state["open_block"][name] for name in self._binding.names))
        self._filling.restart(state["n_averaged"], state["n_skipped"])
        self.start, self.last_sample = state["start"], state["last_sample"]
        self._lr, self._metrics = lr, metrics


def named(binding: Binding, parts: Sequence[Tensor]) -> dict[str, Tensor]:
    """Name to tensor, distributed as the model's is."""
    return {n: sharded_like(p, w) for n, p, w in zip(binding.names, parts, binding.whole, strict=True)}


def numbers_of(summaries: object) -> tuple[Metrics, Metrics]:
    """The learning rates and metrics of an open block, as a saved state has them. Raises StateError if it has none."""
    try:
        entries = json.loads(summaries)  # type: ignore[arg-type]
        return tuple(  # type: ignore[return-value]
            Metrics({name: Summary.of_json(numbers) for name, numbers in entries[kind].items()})
            for kind in ("lr", "metrics")
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise StateError(f"the saved summaries are damaged ({error!s:.100}); nothing was loaded") from error


# Means of blocks, in memory or on disk.

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
        self._found_coarse: set[str] = set()

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

        The live weights of a blend are those of the model now. Where the blocks are too long for the profile a warning
        says so, once a profile.

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
        explanation = explain(profile, [*earlier, replace(newest, stop=step)], beside=True)
        self._warn_if_coarse(explanation)
        row, live = explanation.coefficients.tolist(), explanation.live
        counted = [block for block, a in zip(blocks, row, strict=False) if a]
        if self._group.size > 1:
            self._refuse_damaged(counted)
        with self._group.all_or_none(f"averaging {self._folder}"), ExitStack() as stack:
            files = {block.file_name: self._file(block, stack) for block in counted if not self._keeps(block)}
            inputs = [self._input(block, files.get(block.file_name), binding) for block in counted]
            if filling and row[-1]:
                inputs.append(_in_memory(self._folder, filling[1]))
            if live:
                now = dict(zip(binding.names, (tensor.detach() for tensor in binding.live), strict=True))
                inputs.append(_in_memory(self._folder, now))
            # Who checks a file while it is read does so on one thread.
            try:
                means = _combined(inputs, [a for a in (*row, live) if a], workers=1 if files else None)
            except NonFiniteError:
                self._refuse_other_checksums(counted, files)  # where it comes from
                raise
            if self._group.size == 1:
                self._refuse_other_checksums(counted, files)
        return [means[name] for name in binding.names]

    def _warn_if_coarse(self, explanation: Explanation) -> None:
        profile = str(explanation.profile)
        if profile not in self._found_coarse:
            warn_if_coarse(explanation)
        if explanation.coarseness:
            self._found_coarse.add(profile)

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
        if any(means.keys() != parts[0][1].keys() for _, means in parts):
            return None  # what thawed between them is in a file only
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
        """A block as what the sum takes it from; what thawed after it is taken as it was while frozen."""
        kept = self._kept[block.file_name][1] if file is None else {}
        stored = {} if file is None else dict(_safetensors.read_file(file).tree)
        if not {*kept, *stored}.issuperset(binding.names):
            stored = dict(_safetensors.read_file(DataFile(self._folder / FROZEN_NAME)).tree) | stored
        parts = {
            name: PartOfTensor(stored[name], part, whole) if is_sharded(whole) else stored[name]
            for name, part, whole in zip(binding.names, binding.live, binding.whole, strict=True)
            if name not in kept
        }
        parts |= {name: LoadedTensor(kept[name]) for name in binding.names if name in kept}
        return Checkpoint(self._folder / block.file_name, "safetensors", Contents(parts, exact=True))

    def _refuse_other_checksums(self, blocks: Sequence[Block], files: Mapping[str, CheckedFile]) -> None:
        for block in blocks:
            if block.file_name in files:
                _blocks.refuse_other_checksum(files[block.file_name], block.checksum, f"block {block}")

    def _refuse_damaged(self, blocks: Sequence[Block]) -> None:
        """Have the first rank look at the files that any rank reads, each once: nobody reads the whole of one."""
        read = set().union(*self._group.gather({b.file_name for b in blocks if not self._keeps(b)}))
        new = [
            b for b in blocks if b.file_name in read and (b.file_name, b.checksum) not in self._found_whole
        ]

        def look() -> None:
            for block in new:
                _blocks.refuse_damaged(self._folder / block.file_name, block.checksum, f"block {block}")

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
