"""What goes wrong around an average in a long run, and must not go wrong in it."""

from __future__ import annotations

import signal
import sys

import pytest
import torch
from torch import nn

import polyak
from polyak._mean import Accumulator
from polyak.errors import OptionError, StructureError, SwapError
from polyak.profiles import Uniform


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("size", [1e3, 1e12, 3e38])
def test_a_divergence_that_ends_in_a_nan_leaves_the_mean_alone(size, compensated):
    """The layers before the NaN are finite but huge; taking them back afterwards would round the mean away."""
    first, second = torch.full((1100, 1000), 0.3), torch.full((1100, 1000), 0.3)  # too large for one batch
    mean = Accumulator([first, second], ["a", "b"], Uniform(), compensated=compensated)
    for _ in range(5):
        mean.add([first, second])
    mean.add([torch.full_like(first, size), torch.full_like(second, float("nan"))])
    assert mean.n_skipped == 1
    torch.testing.assert_close(mean.means[0], first, rtol=0, atol=1e-7)


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("sample", [1.0, 1e4])
def test_small_tensors_are_averaged_also_where_they_suddenly_grow(sample, compensated):
    """They are gathered batch by batch in the same memory, and looked at all at once when one grows."""
    weights = [torch.zeros(5000) for _ in range(60)]
    mean = Accumulator(weights, [str(i) for i in range(60)], Uniform(), compensated=compensated)
    assert len(mean._batches) > 2
    mean.add(weights)
    mean.add([torch.full_like(weight, sample * i) for i, weight in enumerate(weights)])
    for i, found in enumerate(mean.means):
        assert torch.equal(found, torch.full_like(found, sample * i / 2))


@pytest.mark.parametrize("compensated", [False, True])
def test_a_resumed_average_is_the_same_to_the_bit_also_after_a_nan(compensated):
    """What is taken back of a sample leaves rounding; both must take back the same."""
    torch.manual_seed(0)
    weights = nn.ParameterList([torch.randn(300) for _ in range(20)] + [torch.randn(1200, 1000)])
    running, resumed = (polyak.Average(weights, polyak.Uniform(), compensated=compensated) for _ in range(2))

    def train(average):
        for parameter in weights:
            parameter.data.mul_(1.01)
        average.update()

    for _ in range(7):
        train(running)
    resumed.load_state_dict(running.state_dict())
    live = weights[20].data.clone()
    weights[20].data.fill_(float("nan"))
    running.update()
    resumed.update()
    weights[20].data.copy_(live)
    assert running.n_skipped == resumed.n_skipped == 1
    for _ in range(3):
        train(running)
        resumed.update()
    for one, other in zip(running.named_tensors().values(), resumed.named_tensors().values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("numel", [10, 30_000])
def test_conjugated_parameters_and_the_largest_numbers_are_averaged(numel):
    conjugated = torch.full((numel,), 1 + 2j).conj()
    largest = torch.tensor([1.7e308, -1.7e308], dtype=torch.float64)
    mean = Accumulator([conjugated, largest], ["conjugated", "largest"], Uniform())
    for _ in range(3):
        mean.add([conjugated, largest])
    assert mean.n_averaged == 3
    assert torch.equal(mean.means[0], conjugated) and torch.equal(mean.means[1], largest)


def interrupted(test):
    """For tests with real interrupts."""
    # One that falls into a weak reference's callback is only printed by Python.
    unraisable = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    traced = pytest.mark.skipif(sys.gettrace() is not None, reason="one that falls into the tracer locks it")
    return unraisable(traced(test))


def interrupted_at(seconds, action):
    """Run ``action`` with a real KeyboardInterrupt after ``seconds``, if it takes that long."""
    armed = True

    def interrupt(*_):
        if armed:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            action()
        finally:
            armed = False
    except KeyboardInterrupt:
        pass
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    torch.set_grad_enabled(True)  # an interrupt while torch's own no_grad() is entered leaves it on


@interrupted
def test_interrupts_at_any_moment_of_a_swap_bring_the_live_weights_back():
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(150)))
    average = polyak.Average(model, polyak.Uniform())
    average.update()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    average.update()
    live = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def use():
        with average.applied():
            pass

    for i in range(150):
        interrupted_at(2e-5 * (i + 1), use)
        assert all(torch.equal(tensor, live[name]) for name, tensor in model.state_dict().items())
    use()


