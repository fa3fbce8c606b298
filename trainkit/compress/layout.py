"""The linear layers of a Llama, Mistral, Qwen2 or Qwen3 folder: their names, by block and by the input that they read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from trainkit.bundle import tensor_entries
from trainkit.errors import UserError
from trainkit.models.load import LAYOUTS, check_text_only, read_config
from trainkit.models.weights import HEAD, weight_files

INPUTS: Mapping[str, tuple[str, ...]] = {
    "attention": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "mlp": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""Input of a block's linear layers -> the layers that read it, in the order in which a block computes them."""


@dataclass(frozen=True)
class Layout:
    """The blocks of a model folder.

    Attributes:
        folder: The folder.
        config: Its transformers config.
        blocks: Number of decoder layers.
    """

    folder: Path
    config: Any
    blocks: int

    def block(self, index: int) -> str:
        """Hugging Face name of a block, which is the prefix of its tensors' names."""
        return f"model.layers.{index}"

    def linears(self, index: int) -> dict[str, str]:
        """Name of each linear layer of a block, without `.weight` -> the input that it reads (`INPUTS`)."""
        return {f"{self.block(index)}.{name}": source for source, names in INPUTS.items() for name in names}

    def all_linears(self) -> list[str]:
        """Names of the linear layers of all blocks."""
        return [name for index in range(self.blocks) for name in self.linears(index)]

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Outputs and inputs of each linear layer; reads only the headers of the weight files.

        Raises:
            UserError: a layer has no weight there.
        """
        entries = {name: entry for file in weight_files(self.folder) for name, entry in tensor_entries(file).items()}
        names = self.all_linears()
        if missing := next((name for name in names if f"{name}.weight" not in entries), None):
            raise UserError(f"{self.folder}: tensor '{missing}.weight' is missing; copy all weight files")
        return {name: tuple(entries[f"{name}.weight"]["shape"]) for name in names}

    def stored_dtype(self) -> str:
        """The dtype, by torch's name, of most weights in the files; config.json may have none, or another."""
        sizes = Counter[str]()
        for file in weight_files(self.folder):
            for entry in tensor_entries(file).values():
                sizes[entry["dtype"]] += prod(entry["shape"])
        names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
        if (most := max(sizes, key=sizes.__getitem__)) not in names:
            raise UserError(f"{self.folder}: most weights are of type {most}; save them as float32, bfloat16 or float16")
        return names[most]

    def check_names(self, names: Mapping[str, object], source: str) -> None:
        """Refuses names, given by `source`, of tensors that are not linear layers of a block.

        Raises:
            UserError: names the first.
        """
        unknown = sorted(names.keys() - set(self.all_linears()))
        if unknown and f"{unknown[0]}.weight" == HEAD:
            tied = ", and here it is the embedding (tie_word_embeddings)" if self.config.tie_word_embeddings else ""
            raise UserError(f"{source}: the output head lm_head is never compressed{tied}; remove it")
        if unknown:
            example = f"{self.block(0)}.mlp.down_proj"
            raise UserError(f"{source}: {unknown[0]!r} is not a linear layer of {self.folder}; give names such as {example}")


def read_layout(folder: str | Path) -> Layout:
    """The layout of a folder; reads no weights.

    Raises:
        UserError: another architecture, already quantised, or no safetensors files.
    """
    path, config = Path(folder), read_config(folder)
    check_text_only(config, path)
    if config.model_type not in LAYOUTS:
        known = ", ".join(sorted(LAYOUTS))
        raise UserError(f"{path}/config.json: model_type {config.model_type!r} cannot be compressed; give one of {known}")
    if getattr(config, "quantization_config", None):
        raise UserError(f"{path}/config.json: the weights are already quantised; give the folder of the dense model")
    if not any(file.suffix == ".safetensors" for file in weight_files(path)):
        raise UserError(f"{path}: no weights in safetensors files; save the model in that format")
    return Layout(path, config, int(config.num_hidden_layers))
