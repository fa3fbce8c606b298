"""`trainkit evaluate`: its figures, the JSON, what it records in a bundle, and mistakes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from tests.support.targets import make_target
from trainkit import bundle
from trainkit.cli import main
from trainkit.export.model import export_model


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "rows.jsonl"
    rows = [{"question": f"How many of {n}?", "answer": f"In May she sold {n} clips. " * (1 + n % 3)} for n in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def made(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the tiny target with small weights set to 0."""
    model, folder = AutoModelForCausalLM.from_pretrained(tiny_target), tmp_path_factory.mktemp("made") / "pruned"
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "proj" in name:
                weight[weight.abs() < 0.15] = 0
    export_model(model, folder, tokenizer=tiny_target, metrics={"loss": 1.5})
    return folder


def test_figures_are_printed_written_and_recorded(tiny_target, made, text, tmp_path, capsys):
    """Table, JSON and bundle hold the same figures; a second run replaces them and keeps other metrics."""
    out = tmp_path / "out.json"
    flags = [f"--dense={tiny_target}", f"--text={text}", "--length=64", f"--json={out}", "--own=3", "--max_new_tokens=9"]
    assert main(["evaluate", str(made), *flags, "--record=true"]) == 0
    printed, found = capsys.readouterr().out, json.loads(out.read_text())
    figures = found["text"]
    assert figures["windows"] == figures["texts"] and figures["predicted_tokens"] == 63 * figures["windows"]
    assert figures["dropped_tokens"] < 64 and f"{figures['windows']} windows of 64 tokens" in printed
    assert figures["tokenizer"] == bundle.tokenizer_digest(tiny_target) and found["dtype"] == "float32"
    for name in ("text", "own_text"):
        one = found[name]
        assert one["perplexity"]["value"] / one["perplexity_dense"]["value"] == pytest.approx(one["ratio"]["value"], rel=1e-6)
        assert one["recovery"] == pytest.approx(100 / one["ratio"]["value"]) and one["kl"]["value"] > 0.01
        assert all(
            one[key]["low"] <= one[key]["value"] <= one[key]["high"] for key in ("perplexity", "ratio", "kl", "agreement")
        )
        assert f"{one['kl']['value']:.4f}" in printed and f"{one['agreement']['value']:.4f}" in printed
    assert not list(tmp_path.glob("*.part")), "the sums so far are removed at the end"
    assert found["own_text"]["texts"] == 3 and 3 <= found["own_text"]["predicted_tokens"] <= 27
    metrics = bundle.read(made).metrics
    assert metrics["loss"] == 1.5 and metrics["perplexity"] == figures["perplexity"]["value"]
    assert metrics["own_text_kl"] == found["own_text"]["kl"]["value"] and metrics["recovery"] == f"{figures['recovery']:.1f} %"
    assert main(["evaluate", str(made), f"--text={text}", "--length=32", "--limit=2", "--record=true"]) == 0
    again = bundle.read(made).metrics
    assert "kl" not in again and again["own_text_kl"] == metrics["own_text_kl"], "KL on other windows is removed"
    assert again["evaluated_on"] == "rows.jsonl, 2 windows of 32 tokens, float32"


