"""Kind lm: its initialisations and its export, with which other programs decode."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.equality import exact_logits
from tests.support.targets import make_target
from trainkit import errors
from trainkit.drafters.base import DraftBatch, LossOutput, TargetHandle, load_bundle, load_kind
from trainkit.drafters.lm import LMDraft
from trainkit.errors import UserError
from trainkit.export.drafter import export_drafter
from trainkit.models.load import load_decoder
from trainkit.models.target import FrozenTarget, target_shape
from trainkit.runner import Runner, Stats


def test_init_from_target_copies_every_nth_layer(tiny_target):
    """Initialising from the target copies its embedding, head and every n-th layer."""
    theirs = load_decoder(tiny_target).state_dict()
    for count, kept in ((1, [0]), (2, [0, 2]), (4, [0, 1, 2, 3])):
        draft = LMDraft(target_shape(tiny_target), num_layers=count)
        draft.initialise(FrozenTarget(tiny_target))
        ours = draft.decoder.state_dict()
        for name in ("embed.weight", "norm.weight"):
            assert torch.equal(ours[name], theirs[name])
        for new, old in enumerate(kept):
            names = [name.removeprefix(f"layers.{new}.") for name in ours if name.startswith(f"layers.{new}.")]
            assert len(names) >= 6
            assert all(torch.equal(ours[f"layers.{new}.{name}"], theirs[f"layers.{old}.{name}"]) for name in names)
        assert draft.config()["num_layers"] == count


def test_init_from_untied_target_copies_the_head(tmp_path):
    """Initialising from an untied target copies its head too."""
    folder = make_target(tmp_path, "qwen3", tie_word_embeddings=False)
    draft = LMDraft(target_shape(folder), num_layers=4)
    draft.initialise(FrozenTarget(folder))
    theirs = load_decoder(folder).state_dict()
    ours = draft.decoder.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_init_from_scratch_uses_given_sizes(tiny_target, seed):
    """Random initialisation uses the given sizes and derives the others."""
    draft = LMDraft(target_shape(tiny_target), num_layers=2, hidden_size=32, init="scratch")
    shape = draft.decoder.shape
    assert (shape.hidden_size, shape.num_heads, shape.num_kv_heads, shape.head_dim) == (32, 2, 2, 16)
    assert (shape.intermediate_size, shape.vocab_size, shape.num_layers) == (64, 320, 2)
    before = draft.decoder.layers[0].mlp.down.weight.clone()
    draft.initialise(FrozenTarget(tiny_target))
    assert torch.equal(draft.decoder.layers[0].mlp.down.weight, before)
    sizes = {"hidden_size": 48, "num_heads": 3, "num_kv_heads": 1, "intermediate_size": 40}
    other = LMDraft(target_shape(tiny_target), **sizes, init="scratch")
    assert sizes.items() <= other.decoder.shape.to_dict().items()


def test_init_from_folder_uses_its_weights_and_sizes(tiny_target, tmp_path):
    """Initialising from a model folder uses its weights and sizes."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    folder = make_target(tmp_path / "small", "qwen2", seed=3, **sizes)
    draft = LMDraft(target_shape(tiny_target), init=str(folder))
    draft.initialise(FrozenTarget(tiny_target))
    theirs = load_decoder(folder).state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in draft.decoder.state_dict().items())


