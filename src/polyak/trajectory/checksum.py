"""The checksum of a block's file, taken from its bytes as they are written or read."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from polyak.checkpoints.regions import DataFile

__all__ = ["CheckedFile", "Checksum"]

_CHUNK_BYTES = 1 << 20
_WORD_BYTES = 8


class Checksum:
    """CRC-32 of the sums of a file's 64-bit words, one sum for each MiB: damage shows, at the speed of memory.

    Pieces may come in any order, each byte once. Words that changed places within a MiB would not show; a disk
    does no such thing.

    >>> whole, parts = Checksum(), Checksum()
    >>> whole.add(0, memoryview(b"block means"))
    >>> parts.add(5, memoryview(b" means"))
    >>> parts.add(0, memoryview(b"block"))
    >>> parts.value == whole.value
    True
    """

    def __init__(self) -> None:
        self._sums: dict[int, int] = {}

    def add(self, offset: int, data: memoryview) -> None:
        """Take in the bytes that lie at ``offset`` of the file."""
        done = 0
        while done < len(data):
            chunk, place = divmod(offset + done, _CHUNK_BYTES)
            piece = data[done : done + _CHUNK_BYTES - place]
            self._sums[chunk] = (self._sums.get(chunk, 0) + _sum_of_words(piece, place)) % 2**64
            done += len(piece)

    @classmethod
    def of_parts(cls, parts: Iterable[Checksum]) -> Checksum:
        """What several took in of one file together, each byte once."""
        whole = cls()
        for part in parts:
            for chunk, total in part._sums.items():
                whole._sums[chunk] = (whole._sums.get(chunk, 0) + total) % 2**64
        return whole

    @property
    def value(self) -> int:
        """The checksum of what was taken in."""
        sums = np.zeros(max(self._sums, default=-1) + 1, np.uint64)
        sums[list(self._sums)] = list(self._sums.values())
        return zlib.crc32(sums.tobytes())


def _sum_of_words(data: memoryview, place: int) -> int:
    """The sum of the 64-bit words that ``data`` is part of, zero elsewhere; its first byte lies at ``place``."""
    head = min(-place % _WORD_BYTES, len(data))
    tail = head + (len(data) - head) // _WORD_BYTES * _WORD_BYTES
    total = int(np.frombuffer(data[head:tail], np.uint64).sum())
    total += int.from_bytes(data[:head], "little") << 8 * (place % _WORD_BYTES)
    return total + int.from_bytes(data[tail:], "little")


class CheckedFile(DataFile):
    """A file that is read once, by whoever opened it, and whose checksum is known in the end.

    Raises as :class:`DataFile` does. One thread at a time.
    """

    def __init__(self, path: Path, *, passing: bool = False) -> None:
        super().__init__(path, passing=passing)
        self._checksum = Checksum()
        self._unread = [(0, self.size)]

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the bytes at ``offset``, and note those that are read for the first time."""
        super().read_into(offset, buffer)
        unread = []
        for start, stop in self._unread:
            first, last = max(start, offset), min(stop, offset + len(buffer))
            if first < last:
                self._checksum.add(first, buffer[first - offset : last - offset])
                unread += [(start, first), (last, stop)]
            else:
                unread.append((start, stop))
        self._unread = [(start, stop) for start, stop in unread if start < stop]

    def checksum(self) -> int:
        """The checksum of the whole file; what was not read yet is read now."""
        buffer = memoryview(bytearray(_CHUNK_BYTES))
        while self._unread:
            start, stop = self._unread[0]
            self.read_into(start, buffer[: min(_CHUNK_BYTES, stop - start)])
        return self._checksum.value
