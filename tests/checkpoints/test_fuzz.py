"""Damaged files of every format are read as what they became, or refused: no other end."""

import resource
import shutil
import time

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polyak import checkpoints
from polyak.checkpoints._base import FORMATS
from polyak.errors import PolyakError

TENSORS = {"a.w": torch.arange(6.0).view(2, 3), "b": torch.arange(5).bfloat16(), "n": torch.tensor(3)}
NESTED = {
    "state_dict": TENSORS | {"t": torch.arange(6.0).view(2, 3).t()},
    "step": 3,
    "other": {"x": [1, "s"]},
}


def write_shards(path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("polyak.checkpoints._huggingface.MAX_SHARD_BYTES", 20)
        checkpoints.write(path, TENSORS, format="huggingface")


def write_compressed(path):
    with path.open("wb") as stream:
        np.savez_compressed(stream, a=np.arange(60).reshape(6, 10))


def writer(format):
    return lambda path: checkpoints.write(path, TENSORS, format=format, metadata={"note": "x"})


WRITERS = {format: writer(format) for format in FORMATS} | {
    "nested pt": lambda path: torch.save(NESTED, path),
    "legacy pt": lambda path: torch.save(NESTED, path, _use_new_zipfile_serialization=False),
    "compressed npz": write_compressed,
    "huggingface shards": write_shards,
}
PLACES = st.floats(0, 1, exclude_max=True)
DAMAGE = st.one_of(
    st.tuples(st.just("flip"), PLACES, st.integers(0, 255)),
    st.tuples(st.just("cut off"), PLACES, st.just(0)),
    st.tuples(st.just("take out"), PLACES, st.integers(1, 9)),
    st.tuples(st.just("put in"), PLACES, st.binary(min_size=1, max_size=9)),
)


def damaged(data, kind, place, value):
    position = int(place * len(data))
    if kind == "flip":
        return data[:position] + bytes([value]) + data[position + 1 :]
    if kind == "cut off":
        return data[:position]
    if kind == "take out":
        return data[:position] + data[position + value :]
    return data[:position] + value + data[position:]


@pytest.mark.parametrize("kind", WRITERS)
def test_damage(tmp_path, kind):
    path, copy = tmp_path / "good", tmp_path / "bad"
    WRITERS[kind](path)
    names = sorted(file.name for file in path.iterdir()) if path.is_dir() else [""]
    megabytes_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    @settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(st.sampled_from(names), st.lists(DAMAGE, min_size=1, max_size=3))
    def check(name, damages):
        if path.is_dir():
            shutil.copytree(path, copy, dirs_exist_ok=True)
        data = (path / name).read_bytes()
        for damage in damages:
            data = damaged(data, *damage)
        (copy / name).write_bytes(data)
        started = time.monotonic()
        try:
            with checkpoints.open(copy) as opened:
                for tensor in opened.tensors:
                    opened.read(tensor)
        except PolyakError as error:
            assert str(copy) in str(error)
        assert time.monotonic() - started < 5

    check()
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - megabytes_before
    assert megabytes < 200
