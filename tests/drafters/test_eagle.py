"""EAGLE-3: unrolled training sees what serving has in its cache, in linear memory; other programs load its files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.support.targets import make_target
from trainkit.drafters.base import Chunk, DraftBatch
from trainkit.drafters.eagle import Eagle, layouts
from trainkit.drafters.eagle.unrolled import attend
from trainkit.errors import UserError
from trainkit.export.drafter import export_drafter, first_logits
from trainkit.losses.divergence import ForwardKL
from trainkit.models.target import FrozenTarget
from trainkit.runner import Runner
from trainkit.runner.engine import load_drafter


@pytest.fixture(scope="module")
def teacher(tiny_target: Path) -> FrozenTarget:
    return FrozenTarget(tiny_target)


def scrambled(teacher: FrozenTarget, **options: object) -> Eagle:
    """An Eagle with random weights everywhere, none left at its initial zeros or ones."""
    made = Eagle(teacher.shape(), **options)  # type: ignore[arg-type]
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.1)
    made.use_target_folder(teacher.folder)
    return made


def dense(q_BTHE, entries, document_BT):
    """The same attention as in the published code: the keys of all steps side by side under one mask."""
    B, T, H, E = q_BTHE.shape
    group = H // entries[0][0].shape[2]
    keys = torch.cat([k for k, _ in entries], 1).repeat_interleave(group, 2)
    values = torch.cat([v for _, v in entries], 1).repeat_interleave(group, 2)
    past = (document_BT[:, :, None] == document_BT[:, None]) & torch.ones(T, T, dtype=torch.bool).tril()
    own = torch.eye(T, dtype=torch.bool).expand(B, T, T)
    mask = torch.cat([past, *[own] * (len(entries) - 1)], -1)
    scores = torch.einsum("bthe,bshe->bhts", q_BTHE, keys) / E**0.5
    weights = scores.masked_fill(~mask[:, None], float("-inf")).softmax(-1)
    return torch.einsum("bhts,bshe->bthe", weights, values)


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("block", [4, 7, 64])
def test_structured_attention_equals_dense_attention(steps, block, seed):
    """The blockwise attention equals dense attention in value and gradient."""
    B, T, H, G, E = 2, 19, 4, 2, 8
    document = torch.tensor([[0] * 8 + [1] * 9 + [-1] * 2, [0] * 19])
    q = torch.randn(B, T, H, E, dtype=torch.float64, requires_grad=True)
    entries = [tuple(torch.randn(B, T, G, E, dtype=torch.float64, requires_grad=True) for _ in "kv") for _ in range(steps)]
    inputs = [q, *(x for entry in entries for x in entry)]
    weight = torch.randn(B, T, H, E, dtype=torch.float64)
    found = []
    for y in (attend(q, entries, document, block), dense(q, entries, document)):
        found.append([y, *torch.autograd.grad((y * weight).sum(), inputs)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_attention_in_bfloat16_rounds_only_its_result(seed):
    """Under bf16 autocast the error against float64 is at most that of the result's rounding, 2^-8 of a value."""
    B, T, H, G, E = 1, 40, 4, 2, 16
    q, *pairs = (torch.randn(B, T, heads, E).mul(2).bfloat16() for heads in (H, *[G] * 6))
    entries = list(zip(pairs[::2], pairs[1::2], strict=True))
    document = torch.tensor([[0] * 25 + [1] * 15])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attend(q, entries, document, block=16)
    expected = dense(q.double(), [(k.double(), v.double()) for k, v in entries], document)
    assert found.dtype == torch.bfloat16
    assert ((found.double() - expected).abs() <= 2**-8 * expected.abs() + 1e-5).all()


def kept_bytes(steps: int, places: int) -> int:
    """Bytes of all tensors that the unrolled attention stores for its backward pass."""
    q = [torch.randn(1, places, 4, 16, requires_grad=True) for _ in range(steps)]
    entries = [tuple(torch.randn(1, places, 2, 16, requires_grad=True) for _ in "kv") for _ in range(steps)]
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = [attend(q[s], entries[: s + 1], torch.zeros(1, places, dtype=torch.long)) for s in range(steps)]
    assert all(output.requires_grad for output in outputs)
    return sum(storages.values())