@interrupted
@pytest.mark.parametrize("keep_in_memory", [0, "1MB"])
def test_interrupts_at_any_moment_of_an_average_of_the_run_so_far_bring_the_live_weights_back(
    tmp_path, keep_in_memory
):
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(20)))
    run = polyak.Recorder(model, tmp_path, block=1, keep_in_memory=keep_in_memory)
    for _ in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        run.update()
    live = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def use():
        with run.applied("uniform"):
            pass

    use()
    for i in range(60):
        interrupted_at(1e-4 * (i + 1), use)
        assert all(torch.equal(tensor, live[name]) for name, tensor in model.state_dict().items())
    use()
    run.update()
    run.close()


@interrupted
def test_interrupts_at_any_moment_of_an_update_leave_a_compensated_mean_in_the_hull():
    weights = [torch.full((3, 3), 1.0) for _ in range(60)] + [torch.full((200, 200), 1.0)]
    mean = Accumulator(weights, list(map(str, range(61))), polyak.EMA(decay=0.5), compensated=True)
    mean.add(weights)
    for i in range(100):
        for weight in weights:
            weight.fill_(1.0 + i % 2)
        interrupted_at(1e-5 * (i + 1), lambda: mean.add(weights))
        for value in mean.means:
            assert 1 - 1e-6 <= float(value.min()) <= float(value.max()) <= 2 + 1e-6


@interrupted
def test_interrupts_at_any_moment_of_update_bn_leave_the_model_as_it_was():
    model = nn.Sequential(*(nn.BatchNorm1d(2) for _ in range(40)))
    loader = [torch.randn(4, 2)]
    polyak.update_bn(loader, model)  # what is imported at the first call is not what is interrupted here
    for i in range(60):
        interrupted_at(1e-4 * (i + 1), lambda: polyak.update_bn(loader, model))
        for layer in model:
            assert layer.training and layer.momentum == 0.1 and not layer._forward_pre_hooks


def test_two_swaps_of_one_model_never_mix():
    model = nn.Linear(2, 2)
    classic = polyak.optim.SWA(torch.optim.SGD(model.parameters(), lr=0.1))
    ema = polyak.Average(model, polyak.EMA(decay=0.5))
    for value in (1.0, 2.0):
        model.weight.data.fill_(value)
        classic.update_swa()
        ema.update()
    classic.swap_swa_sgd()
    with ema.applied(), pytest.raises(SwapError, match="another average"):
        classic.swap_swa_sgd()
    with pytest.warns(UserWarning, match="weights were changed"):
        classic.swap_swa_sgd()
    assert torch.equal(model.weight.data, torch.full((2, 2), 2.0))
    with ema.applied(), pytest.raises(SwapError, match="another average"):
        classic.step()


def test_part_averages_of_one_model_do_not_show_each_other():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    first = polyak.Average(model, polyak.Uniform(), include="0.*")
    last = polyak.Average(model, polyak.Uniform(), include="2.*")
    first.update()
    last.update()
    with first.applied():
        with pytest.raises(SwapError):
            last.named_tensors()
        with pytest.raises(SwapError):
            last.swap_in()


