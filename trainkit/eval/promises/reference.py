"""The promises about the target: our decoder computes what transformers computes, and a text ends at every end token."""

# T positions  V vocabulary

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trainkit.bundle import read_json
from trainkit.eval.bench.identity import logits
from trainkit.eval.promises.types import Check, Subject
from trainkit.layers.linear import rounds_products
from trainkit.runner.sampling import Sampling

EXTRA_ENDS = 3
"""Number of tokens that are made end tokens, one at a time: those that occur in most texts, the first token left out."""
PROMPTS = 3
"""Number of prompts that transformers continues token by token; it is the slowest part of the check."""


@torch.inference_mode()
def check_target(subject: Subject) -> Check:
    """Compares our decoder with transformers: logits on the prompts, and the first tokens of greedy texts."""
    promise = "The runner's target is the model that transformers loads from the same folder."
    model: Any = subject.reference.model
    device, prompts = subject.runner.device, subject.prompts
    # Logits on whole prompts
    worst, agreed, count = 0.0, 0, 0
    for prompt in prompts:
        theirs_TV = model(input_ids=torch.tensor([prompt], device=device), use_cache=False).logits[0].float()
        ours_TV = logits(subject.runner.rounds.target, prompt).float()
        worst = max(worst, float((theirs_TV - ours_TV).abs().max() / theirs_TV.abs().max().clamp(min=1e-6)))
        agreed += int((theirs_TV.argmax(-1) == ours_TV.argmax(-1)).sum())
        count += len(prompt)
    # Texts
    length = min(16, subject.arguments.max_new_tokens)
    theirs = [_greedy(model, prompt, length, device) for prompt in prompts[:PROMPTS]]
    ours = [output.tokens for output in subject.runner.generate(prompts[:PROMPTS], length, depth=0, ignore_end=True)]
    identity = subject.checker(Sampling()).compare(prompts[:PROMPTS], theirs, ours)
    in_float32 = subject.arguments.exact and not rounds_products(subject.runner.rounds.target)
    limit = 1e-3 if in_float32 else 0.1
    kept = worst <= limit and not (subject.arguments.exact and identity.mismatches)
    equal = identity.total - len(identity.differences)
    figure = f"logits differ by {worst:.1e} of the largest; {equal} of {identity.total} greedy texts equal"
    details = [f"the likeliest token is equal at {agreed} of {count} positions; limit of the difference {limit:g}"]
    counts = {"difference": worst, "agreed": agreed, "positions": count, "texts": identity.to_dict()}
    return Check("target", promise, "kept" if kept else "BROKEN", figure, details, counts)


def _greedy(model: Any, prompt: list[int], length: int, device: torch.device) -> list[int]:
    """The greedy continuation, with a forward pass over the whole text for each token, so without transformers' cache."""
    tokens = list(prompt)
    for _ in range(length):
        last_V = model(input_ids=torch.tensor([tokens], device=device), use_cache=False).logits[0, -1]
        tokens.append(int(last_V.argmax()))
    return tokens[len(prompt) :]


def check_ends(subject: Subject) -> Check:
    """Compares the runner's end ids with the folder's files, and ends texts in the middle of drafts.

    For the second part, frequent tokens are made end tokens too, one at a time. Plain decoding, chains and trees must then end
    every text right after the first occurrence of that token.
    """
    promise = "A text ends at every end token that the model's files name, also inside an accepted draft."
    runner, prompts, length = subject.runner, subject.prompts[:8], subject.arguments.max_new_tokens
    # The ids, from the files as plain JSON
    named, known = named_end_ids(subject.target_folder), set(runner.shape.end_ids)
    details = [f"end id {token} of {source} does not end a text" for token, source in named.items() if token not in known]
    details += [f"end id {token} is in no file of the target" for token in sorted(known - named.keys())]
    # Texts that end early
    before, cuts = runner.shape, 0
    whole = [output.tokens for output in runner.generate(prompts, length, depth=0)]
    firsts = Counter(token for text in whole for token in set(text[1:-1]) - set(text[:1]))
    for extra, _ in firsts.most_common(EXTRA_ENDS):
        runner.shape = replace(before, end_ids=tuple(sorted({*before.end_ids, extra})))
        expected = [text[: text.index(extra) + 1] if extra in text else text for text in whole]
        try:
            for name, draft in {
                "plain": {"depth": 0},
                "chain": {"depth": subject.depth},
                "tree": {"tree": subject.tree},
            }.items():
                outputs = [output.tokens for output in runner.generate(prompts, length, **draft)]
                identity = subject.checker(Sampling()).compare(prompts, expected, outputs)
                cuts += sum(len(one) < len(other) for one, other in zip(outputs, whole, strict=True))
                wrong = identity.mismatches if subject.arguments.exact else sum(extra in text[:-1] for text in outputs)
                details += [f"{name} with end token {extra}: {wrong} texts end elsewhere"] if wrong else []
        finally:
            runner.shape = before
    figure = "; ".join(details) or f"end ids {sorted(known)}; {cuts} texts stopped at an end token inside them"
    counts = {"end_ids": sorted(known), "cut_texts": cuts}
    return Check("ends", promise, "BROKEN" if details else "kept", figure, counts=counts)


def named_end_ids(folder: Path) -> dict[int, str]:
    """End id -> the file that names it, read as plain JSON, so independently of the reader that the runner uses.

    config.json (its text model's part if it has one) and generation_config.json name ids; tokenizer_config.json names a token,
    whose id is in tokenizer.json.
    """
    ids: dict[int, str] = {}
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            values = read_json(folder / name)
            value = values.get("eos_token_id", values.get("text_config", {}).get("eos_token_id"))
            ids |= {token: name for token in (value if isinstance(value, list) else [value]) if token is not None}
    name = "tokenizer_config.json"
    token = read_json(folder / name).get("eos_token") if (folder / name).is_file() else None
    token = token.get("content") if isinstance(token, dict) else token
    if token is not None and (folder / "tokenizer.json").is_file():
        values = read_json(folder / "tokenizer.json")
        vocab = values.get("model", {}).get("vocab", {})
        known = dict(vocab) if isinstance(vocab, dict) else {entry[0]: index for index, entry in enumerate(vocab)}
        known |= {added["content"]: added["id"] for added in values.get("added_tokens", [])}
        ids |= {known[token]: name} if token in known else {}
    return ids
