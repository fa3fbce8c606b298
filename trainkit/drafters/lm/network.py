"""A small decoder with the target's tokenizer, trained by distillation (METHODS: Direct Alignment, FastDraft).

Left out on purpose: the target's hidden states. Without them the export is an ordinary model that any engine serves.
"""

# B batch  T positions  D hidden  F frontier nodes  M numbered nodes  S cache slots  K ids it may propose

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from trainkit.bundle import read_json
from trainkit.drafters.base import Accepted, Chunk, Divergence, DraftBatch, Drafter, Frontier, State, StepOutput
from trainkit.errors import UserError
from trainkit.layers.attention import document_bias, move_slots
from trainkit.layers.blocks import Decoder
from trainkit.layers.linear import project
from trainkit.layers.visible import Visible
from trainkit.losses.output import LossOutput
from trainkit.models.compressed import dense_tensors
from trainkit.models.load import (
    LAYOUTS,
    check_covered,
    copy_weights,
    decoder_shape,
    hf_shapes,
    load_decoder,
    note_other_tokenizer,
    read_config,
    save_decoder,
    with_supported_rope,
)
from trainkit.models.shape import TargetHandle, TargetShape
from trainkit.models.target import FrozenTarget


class LMDraft(Drafter):
    """A decoder-only draft model.

    Args:
        target: Sizes of the target; defaults for the sizes below.
        num_layers: Decoder layers.
        hidden_size: Hidden size; the target's by default.
        intermediate_size: Width inside the MLP; scaled with the hidden size by default.
        num_heads: Query heads; by default as many as fit at the target's head width.
        num_kv_heads: Key-value heads; by default as many as the target has, at most `num_heads`.
        init: `scratch` draws random weights. `target` copies the target's embedding, head and every n-th layer, and needs the
            target's hidden size. Anything else is a Hugging Face folder whose weights and sizes are used.
        draft_vocab: Token ids it may propose, ascending, or a JSON file of them (`trainkit vocab`); all by default. Serving
            then reads and computes only these rows of the head (VocabTrim, arXiv 2506.22694); weights and exports contain the
            whole head. `trainkit trim` chooses the ids.
    """

    resumable = True
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
        super().__init__(target, draft_vocab)
        shape = target.decoder
        if init in ("scratch", "target"):
            width = hidden_size or shape.hidden_size
            heads = num_heads or max(1, width // shape.head_dim)
            kv_heads = num_kv_heads or next(g for g in range(min(shape.num_kv_heads, heads), 0, -1) if heads % g == 0)
            inner = intermediate_size or shape.intermediate_size * width // shape.hidden_size
            shape = replace(
                shape, num_layers=num_layers, hidden_size=width, intermediate_size=inner, num_heads=heads, num_kv_heads=kv_heads
            )
            shape = with_supported_rope(shape) if init == "scratch" else shape
        else:
            config = read_config(init)
            check_covered(config, init, 0)
            shape = decoder_shape(config)
            if shape.vocab_size != target.decoder.vocab_size:
                sizes = f"vocabulary of {shape.vocab_size} ids, the target's has {target.decoder.vocab_size}"
                raise UserError(f"{init}: {sizes}; choose a model with the target's vocabulary")
        self.init = init
        self.start_id: int | None = None
        self.decoder = Decoder(shape)
        self.decoder.initialise()
        self.register_buffer("head_KD", None, persistent=False)
        self.head_KD: Tensor | None  # rows of the head for serving, if the vocabulary is trimmed

    def initialise(self, target: FrozenTarget) -> None:
        if self.init == "scratch":
            return
        if self.init != "target":
            note_other_tokenizer(self.init, target.folder)
            copy_weights(self.decoder, dense_tensors(self.init, torch.float32), self.init)
            return
        # Sizes: all but the number of layers must be the target's
        theirs, ours = self.target.decoder, self.decoder.shape
        needed = replace(theirs, num_layers=ours.num_layers)
        if name := next((item.name for item in fields(ours) if getattr(ours, item.name) != getattr(needed, item.name)), None):
            sizes = f"{name} {getattr(ours, name)} is not the target's {getattr(needed, name)}"
            raise UserError(f"drafter.init: 'target' copies whole layers, but {sizes}; set init: scratch, or leave {name} out")
        # Weights: every n-th layer, and everything outside the layers
        source = load_decoder(target.folder, dtype=torch.float32, packed=False)
        for index, layer in enumerate(self.decoder.layers):
            layer.load_state_dict(source.layers[index * theirs.num_layers // ours.num_layers].state_dict())
        self.decoder.embed.load_state_dict(source.embed.state_dict())
        self.decoder.norm.load_state_dict(source.norm.state_dict())
        if self.decoder.lm_head is not None and source.lm_head is not None:
            self.decoder.lm_head.load_state_dict(source.lm_head.state_dict())

    def forward(self, batch: DraftBatch, divergence: Divergence) -> LossOutput:
        self.decoder.reserve_positions(batch.tokens_BT.shape[1])
        bias = document_bias(batch.document_BT, self.decoder.embed.weight.dtype)
        hidden_BTD, _ = self.decoder(batch.tokens_BT, batch.positions_BT, bias)
        counted_BT, target_ND, labels_N = batch.training_targets(1)
        draft_ND, head = hidden_BTD[counted_BT], self._training_head
        return divergence(draft_ND, head, target_ND, batch.teacher_head, self.ids_K, labels_N=labels_N)

    def _training_head(self, hidden_ND: Tensor) -> Tensor:
        if self.ids_K is None:
            return self.decoder.head(hidden_ND)
        return F.linear(hidden_ND, self.decoder.head_weight[self.ids_K])

    # Serving: the token at position t is cached in slot t. The deepest draft token was proposed but never fed. If it is
    # accepted, the cache lacks it; so `step` at depth 0, and `prefill` past position 0, also read the token before theirs.

    def init_state(self, batch_size: int, slots: int, device: torch.device, dtype: torch.dtype) -> State:
        self.decoder.reserve_positions(slots)
        self._take_head_rows()
        return {
            "cache": self.decoder.new_cache(batch_size, slots, device, dtype),
            "previous": torch.zeros(batch_size, 1, dtype=torch.long, device=device),  # the token before the root
        }

    def _take_head_rows(self) -> None:
        if self.ids_K is not None:  # copied in place: a captured graph may hold the tensor
            with torch.inference_mode(False):  # so that later copies change its version, which `Blocked` reads
                rows_KD = self.decoder.head_weight.detach()[self.ids_K]
            self.head_KD = rows_KD if self.head_KD is None else self.head_KD.copy_(rows_KD)

    def copy_weights(self, tensors: Mapping[str, Tensor]) -> None:
        super().copy_weights(tensors)
        self._take_head_rows()

    def prefill(self, state: State, chunk: Chunk, handle: TargetHandle, span: int) -> None:
        tokens_BT, positions_BT = chunk.tokens_BT, chunk.positions_BT
        if chunk.continues:
            tokens_BT = torch.cat([state["previous"], tokens_BT], dim=1)
            positions_BT = torch.cat([positions_BT[:, :1] - 1, positions_BT], dim=1)
        self.decoder(tokens_BT, positions_BT, Visible.causal(positions_BT), state["cache"], positions_BT, span=span)
        state["previous"].copy_(chunk.last(chunk.tokens_BT))

    def resume(self, state: State, previous_B1: Tensor) -> None:
        state["previous"].copy_(previous_B1)

    def step(self, state: State, frontier: Frontier, handle: TargetHandle, span: int) -> StepOutput:
        tokens, positions, slots, visible = frontier.tokens_BF, frontier.positions_BF, frontier.slots_BF, frontier.visible()
        if frontier.depth == 0:  # the token before the root, and the root
            tokens = torch.cat([state["previous"], tokens], dim=1)
            positions = slots = torch.cat([positions - 1, positions], dim=1)
            visible = Visible.causal(positions)
        hidden, _ = self.decoder(tokens, positions, visible, state["cache"], slots, span=span)
        hidden = hidden[:, -frontier.tokens_BF.shape[1] :]
        if self.ids_K is None:
            return StepOutput(self.decoder.head(hidden), None, hidden)
        assert self.head_KD is not None  # from init_state
        return StepOutput(project(hidden, self.head_KD, None, self.decoder.blocked), self.ids_K, hidden)

    def commit(self, state: State, accepted: Accepted, handle: TargetHandle, span: int) -> None:
        if accepted.path_BP is not None:
            move_slots(state["cache"], accepted.root_B[:, None] + accepted.path_BP, accepted.root_B)
        state["previous"].copy_(accepted.last(accepted.tokens_BP, state["previous"]))

    def standalone_decoder(self) -> Decoder | None:
        return self.decoder if self.ids_K is None else None

    def step_bytes(self, head_bytes: int) -> int:
        total = self.decoder.step_bytes()
        if self.ids_K is None:
            return total
        head_VD = self.decoder.head_weight
        return total - (head_VD.shape[0] - len(self.ids_K)) * head_VD.shape[1] * head_VD.element_size()

    # Files: a plain Hugging Face checkpoint

    def config(self) -> dict[str, Any]:
        sizes = ("num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads")
        values = {name: getattr(self.decoder.shape, name) for name in sizes}
        return values | {"init": self.init, "draft_vocab": self.draft_vocab}

    def use_target_folder(self, folder: Path) -> None:
        self.start_id = read_json(folder / "config.json").get("bos_token_id")

    def fill_untrained(self) -> None:
        """Sets the rows of the head outside `draft_vocab`, which training never reached, to the mean of those inside.

        Other programs use the whole head. With the mean, the logits of untrained ids are the mean of the trained logits and so
        never the largest; initial values could be. A tied head becomes a separate tensor.
        """
        if self.ids_K is None:
            return
        weight_VD = self.decoder.head_weight.detach().clone()
        trained_KD = weight_VD[self.ids_K]
        weight_VD[:] = trained_KD.mean(0)
        weight_VD[self.ids_K] = trained_KD
        weights = {**self.decoder.state_dict(), "lm_head.weight": weight_VD}
        self.decoder = Decoder(replace(self.decoder.shape, tied=False)).to(weight_VD.dtype)
        self.decoder.load_state_dict(weights)

    def layout_shapes(self, layout: str) -> Mapping[str, tuple[int, ...]]:
        return hf_shapes(self.decoder.shape)

    def export(self, folder: Path, dtype: torch.dtype, layout: str = "hf") -> None:
        save_decoder(self.decoder, folder, dtype, self.target.end_ids, self.target.pad_id, self.start_id)

    @classmethod
    def claims(cls, folder: Path) -> bool:
        """Whether the folder is a plain checkpoint of a model type that our decoder covers."""
        if not (folder / "config.json").is_file():
            return False
        config = read_json(folder / "config.json")  # not through transformers, which refuses unknown model types
        names = config.get("architectures") or [""]
        return str(config.get("model_type")) in LAYOUTS and isinstance(names, list) and str(names[0]).endswith("ForCausalLM")

    @classmethod
    def load(cls, folder: Path, target: TargetShape, config: Mapping[str, Any]) -> LMDraft:
        drafter = cls(target, **{**config, "init": str(folder)})
        drafter.decoder = load_decoder(folder)
        drafter.init = str(config.get("init", folder))
        return drafter.eval()
