"""Rollouts: groups of responses from the runner on the policy's current weights, with or without a drafter.

A drafter changes the speed, not the distribution: under `coupled` verification (the default) the tokens are those of plain
sampling with the same seed, under `residual` their distribution. A response's draws follow from (seed, step, index of its task,
number of the sample), so they depend neither on the batch, nor on the order of the tasks, nor on which rank generates them.
Generation is synchronous: every token of a step is drawn from the weights of the last `update`.

`speculate: auto` is the runner's policy `cost`: in every round, and by the number of unfinished responses, it drafts
the number of tokens that is fastest by the measured costs and the acceptance of recent rounds, or none. Left out on purpose: a
second controller, which would compare tokens per second with and without a draft; it would decide the same, later.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from time import perf_counter
from typing import Any, Literal

from torch import Tensor
from tqdm import tqdm

from trainkit.errors import UserError, note
from trainkit.models.load import hf_views
from trainkit.models.weights import EMBEDDING, HEAD
from trainkit.rl.types import Group, Response, Task
from trainkit.runner.engine import Runner
from trainkit.runner.options import GenerateOptions
from trainkit.runner.stats import Stats

USELESS = 0.05
"""Share of first drafted tokens that must be accepted in a step; below it the drafter is reported."""
FEWEST = 100
"""Smallest number of first drafted tokens for which that share is evaluated."""
RETRY = 20
"""Number of steps after which `auto` tries again a drafter that was useless; at once if its weights have changed."""


class Rollouts:
    """Generates groups of responses with a runner, whose weights follow the policy by `update`.

    Args:
        runner: Decodes, with at most `max_batch` responses at the same time. Without a drafter it samples plainly.
        samples: Number of responses to each prompt; they share its prefill.
        max_new_tokens: Largest number of tokens of a response, the end token included.
        temperature: Sampling temperature, above 0.
        seed: Seed of all draws.
        speculate: `on` drafts in every round, `off` in none, `auto` where it is expected to be faster.
        **options: Other fields of `GenerateOptions`: what to draft, `stop`, `verify`.

    Raises:
        UserError: an option out of range, or one under which the sampled distribution is not the one that is trained.
    """

    def __init__(
        self,
        runner: Runner,
        samples: int,
        max_new_tokens: int,
        temperature: float = 1.0,
        seed: int = 0,
        speculate: Literal["on", "off", "auto"] = "on",
        **options: Any,
    ) -> None:
        self.runner, self.samples, self.seed, self.speculate = runner, samples, seed, speculate
        self.options = options | {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        self._check(GenerateOptions.from_names("Rollouts", self.options))
        self._useless: tuple[int, int] | None = None  # step of the finding, and version of the drafter's weights
        self._report: dict[str, float] = {}

    def _check(self, options: GenerateOptions) -> None:
        if self.samples < 1:
            raise UserError(f"samples {self.samples}: must be at least 1")
        if self.speculate not in ("on", "off", "auto"):
            raise UserError(f"speculate {self.speculate!r}: choose from on, off, auto")
        if options.sampling.greedy:
            raise UserError(f"temperature {options.temperature:g}: all responses to a prompt would be equal; give one above 0")
        for name, value, whole in (("top_p", options.top_p, 1), ("top_k", options.top_k, 0)):
            if value != whole:
                raise UserError(
                    f"{name} {value}: the policy is trained on its whole distribution, so responses must be sampled from it; "
                    f"leave {name} at {whole}"
                )
        if options.verify not in ("coupled", "residual"):
            raise UserError(
                f"verify {options.verify!r}: responses would not follow the policy's distribution; use coupled or residual"
            )
        if self.speculate == "auto" and self.runner.drafter is not None:
            if options.tree is not None:
                raise UserError("speculate auto: chooses the length of chains; leave tree out, or set speculate on")
            if options.verify == "residual":
                raise UserError(
                    "speculate auto: follows measured times, which under verify residual would change the tokens; use coupled"
                )

    # Weights

    def update(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copies weights under their Hugging Face names into the runner, in place; see `policy_tensors`.

        Captured graphs stay valid. Nothing that older weights have computed is used again. Parts of the target that the drafter
        shares, such as the embedding and the head of EAGLE's drafts, follow.

        Raises:
            UserError: a name or shape that the target does not have, or a value that is not finite.
        """
        self.runner.update(named_tensors)

    def differing(self, named_tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
        """Names of the tensors that the runner does not hold, rounded to its dtype, bit for bit; empty after `update`."""
        views, wrong = hf_views(self.runner.rounds.target), list[str]()
        for name, value in named_tensors:
            view = views.get(EMBEDDING if name == HEAD and HEAD not in views else name)
            if view is None or view.shape != value.shape or not view.equal(value.detach().to(view)):
                wrong.append(name)
        return wrong

    # Responses

    def generate(self, tasks: Sequence[Task], step: int) -> list[Group]:
        """A group of sampled responses for each task, in the order of the tasks.

        Log-probabilities are those of the distribution that the tokens were drawn from, at the sampling temperature.
        """
        draws = [((step << 40) + task.index, sample) for task in tasks for sample in range(self.samples)]
        prompts = [task.tokens for task in tasks for _ in range(self.samples)]
        started = perf_counter()
        options = self.options | self._draft(step) | {"logprobs": True, "processed_logprobs": True}
        responses = self._run(prompts, draws, options)
        self._measure(responses, self.runner.last, perf_counter() - started, step)
        return [Group(task, responses[i * self.samples : (i + 1) * self.samples]) for i, task in enumerate(tasks)]

    def greedy(self, tasks: Sequence[Task], max_new_tokens: int | None = None) -> list[Response]:
        """The greedy response to each task, without log-probabilities; `report` stays that of the last `generate`."""
        options = self.options | self._draft(None) | {"temperature": 0.0}
        options["max_new_tokens"] = max_new_tokens or options["max_new_tokens"]
        return self._run([task.tokens for task in tasks], [(task.index, 0) for task in tasks], options)

    def _run(self, prompts: list[list[int]], draws: list[tuple[int, int]], options: dict[str, Any]) -> list[Response]:
        responses: dict[int, Response] = {}
        finished = self.runner.generate_each(prompts, draws, **options)
        for index, out in tqdm(finished, total=len(prompts), desc="rollouts", unit=" texts", leave=False, disable=None):
            responses[index] = Response(out.tokens, out.text, out.finish, out.logprobs or [], out.stats)
        return [responses[index] for index in range(len(prompts))]

    def _draft(self, step: int | None) -> dict[str, Any]:
        """What to draft: options that replace those of the user."""
        plain = {"depth": 0, "tree": None, "policy": None}
        if self.speculate == "off" or self.runner.drafter is None:
            return plain
        if self.speculate == "on":
            return {}
        if self._useless is not None:
            since, version = self._useless
            if version == self._drafter_version() and (step is None or since <= step < since + RETRY):
                return plain
            self._useless = None
        return {"policy": self.options.get("policy") or "cost"}

    def _drafter_version(self) -> int:
        """A number that changes when the drafter's weights are replaced in place."""
        assert self.runner.drafter is not None
        return sum(0 if weight.is_inference() else weight._version for weight in self.runner.drafter.parameters())

    # Measurements

    def report(self) -> dict[str, float]:
        """Measurements of the last `generate`.

        `rollout/seconds`; `tokens` of responses, and `tokens_per_second`; `tau` and `acceptance_K` of draft position K, where
        something was drafted; `paused`, the share of rounds without a draft; `shared`, the share of prompt tokens that were not
        read again; `length_mean` and `length_max` of responses in tokens; `truncated`, the share that was cut by length; and
        `drafter_useless`, 1 if fewer than 5 % of the first drafted tokens were accepted.
        """
        return dict(self._report)

    def _measure(self, responses: Sequence[Response], stats: Stats, seconds: float, step: int) -> None:
        lengths = [len(response.tokens) for response in responses]
        accepted, (first, offered) = stats.alpha_k, stats.first_drafts
        useless = offered >= FEWEST and first < USELESS * offered
        values = {
            "seconds": seconds,
            "tokens": sum(lengths),
            "tokens_per_second": sum(lengths) / seconds,
            "shared": stats.shared / max(stats.shared + stats.prefilled, 1),
            "length_mean": sum(lengths) / max(len(lengths), 1),
            "length_max": max(lengths, default=0),
            "truncated": sum(one.finish in ("length", "max_len") for one in responses) / max(len(responses), 1),
        }
        if accepted:
            values |= {f"acceptance_{depth}": share for depth, share in enumerate(accepted, 1)}
            values |= {"tau": stats.tau, "paused": stats.paused / stats.rounds, "drafter_useless": float(useless)}
        self._report = {f"rollout/{name}": float(value) for name, value in values.items()}
        if useless:
            if self.speculate == "auto":
                self._useless = step, self._drafter_version()
            rest = f"it is not used for {RETRY} generations" if self.speculate == "auto" else "set speculate to auto or off"
            note(f"the drafter's first token is accepted in less than {USELESS:.0%} of rounds, so drafting costs time; {rest}")

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run continues with; the tokens do not depend on it."""
        return {"useless_since": None if self._useless is None else self._useless[0]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a `state_dict`, after the drafter's weights are loaded."""
        since = state["useless_since"]
        self._useless = None if since is None or self.runner.drafter is None else (since, self._drafter_version())
