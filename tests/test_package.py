"""What is installed: no test and no benchmark, and of each extra that is missing one line that says how to get it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
import venv
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

import polyak

pytest.importorskip("hatchling")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sdist of the checkout, and a wheel of the sdist."""
    folder = tmp_path_factory.mktemp("built")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_sdist_and_wheel_hold_the_package_and_no_test_or_benchmark(built: Path) -> None:
    wheel = ZipFile(built / f"polyak-{polyak.__version__}-py3-none-any.whl")
    sources = {
        str(path.relative_to(ROOT / "src")) for path in (ROOT / "src").rglob("*.*") if path.suffix != ".pyc"
    }
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == {name for name in sources if "__pycache__" not in name}
    assert (
        "Requires-Dist: torch<3,>=2.9"
        in wheel.read(f"polyak-{polyak.__version__}.dist-info/METADATA").decode()
    )
    with tarfile.open(built / f"polyak-{polyak.__version__}.tar.gz") as sdist:
        tops = {name.split("/")[1] for name in sdist.getnames()}
    own = {"src", "examples", "docs", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"}
    assert tops == own | {"CITATION.cff", "LICENSE", "PKG-INFO", "pyproject.toml", ".gitignore"}


def test_the_version_is_written_once() -> None:
    version = re.escape(polyak.__version__)
    assert f'"{polyak.__version__}"' in (ROOT / "src/polyak/_version.py").read_text()
    for name in ("pyproject.toml", "CITATION.cff", "src/polyak/__init__.py"):
        assert not re.search(rf'version\s*[:=]\s*"?{version}', (ROOT / name).read_text()), name
    assert f"## {polyak.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def needed(names: list[str], seen: dict[str, Distribution]) -> dict[str, Distribution]:
    """The distributions that these need, and those that they need."""
    for name in names:
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue
        if found.name not in seen:
            seen[found.name] = found
            wanted = [Requirement(text) for text in found.requires or ()]
            plain = [
                need.name for need in wanted if need.marker is None or need.marker.evaluate({"extra": ""})
            ]
            needed(plain, seen)
    return seen


def tops(found: Distribution) -> Iterator[Path]:
    for name in {path.parts[0] for path in found.files or () if path.parts[0] not in ("..", "__pycache__")}:
        yield Path(str(found.locate_file(name)))


@pytest.fixture(scope="module")
def environment(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh one, with the wheel and what it requires: links to what is installed here, so nothing is fetched."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python3*/site-packages")
    requirements = [Requirement(text) for text in distribution("polyak").requires or ()]
    for found in needed([need.name for need in requirements if need.marker is None], {}).values():
        for path in tops(found):
            if path.exists() and not (site / path.name).exists():
                (site / path.name).symlink_to(path)
    (wheel,) = built.glob("*.whl")
    python = folder / "bin" / "python"
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        wheel,
    ]
    subprocess.run(install, check=True)
    return folder


IMPORTS = """
import importlib, json, pkgutil, polyak
from polyak.errors import MissingExtraError

said = {}
for info in pkgutil.walk_packages(polyak.__path__, "polyak."):
    if "._" not in info.name:
        try:
            importlib.import_module(info.name)
        except MissingExtraError as error:
            said[info.name] = str(error)
for name in polyak.__all__:
    getattr(polyak, name)
print(json.dumps([polyak.__file__, said]))
"""


@pytest.mark.slow
def test_without_extras_everything_public_is_there_and_what_is_missing_is_one_line(
    environment: Path, tmp_path: Path
) -> None:
    def run(*command: str) -> subprocess.CompletedProcess[str]:
        path = environment / "bin" / command[0]
        return subprocess.run(
            [path, *command[1:]], capture_output=True, text=True, cwd=tmp_path, env={"PATH": ""}
        )

    imported = run("python", "-W", "error", "-c", IMPORTS)
    assert imported.returncode == 0, imported.stderr
    file, said = json.loads(imported.stdout)
    assert Path(file).is_relative_to(environment)
    frameworks = ("accelerate", "lightning", "transformers")
    assert sorted(said) == [f"polyak.integrations.{name}" for name in frameworks]
    for name, extra in zip(frameworks, ("transformers", "lightning", "transformers"), strict=True):
        message = said[f"polyak.integrations.{name}"]
        assert f"pip install 'polyak[{extra}]'" in message and "\n" not in message

    version = run("polyak", "--version")
    assert (version.stdout, version.stderr) == (f"polyak {polyak.__version__}\n", "")
    (tmp_path / "run").mkdir()
    for extra, command in (("demo", ["demo"]), ("report", ["report", "run", "-o", "report.html"])):
        refused = run("polyak", *command)
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1, refused.stderr
        assert f"pip install 'polyak[{extra}]'" in refused.stderr
    assert sorted(tmp_path.iterdir()) == [tmp_path / "run"]
