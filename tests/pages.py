"""The code of a page of the docs, run as it is pasted."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent / "docs"


def run(page: str, **yours: Any) -> dict[str, Any]:
    """All names that the blocks of a page define, one after the other, beside those that its reader has."""
    for block in re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.M | re.S):
        assert ">>>" not in block
        exec(compile(block, page, "exec"), yours)
    return yours
