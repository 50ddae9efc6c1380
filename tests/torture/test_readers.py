"""Readers of files and of saved states, given what fuzzing keeps, and JSON with any value replaced.

``tests/checkpoints/test_fuzz.py`` damages the bytes of checkpoints of every format at random.
"""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from torture import readers
from torture.damage import places_of, with_value

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=5,
)
CHANGES = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), JSON), min_size=1, max_size=2)
READ_JSON = ("safetensors header", "huggingface index", "manifest", "sidecar", *readers.CONFIGS)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", readers.READERS)
def test_what_fuzzing_keeps(tmp_path: Path, name: str) -> None:
    """Each input ends in the right result or in a PolyakError, soon and in little memory; a right one is read."""
    take = readers.read(name, tmp_path)
    kept = readers.corpus(name)
    assert "plain" not in kept or take(kept["plain"])
    megabytes_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    started = time.process_time()
    for data in kept.values():
        take(data)
    assert time.process_time() - started < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - megabytes_before < 200


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", READ_JSON)
@pytest.mark.parametrize("examples", [10, pytest.param(1000, marks=pytest.mark.torture)])
def test_json(tmp_path: Path, name: str, examples: int) -> None:
    """One or two of its values are replaced by any others."""
    take = readers.read(name, tmp_path)
    tree = json.loads(readers.corpus(name)["plain"])

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(CHANGES)
    def run(changes: list[tuple[float, Any]]) -> None:
        changed = tree
        for share, value in changes:
            if places := list(places_of(changed)):
                changed = with_value(changed, places[int(share * len(places))], value)
        take(json.dumps(changed).encode())

    run()