def test_attention_memory_is_linear_in_length_and_steps(seed):
    """Only queries, keys and values of each step are stored, nothing of size T x T."""
    one, two, four = (kept_bytes(steps, 512) for steps in (1, 2, 4))
    assert four - two == 2 * (two - one), (one, two, four)
    long = kept_bytes(4, 1024)
    assert long == pytest.approx(2 * four, rel=0.05)
    assert long < 1024 * 1024 * 4 * 0.6  # a mask of booleans for each step would be twice that


def test_unrolled_step_equals_cached_serving(teacher, seed):
    """At each position and step the layer, run token by token over a cache like the runner's, gives the unrolled features."""
    draft = scrambled(teacher, steps=3)
    shape, T, D = teacher.shape().decoder, 9, 64
    tokens, taps = torch.randint(shape.vocab_size, (1, T + 4)), torch.randn(1, T + 4, len(draft.taps), D)
    document = torch.zeros(1, T + 4, dtype=torch.long)
    hidden = torch.randn(1, T + 4, D)
    batch = DraftBatch(
        tokens, torch.arange(T + 4)[None], document, torch.ones_like(document, dtype=torch.bool), taps, hidden, teacher.handle()
    )
    seen: list[torch.Tensor] = []
    draft.norm.register_forward_hook(lambda module, args, output: seen.append(args[0].detach()))
    with torch.no_grad():
        draft.eval()(batch, ForwardKL())
        for place in range(T):
            state = draft.init_state(1, 32, torch.device("cpu"), torch.float32)
            at = torch.arange(place + 1)[None]
            chunk = Chunk(tokens[:, : place + 1], tokens[:, 1 : place + 2], at, taps[:, : place + 1])
            draft.prefill(state, chunk, teacher.handle(), 32)
            feature = state["root"]
            torch.testing.assert_close(feature[0, 0], seen[0][place], rtol=1e-4, atol=1e-5)
            for step in (1, 2):
                slot = torch.tensor([[place + step]])
                bias = torch.zeros(1, 1, 32).masked_fill(torch.arange(32) > slot, float("-inf"))
                embedded = teacher.handle().embed(tokens[:, place + 1 + step, None])
                feature = draft.layer(embedded, feature, draft.rope.context(slot, bias, slot), state["cache"])
                torch.testing.assert_close(feature[0, 0], seen[step][place], rtol=1e-4, atol=1e-5)


def test_training_covers_the_first_draft_after_a_prompt(teacher, seed):
    """The feature of a prompt's last token is trained to predict the answer's second token, which serving drafts first."""
    prompt, T = 6, 12
    tokens = torch.randint(320, (1, T))
    row = {"tokens_BT": tokens, "positions_BT": torch.arange(T)[None], "document_BT": torch.zeros_like(tokens)}
    hidden, taps = teacher.forward(*row.values(), taps=Eagle(teacher.shape()).taps)
    assert taps is not None
    taps = taps.detach().requires_grad_()
    batch = DraftBatch(
        **row, mask_BT=torch.arange(T)[None] >= prompt, taps_BTAD=taps, hidden_BTD=hidden, handle=teacher.handle()
    )
    scrambled(teacher, steps=1)(batch, ForwardKL()).sum.backward()
    assert taps.grad is not None
    reached = taps.grad.abs().sum((0, 2, 3)) > 0
    assert reached[: T - 2].all() and not reached[T - 2 :].any()  # the answer's last two tokens predict nothing
    only = torch.arange(T)[None] == prompt + 1
    taps.grad = None
    scrambled(teacher, steps=1)(replace(batch, mask_BT=only), ForwardKL()).sum.backward()
    assert (taps.grad.abs().sum((0, 2, 3)) > 0).nonzero()[:, 0].tolist() == list(range(prompt))


