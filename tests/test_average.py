"""`Average` through its public face."""

from __future__ import annotations

import copy
import io
import json
import threading

import pytest
import torch
from torch import nn

import oracles
import polyak
from devices import DEVICES, as_if_on
from polyak import _torch
from polyak.errors import NotStartedError, OptionError, StateError, StructureError, SwapError


def mlp(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).to(dtype)


def walked(scheme, steps=20, model=None, **options):
    model = model or mlp()
    average = polyak.Average(model, scheme, **options)
    walk = oracles.RandomWalk(model)
    for _ in range(steps):
        walk.step()
        average.update()
    return model, average, walk


def live(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("every", [1, 3, 10])
@pytest.mark.parametrize(
    ("scheme", "oracle"),
    [
        (polyak.Uniform(), oracles.uniform),
        (polyak.EMA(half_life=7), oracles.ema_half_life(7)),
        (polyak.EMA(decay=0.9), oracles.ema_decay(0.9)),
        (polyak.Power(sigma_rel=0.1), oracles.power(polyak.Power(sigma_rel=0.1).exponent - 1)),
        (polyak.Polynomial(eta=8), oracles.polynomial(8)),
    ],
)
def test_samples_follow_the_schedule_and_the_scheme(scheme, oracle, every):
    _, average, walk = walked(scheme, steps=50, start=10, every=every)
    taken = walk.visited[10 + every - 1 :: every]
    assert average.n_averaged == len(taken) == 40 // every
    for name, value in average.named_tensors().items():
        if name in taken[0]:
            expected = oracles.mean_of([v[name] for v in taken], oracle(len(taken), every))
            torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["swa", "ema"])
def test_equals_torch_swa_utils(kind):
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

    model = mlp()
    theirs = AveragedModel(
        model, multi_avg_fn=get_swa_multi_avg_fn() if kind == "swa" else get_ema_multi_avg_fn(0.9)
    )
    ours = polyak.Average(model, polyak.Uniform() if kind == "swa" else polyak.EMA(decay=0.9, debias=False))
    walk = oracles.RandomWalk(model)
    for _ in range(200):
        walk.step()
        theirs.update_parameters(model)
        ours.update()
    for name, parameter in theirs.module.named_parameters():
        torch.testing.assert_close(ours.named_tensors()[name], parameter.detach(), rtol=0, atol=1e-6)


def test_update_now_stands_for_the_steps_since_the_last_sample():
    model = nn.Linear(1, 1, bias=False)
    average = polyak.Average(model, polyak.EMA(half_life=1), every=10)
    model.weight.data.fill_(1.0)
    for _ in range(10):
        average.update()
    for _ in range(3):
        average.update()
    model.weight.data.fill_(2.0)
    average.update_now()
    older, newer = 2.0**-3 * (1 - 2.0**-10), 1 - 2.0**-3
    assert float(average.named_tensors()["weight"]) == pytest.approx((older + 2 * newer) / (older + newer))


@pytest.mark.parametrize("scheme", ["ema:half_life=2", "power:gamma=2"])
def test_without_every_only_update_now_samples_the_first_time_for_the_steps_since_start(scheme):
    model = nn.Linear(1, 1, bias=False)
    average = polyak.Average(model, scheme, start=2, every=None)
    for step in range(1, 10):
        model.weight.data.fill_(float(step))
        average.update()
        if step in (6, 9):
            average.update_now()
    shares = polyak.parse(scheme).weights([0, 4, 7])
    assert average.n_averaged == 2
    assert average.named_tensors()["weight"].item() == pytest.approx(shares @ [6.0, 9.0])


def test_update_now_alone_keeps_the_callers_schedule():
    model = nn.Linear(1, 1, bias=False)
    average = polyak.Average(model, polyak.EMA(half_life=100), every=100)
    for value in (1.0, 2.0):
        model.weight.data.fill_(value)
        average.update_now()
    assert float(average.named_tensors()["weight"]) == pytest.approx((1 * 0.5 + 2 * 1) / 1.5)


# Names, ties, buffers, frozen parameters.


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.embedding(x))


