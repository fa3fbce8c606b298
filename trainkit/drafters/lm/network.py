"""A small Llama-layout decoder with the target's tokenizer, trained by distillation (METHODS: Direct Alignment, FastDraft).

Left out on purpose: target taps, of which this kind needs none, so that its export serves any engine as an ordinary model.
"""

# B batch  T positions  D hidden  F frontier nodes  M drafted nodes  P path  S cache slots  K ids it may propose

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from trainkit.bundle import read_json
from trainkit.drafters.base import (
    Divergence,
    DraftBatch,
    Drafter,
    Frontier,
    LossOutput,
    State,
    StepOutput,
    TargetHandle,
    TargetShape,
)
from trainkit.errors import UserError
from trainkit.layers.attention import causal_bias, document_bias, move_slots, tree_bias
from trainkit.layers.blocks import Decoder
from trainkit.layers.heads import checked_vocab
from trainkit.layers.linear import project
from trainkit.models.load import (
    LAYOUTS,
    check_covered,
    copy_weights,
    decoder_shape,
    hf_shapes,
    load_decoder,
    read_config,
    read_tensors,
    save_decoder,
)


class LMDraft(Drafter):
    """A decoder-only draft model.

    Args:
        target: Sizes of the target; what is not given below is taken from it.
        num_layers: Decoder layers.
        hidden_size: Width; the target's by default.
        intermediate_size: Width inside the MLP; scaled with the hidden size by default.
        num_heads: Query heads; as many as fit at the target's head width by default.
        num_kv_heads: Key-value heads; as many as the target has, at most `num_heads`, by default.
        init: `scratch` draws random weights; `target` copies the target's embedding, head and every n-th layer (needs the
            target's width); anything else names a Hugging Face folder whose weights, and whose sizes, are taken.
        draft_vocab: Token ids it may propose, ascending, or a JSON file of them (`trainkit vocab`); all by default. Its head
            then reads and computes only these rows (VocabTrim, arXiv 2506.22694); weights and exports keep the whole head.
            `trainkit trim` chooses them.
    """

    formats: ClassVar[Mapping[str, str]] = {"native": "hf", "hf": "hf", "vllm": "hf", "sglang": "hf"}

    def __init__(
        self,
        target: TargetShape,
        *,
        num_layers: int = 1,
        hidden_size: int | None = None,
        intermediate_size: int | None = None,
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        init: str = "target",
        draft_vocab: list[int] | str | None = None,
    ) -> None:
        super().__init__(target)
        shape = target.decoder
        if init in ("scratch", "target"):
            width = hidden_size or shape.hidden_size
            heads = num_heads or max(1, width // shape.head_dim)
            kv_heads = num_kv_heads or next(g for g in range(min(shape.num_kv_heads, heads), 0, -1) if heads % g == 0)
            inner = intermediate_size or shape.intermediate_size * width // shape.hidden_size
            shape = replace(
                shape, num_layers=num_layers, hidden_size=width, intermediate_size=inner, num_heads=heads, num_kv_heads=kv_heads
            )
        else:
            config = read_config(init)
            check_covered(config, init, 0)
            shape = decoder_shape(config)
            if shape.vocab_size != target.decoder.vocab_size:
                raise UserError(f"{init}: vocabulary of {shape.vocab_size}, the target's has {target.decoder.vocab_size}")
        self.init = init
        self.decoder = Decoder(shape)
        self.decoder.initialise()
        self.register_buffer("ids_K", checked_vocab(draft_vocab, shape.vocab_size), persistent=False)
        self.register_buffer("head_KD", None, persistent=False)
        self.ids_K: Tensor | None
        self.head_KD: Tensor | None  # the rows of the head that a trimmed draft serves with

    def initialise(self, target_folder: Path) -> None:
        if self.init == "scratch":
            return
        if self.init != "target":
            copy_weights(self.decoder, read_tensors(self.init), self.init)
            return
        theirs, ours = self.target.decoder, self.decoder.shape
        other = replace(theirs, num_layers=ours.num_layers)
        if name := next((item.name for item in fields(ours) if getattr(ours, item.name) != getattr(other, item.name)), None):
            sizes = f"{name} {getattr(ours, name)} is not the target's {getattr(other, name)}"
            raise UserError(f"drafter.init: 'target' copies whole layers, but {sizes}; set init: scratch or leave it out")
        source = load_decoder(target_folder, dtype=torch.float32)
        kept = [i * theirs.num_layers // ours.num_layers for i in range(ours.num_layers)]
        copied = source.state_dict()
        for new, old in enumerate(kept):
            prefix = f"layers.{old}."
            weights = {name.removeprefix(prefix): value for name, value in copied.items() if name.startswith(prefix)}
            self.decoder.layers[new].load_state_dict(weights)
        self.decoder.embed.load_state_dict(source.embed.state_dict())
        self.decoder.norm.load_state_dict(source.norm.state_dict())
        if self.decoder.lm_head is not None and source.lm_head is not None:
            self.decoder.lm_head.load_state_dict(source.lm_head.state_dict())

    def forward(self, batch: DraftBatch, divergence: Divergence) -> LossOutput:
        self.decoder.reserve_positions(batch.tokens_BT.shape[1])
        bias = document_bias(batch.document_BT, self.decoder.embed.weight.dtype)
        hidden_BTD, _ = self.decoder(batch.tokens_BT, batch.positions_BT, bias)
        counted_BT, target_ND, labels_N = batch.ahead(1)
        draft_ND, head = hidden_BTD[counted_BT], self._training_head
        return divergence(draft_ND, head, target_ND, batch.teacher_head, self.ids_K, labels_N=labels_N)

    def _training_head(self, hidden_ND: Tensor) -> Tensor:
        if self.ids_K is None:
            return self.decoder.head(hidden_ND)
        return F.linear(hidden_ND, self.decoder.head_weight[self.ids_K])

    def init_state(self, batch_size: int, slots: int, device: torch.device, dtype: torch.dtype) -> State:
        self.decoder.reserve_positions(slots)
        if self.ids_K is not None:  # once for all steps; in place, should a captured graph point to it
            rows_KD = self.decoder.head_weight.detach()[self.ids_K]
            self.head_KD = rows_KD if self.head_KD is None else self.head_KD.copy_(rows_KD)
        return {
            "cache": self.decoder.new_cache(batch_size, slots, device, dtype),
            # the token before the root is read again at each round's first step: after a full acceptance it was never fed
            "previous": torch.zeros(batch_size, dtype=torch.long, device=device),
        }

    def prefill(
        self,
        state: State,
        tokens_BT: Tensor,
        next_BT: Tensor,
        positions_BT: Tensor,
        taps_BTAD: Tensor | None,
        handle: TargetHandle,
        span: int,
    ) -> None:
        bias = causal_bias(positions_BT, span, state["cache"].dtype)
        self.decoder(tokens_BT, positions_BT, bias, state["cache"], positions_BT)
        state["previous"].copy_(tokens_BT[:, -1])

    def catch_up(
        self,
        state: State,
        tokens_BT: Tensor,
        next_BT: Tensor,
        positions_BT: Tensor,
        taps_BTAD: Tensor | None,
        handle: TargetHandle,
        span: int,
    ) -> None:
        # and the token before, which was never fed if it ended a draft that was accepted whole
        tokens_BT = torch.cat([state["previous"][:, None], tokens_BT], dim=1)
        positions_BT = torch.cat([positions_BT[:, :1] - 1, positions_BT], dim=1)
        self.prefill(state, tokens_BT, next_BT, positions_BT, taps_BTAD, handle, span)

    def step(self, state: State, frontier: Frontier, handle: TargetHandle, span: int) -> StepOutput:
        tokens, positions, ancestors = frontier.tokens_BF, frontier.positions_BF, frontier.ancestors_BFM
        root_B = positions[:, 0] - frontier.depth
        slots = positions if frontier.chain else root_B[:, None] + frontier.nodes_F
        if frontier.depth == 0:
            tokens = torch.cat([state["previous"][:, None], tokens], dim=1)
            positions = slots = torch.cat([positions - 1, positions], dim=1)
            ancestors = torch.cat([torch.zeros_like(ancestors), ancestors], dim=1)
        if frontier.chain:
            bias = causal_bias(positions, span, state["cache"].dtype)
        else:
            bias = tree_bias(root_B, ancestors, span, state["cache"].dtype)
        hidden, _ = self.decoder(tokens, positions, bias, state["cache"], slots)
        hidden = hidden[:, -frontier.tokens_BF.shape[1] :]
        if self.ids_K is None:
            return StepOutput(self.decoder.head(hidden), None, hidden)
        assert self.head_KD is not None  # from init_state
        return StepOutput(project(hidden, self.head_KD, None, self.decoder.streams), self.ids_K, hidden)

    def commit(
        self,
        state: State,
        path_BP: Tensor | None,
        tokens_BP: Tensor,
        next_BP: Tensor,
        counts_B: Tensor,
        root_B: Tensor,
        taps_BPAD: Tensor | None,
        handle: TargetHandle,
        span: int,
    ) -> None:
        if path_BP is not None:
            move_slots(state["cache"], root_B[:, None] + path_BP, root_B)
        last = tokens_BP.gather(1, (counts_B - 1).clamp(min=0)[:, None])[:, 0]
        state["previous"].copy_(torch.where(counts_B > 0, last, state["previous"]))

    def alone(self) -> Decoder | None:
        return self.decoder if self.ids_K is None else None

    def step_bytes(self, head_bytes: int) -> int:
        whole = self.decoder.step_bytes()
        if self.ids_K is None:
            return whole
        head_VD = self.decoder.head_weight
        return whole - (head_VD.shape[0] - len(self.ids_K)) * head_VD.shape[1] * head_VD.element_size()

    def config(self) -> dict[str, Any]:
        shape = self.decoder.shape
        return {
            "num_layers": shape.num_layers,
            "hidden_size": shape.hidden_size,
            "intermediate_size": shape.intermediate_size,
            "num_heads": shape.num_heads,
            "num_kv_heads": shape.num_kv_heads,
            "init": self.init,
            "draft_vocab": None if self.ids_K is None else self.ids_K.tolist(),
        }

    def layout_shapes(self, layout: str) -> Mapping[str, tuple[int, ...]]:
        return hf_shapes(self.decoder.shape)

    def export(self, folder: Path, dtype: torch.dtype, layout: str = "hf") -> None:
        save_decoder(self.decoder, folder, dtype, self.target.end_ids, self.target.pad_id)

    @classmethod
    def claims(cls, folder: Path) -> bool:
        """Any plain checkpoint of a layout our decoder covers."""
        if not (folder / "config.json").is_file():
            return False
        config = read_json(folder / "config.json")  # as it stands: transformers refuses one of a model that it does not know
        names = config.get("architectures") or [""]
        return str(config.get("model_type")) in LAYOUTS and isinstance(names, list) and str(names[0]).endswith("ForCausalLM")

    @classmethod
    def load(cls, folder: Path, target: TargetShape, config: Mapping[str, Any]) -> LMDraft:
        draft = cls(target, **{**config, "init": str(folder)})
        draft.decoder = load_decoder(folder)
        draft.init = str(config.get("init", folder))
        return draft.eval()
