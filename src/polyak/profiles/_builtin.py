"""The profiles that polyak brings: schemes, which a running mean can follow, and those that look back from the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from types import ModuleType
from typing import Any, Self

import numpy as np

from polyak._checks import whole_within, within
from polyak.errors import OptionError
from polyak.profiles._base import (
    Floats,
    Profile,
    Scheme,
    as_profile,
    parse,
    read_number,
    rounded,
    suggestion,
    written,
)  # fmt: skip

# What a few hundred float64 operations may be off by, relative to their operands.
_ROUNDING = 1e-12
# σ of γ = 0, 1/√12, rounded up.
_WIDEST = 0.2887
# In place of -ln 0, with which positions cannot be multiplied: exp(-_FORGOTTEN t) is 0 for any t that is worth a name.
_FORGOTTEN = 1e100
# What the exponent of `Power` may be given by, and in which range.
_POWERS = {"gamma": "[0, inf)", "sigma_rel": f"(0, {_WIDEST}]", "half_life_fraction": f"(0, {math.log(2)}]"}

# Schemes.


@dataclass(frozen=True)
class Uniform(Scheme):
    """Every sample counts the same: F(t, T) = t/T, c_n = 1/n; unit: samples.

    Source: Polyak and Juditsky 1992; Ruppert 1988; SWA is Izmailov et al. 2018, arXiv:1803.05407.

    >>> import polyak
    >>> polyak.Uniform().weights([0, 1, 2, 4])
    array([0.25, 0.25, 0.5 ])
    """

    unit = "samples"
    examples = ("uniform",)

    def coefficient_between(self, before: Any, now: Any, xp: ModuleType = np) -> Any:
        return 1 / now

    def share(self, t: Floats, total: float) -> Floats:
        return t / total


@dataclass(frozen=True, kw_only=True)
class EMA(Scheme):
    """Exponential moving average: a sample's weight falls by β per unit of its age.

    F(t, T) = (β^-t - 1)/(β^-T - 1) and c_n = (1-β)/(1-βⁿ), which starts as the plain mean and so needs no
    warm-up.

    Args:
        half_life: optimizer steps after which a weight has halved, positive: β = 2^(-1/half_life) per step,
            so it means the same whatever the gap between samples. Unit: steps.
        decay: β per sample, in [0, 1). Unit: samples. 0 keeps the newest sample alone.
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

    examples = ("ema:half_life=2000", "ema:decay=0.999", "ema:decay=0.9,debias=false")

    @classmethod
    def candidates(cls, steps: int) -> Sequence[Profile]:
        return [cls(half_life=rounded(part * steps, 3)) for part in (0.01, 0.025, 0.05, 0.1, 0.2)]

    def __post_init__(self) -> None:
        given, value = self._exactly_one("half_life", "decay")
        if given == "half_life":
            self._set(half_life=within("(0, inf)", given, value), unit="steps")
        else:
            self._set(decay=within("[0, 1)", given, value), unit="samples")
        if not isinstance(self.debias, bool):
            raise OptionError(f"debias must be True or False, got {self.debias!r}")

    # Everything is in terms of exp(-rate·age), which cannot overflow however long the run.

    def coefficient_between(self, before: Any, now: Any, xp: ModuleType = np) -> Any:
        forgotten = -xp.expm1(-self._rate * (now - before))
        if self.debias:
            return forgotten / -xp.expm1(-self._rate * now)
        # A bare 1.0 would be copied to the tensors' device, which waits for it.
        return xp.where(before == 0, xp.ones_like(forgotten), forgotten)

    def share(self, t: Floats, total: float) -> Floats:
        kept = np.exp(-self._rate * (total - t))
        if self.debias:
            return kept * (np.expm1(-self._rate * t) / np.expm1(-self._rate * total))
        return np.where(t > 0, kept, 0.0)

    def longer(self, factor: float) -> Scheme:
        given, value = self._exactly_one("half_life", "decay")
        if given == "half_life":
            return replace(self, half_life=rounded(value * factor, 4))
        return replace(self, decay=1 - rounded((1 - value) / factor, 4))

    @cached_property
    def _rate(self) -> float:
        """-ln β per unit."""
        given, value = self._exactly_one("half_life", "decay")
        if given == "half_life":
            return math.log(2) / value
        return -math.log(value) if value else _FORGOTTEN


