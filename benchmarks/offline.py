"""What averaging checkpoint files costs, beside reading them all and writing one.

    python benchmarks/offline.py [--rounds 7] [--folder DIR] [--output FILE]

Eight GPT-2-sized fp32 checkpoints are made on the spot, in both formats (9 GB of disk), and are in the page cache
when they are read. All contenders take turns, each time in a fresh process, as a script is; the clock starts once it
has averaged eight tiny checkpoints, so that imports do not count. Ratios are taken round by round. Memory is the most
anonymous memory beyond an interpreter that has imported torch, each case in a process of its own too. Planning is
what ``polyak average RUN --dry-run`` does of it: which of 1,000 files of a run are taken, at which steps.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import harness
import shapes
from offline_peers import CONTENDERS, LIMIT, LOAD_AND_ADD, MERGEKIT, MERGEKIT_INSTALLED, POLYAK, POLYAK_PT
from polyak import checkpoints
from polyak.combine._offline import Plan

N_INPUTS = 8
MODEL = shapes.gpt2_small
MAX_MEMORY_BYTES = 256_000_000
TINY = "tiny"  # the folder of checkpoints that are averaged first
LARGE_TENSOR = (400, 1_000_000)  # 1.6 GB, several times max_memory
N_MANY = 64  # inputs with a sixteenth of the rows
N_PLANNED, PLANNED_TENSORS = 1000, 60
OUR_MEMORY = ("8 inputs", f"{N_MANY} smaller inputs", "2 inputs of one 1.6 GB tensor", "8 inputs, .pt")
DEFAULT_OUTPUT = Path(__file__).parent / "results" / "offline.json"


def make_inputs(folder: Path, model: Sequence[shapes.Shape]) -> None:
    """``0.safetensors``, ``0.pt``, …: a random model and seven that lie near it."""
    generator = torch.Generator().manual_seed(0)
    first = {
        name: torch.randn(shape, generator=generator)
        for name, shape in zip(shapes.gpt2_names(), model, strict=False)
    }
    folder.mkdir(exist_ok=True)
    for number in range(N_INPUTS):
        near = {name: tensor + 0.01 * number for name, tensor in first.items()}
        for suffix in (".safetensors", ".pt"):
            checkpoints.write(folder / f"{number}{suffix}", near)
        if MERGEKIT_INSTALLED:
            _make_huggingface_folder(folder / f"{number}.hf", folder / f"{number}.safetensors")


def _make_huggingface_folder(folder: Path, weights: Path) -> None:
    """The same bytes as a model of transformers' GPT-2."""
    folder.mkdir()
    (folder / "model.safetensors").hardlink_to(weights)
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    (folder / "config.json").write_text(json.dumps(config))


def inputs_of(folder: Path, suffix: str) -> list[Path]:
    return [folder / f"{number}{suffix}" for number in range(N_INPUTS)]


def average(name: str, folder: Path) -> Path:
    """Average all inputs once; where the average is."""
    contender, suffix, _ = CONTENDERS[name]
    output = output_of(name, folder)
    contender(inputs_of(folder, suffix), output)
    return output


def output_of(name: str, folder: Path) -> Path:
    return folder / f"average{CONTENDERS[name][2]}"


def seconds_of_one(name: str, folder: Path) -> float:
    """Seconds that averaging into a new file takes once everything is imported. Runs in a fresh process."""
    average(name, folder / TINY)
    _remove(output_of(name, folder))
    started = time.perf_counter()
    average(name, folder)
    return time.perf_counter() - started