def test_tied_weights_are_averaged_once_and_come_back_under_all_names(tmp_path):
    model = Tied()
    model.embedding.weight.data.fill_(0.0)
    average = polyak.Average(model, polyak.EMA(decay=0.9, debias=False))
    average.update()
    model.embedding.weight.data.fill_(1.0)
    average.update()
    assert list(average.named_tensors()) == ["embedding.weight"]
    torch.testing.assert_close(average.named_tensors()["embedding.weight"], torch.full((5, 4), 0.1))
    fresh = Tied()
    average.copy_to(fresh)
    assert fresh.head.weight is fresh.embedding.weight
    average.save(tmp_path / "tied.pt")
    untied = Tied()
    untied.load_state_dict(torch.load(tmp_path / "tied.pt", weights_only=True))
    torch.testing.assert_close(untied.head.weight.data, torch.full((5, 4), 0.1))


class Buffers(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("flag", torch.tensor(False))
        self.register_buffer("scale", torch.zeros(2))
        self.register_buffer("cache", torch.zeros(3), persistent=False)


@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_buffers_are_copied_from_the_live_model_and_floating_ones_averaged_on_request(buffers):
    model = Buffers()
    average = polyak.Average(model, polyak.Uniform(), buffers=buffers)
    for value in (1, 2, 6):
        model.count.fill_(value)
        model.flag.fill_(value == 6)
        model.scale = torch.full((2,), float(value))  # replaced, as some models do
        model.cache.fill_(value)
        average.update()
    tensors = average.named_tensors()
    assert tensors["count"] == 6 and tensors["count"].dtype == torch.long and tensors["flag"]
    torch.testing.assert_close(tensors["scale"], torch.full((2,), 3.0 if buffers == "average" else 6.0))
    assert "cache" not in tensors
    fresh = Buffers()
    average.copy_to(fresh)
    assert fresh.count == 6 and fresh.flag
    torch.testing.assert_close(fresh.cache, torch.full((3,), 3.0 if buffers == "average" else 6.0))


def test_sparse_buffers_are_left_to_the_live_model_and_sparse_parameters_refused():
    model = nn.Linear(2, 2)
    model.register_buffer("adjacency", torch.eye(3).to_sparse())
    average = polyak.Average(model, polyak.Uniform())
    average.update()
    with average.applied():
        model.adjacency.mul_(5)
    assert torch.equal(model.adjacency.to_dense(), torch.eye(3))
    model.weight = nn.Parameter(torch.eye(2).to_sparse())
    with pytest.raises(StructureError, match="'weight' are sparse"):
        polyak.Average(model, polyak.Uniform())


def test_frozen_parameters_are_the_live_models_and_cost_nothing():
    model = mlp()
    model[0].requires_grad_(False)
    average = polyak.Average(model, polyak.Uniform())
    average.update()
    tensors = average.named_tensors()
    assert tensors["0.weight"].data_ptr() == model[0].weight.data_ptr()
    assert tensors["2.weight"].data_ptr() != model[2].weight.data_ptr()


def test_include_and_exclude_choose_by_name_and_pattern():
    model = mlp()
    average = polyak.Average(model, polyak.Uniform(), include=["0.*", "2.weight"], exclude="*.bias")
    average.update()
    assert set(average.state_dict()["average"]) == {"0.weight", "2.weight"}
    with pytest.raises(OptionError, match="'3.weight' matches no tensor"):
        polyak.Average(model, polyak.Uniform(), include="3.weight")
    with pytest.raises(OptionError, match="nothing to average"):
        polyak.Average(model, polyak.Uniform(), exclude="*")


def test_wrappers_leave_no_trace_in_names():
    model = mlp()
    compiled = torch.compile(model, backend="eager")
    parallel = nn.DataParallel(compiled)
    for wrapped in (compiled, parallel):
        average = polyak.Average(wrapped, polyak.Uniform())
        average.update()
        assert list(average.named_tensors()) == list(model.state_dict())


def test_a_users_own_module_called_module_keeps_its_name():
    model = nn.Module()
    model.module = nn.Linear(1, 1)
    assert list(polyak.Average(model, polyak.Uniform()).state_dict()["average"]) == [
        "module.weight",
        "module.bias",
    ]


def test_compiled_models_see_the_swap():
    model = nn.Linear(2, 1, bias=False)
    compiled = torch.compile(model, backend="eager")
    average = polyak.Average(compiled, polyak.Uniform())
    x = torch.ones(1, 2)
    for value in (1.0, 3.0):
        model.weight.data.fill_(value)
        compiled(x)
        average.update()
    with average.applied():
        assert compiled(x).item() == 4.0
    assert compiled(x).item() == 6.0


# Models that others cannot average.


def test_a_model_that_cannot_be_copied():
    model = mlp()
    model.lock = threading.Lock()
    with pytest.raises(TypeError):
        copy.deepcopy(model)
    average = polyak.Average(model, polyak.Uniform())
    average.update()
    with average.applied():
        pass
    assert average.n_averaged == 1


def test_a_meta_model_is_refused_until_it_has_data():
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    average = polyak.Average(model, polyak.Uniform())
    with pytest.raises(StructureError, match=r"'weight', 'bias' have no data yet.*to_empty"):
        average.update()
    model.to_empty(device="cpu")
    nn.init.ones_(model.weight)
    nn.init.ones_(model.bias)
    average.update()
    assert torch.equal(average.named_tensors()["weight"], torch.ones(2, 2))


def test_a_lazy_model_is_taken_up_at_its_first_update():
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 1))
    average = polyak.Average(model, polyak.Uniform())
    with pytest.raises(StructureError, match=r"'0\.weight', '0\.bias' have no data yet"):
        average.update()
    model(torch.ones(2, 4))
    average.update()
    assert average.named_tensors()["0.weight"].shape == (3, 4)


