"""Hugging Face folders to decoders and back: configs, weight names, and the fusing of what is read together."""

# D hidden

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainkit.errors import UserError
from trainkit.layers.attention import rotary_table
from trainkit.layers.blocks import Decoder
from trainkit.layers.shape import DecoderShape

LAYOUTS = {"llama", "mistral", "qwen2", "qwen3"}
MODEL_FAULTS = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    RuntimeError,
    AssertionError,
    AttributeError,
    ArithmeticError,
    ImportError,
    StrictDataclassError,
)
"""What the classes of transformers raise for a config.json with odd values."""
_OPTIONAL_SIZES = ("intermediate_size", "num_key_value_heads", "head_dim", "max_position_embeddings")
ROPE_TYPES = {"default", "linear", "llama3", "yarn"}


@dataclass(frozen=True)
class Place:
    """Where a Hugging Face tensor lives in a `Decoder`: rows `start:stop` of the parameter `name`, or all of it."""

    name: str
    start: int | None = None
    stop: int | None = None

    def of(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The view of that parameter."""
        value = parameters[self.name]
        return value if self.start is None else value[self.start : self.stop]


def read_config(folder: str | Path, trust_remote_code: bool = False) -> Any:
    """The transformers config of a local model folder.

    Raises:
        UserError: the folder or its config.json is missing or unreadable.
    """
    from transformers import AutoConfig

    path = Path(folder)
    if not (path / "config.json").is_file():
        raise UserError(f"{path}: no config.json there; give a Hugging Face model folder")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except MODEL_FAULTS as error:
        raise UserError(f"{path}/config.json: {first_lines(error)}; mend it or copy it again") from error


def read_tokenizer(folder: str | Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder, or of a hub name written owner/name.

    Raises:
        UserError: there is none, or it cannot be loaded.
    """
    from transformers import AutoTokenizer  # seconds to import

    mend = "give a folder with tokenizer.json"
    if not Path(folder).is_dir() and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(folder)):
        raise UserError(f"tokenizer {folder}: no such folder; {mend}")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # the Rust library raises bare Exceptions for what it cannot read
        raise UserError(f"tokenizer {folder}: cannot be loaded ({first_lines(error, 1)}); {mend}") from error


def first_lines(error: Exception, count: int = 2) -> str:
    """The beginning of a library's message as one line, or the error's name where there is none."""
    return " ".join(" ".join(str(error).strip().splitlines()[:count]).split()) or type(error).__name__