def decay_at_batch_size(decay: float, batch_size: float, reference: float) -> float:
    """The decay that has the memory in examples that ``decay`` has at another batch size: decay^(batch/reference).

    An EMA that halves over so many examples does so in fewer steps where batches are larger. Only the decay of a
    scheme per sample wants this, where the learning rate is scaled with the batch size, too; a half-life in steps is
    multiplied by reference/batch.

    Args:
        decay: per step at the reference batch size, in [0, 1].
        batch_size: examples per step now.
        reference: examples per step that ``decay`` was chosen at.

    Raises:
        OptionError: a decay or a size out of range.

    Source: Busbridge et al. 2023, How to Scale Your EMA, arXiv:2307.13813.

    >>> from polyak.profiles import decay_at_batch_size
    >>> round(decay_at_batch_size(0.999, batch_size=1024, reference=256), 6)
    0.996006
    """
    sizes = (within("(0, inf)", "batch_size", batch_size), within("(0, inf)", "reference", reference))
    return within("[0, 1]", "decay", decay) ** (sizes[0] / sizes[1])


@dataclass(frozen=True, kw_only=True)
class Power(Scheme):
    """Power-function averaging: F(t, T) = (t/T)^(γ+1), c_n = 1 - (1 - 1/n)^(γ+1); unit: steps.

    Its shape scales with the run: the relative width, the standard deviation of t/T, is always
    σ = √((γ+1)/((γ+2)²(γ+3))).

    Args:
        gamma: γ, at least 0; 0 is the uniform average.
        sigma_rel: σ, in (0, 0.2887], instead of γ; smaller is closer to the newest weights.
        half_life_fraction: f, in (0, ln 2], instead of γ = ln 2/f - 1: at step t weights halve with every f t steps
            of age, to first order. Half the weight lies on the last 1 - e^-f of the run, about f where that is small.
            It is torchtitan's EMA, whose decay at its t-th update is 2^(-1/(f t)): c_t is the same up to 1/t².

    Raises:
        OptionError: not exactly one of the three was given, or it is out of range.

    Source: Karras et al. 2024 (EDM2), arXiv:2312.02696, section 3.

    >>> import polyak
    >>> polyak.Power(gamma=1).weights([0, 1, 2]).tolist()
    [0.25, 0.75]
    >>> round(polyak.Power(sigma_rel=0.1).exponent, 2)
    7.94
    """

    gamma: float | None = None
    sigma_rel: float | None = None
    half_life_fraction: float | None = None

    unit = "steps"
    examples = ("power:sigma_rel=0.1", "power:gamma=6.94", "power:half_life_fraction=0.05")

    @classmethod
    def candidates(cls, steps: int) -> Sequence[Profile]:
        return [cls(gamma=gamma) for gamma in (1, 2, 4, 8, 16, 32)]

    def __post_init__(self) -> None:
        given, value = self._exactly_one(*_POWERS)
        self._set(**{given: within(_POWERS[given], given, value)})

    @cached_property
    def exponent(self) -> float:
        """γ + 1, whatever was given."""
        given, value = self._exactly_one(*_POWERS)
        if given == "half_life_fraction":
            return math.log(2) / value
        return 1 + (value if given == "gamma" else _gamma_of_width(value))

    def coefficient_between(self, before: Any, now: Any, xp: ModuleType = np) -> Any:
        # The first sample takes log 0 = -inf, which gives its coefficient, 1, exactly: NumPy need not warn.
        with np.errstate(divide="ignore"):
            return -xp.expm1(self.exponent * xp.log1p(-(now - before) / now))

    def share(self, t: Floats, total: float) -> Floats:
        return (t / total) ** self.exponent

    def longer(self, factor: float) -> Scheme:
        given, value = self._exactly_one(*_POWERS)
        if given == "gamma":
            return replace(self, gamma=rounded(value / factor, 4))
        widest = _WIDEST if given == "sigma_rel" else math.log(2)
        return replace(self, **{given: min(rounded(value * factor, 4), widest)})


