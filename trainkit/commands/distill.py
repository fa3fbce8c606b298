"""`trainkit distill`: what the target itself answers to prompts, as a set that drafts and heads are trained on."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainkit import __version__, bundle
from trainkit.data.answer import Answer
from trainkit.data.manifest import weights_digest
from trainkit.data.sets.distilled import Answerer, Item, Layout, Made, write_set
from trainkit.data.text.chat_template import load_tokenizer, vocabulary_hash
from trainkit.data.text.prompts import Asked, read_asked
from trainkit.data.text.sources import content_hash
from trainkit.errors import UserError
from trainkit.models.load import covered_positions, read_config
from trainkit.runner.engine import Runner
from trainkit.runner.sampling import Sampling


def distill(
    *,
    target: str,
    prompts: str,
    out: str,
    temperatures: tuple[float, ...] = (0.0, 0.3, 0.7, 1.0),
    n: int = 1,
    max_new_tokens: int = 512,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    limit: int | None = None,
    columns: dict[str, str] | None = None,
    drafter: str | None = None,
    depth: int | None = None,
    batch: int = 32,
    device: str = "cpu",
    dtype: str = "float32",
    base_url: str | None = None,
    model: str | None = None,
    concurrency: int = 32,
    part_rows: int = 1024,
) -> str:
    """Answers every prompt at every temperature and writes the set: token ids with their loss mask, and readable chats.

    Killed or interrupted, the same command goes on where it stopped: no row is lost or made twice. Started under torchrun, each
    process makes its share of the parts on its own device. A drafter makes it faster and changes nothing.

    Examples:
        trainkit distill --target models/target --prompts prompts.jsonl --out data/distilled --temperatures [0,0.7]
        torchrun --nproc-per-node 8 -m trainkit.cli distill --target DIR --prompts FILE --out DIR --device cuda
        trainkit distill --target DIR --prompts FILE --out DIR --base-url http://localhost:8000/v1 --concurrency 128

    Args:
        target: Hugging Face folder of the target; with --base-url only its tokenizer and config are read.
        prompts: Rows to answer: chats up to their last user turn, `prompt`, `question`, `turns` or `text`.
        out: Folder of the set; `data.train` takes it as it is.
        temperatures: Every prompt is answered at each; 0 takes the likeliest tokens.
        n: Answers to a prompt at each temperature.
        max_new_tokens: Most tokens in an answer.
        top_p: Nucleus mass.
        top_k: Likeliest tokens kept; 0 keeps all.
        seed: With a row's place in the set it fixes its draws.
        limit: First prompts to take.
        columns: Our column names -> the file's.
        drafter: Drafter bundle to decode with.
        depth: Tokens drafted a round.
        batch: Answers decoded together.
        device: Torch device; `cuda` is each process's own under torchrun.
        dtype: float32, bfloat16 or float16.
        base_url: An OpenAI-compatible server to ask instead, its URL up to /v1; its key comes from OPENAI_API_KEY. Start vLLM
            with `--generation-config vllm`, or it applies the model's own top-k and top-p where these flags are at rest.
        model: The server's name for the model; the first it offers by default.
        concurrency: Requests that the server works on at once.
        part_rows: Rows in a file of the set, the unit that processes share out.
    """
    _check(temperatures, {"n": n, "part_rows": part_rows, "max_new_tokens": max_new_tokens}, top_k, top_p)
    if base_url is not None and (drafter is not None or depth is not None):
        raise UserError("--drafter and --depth are for decoding here; a server has its own, so leave them out with --base-url")
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    read_config(target)  # a missing folder would be looked for on the hub, as a tokenizer's name
    tokenizer = load_tokenizer(target)
    asked = read_asked(prompts, tokenizer, limit, columns)
    layout = Layout(len(asked), tuple(temperatures), n, part_rows)
    sampling = {"max_new_tokens": max_new_tokens, "top_p": top_p, "top_k": top_k, "seed": seed}
    if base_url is None:
        answer = _local(target, drafter, asked, sampling, depth, batch, device, dtype)
        source: dict[str, Any] = {"dtype": dtype, "weights": weights_digest(target)}
    else:
        answer, source = _remote(base_url, model, tokenizer, asked, sampling, concurrency)
    provenance = {
        "target": bundle.fingerprint(target),
        "vocabulary": vocabulary_hash(tokenizer),
        **sampling,
        **source,
        "prompts": {"name": Path(prompts).name, "sha256": content_hash(prompts), "limit": limit, "columns": columns},
        "versions": {"trainkit": __version__},
    }
    folder = Path(out)
    made = write_set(folder, layout, asked, answer, provenance, rank=rank, world_size=world_size, progress=rank == 0)
    return _summary(folder, layout, made, rank, world_size)


def _check(temperatures: Sequence[float], counts: Mapping[str, int], top_k: int, top_p: float) -> None:
    """Before the folder is begun, since a set is gone on with only under the settings it was begun with."""
    if not temperatures:
        raise UserError("--temperatures: give at least one, such as [0,0.7]")
    for temperature in temperatures:
        Sampling(temperature, top_k, top_p)
    if len(set(temperatures)) < len(temperatures):
        raise UserError(f"--temperatures: {list(temperatures)} names one twice; --n gives several answers at each")
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"--{name}: {value} must be at least 1")


def _local(
    target: str,
    drafter: str | None,
    asked: Sequence[Asked],
    sampling: dict[str, Any],
    depth: int | None,
    batch: int,
    device: str,
    dtype: str,
) -> Answerer:
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    longest = max(range(len(asked)), key=lambda place: len(asked[place].tokens))
    covered = covered_positions(target)
    if len(asked[longest].tokens) >= covered:
        raise UserError(
            f"--prompts: prompt {longest} has {len(asked[longest].tokens)} tokens, the target covers {covered}; shorten it"
        )
    max_len = min(len(asked[longest].tokens) + sampling["max_new_tokens"], covered)
    runner = Runner.load(target, drafter, device, dtype, batch, max_len)

    def answer(items: Sequence[Item], temperature: float) -> Iterator[Answer]:
        # long answers begin early when prompts are long; sorted, the batch's rows have prompts of similar length
        items = sorted(items, key=lambda item: -len(asked[item[1]].tokens))
        draws = [(prompt, which) for _, prompt, which in items]
        texts = [asked[prompt].tokens for _, prompt, _ in items]
        for place, output in runner.generate_each(texts, draws, temperature=temperature, depth=depth, **sampling):
            yield Answer(items[place][0], output.tokens, output.text, output.finish)

    return answer


def _remote(
    base_url: str, model: str | None, tokenizer: Any, asked: Sequence[Asked], sampling: dict[str, Any], concurrency: int
) -> tuple[Answerer, dict[str, Any]]:
    from trainkit.data.openai_client import Server

    server = Server(
        base_url,
        model,
        tokenizer=tokenizer,
        end_id=tokenizer.eos_token_id,
        concurrency=concurrency,
        api_key=os.environ.get("OPENAI_API_KEY"),
    )

    def answer(items: Sequence[Item], temperature: float) -> Iterator[Answer]:
        numbered = ((number, asked[prompt].tokens) for number, prompt, _ in items)
        before = server.encoded
        yield from server.complete(numbered, temperature=temperature, **sampling)
        if server.encoded > before:
            print(
                f"{server.encoded - before:,} answers came without token ids and were encoded from their text, which need not "
                "give the tokens that the model drew",
                file=sys.stderr,
            )

    return answer, {"server": server.describe()}


def _summary(folder: Path, layout: Layout, made: Made, rank: int, world_size: int) -> str:
    speed = made.tokens / made.seconds if made.seconds else 0.0
    ended = f", {made.ended / made.rows:.0%} ended by themselves" if made.rows else ""
    whose = f" (process {rank} of {world_size})" if world_size > 1 else ""
    return (
        f"{folder}: {made.rows:,} of {layout.rows:,} rows made{whose}, {made.found:,} were there; {made.tokens:,} tokens in "
        f"{made.seconds:.0f} s, {speed:,.0f} tokens/s{ended}"
    )
