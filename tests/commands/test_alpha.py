"""`trainkit alpha`: sums by question against a naive loop, cached target states, tau, and the command's output."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.equality import exact_logits
from trainkit.cli import main
from trainkit.commands.alpha import alpha
from trainkit.data.teacher.live import LiveTeacher
from trainkit.data.text.prepare import Prepared, prepare
from trainkit.drafters.lm import LMDraft
from trainkit.drafters.medusa import Medusa
from trainkit.errors import UserError
from trainkit.eval.acceptance import Sums, decode_tau, measure
from trainkit.export.drafter import export_drafter
from trainkit.losses.measures import acceptance, coupled_acceptance
from trainkit.models.load import load_decoder
from trainkit.models.target import FrozenTarget, target_shape
from trainkit.runner import Runner, Stats


def draft_of(target: Path, layers: int, noise: float, **more: Any) -> LMDraft:
    draft = LMDraft(target_shape(target), num_layers=layers, **more)
    draft.initialise(FrozenTarget(target))
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return draft.eval()


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    answers = [f"In May she sold {n} clips. " * (1 + n % 4) for n in range(7)]
    path.write_text("".join(json.dumps({"prompt": f"How many, {n}?", "response": a}) + "\n" for n, a in enumerate(answers)))
    return path


@pytest.fixture(scope="module")
def made(tiny_target: Path, texts: Path) -> Prepared:
    return prepare([str(texts)], None, str(tiny_target), 128, validation_share=0.0)


def naive(target: Path, draft: LMDraft, made: Prepared, temperatures: list[float]) -> Sums:
    """Each document alone through both models, in float64, with whole logits."""
    packed, teacher, sums = made.train, load_decoder(target), {"tokens": []}
    for start, end in zip(packed.documents_D[:-1], packed.documents_D[1:], strict=True):
        tokens, counted = packed.tokens_N[start:end].tolist(), torch.from_numpy(packed.mask_N[start + 1 : end])
        target_NV, draft_NV = (exact_logits(decoder, tokens)[:-1][counted] for decoder in (teacher, draft.decoder))
        if draft.ids_K is not None:
            proposed, draft_NV = draft_NV[:, draft.ids_K], torch.full_like(draft_NV, float("-inf"))
            draft_NV[:, draft.ids_K] = proposed
        sums["tokens"].append(len(draft_NV))
        for temperature in temperatures:
            if temperature:
                p, q = (target_NV / temperature).softmax(-1), (draft_NV / temperature).softmax(-1)
                sums.setdefault(f"alpha@{temperature:g}", []).append(float(acceptance(p, q).sum()))
                sums.setdefault(f"alpha_coupled@{temperature:g}", []).append(float(coupled_acceptance(p, q).sum()))
            else:
                sums.setdefault("agreement@0", []).append(float((target_NV.argmax(-1) == draft_NV.argmax(-1)).sum()))
    return {name: np.array(values) for name, values in sums.items()}


def test_sums_per_question_equal_naive_loop(tiny_target, made, seed):
    """float32 against float64; two different drafters have different sums."""
    drafts = [
        draft_of(tiny_target, 4, 0.02),
        draft_of(tiny_target, 3, 0.02),
        draft_of(tiny_target, 4, 0.02, draft_vocab=list(range(0, 320, 2))),
    ]
    found = measure(LiveTeacher(FrozenTarget(tiny_target)), drafts, made.train, [0, 0.7, 1], 2, "")
    for draft, (sums,) in zip(drafts, found, strict=True):
        expected = naive(tiny_target, draft, made, [0, 0.7, 1])
        assert sums.keys() == expected.keys() and len(sums["tokens"]) == 7 == len(made.train.documents_D) - 1
        assert sums["tokens"].tolist() == expected["tokens"].tolist() and sums["tokens"].sum() == made.train.labels_R.sum()
        for name, values in expected.items():
            tolerance = 1 if name == "agreement@0" else 1e-2  # one tie in 1,000 tokens, else float32 rounding
            assert np.abs(sums[name] - values).sum() <= tolerance, name
            assert 0 < sums[name].sum() < sums["tokens"].sum() or name == "tokens"
    assert not np.allclose(found[0][0]["alpha@1"], found[1][0]["alpha@1"])


def test_batch_and_temperature_order_change_nothing(tiny_target, made, seed):
    """Temperature 0 alone gives agreement only; batch size and order of temperatures change no sum."""
    draft = draft_of(tiny_target, 4, 0.02)
    reader = LiveTeacher(FrozenTarget(tiny_target))
    ((alone,),) = measure(reader, [draft], made.train, [0], 3, "")
    ((many,),) = measure(reader, [draft], made.train, [0.5, 0], 1, "")
    assert list(alone) == ["tokens", "agreement@0"] and set(many) == {"tokens", "agreement@0", "alpha@0.5", "alpha_coupled@0.5"}
    assert np.abs(alone["agreement@0"] - many["agreement@0"]).sum() <= 1  # a tie, at most


def test_target_runs_once_for_all_drafters(tiny_target, made, tmp_path, monkeypatch, seed):
    """The sums are identical with and without the store; the second call with a store never runs the target."""
    drafts = [draft_of(tiny_target, n, 0.02) for n in (1, 4)]
    calls, forward = [], FrozenTarget.forward
    monkeypatch.setattr(FrozenTarget, "forward", lambda self, *args: calls.append(1) or forward(self, *args))
    plain = measure(LiveTeacher(FrozenTarget(tiny_target)), drafts, made.train, [1], 2, "set")
    batches = -(-len(made.train) // 2)
    assert len(calls) == batches
    first = measure(LiveTeacher(FrozenTarget(tiny_target), str(tmp_path)), drafts, made.train, [1], 2, "set")
    assert len(calls) == 2 * batches
    second = measure(LiveTeacher(FrozenTarget(tiny_target), str(tmp_path)), drafts, made.train, [1], 2, "set")
    assert len(calls) == 2 * batches
    for (one,), (two,), (three,) in zip(plain, first, second, strict=True):
        assert all(np.array_equal(one[name], two[name]) and np.array_equal(one[name], three[name]) for name in one)


def test_each_head_is_measured_at_its_own_offset(tiny_target, made, tmp_path, seed):
    """Untrained Medusa heads all output the target's next-token logits: head k's prediction of token p is the one for p - k.

    They are measured together with a kind that has no taps, so the two share no stored states.
    """
    drafts = [draft_of(tiny_target, 1, 0.0), Medusa(target_shape(tiny_target), num_heads=3, head="target").eval()]
    reader = LiveTeacher(FrozenTarget(tiny_target), str(tmp_path))
    alone, heads = measure(reader, drafts, made.train, [0, 0.7], 2, "")
    assert len(alone) == 1 and len(heads) == 3
    packed, teacher = made.train, load_decoder(tiny_target)
    documents = list(itertools.pairwise(packed.documents_D.tolist()))
    for k, sums in enumerate(heads, start=1):
        expected: dict[str, list[float]] = {name: [] for name in ("tokens", "agreement@0", "alpha@0.7", "alpha_coupled@0.7")}
        for start, end in documents:
            logits = exact_logits(teacher, packed.tokens_N[start:end].tolist())
            labels = [p for p in range(k + 1, end - start) if packed.mask_N[start + p]]
            target_NV, draft_NV = logits[[p - 1 for p in labels]], logits[[p - 1 - k for p in labels]]
            p, q = (target_NV / 0.7).softmax(-1), (draft_NV / 0.7).softmax(-1)
            expected["tokens"].append(len(labels))
            expected["agreement@0"].append(float((target_NV.argmax(-1) == draft_NV.argmax(-1)).sum()))
            expected["alpha@0.7"].append(float(acceptance(p, q).sum()))
            expected["alpha_coupled@0.7"].append(float(coupled_acceptance(p, q).sum()))
        assert sums.keys() == expected.keys() and sums["tokens"].tolist() == expected["tokens"]
        for name, values in expected.items():
            assert np.abs(sums[name] - np.array(values)).sum() <= (2 if name == "agreement@0" else 1e-2), (k, name)
    assert not np.allclose(heads[0]["alpha@0.7"], heads[1]["alpha@0.7"])


def test_kind_without_per_token_losses_is_refused(tiny_target, made, seed):
    """A drafter kind whose loss has no values per token cannot be evaluated."""

    class Silent(LMDraft):
        def forward(self, batch, divergence):
            return replace(super().forward(batch, divergence), per_token={})

    draft = Silent(target_shape(tiny_target), num_layers=1)
    with pytest.raises(UserError, match="Silent: its loss gives no values per token") as caught:
        measure(LiveTeacher(FrozenTarget(tiny_target)), [draft], made.train, [0.0], 8, "")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tau_equals_runner_statistics(temperature, tiny_target, seed):
    """Tau as evaluated equals tau from the runner's statistics."""
    draft = draft_of(tiny_target, 4, 0.02)
    prompts = [torch.randint(5, 320, (n,)).tolist() for n in (2, 5, 9, 3)]
    found = decode_tau(str(tiny_target), draft, prompts, [temperature], 3, 24, 33)
    runner = Runner.load(tiny_target, max_len=64)
    runner = Runner(runner.rounds.target, draft, target_shape(tiny_target), tiny_target, 16, 64)
    for verify in ("coupled", "residual") if temperature else ("coupled",):
        outputs = runner.generate(prompts, 24, temperature, depth=3, verify=verify)
        emitted, rounds = found.pop(f"tau_{verify}@{temperature:g}")
        merged = Stats.merge(output.stats for output in outputs)
        assert rounds.tolist() == [output.stats.rounds for output in outputs] and sum(rounds) == merged.rounds
        assert emitted.sum() / rounds.sum() == pytest.approx(merged.tau, rel=1e-12) and merged.tau > 1
    assert not found


