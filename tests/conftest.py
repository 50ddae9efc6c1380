"""What every test shares."""

import re
import sys

import torch
from hypothesis import settings

from polyak import _host_kernel

# The tensors of the tests are small: threads cost more than they bring, and the machine runs other things.
torch.set_num_threads(1)

# Nor do most of them need compiled loops, which each process would load; `devices.as_if_on("compiled")` uses them.
_host_kernel._LEAST_NUMEL = sys.maxsize

# The same examples on every run, however busy the machine, so that what fails is what was changed;
# `make test-slow` looks for new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


def pytest_make_parametrize_id(val: object) -> str | None:
    """Name a case by its value, without addresses: processes that share the tests must agree on their names."""
    if val is None or isinstance(val, str | bytes | bool | int | float | complex):
        return None
    if isinstance(val, type) or callable(val):
        return getattr(val, "__name__", None)
    return re.sub(r" at 0x[0-9a-f]+", "", str(val))