@dataclass(frozen=True, kw_only=True)
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
    examples = ("polynomial:eta=8",)

    def __post_init__(self) -> None:
        self._set(eta=within("[0, inf)", "eta", self.eta))

    def coefficient_between(self, before: Any, now: Any, xp: ModuleType = np) -> Any:
        return (self.eta + 1) / (now + self.eta)

    def share(self, t: Floats, total: float) -> Floats:
        rise = self.eta + 1
        # One factor of the Gamma functions is kept out of the logarithm, so that F is 0 at t = 0.
        first = (t / (t + rise)) / (total / (total + rise))
        return first * np.exp(_log_gamma_rise(t + 1, rise) - _log_gamma_rise(np.array(total + 1), rise))

    def longer(self, factor: float) -> Scheme:
        return replace(self, eta=rounded(self.eta / factor, 4))


def _gamma_of_width(sigma_rel: float) -> float:
    """The γ >= 0 with σ = sigma_rel: for u = γ+2 and p = σ^-2, the largest root of u³ + u² - pu + p."""
    p = sigma_rel**-2
    u = float(np.roots([1, 1, -p, p]).real.max())
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


@dataclass(frozen=True, kw_only=True)
class WarmupEMA(Scheme):
    """EMA with the warm-up of torch_ema, diffusers, timm or ema-pytorch: its decay rises sample by sample.

    The first sample is copied, c_1 = 1, and the n-th is taken in with c_n = 1 - d_n, where d_n is ::

        n / (n + 9)                                 without ``power``: torch_ema, diffusers
        1 - (1 + (n - 1)/inv_gamma)^-power          with it: timm, ema-pytorch, diffusers' ``use_ema_warmup``

    but never below ``min_decay`` or above ``decay``. So F(t, T) = d_{t+1} d_{t+2} … d_T; between two samples it is
    interpolated geometrically, up to the first in a straight line from 0. Unit: samples.

    No warm-up is needed where :class:`EMA` debiases; this is for runs that shall have those tools' numbers.

    Args:
        decay: the most that d_n rises to, in [0, 1]; at 1 it goes on rising.
        power: how fast it rises, positive: 2/3 and 3/4 are usual, and 1 is the uniform average where
            ``inv_gamma`` is 1 too.
        inv_gamma: the number of samples in which it begins to, positive; only with ``power``.
        min_decay: the least that d_n is after the first sample, in [0, 1) and at most ``decay``.

    Raises:
        OptionError: a value out of range, or ``inv_gamma`` without ``power``.

    Source: the first law is that of TensorFlow's ``ExponentialMovingAverage`` with ``num_updates``, the second K.
    Crowson's in k-diffusion, from where timm, ema-pytorch and diffusers have it.

    >>> import polyak
    >>> law = polyak.WarmupEMA(decay=0.999)
    >>> [round(1 - law.coefficient(n), 4) for n in (1, 2, 3, 10**6)]
    [0.0, 0.1818, 0.25, 0.999]
    >>> polyak.WarmupEMA(decay=0.999, power=1).weights([0, 1, 2, 4]).round(4).tolist()
    [0.25, 0.25, 0.5]
    """

    decay: float
    power: float | None = None
    inv_gamma: float = 1.0
    min_decay: float = 0.0

    unit = "samples"
    name = "warmup-ema"
    examples = ("warmup-ema:decay=0.9999", "warmup-ema:decay=0.9999,power=0.75")

    def __post_init__(self) -> None:
        decay = within("[0, 1]", "decay", self.decay)
        self._set(decay=decay, min_decay=within("[0, 1)", "min_decay", self.min_decay))
        self._set(inv_gamma=within("(0, inf)", "inv_gamma", self.inv_gamma))
        if self.min_decay > decay:
            raise OptionError(f"min_decay must be at most decay, which is {decay}, got {self.min_decay}")
        if self.power is not None:
            self._set(power=within("(0, inf)", "power", self.power))
        elif self.inv_gamma != 1:
            raise OptionError("inv_gamma belongs to the law with a power: give both, or neither")

    def coefficient_between(self, before: Any, now: Any, xp: ModuleType = np) -> Any:
        taken = xp.clip(self._rising(now), 1 - self.decay, 1 - self.min_decay)
        return xp.where(before == 0, xp.ones_like(taken), taken)

    def share(self, t: Floats, total: float) -> Floats:
        sample, last = np.floor(t), np.floor(total)
        kept = self._log_kept(np.maximum(sample, 1), np.maximum(last, 1))
        # Parts of the step to the next sample; the one to the first sample is the straight line.
        kept = kept - np.where(sample > 0, (t - sample) * self._log_decay(sample + 1), 0.0)
        kept = kept + np.where(last > 0, (total - last) * self._log_decay(last + 1), 0.0)
        return np.minimum(t, 1.0) / np.minimum(total, 1.0) * np.exp(kept)

    def longer(self, factor: float) -> Scheme | None:
        return replace(self, decay=1 - rounded((1 - self.decay) / factor, 4)) if self.decay < 1 else None

    @property
    def _law(self) -> tuple[float, float, float]:
        """a, g and p of c_n = a (1 + (n - 1)/g)^-p, which both laws are: 9/(n + 9) has 0.9, 10 and 1."""
        return (0.9, 10.0, 1.0) if self.power is None else (1.0, self.inv_gamma, self.power)

    def _rising(self, n: Any) -> Any:
        """The coefficient of sample n that the law gives, before ``decay`` and ``min_decay``."""
        a, g, p = self._law
        return a * (1 + (n - 1) / g) ** -p

    def _log_rising(self, n: Floats) -> Floats:
        with np.errstate(divide="ignore"):
            return np.maximum(np.log1p(-self._rising(n)), -_FORGOTTEN)

    def _slope(self, n: Floats) -> Floats:
        """The derivative of `_log_rising`."""
        _, g, p = self._law
        taken = self._rising(n)
        return p / (g + n - 1) * taken / (1 - taken)

    def _last_below(self, decay: float) -> float:
        """The last sample, at least the first, up to which the law gives a decay below this one."""
        a, g, p = self._law
        with np.errstate(over="ignore", divide="ignore"):
            reached = 1 + g * (np.float64(a) / (1 - decay) if decay < 1 else np.inf) ** (1 / p) - g
        return float(np.clip(np.floor(reached), 1, _FORGOTTEN))

    def _log_decay(self, n: Floats) -> Floats:
        """That of the decay of a sample after the first, as :meth:`_log_kept` adds it up."""
        return np.clip(self._log_rising(n), _log(self.min_decay), _log(self.decay))

    def _log_kept(self, n: Floats, last: Floats) -> Floats:
        """ln F between two samples: a sum of ln d_k, part by part, so that nothing large cancels."""
        rises = self._last_below(self.min_decay)
        capped = max(rises, self._last_below(self.decay))
        flat = np.minimum(last, rises) - np.minimum(n, rises)
        full = np.maximum(last, capped) - np.maximum(n, capped)
        to, start = (_sum_of(self._log_rising, self._slope, np.clip(x, rises, capped)) for x in (last, n))
        return flat * _log(self.min_decay) + (to - start) + full * _log(self.decay)


