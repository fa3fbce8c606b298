"""`trainkit trim`: the head shrinks, the export and the output do not change, and no id outside is ever proposed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.support import equality
from tests.support.kinds.twig import Twig
from tests.support.models import BUSHY, SHAPE, lm_draft, near, ragged_prompts, random_decoder
from tests.support.targets import make_target
from trainkit import bundle
from trainkit.cli import main
from trainkit.commands.trim import trim
from trainkit.data.text.prepare import prepare
from trainkit.data.text.vocabulary import most_frequent
from trainkit.drafters import base
from trainkit.drafters.base import DraftBatch
from trainkit.drafters.lm import LMDraft
from trainkit.errors import UserError
from trainkit.export.drafter import export_drafter
from trainkit.losses.divergence import ForwardKL, TVDpp
from trainkit.models.load import read_tokenizer
from trainkit.models.shape import TargetShape
from trainkit.models.target import FrozenTarget, target_shape
from trainkit.runner import Runner, Stats
from trainkit.runner.round import Trace
from trainkit.runner.sampling import Sampling


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    rows = [{"prompt": f"How many, {n}?", "response": f"In May she sold {n} clips altogether."} for n in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_target(tmp_path_factory.mktemp("untied") / "target", num_hidden_layers=2, tie_word_embeddings=False)


def draft_of(target: Path, **more: Any) -> LMDraft:
    draft = LMDraft(target_shape(target), num_layers=2, **more)
    draft.initialise(FrozenTarget(target))
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return draft.eval()


def exported(target: Path, folder: Path) -> Path:
    export_drafter(draft_of(target), folder, tokenizer=target, recipe="some.yaml", seed=5, data="digest", format="vllm")
    return folder


def ids_in(folder: Path) -> list[int]:
    return list(bundle.read(folder).config["draft_vocab"])


def test_most_frequent_by_hand():
    """The most frequent ids equal those found by hand, and always include the end ids."""
    counts = np.array([5, 9, 0, 9, 1, 5])
    assert most_frequent(counts, 3) == [0, 1, 3], "the lower of the two ids with count 5"
    assert most_frequent(counts, 4) == [0, 1, 3, 5]
    assert most_frequent(counts, 3, [2]) == [1, 2, 3], "an end id is included though it was never counted"
    assert most_frequent(counts, 3, [1, 4]) == [1, 3, 4], "no id is included twice"
    assert most_frequent(counts, 6, [2, 4]) == [0, 1, 2, 3, 4, 5]


@given(hnp.arrays(np.int64, 12, elements=st.integers(0, 4)), st.integers(3, 12), st.sets(st.integers(0, 11), max_size=2))
def test_dropped_ids_are_never_more_frequent(counts, number, always):
    """No id that is left out is more frequent than one that is retained."""
    ids = most_frequent(counts, number, sorted(always))
    assert ids == sorted(set(ids)) and len(ids) == number and always <= set(ids)
    chosen, left = [(-counts[i], i) for i in set(ids) - always], [(-counts[i], i) for i in set(range(12)) - set(ids)]
    assert not chosen or not left or max(chosen) < min(left)


@pytest.mark.parametrize("tied", [True, False])
def test_trimmed_bundle_keeps_full_head_on_disk(tied, tiny_target, untied, text, tmp_path, capsys, seed):
    """Only trainkit.json differs on disk: transformers gets equal logits; a step does not read the rows that were left out."""
    from transformers import AutoModelForCausalLM

    target = tiny_target if tied else untied
    whole = exported(target, tmp_path / "whole")
    flags = ["--target", str(target), "--text", str(text), "--keep", "0.25"]
    assert main(["trim", str(whole), str(tmp_path / "trimmed"), *flags]) == 0
    said = capsys.readouterr().out
    assert f"written to {tmp_path / 'trimmed'}; the reloaded files compute" in said
    packed = prepare([str(text)], None, str(target), 2048, validation_share=0.0).train
    counted, ids = packed.tokens_N[packed.mask_N], ids_in(tmp_path / "trimmed")
    assert len(ids) == 80 and set(target_shape(target).end_ids) <= set(ids)
    assert ids == most_frequent(np.bincount(counted, minlength=320), 80, target_shape(target).end_ids)
    share = np.isin(counted, ids).mean()
    assert f"kept 80 of 320 ids, which cover {share:.2%} of the {len(counted):,} labels" in said
    assert "[80 entries]" in said and max(map(len, said.splitlines())) < 400, "long lists are abbreviated"
    found = bundle.read(tmp_path / "trimmed")
    assert (found.recipe, found.seed, found.data, found.extra["format"]) == ("some.yaml", 5, "digest", "vllm")
    assert found.metrics == {"vocabulary_kept": 0.25, "coverage": round(float(share), 5)}
    tokens = torch.randint(0, 320, (1, 30))
    with torch.no_grad():
        ours, theirs = (AutoModelForCausalLM.from_pretrained(tmp_path / name)(tokens).logits for name in ("whole", "trimmed"))
    assert torch.equal(ours, theirs) and ours.shape[-1] == 320
    before, after = (Runner.load(target, tmp_path / name).drafter for name in ("whole", "trimmed"))
    assert isinstance(before, LMDraft) and isinstance(after, LMDraft)
    assert before.step_bytes(0) - after.step_bytes(0) == 240 * 64 * 4
    assert torch.equal(before.decoder.head_weight, after.decoder.head_weight)
    assert after.config() == before.config() | {"draft_vocab": ids}
    assert trim(str(tmp_path / "trimmed"), str(tmp_path / "again"), target=str(target), text=str(text), keep=100)
    assert len(ids_in(tmp_path / "again")) == 100, "a trimmed bundle still has the whole head, so it can be trimmed again"


def trimmed_pair(ids: list[int] | None, noise: float = 0.03) -> Runner:
    """A random target of 48 ids, and a draft near it that may propose `ids`."""
    target, shape = random_decoder(), TargetShape(SHAPE, (7,))
    draft = lm_draft(shape, near(target, noise))
    if ids is not None:
        trimmed = LMDraft(shape, num_layers=SHAPE.num_layers, init="scratch", draft_vocab=ids)
        trimmed.decoder = draft.decoder
        draft = trimmed
    return Runner(target, draft, shape, max_batch=4, max_len=96)


@pytest.mark.parametrize(
    ("left", "said"),
    [({}, None), ({"tree": [[0], [1]]}, "the tree of"), ({"tree": [[0]], "predictor": {}}, "the tree and the predictor of")],
)
def test_trim_drops_tree_and_predictor_with_a_note(left, said, tiny_target, text, tmp_path, seed):
    """Trimming drops the tree and the predictor made for the full vocabulary, and says so."""
    whole = exported(tiny_target, tmp_path / "whole")
    bundle.amend(whole, runner=left)
    lines = trim(str(whole), str(tmp_path / "out"), target=str(tiny_target), text=str(text)).splitlines()
    assert bundle.read(tmp_path / "out").runner == {}
    assert [f"not copied: {said} {whole}; " in line for line in lines if "not copied" in line] == ([True] if said else [])


@pytest.mark.parametrize("tree", [None, BUSHY], ids=["chain", "tree"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_trimmed_draft_decodes_as_plain_decoding(temperature, tree, seed):
    """`coupled` gives equal tokens, in two calls; the second has a longer cache and fills the trimmed head again."""
    ids, seen = sorted(torch.randperm(48)[:20].tolist()), []
    runner = trimmed_pair(ids)
    shape: dict[str, Any] = {"tree": tree} if tree else {"depth": 3}
    for length in (8, 40):
        prompts = ragged_prompts(6)
        plain = runner.generate(prompts, length, temperature, seed=seed, depth=0)
        runner.observe = lambda trace: seen.append(trace)
        drafted = runner.generate(prompts, length, temperature, seed=seed, **shape)
        runner.observe = None
        texts = [out.tokens for out in drafted]
        sampling, others = Sampling(temperature), [out.tokens for out in plain]
        ties = equality.compare(runner.rounds.target, prompts, texts, others, sampling, seed)
        equality.assert_few(ties, sum(map(len, texts)))
    assert_proposes(seen, ids)
    assert Stats.merge(out.stats for out in drafted).tau > 1  # pyright: ignore[reportPossiblyUnboundVariable]


def assert_proposes(traces: list[Trace], ids: list[int]) -> None:
    """Every drafted token is among the ids, and no other has any probability."""
    outside = [i for i in range(48) if i not in ids]
    assert len(traces) > 3
    for trace in traces:
        assert set(trace.draft.tokens_BN[:, 1:].flatten().tolist()) <= set(ids)
        for scores in trace.draft.logits:
            assert scores.shape[-1] == 48 and (scores[..., outside] == float("-inf")).all()
            assert scores[..., ids].isfinite().all()


@pytest.mark.parametrize("tree", [None, BUSHY], ids=["chain", "tree"])
def test_trimmed_residual_sampling_is_lossless(tree, seed):
    """`residual`: chi-squared test of the second token's counts over 1,000 draws against the target's exact distribution."""
    from scipy import stats

    ids, seen = sorted(torch.randperm(48)[:20].tolist()), []
    runner, prompt = trimmed_pair(ids), [9]
    runner.max_batch = 1000
    runner.observe = lambda trace: seen.append(trace)
    shape: dict[str, Any] = {"tree": tree} if tree else {"depth": 2}
    outputs = runner.generate([prompt], 3, 1.0, verify="residual", n=1000, seed=seed, ignore_end=True, **shape)
    assert_proposes(seen, ids)
    first = equality.exact_logits(runner.rounds.target, prompt)[-1].softmax(-1)
    law = sum(first[t] * equality.exact_logits(runner.rounds.target, [*prompt, t])[-1].softmax(-1) for t in range(48))
    counts = np.bincount([out.tokens[1] for out in outputs], minlength=48)
    expected = law.numpy() * 1000  # pyright: ignore[reportAttributeAccessIssue]
    rare = expected < 5
    pooled = np.append(expected[~rare], expected[rare].sum()), np.append(counts[~rare], counts[rare].sum())
    keep = pooled[0] > 0
    assert stats.chisquare(pooled[1][keep], pooled[0][keep]).pvalue > 1e-5


def test_trimmed_greedy_residual_equals_plain(seed):
    """At temperature 0 residual verification with a trimmed draft equals plain decoding."""
    runner, prompts = trimmed_pair(sorted(torch.randperm(48)[:9].tolist())), ragged_prompts(5)
    plain, drafted = (runner.generate(prompts, 20, depth=depth, verify="residual") for depth in (0, 3))
    texts = [[out.tokens for out in one] for one in (drafted, plain)]
    equality.assert_few(equality.compare(runner.rounds.target, prompts, *texts, Sampling()), 100)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_trim_to_all_ids_changes_no_draft(temperature, tiny_target, text, tmp_path, seed):
    """With keep 1.0 it has all ids, and every round drafts what the untrimmed bundle drafts."""
    exported(tiny_target, tmp_path / "whole")
    trim(str(tmp_path / "whole"), str(tmp_path / "all"), target=str(tiny_target), text=str(text), keep=1.0)
    assert ids_in(tmp_path / "all") == list(range(320))
    prompts, drafts = [torch.randint(5, 320, (n,)).tolist() for n in (3, 8, 5)], []
    for name in ("whole", "all"):
        runner, seen = Runner.load(tiny_target, tmp_path / name, max_len=64), []
        runner.observe = lambda trace, seen=seen: seen.append(trace.draft)
        runner.generate(prompts, 16, temperature, depth=3, seed=seed)
        drafts.append(seen)
        assert runner.drafter is not None and runner.drafter.step_bytes(0) == draft_of(tiny_target).step_bytes(0)
    assert len(drafts[0]) == len(drafts[1]) > 3
    for one, other in zip(*drafts, strict=True):
        assert torch.equal(one.tokens_BN, other.tokens_BN)
        assert all(torch.equal(a, b) for a, b in zip(one.logits, other.logits, strict=True))


@pytest.mark.parametrize("divergence", [ForwardKL().measuring(), TVDpp(normalise="position")], ids=["kl", "tvdpp"])
def test_training_uses_only_the_trimmed_ids(divergence, tiny_target, seed):
    """Loss, metrics and gradient equal those of a whole head whose other rows are removed by hand."""
    ids = sorted(torch.randperm(320)[:50].tolist())
    draft, teacher = draft_of(tiny_target, draft_vocab=ids), FrozenTarget(tiny_target)
    tokens, positions = torch.randint(0, 320, (2, 14)), torch.arange(14).repeat(2, 1)
    document, mask = torch.zeros(2, 14, dtype=torch.long), torch.rand(2, 14) < 0.6
    hidden, _ = teacher.forward(tokens, positions, document)
    seen = DraftBatch(tokens, positions, document, mask, None, hidden, teacher.handle())
    torch.manual_seed(seed)
    found = draft(seen, divergence)
    found.sum.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in draft.named_parameters() if parameter.grad is not None}
    whole = draft_of(tiny_target)
    whole.load_state_dict(draft.state_dict())
    ids_K, counted = torch.tensor(ids), seen.label_mask(1)

    def by_hand(draft_ND, head, target_ND, target_head, ids_N=None, mask_N=None, labels_N=None):
        assert ids_N is None
        return divergence(draft_ND, lambda x: head(x)[:, ids_K], target_ND, target_head, ids_K, labels_N=labels_N)

    torch.manual_seed(seed)
    expected = whole(seen, by_hand)
    expected.sum.backward()
    assert float(found.count) == float(expected.count) == int(counted.sum())
    assert float(found.sum.detach()) == pytest.approx(float(expected.sum.detach()), rel=1e-5)
    for name, value in expected.metrics.items():
        assert float(found.metrics[name]) == pytest.approx(float(value), rel=1e-4), name
    for name, parameter in whole.named_parameters():
        assert parameter.grad is not None and (gradients[name] - parameter.grad).abs().max() < 1e-4, name
    # the head is tied to the embedding: only ids that were read or may be proposed get a gradient
    touched = gradients["decoder.embed.weight"].abs().sum(1) > 0
    assert set(touched.nonzero()[:, 0].tolist()) <= set(ids) | set(tokens.flatten().tolist()) and touched[ids].all()


@pytest.mark.parametrize("ids", [[3, 2], [2, 2], [], [-1, 4], [5, 320]])
def test_unsorted_or_foreign_draft_ids_are_refused(ids, tiny_target):
    """draft_vocab must be ascending ids of the target's vocabulary."""
    with pytest.raises(UserError, match="draft_vocab: must be ascending ids within the vocabulary of 320") as caught:
        LMDraft(target_shape(tiny_target), draft_vocab=ids)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", ["0", "-0.5", "1.5", "321", "0.002"])
