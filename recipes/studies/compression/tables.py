"""Measures tau of pairs of a target and a draft model, and prints the tables of the compression study.

    python recipes/studies/compression/tables.py measure PROMPTS OUT.json TARGET:DRAFTER...
    python recipes/studies/compression/tables.py table OUT.json

Every text is compared with plain decoding of the same target.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from time import process_time

from trainkit.data.text.prompts import read_prompts
from trainkit.files import write_json
from trainkit.runner import Runner, Stats

QUESTIONS, DEPTH = int(os.environ.get("QUESTIONS", "40")), int(os.environ.get("DEPTH", "3"))


def measure(prompts: str, out: Path, pairs: list[str]) -> None:
    """Adds the pairs that OUT does not hold yet: tau, acceptance by position, equal texts, processor time of plain decoding."""
    done = json.loads(out.read_text()) if out.is_file() else {}
    for pair in pairs:
        target, _, drafter = pair.partition(":")
        for temperature in (0.0, 1.0):
            key = f"{Path(target).name}|{Path(drafter).name}|{temperature:g}"
            if key in done:
                continue
            ids = [prompt for prompt in read_prompts(prompts, target, QUESTIONS + 20) if len(prompt) < 380][:QUESTIONS]
            runner = Runner.load(target, drafter, max_batch=8, max_len=512)
            seconds, texts, stats = {}, {}, Stats()
            for depth in (0, DEPTH):
                start = process_time()
                outputs = runner.generate(ids, max_new_tokens=128, depth=depth, temperature=temperature, seed=1, progress=True)
                seconds[depth], texts[depth] = process_time() - start, [output.tokens for output in outputs]
                stats = Stats.merge(output.stats for output in outputs)
            equal = sum(plain == text for plain, text in zip(texts[0], texts[DEPTH], strict=True))
            done[key] = {
                "tau": stats.tau,
                "alpha_k": list(stats.alpha_k),
                "equal": equal,
                "of": len(ids),
                "tokens": sum(map(len, texts[0])),
                "speedup": seconds[0] / seconds[DEPTH],
            }
            print(key, done[key])
            write_json(out, done)


def table(out: Path) -> None:
    """Prints tau of each pair at temperatures 0 and 1."""
    done = json.loads(out.read_text())
    print(f"| target | draft model | tau at T 0 | at T 1 | alpha by position at T 0 | equal texts |\n{'|---' * 6}|")
    for target, drafter in dict.fromkeys(tuple(key.split("|")[:2]) for key in done):
        greedy, sampled = (done[f"{target}|{drafter}|{temperature}"] for temperature in (0, 1))
        alpha = " ".join(f"{value:.2f}" for value in greedy["alpha_k"])
        equal, of = (greedy[part] + sampled[part] for part in ("equal", "of"))
        print(f"| {target} | {drafter} | {greedy['tau']:.3f} | {sampled['tau']:.3f} | {alpha} | {equal} of {of} |")


if __name__ == "__main__":
    if sys.argv[1] == "measure":
        measure(sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
    else:
        table(Path(sys.argv[2]))
