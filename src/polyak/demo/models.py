"""The demo's two models: small enough for a minute on two cores, of the kinds that people average."""

from __future__ import annotations

from torch import nn

__all__ = ["byte_language_model", "digits_cnn"]


def digits_cnn() -> nn.Sequential:
    """Two convolutions, 16 and 32 channels, with BatchNorm: images ``[N, 1, 8, 8]`` to logits ``[N, 10]``."""
    return nn.Sequential(
        *_convolution(1, 16),
        nn.MaxPool2d(2),
        *_convolution(16, 32),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def byte_language_model() -> nn.Sequential:
    """One hidden layer over eight embedded bytes: contexts ``[N, 8]`` to next-byte logits ``[N, 256]``."""
    return nn.Sequential(
        nn.Embedding(256, 24),
        nn.Flatten(),
        nn.Linear(8 * 24, 192),
        nn.LayerNorm(192),
        nn.GELU(),
        nn.Linear(192, 256),
    )


def _convolution(inputs: int, outputs: int) -> list[nn.Module]:
    # BatchNorm subtracts the mean, so a bias before it would do nothing.
    return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
