"""What the parts of an RL step pass to one another: tasks, responses in groups, and token tensors for the losses."""

# P prompts  G responses of a prompt  R responses  T response tokens, padded at the end

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from trainkit.runner.stats import Stats


@dataclass(frozen=True)
class Task:
    """A prompt with what its rewards need.

    Attributes:
        index: Number of its row in the data set; with the step it fixes the draws of its responses.
        tokens: Token ids of the prompt.
        prompt: The prompt as the data set has it: raw text, or the messages of a chat. Reward functions receive it.
        columns: The row's other columns by name. Reward functions receive them.
        source: Where the row was read, such as `file.jsonl:3`, for messages.
    """

    index: int
    tokens: list[int]
    prompt: str | list[dict[str, Any]]
    columns: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""


@dataclass
class Response:
    """One sampled response.

    Attributes:
        tokens: Its token ids, the end token included.
        text: Its text without special tokens.
        finish: `end`, `stop`, `length` or `max_len`, as in `runner.request.Output`.
        logprobs: Log-probability of each token under the distribution that it was drawn from, in nats.
        stats: Rounds and accepted lengths.
        rewards: Value of each reward function by name; NaN if it is missing.
        reward: Weighted sum of the rewards that are not missing; NaN if all are.
        extra: What reward functions logged for tables, by column.
        advantage: Advantage relative to its group; NaN before it is computed, and for groups that nobody trains on.
    """

    tokens: list[int]
    text: str
    finish: str
    logprobs: list[float]
    stats: Stats = field(default_factory=Stats)
    rewards: dict[str, float] = field(default_factory=dict)
    reward: float = float("nan")
    extra: dict[str, Any] = field(default_factory=dict)
    advantage: float = float("nan")


@dataclass
class Group:
    """All responses to one prompt in one step; a group never crosses ranks."""

    task: Task
    responses: list[Response]


@dataclass(frozen=True)
class PolicyTokens:
    """The response tokens of some responses; all that a policy loss knows.

    Attributes:
        new_RT: Log-probabilities under the policy that is trained, differentiable.
        old_RT: Log-probabilities under the policy that began this optimisation phase, as the trainer computes them.
        advantage_RT: Advantage of each token.
        mask_RT: 1 where a token counts; float. Other tensors hold finite values everywhere.
        ref_RT: Log-probabilities under the reference policy; None if the loss has no KL term.
        correction_RT: Factor of each token's loss for the mismatch between sampler and trainer; None for 1.
    """

    new_RT: Tensor
    old_RT: Tensor
    advantage_RT: Tensor
    mask_RT: Tensor
    ref_RT: Tensor | None = None
    correction_RT: Tensor | None = None
