"""Write docs/results.md from the JSON files in benchmarks/results: `python benchmarks/tables.py`.

Each section is one function of one file. A section whose file is not there says which command makes it. One more is
written into docs/choosing.md, between its two marks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from page_tables import difference, mean, off_by, plus_minus, table
from real_page import real_tasks

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = ROOT / "docs" / "results.md"
CHOOSING = ROOT / "docs" / "choosing.md"
QUANTISED, END = "<!-- benchmarks/tables.py: quantised -->\n", "<!-- end -->\n"

INTRODUCTION = """# Measured figures

Written by `python benchmarks/tables.py` from the JSON files in `benchmarks/results`; a test holds that the two agree.
Times are ratios within one run, each the median over rounds in rotated order with the interquartile range in brackets:
absolute times on shared machines mean little. A promise that was not kept is shown as such.
"""


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


def update_cost(data: dict[str, Any]) -> str:
    names = list(dict.fromkeys(name for case in data["cases"].values() for name in case["contenders"]))
    rows = [
        [name, *(cost(case["contenders"].get(name)) for case in data["cases"].values())] for name in names
    ]
    models = "; ".join(f"**{name}**: {case['model']}" for name, case in data["cases"].items())
    heading = ("time of one update / one flat `lerp_` over as many numbers", *data["cases"])
    parts = [f"{models}.", table(heading, rows), memory(data), promises(data["promises"])]
    if "overhead" in data:
        parts += [overhead(data["overhead"]), promises(data["overhead"]["promises"])]
    return "\n\n".join(parts)


def cost(entry: dict[str, Any] | None) -> str:
    return spread(entry["time_over_limit"]) if entry else ""


def overhead(data: dict[str, Any]) -> str:
    introduction = (
        f"Overhead, on {data['environment']['processor']}: an update of 1,200 fp32 tensors of one number each, on one "
        "thread, the fastest of 25 calls in a row. Arithmetic takes a microsecond of it; the rest is Python, and what "
        "torch does for each tensor, as in its own `_foreach_lerp_` on lists built once."
    )
    rows = [(name, spread(entry)) for name, entry in data["microseconds"].items()]
    return f"{introduction}\n\n{table(('one update', 'µs'), rows)}"


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


def accelerator(data: dict[str, Any]) -> str:
    rows = [
        (name, f"{entry['calls']}", f"{entry['passes']:.2f}", f"{entry['host_reads']}")
        for name, entry in data["counted"].items()
    ]
    heading = ("one update", "calls that launch", "passes over the fp32 bytes", "host reads")
    limit = "Counted on tensors without numbers; one `_foreach_lerp_`, which checks nothing, makes 1 call and 3 passes."
    return "\n\n".join((limit, table(heading, rows), measured_on_gpu(data)))


def measured_on_gpu(data: dict[str, Any]) -> str:
    if "device" not in data:
        return "Not measured on a GPU yet, so that nothing is known of times there."
    rows = [
        (
            f"{case}, {name}",
            f"{entry['microseconds']:.0f}",
            f"{entry['over_copy']:.2f}",
            f"{entry['host_microseconds']:.0f}",
            f"{entry['launches']}",
        )
        for case, measured in data["cases"].items()
        for name, entry in measured["contenders"].items()
    ]
    heading = ("one update", "µs", "over a copy of the fp32 bytes", "µs on the host", "launches")
    return f"Measured on {data['device']}:\n\n{table(heading, rows)}"


def batchnorm_cost(data: dict[str, Any]) -> str:
    rows = [
        [name, *(spread(case[name]["over_limit"]) for case in data["cases"].values())]
        for name in next(iter(data["cases"].values()))
    ]
    return f"{data['settings']['model']}\n\n{table(('time / forward passes alone', *data['cases']), rows)}"


def trajectory(data: dict[str, Any]) -> str:
    meanings = {
        "updates": "back-to-back updates, a block every 100 / those of an `Average`",
        "merging": "the same with a merge after every block",
        "training": "training the byte language model, a sample every 10 steps / without a recorder",
        "selection": "choosing among 40 profiles / 40 evaluations",
    }
    rows = [
        (
            meanings[name],
            spread(entry["ratio"]),
            f"at most {entry['aim']:g}",
            kept(entry["ratio"], entry["aim"]),
        )
        for name, entry in data["results"].items()
    ]
    what = "Of a recorder of ResNet-50's shapes, and of protocol C."
    return f"{what}\n\n{table(('time', 'ratio', 'aim', ''), rows)}"


def kept(ratio: dict[str, float], aim: float) -> str:
    return "kept" if ratio["median"] <= aim else "**not kept**"


def effect(data: dict[str, Any]) -> str:
    seeds = len(data["settings"]["seeds"])
    horizons, fit = data["any_horizon"], data["fit"]
    parts = [
        f"Protocol C: the demo's byte language model on {seeds} seeds that nothing was tuned on. Test NLL in nats "
        "per byte; profiles were chosen on validation; p-values are of paired t-tests over seeds.",
        *(
            bound(data["bound"])
            if "bound" in data
            else ["How far choosing comes to the linear bound: not measured yet."]
        ),
        f"**Any horizon from one run.** Averages selected along one recorded run at the constant rate "
        f"{horizons['constant_lr']:g}, against the decay (rate and share) tuned for each horizon on other seeds, at "
        f"{horizons['training_of_decayed_runs_over_recorded']:.2g} times the training of the one run. "
        f"Aim: {horizons['aim']}.",
        table(
            ("steps", "tuned rate, decay", "decayed", "selected", "difference"),
            [
                (
                    steps,
                    f"{row['tuned_lr']:g}, {row['tuned_decay']}",
                    mean(row["decayed"]),
                    mean(row["selected"]),
                    difference(row["selected_minus_decayed"]),
                )
                for steps, row in horizons["horizons"].items()
            ],
        ),
        f"**Fitted weights** (`polyak.fit`, {fit['extra_steps']} extra passes, {mean(fit['fitted'])}) against other "
        "uses of the run and of the same extra compute:",
        table(
            ("against", "test NLL", "fitted minus it"),
            [
                (name, mean(row["test"]), difference(row["fitted_minus_it"]))
                for name, row in fit["against"].items()
            ],
        ),
    ]
    return "\n\n".join(parts)


def bound(found: dict[str, Any]) -> list[str]:
    worse, tuned = found["significantly_worse_cells"], found["tuned_decay"]
    return [
        "**From the live weights to the linear bound.** The bound is the best signed combination of all blocks and the "
        "live weights for the test examples themselves, as 20 steps of L-BFGS find it: no average that was tried does "
        "better there, and nobody can find it without them. The way is the part of the distance to it that choosing "
        "covers; beside it what the same fit "
        f"gives that has seen the validation examples only. Aim: {found['aim']}; "
        f"{'met' if found['aim_met'] else 'not met'}: the least is {percent(found['least_way'])}, and cells in which "
        f"what was selected is significantly worse than the live weights: {', '.join(worse) or 'none'}.",
        table(
            (
                "rate, decay",
                "live",
                "best average",
                "selected",
                "minus live",
                "bound",
                "way",
                "fitted on validation",
            ),
            [
                (
                    name,
                    *(mean(cell[kind]) for kind in ("live", "average", "selected")),
                    difference(cell["selected_minus_live"]),
                    mean(cell["bound"]),
                    percent(cell["way"]),
                    mean(cell["fitted_on_validation"]),
                )
                for name, cell in {**found["cells"], "tuned decay": tuned}.items()
            ],
        ),
        "Why the bound lies so far off where the rate was decayed: validation and test are drawn from the same pages, "
        "which training never saw, so a fit with as many free weights as there are blocks learns those pages too. Nor "
        "is it cheap: up to 25 passes over 10,000 examples, about twice the training of the run; the last table of "
        "this section has what a tenth of the run in more training steps brings.",
        "**Blends**, which are among what was selected, against the best average alone, and how often one was chosen:",
        table(
            ("rate, decay", "selected minus best average", "live chosen", "an average", "a blend"),
            [
                (name, difference(cell["selected_minus_average"]), *kinds_chosen(cell["chosen"]))
                for name, cell in {**found["cells"], "tuned decay": tuned}.items()
            ],
        ),
    ]


def percent(share: float) -> str:
    """Whole per cent, of which none is negative."""
    return f"{round(share, 2) + 0.0:.0%}"


def kinds_chosen(names: Sequence[str]) -> tuple[str, str, str]:
    """How many of those that were chosen are live weights, averages and blends."""
    live = names.count("live")
    blends = sum(name.startswith("blend:") for name in names)
    return str(live), str(len(names) - live - blends), str(blends)


def no_harm(data: dict[str, Any]) -> str:
    cells = data["cells"]
    worse = [name for name, cell in cells.items() if cell["significantly_worse"]]
    seeds = next(iter(cells.values()))["best_minus_live"]["seeds"]
    rows = [
        (
            name,
            mean(cell["live"]),
            mean(cell["best"]),
            difference(cell["best_minus_live"]),
            f"{cell['chosen'].get('live', 0)} of {seeds}",
        )
        for name, cell in cells.items()
    ]
    heading = ("protocol, decay", "live", "selected", "difference", "live weights chosen")
    introduction = (
        f"Protocols A and B on {seeds} seeds, test NLL of the live weights and of what `select` chose by validation. "
        f"Significantly worse than the live weights: {', '.join(worse) or 'none'}."
    )
    return f"{introduction}\n\n{table(heading, rows)}"


def valley(data: dict[str, Any]) -> str:
    rows = []
    for task, found in data["tasks"].items():
        for examples in ("train", "test"):
            for size, rises in found[examples]["rises"].items():
                for rise in rises:
                    label = f"{task}, {examples}, {size}, {rise['radius']:g}"
                    means = (f"{rise[name][0]:.4f}" for name in ("live", "averaged"))
                    rows.append((label, *means, difference(rise["difference"])))
    heading = ("task, examples, directions, radius", "live", "averaged", "difference")
    lines = []
    for task, found in data["tasks"].items():
        for examples in ("train", "test"):
            best, barrier = (found[examples][key] for key in ("best_position", "barrier"))
            lines.append((f"{task}, {examples}", f"{min(best):g} to {max(best):g}", f"{max(barrier):.4f}"))
    line_heading = ("the line, task, examples", "positions of its best loss", "largest barrier")
    seeds = len(next(iter(data["tasks"].values()))["chosen"])
    return (
        f"Rise of the mean loss at a radius from the live weights and from the average that validation chose, over "
        f"{data['directions']} random filter-normalised directions and {seeds} seeds. *Own size*: directions scaled to "
        f"the filters of the weights they start from. *Same vectors*: scaled to those of the live weights for both, as "
        f"an average is shorter. Training examples keep their wrong labels.\n\n{table(heading, rows)}\n\n"
        f"Along the straight line the live weights are at 0 and the averaged ones at 1; a barrier is how much worse "
        f"the line is than its ends.\n\n{table(line_heading, lines)}"
    )


def fitted(data: dict[str, Any]) -> str:
    settings = data["settings"]
    steps, batch = settings["steps"], settings["batch_size"]
    rows = []
    for kind, found in data["runs"].items():
        for what, differences in found["minus_selected"].items():
            rows.append((f"{kind}: {what}", *(difference(entry) for entry in differences.values())))
    selected = [f"{kind}: {found['selected'][0]:.4f} selected" for kind, found in data["runs"].items()]
    passes = list(next(iter(data["runs"].values()))["minus_selected"]["more training"])
    return (
        f"The demo's byte language model on {settings['seeds']} seeds, {steps} steps of {batch} examples; test NLL in "
        "nats per byte, minus that of what `select` chose of the run. `fit(signed=True)` begins at the best average; a "
        f"pass is forward and backward on {batch} examples, as dear as a training step. *More training* is a run with "
        "as many steps more, and what `select` chose of it. What was selected has seen the validation examples, too. "
        f"{'; '.join(selected)}.\n\n"
        f"{table(('run', *(f'{n} passes or steps' for n in passes)), rows)}"
    )


def posterior(data: dict[str, Any]) -> str:
    rows = []
    for task, found in data["tasks"].items():
        for name, metrics in found["contenders"].items():
            nll, accuracy, error, surplus = (
                metrics[metric]["mean_and_error"]
                for metric in ("nll", "accuracy", "calibration_error", "overconfidence")
            )
            compared = metrics["nll"]["minus_average"]
            rows.append(
                (
                    f"{task}: {name}",
                    f"{nll[0]:.4f} ± {nll[1]:.4f}",
                    f"{100 * accuracy[0]:.2f}",
                    f"{100 * error[0]:.2f}",
                    f"{100 * surplus[0]:+.2f}",
                    "" if name == "average" else difference(compared),
                )
            )
    heading = (
        "task: prediction",
        "test NLL",
        "accuracy, %",
        "calibration error, %",
        "confidence minus accuracy, %",
        "NLL minus the average's",
    )
    tasks = data["tasks"].items()
    better = [
        task
        for task, found in tasks
        if (d := found["contenders"]["SWAG"]["nll"]["minus_average"])["mean"] < 0 and d["p_value"] < 0.05
    ]
    scales = "; ".join(
        f"{task} " + ", ".join(f"{scale} ({count})" for scale, count in found["scales"].items())
        for task, found in tasks
    )
    return (
        f"{data['draws']} draws of a SWAG of rank {data['rank']} around the average, of five blocks or more, that "
        f"validation chose, with a scale that validation chose of {', '.join(map(str, data['scales']))}. SWAG predicts "
        f"significantly better than the average on: {', '.join(better) or 'none of these tasks'}. Chosen scales, on so "
        f"many seeds: {scales}."
        f"\n\n{table(heading, rows)}"
    )


def preview(data: dict[str, Any]) -> str:
    settings, tuned, shares = data["settings"], data["tuned"], data["shares"]
    names = ("live", "ema", "preview", "decayed")
    losses = [
        (f"{share}, {found['steps']}", *(mean(found[name]) for name in names))
        for share, found in shares.items()
    ]
    differences = [
        (f"{share}, {found['steps']}", *map(off_by, found["minus_decayed"].values()))
        for share, found in shares.items()
    ]
    log = [
        (f"{entry['step']}", *(f"{entry[f'eval_loss{name}']:.4f}" for name in ("", "/average", "/decayed")))
        for entry in data["log"]
    ]
    half_lives = ", ".join(map(str, tuned["half_lives"].values()))
    return "\n\n".join(
        (
            f"The text task under the Trainer of transformers on {len(settings['seeds'])} seeds that nothing was tuned "
            f"on; test NLL in nats per byte. One run a seed at the constant rate {tuned['rate']:g} is recorded with "
            f'`preview="{settings["preview"]}"` and followed by EMAs. *Really decayed* are runs of their own that end '
            "at the step of their row, of the same seed, order of data and rate, which falls to zero over their last "
            f"{settings['decay_share']:.0%} ({tuned['shape']}); all of a row took the same number of steps. The rate, "
            f"out of {', '.join(f'{rate:g}' for rate in settings['rates'])}, the shape, linear or 1-sqrt (1 - √x "
            f"after the share x of the decay), and the EMA's half-lives ({half_lives} steps) had the best validation "
            f"on {len(settings['tuning_seeds'])} other seeds.",
            table(("share of the run, steps", "live", "EMA", "decayed now", "really decayed"), losses),
            "Minus the really decayed run, paired over seeds, ± standard error:",
            table(("share of the run, steps", "live", "EMA", "decayed now"), differences),
            worth_of_preview(shares),
            f"What the Trainer logged on the first seed (`eval_loss/average` is the EMA of half-life "
            f"{tuned['half_lives']['100%']}):",
            table(("step", *(f"`eval_loss{name}`" for name in ("", "/average", "/decayed"))), log),
        )
    )


def worth_of_preview(shares: dict[str, Any]) -> str:
    """The conclusion: how far off the preview is, beside what else is logged, and what of a gain it shows."""
    (begin, first), *_, (end, last) = shares.items()
    off = {
        name: [found["minus_decayed"][name]["mean"] for found in shares.values()]
        for name in first["minus_decayed"]
    }
    most = {name: max(map(abs, values)) for name, values in off.items()}
    signed = ", ".join(
        f"{value:+.4f} at {share}" for share, value in zip(shares, off["preview"], strict=True)
    )
    worst = max(
        abs(preview - decayed)
        for found in shares.values()
        for preview, decayed in zip(found["preview"], found["decayed"], strict=True)
    )
    shown, gained = (fmean(first[name]) - fmean(last[name]) for name in ("preview", "decayed"))
    return (
        "**What it is good for.** For an evaluation more the preview tells about what a decay now would come to, on "
        f"average {signed} of the steps and {worst:.4f} on the worst seed away from it, where the live weights are up "
        f"to {most['live']:.4f} away, and an EMA, its half-life tuned for each of these steps, {most['ema']:.4f}; "
        f"it shows {shown / gained:.0%} of what the decayed runs gained from {begin} to {end}: good for following a "
        "run at a constant rate and for deciding how long to train, not for telling apart settings that differ by "
        "less than it is off, as each may be off in its own way."
    )


def quantised(data: dict[str, Any]) -> str:
    settings, bits = data["settings"], data["bits"]
    decay = settings["decay"]
    names = list(bits["4"]["loss"])
    rows = [
        (width, *(mean(entry["loss"][name]) if name in entry["loss"] else "" for name in names))
        for width, entry in bits.items()
    ]
    rises = [
        (
            width,
            *(mean(entry["rise"][name]) for name in entry["rise"]),
            difference(entry["rise_minus_live"]),
            difference(entry["rise_minus_decayed"]),
            difference(entry["quantised_minus_unquantised_choice"]),
        )
        for width, entry in bits.items()
        if width != "32"
    ]
    heading = ("bits", *(f"rise, {name}" for name in bits["4"]["rise"]))
    return "\n\n".join(
        (
            f"`python benchmarks/quantised.py` (`quantised.json`): networks of two hidden layers on 8x8 digits, "
            f"{settings['seeds']} seeds, test loss; weights are rounded to the nearest level of each output channel. "
            "The average is that which validation chose unquantised, of a run at the constant rate "
            f"{settings['rate']:g}; the decayed run's rate, {decay['rate']:g}, falls to zero over its last "
            f"{decay['share']:.0%}, the best of {len(settings['tried'])} settings on {len(settings['tuning_seeds'])} "
            "other seeds.",
            table(("bits", *names), rows),
            "By how much the loss rises over that of the same weights unquantised, paired over seeds, and what it "
            "brings to choose the average quantised:",
            table(
                (
                    *heading,
                    "average's rise minus live's",
                    "minus the decayed run's",
                    "chosen quantised minus not",
                ),
                rises,
            ),
            worth_of_quantised(bits),
        )
    )


def worth_of_quantised(bits: dict[str, Any]) -> str:
    """In words: at which widths the average's loss rises less, or more, and where choosing quantised pays."""
    narrow = {width: entry for width, entry in bits.items() if width != "32"}

    def widths(comparison: str, sign: int) -> str:
        found = [
            width
            for width, entry in narrow.items()
            if entry[comparison]["p_value"] < 0.05 and entry[comparison]["mean"] * sign > 0
        ]
        return f"{' and '.join(found)} bits" if found else "no width"

    sentences = [
        f"its loss rises less than that of the {against} at {widths(name, -1)}, more at {widths(name, 1)}"
        for against, name in (("live weights", "rise_minus_live"), ("decayed run", "rise_minus_decayed"))
    ]
    choice = "quantised_minus_unquantised_choice"
    return (
        f"What is significant (p < 0.05): of an average that was chosen unquantised, {'; '.join(sentences)}. "
        f"Choosing quantised gives a lower loss at {widths(choice, -1)}, a higher one at {widths(choice, 1)}."
    )


