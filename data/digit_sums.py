"""Generates two-digit sums for the small task of reinforcement learning, and their tokenizer of 14 characters. See README.md.

`start.jsonl` holds prompts with NOISY answers: a model that is trained on them learns to add, but samples wrong digits as often as they
have them. So reinforcement learning begins with a low reward and a policy that can reach a high one. Run

    python data/digit_sums.py OUT [--noise 0.42] [--copies 8] [--seed 0]

`--prompt "What is {a} plus {b}?"` makes tasks for a chat model instead; then only the rows of tasks are of use. The same arguments give
the same bytes. Rows of `train.jsonl` and `validation.jsonl` have no pair of numbers in common.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

END, PAD = "<end>", "<pad>"
CHARACTERS = "0123456789+="


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_tokenizer(folder: Path) -> None:
    """Writes a folder that `AutoTokenizer.from_pretrained` loads: one token per character, an end token and a padding token."""
    vocabulary = {token: id for id, token in enumerate([*CHARACTERS, END, PAD])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.Fuse()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (END, PAD)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": PAD}
    config |= {"clean_up_tokenization_spaces": False, "model_max_length": 64}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def noisy(rng: random.Random, answer: str, noise: float) -> str:
    """The answer, each of whose digits is another one with probability `noise`."""
    other = lambda digit: rng.choice([d for d in "0123456789" if d != digit])
    return "".join(other(digit) if rng.random() < noise else digit for digit in answer)


def make(out: Path, prompt: str, noise: float, copies: int, validation: int, seed: int) -> None:
    """Writes tasks for training and validation, noisy answers to the training prompts, and the tokenizer into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    rng.shuffle(pairs)
    tasks = [{"prompt": prompt.format(a=a, b=b), "answer": str(a + b)} for a, b in pairs]
    train = tasks[validation:]
    write_jsonl(out / "validation.jsonl", tasks[:validation])
    write_jsonl(out / "train.jsonl", train)
    answers = [
        {"prompt": task["prompt"], "response": noisy(rng, task["answer"], noise)} for _ in range(copies) for task in train
    ]
    write_jsonl(out / "start.jsonl", answers)
    write_tokenizer(out / "tokenizer")


def main() -> None:
    """Command line: sizes, noise, seed and output folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--prompt", default="{a}+{b}=", help="text of a prompt, with {a} and {b}")
    parser.add_argument("--noise", type=float, default=0.42, help="probability of a wrong digit")
    parser.add_argument("--copies", type=int, default=8, help="noisy answers to each training prompt")
    parser.add_argument("--validation", type=int, default=500, help="pairs that are held out")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make(args.out, args.prompt, args.noise, args.copies, args.validation, args.seed)


if __name__ == "__main__":
    main()
