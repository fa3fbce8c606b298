"""`trainkit acceptance`: records equal a recount by hand, do not depend on the parts, and wrong options give one line."""

# B rows  V vocabulary

from __future__ import annotations

import json

import pytest
import torch

from tests.support.models import pair, ragged_prompts
from tests.support.targets import make_target
from trainkit import bundle
from trainkit.cli import main
from trainkit.commands import acceptance
from trainkit.commands.acceptance import recording
from trainkit.data.sets.acceptance import COLUMNS, AcceptanceSet
from trainkit.drafters.lm import LMDraft
from trainkit.export.drafter import export_drafter
from trainkit.models.predictor import RANKS
from trainkit.models.target import FrozenTarget, target_shape
from trainkit.runner.sampling import CHOICE, gumbel, request_keys

DEPTH = 3


def recorder_of(runner, prompts, verify, seed=5):
    return recording(runner, prompts, torch.float32, depth=DEPTH, verify=verify, max_new_tokens=24, seed=seed)


def watch(monkeypatch, look):
    """Calls `look` with the trace of every round that is recorded."""
    original = acceptance.round_records
    monkeypatch.setattr(acceptance, "round_records", lambda trace, *more: (look(trace), original(trace, *more))[1])


@pytest.mark.parametrize(("verify", "temperature"), [("coupled", 0.0), ("coupled", 1.0), ("residual", 0.0), ("residual", 0.8)])
def test_records_equal_recount_from_traces(verify, temperature, seed, monkeypatch):
    """For each row and round: follow the chain, read the values at each position, stop after the first rejected token."""
    runner, prompts = pair(noise=0.05, ends=()), ragged_prompts(5)  # no text ends early, so there are many records
    traces, lengths = [], []
    watch(monkeypatch, traces.append)
    records = recorder_of(runner, prompts, verify)(range(5), temperature, lambda tokens, cut: lengths.append(tokens))
    texts = {
        i: out.tokens
        for i, out in runner.generate_each(
            prompts, temperature=temperature, depth=DEPTH, verify=verify, max_new_tokens=24, seed=5, ignore_end=False
        )
    }
    assert sorted(lengths) == sorted(map(len, texts.values()))

    by_prompt, others = {i: [] for i in range(5)}, 0.0
    keys = {request_keys(5, i, 0): i for i in range(5)}
    for trace in traces:
        for row, key in enumerate(trace.keys_B2.tolist()):
            if not trace.verdict.counts_B[row]:
                continue
            emitted = trace.verdict.emitted_BP[row].tolist()
            for d in range(DEPTH):
                token = int(trace.draft.tokens_BN[row, d + 1])
                accepted = d + 1 < int(trace.verdict.counts_B[row])
                assert not accepted or emitted[d] == token
                q_V, p_V = trace.draft.logits[d][row, 0].softmax(-1), trace.scores_BNV[row, d].softmax(-1)
                soft = verify == "residual" and temperature > 0
                step = trace.draft.signals[d]
                best = step.tokens_BFW[row, 0].tolist()
                assert best[0] == token and len(set(best)) == RANKS
                label = [min(1.0, float(p_V[token] / q_V[token]))] if soft else [float(one == emitted[d]) for one in best]
                assert soft or label[0] == accepted
                others += sum(label[1:])
                by_prompt[keys[tuple(key)]].append((d, label, float(q_V.max()), step.hidden_BFD[row, 0]))
                if not accepted:
                    break
    expected = [(i, *one) for i, found in by_prompt.items() for one in found]
    assert len(expected) == len(records["label"]) > 20
    assert records["prompt"].tolist() == [one[0] for one in expected]
    assert records["depth"].tolist() == [one[1] for one in expected]
    assert torch.allclose(records["label"], torch.tensor([one[2] for one in expected]), atol=1e-6)
    assert torch.allclose(records["max_q"], torch.tensor([one[3] for one in expected]), atol=1e-6)
    assert torch.equal(records["hidden"], torch.stack([one[4] for one in expected]))
    assert bool((records["signals"][..., -1] == torch.tensor(temperature)).all())
    share = float(records["label"][:, 0].mean())
    assert 0.1 < share < 0.95 and (soft or others > 3), "too few of one kind for a test"


