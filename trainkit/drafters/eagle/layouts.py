"""EAGLE-3 on disk: one flat folder that vLLM and SGLang both load, and the layout of vLLM's speculators library.

Names, shapes and configuration keys were read off vLLM 0.32, SGLang and speculators 0.9.0 (November 2026). Both layouts hold
the same tensors; the flat one calls the layer `midlayer`. vLLM's loader leaves a missing tensor uninitialised without a word,
so `shapes` says what must be there, from sizes alone, and the exporter compares.
"""

# H hidden  I intermediate  V target vocabulary  D draft vocabulary  A taps

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from trainkit.bundle import read_json
from trainkit.errors import UserError
from trainkit.layers.shape import DecoderShape
from trainkit.models.load import hf_config, read_tensors

PREFIX = {"flat": "midlayer", "speculators": "layers.0"}
"""What each layout calls the decoder layer."""
_ARCHITECTURES = {"flat": "LlamaForCausalLMEagle3", "speculators": "Eagle3DraftModel"}


def default_taps(num_layers: int) -> tuple[int, ...]:
    """Hidden states 2, L/2 and L - 3, as vLLM and SGLang take them untold; of fewer than 7 layers up to three, spread."""
    if num_layers >= 7:
        return (2, num_layers // 2, num_layers - 3)
    return tuple(sorted({0, num_layers // 2, num_layers - 1}))


def shapes(layer: DecoderShape, taps: int, draft_vocab_size: int, layout: str) -> dict[str, tuple[int, ...]]:
    """Every tensor of the layout, with its shape.

    Args:
        layer: Sizes of the decoder layer; its vocabulary is the target's.
        taps: A.
        draft_vocab_size: D.
        layout: `flat` or `speculators`.
    """
    H, inner, V = layer.hidden_size, layer.intermediate_size, layer.vocab_size
    q, kv, at = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim, PREFIX[layout]
    return {
        "embed_tokens.weight": (V, H),
        "fc.weight": (H, taps * H),
        "norm.weight": (H,),
        "lm_head.weight": (draft_vocab_size, H),
        "d2t": (draft_vocab_size,),
        "t2d": (V,),
        **{f"{at}.{name}.weight": (H,) for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm")},
        f"{at}.self_attn.q_proj.weight": (q, 2 * H),
        f"{at}.self_attn.k_proj.weight": (kv, 2 * H),
        f"{at}.self_attn.v_proj.weight": (kv, 2 * H),
        f"{at}.self_attn.o_proj.weight": (H, q),
        f"{at}.mlp.gate_proj.weight": (inner, H),
        f"{at}.mlp.up_proj.weight": (inner, H),
        f"{at}.mlp.down_proj.weight": (H, inner),
    }


def to_file(state: Mapping[str, Tensor], layer: DecoderShape, ids_K: Tensor | None, layout: str) -> dict[str, Tensor]:
    """The file's tensors from the drafter's, but for the embedding: fused projections apart, ids as offsets and as a mask."""
    q, kv, at, V = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim, PREFIX[layout], layer.vocab_size
    tensors = {
        "fc.weight": state["fc.weight"],
        "norm.weight": state["norm.weight"],
        "lm_head.weight": state["lm_head.weight"],
        f"{at}.hidden_norm.weight": state["layer.hidden_norm.weight"],
        f"{at}.input_layernorm.weight": state["layer.embedding_norm.weight"],
        f"{at}.post_attention_layernorm.weight": state["layer.mlp_norm.weight"],
        f"{at}.self_attn.o_proj.weight": state["layer.attention.out.weight"],
        f"{at}.mlp.down_proj.weight": state["layer.mlp.down.weight"],
    }
    for name, rows in zip("qkv", state["layer.attention.qkv.weight"].split([q, kv, kv]), strict=True):
        tensors[f"{at}.self_attn.{name}_proj.weight"] = rows
    for name, rows in zip(("gate", "up"), state["layer.mlp.gate_up.weight"].chunk(2), strict=True):
        tensors[f"{at}.mlp.{name}_proj.weight"] = rows
    held_K = torch.arange(V) if ids_K is None else ids_K.cpu()
    return tensors | {
        "d2t": held_K - torch.arange(len(held_K)),
        "t2d": torch.zeros(V, dtype=torch.bool).index_fill_(0, held_K, True),
    }


def from_file(tensors: Mapping[str, Tensor], source: Path) -> tuple[dict[str, Tensor], Tensor]:
    """The drafter's tensors and the ids of its head's rows, from the file's of either layout.

    Raises:
        UserError: a tensor is missing.
    """
    at = PREFIX["speculators"] if any(name.startswith(PREFIX["speculators"]) for name in tensors) else PREFIX["flat"]
    try:
        state = {
            **{name: tensors[name] for name in ("fc.weight", "norm.weight", "lm_head.weight")},
            "layer.hidden_norm.weight": tensors[f"{at}.hidden_norm.weight"],
            "layer.embedding_norm.weight": tensors[f"{at}.input_layernorm.weight"],
            "layer.mlp_norm.weight": tensors[f"{at}.post_attention_layernorm.weight"],
            "layer.attention.qkv.weight": torch.cat([tensors[f"{at}.self_attn.{name}_proj.weight"] for name in "qkv"]),
            "layer.attention.out.weight": tensors[f"{at}.self_attn.o_proj.weight"],
            "layer.mlp.gate_up.weight": torch.cat([tensors[f"{at}.mlp.{name}_proj.weight"] for name in ("gate", "up")]),
            "layer.mlp.down.weight": tensors[f"{at}.mlp.down_proj.weight"],
        }
        offsets_K = tensors.get("d2t", torch.zeros(len(tensors["lm_head.weight"]), dtype=torch.long))
    except KeyError as error:
        raise UserError(f"{source}: tensor {error.args[0]!r} is missing; give a whole EAGLE-3 checkpoint") from None
    return state, offsets_K.long() + torch.arange(len(offsets_K))


def configuration(
    layer: DecoderShape,
    taps: Sequence[int],
    verifiers: list[str],
    target: DecoderShape,
    draft_vocab_size: int,
    layout: str,
    dtype: torch.dtype,
    end_ids: Sequence[int],
    verifier: str,
) -> dict[str, Any]:
    """The layout's config.json.

    `norm_before_residual` is written although false, since readers differ in what they assume. Tap ids are left out of a flat
    one where they are the default; SGLang adds 1 to those it is given, vLLM does not.
    """
    plain = hf_config(layer, end_ids, None, dtype)
    if layout == "flat":
        found = plain | {
            "architectures": [_ARCHITECTURES[layout]],
            "draft_vocab_size": draft_vocab_size,
            "tie_word_embeddings": False,
            "norm_before_residual": False,
            "rope_theta": layer.rope["rope_theta"],
        }
        if layer.rope["rope_type"] != "default":  # readers of transformers 4 look here
            found["rope_scaling"] = {name: value for name, value in layer.rope.items() if name != "rope_theta"}
        if target.num_layers < 7 or tuple(taps) != default_taps(target.num_layers):
            found["eagle_aux_hidden_state_layer_ids"] = list(taps)
            found["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": [tap - 1 for tap in taps]}
        return found
    layer_fields = (
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "hidden_act",
        "attention_bias",
        "mlp_bias",
        "max_position_embeddings",
        "rope_parameters",
    )
    return {
        "architectures": [_ARCHITECTURES[layout]],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.9.0",
        "draft_vocab_size": draft_vocab_size,
        "eagle_aux_hidden_state_layer_ids": list(taps),
        "norm_before_residual": False,
        "norm_before_fc": False,
        "fc_norm": False,
        "norm_output": False,
        "embed_requires_grad": False,
        "target_hidden_size": None,
        "tie_word_embeddings": False,
        "dtype": plain["dtype"],
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {"proposal_type": "greedy", "speculative_tokens": 3, "verifier_accept_k": 1, "accept_tolerance": 0.0}
            ],
            "verifier": {"name_or_path": verifier, "architectures": verifiers},
        },
        "transformer_layer_config": {name: plain[name] for name in layer_fields} | {"tie_word_embeddings": False},
    }


def arguments(folder: Path, target_layers: int) -> dict[str, Any]:
    """The drafter's constructor arguments that an outside checkpoint's config.json and tensors imply.

    Raises:
        UserError: a variant that this kind does not compute, or a size that is missing or none.
    """
    config = read_json(folder / "config.json")
    for name in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output"):
        if config.get(name):
            raise UserError(f"{folder}/config.json: {name} is not supported, only EAGLE-3 as published; train one anew")
    layer = config.get("transformer_layer_config", config)
    for name in ("intermediate_size", "num_attention_heads"):
        if not isinstance(layer, dict) or type(layer.get(name)) is not int or layer[name] < 1:
            raise UserError(f"{folder}/config.json: {name} must be a number, at least 1; copy the folder again")
    if layer.get("num_hidden_layers", 1) != 1:
        raise UserError(f"{folder}/config.json: {layer['num_hidden_layers']} draft layers are not supported, only 1")
    taps = config.get("eagle_aux_hidden_state_layer_ids")
    if taps is None and (shifted := (config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")):
        taps = [tap + 1 for tap in shifted]
    if layer.get("hidden_act", "silu") != "silu":
        raise UserError(f"{folder}/config.json: hidden_act {layer['hidden_act']!r} is not supported, only 'silu'")
    # absent fields mean what transformers' LlamaConfig takes them for, whatever the target has
    rope = {"rope_type": "default", "rope_theta": layer.get("rope_theta", 10000.0)}
    for given in (layer.get("rope_scaling"), layer.get("rope_parameters")):
        rope |= {"rope_type" if name == "type" else name: value for name, value in (given or {}).items()}
    heads = layer["num_attention_heads"]
    return {
        "taps": list(taps or default_taps(target_layers)),
        "intermediate_size": layer["intermediate_size"],
        "num_heads": heads,
        "num_kv_heads": layer.get("num_key_value_heads", heads),
        "rope": rope,
        "norm_eps": layer.get("rms_norm_eps", 1e-6),
    }


def claimed(folder: Path) -> bool:
    """Whether a folder's config.json names an EAGLE-3 draft."""
    if not (folder / "config.json").is_file():
        return False
    names = read_json(folder / "config.json").get("architectures")
    return isinstance(names, list) and str([*names, ""][0]) in _ARCHITECTURES.values()


def embedding(folder: Path) -> Tensor:
    """The token embedding [V, H] of a model folder, or of an EAGLE-3 draft's.

    Raises:
        UserError: none there.
    """
    for _, value in read_tensors(folder, only=("model.embed_tokens.weight", "embed_tokens.weight")):
        return value
    raise UserError(f"{folder}: holds no embed_tokens.weight, which an EAGLE-3 export copies; name the target's folder")


def write(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Writes model.safetensors, floating values in `dtype`, and config.json."""
    written = {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}
    apart = {name: value.contiguous().clone() for name, value in written.items()}  # safetensors refuses views of one storage
    save_file(apart, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def verifier(folder: Path, target: DecoderShape) -> list[str]:
    """The target's architecture as its config.json names it, or, where that is an EAGLE-3 draft's, the one of its sizes."""
    if claimed(folder):
        return hf_config(target, (), None, torch.float32)["architectures"]
    return read_json(folder / "config.json").get("architectures") or []


def layer_shape(
    target: DecoderShape,
    intermediate_size: int | None,
    num_heads: int | None,
    num_kv_heads: int | None,
    rope: Mapping[str, Any] | None,
    norm_eps: float | None,
) -> DecoderShape:
    """Sizes of the draft's one layer: Llama's layout, whatever biases and norms the target's attention has."""
    return replace(
        target,
        num_layers=1,
        intermediate_size=intermediate_size or target.intermediate_size,
        num_heads=num_heads or target.num_heads,
        num_kv_heads=num_kv_heads or target.num_kv_heads,
        qkv_bias=False,
        qk_norm=False,
        tied=False,
        rope=dict(rope or target.rope),
        norm_eps=norm_eps or target.norm_eps,
    )
