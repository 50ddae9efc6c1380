"""Checkpoints of every format, and what happens to files: shared by the tests of readers."""

import numpy as np
import pytest
import torch

from polyak import checkpoints
from polyak.checkpoints._base import FORMATS

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


def damaged(data, kind, place, value):
    position = int(place * len(data))
    if kind == "flip":
        return data[:position] + bytes([value]) + data[position + 1 :]
    if kind == "cut off":
        return data[:position]
    if kind == "take out":
        return data[:position] + data[position + value :]
    return data[:position] + value + data[position:]
