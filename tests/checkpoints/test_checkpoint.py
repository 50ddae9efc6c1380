"""Finding weights: which key wins, what is left out, which prefixes go."""

from pathlib import Path

import pytest
import torch

import polyak
from polyak import checkpoints
from polyak.checkpoints._base import Contents, LoadedTensor
from polyak.checkpoints._tree import find_weights
from polyak.combine._reading import read_inputs
from polyak.errors import CheckpointError, OptionError

PATH = Path("run.pt")


def find(tree, key=None):
    return find_weights(Contents(tree, stored=LoadedTensor), key, PATH)


def tensors(*names):
    return {name: torch.zeros(1) for name in names}


@pytest.mark.parametrize(
    ("tree", "key", "names"),
    [
        ({"w": torch.zeros(1), "epoch": 3}, None, ["w"]),
        ({"model": tensors("w"), "rng_state": torch.zeros(9)}, "model", ["w"]),
        ({"state_dict": tensors("w"), "ema": tensors("v")}, "ema", ["v"]),
        ({"app": {"model": tensors("w")}}, "app.model", ["w"]),
        ({"model": {"state_dict": tensors("w"), "cfg": 1}}, "model.state_dict", ["w"]),
        ({"model": {"encoder": tensors("w"), "head": torch.zeros(1)}}, "model", ["encoder.w", "head"]),
        ({"model": {"a": {"model": tensors("w")}, "b": torch.zeros(1)}}, "model", ["a.model.w", "b"]),
        ({"module": tensors("w"), "dp_world_size": 8}, "module", ["w"]),
        ({"encoder": tensors("w"), "decoder": tensors("w")}, None, ["encoder.w", "decoder.w"]),
        ({"net": tensors("w"), "opt": {"state": tensors("m")}, "d_optimizer": tensors("m")}, "net", ["w"]),
        ({"optimizer": {"model": tensors("m")}, "w": torch.zeros(1)}, None, ["w"]),
        (
            {"shadow_params": [torch.zeros(1), torch.ones(1)]},
            "shadow_params",
            ["shadow_params.0", "shadow_params.1"],
        ),
        ({"shadow_params": None, "state_dict": tensors("w")}, "state_dict", ["w"]),
        ({0: tensors("w")}, None, ["0.w"]),
    ],
)
def test_the_weights_are_found(tree, key, names):
    found = find(tree)
    assert (found.key, list(found.tensors)) == (key, names)


@pytest.mark.parametrize(
    ("names", "plain"),
    [
        (["module.w", "module.b"], ["w", "b"]),
        (["module.w", "head.b"], ["module.w", "head.b"]),
        (["module.module.w"], ["w"]),
        (["_orig_mod.w", "_orig_mod.b"], ["w", "b"]),
        (["module._orig_mod.w"], ["w"]),
        (
            ["layers.0._fsdp_wrapped_module.w", "layers.1._checkpoint_wrapped_module._orig_mod.w"],
            ["layers.0.w", "layers.1.w"],
        ),
        (["my_orig_mod.w"], ["my_orig_mod.w"]),
        (["n_averaged", "module.w"], ["w"]),
        (["n_averaged"], ["n_averaged"]),
        (["w", "_orig_mod.w"], ["w", "_orig_mod.w"]),
    ],
)
def test_prefixes_of_wrappers_are_left_out(names, plain):
    assert list(find(tensors(*names)).tensors) == plain


@pytest.mark.parametrize(
    ("tree", "step"),
    [
        ({"w": torch.zeros(1)}, None),
        ({"w": torch.zeros(1), "epoch": 3}, 3),
        ({"w": torch.zeros(1), "epoch": 3, "global_step": 400}, 400),
        ({"ema": {"shadow_params": [torch.zeros(1)], "optimization_step": 9}, "epoch": 2}, 9),
        ({"ema": {"shadow_params": [torch.zeros(1)], "optimization_step": 9}}, 9),
        ({"w": torch.zeros(1), "step": "7"}, None),
        ({"w": torch.zeros(1), "step": True}, None),
        ({"model": {"w": torch.zeros(1)}, "step": torch.tensor(7)}, 7),
        ({"model": {"w": torch.zeros(1)}, "step": torch.tensor([7.0])}, 7),
        ({"model": {"w": torch.zeros(1)}, "step": torch.tensor(7.5)}, None),
        ({"model": {"w": torch.zeros(1)}, "step": torch.tensor(torch.inf)}, None),
        ({"model": {"w": torch.zeros(1)}, "step": torch.tensor(True)}, None),
        ({"w": torch.zeros(1), "step": torch.tensor(7)}, None),
        ({"w": torch.zeros(1), "step": -1}, None),
    ],
)
def test_the_step_is_found(tree, step):
    assert find(tree).step == step


