"""Choose the weights of a run as they will be shipped: quantised, here to a few bits for each weight.

    python examples/quantised_choice.py [SEED]

Averages are said to survive quantisation better than the last weights of a run (arXiv 2510.06213). `prepare` lets
`select` score every candidate quantised, the live weights too, so that one need not believe it: the choice is made on
what is shipped. `python benchmarks/quantised.py` does the same on several seeds, beside a run that was decayed.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import polyak

STEPS, BATCH, RATE, WRONG_LABELS = 1200, 32, 0.1, 0.2
BITS = (8, 4, 3)

Examples = tuple[Tensor, Tensor]


def digits(seed: int) -> tuple[Examples, Examples, Examples]:
    """Training, validation and test examples; a fifth of the labels that are trained on are wrong."""
    pixels, target = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(target), generator=generator)
    inputs, labels = torch.tensor(pixels / 16).float()[order], torch.tensor(target)[order]
    is_wrong = torch.rand(800, generator=generator) < WRONG_LABELS
    noisy = torch.where(is_wrong, torch.randint(10, (800,), generator=generator), labels[:800])
    return (
        (inputs[:800], noisy),
        (inputs[800:1300], labels[800:1300]),
        (inputs[1300:], labels[1300:]),
    )


def train(
    examples: Examples, seed: int, folder: str, decay: float = 0.0, rate: float = RATE
) -> tuple[nn.Module, polyak.Trajectory]:
    """SGD at a constant rate, or one that falls linearly to zero over the last ``decay`` of the run; recorded."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=1e-3)
    inputs, labels = examples
    with polyak.Recorder(model, folder, every=2, block=24) as run:
        for step in range(STEPS):
            left = (STEPS - step) / STEPS
            optimizer.param_groups[0]["lr"] = rate * min(1.0, left / decay if decay else 1.0)
            rows = torch.randint(len(labels), (BATCH,))
            optimizer.zero_grad()
            cross_entropy(model(inputs[rows]), labels[rows]).backward()
            optimizer.step()
            run.update()
    return model, run.trajectory


def quantised(bits: int) -> Callable[[nn.Module], None]:
    """Round the weights of linear layers to ``bits`` bits: to the nearest of 2^bits - 1 levels of each output channel.

    >>> layer = nn.Linear(2, 1)
    >>> layer.weight.data = torch.tensor([[0.9, -0.4]])
    >>> quantised(2)(layer)
    >>> layer.weight.tolist()[0]                        # the levels are -0.9, 0 and 0.9
    [0.8999999761581421, -0.0]
    """

    @torch.no_grad()
    def in_place(model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                level = module.weight.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
                module.weight.copy_((module.weight / level).round() * level)

    return in_place


def losses(examples: Examples) -> Callable[[nn.Module], Tensor]:
    """One loss per example."""
    inputs, labels = examples
    return lambda model: cross_entropy(model(inputs), labels, reduction="none")


def main(seed: int = 0) -> None:
    training, validation, test = digits(seed)
    with tempfile.TemporaryDirectory() as folder:
        model, trajectory = train(training, seed, folder)
        choices = {
            bits: polyak.select(
                trajectory,
                model,
                score=losses(validation),
                holdout=losses(test),  # data that nothing is chosen on
                prepare=quantised(bits),
                progress=False,
            )
            for bits in BITS
        }
        choices[4].apply(model)  # as it was before it was quantised
    for bits, choice in choices.items():
        print(f"{bits} bits: {choice.verdict}\n")
    quantised(4)(model.eval())
    print(f"shipped: test loss {losses(test)(model).mean().item():.4f} at 4 bits")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
