"""A target tuned through LoRA: low-rank weights beside its projections, to train, to switch off, and to merge for good.

Hu et al. 2021, arXiv 2106.09685, by peft: y = W x + alpha / rank * B A x, B zero at first. Left out on purpose: adapters on the
embedding and the output head, which drafters call by themselves, and dropout.
"""

# B batch  T positions  A taps  D hidden

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainkit.bundle import ADAPTER
from trainkit.errors import UserError
from trainkit.models.load import first_lines
from trainkit.models.target import FrozenTarget

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TOLERANCE = 1e-4
"""Of merged logits against those with the adapter on, as a share of the largest: float32 sums in another order."""
_NAME = "default"  # peft's, of the only adapter there is


@dataclass(frozen=True)
class AdapterShape:
    """Rank and scale of an adapter, and the names of the projections that it stands beside."""

    rank: int
    alpha: float
    modules: tuple[str, ...] = PROJECTIONS

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint; `AdapterShape(**values)` reads them back."""
        return asdict(self) | {"modules": list(self.modules)}


class TunedTarget(FrozenTarget):
    """A target that is frozen but for its adapter; still no nn.Module, so that nobody saves or trains the rest.

    Attributes:
        adapter: The low-rank matrices by projection, shared with the model: what is trained and saved.
    """

    def __init__(self, folder: str | Path, shape: AdapterShape, **options: Any) -> None:
        from peft import LoraConfig, get_peft_model
        from peft.tuners.lora import LoraLayer

        super().__init__(folder, **options)
        config = LoraConfig(r=shape.rank, lora_alpha=shape.alpha, target_modules=list(shape.modules))  # type: ignore[arg-type]
        try:
            self.tuner: Any = get_peft_model(self.model, config)  # type: ignore[arg-type]
        except ValueError as error:
            raise UserError(f"model.lora_modules: {first_lines(error, 1)}; name projections of {folder}") from error
        inside = {module for layer in self._layers for module in layer.modules()}
        places: dict[str, Any] = {name: part for name, part in self.model.named_modules() if isinstance(part, LoraLayer)}
        for name, part in places.items():
            if part not in inside:
                raise UserError(f"model.lora_modules: {name} is outside of the decoder layers; name projections within them")
        self.adapter = nn.ModuleDict(
            {
                name.replace(".", "/"): nn.ModuleDict({"A": part.lora_A[_NAME], "B": part.lora_B[_NAME]})
                for name, part in places.items()
            }
        )

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within, the target is bit for bit what it was before it was tuned."""
        self.tuner.base_model.disable_adapter_layers()
        try:
            yield
        finally:
            self.tuner.base_model.enable_adapter_layers()

    def forward(
        self, tokens_BT: Tensor, positions_BT: Tensor, document_BT: Tensor, taps: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor | None]:
        """As the frozen target's; where gradients are enabled they reach the adapter."""
        return self._states(tokens_BT, positions_BT, document_BT, taps)

    __call__ = forward


@torch.no_grad()
def merged(folder: str | Path, shape: AdapterShape, tensors: Mapping[str, Tensor], mark: str) -> Any:
    """The model in `folder` with an adapter's weights added to its own, float32 on the CPU.

    Its config carries a digest of the adapter, so that a drafter tuned with it is refused on any other target.

    Args:
        folder: Of the target that was tuned.
        shape: Of the adapter.
        tensors: The adapter's `state_dict`.
        mark: What tells the target's weights from others'.

    Raises:
        UserError: the adapter does not fit, or merging changed the logits by more than `TOLERANCE`.
    """
    target = TunedTarget(folder, shape)
    try:
        target.adapter.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"{folder}: the adapter does not fit ({first_lines(error)}); give the target that was tuned") from error
    model: Any = target.model
    tokens = torch.randint(model.config.vocab_size, (1, 16), generator=torch.Generator().manual_seed(0))
    before = model(tokens).logits
    model = target.tuner.merge_and_unload()
    after = model(tokens).logits
    difference = (before - after).abs().max() / before.abs().max()
    if not difference <= TOLERANCE:
        raise UserError(f"{folder}: merging the adapter changed its logits by {float(difference):.3g}; nothing was written")
    digest = hashlib.sha256(repr((shape, mark)).encode())
    for name, value in sorted(tensors.items()):
        digest.update(name.encode() + value.float().contiguous().numpy().tobytes())
    setattr(model.config, ADAPTER, digest.hexdigest())
    return model
