"""Every tool's run of checkpoints: the right files, the right weights and the right steps, by every command."""

from __future__ import annotations

import json
import sys
import types
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from glob import glob
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import dialect_makers  # noqa: F401 - all make their dialects known
import dialect_texts  # noqa: F401
import dialect_tools  # noqa: F401
from dialects import MAKERS, Expectation
from polyak import Trajectory
from polyak.cli import main
from polyak.errors import PolyakError


@dataclass(frozen=True)
class Run:
    """A run on disk, with what is right for it."""

    folder: Path
    expected: Expectation

    @property
    def path(self) -> Path:
        return self.folder / self.expected.folder

    @property
    def inputs(self) -> list[str]:
        return [str(self.folder / text) for text in self.expected.inputs] or [str(self.path)]

    def paths(self) -> list[str]:
        return [path for text in self.inputs for path in sorted(glob(text))]

    def refuses(self, message: str) -> bool:
        return any(word in message for word in self.expected.words)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Each tool's run, made once."""
    made: dict[str, Run] = {}

    def run(name: str) -> Run:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = Run(folder, MAKERS[name](folder))
        return made[name]

    return run


@pytest.fixture(params=MAKERS)
def run(request, runs):
    return runs(request.param)


def average(run: Run, output: Path, capsys, *options: str) -> str | None:
    """What ``polyak average`` prints; None where it is refused, rightly."""
    before = {path: path.lstat().st_mtime_ns for path in run.folder.rglob("*")}
    code = main(["average", *run.inputs, "-o", str(output), *options])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert {path: path.lstat().st_mtime_ns for path in run.folder.rglob("*")} == before
    if code == 2 and run.expected.words:
        assert run.refuses(captured.err), captured.err
        assert not output.exists()
        return None
    assert (code, run.expected.kind) != (0, "refused"), captured.out
    assert code == 0, captured.err
    return captured.out


def assert_holds(output: Path, expected: Mapping[str, float]) -> None:
    """Exactly the tensors that are expected, to the precision of their dtypes."""
    tensors = load_file(output)
    assert tensors.keys() == expected.keys()
    torch.testing.assert_close(
        tensors, {name: torch.full_like(tensor, expected[name]) for name, tensor in tensors.items()}
    )


def update_entries(output: Path) -> Tensor:
    """The update that an adapter stands for: its alpha lies in the tensors, or in the configuration beside them."""
    file = output if output.is_file() else next(output.glob("*.safetensors"))
    tensors = {name: tensor.double() for name, tensor in load_file(file).items()}
    (down,) = (tensor for name, tensor in tensors.items() if "lora_down" in name or "lora_A" in name)
    (up,) = (tensor for name, tensor in tensors.items() if "lora_up" in name or "lora_B" in name)
    alphas = [tensor.item() for name, tensor in tensors.items() if name.endswith("alpha")]
    alpha = alphas[0] if alphas else json.loads((output / "adapter_config.json").read_text())["lora_alpha"]
    return up @ down * alpha / down.shape[0]


def test_the_mean_is_of_the_right_weights(run, tmp_path, capsys):
    adapter = run.expected.update is not None
    output = tmp_path / (
        "out" if adapter and any(run.path.rglob("adapter_config.json")) else "out.safetensors"
    )
    printed = average(run, output, capsys)
    if printed is None:
        return
    if adapter:
        entries = update_entries(output)
        torch.testing.assert_close(entries, torch.full_like(entries, run.expected.update), rtol=1e-5, atol=0)
    else:
        assert_holds(output, run.expected.mean())
    assert not run.expected.left_out or any(name in printed for name in run.expected.left_out), printed


def test_the_newest_by_step_is_taken(run, tmp_path, capsys):
    if run.expected.steps is None or run.expected.update is not None:
        pytest.skip("no steps, or an adapter")
    output = tmp_path / "newest.safetensors"
    if average(run, output, capsys, "--profile", "tail:steps=1") is not None:
        assert_holds(output, run.expected.newest)


