"""Through how many files a call passes: what a reader has to open to follow it."""

from importlib import import_module

import pytest


@pytest.fixture
def flows():
    return import_module("flows")


@pytest.mark.filterwarnings("ignore:.*BatchNorm statistics:UserWarning")
@pytest.mark.parametrize("name", ["Average.update", "a block's write", "average_checkpoints", "select"])
def test_a_call_passes_through_few_files(flows, name):
    files = flows.measure(name)
    assert 2 < len(files) <= flows.LIMITS[name], files


def test_files_are_seen_on_other_threads_too(flows):
    assert "trajectory/_blocks.py" in flows.measure("a block's write")
