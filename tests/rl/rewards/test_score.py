"""Reward functions as users write them: what they receive, missing values, weights, failures, limits, and mistakes."""

from __future__ import annotations

import asyncio
import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import reward_users as users
from tests.support.rewards import group, rewards_of
from trainkit.errors import UserError
from trainkit.rl.evaluate import rows
from trainkit.rl.rewards.score import Rewards

MODULE = "tests.support.reward_users"
CHAT = [{"role": "user", "content": "What is it?"}]


def test_trl_functions_run_unchanged() -> None:
    """Functions written for TRL's trainer score texts and chats, with columns, None, loggers, state and async."""
    names = ["unique_letters", "boxed", "only_maths", "more_tokens", "remote"]
    rewards = Rewards([{"function": f"{MODULE}:{name}"} for name in names])
    groups = [group([r"\boxed{7}", "aab"], ground_truth="7", task="math"), group(["x"], index=1, ground_truth="x", task="code")]
    counts = rewards.score(groups, step=3)
    assert rewards_of(groups, "unique_letters") == [9, 2, 1]
    assert rewards_of(groups, "boxed") == [1, 0, 0]
    assert rewards_of(groups, "only_maths")[:2] == [9, 3] and math.isnan(rewards_of(groups, "only_maths")[2])
    assert rewards_of(groups, "more_tokens") == [27, 9, 3]
    assert rewards_of(groups, "remote") == [1, 1, 1]
    assert [response.reward for g in groups for response in g.responses] == [47, 15, 5]
    assert [response.extra for g in groups for response in g.responses] == [{"tokens": 9}, {"tokens": 3}, {"tokens": 1}]
    assert rewards.metrics == {"mean_tokens": pytest.approx(13 / 3)} and counts["missing/only_maths"] == 1
    assert counts["missing"] == counts["failures/boxed"] == counts["timeouts/remote"] == 0


def test_chat_completions_are_lists_of_one_message() -> None:
    """A row whose prompt is a chat gets its completion as a chat; a text stays a text, even in the same call."""
    groups = [group(["<think>a</think><answer>b</answer>", "b"], CHAT)]
    Rewards([{"function": users.tagged}]).score(groups, 0)
    assert rewards_of(groups, "tagged") == [1, 0]
    seen: list[Any] = []
    Rewards([{"function": lambda prompts, completions: seen.extend(zip(prompts, completions, strict=True)) or [0] * 2}]).score(
        [group(["a"]), group(["b"], CHAT, 1)], 0
    )
    assert seen == [("What is it?", "a"), (CHAT, [{"role": "assistant", "content": "b"}])]


def test_functions_get_all_that_they_accept() -> None:
    """Arguments are keywords and the columns of all rows, None where a row lacks one; options come before columns."""
    seen: dict[str, Any] = {}

    def all_of_it(**arguments: Any) -> list[float]:
        seen.update(arguments)
        return [0.0, 0.0]

    groups = [group(["a"], answer="1", level=3), group(["b"], index=1, answer="2")]
    rewards = Rewards([{"function": all_of_it, "options": {"level": 9}}])
    rewards.steps, rewards.max_steps = 2, 12
    rewards.score(groups, 5)
    assert callable(seen.pop("log_extra")) and callable(seen.pop("log_metric"))
    state = seen.pop("trainer_state")
    assert (state.global_step, state.max_steps) == (10, 12)
    assert seen == {
        "prompts": ["What is it?"] * 2,
        "completions": ["a", "b"],
        "completion_ids": [[97], [98]],
        "answer": ["1", "2"],
        "level": 9,
    }


