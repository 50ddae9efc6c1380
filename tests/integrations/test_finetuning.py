"""Lightning's own gradual unfreezing, with an average and a recording that follow it."""

from __future__ import annotations

import copy

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint
from torch import nn

import polyak
from polyak.integrations.lightning import Averaging, Recording

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*(TensorBoard|LeafSpec|tree_|num_workers|is not empty|ckpt_path=)"),
]
STEPS_PER_EPOCH, EPOCHS = 4, 4


class Net(pl.LightningModule):
    def __init__(self, seen):
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.head, self.seen = nn.Sequential(nn.Linear(3, 4), nn.Tanh()), nn.Linear(4, 1), seen

    def training_step(self, batch, index):
        return self.head(self.backbone(batch[0])).square().mean()

    def on_train_batch_end(self, *_):
        self.seen.append({name: p.detach().double().clone() for name, p in self.named_parameters()})

    def configure_optimizers(self):
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.1)


class Unfreezing(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 2:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer, lr=0.05)


def fit(folder, seen, epochs, *callbacks, ckpt_path=None, order=1):
    data = torch.utils.data.TensorDataset(torch.linspace(-1, 1, 24 * STEPS_PER_EPOCH).view(-1, 3))
    followers = [Averaging("ema:half_life=6"), *callbacks]
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[*[Unfreezing(), *followers][::order], ModelCheckpoint(folder, save_last=True)],
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Net(seen), torch.utils.data.DataLoader(data, batch_size=8), ckpt_path=ckpt_path)
    return followers[0].average


def assert_is_mean(average, seen, scheme="ema:half_life=6"):
    weights = polyak.parse(scheme).weights(range(len(seen) + 1))
    assert set(average) == set(seen[0])
    for name, value in average.items():
        expected = sum(a * sample[name] for a, sample in zip(weights.tolist(), seen, strict=True))
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("order", [1, -1])
def test_a_backbone_that_is_unfrozen_is_averaged_from_then_on(tmp_path, order):
    seen = []
    recording = Recording(tmp_path / "run", block=2)
    average = fit(tmp_path, seen, EPOCHS, recording, order=order)
    assert torch.equal(seen[7]["backbone.0.weight"], seen[0]["backbone.0.weight"])
    assert not torch.equal(seen[8]["backbone.0.weight"], seen[7]["backbone.0.weight"])
    assert average.n_averaged == len(seen) == EPOCHS * STEPS_PER_EPOCH
    assert_is_mean(average.named_tensors(), seen)
    trajectory = polyak.Trajectory(tmp_path / "run")
    assert_is_mean(trajectory.average("uniform"), seen, "uniform")
    assert_is_mean(trajectory.average("tail:0.25"), seen[12:], "uniform")


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_it_resumes_before_at_and_after_the_unfreezing(tmp_path, stop):
    whole, cut = [], []
    expected = fit(tmp_path / "whole", whole, EPOCHS).named_tensors()
    fit(tmp_path / "cut", cut, stop)
    seen = copy.deepcopy(cut)
    average = fit(tmp_path / "cut", seen, EPOCHS, ckpt_path=tmp_path / "cut" / "last.ckpt")
    assert len(seen) == len(whole)
    assert_is_mean(average.named_tensors(), seen)
    if stop == 3:
        return  # Lightning itself does not train on bit for bit, as the optimizer's groups are made in another order
    assert all(torch.equal(value, expected[name]) for name, value in average.named_tensors().items())
