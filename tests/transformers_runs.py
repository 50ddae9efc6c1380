"""A small model under the Trainer of transformers, which notes what it passes through and is evaluated with."""

from __future__ import annotations

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments


class Net(nn.Module):
    """Notes the weights that it is evaluated with; ``fail`` makes evaluations raise."""

    def __init__(self, norm=False):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4) if norm else nn.Tanh(), nn.Linear(4, 1))
        self.evaluated, self.fail = [], False

    def forward(self, x, labels=None):
        if not self.training:
            if self.fail:
                raise ValueError("evaluation failed")
            self.evaluated.append(weights(self))
        out = self.body(x)
        return {"loss": (out.squeeze(-1) - labels).square().mean(), "logits": out}


class Steps(TrainerCallback):
    def __init__(self):
        self.weights = []

    def on_step_end(self, args, state, control, *, model, **kwargs):
        self.weights.append(weights(model))


def weights(model):
    return model.body[0].weight.detach().clone()


def mean(samples):
    return torch.stack(samples).double().mean(0).float()


def rows():
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(3, generator=generator), "labels": torch.tensor(1.0)} for _ in range(16)]


def trainer_for(folder, model=None, **options):
    arguments = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "no", "max_steps": 12} | options
    args = TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **({"learning_rate": 0.05, "logging_strategy": "no", "per_device_eval_batch_size": 16} | arguments),
    )
    trainer = Trainer(model or Net(), args, train_dataset=rows(), eval_dataset=rows())
    trainer.add_callback(steps := Steps())
    return trainer, steps
