"""Compares policies with the model that they were trained from: reward, pass@k, best-of-n win rate, and measured KL.

    python recipes/studies/rl/measure.py START POLICY... --tasks FILE --reward FUNCTION --json FILE [--samples 16] [--limit N]

All sample the same prompts at temperature 1. KL(policy || start), in nats per response, is the mean of log(policy / start) over
the responses of the policy.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from trainkit.data.text.chat_template import Encoder, load_tokenizer
from trainkit.eval.bootstrap import mean
from trainkit.files import write_json
from trainkit.rl.evaluate import evaluate, reward_table, win_rate
from trainkit.rl.rewards.score import Rewards
from trainkit.rl.rollout import Rollouts
from trainkit.rl.tasks import read_tasks
from trainkit.rl.types import Group
from trainkit.runner import Runner


def divergence(groups: list[Group], start: Runner) -> Any:
    """Interval of KL(policy || start) in nats per response, over prompts."""
    responses = [(group.task.tokens, response) for group in groups for response in group.responses]
    before = start.score([prompt for prompt, _ in responses], [response.tokens for _, response in responses])
    gaps = np.array([sum(response.logprobs) - sum(old) for (_, response), old in zip(responses, before, strict=True)])
    gaps_PS = gaps.reshape(len(groups), -1)
    return mean(gaps_PS.sum(1), np.full(len(groups), gaps_PS.shape[1], float))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("start")
    parser.add_argument("policies", nargs="+")
    parser.add_argument("--tasks", required=True)
    parser.add_argument("--reward", default="exact")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--max_new_tokens", type=int, default=5)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    tasks = read_tasks(args.tasks, Encoder(load_tokenizer(args.start), args.start), args.limit)
    rewards, found = Rewards([{"function": args.reward}]), {}
    for folder in (args.start, *args.policies):
        runner = Runner.load(folder, max_batch=args.batch)
        rollouts = Rollouts(runner, args.samples, args.max_new_tokens, 1.0, args.seed, speculate="off")
        values, _, groups = evaluate(rollouts, rewards, tasks, [k for k in (1, 4, 16) if k <= args.samples])
        if folder == args.start:
            start, reference = runner, reward_table(groups)
        for n in (1, 2, 4):
            win = win_rate(reward_table(groups), reference, n)
            values |= {f"best_of_{n}": win.value, f"best_of_{n}_low": win.low, f"best_of_{n}_high": win.high}
        kl = divergence(groups, start)
        found[folder] = values | {"kl": kl.value, "kl_low": kl.low, "kl_high": kl.high}
        print(folder, {name: round(value, 4) for name, value in found[folder].items() if not name.endswith(("low", "high"))})
    write_json(args.json, found)


if __name__ == "__main__":
    main()
