"""What the benchmarks share: fair timing, ratios with their spread, memory peaks, a record of the setting."""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import platform
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from rich import box
from rich.markup import escape
from rich.progress import track
from rich.table import Table

__all__ = [
    "Spread",
    "Verdict",
    "calls_lasting",
    "environment",
    "in_fresh_process",
    "memory_is_measurable",
    "on_two_processes",
    "peak_anonymous_bytes",
    "peak_resident_bytes",
    "ratios",
    "resident_bytes",
    "rotated",
    "study_parser",
    "time_rounds",
    "verdict_table",
    "write_json",
]

Job = TypeVar("Job")
Result = TypeVar("Result")

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_HIGH_WATER_MARK = "5"
_SAMPLING_SECONDS = 2e-4


@dataclass(frozen=True)
class Spread:
    """The median of repeated measurements and their quartiles, in the unit of what was measured."""

    median: float
    lower_quartile: float
    upper_quartile: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of ``values``, one for each round."""
        lower, median, upper = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
        return cls(median, lower, upper)

    @property
    def interquartile_range(self) -> float:
        """The width of the middle half."""
        return self.upper_quartile - self.lower_quartile

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.interquartile_range:.2f})"


@dataclass(frozen=True)
class Verdict:
    """A promise as a sentence, what was measured, and whether it holds."""

    promise: str
    measured: float
    holds: bool


def verdict_table(found: Sequence[Verdict]) -> Table:
    """The promises, one a line."""
    table = Table("promise", title="Promises", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("measured", justify="right")
    table.add_column("")
    for verdict in found:
        table.add_row(
            escape(verdict.promise), f"{verdict.measured:.3f}", "holds" if verdict.holds else "DOES NOT HOLD"
        )
    return table


def calls_lasting(call: Callable[[], object], seconds: float, most: int = 200) -> int:
    """How many calls in a row take about ``seconds``, at least one and at most ``most``."""
    started = time.perf_counter()
    call()
    once = time.perf_counter() - started
    return min(most, max(1, math.ceil(seconds / once)))


def rotated(names: Sequence[str], rounds: int, description: str = "") -> Iterator[str]:
    """Each name once a round, in an order that is rotated by one each round, under a progress bar."""
    for round_index in track(range(rounds), description=description, transient=True):
        first = round_index % len(names)
        yield from names[first:]
        yield from names[:first]


def time_rounds(
    calls: Mapping[str, Callable[[], object]], rounds: int, least_seconds: float, description: str = ""
) -> dict[str, list[float]]:
    """Seconds per call of each entry of ``calls``, once a round, in turns.

    A measurement is the mean over enough calls in a row to last ``least_seconds``, so that short calls are
    not lost in the clock's noise.
    """
    repeats = {name: calls_lasting(call, least_seconds) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for name in rotated(list(calls), rounds, description):
        seconds[name].append(_seconds_per_call(calls[name], repeats[name]))
    return seconds


def _seconds_per_call(call: Callable[[], object], repeats: int) -> float:
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - started) / repeats


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """The spread of the ratios taken round by round, which cancels what slows a whole round."""
    return Spread.of([top / bottom for top, bottom in zip(numerators, denominators, strict=True)])


def memory_is_measurable() -> bool:
    """Whether this system tells a process how much memory it holds (Linux does)."""
    return _STATUS.exists()


def resident_bytes() -> int:
    """Memory the process holds now, after the allocator has handed freed pages back."""
    _hand_back_freed()
    return _status_bytes("VmRSS")


def peak_resident_bytes(call: Callable[[], object]) -> int:
    """The most memory the process held at any moment of one call."""
    _hand_back_freed()
    try:
        _CLEAR_REFS.write_text(_RESET_HIGH_WATER_MARK)
    except OSError:  # containers may forbid it
        return _sampled_peak_bytes(call, "VmRSS")
    call()
    return _status_bytes("VmHWM")


def peak_anonymous_bytes(call: Callable[[], object]) -> int:
    """The most memory that is no file's, at any moment of one call, beyond what there was before it."""
    _hand_back_freed()
    before = _status_bytes("RssAnon")
    return _sampled_peak_bytes(call, "RssAnon") - before


def _hand_back_freed() -> None:
    """What the allocator keeps of freed memory would be used anew, and not be seen."""
    ctypes.CDLL(None).malloc_trim(0)


def _sampled_peak_bytes(call: Callable[[], object], field: str) -> int:
    samples = [_status_bytes(field)]
    finished = threading.Event()

    def sample() -> None:
        while not finished.wait(_SAMPLING_SECONDS):
            samples.append(_status_bytes(field))

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        call()
    finally:
        finished.set()
        sampler.join()
    return max(samples)


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.removesuffix("kB")) * 1024
    raise KeyError(f"{_STATUS} has no field {field!r}")


def in_fresh_process(function: Callable[..., Result], *arguments: object) -> Result:
    """Call a function of a module in a new process, where nothing was allocated before."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def study_parser(doc: str | None, seeds: int) -> argparse.ArgumentParser:
    """What studies over seeds have in common: ``--seeds`` and ``--output``."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--seeds", type=_several, default=seeds, help=f"seeds to report on, at least 2 (default {seeds})"
    )
    parser.add_argument("--output", type=Path, help="write the figures to this file as JSON")
    return parser


def _several(text: str) -> int:
    if int(text) < 2:
        raise argparse.ArgumentTypeError("must be at least 2: a single run shows nothing about chance")
    return int(text)


def on_two_processes(run: Callable[[Job], Result], jobs: Sequence[Job]) -> list[Result]:
    """The result of each job, in order, with a bar on the screen."""
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        return list(track(pool.map(run, jobs), description=f"{len(jobs)} runs", total=len(jobs)))


def merged(runs: Iterable[Mapping[str, Sequence[float]]]) -> dict[str, list[float]]:
    """The measurements of several runs as those of one, name by name.

    >>> merged([{"a": [1.0]}, {"a": [2.0, 3.0]}])
    {'a': [1.0, 2.0, 3.0]}
    """
    together: dict[str, list[float]] = {}
    for run in runs:
        for name, values in run.items():
            together.setdefault(name, []).extend(values)
    return together


def environment(distributions: Sequence[str]) -> dict[str, Any]:
    """Where figures come from: versions, processor, threads and load; nothing that names the machine."""
    versions = {name: _installed_version(name) for name in ("torch", "numpy", *distributions)}
    return {
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "processor": _processor_name(),
        "torch_threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "versions": {name: version for name, version in versions.items() if version is not None},
    }


def _installed_version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _processor_name() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def write_json(path: Path, results: Mapping[str, Any]) -> None:
    """Write results as indented JSON, making the folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
