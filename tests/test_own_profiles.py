"""Profiles that a user defines work wherever polyak's own do, and cannot be mistaken for them."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import polyak
from polyak.combine import Span, coefficients
from polyak.errors import OptionError
from polyak.profiles import EMA, Profile, Scheme, _base, as_scheme, parse, registered
from polyak.selection._select import coarse_grid, fine_grid
from recorded_runs import RecordedWalk, largest_error


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """What a test defines is forgotten after it."""
    ours = {name: cls for name, cls in registered().items() if cls.__module__ == EMA.__module__}
    monkeypatch.setattr(_base, "_REGISTRY", ours)


def define():
    """As a user would: nothing but fields, a unit and a share."""

    @dataclass(frozen=True)
    class Ramp(Profile):
        fraction: float
        unit = "samples"

        def share(self, t, total):
            return np.clip(1 - (total - t) / (self.fraction * total), 0, 1) ** 2

    @dataclass(frozen=True)
    class Fading(Scheme):
        scale: float = 5.0
        unit = "steps"

        def share(self, t, total):
            return np.log1p(t / self.scale) / np.log1p(total / self.scale)

    @dataclass(frozen=True)
    class Steep(Scheme):
        rate: float
        unit = "steps"

        def share(self, t, total):
            kept = np.exp(self.rate * (t - total) / 100)
            return kept * (np.expm1(-self.rate * t / 100) / np.expm1(-self.rate * total / 100))

    return SimpleNamespace(Ramp=Ramp, Fading=Fading, Steep=Steep)


@pytest.fixture
def own():
    return define()


@pytest.fixture
def recorded(tmp_path):
    run = RecordedWalk(tmp_path / "run", block=10)
    run.run(100)
    run.recorder.close()
    return run


def test_text_and_repr_follow_from_the_fields(own):
    assert str(own.Ramp(0.5)) == "ramp:0.5"
    assert repr(own.Ramp(0.5)) == "Ramp(0.5)"
    assert parse("ramp:0.5") == parse("ramp:fraction=0.5") == own.Ramp(0.5)
    assert (str(own.Fading()), str(own.Fading(2.5))) == ("fading", "fading:2.5")
    assert parse("fading") == own.Fading()
    assert list(registered(Scheme))[-2:] == ["fading", "steep"]
    with pytest.raises(
        OptionError, match=r"no profile 'rampe'; did you mean 'ramp'. Known: uniform, .*, steep"
    ):
        parse("rampe:1")
    with pytest.raises(OptionError, match=r"'ramp': it lacks fraction$"):
        parse("ramp")
    with pytest.raises(OptionError, match="'fast' is not a number"):
        parse("ramp:fast")


def test_an_average_follows_one_and_its_state_names_it(own):
    def averaged(scheme, values, state=None):
        model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
        average = polyak.Average(model, scheme)
        if state:
            average.load_state_dict(state)
        for value in values:
            nn.init.constant_(model.weight, value)
            average.update()
        return average

    values = np.arange(1.0, 9) ** 2
    whole = averaged(own.Fading(3.0), values)
    expected = own.Fading(3.0).weights(np.arange(9)) @ values
    assert whole.named_tensors()["weight"].item() == pytest.approx(expected, rel=1e-14)
    half = averaged("fading:3", values[:5]).state_dict()
    assert half["scheme"] == "fading:3"
    resumed = averaged(own.Fading(3.0), values[5:], half)
    assert torch.equal(resumed.named_tensors()["weight"], whole.named_tensors()["weight"])
    assert repr(resumed) == "Average(Fading(3.0), start=0, every=1, n_averaged=8, backend='torch')"
    with pytest.raises(
        polyak.errors.StateError, match="saved with scheme='fading:3', but this has scheme='steep:1'"
    ):
        averaged("steep:1", [], half)
    with pytest.raises(
        OptionError, match=r"follows a scheme \(Uniform, EMA, Power, Polynomial, WarmupEMA, Fading, Steep\)"
    ):
        averaged(own.Ramp(0.5), [])


def test_a_trajectory_takes_one(own, recorded, tmp_path):
    trajectory = recorded.recorder.trajectory
    for profile, text in ((own.Ramp(0.5), "ramp:0.5"), (own.Fading(40.0), "fading:40")):
        weights = profile.weights(np.arange(0, 101, 10)).repeat(10) / 10
        expected = recorded.mean(range(1, 101), weights.tolist())
        averaged = {name: tensor for name, tensor in trajectory.average(text).items() if name in expected}
        parameters = {name: expected[name] for name, _ in recorded.model.named_parameters()}
        assert largest_error(averaged, parameters) < 1e-6
        assert trajectory.explain(profile).effective_samples == pytest.approx(1 / (weights**2).sum())
        with pytest.warns(UserWarning, match="BatchNorm statistics of other weights"):
            trajectory.write(profile, tmp_path / f"{profile.name}.pt")
        written = torch.load(tmp_path / f"{profile.name}.pt", weights_only=True)
        assert torch.equal(written["0.weight"], averaged["0.weight"])


def test_one_that_blocks_cannot_resolve_is_refused_with_a_cure(own, recorded):
    trajectory = recorded.recorder.trajectory
    with pytest.raises(OptionError, match=r"cannot give steep:900.*resolve; record shorter blocks"):
        trajectory.average(own.Steep(900.0))

    @dataclass(frozen=True)
    class Steeper(own.Steep):
        def longer(self, factor):
            return type(self)(self.rate / factor)

    with pytest.raises(OptionError, match=r"The shortest possible here is steeper:\d+"):
        trajectory.average(Steeper(900.0))


def test_a_scheme_whose_first_sample_no_block_holds_alone(own, recorded):
    @dataclass(frozen=True)
    class Copied(Scheme):
        unit = "steps"

        def share(self, t, total):
            return np.where(t > 0, np.exp((t - total) / 1000), 0.0)

    with pytest.raises(OptionError, match="its first sample alone counts that much"):
        recorded.recorder.trajectory.average(Copied())


def test_select_tries_one_and_what_it_names(own, recorded):
    trajectory = recorded.recorder.trajectory
    assert not {own.Ramp, own.Fading} & {type(profile) for profile in coarse_grid(100)}

    @dataclass(frozen=True)
    class Hill(own.Ramp):
        @classmethod
        def candidates(cls, steps):
            return [cls(0.2), cls(0.5), cls(0.9)]

    target = {k: v for k, v in trajectory.average(Hill(0.5)).items() if k == "0.weight"}

    def score(model):
        return float((model[0].weight - target["0.weight"]).square().sum())

    options = {"score": score, "mode": "min", "progress": False}
    names = {c.name for c in polyak.select(trajectory, recorded.model, **options).table}
    assert {"hill:0.2", "hill:0.5", "hill:0.9"} < names
    assert len([name for name in names if name.startswith("hill:")]) == 7  # and finer ones around the best
    given = ["ramp:0.4", own.Ramp(0.5), "uniform"]
    chosen = polyak.select(trajectory, recorded.model, profiles=given, **options)
    assert {c.name for c in chosen.table} == {"live", "ramp:0.4", "ramp:0.5", "uniform"}
    assert chosen.best.name == "ramp:0.5"
    assert chosen.best.score == 0


def test_finer_values_are_of_the_one_number_that_differs():
    @dataclass(frozen=True)
    class Last(Profile):
        steps: int
        kind: str = "plain"
        unit = "steps"

        def share(self, t, total):
            return np.clip((t - total + self.steps) / self.steps, 0, 1)

        @classmethod
        def candidates(cls, steps):
            return [cls(10), cls(100), cls(10, "other"), cls(400, "other")]

    assert fine_grid(Last(100), 1000) == [Last(46), Last(22), Last(215), Last(464)]
    assert fine_grid(Last(10, "other"), 1000) == [
        Last(34, "other"),
        Last(117, "other"),
        Last(3, "other"),
        Last(1, "other"),
    ]
    assert fine_grid(Last(50), 1000) == []


# Text of all kinds of fields.


def test_each_kind_of_field_is_read_as_it_is_annotated():
    @dataclass(frozen=True)
    class Mixed(Profile):
        factors: tuple[float, ...]
        kind: str = "plain"
        _: KW_ONLY
        steps: int | None = None
        flag: bool = False
        table: dict[str, int] = field(default_factory=dict, hash=False)
        unit = "steps"
        separator = "/"

        def share(self, t, total):
            return t / total

    for text, mixed in [
        ("mixed:1,2.5", Mixed((1.0, 2.5))),
        ("mixed:1,2/other", Mixed((1.0, 2.0), "other")),
        ("mixed:1/steps=7/flag=true", Mixed((1.0,), steps=7, flag=True)),
    ]:
        assert parse(text) == mixed
        assert str(mixed) == text
        assert eval(repr(mixed), {"Mixed": Mixed}) == mixed
    with pytest.raises(OptionError, match="text cannot carry the option that '3' stands for"):
        parse("mixed:1/table=3")


def test_annotations_that_cannot_be_read_are_said():
    @dataclass(frozen=True)
    class Odd(Profile):
        factor: OnlyForTypeCheckers = 1.0  # noqa: F821  # pyright: ignore[reportUndefinedVariable]
        unit = "steps"

        def share(self, t, total):
            return t / total

    assert str(Odd()) == "odd"
    with pytest.raises(
        OptionError, match=r"annotations of .*Odd cannot be read \(name 'OnlyForTypeCheckers'"
    ):
        parse("odd:2")


def test_what_follows_a_default_is_written_with_its_keyword():
    @dataclass(frozen=True)
    class Two(Profile):
        first: float = 1.0
        second: float = 2.0
        unit = "steps"

        def share(self, t, total):
            return t / total

    assert (str(Two(second=3.0)), repr(Two(second=3.0))) == ("two:second=3", "Two(second=3.0)")
    assert parse("two:second=3") == Two(second=3.0)
    assert parse(str(Two(5.0, 3.0))) == Two(5.0, 3.0)


# Definitions that cannot work are refused when they are made, or used for the first time.


def test_two_classes_of_one_name_are_refused_and_a_new_definition_takes_the_place_of_the_old(own):
    again = define()  # as when the cell of a notebook is run once more
    assert again.Ramp is not own.Ramp
    assert type(parse("ramp:0.5")) is again.Ramp
    for module in ("before", "yours"):
        with pytest.raises(
            OptionError, match=r"two profiles cannot both be 'ema' in text: polyak.profiles._builtin.EMA is"
        ):
            type("Ema", (own.Fading,), {"__module__": module})
    assert registered()["ema"] is EMA

    @dataclass(frozen=True)
    class EMA2(own.Fading):
        name = "my-ema"

    assert parse("my-ema:3") == EMA2(3.0)


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("name", "two words", "must be one word, got 'two words'"),
        ("unit", "epochs", "must be steps, samples or blocks"),
    ],
)
def test_names_and_units_are_checked_at_definition(own, attribute, value, message):
    with pytest.raises(OptionError, match=message):
        type("Wrong", (own.Ramp,), {attribute: value})
    assert "wrong" not in registered()


def test_a_class_that_is_not_frozen_is_refused_by_python(own):
    with pytest.raises(TypeError, match="frozen"):

        @dataclass
        class Loose(Profile):
            unit = "steps"

            def share(self, t, total):
                return t / total


def test_an_unfinished_class_is_not_known():
    class Unfinished(Scheme):
        unit = "steps"

    assert "unfinished" not in registered()
    with pytest.raises(TypeError, match="abstract"):
        Unfinished()


def test_a_scheme_that_no_running_mean_can_follow_is_refused(own):
    @dataclass(frozen=True)
    class Pretender(Scheme):
        unit = "samples"

        def share(self, t, total):
            return np.clip(2 * t / total - 1, 0, 1)

    with pytest.raises(
        OptionError, match=r"no running mean has the weights of Pretender\(\).*derive .* Profile"
    ):
        as_scheme("pretender")

    @dataclass(frozen=True)
    class Blockwise(own.Fading):
        unit = "blocks"

    with pytest.raises(OptionError, match=r"Blockwise\(\) must count steps or samples"):
        as_scheme(Blockwise())


@pytest.mark.parametrize(
    "share", [lambda t, total: 1 - t / total, lambda t, total: 0.5 - 1e-8 * t, lambda t, total: t * np.nan]
)
def test_a_share_that_falls_or_is_no_number_is_refused(share):
    @dataclass(frozen=True)
    class Wrong(Profile):
        unit = "samples"

        def share(self, t, total):
            return np.where(t > 0, share(t, total), 0)

    spans = [Span(start, start + 1) for start in range(3)]
    for use in (lambda: Wrong().weights([0, 1, 2, 3]), lambda: coefficients(Wrong(), spans)):
        with pytest.raises(OptionError, match=r"share\(t, total\) of wrong must be finite and rise with t"):
            use()


# A share made of NumPy's functions, on tensors of any device.


def coefficient_of(expression):
    class Tried(Scheme):
        unit = "samples"

        def share(self, t, total):
            return expression(t, total)

    return lambda *at, xp=np: Tried().coefficient_between(*at, xp=xp)


@pytest.mark.parametrize(
    "expression",
    [
        lambda t, total: (t / total) ** 2.5,
        lambda t, total: 2**-total * (2**t - 1) + 0 * t,
        lambda t, total: np.where(t == 0, 0.0, np.maximum(0.25, np.minimum(t / total, 0.5))),
        lambda t, total: np.clip(np.power(t, 3) / np.power(total, 3), 0.1, 0.6),
        lambda t, total: np.sqrt(t) * -np.negative(1 / np.sqrt(total)) * np.float64(0.5),
        lambda t, total: 0.5,
    ],
)
def test_numpy_functions_of_a_share_run_in_torch(expression):
    coefficient = coefficient_of(expression)
    for before, now in [(0.0, 1.0), (1.0, 2.0), (6.0, 7.0)]:
        tensors = [torch.tensor(at, dtype=torch.float64) for at in (before, now)]
        found = coefficient(*tensors, xp=torch)
        assert found.dtype == torch.float64
        assert found.item() == pytest.approx(float(coefficient(before, now)), abs=1e-15)
        assert coefficient(*(t.to("meta") for t in tensors), xp=torch).is_meta


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        (lambda t, total: np.cbrt(t / total), "torch has no cbrt like NumPy's.*coefficient_between"),
        (lambda t, total: np.exp(t - total, where=True), "torch has no exp like NumPy's"),
        (lambda t, total: t / total if t > 0 else 0.0, "must not branch"),
    ],
)
def test_a_share_that_cannot_run_on_a_device_says_so(expression, message):
    before, now = torch.ones(2, dtype=torch.float64).unbind()
    with pytest.raises(OptionError, match=message):
        coefficient_of(expression)(before, now + 1, xp=torch)
