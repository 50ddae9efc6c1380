"""`update_bn` on two ranks: equal to one process that sees all the data, and never a hang."""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import polyak
from ranks import run_on_ranks

BATCHES = 9


def network(synchronised: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 2), nn.BatchNorm2d(3)
    )
    return nn.SyncBatchNorm.convert_sync_batchnorm(model) if synchronised else model


def batches() -> list[Tensor]:
    """Batches of unlike sizes, and sorted: what one rank sees is unlike what the other does."""
    x = torch.randn(90, 2, 6, 6, generator=torch.Generator().manual_seed(1))
    x = x[x.mean((1, 2, 3)).argsort()] + torch.linspace(-3, 3, 90).view(-1, 1, 1, 1)
    return list(x.split([16, 1, 13, 10, 12, 8, 15, 14, 1]))


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def statistics_of_uneven_shares() -> dict[str, dict[str, Tensor]]:
    """What each kind of model holds afterwards on this rank."""
    rank = torch.distributed.get_rank()
    shares = {"uneven": (batches()[:7], batches()[7:]), "one has none": ([], batches())}
    results = {}
    for name, share in shares.items():
        for passes in (1, 3):
            for kind in ("plain", "wrapped", "synchronised"):
                model = network(synchronised=kind == "synchronised")
                wrapped = nn.parallel.DistributedDataParallel(model) if kind == "wrapped" else model
                polyak.update_bn(share[rank], wrapped, passes=passes)
                results[f"{name}, {passes}, {kind}"] = buffers(model)
    return results


def outcomes_of_failures() -> dict[str, Any]:
    rank = torch.distributed.get_rank()

    def outcome(model: nn.Module, loader: Any, **options: Any) -> tuple[str, str, bool, float]:
        before, started = buffers(model), time.monotonic()
        try:
            polyak.update_bn(loader, model, **options)
            kind, message = "none", ""
        except BaseException as error:
            kind, message = type(error).__name__, str(error)
        after = buffers(model)
        unchanged = all(torch.equal(after[name], before[name]) for name in before)
        return kind, message, unchanged, time.monotonic() - started

    def breaking(error: BaseException):
        yield from batches()[:2]
        if rank == 1:
            raise error

    frozen = network()
    frozen[1].train(rank == 0)
    return {
        "error": outcome(network(), breaking(OSError("disk gone"))),
        "interrupt": outcome(network(True), breaking(KeyboardInterrupt())),
        "no data": outcome(network(), []),
        "frozen on one rank": outcome(frozen, batches()),
        "works after failures": outcome(network(), batches())[0],
    }


@pytest.fixture(scope="module")
def statistics() -> list[dict[str, dict[str, Tensor]]]:
    return run_on_ranks(statistics_of_uneven_shares)


@pytest.fixture(scope="module")
def failures() -> list[dict[str, Any]]:
    return run_on_ranks(outcomes_of_failures)


@pytest.mark.parametrize("share", ["uneven", "one has none"])
@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("kind", ["plain", "wrapped", "synchronised"])
def test_ranks_agree_with_one_process_that_sees_all(statistics, share, passes, kind):
    alone = network()
    polyak.update_bn(batches(), alone, passes=passes)
    first, second = (rank[f"{share}, {passes}, {kind}"] for rank in statistics)
    for name, expected in buffers(alone).items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], expected, rtol=1e-6, atol=1e-6, msg=name)
    assert first["1.num_batches_tracked"] == BATCHES


def test_the_first_layer_has_the_population_of_all_ranks(statistics):
    model = network().double()
    with torch.no_grad():
        reached = copy.deepcopy(model[0])(torch.cat(batches()).double())
    variance, mean = torch.var_mean(reached, (0, 2, 3), correction=0)
    found = statistics[0]["uneven, 1, plain"]
    torch.testing.assert_close(found["1.running_mean"].double(), mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["1.running_var"].double(), variance, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("case", "own"), [("error", "OSError"), ("interrupt", "KeyboardInterrupt")])
def test_a_failure_on_one_rank_is_told_to_the_other(failures, case, own):
    (kind, message, unchanged, seconds), (own_kind, _, own_unchanged, own_seconds) = (
        rank[case] for rank in failures
    )
    assert own_kind == own
    assert kind == "PolyakError" and "rank 1" in message and own in message
    assert unchanged and own_unchanged
    assert max(seconds, own_seconds) < 10


def test_no_data_on_any_rank(failures):
    assert all(rank["no data"][0] == "BatchError" and rank["no data"][2] for rank in failures)


def test_ranks_that_would_refresh_different_layers_are_refused(failures):
    kind, message, unchanged, _ = failures[0]["frozen on one rank"]
    assert kind == "StructureError" and "rank 1" in message and unchanged
    assert failures[1]["frozen on one rank"][0] == "StructureError"


def test_the_group_still_works_after_failures(failures):
    assert [rank["works after failures"] for rank in failures] == ["none", "none"]


def fail_on_the_second_rank() -> None:
    if torch.distributed.get_rank() == 1:
        raise ZeroDivisionError("as asked")
    torch.distributed.barrier()


def test_the_launcher_passes_a_failure_on():
    with pytest.raises(AssertionError, match="ZeroDivisionError: as asked"):
        run_on_ranks(fail_on_the_second_rank)
