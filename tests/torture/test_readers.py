"""Readers of JSON that steers other files, fuzzed: what they read is right, or refused by name.

``tests/checkpoints/test_fuzz.py`` does the same to the bytes of checkpoints of every format.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import polyak
from damaged_files import TENSORS, WRITERS
from polyak import checkpoints
from polyak.errors import PolyakError
from torture.calls import Setting
from torture.damage import places_of, read_all, same_values, with_value, write_header

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=5,
)
SHARES = st.floats(0, 1, exclude_max=True)
EXAMPLES = [10, pytest.param(1000, marks=pytest.mark.torture)]


def fuzzed(examples: int, tree: Any, check) -> None:
    """Give ``check`` the tree with one or two values replaced, so many times."""

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(st.lists(st.tuples(SHARES, JSON), min_size=1, max_size=2))
    def run(changes: list[tuple[float, Any]]) -> None:
        changed = tree
        for share, value in changes:
            places = list(places_of(changed))
            if places:
                changed = with_value(changed, places[int(share * len(places))], value)
        try:
            check(changed)
        except PolyakError as error:
            assert str(error)

    run()


@pytest.mark.parametrize("examples", EXAMPLES)
def test_the_header_of_safetensors(tmp_path: Path, examples: int) -> None:
    path = tmp_path / "a.safetensors"
    checkpoints.write(path, TENSORS, metadata={"step": "3"})
    data = path.read_bytes()

    def check(header: Any) -> None:
        path.write_bytes(data)
        write_header(path, header)
        for tensor in read_all(path).values():
            assert isinstance(tensor, torch.Tensor)

    fuzzed(examples, json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]), check)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_the_index_of_huggingface(tmp_path: Path, examples: int) -> None:
    path = tmp_path / "hf"
    WRITERS["huggingface shards"](path)
    wanted = read_all(path)
    (index,) = path.glob("*.index.json")

    def check(tree: Any) -> None:
        index.write_text(json.dumps(tree))
        for name, tensor in read_all(path).items():
            assert same_values({name: tensor}, {name: wanted[name]})

    fuzzed(examples, json.loads(index.read_text()), check)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_the_manifest_of_a_recording(tmp_path: Path, examples: int) -> None:
    setting = Setting(tmp_path)
    setting.close()
    manifest = tmp_path / "run" / "manifest.json"

    def check(tree: Any) -> None:
        manifest.write_text(json.dumps(tree))
        run = polyak.Trajectory(tmp_path / "run")
        found = run.usable.average("uniform")
        for name in setting.samples[0]:
            assert found[name].isfinite().all()

    fuzzed(examples, json.loads(manifest.read_text()), check)