# Changes of structure.


def test_replaced_parameters_of_the_same_shape_are_taken_up():
    model, average, walk = walked(polyak.Uniform(), steps=2)
    model[0].weight = nn.Parameter(torch.full((8, 3), 5.0))
    model.double()
    average.update()
    expected = (sum(v["0.weight"] for v in walk.visited) + 5) / 3
    torch.testing.assert_close(average.named_tensors()["0.weight"], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.append(nn.Linear(2, 2)), r"has '3\.weight', '3\.bias' besides"),
        (lambda m: m.pop(2), r"lacks '2\.weight', '2\.bias'"),
        (lambda m: m.insert(1, nn.Linear(8, 8)), r"has '3\.weight', '3\.bias' besides; has '1\.weight' as "),
        (
            lambda m: setattr(m[0], "weight", nn.Parameter(torch.ones(8, 1))),
            r"has '0\.weight' as \(8, 1\), not \(8, 3\)",
        ),
        (lambda m: setattr(m[0].weight, "data", torch.ones(1, 3)), r"has '0\.weight' as "),
        (lambda m: m[0].register_parameter("bias", None), r"lacks '0\.bias'"),
    ],
    ids=["appended", "removed", "inserted", "reshaped", "data reshaped", "bias dropped"],
)
def test_any_other_change_of_structure_is_refused_by_name(change, message):
    model, average, _ = walked(polyak.Uniform(), steps=3)
    before = {k: v.clone() for k, v in average.state_dict()["average"].items()}
    change(model)
    with pytest.raises(StructureError, match=message):
        average.update()
    assert average.n_averaged == 3 and same(before, average._named(average._accumulator.means))


def replace(weight, model):
    model.weight = nn.Parameter(weight.clone())


def reseat(weight, model):
    with torch.no_grad():
        model.weight.set_(weight.clone())


PLACES = [
    lambda weight: weight.clone(),
    lambda weight: weight.clone().share_memory_(),
    lambda weight: torch.cat([torch.zeros(1, 90), weight])[1:],
    lambda weight: weight.t().contiguous().t(),
    lambda weight: torch.stack([weight, -weight], dim=-1)[..., 0],
    lambda weight: torch.stack([weight, -weight, weight], dim=-1)[..., 0],
    lambda weight: torch._neg_view(-weight),
    lambda weight: weight.half(),
    lambda weight: weight.bfloat16(),
    lambda weight: weight.double(),
]


