"""Small runs that are interrupted and compared."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import torch

STEPS = 30


def arguments(kind: str, target: Path, chats: Path, root: Path, **more) -> list[str]:
    """Accumulation, dropout or sampled losses, and a validation in mid-epoch; every step logged."""
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


def go_on(given: list[str], root: Path) -> list[str]:
    last = root / "checkpoints" / "last.ckpt"
    return [*given, "--ckpt_path", str(last)] if last.exists() else given


def log(root: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv without what a clock decides."""
    with (root / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k != "seconds" and not k.startswith("speed/")} for row in rows]


def lines(root: Path) -> int:
    path = root / "metrics.csv"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def weights(root: Path) -> dict[str, torch.Tensor]:
    return torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def same(root: Path, other: Path) -> None:
    assert log(root) == log(other)
    assert all(torch.equal(value, weights(other)[name]) for name, value in weights(root).items())
