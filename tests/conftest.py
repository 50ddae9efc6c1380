"""What every test shares."""

import re

import torch

# The tensors of the tests are small: threads cost more than they bring, and the machine runs other things.
torch.set_num_threads(1)


def pytest_make_parametrize_id(val: object) -> str | None:
    """Name a case by its value, without addresses: processes that share the tests must agree on their names."""
    if val is None or isinstance(val, str | bytes | bool | int | float | complex):
        return None
    if isinstance(val, type) or callable(val):
        return getattr(val, "__name__", None)
    return re.sub(r" at 0x[0-9a-f]+", "", str(val))
