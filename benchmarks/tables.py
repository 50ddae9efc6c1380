"""Write docs/results.md from the JSON files in benchmarks/results: `python benchmarks/tables.py`.

Each section is one function of one file. A section whose file is not there says which command makes it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = ROOT / "docs" / "results.md"

INTRODUCTION = """# Measured figures

Written by `python benchmarks/tables.py` from the JSON files in `benchmarks/results`; a test holds that the two agree.
Times are ratios within one run, each the median over rounds in rotated order with the interquartile range in brackets:
absolute times on shared machines mean little. A promise that was not kept is shown as such.
"""


def table(heading: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; all columns but the first are right-aligned."""
    heading = list(heading)
    lines = [heading, ["---", *["--:"] * (len(heading) - 1)], *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def demo(data: dict[str, Any]) -> str:
    settings = data["settings"]
    rows = [
        (
            label,
            plus_minus(entry["test_nll"], 1, 4),
            plus_minus(entry["test_accuracy"], 100, 2),
            difference(entry["test_nll"]["minus_tuned_decay"]),
        )
        for label, entry in data["summary"].items()
    ]
    heading = ("", "test NLL", "accuracy, %", "NLL minus tuned decay")
    model = settings["description"]
    introduction = f"{model[0].upper()}{model[1:]}; {len(settings['seeds'])} seeds, mean ± standard error."
    return "\n\n".join((introduction, table(heading, rows), "\n".join(data["verdict"])))


def plus_minus(entry: dict[str, float], scale: float, digits: int) -> str:
    return f"{scale * entry['mean']:.{digits}f} ± {scale * entry['stderr']:.{digits}f}"


def difference(entry: dict[str, float]) -> str:
    if not entry["stderr"]:
        return ""
    p = "p < 0.001" if entry["p_value"] < 0.001 else f"p = {entry['p_value']:.3f}"
    return f"{entry['mean']:+.4f} ({p})"


def update_cost(data: dict[str, Any]) -> str:
    names = list(dict.fromkeys(name for case in data["cases"].values() for name in case["contenders"]))
    rows = [
        [name, *(cost(case["contenders"].get(name)) for case in data["cases"].values())] for name in names
    ]
    models = "; ".join(f"**{name}**: {case['model']}" for name, case in data["cases"].items())
    heading = ("time of one update / one flat `lerp_` over as many numbers", *data["cases"])
    return f"{models}.\n\n{table(heading, rows)}\n\n{memory(data)}\n\n{promises(data['promises'])}"


def cost(entry: dict[str, Any] | None) -> str:
    return spread(entry["time_over_limit"]) if entry else ""


def memory(data: dict[str, Any]) -> str:
    rows = [
        (f"{name}, {case_name}", f"{extra['resting']:.3f}", f"{extra['peak']:.3f}")
        for case_name, case in data["cases"].items()
        for name, entry in case["contenders"].items()
        if (extra := entry["extra_memory_over_fp32_parameters"])
    ]
    return table(("extra memory / parameters in fp32", "at rest", "peak of an update"), rows)


def promises(entries: list[dict[str, Any]]) -> str:
    rows = [
        (entry["promise"], f"{entry['measured']:.3f}", "kept" if entry["holds"] else "**not kept**")
        for entry in entries
    ]
    return table(("promise", "measured", ""), rows)


def batchnorm_cost(data: dict[str, Any]) -> str:
    rows = [
        [name, *(spread(case[name]["over_limit"]) for case in data["cases"].values())]
        for name in next(iter(data["cases"].values()))
    ]
    return f"{data['settings']['model']}\n\n{table(('time / forward passes alone', *data['cases']), rows)}"


def offline(data: dict[str, Any]) -> str:
    rows = [
        (name, spread(case["over_limit"]), spread(case["over_polyak"]))
        for name, case in data["cases"].items()
    ]
    times = table(("time", "over the limit", "over polyak"), rows)
    peaks = [(name, f"{peak / 1e6:,.0f}") for name, peak in data["peak_anonymous_bytes"].items()]
    return f"{times}\n\n{table(('anonymous memory beyond the interpreter with torch', 'peak, MB'), peaks)}"


def spread(entry: dict[str, float]) -> str:
    width = entry["upper_quartile"] - entry["lower_quartile"]
    return f"{entry['median']:.2f} ({width:.2f})"


# Title, file, the command that makes it, and what to write.
SECTIONS: list[tuple[str, str, str, Callable[[dict[str, Any]], str]]] = [
    ("Does it help? Digits, BatchNorm", "demo_digits.json", "polyak demo", demo),
    ("Does it help? Text", "demo_text.json", "polyak demo --task text", demo),
    ("What an update costs", "update_cost.json", "python benchmarks/update_cost.py", update_cost),
    ("What averaging checkpoint files costs", "offline.json", "python benchmarks/offline.py", offline),
    ("What update_bn costs", "batchnorm_cost.json", "python benchmarks/batchnorm_cost.py", batchnorm_cost),
]


def document() -> str:
    """The whole of docs/results.md."""
    return INTRODUCTION + "".join(section(*entry) for entry in SECTIONS)


def section(title: str, file: str, command: str, write: Callable[[dict[str, Any]], str]) -> str:
    path = RESULTS / file
    if not path.exists():
        return f"\n## {title}\n\nNot measured yet: `{command}`.\n"
    data = json.loads(path.read_text())
    machine = data.get("environment", {}).get("processor")
    where = f", on {machine}, {data['environment']['torch_threads']} threads" if machine else ""
    return f"\n## {title}\n\n`{command}` (`{file}`{where}). {write(data)}\n"


if __name__ == "__main__":
    DOCUMENT.write_text(document())
