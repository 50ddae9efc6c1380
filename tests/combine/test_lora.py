"""Averages of LoRA adapters against the float64 mean of their updates, as the tools that made them see it."""

import json
import math

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn

import polyak
from polyak import checkpoints
from polyak.cli import main
from polyak.combine import Plan
from polyak.combine._lora import is_adapter, product_of_rank
from polyak.errors import CheckpointError, NonFiniteError, OptionError, StructureError


class Net(nn.Module):
    """One of each kind of module that PEFT adapts by two factors."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.inner = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 8))
        self.conv = nn.Conv2d(3, 4, (3, 2))
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.inner(self.embed(x)))


EVERY_KIND = ["embed", "0", "1", "conv"]


def net():
    torch.manual_seed(0)
    return Net()


def peft_adapter(folder, seed, **options):
    """An adapter as PEFT saves it, with random factors."""
    settings = {"r": 2, "lora_alpha": 4, "target_modules": EVERY_KIND, "modules_to_save": ["head"]} | options
    model = get_peft_model(net(), LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


def updates(folder):
    """What PEFT adds to each module's weight when it loads the folder, and the modules that are saved whole."""
    model = PeftModel.from_pretrained(net(), folder).double()
    found = {
        name: module.get_delta_weight("default")
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    assert len(found) == len(model.peft_config["default"].target_modules)
    return found | {"head": model.base_model.model.head.modules_to_save["default"].weight.detach()}


def mean_of(folders, coefficients):
    found = [updates(folder) for folder in folders]
    return {name: sum(a * one[name] for a, one in zip(coefficients, found, strict=True)) for name in found[0]}


def assert_updates(folder, expected, tolerance=2e-5):
    found = updates(folder)
    assert found.keys() == expected.keys()
    for name, update in expected.items():
        torch.testing.assert_close(found[name], update, rtol=0, atol=tolerance * update.abs().max().item())


def lora_note(report):
    return next(note for note in report.notes if note.startswith("LoRA"))


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_loads_the_mean_of_the_updates(tmp_path, rslora):
    a = peft_adapter(tmp_path / "a", 1, use_rslora=rslora)
    b = peft_adapter(tmp_path / "b", 2, r=3, lora_alpha=32, use_rslora=rslora)
    report = polyak.average_checkpoints([a, b], tmp_path / "out", weights=[1, 3], rank=5)
    assert_updates(tmp_path / "out", mean_of([a, b], [0.25, 0.75]))
    assert lora_note(report).startswith(
        "LoRA: the mean of 2 updates, rank 5, keeps 100.0% of its norm (worst 100.0% in "
    )
    # The input's own rsLoRA is not needed any more: its scale would be another for another rank.
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 5
    # What says so in the configs is written anew.
    assert not any("differ in" in note for note in report.notes)


def test_patterns_of_ranks_and_alphas(tmp_path):
    a = peft_adapter(tmp_path / "a", 1, rank_pattern={"0": 4, "conv": 1}, alpha_pattern={"inner.1": 7})
    b = peft_adapter(tmp_path / "b", 2, rank_pattern={"conv": 3}, alpha_pattern={".*embed": 9, "0": 1})
    report = polyak.average_checkpoints([a, b], tmp_path / "out", rank=8)
    assert_updates(tmp_path / "out", mean_of([a, b], [0.5, 0.5]))
    # By default every module keeps the largest rank that an input gives it, and the config says so.
    report = polyak.average_checkpoints([a, b], tmp_path / "cut")
    assert "ranks 2 to 4, keeps" in lora_note(report)
    kept = polyak.average_checkpoints([a, b], tmp_path / "a_alone", weights=[1, 0])
    assert_updates(tmp_path / "a_alone", updates(a)) and "mean of 1 update," in lora_note(kept)
    with checkpoints.open(tmp_path / "cut") as cut:
        ranks = {name: info.shape[0] for name, info in cut.tensors.items() if name.endswith("A.weight")}
    assert sorted(ranks.values()) == [2, 3, 4]
    best = {name: best_of_rank(update, name) for name, update in mean_of([a, b], [0.5, 0.5]).items()}
    assert_updates(tmp_path / "cut", best)


def best_of_rank(update, name):
    """The best approximation of the rank that the case above leaves, from the full product."""
    rank = next((r for end, r in (("inner.0", 4), ("conv", 3), ("head", 99)) if name.endswith(end)), 2)
    return cut_back(update, rank).view(update.shape)


def cut_back(update, rank):
    u, singular, vh = torch.linalg.svd(update.flatten(1).double(), full_matrices=False)
    return u[:, :rank] * singular[:rank] @ vh[:rank]


def test_the_first_config_fits_where_the_ranks_stay(tmp_path):
    a = peft_adapter(tmp_path / "a", 1, rank_pattern={"0": 4}, alpha_pattern={"0": 3}, use_rslora=True)
    b = peft_adapter(tmp_path / "b", 2, rank_pattern={"0": 1}, lora_alpha=1)
    report = polyak.average_checkpoints([a, b], tmp_path / "a" / "average.safetensors")
    assert any("adapter_config.json of a beside it" in note for note in report.notes)
    folder = tmp_path / "by_hand"
    folder.mkdir()
    (tmp_path / "a" / "average.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_bytes((a / "adapter_config.json").read_bytes())
    expected = mean_of([a, b], [0.5, 0.5])
    ranks = {"base_model.model.inner.0": 4, "head": 99}
    assert_updates(folder, {n: cut_back(u, ranks.get(n, 2)).view(u.shape) for n, u in expected.items()})
    report = polyak.average_checkpoints([a, b], tmp_path / "c.safetensors", rank=3)
    assert any('"r": 3, "lora_alpha": 3, "use_rslora": false' in note for note in report.notes)


# PEFT itself asks transformers for what transformers is going to remove.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_real_transformer(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    def model():
        torch.manual_seed(0)
        sizes = {"vocab_size": 17, "n_positions": 8, "n_embd": 8, "n_layer": 2, "n_head": 2}
        return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))

    for seed, name in enumerate("ab"):
        config = LoraConfig(
            task_type="CAUSAL_LM", r=2, lora_alpha=3 + seed, target_modules=["c_attn"], fan_in_fan_out=True
        )
        adapted = get_peft_model(model(), config)
        torch.manual_seed(seed)
        for parameter in (parameter for parameter in adapted.parameters() if parameter.requires_grad):
            nn.init.normal_(parameter)
        adapted.save_pretrained(tmp_path / name)
    polyak.average_checkpoints([tmp_path / "a", tmp_path / "b"], tmp_path / "out", rank=4)

    def merged(folder):
        return PeftModel.from_pretrained(model(), folder).double().merge_and_unload().state_dict()

    a, b, out = (merged(tmp_path / name) for name in ("a", "b", "out"))
    for name, weight in out.items():
        torch.testing.assert_close(weight, (a[name] + b[name]) / 2, rtol=0, atol=1e-5)


