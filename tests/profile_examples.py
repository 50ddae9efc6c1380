"""Profiles that several test files look at."""

from hypothesis import strategies as st

from polyak import EMA, Blend, Decay, Polynomial, Power, Tail, Uniform, WarmupEMA, Weights, Window

fractions = st.floats(1e-9, 1)
positive = st.floats(1e-3, 1e12)
unit_open = st.floats(0, 1, exclude_min=True, exclude_max=True)
counts = st.integers(1, 10**9)
shapes = st.sampled_from(["linear", "sqrt", "1-sqrt", "cosine"])
_UNBLENDED = st.one_of(
    st.just(Uniform()),
    st.builds(EMA, half_life=positive, debias=st.booleans()),
    st.builds(EMA, decay=unit_open, debias=st.booleans()),
    st.builds(WarmupEMA, decay=st.floats(0.5, 1), min_decay=st.floats(0, 0.5)),
    st.builds(WarmupEMA, decay=st.floats(0, 1), power=st.floats(0.1, 10), inv_gamma=st.floats(0.01, 1e4)),
    st.builds(Power, half_life_fraction=st.floats(1e-6, 0.69)),
    st.builds(Power, gamma=st.floats(0, 1e6)),
    st.builds(Power, sigma_rel=st.floats(1e-6, 0.2887)),
    st.builds(Polynomial, eta=st.floats(0, 100)),
    st.builds(Tail, fractions),
    st.builds(lambda k: Tail(steps=k), counts),
    st.builds(lambda start, length: Window(start, start + length), st.integers(0, 10**9), counts),
    st.builds(Decay, shapes, fractions),
    st.builds(Weights, st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=8)),
)
ANY_PROFILE = st.one_of(_UNBLENDED, st.builds(Blend, _UNBLENDED, st.floats(0, 1)))
