"""`trainkit infalign`: writes the reference policy's rewards on the training prompts, for the reward transform InfAlign."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trainkit import bundle
from trainkit.commands.distill import check_lengths
from trainkit.data.manifest import weights_digest
from trainkit.data.sets.writer import check_positive, local_device, quiet_libraries
from trainkit.data.text.chat_template import Encoder, load_tokenizer
from trainkit.data.text.sources import content_hash
from trainkit.errors import UserError
from trainkit.models.load import read_config
from trainkit.rl.infalign import calibrate
from trainkit.rl.rewards.score import Rewards
from trainkit.rl.rollout import Rollouts
from trainkit.rl.tasks import GYM, read_tasks
from trainkit.runner.engine import Runner


def infalign(
    out: Path,
    *,
    target: str,
    prompts: str,
    reward: list[str],
    samples: int = 16,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    seed: int = 0,
    limit: int | None = None,
    columns: dict[str, str] | None = None,
    drafter: str | None = None,
    batch: int = 32,
    device: str = "auto",
    dtype: str = "float32",
) -> str:
    """Samples responses of a model before its RL fine-tune, scores them, and writes the rewards of each prompt to a table.

    PolicyModule then trains with `transform: {class_path: InfAlign, init_args: {calibration: OUT}}`. Give the target, prompts,
    rewards, temperature and length of that training. After a kill or an interrupt, the same command continues where it stopped;
    with a larger --limit it continues too. A drafter makes it faster and does not change the rewards.

    Examples:
        trainkit infalign calibration.json --target models/target --prompts train.jsonl --reward style.py:grade --samples 32
        trainkit infalign OUT --target DIR --prompts FILE --reward numeric --reward '{"function": "repetition", "weight": 0.5}'

    Args:
        out: File of the table.
        target: Hugging Face folder of the policy before training, which is the reference.
        prompts: The training data: file, folder or hub name, or `reasoning_gym:NAME?KEY=VALUE`.
        reward: Reward function, repeated for several: a name, or a JSON object as in a recipe's `rewards`.
        samples: Responses to each prompt; quantiles have a resolution of 1 / samples.
        max_new_tokens: Largest number of tokens in a response, the end token included.
        temperature: Sampling temperature.
        seed: Seed for sampling. Training draws other responses with the same seed.
        limit: Number of prompts to use, from the beginning; all by default.
        columns: Column mapping, from trainkit's names to the file's.
        drafter: Drafter bundle, or a plain folder of a small model with the same tokenizer.
        batch: Responses decoded at the same time.
        device: Torch device; `auto` uses a GPU if there is one.
        dtype: float32, bfloat16 or float16.
    """
    check_positive(samples=samples, max_new_tokens=max_new_tokens, batch=batch, limit=limit)
    specs = [_spec(text) for text in reward]
    rewards = Rewards(specs)
    quiet_libraries()
    read_config(target)  # first, since a missing folder would be taken for a tokenizer's name on the hub
    # Read the prompts, and load the policy.
    tasks = read_tasks(prompts, Encoder(load_tokenizer(target), target), limit, columns)
    rewards.check(tasks)
    room = max(len(task.tokens) for task in tasks) + max_new_tokens
    check_lengths(target, [len(task.tokens) for task in tasks], room)
    runner = Runner.load(target, drafter, local_device(device), dtype, batch, room)
    rollouts = Rollouts(runner, samples, max_new_tokens, temperature, seed, "off" if drafter is None else "on")
    # Sample and score.
    settings = {
        "target": bundle.fingerprint(target),
        "weights": weights_digest(target),
        "dtype": dtype,
        "prompts": prompts if prompts.startswith(GYM) else content_hash(prompts),
        "columns": columns,
        "rewards": specs,
        "samples": samples,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
    }
    table = calibrate(rollouts, rewards, tasks, out, settings)
    # Summarise.
    known = [table.rewards[task.index] for task in tasks]
    values = [value for row in known for value in row]
    if not values:
        raise UserError(f"{out}: no response has a reward, because the functions failed or returned None; fix them")
    missing = len(tasks) * samples - len(values)
    equal = sum(len(set(row)) < 2 for row in known)
    return (
        f"wrote {out}: {len(tasks):,} prompts with {samples} rewards each, {min(values):.3g} to {max(values):.3g}, mean "
        f"{sum(values) / len(values):.3g}; {missing:,} missing; {equal:,} prompts whose rewards are all equal"
    )


def _spec(text: str) -> dict[str, Any]:
    """The spec of a reward by its name or JSON object."""
    if not text.lstrip().startswith("{"):
        return {"function": text}
    try:
        return dict(json.loads(text))
    except ValueError as error:
        raise UserError(
            f'--reward {text}: not JSON ({error}); give a name or an object such as {{"function": "numeric"}}'
        ) from None
