"""The demo's data: handwritten digits and the English of Python's own help pages, split by seed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from polyak.extras import require

__all__ = ["Examples", "Split", "batches", "digits", "help_text", "with_noise"]

_CONTEXT_BYTES, _HELD_OUT_SHARE, _TEXT_SAMPLES = 8, 0.1, 10_000


@dataclass(frozen=True)
class Examples:
    """Inputs ``[N, ...]`` and their classes ``[N]`` (int64)."""

    inputs: Tensor
    targets: Tensor

    def __getitem__(self, rows: Tensor | slice) -> Examples:
        return Examples(self.inputs[rows], self.targets[rows])


@dataclass(frozen=True)
class Split:
    """Disjoint examples to train on, to tune on and to report on."""

    train: Examples
    validation: Examples
    test: Examples


def digits(seed: int, trained_on: int = 500, validated_on: int = 600, label_noise: float = 0.2) -> Split:
    """scikit-learn's 1,797 digits, ``[N, 1, 8, 8]`` in [0, 1]: to train on, to validate on, the rest to test.

    ``label_noise`` is the share of training labels that are replaced by random ones; those of validation and
    test are clean.
    """
    bunch = require("sklearn.datasets", extra="demo", purpose="the digits demo").load_digits()
    everything = Examples(
        torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16, torch.tensor(bunch.target)
    )
    generator = torch.Generator().manual_seed(seed)
    shuffled = everything[torch.randperm(len(everything.targets), generator=generator)]
    return Split(
        _with_noisy_labels(shuffled[:trained_on], label_noise, generator),
        shuffled[trained_on : trained_on + validated_on],
        shuffled[trained_on + validated_on :],
    )


def help_text(seed: int) -> Split:
    """The next byte given eight, in the help pages that ship with Python (466 kB of English).

    Trains on the first 90%; validation and test are disjoint random samples, 10,000 bytes each, of the rest.
    """
    from pydoc_data.topics import topics

    corpus = torch.tensor(list("".join(topics.values()).encode()))
    windows = corpus.unfold(0, _CONTEXT_BYTES + 1, 1)
    everything = Examples(windows[:, :-1], windows[:, -1])
    held_out = len(everything.targets) - int(_HELD_OUT_SHARE * len(everything.targets))
    generator = torch.Generator().manual_seed(seed)
    tail = everything[held_out:]
    shuffled = tail[torch.randperm(len(tail.targets), generator=generator)]
    # The windows that reach into the tail are in neither part: no test byte is ever seen in training.
    return Split(
        everything[: held_out - _CONTEXT_BYTES],
        shuffled[:_TEXT_SAMPLES],
        shuffled[_TEXT_SAMPLES : 2 * _TEXT_SAMPLES],
    )


def batches(
    examples: Examples, batch_size: int, steps: int, generator: torch.Generator
) -> Iterator[Examples]:
    """``steps`` shuffled batches, epoch after epoch; what does not fill a batch is left out of its epoch."""
    epoch_steps = len(examples.targets) // batch_size
    order = torch.empty(0, dtype=torch.int64)
    for step in range(steps):
        if step % epoch_steps == 0:
            order = torch.randperm(len(examples.targets), generator=generator)
        first = step % epoch_steps * batch_size
        yield examples[order[first : first + batch_size]]


def with_noise(inputs: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    """``inputs`` plus fresh Gaussian noise; as they are if ``deviation`` is 0."""
    if deviation == 0:
        return inputs
    return inputs + deviation * torch.randn(inputs.shape, generator=generator)


def _with_noisy_labels(examples: Examples, share: float, generator: torch.Generator) -> Examples:
    count = len(examples.targets)
    replaced = torch.rand(count, generator=generator) < share
    random_labels = torch.randint(0, 10, (count,), generator=generator)
    return Examples(examples.inputs, torch.where(replaced, random_labels, examples.targets))
