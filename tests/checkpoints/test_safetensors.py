"""Safetensors: the peer reads what is written, and every lie in a header is refused."""

import json
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from polyak import checkpoints
from polyak.errors import CheckpointError, OptionError, StructureError


def header(entries):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


def entry(begin, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_the_peer_reads_it(tmp_path):
    tensors = {"b": torch.arange(3).to(torch.bool), "w": torch.randn(3, 5).bfloat16(), "e": torch.zeros(0, 2)}
    path = tmp_path / "x.safetensors"
    checkpoints.write(path, tensors, metadata={"note": "hello"})
    loaded = load_file(path)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    with safe_open(path, "pt") as peer:
        assert peer.metadata() == {"format": "pt", "note": "hello"}


def test_it_reads_the_peer(tmp_path):
    tensors = {"b": torch.tensor([True]), "w": torch.randn(3, 5).half()}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"global_step": "30"})
    with checkpoints.open(tmp_path / "x.safetensors") as opened:
        assert opened.step == 30
        assert all(torch.equal(opened.read(name), tensor) for name, tensor in tensors.items())


def test_values_are_aligned(tmp_path):
    tensors = {"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(3, dtype=torch.float64)}
    checkpoints.write(tmp_path / "x.safetensors", tensors)
    with checkpoints.open(tmp_path / "x.safetensors") as opened:
        location = opened.location("b")
        assert location is not None and location.offset % 8 == 0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"\x05\0\0", "truncated"),
        (struct.pack("<Q", 1 << 40) + b"{}", "claims a header of 1,099,511,627,776 bytes in a file of 10"),
        (struct.pack("<Q", 3) + b"{}", "claims a header of 3 bytes"),
        (header(b"not json"), "damaged safetensors header"),
        (header(b"[1]"), "not a JSON object"),
        (header(b"[" * 100_000), "damaged safetensors header"),
        (header(b"\xff\xff"), "damaged safetensors header"),
        (header(b'{"w": 1, "w": 2}'), "'w' stands there twice"),
        (header({"__metadata__": {"a": 1}}), "metadata must be text"),
        (header({"w": 3}), "must have dtype, shape and data_offsets"),
        (header({"w": entry(0, 8, dtype="F4")}) + bytes(8), "dtype 'F4' is not one that torch can hold"),
        (header({"w": entry(0, 8, dtype=["F32"])}) + bytes(8), "is not one that torch can hold"),
        (header({"w": entry(0, 8, shape=(-2,))}) + bytes(8), r"shape \[-2\] is impossible"),
        (header({"w": entry(0, 8, shape=(2.0,))}) + bytes(8), "is impossible"),
        (header({"w": entry(0, 8, shape=(1 << 62, 1 << 62))}) + bytes(8), "is impossible"),
        (header({"w": entry(-8, 0)}) + bytes(8), "are impossible"),
        (header({"w": entry(0, 4)}) + bytes(4), "needs 8 bytes and has 4"),
        (header({"w": entry(8, 0)}) + bytes(8), "needs 8 bytes and has -8"),
        (header({"w": entry(0, 8)}) + bytes(7), "truncated: its tensors take 8 bytes and 7 are there"),
        (header({"w": entry(0, 8)}) + bytes(9), "corrupt: its tensors take 8 bytes and 9 are there"),
        (header({"w": entry(0, 8), "v": entry(4, 12)}) + bytes(12), "'v' overlaps the one before"),
        (header({"w": entry(0, 8), "v": entry(12, 20)}) + bytes(20), "'v' leaves a hole before it"),
        (header({"w": entry(8, 16)}) + bytes(16), "'w' leaves a hole before it"),
        (header({}), "holds no weights"),
    ],
)
def test_lies_are_refused(tmp_path, data, message):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoints.open(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_what_it_cannot_hold_is_refused(tmp_path):
    with pytest.raises(StructureError, match=r"cannot hold torch\.complex128; write a \.pt file instead"):
        checkpoints.write(tmp_path / "x.safetensors", {"w": torch.zeros(2, dtype=torch.complex128)})
    with pytest.raises(StructureError, match="would read as tied tensors"):
        checkpoints.write(tmp_path / "x.safetensors", {"w": torch.zeros(2)}, metadata={"best": "w"})
    with pytest.raises(OptionError, match="metadata must map text to text"):
        checkpoints.write(tmp_path / "x.safetensors", {"w": torch.zeros(2)}, metadata={"step": 3})  # type: ignore[dict-item]
    with pytest.raises(StructureError, match="'v' cannot be tied to 'u'"):
        checkpoints.write(tmp_path / "x.safetensors", {"w": torch.zeros(2)}, ties={"v": "u"})
    with pytest.raises(StructureError, match="sparse or on the meta device"):
        checkpoints.write(tmp_path / "x.safetensors", {"w": torch.zeros(2, device="meta")})
    assert list(tmp_path.iterdir()) == []


SCALES = torch.tensor([0.5, 1, 4])


def test_scales_of_mx_formats(tmp_path):
    path = tmp_path / "x.safetensors"
    exponents = bytes([126, 127, 129])  # with a bias of 127
    path.write_bytes(header({"scale": entry(0, 3, (3,), "F8_E8M0")}) + exponents)
    with checkpoints.open(path) as opened:
        assert opened.tensors["scale"].dtype == torch.float8_e8m0fnu
        assert torch.equal(opened.read("scale").float(), SCALES)


def test_the_peer_reads_and_writes_such_scales(tmp_path):
    pytest.importorskip("safetensors", "0.6.1")  # the first that has them
    scales = SCALES.to(torch.float8_e8m0fnu)
    save_file({"scale": scales}, tmp_path / "x.safetensors")
    with checkpoints.open(tmp_path / "x.safetensors") as opened:
        assert torch.equal(opened.read("scale").float(), SCALES)
    checkpoints.write(tmp_path / "ours.safetensors", {"scale": scales})
    assert torch.equal(load_file(tmp_path / "ours.safetensors")["scale"].float(), SCALES)


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F6_E3M2"])
def test_dtypes_that_torch_lacks_are_no_damage(tmp_path, dtype):
    path = tmp_path / "x.safetensors"
    path.write_bytes(header({"w": entry(0, 3, (4,), dtype)}) + bytes(3))
    with pytest.raises(CheckpointError, match=f"'w': dtype '{dtype}' is not one .* dequantise it") as caught:
        checkpoints.open(path)
    assert "damaged" not in str(caught.value) and "corrupt" not in str(caught.value)
