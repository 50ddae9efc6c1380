"""Coverage-guided fuzzing of every reader in ``readers.py``: ``make fuzz``.

``PYTHONPATH=tests python -m torture.fuzz NAME`` fuzzes one. What reaches new code goes to ``build/fuzz``, where an
input that ends in anything but the right result or a PolyakError stays as well: NAME and its file repeat it.
``--corpus`` writes the seeds, and the smallest of what was found, to ``tests/torture/corpus``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

FOUND = Path(__file__).parents[2] / "build" / "fuzz"
# An input is no longer than this; a reader takes no more than so many seconds and MiB for it.
LIMITS = ("-max_len=8192", "-timeout=20", "-rss_limit_mb=2048", "-malloc_limit_mb=512")
MOST_KEPT, MOST_KEPT_BYTES = 24, 1500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reader", nargs="?", help="one of readers.READERS; all of them by default")
    parser.add_argument("file", nargs="?", help="an input to repeat")
    parser.add_argument("--seconds", type=int, default=60, help="for each reader")
    parser.add_argument("--corpus", action="store_true", help="write the corpus instead")
    options = parser.parse_args()
    if options.reader is not None and not options.corpus:
        fuzz(options.reader, [options.file] if options.file else [f"-max_total_time={options.seconds}"])
    from torture import readers

    names = [options.reader] if options.reader else list(readers.READERS)
    if options.corpus:
        for name in names:
            keep(name)
        return
    failed = [name for name in names if run(name, "--seconds", str(options.seconds))]
    if failed:
        sys.exit(f"found wrong: {', '.join(failed)}; see {FOUND}")


def run(*arguments: str) -> int:
    """This script in a process of its own: libFuzzer ends the one that it runs in."""
    return subprocess.run([sys.executable, "-m", "torture.fuzz", *arguments]).returncode


def fuzz(name: str, arguments: list[str]) -> None:
    """Have libFuzzer feed a reader; does not return."""
    import atheris

    with atheris.instrument_imports(include=["polyak"]):
        from torture import readers

    found = FOUND / name.replace(" ", "-")
    found.mkdir(parents=True, exist_ok=True)
    is_run = arguments[0].startswith("-")
    places = [str(found), str(readers.CORPUS / found.name)] if is_run else []
    folder = TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
    take = readers.read(name, Path(folder.name))
    take(next(iter(readers.READERS[name].seeds().values())))  # what it imports is not of an input's seconds

    def given(data: bytes) -> None:
        try:
            take(data)
        except BaseException:  # libFuzzer keeps only what crashes the interpreter
            (FOUND / f"{found.name}-{sha256(data).hexdigest()[:12]}").write_bytes(data)
            raise

    prefix = f"-artifact_prefix={FOUND}/{found.name}-"
    atheris.Setup([sys.argv[0], *LIMITS, prefix, *arguments, *places], given)
    atheris.Fuzz()


def keep(name: str) -> None:
    """Write the seeds of a reader, and of what fuzzing found the smallest inputs that reach further than they do."""
    from torture import readers

    place = readers.CORPUS / name.replace(" ", "-")
    place.mkdir(parents=True, exist_ok=True)
    seeds = readers.READERS[name].seeds()
    for seed, data in seeds.items():
        (place / seed.replace(" ", "-")).write_bytes(data)
    found = sorted((FOUND / place.name).glob("*"), key=lambda path: (path.stat().st_size, path.name))
    new = [path for path in found if path.stat().st_size <= MOST_KEPT_BYTES][: MOST_KEPT - len(seeds)]
    for path in new:
        (place / path.name[:12]).write_bytes(path.read_bytes())


if __name__ == "__main__":
    main()
