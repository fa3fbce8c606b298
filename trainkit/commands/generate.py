"""`trainkit generate`: one prompt in, text out as it is decoded, and what it took."""

from __future__ import annotations

import sys
from pathlib import Path
from time import perf_counter

from trainkit.data.text.chat_template import Encoder
from trainkit.data.text.sources import RowError
from trainkit.errors import UserError
from trainkit.runner.engine import Runner
from trainkit.runner.trees.dynamic import read_tree
from trainkit.runner.verify import Typical


def generate(
    *,
    target: str,
    prompt: str,
    drafter: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    depth: int | None = None,
    tree: str | None = None,
    policy: str | None = None,
    verify: str = "coupled",
    typical_epsilon: float = Typical.epsilon,
    typical_scale: float = Typical.scale,
    stop: list[str] | None = None,
    raw: bool = False,
    device: str = "cpu",
    dtype: str = "float32",
) -> None:
    """Continues one prompt, streaming the text; with a drafter the text is the same and comes sooner.

    Examples:
        trainkit generate --target models/target --prompt "How many days have 3 weeks?"
        trainkit generate --target models/target --drafter models/draft --prompt @question.txt --temperature 0.7 --seed 1
        trainkit generate --target models/target --drafter models/draft --prompt "Why?" --tree dynamic:5,4,16
        trainkit generate --target models/target --drafter models/draft --prompt "Why?" --policy cost

    Args:
        target: Hugging Face folder of the target.
        prompt: The text; `-` reads standard input, `@FILE` a file.
        drafter: Drafter bundle, or a plain folder of a small model with the same tokenizer.
        max_new_tokens: Most tokens to generate.
        temperature: 0 takes the likeliest token.
        top_p: Nucleus mass.
        top_k: Likeliest tokens kept; 0 keeps all.
        seed: Fixes every draw.
        depth: Tokens drafted a round; 0 decodes plainly.
        tree: Draft a tree instead of a chain. dynamic:DEPTH,TOP_K,NODES follows the draft's probabilities: on each of DEPTH
            levels the TOP_K best nodes get TOP_K children, and of all these the best are verified, NODES rows with the root.
            [[0],[1],[0,0]] is a fixed tree of rank paths: here the root's best two tokens and the best after the first.
        policy: Choose the depth round by round, at most `depth` (10): cost drafts while the next token is worth more than it
            costs on this machine; predictor:P and confidence:P until the chance of being kept, or the draft's own, falls below
            P; ema by what was lately accepted. With a dynamic tree: fixed, which ranks its nodes by the predictor, or cost,
            which also ends and prunes it. The text is the same under all of them.
        verify: coupled: the text of plain decoding with the same seed, token for token; residual: equal in distribution;
            typical: LOSSY above temperature 0, keeps drafted tokens that the target finds plausible and so writes other text.
        typical_epsilon: typical keeps a token whose probability is above the lower of this,
        typical_scale: and of this times exp(-entropy).
        stop: Strings that end the text.
        raw: Give the prompt to the model as it is; otherwise it becomes a user turn where the tokenizer has a chat template.
        device: Torch device.
        dtype: float32, bfloat16 or float16.
    """
    if prompt == "-":
        prompt = sys.stdin.read()
    elif prompt.startswith("@"):
        if not Path(prompt[1:]).is_file():
            raise UserError(f"prompt {prompt}: no such file; give one, or the text itself without @")
        try:
            prompt = Path(prompt[1:]).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"prompt {prompt}: not UTF-8 at byte {error.start + 1}; save the file as UTF-8") from None
    runner = Runner.load(target, drafter, device=device, dtype=dtype, max_batch=1)
    if not raw and runner.tokenizer.chat_template:
        try:
            tokens = Encoder(runner.tokenizer).prompt_ids([{"role": "user", "content": prompt}])
        except RowError as reason:
            raise UserError(f"{target}: {reason}; mend its chat template, or give --raw true") from None
    else:
        tokens = runner.tokenizer.encode(prompt, add_special_tokens=False)
    began = perf_counter()
    stream = runner.stream(
        tokens,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        depth=depth,
        tree=None if tree is None else read_tree(tree),
        policy=policy,
        verify=verify,
        typical_epsilon=typical_epsilon,
        typical_scale=typical_scale,
        stop=stop or (),
    )
    for piece in stream:
        print(piece, end="", flush=True)
    print()
    spent = perf_counter() - began
    stats = runner.last
    speed = stats.tokens / spent
    lossy = f"; LOSSY: {verify} verification, not the target's own text" if stats.lossy else ""
    paused = f", {stats.paused} without a draft, which would not have paid" if stats.paused else ""
    print(
        f"[{stats.tokens} tokens, {speed:.1f} tokens/s, tau {stats.tau:.2f} over {stats.rounds} rounds{paused}{lossy}]",
        file=sys.stderr,
    )