def test_changes_after_the_last_update_are_noticed_before_anything_is_saved(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    average = polyak.Average(model, polyak.Uniform())
    average.update()
    model.append(nn.Linear(2, 1))
    for call in (
        average.named_tensors,
        lambda: average.save(tmp_path / "a.pt"),
        lambda: average.copy_to(model),
    ):
        with pytest.raises(StructureError, match=r"has '2\.weight'"):
            call()
    assert not list(tmp_path.iterdir())


def test_tensors_replaced_while_swapped_come_back():
    model = nn.Linear(2, 2)
    model.register_buffer("seen", torch.zeros(1))
    average = polyak.Average(model, polyak.Uniform())
    average.update()
    live, seen = model.weight, model.seen
    with average.applied():
        model.seen = model.seen + 1
    assert model.seen is seen and model.seen == 0
    with pytest.warns(UserWarning, match="those changes are gone"), average.applied():
        model.weight = nn.Parameter(torch.zeros(2, 2))
    assert model.weight is live


def test_tensors_made_in_inference_mode_do_not_get_in_the_way():
    model = nn.Linear(2, 2)
    with torch.inference_mode():
        model.register_buffer("cache", torch.ones(2))
        average = polyak.Average(model, polyak.Uniform())
    average.update()
    with average.applied():
        pass
    average.update()
    assert average.n_averaged == 2


@pytest.mark.parametrize(
    ("before", "after"),
    [(torch.contiguous_format, torch.channels_last), (torch.channels_last, torch.contiguous_format)],
)
def test_a_model_that_is_laid_out_anew_is_followed(before, after):
    model = nn.Conv2d(64, 64, 3).to(memory_format=before)
    weight = model.weight.detach().clone()
    average = polyak.Average(model, polyak.Uniform())
    average.update()
    model.to(memory_format=after)
    model.weight.data.mul_(3)
    average.update()
    mean = average.named_tensors()["weight"]
    assert mean.is_contiguous(memory_format=after)
    torch.testing.assert_close(mean, 2 * weight)


def test_averaged_buffers_that_change_shape_are_refused():
    model = nn.Module()
    model.linear = nn.Linear(1, 1)
    model.register_buffer("a", torch.zeros(2))
    model.register_buffer("b", torch.zeros(3))
    average = polyak.Average(model, polyak.Uniform(), buffers="average")
    average.update()
    model.a.data, model.b.data = model.b.data, model.a.data
    with pytest.raises(StructureError, match=r"has 'a' as \(3,\), not \(2,\), 'b' as"):
        average.update()


def test_names_that_meet_once_wrappers_are_left_out_are_refused():
    class Wrapper(nn.DataParallel):
        def __init__(self, module):
            super().__init__(module)
            self.head = nn.Linear(1, 1)

    inner = nn.Module()
    inner.head = nn.Linear(1, 1)
    with pytest.raises(StructureError, match=r"'head\.weight', 'head\.bias' would name two tensors"):
        polyak.Average(Wrapper(inner), polyak.Uniform())


def test_parameters_left_out_on_purpose_may_be_thawed():
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    model[0].requires_grad_(False)
    averages = [
        polyak.Average(model, polyak.Uniform(), exclude="0.*"),
        polyak.Average(model, polyak.Uniform(), include="1.*"),
    ]
    model[0].requires_grad_(True)
    for average in averages:
        average.update()
        assert average.n_averaged == 1


@pytest.mark.parametrize("shape", [(2, 2000, 1500), (3, 1, 2, 1000, 1000)])
@pytest.mark.parametrize("options", [{"compensated": True}, {}])
def test_an_update_takes_little_memory_also_where_the_outermost_dimension_is_small(shape, options):
    weight = torch.randn(shape, dtype=torch.float32 if options else torch.bfloat16)
    mean = Accumulator([weight], ["w"], Uniform(), **options)
    copies = 3 if options else 1
    assert copies * max(m.numel() for batch in mean._batches for m in batch.means) <= 0.02 * weight.numel()
    for _ in range(3):
        mean.add([weight])
    assert torch.equal(mean.means[0], weight.float())


def test_copy_to_a_model_without_data_is_refused():
    average = polyak.Average(nn.Linear(2, 2), polyak.Uniform())
    average.update()
    with torch.device("meta"):
        target = nn.Linear(2, 2)
    for model in (target, nn.LazyLinear(2)):
        with pytest.raises(StructureError, match="no data yet"):
            average.copy_to(model)


@pytest.mark.parametrize(
    "options",
    [{"dtype": "float32"}, {"dtype": torch.float8_e4m3fn}, {"dtype": torch.complex64}, {"device": "meta"}],
)
def test_options_that_cannot_work_are_refused_at_once(options):
    with pytest.raises(OptionError, match=next(iter(options))):
        polyak.Average(nn.Linear(1, 1), polyak.Uniform(), **options)


def test_only_modules_can_be_averaged():
    with pytest.raises(OptionError, match="got dict"):
        polyak.Average({}, polyak.Uniform())
    with pytest.raises(OptionError, match="same average twice"):
        model = nn.Linear(1, 1)
        average = polyak.Average(model, polyak.Uniform())
        polyak.attach(torch.optim.SGD(model.parameters()), average, average)
