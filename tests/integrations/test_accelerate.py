"""accelerate, which needs no callback: `attach`, and its own states; with a model that FSDP2 shards on two ranks."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

import polyak
from polyak.errors import OptionError, StateError
from polyak.integrations.accelerate import register
from ranks import run_on_ranks
from sharded_accelerate import sharding_accelerator


def by_itself(accelerator, average):
    accelerator.register_for_checkpointing(average)


def by_name(accelerator, average):
    register(accelerator, ema=average)


def run(accelerator, folder, n_steps, carry, load=False):
    torch.manual_seed(0)
    model = nn.Linear(3, 5)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    average = polyak.Average(model, polyak.EMA(half_life=2))
    polyak.attach(optimizer, average)
    carry(accelerator, average)
    if load:
        accelerator.load_state(str(folder))
    for _ in range(n_steps):
        accelerator.backward(model(torch.ones(2, 3)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    accelerator.save_state(str(folder))
    return average


@pytest.mark.parametrize("carry", [by_itself, by_name])
def test_save_state_and_load_state_carry_the_average(tmp_path, carry):
    whole = run(Accelerator(cpu=True), tmp_path / "whole", 6, carry)
    run(Accelerator(cpu=True), tmp_path / "half", 3, carry)
    resumed = run(Accelerator(cpu=True), tmp_path / "half", 3, carry, load=True)
    assert resumed.n_averaged == whole.n_averaged == 6
    for name, tensor in whole.named_tensors().items():
        assert torch.equal(tensor, resumed.named_tensors()[name])


def test_what_cannot_be_carried_is_refused(tmp_path):
    with pytest.raises(OptionError, match="ema is neither an Average nor a Recorder, but Linear"):
        register(Accelerator(cpu=True), ema=nn.Linear(1, 1))
    run(Accelerator(cpu=True), tmp_path / "state", 1, lambda *_: None)
    with pytest.raises(StateError, match=r"holds no polyak-ema\.pt"):
        run(Accelerator(cpu=True), tmp_path / "state", 1, by_name, load=True)


CARRIED = [(by_itself, "custom_checkpoint_0.pkl"), (by_name, "polyak-ema.pt")]


@pytest.mark.filterwarnings("ignore:left out", "ignore:integer and bool tensors")
@pytest.mark.parametrize(("carry", "name"), CARRIED)
def test_states_are_averaged_afterwards_and_their_averages_where_they_are_named(tmp_path, carry, name):
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))
    model[2].bias.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(trained, lr=0.1))
    average = polyak.Average(model, polyak.EMA(half_life=2))
    polyak.attach(optimizer, average)
    carry(accelerator, average)
    live, averaged = [], []
    for step in range(2, 5):
        accelerator.backward(model(torch.randn(8, 3)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        accelerator.save_state(str(tmp_path / f"run/step_{step}"))
        live.append({key: tensor.clone() for key, tensor in model.state_dict().items()})
        averaged.append(live[-1] | {key: mean.clone() for key, mean in average.named_tensors().items()})
    report = polyak.average_checkpoints([tmp_path / "run"], tmp_path / "live.safetensors")
    assert len(report.inputs) == 3 and f"name '{tmp_path}/run/step_*/{name}' to take these" in report.left_out
    found = polyak.average_checkpoints(
        sorted((tmp_path / "run").glob(f"*/{name}")), tmp_path / "averaged.safetensors"
    )
    assert found.left_out == "" and "'2.bias', is taken from the weights beside it" in found.notes[0]
    for output, inputs in (("live", live), ("averaged", averaged)):
        written = load_file(tmp_path / f"{output}.safetensors")
        model.load_state_dict(written)  # nothing is missing
        for key in ("0.weight", "1.running_mean", "2.bias"):
            expected = torch.stack([each[key] for each in inputs]).double().mean(0)
            torch.testing.assert_close(written[key].double(), expected, rtol=0, atol=1e-6)


def sharded(folder, load):
    """SGD without momentum, whose state torch makes by a step of its own at each save, which must not count."""
    average = run(sharding_accelerator(), f"{folder}/state", 3, by_name, load=load)
    average.save(f"{folder}/average{average.n_averaged}.safetensors", overwrite=True)
    means = average.named_tensors()
    return average.n_averaged, {name: tensor.full_tensor() for name, tensor in means.items()}


@pytest.mark.slow
def test_a_sharded_average_is_carried_to_another_number_of_ranks(tmp_path):
    whole = run(Accelerator(cpu=True), tmp_path / "whole", 6, by_name)
    before = run_on_ranks(sharded, str(tmp_path), False)
    assert [n for n, _ in before] == [3, 3]
    for ranks in (1, 2):  # where the second begins from what the first has saved
        for n_averaged, found in run_on_ranks(sharded, str(tmp_path), True, ranks=ranks):
            assert n_averaged == 3 + 3 * ranks
            if ranks == 1:
                for name, tensor in whole.named_tensors().items():
                    torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)
    assert load_file(tmp_path / "average9.safetensors").keys() == {"weight", "bias"}
    folder = tmp_path / "state"
    with pytest.warns(UserWarning, match="averages beside live weights"):
        report = polyak.average_checkpoints([folder], tmp_path / "live.pt")
    assert report.inputs == ("pytorch_model_fsdp_0",) and f"name '{folder}/polyak-ema'" in report.left_out
