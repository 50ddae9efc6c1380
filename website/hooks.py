"""What of the site is not written in docs/: its home, the examples, the figures, the commands and this page's style."""

from __future__ import annotations

import json
import logging
import re
import sys
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files
from mkdocstrings import Inventory

HERE = Path(__file__).parent
ROOT = HERE.parent
# Pages that lie at the root of the repository, where people look for them.
OUTSIDE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}

# The command line, which has a page of its own, and what is told on none.
NO_API = {"polyak.cli", "__version__"}


def on_config(config: Any) -> None:
    """Every script among the examples has a page, before those on the project."""
    scripts = [f"examples/{script.stem}.md" for script in sorted((ROOT / "examples").glob("*.py"))]
    config.nav.insert(-1, {"Examples": scripts})


def on_files(files: Files, config: Any) -> Files:
    """Add every page and picture that is made from something else."""
    sys.path.insert(0, str(HERE))
    import figures

    for name, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=_moved((ROOT / name).read_text())))
    for script in sorted((ROOT / "examples").glob("*.py")):
        page = f"examples/{script.stem}.md"
        files.append(File.generated(config, page, content=_listing(script.name, script.read_text())))
    for page, content in _notebook("tour"):
        files.append(File.generated(config, page, content=content))
    for name, picture in figures.pictures():
        if not (ROOT / "docs" / "figures" / f"{name}.svg").exists():  # as those that the README shows do
            files.append(File.generated(config, f"figures/{name}.svg", content=picture))
    files.append(File.generated(config, "reference/commands.md", content="\n".join(_commands())))
    for asset in ("site.css", "iframe-worker.js"):
        files.append(File.generated(config, asset, content=(HERE / asset).read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links lead to pages of the site; examples with prompts are marked as such; results have their figures."""
    import figures

    up = "../" * page.file.src_uri.count("/")
    markdown = re.sub(r"\]\(\.\./src/polyak/average\.py\)", f"]({up}reference/averages.md)", markdown)
    markdown = re.sub(r"\]\(\.\./examples/(\w+)\.(?:py|ipynb)\)", rf"]({up}examples/\1.md)", markdown)
    markdown = re.sub(r"^```python\n(?=>>>)", "```pycon\n", markdown, flags=re.M)
    if page.file.src_uri == "results.md":
        for heading, name in figures.PLACES.items():
            place = f"## {heading}\n"
            if place not in markdown:
                raise ValueError(f"docs/results.md has no heading {heading!r}, under which a figure belongs")
            markdown = markdown.replace(place, f"{place}\n![{heading}](figures/{name}.svg)\n")
    return markdown


def on_post_build(config: Any) -> None:
    """Every public name has a place in the reference."""
    with open(Path(config.site_dir, "objects.inv"), "rb") as inventory:
        listed = set(Inventory.parse_sphinx(inventory))
    for page in Path(config.site_dir, "reference").glob("*.html"):
        listed |= set(re.findall(r'id="(polyak[\w.]+)"', page.read_text()))
    for name in sorted(public_names()):
        if name not in listed:
            logging.getLogger("mkdocs.hooks").warning(
                "public name without a place in docs/reference: %s", name
            )


def public_names() -> Iterator[str]:
    """Whatever a module without an underscore in its name exports."""
    modules = [griffe.load("polyak", search_paths=[ROOT / "src"])]
    while modules:
        module = modules.pop()
        modules += [
            sub for name, sub in module.modules.items() if not name.startswith("_") and not sub.is_alias
        ]
        if module.path not in NO_API:
            yield from (f"{module.path}.{name}" for name in module.exports or () if name not in NO_API)


def _moved(text: str) -> str:
    """A page from the root of the repository as if it lay in docs/."""
    for name, page in OUTSIDE.items():
        text = text.replace(f"]({name})", f"]({page})")
    text = re.sub(r"\]\((examples|src)/", r"](../\1/", text)
    return text.replace("](docs/", "](").replace("[docs/", "[")


def _listing(name: str, code: str) -> str:
    return f"# {name}\n\n```python\n{code}```\n"


def _notebook(name: str) -> Iterator[tuple[str, str | bytes]]:
    """A page of a notebook's cells and of what they printed, and the pictures that they drew."""
    parts: list[str] = []
    for number, cell in enumerate(json.loads((ROOT / "examples" / f"{name}.ipynb").read_text())["cells"]):
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            if "text" in output:
                parts.append(f"```text\n{''.join(output['text'])}\n```")
            if "image/png" in output.get("data", {}):
                picture = f"{name}-{number}.png"
                parts.append(f"![]({picture})")
                yield f"examples/{picture}", b64decode(output["data"]["image/png"])
    yield f"examples/{name}.md", "\n\n".join(parts).replace("](../docs/", "](../")


def _commands() -> Iterator[str]:
    """What each command says of itself."""
    from typer.main import get_command

    from polyak.cli import app

    yield "# Command line\n"
    group = get_command(app)
    with group.make_context("polyak", [], resilient_parsing=True) as context:
        for name in group.list_commands(context):
            command = group.get_command(context, name)
            with command.make_context(name, [], parent=context, resilient_parsing=True) as inner:
                inner.max_content_width = inner.terminal_width = 88
                yield f"## polyak {name}\n\n```text\n{command.get_help(inner)}\n```\n"
