"""The decoder computes what transformers computes for every supported layout, and refuses unsupported models by name."""

# T positions  V vocabulary

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.support.equality import assert_few, compare, exact_logits
from tests.support.models import ragged_prompts
from tests.support.targets import make_target
from trainkit.drafters.base import load_kind
from trainkit.errors import UserError
from trainkit.export.drafter import export_drafter
from trainkit.export.model import export_model
from trainkit.layers.attention import rotary_table
from trainkit.models.load import (
    check_covered,
    decoder_shape,
    find_device,
    hf_views,
    load_decoder,
    read_config,
    save_decoder,
    transformers4_rope,
)
from trainkit.models.target import load_model, target_shape
from trainkit.models.weights import read_tensors
from trainkit.runner import Runner
from trainkit.runner.sampling import Sampling

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 5000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128},
    "yarn-scaled": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 16,
        "beta_slow": 2,
        "attention_factor": 1.3,
    },
}
MODELS = {
    "llama": ("llama", {}),
    "llama untied": ("llama", {"tie_word_embeddings": False}),
    "llama without groups": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "llama, one key head, wide heads": ("llama", {"num_key_value_heads": 1, "head_dim": 32}),
    "mistral": ("mistral", {"tie_word_embeddings": False}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
    "qwen2 untied": ("qwen2", {"tie_word_embeddings": False, "num_key_value_heads": 4}),
    "qwen3": ("qwen3", {"head_dim": 24}),
    "qwen3 untied": ("qwen3", {"tie_word_embeddings": False, "num_key_value_heads": 1}),
    "llama, attention biases": ("llama", {"attention_bias": True}),
    "llama, MLP biases": ("llama", {"mlp_bias": True}),
    "llama, all biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen3, attention biases": ("qwen3", {"attention_bias": True, "num_key_value_heads": 1}),
} | {f"llama {name}": ("llama", {"rope_parameters": rope}) for name, rope in ROPES.items()}


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_greedy_text_equal_transformers(name, tmp_path, seed):
    """Logits over a long text, then plain and speculative decoding against `generate` on prompts of different lengths."""
    model_type, fields = MODELS[name]
    folder = make_target(tmp_path, model_type, seed=seed, num_hidden_layers=2, max_position_embeddings=512, **fields)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = torch.randint(0, 320, (1, 400))
    with torch.no_grad():
        logits = theirs.double()(text).logits[0]
    theirs = theirs.float()
    # both in float64, which shows a difference in the formulas; transformers' norms and rotary angles stay float32
    assert (exact_logits(load_decoder(folder), text[0].tolist()) - logits).abs().max() < 1e-4 * logits.abs().max()

    prompts = ragged_prompts(6, 320)
    texts = []
    for prompt in prompts:
        with torch.no_grad():
            out = theirs.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=24, do_sample=False
            )
        texts.append(out[0, len(prompt) :].tolist())
    runner = Runner.load(folder, folder, max_len=64)
    for depth in (0, 3):
        outs = runner.generate(prompts, max_new_tokens=24, depth=depth)
        ties = compare(runner.rounds.target, prompts, [out.tokens for out in outs], texts, Sampling())
        assert_few(ties, sum(map(len, texts)))


@pytest.mark.parametrize("name", ["llama untied", "mistral", "qwen2", "qwen3", "llama, all biases", "qwen3, attention biases"])
def test_saved_decoder_loads_in_transformers(name, tmp_path, seed):
    """A saved decoder loads here and in transformers with equal logits."""
    model_type, fields = MODELS[name]
    decoder = load_decoder(make_target(tmp_path / "in", model_type, seed=seed, **fields))
    (tmp_path / "out").mkdir()
    save_decoder(decoder, tmp_path / "out", torch.float32, (0, 1), 1)
    again = load_decoder(tmp_path / "out")
    assert again.shape == decoder.shape
    assert all(torch.equal(a, b) for a, b in zip(decoder.state_dict().values(), again.state_dict().values(), strict=True))
    text = torch.randint(0, 320, (1, 60))
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        logits = theirs.eval()(text).logits[0]
    assert (exact_logits(decoder, text[0].tolist()) - logits).abs().max() < 1e-4 * logits.abs().max()
    assert theirs.config.eos_token_id == [0, 1]


def test_weights_load_in_the_requested_dtype(tiny_target, tmp_path):
    """Weights are loaded in the requested dtype."""
    decoder = load_decoder(tiny_target, dtype=torch.bfloat16)
    assert {p.dtype for p in decoder.parameters()} == {torch.bfloat16}
    save_decoder(decoder, tmp_path, torch.bfloat16)
    assert load_decoder(tmp_path).embed.weight.dtype == torch.bfloat16
    whole = dict(read_tensors(tiny_target))
    assert all(torch.equal(value, whole[name].bfloat16()) for name, value in hf_views(decoder).items())


@pytest.mark.parametrize("tied", [True, False])
def test_decoder_without_layers_reads_only_its_ends(tied, tmp_path):
    """Broken weights of a layer are not read; a broken final norm is."""
    folder = make_target(tmp_path, tie_word_embeddings=tied)
    whole, ends = load_decoder(folder, dtype=torch.float32), load_decoder(folder, dtype=torch.float32, layers=False)
    assert len(ends.layers) == 0 and torch.equal(ends.head_weight, whole.head_weight)
    assert torch.equal(ends.embed.weight, whole.embed.weight) and torch.equal(ends.norm.weight, whole.norm.weight)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    load_decoder(folder, layers=False)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="model.norm.weight"):
        load_decoder(folder, layers=False)


