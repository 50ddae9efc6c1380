"""Models that change their structure, have 10,000 tensors, or one that is large."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import parametrizations

import polyak
from polyak import checkpoints
from polyak.errors import PolyakError
from torture.harness import Case, family, mean64, near, same_model, small_model, state_of, walk


def _swap_parameters(model: nn.Sequential) -> None:
    model[0].weight.data, model[2].weight.data = model[2].weight.data, model[0].weight.data


def _replaced(model: nn.Sequential) -> None:
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())


# What people do to a model between two steps.
CHANGES: dict[str, Callable[[nn.Sequential], object]] = {
    "a layer more": lambda m: m.append(nn.Linear(2, 2)),
    "a layer less": lambda m: m.__delitem__(2),
    "another layer": lambda m: m.__setitem__(2, nn.Linear(4, 3)),
    "an equal layer": lambda m: m.__setitem__(2, nn.Linear(4, 2)),
    "no bias": lambda m: m[2].register_parameter("bias", None),
    "a bias more": lambda m: m[1].register_parameter("extra", nn.Parameter(torch.ones(1))),
    "a parameter replaced": _replaced,
    "data exchanged": _swap_parameters,
    "a larger weight": lambda m: setattr(m[2], "weight", nn.Parameter(torch.zeros(5, 4))),
    "data of another shape": lambda m: setattr(m[2].weight, "data", torch.zeros(3, 4)),
    "data of another order": lambda m: setattr(m[2].weight, "data", torch.zeros(4, 2)),
    "a scalar": lambda m: setattr(m[2].bias, "data", torch.zeros(())),
    "tied": lambda m: setattr(m[2], "bias", nn.Parameter(m[2].bias.detach())) or setattr(m, "again", m[2]),
    "double": lambda m: m.double(),
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "frozen": lambda m: m[0].requires_grad_(False),
    "all frozen": lambda m: m.requires_grad_(False),
    "meta": lambda m: m.to("meta"),
    "a buffer more": lambda m: m.register_buffer("seen", torch.zeros(2)),
    "a buffer less": lambda m: m[1].register_buffer("running_mean", None),
    "evaluation": lambda m: m.eval(),
    "weight norm": lambda m: parametrizations.weight_norm(m[0]),
    "spectral norm": lambda m: parametrizations.spectral_norm(m[0]),
    "a Linear renamed": lambda m: m.__setattr__("head", m[2]) or m.__delitem__(2),
    "a wrapper": lambda m: m.__setitem__(0, nn.Sequential(m[0])),
    "not contiguous": lambda m: setattr(m[0].weight, "data", m[0].weight.data.t().contiguous().t()),
    "integers": lambda m: m[1].num_batches_tracked.fill_(2**40),
}
USES = ("update", "applied", "save", "state", "record", "record averaged", "module", "copy_to")


def changed(change: str, use: str, folder: Path) -> None:
    """Three samples, a change, and three more: the mean by name of what was seen, or a refusal; never a mixture."""
    model = small_model()
    average = polyak.Average(model, "uniform")
    run = polyak.Recorder(
        model, folder / "run", block=2, buffers="average" if use.endswith("averaged") else "copy"
    )
    samples = []

    def step(number: int) -> None:
        samples.append(walk(model, number))
        average.update()
        run.update()

    try:
        for number in range(3):
            step(number)
        CHANGES[change](model)
        if use == "state":
            average.load_state_dict(average.state_dict())
            run.load_state_dict(run.state_dict())
        if use in ("update", "record", "record averaged", "state"):
            for number in range(3, 6):
                step(number)
        if use == "module":
            average.module()
        before = state_of(model)
        if use == "save":
            average.save(folder / "out.safetensors")
            assert checkpoints.open(folder / "out.safetensors").tensors.keys() == model.state_dict().keys()
        if use == "copy_to":
            average.copy_to(model)
        elif use == "applied":
            with average.applied():
                pass
            same_model(model, before)
        common = set(samples[0]).intersection(*samples[1:])
        wanted = mean64([{n: t for n, t in s.items() if n in common} for s in samples])
        near(average.named_tensors(), wanted, 2e-2 if change in ("half", "bfloat16") else 1e-5)
    finally:
        if change == "meta":
            run._release()
        with suppress(PolyakError):
            run.close()
    recorded = run.trajectory
    assert not recorded.usable.damaged
    for block, stored in zip(recorded.blocks, recorded.checkpoints, strict=True):
        if block.stop <= 2:
            near({n: stored.read(n) for n in samples[0]}, mean64(samples[:2]))


@family("structure of the model changes", apart=28)
def structures(rng: random.Random) -> Iterator[Case]:
    for change in CHANGES:
        for use in USES:
            yield Case(f"{change}, {use}", partial(changed, change, use))


def many(use: str, count: int, folder: Path) -> None:
    """As many tensors as the largest models have."""
    model = nn.ParameterList([torch.full((2,), float(n % 7)) for n in range(count)])
    if use == "average":
        average = polyak.Average(model, "ema:decay=0.5")
        for _ in range(2):
            average.update()
        with average.applied():
            pass
        found = average.named_tensors()
    elif use == "record":
        with polyak.Recorder(model, folder / "run", block=1) as run:
            run.update()
        found = run.trajectory.average("uniform")
    else:
        for number in (1, 2):
            checkpoints.write(
                folder / f"step{number}{use}", {f"{n}": p.detach() for n, p in enumerate(model)}
            )
        polyak.average_checkpoints(sorted(folder.glob("step*")), folder / f"out{use}")
        with checkpoints.open(folder / f"out{use}") as opened:
            found = {name: opened.read(name) for name in opened.tensors}
    assert len(found) == count
    assert all(torch.equal(found[str(n)], p.detach()) for n, p in enumerate(model))


LARGE = """
import json, resource, struct, sys
from pathlib import Path
import torch, polyak, polyak.combine
from polyak import checkpoints
torch.set_num_threads(1)
folder, numel = Path(sys.argv[1]), int(sys.argv[2])
for name in "ab":
    header = json.dumps({"w": {"dtype": "BF16", "shape": [numel], "data_offsets": [0, 2 * numel]}}).encode()
    with (folder / f"{name}.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        stream.truncate(8 + len(header) + 2 * numel)
        stream.seek(8 + len(header))
        stream.write(bytes(torch.tensor([1.0 if name == "a" else 3.0]).bfloat16().view(torch.uint8).tolist()))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
polyak.average_checkpoints([folder / "a.safetensors", folder / "b.safetensors"], folder / "out.safetensors")
megabytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
with checkpoints.open(folder / "out.safetensors") as opened:
    assert opened.tensors["w"].shape == (numel,)
    assert opened.read_slice("w", 0, 3).tolist() == [2.0, 0.0, 0.0]
assert megabytes < 256, megabytes
"""


def large(numel: int, folder: Path) -> None:
    """A tensor of sparse files, averaged in a process of its own whose memory is measured."""
    code = [sys.executable, "-c", LARGE, str(folder), str(numel)]
    ended = subprocess.run(code, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


@family("very many and very large tensors", apart=100)
def sizes(rng: random.Random) -> Iterator[Case]:
    for use in (".safetensors", ".pt", ".npz", "", "average", "record"):
        yield Case(f"10,000 tensors, {use or 'folder'}", partial(many, use, 10_000))
    for numel in (100_000_000, 1_000_000_000):
        yield Case(f"{numel:,} elements", partial(large, numel))