def find_device(name: str) -> torch.device:
    """The torch device of this name; `auto` is a GPU where there is one, otherwise the CPU.

    Raises:
        UserError: there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name!r}: no device has that name; use cpu or cuda") from None
    there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device.type != "cpu" and (there is None or there.type != device.type):
        raise UserError(f"device {name!r}: no {device.type.upper()} device is available here; use device cpu")
    if device.type != "cpu" and (device.index or 0) >= torch.accelerator.device_count():
        raise UserError(f"device {name!r}: there are {torch.accelerator.device_count()} here; use a lower number")
    return device


def decoder_shape(config: Any) -> DecoderShape:
    """The sizes of any Llama-like config, by its usual field names; says nothing of whether our decoder covers it."""
    where = f"{config._name_or_path or config.model_type}/config.json"
    heads: Any = getattr(config, "num_attention_heads", None)
    sizes = {name: getattr(config, name, None) for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
    sizes["num_attention_heads"] = heads
    sizes |= {name: value for name in _OPTIONAL_SIZES if (value := getattr(config, name, None)) is not None}
    for name, value in sizes.items():
        if type(value) is not int or value < 1:
            raise UserError(f"{where}: {name} is {value!r}; give a model of attention layers, where it is at least 1")
    if heads % (getattr(config, "num_key_value_heads", None) or heads):
        raise UserError(f"{where}: num_key_value_heads {config.num_key_value_heads} must divide num_attention_heads {heads}")
    rope = dict(getattr(config, "rope_parameters", None) or {})
    rope.setdefault("rope_type", "default")
    rope.setdefault("rope_theta", getattr(config, "rope_theta", None) or 10000.0)
    return DecoderShape(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        norm_eps=getattr(config, "rms_norm_eps", None) or 1e-5,
        rope=rope,
        max_positions=getattr(config, "max_position_embeddings", 2048),
        qkv_bias=config.model_type == "qwen2",
        qk_norm=config.model_type == "qwen3",
        tied=bool(config.tie_word_embeddings),
    )


def covered_positions(folder: str | Path) -> int:
    """Positions that the model in `folder` was made for.

    Raises:
        UserError: no readable config.json there, or the runner does not decode this model.
    """
    config = read_config(folder)
    check_covered(config, folder, 0)
    return config.max_position_embeddings


def check_covered(config: Any, folder: str | Path, max_len: int) -> None:
    """Refuses, by name, what the runner's decoder does not compute exactly.

    Raises:
        UserError: another architecture, activation, bias or rotary type, or a sliding window shorter than `max_len`.
    """
    where = f"{folder}/config.json"
    if config.model_type not in LAYOUTS:
        known = ", ".join(sorted(LAYOUTS))
        raise UserError(f"{where}: model_type {config.model_type!r} is not one the runner decodes; give one of {known}")
    if config.hidden_act != "silu":
        raise UserError(f"{where}: hidden_act {config.hidden_act!r} is not supported by the runner, only 'silu'")
    for field in ("attention_bias", "mlp_bias"):
        if getattr(config, field, False):
            raise UserError(f"{where}: {field} is not supported by the runner for {config.model_type}")
    shape = decoder_shape(config)
    rope, kind = shape.rope, shape.rope["rope_type"]
    if kind not in ROPE_TYPES:
        raise UserError(f"{where}: rope_type {kind!r} is not one the runner computes ({', '.join(sorted(ROPE_TYPES))})")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{where}: partial_rotary_factor is not supported by the runner")
    if getattr(config, "quantization_config", None):
        raise UserError(f"{where}: quantised weights are not supported by the runner; give the dense folder")
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window and type(window) is not int:
        raise UserError(f"{where}: sliding_window is {window!r}; make it a number or null")
    if window and max_len > window:
        raise UserError(f"{where}: sliding_window {window} is shorter than max_len {max_len}; load with max_len <= {window}")
    if max_len > config.max_position_embeddings:
        covered = config.max_position_embeddings
        raise UserError(f"{where}: max_position_embeddings {covered} is shorter than max_len {max_len}; lower max_len")
    try:
        rotary_table(shape, 1)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        said = f"{type(error).__name__} {first_lines(error, 1)}"
        raise UserError(f"{where}: rope_parameters give no rotary table ({said}); mend them") from error


def places(shape: DecoderShape) -> dict[str, Place]:
    """Every Hugging Face tensor name of this shape, and where it lives in a `Decoder`."""
    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    qkv = {"q_proj": (0, q), "k_proj": (q, q + kv), "v_proj": (q + kv, q + 2 * kv)}
    mlp = {"gate_proj": (0, shape.intermediate_size), "up_proj": (shape.intermediate_size, 2 * shape.intermediate_size)}
    found = {"model.embed_tokens.weight": Place("embed.weight"), "model.norm.weight": Place("norm.weight")}
    if not shape.tied:
        found["lm_head.weight"] = Place("lm_head.weight")
    for index in range(shape.num_layers):
        theirs, ours = f"model.layers.{index}", f"layers.{index}"
        found[f"{theirs}.input_layernorm.weight"] = Place(f"{ours}.attention_norm.weight")
        found[f"{theirs}.post_attention_layernorm.weight"] = Place(f"{ours}.mlp_norm.weight")
        found[f"{theirs}.self_attn.o_proj.weight"] = Place(f"{ours}.attention.out.weight")
        found[f"{theirs}.mlp.down_proj.weight"] = Place(f"{ours}.mlp.down.weight")
        for part, rows in qkv.items():
            found[f"{theirs}.self_attn.{part}.weight"] = Place(f"{ours}.attention.qkv.weight", *rows)
            if shape.qkv_bias:
                found[f"{theirs}.self_attn.{part}.bias"] = Place(f"{ours}.attention.qkv.bias", *rows)
        for part, rows in mlp.items():
            found[f"{theirs}.mlp.{part}.weight"] = Place(f"{ours}.mlp.gate_up.weight", *rows)
        if shape.qk_norm:
            for part in ("q_norm", "k_norm"):
                found[f"{theirs}.self_attn.{part}.weight"] = Place(f"{ours}.attention.{part}.weight")
    return found


def hf_shapes(shape: DecoderShape) -> dict[str, tuple[int, ...]]:
    """Every tensor that a Hugging Face program expects of this shape, and its size; says nothing of a `Decoder`'s storage."""
    D, inner = shape.hidden_size, shape.intermediate_size
    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (D,),
        "post_attention_layernorm.weight": (D,),
        "self_attn.q_proj.weight": (q, D),
        "self_attn.k_proj.weight": (kv, D),
        "self_attn.v_proj.weight": (kv, D),
        "self_attn.o_proj.weight": (D, q),
        "mlp.gate_proj.weight": (inner, D),
        "mlp.up_proj.weight": (inner, D),
        "mlp.down_proj.weight": (D, inner),
    }
    if shape.qkv_bias:
        layer |= {"self_attn.q_proj.bias": (q,), "self_attn.k_proj.bias": (kv,), "self_attn.v_proj.bias": (kv,)}
    if shape.qk_norm:
        layer |= {"self_attn.q_norm.weight": (shape.head_dim,), "self_attn.k_norm.weight": (shape.head_dim,)}
    ends = {"model.embed_tokens.weight": (shape.vocab_size, D), "model.norm.weight": (D,)}
    if not shape.tied:
        ends["lm_head.weight"] = (shape.vocab_size, D)
    layers = range(shape.num_layers)
    return ends | {f"model.layers.{index}.{name}": size for index in layers for name, size in layer.items()}


