"""Damaged files of every format are read as what they became, or refused: no other end."""

import resource
import shutil
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from damaged_files import WRITERS, damaged
from polyak import checkpoints
from polyak.errors import PolyakError

PLACES = st.floats(0, 1, exclude_max=True)
DAMAGE = st.one_of(
    st.tuples(st.just("flip"), PLACES, st.integers(0, 255)),
    st.tuples(st.just("cut off"), PLACES, st.just(0)),
    st.tuples(st.just("take out"), PLACES, st.integers(1, 9)),
    st.tuples(st.just("put in"), PLACES, st.binary(min_size=1, max_size=9)),
)


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
