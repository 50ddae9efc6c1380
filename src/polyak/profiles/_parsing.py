"""Reading a profile from its text."""

from __future__ import annotations

from dataclasses import MISSING, fields

from polyak.errors import OptionError
from polyak.profiles._base import Profile, Spelling, suggestion
from polyak.profiles._schemes import EMA, Polynomial, Power, Uniform
from polyak.profiles._windows import Decay, Tail, Weights, Window

_CLASSES: dict[str, type[Profile]] = {
    cls.spelling.name: cls for cls in (Uniform, EMA, Power, Polynomial, Tail, Window, Decay, Weights)
}


def parse(text: str) -> Profile:
    """The profile that ``text`` describes; ``parse(str(profile)) == profile``.

    The form is ``name:option,option``, an option being ``keyword=value``. The usual options of a tail, a
    window, a decay and weights need no keyword: see the examples.

    Raises:
        OptionError: the text is not of this form, or a hyper-parameter is out of range.

    >>> import polyak
    >>> polyak.parse("ema:decay=0.999,debias=false")
    EMA(decay=0.999, debias=False)
    >>> polyak.parse("tail:0.4"), polyak.parse("tail:steps=2000"), polyak.parse("window:1000,2000")
    (Tail(0.4), Tail(steps=2000), Window(1000, 2000))
    >>> polyak.parse("decay:sqrt:0.4"), polyak.parse("weights:1,2,3")
    (Decay('sqrt', 0.4), Weights((1.0, 2.0, 3.0)))
    >>> polyak.parse("emma:decay=0.9")
    Traceback (most recent call last):
    polyak.errors.OptionError: cannot read the profile 'emma:decay=0.9': there is no profile 'emma';
    did you mean 'ema'? Known: uniform, ema, power, ... For example: ema:half_life=2000
    """
    name, colon, rest = text.strip().partition(":")
    example = _CLASSES.get(name, EMA).spelling.example
    try:
        return _build(name, rest if colon else None)
    except ValueError as error:
        raise OptionError(f"cannot read the profile {text!r}: {error}. For example: {example}") from None


def as_profile(given: object) -> Profile:
    """A profile as it is, text parsed. Raises ``OptionError`` for anything else.

    >>> as_profile("uniform")
    Uniform()
    """
    if isinstance(given, str):
        return parse(given)
    if not isinstance(given, Profile):
        raise OptionError(f"a profile is needed, such as polyak.Tail(0.4) or 'tail:0.4', got {given!r}")
    return given


def _build(name: str, rest: str | None) -> Profile:
    if name not in _CLASSES:
        raise ValueError(f"there is no profile {name!r}; {suggestion(name, _CLASSES)}")
    cls = _CLASSES[name]
    options = {} if rest is None else _read_options(cls.spelling, rest)
    missing = [field.name for field in fields(cls) if field.default is MISSING and field.name not in options]
    if missing:
        raise ValueError(f"it lacks {' and '.join(missing)}")
    return cls(**options)


def _read_options(spelling: Spelling, rest: str) -> dict[str, object]:
    options: dict[str, object] = {}
    positional = iter(spelling.positional)
    for piece in _pieces(spelling, rest):
        keyword, equals, value = piece.partition("=")
        if not equals:
            keyword, value = next(positional, ""), piece
        keyword, value = keyword.strip(), value.strip()
        if keyword not in spelling.readers:
            raise ValueError(
                f"{piece!r} is not an option of {spelling.name}; {_known_options(spelling, piece)}"
            )
        if keyword in options:
            raise ValueError(f"{keyword} is given twice, the second time by {piece!r}")
        options[keyword] = spelling.readers[keyword](value)
    return options


def _pieces(spelling: Spelling, rest: str) -> list[str]:
    if spelling.separator is None:
        return [rest]
    return rest.split("," if "=" in rest else spelling.separator)


def _known_options(spelling: Spelling, piece: str) -> str:
    if not spelling.readers:
        return "it takes none"
    return suggestion(piece.partition("=")[0], spelling.readers)
