"""NumPy archives: NumPy and ml_dtypes on both sides, compressed members, and zips that lie."""

import io
import random
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
import torch

from polyak import checkpoints
from polyak.errors import CheckpointError


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def write_zip(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members:
            archive.writestr(name, data)


def test_numpy_reads_it(tmp_path):
    tensors = {"w": torch.randn(3, 5), "b": torch.tensor([True, False]), "bf16": torch.randn(4).bfloat16()}
    checkpoints.write(tmp_path / "x.npz", tensors | {"tied": tensors["w"]})
    with np.load(tmp_path / "x.npz") as peer:
        assert np.array_equal(peer["w"], tensors["w"].numpy())
        assert np.array_equal(peer["tied"], peer["w"])
        assert np.array_equal(peer["b"], tensors["b"].numpy())
        bf16 = peer["bf16"].view(ml_dtypes.bfloat16).astype(np.float32)
        assert np.array_equal(bf16, tensors["bf16"].float().numpy())


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_it_reads_numpy(tmp_path, save):
    arrays = {
        "c": np.random.default_rng(0).normal(size=(30, 40)),
        "scalar": np.array(3, np.int16),
        "empty": np.zeros((0, 3), np.float32),
        "bf16": np.arange(9).astype(ml_dtypes.bfloat16),
        "e5m2": np.arange(9).astype(ml_dtypes.float8_e5m2),
        "names": np.array(["a", "b"]),
        "objects": np.array([{}], dtype=object),
    }
    save(tmp_path / "x.npz", **arrays)
    with checkpoints.open(tmp_path / "x.npz") as opened:
        assert opened.ignored == ("names", "objects")
        assert opened.tensors["bf16"].dtype == torch.bfloat16
        assert (opened.location("c") is None) == (save is np.savez_compressed)
        for name in opened.tensors:
            read = opened.read(name)
            assert read.shape == arrays[name].shape
            assert torch.equal(read.double(), torch.from_numpy(arrays[name].astype(np.float64)))


def test_column_order(tmp_path):
    array = np.asfortranarray(np.arange(12.0).reshape(3, 4))
    np.savez(tmp_path / "x.npz", w=array)
    with checkpoints.open(tmp_path / "x.npz") as opened:
        assert torch.equal(opened.read("w"), torch.from_numpy(np.ascontiguousarray(array)))
        assert opened.location("w") is None
    np.savez_compressed(tmp_path / "y.npz", w=array)
    with pytest.raises(CheckpointError, match=r"'w\.npy': it is compressed in column order"):
        checkpoints.open(tmp_path / "y.npz")


def test_compressed_slices_in_any_order(tmp_path):
    array = np.arange(1000)
    np.savez_compressed(tmp_path / "x.npz", w=array)
    order = list(range(0, 1000, 50))
    random.Random(0).shuffle(order)
    with checkpoints.open(tmp_path / "x.npz") as opened:
        for start in order:
            assert opened.read_slice("w", start, start + 50).tolist() == array[start : start + 50].tolist()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.arange(3, dtype=">f4"), "no numbers like '>f4'; save it little-endian"),
        (np.zeros(3, np.longdouble), "no numbers like '<f16'"),
        (np.zeros(3).astype(ml_dtypes.float8_e4m3fn), "8-bit floats may be of several kinds"),
    ],
)
def test_numbers_that_torch_lacks(tmp_path, array, message):
    np.savez(tmp_path / "x.npz", w=array)
    with pytest.raises(CheckpointError, match=message):
        checkpoints.open(tmp_path / "x.npz")


