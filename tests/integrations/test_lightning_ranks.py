"""Averages and recordings in Lightning on two ranks: DDP, and FSDP2 by ModelParallelStrategy, on CPU."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import polyak
from polyak import checkpoints
from polyak.errors import StructureError
from polyak.integrations.lightning import Averaging, Recording
from ranks import run_on_ranks

pytestmark = pytest.mark.slow

ROWS, BATCH = 32, 4  # 4 steps an epoch on each of two ranks


class Net(pl.LightningModule):
    """Shards itself where it is told to; remembers its whole weights after each step."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
        self.stepped = []

    def configure_model(self):
        if self.device_mesh is not None and not isinstance(self.body[0].weight, DTensor):
            fully_shard(self.body, mesh=self.device_mesh["data_parallel"])

    def forward(self, x):
        return self.body(x)

    def training_step(self, batch, index):
        return self(batch[0]).square().mean()

    def on_train_batch_end(self, *_):
        self.stepped.append(whole(self))

    def validation_step(self, batch, index):
        self.log("val_loss", self(batch[0]).square().mean(), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def whole(model):
    weight = model.body[0].weight.detach()
    return (weight.full_tensor() if isinstance(weight, DTensor) else weight).clone()


def data():
    torch.manual_seed(1)
    dataset = torch.utils.data.TensorDataset(torch.randn(ROWS, 4))
    return torch.utils.data.DataLoader(dataset, batch_size=BATCH)


def train(folder, strategy, *callbacks, epochs=2, ckpt_path=None):
    """On the ranks that ``run_on_ranks`` started, which Lightning takes for its own."""
    warnings.simplefilter("ignore")
    size = dist.get_world_size()
    os.environ |= {"LOCAL_RANK": str(dist.get_rank()), "WORLD_SIZE": str(size), "NODE_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    if strategy == "fsdp2":
        strategy = ModelParallelStrategy(data_parallel_size=size, tensor_parallel_size=1)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=size,
        strategy=strategy,
        max_epochs=epochs,
        callbacks=list(callbacks),
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
    )
    model = Net()
    trainer.fit(model, data(), data(), ckpt_path=ckpt_path)
    return model, trainer


def followers(folder, name):
    averaging = Averaging("ema:half_life=3", start_epoch=1, validate="both")
    follows = Averaging("uniform", every_epochs=1, apply=False)
    return averaging, follows, Recording(folder / name, block=6, preview="decay:sqrt:0.5")


def run_both(folder):
    return {strategy: run(Path(folder) / strategy, strategy) for strategy in ("ddp", "fsdp2")}


def run(folder, strategy):
    """A run of four epochs, and the same run resumed after two; what each rank knows of them."""
    saving = ModelCheckpoint(folder, filename="at", save_on_train_epoch_end=False)
    averaging, follows, recording = followers(folder, "whole")
    model, trainer = train(folder, strategy, averaging, follows, recording, epochs=4)
    train(folder, strategy, *followers(folder, "half"), saving, epochs=2)
    again = followers(folder, "half")
    resumed, _ = train(folder, strategy, *again, epochs=4, ckpt_path=folder / "at.ckpt")
    dist.barrier()  # the first rank has written what it recorded
    return {
        "stepped": model.stepped,
        "final": whole(model),
        "metrics": {name: value.item() for name, value in trainer.callback_metrics.items()},
        "n_averaged": [callback.average.n_averaged for callback in (averaging, follows)],
        "recorded": polyak.Trajectory(folder / "whole").average("uniform")["body.0.weight"],
        "resumed stepped": resumed.stepped,
        "resumed final": whole(resumed),
        "resumed n_averaged": [callback.average.n_averaged for callback in again[:2]],
        "resumed recorded": polyak.Trajectory(folder / "half").average("uniform")["body.0.weight"],
        "sharded": isinstance(model.body[0].weight, DTensor),
    }


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return folder, run_on_ranks(run_both, str(folder), timeout_seconds=180)


@pytest.fixture(params=["ddp", "fsdp2"])
def ranks(request, both):
    folder, found = both
    return request.param, folder / request.param, [rank[request.param] for rank in found]


def test_averages_follow_validate_and_end_alike_on_all_ranks(ranks):
    strategy, _, found = ranks
    for rank in found:
        assert rank["sharded"] is (strategy == "fsdp2")
        assert rank["n_averaged"] == [12, 4]
        shares = torch.from_numpy(polyak.EMA(half_life=3).weights(range(13))).float()
        expected = torch.einsum("n,nij->ij", shares, torch.stack(rank["stepped"][4:]))
        torch.testing.assert_close(rank["final"], expected)
        assert rank["metrics"].keys() == {"val_loss", "val_loss/average", "val_loss/decayed"}
        assert len(set(rank["metrics"].values())) == 3
        assert rank["metrics"] == found[0]["metrics"]
        torch.testing.assert_close(rank["recorded"], torch.stack(rank["stepped"]).mean(0))


def test_they_are_resumed_as_if_never_stopped(ranks):
    for rank in ranks[2]:
        assert all(map(torch.equal, rank["resumed stepped"], rank["stepped"][8:]))
        assert torch.equal(rank["resumed final"], rank["final"])
        assert rank["resumed n_averaged"] == rank["n_averaged"]
        assert torch.equal(rank["resumed recorded"], rank["recorded"])


def test_a_checkpoint_of_a_sharded_model_is_the_average_beside_the_live_weights(ranks):
    strategy, folder, found = ranks
    if strategy == "ddp":
        saved = torch.load(folder / "at.ckpt", weights_only=True)
        average, live = saved["state_dict"], saved["current_model_state"]
    else:
        with checkpoints.open(folder / "at.ckpt", key="state_dict") as opened:
            average = {"body.0.weight": opened.read("body.0.weight")}
            live = {"body.0.weight": opened.read("current_model_state.body.0.weight")}
    shares = torch.from_numpy(polyak.EMA(half_life=3).weights(range(5))).float()
    stepped = found[0]["stepped"]
    torch.testing.assert_close(
        average["body.0.weight"], torch.einsum("n,nij->ij", shares, torch.stack(stepped[4:8]))
    )
    assert torch.equal(live["body.0.weight"], stepped[7])


def on_one_rank(folder):
    folder = Path(folder)
    averaging, follows, _ = followers(folder, "one")
    model, _ = train(folder, "fsdp2", averaging, follows, epochs=2, ckpt_path=folder / "at.ckpt")
    strategy = ModelParallelStrategy(1, 1, save_distributed_checkpoint=False)
    with pytest.raises(StructureError, match="save_distributed_checkpoint=True"):
        train(folder, strategy, Averaging("uniform"))
    return whole(model), model.stepped, averaging.average.n_averaged


@pytest.mark.slow
def test_a_sharded_run_goes_on_on_another_number_of_ranks(both):
    folder = both[0] / "fsdp2"
    ((final, stepped, n_averaged),) = run_on_ranks(on_one_rank, str(folder), ranks=1)
    stepped = both[1][0]["fsdp2"]["stepped"][4:8] + stepped  # one rank has more batches to go in the epoch
    shares = torch.from_numpy(polyak.EMA(half_life=3).weights(range(len(stepped) + 1))).float()
    assert n_averaged == len(stepped) == 8
    torch.testing.assert_close(final, torch.einsum("n,nij->ij", shares, torch.stack(stepped)))