def test_training_counts_only_proposable_labels(teacher, seed):
    """In training only labels inside the draft vocabulary count."""
    ids = list(range(0, 320, 2))
    draft = scrambled(teacher, steps=2, draft_vocab=ids)
    tokens = torch.randint(320, (2, 16))
    positions, document = torch.arange(16).expand(2, -1), torch.zeros(2, 16, dtype=torch.long)
    hidden, taps = teacher.forward(tokens, positions, document, draft.taps)
    batch = DraftBatch(tokens, positions, document, positions > 3, taps, hidden, teacher.handle())
    even = int((teacher.handle().head(hidden[:, 3:15]).argmax(-1) % 2 == 0).sum())  # labels 4..15 are predicted at 3..14
    output = draft.train()(batch, ForwardKL())
    assert 0 < even < 24 and [int(output.metrics[f"count_head{s}"]) for s in (1, 2)] == [even, even]
    assert int(draft.eval()(batch, ForwardKL()).count) == 2 * 2 * 12


def test_target_head_runs_twice_a_token(teacher, seed):
    """Seven steps share the target's logits: its head computes each position in forward and again in backward, no more."""
    draft, rows = scrambled(teacher, draft_vocab=list(range(0, 320, 2))), [0]
    tokens = torch.randint(320, (2, 64))
    positions, document = torch.arange(64).expand(2, -1), torch.zeros(2, 64, dtype=torch.long)
    hidden, taps = teacher.forward(tokens, positions, document, draft.taps)

    def counting(hidden_ND: torch.Tensor) -> torch.Tensor:
        rows[0] += len(hidden_ND)
        return teacher.handle().head(hidden_ND)

    handle = replace(teacher.handle(), head=counting)
    batch = DraftBatch(tokens, positions, document, positions > 3, taps, hidden, handle)
    output = draft.train()(batch, ForwardKL(chunk=64))
    output.sum.backward()
    assert rows[0] == 2 * 2 * 60 and int(output.count) > 0  # labels at 4..63 are predicted at 3..62


def exported(draft: Eagle, teacher: FrozenTarget, out: Path) -> Path:
    export_drafter(draft, out, tokenizer=teacher.folder)
    return out


