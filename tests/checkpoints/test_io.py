"""Outputs appear whole or not at all: full disks, failures, other people's folders, kill -9."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from polyak import checkpoints
from polyak.checkpoints import Layout, TensorInfo, _io
from polyak.checkpoints._base import FORMATS
from polyak.checkpoints._io import DataFile
from polyak.errors import CheckpointError, OutputExistsError


def run(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


FULL_DISK = """
    import resource, signal, sys, torch
    from polyak import checkpoints
    from polyak.checkpoints._base import FORMATS
    from polyak.errors import CheckpointError

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
    for format in FORMATS:
        try:
            checkpoints.write(sys.argv[1], {"w": torch.ones(50_000)}, format=format)
        except CheckpointError as error:
            print(format, error)
"""


@pytest.mark.parametrize("limit_bytes", [100_000, 200_060])
def test_a_full_disk_leaves_nothing(tmp_path, limit_bytes):
    # A limit on file sizes fails just where a full disk would. The larger one lets the 200,000 bytes of values
    # through, and stops the formats' own writers.
    output, _ = run(FULL_DISK, tmp_path / "x", limit_bytes).communicate(timeout=60)
    lines = output.splitlines()
    assert len(lines) == len(FORMATS)
    assert all(f"cannot write {tmp_path / 'x'}" in line for line in lines)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_too_small_is_refused_at_once(tmp_path):
    layout = Layout({"w": TensorInfo((1 << 50,), torch.float32)})
    with pytest.raises(CheckpointError, match="No space left|bytes are needed and the disk has less"):
        checkpoints.create(tmp_path / "x.safetensors", layout)
    assert list(tmp_path.iterdir()) == []


def test_there_must_be_a_folder(tmp_path):
    with pytest.raises(CheckpointError, match="there is no folder .*make it first"):
        checkpoints.write(tmp_path / "absent" / "x.pt", {"w": torch.ones(1)})


@pytest.mark.parametrize("format", ["safetensors", "huggingface", "dcp"])
def test_folders_with_other_files_are_not_replaced(tmp_path, format):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(OutputExistsError, match=r"also holds 'config\.json', which would be lost"):
        checkpoints.write(tmp_path / "model", {"w": torch.ones(1)}, format=format, overwrite=True)
    assert (tmp_path / "model" / "config.json").read_text() == "{}"
    assert [item.name for item in tmp_path.iterdir()] == ["model"]


def test_links_to_folders_are_not_replaced(tmp_path):
    checkpoints.write(tmp_path / "model", {"w": torch.zeros(1)})
    (tmp_path / "latest").symlink_to(tmp_path / "model")
    with pytest.raises(OutputExistsError, match="is a link to a folder: name the folder itself"):
        checkpoints.write(tmp_path / "latest", {"w": torch.ones(1)}, overwrite=True)


def test_an_old_folder_is_put_back_if_the_new_one_cannot_be_named(tmp_path, monkeypatch):
    path = tmp_path / "model"
    checkpoints.write(path, {"w": torch.zeros(1)})
    rename = os.rename

    def fail_on_new(source, target):
        if str(source).endswith(".tmp"):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_on_new)
    with pytest.raises(CheckpointError, match="Input/output error; nothing was changed there"):
        checkpoints.write(path, {"w": torch.ones(1)}, overwrite=True)
    assert list(tmp_path.iterdir()) == [path]
    with checkpoints.open(path) as opened:
        assert opened.read("w").item() == 0


def test_an_output_that_appears_meanwhile_is_kept(tmp_path):
    path = tmp_path / "x.safetensors"
    layout = Layout({"w": TensorInfo((1,), torch.float32)})
    with pytest.raises(OutputExistsError), checkpoints.create(path, layout):
        path.write_text("somebody else's")
    assert path.read_text() == "somebody else's"
    assert list(tmp_path.iterdir()) == [path]


def test_files_have_ordinary_permissions(tmp_path):
    previous = os.umask(0o022)
    try:
        checkpoints.write(tmp_path / "x.safetensors", {"w": torch.ones(1)})
        checkpoints.write(tmp_path / "x.pt", {"w": torch.ones(1)})
    finally:
        os.umask(previous)
    assert {oct(item.stat().st_mode & 0o777) for item in tmp_path.iterdir()} == {"0o644"}


WRITE_FOREVER = """
    import sys, torch
    from polyak import checkpoints
    print("ready", flush=True)
    for number in range(1, 1_000_000):
        tensors = {name: torch.full((20_000,), float(number)) for name in "abc"}
        checkpoints.write(sys.argv[1], tensors, format=sys.argv[2], overwrite=True)