def test_a_key_takes_the_same_weights(run, tmp_path, capsys):
    if run.expected.key is None:
        pytest.skip("no key")
    output = tmp_path / "keyed.safetensors"
    if average(run, output, capsys, "--key", run.expected.key) is not None:
        assert_holds(output, run.expected.mean())


def test_the_steps_are_told(run, tmp_path, capsys):
    if run.expected.steps is None:
        pytest.skip("no steps")
    printed = average(run, tmp_path / "out.safetensors", capsys, "--json", "--dry-run")
    if printed is None:
        return
    report = json.loads(printed)
    if run.expected.steps:
        assert tuple(report["steps"]) in run.expected.steps
    elif report["steps"]:
        assert report["steps"] == sorted(set(report["steps"]))
    assert all(name in text for name, text in zip(run.expected.names, report["inputs"], strict=True)), printed


def test_inspect_names_every_checkpoint(run, capsys):
    code = main(["inspect", str(run.path), "--json"])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    if run.expected.kind == "refused" and code == 2:
        assert run.refuses(captured.out + captured.err)
        return
    assert code == 0, captured.err
    json.loads(captured.out)
    assert all(name in captured.out for name in run.expected.names)


def test_a_trajectory_of_the_same_paths_has_the_same_steps(run, tmp_path, capsys):
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trajectory = Trajectory.from_checkpoints(run.paths())
    except PolyakError as error:
        # What has no order, such as the folds of one model, is no trajectory.
        assert run.refuses(str(error)) or (run.expected.steps is None and "steps" in str(error)), error
        return
    assert run.expected.kind != "refused"
    said = " ".join(str(warning.message) for warning in caught)
    assert not run.expected.left_out or any(name in said for name in run.expected.left_out)
    stops = [block.stop for block in trajectory.blocks]
    if run.expected.steps is None:
        assert len(stops) == 3
        return
    printed = average(run, tmp_path / "out.safetensors", capsys, "--json", "--dry-run")
    assert printed is not None and (json.loads(printed)["steps"] or [1, 2, 3]) == stops


class Shaped(nn.Module):
    """A model of no use that has the tensors of a file, under their names, and none of their values."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        super().__init__()
        for name, tensor in tensors.items():
            *path, last = name.split(".")
            parent = self
            for part in path:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            empty = torch.full_like(tensor, 99)
            if tensor.is_floating_point() and not last.startswith("running_"):
                parent.register_parameter(last, nn.Parameter(empty))
            else:
                parent.register_buffer(last, empty)


def test_select_scores_whole_models_of_the_right_weights(run, tmp_path, capsys, monkeypatch):
    if run.expected.update is not None:
        pytest.skip("an adapter is no model")
    averaged = tmp_path / "out.safetensors"
    if average(run, averaged, capsys) is None:
        return
    mean, names = run.expected.mean(), list(run.expected.newest)
    trained = next(name for name in names if name not in run.expected.constant)

    def score(model):
        state = model.state_dict()
        assert all((state[name] == run.expected.newest[name]).all() for name in run.expected.constant)
        return (state[trained].double() - mean[trained]).abs().mean().item()

    user_code = types.ModuleType("user_code")
    user_code.build, user_code.score = (lambda: Shaped(load_file(averaged))), score
    monkeypatch.setitem(sys.modules, "user_code", user_code)
    options = ["--model", "user_code:build", "--score", "user_code:score", "--mode", "min"]
    options += ["--profiles", "uniform", "--json"]
    code = main(["select", *run.inputs, *options])
    captured = capsys.readouterr()
    if run.expected.steps is None and code == 2:
        assert "--steps" in captured.err
        return
    assert code == 0, captured.err
    candidates = json.loads(captured.out)["candidates"]
    scores = {candidate["name"]: candidate["score"] for candidate in candidates}
    distance = abs(run.expected.newest[trained] - mean[trained])
    assert scores == pytest.approx({"live": distance, "uniform": 0}, abs=1e-2)