def test_unlike_alphas_of_the_same_factors(tmp_path):
    a, b = peft_adapter(tmp_path / "a", 1, lora_alpha=4), peft_adapter(tmp_path / "b", 1, lora_alpha=32)
    report = polyak.average_checkpoints([a, b], tmp_path / "out")
    once = updates(a)
    assert_updates(tmp_path / "out", {name: u if name == "head" else 4.5 * u for name, u in once.items()})
    assert "keeps 100.0% of its norm" in lora_note(report)


def test_a_whole_model_with_its_adapter(tmp_path):
    """A state dict of PEFT's model: base weights beside factors whose names hold the adapter's."""
    paths = []
    for seed in range(2):
        folder = peft_adapter(tmp_path / str(seed), seed, lora_alpha=1 + seed)
        model = PeftModel.from_pretrained(net(), folder)
        (folder / "adapter_model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "whole.pt")
        paths.append(folder / "whole.pt")
    polyak.average_checkpoints(paths, tmp_path / "out.pt", rank=4)
    with checkpoints.open(tmp_path / "out.pt") as out, checkpoints.open(paths[0]) as one:
        name = "base_model.model.inner.0.{}".format
        a, b = (out.read(name(f"lora_{part}.default.weight")).double() for part in "AB")
        expected = torch.zeros(10, 6, dtype=torch.float64)
        for alpha, path in enumerate(paths, 1):
            factors = torch.load(path)
            first, second = (factors[name(f"lora_{part}.default.weight")].double() for part in "AB")
            expected += alpha / 2 * second @ first / len(paths)
        torch.testing.assert_close(b @ a, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
        torch.testing.assert_close(out.read(name("base_layer.weight")), one.read(name("base_layer.weight")))


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    a, b = peft_adapter(tmp_path / "a", 1), peft_adapter(tmp_path / "b", 2, r=3)
    assert main(["average", "a", "b", "-o", "out", "--rank", "5"]) == 0
    assert "LoRA: the mean of 2 updates, rank 5, keeps 100.0% of its norm" in capsys.readouterr().out
    assert_updates(tmp_path / "out", mean_of([a, b], [0.5, 0.5]))
    # What was written may be replaced, as other outputs may.
    assert main(["average", "a", "-o", "out", "--lora", "factors", "--force"]) == 0
    assert "the means of 1 inputs' factors" in capsys.readouterr().out
    assert main(["average", "a", "b", "-o", "other", "--lora", "factors"]) == 2
    assert "means of factors need the same scale" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_adapters_of_different_bases_are_named(tmp_path):
    a, b = peft_adapter(tmp_path / "a", 1), peft_adapter(tmp_path / "b", 2)
    config = json.loads((b / "adapter_config.json").read_text())
    (b / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "other/model"}))
    report = Plan([a, b], tmp_path / "out").report()
    assert any("different base models" in note and "other/model" in note for note in report.notes)