def _log(decay: float) -> float:
    return math.log(decay) if decay else -_FORGOTTEN


# Terms that are added up one by one; with the two corrections after them, a sum of logarithms is exact to 1e-13.
_SUMMED = 4096
_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(12)


def _sum_of(term: Callable[[Floats], Floats], slope: Callable[[Floats], Floats], n: Floats) -> Floats:
    """The sum of term(2), …, term(n), for whole n from 1 on, where ``slope`` is the derivative of ``term``.

    Beyond the first terms by the formula of Euler and Maclaurin, whose integral is taken between doublings of n.
    """
    summed = np.concatenate([[0.0], np.cumsum(term(np.arange(2.0, _SUMMED + 1)))])
    x = np.maximum(n, float(_SUMMED))
    doublings = 1 + math.ceil(math.log2(np.max(x) / _SUMMED + 1))
    edges = 1 + (_SUMMED - 1) * np.exp2(np.arange(doublings, dtype=np.float64))
    integrals = np.concatenate([[0.0], np.cumsum(_integral(term, edges[:-1], edges[1:]))])
    panel = np.searchsorted(edges, x, side="right") - 1
    ends = (term(x) - term(edges[0])) / 2 + (slope(x) - slope(edges[0])) / 12
    return (
        summed[np.minimum(n, _SUMMED).astype(int) - 1]
        + integrals[panel]
        + _integral(term, edges[panel], x)
        + ends
    )