def offline(data: dict[str, Any]) -> str:
    rows = [
        (name, spread(case["over_limit"]), spread(case["over_polyak"]))
        for name, case in data["cases"].items()
    ]
    times = table(("time", "over the limit", "over polyak"), rows)
    peaks = [(name, f"{peak / 1e6:,.0f}") for name, peak in data["peak_anonymous_bytes"].items()]
    settings = data["settings"]
    model = (
        f"{settings['inputs']} {settings['dtype']} checkpoints of {settings['elements'] / 1e6:.0f}M numbers."
    )
    memory = table(("anonymous memory beyond the interpreter with torch", "peak, MB"), peaks)
    plan = data["planning"]
    planning = (
        f"Planning a run of {plan['checkpoints']:,} checkpoints, {plan['tensors']} tensors and an optimizer's state in "
        f"each, takes {spread(plan['seconds'])} seconds."
    )
    return f"{model}\n\n{times}\n\n{memory}\n\n{planning}\n\n{promises(data['promises'])}"


def spread(entry: dict[str, float]) -> str:
    width = entry["upper_quartile"] - entry["lower_quartile"]
    return f"{entry['median']:.2f} ({width:.2f})"


def torture(data: dict[str, Any]) -> str:
    families = data["families"]
    kinds = ("cases", "right", "refused", "wrong")
    rows = [(title, *(f"{count.get(kind, 0):,}" for kind in kinds)) for title, count in families.items()]
    rows.append(("all", *(f"{sum(c.get(kind, 0) for c in families.values()):,}" for kind in kinds)))
    introduction = (
        f"Each case ends in the right result, or is refused in words that name the thing, with nothing half-written. "
        f"Seed {data['settings']['seed']}."
    )
    return f"{introduction}\n\n{table(('faults and abuse', *kinds), rows)}"


