"""The documentation site builds without a warning, fetches nothing, and draws what was measured."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

pytest.importorskip("mkdocs")
ROOT = Path(__file__).parent.parent


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "website"))
    import hooks

    return hooks


def test_every_public_name_has_a_place_in_the_reference(hooks: ModuleType) -> None:
    """As the pages ask for them, by name or with all of their module; `make docs` looks at what came of it."""
    pages = "\n".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))
    asked = set(re.findall(r"^::: ([\w.]+)$", pages, re.M)) | set(re.findall(r"{#([\w.]+)}", pages))
    names = [name.rpartition(".") for name in hooks.public_names()]
    assert ("polyak.integrations.lightning", ".", "Averaging") in names and len(names) > 100
    told = {name.rpartition(".")[2] for name in asked} | {
        name for module, _, name in names if module in asked
    }
    assert not [f"{module}.{name}" for module, _, name in names if name not in told]


DOCSTRING = """
As :meth:`update` and :class:`~polyak.Average` with ``x``, of :class:`torch.Tensor`::

    y

>>> f(
...     1)
2

The end.
"""
MARKDOWN = """
As <autoref identifier="polyak.a.A.update" optional><code>update</code></autoref> and [`Average`][polyak.Average]\
 with `x`, of `torch.Tensor`:

    y

```pycon
>>> f(
...     1)
2
```

The end.
"""


def test_a_docstring_becomes_markdown(hooks: ModuleType) -> None:
    import docstrings

    update = SimpleNamespace(is_alias=False, path="polyak.a.A.update")
    average = SimpleNamespace(members={"update": update}, parent=None)
    assert docstrings.as_markdown(DOCSTRING, average) == MARKDOWN


def test_each_figure_is_drawn_from_its_file_and_has_its_place(hooks: ModuleType) -> None:
    import figures

    headings = set(re.findall(r"^## (.*)$", (ROOT / "docs" / "results.md").read_text(), re.M))
    assert set(figures.PLACES) <= headings and set(figures.PLACES.values()) == set(figures.FIGURES)
    for name, picture in figures.pictures():
        assert picture.startswith(b"<?xml") and len(picture) < 100_000, name
        shown = ROOT / "docs" / "figures" / f"{name}.svg"
        assert not shown.exists() or shown.read_bytes() == picture, (
            f"run python website/figures.py docs/figures {name}"
        )


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_fetches_nothing(tmp_path: Path) -> None:
    config = ROOT / "website" / "mkdocs.yml"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", config, "-d", tmp_path]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0 and "WARNING" not in result.stderr, result.stderr
    for page in tmp_path.rglob("*.html"):
        text = page.read_text()
        assert not re.search(r'(<script[^>]*src|<img[^>]*src|<link[^>]*href)="?(https?:)?//', text), page
        assert "::: polyak" not in text and ":class:" not in text, page
