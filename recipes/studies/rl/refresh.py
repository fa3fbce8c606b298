"""Study of the drafter refresh: a policy moves, one drafter stays as it was, another is refreshed; tau of both.

    python recipes/studies/rl/refresh.py drift TARGET DRAFTER TEXT.txt OUT.jsonl [STEPS] [LR] [POSITIONS]
    python recipes/studies/rl/refresh.py table OUT.jsonl [OUT.jsonl ...]
    python recipes/studies/rl/refresh.py curves RUN_DIR [RUN_DIR ...]

`drift` moves the target by supervised steps on other text, as hard a case as RL with a high learning rate, and rolls out
beginnings of that text after every fifth step, with both drafters and the same seeds. The texts of both must be equal. `curves`
compares RL runs that differ in their drafter; their rewards must be equal in every row.
"""

# B rows  T positions

from __future__ import annotations

import csv
import json
import random
import sys
from pathlib import Path
from statistics import mean
from time import process_time
from typing import Any

import torch
import torch.nn.functional as F

from trainkit.models.load import read_tokenizer
from trainkit.models.target import LiveTarget, load_model
from trainkit.rl.refresh import Refresh
from trainkit.rl.types import Group, Response, Task
from trainkit.runner import Runner, Stats

INTERVAL, PROMPTS, PROMPT, NEW, ROWS, LENGTH = 5, 16, 32, 64, 8, 128
OPTIONS: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": NEW, "ignore_end": True, "depth": 4}


def drift(target: Path, drafter: Path, text: Path, out: Path, steps: int, lr: float, positions: Any) -> None:
    """Writes a line for each rollout: step, loss, and of both drafters tau and processor seconds; metrics of the refresh."""
    tokens = read_tokenizer(target).encode(text.read_text(encoding="utf-8"), add_special_tokens=False)
    train, held_out = tokens[: len(tokens) * 9 // 10], tokens[len(tokens) * 9 // 10 :]
    policy: Any = load_model(target, torch.float32)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=0.0)
    frozen, refreshed = (Runner.load(target, drafter, max_batch=PROMPTS, max_len=PROMPT + NEW) for _ in range(2))
    assert refreshed.drafter is not None
    refresh = Refresh(refreshed.drafter, drafter, LiveTarget(policy, target), every=10, batch=8, lr=1e-4, positions=positions)
    rng, loss = random.Random(0), torch.zeros(())
    with out.open("w", encoding="utf-8") as file:
        for step in range(steps + 1):
            if step % INTERVAL == 0:
                starts = [rng.randrange(len(held_out) - PROMPT) for _ in range(PROMPTS)]
                prompts = [held_out[start : start + PROMPT] for start in starts]
                line: dict[str, Any] = {"step": step, "loss": loss.item()}
                texts = []
                for name, runner in (("frozen", frozen), ("refreshed", refreshed)):
                    runner.update(policy.state_dict().items())
                    began = process_time()
                    outputs = runner.generate(prompts, seed=step, **OPTIONS)
                    stats = Stats.merge(output.stats for output in outputs)
                    line |= {f"{name}_tau": stats.tau, f"{name}_seconds": process_time() - began}
                    texts.append([output.tokens for output in outputs])
                assert texts[0] == texts[1], "the drafter changed a text"
                responses = [[Response(output.tokens, "", output.finish, [])] for output in outputs]
                refresh.observe([Group(Task(n, prompts[n], ""), group) for n, group in enumerate(responses)], step)
                if refresh.due(step, line["refreshed_tau"]):
                    began = process_time()
                    line |= refresh.run(step) | {"refresh_seconds": process_time() - began}
                print(json.dumps(line), file=file, flush=True)
            starts = [rng.randrange(len(train) - LENGTH) for _ in range(ROWS)]
            tokens_BT = torch.tensor([train[start : start + LENGTH] for start in starts])
            logits = policy(input_ids=tokens_BT[:, :-1], use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1), tokens_BT[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def table(path: Path) -> None:
    """Prints tau of both drafters over the run, and processor seconds of rollouts and refreshes."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    print(f"{path.stem}\n| steps | loss | tau, frozen | tau, refreshed | rollout s, frozen | refreshed | refresh s |")
    print("|---|---|---|---|---|---|---|")
    size = max(1, len(lines) // 6)
    for start in range(0, len(lines), size):
        part = lines[start : start + size]
        columns = [mean(line[name] for line in part) for name in ("loss", "frozen_tau", "refreshed_tau")]
        columns += [
            sum(line.get(name, 0) for line in part) for name in ("frozen_seconds", "refreshed_seconds", "refresh_seconds")
        ]
        print(f"| {part[0]['step']} to {part[-1]['step']} | " + " | ".join(f"{value:.2f}" for value in columns) + " |")
    kept = [line["refresh/kept"] for line in lines if "refresh/kept" in line]
    print(f"{sum(kept):.0f} of {len(kept)} refreshes kept")


def curves(runs: list[Path]) -> None:
    """Prints reward, response length and tau of RL runs, and their seconds of rollouts and of training the drafter."""
    logs = [[row for row in csv.DictReader((run / "metrics.csv").open()) if row.get("train/tau")] for run in runs]
    length = min(map(len, logs))
    assert all(log[i]["train/reward"] == logs[0][i]["train/reward"] for log in logs for i in range(length)), "rewards differ"
    print("| steps | reward | length | " + " | ".join(f"tau, {run.name}" for run in runs) + " |")
    print("|---" * (3 + len(runs)) + "|")
    size = max(1, length // 6)
    for start in range(0, length, size):
        rows = [log[start : min(start + size, length)] for log in logs]
        columns = [mean(float(row[f"train/{name}"]) for row in rows[0]) for name in ("reward", "length")]
        columns += [mean(float(row["train/tau"]) for row in part) for part in rows]
        print(f"| {rows[0][0]['step']} to {rows[0][-1]['step']} | " + " | ".join(f"{value:.2f}" for value in columns) + " |")
    for run, log in zip(runs, logs, strict=True):
        rollouts, trained = (
            sum(float(row.get(name) or 0) for row in log[:length]) for name in ("speed/seconds_rollouts", "refresh/seconds")
        )
        print(f"{run.name}: {rollouts:.0f} s of rollouts, {trained:.0f} s of training the drafter")


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    if command == "drift":
        steps, lr, positions = [*arguments[4:], *("60", "3e-4", "mixed")[len(arguments) - 4 :]]
        folder, bundle, text, out = map(Path, arguments[:4])
        drift(folder, bundle, text, out, int(steps), float(lr), positions)
    elif command == "curves":
        curves([Path(name) for name in arguments])
    else:
        for name in arguments:
            table(Path(name))
