"""``polyak average``, of checkpoints and of recorded runs."""

from __future__ import annotations

import json
import os
import signal
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polyak import _terminal
from polyak.cli._users import recalibrated_report, run_recalibrated
from polyak.errors import CheckpointError, OptionError, name_list

if TYPE_CHECKING:
    from rich.table import Table

    from polyak import combine
    from polyak.trajectory import Explanation

# What is to be read: paths as people write them, and how they are read.

KeyOption = Annotated[
    str | None,
    typer.Option(help="Nested key of the weights, or a prefix of names; by default the best known."),
]
StepsOption = Annotated[
    str | None, typer.Option(help="The training step of each checkpoint, in the order given: 100,200,300")
]
LastOption = Annotated[int | None, typer.Option(help="Take only the newest so many checkpoints.")]
AllowOption = Annotated[
    list[str] | None,
    typer.Option(
        help="A type that a file may hold beside tensors, read as data; no code is run. May be repeated."
    ),
]


@dataclass(frozen=True)
class HowToRead:
    """The options of reading checkpoints that several commands have, as they are typed."""

    key: str | None = None
    steps: str | None = None
    last: int | None = None
    allow: list[str] | None = None

    def keywords(self) -> dict[str, Any]:
        """The same as keywords of ``read_inputs``."""
        steps = None if self.steps is None else _whole_numbers(self.steps)
        return {"key": self.key, "steps": steps, "last": self.last, "allow": tuple(self.allow or ())}


def _whole_numbers(steps: str) -> list[int]:
    try:
        return [int(number) for number in steps.split(",")]
    except ValueError:
        raise OptionError(
            f"--steps takes whole numbers between commas, such as 100,200; got {steps!r}"
        ) from None


def expanded(inputs: list[str], profile_option: str) -> tuple[list[Path], set[Path]]:
    """Paths, patterns replaced by what they match, in the order people count; and those that a pattern matched.

    ``profile_option`` is where the command takes profiles, which are no paths.
    """
    from polyak.checkpoints._checkpoint import natural_order

    paths: list[Path] = []
    found: set[Path] = set()
    for text in inputs:
        if not Path(text).exists():
            _refuse_profile(text, profile_option)
        if Path(text).exists() or not any(sign in text for sign in "*?["):
            paths.append(Path(text))
            continue
        matches = sorted(glob(text, recursive=True), key=natural_order)
        if not matches:
            raise CheckpointError(f"nothing matches the pattern {text}")
        paths += map(Path, matches)
        found |= set(map(Path, matches))
    return paths, found


def _refuse_profile(text: str, option: str) -> None:
    from polyak.profiles import parse

    try:
        parse(text)
    except OptionError:
        return
    raise OptionError(f"{text} is a profile, not a path: write {option} {text}, and several in quotes")


# ``polyak average`` of a recorded run: the same question, answered from its blocks.


def average_run(
    folder: Path, output: Path, profile: str, *, max_memory: str, dry_run: bool, force: bool, as_json: bool
) -> None:
    """Write the average of a recorded run under ``profile``, and say how well its blocks give it.

    Raises as :meth:`polyak.Trajectory.write`.
    """
    from polyak import Trajectory

    trajectory = Trajectory(folder)
    explanation = trajectory.explain(profile)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if not dry_run:
            trajectory.write(profile, output, overwrite=force, max_memory=max_memory)
    said = (str(warning.message) for warning in caught)
    notes = [*explanation.warnings, *(note for note in said if not note.startswith(explanation.warnings))]
    if as_json:
        typer.echo(json.dumps(_as_dict(explanation, notes, folder, output, dry_run), indent=2))
        return
    typer.echo(str(explanation))
    for note in notes[len(explanation.warnings) :]:
        typer.echo(_terminal.printable(f"warning: {note}"))
    typer.echo(_terminal.wrote(output, dry_run=dry_run))


def _as_dict(
    explanation: Explanation, notes: list[str], folder: Path, output: Path, dry_run: bool
) -> dict[str, object]:
    return {
        "input": str(folder),
        "output": str(output),
        "profile": str(explanation.profile),
        "blocks": [str(block) for block in explanation.blocks],
        "coefficients": explanation.coefficients.tolist(),
        "live": explanation.live,
        "misplaced_weight": explanation.misplaced_weight,
        "effective_samples": explanation.effective_samples,
        "warnings": notes,
        "dry_run": dry_run,
    }


# ``polyak average``: any checkpoints in, one average out.


