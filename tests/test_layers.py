"""The house: imports go down the layers, and everything public is exported and documented."""

from __future__ import annotations

import ast
import importlib
import inspect
import io
import pkgutil
import tokenize
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import polyak

SOURCE = Path(polyak.__file__).parent
LAYERS = [
    {"errors", "_version"},
    {"_terminal", "_torch", "_checks"},
    {"_model", "profiles"},
    {
        "_mean",
        "_device_mean",
        "_triton_mean",
        "_host_jobs",
        "_host_kernel",
        "_host_loops",
        "_batches",
        "_offload",
        "_module",
        "_swap",
        "_distributed",
        "checkpoints",
        "combine",
    },
    {"average", "batchnorm", "_attach", "trajectory"},
    {"_evaluate", "_plots"},
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


def code_lines(text: str) -> set[int]:
    """The lines of a file that are code: no docstring, comment or blank line."""
    documented: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            documented.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    layout = (
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    )
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return {n for t in tokens if t.type not in layout for n in range(t.start[0], t.end[0] + 1)} - documented


def import_lines(text: str) -> set[int]:
    imports = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom))
    return {line for node in imports for line in range(node.lineno, (node.end_lineno or 0) + 1)}


def test_no_import_goes_in_a_circle() -> None:
    def name_of(path: Path) -> str:
        parts = ("polyak", *path.relative_to(SOURCE).with_suffix("").parts)
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    trees = {name_of(path): ast.parse(path.read_text()) for path in SOURCE.rglob("*.py")}
    graph: dict[str, set[str]] = {}
    for name, tree in trees.items():
        found = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module in trees]
        imported = {f"{node.module}.{alias.name}": node.module for node in found for alias in node.names}
        graph[name] = {full if full in trees else str(module) for full, module in imported.items()}
    # An order in which each file comes after all that it imports; there is none where some go in a circle.
    assert len(list(TopologicalSorter(graph).static_order())) == len(trees)


def test_a_file_is_one_subject_that_a_reader_opens_once() -> None:
    texts = {path: path.read_text() for path in SOURCE.rglob("*.py")}
    lengths = {path: len(code_lines(text)) for path, text in texts.items()}
    assert max(lengths.values()) <= 400
    short = [path for path, length in lengths.items() if length < 60 and not path.name.startswith("__")]
    assert len(short) <= 12 + 1, short  # _version.py holds one line
    assert sum(len(import_lines(text)) for text in texts.values()) <= 0.08 * sum(lengths.values())


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
