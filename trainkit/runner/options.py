"""The options of decoding: one set for Python, the command line and the runner's plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from trainkit.errors import UserError, check_unicode
from trainkit.runner.sampling import Sampling
from trainkit.runner.trees.dynamic import parse_tree
from trainkit.runner.trees.shape import RankPath, Shape
from trainkit.runner.verify import Typical, Verification


@dataclass(frozen=True)
class GenerateOptions:
    """Options of `Runner.generate` and `trainkit generate`, the same for all prompts of a call.

    Args:
        max_new_tokens: Largest number of new tokens for each prompt, the end token included.
        temperature: Softmax temperature; 0 takes the likeliest token, and so does any value below 1e-6.
        top_p: Probability mass of the nucleus that is sampled from.
        top_k: Number of likeliest tokens that are sampled from; 0 takes all.
        seed: Seed of the noise. With a prompt's index in the call it fixes every draw, whatever the batch, depth or drafter.
        depth: Number of tokens drafted in a round, as a chain; 0 decodes plainly. By default the tree that the drafter's bundle
            recommends, or a chain of 4.
        verify: coupled: the text of plain decoding with the same seed, token for token; residual: the same distribution;
            typical: LOSSY above temperature 0, accepts drafted tokens that the target finds plausible.
        stop: Strings that end a text; the text is cut before them.
        logprobs: Also return each token's log-probability.
        processed_logprobs: Log-probabilities under the distribution that tokens are drawn from, after temperature, top-k and
            top-p; by default under the target's at temperature 1. Equal at temperature 0.
        tree: Draft a tree instead of a chain. dynamic:DEPTH,TOP_K,NODES follows the draft's probabilities: on each of DEPTH
            levels the TOP_K best nodes get TOP_K children, and the best NODES of all, root included, are verified.
            [[0],[1],[0,0]] is a static tree of rank paths: the root's two likeliest children, and the first one's likeliest
            child.
        policy: Choose the depth in every round, up to `depth` (10 by default). cost: draft while the next token is worth more
            than it costs on this machine, by the best signal available; cost:SIGNAL: by this signal (logistic,
            predictor or confidence). logistic:P, predictor:P and confidence:P: until the acceptance predicted by the online
            logistic model or by the trained predictor, or the draft's own probability, falls below P. ema: by recent
            acceptance; fixed: always `depth`. The text is the
            same under all.
        plain: Draft nothing, but compute as many rows in each step as verifying the draft would. In bfloat16 and float16,
            rounding depends on the number of rows; compare drafted texts, one prompt at a time, with this text.
        ignore_end: Continue to `max_new_tokens` past end tokens; for measurements.
        typical_epsilon: `typical` accepts a token whose probability is above the lower of this and `typical_scale`
            exp(-entropy).
        typical_scale: See `typical_epsilon`.

    Raises:
        UserError: an option is out of range, or two options contradict each other.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    depth: int | None = None
    verify: str | Verification = "coupled"
    stop: str | Sequence[str] = ()
    logprobs: bool = False
    processed_logprobs: bool = False
    tree: str | Sequence[RankPath] | Shape | None = None
    policy: str | None = None
    plain: bool = False
    ignore_end: bool = False
    typical_epsilon: float = Typical.epsilon
    typical_scale: float = Typical.scale

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        if isinstance(self.tree, str):
            object.__setattr__(self, "tree", parse_tree(self.tree))
        object.__setattr__(self, "temperature", self.sampling.temperature)
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens {self.max_new_tokens} must be at least 1")
        if any(not check_unicode("stop", text) for text in self.stop):
            raise UserError("stop: an empty string would end every text at once")
        if self.tree is not None and self.depth is not None:
            raise UserError("give depth or tree, not both")
        if self.plain and (self.policy is not None or self.verify != "coupled"):
            raise UserError("plain: only with coupled verification and a fixed depth or tree; leave verify and policy out")

    @staticmethod
    def from_names(caller: str, options: dict[str, Any]) -> GenerateOptions:
        """The options passed by name to the function `caller`.

        Raises:
            UserError: unknown option.
        """
        known = {item.name for item in fields(GenerateOptions)}
        if unknown := next((name for name in options if name not in known), None):
            raise UserError(f"{caller}: unknown option {unknown!r}; choose from {', '.join(sorted(known))}")
        return GenerateOptions(**options)

    @cached_property
    def sampling(self) -> Sampling:
        """Temperature, top-k and top-p."""
        return Sampling(self.temperature, self.top_k, self.top_p)