def test_missing_values_leave_the_weighted_sum() -> None:
    """The reward is the sum of weight times value over what is not missing; NaN if all that counts is missing."""
    specs = [
        {"function": lambda completions: [1, None, None, None], "weight": 2, "name": "a"},
        {"function": lambda completions: [True, 0.5, float("nan"), None], "weight": -0.5, "name": "b"},
        {"function": lambda completions: [9, 9, 9, 9], "weight": 0, "name": "c"},
    ]
    groups = [group("wxyz")]
    counts = Rewards(specs).score(groups, 0)
    values = [response.reward for response in groups[0].responses]
    assert values[:2] == [1.5, -0.25] and all(math.isnan(value) for value in values[2:])
    assert [counts[f"missing{name}"] for name in ("", "/a", "/b", "/c")] == [2, 3, 2, 0]


def test_rewards_do_not_depend_on_the_split(seed: int) -> None:
    """Scoring groups together, in another order or one by one gives equal rewards."""
    texts = ["#### 7", "so 8", "7.0", "x", "", "a b a b a b a b", "7 7 7 7 7 7"]
    specs = [
        {"function": "numeric"},
        {"function": "repetition", "weight": 0.3, "options": {"size": 2}},
        {"function": "length", "weight": 0.1, "options": {"maximum": 4, "margin": 6}},
        {"function": f"{MODULE}:unique_letters"},
    ]
    rng = random.Random(seed)
    drawn = [rng.choices(texts, k=4) for _ in range(5)]

    def scored(parts: list[list[int]]) -> dict[int, list[float]]:
        rewards, out = Rewards(specs), {}
        for part in parts:
            groups = [group(drawn[n], index=n, answer="7") for n in part]
            rewards.score(groups, 0)
            out |= {g.task.index: [response.reward for response in g.responses] for g in groups}
        return out

    order = rng.sample(range(5), 5)
    assert scored([list(range(5))]) == scored([order]) == scored([[n] for n in order])


def test_async_functions_overlap() -> None:
    """Asynchronous functions wait at the same time, also when an event loop runs already."""
    barrier = asyncio.Barrier(3)

    async def together(completions: list[str]) -> list[float]:
        await asyncio.wait_for(barrier.wait(), 20)
        return [1.0]

    rewards = Rewards([{"function": together}] * 3)
    assert rewards.names == ["together", "together_2", "together_3"]

    async def notebook() -> float:
        rewards.score(groups := [group(["a"])], 0)
        return groups[0].responses[0].reward

    assert asyncio.run(notebook()) == 3


def test_async_functions_keep_their_event_loop() -> None:
    """A lock that a function keeps, waited for in each call, works in every step; a cancelled call is a missing value."""
    lock = asyncio.Semaphore(1)

    async def remote(completions: list[str]) -> list[float]:
        async def ask() -> float:
            async with lock:
                await asyncio.sleep(0)
                return 1.0

        return await asyncio.gather(*(ask() for _ in completions))

    async def cancelled(completions: list[str]) -> list[float]:
        raise asyncio.CancelledError

    rewards = Rewards([{"function": remote}, {"function": cancelled}])
    for step in range(3):
        counts = rewards.score([group(["a", "b", "c"])], step)
        assert counts["failures/remote"] == 0 and counts["failures/cancelled"] == 1


def test_what_a_function_changes_stays_with_it() -> None:
    """Tokens that are trained on, columns, prompts and what the next function receives survive one that changes its inputs."""

    def changes(prompts: Any, completions: Any, completion_ids: Any, tests: Any) -> list[float]:
        prompts[0][0]["content"] = completions[0][0]["content"] = "changed"
        completion_ids[0].append(7)
        tests[0][0].append(7)
        return [0.0, 0.0]

    def sees(completions: Any, completion_ids: Any, tests: Any) -> list[float]:
        return [
            float((chat[0]["content"], 7 in ids + test[0]) == ("b", False))
            for chat, ids, test in zip(completions, completion_ids, tests, strict=True)
        ]

    groups = [group(["b", "b"], prompt=[dict(turn) for turn in CHAT], tests=[[1, 2]])]
    tokens = [list(response.tokens) for response in groups[0].responses]
    Rewards([{"function": changes}, {"function": sees}]).score(groups, 0)
    assert rewards_of(groups, "sees") == [1, 1]
    assert [response.tokens for response in groups[0].responses] == tokens
    assert groups[0].task.prompt == CHAT and groups[0].task.columns == {"tests": [[1, 2]]}


