"""Large files that pass through the page cache, on systems that can do that, cannot, or fail."""

import errno
import os
import sys

import pytest
import torch

from polyak import checkpoints
from polyak.checkpoints import _io
from polyak.checkpoints._io import DataFile
from polyak.errors import CheckpointError

LARGE = {
    "w": torch.arange(_io.LEAST_PASSING_BYTES // 4 + 12_345, dtype=torch.float32),
    "b": torch.ones(3),
}
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such flag")


def refuse(error):
    def call(*arguments):
        if len(arguments) == 4:  # with flags
            raise error
        return genuine(*arguments)

    genuine = os.preadv
    return call


def written(path):
    checkpoints.write(path, LARGE)
    with checkpoints.open(path) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.tensors}


def same(tensors):
    return all(torch.equal(tensors[name], LARGE[name]) for name in LARGE)


def test_a_large_file_comes_back(tmp_path):
    assert same(written(tmp_path / "large.safetensors"))


@on_linux
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EOPNOTSUPP, ""),
        OSError(errno.EINVAL, ""),
        OSError(errno.ENOSYS, ""),
        NotImplementedError(),
    ],
)
def test_where_the_system_does_not_know_how(tmp_path, monkeypatch, error):
    flags = []

    def write(*arguments):
        flags.append(arguments[3])
        raise error

    monkeypatch.setattr(os, "pwritev", write)
    monkeypatch.setattr(os, "preadv", refuse(error))
    assert same(written(tmp_path / "large.safetensors")) and flags
    file = DataFile(tmp_path / "large.safetensors", passing=True)
    assert file.read(file.size - 4, 4) == (tmp_path / "large.safetensors").read_bytes()[-4:]


@on_linux
def test_a_system_that_takes_little_at_a_time(tmp_path, monkeypatch):
    def write(number, buffers, offset, flags, pwritev=os.pwritev):
        return pwritev(number, [buffers[0][:300_001]], offset, flags & ~_io._RWF_DONTCACHE)

    monkeypatch.setattr(os, "pwritev", write)
    assert same(written(tmp_path / "large.safetensors"))


@on_linux
def test_a_full_disk(tmp_path, monkeypatch):
    def write(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwritev", write)
    with pytest.raises(CheckpointError, match="cannot write .*No space left on device"):
        written(tmp_path / "large.safetensors")
    assert not list(tmp_path.iterdir())


@on_linux
def test_a_disk_that_fails_to_read(tmp_path, monkeypatch):
    checkpoints.write(tmp_path / "large.safetensors", LARGE)
    file = DataFile(tmp_path / "large.safetensors", passing=True)
    monkeypatch.setattr(os, "preadv", refuse(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(CheckpointError, match="cannot read .*Input/output error"):
        file.read(0, 8)
