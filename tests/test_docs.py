"""The documents name tests that exist, link to files that exist, and show the figures that were measured."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import polyak
from polyak.profiles import registered

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def test_every_test_that_is_named_exists() -> None:
    text = (ROOT / "docs" / "compared.md").read_text()
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", text))
    assert len(named) > 15
    assert not [name for name in named if f"def {name}(" not in sources]
    assert not [path for path in re.findall(r"`(tests/[\w/.]+)`", text) if not (ROOT / path).exists()]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    """To a file, and where they name a heading of a page to one that it has."""
    links = re.findall(r"\]\(([^)#]*)(#[^)]*)?\)", document.read_text())
    places = [(document.parent / link if link else document, at) for link, at in links if "://" not in link]
    assert not [
        f"{path}{at}" for path, at in places if not path.exists() or (at and at not in headings(path))
    ]


def headings(page: Path) -> set[str]:
    """As links name them."""
    found = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {"#" + re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in found}


def test_the_table_of_profiles_is_right_and_whole() -> None:
    """Each row's text and Python are the same profile, its unit is right, and no class is left out."""
    rows = re.findall(
        r"^\| `([A-Z].*?)` \| `(.*?)` \|.*\| (.*?) \|$", (ROOT / "docs/choosing.md").read_text(), re.M
    )
    profiles = [polyak.parse(text) for _, text, _ in rows]
    assert profiles == [eval(f"polyak.{python}") for python, *_ in rows]
    assert [profile.unit for profile in profiles] == [unit.split()[-1] for *_, unit in rows]
    ours = {cls for cls in registered().values() if cls.__module__ == polyak.EMA.__module__}
    assert set(map(type, profiles)) == ours


def test_results_show_the_committed_figures() -> None:
    import tables

    assert (ROOT / "docs" / "results.md").read_text() == tables.document(), "run python benchmarks/tables.py"
    assert (ROOT / "docs" / "choosing.md").read_text() == tables.choosing(), "run python benchmarks/tables.py"


# Pages whose code has no prompts, so that doctest passes over it, and what it prints.
PASTED = {"README.md": "scores best", "docs/teacher.md": r"accuracy of the teacher (0\.9[5-9]|1\.)"}


@pytest.mark.parametrize("document", PASTED)
def test_what_is_to_be_pasted_runs(
    document: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / document).read_text(), re.M | re.S)
    assert blocks and not any(">>>" in block for block in blocks)
    names = {"__name__": "__main__"}
    for block in blocks:
        exec(compile(block, document, "exec"), names)
    assert re.search(PASTED[document], capsys.readouterr().out)
