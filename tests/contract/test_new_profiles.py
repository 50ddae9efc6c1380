"""What adding a scheme, or a profile, takes: one short file, and the whole contract suite runs over it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SUITE = Path(__file__).with_name("test_schemes.py")

SCHEME = '''
"""A running mean that starts quietly."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from polyak.errors import OptionError
from polyak.profiles import Scheme


@dataclass(frozen=True)
class Late(Scheme):
    """F(t, T) = g(t)/g(T) with g(t) = t (1 - exp(-t/warmup)): the first steps count little, later ones alike."""

    warmup: float

    unit = "steps"
    examples = ("late:100", "late:2.5")

    def __post_init__(self):
        if not self.warmup > 0:
            raise OptionError(f"warmup must be positive, got {self.warmup}")

    def share(self, t, total):
        return t / total * (np.expm1(-t / self.warmup) / np.expm1(-total / self.warmup))

    @classmethod
    def candidates(cls, steps):
        return [cls(part * steps) for part in (0.1, 0.2, 0.5)]

    def longer(self, factor):
        return replace(self, warmup=self.warmup / factor)
'''

PROFILE = '''
"""An average around one place of a run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from polyak.profiles import Profile


@dataclass(frozen=True)
class Hill(Profile):
    """Weights that rise up to the middle of the last part of a run, and fall again to its end."""

    fraction: float = 1.0

    unit = "samples"
    examples = ("hill", "hill:0.25")

    def share(self, t, total):
        x = np.clip(1 - (total - t) / (self.fraction * total), 0, 1)
        return np.where(x < 0.5, 2 * x**2, 1 - 2 * (1 - x) ** 2)

    @classmethod
    def candidates(cls, steps):
        return [cls(fraction) for fraction in (0.25, 0.5, 1.0)]
'''


def run_the_contract(folder: Path, source: str) -> subprocess.CompletedProcess[str]:
    """The suite's tests of the one class that ``source`` defines, in a process that imports it first."""
    (folder / "defined_elsewhere.py").write_text(source)
    name = re.findall(r"^class (\w+)", source, re.M)[0]
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [sys.executable, "-m", "pytest", str(SUITE), "-p", "defined_elsewhere", "-k", name, "-rA", "-x"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        cwd=SUITE.parents[2],
    )


def names_of_passed(output: str) -> set[str]:
    return set(re.findall(r"^PASSED .*::(test_\w+)", output, re.M))


@pytest.mark.parametrize(
    ("source", "at_most"),
    [pytest.param(SCHEME, 40, marks=pytest.mark.slow), (PROFILE, 30)],
    ids=["a scheme", "a profile"],
)
def test_a_new_class_is_one_short_file_that_keeps_the_contract(tmp_path, source, at_most):
    assert len(source.strip().splitlines()) <= at_most
    done = run_the_contract(tmp_path, source)
    assert done.returncode == 0, done.stdout
    every_profile, every_scheme = (
        set(re.findall(r"^def (test_\w+)\((?:.*\b(?:profile|cls|scheme)\b)", part, re.M))
        for part in SUITE.read_text().partition("# Long runs")[0].split("# Every scheme.")
    )
    due = every_profile | every_scheme if source is SCHEME else every_profile
    assert names_of_passed(done.stdout) == due
    assert len(due) > 7


@pytest.mark.parametrize(
    ("source", "right", "wrong", "found_by"),
    [
        # With a shape that depends on the length of the run: no running mean has these weights.
        (
            SCHEME,
            "return t / total *",
            "return (t / total) ** (1 + total / 1e4) *",
            "the_weights_of_the_profile",
        ),
        (PROFILE, "2 * x**2,", "2 * x,", "test_the_share_rises_from_0_to_1"),
    ],
    ids=["not a scheme", "falls"],
)
def test_the_contract_finds_what_is_wrong(tmp_path, source, right, wrong, found_by):
    assert right in source
    done = run_the_contract(tmp_path, source.replace(right, wrong))
    assert done.returncode == 1
    assert re.search(rf"^FAILED .*{found_by}", done.stdout, re.M), done.stdout
