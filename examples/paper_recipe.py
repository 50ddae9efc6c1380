"""The recipe of the SWA paper (Izmailov et al. 2018), end to end, against conventional training and a cosine.

    python examples/paper_recipe.py --data /usr/share/datasets/fashion-mnist --model preresnet20

Constant learning rate, linearly down to the rate at which averaging goes on, one sample at the end of each epoch, and
BatchNorm statistics of the average's own. One such run is read at 1, 1.25 and 1.5 budgets; the other two schedules
need a run for each. `--data` is a folder with MNIST or Fashion-MNIST (Debian: apt install dataset-fashion-mnist) or
with the Python files of CIFAR-10 or CIFAR-100, for which the paper has its figures. `--epochs` and `--images` make it
small: the defaults are the paper's, for a GPU. All three see the same images and pay the same budget.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

import polyak
from paper_data import Images, augmented, load
from paper_models import MODELS

BUDGETS = (1.0, 1.25, 1.5)
LIVE, SWA, CONVENTIONAL, COSINE = "live, at the end of SWA's run", "SWA", "conventional", "cosine"
SHIFT, LEAST_EPOCHS = 4, 4


@dataclass(frozen=True)
class Settings:
    """The paper's for one kind of network; ``epochs`` are one budget, ``swa_start`` is a share of it."""

    rate: float
    weight_decay: float
    swa_rate: float
    epochs: int
    swa_start: float
    batch: int = 128


def paper_settings(model: str, classes: int) -> Settings:
    """Appendix A.1 of the paper: the rate of averaging depends on the data for pre-activation ResNets."""
    if model == "vgg16":
        return Settings(0.05, 5e-4, 0.01, epochs=200, swa_start=160 / 200)
    if model == "wrn":
        return Settings(0.1, 5e-4, 0.05, epochs=200, swa_start=160 / 200)
    return Settings(0.1, 3e-4, 0.05 if classes == 100 else 0.01, epochs=150, swa_start=125 / 150)