def _integral(f: Callable[[Floats], Floats], start: Floats, stop: Floats) -> Floats:
    middle, half = (start + stop) / 2, (stop - start) / 2
    return half * sum(w * f(middle + half * node) for node, w in zip(_NODES, _NODE_WEIGHTS, strict=True))


# Profiles that look at a run from its end: they are applied after training.


@dataclass(frozen=True)
class Tail(Profile):
    """Uniform on the last part of the run, nothing before it.

    Args:
        fraction: the part of the samples, in (0, 1]. Unit: samples.
        steps: the last ``steps`` optimizer steps instead, at least 1; the whole run where that is shorter.
            Unit: steps.

    Raises:
        OptionError: both or neither of ``fraction`` and ``steps``, or one out of range.

    Source: suffix averaging, Rakhlin et al. 2012, arXiv:1109.5647; LAWA, Kaddour 2022, arXiv:2209.14981.

    >>> import polyak
    >>> polyak.Tail(0.5).weights([0, 1, 2, 3, 4]).tolist()
    [0.0, 0.0, 0.5, 0.5]
    """

    fraction: float | None = None
    _: KW_ONLY
    steps: int | None = None

    examples = ("tail:0.4", "tail:steps=2000")

    @classmethod
    def candidates(cls, steps: int) -> Sequence[Profile]:
        return [cls(fraction) for fraction in (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)]

    def __post_init__(self) -> None:
        given, value = self._exactly_one("fraction", "steps")
        if (
            given == "fraction"
            and isinstance(value, int | float)
            and 2 <= value < 1e9
            and value == int(value)
        ):
            raise OptionError(
                f"fraction must be a number in (0, 1], got {value:g}: the newest {value:g} checkpoints are "
                f"--last {value:g}, or last={value:g} in Python, and the last {value:g} steps are tail:steps={value:g}"
            )
        if given == "fraction":
            self._set(fraction=within("(0, 1]", given, value), unit="samples")
        else:
            self._set(steps=whole_within("[1, inf)", given, value), unit="steps")

    def share(self, t: Floats, total: float) -> Floats:
        given, value = self._exactly_one("fraction", "steps")
        length = _part(value, total) if given == "fraction" else min(value, total)
        return _position_in_tail(t, total, length)


@dataclass(frozen=True)
class Window(Profile):
    """Uniform between two optimizer steps, on ``(start, stop]``; unit: steps.

    Args:
        start: steps before the window, at least 0.
        stop: its last step, above ``start``; a window that reaches past the end of the run ends there.

    Raises:
        OptionError: an empty window; or, when it is used, a run that ends before it begins.

    Source: PMA, Li et al. 2025, arXiv:2505.12082; long used in speech recognition (icefall).

    >>> import polyak
    >>> polyak.Window(100, 300).weights([0, 100, 200, 300, 400]).tolist()
    [0.0, 0.5, 0.5, 0.0]
    """

    start: int
    stop: int

    unit = "steps"
    examples = ("window:1000,2000",)

    def __post_init__(self) -> None:
        start = whole_within("[0, inf)", "start", self.start)
        self._set(start=start, stop=whole_within(f"({start}, inf)", "stop", self.stop))

    def share(self, t: Floats, total: float) -> Floats:
        if self.start >= total:
            raise OptionError(
                f"{self} lies outside the run, which has {total:.15g} steps: choose an earlier start"
            )
        stop = min(self.stop, total)
        return np.clip((t - self.start) / (stop - self.start), 0.0, 1.0)


Shape = str | Callable[[float], float]

