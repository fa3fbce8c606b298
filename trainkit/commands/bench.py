"""`trainkit bench`: speeds beside their baselines, from one run; a table, and JSON and PNG on request. Light to import."""

from __future__ import annotations

from json import loads as parse_json
from pathlib import Path

from trainkit.errors import UserError
from trainkit.eval.bench.types import BenchArguments


def bench(
    *,
    target: str | None = None,
    drafter: list[str] | None = None,
    prompts: str | None = None,
    json: str | None = None,
    plot: str | None = None,
    depths: tuple[int, ...] = (1, 2, 3, 4, 6),
    trees: str | None = None,
    policy: list[str] | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    verify: str = "coupled",
    limit: int = 16,
    repeats: int = 3,
    batch: int = 1,
    device: str = "auto",
    dtype: str = "float32",
    baselines: bool = True,
    seed: int = 0,
    max_seconds: float = 900.0,
    synthetic: str | None = None,
    synthetic_tau: float = 3.0,
    synthetic_kinds: list[str] | None = None,
    prompt_length: int = 64,
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
        target: Hugging Face folder of the target.
        drafter: Drafter bundles, or plain folders of small models with the same tokenizer; repeat the flag for several.
        prompts: File of prompts or chats; the tokenizer's chat template is applied, if it has one.
        json: File for all measurements.
        plot: File for the figure, PNG.
        depths: Draft depths to measure, up to the drafter's own limit; the tree in a drafter's bundle is measured too.
        trees: Additional trees: a list of lists of rank paths, such as [[[0],[1],[0,0]]], or a JSON file with such a list.
        policy: Policies that choose the depth during decoding, up to the largest of `depths`: cost, predictor:P, confidence:P,
            ema, cost-blind (cost without the predictor); repeat the flag for several. Compared with the best fixed depth.
        max_new_tokens: Maximum number of new tokens for each prompt.
        temperature: Sampling temperature; 0 is greedy. Above 0 transformers samples other texts, and only trainkit's outputs
            are compared with plain decoding.
        verify: Verification method, coupled or residual.
        limit: Number of prompts to use, from the start of the file.
        repeats: Runs of each method; the table shows medians.
        batch: Prompts decoded together.
        device: Torch device; `auto` uses a GPU if there is one.
        dtype: Precision: float32, bfloat16 or float16.
        baselines: Whether to measure transformers too.
        seed: Seed of all sampling.
        max_seconds: Time limit; if the whole load would take longer, fewer prompts and then fewer repeats are run, with a note.
        synthetic: Shape of a random target with scripted drafters, instead of a target folder: tiny, llama3-1b or llama3-8b.
        synthetic_tau: Tokens per round that the scripted drafter reaches, as far as the depth allows.
        synthetic_kinds: Drafter kinds whose cost is measured, with default settings and at most 32,000 draft tokens; by default
            all kinds.
        prompt_length: Tokens of the synthetic prompt.

    Returns:
        0, or 1 on a mismatch.
    """
    flags = dict(locals())
    for name in ("json", "plot"):
        if (file := flags.pop(name)) is not None and Path(file).is_dir():
            raise UserError(f"--{name} {file}: is a folder; name a file in it")
    flags |= {"drafters": tuple(flags.pop("drafter") or ()), "policies": tuple(flags.pop("policy") or ())}
    flags |= {"depths": tuple(depths), "trees": read_trees(trees), "synthetic_kinds": tuple(synthetic_kinds or ())}
    arguments = BenchArguments(**flags)
    from trainkit.eval.bench.methods import checkpoint_setup, synthetic_setup
    from trainkit.eval.bench.metrics import summarise
    from trainkit.eval.bench.plot import figure
    from trainkit.eval.bench.run import run
    from trainkit.eval.bench.table import table
    from trainkit.files import write_json

    result = run(arguments, synthetic_setup(arguments) if synthetic is not None else checkpoint_setup(arguments))
    summary = summarise(result)
    print(table(summary))
    if json is not None:
        write_json(json, summary)
    if plot is not None:
        figure(summary, plot)
    return int(result.mismatches > 0)


def read_trees(given: str | None) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Trees as rank paths, from JSON text or a JSON file.

    Raises:
        UserError: not a list of trees.
    """
    if given is None:
        return ()
    from trainkit.drafters.base import parse_rank_paths

    is_file = not given.lstrip().startswith("[")
    try:
        trees = parse_json(Path(given).read_text(encoding="utf-8") if is_file else given)
        if not all(trees):
            raise ValueError("an empty tree is plain decoding")
        return tuple(parse_rank_paths(tree) for tree in trees)
    except (ValueError, TypeError) as error:
        name = f" {given}" if is_file else ""
        raise UserError(f"trees{name}: must be a list of trees, each a list of rank paths: [[[0],[1],[0,0]]]") from error