class Data:
    """Images on the device, scaled to [-1, 1], and shuffled batches of them."""

    def __init__(self, train: Images, test: Images, device: torch.device):
        self.train, self.test = (_scaled(part, device) for part in (train, test))
        self.channels = train.pixels.shape[1]
        self.classes = int(train.labels.max()) + 1

    def batches(self, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch, moved and mirrored at random; what does not fill a batch is left out."""
        inputs, labels = self.train
        order = torch.randperm(len(labels), generator=generator)
        for rows in order[: len(order) // size * size].split(size):
            yield augmented(inputs[rows.to(inputs.device)], SHIFT, generator), labels[rows.to(labels.device)]


def _scaled(part: Images, device: torch.device) -> tuple[Tensor, Tensor]:
    return part.pixels.to(device).float().div(127.5).sub(1), part.labels.to(device)


def contenders(
    build: Callable[[], nn.Module], data: Data, settings: Settings, seed: int
) -> Iterator[tuple[str, float, nn.Module]]:
    """Name, budget and a model that holds the weights until the next is asked for; every run starts from ``seed``."""
    yield from swa_run(build, data, settings, seed)
    for budget in BUDGETS:
        yield CONVENTIONAL, budget, decayed_run(build, data, settings, seed, budget, conventional)
        yield COSINE, budget, decayed_run(build, data, settings, seed, budget, cosine)


def swa_run(
    build: Callable[[], nn.Module], data: Data, settings: Settings, seed: int
) -> Iterator[tuple[str, float, nn.Module]]:
    """One run of the largest budget; its average and its live weights are offered at every budget on the way."""
    model, optimizer, generator = begun(build, data, settings, seed)
    epoch_steps = len(data.train[1]) // settings.batch
    start = round(settings.swa_start * settings.epochs) * epoch_steps
    scheduler = polyak.schedules.swa_schedule(optimizer, swa_start=start, swa_lr=settings.swa_rate)
    swa = polyak.Average(model, polyak.Uniform(), start=start, every=epoch_steps)
    read_at = {round(budget * settings.epochs): budget for budget in BUDGETS}
    for epoch in range(1, max(read_at) + 1):
        for _ in steps(model, optimizer, scheduler, data.batches(settings.batch, generator)):
            swa.update()
        if epoch in read_at:
            yield LIVE, read_at[epoch], model
            with swa.applied():
                polyak.update_bn(data.train[0].split(512), model)
                yield SWA, read_at[epoch], model


def decayed_run(
    build: Callable[[], nn.Module],
    data: Data,
    settings: Settings,
    seed: int,
    budget: float,
    schedule: Callable[[Optimizer, int], LRScheduler],
) -> nn.Module:
    """The model after ``budget`` with a schedule that comes down by then."""
    model, optimizer, generator = begun(build, data, settings, seed)
    epochs = round(budget * settings.epochs)
    scheduler = schedule(optimizer, epochs * (len(data.train[1]) // settings.batch))
    for _ in range(epochs):
        for _ in steps(model, optimizer, scheduler, data.batches(settings.batch, generator)):
            pass
    return model


def conventional(optimizer: Optimizer, total_steps: int) -> LRScheduler:
    """The paper's baseline: the same shape as SWA's, at a hundredth of the rate after nine tenths."""
    lowest = optimizer.param_groups[0]["lr"] / 100
    return polyak.schedules.swa_schedule(optimizer, swa_start=total_steps, swa_lr=lowest)


def cosine(optimizer: Optimizer, total_steps: int) -> LRScheduler:
    """Half a cosine, to zero."""
    return CosineAnnealingLR(optimizer, T_max=total_steps)


def begun(
    build: Callable[[], nn.Module], data: Data, settings: Settings, seed: int
) -> tuple[nn.Module, Optimizer, torch.Generator]:
    """A fresh model, its optimizer, and the generator of its batches."""
    torch.manual_seed(seed)
    model = build().to(data.train[0].device, memory_format=torch.channels_last)
    optimizer = SGD(model.parameters(), settings.rate, momentum=0.9, weight_decay=settings.weight_decay)
    return model, optimizer, torch.Generator().manual_seed(seed)


def steps(
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    batches: Iterator[tuple[Tensor, Tensor]],
) -> Iterator[None]:
    """Train on each batch."""
    model.train()
    for inputs, labels in batches:
        optimizer.zero_grad()
        cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        scheduler.step()
        yield


@torch.no_grad()
def test_scores(model: nn.Module, data: Data) -> dict[str, float]:
    """Mean NLL in nats and accuracy, 0 to 1, of the model in evaluation mode, which it is left in."""
    model.eval()
    inputs, labels = data.test
    logits = torch.cat([model(part) for part in inputs.split(1000)])
    right = (logits.argmax(1) == labels).double().mean()
    return {"nll": cross_entropy(logits, labels).item(), "accuracy": right.item()}


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts = load(options.data)
    order = torch.randperm(len(parts["train"]), generator=torch.Generator().manual_seed(options.seed))
    data = Data(parts["train"][order[: options.images]], parts["test"], device)
    settings = paper_settings(options.model, data.classes)
    given = {"epochs": options.epochs, "batch": options.batch}
    settings = replace(settings, **{name: value for name, value in given.items() if value is not None})
    if settings.epochs < LEAST_EPOCHS:
        raise SystemExit(f"--epochs: at least {LEAST_EPOCHS}, so that SWA samples within the first budget")
    if len(data.train[1]) < settings.batch:
        raise SystemExit(f"--images: {len(data.train[1])} do not fill one batch of {settings.batch}")
    rows = []
    print(f"{options.model}, {len(data.train[1])} images, {settings} on {device.type}")
    for name, budget, model in contenders(
        lambda: MODELS[options.model](data.channels, data.classes), data, settings, options.seed
    ):
        scores = test_scores(model, data)
        rows.append({"contender": name, "budget": budget, **scores})
        print(f"{budget:4g} budgets  {scores['accuracy']:7.2%}  NLL {scores['nll']:.4f}  {name}", flush=True)
    if options.output is not None:
        record = {"model": options.model, "seed": options.seed, "settings": vars(settings), "rows": rows}
        options.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--data", type=Path, required=True, help="folder of the IDX or CIFAR files")
    parser.add_argument("--model", choices=list(MODELS), required=True, help="preresnet8 is for two cores")
    parser.add_argument("--epochs", type=int, help="one budget (default: the paper's 200, or 150)")
    parser.add_argument("--images", type=int, help="train on so many, drawn at random (default: all)")
    parser.add_argument("--batch", type=int, help="images in a batch (default 128)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of weights, batches and the images drawn (default 0)"
    )
    parser.add_argument("--output", type=Path, help="write the figures to this file as JSON")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
