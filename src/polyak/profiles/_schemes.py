"""The schemes: profiles that a running mean can follow."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

import numpy as np

from polyak.errors import OptionError
from polyak.profiles._base import Floats, Scheme, Spelling, read_flag, read_number, within


@dataclass(frozen=True, repr=False)
class Uniform(Scheme):
    """Every sample counts the same: F(t, T) = t/T, c_n = 1/n; unit: samples.

    Source: Polyak and Juditsky 1992; Ruppert 1988; SWA is Izmailov et al. 2018, arXiv:1803.05407.

    >>> import polyak
    >>> polyak.Uniform().weights([0, 1, 2, 4])
    array([0.25, 0.25, 0.5 ])
    """

    unit = "samples"
    spelling = Spelling("uniform", "uniform", {})

    def coefficient_between(self, before: Any, now: Any, xp: ModuleType = np) -> Any:
        return 1 / now

    def _share(self, t: Floats, total: float) -> Floats:
        return t / total


@dataclass(frozen=True, kw_only=True, repr=False)
class EMA(Scheme):
    """Exponential moving average: a sample's weight falls by β per unit of its age.

    F(t, T) = (β^-t - 1)/(β^-T - 1) and c_n = (1-β)/(1-βⁿ), which starts as the plain mean and so needs no
    warm-up.

    Args:
        half_life: optimizer steps after which a weight has halved, positive: β = 2^(-1/half_life) per step,
            so it means the same whatever the gap between samples. Unit: steps.
        decay: β per sample, in (0, 1). Unit: samples.
        debias: False gives torch's form, which copies the first sample (c_1 = 1, then 1-β): the first sample
            keeps the weight of all that came before it, F(t, T) = β^(T-t) for t > 0.

    Raises:
        OptionError: both or neither of ``half_life`` and ``decay``, or one out of range.

    Source: the correction of the first samples is that of Adam, Kingma and Ba 2015, arXiv:1412.6980.

    >>> import polyak
    >>> polyak.EMA(half_life=1).weights([0, 1, 2]).round(4).tolist()
    [0.3333, 0.6667]
    >>> polyak.EMA(decay=0.5, debias=False).weights([0, 1, 2]).tolist()
    [0.5, 0.5]
    """

    half_life: float | None = None
    decay: float | None = None
    debias: bool = True

    spelling = Spelling(
        "ema",
        "ema:half_life=2000",
        {"half_life": read_number, "decay": read_number, "debias": read_flag},
    )

    def __post_init__(self) -> None:
        given, value = self._exactly_one("half_life", "decay")
        if given == "half_life":
            self._set(half_life=within("(0, inf)", given, value), unit="steps")
        else:
            self._set(decay=within("(0, 1)", given, value), unit="samples")
        if not isinstance(self.debias, bool):
            raise OptionError(f"debias must be True or False, got {self.debias!r}")

    # Everything is in terms of exp(-rate·age), which cannot overflow however long the run.

    def coefficient_between(self, before: Any, now: Any, xp: ModuleType = np) -> Any:
        forgotten = -xp.expm1(-self._rate * (now - before))
        if self.debias:
            return forgotten / -xp.expm1(-self._rate * now)
        # A bare 1.0 would be copied to the tensors' device, which waits for it.
        return xp.where(before == 0, xp.ones_like(forgotten), forgotten)

    def _share(self, t: Floats, total: float) -> Floats:
        kept = np.exp(-self._rate * (total - t))
        if self.debias:
            return kept * (np.expm1(-self._rate * t) / np.expm1(-self._rate * total))
        return np.where(t > 0, kept, 0.0)

    @cached_property
    def _rate(self) -> float:
        """-ln β per unit."""
        given, value = self._exactly_one("half_life", "decay")
        return math.log(2) / value if given == "half_life" else -math.log(value)


@dataclass(frozen=True, kw_only=True, repr=False)
class Power(Scheme):
    """Power-function averaging: F(t, T) = (t/T)^(γ+1), c_n = 1 - (1 - 1/n)^(γ+1); unit: steps.

    Its shape scales with the run: the relative width, the standard deviation of t/T, is always
    σ = √((γ+1)/((γ+2)²(γ+3))).

    Args:
        gamma: γ, at least 0; 0 is the uniform average.
        sigma_rel: σ, in (0, 0.2887], instead of γ; smaller is closer to the newest weights.

    Raises:
        OptionError: both or neither of ``gamma`` and ``sigma_rel``, or one out of range.

    Source: Karras et al. 2024 (EDM2), arXiv:2312.02696, section 3.

    >>> import polyak
    >>> polyak.Power(gamma=1).weights([0, 1, 2]).tolist()
    [0.25, 0.75]
    >>> round(polyak.Power(sigma_rel=0.1).exponent, 2)
    7.94
    """

    gamma: float | None = None
    sigma_rel: float | None = None

    unit = "steps"
    spelling = Spelling("power", "power:sigma_rel=0.1", {"gamma": read_number, "sigma_rel": read_number})

    def __post_init__(self) -> None:
        given, value = self._exactly_one("gamma", "sigma_rel")
        self._set(**{given: within("[0, inf)" if given == "gamma" else "(0, 0.2887]", given, value)})

    @cached_property
    def exponent(self) -> float:
        """γ + 1, also where the width σ was given."""
        given, value = self._exactly_one("gamma", "sigma_rel")
        return 1 + (value if given == "gamma" else _gamma_of_width(value))

    def coefficient_between(self, before: Any, now: Any, xp: ModuleType = np) -> Any:
        # The first sample takes log 0 = -inf, which gives its coefficient, 1, exactly: NumPy need not warn.
        with np.errstate(divide="ignore"):
            return -xp.expm1(self.exponent * xp.log1p(-(now - before) / now))

    def _share(self, t: Floats, total: float) -> Floats:
        return (t / total) ** self.exponent


@dataclass(frozen=True, kw_only=True, repr=False)
class Polynomial(Scheme):
    """Polynomial-decay averaging: c_n = (η+1)/(n+η); unit: samples.

    F(t, T) = Γ(t+η+1) Γ(T) / (Γ(t) Γ(T+η+1)), close to (t/T)^(η+1) in a long run.

    Args:
        eta: η, at least 0; 0 is the uniform average, larger is closer to the newest weights.

    Raises:
        OptionError: ``eta`` out of range.

    Source: Shamir and Zhang 2013, arXiv:1212.1824, section 4.

    >>> import polyak
    >>> polyak.Polynomial(eta=1).weights([0, 1, 2, 3]).round(4).tolist()
    [0.1667, 0.3333, 0.5]
    """

    eta: float

    unit = "samples"
    spelling = Spelling("polynomial", "polynomial:eta=8", {"eta": read_number})

    def __post_init__(self) -> None:
        self._set(eta=within("[0, inf)", "eta", self.eta))

    def coefficient_between(self, before: Any, now: Any, xp: ModuleType = np) -> Any:
        return (self.eta + 1) / (now + self.eta)

    def _share(self, t: Floats, total: float) -> Floats:
        rise = self.eta + 1
        # One factor of the Gamma functions is kept out of the logarithm, so that F is 0 at t = 0.
        first = (t / (t + rise)) / (total / (total + rise))
        return first * np.exp(_log_gamma_rise(t + 1, rise) - _log_gamma_rise(np.array(total + 1), rise))


def _gamma_of_width(sigma_rel: float) -> float:
    """The γ >= 0 with σ = sigma_rel: for u = γ+2 and p = σ^-2, the largest root of u³ + u² - pu + p."""
    p = sigma_rel**-2
    u = float(np.roots([1, 1, -p, p]).real.max())
    # 0.2887 is the width of γ = 0, 1/√12, rounded up.
    return max(u - 2, 0.0)


# The asymptotic series of ln Γ in odd powers of 1/z; from z = 16 on these terms leave an error near 1e-14.
_SERIES = ((1, 1 / 12), (3, -1 / 360), (5, 1 / 1260), (7, -1 / 1680))
_SERIES_START = 16


def _log_gamma_rise(z: Floats, rise: float) -> Floats:
    """ln Γ(z + rise) - ln Γ(z), up to a constant that depends on ``rise`` only, for z >= 1.

    Two values of ln Γ would each be of the size of z ln z and lose their leading digits to each other. Here
    the difference is taken inside the asymptotic series, after z has been carried to where the series holds.
    """
    carried = sum(np.log1p(rise / (z + j)) for j in range(_SERIES_START))
    z = z + _SERIES_START
    leading = (z - 0.5) * np.log1p(rise / z) + rise * np.log(z + rise)
    series = sum(factor * ((z + rise) ** -power - z**-power) for power, factor in _SERIES)
    return leading + series - carried
