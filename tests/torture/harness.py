"""Faults and abuse as data: a family is a generator of named cases, and every case is judged in one way.

A case does something to polyak in an empty folder, while the working directory is another one. It ends well where it
returns, having compared what it got with an oracle, or where polyak refuses in words that name the thing; nothing
half-written may be left in either case, nor anything at all outside the two.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from polyak.errors import PolyakError

__all__ = [
    "FAMILIES",
    "Case",
    "cases",
    "contents",
    "family",
    "judged",
    "mean64",
    "near",
    "same_model",
    "small_model",
    "state_of",
    "walk",
]

REPOSITORY = Path(__file__).parents[2]
RIGHT, REFUSED = "right", "refused"
FAMILIES: dict[str, Family] = {}


@dataclass(frozen=True)
class Case:
    """One thing that goes wrong.

    Args:
        name: within its family.
        run: does it in the empty folder that it is given, and raises AssertionError where something is wrong.
        names: what a refusal must say: all of these, lower case or not.
    """

    name: str
    run: Callable[[Path], object]
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """Cases of one kind, made from a random generator, of which every ``apart``-th is in the short share."""

    title: str
    make: Callable[[random.Random], Iterable[Case]]
    apart: int


def family(title: str, apart: int = 10) -> Callable:
    """Make a generator of cases known under ``title``; every ``apart``-th is part of the ordinary tests."""

    def known(make: Callable[[random.Random], Iterable[Case]]) -> Callable:
        FAMILIES[title] = Family(title, make, apart)
        return make

    return known


def cases(seed: int) -> Iterator[tuple[Family, Case, bool]]:
    """Every case of every family, and whether it is in the short share; the same ones for the same seed."""
    for one in FAMILIES.values():
        for number, case in enumerate(one.make(random.Random(f"{one.title} {seed}"))):
            yield one, case, number % one.apart == 0


def judged(case: Case, place: Path) -> str:
    """Run a case in folders of its own in ``place``: ``"right"`` or ``"refused"``; what else it raises is a failure."""
    folder, here = place / "folder", place / "here"
    folder.mkdir()
    here.mkdir()
    try:
        with elsewhere_unchanged(place), chdir(here):
            case.run(folder)
        outcome = RIGHT
    except PolyakError as error:
        said = str(error).lower()
        missing = [name for name in case.names if name.lower() not in said]
        assert not missing, f"a refusal that does not name {missing}: {error}"
        assert said, "a refusal without words"
        assert not walk_files(here), f"a refused call left {walk_files(here)} in the working directory"
        outcome = REFUSED
    left = [path for path in walk_files(place) if ".polyak-" in path]
    assert not left, f"half-written: {left}"
    return outcome


@contextmanager
def elsewhere_unchanged(place: Path) -> Iterator[None]:
    """Nothing is written beside the folders of a case, nor into the repository; pytest's own names have a dot."""
    before = _names(REPOSITORY)
    try:
        yield
    finally:
        changed = _names(REPOSITORY) ^ before
        assert not changed, f"written into the repository, or taken from it: {changed}"
        beside = _names(place) - {"folder", "here"}
        assert not beside, f"written beside its folder: {beside}"


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def walk_files(folder: Path) -> list[str]:
    """All files below a folder, by relative path; names need not be text."""
    found = []
    for place, folders, files in os.walk(folder):
        found += [os.path.relpath(os.path.join(place, name), folder) for name in (*folders, *files)]
    return sorted(found)


def contents(folder: Path) -> dict[str, bytes]:
    """All regular files below a folder with their bytes."""
    paths = {name: folder / name for name in walk_files(folder)}
    return {name: path.read_bytes() for name, path in paths.items() if path.is_file()}


# What is compared with what.


def small_model(seed: int = 0) -> nn.Sequential:
    """Two layers with a BatchNorm between them."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def walk(model: nn.Module, step: int) -> dict[str, Tensor]:
    """Move every parameter at random, the same way for the same step; the new values in float64."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return {name: p.detach().double().clone() for name, p in model.named_parameters()}


def mean64(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of samples in float64."""
    return {name: torch.stack([s[name].double() for s in samples]).mean(0) for name in samples[0]}


def near(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Every tensor that is wanted is there, and has its values."""
    for name, value in wanted.items():
        assert name in found, f"{name!r} is missing"
        assert found[name].shape == value.shape, name
        error = (found[name].double() - value).abs().max().item() if value.numel() else 0.0
        assert error <= tolerance * max(1.0, value.abs().max().item()), f"{name!r} is off by {error}"


def state_of(model: nn.Module) -> dict[str, object]:
    """Everything of a model that nothing may change behind its owner's back."""
    modes = {f"{name}.training": module.training for name, module in model.named_modules()}
    hooks = {
        f"{name}.hooks": len(m._forward_pre_hooks) + len(m._forward_hooks)
        for name, m in model.named_modules()
    }
    return {name: tensor.clone() for name, tensor in model.state_dict().items()} | modes | hooks


def same_model(model: nn.Module, before: dict[str, object]) -> None:
    """The model is, bit for bit, what ``state_of`` found."""
    now = state_of(model)
    assert now.keys() == before.keys()
    for name, value in before.items():
        same = torch.equal(now[name], value) if isinstance(value, Tensor) else now[name] == value
        assert same, f"{name} was changed"