def test_invalid_init_is_named(tiny_target, tmp_path):
    """An invalid initialisation is named in the error."""
    shape = target_shape(tiny_target)
    with pytest.raises(UserError, match="init"):
        LMDraft(shape, hidden_size=32, init="target").initialise(FrozenTarget(tiny_target))
    with pytest.raises(UserError, match="no config.json"):
        LMDraft(shape, init=str(tmp_path))
    with pytest.raises(UserError, match="vocabulary of 300"):
        LMDraft(shape, init=str(make_target(tmp_path / "other", vocab_size=300, num_hidden_layers=1)))
    gelu = make_target(tmp_path / "gelu", num_hidden_layers=1, hidden_act="gelu")
    with pytest.raises(UserError, match="hidden_act"):
        LMDraft(shape, init=str(gelu))


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_export_has_equal_logits_in_transformers(model_type, tmp_path, seed):
    """The export loads here and in transformers with equal logits."""
    target = make_target(tmp_path / "target", model_type, tie_word_embeddings=model_type == "llama")
    draft = LMDraft(target_shape(target), num_layers=2, init="target")
    draft.initialise(FrozenTarget(target))
    (tmp_path / "draft").mkdir()
    draft.export(tmp_path / "draft", torch.float32)
    again = load_kind("lm").load(tmp_path / "draft", draft.target, draft.config())
    assert isinstance(again, LMDraft) and again.config() == draft.config() and not again.training
    text = torch.randint(0, 320, (50,)).tolist()
    logits = exact_logits(draft.decoder, text)
    assert torch.equal(exact_logits(again.decoder, text), logits)
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "draft", dtype=torch.float64, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert (theirs.eval()(torch.tensor([text])).logits[0] - logits).abs().max() < 1e-4 * logits.abs().max()
    assert LMDraft.claims(tmp_path / "draft") and not LMDraft.claims(tmp_path)
    config = json.loads((tmp_path / "draft" / "config.json").read_text())
    assert config["eos_token_id"] is not None and config["architectures"][0].endswith("ForCausalLM")


def test_assisted_generation_and_runner_agree(tiny_target, tmp_path, seed):
    """The exported folder works as `assistant_model`; the text equals plain greedy text and our runner's."""
    draft = LMDraft(target_shape(tiny_target), num_layers=4)  # a copy of the target, so that many tokens are accepted
    draft.initialise(FrozenTarget(tiny_target))
    draft.export(tmp_path, torch.float32)
    target = AutoModelForCausalLM.from_pretrained(tiny_target, dtype=torch.float32).eval()
    assistant = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    runner = Runner.load(tiny_target, tmp_path, max_len=64)
    prompts = [torch.randint(0, 320, (n,)).tolist() for n in (1, 5, 9)]
    ours = runner.generate(prompts, max_new_tokens=20)
    assert Stats.merge(out.stats for out in ours).accepted[1:] or all(len(out.tokens) < 6 for out in ours)
    for prompt, out in zip(prompts, ours, strict=True):
        inputs = {"input_ids": torch.tensor([prompt]), "attention_mask": torch.ones(1, len(prompt))}
        inputs |= {"do_sample": False, "max_new_tokens": 20}
        plain = target.generate(**inputs)[0, len(prompt) :].tolist()
        assisted = target.generate(**inputs, assistant_model=assistant)[0, len(prompt) :].tolist()
        assert plain == assisted == out.tokens


def test_loss_counts_labels_inside_documents_only(tiny_target, seed):
    """In packed text the draft's logits are those of each document alone, compared with the right states and labels."""
    draft = LMDraft(target_shape(tiny_target), num_layers=2, init="scratch")
    target = load_decoder(tiny_target)
    tokens = torch.randint(0, 320, (1, 12))
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 0]])
    document = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 1, -1, -1, -1]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 0, 1, 1, 0, 0, 0]]).bool()
    hidden = torch.randn(1, 12, 64)
    seen = {}

    def divergence(draft_hidden_ND, draft_head, target_hidden_ND, target_head, ids_K=None, mask_N=None, labels_N=None):
        seen.update(draft=draft_hidden_ND, target=target_hidden_ND, labels=labels_N, logits=draft_head(draft_hidden_ND))
        return LossOutput(draft_hidden_ND.sum(), torch.tensor(1.0))

    handle = TargetHandle(target.embed, target.head, 320)
    draft(DraftBatch(tokens, positions, document, mask, None, hidden, handle), divergence)
    at = [1, 2, 3, 6, 7]  # t whose t + 1 counts, in the same document
    assert torch.equal(seen["target"], hidden[0, at])
    assert seen["labels"].tolist() == tokens[0, [t + 1 for t in at]].tolist()
    with torch.no_grad():
        alone = torch.cat([exact_logits(draft.decoder, tokens[0, a:b].tolist()) for a, b in ((0, 5), (5, 9))])
        assert (seen["logits"] - alone[at]).abs().max() < 1e-4


