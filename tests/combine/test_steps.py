"""Training steps in names, as tools write them and people read them."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyak.combine._steps import NamedSteps, counted_from_one, number_in_name, steps_in_names
from polyak.errors import OptionError


def read(*names):
    return steps_in_names([Path("run") / name for name in names])


NAMES = [
    # plain numbers
    (["10.pt", "9.pt"], [10, 9], "number"),
    (["model-00010.safetensors", "model-00009.safetensors"], [10, 9], "number"),
    (["model_0004999.pth", "model_0009999.pth"], [4999, 9999], "number"),  # detectron2
    (["net_g_5000.pth", "net_g_10000.pth"], [5000, 10000], "number"),  # BasicSR
    (["G_1000.pth", "G_2000.pth"], [1000, 2000], "number"),  # VITS
    (["checkpoint-500", "checkpoint-1500"], [500, 1500], "number"),  # transformers
    (["checkpoint-11.pth.tar", "checkpoint-12.pth.tar"], [11, 12], "number"),  # timm
    (["name-000001.safetensors", "name-000002.safetensors"], [1, 2], "number"),  # kohya
    (["network-snapshot-000200.pkl", "network-snapshot-025000.pkl"], [200, 25000], "number"),  # StyleGAN
    (["gpt2-100.pt", "gpt2-200.pt"], [100, 200], "number"),
    (["model0.pt", "model1.pt"], [1, 2], "number"),
    (["model.100", "model.200"], [100, 200], "number"),
    # a word for steps
    (["step_100_bf16.pt", "step_200_bf16.pt"], [100, 200], "step"),
    (["step0.pt", "step50.pt"], [0, 50], "step"),
    (["iter_0000100", "iter_0000200"], [100, 200], "step"),  # Megatron
    (["iter_40000.pth", "iter_80000.pth"], [40000, 80000], "step"),  # MMEngine
    (["iteration-5.pt", "iteration-10.pt"], [5, 10], "step"),
    (["global_step1000", "global_step2000"], [1000, 2000], "step"),  # DeepSpeed
    (["name-step00000500.safetensors", "name-step00001000.safetensors"], [500, 1000], "step"),  # kohya
    (["it100.pt", "it200.pt"], [100, 200], "step"),
    (["ba100.pt", "ba1000.pt", "ba100000.pt"], [100, 1000, 100000], "step"),
    (["update=5.pt", "updates=10.pt"], [5, 10], "step"),
    (["batch-10.pt", "batch-20.pt"], [10, 20], "step"),
    (["globalStep5_final.pt", "globalStep7_final.pt"], [5, 7], "step"),
    (["100steps.pt", "200steps.pt"], [100, 200], "step"),
    (["5k_steps.pt", "500ksteps.pt", "1M-steps.pt"], [5000, 500_000, 1_000_000], "step"),
    (["step1000-tokens4B", "step2000-tokens8B"], [1000, 2000], "step"),  # OLMo
    # a word for epochs
    (["epoch_1", "epoch_2"], [1, 2], "epoch"),
    (["epoch_0.pt", "epoch_1.pt"], [1, 2], "epoch"),
    (["epoch-10.pt", "epoch-9.pt"], [10, 9], "epoch"),  # icefall
    (["10epoch.pth", "9epoch.pth"], [10, 9], "epoch"),  # ESPnet
    (["snapshot.ep.10", "snapshot.ep.5"], [10, 5], "epoch"),  # ESPnet
    (["model_e5.pt", "model_e10.pt"], [5, 10], "epoch"),
    (["ep10_seed42.pt", "ep20_seed42.pt"], [10, 20], "epoch"),
    (["ep10_seed2.pt", "ep20_seed1.pt"], [10, 20], "epoch"),
    # both
    (["epoch=1-step=500.ckpt", "epoch=2-step=1000.ckpt"], [500, 1000], "step"),  # Lightning
    (["step=40.ckpt", "step=80.ckpt"], [40, 80], "step"),
    (["epoch=3-step=40.ckpt", "epoch=10-step=400-v1.ckpt"], [40, 400], "step"),
    (["epoch=3-step=40.ckpt", "epoch=3-step=80.ckpt"], [40, 80], "step"),
    (["epoch=3-step=40.ckpt", "epoch=3-step=40-v1.ckpt", "epoch=4-step=50.ckpt"], [40, 40, 50], "step"),
    (["epoch=3.ckpt", "epoch=3-v1.ckpt", "epoch=4.ckpt"], [3, 3, 4], "epoch"),
    (["ep1-ba100", "ep2-ba200"], [100, 200], "step"),  # Composer
    (["ep1-ba100-rank0.pt", "ep2-ba200-rank0.pt"], [100, 200], "step"),
    (["1_epoch_500_step.pt", "2_epoch_1000_step.pt"], [500, 1000], "step"),
    (["checkpoint_12_5000.pt", "checkpoint_13_5500.pt"], [5000, 5500], "number"),  # fairseq
    (["checkpoint_12_5000.pt", "checkpoint_12_5500.pt"], [5000, 5500], "number"),
    (["epoch1_100.pt", "epoch1_200.pt", "epoch2_300.pt"], [100, 200, 300], "number"),
    (["epoch1_200.pt", "epoch1_300.pt", "epoch2_100.pt"], [1, 1, 2], "epoch"),
    (["epoch_1_step_100.pt", "epoch_2_step_100.pt"], [1, 2], "epoch"),
    # units
    (["ckpt_500k.pt", "ckpt_750k.pt", "ckpt_1M.pt"], [500_000, 750_000, 1_000_000], "step"),
    (["ckpt_1.5M", "ckpt_500k"], [1_500_000, 500_000], "step"),
    (["model_9k.pt", "model_10k.pt", "model_100k.pt"], [9_000, 10_000, 100_000], "step"),
    (["ckpt_900.pt", "ckpt_1k.pt"], [900, 1000], "step"),
    (["ckpt_1e5.pt", "ckpt_5e5.pt", "ckpt_1.5e6.pt"], [100_000, 500_000, 1_500_000], "step"),
    (["step_500k.pt", "step_1M.pt"], [500_000, 1_000_000], "step"),
    (["10kimg.pt", "200kimg.pt"], [10_000, 200_000], "step"),
    (["ckpt_500M.pt", "ckpt_1B.pt", "ckpt_1.5B.pt"], [500_000_000, 1_000_000_000, 1_500_000_000], "step"),
    (["500Msteps.pt", "1Bsteps.pt"], [500_000_000, 1_000_000_000], "step"),
    (["model-1B-step100.pt", "model-1B-step200.pt"], [100, 200], "step"),
    (["Llama-3.2-1B-100.pt", "Llama-3.2-1B-200.pt"], [100, 200], "number"),
    # digits in threes
    (["step_1_000.pt", "step_2_000.pt", "step_10_000.pt"], [1000, 2000, 10_000], "step"),
    (["model_900.pt", "model_1_000.pt", "model_1_100.pt"], [900, 1000, 1100], "number"),
    (["ckpt_10_500.pt", "ckpt_1_100_250.pt"], [10_500, 1_100_250], "number"),
    (["step-1,500.pt", "step-2,500.pt"], [1500, 2500], "step"),
    (["epoch_1_step_1_000.pt", "epoch_2_step_2_000.pt"], [1000, 2000], "step"),
    (["step_1_000_0.91.pt", "step_2_000_0.88.pt"], [1000, 2000], "step"),
    (["checkpoint_1_500.pt", "checkpoint_2_750.pt"], [500, 750], "number"),  # fairseq
    (["checkpoint_1_500.pt", "checkpoint_2_1000.pt"], [500, 1000], "number"),
    (["checkpoint_1_050.pt", "checkpoint_2_1050.pt"], [50, 1050], "number"),
    # metrics, rates and hashes
    (["model_10_0.91.pth", "model_20_0.87.pth"], [10, 20], "number"),
    (["epoch1_loss0.90.pt", "epoch2_loss0.50.pt"], [1, 2], "epoch"),
    (["epoch1_acc91.pt", "epoch2_acc87.pt"], [1, 2], "epoch"),
    (["epoch1_91.pt", "epoch2_87.pt"], [1, 2], "epoch"),
    (["10_loss_3.pt", "20_loss_2.pt"], [10, 20], "number"),
    (["10_f1_0.9.pt", "20_f1_0.8.pt"], [10, 20], "number"),
    (["asr--val_wer=0.31-epoch=1.ckpt", "asr--val_wer=0.29-epoch=2.ckpt"], [1, 2], "epoch"),  # NeMo
    (["epoch=03-val_loss=2.50.ckpt", "epoch=04-val_loss=2.25.ckpt"], [3, 4], "epoch"),
    (["ema_0.9999_000100.pt", "ema_0.9999_000200.pt"], [100, 200], "number"),  # guided-diffusion
    (["ema_100.pt", "ema_200.pt"], [100, 200], "number"),
    (["model_5_lr1e-4.pt", "model_7_lr3e-5.pt"], [5, 7], "number"),
    (["10_3f9a1c2e.pt", "20_77e01ab4.pt"], [10, 20], "number"),
    (["10-3k9x2abc.pt", "20-7pq1zz0d.pt"], [10, 20], "number"),
    (["10-x3k9.pt", "20-x7q4.pt"], [10, 20], "number"),
    (["model-00001-of-00003_5.pt", "model-00001-of-00003_6.pt"], [5, 6], "number"),
    (["step.100.0.91.pt", "step.200.0.95.pt"], [100, 200], "step"),
    (["model.10.0.91.pt", "model.20.0.9.pt"], [10, 20], "number"),
    (["epoch1of10.pt", "epoch2of10.pt"], [1, 2], "epoch"),
    (["lora_r16_10.pt", "lora_r8_20.pt"], [10, 20], "number"),
    (["round_1.pt", "round_2.pt"], [1, 2], "number"),
    (["stage1-step100", "stage2-step200"], [100, 200], "step"),  # OLMo
    # names of folders
    (["9/model.pt", "10/model.pt"], [9, 10], "number"),
    (["7/1.pt", "8/1.pt"], [7, 8], "number"),
    (["checkpoint-500/model.safetensors", "checkpoint-1500/model.safetensors"], [500, 1500], "number"),
    (["checkpoint-500/unet", "checkpoint-1000/unet"], [500, 1000], "number"),  # diffusers
    (
        ["global_step5/mp_rank_00_model_states.pt", "global_step10/mp_rank_00_model_states.pt"],
        [5, 10],
        "step",
    ),
    (
        ["iter_0000100/mp_rank_00/model_optim_rng.pt", "iter_0000200/mp_rank_00/model_optim_rng.pt"],
        [100, 200],
        "step",
    ),
    (["step_10/model_3.pt", "step_20/model_1.pt"], [10, 20], "step"),
    # one name
    (["step=40.ckpt"], [40], "step"),
    (["global_step40/model.pt"], [40], "step"),
    # dates that tell nothing
    (["2024-05-01_10-58_step5.pt", "2024-05-01_11-58_step7.pt"], [5, 7], "step"),
    (["2024-05-01_100.pt", "2024-05-01_200.pt"], [100, 200], "number"),
    (["step_20240501.pt", "step_20240502.pt"], [20240501, 20240502], "step"),
]


@pytest.mark.parametrize(("names", "values", "unit"), NAMES, ids=lambda value: str(value)[:60])
def test_steps(names, values, unit):
    found = read(*names)
    assert found is not None
    assert (found.values, found.unit) == (tuple(values), unit)
    assert [values[index] for index in found.order] == sorted(values)


@pytest.mark.parametrize(
    ("names", "order", "unit"),
    [
        (["epoch_1_step_300", "epoch_0_step_900", "epoch_2_step_50"], [1, 0, 2], "epoch and step"),
        (["epoch_1_step_1", "epoch_0_step_2", "epoch_0_step_1"], [2, 1, 0], "epoch and step"),
        (["epoch_1/step_300.pt", "epoch_0/step_900.pt"], [1, 0], "epoch and step"),
        (["epoch_0.5.pt", "epoch_0.25.pt", "epoch_1.0.pt"], [1, 0, 2], "epoch"),
        # SpeechBrain
        (["CKPT+2024-05-01+11-40-13+00", "CKPT+2024-05-01+10-58-41+00"], [1, 0], "time"),
        (["CKPT+2024-05-01+11-40-13+01", "CKPT+2024-05-01+11-40-13+00"], [1, 0], "time"),
        (
            ["CKPT+2024-05-02+10-58-41+00/model.ckpt", "CKPT+2024-05-01+11-40-13+00/model.ckpt"],
            [1, 0],
            "time",
        ),
        (["2024-05-01_10-58.pt", "2024-04-30_23-59.pt"], [1, 0], "time"),
        (["20240501-105841.pt", "20240501-095959.pt"], [1, 0], "time"),
        (["20240501105841.pt", "20240430105842.pt"], [1, 0], "time"),
        (["model_2024-05-01.pt", "model_2024-04-30.pt"], [1, 0], "time"),
        (["2024-05-02/10-58-41/model.pt", "2024-05-01/11-00-00/model.pt"], [1, 0], "time"),  # Hydra
        (["10-58-41.pt", "09-59-42.pt"], [1, 0], "time"),
        (["model_1714561999.pt", "model_1714561121.pt"], [1, 0], "time"),
        (["model_2024-05-01T10:58:41.pt", "model_2024-04-30T11:00:00.pt"], [1, 0], "time"),
    ],
    ids=str,
)
def test_order_without_values(names, order, unit):
    assert read(*names) == NamedSteps(None, tuple(order), unit)


@pytest.mark.parametrize(
    "names",
    [
        ["best.pt", "last.pt"],
        ["1.pt", "last.pt"],
        ["1_1.pt", "1_2.pt", "2_2.pt"],
        ["gpt2-a.pt", "gpt2-b.pt"],
        ["1" * 30 + ".pt", "2" * 30 + ".pt"],
        ["last.ckpt", "last-v1.ckpt"],
        ["last-v1.ckpt", "last-v2.ckpt"],
        ["model_3f9a1c2e.pt", "model_4f9a1c2e.pt"],
        ["model_seed1.pt", "model_seed2.pt"],
        ["lr_1e-3.pt", "lr_1e-4.pt"],
        ["ema_0.999.pt", "ema_0.9999.pt"],
        ["checkpoint.best_loss_3.21.pt", "checkpoint.best_loss_3.30.pt"],
        ["val_loss=2.5.ckpt", "val_loss=3.5.ckpt"],
        ["model_fp16.pt", "model_fp32.pt"],
        ["mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"],
        ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        ["llama-7b.pt", "llama-13b.pt"],
        ["lora_r8.pt", "lora_r16.pt"],
        ["run_1/model.pt", "run_2/model.pt"],
        ["Dec31_23-00-00.pt", "Jan01_10-00-00.pt"],
        ["model_1_of_2.pt", "model_2_of_2.pt"],
        [],
    ],
    ids=str,
)
def test_no_order(names):
    assert read(*names) is None


@pytest.mark.parametrize(
    "names",
    [
        ["model_10_91.pth", "model_20_87.pth"],
        ["model_0_900.pt", "model_1_300.pt", "model_1_600.pt"],
        ["10/3.pt", "20/2.pt"],
        ["model_2024-05-01_7.pt", "model_2024-05-02_5.pt"],
        ["01-05-2024.pt", "30-04-2024.pt"],
        ["stage1-step5000", "stage2-step1000"],
        ["iter_5_step_10.pt", "iter_6_step_9.pt"],
    ],
    ids=str,
)
def test_contradictions_are_refused(names):
    with pytest.raises(OptionError, match="contradict each other") as caught:
        read(*names)
    assert "steps=[" in str(caught.value) and "--steps" in caught.value.for_command


def test_a_refusal_names_two_files_and_what_their_numbers_say():
    with pytest.raises(OptionError) as caught:
        read("a_10_91.pt", "a_20_87.pt")
    message = str(caught.value)
    assert all(part in message for part in ("a_10_91.pt", "a_20_87.pt", "87 and 91", "20 and 10"))


def test_a_step_that_may_be_in_threes_is_refused():
    with pytest.raises(
        OptionError, match="'1_500' in .*may be the step 1500, or a step and another"
    ) as caught:
        read("step_1_500.pt", "step_2_750.pt")
    assert "--steps" in caught.value.for_command


def test_equal_pairs_are_refused():
    with pytest.raises(OptionError, match="same epoch and step"):
        read("epoch_0_step_9.pt", "epoch_1_step_3.pt", "epoch_1_step_3-v1.pt")


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("epoch_1.pt", 1),
        ("model0.pt", 0),
        ("checkpoint_0500.pth.tar", 500),
        ("ckpt_1.5M.pt", 1_500_000),
        ("ema_0.9999_000100.pt", 100),
        ("snapshot.ep.10", 10),
        ("epoch=3-step=40-v1.ckpt", 40),
        ("checkpoint_12_5000.pt", 5000),
        ("best_epoch_7.pt", 7),
        ("best.pt", None),
        ("last-v1.ckpt", None),
        ("best_0.91_fp16.pt", None),
        ("best_bf16.pt", None),
        ("ema_0.999.pt", None),
        ("llama-7b.pt", None),
        ("opt-350m-best.pt", None),
        ("olmo-1B.pt", None),
        ("olmo-1B-step300.pt", 300),
        ("gpt2-best.pt", None),
        ("resnet50_final.pth", None),
        ("model_3f9a1c2e.pt", None),
        ("checkpoint.best_loss_3.21.pt", None),
        ("best_seed42.pt", None),
        ("best_2024-05-01.pt", None),
        ("May01_10-58-41_best.pt", None),
        ("init.pt", None),
        ("step_10_000.pt", 10_000),
        ("checkpoint_12_500.pt", 500),
    ],
)
def test_number_in_name(name, number):
    assert number_in_name(name) == number


def test_counted_from_one():
    assert counted_from_one([0, 1], "number") == (1, 2)
    assert counted_from_one([1, 2], "epoch") == (1, 2)
    assert counted_from_one([0, 1], "step") == (0, 1)


SERIES = st.sampled_from([(names, values) for names, values, _ in NAMES if len(names) > 1])


@given(SERIES, st.data())
def test_permuted_names_give_permuted_steps(series, data):
    names, values = series
    positions = data.draw(st.permutations(range(len(names))))
    found = read(*(names[index] for index in positions))
    assert found is not None and found.values == tuple(values[index] for index in positions)
    whole = read(*names)
    assert whole is not None
    assert [names[positions[index]] for index in found.order] == [names[index] for index in whole.order]


NUMBERS = st.lists(st.integers(1, 10**9), min_size=2, max_size=8, unique=True)
FORMS = st.sampled_from(["{}", "model_{}", "step-{}", "epoch{}", "epoch=1-step={}", "{}_steps", "ckpt.{}"])


@given(NUMBERS, FORMS, st.data())
def test_zeros_in_front_do_not_matter(numbers, form, data):
    padded = [str(number).zfill(data.draw(st.integers(1, 15))) for number in numbers]
    found = read(*(form.format(number) + ".pt" for number in padded))
    assert found is not None and found.values == tuple(numbers)
    assert [numbers[index] for index in found.order] == sorted(numbers)


AFFIXES = st.sampled_from(
    ["", "best", "llama2", "7b", "v1.5", "0.91", "seed3", "fp16", "3f9a1c2e", "run7", "lr3e-4", "2"]
)


@given(NUMBERS, FORMS, AFFIXES, AFFIXES)
def test_what_all_names_share_does_not_matter(numbers, form, prefix, suffix):
    found = read(*(f"{prefix}__{form.format(number)}__{suffix}.pt" for number in numbers))
    assert found is not None and found.values == tuple(numbers)