GOOD = npy(np.arange(4.0))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("w.npy", b"")], "no .npy array"),
        ([("w.npy", b"\x93NUMPX" + GOOD[6:])], "no .npy array"),
        ([("w.npy", GOOD[:8] + b"\xff\xff" + GOOD[10:])], "header is longer than it is"),
        ([("w.npy", GOOD[:-1])], r"shape \[4\] needs 32 bytes and 31 are there"),
        ([("w.npy", GOOD + b"x")], r"shape \[4\] needs 32 bytes and 33 are there"),
        ([("w.npy", GOOD.replace(b"(4,)", b"-4  "))], "header is damaged"),
        ([("w.npy", GOOD.replace(b"(4,)", b"(-4)"))], "header is damaged"),
        ([("w.npy", GOOD.replace(b"False", b"1    "))], "header is damaged"),
        ([("w.npy", GOOD.replace(b"{'descr'", b"('descr'"))], "header is damaged"),
        ([("w.npy", GOOD), ("polyak.json", b"{")], r"polyak\.json is damaged"),
        ([("w.npy", GOOD), ("polyak.json", b'{"ties": {"v": 3}}')], r"polyak\.json is damaged"),
        ([("readme.txt", b"hello")], r"no weights in it \(it holds 'readme\.txt'\)"),
    ],
)
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_damaged_members(tmp_path, members, message, compression):
    write_zip(tmp_path / "x.npz", members, compression)
    with pytest.raises(CheckpointError, match=message):
        checkpoints.open(tmp_path / "x.npz")


def test_the_same_member_twice(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate name"):
        write_zip(tmp_path / "x.npz", [("w.npy", GOOD), ("w.npy", GOOD)])
    with pytest.raises(CheckpointError, match=r"holds 'w\.npy' twice"):
        checkpoints.open(tmp_path / "x.npz")


def test_other_compressions_are_refused(tmp_path):
    write_zip(tmp_path / "x.npz", [("w.npy", GOOD)], zipfile.ZIP_LZMA)
    with pytest.raises(CheckpointError, match="compressed in a way that is not read"):
        checkpoints.open(tmp_path / "x.npz")


def lying_zip(path, claimed_nbytes):
    """One deflated member whose directory claims another size than it has."""
    write_zip(path, [("w.npy", GOOD)], zipfile.ZIP_DEFLATED)
    data = bytearray(path.read_bytes())
    central = data.rindex(b"PK\x01\x02")
    data[central + 24 : central + 28] = struct.pack("<I", claimed_nbytes)
    path.write_bytes(data)


def test_bombs_are_refused(tmp_path):
    lying_zip(tmp_path / "x.npz", (1 << 32) - 2)
    with pytest.raises(CheckpointError, match=r"zip bomb: 'w\.npy' claims 4,294,967,294 bytes from"):
        checkpoints.open(tmp_path / "x.npz")


@pytest.mark.parametrize("difference", [-1, 1])
def test_sizes_that_lie_a_little_are_refused(tmp_path, difference):
    lying_zip(tmp_path / "x.npz", len(GOOD) + difference)
    with pytest.raises(CheckpointError, match="bytes and .* are there|Bad CRC-32"):
        checkpoints.open(tmp_path / "x.npz")


def test_more_data_than_declared_is_noticed(tmp_path):
    header = npy(np.zeros(8))[:-64]
    write_zip(tmp_path / "x.npz", [("w.npy", header + bytes(640))], zipfile.ZIP_DEFLATED)
    data = bytearray((tmp_path / "x.npz").read_bytes())
    central = data.rindex(b"PK\x01\x02")
    data[central + 24 : central + 28] = struct.pack("<I", len(header) + 64)
    (tmp_path / "x.npz").write_bytes(data)
    with pytest.raises(CheckpointError, match="Bad CRC-32"), checkpoints.open(tmp_path / "x.npz") as opened:
        opened.read("w")


def test_overlapping_members_are_refused(tmp_path):
    write_zip(tmp_path / "x.npz", [("a.npy", GOOD), ("b.npy", GOOD)])
    data = bytearray((tmp_path / "x.npz").read_bytes())
    central = data.index(b"PK\x01\x02")
    data[central + 46 : central + 47] = b"b"
    second = data.index(b"PK\x01\x02", central + 4)
    data[second + 46 : second + 47] = b"a"
    data[second + 42 : second + 46] = bytes(4)
    (tmp_path / "x.npz").write_bytes(data)
    with pytest.raises(CheckpointError, match="overlaps another"):
        checkpoints.open(tmp_path / "x.npz")
