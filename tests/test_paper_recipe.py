"""The paper's recipe: its files of images, its networks, and a run of it from end to end on made-up images."""

from __future__ import annotations

import json
import pickle
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from image_files import write_cifar, write_idx, write_mnist

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def beside_the_example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)


@pytest.fixture
def paper_data() -> ModuleType:
    return import_module("paper_data")


def test_images_are_read_from_idx_files_gzipped_or_not(paper_data: ModuleType, tmp_path: Path) -> None:
    write_mnist(tmp_path, 12, 10)
    parts = paper_data.load(tmp_path)
    assert parts["train"].pixels.shape == (12, 1, 28, 28) and parts["train"].pixels.dtype == torch.uint8
    assert parts["test"].labels.tolist() == list(range(10))
    assert parts["test"].pixels[3, 0, 8].min() >= 100  # the row that is bright for class 3


@pytest.mark.parametrize(
    ("label_key", "train", "test"),
    [
        (b"labels", [f"data_batch_{n}" for n in range(1, 6)], "test_batch"),
        (b"fine_labels", ["train"], "test"),
    ],
)
def test_images_are_read_from_cifars_own_files(
    paper_data: ModuleType, tmp_path: Path, label_key: bytes, train: list[str], test: str
) -> None:
    written = write_cifar(tmp_path, dict.fromkeys(train, 3) | {test: 2}, label_key)
    parts = paper_data.load(tmp_path)
    assert parts["train"].pixels.shape == (3 * len(train), 3, 32, 32) and len(parts["test"]) == 2
    last = written[train[-1]][b"data"]
    assert np.array_equal(parts["train"].pixels[-1].numpy().ravel(), last[-1])
    assert parts["train"].labels.tolist() == [0, 1, 2] * len(train)


class Harmful:
    def __reduce__(self):
        return (print, ("was run",))


def test_a_pickle_that_asks_for_code_is_refused_and_not_run(
    paper_data: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_cifar(tmp_path, {"train": 1, "test": 1}, b"fine_labels")
    (tmp_path / "train").write_bytes(pickle.dumps({b"data": Harmful(), b"fine_labels": [0]}, protocol=2))
    with pytest.raises(ValueError, match="train cannot be read: it asks for"):
        paper_data.load(tmp_path)
    assert "was run" not in capsys.readouterr().out


def test_files_that_are_not_what_their_names_say_are_refused(paper_data: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="neither the IDX files"):
        paper_data.load(tmp_path)
    write_mnist(tmp_path, 12, 10)
    labels = tmp_path / "train-labels-idx1-ubyte"
    write_idx(labels, np.zeros(11))
    with pytest.raises(ValueError, match="12 images and 11 labels"):
        paper_data.load(tmp_path)
    labels.write_bytes(labels.read_bytes()[:-1])
    with pytest.raises(ValueError, match="cut short"):
        paper_data.load(tmp_path)
    labels.write_bytes(b"\0\0\x0d\x01")
    with pytest.raises(ValueError, match="no IDX file of bytes"):
        paper_data.load(tmp_path)


def test_augmented_images_are_shifted_and_mirrored_copies(paper_data: ModuleType) -> None:
    images = torch.rand(40, 2, 6, 5)
    found = paper_data.augmented(images, 1, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images, [1] * 4, value=-1.0)
    seen = set()
    for image, source in zip(found, padded, strict=True):
        ways = [
            (down, right, mirrored)
            for down in range(3)
            for right in range(3)
            for mirrored in (False, True)
            for cut in [source[:, down : down + 6, right : right + 5]]
            if torch.equal(image, cut.flip(-1) if mirrored else cut)
        ]
        assert len(ways) == 1
        seen.update(ways)
    assert len(seen) > 10


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("vgg16", 15_291_300),
        ("preresnet8", 23_764),
        ("preresnet20", 278_132),
        ("preresnet110", 1_736_372),
        ("wrn", 36_536_884),
    ],
)
def test_networks_are_those_of_the_paper(name: str, parameters: int) -> None:
    build = import_module("paper_models").MODELS[name]
    with torch.device("meta"):
        model = build(3, 100)
    if parameters < 1_000_000:
        assert build(3, 100)(torch.zeros(2, 3, 32, 32)).shape == (2, 100)
        assert build(1, 10)(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_the_recipe_runs_and_its_contenders_share_a_budget(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_mnist(tmp_path, 40, 20)
    recipe = import_module("paper_recipe")
    output = tmp_path / "recipe.json"
    arguments = ["--data", str(tmp_path), "--model", "preresnet8", "--epochs", "4", "--batch", "20"]
    recipe.main([*arguments, "--output", str(output)])
    rows = json.loads(output.read_text())["rows"]
    assert {row["contender"] for row in rows} == {recipe.LIVE, recipe.SWA, recipe.CONVENTIONAL, recipe.COSINE}
    assert sorted({row["budget"] for row in rows}) == [1, 1.25, 1.5] and len(rows) == 12
    assert "1.5 budgets" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--epochs: at least 4"):
        recipe.main([*arguments, "--epochs", "3"])
    with pytest.raises(SystemExit, match="do not fill one batch"):
        recipe.main([*arguments, "--images", "10"])


def test_swa_is_the_mean_of_one_sample_an_epoch_after_its_start(tmp_path: Path) -> None:
    write_mnist(tmp_path, 20, 20)
    recipe = import_module("paper_recipe")
    parts = recipe.load(tmp_path)
    data = recipe.Data(parts["train"], parts["test"], torch.device("cpu"))
    settings = recipe.Settings(0.1, 0.0, 0.05, epochs=4, swa_start=0.5, batch=10)
    seen = {}
    ends = []
    for name, budget, model in recipe.swa_run(
        lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10)), data, settings, seed=0
    ):
        seen[name, budget] = model[1].weight.clone()
        if name == recipe.LIVE:
            ends.append(model[1].weight.clone())
    # Epochs 3 and 4 of the first budget, and one more for each that follows.
    assert not torch.equal(seen[recipe.SWA, 1.0], seen[recipe.LIVE, 1.0])
    grown = (2 * seen[recipe.SWA, 1.0] + ends[1]) / 3
    assert torch.allclose(seen[recipe.SWA, 1.25], grown, atol=1e-6)
    assert torch.allclose(seen[recipe.SWA, 1.5], (3 * grown + ends[2]) / 4, atol=1e-6)
