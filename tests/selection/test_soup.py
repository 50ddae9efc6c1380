"""`soup` against the recipe done by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import polyak
from polyak import checkpoints
from polyak.errors import OptionError, StructureError
from polyak.trajectory import Trajectory


def saved(folder, values):
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{index}.pt" for index in range(len(values))]
    for value, path in zip(values, paths, strict=True):
        torch.save({"weight": torch.tensor([[value]])}, path)
    return paths


def by_hand(values, goodness):
    """Indices and score of the greedy soup, in float64."""
    order = sorted(range(len(values)), key=lambda index: -goodness(values[index]))
    taken = order[:1]
    for index in order[1:]:
        wider = [*taken, index]
        mean = sum(values[i] for i in wider) / len(wider)
        if goodness(mean) >= goodness(sum(values[i] for i in taken) / len(taken)):
            taken = wider
    return taken, goodness(sum(values[i] for i in taken) / len(taken))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(-9, 9).map(lambda x: round(x, 1)), min_size=2, max_size=7, unique=True))
def test_the_soup_is_that_of_the_recipe_and_never_worse_than_the_best_single(tmp_path_factory, values):
    paths = saved(tmp_path_factory.mktemp("soup"), values)
    # Away from the grid of the values, so that rounding decides nothing.
    made = polyak.soup(paths, nn.Linear(1, 1, bias=False), lambda m: -abs(m.weight.item() - 1.2345), "max")
    taken, score = by_hand(values, lambda value: -abs(value - 1.2345))
    assert [paths.index(path) for path in made.ingredients] == taken
    assert made.score == pytest.approx(score, abs=1e-5)
    assert made.score >= max(made.singles.values())


@pytest.fixture
def paths(tmp_path):
    return saved(tmp_path / "parts", [9.0, 1.0, 2.5])


def distance(model):
    return abs(model.weight.item() - 2)


def off_by_a_quarter(model):
    return (model.weight.detach().flatten() - 2).abs() + 0.25


def test_applied_and_written(paths, tmp_path):
    model = nn.Linear(1, 1, bias=False)
    before = model.weight.detach().clone()
    made = polyak.soup(paths, model, distance, "min")
    assert torch.equal(model.weight, before)
    assert [path.name for path in made.ingredients] == ["2.pt", "1.pt"] and made.score == 0.25
    assert made.singles == dict(zip(paths, [7.0, 1.0, 0.5], strict=True))
    assert str(made) == "soup of 2 of 3 checkpoints: score 0.25, the best single one 0.5 (lower is better)"
    made.write(tmp_path / "soup.safetensors")
    written = checkpoints.open(tmp_path / "soup.safetensors")
    assert written.read("weight").item() == 1.75 and written.metadata["polyak.soup"] == "2.pt, 1.pt"
    made.apply(model)
    assert model.weight.item() == 1.75
    weights = Trajectory.from_checkpoints(paths).average(made.profile)
    assert weights["weight"].item() == 1.75


def test_what_does_not_make_it_worse_goes_in(tmp_path):
    paths = saved(tmp_path / "same", [3.0, 3.0, 3.0])
    assert polyak.soup(paths, nn.Linear(1, 1, bias=False), distance, "min").ingredients == paths


def test_losses_per_example_count_by_their_mean(paths):
    made = polyak.soup(paths, nn.Linear(1, 1, bias=False), lambda m: off_by_a_quarter(m).expand(3))
    assert (made.score, made.mode) == (0.5, "min")


def test_batchnorm_statistics_are_those_of_the_soup(tmp_path):
    torch.manual_seed(0)
    batch, paths = torch.randn(32, 2), []
    for index in range(3):
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        paths.append(tmp_path / f"{index}.pt")
        torch.save(model.state_dict(), paths[-1])
    model.train()

    def score(tried):
        return tried(batch).mean(0).abs().sum().item()  # 0 with the right statistics

    made = polyak.soup(paths, model, score, "min", recalibrate=[batch])
    assert max(made.singles.values()) < 1e-5 and made.score < 1e-5
    made.apply(model)
    assert score(model.eval()) < 1e-5
    assert str(made).startswith("soup of ")
    assert str(polyak.soup(paths, model, score, "min")).startswith(
        "These scores are not those the averages can have"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda paths: paths[:1], "two or more"),
        (lambda paths: [*paths, paths[0]], "two or more different"),
        (lambda paths: str(paths[0]), "must be a list of paths"),
    ],
)
def test_what_is_no_choice_is_refused(paths, change, message):
    with pytest.raises(OptionError, match=message):
        polyak.soup(change(paths), nn.Linear(1, 1, bias=False), distance)


def test_no_model_is_refused(paths):
    with pytest.raises(OptionError, match=r"a plain torch.nn.Module is needed, got list"):
        polyak.soup(paths, [1], distance)


def test_other_models_are_refused(paths):
    with pytest.raises(StructureError, match="do not fit this model"):
        polyak.soup(paths, nn.Linear(2, 1), distance)
