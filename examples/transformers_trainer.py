"""EMA under the Trainer of transformers, in one line beside the training code.

    python examples/transformers_trainer.py [FOLDER]

A small GPT-2 learns the bytes of a text that comes with Python, at a constant learning rate. Evaluations see the
averaged weights, and the model that is saved in FOLDER has them.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from pydoc_data import topics

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

import polyak
from polyak.integrations.transformers import Averaging

CONTEXT = 32
N_TRAINING, N_EVALUATION = 1000, 300  # windows of CONTEXT bytes


def windows() -> tuple[list[dict[str, torch.Tensor]], list[dict[str, torch.Tensor]]]:
    """Windows to train on, and those that follow in the text to evaluate on."""
    text = "".join(topics.topics.values()).encode()[: CONTEXT * (N_TRAINING + N_EVALUATION)]
    examples = [{"input_ids": window, "labels": window} for window in torch.tensor([*text]).split(CONTEXT)]
    return examples[:N_TRAINING], examples[N_TRAINING:]


def make_trainer(folder: Path) -> Trainer:
    set_seed(0)
    training, evaluation = windows()
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=256,
            n_positions=CONTEXT,
            n_embd=32,
            n_layer=2,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    arguments = TrainingArguments(
        str(folder),
        num_train_epochs=4,
        per_device_train_batch_size=8,
        learning_rate=2e-2,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    return Trainer(model, arguments, train_dataset=training, eval_dataset=evaluation)


def main(folder: Path) -> None:
    live = make_trainer(folder)
    live.train()
    print(f"loss of the live weights     {live.evaluate()['eval_loss']:.4f}")

    averaged = make_trainer(folder)
    Averaging(averaged, polyak.EMA(half_life=30))
    averaged.train()
    print(f"loss of the averaged weights {averaged.evaluate()['eval_loss']:.4f}")
    averaged.save_model(str(folder / "averaged"))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
