"""The arithmetic of the benchmarks of valleys and posteriors, on made-up outcomes."""

from importlib import import_module
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

pytestmark = pytest.mark.skipif(not BENCHMARKS.exists(), reason="benchmarks come with a checkout only")


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return import_module


def test_rises_are_paired_over_seeds(benchmark):
    valley = benchmark("valley")

    def seed(live, averaged):
        rises = {"live": [live] * 4, "averaged": [averaged] * 4}
        return valley.Around(
            {"live": 1.0, "averaged": 0.5}, dict.fromkeys(valley.SIZES, rises), [1.0], 0.9, 0.0
        )

    found = valley.over_seeds([seed(2.0, 1.0), seed(5.0, 4.5), seed(3.0, 1.5)])
    rise = found["rises"][valley.SAME][2]
    assert rise["radius"] == valley.RADII[2] and rise["difference"]["mean"] == pytest.approx(-1.0)
    assert rise["difference"]["seeds_lower"] == 3 and found["best_position"] == [0.9] * 3


def test_predictions_are_measured_and_compared_with_the_averages(benchmark):
    posterior = benchmark("posterior")
    examples = posterior.Examples(torch.zeros(4, 1), torch.tensor([0, 0, 1, 1]))
    sure = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9], [0.9, 0.1]])
    found = posterior.measure(sure, examples)
    assert found["accuracy"] == 0.75 and found["overconfidence"] == pytest.approx(0.15)
    assert found["nll"] == pytest.approx(-(3 * torch.tensor(0.9).log() + torch.tensor(0.1).log()).item() / 4)
    assert found["calibration_error"] == pytest.approx(0.15)

    def outcome(seed, swag):
        metrics = dict.fromkeys(posterior.METRICS, 1.0)
        return posterior.Outcome(
            posterior.Job("text", seed),
            "tail:0.5",
            0.1,
            {posterior.AVERAGE: metrics, posterior.POSTERIOR: metrics | {"nll": swag}},
        )

    summary = posterior.summary([outcome(0, 1.5), outcome(1, 2.5)])["text"]
    assert summary["contenders"][posterior.POSTERIOR]["nll"]["minus_average"]["mean"] == 1.0
    assert summary["scales"] == {"0.1": 2}


@pytest.mark.parametrize("name", ["valley", "posterior", "no_harm"])
def test_a_single_seed_is_refused(benchmark, name, capsys):
    with pytest.raises(SystemExit):
        benchmark(name).main(["--seeds", "1"])
    assert "at least 2" in capsys.readouterr().err
