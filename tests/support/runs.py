"""Small training runs that tests interrupt, resume and compare."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import torch

STEPS = 30


def arguments(kind: str, target: Path, chats: Path, root: Path, **more) -> list[str]:
    """Arguments of a run with accumulation, dropout or a sampled loss, and a validation within the epoch.

    Args:
        kind: `language` or `draft`, the module to train.
        target: Folder of the target, whose tokenizer is used.
        chats: File of training and validation rows.
        root: Run folder.
        more: Flags that are added or replaced; None removes a flag.
    """
    flags = {
        "data": "TextData",
        "data.train": chats,
        "data.validation": chats,
        "data.limit_validation": 8,
        "data.length": 96,
        "data.batch_size": 2,
        "data.cache": root.parent / "cache",
        "data.tokenizer": target,
        "trainer.default_root_dir": root,
        "trainer.max_steps": STEPS,
        "trainer.accumulate_grad_batches": 2,
        "trainer.log_every_n_steps": 3,
        "trainer.val_check_interval": 22,
        "trainer.enable_progress_bar": "false",
        "trainer.accelerator": "cpu",
        "checkpoint.every_n_steps": 4,
        "seed_everything": 5,
    }
    if kind == "language":
        config = {
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 128,
            "attention_dropout": 0.2,
        }
        flags |= {"model": "LanguageModule", "model.config": json.dumps(config)}
    else:
        flags |= {
            "model": "DraftModule",
            "model.target": target,
            "model.drafter": "LMDraft",
            "checkpoint.monitor": "val/alpha",
            "model.divergence": "TVDpp",
            "model.divergence.estimator": "sampled",
            "model.divergence.samples": 2,
            "model.divergence.normalise": "batch",
        }
    given = {name: value for name, value in (flags | more).items() if value is not None}
    return [str(part) for name, value in given.items() for part in (f"--{name}", value)]


def resumed(given: list[str], root: Path) -> list[str]:
    """The arguments with the checkpoint of `root` to resume from, where there is one."""
    last = root / "checkpoints" / "last.ckpt"
    return [*given, "--ckpt_path", str(last)] if last.exists() else given


def log(root: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv without times and speeds."""
    with (root / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k != "seconds" and not k.startswith("speed/")} for row in rows]


def lines(root: Path) -> int:
    """Number of lines in metrics.csv, 0 before it exists."""
    path = root / "metrics.csv"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def weights(root: Path) -> dict[str, torch.Tensor]:
    return torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def check_equal(root: Path, other: Path) -> None:
    """Asserts equal logs and, bit for bit, equal weights of two runs."""
    assert log(root) == log(other)
    assert all(torch.equal(value, weights(other)[name]) for name, value in weights(root).items())
