"""Records of serving: recounted by hand from the distributions, the same in any cut, and refused where they would mislead."""

# B rows  V vocabulary

from __future__ import annotations

import json

import pytest
import torch

from tests.support.models import pair, ragged_prompts
from tests.support.targets import make_target
from trainkit import bundle
from trainkit.cli import main
from trainkit.commands.acceptance import Recorder, records_of
from trainkit.data.sets.acceptance import COLUMNS, AcceptanceSet
from trainkit.drafters.lm import LMDraft
from trainkit.export.drafter import export_drafter
from trainkit.models.predictor import RANKS
from trainkit.models.target import target_shape
from trainkit.runner.sampling import CHOICE, gumbel, request_keys

DEPTH = 3


def make(runner, prompts, verify, seed=5):
    return records_of(runner, prompts, depth=DEPTH, verify=verify, max_new_tokens=24, seed=seed, dtype=torch.float32)


@pytest.mark.parametrize(("verify", "temperature"), [("coupled", 0.0), ("coupled", 1.0), ("residual", 0.0), ("residual", 0.8)])
def test_records_are_those_of_a_recount_by_hand(verify, temperature, seed):
    """Row by row: walk each round's chain, take what stands there, stop after the first that the text does not hold."""
    runner, prompts = pair(noise=0.05), ragged_prompts(5)
    traces = []
    recorder_make = make(runner, prompts, verify)
    seen = Recorder.__call__
    try:
        Recorder.__call__ = lambda self, trace: (traces.append(trace), seen(self, trace))[1]
        told = []
        records = recorder_make(range(5), temperature, told.append)
    finally:
        Recorder.__call__ = seen
    texts = {
        i: out.tokens
        for i, out in runner.generate_each(
            prompts, temperature=temperature, depth=DEPTH, verify=verify, max_new_tokens=24, seed=5, ignore_end=False
        )
    }
    assert sorted(told) == sorted(map(len, texts.values()))

    by_prompt, beside = {i: [] for i in range(5)}, 0.0
    keys = {request_keys(5, i, 0): i for i in range(5)}
    for trace in traces:
        for row, pair_of in enumerate(trace.keys_B2.tolist()):
            if not trace.verdict.counts_B[row]:
                continue
            emitted = trace.verdict.emitted_BP[row].tolist()
            for d in range(DEPTH):
                token = int(trace.draft.tokens_BN[row, d + 1])
                accepted = d + 1 < int(trace.verdict.counts_B[row])
                assert not accepted or emitted[d] == token
                q_V, p_V = trace.draft.logits[d][row, 0].softmax(-1), trace.scores_BNV[row, d].softmax(-1)
                soft = verify == "residual" and temperature > 0
                told = trace.draft.signals[d]
                best = told.tokens_BFW[row, 0].tolist()
                assert best[0] == token and len(set(best)) == RANKS
                label = [min(1.0, float(p_V[token] / q_V[token]))] if soft else [float(one == emitted[d]) for one in best]
                assert soft or label[0] == accepted
                beside += sum(label[1:])
                by_prompt[keys[tuple(pair_of)]].append((d, label, float(q_V.max()), told.hidden_BFD[row, 0]))
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
    assert 0.1 < share < 0.95 and (soft or beside > 3), "too little to tell"