def test_an_error_is_missing_and_the_run_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    """An error of a function makes its values missing, is printed once with its line, and is counted; others still count."""
    rewards = Rewards([{"function": f"{MODULE}:raising"}, {"function": f"{MODULE}:unique_letters", "weight": 0.5}])
    for step in range(3):
        groups = [group(["bad", "ok"])]
        counts = rewards.score(groups, step)
        assert counts["failures/raising"] == 1 and counts["missing/raising"] == 2 and counts["missing"] == 0
        assert [response.reward for response in groups[0].responses] == [1.5, 1]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: reward raising failed at step 0: RuntimeError: no connection to the server (reward_users.py:")


def test_tables_hold_what_functions_log() -> None:
    """Rows of tables have the columns of `log_extra`; values that JSON does not have become text."""

    def logs(completions: list[str], log_extra: Any) -> list[float]:
        log_extra("path", [Path("a"), None])
        return [0.0, 1.0]

    Rewards([{"function": logs}]).score(groups := [group("ab")], 0)
    assert [row["log/path"] for row in rows(groups)] == ["a", None]


def test_a_mistake_named_by_a_function_stops_the_run() -> None:
    """A UserError of a function is its last word, not one more failure."""

    def picky(completions: list[str]) -> list[float]:
        raise UserError("picky: the file is missing; make it")

    with pytest.raises(UserError, match=r"^picky: the file is missing; make it$"):
        Rewards([{"function": picky}]).score([group("a")], 0)


def test_a_function_that_exits_does_not_end_the_run() -> None:
    """`exit()` in a function is an error as others are, not the silent end of the run."""
    counts = Rewards([{"function": lambda completions: sys.exit(0), "name": "leaves"}]).score([group(["a"])], 0)
    assert counts["failures/leaves"] == counts["missing"] == 1


def test_a_reward_that_always_fails_stops_the_run() -> None:
    """After `max_failures` failures in a row the run stops with one line; a call that works starts the count again."""
    rewards = Rewards([{"function": f"{MODULE}:raising"}], max_failures=3)
    for text in ("bad", "bad", "ok", "bad", "bad"):
        rewards.score([group([text])], 0)
    with pytest.raises(UserError, match=r"^reward raising failed at step 7: RuntimeError: .* it has failed 3 times in a row"):
        rewards.score([group(["bad"])], 7)


def test_a_call_beyond_its_timeout_is_missing() -> None:
    """A call that hangs is ended, all its values are missing and counted, and the next call works."""
    rewards = Rewards([{"function": f"{MODULE}:endless", "timeout": 2}, {"function": f"{MODULE}:unique_letters"}])
    groups = [group(["hang", "b"])]
    counts = rewards.score(groups, 0)
    assert counts["timeouts/endless"] == 1 and counts["missing/endless"] == 2 and counts["failures/endless"] == 0
    assert [response.reward for response in groups[0].responses] == [4, 1]
    rewards.score(groups := [group(["a"])], 1)
    assert rewards_of(groups, "endless") == [1]


def test_a_timeout_changes_no_value() -> None:
    """Functions of every kind give in their own process what they give in this one, with what they log."""
    specs = [
        {"function": f"{MODULE}:more_tokens"},
        {"function": f"{MODULE}:only_maths"},
        {"function": f"{MODULE}:remote"},
        {"function": "numeric", "options": {"column": "task"}},
        {"function": f"{Path(users.__file__)}:endless", "options": {"column": 1}},
    ]
    here, apart = Rewards(specs), Rewards([spec | {"timeout": 60} for spec in specs])
    outcomes = []
    for rewards in (here, apart):
        groups = [group(["abc", "5"], task="5")]
        counts = rewards.score(groups, 2)
        outcomes.append((counts, rewards.metrics, json.dumps([vars(r)["rewards"] | r.extra for r in groups[0].responses])))
    assert outcomes[0] == outcomes[1] and "NaN" in outcomes[0][2]


def test_a_file_of_functions_may_import_its_neighbours(tmp_path: Path) -> None:
    """A file is loaded once, and imports from its own folder."""
    (tmp_path / "neighbour_of_rewards.py").write_text("VALUE = 4\n")
    path = tmp_path / "my rewards.py"
    path.write_text(
        "from neighbour_of_rewards import VALUE\n\n\ndef four(completions):\n    return [VALUE] * len(completions)\n"
    )
    rewards = Rewards([{"function": f"{path}:four"}, {"function": f"{path}:four", "timeout": 60}])
    rewards.score(groups := [group(["a"])], 0)
    assert groups[0].responses[0].rewards == {"four": 4, "four_2": 4}


def test_no_group_is_no_call() -> None:
    """A rank without groups calls nothing."""
    assert Rewards([{"function": f"{MODULE}:raising"}]).score([], 0)["missing"] == 0


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([], "rewards: must name at least one function"),
        ([{}], "rewards[0]: {} names no function"),
        (["numeric"], "rewards[0]: 'numeric' names no function"),
        ([{"function": "numerical"}], "rewards[0]: unknown function 'numerical'; choose from exact, numeric"),
        ([{"function": 3}], "rewards[0]: function: 3 must be a name"),
        ([{"function": "numeric", "wieght": 1}], "rewards[0]: unknown key 'wieght'; choose from function, weight"),
        ([{"function": "numeric", "weight": "1"}], "rewards[0]: weight: '1' must be a number"),
        ([{"function": "numeric", "weight": math.nan}], "rewards[0]: weight: nan must be a number"),
        ([{"function": "numeric", "weight": 0}], "rewards: all weights are 0"),
        ([{"function": "numeric", "timeout": 0}], "rewards[0]: timeout: 0 must be above 0"),
        ([{"function": "numeric", "timeout": True}], "rewards[0]: timeout: True must be a number"),
        ([{"function": len, "timeout": 1}], "rewards[0]: timeout: the function must be given by name"),
        ([{"function": "numeric", "options": ["a"]}], "rewards[0]: options: ['a'] must be a mapping"),
        ([{"function": "numeric", "options": {"colunm": "a"}}], "options: numeric has no option 'colunm'; choose from column"),
        ([{"function": "numeric", "options": {"column": 3}}], "rewards[0]: options: column: 3 must be str"),
        ([{"function": "numeric", "options": {"extract": 3}}], "rewards[0]: options: extract: 3 must be str or None"),
        ([{"function": "numeric", "options": {"extract": "("}}], "extract: '(' is not a regular expression"),
        ([{"function": "regex"}], "rewards[0]: options: regex needs the option pattern"),
        ([{"function": "format", "options": {"tags": [1]}}], "rewards[0]: options: tags: [1] must be list[str] or None"),
        ([{"function": "length", "options": {"maximum": 2.5}}], "rewards[0]: options: maximum: 2.5 must be int"),
        ([{"function": "regex", "options": {"pattern": "a", "full": 1}}], "rewards[0]: options: full: 1 must be bool"),
        ([{"function": "format", "options": {"tags": []}}], "tags: must be a list of names"),
        ([{"function": "length", "options": {"maximum": 0}}], "maximum: 0 must be at least 1"),
        ([{"function": "length", "options": {"maximum": 5, "minimum": 9}}], "maximum: 5 must be at least 9"),
        ([{"function": "repetition", "options": {"size": 0}}], "size: 0 must be at least 1"),
        (
            [{"function": "numeric"}, {"function": "exact", "name": "numeric"}],
            "rewards[1]: name: 'numeric' must be a name that",
        ),
        ([{"function": "no_such_module_here:f"}], "rewards[0]: there is no module no_such_module_here"),
        ([{"function": "no_such_file.py:f"}], "rewards[0]: no_such_file.py: there is no such file"),
        ([{"function": f"{MODULE}:nothing"}], f"rewards[0]: {MODULE} has no function 'nothing'"),
        ([{"function": f"{MODULE}:re"}], f"rewards[0]: {MODULE}:re is a module, not a function"),
        ([{"function": ":f"}], "rewards[0]: unknown function ':f'"),
        (
            [{"function": f"{MODULE}:more_tokens", "options": {"column": 1}}],
            "rewards[0]: options: the function does not accept",
        ),
        ([{"function": lambda completions, /: []}], "rewards[0]: function: takes arguments by position"),
    ],
)
def test_bad_specs_are_one_line(specs: list[Any], message: str) -> None:
    """A mistake in a spec is one line that names the entry, the key and the remedy."""
    with pytest.raises(UserError) as caught:
        Rewards(specs)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda completions: [1.0], "reward f returned 1 values for 2 completions"),
        (lambda completions: None, "reward f returned None; it must return a list"),
        (lambda completions: 1.0, "reward f returned a value of type float"),
        (lambda completions: "ab", "reward f returned a value of type str"),
        (lambda completions: {0: 1, 1: 1}, "reward f returned a value of type dict"),
        (lambda completions: [1.0, "2"], "reward f returned '2' for completion 1"),
        (lambda completions: [[1.0], 2], "reward f returned [1.0] for completion 0"),
        (lambda completions: [math.inf, 2], "reward f returned inf for completion 0"),
        (lambda completions, truth: [1, 1], "reward f needs the column 'truth', but the tasks have: answer"),
        (lambda completions, log_extra: log_extra("a", [1]) or [1, 1], "reward f called log_extra('a') with 1 values for 2"),
    ],
)
def test_bad_results_are_one_line(function: Any, message: str) -> None:
    """A function that breaks the contract stops the run with one line that names it."""
    with pytest.raises(UserError) as caught:
        Rewards([{"function": function, "name": "f"}]).score([group("ab", answer="1")], 0)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_broken_files_are_one_line(tmp_path: Path) -> None:
    """A file that raises, or needs a module that is not installed, is one line."""
    for source, message in (
        ("import no_such_module_here", "needs the module no_such_module_here"),
        ("1 / 0", "ZeroDivisionError"),
    ):
        (tmp_path / "rewards.py").write_text(source)
        with pytest.raises(UserError, match=message):
            Rewards([{"function": f"{tmp_path}/rewards.py:f"}])


