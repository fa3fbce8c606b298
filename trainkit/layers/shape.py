"""Sizes of a decoder: read from a Hugging Face config, stored in checkpoints and bundles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class DecoderShape:
    """Sizes and switches of a Llama-like decoder, enough to build it without its weights.

    Attributes:
        vocab_size: Number of tokens: rows of the embedding and of the output head.
        hidden_size: Width of the residual stream.
        intermediate_size: Width inside the gated MLP.
        num_layers: Number of decoder layers.
        num_heads: Number of query heads.
        num_kv_heads: Number of key-value heads; divides `num_heads`.
        head_dim: Width of one head.
        norm_eps: Epsilon of every RMS norm.
        rope: Hugging Face `rope_parameters`: `rope_type` (default, linear, llama3, yarn), `rope_theta` and that type's keys.
        max_positions: Longest sequence that the rotary parameters are meant for.
        qkv_bias: Whether query, key and value projections have biases (Qwen2, and others with `attention_bias`).
        qk_norm: Whether each query and key head has an RMS norm before rotation (Qwen3).
        tied: Whether the output head is the embedding.
        out_bias: Whether attention's output projection has a bias (`attention_bias` of Llama and Qwen3).
        mlp_bias: Whether the MLP's three projections have biases (`mlp_bias` of Llama).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float = 1e-6
    rope: Mapping[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})
    max_positions: int = 2048
    qkv_bias: bool = False
    qk_norm: bool = False
    tied: bool = True
    out_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads {self.num_kv_heads} does not divide num_heads {self.num_heads}")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able copy."""
        return asdict(self) | {"rope": dict(self.rope)}
