"""Checksums of pieces in any order, and of files read in any order."""

import itertools
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyak.trajectory._blocks import CheckedFile, Checksum

MIB = 1 << 20


def plain(data):
    """The definition: CRC-32 of one sum of 64-bit words for each MiB."""
    padded = np.frombuffer(data + bytes(-len(data) % 8), np.uint64)
    sums = [padded[start : start + MIB // 8].sum() for start in range(0, len(padded), MIB // 8)]
    return zlib.crc32(np.array(sums, np.uint64).tobytes())


def noise(nbytes):
    return np.random.default_rng(0).integers(0, 256, nbytes, np.uint8).tobytes()


@given(cuts=st.lists(st.integers(0, 3 * MIB + 5), max_size=12), order=st.randoms(use_true_random=False))
def test_pieces_in_any_order(cuts, order):
    data = noise(3 * MIB + 5)
    edges = [0, *sorted(cuts), len(data)]
    pieces = list(itertools.pairwise(edges))
    order.shuffle(pieces)
    checksum = Checksum()
    for start, stop in pieces:
        checksum.add(start, memoryview(data)[start:stop])
    assert checksum.value == plain(data)


@given(reads=st.lists(st.tuples(st.integers(0, 2 * MIB), st.integers(0, MIB)), max_size=8))
def test_a_file_read_in_any_order_and_in_part(tmp_path_factory, reads):
    data = noise(2 * MIB + 3)
    path = tmp_path_factory.getbasetemp() / "block"
    path.write_bytes(data)
    file = CheckedFile(path)
    for start, nbytes in reads:
        stop = min(start + nbytes, len(data))
        assert file.read(start, stop - start) == data[start:stop]
    assert file.checksum() == plain(data)


@pytest.mark.parametrize("place", [0, 7, MIB - 1, MIB, 2 * MIB + 2])
def test_one_bit_shows(tmp_path, place):
    data = bytearray(noise(2 * MIB + 3))
    data[place] ^= 1
    (tmp_path / "block").write_bytes(data)
    assert CheckedFile(tmp_path / "block").checksum() != plain(noise(2 * MIB + 3))