# kohya and LyCORIS: alpha is a tensor.


def kohya_adapter(path, seed, rank, alpha, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    tensors = {
        "lora_unet_mid_attn.lora_down.weight": random(rank, 6),
        "lora_unet_mid_attn.lora_up.weight": random(5, rank),
        "lora_unet_down_conv.lora_down.weight": random(rank, 3, 3, 3),
        "lora_unet_down_conv.lora_up.weight": random(7, rank, 1, 1),
        "lora_unet_norm.diff": random(4),
    }
    if alpha is not None:
        tensors |= {
            f"lora_unet_{name}.alpha": torch.tensor(alpha, dtype=dtype) for name in ("mid_attn", "down_conv")
        }
    checkpoints.write(path, tensors)
    return path


def kohya_updates(path):
    with checkpoints.open(path) as checkpoint:
        read = {name: checkpoint.read(name).double() for name in checkpoint.tensors}
    found = {}
    for name in ("lora_unet_mid_attn", "lora_unet_down_conv"):
        down, up = read[f"{name}.lora_down.weight"], read[f"{name}.lora_up.weight"]
        scale = read[f"{name}.alpha"] / len(down) if f"{name}.alpha" in read else 1
        found[name] = scale * torch.einsum("or,r...->o...", up.flatten(1), down)
    return found, read["lora_unet_norm.diff"]


@settings(max_examples=25, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    alphas=st.lists(st.sampled_from([None, 0.5, 1.0, 3.0, 16.0]), min_size=4, max_size=4),
    weights=st.lists(st.sampled_from([0.0, 0.25, 1.0, -0.5, 3.0]), min_size=4, max_size=4),
    rank=st.one_of(st.none(), st.integers(1, 7)),
)
def test_kohya_of_any_ranks_alphas_and_coefficients(tmp_path_factory, ranks, alphas, weights, rank):
    weights = [*weights[: len(ranks) - 1], 5.0]
    folder = tmp_path_factory.mktemp("kohya")
    paths = [
        kohya_adapter(folder / f"{seed}.safetensors", seed, r, alpha)
        for seed, (r, alpha) in enumerate(zip(ranks, alphas, strict=False))
    ]
    report = polyak.average_checkpoints(paths, folder / "out.safetensors", weights=weights, rank=rank)
    coefficients = [weight / sum(weights) for weight in weights]
    found = [kohya_updates(path) for path in paths]
    average, diff = kohya_updates(folder / "out.safetensors")
    for name, update in average.items():
        expected = sum(a * one[name] for a, (one, _) in zip(coefficients, found, strict=True))
        best = cut_back(expected, rank or max(ranks)).view(expected.shape)
        torch.testing.assert_close(update, best, rtol=0, atol=1e-5 * expected.abs().max().item())
    torch.testing.assert_close(
        diff, sum(a * one for a, (_, one) in zip(coefficients, found, strict=True)).double()
    )
    assert f"rank {rank or max(ranks)}, keeps" in lora_note(report)


def test_the_share_that_is_kept(tmp_path):
    paths = [kohya_adapter(tmp_path / f"{seed}.safetensors", seed, 3, 2.0) for seed in range(2)]
    report = polyak.average_checkpoints(paths, tmp_path / "out.safetensors", rank=1)
    whole = [kohya_updates(path)[0] for path in paths]
    mean = {name: (whole[0][name] + whole[1][name]) / 2 for name in whole[0]}
    kept = {name: cut_back(update, 1).norm() for name, update in mean.items()}
    share = math.hypot(*kept.values()) / math.hypot(*(update.norm() for update in mean.values()))
    worst = min(mean, key=lambda name: kept[name] / mean[name].norm())
    assert lora_note(report) == (
        f"LoRA: the mean of 2 updates, rank 1, keeps {share:.1%} of its norm "
        f"(worst {kept[worst] / mean[worst].norm():.1%} in {worst})"
    )
    assert lora_note(Plan(paths, tmp_path / "other.pt").report()) == "LoRA: the mean of 2 updates, rank 3"


def test_factors_of_very_different_sizes_lose_nothing():
    generator = torch.Generator().manual_seed(0)
    b = torch.randn(40, 3, generator=generator, dtype=torch.float64) * 1e-6
    a = torch.randn(3, 30, generator=generator, dtype=torch.float64) * 1e6
    found_a, found_b, (kept, whole) = product_of_rank(4, [b], [a])
    torch.testing.assert_close(found_b @ found_a, b @ a, rtol=0, atol=1e-13 * (b @ a).abs().max().item())
    assert kept == pytest.approx(whole) and found_a.shape == (4, 30) and not found_a[3].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes(tmp_path, dtype):
    paths = [kohya_adapter(tmp_path / f"{seed}.safetensors", seed, 2, 2.0, dtype) for seed in range(2)]
    polyak.average_checkpoints(paths, tmp_path / "same.safetensors")
    polyak.average_checkpoints(paths, tmp_path / "wide.safetensors", dtype="fp32", rank=4)
    with checkpoints.open(tmp_path / "same.safetensors") as same:
        assert {info.dtype for info in same.tensors.values()} == {dtype}
    with checkpoints.open(tmp_path / "wide.safetensors") as wide:
        assert {info.dtype for info in wide.tensors.values()} == {torch.float32}
    found, mean = kohya_updates(tmp_path / "wide.safetensors")[0], [kohya_updates(path)[0] for path in paths]
    for name, update in found.items():
        torch.testing.assert_close(update, (mean[0][name] + mean[1][name]) / 2, rtol=0, atol=1e-5)


def test_nan_names_the_file_and_the_output_is_not_made(tmp_path):
    kohya_adapter(tmp_path / "a.safetensors", 1, 2, 2.0)
    with checkpoints.open(tmp_path / "a.safetensors") as good:
        tensors = {name: good.read(name) for name in good.tensors}
    tensors["lora_unet_mid_attn.lora_up.weight"][0, 0] = math.nan
    checkpoints.write(tmp_path / "b.safetensors", tensors)
    inputs = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    with pytest.raises(NonFiniteError, match=r"b\.safetensors.*mid_attn\.lora_up"):
        polyak.average_checkpoints(inputs, tmp_path / "out.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


@pytest.mark.parametrize(("rank", "alpha"), [(None, 1.0), (2, 1.0), (1, 1.0), (4, 4.0)])
def test_alpha_is_that_of_the_inputs_where_the_rank_is(tmp_path, rank, alpha):
    a = kohya_adapter(tmp_path / "a.safetensors", 1, 2, 1.0)
    polyak.average_checkpoints([a], tmp_path / "out.safetensors", rank=rank)
    assert checkpoints.open(tmp_path / "out.safetensors").read("lora_unet_mid_attn.alpha").item() == alpha


def test_progress_counts_the_bytes_of_the_factors(tmp_path):
    inputs = [kohya_adapter(tmp_path / f"{seed}.safetensors", seed, 2, 1.0) for seed in range(2)]
    seen = []
    polyak.average_checkpoints(inputs, tmp_path / "out.safetensors", progress=lambda *at: seen.append(at))
    linear, conv = 4 * (2 * 6 + 5 * 2), 4 * (2 * 27 + 7 * 2)
    assert seen[:2] == [(2 * linear, 2 * (linear + conv)), (2 * (linear + conv),) * 2]


# What is refused.


def test_no_config_no_alpha(tmp_path):
    a, b = peft_adapter(tmp_path / "a", 1), peft_adapter(tmp_path / "b", 2)
    (b / "adapter_config.json").unlink()
    with pytest.raises(
        StructureError, match=r"b has no adapter_config.json beside it.*lora=\"factors\""
    ) as caught:
        Plan([a, b], tmp_path / "out")
    assert "--lora factors" in caught.value.for_command


# PEFT warns of the shapes of the biases that it has made.
@pytest.mark.filterwarnings("ignore:Adapter 'default'")
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True, "target_modules": ["0"]}, "lora_bias"),
        ({"init_lora_weights": "pissa", "target_modules": ["0"]}, "pissa"),
    ],
)
def test_other_methods_are_refused_by_name(tmp_path, options, named):
    a = peft_adapter(tmp_path / "a", 1, **options)
    with pytest.raises(StructureError, match=named):
        Plan([a], tmp_path / "out", rank=3)
    assert not (tmp_path / "out").exists()


