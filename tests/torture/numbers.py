"""NaN and infinity anywhere: in weights, metrics, scores, batches, states and files."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import nn

import polyak
from polyak import checkpoints
from torture.calls import LOADER, made
from torture.harness import Case, family, mean64, near, same_model, small_model, state_of, walk

VALUES = {"NaN": math.nan, "infinity": math.inf, "-infinity": -math.inf}


def skipped(value: float, dtype: torch.dtype, place: int, options: dict, folder: Path) -> None:
    """One bad number in one of six samples: that sample is left out of the average and of the blocks."""
    model = small_model().to(dtype)
    average = polyak.Average(model, "uniform", **options)
    run = polyak.Recorder(model, folder / "run", block=2, dtype=None)
    samples = []
    for step in range(1, 7):
        sample = walk(model, step)
        weight = list(model.parameters())[place].data.view(-1)
        kept = weight[-1].clone()
        if step == 4:
            weight[-1] = value
        else:
            samples.append(sample)
        average.update()
        run.update(loss=value if step == 2 else 1.0)
        weight[-1] = kept
    run.close()
    assert average.n_skipped == 1 and average.n_averaged == 5
    tolerance = 1e-5
    near(average.named_tensors(), mean64(samples), tolerance)
    trajectory = run.trajectory
    near(trajectory.average("uniform"), mean64(samples), tolerance)
    assert trajectory.blocks[0].metrics["loss"].count == 1 and trajectory.blocks[1].skipped == 1


def raised(value: float, place: int, folder: Path) -> None:
    model = small_model()
    average = polyak.Average(model, "ema:decay=0.5", check_finite="raise")
    walk(model, 1)
    average.update()
    before = {name: tensor.clone() for name, tensor in average.named_tensors().items()}
    list(model.parameters())[place].data.view(-1)[0] = value
    try:
        average.update()
    finally:
        assert average.n_averaged == 1
        for name, _ in model.named_parameters():
            assert torch.equal(average.named_tensors()[name], before[name]), name
    raise AssertionError("it was averaged")


def in_a_file(value: float, dtype: torch.dtype, suffix: str, folder: Path) -> None:
    """A bad number in one checkpoint stays visible where it is, and spoils no other element."""
    for number in (1, 2, 3):
        weight = torch.full((50,), float(number)).to(dtype)
        if number == 2:
            weight[7] = value
        checkpoints.write(
            folder / f"step{number}{suffix}", {"w": weight, "b": torch.full((3,), float(number))}
        )
    polyak.average_checkpoints(sorted(folder.glob("step*")), folder / f"out{suffix}")
    found = checkpoints.open(folder / f"out{suffix}").read("w").double()
    good = torch.arange(50) != 7
    assert not found[7].isfinite() and torch.allclose(found[good], torch.full((49,), 2.0).double(), atol=1e-2)


def as_score(value: float, at: int, mode: str, folder: Path) -> None:
    """A candidate whose score is no number is never chosen."""
    with made(folder) as s:
        before, calls = state_of(s.model), []

        def score(model: nn.Module) -> float:
            calls.append(1)
            return value if len(calls) == at else float(len(calls))

        profiles = ["uniform", "tail:0.5"]
        choice = polyak.select(
            s.trajectory, s.model, score=score, mode=mode, profiles=profiles, progress=False
        )
        bad_wins = (mode == "min" and value == -math.inf) or (mode == "max" and value == math.inf)
        assert math.isfinite(choice.best.score) or bad_wins, choice.best
        same_model(s.model, before)


def in_a_batch(value: float, at: int, folder: Path) -> None:
    model = small_model()
    before = state_of(model)
    batches = [batch.clone() for batch in LOADER]
    batches[at][0, 0] = value
    try:
        polyak.update_bn(batches, model)
    except polyak.PolyakError:
        same_model(model, before)
        raise
    raise AssertionError("statistics of no number")


@family("NaN and infinity", apart=18)
def bad_numbers(rng: random.Random) -> Iterator[Case]:
    dtypes = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    for label, value in VALUES.items():
        for dtype in dtypes:
            for options in ({}, {"compensated": True}, {"buffers": "average"}):
                place = rng.randrange(6)
                run = partial(skipped, value, dtype, place, options)
                yield Case(f"{label} in weight {place}, {dtype}, {list(options)}", run)
            for suffix in (".pt", ".safetensors"):
                yield Case(f"{label} in a file, {dtype}, {suffix}", partial(in_a_file, value, dtype, suffix))
        for place in range(6):
            yield Case(f"{label} raises, {place}", partial(raised, value, place), names=("finite",))
        for mode in ("min", "max"):
            for at in (1, 2, 3):
                yield Case(f"{label} is score {at}, {mode}", partial(as_score, value, at, mode))
        for at in (0, 1):
            yield Case(f"{label} in batch {at}", partial(in_a_batch, value, at))
