"""Record a run with a constant learning rate, then let validation data choose what to ship.

    python examples/choose_after_training.py [FOLDER]

Nothing about averaging is decided while training: when to start, over how long, EMA or uniform, and whether it
helps at all are answered afterwards, from the recorded run. FOLDER is where the run and the chosen model go.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import polyak

CLASSES, FEATURES, LABEL_NOISE = 5, 20, 0.3
STEPS, BATCH = 1500, 32


def noisy_examples(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs [count, FEATURES] and labels [count] of a fixed rule, some of them wrong."""
    rule = torch.randn(FEATURES, CLASSES, generator=torch.Generator().manual_seed(0))
    inputs = torch.randn(count, FEATURES, generator=generator)
    random_labels = torch.randint(CLASSES, (count,), generator=generator)
    is_wrong = torch.rand(count, generator=generator) < LABEL_NOISE
    return inputs, torch.where(is_wrong, random_labels, (inputs @ rule).argmax(1))


def train(model: nn.Module, examples: tuple[Tensor, Tensor], folder: Path) -> polyak.Trajectory:
    """Plain SGD at a constant learning rate; recording it is two lines."""
    inputs, labels = examples
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    with polyak.Recorder(model, folder, block=25, optimizer=optimizer) as run:
        for _ in range(STEPS):
            rows = torch.randint(len(labels), (BATCH,), generator=generator)
            loss = cross_entropy(model(inputs[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.update(loss=loss)
    return run.trajectory


def main(folder: Path) -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(2)
    training, validation, test = (noisy_examples(count, generator) for count in (4000, 2000, 2000))
    model = nn.Sequential(nn.Linear(FEATURES, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, CLASSES))
    trajectory = train(model, training, folder / "run")

    def losses(on: tuple[Tensor, Tensor]):
        """One loss per example, so that every difference comes with an interval."""
        return lambda model: cross_entropy(model(on[0]), on[1], reduction="none")

    choice = polyak.select(
        trajectory,
        model,
        score=losses(validation),
        holdout=losses(test),  # data that nothing is chosen on
        recalibrate=list(
            training[0].split(500)
        ),  # the averaged weights need BatchNorm statistics of their own
        progress=False,
    )
    print(choice)
    choice.write(folder / "chosen.safetensors", overwrite=True)
    choice.apply(model)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
