"""Which average of a run to ship: scored, fitted or mixed after training, in the user's own model."""

from polyak.selection.fit import Fit, fit
from polyak.selection.select import select
from polyak.selection.selection import Selection
from polyak.selection.soup import Soup, soup

__all__ = ["Fit", "Selection", "Soup", "fit", "select", "soup"]