@pytest.fixture(scope="module")
def bundles(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("bundles")
    for name, layers in (("a", 4), ("b", 3)):
        export_drafter(draft_of(tiny_target, layers, 0.02), root / name, tokenizer=tiny_target)
    return [str(root / "a"), str(root / "b")]


def test_alpha_command_writes_table_and_json(tiny_target, texts, bundles, tmp_path, capsys):
    """The JSON holds every figure of the table and those of each question; a second call with cached states agrees."""
    flags = ["--target", str(tiny_target), "--data", str(texts), "--length", "128", "--teacher-cache", str(tmp_path / "cache")]
    flags += ["--prompts", str(texts), "--questions", "3", "--depth", "2", "--max-new-tokens", "12", "--temperatures", "[0,1]"]
    printed = []
    for name in ("one", "two"):
        outputs = ["--drafter", json.dumps(bundles), "--json", str(tmp_path / f"{name}.json")]
        assert main(["alpha", *flags, *outputs]) == 0
        printed.append(capsys.readouterr().out.splitlines())
    assert (
        printed[0][-8:] == printed[1][-8:] and "0.00 GB" in printed[0][0] and printed[0][0].endswith(" 0 rows already cached")
    )
    found, again = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert found == again and list(found["drafters"]) == bundles and found["questions"] == 7
    means = found["drafters"][bundles[0]]["means"]
    assert set(means) == {"alpha@1", "alpha_coupled@1", "agreement@0", "tau_coupled@0", "tau_coupled@1", "tau_residual@1"}
    sums = found["drafters"][bundles[0]]["per_question"]
    assert means["alpha@1"]["mean"] == pytest.approx(sum(sums["alpha@1"]) / found["tokens"], abs=1e-5)
    assert all(one["low"] <= one["mean"] <= one["high"] for one in means.values())
    assert means["tau_coupled@0"]["mean"] >= 1 and means["alpha_coupled@1"]["mean"] <= means["alpha@1"]["mean"]
    table = "\n".join(printed[0])
    assert f"7 texts, {found['tokens']:,} tokens" in table and f"difference from {bundles[0]}, on the same texts" in table
    assert f"{means['alpha@1']['mean']:.4f} [{means['alpha@1']['low']:.4f}, {means['alpha@1']['high']:.4f}]" in table


def test_table_has_heads_and_tau_per_drafter(tiny_target, texts, bundles, tmp_path, capsys):
    """The table has a line for every head, and tau once for every drafter."""
    heads = Medusa(target_shape(tiny_target), num_heads=2, head="target")
    export_drafter(heads.eval(), tmp_path / "heads", tokenizer=tiny_target)
    names = [bundles[0], str(tmp_path / "heads"), f"{tmp_path / 'heads'} head 2"]
    flags = ["--target", str(tiny_target), "--data", str(texts), "--length", "128", "--temperatures", "[0]"]
    flags += ["--prompts", str(texts), "--questions", "2", "--max-new-tokens", "8", "--json", str(tmp_path / "alpha.json")]
    assert main(["alpha", *flags, "--drafter", bundles[0], "--drafter", str(tmp_path / "heads")]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads((tmp_path / "alpha.json").read_text())["drafters"]
    assert list(found) == names and [sum(line.startswith(f"{name} ") for line in lines) for name in names] == [1, 4, 2]
    assert [list(found[name]["means"]) for name in names] == [["agreement@0", "tau_coupled@0"]] * 2 + [["agreement@0"]]
    emitted, rounds = map(sum, found[names[1]]["per_question"]["tau_coupled@0"])
    assert rounds <= emitted <= 3 * rounds, "the chain is as deep as the number of heads"


def test_paired_difference_to_itself_is_zero(tiny_target, texts, bundles, capsys):
    """One drafter alone has no difference; the paired difference of a drafter to itself is exactly 0."""
    flags = ["--target", str(tiny_target), "--data", str(texts), "--length", "128", "--temperatures", "[1]"]
    assert main(["alpha", *flags, "--drafter", bundles[0]]) == 0
    assert "difference" not in capsys.readouterr().out
    same = alpha(target=str(tiny_target), data=str(texts), drafter=[bundles[0]] * 2, length=128, temperatures=(1.0,))
    assert same.splitlines()[-1].count("+0.0000 [+0.0000, +0.0000]") == 2


def test_what_became_of_the_rows_is_on_stderr(tiny_target, bundles, tmp_path, capsys):
    """Truncated rows, columns and files that were not read are named on standard error, also by vocab."""
    row = {"prompt": "How many?", "response": "In May she sold 3 clips. " * 9, "id": 3}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "README.md").write_text("two answers")
    common = [f"--target={tiny_target}"]
    assert main(["alpha", *common, f"--data={tmp_path}", f"--drafter={bundles[0]}", "--length=32"]) == 0
    noted = ["train: columns not read: id (1)", "train: files not read: README.md"]
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train:")]  # not transformers' bar
    assert lines == ["train: 1 truncated to 32 tokens", *noted]
    assert main(["vocab", str(tmp_path / "ids.json"), *common, f"--text={tmp_path / 'rows.jsonl'}"]) == 0
    assert noted[0] in capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("temperatures", "[-1]", "temperature -1"),
        ("temperatures", "[]", "temperatures"),
        ("drafter", "[]", "drafter"),
        ("batch", "0", "batch"),
        ("limit", "-1", "--limit: -1 must be at least 1"),
        ("questions", "-1", "--questions: -1 must be at least 1"),
        ("length", "1024", "512 positions"),
        ("data", "none.jsonl", "none.jsonl"),
    ],
)
def test_bad_flags_give_one_line(flag, value, message, tiny_target, texts, bundles, capsys):
    """A wrong flag gives a one-line error that names it."""
    given = {"target": str(tiny_target), "data": str(texts), "length": "128", "drafter": bundles[0]} | {flag: value}
    assert main(["alpha", *(f"--{name}={one}" for name, one in given.items())]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("trainkit: error") and message in line