def read_tensors(folder: str | Path, only: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every tensor in a folder's safetensors files, or of those named in `only`, one at a time.

    Raises:
        UserError: no safetensors there, or a file is truncated.
    """
    path = Path(folder)
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            held = json.loads(index.read_text())["weight_map"].items()
            files = sorted({path / str(file) for name, file in held if only is None or name in only})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index}: names no weight files ({first_lines(error, 1)}); copy it again") from error
    else:
        files = [path / "model.safetensors"]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: not found; give a folder with its weights, which are read from safetensors only")
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  safe_open is no mapping
                    if only is not None and name not in only:
                        continue
                    yield name, tensors.get_tensor(name)
        except SafetensorError as error:
            raise UserError(f"{file}: not a whole safetensors file ({error}); copy it again") from error


def copy_weights(decoder: Decoder, tensors: Iterable[tuple[str, Tensor]], source: str, complete: bool = True) -> None:
    """Copies Hugging Face tensors into the decoder's fused storage, in place, casting to its dtype.

    Raises:
        UserError: a tensor the shape has no place for, of another size, with values that are not finite, or (with `complete`)
            one that is missing.
    """
    parameters = dict(decoder.named_parameters())
    wanted = places(decoder.shape)
    seen: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, value in tensors:
            if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and decoder.shape.tied):
                continue
            if name not in wanted:
                raise UserError(f"{source}: tensor {name!r} has no place here; give weights that fit config.json")
            place = wanted[name].of(parameters)
            if place.shape != value.shape:
                sizes = f"{list(value.shape)}, the config asks for {list(place.shape)}"
                raise UserError(f"{source}: tensor {name!r} is {sizes}; give weights that fit config.json")
            place.copy_(value)
            seen[name] = place
    missing = sorted(wanted.keys() - seen.keys())
    if complete and missing:
        raise UserError(f"{source}: {len(missing)} tensors are missing, the first is {missing[0]!r}; copy all weight files")
    check_finite(seen.items(), source)


@torch.no_grad()
def check_finite(tensors: Iterable[tuple[str, Tensor]], source: str) -> None:
    """Refuses weights with NaN or infinite values, also those that became so in a narrower dtype.

    Smallest and largest value cost one read of the weights (7 GB/s on one core) and, on a GPU, one wait for all of them.

    Raises:
        UserError: names the first such tensor.
    """
    bounds = [(name, value, torch.stack(value.aminmax())) for name, value in tensors if value.numel()]
    if not bounds or bool(torch.stack([pair.float().isfinite().all() for _, _, pair in bounds]).all()):
        return
    name, value, _ = next(entry for entry in bounds if not bool(entry[2].isfinite().all()))
    dtype = str(value.dtype).removeprefix("torch.")
    raise UserError(f"{source}: tensor {name!r} holds values that are not finite in {dtype}; copy it again or train it anew")


def load_decoder(
    folder: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    max_len: int | None = None,
    layers: bool = True,
) -> Decoder:
    """A decoder with the weights of a Hugging Face folder, in `dtype` (default: as stored), without gradient.

    Without `layers` it is embedding, final norm and head alone, and no other weight is read.

    Raises:
        UserError: the runner does not cover this model (`check_covered`), or its weights do not fit its config.
    """
    config = read_config(folder)
    check_covered(config, folder, max_len or 0)
    if dtype is None:
        stored = getattr(config, "dtype", None) or torch.float32
        dtype = getattr(torch, stored, None) if isinstance(stored, str) else stored
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise UserError(f"{folder}/config.json: dtype {stored!r} is none that weights have; make it float32 or bfloat16")
    with torch.device("meta"):
        shape = decoder_shape(config)
        decoder = Decoder(shape if layers else replace(shape, num_layers=0))
    decoder = decoder.to(dtype).to_empty(device=device)
    decoder.rope = torch.empty(0, *decoder.rope.shape[1:], device=device, dtype=dtype)
    copy_weights(decoder, read_tensors(folder, None if layers else places(decoder.shape)), str(folder))
    return decoder.requires_grad_(False).eval()


def hf_tensors(decoder: Decoder) -> dict[str, Tensor]:
    """The decoder's weights under their Hugging Face names, each its own storage."""
    parameters = dict(decoder.named_parameters())
    return {name: place.of(parameters).detach().clone() for name, place in places(decoder.shape).items()}


def hf_config(shape: DecoderShape, end_ids: Iterable[int], pad_id: int | None, dtype: torch.dtype) -> dict[str, Any]:
    """A config.json that loads this shape as Llama, Qwen2 or Qwen3, whichever has its biases and norms."""
    model_type = "qwen3" if shape.qk_norm else "qwen2" if shape.qkv_bias else "llama"
    name = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}[model_type]
    ends = list(end_ids)
    return {
        "architectures": [name],
        "model_type": model_type,
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": shape.norm_eps,
        "rope_parameters": dict(shape.rope),
        "max_position_embeddings": shape.max_positions,
        "tie_word_embeddings": shape.tied,
        "attention_bias": False,
        "mlp_bias": False,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": pad_id,
        "dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
    }


def save_decoder(
    decoder: Decoder, folder: Path, dtype: torch.dtype, end_ids: Iterable[int] = (), pad_id: int | None = None
) -> None:
    """Writes config.json and model.safetensors as transformers, vLLM and SGLang load them."""
    config = hf_config(decoder.shape, end_ids, pad_id, dtype)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {name: value.to(dtype=dtype, device="cpu").contiguous() for name, value in hf_tensors(decoder).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
