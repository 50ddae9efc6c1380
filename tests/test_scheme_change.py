"""`average.scheme = …`: the new scheme counts from the next sample on, and the state says so."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import oracles
import polyak
from devices import as_if_on
from polyak._mean import Accumulator
from polyak.errors import OptionError, StateError

SCHEMES = {
    "uniform": oracles.uniform,
    "ema:half_life=7": oracles.ema_half_life(7),
    "ema:decay=0.9": oracles.ema_decay(0.9),
    "ema:decay=0.8,debias=false": oracles.ema_first_copied(0.8),
    "power:gamma=3": oracles.power(3),
    "polynomial:eta=8": oracles.polynomial(8),
}
CHANGES = [
    ("uniform", "ema:half_life=7"),
    ("ema:half_life=7", "uniform"),
    ("ema:decay=0.9", "ema:half_life=7"),
    ("ema:half_life=7", "ema:decay=0.8,debias=false"),
    ("power:gamma=3", "polynomial:eta=8"),
    ("polynomial:eta=8", "power:gamma=3"),
]
N, CHANGED_AFTER = 30, 12


def weights_after(old: str, new: str, gap: int) -> np.ndarray:
    """Those of the samples before the change share, as the old scheme has it, what the new one gives to them all."""
    followed = SCHEMES[new](N, gap)
    before = SCHEMES[old](CHANGED_AFTER, gap) * followed[:CHANGED_AFTER].sum()
    return np.concatenate([before, followed[CHANGED_AFTER:]])


def walked(scheme: str, every: int = 1, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2))
    return model, polyak.Average(model, scheme, every=every, **options), oracles.RandomWalk(model)


def follow(average, walk, samples: int) -> None:
    for _ in range(samples * average.every):
        walk.step()
        average.update()


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize(("old", "new"), CHANGES)
def test_the_new_scheme_counts_from_the_next_sample_on(old, new, every, compensated):
    _, average, walk = walked(old, every, compensated=compensated)
    follow(average, walk, CHANGED_AFTER)
    at_change = {name: tensor.clone() for name, tensor in average.named_tensors().items()}
    average.scheme = new
    assert average.scheme == polyak.parse(new)
    assert all(torch.equal(tensor, at_change[name]) for name, tensor in average.named_tensors().items())
    follow(average, walk, N - CHANGED_AFTER)

    taken = walk.visited[every - 1 :: every]
    state = average.state_dict()
    for name, value in state["average"].items():
        expected = oracles.mean_of([v[name] for v in taken], weights_after(old, new, every))
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-6)
        if compensated:
            whole = value.double() + state["residual"][name].double()
            torch.testing.assert_close(whole, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("old", "new"), CHANGES)
def test_on_an_accelerator_too(old, new):
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randn(5, dtype=torch.float64, generator=generator) for _ in range(N)]
    with as_if_on("accelerator"):
        mean = Accumulator(samples[:1], ["w"], polyak.profiles.as_scheme(old))
    for n, sample in enumerate(samples, start=1):
        if n == CHANGED_AFTER + 1:
            mean.scheme = polyak.profiles.as_scheme(new)
        mean.add([sample], 5.0 * n)
    expected = oracles.mean_of(samples, weights_after(old, new, 5))
    torch.testing.assert_close(mean.means[0], expected, rtol=0, atol=1e-12)


def test_a_scheme_set_before_the_first_sample_is_as_one_that_was_given():
    _, changed, walk = walked("uniform")
    changed.scheme = polyak.EMA(half_life=7)
    follow(changed, walk, 9)
    _, given, walk = walked("ema:half_life=7")
    follow(given, walk, 9)
    assert all(map(torch.equal, changed.named_tensors().values(), given.named_tensors().values()))


@pytest.mark.parametrize("compensated", [False, True])
def test_a_change_survives_a_resume_bitwise(compensated):
    _, whole, walk = walked("ema:half_life=7", 2, compensated=compensated)
    follow(whole, walk, 5)
    whole.scheme = "ema:half_life=3"
    follow(whole, walk, 4)
    state = {k: dict(v) if isinstance(v, dict) else v for k, v in whole.state_dict().items()}
    for kind in ("average", "residual") if compensated else ("average",):
        state[kind] = {name: tensor.clone() for name, tensor in state[kind].items()}
    assert state["scheme"] == "ema:half_life=3"
    follow(whole, walk, 6)

    model, resumed, again = walked("ema:half_life=7", 2, compensated=compensated)
    with pytest.raises(
        StateError, match=r"saved with scheme='ema:half_life=3', .*'ema:half_life=7'"
    ) as refused:
        resumed.load_state_dict(state)
    # The message says how: its own words are run.
    exec(str(refused.value).partition("Set ")[2].partition(" before")[0], {"average": resumed})
    resumed.load_state_dict(state)
    for _ in range(18):
        again.step()
    follow(resumed, again, 6)
    assert all(map(torch.equal, whole.named_tensors().values(), resumed.named_tensors().values()))
    assert resumed.scheme == whole.scheme == polyak.EMA(half_life=3)
    assert repr(resumed).startswith("Average(EMA(half_life=3.0), start=0, every=2")


def test_what_is_no_scheme_is_refused_and_changes_nothing():
    _, average, walk = walked("uniform")
    follow(average, walk, 3)
    for wrong in ("tail:0.4", polyak.Decay("sqrt", 0.4), "ema:decay=2", "emma", 0.9, None):
        with pytest.raises(OptionError):
            average.scheme = wrong
    assert average.scheme == polyak.Uniform()
    assert average.state_dict()["scheme"] == "uniform"
    follow(average, walk, 3)
    expected = oracles.mean_of([v["0.weight"] for v in walk.visited], oracles.uniform(6))
    found = average.named_tensors()["0.weight"]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)


def test_it_may_be_assigned_while_the_average_is_applied():
    _, average, walk = walked("uniform")
    follow(average, walk, 3)
    with average.applied():
        average.scheme = "ema:decay=0.5,debias=false"
    follow(average, walk, 1)
    expected = oracles.mean_of([v["0.weight"] for v in walk.visited], np.array([1 / 6, 1 / 6, 1 / 6, 1 / 2]))
    found = average.named_tensors()["0.weight"]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)
