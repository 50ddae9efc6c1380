"""Faces for existing code: change ``torchcontrib.optim`` or ``torch.optim`` to ``polyak.optim``."""

from polyak.optim.swa import SWA

__all__ = ["SWA"]
