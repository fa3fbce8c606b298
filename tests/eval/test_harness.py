"""The runner as a model of lm-evaluation-harness: scores and texts equal those of the harness's own transformers model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lm_eval.tasks import TaskManager

from trainkit.errors import UserError
from trainkit.eval import harness
from trainkit.eval.harness import RunnerLM, load_tasks, run_tasks
from trainkit.runner import Runner

CHOICE = {
    "task": "clips_choice",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}} Answer:",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{label}}",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}
WRITING = {
    "task": "clips_writing",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": [" ", "\n\n"], "max_gen_toks": 12, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
ROLLING = {
    "task": "clips_rolling",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{question}}",
    "metric_list": [{"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}],
}


@pytest.fixture(scope="module")
def theirs(tiny_target: Path) -> Any:
    """The harness's own model, on the tiny target; in float64, so that rounding decides no greedy token."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(tiny_target), batch_size=3, device="cpu", dtype="float64", max_length=64)


@pytest.fixture(scope="module")
def ours(tiny_target: Path) -> RunnerLM:
    return RunnerLM(Runner.load(tiny_target, max_len=64, max_batch=3, dtype="float64"))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, theirs: Any) -> Path:
    """A folder of three tasks over local JSON Lines; the answers to write are those of the model for every second question."""
    folder = tmp_path_factory.mktemp("tasks")
    questions = [f"In May she sold {n} clips. How many clips did she sell in {n + 1} days?" for n in range(9)]
    written = theirs.generate_until([request(text, WRITING["generation_kwargs"]) for text in questions], disable_tqdm=True)
    rows = [
        {
            "question": text,
            "answer": answer if n % 2 else "24",
            "choices": [" 24", " clips", f" {n} clips sold"],
            "label": n % 3,
        }
        for n, (text, answer) in enumerate(zip(questions, written, strict=True))
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for task in (CHOICE, WRITING, ROLLING):
        data = {
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
            "test_split": "test",
        }
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(task | data))
    return folder


def request(*args: Any) -> Any:
    return SimpleNamespace(args=args)


def random_pairs(count: int) -> list[tuple[str, str]]:
    """Contexts, some empty, some ending with spaces, some longer than the model covers, with continuations."""
    words = "clips sold in May 24 friends Natalia 漢 half altogether".split()
    draw = lambda most: " ".join(words[i] for i in torch.randint(0, len(words), (int(torch.randint(1, most, ())),)).tolist())
    ends = ["", " ", "  ", "\n"]
    contexts = ["" if n % 5 == 0 else draw(60 if n % 7 == 0 else 12) + ends[n % 4] for n in range(count)]
    return [(context, ("" if context.endswith(" ") else " ") + draw(5)) for context in contexts]


def test_likelihoods_equal_those_of_the_harness(ours, theirs, seed):
    """Log-probabilities and greedy flags of pairs, and of whole texts longer than the model covers."""
    pairs = [request(*pair) for pair in random_pairs(20)]
    greedy = theirs.generate_until([request("In May she", {"until": [], "max_gen_toks": 3})], disable_tqdm=True)
    pairs.append(request("In May she", greedy[0]))
    found, expected = (lm.loglikelihood(pairs, disable_tqdm=True) for lm in (ours, theirs))
    for (logprob, is_greedy), (known, known_greedy) in zip(found, expected, strict=True):
        assert logprob == pytest.approx(known, abs=1e-3) and is_greedy == known_greedy  # our log-softmax is float32
    texts = [request(" ".join(text for pair in random_pairs(8) for text in pair)) for _ in range(3)] + [request("In May")]
    rolling, known = (lm.loglikelihood_rolling(texts, disable_tqdm=True) for lm in (ours, theirs))
    assert max(len(ours.tok_encode(text.args[0])) for text in texts) > 64
    assert rolling == pytest.approx(known, rel=1e-5, abs=1e-3)


def test_texts_equal_those_of_the_harness(ours, theirs, tiny_target, seed):
    """Greedy texts, with and without a drafter, cut before stop strings, of contexts that are too long too.

    No stop string is part of a special token's name: the runner would find it there, but the harness leaves these names out.
    """
    settings = [
        {"until": [" "], "max_gen_toks": 12},
        {"until": "\n\n", "max_gen_toks": 5},
        {"until": ["zz"], "do_sample": False, "max_gen_toks": 20},
    ]
    given = [request(context or "x", settings[n % 3]) for n, (context, _) in enumerate(random_pairs(12))]
    expected = theirs.generate_until(given, disable_tqdm=True)
    drafted = RunnerLM(Runner.load(tiny_target, tiny_target, max_len=64, max_batch=3, dtype="float64"), depth=3)
    assert ours.generate_until(given, disable_tqdm=True) == drafted.generate_until(given, disable_tqdm=True) == expected
    assert drafted.stats.tau > 2 > ours.stats.tau and "tau" in drafted.summary
    sampled = request("In May she", {"until": [], "max_gen_toks": 20, "do_sample": True, "temperature": 1.0, "top_k": 3})
    one, two = ours.generate_until([sampled] * 2, disable_tqdm=True)
    assert one != two, "each request has draws of its own"