def average(
    inputs: Annotated[
        list[str],
        typer.Argument(help="Checkpoints (files or folders), folders of them, patterns; or a recorded run."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="What to write; its suffix says the format.")
    ],
    profile: Annotated[
        str | None, typer.Option(help="How much each step counts: tail:0.4, ema:half_life=2000, ...")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="How much each input counts, in the order given: 1,2,3")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Dtype of the output: fp32, bf16, fp16, ...; by default the inputs'.")
    ] = None,
    max_memory: Annotated[
        str, typer.Option(help="The most memory, whatever the sizes of models and tensors.")
    ] = "256MB",
    key: KeyOption = None,
    steps: StepsOption = None,
    last: LastOption = None,
    allow: AllowOption = None,
    rank: Annotated[
        int | None, typer.Option(help="Rank of LoRA adapters' average; by default the largest of the inputs.")
    ] = None,
    lora: Annotated[
        str, typer.Option(help="Mean of LoRA adapters' updates (product), or of their factors (factors).")
    ] = "product",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read the headers, say what would be done, and stop.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an output that is there.")] = False,
    hashes: Annotated[bool, typer.Option("--hash", help="Note the SHA-256 of the inputs.")] = False,
    like: Annotated[
        Path | None, typer.Option(help="Nest the weights as in this torch checkpoint, with its settings.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="package.module:function that builds the model; for --recalibrate.")
    ] = None,
    recalibrate: Annotated[
        str | None,
        typer.Option(help="package.module:function that returns batches for BatchNorm statistics."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was done as JSON.")] = False,
) -> None:
    """Average checkpoints of any tool, format and size, in little memory.

    \b
    polyak average a.pt b.safetensors hf_folder/ -o average.safetensors
    polyak average run/ -o average.pt                        all checkpoints in a folder
    polyak average 'run/step-*.pt' -o average.pt --profile tail:0.4
    polyak average run/ -o average.pt --last 5               the newest five checkpoints
    polyak average run/ -o average.pt --profile ema:half_life=2000
    polyak average run/ -o average.pt --profile blend:0.7:tail:0.4     and 30% of the last one
    polyak average a.pt b.pt -o average.pt --weights 3,1     three parts a, one part b
    polyak average run/ -o average.pt --dry-run              what would be read, written, averaged
    polyak average run/ -o average.safetensors --dtype bf16 --max-memory 1GB
    polyak average adapter-a/ adapter-b/ -o adapter/ --rank 16     LoRA adapters: the mean of their updates
    polyak average timm/*.pth.tar -o average.pt --key state_dict_ema
    polyak average run/*.ckpt -o average.ckpt --like run/last.ckpt      loads as that file does
    polyak average run/ -o average.pt --model my.model:build --recalibrate my.data:batches
    polyak average step-1000/ step-2000/ -o average/         one file a rank (Llama, Megatron, ...): so is the average
    torchrun --nproc-per-node 4 -m polyak average run/ -o average.safetensors
    polyak average recorded/ -o average.safetensors --profile tail:0.4     a run that was recorded

    A profile takes the inputs in the order of their training steps. The output says what it was made of, and
    appears whole or not at all. BatchNorm statistics of an average must be computed anew: --model and --recalibrate
    do it with your model and batches, the average being held in memory, and run your code, never code in a checkpoint.
    """
    from polyak.checkpoints._checkpoint import is_recording
    from polyak.combine import Plan

    _refuse_half_of_recalibration(model, recalibrate)
    paths, found = expanded(inputs, "--profile")
    if len(paths) == 1 and is_recording(paths[0]):
        _refuse(
            paths[0],
            {
                "--weights": weights,
                "--key": key,
                "--steps": steps,
                "--last": last,
                "--allow": allow,
                "--dtype": dtype,
                "--hash": hashes or None,
                "--like": like,
                "--rank": rank,
                "--recalibrate": recalibrate,
                "--lora": None if lora == "product" else lora,
            },
        )
        if _is_first_process():  # blocks are few: one process is enough
            average_run(
                paths[0],
                output,
                profile or "uniform",
                max_memory=max_memory,
                dry_run=dry_run,
                force=force,
                as_json=as_json,
            )
        return
    plan = Plan(
        paths,
        output,
        weights=None if weights is None else _numbers(weights),
        profile=profile,
        dtype=dtype,
        max_memory=max_memory,
        overwrite=force,
        hashes=hashes,
        found=found,
        **HowToRead(key, steps, last, allow).keywords(),
        like=like,
        rank=rank,
        lora=lora,
    )
    started = time.monotonic()
    if model is None or recalibrate is None:
        report = plan.report() if dry_run else _run(plan)
    else:
        report = recalibrated_report(plan) if dry_run else _run_with_user_code(plan, model, recalibrate)
    if not _is_first_process():
        return
    if as_json:
        typer.echo(json.dumps(report.to_dict() | {"dry_run": dry_run}, indent=2))
    else:
        _show(report, None if dry_run else time.monotonic() - started)


def _refuse(run: Path, options: Mapping[str, object]) -> None:
    given = [option for option, value in options.items() if value is not None]
    if given:
        raise OptionError(
            f"{run} is a recorded run, which takes no {', '.join(given)}: say --profile, such as tail:0.4"
        )


def _numbers(weights: str) -> list[float]:
    try:
        return [float(number) for number in weights.split(",")]
    except ValueError:
        raise OptionError(f"--weights takes numbers between commas, such as 1,2,3; got {weights!r}") from None


def _run(plan: combine.Plan) -> combine.AverageReport:
    from polyak.combine._offline import launched_on_ranks, process_group, run_on_ranks

    bar = _terminal.progress_bar(str(plan.output), shown=_is_first_process(), in_bytes=True)
    with _ended_cleanly(), bar as shown:
        if not launched_on_ranks():
            return plan.run(shown.reach)
        with process_group():
            return run_on_ranks(plan, shown.reach)


def _run_with_user_code(plan: combine.Plan, model: str, recalibrate: str) -> combine.AverageReport:
    bar = _terminal.progress_bar(str(plan.output), shown=True, in_bytes=True)
    with _ended_cleanly(), bar as shown:
        return run_recalibrated(plan, model, recalibrate, shown.reach)


def _refuse_half_of_recalibration(model: str | None, recalibrate: str | None) -> None:
    from polyak.combine._offline import launched_on_ranks

    if (model is None) != (recalibrate is None):
        raise OptionError("--model and --recalibrate belong together: give both, or neither")
    if recalibrate is not None and launched_on_ranks():
        raise OptionError("--recalibrate runs your model in one process: start polyak without torchrun")


def _is_first_process() -> bool:
    from polyak.combine._offline import launched_on_ranks

    return not launched_on_ranks() or os.environ["RANK"] == "0"


@contextmanager
def _ended_cleanly() -> Iterator[None]:
    """Let SIGTERM, as launchers and schedulers send it, remove the temporary file like an interrupt does."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _show(report: combine.AverageReport, seconds: float | None) -> None:
    console = _terminal.console()
    console.print(_plan(report) if seconds is None else _inputs(report))
    if report.left_out:
        console.print(_terminal.printable(report.left_out), soft_wrap=True)
    for line in (*report.notes, *_tensors(report), _bytes(report, seconds)):
        console.print(_terminal.printable(line), soft_wrap=True)


def _inputs(report: combine.AverageReport) -> Table:
    rows = _terminal.table("input", "#step", "#coefficient")
    steps = report.steps or [None] * len(report.inputs)
    for name, step, coefficient in zip(report.inputs, steps, report.coefficients, strict=True):
        rows.add_row(_terminal.printable(name), "-" if step is None else f"{step:,}", f"{coefficient:.6g}")
    return rows


def _plan(report: combine.AverageReport) -> Table:
    """The same before anything is read, with the key of each, and with what is left out."""
    rows = _terminal.table("input", "#step", "#coefficient", "key", "left out")
    coefficients = iter(report.coefficients)
    for item in report.plan:
        rows.add_row(
            _terminal.printable(item["name"]),
            "-" if item["step"] is None else f"{item['step']:,}",
            f"{next(coefficients):.6g}" if item["taken"] else "",
            _terminal.printable(item["key"] or ""),
            _terminal.printable(item["why"]),
        )
    return rows


def _tensors(report: combine.AverageReport) -> Iterator[str]:
    yield f"{_terminal.counted(len(report.averaged), 'tensor')} averaged"
    if report.copied:
        yield f"{len(report.copied)} copied from the last input: {name_list([*report.copied])}"
    if report.differing:
        yield f"of these the inputs differ in {name_list([*report.differing])}"
    if report.ignored:
        yield f"ignored: {name_list([*report.ignored])}"


def _bytes(report: combine.AverageReport, seconds: float | None) -> str:
    read, written, memory = map(
        _terminal.size, (report.bytes_read, report.bytes_written, report.memory_bytes)
    )
    done = _terminal.wrote(report.output, dry_run=seconds is None)
    if seconds is None:
        return f"{done}: {read} to read and {written} to write in at most {memory} of memory"
    speed = _terminal.size(int((report.bytes_read + report.bytes_written) / max(seconds, 1e-3)))
    return f"{done}: {read} read and {written} written in {seconds:.1f} s ({speed}/s)"