"""


@pytest.mark.parametrize(("format", "delay_s"), [("safetensors", 0.11), ("pt", 0.07), ("huggingface", 0.13)])
def test_kill_9_leaves_a_whole_output_or_none(tmp_path, format, delay_s):
    path = tmp_path / "out"
    with run(WRITE_FOREVER, path, format) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(delay_s)
        process.send_signal(signal.SIGKILL)
    if path.exists():
        with checkpoints.open(path) as opened:
            values = {value for name in "abc" for value in opened.read(name).unique().tolist()}
        assert len(values) == 1


def test_a_checkpoint_owns_its_open_files(tmp_path):
    for name, value in (("a", 1.0), ("b", 2.0)):
        checkpoints.write(tmp_path / f"{name}.safetensors", {"w": torch.tensor([value])})
    first, same, other = (checkpoints.open(tmp_path / f"{name}.safetensors") for name in "aab")
    (tmp_path / "a.safetensors").unlink()
    other.close()
    same.close()
    assert first.read("w").item() == 1 and other.read("w").item() == 2
    first.close()
    with pytest.raises(CheckpointError, match=r"cannot read .*a\.safetensors: No such file"):
        first.read("w")


def test_files_that_nobody_holds_are_closed(tmp_path):
    path = tmp_path / "a.safetensors"
    checkpoints.write(path, {"w": torch.ones(1)})
    opened = checkpoints.open(path)
    before = len(_io._open_files)
    del opened
    assert len(_io._open_files) == before - 1


PLAIN_SYSTEM = """
    import os, sys

    # What Windows lacks.
    for name in ("pread", "preadv", "pwrite", "pwritev", "posix_fadvise", "sync_file_range", "sched_getaffinity"):
        if hasattr(os, name):
            delattr(os, name)
    sys.modules["fcntl"] = sys.modules["resource"] = None

    import torch
    import polyak
    from polyak import checkpoints
    from polyak.checkpoints._base import FORMATS

    values = torch.arange(float(sys.argv[2]))
    for format in FORMATS:
        path = f"{sys.argv[1]}/{format}"
        checkpoints.write(path, {"w": values}, format=format)
        with checkpoints.open(path) as opened:
            assert torch.equal(opened.read_slice("w", 3, 70), values[3:70]), format
            assert torch.equal(opened.read("w"), values), format
    print("done")
"""


@pytest.mark.parametrize("numel", [100, _io.LEAST_UNCACHED_BYTES // 4])
def test_a_system_that_reads_and_writes_at_one_position(tmp_path, numel):
    output, _ = run(PLAIN_SYSTEM, tmp_path, numel).communicate(timeout=120)
    assert output == "done\n"


# Large files that pass through the page cache, on systems that can do that, cannot, or fail.

LARGE = {
    "w": torch.arange(_io.LEAST_UNCACHED_BYTES // 4 + 12_345, dtype=torch.float32),
    "b": torch.ones(3),
}
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such flag")


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
    assert same(written(tmp_path / "large.safetensors")) and flags


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
    checkpoints.write(tmp_path / "small.safetensors", {"w": torch.ones(3)})
    file = DataFile(tmp_path / "small.safetensors")

    def fail(*arguments):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(CheckpointError, match="cannot read .*Input/output error"):
        file.read(0, 8)