def test_task_scores_equal_those_of_the_harness(ours, theirs, tasks):
    """Multiple choice, writing and rolling tasks from local files have the scores that the harness gives its own model."""
    import lm_eval

    names = ["clips_choice", "clips_writing", "clips_rolling"]
    found = run_tasks(ours, load_tasks(names, str(tasks)))
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    known: Any = lm_eval.simple_evaluate(theirs, tasks=names, task_manager=manager, bootstrap_iters=10, log_samples=False)
    for task, metric in (("clips_choice", "acc"), ("clips_choice", "acc_norm"), ("clips_writing", "exact_match")):
        assert found[task][metric]["value"] == known["results"][task][f"{metric},none"], (task, metric)
        assert found[task][metric]["higher_is_better"] and found[task][metric]["stderr"] > 0
    assert found["clips_writing"]["exact_match"]["value"] >= 4 / 9
    rolling = found["clips_rolling"]["word_perplexity"]
    assert rolling["value"] == pytest.approx(known["results"]["clips_rolling"]["word_perplexity,none"], rel=1e-4)
    assert not rolling["higher_is_better"] and rolling["stderr"] is None


def test_examples_are_as_many_as_requested(ours, tasks, monkeypatch, seed):
    """`few_shot` puts so many questions with answers first, or none, as earlier turns with the chat template."""
    asked: list[str] = []
    monkeypatch.setattr(
        RunnerLM, "generate_until", lambda self, requests, **_: [asked.append(r.args[0]) or "" for r in requests]
    )
    for count, chat in ((None, False), (2, False), (2, True)):
        run_tasks(ours, load_tasks(["clips_writing"], str(tasks), count), limit=1, chat=chat)
        assert asked[-1].count("In May she sold") == 1 + (count or 0) and asked[-1].count("<|user|>") == 3 * chat
    assert len(asked) == 3


def test_chats_are_rendered_by_the_template(ours):
    """The harness's chat messages become the chat template's text."""
    chat = [{"role": "user", "content": "How many?"}]
    assert ours.apply_chat_template(chat) == "<|user|>How many?<|assistant|>"
    assert ours.chat_template(True) == ours.tokenizer.chat_template


BROKEN: dict[str, tuple[Any, list[str]]] = {
    "unknown task": (
        lambda tasks, lm: load_tasks(["clips_chioce"], str(tasks)),
        ["'clips_chioce'", "did you mean clips_choice?"],
    ),
    "no folder": (lambda tasks, lm: load_tasks(["x"], "nowhere"), ["--task_path nowhere", "no such folder"]),
    "no data": (lambda tasks, lm: load_tasks(["lost"], str(tasks)), ["lost", "cannot be loaded", "fix"]),
    "unknown option": (lambda tasks, lm: write(lm, num_beams=4), ["'num_beams'", "remove it"]),
    "text too long": (lambda tasks, lm: write(lm, max_gen_toks=64), ["64 new tokens", "covers 64 positions"]),
    "continuation too long": (lambda tasks, lm: lm.loglikelihood([request("a", " b" * 99)]), ["continuation", "64 positions"]),
}


def write(lm: RunnerLM, **options: Any) -> list[str]:
    return lm.generate_until([request("x", {"until": []} | options)])


@pytest.mark.parametrize("name", BROKEN)
def test_mistake_with_tasks_is_one_line(name, tasks, ours, monkeypatch):
    """A mistake gives one line that names the cause and the remedy."""
    local = lambda include_path, **_: TaskManager(include_path=include_path, include_defaults=False)
    monkeypatch.setattr(harness, "TaskManager", local)  # indexing the harness's 14,000 tasks takes many seconds
    lost = CHOICE | {"task": "lost", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "nowhere.jsonl"}}}
    (tasks / "lost.yaml").write_text(yaml.safe_dump(lost | {"test_split": "test"}))
    call, parts = BROKEN[name]
    with pytest.raises(UserError) as caught:
        call(tasks, ours)
    assert "\n" not in str(caught.value) and all(part in str(caught.value) for part in parts), caught.value
