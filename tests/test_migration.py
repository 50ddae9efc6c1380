"""The page for those who come from other tools: what it says to write now runs, and has the other tool's numbers."""

import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from peers import timm_model_ema

PAGE = (Path(__file__).parent.parent / "docs" / "migration.md").read_text()
SECTIONS = {
    name: re.findall(r"```python\n(.*?)```", text, re.S)
    for name, text in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.S | re.M)
    if "```python" in text
}


def namespace() -> dict[str, Any]:
    """What the page says is yours: a run that is the same each time.

    Besides, ``passed`` gets the weights before training and after each step, and ``scored`` those that are evaluated.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    x, y = torch.randn(2, 40, 8, 3, dtype=torch.float64).unbind()
    loader = list(zip(x, y[..., :1], strict=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    passed = [weights(model)]
    optimizer.register_step_post_hook(lambda *_: passed.append(weights(model)))
    scored: list[torch.Tensor] = []

    def train_step(x: torch.Tensor, y: torch.Tensor) -> None:
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()

    yours = {"base_optimizer": optimizer, "loss_fn": nn.functional.mse_loss, "n_epochs": 5}
    yours |= {"train_step": train_step, "evaluate": lambda module: scored.append(weights(module))}
    return yours | {"model": model, "loader": loader, "passed": passed, "scored": scored}


def weights(module: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def run(block: str) -> dict[str, Any]:
    names = namespace()
    exec(compile(block, "docs/migration.md", "exec"), names)
    return names


def test_each_tool_has_a_before_and_a_now() -> None:
    assert len(SECTIONS) == 7 and all(len(blocks) == 2 for blocks in SECTIONS.values())
    assert ">>>" not in PAGE


def lerped(samples: Sequence[torch.Tensor], decay: Callable[[int], float]) -> torch.Tensor:
    """The first sample, and then the n-th taken in with decay(n)."""
    mean = samples[0]
    for n, sample in enumerate(samples[1:], start=2):
        mean = decay(n) * mean + (1 - decay(n)) * sample
    return mean


@pytest.mark.parametrize(
    ("tool", "average"),
    [
        ("torch.optim.swa_utils", lambda passed: lerped(passed[1:], lambda n: 0.999)),
        ("timm", lambda passed: lerped(passed[1:], lambda n: min(1 - n ** (-2 / 3), 0.9998))),
        ("diffusers", lambda passed: lerped(passed[1:], lambda n: min(1 - n**-0.75, 0.9999))),
        (
            "ema-pytorch",
            lambda passed: lerped(passed[101::10], lambda n: min(1 - (10 * n - 9) ** (-2 / 3), 0.9999)),
        ),
        ("torch_ema", lambda passed: lerped(passed, lambda n: min(n / (n + 9), 0.995))),
        ("torchcontrib", lambda passed: torch.stack(passed[15::5]).mean(0)),
    ],
)
def test_what_it_says_to_write_now_gives_these_numbers(
    tool: str, average: Callable[[Sequence[torch.Tensor]], torch.Tensor]
) -> None:
    names = run(SECTIONS[tool][1])
    [averaged], passed = names["scored"], names["passed"]
    assert len(passed) == 201
    torch.testing.assert_close(averaged, average(passed), rtol=1e-10, atol=1e-10)


def test_the_lightning_callback() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        callback = run(SECTIONS["Lightning"][1])["callback"]
    assert "ema:decay=0.999,debias=false" in callback.state_key


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is used of timm, whose package imports torchvision."""
    module = timm_model_ema()
    monkeypatch.setitem(sys.modules, "timm", ModuleType("timm"))
    monkeypatch.setitem(sys.modules, "timm.utils", module)


@pytest.mark.parametrize(
    ("tool", "tolerance"),
    # ema-pytorch computes its decays in fp32. The others cannot be run here, or are compared in test_peers.py.
    [("torch.optim.swa_utils", 1e-12), ("timm", 1e-12), ("ema-pytorch", 1e-5)],
)
def test_the_numbers_are_those_of_before(tool: str, tolerance: float, request: pytest.FixtureRequest) -> None:
    if tool == "timm":
        request.getfixturevalue("timm")
    ([before], [now]) = (run(block)["scored"] for block in SECTIONS[tool])
    torch.testing.assert_close(now, before, rtol=tolerance, atol=tolerance)
