"""`trainkit bench`: speeds beside their baselines, from one run; a table, and JSON and PNG on request. Light to import."""

from __future__ import annotations

from json import loads as parse_json
from pathlib import Path
from typing import Any

from trainkit.errors import UserError
from trainkit.eval.bench.types import BenchArguments


def bench(
    *,
    drafter: list[str] | None = None,
    json: str | None = None,
    plot: str | None = None,
    trees: str | None = None,
    policy: list[str] | None = None,
    **options: Any,
) -> int:
    """Measures decoding with and without drafters, beside transformers, on the same prompts, interleaved in one process.

    The exit code is 1 if an output differs from plain decoding and rounding does not explain the difference.

    Examples:
        trainkit bench --target models/target --drafter models/draft --prompts test.jsonl --json bench.json --plot bench.png
        trainkit bench --target models/target --drafter models/draft --drafter models/heads --prompts test.jsonl
        trainkit bench --target models/target --drafter models/draft --prompts test.jsonl --policy cost --policy confidence:0.6
        trainkit bench --synthetic llama3-8b --device cuda --dtype bfloat16 --baselines false
        trainkit bench --synthetic llama3-8b --synthetic_kinds medusa --synthetic_kinds hydra --synthetic_tau 3.4 --device cuda

    Args:
        drafter: Drafter bundles, or plain folders of small models with the same tokenizer; repeat the flag for several.
        json: File for all measurements.
        plot: File for the figure, PNG.
        trees: Additional trees: a JSON list of lists of rank paths, such as [[[0],[1],[0,0]]], or a file with such a list.
        policy: Policies that choose the depth during decoding, up to the largest of `depths`: cost, cost:SIGNAL (logistic,
            predictor, confidence), cost-blind, logistic:P, predictor:P, confidence:P, ema; repeat the flag for several.
            Compared with the best fixed depth.
        **options: As in `BenchArguments`.

    Returns:
        0, or 1 on a mismatch.
    """
    for name, file in (("json", json), ("plot", plot)):
        if file is not None and Path(file).is_dir():
            raise UserError(f"--{name} {file}: is a folder; name a file in it")
    arguments = BenchArguments(drafters=tuple(drafter or ()), trees=read_trees(trees), policies=tuple(policy or ()), **options)
    from trainkit.data.sets.writer import quiet_libraries
    from trainkit.eval.bench.methods import checkpoint_setup, synthetic_setup
    from trainkit.eval.bench.metrics import summarise
    from trainkit.eval.bench.plot import figure
    from trainkit.eval.bench.run import run
    from trainkit.eval.bench.table import table
    from trainkit.files import write_json

    quiet_libraries()
    result = run(arguments, synthetic_setup(arguments) if arguments.synthetic is not None else checkpoint_setup(arguments))
    summary = summarise(result)
    print(table(summary))
    if json is not None:
        write_json(json, summary)
    if plot is not None:
        figure(summary, plot)
    return int(result.mismatches > 0)


def read_trees(text: str | None) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Trees as rank paths, from JSON text or the name of a JSON file.

    Raises:
        UserError: not a list of trees.
    """
    if text is None:
        return ()
    from trainkit.drafters.base import parse_rank_paths

    file = "" if text.lstrip().startswith("[") else f" {text}"
    try:
        trees = parse_json(Path(text).read_text(encoding="utf-8") if file else text)
        if not all(trees):
            raise ValueError("an empty tree is plain decoding")
        return tuple(parse_rank_paths(tree) for tree in trees)
    except (ValueError, TypeError) as error:
        raise UserError(f"trees{file}: must be a list of trees, each a list of rank paths: [[[0],[1],[0,0]]]") from error