def test_loha_and_lokr_are_refused_by_name(tmp_path):
    from peft import LoHaConfig, LoKrConfig

    for kind in (LoHaConfig, LoKrConfig):
        folder = tmp_path / kind.__name__
        get_peft_model(net(), kind(r=2, target_modules=["0"])).save_pretrained(folder)
        with pytest.raises(StructureError, match=kind.__name__.removesuffix("Config")):
            Plan([folder], tmp_path / "out")
        Plan([folder], tmp_path / "out", lora="factors")


def test_modules_must_be_the_same(tmp_path):
    a, b = peft_adapter(tmp_path / "a", 1), peft_adapter(tmp_path / "b", 2, target_modules=["0"])
    with pytest.raises(StructureError, match=r"do not change the same modules.*b lacks .*embed"):
        Plan([a, b], tmp_path / "out")


def test_a_config_of_other_weights(tmp_path):
    a = peft_adapter(tmp_path / "a", 1)
    config = json.loads((a / "adapter_config.json").read_text())
    (a / "adapter_config.json").write_text(json.dumps(config | {"r": 16}))
    with pytest.raises(StructureError, match="is not of these weights.*rank 16.*have rank 2"):
        Plan([a], tmp_path / "out")
    (a / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        Plan([a], tmp_path / "out")


def small_adapter(folder, a=(2, 3), b=(4, 2), dtypes=(torch.float32, torch.float32), **config):
    names = ("base_model.model.layer.lora_A.weight", "base_model.model.layer.lora_B.weight")
    factors = {
        n: torch.ones(*shape, dtype=dtype) for n, shape, dtype in zip(names, (a, b), dtypes, strict=True)
    }
    folder.mkdir()
    checkpoints.write(folder / "adapter_model.safetensors", factors)
    known = {"peft_type": "LORA", "r": 2, "lora_alpha": 4} | config
    (folder / "adapter_config.json").write_text(json.dumps(known))
    return folder


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 1}, "not of these weights.*rank 1 and"),
        ({"r": 3}, "not of these weights.*rank 3 and"),
        ({"lora_alpha": math.inf}, "not of these weights.*alpha inf"),
        ({"r": None}, "does not say r and lora_alpha"),
        ({"lora_alpha": "much"}, "does not say r and lora_alpha"),
        ({"rank_pattern": [2]}, "does not say r and lora_alpha"),
        ({"alpha_pattern": {"(": 2}}, "does not say r and lora_alpha"),
        ({"peft_type": "IA3"}, "of type IA3, not LORA"),
        ({"peft_type": "VERA"}, "of type VERA, not LORA"),
    ],
)
def test_what_a_config_says_wrongly(tmp_path, config, message):
    with pytest.raises((CheckpointError, StructureError), match=message):
        Plan([small_adapter(tmp_path / "a", **config)], tmp_path / "out")


