"""Tasks of lm-evaluation-harness (extra `eval`) with the runner as the model: batched, speculative if there is a drafter.

Encoding of contexts and continuations, few-shot prompts, metrics and filters are the harness's own. Texts are equal with and
without a drafter, because decoding is lossless.
"""

from __future__ import annotations

import difflib
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import lm_eval
import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from trainkit.errors import UserError, first_lines, note
from trainkit.runner import Runner, Stats

FEW_SHOT_SEED = 1234
"""Seed of the choice of examples, the harness's default."""
DEFAULT_NEW_TOKENS = 256
"""Largest number of new tokens where a task names none, as in the harness."""
NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names under which tasks limit the number of new tokens; the first one that is given counts."""
SAMPLING = {"temperature", "top_p", "top_k"}
"""Options of a task's generation that the runner has too."""


class RunnerLM(TemplateLM):
    """The runner as a model of lm-evaluation-harness.

    Args:
        runner: The model, with its drafter if there is one.
        options: Options of `Runner.generate` for every text, such as the depth.

    Attributes:
        stats: Counts of all texts that it wrote.
        seconds: Seconds that it took to write them, and to score texts.
    """

    def __init__(self, runner: Runner, **options: Any) -> None:
        super().__init__()
        self.runner, self.options, self.stats = runner, options, Stats()
        self.seconds = {"writing": 0.0, "scoring": 0.0}
        self.tokenizer: Any = runner.tokenizer
        self.max_length = runner.max_len
        self._device = runner.device

    @property
    def summary(self) -> str:
        """Number of written tokens, their speed and the time of scoring, as one line."""
        writing, scoring = self.seconds["writing"], self.seconds["scoring"]
        parts = [f"scored in {scoring:.1f} s"] if scoring else []
        if writing:
            tau = f", tau {self.stats.tau:.2f}" if self.runner.drafter is not None else ""
            parts.append(
                f"wrote {self.stats.tokens:,} tokens in {writing:.1f} s ({self.stats.tokens / writing:.1f} tokens/s{tau})"
            )
        return "; ".join(parts)

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Precedes a text that has no context: the start token, or the end token if there is none."""
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; by default with the tokenizer's own special tokens, but without a second start token."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The rendered chat; an unfinished assistant turn stays open."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether it is the greedy one); only the last `max_length` + 1 tokens count."""
        cut = [max(0, len(head) + len(tail) - self.max_length - 1) for _, head, tail in requests]
        for (strings, head, _), count in zip(requests, cut, strict=True):
            if count >= len(head):
                raise UserError(f"a continuation has more tokens than {self.max_length} positions: {str(strings)[:60]!r}")
        heads = [head[count:] for (_, head, _), count in zip(requests, cut, strict=True)]
        began = perf_counter()
        scores = self.runner.score_each(heads, [tail for _, _, tail in requests])
        bar = tqdm(scores, total=len(requests), desc="scoring", unit=" texts", disable=True if disable_tqdm else None)
        found = {index: (sum(score.logprobs), score.greedy) for index, score in bar}
        self.seconds["scoring"] += perf_counter() - began
        return [found[index] for index in range(len(requests))]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, in windows of `max_length` that predict every token once."""
        windows: list[tuple[int, list[int], list[int]]] = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            pieces = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            windows += [(number, *make_disjoint_window(piece)) for piece in pieces]
        totals = [0.0] * len(requests)
        for (number, _, _), (logprob, _) in zip(windows, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[number] += logprob
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context, cut before a stop string.

        Raises:
            UserError: a task asks for a way of generating that the runner does not have.
        """
        groups: dict[str, list[int]] = {}  # requests that share their settings are decoded together
        for index, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(index)
        texts = [""] * len(requests)
        for indices in groups.values():
            options = self._options(requests[indices[0]].args[1])
            room = self.max_length - options["max_new_tokens"]
            if room < 1:
                raise UserError(
                    f"a task asks for {options['max_new_tokens']} new tokens, but the model covers {self.max_length} positions"
                )
            prompts = [self.tok_encode(requests[index].args[0])[-room:] for index in indices]
            began = perf_counter()
            outputs = self.runner.generate(prompts, progress=not disable_tqdm, **options, **self.options)
            self.seconds["writing"] += perf_counter() - began
            self.stats = Stats.merge([self.stats, self.runner.last])
            for index, output in zip(indices, outputs, strict=True):
                texts[index] = output.text
        return texts

    def _options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Options of `Runner.generate` for a task's `generation_kwargs`."""
        values = dict(given)
        until = values.pop("until", None) or ()
        limits = [limit for name in NEW_TOKENS if (limit := values.pop(name, None)) is not None]
        sampled = values.pop("do_sample", values.get("temperature", 0) > 0)
        if unknown := sorted(set(values) - SAMPLING):
            raise UserError(f"generation_kwargs of a task: the runner has no option {unknown[0]!r}; remove it from the task")
        stop = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
        options = {"max_new_tokens": int(limits[0]) if limits else DEFAULT_NEW_TOKENS, "stop": stop}
        return options | (values if sampled else {})