_SHAPES: dict[str, Callable[[Floats], Floats]] = {
    "linear": lambda x: 1 - x,
    "sqrt": lambda x: np.sqrt(1 - x),
    "1-sqrt": lambda x: 1 - np.sqrt(x),
    "cosine": lambda x: (1 + np.cos(np.pi * x)) / 2,
}


@dataclass(frozen=True)
class Decay(Profile):
    """Stands in for a learning-rate decay over the last part of the run; unit: steps.

    Averaging with these weights scales the update that was made at position x of that part, x from 0 to 1, by
    w(x), as a learning rate falling like w would have done: F = 1 - w(x), and 0 before.

    Args:
        shape: w as ``"linear"`` 1-x, ``"sqrt"`` √(1-x) (the newest count most), ``"1-sqrt"`` 1-√x (the oldest
            count most), ``"cosine"`` (1+cos πx)/2, or a function of one float that does not increase from
            w(0) = 1 and stays in [0, 1]. What is left at the end, w(1), goes to the newest.
        fraction: the part of the run that w spans, in (0, 1].

    Raises:
        OptionError: an unknown shape, a function that breaks these rules, or a fraction out of range.

    Source: WSM, Tian et al. 2025, arXiv:2507.17634.

    >>> import polyak
    >>> polyak.Decay("sqrt", 0.5).weights([0, 4, 7, 8]).tolist()
    [0.0, 0.5, 0.5]
    >>> polyak.Decay(lambda x: 1 - x**2, 1.0).weights([0, 1, 2]).tolist()
    [0.25, 0.75]
    """

    shape: Shape
    fraction: float

    unit = "steps"
    examples = ("decay:sqrt:0.4", "decay:linear:0.4", "decay:1-sqrt:1", "decay:cosine:0.7")
    separator = ":"
    replaces_decay = True

    @classmethod
    def candidates(cls, steps: int) -> Sequence[Profile]:
        return [cls(shape, part) for shape in ("sqrt", "linear") for part in (0.1, 0.2, 0.4, 0.6, 0.8)]

    def __post_init__(self) -> None:
        self._set(fraction=within("(0, 1]", "fraction", self.fraction))
        if callable(self.shape):
            _check_falls(self.shape)
        elif self.shape not in tuple(_SHAPES):
            raise OptionError(f"unknown decay shape {self.shape!r}: {suggestion(str(self.shape), _SHAPES)}")

    def share(self, t: Floats, total: float) -> Floats:
        w = _elementwise(self.shape) if callable(self.shape) else _SHAPES[self.shape]
        return 1 - w(_position_in_tail(t, total, _part(self.fraction, total)))


@dataclass(frozen=True)
class Weights(Profile):
    """Given or fitted weights, one per block, divided by their sum; unit: blocks.

    F is piecewise linear with F(k, K) = (a_1 + … + a_k)/(a_1 + … + a_K). Only here may weights be negative,
    and then the average may leave the convex hull of the blocks.

    Args:
        a: the K weights, oldest block first.

    Raises:
        OptionError: no weights, one that is not finite, or a sum that is zero or not finite; or, when they
            are used, a run of another number of blocks.

    Source: soups, Wortsman et al. 2022, arXiv:2203.05482; fitted: TWA, Li et al. 2023, arXiv:2205.13104.

    >>> import polyak
    >>> polyak.Weights([1, 1, 2]).weights([0, 1, 2, 3]).tolist()
    [0.25, 0.25, 0.5]
    """

    a: Sequence[float] | Floats

    unit = "blocks"
    signed = True
    examples = ("weights:1,2,3", "weights:-0.5,1.5")

    def __post_init__(self) -> None:
        if not hasattr(self.a, "__iter__"):
            raise OptionError(f"weights must be a sequence of numbers, got {self.a!r:.60}")
        a = tuple(within("(-inf, inf)", "a weight", value) for value in self.a)
        total = sum(a)
        # A sum of rounding errors is no sum: dividing by it would give weights of any size.
        if not abs(total) > _ROUNDING * sum(map(abs, a)):
            raise OptionError(
                f"the weights must have a sum that is finite and not zero, got {len(a)} that sum to {total}"
            )
        self._set(a=a)

    def share(self, t: Floats, total: float) -> Floats:
        sums = np.cumsum([0.0, *self.a])
        blocks = len(sums) - 1
        if total != blocks:
            raise OptionError(
                f"there must be one weight for each of {total:.15g} blocks or inputs, got {blocks}"
            )
        return np.interp(t, np.arange(blocks + 1), sums / sums[-1])


