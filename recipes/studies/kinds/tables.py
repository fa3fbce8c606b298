"""Measures tau of several drafters on the same questions, as chains and as trees, and prints the tables of the kinds study.

    python recipes/studies/kinds/tables.py measure TARGET PROMPTS OUT.json DEPTH DRAFTER...
    python recipes/studies/kinds/tables.py table OUT

Every text is compared with plain decoding. The searched tree is compared with a tree of as many nodes that is filled level by
level, and with a dynamic tree of as many nodes.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from trainkit import bundle
from trainkit.data.text.prompts import read_prompts
from trainkit.drafters.base import DraftBatch
from trainkit.eval.tree_search.search import full_tree
from trainkit.losses.divergence import ForwardKL
from trainkit.models.target import FrozenTarget
from trainkit.modules.draft import agreement_by_position, rounds
from trainkit.runner import DynamicTree, Runner, Stats

QUESTIONS, NEW_TOKENS = int(os.environ.get("QUESTIONS", "100")), 128


def shapes(folder: Path, depth: int) -> dict[str, dict[str, Any]]:
    """Draft shapes to measure: a chain, the tree searched for this bundle, and two other trees of as many nodes."""
    options: dict[str, dict[str, Any]] = {"chain": {"depth": depth}}
    tree = bundle.read(folder).runner.get("tree")
    if tree:
        nodes = len(tree) + 1
        options["static tree, searched"] = {"tree": [tuple(path) for path in tree]}
        options["static tree, full"] = {"tree": full_tree(nodes, depth, 8)}
        width = max(2, -(-nodes // depth))
        options["dynamic tree"] = {"tree": DynamicTree(depth=depth, top_k=min(width, 4), nodes=nodes)}
    return options


def measure(target: Path, prompts: Path, out: Path, depth: int, drafters: list[Path]) -> None:
    """Adds missing measurements to OUT: tau, number of texts equal to plain decoding, acceptance by position."""
    done = json.loads(out.read_text()) if out.is_file() else {}
    prompt_ids = [prompt for prompt in read_prompts(str(prompts), str(target), QUESTIONS + 20) if len(prompt) < 380][:QUESTIONS]
    plain: dict[float, list[list[int]]] = {}
    for folder in drafters:
        runner = Runner.load(target, folder, max_batch=8, max_len=512)
        for temperature in (0.0, 1.0):
            options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "temperature": temperature, "seed": 1, "progress": True}
            for name, shape in shapes(folder, depth).items():
                key = f"{folder.name}|{temperature:g}|{name}"
                if key in done:
                    continue
                if temperature not in plain:
                    plain[temperature] = [output.tokens for output in runner.generate(prompt_ids, depth=0, **options)]
                outputs = runner.generate(prompt_ids, **shape, **options)
                stats = Stats.merge(output.stats for output in outputs)
                equal = sum(output.tokens == text for output, text in zip(outputs, plain[temperature], strict=True))
                done[key] = {
                    "tau": stats.tau,
                    "rounds": stats.rounds,
                    "alpha_k": list(stats.alpha_k),
                    "equal": equal,
                    "of": len(prompt_ids),
                    "nodes": len(shape["tree"]) + 1 if isinstance(shape.get("tree"), list) else 0,
                }
                if name == "chain" and temperature == 0:
                    done[key]["in_training"] = simulated(runner, target, prompt_ids, plain[temperature], depth)
                print(key, done[key])
                partial = out.with_suffix(".partial")
                partial.write_text(json.dumps(done, indent=1))
                partial.replace(out)


def simulated(runner: Runner, target: Path, prompts: list[list[int]], texts: list[list[int]], depth: int) -> dict[str, Any]:
    """Alpha by position and tau of the same texts, computed as validation does: by the forward pass of the loss."""
    assert runner.drafter is not None
    teacher, counts = FrozenTarget(target), dict[str, int]()
    for prompt, text in zip(prompts, texts, strict=True):
        tokens = torch.tensor([[*prompt, *text]])
        positions, document = torch.arange(tokens.shape[1])[None], torch.zeros_like(tokens)
        hidden, taps = teacher.forward(tokens, positions, document, runner.drafter.taps)
        label = positions > len(prompt)  # prefill emits the first token
        batch = DraftBatch(tokens, positions, document, label, taps, hidden, teacher.handle())
        with torch.no_grad():
            agreement = agreement_by_position(runner.drafter(batch, ForwardKL()), batch, depth)
        assert agreement is not None
        for name, value in rounds(agreement, label, document).items():
            counts[name] = counts.get(name, 0) + value
    alpha = [counts[f"accepted_{k}"] / max(1, counts[f"offered_{k}"]) for k in range(1, depth + 1)]
    return {"tau": counts["emitted"] / counts["rounds"], "alpha_k": alpha}


def table(out: Path) -> None:
    """Prints tau by kind and shape at temperatures 0 and 1, and acceptance by position in training and in serving."""
    done: dict[str, dict[str, Any]] = json.loads((out / "tau.json").read_text())
    keys = [key.split("|") for key in done]
    names = list(dict.fromkeys(name for _, _, name in keys))
    print("| kind | T | " + " | ".join(names) + " | nodes of the searched | alpha by position, chain | equal |")
    print("|---" * (len(names) + 5) + "|")
    for kind, temperature in dict.fromkeys((kind, temperature) for kind, temperature, _ in keys):
        rows = {name: done.get(f"{kind}|{temperature}|{name}") for name in names}
        cells = [f"{row['tau']:.3f}" if row else "-" for row in rows.values()]
        searched, chain = rows.get("static tree, searched"), rows["chain"]
        alpha = " ".join(f"{value:.2f}" for value in chain["alpha_k"]) if chain else "-"
        equal, of = (sum(row[part] for row in rows.values() if row) for part in ("equal", "of"))
        nodes = searched["nodes"] if searched else "-"
        print(f"| {kind} | {temperature} | {' | '.join(cells)} | {nodes} | {alpha} | {equal} of {of} |")
    print("\n| kind | tau served | tau in training | alpha by position served | in training |\n|---|---|---|---|---|")
    for key, row in done.items():
        if "in_training" in row:
            other = row["in_training"]
            pairs = [" ".join(f"{value:.3f}" for value in values["alpha_k"]) for values in (row, other)]
            print(f"| {key.split('|')[0]} | {row['tau']:.3f} | {other['tau']:.3f} | {pairs[0]} | {pairs[1]} |")


if __name__ == "__main__":
    if sys.argv[1] == "measure":
        target, prompts, out, depth, *folders = sys.argv[2:]
        measure(Path(target), Path(prompts), Path(out), int(depth), [Path(folder) for folder in folders])
    else:
        table(Path(sys.argv[2]))