def _remove(path: Path) -> None:
    """Nobody's time goes into giving back what another has written."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    os.sync()


def check(folder: Path) -> None:
    """Refuse to time contenders that do not average: the last tensor must have moved by the mean offset."""
    expected = 0.01 * (N_INPUTS - 1) / 2
    for name in CONTENDERS:
        if name == LIMIT:
            continue
        output = checkpoints.open(average(name, folder))
        first = checkpoints.open(folder / "0.safetensors")
        last = list(first.tensors)[-1]
        moved = (output.read(last) - first.read(last)).mean()
        if abs(moved - expected) > 1e-4:
            raise RuntimeError(f"{name!r} did not average")


def memory_cases(folder: Path) -> dict[str, tuple[list[Path], str]]:
    """The inputs and the contender of each case."""
    inputs = inputs_of(folder, ".safetensors")
    many = [folder / f"many_{number}.safetensors" for number in range(N_MANY)]
    large = [folder / f"large_{number}.safetensors" for number in range(2)]
    from_pt = inputs_of(folder, ".pt")
    ours = [(inputs, POLYAK), (many, POLYAK), (large, POLYAK), (from_pt, POLYAK_PT)]
    return {
        **dict(zip(OUR_MEMORY, ours, strict=True)),
        **{f"8 inputs, {name}": (from_pt, name) for name in CONTENDERS if "way" in name},
        **({"8 inputs, mergekit linear": (inputs_of(folder, ".hf"), MERGEKIT)} if MERGEKIT_INSTALLED else {}),
    }


def make_many_inputs(folder: Path) -> None:
    """Checkpoints with a sixteenth of each tensor."""
    model = [(-(-rows // 16), *others) for rows, *others in MODEL()]
    for number in range(N_MANY):
        tensors = {
            name: torch.full(shape, float(number))
            for name, shape in zip(shapes.gpt2_names(), model, strict=False)
        }
        checkpoints.write(folder / f"many_{number}.safetensors", tensors)


def make_run(folder: Path) -> None:
    """A run as a training loop saves it: weights, an optimizer's state and the step in each file."""
    folder.mkdir()
    for number in range(N_PLANNED):
        weights = {f"layers.{n}.weight": torch.full((8, 8), float(number)) for n in range(PLANNED_TENSORS)}
        moments = {
            n: {"step": number, "exp_avg": tensor.clone(), "exp_avg_sq": tensor.clone()}
            for n, tensor in enumerate(weights.values())
        }
        state = {"model": weights, "optimizer": {"state": moments, "param_groups": []}, "step": 10 * number}
        torch.save(state, folder / f"step_{10 * number}.pt")


def seconds_of_planning(folder: Path) -> float:
    """Seconds until it is known what of the run is taken. Runs in a fresh process."""
    output = folder.parent / "planned.safetensors"
    Plan([folder / "step_0.pt"], output)  # imports do not count
    started = time.perf_counter()
    plan = Plan([folder], output)
    seconds = time.perf_counter() - started
    if len(plan.opened) != N_PLANNED:
        raise RuntimeError(f"{len(plan.opened)} of {N_PLANNED} checkpoints were taken")
    return seconds


def make_large_inputs(folder: Path) -> None:
    """Two checkpoints of one tensor, written row by row."""
    layout = checkpoints.Layout({"weight": checkpoints.TensorInfo(LARGE_TENSOR, torch.float32)})
    rows, columns = LARGE_TENSOR
    for number in range(2):
        with checkpoints.create(folder / f"large_{number}.safetensors", layout) as writer:
            for row in range(rows):
                writer.write("weight", row * columns, torch.full((columns,), float(number)))


