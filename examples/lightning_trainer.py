"""SWA with BatchNorm in Lightning, in one line beside the training code.

    python examples/lightning_trainer.py [FOLDER]

A constant learning rate on noisy labels, where averaging helps. Validation sees the averaged weights with BatchNorm
statistics of their own, the best checkpoint in FOLDER holds them, and the model ends with them.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

import polyak
from polyak.integrations.lightning import Averaging


class Regression(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs).squeeze(-1)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.log("loss", mse_loss(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def batches(count: int, noise: float, *, shuffle: bool = False) -> DataLoader:
    inputs = torch.randn(count, 20)
    targets = inputs[:, :5].sum(1).tanh() + noise * torch.randn(count)
    return DataLoader(TensorDataset(inputs, targets), batch_size=32, shuffle=shuffle)


def final_loss(training: DataLoader, validation: DataLoader, folder: Path, *callbacks: pl.Callback) -> float:
    """Train, and return the loss of the model that training ends with."""
    pl.seed_everything(0, verbose=False)
    model = Regression()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=8,
        callbacks=list(callbacks),
        default_root_dir=folder,
        enable_checkpointing=bool(callbacks),
        enable_model_summary=False,
        enable_progress_bar=False,
        logger=False,
    )
    trainer.fit(model, training, validation)
    return trainer.validate(model, validation, verbose=False)[0]["loss"]


def main(folder: Path) -> None:
    torch.manual_seed(0)
    data = batches(2048, noise=1.0, shuffle=True), batches(2048, noise=0.0)
    swa = Averaging(polyak.Uniform(), start=128, recalibrate=data[0])
    best = ModelCheckpoint(folder, monitor="loss", filename="best")
    print(f"loss of the live weights     {final_loss(*data, folder):.4f}")
    print(f"loss of the averaged weights {final_loss(*data, folder, swa, best):.4f}")
    print(f"the best checkpoint's        {best.best_model_score:.4f}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
