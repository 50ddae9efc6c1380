"""What weights of either sign bring that are fitted by gradients, after how many passes, and what more training does.

    python benchmarks/fitted.py [--seeds 8] [--output benchmarks/results/fitted.json]

Runs of the demo's byte language model, at its constant rate and with the decay that was tuned for it on other seeds,
are recorded. At the end the weights of all blocks are fitted from the best average by validation, on validation or on
training examples, in batches as large as the training's: a pass forward and backward costs what a training step does.
Beside it stand runs that are as many steps longer, with what `select` chose of them. Test NLL, differences paired over
seeds. It took 20 minutes on two cores that were busy otherwise, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import harness
import polyak
from polyak.demo._study import Difference, Scoring, mean_and_error, paired_difference, train
from polyak.demo._tasks import TASKS, Examples

TASK = TASKS["text"]
DECAYS = {"constant rate": 0.0, "tuned decay": 0.45}
# Of fits, and how many steps longer a run is that is compared with one.
PASSES = (25, 100, 400)
EXAMPLES = VALIDATION, TRAINING = "validation examples", "training examples"


@dataclass(frozen=True)
class Job:
    """A training run of so many steps more than the task has; 0: weights are fitted at its end."""

    seed: int
    kind: str
    more_steps: int = 0


@dataclass(frozen=True)
class Outcome:
    """Test NLL of the last weights, of what was selected, and of fitted weights, by examples and passes."""

    job: Job
    live: float
    selected: float
    fitted: dict[str, dict[int, float]]


def run(job: Job) -> Outcome:
    """Train, record, choose, fit."""

    def look(
        trajectory: polyak.Trajectory, model: nn.Module, scoring: Scoring, selection: polyak.Selection
    ) -> Outcome:
        split = scoring.split
        averages = [one.profile for one in selection.table if one.profile is not None]
        start = next(profile for profile in averages if not isinstance(profile, polyak.Blend))

        def test(weights: dict[str, Tensor]) -> float:
            averaged = deepcopy(model)
            averaged.load_state_dict(weights)
            with torch.no_grad():
                return loss(averaged, split.test).item()

        def fitted(examples: Examples, passes: int) -> float:
            options: dict[str, Any] = {"start": start, "signed": True, "steps": passes}
            fit = polyak.fit(trajectory, model, batches_of(examples, job.seed), loss, **options)
            return test(trajectory.average(fit.profile))

        on = {} if job.more_steps else {VALIDATION: split.validation, TRAINING: split.train}
        return Outcome(
            job,
            live=test(trajectory.live()),
            selected=test(selection.weights() or trajectory.live()),
            fitted={name: {n: fitted(examples, n) for n in PASSES} for name, examples in on.items()},
        )

    task = replace(TASK, steps=TASK.steps + job.more_steps)
    found = train(
        task,
        job.seed,
        decay_fraction=DECAYS[job.kind],
        record=True,
        eval_steps=task.steps,
        look=look,
    )
    return found.seen


def batches_of(examples: Examples, seed: int) -> list[Examples]:
    """All examples once, in an order of their own."""
    order = torch.randperm(len(examples.targets), generator=torch.Generator().manual_seed(seed))
    return [examples[some] for some in order.split(TASK.batch_size)]


def loss(model: nn.Module, examples: Examples) -> Tensor:
    """NLL in nats per byte."""
    return cross_entropy(model(examples.inputs), examples.targets)


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """For each kind of run, over seeds: fitted weights and longer runs, minus what was selected."""
    found: dict[str, Any] = {}
    for kind in DECAYS:
        by_steps = {
            more: [o for o in outcomes if o.job.kind == kind and o.job.more_steps == more]
            for more in (0, *PASSES)
        }
        selected = [outcome.selected for outcome in by_steps[0]]
        found[kind] = {
            "live": mean_and_error([outcome.live for outcome in by_steps[0]]),
            "selected": mean_and_error(selected),
            "minus_selected": {
                **{
                    f"fitted on {name}": {
                        n: asdict(paired_difference([o.fitted[name][n] for o in by_steps[0]], selected))
                        for n in PASSES
                    }
                    for name in EXAMPLES
                },
                "more training": {
                    n: asdict(paired_difference([o.selected for o in by_steps[n]], selected)) for n in PASSES
                },
            },
        }
    return found


def table(found: dict[str, Any]) -> Table:
    """The differences for the eye."""
    shown = Table(
        title=f"Test NLL after {TASK.steps} steps, minus that of what was selected", box=box.SIMPLE_HEAD
    )
    for heading in ("run", "what", *(f"{n} passes" for n in PASSES)):
        shown.add_column(heading, justify="right" if "passes" in heading else "left", no_wrap=True)
    for kind, entry in found.items():
        for what, differences in entry["minus_selected"].items():
            cells = [Difference(**d) for d in differences.values()]
            shown.add_row(kind, what, *(f"{d.mean:+.4f} (p={d.p_value:.2g})" for d in cells))
    return shown


def jobs_of(seeds: int) -> Iterator[Job]:
    """All runs."""
    for seed in range(seeds):
        for kind in DECAYS:
            for more_steps in (0, *PASSES):
                yield Job(seed, kind, more_steps)


def main(arguments: list[str] | None = None) -> None:
    options = harness.study_parser(__doc__, seeds=8).parse_args(arguments)
    environment = harness.environment(("polyak", "scipy", "scikit-learn"))
    found = summary(harness.on_two_processes(run, list(jobs_of(options.seeds))))
    Console().print(table(found))
    if options.output is not None:
        record = {
            "benchmark": "fitted",
            "environment": environment,
            "settings": {
                "seeds": options.seeds,
                "steps": TASK.steps,
                "batch_size": TASK.batch_size,
                "decays": DECAYS,
            },
            "runs": found,
        }
        harness.write_json(options.output, record)


if __name__ == "__main__":
    main()