@pytest.mark.parametrize("layout", ["flat", "speculators"])
@pytest.mark.parametrize("ids", [None, [3, 4, 7, 100, 319]])
def test_export_has_published_names_and_shapes(layout, ids, teacher, seed, tmp_path):
    """The exported files have the published tensor names, shapes and types."""
    draft = scrambled(teacher, intermediate_size=96, draft_vocab=ids)
    draft.export(tmp_path, torch.bfloat16, layout)
    H, inner, V, K, A = 64, 96, 320, len(ids or range(320)), 3
    at = {"flat": "midlayer", "speculators": "layers.0"}[layout]
    expected = {
        "embed_tokens.weight": [V, H],
        "fc.weight": [H, A * H],
        "norm.weight": [H],
        "lm_head.weight": [K, H],
        "d2t": [K],
        "t2d": [V],
        f"{at}.hidden_norm.weight": [H],
        f"{at}.input_layernorm.weight": [H],
        f"{at}.post_attention_layernorm.weight": [H],
        f"{at}.self_attn.q_proj.weight": [64, 2 * H],
        f"{at}.self_attn.k_proj.weight": [32, 2 * H],
        f"{at}.self_attn.v_proj.weight": [32, 2 * H],
        f"{at}.self_attn.o_proj.weight": [H, 64],
        f"{at}.mlp.gate_proj.weight": [inner, H],
        f"{at}.mlp.up_proj.weight": [inner, H],
        f"{at}.mlp.down_proj.weight": [H, inner],
    }
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert {name: file.get_slice(name).get_shape() for name in file.keys()} == expected  # noqa: SIM118
    shapes = draft.layout_shapes(layout)
    assert shapes is not None and {name: list(shape) for name, shape in shapes.items()} == expected
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["d2t"].dtype == torch.int64 and tensors["t2d"].dtype == torch.bool
    assert (torch.arange(K) + tensors["d2t"]).tolist() == (ids or list(range(V)))
    assert tensors["t2d"].nonzero()[:, 0].tolist() == (ids or list(range(V)))
    theirs = load_file(teacher.folder / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(tensors["embed_tokens.weight"], theirs.bfloat16())
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["norm_before_residual"] is False and config["draft_vocab_size"] == K
    if layout == "flat":
        assert config["architectures"] == ["LlamaForCausalLMEagle3"] and config["model_type"] == "llama"
        assert config["eagle_aux_hidden_state_layer_ids"] == [0, 2, 3]  # 4 layers: other programs have no default
        assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [-1, 1, 2]
    else:
        assert config["transformer_layer_config"]["num_hidden_layers"] == 1 and config["speculators_model_type"] == "eagle3"


def test_default_taps_match_other_programs(teacher):
    """The default taps are those that other programs assume when none are given."""
    assert layouts.default_taps(32) == (2, 16, 29) and layouts.default_taps(7) == (2, 3, 4)
    assert layouts.default_taps(2) == (0, 1)
    deep = replace(teacher.shape(), decoder=replace(teacher.shape().decoder, num_layers=32))
    draft = Eagle(deep)
    config = layouts.configuration(draft.shape, draft.taps, deep, teacher.folder, 320, "flat", torch.float32)
    assert "eagle_config" not in config and "eagle_aux_hidden_state_layer_ids" not in config


@pytest.mark.parametrize("taps", [[2], [1, 3], [0, 1, 2, 3]])
def test_other_numbers_of_taps_are_declared(taps, teacher, seed, tmp_path):
    """vLLM and SGLang size fc by `num_aux_hidden_states`; SGLang skips fc for one tap, so that export is refused."""
    draft = scrambled(teacher, taps=taps)
    for format in ("vllm", "sglang"):
        if format == "sglang" and len(taps) == 1:
            with pytest.raises(UserError, match="a single tap"):
                export_drafter(draft, tmp_path / format, tokenizer=teacher.folder, format=format)
            continue
        bundle = export_drafter(draft, tmp_path / format, tokenizer=teacher.folder, format=format)
        config = json.loads((bundle.path / "config.json").read_text())
        assert config["num_aux_hidden_states"] == len(taps) == len(config["eagle_aux_hidden_state_layer_ids"])
        assert load_file(bundle.path / "model.safetensors")["fc.weight"].shape == (64, 64 * len(taps))
    usual = json.loads((exported(scrambled(teacher), teacher, tmp_path / "usual") / "config.json").read_text())
    assert "num_aux_hidden_states" not in usual


@pytest.mark.parametrize("layout", ["flat", "speculators"])
def test_foreign_folder_decodes_like_the_bundle(layout, teacher, seed, tmp_path):
    """A folder as another program writes it is recognised; taps and vocabulary are read from its files."""
    draft = scrambled(teacher, taps=[0, 1, 3], draft_vocab=list(range(5, 300)))
    bundle = exported(draft, teacher, tmp_path / "bundle")
    outside = tmp_path / "outside"
    outside.mkdir()
    draft.export(outside, torch.float32, layout)
    assert Eagle.claims(outside) and not Eagle.claims(teacher.folder)
    assert torch.equal(first_logits(Eagle.load(outside, teacher.shape(), {})), first_logits(draft))
    texts = [Runner.load(teacher.folder, folder).generate(["How many"], depth=3)[0] for folder in (bundle, outside)]
    assert texts[0].tokens == texts[1].tokens and texts[0].stats == texts[1].stats


def test_imported_draft_keeps_its_rope_and_norm(teacher, seed, tmp_path):
    """They come from its config.json, or are transformers' defaults if absent, never the target's. Our bundle keeps them."""
    draft = scrambled(teacher, rope={"rope_type": "default", "rope_theta": 123.0}, norm_eps=1e-3)
    assert not torch.equal(first_logits(draft), first_logits(copy_of(draft, teacher)))
    outside = tmp_path / "outside"
    outside.mkdir()
    draft.export(outside, torch.float32)
    assert torch.equal(first_logits(Eagle.load(outside, teacher.shape(), {})), first_logits(draft))
    card = exported(draft, teacher, tmp_path / "bundle")
    again = load_drafter(card, teacher.folder, teacher.shape())
    assert torch.equal(first_logits(again), first_logits(draft))
    config = json.loads((outside / "config.json").read_text())
    for name in ("rope_parameters", "rope_theta", "rms_norm_eps"):
        config.pop(name)
    (outside / "config.json").write_text(json.dumps(config))
    bare = Eagle.load(outside, teacher.shape(), {})
    assert bare.shape.rope == {"rope_type": "default", "rope_theta": 10000.0} and bare.shape.norm_eps == 1e-6


def copy_of(draft: Eagle, teacher: FrozenTarget) -> Eagle:
    """The same weights under the target's own rotary parameters and epsilon."""
    made = Eagle(teacher.shape())
    made.load_state_dict(draft.state_dict())
    return made.eval()


def test_exported_embedding_is_the_targets(teacher, seed, tmp_path):
    """The exported embedding is the target's, whatever folder the tokenizer comes from."""
    other = make_target(tmp_path / "other", seed=5)
    draft = scrambled(teacher)
    export_drafter(draft, tmp_path / "out", tokenizer=other, target=teacher.folder)
    written = load_file(tmp_path / "out" / "model.safetensors")["embed_tokens.weight"]
    assert torch.equal(written, load_file(teacher.folder / "model.safetensors")["model.embed_tokens.weight"])
    draft.embedding_folder = None
    with pytest.raises(UserError, match="name its folder with --target"):
        export_drafter(draft, tmp_path / "out", tokenizer=teacher.folder, target=tmp_path / "gone")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"norm_before_residual": True}, "norm_before_residual is not supported"),
        ({"num_hidden_layers": 2}, "2 draft layers"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"num_attention_heads": "4"}, "num_attention_heads must be a number"),
    ],
)
def test_unsupported_variants_are_refused(change, said, teacher, seed, tmp_path):
    """Variants of EAGLE-3 that are not implemented are refused."""
    draft = scrambled(teacher)
    draft.export(tmp_path, torch.float32)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=said):
        Eagle.load(tmp_path, teacher.shape(), {})


