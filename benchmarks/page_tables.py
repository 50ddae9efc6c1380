"""Numbers and tables as the pages in docs show them."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["difference", "mean", "off_by", "plus_minus", "table"]


def table(heading: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; all columns but the first are right-aligned."""
    heading = list(heading)
    lines = [heading, ["---", *["--:"] * (len(heading) - 1)], *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plus_minus(entry: dict[str, float], scale: float, digits: int) -> str:
    return f"{scale * entry['mean']:.{digits}f} ± {scale * entry['stderr']:.{digits}f}"


def difference(entry: dict[str, float]) -> str:
    if not entry["stderr"]:
        return ""
    p = "p < 0.001" if entry["p_value"] < 0.001 else f"p = {entry['p_value']:.3f}"
    return f"{entry['mean']:+.4f} ({p})"


def off_by(entry: dict[str, float]) -> str:
    return f"{entry['mean']:+.4f} ± {entry['stderr']:.4f}"


def mean(values: list[float]) -> str:
    return f"{sum(values) / len(values):.4f}"