def peak_memory_bytes(inputs: Sequence[Path], contender: str, output: Path) -> int:
    """The most anonymous memory of one average beyond what the process held before. Runs in a fresh process."""
    way = CONTENDERS[contender][0]
    return harness.peak_anonymous_bytes(lambda: way(inputs, output))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=7, help="measurements a contender (default 7)")
    parser.add_argument("--folder", type=Path, help="where to put the checkpoints; on a disk, not in memory")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="file for the figures, as JSON")
    options = parser.parse_args(arguments)
    environment = harness.environment(
        ("polyak", "safetensors")
    )  # before the work, whose own load it would show

    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        folder = Path(place)
        make_inputs(folder, MODEL())
        make_inputs(folder / TINY, [(2,)] * len(MODEL()))
        check(folder)
        seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
        for name in harness.rotated(list(CONTENDERS), options.rounds, "timing"):
            seconds[name].append(harness.in_fresh_process(seconds_of_one, name, folder))
        planning = _measured_planning(folder / "run", options.rounds)
        memory = _measured_memory(folder) if harness.memory_is_measurable() else {}
    cases = {name: _record(values, seconds) for name, values in seconds.items()}
    found = verdicts(cases, memory, planning)
    Console().print(_times(cases), _memories(memory), harness.verdict_table(found))
    harness.write_json(
        options.output,
        {
            "benchmark": "offline",
            "environment": environment,
            "settings": {
                "rounds": options.rounds,
                "inputs": N_INPUTS,
                "elements": shapes.number_of_elements(MODEL()),
                "dtype": "float32",
            },
            "cases": cases,
            "planning": planning,
            "peak_anonymous_bytes": memory,
            "promises": [asdict(verdict) for verdict in found],
        },
    )


def verdicts(
    cases: dict[str, Any], memory: dict[str, int], planning: dict[str, Any]
) -> list[harness.Verdict]:
    """The promises, and what became of them."""
    over_limit = cases[POLYAK]["over_limit"]["median"]
    from_pt = cases[POLYAK_PT]["over_polyak"]["median"]
    added = cases[LOAD_AND_ADD]["over_polyak"]["median"]
    seconds = planning["seconds"]["median"]
    found = [
        harness.Verdict(f"{POLYAK} / {LIMIT} at most 1.6, aim 1.4", over_limit, over_limit <= 1.6),
        harness.Verdict(f"{POLYAK_PT} / {POLYAK} at most 1.25", from_pt, from_pt <= 1.25),
        harness.Verdict(f"{LOAD_AND_ADD} / {POLYAK} at least 5", added, added >= 5),
        harness.Verdict("seconds of planning 1,000 checkpoints at most 5", seconds, seconds <= 5),
    ]
    if memory:
        peak = max(value for name, value in memory.items() if name in OUR_MEMORY) / MAX_MEMORY_BYTES
        found.append(harness.Verdict("polyak, anonymous memory / max_memory at most 1", peak, peak <= 1))
    return found


def _measured_planning(folder: Path, rounds: int) -> dict[str, Any]:
    make_run(folder)
    seconds = [harness.in_fresh_process(seconds_of_planning, folder) for _ in range(rounds)]
    shutil.rmtree(folder)
    return {
        "checkpoints": N_PLANNED,
        "tensors": PLANNED_TENSORS,
        "seconds_by_round": seconds,
        "seconds": asdict(harness.Spread.of(seconds)),
    }


def _measured_memory(folder: Path) -> dict[str, int]:
    make_many_inputs(folder)
    make_large_inputs(folder)
    return {
        name: harness.in_fresh_process(peak_memory_bytes, inputs, contender, output_of(contender, folder))
        for name, (inputs, contender) in memory_cases(folder).items()
    }


def _record(values: list[float], seconds: dict[str, list[float]]) -> dict[str, Any]:
    return {
        "seconds_by_round": values,
        "seconds": asdict(harness.Spread.of(values)),
        "over_limit": asdict(harness.ratios(values, seconds[LIMIT])),
        "over_polyak": asdict(harness.ratios(values, seconds[POLYAK])),
    }


def _times(cases: dict[str, Any]) -> Table:
    table = Table(
        "contender", "seconds", "over limit", "over polyak", title="8 checkpoints of 498 MB into one"
    )
    for name, record in cases.items():
        spreads = (harness.Spread(**record[key]) for key in ("seconds", "over_limit", "over_polyak"))
        table.add_row(name, *map(str, spreads))
    return table


def _memories(memory: dict[str, int]) -> Table:
    table = Table("case", "peak MB", title="anonymous memory beyond the interpreter with torch")
    for name, peak_bytes in memory.items():
        table.add_row(name, f"{peak_bytes / 1e6:,.0f}")
    return table


if __name__ == "__main__":
    main()
