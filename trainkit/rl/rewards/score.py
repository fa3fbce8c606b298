"""Rewards: calls reward functions on groups of responses as TRL calls them, and adds their values with weights.

A function written for `GRPOTrainer` of huggingface/trl works unchanged: all arguments are keywords, and are lists with an entry
for each completion, except `trainer_state`, `log_extra` and `log_metric`.
"""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, NoReturn

from trainkit.errors import UserError
from trainkit.rl.rewards.calls import NOT_COLUMNS, BadCall, BadGold, Failed, Result, TimedOut, call, call_async, is_async, wait
from trainkit.rl.rewards.specs import Reward, read_spec
from trainkit.rl.types import Group, Task


class Rewards:
    """Scores responses with one or more reward functions.

    If a function raises an error, or its call exceeds its `timeout`, its value is missing for all responses of the call. The
    first error of each kind is printed, all are counted, and the run goes on. None or NaN in its list is a missing value too.

    Args:
        specs: For each function, `function` (the name of a built-in one, `module:function`, `file.py:function`, or a callable),
            and optionally `weight` (default 1; with 0 its values are only recorded), `options` (keyword arguments), `name` (key
            in `Response.rewards`), and `timeout` (seconds for a call, which then runs in a process of its own).
        max_failures: Number of calls of a function, one after another, that may fail before the run is stopped.

    Attributes:
        names: The functions' names, in order.
        max_failures: As given.
        metrics: What functions logged in the last call of `score`, the mean of each name.
        steps: Optimiser steps in a step of `score`.
        max_steps: Optimiser steps of the whole run; 0 if it has no end.

    Raises:
        UserError: a spec has an unknown key, function or option, or a wrong value; the message names it.
    """

    def __init__(self, specs: Sequence[Mapping[str, Any]], max_failures: int = 10) -> None:
        if not specs:
            raise UserError("rewards: must name at least one function, such as [{function: numeric}]")
        if max_failures < 1:
            raise UserError(f"max_failures: {max_failures} must be at least 1; choose a larger number")
        self.max_failures = max_failures
        self._rewards: list[Reward] = []
        for n, spec in enumerate(specs):
            try:
                self._rewards.append(read_spec(spec, {reward.name for reward in self._rewards}))
            except UserError as error:
                raise UserError(f"rewards[{n}]: {error}") from error
        if not any(reward.weight for reward in self._rewards):
            raise UserError("rewards: all weights are 0, so no response has a reward; set one of them")
        self.names = [reward.name for reward in self._rewards]
        self.metrics: dict[str, float] = {}
        self.steps, self.max_steps = 1, 0

    def check(self, tasks: Sequence[Task]) -> None:
        """Checks before training that the tasks have the columns that the functions need, and that references can be read.

        Raises:
            UserError: they have not; the message names the function, and the row if it is one.
        """
        arguments = {"prompts": [task.prompt for task in tasks], "completions": [], "completion_ids": []} | _columns(tasks)
        arguments["trainer_state"] = SimpleNamespace(global_step=0, max_steps=0)
        for reward in self._rewards:
            try:
                request = reward.request(arguments, 0)
                if reward.built_in:
                    call(reward.function, request)
            except (BadCall, BadGold, Failed) as error:
                self._refuse(reward, error, tasks)

    def score(self, groups: Sequence[Group], step: int) -> dict[str, int]:
        """Fills `rewards`, `reward` and `extra` of each response.

        The reward is the weighted sum of the values that are not missing, and NaN if those of all functions with a weight are.

        Args:
            groups: The groups of this rank; each function is called once with all their responses.
            step: Number of the generation. `trainer_state.global_step` is `step * steps`.

        Returns:
            `missing`: number of responses without a reward. For each function also `missing/NAME`, `failures/NAME` (1 if its
            call raised an error) and `timeouts/NAME` (1 if its call took too long).

        Raises:
            UserError: a function lacks a column, does not return one number or None per completion, has failed `max_failures`
                times in a row, or cannot read a reference; the message names it, and the row.
        """
        responses = [response for group in groups for response in group.responses]
        tasks = [group.task for group in groups for _ in group.responses]
        results = (
            self._call_all(_arguments(groups, step * self.steps, self.max_steps), tasks)
            if responses
            else [Result() for _ in self._rewards]
        )

        # Values, and what the functions logged.
        counts, logged = {"missing": 0}, {}
        for reward, result in zip(self._rewards, results, strict=True):
            if responses:
                self._count_failures(reward, result, step, len(responses))
            counts[f"failures/{reward.name}"] = int(isinstance(result, Failed))
            counts[f"timeouts/{reward.name}"] = int(isinstance(result, TimedOut))
            if not isinstance(result, Result):
                result = Result([math.nan] * len(responses))
            for response, value in zip(responses, result.values, strict=True):
                response.rewards[reward.name] = value
            counts[f"missing/{reward.name}"] = sum(map(math.isnan, result.values))
            for column, entries in result.extra.items():
                for response, entry in zip(responses, entries, strict=True):
                    response.extra[column] = entry
            for name, numbers in result.metrics.items():
                logged.setdefault(name, []).extend(numbers)
        self.metrics = {name: sum(numbers) / len(numbers) for name, numbers in logged.items()}

        # Weighted sums.
        for response in responses:
            parts = [reward.weight * response.rewards[reward.name] for reward in self._rewards if reward.weight]
            valid = [part for part in parts if not math.isnan(part)]
            response.reward = math.fsum(valid) if valid else math.nan
            counts["missing"] += not valid
        return counts

    def _call_all(self, arguments: Mapping[str, Any], tasks: Sequence[Task]) -> list[Result | Failed | TimedOut]:
        """The result of each function or why it has none; asynchronous ones and those with a process of their own overlap."""
        count = len(tasks)
        requests = []
        for reward in self._rewards:
            try:
                requests.append(reward.request(arguments, count))
            except BadCall as error:
                self._refuse(reward, error, tasks)

        async def overlapping() -> list[Any]:
            pending = [
                asyncio.to_thread(reward.worker.call, request, reward.seconds)
                if reward.worker is not None and reward.seconds is not None
                else call_async(reward.function, request)
                for reward, request in zip(self._rewards, requests, strict=True)
                if reward.worker is not None or is_async(reward.function)
            ]
            return await asyncio.gather(*pending, return_exceptions=True)

        with ThreadPoolExecutor(1) as thread:
            awaited = thread.submit(lambda: wait(overlapping()))
            results: list[Any] = []
            for reward, request in zip(self._rewards, requests, strict=True):
                try:
                    here = reward.worker is None and not is_async(reward.function)
                    results.append(call(reward.function, request) if here else None)
                except (BadCall, BadGold, Failed) as error:
                    results.append(error)
            others = iter(awaited.result())
        results = [next(others) if result is None else result for result in results]
        for reward, result in zip(self._rewards, results, strict=True):
            if isinstance(result, BaseException) and not isinstance(result, (Failed, TimedOut)):
                self._refuse(reward, result, tasks)
        return results

    def _refuse(self, reward: Reward, error: BaseException, tasks: Sequence[Task]) -> NoReturn:
        """Raises the UserError for a function that cannot be used, or any other error as it is."""
        if isinstance(error, BadGold):
            number, reason = error.args
            task = tasks[number]
            raise UserError(
                f"{task.source or f'task {task.index}'}: {reason}, for the reward {reward.name}; fix or remove this row"
            )
        if isinstance(error, (BadCall, Failed)):
            raise UserError(f"reward {reward.name} {'raises ' * isinstance(error, Failed)}{error.args[-1]}") from error
        raise error

    def _count_failures(self, reward: Reward, result: Result | Exception, step: int, count: int) -> None:
        """Prints the first failure of each kind; stops the run after too many in a row."""
        if isinstance(result, Result):
            reward.failed = 0
            return
        kind, text = result.args if isinstance(result, Failed) else ("timeout", f"took longer than {reward.seconds:g} s")
        reward.failed += 1
        reward.kinds[kind] += 1
        what = f"reward {reward.name} failed at step {step}: {text}"
        if reward.failed >= self.max_failures:
            raise UserError(f"{what}; it has failed {reward.failed} times in a row: fix it, or remove it from the rewards")
        if reward.kinds[kind] == 1:
            rest = f"{count:,} responses have no value of it; further failures of this kind are only counted"
            print(f"note: {what}; {rest}", file=sys.stderr)


def _columns(tasks: Sequence[Task]) -> dict[str, list[Any]]:
    """The columns of all tasks, each a list with an entry per task, None where a task lacks it."""
    names = list(dict.fromkeys(name for task in tasks for name in task.columns))
    if clash := NOT_COLUMNS.intersection(names):
        raise UserError(f"column {min(clash)!r}: has the name of an argument that reward functions receive; rename the column")
    return {name: [task.columns.get(name) for task in tasks] for name in names}


def _arguments(groups: Sequence[Group], step: int, max_steps: int) -> dict[str, Any]:
    """Keyword arguments of all functions; a completion is text if its prompt is, else a chat of one turn."""
    pairs = [(group.task, response) for group in groups for response in group.responses]
    return {
        "prompts": [task.prompt for task, _ in pairs],
        "completions": [
            response.text if isinstance(task.prompt, str) else [{"role": "assistant", "content": response.text}]
            for task, response in pairs
        ],
        "completion_ids": [response.tokens for _, response in pairs],
        **_columns([task for task, _ in pairs]),
        "trainer_state": SimpleNamespace(global_step=step, max_steps=max_steps),
    }
