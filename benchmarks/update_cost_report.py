"""What the measurements of `update_cost` mean: a table a case, the record for JSON, and the promises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich import box
from rich.markup import escape
from rich.table import Table

import harness
from harness import Spread, Verdict
from peers import AS_ON_ACCELERATOR, CONTENDERS, LIMIT, PREBUILT

__all__ = ["Measurements", "case_record", "case_table", "overhead_table", "overhead_verdicts", "verdicts"]

EMA, CHECKED_EMA = "polyak EMA", "polyak EMA, checked"
FAST_EMA, FAST_CHECKED_EMA = "polyak[fast] EMA", "polyak[fast] EMA, checked"


@dataclass(frozen=True)
class Measurements:
    """Of one case: seconds per update by contender and round, extra memory, and who was left out and why.

    Memory is a multiple of the parameters' bytes in fp32, under ``"resting"`` and ``"peak"``.
    """

    seconds: dict[str, list[float]]
    memory: dict[str, dict[str, float]]
    left_out: dict[str, str]

    def best_peer(self) -> str | None:
        """The peer with the lowest median time."""
        medians = {name: Spread.of(self.seconds[name]).median for name in self.peers()}
        return min(medians, key=medians.__getitem__, default=None)

    def peers(self) -> list[str]:
        """The peers that were timed."""
        return [name for name in self.seconds if CONTENDERS[name].kind == "peer"]

    def ratio(self, name: str, other: str) -> Spread:
        """The spread of one contender's times over another's, round by round."""
        return harness.ratios(self.seconds[name], self.seconds[other])


@dataclass(frozen=True)
class Promise:
    """A bound on a contender's time (against the limit or the best peer) or memory in one case."""

    case: str
    contender: str
    quantity: Literal["time / limit", "time / best peer", "resting memory", "peak memory"]
    at_most: float

    def value(self, measured: Measurements) -> float | None:
        """The measured figure; None where it was not measured."""
        if self.quantity.endswith("memory"):
            return measured.memory.get(self.contender, {}).get(self.quantity.removesuffix(" memory"))
        other = LIMIT if self.quantity == "time / limit" else measured.best_peer()
        if self.contender not in measured.seconds or other is None:
            return None
        return measured.ratio(self.contender, other).median


PROMISES = (
    Promise("resnet50", EMA, "time / limit", 1.10),
    Promise("resnet50", CHECKED_EMA, "time / limit", 1.35),
    Promise("gpt2", EMA, "time / limit", 1.10),
    Promise("gpt2", CHECKED_EMA, "time / limit", 1.35),
    Promise("gpt2", CHECKED_EMA, "resting memory", 1.005),
    Promise("gpt2", CHECKED_EMA, "peak memory", 1.02),
    Promise("many_small", EMA, "time / best peer", 0.35),
    Promise("many_small", CHECKED_EMA, "time / best peer", 0.75),
    Promise("bf16", EMA, "time / limit", 1.5),
    Promise("bf16", CHECKED_EMA, "resting memory", 1.005),
    Promise("bf16", CHECKED_EMA, "peak memory", 1.02),
    Promise("resnet50", FAST_CHECKED_EMA, "time / limit", 1.05),
    Promise("channels_last", FAST_CHECKED_EMA, "time / limit", 1.10),
    Promise("gpt2", FAST_CHECKED_EMA, "time / limit", 1.05),
    Promise("bf16", FAST_CHECKED_EMA, "time / limit", 1.1),
    Promise("many_small", FAST_CHECKED_EMA, "time / best peer", 0.25),
    Promise("gpt2", FAST_CHECKED_EMA, "resting memory", 1.005),
    Promise("gpt2", FAST_CHECKED_EMA, "peak memory", 1.02),
)
# Of an update of 1,200 tensors that is hardly arithmetic, over torch's own call for all of them: microseconds alone
# tell more of the processor.
MOST_OVERHEAD = {CHECKED_EMA: 0.75, FAST_CHECKED_EMA: 0.75, AS_ON_ACCELERATOR.name: 1.0}


def verdicts(measured: dict[str, Measurements]) -> list[Verdict]:
    """Every promise that these measurements can judge."""
    found = []
    for promise in PROMISES:
        value = promise.value(measured[promise.case]) if promise.case in measured else None
        if value is not None:
            sentence = f"{promise.case}: {promise.contender}, {promise.quantity} at most {promise.at_most:g}"
            found.append(Verdict(sentence, value, value <= promise.at_most))
    for case in measured:
        for ours in (EMA, FAST_EMA):
            if ours in measured[case].seconds and measured[case].peers():
                found.append(_no_peer_ahead(case, ours, measured[case]))
    return found


def _no_peer_ahead(case: str, ours: str, measured: Measurements) -> Verdict:
    """A peer is ahead when we take longer by more than the interquartile range of the per-round ratios."""
    against = {peer: measured.ratio(ours, peer) for peer in measured.peers()}
    nearest = max(against, key=lambda peer: against[peer].median - against[peer].interquartile_range)
    bound = 1 + against[nearest].interquartile_range
    sentence = f"{case}: {ours}, time / {nearest}, the peer nearest to being ahead, at most 1 + the spread"
    return Verdict(f"{sentence} ({bound:.2f})", against[nearest].median, against[nearest].median <= bound)


def overhead_verdicts(microseconds: Mapping[str, Sequence[float]]) -> list[Verdict]:
    """Whether Python, and what torch does for each tensor, take no longer than was promised."""
    found = []
    for name, at_most in MOST_OVERHEAD.items():
        if name in microseconds:
            ratio = harness.ratios(microseconds[name], microseconds[PREBUILT]).median
            sentence = f"1,200 tensors: {name}, overhead / {PREBUILT} at most {at_most:g}"
            found.append(Verdict(sentence, ratio, ratio <= at_most))
    return found


def overhead_table(microseconds: Mapping[str, Sequence[float]]) -> Table:
    """Overhead for the eye: medians, with their interquartile range in brackets."""
    table = Table("contender", title="overhead", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("µs", justify="right")
    for name, values in microseconds.items():
        table.add_row(escape(name), str(Spread.of(values)))
    return table


def case_record(measured: Measurements) -> dict[str, Any]:
    """A case for JSON: medians and quartiles, with every round's seconds so that others can be computed."""
    return {
        "best_peer": measured.best_peer(),
        "contenders": {
            name: {
                "kind": CONTENDERS[name].kind,
                "milliseconds": asdict(Spread.of([1e3 * value for value in seconds])),
                "time_over_limit": asdict(measured.ratio(name, LIMIT)),
                "extra_memory_over_fp32_parameters": measured.memory.get(name),
                "seconds_by_round": seconds,
            }
            for name, seconds in measured.seconds.items()
        },
        "left_out": measured.left_out,
    }


def case_table(title: str, measured: Measurements) -> Table:
    """A case for the eye; ratios are medians over the rounds with their interquartile range in brackets."""
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )
    table.add_column("contender", no_wrap=True)
    for heading in ("ms", "x limit", "x best peer", "memory", "peak"):
        table.add_column(heading, justify="right", no_wrap=True)
    best_peer = measured.best_peer()
    for name, seconds in measured.seconds.items():
        memory = measured.memory.get(name)
        table.add_row(
            escape(name),
            f"{1e3 * Spread.of(seconds).median:.2f}",
            str(measured.ratio(name, LIMIT)),
            str(measured.ratio(name, best_peer)) if best_peer else "",
            *([f"{memory['resting']:.2f}", f"{memory['peak']:.2f}"] if memory else ["", ""]),
        )
    return table
