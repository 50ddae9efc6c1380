"""Faces for existing code: change ``torchcontrib.optim`` or ``torch.optim`` to ``polyak.optim``."""

from polyak.optim import swa_utils
from polyak.optim._swa import SWA

__all__ = ["SWA", "swa_utils"]
