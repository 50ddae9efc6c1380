"""Putting averaged models together: combined block means, copied buffers, frozen parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from polyak.checkpoints import Checkpoint, Layout, TensorInfo, Writer
from polyak.combine import combine, is_averaged
from polyak.trajectory.block_file import Part, copied_names

__all__ = ["Assembly"]

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
            tensors |= {n: info for n, info in self._frozen.tensors.items() if n not in ties}
        return Layout(tensors, ties)

    def fill(self, rows: Sequence[Row], writers: Sequence[Writer], max_memory: int | str) -> None:
        """Write the model of each row to its writer, which was begun with its layout."""
        averaged = [self._copy_rest(row, writer) for row, writer in zip(rows, writers, strict=True)]
        blocks = self._counted(rows)
        coefficients = [[row[index] for index in blocks] for row in rows]
        combine(list(blocks.values()), coefficients, averaged, max_memory=max_memory)

    def _copy_rest(self, row: Row, writer: Writer) -> Part:
        """Copy what is not averaged; what remains to be written. Buffers are those of the newest block."""
        newest, stored = list(self._counted([row]).values())[-1], writer.layout.tensors
        copied = copied_names(newest).intersection(stored)
        _copy(newest, copied, writer)
        if self._frozen is not None:
            _copy(self._frozen, stored.keys() & self._frozen.tensors.keys(), writer)
        return Part(writer, [name for name in stored if name in newest.tensors and name not in copied])

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
