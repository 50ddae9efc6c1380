"""Data, networks and float64 answers for the tests of `update_bn`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import polyak

CHANNELS = 6


def population(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Float64 mean and variance (divided by N) per channel, from all the data at once."""
    rows = inputs.double().transpose(0, 1).flatten(1)
    mean = rows.mean(1)
    return mean, (rows - mean[:, None]).square().mean(1)


def assert_population(layer: nn.Module, inputs: Tensor, rtol: float = 3e-5) -> None:
    mean, variance = population(inputs)
    torch.testing.assert_close(layer.running_mean.double(), mean, rtol=rtol, atol=rtol)
    torch.testing.assert_close(layer.running_var.double(), variance, rtol=rtol, atol=0)


def data(n_samples: int = 517, *shape: int, seed: int = 0) -> Tensor:
    """Channels of different offsets and scales, sorted by size: early batches are unlike late ones."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_samples, CHANNELS, *shape, generator=generator).sort(0).values
    per_channel = (1, CHANNELS, *(1 for _ in shape))
    return x * torch.linspace(0.1, 5, CHANNELS).view(per_channel) + torch.linspace(-9, 9, CHANNELS).view(
        per_channel
    )


def deep_network(depth: int = 3, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    blocks = [[nn.Linear(CHANNELS, CHANNELS), nn.BatchNorm1d(CHANNELS), nn.Tanh()] for _ in range(depth)]
    return nn.Sequential(*(layer for block in blocks for layer in block))


def state_of(model: nn.Module) -> tuple:
    """Everything that update_bn may not leave changed after a failure."""
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        [module.training for module in model.modules()],
        [getattr(module, "momentum", None) for module in model.modules()],
        [len(module._forward_pre_hooks) for module in model.modules()],
        [id(buffer) for buffer in model.buffers()],
    )


def assert_same_state(model: nn.Module, before: tuple) -> None:
    tensors, *rest = state_of(model)
    assert rest == list(before[1:])
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[0][name]), name


def count_graphs() -> tuple[int, int]:
    """How many graphs torch compiles for a forward pass, and how many it has compiled after an update."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    x = data(96)
    model = nn.Sequential(torch.compile(deep_network(), backend=backend))
    with torch.no_grad():
        model(x[:32])
    n_graphs = len(graphs)
    polyak.update_bn(x.split(32), model)
    return n_graphs, len(graphs)
