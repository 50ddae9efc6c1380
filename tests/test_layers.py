"""The house: imports go down the layers, and everything public is exported and documented."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest

import polyak

SOURCE = Path(polyak.__file__).parent
LAYERS = [
    {"errors", "_version"},
    {"_checks", "_model", "profiles"},
    {"_mean", "_batches", "_swap", "_distributed", "checkpoints", "combine"},
    {"average", "batchnorm", "_attach", "trajectory"},
    {"_evaluate", "plots"},
    {"inspection", "selection", "landscape", "posterior"},
    {"integrations", "optim", "schedules"},
    {"demo", "report"},
    {"cli", "__main__"},
]
FLOOR = {name: floor for floor, names in enumerate(LAYERS) for name in names}
FILES = sorted(path for path in SOURCE.rglob("*.py") if path.parent != SOURCE or path.name != "__init__.py")


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Every polyak module that a file imports, at its top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "polyak":
            names |= {f"polyak.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    parts = [name.split(".") for name in names if name.startswith("polyak.")]
    homes = polyak._HOMES
    return {homes.get(part[1], part[1]) for part in parts} - {"__version__"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_down(path: Path) -> None:
    here = room(path)
    assert here in FLOOR, f"{here} stands on no floor: add it to LAYERS"
    above = {name for name in imported_rooms(path) if FLOOR[name] > FLOOR[here]}
    assert not above, f"{here} imports {above} from above"


def test_no_file_is_long() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in SOURCE.rglob("*.py")}
    assert max(lengths.values()) <= 400
    assert sorted(lengths.values())[len(lengths) // 2] <= 200


def test_all_names_what_is_exported() -> None:
    assert set(polyak.__all__) == {*polyak._HOMES, "__version__"}
    for name in polyak.__all__:
        assert getattr(polyak, name) is not None
        assert name in dir(polyak)
    for name in polyak._MODULES:
        assert inspect.ismodule(getattr(polyak, name))
    with pytest.raises(AttributeError, match="no attribute 'Averag'"):
        polyak.Averag  # noqa: B018


def modules() -> list[str]:
    found = pkgutil.walk_packages([str(SOURCE)], "polyak.")
    return [info.name for info in found if not info.name.endswith("__main__")]


@pytest.mark.parametrize("name", modules())
def test_all_of_each_module_exists(name: str) -> None:
    module = importlib.import_module(name)
    for public in getattr(module, "__all__", []):
        assert hasattr(module, public), f"{name}.__all__ names {public}, which is not there"


# A Selection is only made by select, whose example shows it.
@pytest.mark.parametrize("name", sorted(set(polyak._HOMES) - {"PolyakError", "Selection"}))
def test_public_names_have_a_doctest(name: str) -> None:
    thing = getattr(polyak, name)
    assert thing.__doc__ and (inspect.isabstract(thing) or ">>>" in thing.__doc__)
