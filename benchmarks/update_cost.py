"""What one update of an average costs, beside the installed peers and one flat ``lerp_`` over the same bytes.

    python benchmarks/update_cost.py [--processes 4] [--rounds 5] [--only resnet50,gpt2] [--output FILE]

All contenders live in one process and take turns; ratios are taken round by round. That is done in several processes
one after the other, as where a process happens to lie in memory can change a ratio by half for as long as it lives;
medians and quartiles are those of all their rounds. On GPT-2 shapes that needs about 8 GB. Memory is measured in a
fresh process for each. Run it on an idle machine: two threads that wait for each other are slowed tenfold by a third.
The bf16 case averages a bf16 model in fp32; its limit is the flat ``lerp_`` of as many fp32 numbers. What looking for
NaNs costs at least without numba, torch's own ``aminmax`` before a ``lerp_`` of the same piece of flat memory, is a row
of its own.

``overhead`` is an update of 1,200 tensors of one number each on one thread. Arithmetic takes a microsecond of it; the
rest is Python, and what torch does for each tensor, of which its own ``_foreach_lerp_`` on lists built once gives the
measure on this processor. A measurement is the fastest of some calls in a row, to which whatever else runs on the
machine can only add. What is not measured stays in the file as it was.
"""

from __future__ import annotations

import argparse
import json
import timeit
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console

import harness
import shapes
from peers import AS_ON_ACCELERATOR, CONTENDERS, DECAY, LIMIT, PREBUILT, Averager, Contender
from update_cost_report import (
    Measurements,
    case_record,
    case_table,
    overhead_table,
    overhead_verdicts,
    verdicts,
)

THREADS = 2
LEAST_SECONDS = 0.02
WARM_UP_UPDATES = 3
OVERHEAD, OVERHEAD_CALLS = "overhead", 25
DISTRIBUTIONS = ("polyak", "numba", "ema-pytorch", "timm", "torch-ema", "diffusers", "torchcontrib")


@dataclass(frozen=True)
class Case:
    """A model to average; memory is measured where the model is large against the rest of a process."""

    shapes: Callable[[], list[shapes.Shape]]
    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.contiguous_format
    measures_memory: bool = False

    def model(self) -> torch.nn.Module:
        """A model of these shapes, with random weights."""
        return shapes.module_of(self.shapes(), self.dtype).to(memory_format=self.memory_format)

    def __str__(self) -> str:
        tensors = self.shapes()
        millions = shapes.number_of_elements(tensors) / 1e6
        order = ", channels last" if self.memory_format == torch.channels_last else ""
        kind = f"{str(self.dtype).removeprefix('torch.')} tensors{order}"
        return f"{len(tensors):,} {kind}, {millions:.2f}M numbers"


CASES = {
    "resnet50": Case(shapes.resnet50),
    "channels_last": Case(shapes.resnet50, memory_format=torch.channels_last),
    "gpt2": Case(shapes.gpt2_small, measures_memory=True),
    "many_small": Case(shapes.many_small),
    "bf16": Case(shapes.gpt2_small, torch.bfloat16, measures_memory=True),
}


def measure(name: str, processes: int, rounds: int) -> Measurements:
    """Time every contender of a case and, where the case asks for it, measure its memory."""
    runs = [harness.in_fresh_process(time_case, name, rounds) for _ in range(processes)]
    seconds, left_out = harness.merged(seconds for seconds, _ in runs), runs[-1][1]
    memory = {}
    if CASES[name].measures_memory and harness.memory_is_measurable():
        memory = {
            contender: harness.in_fresh_process(extra_memory, contender, name)
            for contender in seconds
            if contender != LIMIT
        }
    return Measurements(seconds, memory, left_out)