@dataclass(frozen=True)
class Blend(Profile):
    """A point between the weights that the run ended with, and an average of it; unit: that of the average.

    F(t, T) = s · P(t, T) for t < T, and 1 at T: the share s of the weight lies as the profile P has it, and all the
    rest on the live weights of the last step. Its text has s first: ``blend:0.4:decay:sqrt:0.4``.

    In a recorded run the live weights are those that the recorder kept when it was closed, beside the blocks; of
    checkpoints they are the last. A blend of a blend is one blend.

    Args:
        profile: P, or its text.
        part: s, in [0, 1]. At 1 this is P, at 0 the live weights.

    Raises:
        OptionError: no profile, or a part out of range; or as P does.

    >>> import polyak
    >>> polyak.parse("blend:0.4:decay:sqrt:0.4")
    Blend(Decay('sqrt', 0.4), 0.4)
    >>> polyak.Blend("tail:0.5", 0.8).weights([0, 1, 2, 3, 4]).round(9).tolist()
    [0.0, 0.0, 0.4, 0.6]
    """

    profile: Profile
    part: float

    examples = ("blend:0.4:decay:sqrt:0.4", "blend:0.25:tail:steps=2000")

    def __post_init__(self) -> None:
        inner, part = as_profile(self.profile), within("[0, 1]", "part", self.part)
        if isinstance(inner, Blend):
            inner, part = inner.profile, part * inner.part
        self._set(profile=inner, part=part, unit=inner.unit, signed=inner.signed)

    def share(self, t: Floats, total: float) -> Floats:
        return self.part * self.profile.share(t, total)

    @classmethod
    def from_text(cls, options: str | None) -> Self:
        part, colon, profile = (options or "").partition(":")
        if not colon:
            raise ValueError("it lacks a part in [0, 1], or the profile of the average")
        return cls(parse(profile), read_number(part))

    def __str__(self) -> str:
        return f"{self.name}:{written(self.part)}:{self.profile}"


def without_live(profile: Profile) -> tuple[Profile, float]:
    """What a profile gives to the steps of a run, and the weight that it gives to the live weights beside them.

    >>> without_live(Blend("uniform", 0.75)), without_live(Uniform())
    ((Uniform(), 0.25), (Uniform(), 0.0))
    """
    return (profile.profile, 1 - profile.part) if isinstance(profile, Blend) else (profile, 0.0)


def _part(fraction: float, total: float) -> float:
    """``fraction * total``; whole where it is meant to be, as 0.55 of 100 would reach into a 56th sample."""
    length = fraction * total
    whole = round(length)
    return whole if math.isclose(length, whole, rel_tol=_ROUNDING) else length


def _position_in_tail(t: Floats, total: float, length: float) -> Floats:
    """Where t lies in the last ``length`` of the run: 0 before it, 1 at its end."""
    return np.clip(1 - (total - t) / length, 0.0, 1.0)


def _elementwise(shape: Callable[[float], float]) -> Callable[[Floats], Floats]:
    return np.vectorize(shape, otypes=[np.float64])


def _check_falls(shape: Callable[[float], float]) -> None:
    """Refuses a function that cannot be a learning-rate decay: it is looked at on a grid."""
    rule = _broken_rule(_elementwise(shape)(np.linspace(0, 1, 1025)))
    if rule:
        raise OptionError(f"a decay shape must {rule}: {shape!r}")


def _broken_rule(w: Floats) -> str:
    if not np.all(np.isfinite(w)):
        return "be finite on [0, 1]"
    if w[0] != 1:
        return f"be 1 at x = 0, not {w[0]}"
    if np.any(np.diff(w) > _ROUNDING):
        return "never increase"
    return f"stay in [0, 1], not end at {w[-1]}" if w[-1] < 0 else ""