def test_step_bytes_by_hand(tiny_target):
    """The bytes of a draft step are those of the weights that it reads."""
    draft = LMDraft(target_shape(tiny_target), num_layers=1)
    layer = 64 * (4 + 2 + 2) * 16 + 64 * 64 + 3 * 64 * 128 + 2 * 64
    assert draft.step_bytes(0) == 4 * (320 * 64 + layer + 64)


@pytest.mark.parametrize(
    ("model_type", "fields", "reason", "theta"),
    [
        ("glm4", {}, "partial_rotary_factor", 10000.0),
        ("gemma3_text", {}, "between types of layers", 1e6),
        (
            "phi3",
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 5e3,
                    "short_factor": [1.0] * 8,
                    "long_factor": [2.0] * 8,
                }
            },
            "rope_type 'longrope'",
            5e3,
        ),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 5e3, "factor": 2.0}}, "rope_type 'dynamic'", 5e3),
    ],
)
def test_draft_replaces_a_rope_it_cannot_have(model_type, fields, reason, theta, tmp_path, capsys):
    """A new draft of such a target is built with plain rotary positions, says so once, and is exported as it was built."""
    target = make_target(tmp_path / "target", model_type, num_hidden_layers=2, **fields)
    shape, plain = target_shape(target), {"rope_type": "default", "rope_theta": theta}
    errors.note.cache_clear()
    capsys.readouterr()
    draft = LMDraft(shape, init="scratch")
    LMDraft(shape, init="scratch")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: the target's ") and reason in line and line.endswith(f"rope_theta {theta:g}")
    assert draft.decoder.shape.rope == plain
    out = export_drafter(draft, tmp_path / "out", tokenizer=target)
    assert load_bundle(out, shape).decoder.shape.rope == plain
    for other in (load_kind("eagle")(shape), load_kind("hydra")(shape, prefix=True).prefix):
        assert other.shape.rope == plain


def test_unsupported_rope_of_eagle_is_refused(tiny_target):
    """Rotary parameters that are given, not the target's, are refused when the drafter is built."""
    with pytest.raises(UserError, match="drafter.rope: rope_type 'dynamic' is not supported"):
        load_kind("eagle")(target_shape(tiny_target), rope={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_exported_trimmed_draft_serves_elsewhere_too(tied, tmp_path, seed):
    """Other programs, which use the whole head, accept as much of a draft trained on a trimmed vocabulary as our runner."""
    target = make_target(tmp_path / "target", num_hidden_layers=2, tie_word_embeddings=tied)
    ids = sorted(torch.randperm(320)[:160].tolist())
    draft = LMDraft(target_shape(target), num_layers=2, draft_vocab=ids)
    draft.initialise(FrozenTarget(target))
    with torch.no_grad():  # what training leaves: rows inside that fit the hidden states, and rows outside that do not
        head, outside = draft.decoder.head_weight, torch.ones(320, dtype=torch.bool).index_fill(0, torch.tensor(ids), False)
        head[outside] = 3 * torch.randn_like(head[outside])
    draft.fill_untrained()
    export_drafter(draft, tmp_path / "draft", tokenizer=target, target=target)
    prompts = torch.randint(0, 320, (4, 12)).tolist()
    taus = [_tau(target, tmp_path / "draft", prompts)]
    (tmp_path / "draft" / "trainkit.json").unlink()
    logits = AutoModelForCausalLM.from_pretrained(tmp_path / "draft")(torch.tensor(prompts)).logits
    assert set(logits.argmax(-1).flatten().tolist()) <= set(ids)
    taus.append(_tau(target, tmp_path / "draft", prompts))
    assert taus[0] == taus[1] and (tied or taus[0] > 1)  # random rows of a tied embedding may leave nothing to accept


def _tau(target, draft, prompts):
    outputs = Runner.load(target, draft).generate(prompts, 24, depth=3, ignore_end=True)
    return Stats.merge(output.stats for output in outputs).tau