def load_tasks(names: Sequence[str], folder: str | None = None, few_shot: int | None = None) -> Any:
    """Tasks with their data, as `TaskManager.load` gives them.

    Args:
        names: Names of the harness's tasks, groups or tags, or of tasks in `folder`; patterns are allowed.
        folder: Folder of YAML files that define tasks.
        few_shot: Number of examples before each question; None takes each task's own, or none.

    Raises:
        UserError: a name is not a task, or a task or its data cannot be loaded.
    """
    # Find the tasks. Indexing the harness's own takes many seconds, and a local folder may hold all that are needed.
    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"--task_path {folder}: no such folder; give one with YAML files of tasks")
    manager = TaskManager(include_path=folder, include_defaults=folder is None)
    if not all(manager.match_tasks([name]) for name in names):
        manager = TaskManager(include_path=folder)
    for name in names:
        if not manager.match_tasks([name]):
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            remedy = f"did you mean {near[0]}?" if near else "give a name of lm-evaluation-harness, or --task_path"
            raise UserError(f"--tasks: unknown task {name!r}; {remedy}")
    # Load them.
    try:
        loaded = manager.load(manager.match_tasks(list(names)))
    except Exception as error:  # a task is third-party configuration and code, and its data may need a network
        reason = first_lines(error, 1)
        raise UserError(f"--tasks {','.join(names)}: cannot be loaded ({reason}); fix the task or its data") from error
    for name, task in loaded["tasks"].items():
        own = task.get_config("num_fewshot")
        if few_shot and own == 0:
            note(f"task {name}: it is defined without examples, so --few_shot does not apply")
        task.set_config(key="num_fewshot", value=own or 0 if few_shot is None or own == 0 else few_shot)
        task.set_fewshot_seed(seed=FEW_SHOT_SEED)
    return loaded


def run_tasks(lm: RunnerLM, tasks: Any, limit: int | None = None, chat: bool = False) -> dict[str, dict[str, Any]]:
    """Scores by task (or group) and metric, as `{"value", "stderr", "higher_is_better"}`.

    Args:
        lm: The model.
        tasks: From `load_tasks`.
        limit: Largest number of documents of each task.
        chat: Whether to use the chat template, with examples as earlier turns.
    """
    random.seed(FEW_SHOT_SEED)  # some tasks draw from the global generators
    np.random.seed(FEW_SHOT_SEED)
    run: Any = lm_eval.evaluate
    found = run(
        lm, tasks, limit=limit, bootstrap_iters=1000, log_samples=False, apply_chat_template=chat, fewshot_as_multiturn=chat
    )
    scores: dict[str, dict[str, Any]] = {}
    for task, values in found["results"].items():
        better = found["higher_is_better"].get(task) or {}
        for key, value in values.items():
            metric, _, name = key.partition(",")
            if name and not metric.endswith("_stderr") and isinstance(value, (int, float)):
                stderr = values.get(f"{metric}_stderr,{name}")
                label = metric if name == "none" else f"{metric} ({name})"
                scores.setdefault(task, {})[label] = {
                    "value": float(value),
                    "stderr": float(stderr) if isinstance(stderr, (int, float)) else None,
                    "higher_is_better": better.get(metric, True) is not False,
                }
    return scores
