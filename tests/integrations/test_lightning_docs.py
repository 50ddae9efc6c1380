"""The code in the pages on Lightning and on GANs runs as it is pasted."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_runs import Gan, Net, batches
from pages import run

pytestmark = pytest.mark.filterwarnings("ignore")  # a logger that is not installed, few workers, few batches


class Model(Net):
    def validation_step(self, batch, index):
        self.log("val_loss", self(batch[0]).square().mean(), prog_bar=True)


def test_the_page_on_lightning(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    yours = run("lightning.md", Model=Model, loader=batches(), validation=batches())
    assert len(yours["recording"].trajectory.blocks) > 1
    assert "val_loss/decayed" in capsys.readouterr().out


def test_the_page_on_gans(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gan, loader = Gan(), batches()
    optimizers = gan.configure_optimizers()

    def step(index, sign):
        def take(real):
            optimizers[index].zero_grad()
            (sign * gan.critic(gan.generator(real[0])).square().mean()).backward()
            optimizers[index].step()

        return take

    yours = {"gan": gan, "module": Gan(), "loader": loader, "noise": torch.randn(2, 3)}
    yours |= {"generator_optimizer": optimizers[0], "generator_step": step(0, -1), "critic_step": step(1, 1)}
    images = run("gan.md", **yours)["images"]
    assert isinstance(gan.generator, nn.Module) and images.shape == (2, 2)
