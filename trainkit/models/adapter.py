"""A target tuned through LoRA: trainable low-rank weights beside its projections, which can be switched off or merged.

Hu et al. 2021, arXiv 2106.09685, by peft: y = W x + alpha / rank * B A x, with B = 0 at the start. Left out on purpose:
adapters on the embedding and the output head, which drafters call directly, and dropout.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainkit.bundle import ADAPTER
from trainkit.errors import UserError, first_lines
from trainkit.models.target import FrozenTarget

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TOLERANCE = 1e-4
"""Largest allowed change of logits by merging, as a share of the largest logit: float32 sums run in another order."""
_NAME = "default"  # peft's name for the only adapter


@dataclass(frozen=True)
class AdapterShape:
    """Sizes of an adapter.

    Attributes:
        rank: Rank of the added weights.
        alpha: Scale of the added weights, divided by `rank`.
        modules: Names of the projections that get added weights.
    """

    rank: int
    alpha: float
    modules: tuple[str, ...] = PROJECTIONS

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint; `AdapterShape(**values)` reads them back."""
        return asdict(self) | {"modules": list(self.modules)}


class TunedTarget(FrozenTarget):
    """A target whose adapter is trained and the rest frozen; not an nn.Module either, so that only the adapter is saved.

    Attributes:
        adapter: Low-rank matrices by projection, shared with the model.
    """

    frozen = False

    def __init__(self, folder: str | Path, shape: AdapterShape, **options: Any) -> None:
        from peft import LoraConfig, get_peft_model
        from peft.tuners.lora import LoraLayer

        super().__init__(folder, **options)
        # Add the adapter.
        config = LoraConfig(r=shape.rank, lora_alpha=shape.alpha, target_modules=list(shape.modules))  # type: ignore[arg-type]
        try:
            self.tuner: Any = get_peft_model(self.model, config)  # type: ignore[arg-type]
        except ValueError as error:
            raise UserError(f"model.lora_modules: {first_lines(error, 1)}; name projections of {folder}") from error
        # Collect its matrices, all of which must be inside the decoder layers.
        inside = {module for layer in self._layers for module in layer.modules()}
        adapted: dict[str, Any] = {name: part for name, part in self.model.named_modules() if isinstance(part, LoraLayer)}
        for name, part in adapted.items():
            if part not in inside:
                raise UserError(f"model.lora_modules: {name} is outside of the decoder layers; name projections within them")
        self.adapter = nn.ModuleDict(
            {
                name.replace(".", "/"): nn.ModuleDict({"A": part.lora_A[_NAME], "B": part.lora_B[_NAME]})
                for name, part in adapted.items()
            }
        )

    @contextmanager
    def off(self) -> Iterator[None]:
        """While the context is open, the target computes exactly what it computed before tuning."""
        self.tuner.base_model.disable_adapter_layers()
        try:
            yield
        finally:
            self.tuner.base_model.enable_adapter_layers()


@torch.no_grad()
def merge_adapter(folder: str | Path, shape: AdapterShape, tensors: Mapping[str, Tensor], weights_digest: str) -> Any:
    """The target in `folder` with the weights of the adapter that was tuned on it added to its own, float32 on the CPU.

    Its config carries a digest of the adapter, so that a drafter tuned with it is refused on any other target. `tensors` is the
    adapter's `state_dict`, and `weights_digest` the digest of the target's weights.

    Raises:
        UserError: the adapter does not fit, or merging changed the logits by more than `TOLERANCE`.
    """
    target = TunedTarget(folder, shape)
    try:
        target.adapter.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"{folder}: the adapter does not fit ({first_lines(error)}); give the target that was tuned") from error
    # Merge, and compare logits on random tokens.
    model: Any = target.model
    tokens = torch.randint(model.config.vocab_size, (1, 16), generator=torch.Generator().manual_seed(0))
    before = model(tokens).logits
    model = target.tuner.merge_and_unload()
    after = model(tokens).logits
    difference = (before - after).abs().max() / before.abs().max()
    if not difference <= TOLERANCE:
        raise UserError(f"{folder}: merging the adapter changed its logits by {float(difference):.3g}; nothing was written")
    # Identify the merged model.
    digest = hashlib.sha256(repr((shape, weights_digest)).encode())
    for name, value in sorted(tensors.items()):
        digest.update(name.encode() + value.float().contiguous().numpy().tobytes())
    setattr(model.config, ADAPTER, digest.hexdigest())
    return model
