"""How far "what would it score if I decayed now?" is off, in the Trainer of transformers: the demo's text task.

    python benchmarks/preview.py [--seeds 8] [--output benchmarks/results/preview.json]

One run a seed at a constant learning rate is followed by EMAs and recorded, and every evaluation scores the live
weights, the EMAs and the preview. At 50, 75 and 100% of its steps the preview is compared with runs that really were
decayed there: of the same seed and order of data, with a rate that falls to zero over the last 40% of as many steps.
The rate, the shape of the decay and the half-lives are chosen by validation on other seeds; test losses are reported.
About 8 minutes on two idle cores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainingArguments

import harness
from polyak.demo._study import Difference, mean_and_error, paired_difference
from polyak.demo._tasks import TASKS, Examples
from polyak.integrations.transformers import Averaging, Recording

TASK = TASKS["text"]
PREVIEW, DECAY_SHARE = "decay:sqrt:0.4", 0.4
SHARES = (0.5, 0.75, 1.0)
EVALUATIONS = 8  # a run, so that the shares are among them
EVALUATED_AT_ONCE = 2500
LIVE, DECAYED_NOW = "eval_loss", "eval_loss/decayed"


@dataclass(frozen=True)
class Plan:
    """Every setting of the study. ``seeds`` report and ``tuning_seeds`` tune; counts are optimizer steps."""

    seeds: Sequence[int]
    tuning_seeds: Sequence[int] = (1000, 1001)
    rates: Sequence[float] = (3e-3, 6e-3, 9e-3, 12e-3)
    shapes: Sequence[str] = ("linear", "1-sqrt")
    half_lives: Sequence[int] = (50, 100, 200, 400)
    steps: int = TASK.steps

    @property
    def ends(self) -> dict[str, int]:
        """The steps at which the preview is compared, by their share of the run."""
        return {f"{share:.0%}": round(share * self.steps) for share in SHARES}


@dataclass(frozen=True)
class Job:
    """One training run of ``steps``, after the warm-up of one of ``full_steps``.

    Its rate is constant and it is followed by EMAs of ``half_lives``, the first as ``average``, and by a recording; or
    it falls over the last ``DECAY_SHARE`` in the shape ``decay``. Scored on validation data if ``tunes``, else on test.
    """

    seed: int
    rate: float
    steps: int
    full_steps: int
    decay: str | None = None
    half_lives: Sequence[int] = ()
    tunes: bool = False


@dataclass(frozen=True)
class Outcome:
    """What the Trainer logged of the evaluations: the step and, under their names, the losses in nats per byte."""

    job: Job
    log: list[dict[str, float]]

    def loss(self, name: str, step: int | None = None) -> float:
        """One of the losses after ``step``, by default the last."""
        return next(entry[name] for entry in reversed(self.log) if step in (None, entry["step"]))

    def ema(self, half_life: int, step: int) -> float:
        """That of an EMA."""
        first = self.job.half_lives[0] == half_life
        return self.loss(f"{LIVE}/{'average' if first else ema(half_life)}", step)


def ema(half_life: int) -> str:
    return f"ema:half_life={half_life}"


class Windows(Dataset[Examples]):
    """Examples for a Trainer, fetched as a list of one batch."""

    def __init__(self, examples: Examples):
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples.targets)

    def __getitems__(self, rows: list[int]) -> list[Examples]:
        return [self.examples[torch.tensor(rows)]]


def collate(batches: list[Examples]) -> dict[str, Tensor]:
    (batch,) = batches
    return {"inputs": batch.inputs, "labels": batch.targets}


class WithLoss(nn.Module):
    """The task's model as a Trainer calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = TASK.build_model()

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": cross_entropy(self.body(inputs), labels)}


def run(job: Job) -> Outcome:
    """Train on one thread; equal jobs give equal numbers on the same machine."""
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder, ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        trainer = trainer_for(job, folder)
        for place, half_life in enumerate(job.half_lives):
            Averaging(trainer, ema(half_life), validate="both", apply=place == 0)
        if job.decay is None:
            blocks = {"every": TASK.record_every, "block": TASK.block_steps, "keep_in_memory": "64MB"}
            Recording(trainer, f"{folder}/trajectory", preview=PREVIEW, **blocks)
        trainer.train()
    return Outcome(job, [evaluation(entry) for entry in trainer.state.log_history if LIVE in entry])


