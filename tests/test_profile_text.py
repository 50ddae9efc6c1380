"""Profiles as text: one parser, one printer, for every class."""

import pytest
from hypothesis import given, settings

import polyak
from polyak import EMA, Blend, Decay, Polynomial, Power, Tail, Uniform, WarmupEMA, Weights, Window
from polyak.errors import OptionError
from polyak.profiles import Profile, Scheme, parse, registered
from profile_examples import ANY_PROFILE


@pytest.mark.parametrize(
    ("text", "profile"),
    [
        ("uniform", Uniform()),
        ("ema:half_life=2000", EMA(half_life=2000)),
        ("ema:decay=0.999", EMA(decay=0.999)),
        ("ema:decay=0.999,debias=false", EMA(decay=0.999, debias=False)),
        ("power:gamma=6.94", Power(gamma=6.94)),
        ("power:sigma_rel=0.1", Power(sigma_rel=0.1)),
        ("polynomial:eta=8", Polynomial(eta=8)),
        ("tail:0.4", Tail(0.4)),
        ("tail:steps=2000", Tail(steps=2000)),
        ("window:1000,2000", Window(1000, 2000)),
        ("decay:sqrt:0.4", Decay("sqrt", 0.4)),
        ("decay:1-sqrt:1", Decay("1-sqrt", 1)),
        ("weights:1,2,3", Weights([1, 2, 3])),
        ("weights:-0.5,1.5", Weights([-0.5, 1.5])),
        ("blend:0.4:decay:sqrt:0.4", Blend(Decay("sqrt", 0.4), 0.4)),
        ("blend:0:uniform", Blend("uniform", 0)),
        ("blend:0.25:ema:decay=0.9,debias=false", Blend(EMA(decay=0.9, debias=False), 0.25)),
        ("blend:0.3:weights:-0.5,1.5", Blend("weights:-0.5,1.5", 0.3)),
    ],
)
def test_text_and_profile(text, profile):
    assert parse(text) == profile
    assert str(profile) == text


@pytest.mark.parametrize(
    ("text", "usual"),
    [
        (" uniform\n", "uniform"),
        ("ema:debias=true,decay=.9", "ema:decay=0.9"),
        ("ema: decay = 0.9", "ema:decay=0.9"),
        ("tail:fraction=0.4", "tail:0.4"),
        ("window:start=1000,stop=2000", "window:1000,2000"),
        ("window:1000,stop=2000", "window:1000,2000"),
        ("decay:shape=sqrt,fraction=0.4", "decay:sqrt:0.4"),
        ("weights:a=1, 2", "weights:1,2"),
        ("blend: .5 : tail:fraction=0.4", "blend:0.5:tail:0.4"),
        ("blend:0.5:blend:0.5:tail:0.4", "blend:0.25:tail:0.4"),
    ],
)
def test_other_spellings(text, usual):
    assert str(parse(text)) == usual


@settings(deadline=None, max_examples=50)
@given(profile=ANY_PROFILE)
def test_text_round_trips(profile):
    assert parse(str(profile)) == profile
    assert str(parse(str(profile))) == str(profile)
    assert eval(repr(profile), vars(polyak.profiles)) == profile


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there is no profile ''; known: uniform, ema, power, .*For example: ema:half_life=2000"),
        ("emma:decay=0.9", "there is no profile 'emma'; did you mean 'ema'. Known: uniform, ema"),
        ("EMA:decay=0.9", "there is no profile 'EMA'"),
        ("uniform:3", "'3' is not an option of uniform; it takes none"),
        ("uniform:", "'' is not an option"),
        ("ema", "takes either half_life or decay, got neither. For example: ema:half_life=2000"),
        ("ema:0.9", "'0.9' is not an option of ema; known: half_life, decay, debias"),
        ("ema:dekay=0.9", "'dekay=0.9' is not an option of ema; did you mean 'decay'"),
        ("ema:decay=fast", "'fast' is not a number"),
        ("ema:decay=2", r"'ema:decay=2': decay must be a number in \[0, 1\), got 2.0"),
        ("ema:decay=0.9,debias=no", "'no' is not true or false"),
        ("ema:decay=0.9,decay=0.8", "decay is given twice, the second time by 'decay=0.8'"),
        ("tail:0.4,fraction=0.5", "fraction is given twice"),
        ("tail:0.4,2", "'2' is not an option of tail; known: fraction, steps"),
        ("tail:steps=2.5", "'2.5' is not a whole number"),
        ("window:10", "it lacks stop. For example: window:1000,2000"),
        ("decay", "it lacks shape and fraction. For example: decay:sqrt:0.4"),
        ("decay:sqrt,0.4", "For example: decay:sqrt:0.4"),
        ("decay:sqt:0.4", "did you mean 'sqrt'"),
        ("weights:1,x", "'1,x' is not a list of numbers like 1,2,3"),
        ("blend", r"it lacks a part in \[0, 1\], or the profile.*For example: blend:0.4:decay:sqrt:0.4"),
        ("blend:0.4", "it lacks a part"),
        ("blend:tail:0.4", "'tail' is not a number|no profile '0.4'"),
        ("blend:1.5:uniform", r"part must be a number in \[0, 1\], got 1.5"),
        ("blend:0.5:tial:0.4", "there is no profile 'tial'; did you mean 'tail'"),
    ],
)
def test_bad_text_is_refused(text, message):
    with pytest.raises(OptionError, match=message) as caught:
        parse(text)
    assert f"cannot read the profile {text!r}: " in str(caught.value)


def test_a_decay_with_a_function_prints_but_cannot_be_parsed():
    def halving(x: float) -> float:
        return 1 - x / 2

    assert str(Decay(halving, 0.4)) == "decay:<halving>:0.4"
    assert str(Decay(lambda x: 1 - x, 0.4)) == "decay:<lambda>:0.4"
    with pytest.raises(OptionError, match=r"<halving> is a Python function.*build the profile in Python"):
        parse(str(Decay(halving, 0.4)))


def test_every_class_of_polyak_is_exported():
    ours = {cls for cls in registered().values() if cls.__module__ == polyak.EMA.__module__}
    exported = {value for value in vars(polyak.profiles).values() if isinstance(value, type)}
    assert ours == exported - {Profile, Scheme}
    assert ours <= {getattr(polyak, name) for name in polyak.__all__}
    assert {cls for cls in registered(Scheme).values() if cls in ours} == {
        Uniform,
        EMA,
        Power,
        Polynomial,
        WarmupEMA,
    }