def test_coupled_labels_are_settled_by_the_noise_that_the_signals_have_seen(seed):
    """The target's own choice with the same noise, drawn here again, is the drafted token exactly where the label is 1."""
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
    seen = Recorder.__call__
    try:
        Recorder.__call__ = lambda self, trace: (look(trace), seen(self, trace))[1]
        records = make(runner, prompts, "coupled")(range(4), temperature, lambda tokens: None)
    finally:
        Recorder.__call__ = seen
    assert checked == len(records["label"]) > 20 and set(records["label"].unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("verify", ["coupled", "residual"])
def test_a_prompts_records_do_not_depend_on_the_cut_into_parts(verify, seed):
    """Whole, or prompt by prompt; states to float32's rounding, since the batch shapes differ."""
    runner, prompts = pair(noise=0.05), ragged_prompts(6)
    made = make(runner, prompts, verify)
    whole = made(range(6), 1.0, lambda tokens: None)
    single = [made([number], 1.0, lambda tokens: None) for number in range(6)]
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
    draft.initialise(tiny_target)
    export_drafter(draft, folder / "draft", tokenizer=tiny_target)
    rows = [{"question": f"How many are {n} clips?"} for n in range(10)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"target": tiny_target, "acceptance": folder / "draft", "data": folder / "prompts.jsonl"}


def command(given, out, **options):
    flags = {**given, "out": out, "max_new_tokens": 8, "depth": 3, "part_prompts": 4, "batch": 4, **options}
    return main(["features", *(f"--{name}={value}" for name, value in flags.items() if value is not None)])


def test_the_command_makes_a_set_and_goes_on_with_it(given, tmp_path, capsys):
    out = tmp_path / "set"
    assert command(given, out) == 0
    said = capsys.readouterr().out
    assert "6 of 6 parts made, 0 were there" in said and "tokens/s" in said
    records = AcceptanceSet.read(out)
    assert records.tensors["hidden"].dtype == torch.bfloat16 and set(records.temperature.tolist()) == {0.0, 1.0}
    about = records.about
    assert about["verify"] == "coupled" and about["depth"] == 3
    assert about["drafter"]["files"] == bundle.read(given["acceptance"]).files
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "part-00003.safetensors").unlink()
    assert command(given, out) == 0
    assert "1 of 6 parts made, 5 were there" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert command(given, out, seed=1) == 2
    assert "was begun with" in capsys.readouterr().err


MISTAKES = {
    ("--taps=[1]",): "--taps: goes not with --acceptance",
    ("--kind=eagle",): "--kind: goes not with --acceptance",
    ("--top_k=4",): "--top_k: goes not with --acceptance",
    ("--validation=x.jsonl",): "--validation: goes not with --acceptance",
    ("--temperatures=[]",): "--temperatures: give at least one",
    ("--temperatures=[1,1]",): "names one twice",
    ("--temperatures=[-1]",): "temperature -1.0",
    ("--depth=0",): "--depth: 0 must be at least 1",
    ("--dtype=float16",): "give bfloat16 or float32",
    ("--acceptance=nowhere",): "nowhere: not a bundle",
    ('--data=["a.jsonl","b.jsonl"]',): "give one file",
}


@pytest.mark.parametrize("flags", MISTAKES, ids=" ".join)
def test_a_mistake_is_one_line_and_nothing_is_begun(flags, given, tmp_path, capsys):
    named = [flag.split("=")[0].strip("-") for flag in flags]
    fixed = [f"--{name}={value}" for name, value in {**given, "out": tmp_path / "set"}.items() if name not in named]
    assert main(["features", *fixed, *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("trainkit: error: ") and MISTAKES[flags] in error
    assert not (tmp_path / "set").exists()


def test_flags_of_decoding_are_refused_without_a_drafter(given, tmp_path, capsys):
    fixed = [f"--{name}={value}" for name, value in {**given, "out": tmp_path / "set"}.items() if name != "acceptance"]
    for flag in ("--depth=4", "--verify=residual", "--temperatures=[0]", "--max_new_tokens=9", "--part_prompts=2"):
        assert main(["features", *fixed, flag]) == 2
        assert f"{flag.split('=')[0]}: goes only with --acceptance" in capsys.readouterr().err


def test_a_drafter_for_another_target_is_refused(given, tmp_path, capsys):
    other = make_target(tmp_path / "other", vocab_size=400)
    assert command({**given, "target": other}, tmp_path / "set") == 2
    assert "vocab_size 400 does not fit" in capsys.readouterr().err
