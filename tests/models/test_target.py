"""The frozen target: packing is exact, taps are Hugging Face's hidden states, and unsupported models are refused."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support import architectures
from tests.support.targets import make_target
from trainkit.errors import UserError
from trainkit.models.target import FrozenTarget, LiveTarget, end_ids, load_model, target_shape

SIZES = architectures.SIZES | {"num_hidden_layers": 3}
FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]


def random_model(folder: Path, model_type: str, **more):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(SIZES | more))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)  # Hugging Face's 0.02 makes attention so flat that a wrong mask hardly shows
    model.save_pretrained(folder)
    return model


def packed(lengths: list[int], padding: int, vocab: int = 96):
    """One row of documents of these lengths, then padding."""
    tokens = torch.randint(3, vocab, (1, sum(lengths) + padding))
    positions = torch.cat([torch.arange(n) for n in lengths] + [torch.zeros(padding, dtype=torch.long)])
    document = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)] + [torch.full((padding,), -1, dtype=torch.long)])
    return tokens, positions[None], document[None]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_packed_logits_equal_each_text_alone(model_type, tmp_path, seed):
    """No attention crosses documents, nor does padding at the end change anything."""
    model = random_model(tmp_path, model_type)
    target = FrozenTarget(tmp_path)
    lengths = [5, 1, 9, 2]
    tokens_BT, positions_BT, document_BT = packed(lengths, padding=4)
    hidden_BTD, taps = target.forward(tokens_BT, positions_BT, document_BT)
    assert taps is None
    logits_BTV = target.handle().head(hidden_BTD)
    start = 0
    for length in lengths:
        alone = model(tokens_BT[:, start : start + length]).logits
        # 1e-4: float32 sums in another order; leaking across documents costs tenths
        assert (logits_BTV[:, start : start + length] - alone).abs().max() < 1e-4
        start += length


def test_default_attention_leaks_across_documents(tmp_path, seed):
    """With transformers' defaults (a cache) the same call does attend across documents: the trap is real."""
    model = random_model(tmp_path, "llama")
    tokens_BT, positions_BT, _ = packed([5, 9], padding=0)
    leaking = model(tokens_BT, position_ids=positions_BT, use_cache=True).logits
    assert (leaking[:, 5:] - model(tokens_BT[:, 5:]).logits).abs().max() > 1e-2


@pytest.mark.parametrize("model_type", [*FAMILIES, "gpt2"])
def test_taps_are_hidden_states(model_type, tmp_path, seed):
    """Taps equal transformers' hidden states."""
    model = random_model(tmp_path, model_type)
    tokens_BT = torch.randint(3, 96, (2, 7))
    positions_BT = torch.arange(7).expand(2, 7)
    taps = (0, 2, 1, 3, -1)
    hidden_BTD, taps_BTAD = FrozenTarget(tmp_path).forward(tokens_BT, positions_BT, torch.zeros_like(tokens_BT), taps)
    states = model(tokens_BT, output_hidden_states=True).hidden_states
    assert taps_BTAD is not None and taps_BTAD.shape == (2, 7, 5, 32)
    for index, tap in enumerate(taps):
        assert (taps_BTAD[:, :, index] - states[tap]).abs().max() < 1e-5, tap
    assert torch.equal(taps_BTAD[:, :, -1], hidden_BTD)


def test_handle_has_the_models_head_and_norm(tmp_path, seed):
    """Embedding, head and final norm of the handle are the model's own."""
    model = random_model(tmp_path, "qwen3")
    target = FrozenTarget(tmp_path)
    tokens_BT = torch.randint(3, 96, (1, 6))
    states = model(tokens_BT, output_hidden_states=True)
    embeddings = target.handle().embed(tokens_BT)
    assert torch.equal(embeddings, states.hidden_states[0])
    hidden_BTD, _ = target.forward(tokens_BT, torch.arange(6)[None], torch.zeros_like(tokens_BT))
    assert (target.handle().head(hidden_BTD) - states.logits).abs().max() < 1e-5


def test_target_is_frozen(tmp_path, seed):
    """The target has no gradients, stays in eval mode and is not part of a module's state."""
    random_model(tmp_path, "llama", attention_dropout=0.5)
    target = FrozenTarget(tmp_path)
    assert not any(p.requires_grad for p in target.model.parameters())
    assert not any(m.training for m in target.model.modules())
    holder = torch.nn.Module()
    holder.target = target
    assert not list(holder.parameters()) and not holder.state_dict()
    holder.train()
    assert not target.model.training
    tokens_BT = torch.randint(3, 96, (1, 6))
    hidden, _ = target.forward(tokens_BT, torch.arange(6)[None], torch.zeros_like(tokens_BT))
    assert not hidden.requires_grad


def test_bfloat16_weights_accept_float32_states(tmp_path, seed):
    """A head in bfloat16 accepts float32 hidden states."""
    random_model(tmp_path, "llama")
    target = FrozenTarget(tmp_path, dtype=torch.bfloat16)
    assert target.handle().head(torch.randn(3, 32)).dtype == torch.bfloat16
    full = FrozenTarget(tmp_path)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert full.handle().head(torch.randn(3, 32)).dtype == torch.bfloat16


