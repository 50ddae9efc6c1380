"""What the tests of several frameworks share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from polyak.profiles import Scheme, _base


@pytest.fixture
def own_scheme(monkeypatch) -> type[Scheme]:
    """A scheme as a user would define it, known for one test."""
    monkeypatch.setattr(_base, "_REGISTRY", dict(_base._REGISTRY))

    @dataclass(frozen=True)
    class Early(Scheme):
        scale: float
        unit = "steps"

        def share(self, t, total):
            return np.log1p(t / self.scale) / np.log1p(total / self.scale)

    return Early
