from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest

from polyak.demo._study import Curve, Study
from polyak.demo._tasks import CHOSEN, LIVE, TASKS, AverageSpec, Task
from polyak.profiles import EMA, Uniform


@pytest.fixture(scope="session")
def tiny_digits() -> Task:
    """The digits task, two epochs long."""
    return replace(
        TASKS["digits"],
        steps=40,
        eval_steps=10,
        block_steps=5,
        averages={
            "SWA, no update_bn": AverageSpec(Uniform(), start=20, every=5),
            "SWA + update_bn": AverageSpec(Uniform(), start=20, every=5, update_bn=True),
            "EMA + update_bn": AverageSpec(EMA(half_life=5), update_bn=True),
        },
        decay_fractions=(0.5, 1.0),
        tuning_seeds=(1000,),
    )


@pytest.fixture(scope="session")
def made_up_study() -> Callable[..., Study]:
    """A digits study whose end-of-run test scores are given, by candidate and then by seed."""

    def build(
        nll: Mapping[str, list[float]],
        accuracy: Mapping[str, list[float]] = {},
        live_validation_nll: tuple[float, ...] = (0.5, 0.4),
    ) -> Study:
        def curve(label: str, seed: int) -> Curve:
            end_nll = nll.get(label, nll[LIVE])[seed]
            end_accuracy = accuracy[label][seed] if label in accuracy else 0.9
            points = len(live_validation_nll)
            return Curve(
                steps=[800 * (point + 1) // points for point in range(points)],
                validation_nll=list(live_validation_nll),
                validation_accuracy=[0.9] * points,
                test_nll=[*(end_nll + points - 1 - point for point in range(points - 1)), end_nll],
                test_accuracy=[*[0.5] * (points - 1), end_accuracy],
            )

        task = TASKS["digits"]
        labels = [LIVE, "decay, last 40%", *task.averages, CHOSEN]
        seeds = range(len(nll[LIVE]))
        check = {"best_score": 0.3, "baseline_score": 0.4, "difference": -0.1, "low": -0.2, "high": -0.05}
        found = {"best": "tail:0.5", "holdout": check, "candidates": [{}] * 30, "verdict": "tail:0.5 is best"}
        return Study(
            task,
            tuning_nll={0.1: [0.5, 0.6], 0.4: [0.4, 0.6], 1.0: [0.9, 0.1 + 0.8]},
            curves={seed: {label: curve(label, seed) for label in labels} for seed in seeds},
            selections={
                seed: found if seed else {**found, "best": "live", "holdout": None} for seed in seeds
            },
            first_selection="candidate  score",
        )

    return build
