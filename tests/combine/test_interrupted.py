"""Killed, terminated or out of disk: the output is absent, the old one, or complete."""

import errno
import os
import random
import resource
import subprocess
import sys
import textwrap

import pytest
import torch

import polyak
from combine_inputs import saved
from polyak.errors import CheckpointError

# One process imports torch and forks; the children average, and are killed at random moments.
KILL = """
    import os, random, signal, sys, time, torch
    from pathlib import Path
    import polyak
    torch.set_num_threads(1)
    folder, suffix, kills, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    output = folder / f"average{suffix}"
    rng = random.Random(seed)

    def average():
        polyak.average_checkpoints(folder / "run", output, overwrite=True)

    def in_child(seconds=None):
        child = os.fork()
        if child == 0:
            average()
            os._exit(0)
        if seconds is not None:
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)
        return os.waitpid(child, 0)[1] == 0

    import polyak.combine
    started = time.perf_counter()
    assert in_child()
    duration = time.perf_counter() - started
    complete = output.read_bytes()
    outcomes = set()
    for number in range(kills):
        old = None if number % 2 else b"the old file"
        output.unlink(missing_ok=True)
        if old is not None:
            output.write_bytes(old)
        in_child((number + rng.random()) / kills * 1.1 * duration)  # from the beginning to past the end
        found = output.read_bytes() if output.exists() else None
        assert found in (old, complete), "half-written"
        outcomes.add("complete" if found == complete else "as before")
    # What was killed does not stand in the way of the next.
    assert in_child() and output.read_bytes() == complete
    print(*sorted(outcomes))
"""


def kill(folder, suffix, kills, seed=0):
    (folder / "run").mkdir()
    saved(
        folder / "run", [{"w": torch.full((2_000_000,), float(value))} for value in range(4)], ".safetensors"
    )
    code = ["-W", "ignore", "-c", textwrap.dedent(KILL), str(folder), suffix, str(kills), str(seed)]
    result = subprocess.run([sys.executable, *code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_killed(tmp_path, suffix):
    assert "as" in kill(tmp_path, suffix, 8)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_killed_a_hundred_times(tmp_path, suffix):
    assert kill(tmp_path, suffix, 100, random.randrange(10**6)) == ["as", "before", "complete"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".npz", ""])
@pytest.mark.parametrize("room", [100, 4_000_000, 8_000_020])
def test_a_file_that_outgrows_the_disk(tmp_path, suffix, room):
    saved(tmp_path, [{"w": torch.ones(2_000_000)}] * 2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(CheckpointError, match="cannot write .*average"):
            polyak.average_checkpoints(tmp_path, tmp_path / f"average{suffix}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["step1.pt", "step2.pt"]


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_disk_that_fills_up_midway(tmp_path, monkeypatch, suffix):
    saved(tmp_path, [{"w": torch.ones(4_000_000)}] * 2)
    written = []

    def write(number, data, offset, pwrite=os.pwrite):
        written.append(offset)
        if len(written) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(number, data, offset)

    monkeypatch.setattr(os, "pwrite", write)
    with pytest.raises(CheckpointError, match="cannot write .*No space left on device"):
        polyak.average_checkpoints(tmp_path, tmp_path / f"average{suffix}")
    assert len(written) > 2 and names(tmp_path) == ["step1.pt", "step2.pt"]
