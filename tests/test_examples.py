"""Every example runs, and says what its docstring promises."""

import subprocess
import sys
from pathlib import Path

import pytest

from polyak import checkpoints

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def run(tmp_path):
    def run(name: str) -> str:
        command = [sys.executable, "-W", "error", EXAMPLES / name, tmp_path]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


def test_choose_after_training(run, tmp_path):
    said = " ".join(run("choose_after_training.py").split())
    assert "live" in said and "The holdout confirms it" in said
    assert "0.weight" in checkpoints.open(tmp_path / "chosen.safetensors").tensors