@pytest.mark.parametrize("records", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_weights_are_averaged_from_wherever_they_lie_now(device, records, tmp_path):
    model, generator, seen = nn.Linear(90, 110), torch.Generator().manual_seed(0), []
    options = {"directory": tmp_path, "block": 1000} if records else {"scheme": "uniform"}
    with as_if_on(device):
        average = (polyak.Recorder if records else polyak.Average)(model, **options)
        # Each comes after a plain one, where the loops or the plan of an accelerator are in use again.
        for put in [put for place in [*PLACES, replace, reseat] for put in (PLACES[0], place)]:
            weight = torch.randint(-8, 8, (110, 90), generator=generator).float()
            seen.append(weight.double())
            if put in PLACES:
                model.weight.data = put(weight)
            else:
                put(weight, model)
            average.update()
            model.weight.data.zero_()
        found = average.average("uniform") if records else average.named_tensors()
    torch.testing.assert_close(found["weight"].double(), torch.stack(seen).mean(0), rtol=0, atol=1e-5)
    if records:
        average.close()


def test_a_bf16_model_keeps_an_fp32_average_through_save_and_load():
    model, average, walk = walked(polyak.EMA(decay=0.999), steps=2000, model=nn.Linear(4, 4).bfloat16())
    expected = oracles.mean_of([v["weight"] for v in walk.visited], oracles.ema_decay(0.999)(2000))
    movement = expected - walk.visited[0]["weight"]
    file = io.BytesIO()
    torch.save(average.state_dict(), file)
    file.seek(0)
    resumed = polyak.Average(model, polyak.EMA(decay=0.999))
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for one in (average, resumed):
        assert one.named_tensors()["weight"].dtype == torch.float32
        assert oracles.relative_error(one.named_tensors()["weight"], expected, movement) <= 1e-3


# Swapping.


def test_the_live_weights_return_bit_for_bit():
    model, average, _ = walked(polyak.Uniform(), model=mlp(torch.bfloat16))
    before = live(model)
    with average.applied() as swapped:
        assert swapped is model
        for name, value in average.named_tensors().items():
            torch.testing.assert_close(
                model.state_dict()[name], value.to(torch.bfloat16) if value.dtype == torch.float32 else value
            )
        assert not torch.equal(model[0].weight, before["0.weight"])
    assert same(live(model), before)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_the_live_weights_return_after_an_exception(error):
    model, average, _ = walked(polyak.Uniform())
    before = live(model)
    with pytest.raises(error), average.applied():
        raise error
    assert same(live(model), before)
    with average.applied():
        pass


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_interrupt_during_the_swap_itself_loses_nothing(monkeypatch, at, when):
    """Ctrl-C may fall before or after the backup, the way in, or the way out, which are one call each."""
    model, average, _ = walked(polyak.Uniform())
    before = live(model)
    copies = 0
    original = _torch.foreach_copy_

    def interrupted(targets, values):
        nonlocal copies
        copies += 1
        if copies == at and when == "before":
            raise KeyboardInterrupt
        original(targets, values)
        if copies == at:
            raise KeyboardInterrupt

    monkeypatch.setattr(_torch, "foreach_copy_", interrupted)
    with pytest.raises(KeyboardInterrupt), average.applied():
        pass
    assert same(live(model), before)
    with average.applied():
        pass
    assert same(live(model), before)


def test_batchnorm_statistics_recomputed_inside_are_undone():
    model, average, _ = walked(polyak.Uniform())
    before = live(model)
    with average.applied():
        model.train()(torch.randn(16, 3))
        assert not same(live(model), before)
    assert same(live(model), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_share_of_the_average_and_the_rest_of_the_live_weights(dtype, share, tmp_path):
    """In the average's dtype, rounded once; what is saved inside is what was put in."""
    model, average, _ = walked("uniform", model=mlp(dtype))
    before, means = live(model), {n: t.double() for n, t in average.named_tensors().items()}
    names = [name for name, _ in model.named_parameters()]
    with average.applied(share=share):
        put_in, named = live(model), average.named_tensors()
        average.save(tmp_path / "blend.safetensors")
        for name in names:
            expected = share * means[name] + (1 - share) * before[name].double()
            assert (named[name].double() - expected).abs().max() < 1e-6
            assert torch.equal(put_in[name], named[name].to(dtype))
        with pytest.raises(SwapError, match="cannot be nested"), average.applied(share=0.5):
            pass
    assert same(live(model), before)
    again = average.named_tensors()
    assert all(torch.equal(again[name].double(), means[name]) for name in names)
    written = polyak.checkpoints.open(tmp_path / "blend.safetensors")
    assert all(torch.equal(written.read(name), named[name]) for name in names)
    assert json.loads(written.metadata["polyak"]).get("share", 1.0) == share


@pytest.mark.parametrize("share", [-0.1, 1.5, "half", float("nan")])
def test_a_share_out_of_range_is_refused_before_anything_is_swapped(share):
    model, average, _ = walked("uniform")
    before = live(model)
    with pytest.raises(OptionError, match=r"share must be a number in \[0, 1\]"):
        average.swap_in(share)
    assert same(live(model), before) and not average.swapped


def test_misuse_while_swapped_is_refused():
    model, average, _ = walked(polyak.Uniform())
    other = polyak.Average(torch.compile(model, backend="eager"), polyak.EMA(decay=0.5))
    other.update()
    state = average.state_dict()
    before = live(model)
    with average.applied():
        swapped = live(model)
        for call in (
            average.update,
            average.update_now,
            average.swap_in,
            lambda: average.load_state_dict(state),
        ):
            with pytest.raises(SwapError, match="averaged weights are in the model"):
                call()
        with pytest.raises(SwapError), average.applied():
            pass
        for call in (
            other.swap_in,
            other.update,
            polyak.optim.SWA(torch.optim.SGD(model.parameters())).update_swa,
        ):
            with pytest.raises(SwapError, match="holds averaged weights already"):
                call()
        assert same(live(model), swapped)
        assert same(average.state_dict()["average"], state["average"])
    assert same(live(model), before)
    with pytest.raises(SwapError, match="without swap_in"):
        average.swap_out()


def test_training_while_swapped_is_said():
    model, average, _ = walked(polyak.Uniform())
    before = live(model)
    with pytest.warns(UserWarning, match="those changes are gone"), average.applied(), torch.no_grad():
        model[0].weight.add_(1)
    assert same(live(model), before)


def test_nothing_is_applied_or_saved_before_the_first_sample(tmp_path):
    model = mlp()
    average = polyak.Average(model, polyak.Uniform(), start=5)
    average.update()
    before = live(model)
    for call in (
        average.swap_in,
        average.named_tensors,
        lambda: average.copy_to(model),
        lambda: average.save(tmp_path / "a.safetensors"),
    ):
        with pytest.raises(
            NotStartedError, match="first is taken after optimizer step 6, and 1 were counted"
        ):
            call()
    assert same(live(model), before) and not list(tmp_path.iterdir())


def test_copy_to_refuses_a_model_that_does_not_fit():
    _, average, _ = walked(polyak.Uniform())
    other = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 3), nn.Linear(3, 1))
    before = live(other)
    with pytest.raises(
        StructureError, match=r"lacks '3\.weight', '3\.bias'; has '2\.weight' as .*, '2\.bias' as "
    ):
        average.copy_to(other)
    assert same(live(other), before)


