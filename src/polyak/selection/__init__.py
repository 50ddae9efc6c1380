"""Which average of a run to ship: scored, fitted or mixed after training, in the user's own model."""

from polyak.selection._fit import Fit, fit
from polyak.selection._fit_score import ScoreFit
from polyak.selection._result import Selection
from polyak.selection._select import select
from polyak.selection._soup import Soup, soup

__all__ = ["Fit", "ScoreFit", "Selection", "Soup", "fit", "select", "soup"]
