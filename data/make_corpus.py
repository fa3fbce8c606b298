"""Generates data/tiny: a chat corpus of word problems and code tasks, its tokenizer, and prompts for benchmarks. See README.md.

Run `python data/make_corpus.py`; the same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

from code_tasks import task
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from word_problems import problem

SPECIAL = ["<|bos|>", "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"]
VOCABULARY = 1024
CODE_SHARE = 0.4
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|user|>{{ message['content'] }}<|end|>"
    "{% elif message['role'] == 'assistant' %}<|assistant|>{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{% else %}{{ raise_exception('roles are user and assistant, not ' + message['role']) }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def rows(seed: int) -> Iterator[tuple[str, str]]:
    """Endless (user, assistant) pairs without repeated user turns."""
    rng = random.Random(seed)
    seen: set[str] = set()
    while True:
        user, assistant = task(rng) if rng.random() < CODE_SHARE else problem(rng)
        if user not in seen:
            seen.add(user)
            yield user, assistant


def write_jsonl(path: Path, chats: list[list[tuple[str, str]]]) -> None:
    """Writes one chat per line; a turn is (role, content)."""
    lines = (json.dumps({"messages": [{"role": r, "content": c} for r, c in chat]}, ensure_ascii=False) for chat in chats)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Trains byte-level BPE with one token per digit and the special tokens first."""
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    split = pre_tokenizers.Split(words, behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Writes a folder that `AutoTokenizer.from_pretrained` loads."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "additional_special_tokens": ["<|user|>", "<|assistant|>"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")


def make(out: Path, train: int, validation: int, prompts: int, seed: int) -> None:
    """Writes the corpus into `out`; validation, prompts and training chats are drawn, in this order, without repeats."""
    out.mkdir(parents=True, exist_ok=True)
    stream = rows(seed)
    validation_rows, prompt_rows, train_rows = ([next(stream) for _ in range(n)] for n in (validation, prompts, train))
    write_jsonl(out / "train.jsonl", [[("user", u), ("assistant", a)] for u, a in train_rows])
    write_jsonl(out / "validation.jsonl", [[("user", u), ("assistant", a)] for u, a in validation_rows])
    write_jsonl(out / "prompts.jsonl", [[("user", u)] for u, _ in prompt_rows])
    write_tokenizer(out / "tokenizer", train_tokenizer([text for chat in train_rows for text in chat]))


def main() -> None:
    """Command line: sizes, seed and output folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tiny")
    parser.add_argument("--train", type=int, default=6000)
    parser.add_argument("--validation", type=int, default=300)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--seed", type=int, default=2024)
    args = parser.parse_args()
    make(args.out, args.train, args.validation, args.prompts, args.seed)


if __name__ == "__main__":
    main()