def test_coupled_labels_follow_the_shared_noise(seed, monkeypatch):
    """The target's own choice, recomputed here with the same noise, is the drafted token exactly where the label is 1."""
    runner, prompts, temperature = pair(noise=0.05, ends=()), ragged_prompts(4), 1.0
    checked = 0

    def look(trace):
        nonlocal checked
        for row, key in enumerate(trace.keys_B2):
            for d in range(int(trace.verdict.counts_B[row])):
                if d < DEPTH:
                    at = positions[tuple(key.tolist())] + d + 1
                    noise = gumbel(key[None], torch.tensor([[at]]), torch.arange(48), CHOICE)[0, 0]
                    own = int((trace.scores_BNV[row, d] + noise).argmax())
                    accepted = d + 1 < int(trace.verdict.counts_B[row])
                    assert (own == int(trace.draft.tokens_BN[row, d + 1])) == accepted
                    log_p = (trace.draft.logits[d][row, 0] + noise).log_softmax(-1).max()
                    assert torch.allclose(trace.draft.signals[d].signals_BFWC[row, 0, 0, 0], log_p.clamp(min=-20), atol=1e-5)
                    checked += 1
            positions[tuple(key.tolist())] += int(trace.verdict.counts_B[row])

    positions = {request_keys(5, i, 0): len(prompt) for i, prompt in enumerate(prompts)}
    watch(monkeypatch, look)
    records = recorder_of(runner, prompts, "coupled")(range(4), temperature, lambda tokens, cut: None)
    assert checked == len(records["label"]) > 20 and set(records["label"].unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("verify", ["coupled", "residual"])
def test_records_do_not_depend_on_the_split(verify, seed):
    """Whole, or prompt by prompt; states to float32's rounding, since the batch shapes differ."""
    runner, prompts = pair(noise=0.05), ragged_prompts(6)
    record = recorder_of(runner, prompts, verify)
    whole = record(range(6), 1.0, lambda tokens, cut: None)
    single = [record([number], 1.0, lambda tokens, cut: None) for number in range(6)]
    for name in COLUMNS:
        together = torch.cat([one[name] for one in single if len(one["label"])])
        if whole[name].is_floating_point():
            assert torch.allclose(whole[name], together, atol=1e-4), name
        else:
            assert torch.equal(whole[name], together), name


@pytest.fixture(scope="module")
def given(tmp_path_factory, tiny_target):
    """A target's folder, the bundle of a draft for it, and prompts."""
    folder = tmp_path_factory.mktemp("given")
    draft = LMDraft(target_shape(tiny_target), num_layers=1, init="target")
    draft.initialise(FrozenTarget(tiny_target))
    export_drafter(draft, folder / "draft", tokenizer=tiny_target)
    rows = [{"question": f"How many are {n} clips?"} for n in range(10)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"target": tiny_target, "drafter": folder / "draft", "prompts": folder / "prompts.jsonl"}


def command(given, out, **options):
    return run(
        {**given, "out": out, "device": "cpu", "max_new_tokens": 8, "depth": 3, "part_prompts": 4, "batch": 4, **options}
    )


def run(values, *flags):
    options = [f"--{name}={value}" for name, value in values.items() if name != "drafter"]
    return main(["acceptance", str(values["drafter"]), *options, *flags])


def test_features_command_writes_and_resumes_a_set(given, tmp_path, capsys):
    """The command writes a set, and a second call makes only a missing part, byte for byte the same."""
    out = tmp_path / "set"
    assert command(given, out) == 0
    line = capsys.readouterr().out
    assert "6 of 6 parts written, 0 already existed" in line and "tokens/s" in line
    records = AcceptanceSet.read(out)
    assert records.tensors["hidden"].dtype == torch.bfloat16 and set(records.temperature.tolist()) == {0.0, 1.0}
    manifest = records.manifest
    assert manifest["verify"] == "coupled" and manifest["depth"] == 3
    assert manifest["drafter"]["files"] == bundle.read(given["drafter"]).files
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "part-00003.safetensors").unlink()
    assert command(given, out) == 0
    assert "1 of 6 parts written, 5 already existed" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert command(given, out, seed=1) == 2
    assert "was started with" in capsys.readouterr().err


MISTAKES = {
    ("--taps=[1]",): "taps",
    ("--temperatures=[]",): "--temperatures: give at least one",
    ("--temperatures=[1,1]",): "has a value twice",
    ("--temperatures=[-1]",): "temperature -1.0",
    ("--depth=0",): "--depth: 0 must be at least 1",
    ("--limit=-1",): "--limit: -1 must be at least 1",
    ("--batch=0",): "--batch: 0 must be at least 1",
    ("--max_new_tokens=0",): "--max_new_tokens: 0 must be at least 1",
    ("--part_prompts=0",): "--part_prompts: 0 must be at least 1",
    ("--dtype=float16",): "float16",
    ("--verify=typical",): "typical",
    ("--prompts=nowhere.jsonl",): "nowhere.jsonl: there is no such file",
    ("nowhere",): "nowhere: no such folder",
}


@pytest.mark.parametrize("flags", MISTAKES, ids=" ".join)
def test_bad_flag_gives_one_line_and_no_output(flags, given, tmp_path, capsys):
    """A wrong flag gives a one-line error and no output folder."""
    values = {**given, "out": tmp_path / "set"}
    options = [flag for flag in flags if flag.startswith("--")]
    values["drafter"] = next((flag for flag in flags if flag not in options), values["drafter"])
    try:
        code = run(values, *options)
    except SystemExit as exit:  # the parser's
        code = exit.code
    assert code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("trainkit: error: ") and MISTAKES[flags] in error
    assert not (tmp_path / "set").exists()


def test_drafter_of_another_target_is_refused(given, tmp_path, capsys):
    """A drafter trained for a target with another vocabulary is refused."""
    other = make_target(tmp_path / "other", vocab_size=400)
    assert command({**given, "target": other}, tmp_path / "set") == 2
    assert "vocab_size 400 does not fit" in capsys.readouterr().err


def test_equal_prompts_are_one_prompt(seed):
    """Records of equal prompts have the index of the first one, so that they are held out together."""
    runner, prompts = pair(noise=0.05, ends=()), ragged_prompts(3)
    repeated = [prompts[number] for number in (0, 1, 0, 2, 1)]
    records = recorder_of(runner, repeated, "coupled")(range(5), 1.0, lambda tokens, cut: None)
    assert records["prompt"].unique().tolist() == [0, 1, 3]
