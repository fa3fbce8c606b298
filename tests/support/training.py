"""Short trainings of a draft in this process, with callbacks that record losses or stop early."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from trainkit.drafters.lm import LMDraft
from trainkit.modules.callbacks import Checkpoints
from trainkit.modules.draft import DraftModule
from trainkit.modules.text_data import TextData


class StopAt(Callback):
    """Stops the training after optimiser step `step`."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, *args) -> None:
        trainer.should_stop |= trainer.global_step == self.step


class Losses(Callback):
    """Records the loss of every micro-batch in `values`."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, module, outputs, *args) -> None:
        self.values.append(float(outputs["loss"]))


def draft_module(target: Path, **more) -> DraftModule:
    """A module that trains a one-layer LM draft of `target` with AdamW; `more` replaces its arguments."""
    options = {"drafter": lambda shape: LMDraft(shape, num_layers=1), "optimizer": lambda p: torch.optim.AdamW(p, lr=3e-3)}
    return DraftModule(str(target), **(options | {"warmup_steps": 2} | more))


def text_data(chats: Path, cache: Path, **more) -> TextData:
    """Rows of 128 tokens, two per batch, a tenth for validation; `more` replaces these arguments."""
    return TextData(str(chats), cache=str(cache), **({"length": 128, "batch_size": 2, "validation_share": 0.1} | more))


def fit(module, data, root: Path, *callbacks, steps: int = 6, ckpt_path: Path | None = None, **more) -> Trainer:
    """Trains on the CPU from seed 3 and returns the trainer; checkpoints are in `root`, `more` replaces trainer options."""
    seed_everything(3, verbose=False)
    options = {
        "max_steps": steps,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "num_sanity_val_steps": 0,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "check_val_every_n_epoch": None,
        "val_check_interval": 1000,
        "default_root_dir": root,
        "callbacks": [Checkpoints(), *callbacks],
    }
    trainer = Trainer(**(options | more))
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return trainer