def test_soft_capped_logits_are_refused(tmp_path):
    """A model whose logits are not its head's output is refused."""
    random_model(tmp_path, "gemma2", head_dim=8, final_logit_softcapping=3.0, attn_logit_softcapping=None)
    with pytest.raises(UserError, match="not output head"):
        FrozenTarget(tmp_path)


@pytest.mark.parametrize("rope", [{"rope_type": "linear", "factor": False}, {"rope_type": "yarn", "factor": None}])
def test_config_that_no_text_fits_is_refused(rope, tmp_path):
    """A config with which the model loads, but its forward pass fails, gives one line."""
    folder = make_target(tmp_path / "target", num_hidden_layers=1)
    config = json.loads((folder / "config.json").read_text())
    odd = {"rope_theta": 2, "original_max_position_embeddings": True, "partial_rotary_factor": False}
    (folder / "config.json").write_text(json.dumps(config | {"rope_parameters": odd | rope}))
    with pytest.raises(UserError, match=r"forward pass of the model fails .*config\.json") as caught:
        FrozenTarget(folder)
    assert "\n" not in str(caught.value)


def test_unknown_tap_is_named(tmp_path):
    """A tap that does not exist is named in the error."""
    random_model(tmp_path, "llama")
    tokens_BT = torch.tensor([[3, 4]])
    with pytest.raises(UserError, match="tap 4.*0 to 3"):
        FrozenTarget(tmp_path).forward(tokens_BT, torch.arange(2)[None], torch.zeros_like(tokens_BT), (4,))


def test_missing_model_gives_one_line(tmp_path):
    """A folder without a model gives a one-line error."""
    for call in (FrozenTarget, target_shape):
        with pytest.raises(UserError, match="config.json") as caught:
            call(tmp_path / "nothing")
        assert "\n" not in str(caught.value)


def test_shape_needs_only_the_config(tmp_path):
    """The shape is read from the config alone."""
    random_model(tmp_path, "qwen2", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5})
    (tmp_path / "model.safetensors").unlink()
    shape = target_shape(tmp_path)
    assert shape.decoder.rope["rope_theta"] == 5e5 and shape.decoder.rope["factor"] == 2.0
    assert shape.decoder.qkv_bias and shape.decoder.num_kv_heads == 2 and shape.decoder.vocab_size == 96
    assert shape.pad_id == 0 and shape.fingerprint is not None
    assert type(shape).from_dict(shape.to_dict()) == shape


def test_end_ids_are_the_union_of_both_configs(tmp_path):
    """Ending on the config's id alone would run past the chat model's end of turn."""
    model = random_model(tmp_path, "llama")
    model.generation_config.eos_token_id = [5, 7]
    model.generation_config.save_pretrained(tmp_path)
    assert end_ids(tmp_path, model.config) == (2, 5, 7)


@pytest.mark.parametrize("model_type", ["gemma3", "qwen2_5_vl", "llama4"])
def test_model_of_text_and_images_gives_one_line(model_type, tmp_path):
    """A model of several inputs is refused by its config, before any weights are read, and the remedy is named."""
    AutoConfig.for_model(model_type, text_config=SIZES).save_pretrained(tmp_path)
    for read in (FrozenTarget, target_shape, lambda folder: load_model(folder, torch.float32)):
        with pytest.raises(UserError, match=f"{model_type}.*text and other inputs.*language model") as caught:
            read(tmp_path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("lora", [False, True])
def test_live_target_is_the_policy_as_it_is(lora, tmp_path, seed):
    """It computes what the trained model computes now, adapter on and dropout off, and leaves no gradients or modes behind."""
    model = random_model(tmp_path, "llama", attention_dropout=0.5).train()
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.5))
    target = LiveTarget(model, tmp_path)
    with torch.no_grad():  # a step of the trainer
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    tokens_BT, positions_BT, document_BT = packed([9], padding=0)
    hidden_BTD, taps_BTAD = target.forward(tokens_BT, positions_BT, document_BT, (1, -1))
    handle = target.handle()
    assert all(module.training for module in model.modules())
    model.eval()
    expected = model(input_ids=tokens_BT, output_hidden_states=True)
    assert torch.allclose(handle.head(hidden_BTD), expected.logits, atol=1e-5)  # the head alone, in another order of sums
    assert taps_BTAD is not None and torch.equal(taps_BTAD[:, :, 0], expected.hidden_states[1])
    assert torch.equal(taps_BTAD[:, :, 1], hidden_BTD)
    embedded = handle.embed(tokens_BT)
    assert not any(x.requires_grad for x in (hidden_BTD, taps_BTAD, embedded, handle.head(hidden_BTD), target.norm_weight()))
    assert (
        embedded.storage_offset() == 0 and target.embedding_weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    )
    assert any(parameter.requires_grad for parameter in model.parameters())
