"""What a profile comes to on blocks: where its weight lies, and how much of it the blocks cannot place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from polyak._checks import warn_user
from polyak.combine import Span, coefficients
from polyak.errors import OptionError
from polyak.profiles import Profile, Scheme, without_live
from polyak.trajectory._blocks import Block

__all__ = ["Explanation", "block_coefficients", "explain", "warn_if_coarse"]

Floats = NDArray[np.float64]

# Positions looked at within a block, at most.
_POSITIONS = 1024
_ROUNDING = 1e-9
# The part of a scheme's weight that may lie on the wrong samples of their blocks.
_MOST_MISPLACED = 0.1
_MOST_DOUBLINGS = 40
_EXPONENT_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Explanation:
    """How a profile is rebuilt from blocks.

    Within a block all samples weigh the same, whatever the profile asks for. So some of its weight lies on other
    samples than asked, never outside their block.

    Attributes:
        profile: what was asked for.
        blocks: oldest first.
        coefficients: float64, one per block; they sum to 1, together with ``live``.
        live: the weight of the weights that the run ended with, where those are no block; see
            :class:`polyak.Blend`.
        exact: whether no weight is misplaced.
        misplaced_weight: the part of the weight that lies on other samples than the profile asks for. An
            averaged number is off by at most this part of the widest range that the number runs through within
            one block.
        partly_covered_weight: the part of the weight that lies in blocks which the profile covers in part.
        effective_samples: 1/Σ a², over the weights a of all samples: how many equal ones would say as much.
        warnings: what speaks against this profile here, in sentences.
    """

    profile: Profile
    blocks: Sequence[Block]
    coefficients: Floats
    live: float = 0.0

    # Each is worked out when it is asked for: choosing among many profiles looks at few.

    @cached_property
    def misplaced_weight(self) -> float:
        inner, live = without_live(self.profile)
        return (1 - live) * _misplaced(inner, self.blocks)

    @cached_property
    def partly_covered_weight(self) -> float:
        inner, _ = without_live(self.profile)
        return float(np.abs(self.coefficients[_are_partly_covered(inner, self.blocks)]).sum())

    @cached_property
    def effective_samples(self) -> float:
        counts = np.array([block.count for block in self.blocks])
        return float(1 / ((self.coefficients**2 / counts).sum() + self.live**2))

    @cached_property
    def warnings(self) -> tuple[str, ...]:
        found = list(_warnings(self.profile, self.blocks, self.coefficients))
        return (*found, self.coarseness) if self.coarseness else tuple(found)

    @cached_property
    def coarseness(self) -> str:
        """What there is to say where the blocks are too long for the profile, else nothing."""
        if self.misplaced_weight <= _MOST_MISPLACED:
            return ""
        return (
            f"the blocks are too long for {self.profile}: {self.misplaced_weight:.0%} of its weight lies on other "
            "samples than it asks for"
        )

    @property
    def exact(self) -> bool:
        """Whether no weight is misplaced."""
        return self.misplaced_weight <= _ROUNDING

    def __str__(self) -> str:
        head = f"{self.profile}: " + (
            "exact"
            if self.exact
            else f"{self.misplaced_weight:.2%} of the weight lies on other samples of its block than asked for"
        )
        facts = (
            f"{self.partly_covered_weight:.2%} of the weight in blocks that it covers in part, "
            f"{self.effective_samples:.1f} effective samples"
        )
        rows = [
            f"  {block!s:>24}  {block.count:>9} samples  {coefficient:10.6f}"
            for block, coefficient in zip(self.blocks, self.coefficients, strict=True)
            if coefficient
        ]
        if self.live:
            rows.append(f"  {'live':>24}  {1:>9} sample   {self.live:10.6f}")
        return "\n".join([head, facts, *rows, *(f"warning: {warning}" for warning in self.warnings)])


def warn_if_coarse(explanation: Explanation) -> None:
    """Warn where the blocks are too long for the profile, and say what to record instead."""
    if not explanation.coarseness:
        return
    counted = zip(explanation.blocks, explanation.coefficients, strict=True)
    longest = max(block.steps for block, a in counted if a)
    warn_user(
        f"{explanation.coarseness}. Those that count are up to {longest} optimizer steps long: record with a "
        "shorter block=, or, where blocks have merged, with a larger max_blocks="
    )


def explain(profile: Profile, blocks: Sequence[Block], *, beside: bool = False) -> Explanation:
    """The coefficients of ``profile`` on ``blocks``, and what is lost by them.

    Args:
        profile: any profile.
        blocks: oldest first.
        beside: whether the live weights are one more input beside the blocks, or those of the last of them.

    Raises:
        OptionError: the profile does not fit the run, or looks back less far than the blocks resolve.

    >>> import polyak
    >>> found = explain(polyak.Tail(0.5), [Block(0, 60, count=60), Block(60, 100, count=40)])
    >>> found.coefficients.round(3).tolist(), found.exact, round(found.misplaced_weight, 3)
    ([0.2, 0.8], False, 0.167)
    """
    row = block_coefficients(profile, blocks, beside=beside)
    return Explanation(profile, blocks, np.array(row[: len(blocks)]), row[-1] if beside else 0.0)


def block_coefficients(profile: Profile, blocks: Sequence[Block], *, beside: bool) -> list[float]:
    """One coefficient per block, with ``beside`` one more for the live weights; they sum to 1.

    Raises:
        OptionError: the profile does not fit the run, or looks back less far than the blocks resolve.
    """
    inner, _ = without_live(profile)
    if isinstance(inner, Scheme):
        _refuse_unresolved(inner, blocks)
    return coefficients(profile, [Span(b.start, b.stop, b.count) for b in blocks], beside=beside)


def _refuse_unresolved(scheme: Scheme, blocks: Sequence[Block]) -> None:
    """Profiles that are no schemes say themselves what part of a run they cover, and are warned about."""
    misplaced = _misplaced(scheme, blocks)
    if misplaced <= _MOST_MISPLACED:
        return
    raise OptionError(
        f"the blocks cannot give {scheme}: {misplaced:.0%} of its weight would lie on other samples than it asks "
        f"for, as {_reason_and_cure(scheme, blocks)}"
    )


def _reason_and_cure(scheme: Scheme, blocks: Sequence[Block]) -> str:
    too_short = "it looks back less far than they resolve"
    if shortest := _shortest(scheme, blocks):
        return (
            f"{too_short}. The shortest possible here is {shortest}; for a shorter one record shorter blocks, or "
            "follow it while training"
        )
    if _first_sample(scheme, blocks) > _MOST_MISPLACED:
        return "its first sample alone counts that much, which no block holds alone; where it can, take it debiased"
    return f"{too_short}; record shorter blocks, or follow it while training"


def _within_blocks(profile: Profile, blocks: Sequence[Block], parts: NDArray[np.int64]) -> Floats:
    """The weights that ``profile`` gives to each block's parts, one block after the other.

    Args:
        profile: any profile.
        blocks: K blocks.
        parts: into how many parts of equal length each of the K is cut.
    """
    starts, stops = _edges(profile, blocks)
    edges = parts + 1
    which = np.repeat(np.arange(len(parts)), edges)
    nth = np.arange(len(which)) - _firsts(edges)[which]
    positions = starts[which] + (stops - starts)[which] * (nth / parts[which])
    shares = profile.cumulative(positions.clip(0, stops[-1]), stops[-1])
    return np.diff(shares)[which[1:] == which[:-1]]


def _firsts(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each run of so many elements begins."""
    return np.cumsum(lengths) - lengths


