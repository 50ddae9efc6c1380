"""Every example runs, and says what its docstring promises."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from polyak import checkpoints

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def run(tmp_path):
    def run(name: str, warnings: str = "error") -> str:
        command = [sys.executable, "-W", warnings, EXAMPLES / name, tmp_path]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


def test_choose_after_training(run, tmp_path):
    said = " ".join(run("choose_after_training.py").split())
    assert "live" in said and "The holdout confirms it" in said
    assert "0.weight" in checkpoints.open(tmp_path / "chosen.safetensors").tensors


@pytest.mark.slow
def test_quantised_choice():
    command = [sys.executable, "-W", "error", EXAMPLES / "quantised_choice.py", "1"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert re.findall(r"^(\d) bits: \w+", result.stdout, re.M) == ["8", "4", "3"]
    assert float(result.stdout.split("test loss ")[1].split()[0]) < 0.7


def losses(said: str) -> dict[str, float]:
    """What follows "loss of the … weights"."""
    return {name: float(loss) for name, loss in re.findall(r"loss of the (\w+) weights +([\d.]+)", said)}


@pytest.mark.slow
def test_lightning_trainer(run, tmp_path):
    said = losses(run("lightning_trainer.py", warnings="default"))
    assert said["averaged"] < said["live"]
    assert checkpoints.open(tmp_path / "best.ckpt", key="current_model_state").tensors


@pytest.mark.slow
def test_transformers_trainer(run, tmp_path):
    said = losses(run("transformers_trainer.py"))
    assert said["averaged"] < said["live"]
    assert "transformer.wte.weight" in checkpoints.open(tmp_path / "averaged").tensors


@pytest.mark.slow
def test_the_tour_gives_what_it_shows(tmp_path):
    """Cell by cell in a kernel: the same kinds of outputs, as small as they were committed, and the file it ships."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    path = EXAMPLES / "tour.ipynb"
    shown, run = (nbformat.read(path, as_version=4) for _ in range(2))
    nbclient.NotebookClient(run, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert path.stat().st_size < 100_000
    for before, now in zip(shown.cells, run.cells, strict=True):
        assert outputs(before) == outputs(now), now.source
    assert "0.weight" in checkpoints.open(tmp_path / "chosen.safetensors").tensors


def outputs(cell):
    """What kinds of outputs a cell of a notebook has."""
    return [(o.output_type, o.get("name"), *sorted(o.get("data", ()))) for o in cell.get("outputs", ())]
