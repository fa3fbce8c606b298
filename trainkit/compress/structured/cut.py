"""What structured pruning keeps of a model, and the config and tensors of the smaller Hugging Face model.

All blocks keep the same number of heads and neurons, because a config.json of these layouts has one size for all blocks.
Blocks may keep different ones.
"""

# D hidden  I neurons  E head width

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from trainkit.compress.layout import Layout
from trainkit.layers.shape import DecoderShape
from trainkit.models.load import decoder_shape, hf_shapes

_ROWS_AND_COLUMNS = {
    "self_attn.q_proj": ("heads", "channels"),
    "self_attn.k_proj": ("kv_heads", "channels"),
    "self_attn.v_proj": ("kv_heads", "channels"),
    "self_attn.o_proj": ("channels", "heads"),
    "mlp.gate_proj": ("neurons", "channels"),
    "mlp.up_proj": ("neurons", "channels"),
    "mlp.down_proj": ("channels", "neurons"),
    "input_layernorm": ("channels",),
    "post_attention_layernorm": ("channels",),
    "model.embed_tokens": ("", "channels"),
    "model.norm": ("channels",),
    "lm_head": ("", "channels"),
}
"""Module -> what the rows and columns of its weight are; "" is never cut. Modules that are not listed are never cut either."""


@dataclass(frozen=True)
class Cut:
    """The kept parts of a model, each list ascending.

    Attributes:
        layout: The model.
        blocks: Kept blocks.
        heads: Kept query heads of each block of the model.
        kv_heads: Kept key-value heads of each block.
        neurons: Kept neurons of each block's MLP.
        channels: Kept channels of the residual stream.
        biases: Fields of config.json that are true in the smaller model: `attention_bias`, `mlp_bias`.
    """

    layout: Layout
    blocks: Sequence[int]
    heads: Sequence[Sequence[int]]
    kv_heads: Sequence[Sequence[int]]
    neurons: Sequence[Sequence[int]]
    channels: Sequence[int]
    biases: frozenset[str]

    @staticmethod
    def whole(layout: Layout) -> Cut:
        """The cut that keeps everything."""
        shape, blocks = decoder_shape(layout.config), range(layout.blocks)
        heads, kv_heads, neurons = range(shape.num_heads), range(shape.num_kv_heads), range(shape.intermediate_size)
        biases = {name for name in ("attention_bias", "mlp_bias") if getattr(layout.config, name, False)}
        heads, kv_heads, neurons = ([kept] * layout.blocks for kept in (heads, kv_heads, neurons))
        return Cut(layout, blocks, heads, kv_heads, neurons, range(shape.hidden_size), frozenset(biases))

    @property
    def shape(self) -> DecoderShape:
        """Sizes of the smaller model."""
        before = decoder_shape(self.layout.config)
        return replace(
            before,
            hidden_size=len(self.channels),
            intermediate_size=len(self.neurons[0]),
            num_layers=len(self.blocks),
            num_heads=len(self.heads[0]),
            num_kv_heads=len(self.kv_heads[0]),
            qkv_bias=before.qkv_bias or "attention_bias" in self.biases,
            out_bias="attention_bias" in self.biases,
            mlp_bias="mlp_bias" in self.biases,
        )

    def config(self) -> dict[str, Any]:
        """The fields of config.json that differ, and all sizes, because a missing one has a default that depends on others."""
        shape = self.shape
        fields: dict[str, Any] = {
            "hidden_size": shape.hidden_size,
            "intermediate_size": shape.intermediate_size,
            "num_hidden_layers": shape.num_layers,
            "num_attention_heads": shape.num_heads,
            "num_key_value_heads": shape.num_kv_heads,
            "head_dim": shape.head_dim,
        }
        if types := getattr(self.layout.config, "layer_types", None):
            fields["layer_types"] = [types[index] for index in self.blocks]
        return fields | dict.fromkeys(sorted(self.biases), True)

    def description(self) -> str:
        """What is removed, in words."""
        before, after = decoder_shape(self.layout.config), self.shape
        count = lambda shape: sum(map(prod, hf_shapes(shape).values()))
        parts = {
            "num_layers": "blocks",
            "intermediate_size": "neurons of each block",
            "num_heads": "query heads of each block",
            "num_kv_heads": "key-value heads of each block",
            "hidden_size": "channels",
        }
        sizes = {name: (getattr(before, field), getattr(after, field)) for field, name in parts.items()}
        removed = [f"{old - new:,} of {old:,} {name}" for name, (old, new) in sizes.items() if old != new]
        return f"{', '.join(removed)}; {1 - count(after) / count(before):.1%} of all parameters"

    def tensors(
        self, source: Iterable[tuple[str, Tensor]], biases: Mapping[str, Tensor] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """The smaller model's tensors from those of the model, one at a time.

        Args:
            source: Name and value of every tensor of the model.
            biases: New values of biases, in the model's sizes; those that neither it nor the source has are zero.
        """
        biases, before = biases or {}, decoder_shape(self.layout.config)
        wanted, stored, width = hf_shapes(self.shape), hf_shapes(before), before.head_dim
        for old, value in source:
            index, module, kind = self._parts(old)
            if old in biases or old.endswith("rotary_emb.inv_freq") or (index is not None and index not in self.blocks):
                continue
            yield self._new_name(old), self._kept(index, module, value, width)
            bias = old.removesuffix(kind) + "bias"
            if kind == "weight" and self._new_name(bias) in wanted and (bias in biases or bias not in stored):
                full = biases.get(bias, torch.zeros(len(value)))
                yield self._new_name(bias), self._kept(index, module, full.to(value), width)

    def _parts(self, name: str) -> tuple[int | None, str, str]:
        """Number of the block (None outside), name of the module within it, and `weight` or `bias`."""
        stem, _, kind = name.rpartition(".")
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
        return (int(match[1]), match[2], kind) if match else (None, stem, kind)

    def _new_name(self, name: str) -> str:
        index, module, kind = self._parts(name)
        return name if index is None else f"{self.layout.block(list(self.blocks).index(index))}.{module}.{kind}"

    def _kept(self, index: int | None, module: str, value: Tensor, width: int) -> Tensor:
        for axis, part in enumerate(_ROWS_AND_COLUMNS.get(module, ())[: value.dim()]):
            if not part:
                continue
            kept = getattr(self, part)
            kept = torch.tensor(kept if part == "channels" else kept[index])  # type: ignore[index]
            if part in ("heads", "kv_heads"):
                kept = (kept[:, None] * width + torch.arange(width)).flatten()
            if len(kept) < value.shape[axis]:
                value = value.index_select(axis, kept)
        return value