def trainer_for(job: Job, folder: str) -> Trainer:
    """A Trainer with a warm-up, a constant rate, and a decay if there is one."""
    torch.manual_seed(job.seed)
    model, split = WithLoss(), TASK.load(job.seed)
    optimizer = TASK.optimizer(model.parameters(), **{**TASK.optimizer_options, "lr": job.rate})
    decay = {"num_decay_steps": round(DECAY_SHARE * job.steps) if job.decay else 0}
    arguments = TrainingArguments(
        folder,
        max_steps=job.steps,
        per_device_train_batch_size=TASK.batch_size,
        per_device_eval_batch_size=EVALUATED_AT_ONCE,
        warmup_steps=job.full_steps * TASK.warmup_steps // TASK.steps,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={**decay, "decay_type": job.decay or "linear"},
        max_grad_norm=0.0,
        seed=job.seed,
        eval_strategy="steps",
        eval_steps=job.full_steps // EVALUATIONS,
        prediction_loss_only=True,
        logging_strategy="no",
        save_strategy="no",
        remove_unused_columns=False,
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
    )
    trainer = Trainer(
        model,
        arguments,
        data_collator=collate,
        train_dataset=Windows(split.train),
        eval_dataset=Windows(split.validation if job.tunes else split.test),
        optimizers=(optimizer, None),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def evaluation(entry: dict[str, Any]) -> dict[str, float]:
    """The losses among what was logged."""
    return {name: value for name, value in entry.items() if name == "step" or name.startswith(LIVE)}


RunAll = Callable[[Sequence[Job]], list[Outcome]]


def study(plan: Plan, run_all: RunAll) -> dict[str, Any]:
    """Tune on the tuning seeds; then the constant run and the really decayed ones of each seed."""
    tuned = tune(plan, run_all)
    half_lives = tuple(dict.fromkeys(reversed(tuned["half_lives"].values())))
    jobs = []
    for seed in plan.seeds:
        job = partial(Job, seed, tuned["rate"], full_steps=plan.steps)
        jobs.append(job(steps=plan.steps, half_lives=half_lives))
        jobs += [job(steps=end, decay=tuned["shape"]) for end in plan.ends.values()]
    return {"tuned": tuned, **summary(plan, tuned["half_lives"], run_all(jobs))}


def tune(plan: Plan, run_all: RunAll) -> dict[str, Any]:
    """The rate and the shape by which a decayed run ends best, and the best half-life at each end, at that rate."""
    job = partial(Job, steps=plan.steps, full_steps=plan.steps, tunes=True)
    settings = list(product(plan.rates, plan.shapes, plan.tuning_seeds))
    decayed = run_all([job(seed, rate, decay=shape) for rate, shape, seed in settings])
    found: dict[tuple[float, str], list[float]] = {}
    for (rate, shape, _), outcome in zip(settings, decayed, strict=True):
        found.setdefault((rate, shape), []).append(outcome.loss(LIVE))
    rate, shape = min(found, key=lambda setting: mean(found[setting]))
    followed = run_all([job(seed, rate, half_lives=plan.half_lives) for seed in plan.tuning_seeds])
    emas = {
        share: {half_life: mean([o.ema(half_life, end) for o in followed]) for half_life in plan.half_lives}
        for share, end in plan.ends.items()
    }
    return {
        "rate": rate,
        "shape": shape,
        "half_lives": {share: min(losses, key=losses.__getitem__) for share, losses in emas.items()},
        "validation": {f"{rate:g}, {shape}": mean(losses) for (rate, shape), losses in found.items()},
        "validation_of_half_lives": emas,
    }


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def summary(plan: Plan, half_lives: dict[str, int], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The losses at each share of the run, by seed, their paired differences, and what the Trainer logged first."""
    constant = [outcome for outcome in outcomes if outcome.job.decay is None]
    shares = {}
    for share, end in plan.ends.items():
        decayed = [o.loss(LIVE) for o in outcomes if o.job.decay is not None and o.job.steps == end]
        losses = {
            "live": [o.loss(LIVE, end) for o in constant],
            "ema": [o.ema(half_lives[share], end) for o in constant],
            "preview": [o.loss(DECAYED_NOW, end) for o in constant],
        }
        shares[share] = {
            "steps": end,
            "half_life": half_lives[share],
            **losses,
            "decayed": decayed,
            "minus_decayed": {
                name: asdict(paired_difference(values, decayed)) for name, values in losses.items()
            },
        }
    return {"shares": shares, "log": constant[0].log}


def table(shares: dict[str, Any]) -> Table:
    """The same for the eye."""
    names = ("live", "ema", "preview")
    shown = Table(title="Test NLL, and minus that of the decayed run", box=box.SIMPLE_HEAD)
    for heading in ("share of the run", *names, "decayed"):
        shown.add_column(heading, no_wrap=True)
    for share, found in shares.items():
        differences = [Difference(**found["minus_decayed"][name]) for name in names]
        means = [
            f"{mean(found[name]):.4f} ({d.mean:+.4f})" for name, d in zip(names, differences, strict=True)
        ]
        shown.add_row(share, *means, f"{mean_and_error(found['decayed'])[0]:.4f}")
    return shown


def main(arguments: list[str] | None = None) -> None:
    parser = harness.study_parser(__doc__, seeds=8)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # as each run has, which the record says
    environment = harness.environment(("polyak", "transformers", "accelerate", "scipy"))
    plan = Plan(range(options.seeds))
    found = study(plan, partial(harness.on_two_processes, run))
    Console().print(table(found["shares"]))
    if options.output is not None:
        settings = {
            "seeds": list(plan.seeds),
            "tuning_seeds": plan.tuning_seeds,
            "rates": plan.rates,
            "half_lives": plan.half_lives,
            "steps": plan.steps,
            "preview": PREVIEW,
            "decay_share": DECAY_SHARE,
        }
        record = {"benchmark": "preview", "environment": environment, "settings": settings, **found}
        harness.write_json(options.output, record)


if __name__ == "__main__":
    main()
