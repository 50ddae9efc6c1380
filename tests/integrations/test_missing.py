"""Without its framework a module says what to install."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("framework", ["lightning", "transformers"])
def test_a_missing_framework_is_one_pip_command_away(framework):
    code = f"""
import sys
sys.modules[{framework!r}] = None
import polyak.integrations
try:
    import polyak.integrations.{framework}
except polyak.errors.MissingExtraError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.endswith(f"pip install 'polyak[{framework}]'\n")