def test_bad_keep_gives_one_line_and_no_output(keep, tiny_target, text, tmp_path, capsys, seed):
    """A wrong --keep gives a one-line error and no output folder."""
    exported(tiny_target, tmp_path / "whole")
    capsys.readouterr()
    flags = ["--target", str(tiny_target), "--text", str(text), f"--keep={keep}"]
    assert main(["trim", str(tmp_path / "whole"), str(tmp_path / "out"), *flags]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith(f"trainkit: error: --keep {float(keep):g}: ") and "\n" not in said
    assert not (tmp_path / "out").exists()


def test_trim_refuses_headless_kinds_and_other_targets(tiny_target, text, tmp_path, seed, monkeypatch):
    """Kinds without an output head, other targets and folders that are no bundle are refused."""
    monkeypatch.setattr(base, "_PACKAGES", [*base._PACKAGES, "tests.support.kinds"])
    base.discover.cache_clear()
    try:
        export_drafter(Twig(target_shape(tiny_target)), tmp_path / "twig", tokenizer=tiny_target)
        with pytest.raises(UserError, match="'twig' has no output head of its own") as caught:
            trim(str(tmp_path / "twig"), str(tmp_path / "out"), target=str(tiny_target), text=str(text))
    finally:
        base.discover.cache_clear()
    assert "\n" not in str(caught.value)
    exported(tiny_target, tmp_path / "whole")
    other = make_target(tmp_path / "other", vocab_size=300, num_hidden_layers=1)
    with pytest.raises(UserError, match="vocab_size 300"):
        trim(str(tmp_path / "whole"), str(tmp_path / "out"), target=str(other), text=str(text))
    with pytest.raises(UserError, match="not a bundle"):
        trim(str(tiny_target), str(tmp_path / "out"), target=str(tiny_target), text=str(text))
    assert not (tmp_path / "out").exists()


def test_old_bundle_without_draft_vocab_can_be_trimmed(tiny_target, text, tmp_path, seed):
    """Its config does not name the argument; the kind does."""
    exported(tiny_target, tmp_path / "old")
    manifest = tmp_path / "old" / "trainkit.json"
    values = json.loads(manifest.read_text())
    del values["config"]["draft_vocab"]
    manifest.write_text(json.dumps(values))
    trim(str(tmp_path / "old"), str(tmp_path / "out"), target=str(tiny_target), text=str(text))
    assert len(ids_in(tmp_path / "out")) == 80


def test_vocab_file_is_accepted_by_a_drafter(tiny_target: Path, text: Path, tmp_path: Path) -> None:
    """`trainkit vocab` writes the most frequent ids, in a file that a drafter accepts as draft_vocab."""
    file = tmp_path / "ids.json"
    assert main(["vocab", str(file), "--target", str(tiny_target), "--text", str(text), "--keep", "40"]) == 0
    ids = json.loads(file.read_text())
    packed = prepare([str(text)], None, read_tokenizer(tiny_target), 2048, validation_share=0.0).train
    counts = np.bincount(packed.tokens_N[packed.mask_N], minlength=320)
    shape = target_shape(tiny_target)
    assert ids == most_frequent(counts, 40, shape.end_ids)
    assert LMDraft(shape, draft_vocab=str(file)).config()["draft_vocab"] == ids
    assert not list(tmp_path.glob("*.partial"))


def test_vocab_refuses_a_folder(tiny_target: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`trainkit vocab` refuses an output path that is a folder."""
    assert main(["vocab", str(tmp_path), "--target", str(tiny_target), "--text", str(text)]) == 2
    assert "is a folder" in capsys.readouterr().err
