"""The loss around weights: along a line, over a plane, and in random directions.

Izmailov et al. 2018 found the average in the middle of a wide valley at whose walls SGD's iterates lie. These
three show whether that is so of a run. Weights are given by name, as ``trajectory.average(...)``,
``trajectory.live()``, ``average.named_tensors()`` or ``model.state_dict()``; scores are those of
:func:`polyak.select`.

A flat place is no proof of good generalisation: sharpness depends on how a network is parametrised (Dinh et al.
2017) and does not always go with test error (Andriushchenko et al. 2023). Choose by held-out scores, and look
here to understand them.
"""

from polyak.landscape.path import PathScores, path
from polyak.landscape.plane import PlaneScores, plane
from polyak.landscape.rays import RayScores, rays

__all__ = ["PathScores", "PlaneScores", "RayScores", "path", "plane", "rays"]