def test_sharded_weights_are_read(tiny_target, tmp_path):
    """Weights in several files are read."""
    model = AutoModelForCausalLM.from_pretrained(tiny_target)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    one, many = load_decoder(tiny_target).state_dict(), load_decoder(tmp_path).state_dict()
    assert all(torch.equal(one[name], many[name]) for name in one)


def edited(source, folder, **fields):
    """A copy of a model folder with other values in its config."""
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((source / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model_type": "gemma2"}, "gemma2"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"model_type": "mistral", "attention_bias": True}, "attention_bias is not supported .* mistral"),
        ({"model_type": "qwen3", "mlp_bias": True}, "mlp_bias is not supported .* qwen3"),
        ({"mlp_bias": True}, "tensors are missing.*bias"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type 'dynamic'"),
        ({"num_hidden_layers": 5}, "tensors are missing.*layers.4"),
        ({"num_hidden_layers": 3}, "layers.3.* no place"),
        ({"intermediate_size": 64}, r"down_proj.*\[64, 128\].*\[64, 64\]"),
        ({"tie_word_embeddings": False}, "lm_head.weight"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised"),
    ],
)
def test_unsupported_model_is_refused_by_name(fields, named, tiny_target, tmp_path):
    """A model that is not supported is refused, and the reason is named."""
    with pytest.raises(UserError, match=named) as caught:
        load_decoder(edited(tiny_target, tmp_path / "model", **fields))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_sliding_window_is_refused_if_it_would_matter(tmp_path):
    """A sliding window is refused if the requested length exceeds it; by default texts end where it ends."""
    folder = make_target(tmp_path, "mistral", num_hidden_layers=1, sliding_window=64)
    assert Runner.load(folder, max_len=64).generate([[1] * 60], max_new_tokens=4, ignore_end=True)
    assert Runner.load(folder).max_len == 64
    with pytest.raises(UserError, match="sliding_window 64"):
        Runner.load(folder, max_len=65)


def test_broken_weights_are_named(tiny_target, tmp_path):
    """A torn or missing file is named in the error."""
    cut = edited(tiny_target, tmp_path / "cut")
    whole = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="model.safetensors.*not a whole"):
        load_decoder(cut)
    (cut / "model.safetensors").unlink()
    with pytest.raises(UserError, match="model.safetensors: not found"):
        load_decoder(cut)
    (cut / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json"):
        load_decoder(cut)


def test_old_config_without_rope_parameters_is_read(tiny_target, tmp_path):
    """An older config with rope_theta and rope_scaling is read."""
    config = json.loads((tiny_target / "config.json").read_text())
    del config["rope_parameters"]
    config |= {"rope_theta": 777.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    rope = decoder_shape(read_config(tmp_path)).rope
    assert (rope["rope_type"], rope["rope_theta"], rope["factor"]) == ("linear", 777.0, 2.0)
    check_covered(read_config(tmp_path), tmp_path, 10)


def read_as_transformers_4(config):
    """The rotary parameters that Llama of transformers 4.57 computes with: `rope_theta`, and `rope_scaling` unless null."""
    scaling = dict(config["rope_scaling"] or {})
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    return {**scaling, "rope_type": rope_type, "rope_theta": config.get("rope_theta", 10000.0)}


@pytest.mark.parametrize("rope", ROPES)
def test_exports_have_their_rope_for_old_readers(rope, tmp_path):
    """Readers built on transformers 4 find the same rotary frequencies in every Llama-like config.json."""
    target = make_target(tmp_path / "target", rope_parameters=ROPES[rope])
    shape = target_shape(target)
    export_model(load_model(target, torch.float32), tmp_path / "model", tokenizer=target)
    written = {"model": json.loads((tmp_path / "model" / "config.json").read_text())}
    for kind, format in (("lm", "hf"), ("lm", "vllm"), ("eagle", "vllm"), ("eagle", "speculators")):
        draft = load_kind(kind)(shape)
        export_drafter(draft, tmp_path / kind / format, tokenizer=target, format=format)
        config = json.loads((tmp_path / kind / format / "config.json").read_text())
        written[f"{kind} {format}"] = config.get("transformer_layer_config", config)
    for name, config in written.items():
        old = replace(shape.decoder, rope=read_as_transformers_4(config))
        assert torch.equal(rotary_table(old, 300), rotary_table(shape.decoder, 300)), name
        assert config["rope_scaling"] is None or config["rope_scaling"]["type"] == config["rope_scaling"]["rope_type"]
    assert all(decoder_shape(read_config(tmp_path / name)).rope == shape.decoder.rope for name in ("model", "lm/hf"))


def test_rope_outside_of_scaling_is_written_for_old_readers():
    """Of partial and long rotary parameters, transformers 4 reads some beside `rope_scaling`."""
    assert transformers4_rope({"rope_type": "default", "rope_theta": 5.0, "partial_rotary_factor": 0.5}) == {
        "rope_theta": 5.0,
        "partial_rotary_factor": 0.5,
        "rope_scaling": None,
    }
    long = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}
    given = long | {"rope_theta": 5.0, "original_max_position_embeddings": 64}
    written = transformers4_rope(given)
    assert (written["rope_theta"], written["original_max_position_embeddings"]) == (5.0, 64)
    assert long.items() <= written["rope_scaling"].items()


def test_automatic_device_is_a_gpu_if_present():
    """Device auto is the GPU if there is one; an unknown device is refused."""
    assert find_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(UserError, match="'toaster': unknown device; use cpu, cuda or auto"):
        find_device("toaster")
