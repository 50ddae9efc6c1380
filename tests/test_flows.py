"""Through how many files a call passes: what a reader has to open to follow it."""

from importlib import import_module
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

pytestmark = pytest.mark.skipif(not BENCHMARKS.exists(), reason="benchmarks come with a checkout only")


@pytest.fixture
def flows(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return import_module("flows")


@pytest.mark.filterwarnings("ignore:.*BatchNorm statistics:UserWarning")
@pytest.mark.parametrize("name", ["Average.update", "a block's write", "average_checkpoints", "select"])
def test_a_call_passes_through_few_files(flows, name):
    files = flows.measure(name)
    assert 2 < len(files) <= flows.LIMITS[name], files


def test_files_are_seen_on_other_threads_too(flows):
    assert "trajectory/_blocks.py" in flows.measure("a block's write")