def test_missing_tensor_is_refused(teacher, seed, tmp_path):
    """A file with a missing tensor is refused, and the tensor is named."""
    draft = scrambled(teacher)
    draft.export(tmp_path, torch.float32)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["midlayer.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"midlayer\.mlp\.up_proj\.weight' is missing"):
        Eagle.load(tmp_path, teacher.shape(), {})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop("d2t"), None),
        (lambda tensors: tensors.pop("t2d"), None),
        (lambda tensors: (tensors.pop("d2t"), tensors.pop("t2d")), "no d2t"),
        (lambda tensors: tensors["d2t"].zero_(), "d2t and t2d name different"),
        (lambda tensors: tensors["t2d"].zero_(), "d2t and t2d name different"),
    ],
)
def test_one_vocabulary_map_is_enough_and_two_agree(change, said, teacher, seed, tmp_path):
    """The draft's tokens come from either map; a file without both, or with one that was never filled, is refused."""
    draft = scrambled(teacher, draft_vocab=list(range(5, 300, 3)))
    draft.export(tmp_path, torch.float32)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    if said is None:
        assert Eagle.load(tmp_path, teacher.shape(), {}).draft_vocab == draft.draft_vocab
        return
    with pytest.raises(UserError, match=said):
        Eagle.load(tmp_path, teacher.shape(), {})


def test_draft_of_another_width_is_refused(teacher, seed, tmp_path):
    """A draft for a target of another hidden size is refused."""
    scrambled(teacher).export(tmp_path, torch.float32)
    wider = replace(teacher.shape(), decoder=replace(teacher.shape().decoder, hidden_size=96))
    with pytest.raises(UserError, match=r"give the target that it was trained for"):
        Eagle.load(tmp_path, wider, {})


@pytest.mark.parametrize("taps", [[], [1, 1], [2, 1], [0, 4], [-1, 2]])
def test_taps_must_be_ascending_hidden_states(taps, teacher):
    """Taps must be ascending numbers of hidden states before the final norm."""
    with pytest.raises(UserError, match=r"drafter\.taps"):
        Eagle(teacher.shape(), taps=taps)


@pytest.mark.parametrize("content", ["{}", "[1, 2", "[3, 2]", "[1.5]", None])
def test_invalid_vocabulary_file_is_refused(content, teacher, tmp_path):
    """An invalid or missing vocabulary file is refused."""
    file = tmp_path / "ids.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=r"drafter\.draft_vocab"):
        Eagle(teacher.shape(), draft_vocab=str(file))
    file.write_text("[2, 5]")
    assert Eagle(teacher.shape(), draft_vocab=str(file)).config()["draft_vocab"] == [2, 5]