@pytest.mark.parametrize(
    "options",
    [
        {"a": (2,)},
        {"b": (2,)},
        {"b": (4, 3)},
        {"b": (4, 2, 2)},
        {"a": (0, 3), "b": (4, 0)},
        {"dtypes": (torch.int32, torch.float32)},
        {"dtypes": (torch.float32, torch.int32)},
    ],
)
def test_factors_that_are_none_of_a_product(tmp_path, options):
    with pytest.raises(StructureError, match="are no factors of a product"):
        Plan([small_adapter(tmp_path / "a", **options)], tmp_path / "out")
    Plan([small_adapter(tmp_path / "b")], tmp_path / "out")


def test_options_that_do_not_fit(tmp_path):
    a = kohya_adapter(tmp_path / "a.safetensors", 1, 2, 2.0)
    checkpoints.write(tmp_path / "model.safetensors", {"w": torch.ones(3)})
    with pytest.raises(OptionError, match="rank above 7, got 1000"):
        Plan([a], tmp_path / "out.safetensors", rank=1000)
    for options in ({"rank": 0}, {"lora": "mean"}, {"lora": "factors", "rank": 3}):
        with pytest.raises(OptionError):
            Plan([a], tmp_path / "out.safetensors", **options)
    with pytest.raises(OptionError, match="no LoRA adapter") as caught:
        Plan([tmp_path / "model.safetensors"], tmp_path / "out.safetensors", rank=3)
    assert caught.value.for_command.endswith("leave out --rank and --lora")
    with pytest.raises(OptionError, match="no LoRA adapter"):
        Plan([tmp_path / "model.safetensors"], tmp_path / "out.safetensors", lora="factors")
    with pytest.raises(StructureError, match=r"model\.safetensors.*hold no LoRA adapter"):
        Plan([a, tmp_path / "model.safetensors"], tmp_path / "out.safetensors")