def _are_partly_covered(profile: Profile, blocks: Sequence[Block]) -> NDArray[np.bool_]:
    """Which blocks have parts with weight and parts without."""
    parts = np.full(len(blocks), _POSITIONS)
    inside = _within_blocks(profile, blocks, parts).reshape(len(blocks), _POSITIONS)
    weighs = inside > _ROUNDING * inside.sum(axis=1, keepdims=True)
    return weighs.any(axis=1) & (inside <= 0).any(axis=1)


def _edges(profile: Profile, blocks: Sequence[Block]) -> tuple[Floats, Floats]:
    """Where each block begins and ends, in the unit of ``profile``."""
    if profile.unit == "steps":
        return np.array([float(b.start) for b in blocks]), np.array([float(b.stop) for b in blocks])
    stops = np.cumsum([b.count if profile.unit == "samples" else 1 for b in blocks], dtype=np.float64)
    return np.array([0, *stops[:-1]]), stops


def _misplaced(profile: Profile, blocks: Sequence[Block]) -> float:
    """Half of Σ |a - b| over all samples, a being the weight asked for and b what the block gives it."""
    if profile.unit == "blocks":
        return 0.0
    parts = np.array([min(block.count, _POSITIONS) for block in blocks])
    inside = _within_blocks(profile, blocks, parts)
    given = np.add.reduceat(inside, _firsts(parts))
    return float(np.abs(inside - np.repeat(given / parts, parts)).sum() / 2 / given.sum())


def _first_sample(profile: Profile, blocks: Sequence[Block]) -> float:
    """The weight that the profile gives to the first sample alone."""
    inside = _within_blocks(profile, blocks, np.array([min(block.count, _POSITIONS) for block in blocks]))
    return float(inside[0] / inside.sum())


def _shortest(scheme: Scheme, blocks: Sequence[Block]) -> Scheme | None:
    """The scheme of this kind that looks back least far of those that the blocks resolve, if there is one."""

    def resolves(exponent: float) -> bool:
        longer = scheme.longer(2**exponent)
        return longer is not None and _misplaced(longer, blocks) <= _MOST_MISPLACED

    high = next((float(exponent) for exponent in range(1, _MOST_DOUBLINGS) if resolves(exponent)), None)
    if high is None:
        return None
    low = high - 1
    while high - low > _EXPONENT_TOLERANCE:
        middle = (low + high) / 2
        low, high = (low, middle) if resolves(middle) else (middle, high)
    return scheme.longer(2**high)


def _warnings(profile: Profile, blocks: Sequence[Block], found: Floats) -> tuple[str, ...]:
    if not profile.replaces_decay:
        return ()
    rates = [block.lr for block, a in zip(blocks, found, strict=True) if a and block.lr]
    least, greatest = min((r.min for r in rates), default=0), max((r.max for r in rates), default=0)
    if greatest - least <= _ROUNDING * greatest:
        return ()
    return (
        f"the learning rate was not constant over the steps that {profile} covers ({least:.3g} to {greatest:.3g}); "
        "it stands in for a decay of the learning rate, and decaying twice does harm",
    )
