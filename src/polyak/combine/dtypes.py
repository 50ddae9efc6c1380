"""Dtypes as people write them."""

from __future__ import annotations

import torch

from polyak.errors import OptionError

__all__ = ["parse_dtype"]

_SHORT = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
}


def parse_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A floating-point dtype from itself, its name in torch, or ``fp64``, ``fp32``, ``fp16``, ``bf16``, ``fp8``.

    Raises ``OptionError`` for anything else.

    >>> parse_dtype("bf16"), parse_dtype("float8_e5m2"), parse_dtype(torch.float32)
    (torch.bfloat16, torch.float8_e5m2, torch.float32)
    """
    text = str(dtype).removeprefix("torch.")
    found = _SHORT.get(text) or getattr(torch, text, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise OptionError(
            f"{text!r} is no floating-point dtype: choose from {', '.join(_SHORT)}, or a name that torch has"
        )
    return found