def test_compressed_model_has_figures_in_its_card(tiny_target, text, chats, tmp_path, capsys):
    """README.md of a compressed model shows the figures; text that it was calibrated on is refused, also as a part."""
    out = tmp_path / "sparse"
    flags = ["--method=wanda", "--sparsity=0.5", f"--calibration={chats}", "--samples=8", "--length=64"]
    assert main(["compress", str(tiny_target), str(out), *flags]) == 0
    common = ["evaluate", str(out), "--length=64", f"--dense={tiny_target}", "--record=true"]
    assert main([*common, f"--text={text}"]) == 0
    metrics, card = bundle.read(out).metrics, (out / "README.md").read_text()
    assert f"| {metrics['kl']:.5g} |" in card and f"| {metrics['recovery']} |" in card and "rows.jsonl" in card
    both = tmp_path / "both.jsonl"
    both.write_text(text.read_text() + chats.read_text())
    for source in (chats, both):
        capsys.readouterr()
        assert main([*common, f"--text={source}"]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert f"{source}: shares text with the calibration of {out}" in line and "evaluate on other text" in line
    (out / "calibration.json").write_text("{}")
    assert main(["evaluate", str(out), "--length=64", f"--text={text}"]) == 2
    assert "calibration.json: holds no list of fingerprints; compress" in capsys.readouterr().err


def test_perplexity_is_that_of_transformers(tiny_target, text, tmp_path):
    """The command's perplexity is exp of the mean of transformers' loss over the windows of the rendered chats."""
    out, tokenizer = tmp_path / "out.json", bundle_tokenizer(tiny_target)
    rows = [json.loads(line) for line in text.read_text().splitlines()]
    whole = "\n\n".join(f"<|user|>{row['question']}<|assistant|>{row['answer']}<|end|>" for row in rows)
    tokens = tokenizer(whole, return_tensors="pt")["input_ids"][0]
    windows = tokens[: len(tokens) // 32 * 32].view(-1, 32)
    model = AutoModelForCausalLM.from_pretrained(tiny_target).eval()
    with torch.no_grad():
        losses = [model(row[None], labels=row[None]).loss.item() for row in windows]
    assert main(["evaluate", str(tiny_target), f"--text={text}", "--length=32", "--batch=3", f"--json={out}"]) == 0
    found = json.loads(out.read_text())["text"]
    assert found["windows"] == len(windows) and found["dropped_tokens"] == len(tokens) % 32
    assert found["perplexity"]["value"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)


def bundle_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def tasks(text: Path) -> Path:
    """A folder with a task of choices and a task of writing over the rows of `text`."""
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(text)}}, "test_split": "test"}
    common = data | {"doc_to_text": "{{question}}", "metric_list": [{"metric": "acc"}]}
    choice = {"task": "pick", "output_type": "multiple_choice", "doc_to_choice": [" In", " May"], "doc_to_target": 0}
    writing = {"task": "write", "output_type": "generate_until", "doc_to_target": "{{answer}}"}
    writing |= {"generation_kwargs": {"until": ["\n"], "max_gen_toks": 8}, "metric_list": [{"metric": "exact_match"}]}
    for task in (choice, writing):
        (text.parent / f"{task['task']}.yaml").write_text(yaml.safe_dump(common | task))
    return text.parent


def test_tasks_have_recovery_and_equal_scores_with_a_drafter(tiny_target, made, tasks, tmp_path, capsys):
    """Scores of model and dense model, recovery in percent; a drafter changes no score and shows its tau."""
    flags = ["--tasks=pick,write", f"--task_path={tasks}", f"--dense={tiny_target}", "--limit=8", "--few_shot=0"]
    values = []
    for number, drafter in enumerate(([], [f"--drafter={tiny_target}"])):
        out = tmp_path / f"{number}.json"
        assert main(["evaluate", str(made), *flags, *drafter, f"--json={out}"]) == 0
        values.append(json.loads(out.read_text()))
        assert ("tau" in capsys.readouterr().out) == bool(drafter)
    assert values[0] == values[1]
    pick = values[0]["tasks"]["scores"]["pick"]["acc"]
    assert pick["recovery"] == (pytest.approx(100 * pick["value"] / pick["dense"]) if pick["dense"] else None)
    assert values[0]["tasks"]["limit"] == 8 and set(values[0]["tasks"]["scores"]) == {"pick", "write"}
    assert values[0]["tasks"]["scores"]["write"]["exact_match"]["recovery"] is None, "the dense model has no exact match"


MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    "nothing": ([], ["--text FILE", "--tasks NAMES"]),
    "own without text": (["--own=3", "--tasks=pick"], ["--own", "--text"]),
    "no such text": (["--text=nowhere.jsonl", "--length=32"], ["nowhere.jsonl", "give an existing file"]),
    "too short": (["--text=TEXT", "--length=512", "--limit=1"], ["rows.jsonl", "fewer than one window of 512", "--length"]),
    "too long a window": (["--text=TEXT", "--length=513"], ["--length: 513", "at most 512"]),
    "window of one": (["--text=TEXT", "--length=1"], ["--length", "at least 2"]),
    "no windows": (["--text=TEXT", "--limit=0"], ["--limit", "at least 1"]),
    "other vocabulary": (
        ["--text=TEXT", "--length=32", "--dense=OTHER"],
        ["--dense", "a vocabulary of 400", "320", "made from"],
    ),
    "too many prompts": (["--text=TEXT", "--length=32", "--own=99"], ["--own 99", "12 prompts", "smaller"]),
    "unknown task": (["--tasks=pikc", "--task_path=TASKS"], ["unknown task 'pikc'", "did you mean pick?"]),
    "no bundle": (["--text=TEXT", "--length=32", "--record=true"], ["not a bundle", "trainkit export"]),
    "no folder": (["--text=TEXT", "--json=/nowhere/x.json"], ["--json /nowhere/x.json", "make it first"]),
    "not a number": (["--text=TEXT", "--length=32", "--dense=NAN"], ["nan", "not finite"]),
    "drafter for nothing": (["--text=TEXT", "--length=32", "--drafter=OTHER"], ["--drafter", "--own N", "leave it out"]),
    "chat without tasks": (["--text=TEXT", "--length=32", "--chat=true"], ["--chat: is for tasks", "leave it out"]),
    "examples without tasks": (["--text=TEXT", "--length=32", "--few_shot=3"], ["--few_shot: is for tasks", "leave it out"]),
    "no task named": (["--tasks=,"], ["--tasks ','", "names no task"]),
    "negative examples": (["--tasks=pick", "--task_path=TASKS", "--few_shot=-1"], ["--few_shot: -1 must be at least 0"]),
    "figures into a folder": (["--text=TEXT", "--length=32", "--json=OTHER"], ["--json", "is a folder"]),
    "bad row": (["--text=BAD", "--length=32"], ["bad.jsonl:2", "fix or remove"]),
}


@pytest.fixture(scope="module")
def places(text: Path, tasks: Path, tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the words in capitals of `MISTAKES` stand for."""
    root = tmp_path_factory.mktemp("places")
    model = AutoModelForCausalLM.from_pretrained(tiny_target)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(root / "nan")
    (root / "bad.jsonl").write_text('{"text": "x"}\n{"txt": "x"}\n')
    other = make_target(root / "other", vocab_size=400, num_hidden_layers=1)
    return {
        "TEXT": str(text),
        "OTHER": str(other),
        "TASKS": str(tasks),
        "NAN": str(root / "nan"),
        "BAD": str(root / "bad.jsonl"),
    }


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_one_line(name, tiny_target, places, capsys, monkeypatch):
    """A mistake gives one line that names the flag, file or value and the remedy, and exit code 2."""
    from lm_eval.tasks import TaskManager

    from trainkit.eval import harness

    local = lambda include_path, **_: TaskManager(include_path=include_path, include_defaults=False)
    monkeypatch.setattr(harness, "TaskManager", local)  # indexing the harness's 14,000 tasks takes many seconds
    flags, parts = MISTAKES[name]
    for word, path in places.items():
        flags = [flag.replace(f"={word}", f"={path}") for flag in flags]
    assert main(["evaluate", str(tiny_target), *flags]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("trainkit: error: ") and all(part in line for part in parts), line


def test_missing_harness_names_the_extra(tiny_target, monkeypatch, capsys):
    """Without lm-evaluation-harness the line names the extra to install."""
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "trainkit.eval.harness", raising=False)
    import trainkit.eval

    monkeypatch.delattr(trainkit.eval, "harness", raising=False)
    assert main(["evaluate", str(tiny_target), "--tasks=pick"]) == 2
    assert "pip install 'trainkit[eval]'" in capsys.readouterr().err