# The means of factors.


def test_means_of_factors_are_said_to_be_that(tmp_path):
    a, b = peft_adapter(tmp_path / "a", 1), peft_adapter(tmp_path / "b", 2)
    report = polyak.average_checkpoints([a, b], tmp_path / "out", lora="factors")
    assert "not the mean of the updates" in lora_note(report)
    with checkpoints.open(a) as one, checkpoints.open(b) as two, checkpoints.open(tmp_path / "out") as out:
        for name in one.tensors:
            torch.testing.assert_close(out.read(name), (one.read(name) + two.read(name)) / 2)
    updates(tmp_path / "out")


def test_means_of_factors_need_one_scale(tmp_path):
    a, b = peft_adapter(tmp_path / "a", 1), peft_adapter(tmp_path / "b", 2, lora_alpha=32)
    with pytest.raises(StructureError, match="lora_alpha 4 and .* 32"):
        Plan([a, b], tmp_path / "out", lora="factors")
    c, d = (kohya_adapter(tmp_path / f"{n}.safetensors", n, 2, float(n)) for n in (1, 2))
    with pytest.raises(StructureError, match="mid_attn.alpha"):
        Plan([c, d], tmp_path / "out", lora="factors")
    e = kohya_adapter(tmp_path / "3.safetensors", 3, 4, 1.0)
    with pytest.raises(StructureError, match="rank of 'lora_unet_mid_attn' 2 and .* 4: average the updates"):
        Plan([c, e], tmp_path / "out", lora="factors")


def test_what_is_an_adapter(tmp_path):
    names = {
        "base_model.model.q.lora_A.weight": True,
        "base_model.model.q.lora_A.default.weight": True,
        "unet.q.lora.down.weight": True,
        "lora_unet_q.hada_w1_a": True,
        "q.lora_scale_of_mine": False,
        "exploration.weight": False,
    }
    for name, expected in names.items():
        checkpoints.write(tmp_path / "one.safetensors", {name: torch.ones(2, 2)}, overwrite=True)
        assert is_adapter(checkpoints.open(tmp_path / "one.safetensors")) == expected, name


# diffusers: alpha is in the metadata of newer files, and the rank where nothing says it.


def small_unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
    )


def diffusers_adapter(folder, seed, rank, alpha, says_alpha=True):
    """As diffusers' training scripts save it."""
    unet = small_unet()
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=["to_q"]))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in (parameter for parameter in unet.parameters() if parameter.requires_grad):
            parameter.normal_()
    config = unet.peft_config["default"].to_dict()
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(unet),
        unet_lora_adapter_metadata=config if says_alpha else None,
    )
    return folder


