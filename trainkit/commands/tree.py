"""`trainkit tree`: searches the static tree that decodes fastest on this machine and recommends it in the drafter's bundle."""

# D levels  W ranks  N tree nodes, root included

from __future__ import annotations

from dataclasses import asdict
from itertools import accumulate
from typing import Any

from trainkit import bundle
from trainkit.data.text.prompts import read_prompts
from trainkit.errors import UserError
from trainkit.eval.bench.hardware import examine
from trainkit.eval.bench.table import grid, ratio
from trainkit.eval.lengths import prompts_that_fit
from trainkit.eval.tree_search.ranks import accuracies, replay_ranks, shares, simulate_decoding
from trainkit.eval.tree_search.search import Candidate, Costs, expected_tau, full_tree, measure_costs, search
from trainkit.files import finite
from trainkit.runner import Runner, Stats
from trainkit.runner.sampling import Sampling
from trainkit.runner.trees.static import chain

SHOWN = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Sizes that the printed table shows, besides the chosen one."""


def tree(
    drafter: str,
    *,
    target: str,
    prompts: str,
    nodes: int | None = None,
    max_nodes: int = 64,
    depth: int = 8,
    width: int = 8,
    limit: int = 50,
    held_out: int = 10,
    max_new_tokens: int = 128,
    max_len: int | None = None,
    temperature: float = 0.0,
    batch: int = 1,
    device: str = "auto",
    dtype: str = "float32",
    seed: int = 0,
) -> str:
    """Searches the draft tree with the most expected tokens per second on this machine, and recommends it in the bundle.

    The target answers the prompts, and the drafter is replayed along these answers. This measures how often the child of each
    rank is the target's choice, at each depth and after each rank of the parent. A tree of N nodes takes the most probable
    paths; the time to verify N rows and to draft a level is measured; the N with the largest expected speed-up is chosen.
    Decoding with this drafter then uses that tree if no depth is given. The tree does not change the text.

    Examples:
        trainkit tree models/heads --target models/target --prompts train.jsonl
        trainkit tree models/heads --target models/target --prompts train.jsonl --nodes 16 --device cuda --dtype bfloat16

    Args:
        drafter: Drafter bundle; its recommended tree is replaced.
        target: Folder of its target.
        prompts: File of prompts, not those of a later bench; the tokenizer's chat template is applied, if it has one.
        nodes: Exact number of tree nodes, root included; chosen by expected speed-up if not given.
        max_nodes: Maximum number of nodes to consider when `nodes` is not given.
        depth: Maximum number of levels.
        width: Maximum number of children of a node.
        limit: Number of prompts to use, from the start of the file.
        held_out: Number of these prompts, the last ones, that the search does not use; they are decoded to measure tau.
        max_new_tokens: Maximum number of tokens of an answer.
        max_len: Prompts that need more positions, answer included, are left out; by default none may.
        temperature: Sampling temperature of the answers; the best tree depends on it.
        batch: Number of prompts that will be decoded together; costs are timed for it.
        device: Torch device; `auto` uses a GPU if there is one.
        dtype: Precision: float32, bfloat16 or float16.
        seed: Seed of all sampling.
    """
    flags = dict(locals())
    minima = {"nodes": 2, "max_nodes": 2, "max_new_tokens": 2, "depth": 1, "width": 1, "limit": 1, "batch": 1, "held_out": 0}
    for name, minimum in minima.items():
        if flags[name] is not None and flags[name] < minimum:
            note = ": the root and one drafted token" if "nodes" in name else ""
            raise UserError(f"{name} {flags[name]}: must be at least {minimum}{note}")

    # check everything before the long part
    temperature = Sampling(temperature).temperature
    bundle.read(drafter)
    prompt_ids, longest, note = prompts_that_fit(read_prompts(prompts, target, limit), max_new_tokens, max_len, target, prompts)
    if len(prompt_ids) <= held_out:
        raise UserError(f"{prompts}: {len(prompt_ids)} prompts, of which {held_out} are held out; give more, or lower held_out")
    runner = Runner.load(target, drafter, device, dtype, max(batch, 8), longest)
    assert runner.drafter is not None
    depth, frontier = min(depth, runner.drafter.max_depth or depth), runner.drafter.max_width
    levels = accumulate(range(depth), lambda count, _: min(count, frontier or count) * width, initial=1)
    size = min(max_nodes, sum(levels)) if nodes is None else nodes  # the largest possible tree has all nodes of all levels
    full_tree(size, depth, width, frontier)  # raises if so many nodes do not fit

    # replay the drafter along the target's answers, measure costs, search
    count = len(prompt_ids) - held_out
    seen, unseen = prompt_ids[:count], prompt_ids[count:]
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed, "progress": True}
    texts = [output.tokens for output in runner.generate(seen, **options)]
    ranks = replay_ranks(runner, seen, texts, depth, width, temperature, seed)
    table_DWW = accuracies(ranks, width)
    cached = sum(len(prompt) + len(text) // 2 for prompt, text in zip(seen, texts, strict=True)) // len(seen)
    costs = measure_costs(runner, cached, batch, size, depth, width)
    candidates = search(table_DWW, ranks, costs, size, frontier)
    # candidates are sorted by size, so the smallest of equally fast ones is chosen
    chosen = candidates[-1] if nodes is not None else max(candidates, key=lambda candidate: candidate.speedup)

    # record the search in the bundle
    rows = []
    for candidate in candidates:
        tau_full = simulate_decoding(ranks, full_tree(candidate.nodes, depth, width, frontier)).tau
        step, verify, draft = costs.plain_step_seconds, costs.verify(candidate.nodes), costs.draft(candidate.paths)
        rows.append(candidate.to_dict() | {"tau_full": tau_full, "v": verify / step, "draft": draft / step})
    decoded = _decode(runner, unseen, chosen, costs, table_DWW, options) if unseen else []
    record = chosen.to_dict() | {
        "prompts": len(seen),
        "places": sum(map(len, ranks)),
        "temperature": temperature,
        "batch": batch,
        "cached_tokens": cached,
        "shares": shares(ranks, width).round(5).tolist(),
        "accuracies": table_DWW.round(5).tolist(),
        "by_nodes": rows,
        "held_out": {"prompts": len(unseen), "trees": decoded},
        "costs": asdict(costs),
        "device": str(runner.device),
        "dtype": dtype,
        "machine": asdict(examine(runner.device)),
    }
    record = finite(record)  # a tau without rounds is nan, which JSON cannot hold
    recommended = {"tree": [list(path) for path in chosen.paths], "tree_search": record}
    bundle.amend(drafter, runner={**bundle.read(drafter).runner, **recommended})
    return "\n".join([_report(drafter, chosen, record), *([note] if note else [])])


def _decode(
    runner: Runner, prompts: list[list[int]], chosen: Candidate, costs: Costs, table_DWW: Any, options: dict[str, Any]
) -> list[dict[str, Any]]:
    """Figures of decoding with the searched tree, the full tree of the same size, and the chain with the best speed-up."""
    assert runner.drafter is not None
    depth, width = table_DWW.shape[:2]
    chains = [chain(levels) for levels in range(1, depth + 1)]
    best = max(chains, key=lambda paths: costs.speedup(expected_tau(paths, table_DWW), paths))
    full = full_tree(chosen.nodes, depth, width, runner.drafter.max_width)
    figures = []
    for name, paths in {"searched": chosen.paths, "full": full, f"chain of {len(best)}": best}.items():
        stats = Stats.merge(output.stats for output in runner.generate(prompts, tree=paths, **options))
        expected, levels = expected_tau(paths, table_DWW), max(map(len, paths))
        shape = {"tree": name, "nodes": len(paths) + 1, "depth": levels, "expected_tau": expected}
        figures.append(shape | {"tau": stats.tau, "rounds": stats.rounds, "roof": costs.speedup(stats.tau, paths)})
    return figures


def _report(drafter: str, chosen: Candidate, record: dict[str, Any]) -> str:
    machine, held_out, costs = record["machine"], record["held_out"], record["costs"]
    lines = [
        f"{drafter}: searched on {record['prompts']} prompts, {record['places']:,} positions, temperature "
        f"{record['temperature']:g}, batch {record['batch']}",
        f"{machine['processor']}, {costs['threads']} threads, {record['dtype']}; a plain step at {record['cached_tokens']} "
        f"cached tokens takes {1e3 * costs['plain_step_seconds']:.2f} ms",
        "",
    ]
    rows = [["nodes", "depth", "expected tau", "tau", "of a full tree", "v(N)", "draft", "expected speed-up"]]
    for row in record["by_nodes"]:
        if row["nodes"] in SHOWN or row["nodes"] == chosen.nodes:
            pointer = " <" if row["nodes"] == chosen.nodes else ""
            figures = [ratio(row[key]) for key in ("expected_tau", "tau", "tau_full", "v", "draft")]
            rows.append([str(row["nodes"]), str(row["depth"]), *figures, f"{row['expected_speedup']:.2f}{pointer}"])
    lines += [grid(rows), ""]
    lines += [
        f"{held_out['prompts']} held-out prompts, {row['tree']} ({row['nodes']} nodes, depth {row['depth']}): expected tau "
        f"{row['expected_tau']:.2f}, decoded {ratio(row['tau'])} over {row['rounds']} rounds; roof {ratio(row['roof'])}"
        for row in held_out["trees"]
    ]
    lines.append(f"recommended: {chosen.nodes} nodes, depth {chosen.depth}: {[list(path) for path in chosen.paths]}")
    return "\n".join(lines)
