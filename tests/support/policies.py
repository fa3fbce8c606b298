"""Small RL runs for tests: reward functions, prompts, and arguments of `trainkit fit`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def odd_share(completion_ids, **columns) -> list[float]:
    """Share of odd token ids in a response, which a few steps raise."""
    return [sum(token % 2 for token in tokens) / len(tokens) for tokens in completion_ids]


def first_odd(completion_ids, **columns) -> list[float]:
    """1 if the first token id is odd, so groups of a few responses often have equal rewards."""
    return [float(tokens[0] % 2) for tokens in completion_ids]


def fails_on(number, completion_ids, **columns) -> list[float]:
    """As `first_odd`, but raises in every call with the prompt number 3."""
    if 3 in number:
        raise RuntimeError("cannot score prompt 3")
    return first_odd(completion_ids)


def never(completion_ids, **columns) -> list[None]:
    """No reward for any response."""
    return [None] * len(completion_ids)


def fails_at_first(completion_ids, trainer_state, log_metric) -> list[float]:
    """As `odd_share`, but raises in the first generation; logs the number of responses."""
    if trainer_state.global_step == 0:
        raise RuntimeError("no connection yet")
    log_metric("seen", len(completion_ids))
    return odd_share(completion_ids)


def progress(completion_ids, trainer_state, log_metric) -> list[float]:
    """The share of training that is done, as a curriculum for TRL's trainer reads it; logs the step."""
    log_metric("step", trainer_state.global_step)
    return [trainer_state.global_step / trainer_state.max_steps + n % 2 for n in range(len(completion_ids))]


def write_prompts(path: Path, count: int = 24) -> Path:
    """A JSONL file of short questions with a column `number`."""
    path.write_text("".join(json.dumps({"prompt": f"{n} + {n % 7}?", "number": n}) + "\n" for n in range(count)))
    return path


def arguments(target: Path, prompts: Path, root: Path, **more: Any) -> list[str]:
    """Arguments of a run of 8 steps, two per generation of 8 groups of 4 responses; None in `more` removes a flag."""
    flags = {
        "model": "PolicyModule",
        "model.target": target,
        "model.algorithm": "GRPO",
        "model.rewards": json.dumps([{"function": "tests.support.policies:odd_share"}]),
        "model.samples": 4,
        "model.prompts": 8,
        "model.max_new_tokens": 10,
        "model.optimizer": "torch.optim.AdamW",
        "model.optimizer.lr": 3e-3,
        "data": "PromptData",
        "data.train": prompts,
        "trainer.default_root_dir": root,
        "trainer.max_steps": 8,
        "trainer.log_every_n_steps": 1,
        "trainer.enable_progress_bar": "false",
        "trainer.accelerator": "cpu",
        "checkpoint.monitor": "val/reward",
        "checkpoint.mode": "max",
        "seed_everything": 5,
    }
    given = {name: value for name, value in (flags | more).items() if value is not None}
    return [str(part) for name, value in given.items() for part in (f"--{name}", value)]


def weights_apart(module: Any, other: Any) -> float:
    """Largest difference between the trained weights of two modules."""
    pairs = zip(module.parameters(), other.parameters(), strict=True)
    return max(float((ours - theirs).abs().max()) for ours, theirs in pairs)