def diffusers_updates(folder):
    """What diffusers makes of it."""
    unet = small_unet()
    state, alphas, metadata = StableDiffusionPipeline.lora_state_dict(folder, return_lora_metadata=True)
    StableDiffusionPipeline.load_lora_into_unet(state, alphas, unet, metadata=metadata)
    modules = {name: one for name, one in unet.named_modules() if hasattr(one, "get_delta_weight")}
    return {name: module.get_delta_weight("default_0").double() for name, module in modules.items()}


@pytest.mark.parametrize("says_alpha", [(True, True), (True, False), (False, False)])
def test_diffusers_loads_the_mean_of_the_updates(tmp_path, says_alpha):
    a, b = (
        diffusers_adapter(tmp_path / f"{seed}", seed, rank, 8 if says else rank, says)
        for seed, rank, says in zip((1, 2), (4, 2), says_alpha, strict=True)
    )
    polyak.average_checkpoints([a, b], tmp_path / "out", rank=6)
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").exists()
    found, (first, second) = diffusers_updates(tmp_path / "out"), map(diffusers_updates, (a, b))
    assert found
    for name, update in found.items():
        torch.testing.assert_close(update, (first[name] + second[name]) / 2, rtol=0, atol=1e-5)


def test_alphas_in_metadata_that_differ_have_no_mean_of_factors(tmp_path):
    a, b = (diffusers_adapter(tmp_path / f"{alpha}", alpha, 2, alpha) for alpha in (2, 8))
    with pytest.raises(StructureError, match="has lora_alpha of 'unet"):
        polyak.average_checkpoints([a, b], tmp_path / "out", lora="factors")
    c = diffusers_adapter(tmp_path / "c", 3, 2, 2)
    polyak.average_checkpoints([a, c], tmp_path / "out", lora="factors")
    assert diffusers_updates(tmp_path / "out")


def test_an_adapter_that_says_no_alpha_and_is_of_no_known_tool_is_refused(tmp_path):
    a, b = torch.ones(2, 3), torch.ones(3, 2)
    checkpoints.write(tmp_path / "a.safetensors", {"net.q.lora_A.weight": a, "net.q.lora_B.weight": b})
    with pytest.raises(StructureError, match=r"no adapter_config\.json beside it, which says alpha"):
        polyak.average_checkpoints([tmp_path / "a.safetensors"], tmp_path / "out.safetensors")
    broken = {"lora_adapter_metadata": "{"}
    name = "unet.q.lora_{}.weight"
    checkpoints.write(tmp_path / "b.safetensors", {name.format("A"): a, name.format("B"): b}, metadata=broken)
    with pytest.raises(CheckpointError, match="must be a JSON object"):
        polyak.average_checkpoints([tmp_path / "b.safetensors"], tmp_path / "out.safetensors")


@pytest.mark.parametrize(
    ("rank", "dim", "alpha", "others"), [(None, "4", "2.0", {"ss_network_args"}), (2, "2", "1.0", set())]
)
def test_metadata_of_kohya_is_that_of_the_output(tmp_path, rank, dim, alpha, others):
    metadata = {"ss_network_dim": "4", "ss_network_alpha": "2.0", "ss_base_model_version": "sd_v1"}
    metadata |= {"ss_network_args": '{"conv_dim": "4"}', "sshs_model_hash": "abc"}
    for seed in (1, 2):
        torch.manual_seed(seed)
        factors = {
            "lora_unet_x.lora_down.weight": torch.randn(4, 8),
            "lora_unet_x.lora_up.weight": torch.randn(8, 4),
        }
        tensors = factors | {"lora_unet_x.alpha": torch.tensor(2.0 if rank is None else 1.0)}
        checkpoints.write(tmp_path / f"{seed}.safetensors", tensors, metadata=metadata)
    inputs = [tmp_path / f"{seed}.safetensors" for seed in (1, 2)]
    polyak.average_checkpoints(inputs, tmp_path / "out.safetensors", rank=rank)
    out = checkpoints.open(tmp_path / "out.safetensors")
    said = {key: text for key, text in out.metadata.items() if key.startswith("ss")}
    expected = {"ss_network_dim": dim, "ss_base_model_version": "sd_v1"}
    assert {key: said[key] for key in expected} == expected
    assert said["ss_network_alpha"] == str(out.read("lora_unet_x.alpha").item())
    assert said.keys() - expected.keys() - {"ss_network_alpha"} == others
    assert rank is not None or said["ss_network_alpha"] == alpha
