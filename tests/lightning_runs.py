"""A small LightningModule that remembers its weights, and runs of it."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import nn

QUIET = [
    "ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning",
    "ignore:.*(TensorBoard|LeafSpec|tree_|num_workers|is not empty|ckpt_path=|callbacks used to create)",
]


class Net(pl.LightningModule):
    def __init__(self, norm=False, fail_in_validation=False):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4) if norm else nn.Tanh(), nn.Linear(4, 1))
        self.fail_in_validation = fail_in_validation
        self.stepped, self.validated, self.losses = [], [], []

    def forward(self, x):
        return self.body(x)

    def training_step(self, batch, index):
        loss = self(batch[0]).square().mean()
        self.losses.append(loss.item())
        return loss

    def on_train_batch_end(self, *_):
        self.stepped.append(weights(self))

    def validation_step(self, batch, index):
        if self.fail_in_validation and not self.trainer.sanity_checking:
            raise RuntimeError("validation failed")
        self.validated.append(weights(self))
        self.log("loss", self(batch[0]).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Gan(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.critic = nn.Linear(3, 2), nn.Linear(2, 1)
        self.stepped = []

    def training_step(self, batch, index):
        generator, critic = self.optimizers()
        for optimizer, sign, times in ((critic, 1, 2), (generator, -1, 1)):
            for _ in range(times):
                loss = sign * self.critic(self.generator(batch[0])).square().mean()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
        self.stepped.append(self.generator.weight.detach().clone())

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.generator, self.critic)]


def weights(model):
    return model.body[0].weight.detach().clone()


def batches():
    torch.manual_seed(1)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(32, 3)), batch_size=8)


def trainer(folder, *callbacks, epochs=3, **options):
    defaults = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in callbacks),
    }
    return pl.Trainer(
        max_epochs=epochs, callbacks=list(callbacks), default_root_dir=folder, **(defaults | options)
    )


def fit(folder, *callbacks, model=None, ckpt_path=None, **options):
    model = model or Net()
    run = trainer(folder, *callbacks, **options)
    run.fit(model, batches(), batches(), ckpt_path=ckpt_path)
    return model, run


def mean(samples):
    return torch.stack(samples).double().mean(0).float()
