"""`trainkit generate`: continues one prompt, prints the text while it is decoded, and then its speed."""

from __future__ import annotations

import sys
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

from trainkit.data.sets.writer import quiet_libraries
from trainkit.data.text.chat_template import Encoder
from trainkit.data.text.sources import RowError
from trainkit.errors import UserError, check_unicode
from trainkit.runner.engine import Runner
from trainkit.runner.options import GenerateOptions


def generate(
    *,
    target: str,
    prompt: str,
    drafter: str | None = None,
    max_new_tokens: int = 256,
    max_len: int | None = None,
    verify: Literal["coupled", "residual", "typical"] = "coupled",
    tree: str | None = None,
    stop: list[str] | None = None,
    raw: bool = False,
    device: str = "auto",
    dtype: str = "float32",
    **options: Any,
) -> None:
    """Continues one prompt, streaming the text; with a drafter the text is the same and comes sooner.

    Examples:
        trainkit generate --target models/target --prompt "How many days have 3 weeks?"
        trainkit generate --target models/target --drafter models/draft --prompt @question.txt --temperature 0.7 --seed 1
        trainkit generate --target models/target --drafter models/draft --prompt "Why?" --tree dynamic:5,4,16
        trainkit generate --target models/target --drafter models/draft --prompt "Why?" --policy cost

    Args:
        target: Hugging Face folder of the target.
        prompt: The text; `-` reads standard input, `@FILE` a file, both without their final line break.
        drafter: Drafter bundle, or a plain folder of a small model with the same tokenizer.
        max_new_tokens: Largest number of new tokens, the end token included.
        max_len: Largest number of tokens of prompt and text together; by default as many as the target covers.
        verify: coupled: the text of plain decoding with the same seed, token for token; residual: the same distribution;
            typical: LOSSY above temperature 0, accepts drafted tokens that the target finds plausible, so the text is another.
        tree: Draft a tree instead of a chain. dynamic:DEPTH,TOP_K,NODES follows the draft's probabilities: on each of DEPTH
            levels the TOP_K best nodes get TOP_K children, and the best NODES of all, root included, are verified.
            [[0],[1],[0,0]] is a static tree of rank paths: the root's two likeliest children, and the first one's likeliest
            child.
        stop: Strings that end the text.
        raw: Give the prompt to the model as it is, without a BOS token; otherwise it becomes a user turn if the tokenizer has a
            chat template.
        device: Torch device; `auto` uses a GPU if there is one.
        dtype: float32, bfloat16 or float16.
        **options: Sampling and drafting, as in `GenerateOptions`.
    """
    # Load the models, and encode the prompt.
    chosen = GenerateOptions(
        max_new_tokens, verify=verify, tree=tree, stop=tuple(stop or ()), logprobs=False, ignore_end=False, **options
    )
    quiet_libraries()
    runner = Runner.load(target, drafter, device=device, dtype=dtype, max_batch=1, max_len=max_len)
    text = _read_prompt(prompt)
    if not raw and runner.tokenizer.chat_template:
        try:
            tokens = Encoder(runner.tokenizer).prompt_ids([{"role": "user", "content": text}])
        except RowError as reason:
            raise UserError(f"{target}: {reason}; fix its chat template, or give --raw true") from None
    else:
        tokens = runner.tokenizer.encode(text, add_special_tokens=False)
    # Print the text while it is decoded, then the statistics.
    pieces = runner.stream(tokens, chosen)  # not timed: a policy may first measure this machine
    began = perf_counter()
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    stats, seconds = runner.last, perf_counter() - began
    lossy = f"; LOSSY: {verify} verification, not the target's own text" if stats.lossy else ""
    paused = f", {stats.paused} of them without a draft, because drafting would have been slower" if stats.paused else ""
    cut = "; ended before max_new_tokens: " if stats.cut_texts else ""
    if cut:
        cut += f"the target covers {runner.max_len} positions" if max_len is None else f"max_len {max_len} is reached"
    print(
        f"[{stats.tokens} tokens, {stats.tokens / seconds:.1f} tokens/s, tau {stats.tau:.2f} over {stats.rounds} rounds"
        f"{paused}{cut}{lossy}]",
        file=sys.stderr,
    )


def _read_prompt(prompt: str) -> str:
    """The text of `--prompt`: as given, or from standard input (-) or a file (@FILE) without the final line break."""
    if prompt != "-" and not prompt.startswith("@"):
        return check_unicode("prompt", prompt)
    if prompt != "-" and not Path(prompt[1:]).is_file():
        raise UserError(f"prompt {prompt}: no such file; give one, or the text itself without @")
    content = sys.stdin.buffer.read() if prompt == "-" else Path(prompt[1:]).read_bytes()
    try:
        return content.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise UserError(f"prompt {prompt}: not UTF-8 at byte {error.start + 1}; give text in UTF-8") from None