def time_case(name: str, rounds: int) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds per update by contender and round, and who was left out and why. Runs in a fresh process."""
    torch.set_num_threads(THREADS)
    averagers, left_out = build_contenders(CASES[name], CONTENDERS.values())
    updates = {contender: averager.update for contender, averager in averagers.items()}
    return harness.time_rounds(updates, rounds, LEAST_SECONDS, description=name), left_out


def time_overhead(rounds: int) -> dict[str, list[float]]:
    """Microseconds of an update where there is hardly a number, by contender and round. Runs in a fresh process."""
    torch.set_num_threads(1)
    contenders = [c for c in CONTENDERS.values() if c.kind == "polyak"]
    contenders += [CONTENDERS[PREBUILT], AS_ON_ACCELERATOR, CONTENDERS["timm ModelEmaV3"]]
    averagers, _ = build_contenders(Case(shapes.many_single), contenders)
    microseconds: dict[str, list[float]] = {name: [] for name in averagers}
    for name in harness.rotated(list(averagers), rounds, description=OVERHEAD):
        microseconds[name].append(_least_microseconds(averagers[name].update))
    return microseconds


def _least_microseconds(call: Callable[[], object]) -> float:
    return 1e6 * min(timeit.repeat(call, repeat=OVERHEAD_CALLS, number=1))


def build_contenders(
    case: Case, contenders: Iterable[Contender]
) -> tuple[dict[str, Averager], dict[str, str]]:
    """The contenders, warmed up and seen to average, and the reasons why others were left out."""
    model = case.model()
    averagers: dict[str, Averager] = {}
    left_out: dict[str, str] = {}
    for contender in contenders:
        name = contender.name
        if case.dtype != torch.float32 and not contender.mixed:
            left_out[name] = "no fp32 average of such a model"
            continue
        try:
            averagers[name] = contender.build(model)
        except ImportError as error:
            left_out[name] = str(error)
    for averager in averagers.values():
        _warm_up(averager)
    _move(model)
    for name, averager in averagers.items():
        _check_that_it_averages(name, averager)
    return averagers, left_out


def _warm_up(averager: Averager) -> None:
    for _ in range(WARM_UP_UPDATES):
        averager.update()


@torch.no_grad()
def _move(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        parameter.add_(1)


def _check_that_it_averages(name: str, averager: Averager) -> None:
    """An update must bring every tensor nearer to weights that lie 1 above: neither skipped nor copied."""
    before = [tensor.flatten()[0].item() for tensor in averager.tensors()]
    averager.update()
    after = [tensor.flatten()[0].item() for tensor in averager.tensors()]
    if not all(0 < new - old < 0.5 for old, new in zip(before, after, strict=True)):
        raise RuntimeError(f"{name!r} did not average every tensor, so its time would mean nothing")


def extra_memory(contender_name: str, case_name: str) -> dict[str, float]:
    """Memory beyond the model's, over the parameters' bytes in fp32: at rest and at the peak of an update."""
    torch.set_num_threads(THREADS)
    case, contender = CASES[case_name], CONTENDERS[contender_name]
    # A small model first, so that imports and the thread pool are not counted.
    small_model = shapes.module_of([(512, 512), (512,)], case.dtype)
    _warm_up(contender.build(small_model))

    model = case.model()
    alone = harness.resident_bytes()
    averager = contender.build(model)
    _warm_up(averager)
    resting = harness.resident_bytes()
    peak = harness.peak_resident_bytes(averager.update)
    fp32_bytes = 4 * shapes.number_of_elements(case.shapes())
    return {"resting": (resting - alone) / fp32_bytes, "peak": (peak - alone) / fp32_bytes}


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    torch.set_num_threads(THREADS)
    console = Console()
    environment = harness.environment(DISTRIBUTIONS)  # before the work, whose own load it would show
    settings = {"processes": options.processes, "rounds": options.rounds}
    record = json.loads(options.output.read_text()) if options.output and options.output.exists() else {}
    found: list[harness.Verdict] = []
    if cases := [name for name in options.only if name != OVERHEAD]:
        measured = {}
        for name in cases:
            measured[name] = measure(name, options.processes, options.rounds)
            console.print(case_table(f"{name}: {CASES[name]}", measured[name]))
            for contender, reason in measured[name].left_out.items():
                console.print(f"left out: {contender} ({reason})", style="dim", highlight=False)
        found += (promises := verdicts(measured))
        record |= {
            "benchmark": "update_cost",
            "environment": environment,
            "settings": {
                **settings,
                "least_seconds_per_measurement": LEAST_SECONDS,
                "warm_up_updates": WARM_UP_UPDATES,
                "decay": DECAY,
                "limit": "one flat fp32 lerp_ over as many numbers",
            },
            "cases": {name: {"model": str(CASES[name]), **case_record(measured[name])} for name in measured},
            "promises": [asdict(verdict) for verdict in promises],
        }
    if OVERHEAD in options.only:
        runs = [harness.in_fresh_process(time_overhead, options.rounds) for _ in range(options.processes)]
        overhead = harness.merged(runs)
        console.print(overhead_table(overhead))
        found += (promises := overhead_verdicts(overhead))
        record[OVERHEAD] = {
            "environment": environment,
            "settings": {**settings, "calls": OVERHEAD_CALLS},
            "microseconds": {name: asdict(harness.Spread.of(values)) for name, values in overhead.items()},
            "promises": [asdict(verdict) for verdict in promises],
        }
    console.print(harness.verdict_table(found))
    if options.output is not None:
        harness.write_json(options.output, record)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--processes", type=_positive, default=4, help="processes a case (default 4)")
    parser.add_argument(
        "--rounds", type=_positive, default=5, help="measurements a contender in each (default 5)"
    )
    parser.add_argument(
        "--only", type=_case_names, default=[*CASES, OVERHEAD], help="cases, separated by commas"
    )
    parser.add_argument("--output", type=Path, help="write the figures to this file as JSON")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1 is needed")
    return number


def _case_names(text: str) -> list[str]:
    names = text.split(",")
    known = [*CASES, OVERHEAD]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown case {unknown[0]!r}; the cases are {', '.join(known)}")
    return names


if __name__ == "__main__":
    main()
