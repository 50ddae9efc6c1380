"""A recording that is killed at any moment loses the open block at most."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import killed_recordings


@pytest.mark.parametrize("kills", [12, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_at_random_moments(tmp_path: Path, kills: int) -> None:
    """Blocks stay whole, and those without merges equal the uninterrupted run's bit for bit."""
    script = [sys.executable, killed_recordings.__file__, str(tmp_path), str(kills)]
    ended = subprocess.run(script, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["killed"] == kills
