"""How a profile is written as text: the table row of each class, and values to and from words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches


@dataclass(frozen=True)
class Spelling:
    """One class in the written form ``name:option,option``.

    ``readers`` turns the text of each option into its value; ``positional`` options are written without
    their keyword; ``separator`` stands between them (None: there is only one, and it takes the whole text).
    """

    name: str
    example: str
    readers: Mapping[str, Callable[[str], object]]
    positional: tuple[str, ...] = ()
    separator: str | None = ","


def written(value: object) -> str:
    """A value as it stands in the text; the readers below give the very same value back.

    >>> written(2000.0), written(0.1), written(False), written((1.0, 2.5))
    ('2000', '0.1', 'false', '1,2.5')
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
    if isinstance(value, tuple):
        return ",".join(written(part) for part in value)
    if callable(value):
        name = getattr(value, "__name__", type(value).__name__)
        return f"<{name.strip('<>')}>"
    return str(value)


def _reader(kind: str, convert: Callable[[str], object]) -> Callable[[str], object]:
    def read(text: str) -> object:
        try:
            return convert(text)
        except ValueError:
            raise ValueError(f"{text!r} is not {kind}") from None

    return read


read_number = _reader("a number", float)
read_whole = _reader("a whole number", int)
read_flag = _reader("true or false", lambda text: bool(("false", "true").index(text)))
read_numbers = _reader("a list of numbers like 1,2,3", lambda text: tuple(map(float, text.split(","))))


def read_shape(text: str) -> str:
    """The name of a shape; refuses what `written` makes of a function, which text cannot carry."""
    if text.startswith("<"):
        raise ValueError(f"{text} is a Python function, which text cannot carry: build the profile in Python")
    return text


def suggestion(word: str, names: Iterable[str]) -> str:
    """The known names, and the one that was probably meant.

    >>> suggestion("emma", ["uniform", "ema"])
    "did you mean 'ema'? Known: uniform, ema"
    """
    names = list(names)
    close = get_close_matches(word, names, n=1)
    return (f"did you mean {close[0]!r}? Known: " if close else "known: ") + ", ".join(names)
