"""`trainkit tree`: the static tree that decodes fastest on this machine, measured, searched, and recommended in the bundle."""

# D levels  W ranks  N tree nodes, root included

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from trainkit.errors import UserError

if TYPE_CHECKING:
    from trainkit.eval.tree_search.ranks import Ranks
    from trainkit.eval.tree_search.search import Candidate, Costs, Paths
    from trainkit.runner import Runner

SHOWN = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


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
    temperature: float = 0.0,
    batch: int = 1,
    device: str = "auto",
    dtype: str = "float32",
    seed: int = 0,
) -> str:
    """Searches the draft tree with the most expected tokens per second here, and recommends it in the drafter's bundle.

    The target answers the prompts, and the drafter is walked along its answers: so it is known how often the child of each rank
    is the target's choice, at each depth and after each rank of the parent. A tree of N nodes takes the likeliest paths; what N
    rows cost to verify, and a level to draft, is timed; the N with the largest expected speed-up wins. Decoding with this
    drafter then drafts that tree where no depth is given. Any tree gives the same text.

    Examples:
        trainkit tree models/heads --target models/target --prompts train.jsonl
        trainkit tree models/heads --target models/target --prompts train.jsonl --nodes 16 --device cuda --dtype bfloat16

    Args:
        drafter: Bundle whose recommended runner settings are replaced.
        target: Folder of its target.
        prompts: Rows to measure on, not those of a later bench; a chat template is applied where the tokenizer has one.
        nodes: Search a tree of just so many nodes, root included.
        max_nodes: Otherwise the most nodes to consider.
        depth: Most levels to consider.
        width: Most children of a node to consider.
        limit: First prompts to take.
        held_out: How many of them, the last, the search does not see: their tau is measured by decoding them.
        max_new_tokens: Most tokens of an answer.
        temperature: Of the answers; what is likely at one temperature is less so at another.
        batch: Prompts that will be decoded together: what costs are timed at.
        device: Torch device; `auto` takes a GPU where there is one.
        dtype: float32, bfloat16 or float16.
        seed: Fixes every draw.
    """
    if held_out < 0:
        raise UserError(f"held_out {held_out}: must be at least 0")
    for name, value, least in (
        ("nodes", nodes, 2),
        ("max_nodes", max_nodes, 2),
        ("depth", depth, 1),
        ("width", width, 1),
        ("limit", limit, 1),
        ("batch", batch, 1),
        ("max_new_tokens", max_new_tokens, 2),
    ):
        if value is not None and value < least:
            raise UserError(f"{name} {value}: must be at least {least}" + (", the root and a draft" if "nodes" in name else ""))
    from trainkit import bundle
    from trainkit.data.text.prompts import read_prompts
    from trainkit.eval.bench.hardware import examine
    from trainkit.eval.bench.run import chosen_device
    from trainkit.eval.tree_search.ranks import accuracies, shares, walk
    from trainkit.eval.tree_search.search import fastest, full, measure_costs, search
    from trainkit.files import finite
    from trainkit.models.load import covered_positions
    from trainkit.runner import Runner

    bundle.read(drafter)  # what cannot be written to is found before the work
    given = read_prompts(prompts, target, limit)
    if len(given) <= held_out:
        raise UserError(f"{prompts}: {len(given)} prompts, of which {held_out} are held out; give more, or lower held_out")
    longest, covered = max(map(len, given)) + max_new_tokens, covered_positions(target)
    if longest > covered:
        raise UserError(f"{prompts}: {longest} positions are needed, {target} covers {covered}; lower max_new_tokens")
    runner = Runner.load(target, drafter, chosen_device(device), dtype, max(batch, 8), longest)
    assert runner.drafter is not None
    depth, widest = min(depth, runner.drafter.max_depth or depth), runner.drafter.max_width
    most = min(max_nodes, _capacity(depth, width, widest)) if nodes is None else nodes
    full(most, depth, width, widest)  # refuses what does not fit

    seen, unseen = given[: len(given) - held_out], given[len(given) - held_out :]
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed, "progress": True}
    texts = [output.tokens for output in runner.generate(seen, **options)]
    ranks = walk(runner, seen, texts, depth, width, temperature, seed)
    table = accuracies(ranks, width)
    cached = sum(len(prompt) + len(text) // 2 for prompt, text in zip(seen, texts, strict=True)) // len(seen)
    costs = measure_costs(runner, cached, batch, most, depth, width)
    candidates = search(table, ranks, costs, most, widest)
    chosen = candidates[-1] if nodes is not None else fastest(candidates)
    rows = [_row(one, costs, ranks, depth, width, widest) for one in candidates]
    proof = _decoded(runner, unseen, chosen, costs, table, widest, options) if unseen else []
    record = {
        "nodes": chosen.nodes,
        "depth": chosen.depth,
        "expected_tau": chosen.expected_tau,
        "tau": chosen.tau,
        "expected_speedup": chosen.speedup,
        "prompts": len(seen),
        "places": sum(map(len, ranks)),
        "temperature": temperature,
        "batch": batch,
        "cached_tokens": cached,
        "shares": shares(ranks, width).round(5).tolist(),
        "accuracies": table.round(5).tolist(),
        "by_nodes": rows,
        "held_out": {"prompts": len(unseen), "trees": proof},
        "costs": _costs(costs),
        "device": str(runner.device),
        "dtype": dtype,
        "machine": asdict(examine(runner.device)),
    }
    record = finite(record)  # a tau without a round is none
    found = {"tree": [list(path) for path in chosen.paths], "tree_search": record}
    bundle.amend(drafter, runner={**bundle.read(drafter).runner, **found})
    return _report(drafter, chosen, record)


def _capacity(depth: int, width: int, widest: int | None) -> int:
    """Nodes of the largest tree."""
    total, level = 1, 1
    for _ in range(depth):
        level = min(level, widest or level) * width
        total += level
    return total


def _row(one: Candidate, costs: Costs, ranks: Sequence[Ranks], depth: int, width: int, widest: int | None) -> dict[str, float]:
    """A size's figures; `tau_full` is that of the full tree with as many nodes, on the same texts."""
    from trainkit.eval.tree_search.ranks import simulated
    from trainkit.eval.tree_search.search import full

    return {
        "nodes": one.nodes,
        "depth": one.depth,
        "expected_tau": one.expected_tau,
        "tau": one.tau,
        "tau_full": simulated(ranks, full(one.nodes, depth, width, widest)).tau,
        "v": costs.verify(one.nodes) / costs.plain,
        "draft": costs.draft(one.paths) / costs.plain,
        "expected_speedup": one.speedup,
    }


def _decoded(
    runner: Runner,
    prompts: list[list[int]],
    chosen: Candidate,
    costs: Costs,
    table: Any,
    widest: int | None,
    options: dict[str, Any],
) -> list[dict[str, Any]]:
    """Held-out prompts decoded with the searched tree, the full tree of as many nodes, and the chain expected to be best."""
    from trainkit.eval.tree_search.search import expected_tau, full
    from trainkit.runner import Stats
    from trainkit.runner.trees.static import chain

    depth, width = table.shape[:2]
    chains: list[Paths] = [chain(levels) for levels in range(1, depth + 1)]
    best = max(chains, key=lambda paths: costs.speedup(expected_tau(paths, table), paths))
    trees = {"searched": chosen.paths, "full": full(chosen.nodes, depth, width, widest), f"chain of {len(best)}": best}
    found = []
    for name, paths in trees.items():
        stats = Stats.merge(output.stats for output in runner.generate(prompts, tree=paths, **options))
        found.append(
            {
                "tree": name,
                "nodes": len(paths) + 1,
                "depth": max(map(len, paths)),
                "expected_tau": expected_tau(paths, table),
                "tau": stats.tau,
                "rounds": stats.rounds,
                "roof": costs.speedup(stats.tau, paths),
            }
        )
    return found


def _costs(costs: Costs) -> dict[str, Any]:
    return {
        "plain_step_seconds": costs.plain,
        "verify_seconds": {str(size): value for size, value in costs.verify_T.items()},
        "first_level_seconds": costs.first,
        "level_seconds": {str(size): value for size, value in costs.level_F.items()},
        "threads": costs.threads,
    }


def _report(drafter: str, chosen: Candidate, record: dict[str, Any]) -> str:
    from trainkit.eval.bench.table import aligned

    machine, held, costs = record["machine"], record["held_out"], record["costs"]
    lines = [
        f"{drafter}: searched on {record['prompts']} prompts, {record['places']:,} places, temperature "
        f"{record['temperature']:g}, batch {record['batch']}",
        f"{machine['processor']}, {costs['threads']} threads, {record['dtype']}; a plain step at {record['cached_tokens']} "
        f"cached tokens takes {1e3 * costs['plain_step_seconds']:.2f} ms",
        "",
    ]
    table: list[tuple[str, ...]] = [
        ("nodes", "depth", "expected tau", "tau", "of a full tree", "v(N)", "draft", "expected speed-up")
    ]
    for row in record["by_nodes"]:
        if row["nodes"] in SHOWN or row["nodes"] == chosen.nodes:
            mark = " <" if row["nodes"] == chosen.nodes else ""
            figures = [row[key] for key in ("expected_tau", "tau", "tau_full", "v", "draft")]
            cells = ["-" if value is None else f"{value:.2f}" for value in figures]
            table.append((str(row["nodes"]), str(row["depth"]), *cells, f"{row['expected_speedup']:.2f}{mark}"))
    lines += [aligned(table), ""]
    for one in held["trees"]:
        tau, roof = ("-" if one[key] is None else f"{one[key]:.2f}" for key in ("tau", "roof"))
        lines.append(
            f"{held['prompts']} held-out prompts, {one['tree']} ({one['nodes']} nodes, depth {one['depth']}): expected tau "
            f"{one['expected_tau']:.2f}, decoded {tau} over {one['rounds']} rounds; roof {roof}"
        )
    lines.append(f"recommended: {chosen.nodes} nodes, depth {chosen.depth}: {[list(path) for path in chosen.paths]}")
    return "\n".join(lines)
