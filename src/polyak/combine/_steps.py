"""temporary"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class NamedSteps:
    values: tuple | None
    order: tuple
    unit: str


def counted_from_one(v, u):
    return list(v) if u == "step" or min(v) > 0 else [x + 1 for x in v]


def number_in_name(n):
    m = re.findall(r"(?<!\d\.)\d+(?!\.\d)", n)
    return int(m[-1]) if m else None


def steps_in_names(paths):
    for names in (
        [p.stem for p in paths],
        [p.absolute().parent.name for p in paths],
        [p.absolute().parent.parent.name for p in paths],
    ):
        v = [number_in_name(n) for n in names]
        if None not in v and len(set(v)) == len(v):
            v = counted_from_one(v, "number")
            return NamedSteps(tuple(v), tuple(sorted(range(len(v)), key=v.__getitem__)), "number")
    return None
