"""`trainkit distill`: a training set of text that the target itself generates from prompts, for training drafters."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from trainkit import __version__, bundle
from trainkit.data.manifest import weights_digest
from trainkit.data.sets.distilled import Complete, DistilledLayout, PlannedRow, write_distilled
from trainkit.data.sets.writer import SetJob, check_positive, local_device, quiet_libraries
from trainkit.data.text.chat_template import Encoder, load_tokenizer, vocabulary_hash
from trainkit.data.text.prompts import Completion, Prompt, read_prompt_rows
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
    max_len: int | None = None,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    limit: int | None = None,
    columns: dict[str, str] | None = None,
    drafter: str | None = None,
    depth: int | None = None,
    batch: int = 32,
    device: str = "auto",
    dtype: str = "float32",
    base_url: str | None = None,
    model: str | None = None,
    concurrency: int = 32,
    part_rows: int = 1024,
) -> str:
    """Generates a completion for every prompt at every temperature, and writes token ids with a loss mask, and readable chats.

    After a kill or an interrupt, the same command continues where it stopped; no row is lost or generated twice. Under
    torchrun, each process generates its share of the parts on its own device. A drafter makes generation faster and does not
    change the text.

    Examples:
        trainkit distill --target models/target --prompts prompts.jsonl --out data/distilled --temperatures [0,0.7]
        torchrun --nproc-per-node 8 -m trainkit.cli distill --target DIR --prompts FILE --out DIR --device cuda
        trainkit distill --target DIR --prompts FILE --out DIR --base-url http://localhost:8000/v1 --concurrency 128

    Args:
        target: Hugging Face folder of the target; with --base-url, only its tokenizer and config are read.
        prompts: File, folder or hub name of rows with prompts: chats (up to their last user turn), `prompt`, `question`,
            the first of `turns`, or `text`, which is raw: no chat template and no BOS token is added.
        out: Folder of the set; pass it to training as `data.train`.
        temperatures: Sampling temperatures, all of which are used for each prompt; 0 takes the most probable tokens.
        n: Completions for each prompt and temperature.
        max_new_tokens: Maximum length of a completion in tokens.
        max_len: Maximum length of a prompt and its completion together; by default as many tokens as the target covers.
        top_p: Nucleus sampling: probability mass to sample from.
        top_k: Number of most probable tokens to sample from; 0 uses all.
        seed: Seed for sampling; with a row's number in the set, it determines the row's text.
        limit: Number of prompts to use, from the beginning; all by default.
        columns: Column mapping, from trainkit's names to the file's.
        drafter: Drafter bundle for speculative decoding.
        depth: Tokens drafted in each round.
        batch: Completions generated at the same time.
        device: Torch device; `auto` uses a GPU if there is one, under torchrun each process its own.
        dtype: Precision: float32, bfloat16 or float16.
        base_url: URL, up to /v1, of an OpenAI-compatible server that generates the text; the API key is read from
            OPENAI_API_KEY. Start vLLM with `--generation-config vllm`; otherwise it applies the model's own top-k and top-p
            where these flags have their defaults.
        model: Name of the model on the server; by default the first that it lists.
        concurrency: Number of requests that the server works on at the same time.
        part_rows: Rows in a file of the set, which is the unit that processes share out.
    """
    # Check every option before the folder is created, since a set is continued only with the options that started it.
    temperatures = check_sampling(temperatures, top_k, top_p)
    check_positive(n=n, part_rows=part_rows, max_new_tokens=max_new_tokens, max_len=max_len)
    check_positive(concurrency=concurrency, batch=batch, limit=limit)
    if base_url is not None and (drafter, depth, max_len) != (None, None, None):
        raise UserError("--drafter, --depth and --max_len: only for decoding on this machine; leave them out with --base-url")
    quiet_libraries()
    read_config(target)  # first, since a missing folder would be taken for a tokenizer's name on the hub
    # Read the prompts.
    encoder = Encoder(load_tokenizer(target))
    rows = read_prompt_rows(prompts, encoder, limit, columns)
    layout = DistilledLayout(len(rows), temperatures, n, part_rows)
    sampling = {"max_new_tokens": max_new_tokens, "top_p": top_p, "top_k": top_k, "seed": seed}
    # Load the target, or connect to the server.
    if base_url is None:
        check_lengths(target, [len(row.tokens) for row in rows], max_len)
        runner = Runner.load(target, drafter, local_device(device), dtype, batch, max_len)
        complete = _local(runner, rows, sampling, depth)
        source: dict[str, Any] = {"dtype": dtype, "weights": weights_digest(target)}
    else:
        complete, source = _remote(base_url, model, encoder, rows, sampling, concurrency)
    # Write the set.
    provenance = {
        "target": bundle.fingerprint(target),
        "vocabulary": vocabulary_hash(encoder.tokenizer),
        **sampling,
        **({} if max_len is None else {"max_len": max_len}),
        **source,
        "prompts": {"name": Path(prompts).name, "sha256": content_hash(prompts), "limit": limit, "columns": columns},
        "versions": {"trainkit": __version__},
    }
    job = SetJob.from_environment(out, provenance)
    stats = write_distilled(job, layout, rows, complete)
    ended = f"{stats.ended / stats.written:.0%} ended with an end token; " if stats.written else ""
    return stats.summary(job, layout.rows, "rows", ended + stats.cut_note)


def check_sampling(temperatures: Sequence[float], top_k: int = 0, top_p: float = 1.0) -> tuple[float, ...]:
    """The temperatures as decoding uses them (`Sampling`).

    Raises:
        UserError: temperatures that are missing, repeated or out of range, or top-k or top-p out of range.
    """
    used = tuple(Sampling(temperature, top_k, top_p).temperature for temperature in temperatures)
    if not used:
        raise UserError("--temperatures: give at least one, such as [0,0.7]")
    if len(set(used)) < len(used):
        raise UserError(f"--temperatures: {list(temperatures)} has a value twice; for several completions at each, use --n")
    return used


def check_lengths(target: str, lengths: Sequence[int], max_len: int | None) -> None:
    """Raises UserError if a prompt leaves no room for a new token in `max_len`, by default all positions of the target."""
    longest, limit = max(range(len(lengths)), key=lengths.__getitem__), max_len or covered_positions(target)
    if lengths[longest] >= limit:
        reason = f"the target covers {limit}" if max_len is None else f"--max_len is {limit}"
        raise UserError(f"--prompts: prompt {longest} has {lengths[longest]} tokens, but {reason}; shorten or remove it")


def _local(runner: Runner, prompts: Sequence[Prompt], sampling: dict[str, Any], depth: int | None) -> Complete:
    def complete(rows: Sequence[PlannedRow], temperature: float) -> Iterator[Completion]:
        # sorted by length, so that the rows of a batch have prompts of similar length
        rows = sorted(rows, key=lambda row: -len(prompts[row.prompt].tokens))
        draws = [(row.prompt, row.sample) for row in rows]
        texts = [prompts[row.prompt].tokens for row in rows]
        for index, output in runner.generate_each(texts, draws, temperature=temperature, depth=depth, **sampling):
            yield Completion(rows[index].id, output.tokens, output.text, output.finish)

    return complete


def _remote(
    base_url: str, model: str | None, encoder: Encoder, prompts: Sequence[Prompt], sampling: dict[str, Any], concurrency: int
) -> tuple[Complete, dict[str, Any]]:
    from trainkit.data.openai_client import CompletionClient

    end_id = None if all(prompt.text for prompt in prompts) else encoder.turn_end_id  # raw text ends with the tokenizer's
    ends: dict[str, Any] = {"end_ids": encoder.end_ids, "end_id": end_id}
    client = CompletionClient(base_url, model, tokenizer=encoder.tokenizer, **ends, concurrency=concurrency)

    def complete(rows: Sequence[PlannedRow], temperature: float) -> Iterator[Completion]:
        before = client.encoded
        requests = ((row.id, prompts[row.prompt].tokens) for row in rows)
        yield from client.complete(requests, temperature=temperature, **sampling)
        if encoded := client.encoded - before:
            print(
                f"{encoded:,} completions came without token ids; their text was encoded, which may give other tokens than "
                "those that the model sampled",
                file=sys.stderr,
            )

    return complete, {"server": {"model": client.model, "base_url": client.base_url}}
