"""Private and version-bound uses of torch, each with what happens where it is gone."""

from __future__ import annotations

import re

__all__ = ["reason_not_loaded"]

# Reading torch's files.

# Words of torch.load's messages, which are otherwise a page of advice.
_FORBIDDEN = re.compile(r"GLOBAL (\S+)")
_REASON = "WeightsUnpickler error:"


def reason_not_loaded(error: Exception) -> tuple[str | None, str]:
    """What a file would need that ``torch.load(weights_only=True)`` refuses, or None; and its reason in few words.

    Where torch words its messages anew, the reason is the beginning of the message.

    >>> reason_not_loaded(RuntimeError("WeightsUnpickler error: Unsupported global: GLOBAL os.system"))
    ('os.system', 'Unsupported global: GLOBAL os.system')
    """
    forbidden = _FORBIDDEN.search(str(error))
    reason = str(error).rpartition(_REASON)[2].strip().split("\n", 1)[0][:200]
    return forbidden and forbidden[1], reason or type(error).__name__
