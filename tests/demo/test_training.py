from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from polyak.demo._study import learning_rate_factor, train
from polyak.demo._tasks import CHOSEN, LIVE, TASKS, AverageSpec, batches, with_noise
from polyak.profiles import Uniform


def test_the_live_weights_and_swa_are_those_of_a_loop_written_out(tiny_digits):
    """The same training in plain torch, with the average of the samples as a mean over a stack."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    split = tiny_digits.load(5)
    torch.manual_seed(5)
    model = tiny_digits.build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    generator = torch.Generator().manual_seed(5)
    samples = []
    for step, batch in enumerate(batches(split.train, 25, 40, generator), 1):
        optimizer.zero_grad()
        cross_entropy(model(with_noise(batch.inputs, 0.3, generator)), batch.targets).backward()
        optimizer.step()
        if step in (25, 30, 35, 40):
            samples.append([parameter.detach().double().clone() for parameter in model.parameters()])

    def nll_on_test() -> float:
        with torch.no_grad():
            return cross_entropy(model.eval()(split.test.inputs), split.test.targets).item()

    live = nll_on_test()
    with torch.no_grad():
        for parameter, *taken in zip(model.parameters(), *samples, strict=True):
            parameter.copy_(torch.stack(taken).mean(0))
    swa = nll_on_test()
    torch.set_num_threads(threads)

    curves = train(tiny_digits, 5).curves
    assert curves[LIVE].steps == [10, 20, 30, 40]
    assert curves[LIVE].test_nll[-1] == live
    assert curves["SWA, no update_bn"].steps == [30, 40]
    assert curves["SWA, no update_bn"].test_nll[-1] == pytest.approx(swa, rel=1e-5)
    assert curves["SWA + update_bn"].test_nll[-1] != pytest.approx(swa, rel=1e-3)


def test_scoring_and_averaging_do_not_change_the_training(tiny_digits):
    often = train(tiny_digits, 0, record=True).curves[LIVE]
    once = train(replace(tiny_digits, averages={}), 0, eval_steps=40).curves[LIVE]
    assert once.steps == [40]
    assert once.test_nll[-1] == often.test_nll[-1]
    assert once.validation_accuracy[-1] == often.validation_accuracy[-1]


def test_a_decayed_run_is_the_constant_one_until_the_decay_begins(tiny_digits):
    constant = train(tiny_digits, 0).curves[LIVE]
    decayed = train(tiny_digits, 0, decay_fraction=0.5).curves
    assert list(decayed) == [LIVE]
    assert decayed[LIVE].test_nll[:2] == constant.test_nll[:2]
    assert decayed[LIVE].test_nll[2:] != constant.test_nll[2:]


def test_the_callers_random_state_and_threads_are_left_alone(tiny_digits):
    random_state, threads = torch.get_rng_state(), torch.get_num_threads()
    train(replace(tiny_digits, steps=4, eval_steps=4, record_every=1, block_steps=2), seed=123)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.get_num_threads() == threads


def test_the_text_task_trains():
    task = replace(
        TASKS["text"],
        steps=30,
        eval_steps=30,
        block_steps=10,
        warmup_steps=5,
        averages={"uniform tail": AverageSpec(Uniform(), start=20)},
    )
    curves = train(task, 0, record=True).curves
    assert set(curves) == {LIVE, "uniform tail", CHOSEN}
    # 256 bytes guessed evenly would cost ln 256 = 5.5 nats.
    assert curves[LIVE].test_nll[0] < 4.0
    assert curves["uniform tail"].test_nll[0] < 4.0


def test_every_step_of_the_schedule_has_a_positive_rate():
    factors = [learning_rate_factor(n, steps=50, warmup_steps=5, decay_steps=20) for n in range(50)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[5:31] == [1.0] * 26
    assert factors[31:] == pytest.approx([left / 20 for left in range(19, 0, -1)])


@pytest.mark.parametrize(("name", "inputs"), [("digits", (3, 1, 8, 8)), ("text", (3, 8))])
def test_models_give_one_logit_per_class(name, inputs):
    task = TASKS[name]
    model: nn.Module = task.build_model()
    x = torch.zeros(inputs, dtype=torch.int64 if name == "text" else torch.float32)
    assert model(x).shape == (3, 256 if name == "text" else 10)
