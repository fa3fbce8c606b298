"""`trainkit bench`: one run, one table; every speed beside its baseline, JSON and PNG on request. Light to import."""

from __future__ import annotations

from json import loads as parse_json
from pathlib import Path
from typing import TYPE_CHECKING

from trainkit.errors import UserError
from trainkit.eval.bench.run import chosen_device, run
from trainkit.eval.bench.types import Request

if TYPE_CHECKING:
    pass


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

    Exit code 1 if some output differs from plain decoding where rounding does not explain it.

    Examples:
        trainkit bench --target models/target --drafter models/draft --prompts test.jsonl --json bench.json --plot bench.png
        trainkit bench --target models/target --drafter models/draft --drafter models/heads --prompts test.jsonl
        trainkit bench --target models/target --drafter models/draft --prompts test.jsonl --policy cost --policy confidence:0.6
        trainkit bench --synthetic llama3-8b --device cuda --dtype bfloat16 --baselines false
        trainkit bench --synthetic llama3-8b --synthetic_kinds medusa --synthetic_kinds hydra --synthetic_tau 3.4 --device cuda

    Args:
        target: Hugging Face folder of the target.
        drafter: Drafter bundles, or plain folders of small models with the same tokenizer; repeat the flag for several.
        prompts: File of prompts or chats; the chat template is applied where the tokenizer has one.
        json: Where to write everything measured.
        plot: Where to write the figure, PNG.
        depths: Depths to draft to, as far as a drafter can; its own or recommended tree is added where it has one.
        trees: More trees to draft: a list of lists of rank paths, [[[0],[1],[0,0]]], or a JSON file of one.
        policy: Policies that choose the depth while decoding, up to the largest of `depths`: cost, predictor:P, confidence:P,
            ema, cost-blind (cost without the predictor); repeat the flag for several. Held against the best fixed depth.
        max_new_tokens: Most tokens for each prompt.
        temperature: 0 is greedy. Above, transformers draws other texts, and only our outputs are held against plain decoding.
        verify: coupled or residual.
        limit: First prompts to take.
        repeats: Times each contender runs; medians are shown.
        batch: Prompts decoded together.
        device: Torch device; `auto` takes a GPU where there is one.
        dtype: float32, bfloat16 or float16.
        baselines: Also measure transformers.
        seed: Fixes every draw.
        max_seconds: Fewer prompts, then fewer repeats are run, and said so, if all of them would need longer than this.
        synthetic: Instead of a target: tiny, llama3-1b or llama3-8b with random weights, and a scripted drafter.
        synthetic_tau: Tokens per round that the scripted drafter realises, as far as the depth allows.
        synthetic_kinds: Kinds at whose cost it drafts, with their default settings and 32,000 tokens at most; by default all.
        prompt_length: Tokens of the synthetic prompt.

    Returns:
        0, or 1 on a mismatch.
    """
    request = Request(
        target,
        tuple(drafter or ()),
        prompts,
        tuple(depths),
        read_trees(trees),
        tuple(policy or ()),
        max_new_tokens,
        temperature,
        verify,
        limit,
        repeats,
        batch,
        chosen_device(device),
        dtype,
        baselines,
        seed,
        max_seconds,
        synthetic,
        synthetic_tau,
        tuple(synthetic_kinds or ()),
        prompt_length,
    )
    for name, file in (("json", json), ("plot", plot)):
        if file is not None and Path(file).is_dir():
            raise UserError(f"--{name} {file}: is a folder; name a file in it")
    from trainkit.eval.bench.methods import checkpoint_field, synthetic_field
    from trainkit.eval.bench.metrics import summarise
    from trainkit.eval.bench.plot import figure
    from trainkit.eval.bench.table import table
    from trainkit.files import write_json

    result = run(request, synthetic_field(request) if synthetic is not None else checkpoint_field(request))
    summary = summarise(result)
    print(table(summary))
    if json is not None:
        write_json(json, summary)
    if plot is not None:
        figure(summary, plot)
    return int(result.mismatches > 0)


def read_trees(given: str | None) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Trees as rank paths, from JSON or a file of it.

    Raises:
        UserError: it is no list of trees.
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
        name = given if is_file else "given"
        raise UserError(f"trees {name}: must be a list of trees, each a list of rank paths: [[[0],[1],[0,0]]]") from error