def test_check_names_row_and_column_before_training() -> None:
    """`check` finds a missing column and an unreadable reference before training, and calls no function of a user."""
    tasks = [group([], index=n, answer=answer).task for n, answer in enumerate(["#### 1", "2", "#### three"])]
    rewards = Rewards([{"function": "numeric"}, {"function": f"{MODULE}:killed"}])
    rewards.check(tasks[:2])
    with pytest.raises(UserError, match=r"^rows.jsonl:3: answer '#### three' holds no number, for the reward numeric; fix or"):
        rewards.check(tasks)
    with pytest.raises(UserError, match=r"^rows.jsonl:3: answer '#### three'"):
        Rewards([{"function": "numeric"}]).score([group(["1", "2"], answer="1"), group(["3"], index=2, answer="#### three")], 0)
    with pytest.raises(
        UserError, match=r"^reward numeric needs the column 'gold', but the tasks have: answer; set its options"
    ):
        Rewards([{"function": "numeric", "options": {"column": "gold"}}]).check(tasks[:2])
    with pytest.raises(UserError, match=r"^reward boxed needs the column 'ground_truth', but the tasks have: answer; rename"):
        Rewards([{"function": users.boxed}]).check(tasks[:2])
    with pytest.raises(UserError, match="column 'completions': has the name of an argument"):
        rewards.check([group([], completions=1).task])