def test_copy_to_the_live_model_is_for_good():
    model, average, _ = walked(polyak.Uniform())
    expected = {n: t.clone() for n, t in average.named_tensors().items()}
    average.copy_to(model)
    assert same(live(model), expected)


# State.


def test_an_average_written_back_into_training_goes_on_with_its_counts():
    """Switch EMA: every third step training goes on from the average, with the momentum that it has."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2, bias=False, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    average = polyak.Average(model, "ema:decay=0.8,debias=false", every=2)
    weight, momentum, mean = model.weight.detach().clone(), torch.zeros(2, 3).double(), None
    for step in range(1, 13):
        gradient = torch.randn(2, 3).double()
        model.weight.grad = gradient.clone()
        optimizer.step()
        average.update()
        momentum = 0.9 * momentum + gradient
        weight = weight - 0.1 * momentum
        if step % 2 == 0:
            mean = weight if mean is None else 0.8 * mean + 0.2 * weight
        if step % 3 == 0:
            average.copy_to(model)
            weight = mean
        torch.testing.assert_close(model.weight.detach(), weight, rtol=1e-12, atol=1e-12)
    assert average.n_averaged == 6 and average.n_skipped == 0
    torch.testing.assert_close(average.named_tensors()["weight"], mean, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("scheme", [polyak.Uniform(), polyak.EMA(half_life=9), polyak.Power(gamma=2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming_is_bitwise_the_uninterrupted_run(scheme, dtype, compensated):
    options = {"start": 3, "every": 2, "compensated": compensated}
    model, whole, walk = walked(scheme, 13, model=mlp(dtype), **options)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    resumed = polyak.Average(model, scheme, **options)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(8):
        walk.step()
        whole.update()
        resumed.update()
    assert whole.n_averaged == resumed.n_averaged == 9
    one, other = whole.state_dict(), resumed.state_dict()
    assert same(one.pop("average"), other.pop("average"))
    if compensated:
        assert same(one.pop("residual"), other.pop("residual"))
    assert one == other


def test_state_has_the_same_keys_and_shapes_at_any_time():
    average = polyak.Average(mlp(), polyak.Uniform(), compensated=True)
    early = average.state_dict()
    average.update()
    late = average.state_dict()
    assert early.keys() == late.keys()
    for key in ("average", "residual"):
        assert {n: t.shape for n, t in early[key].items()} == {n: t.shape for n, t in late[key].items()}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: polyak.Average(mlp(), polyak.EMA(decay=0.9)), "saved with scheme='uniform'"),
        (lambda: polyak.Average(mlp(), polyak.Uniform(), every=2), "every=1"),
        (lambda: polyak.Average(nn.Linear(3, 8), polyak.Uniform()), "lacks 'weight'"),
        (lambda: polyak.Average(mlp(), polyak.Uniform(), dtype=torch.float64), "float32, not .*float64"),
        (lambda: polyak.Average(mlp(), polyak.Uniform(), compensated=True), "lacks 'residual'"),
    ],
    ids=["scheme", "every", "names", "dtype", "compensated"],
)
def test_a_state_of_something_else_is_refused(other, message):
    _, average, _ = walked(polyak.Uniform(), steps=4)
    target = other()
    target.update()
    before = live_state(target)
    with pytest.raises(StateError, match=message):
        target.load_state_dict(average.state_dict())
    assert same(live_state(target), before)


def live_state(average):
    return {n: t.clone() for n, t in average.state_dict()["average"].items()}


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "npz"])
def test_saved_averages_open_again(tmp_path, suffix):
    from polyak import checkpoints

    model, average, _ = walked(polyak.Uniform(), model=mlp(torch.bfloat16))
    path = tmp_path / f"average.{suffix}"
    with average.applied():
        average.save(path)
    with checkpoints.open(path) as saved:
        for name, value in average.named_tensors().items():
            assert torch.equal(saved.read(name), value)
    assert json.loads(saved.metadata["polyak"])["scheme"] == "uniform"
    with average.applied():
        with pytest.raises(FileExistsError):
            average.save(path)
        average.save(path, overwrite=True)


def test_statistics_recomputed_while_swapped_are_saved_also_where_buffers_are_averaged(tmp_path):
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    average = polyak.Average(model, polyak.Uniform(), buffers="average")
    for value in (1.0, 3.0):
        model[0].weight.data.fill_(value)
        model[1].running_mean.fill_(value)
        average.update()
    with average.applied():  # and leaving it does not warn of changes
        assert average.named_tensors()["1.running_mean"] == 2
        polyak.update_bn([torch.tensor([[10.0], [14.0]])], model)
        average.save(tmp_path / "a.pt")
        copied = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
        average.copy_to(copied)
    assert torch.load(tmp_path / "a.pt")["1.running_mean"] == copied[1].running_mean == 24
    assert average.named_tensors()["1.running_mean"] == 2 and model[1].running_mean == 3


def test_what_named_tensors_gives_follows_a_model_that_was_retyped():
    model = nn.Linear(2, 1)
    average = polyak.Average(model, polyak.Uniform())
    average.update()
    model.double()
    first, second = average.named_tensors()["weight"], average.named_tensors()["weight"]
    assert first.dtype == torch.float64 and first.data_ptr() == second.data_ptr()


def test_strided_parameters_are_saved_as_they_are(tmp_path):
    model = nn.Linear(4, 3, bias=False)
    model.weight.data = torch.arange(24.0).reshape(3, 8)[:, ::2]
    average = polyak.Average(model, polyak.Uniform(), buffers="copy")
    model.register_buffer("mask", torch.arange(8.0)[::2])
    average.update()
    for suffix in ("safetensors", "pt", "npz"):
        average.save(tmp_path / f"a.{suffix}")
        with polyak.checkpoints.open(tmp_path / f"a.{suffix}") as saved:
            assert torch.equal(saved.read("weight"), model.weight)
            assert torch.equal(saved.read("mask"), model.mask)


def test_saving_a_batchnorm_model_outside_applied_is_warned_of(tmp_path):
    _, average, _ = walked(polyak.Uniform(), model=mlp(torch.float32))
    with pytest.warns(UserWarning, match=r"save inside applied\(\), after polyak\.update_bn"):
        average.save(tmp_path / "a.pt")
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False))
    average = polyak.Average(model, polyak.Uniform())
    with pytest.raises(NotStartedError, match=r"save\(\) needs at least one sample"):
        average.save(tmp_path / "b.pt")
    average.update()
    average.save(tmp_path / "b.pt")  # no statistics, no warning


# Options.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"start": -1}, OptionError, "start must be a whole number in \\[0, inf\\), got -1"),
        ({"every": 0}, OptionError, "every must be a whole number in \\[1, inf\\), got 0"),
        ({"every": 2.5}, OptionError, "got 2.5"),
        ({"every": True}, OptionError, "got True"),
        ({"buffers": "mean"}, OptionError, "'copy' or 'average'"),
        ({"check_finite": "no"}, OptionError, "check_finite"),
        ({"decay": 0.9}, TypeError, "decay"),
    ],
)
def test_bad_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        polyak.Average(mlp(), polyak.Uniform(), **options)


def test_profiles_that_need_the_whole_run_are_refused():
    with pytest.raises(OptionError, match="from a trajectory after training"):
        polyak.Average(mlp(), polyak.Tail(0.4))
    with pytest.raises(OptionError, match="follows a scheme"):
        polyak.Average(mlp(), "tail:0.4")
    with pytest.raises(OptionError, match="EMA takes either half_life or decay"):
        polyak.Average(mlp(), "ema")


def test_memory_is_one_copy_of_the_parameters():
    model = mlp()
    average = polyak.Average(model, polyak.Uniform())
    elements = sum(t.numel() for t in average.state_dict()["average"].values())
    assert elements == sum(p.numel() for p in model.parameters())


def test_repr_says_what_it_is():
    average = polyak.Average(mlp(), polyak.EMA(decay=0.5), every=2)
    assert repr(average) == "Average(EMA(decay=0.5), start=0, every=2, n_averaged=0, backend='torch')"


# What `every` must not change.


def ramp(scheme, every, steps=1000):
    """The average of w_t = t: where the scheme's weight lies in the run."""
    model = nn.Linear(1, 1, bias=False)
    average = polyak.Average(model, scheme, every=every, dtype=torch.float64)
    for step in range(1, steps + 1):
        model.weight.data.fill_(step)
        average.update()
    return float(average.named_tensors()["weight"])


@pytest.mark.parametrize("every", [2, 10, 50])
@pytest.mark.parametrize("scheme", [polyak.Power(gamma=6.94), polyak.Power(sigma_rel=0.2)])
def test_a_power_average_keeps_its_mean_position_when_sampled_rarely(scheme, every):
    """ema-pytorch's Karras EMA is off by 2 to 12 times with update_every."""
    lag, reference = 1000 - ramp(scheme, every), 1000 - ramp(scheme, 1)
    assert abs(lag - reference) <= every, "a sample stands for the steps before it, at most `every` of them"


@pytest.mark.parametrize("every", [2, 10, 50])
def test_a_half_life_keeps_its_horizon_when_sampled_rarely(every):
    scheme = polyak.EMA(half_life=100)
    lag, reference = 1000 - ramp(scheme, every), 1000 - ramp(scheme, 1)
    assert abs(lag - reference) <= every
    assert 1000 - ramp(polyak.EMA(decay=0.5 ** (1 / 100)), every) > reference + every, (
        "per-sample decay does change"
    )