def mutation(data: dict[str, Any]) -> str:
    settings, modules = data["settings"], data["modules"]
    kinds = ("possible", "tried", "killed", "explained", "survived")
    rows = []
    for name, found in modules.items():
        least, most = found["interval"]
        counts = (f"{found[kind]:,}" for kind in kinds)
        rows.append((name, *counts, f"{found['score']:.1%}", f"{least:.1%} to {most:.1%}"))
    introduction = (
        f"Mutants of cosmic-ray {settings['cosmic_ray']}: an operator, a number, a condition, a decorator or a loop is "
        "changed, and a test must fail. Types and the text of messages are left alone, and at one place there are at "
        "most two mutants of a kind. Where not all were tried they are a random sample, seed "
        f"{settings['seed']}. The explained ones do what the original does: `benchmarks/mutants.toml` says why. "
        "The score is the part of the others that was killed; its interval of 95% is for all that are possible."
    )
    return f"{introduction}\n\n{table(('module', *kinds, 'score', 'interval'), rows)}"


# Title, file, the command that makes it, and what to write.
SECTIONS: list[tuple[str, str, str, Callable[[dict[str, Any]], str]]] = [
    ("Does it help? Digits, BatchNorm", "demo_digits.json", "polyak demo", demo),
    ("Does it help? Text", "demo_text.json", "polyak demo --task text", demo),
    ("What is choosing afterwards worth?", "effect.json", "python benchmarks/effect.py", effect),
    ("Does choosing ever do harm?", "no_harm.json", "python benchmarks/no_harm.py", no_harm),
    (
        "When does averaging pay? Two small real tasks",
        "real_tasks.json",
        "python benchmarks/real_tasks.py",
        real_tasks,
    ),
    ("What would it score if I decayed now?", "preview.json", "python benchmarks/preview.py", preview),
    ("Does the average lie wider?", "valley.json", "python benchmarks/valley.py", valley),
    ("What do fitted weights bring?", "fitted.json", "python benchmarks/fitted.py", fitted),
    ("Does SWAG add to the average?", "posterior.json", "python benchmarks/posterior.py", posterior),
    ("What recording and choosing cost", "trajectory.json", "python benchmarks/trajectory.py", trajectory),
    ("What an update costs", "update_cost.json", "python benchmarks/update_cost.py", update_cost),
    (
        "What an update costs on another processor",
        "update_cost_amd.json",
        "python benchmarks/update_cost.py",
        lambda data: (
            "The promises of the section above where memory is twice as fast, of an earlier version: its compiled "
            "loops ran on threads of their own, for which those of torch's last operation did not make way.\n\n"
            f"{promises([*data['promises'], *data['overhead']['promises']])}"
        ),
    ),
    (
        "What an update costs on an accelerator",
        "accelerator.json",
        "python benchmarks/accelerator.py --count",
        accelerator,
    ),
    ("What averaging checkpoint files costs", "offline.json", "python benchmarks/offline.py", offline),
    ("What update_bn costs", "batchnorm_cost.json", "python benchmarks/batchnorm_cost.py", batchnorm_cost),
    ("Does it hold under faults and abuse?", "torture.json", "make torture", torture),
    ("Do the tests see what is broken?", "mutation.json", "make mutants", mutation),
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
    threads = data["environment"]["torch_threads"] if machine else 0
    where = f", on {machine}, {threads} {'thread' if threads == 1 else 'threads'}" if machine else ""
    return f"\n## {title}\n\n`{command}` (`{file}`{where}). {write(data)}\n"


def choosing() -> str:
    """docs/choosing.md with the figures of quantised choices in their place."""
    before, _, rest = CHOOSING.read_text().partition(QUANTISED)
    after = rest.partition(END)[2]
    figures = quantised(json.loads((RESULTS / "quantised.json").read_text()))
    return f"{before}{QUANTISED}{figures}\n{END}{after}"


if __name__ == "__main__":
    DOCUMENT.write_text(document())
    CHOOSING.write_text(choosing())