def test_any_key_may_be_chosen():
    tree = {"model": tensors("w"), "g.net": {"inner": tensors("v")}, "optimizer": {"state": [tensors("m")]}}
    assert list(find(tree, "g.net").tensors) == ["inner.v"]
    assert list(find(tree, "g.net.inner").tensors) == ["v"]
    assert list(find(tree, "optimizer.state.0").tensors) == ["m"]
    for absent in ("g", "model.w", "", "optimizer.state.1"):
        with pytest.raises(OptionError, match=r"run\.pt has no weights under .* choose from 'model'"):
            find(tree, absent)


def test_what_is_left_out_is_listed_by_branch():
    tree = {
        "model": {"w": torch.zeros(1), "_extra_state": "x", "nested": {"n": 1}},
        "optimizer": {"state": {0: tensors("m", "v")}, "lr": 1},
        "epoch": 2,
    }
    assert find(tree).ignored == ("model._extra_state", "model.nested", "optimizer", "epoch")


def test_nothing_to_find_is_an_error():
    with pytest.raises(
        CheckpointError,
        match=r"run\.pt holds the state of an optimizer and no weights; its entries are 'optimizer', 'epoch'",
    ):
        find({"optimizer": {"state": tensors("m")}, "epoch": 2})


def test_two_tensors_of_one_name_are_an_error():
    with pytest.raises(CheckpointError, match=r"two tensors named 'a\.b'"):
        find({"a": tensors("b"), "a.b": torch.zeros(1)})


def test_damaged_nesting_ends(monkeypatch):
    monkeypatch.setattr("polyak.checkpoints._tree._MAX_ENTRIES", 10_000)
    endless: dict = {"w": torch.zeros(1)}
    endless["again"] = endless
    with pytest.raises(CheckpointError, match="nested too deeply"):
        find(endless)
    wide: list = [1] * 10
    for _ in range(12):
        wide = [wide] * 10
    with pytest.raises(CheckpointError, match="too widely"):
        find({"w": torch.zeros(1), "wide": wide})


def test_the_state_of_an_average_holds_its_weights_under_their_names(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    ema = polyak.Average(model, polyak.EMA(decay=0.9), compensated=True)
    ema.update()
    saved = {"model": model.state_dict(), "ema": ema.state_dict()}
    torch.save(saved, tmp_path / "run.pt")
    found = checkpoints.open(tmp_path / "run.pt")
    assert set(found.tensors) == set(model.state_dict())
    assert found.note.startswith("weights found under 'ema.average'")
    assert "what that lacks, '1.running_mean'" in found.note and "is taken from 'model'" in found.note
    alone = checkpoints.open(tmp_path / "run.pt", "ema.average")
    assert set(alone.tensors) == {name for name, _ in model.named_parameters()}


def layer(name, size=2):
    return {f"{name}.weight": torch.zeros(size, size), f"{name}.bias": torch.zeros(size)}


@pytest.mark.parametrize(
    ("beside", "also_present", "parts"),
    [
        ({"encoder": layer("conv")}, ("encoder",), ("encoder",)),
        ({"generator": {"0.weight": torch.zeros(2, 2)}}, ("generator",), ("generator",)),
        ({"nets": {"head": layer("out")}}, ("nets",), ("nets",)),
        # Another value of the same tensors, and nets that train this one.
        ({"best_so_far": layer("block.fc")}, ("best_so_far",), ()),
        ({"replica": {"module.block.fc.weight": torch.zeros(2, 2)}}, ("replica",), ()),
        ({"d": layer("conv"), "netD": layer("a"), "net_d": layer("b")}, ("d", "netD", "net_d"), ()),
        ({"discriminator": layer("conv"), "criterion": layer("proj")}, ("discriminator", "criterion"), ()),
        # No weights.
        ({"optimizer": {"state": layer("conv")}, "queue": torch.zeros(2, 2)}, (), ()),
        ({"rng_state": {"cuda": torch.zeros(2, 2)}, "scores": {"car": torch.zeros(1)}}, (), ()),
    ],
)
def test_other_weights_beside_a_known_key_are_named(tmp_path, beside, also_present, parts):
    tree = {"model": layer("block.fc"), **beside}
    found = find(tree)
    assert (found.key, found.siblings) == ("model", parts)
    assert all(repr(key) in found.note.partition("also present: ")[2] for key in also_present)
    assert bool(also_present) == ("also present" in found.note)
    torch.save(tree, tmp_path / "1.pt")
    refusal = read_inputs(tmp_path / "1.pt").refusal
    assert bool(parts) == (refusal is not None)
    assert not parts or f"by key='model' or key={parts[0]!r}" in str(refusal)
    assert read_inputs(tmp_path / "1.pt", "model").refusal is None
