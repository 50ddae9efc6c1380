"""Profiles: how much each step of a training run counts in the average.

A profile is one function, :meth:`~Profile.share`: the share of the weight that lies on ``(0, t]`` of a run of
length ``total``. A :class:`Scheme` is a profile that can be followed while training runs. Each is one class, known to
all of polyak because it is defined: yours are, too.

=============  =======================================  ===================================================
class          written                                  known as
=============  =======================================  ===================================================
`Uniform`      ``uniform``                              SWA, Polyak-Ruppert averaging
`EMA`          ``ema:half_life=2000``                   exponential moving average
`Power`        ``power:gamma=6.94``                     EDM2's power function
`Polynomial`   ``polynomial:eta=8``                     polynomial-decay averaging
`WarmupEMA`    ``warmup-ema:decay=0.999``               the EMAs of timm, diffusers, torch_ema, ema-pytorch
`Tail`         ``tail:0.4``, ``tail:steps=2000``        LAWA, suffix average, last-k
`Window`       ``window:1000,2000``                     PMA
`Decay`        ``decay:sqrt:0.4``                       WSM: stands in for learning-rate decay
`Blend`        ``blend:0.4:decay:sqrt:0.4``             a point between the live weights and an average
`Weights`      ``weights:1,2,3``                        given or fitted, one weight per block
=============  =======================================  ===================================================

The first five are schemes. :func:`parse` reads the written form and ``str`` gives it back.
"""

from polyak.profiles._base import Profile, Scheme, as_profile, as_scheme, parse, registered
from polyak.profiles._builtin import (
    EMA,
    Blend,
    Decay,
    Polynomial,
    Power,
    Tail,
    Uniform,
    WarmupEMA,
    Weights,
    Window,
    decay_at_batch_size,
    without_live,
)

__all__ = [
    "EMA",
    "Blend",
    "Decay",
    "Polynomial",
    "Power",
    "Profile",
    "Scheme",
    "Tail",
    "Uniform",
    "WarmupEMA",
    "Weights",
    "Window",
    "as_profile",
    "as_scheme",
    "decay_at_batch_size",
    "parse",
    "registered",
    "without_live",
]
