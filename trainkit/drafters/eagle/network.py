"""EAGLE-3 (Li et al. 2025, arXiv 2503.01840): a decoder layer over the target's hidden states that drafts from its outputs.

At position t the layer reads the embedding of x_{t+1} beside a feature of position t: a linear mix of hidden states of the
target or, while drafting, the layer's own output one level up. It predicts x_{t+2}. Training unrolls the drafting (the paper's
training-time test), so that the layer also learns from its own features. No loss makes it imitate hidden states of the target.
"""

# B batch  T positions  D hidden  A taps  F frontier nodes  P path  K ids it may propose  V vocabulary  G key-value heads

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trainkit.drafters.base import WIDEST, Accepted, Chunk, Divergence, DraftBatch, Drafter, Frontier, State, StepOutput
from trainkit.drafters.eagle import layouts
from trainkit.drafters.eagle.unrolled import Entry, attend
from trainkit.errors import UserError
from trainkit.layers.attention import Attention, Context, KernelContext, Rotary
from trainkit.layers.blocks import GatedMLP, draw_weights
from trainkit.layers.linear import Linear, weight_bytes
from trainkit.layers.norm import RMSNorm
from trainkit.layers.shape import DecoderShape
from trainkit.layers.visible import Visible
from trainkit.layers.vocabulary import trim_rows
from trainkit.losses.output import LossOutput
from trainkit.models.load import rope_fault, with_supported_rope
from trainkit.models.shape import TargetHandle, TargetShape
from trainkit.models.target import FrozenTarget
from trainkit.models.weights import read_tensors


class EagleLayer(nn.Module):
    """A decoder layer whose queries, keys and values read a token's embedding beside the feature, each normalised.

    The residual stream is the feature itself, not its norm: the form that vLLM and SGLang both serve.
    """

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        D, eps = shape.hidden_size, shape.norm_eps
        self.embedding_norm, self.hidden_norm = RMSNorm(D, eps=eps), RMSNorm(D, eps=eps)
        self.attention = Attention(shape, input_size=2 * D)
        self.mlp_norm = RMSNorm(D, eps=eps)
        self.mlp = GatedMLP(D, shape.intermediate_size)

    def forward(self, embedded_BTD: Tensor, feature_BTD: Tensor, context: Context | KernelContext, cache: Tensor) -> Tensor:
        """The next features [B, T, D], over a cache as in `Attention.forward`."""
        if isinstance(context, KernelContext):
            from trainkit.layers import fused  # it needs Triton

            residual_MD = feature_BTD.flatten(0, 1).clone()
            inputs_MD = self._inputs(embedded_BTD, feature_BTD).flatten(0, 1)
            parts_SMD = fused.layer_parts(residual_MD, inputs_MD, self, context, cache)
            return fused.total(residual_MD, parts_SMD).view_as(feature_BTD)
        return self._residual(feature_BTD, self.attention(self._inputs(embedded_BTD, feature_BTD), context, cache))

    def unrolled(
        self, embedded_BTD: Tensor, feature_BTD: Tensor, rope: Tensor, earlier: Sequence[Entry], document_BT: Tensor
    ) -> tuple[Tensor, Entry]:
        """Unrolled step number `len(earlier)`: the next features [B, T, D], and this step's keys and values."""
        heads = self.attention.heads
        qk, v_BTGE = self.attention.projected(self._inputs(embedded_BTD, feature_BTD), rope)
        entry = (qk[:, :, heads:], v_BTGE)
        y_BTHE = attend(qk[:, :, :heads], [*earlier, entry], document_BT)
        return self._residual(feature_BTD, self.attention.out(y_BTHE.flatten(2))), entry

    def _inputs(self, embedded_BTD: Tensor, feature_BTD: Tensor) -> Tensor:
        return torch.cat([self.embedding_norm(embedded_BTD), self.hidden_norm(feature_BTD)], dim=-1)

    def _residual(self, feature_BTD: Tensor, attended_BTD: Tensor) -> Tensor:
        x = feature_BTD + attended_BTD
        return x + self.mlp(self.mlp_norm(x))


class Eagle(Drafter):
    """EAGLE-3.

    Args:
        target: Sizes of the target; defaults for the sizes below.
        taps: Hidden states of the target that are mixed into the feature: indices of Hugging Face `hidden_states`, ascending,
            before the final norm; 2, L/2 and L - 3 by default (spread over all layers if there are fewer than 7).
        steps: Unrolled steps in training.
        decay: Weight of step s in the loss is decay^s.
        intermediate_size: Width inside the layer's MLP; the target's by default.
        num_heads: Query heads; the target's by default.
        num_kv_heads: Key and value heads; the target's by default.
        rope: Rotary parameters as Hugging Face names them; the target's by default, or plain ones if those are not supported.
        norm_eps: Epsilon of the norms; the target's by default.
        draft_vocab: Token ids it may propose, ascending, or a JSON file of them (`trainkit vocab`); all by default.
    """

    max_width = WIDEST
    resumable = True
    formats: ClassVar[Mapping[str, str]] = {"native": "flat", "vllm": "flat", "sglang": "flat", "speculators": "speculators"}
    names_target: ClassVar[frozenset[str]] = frozenset({"speculators"})

    def __init__(
        self,
        target: TargetShape,
        *,
        taps: list[int] | None = None,
        steps: int = 7,
        decay: float = 0.8,
        intermediate_size: int | None = None,
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        rope: dict[str, Any] | None = None,
        norm_eps: float | None = None,
        draft_vocab: list[int] | str | None = None,
    ) -> None:
        super().__init__(target, draft_vocab)
        decoder = target.decoder
        layers, D = decoder.num_layers, decoder.hidden_size
        self.taps = tuple(taps) if taps is not None else layouts.default_taps(layers)
        if not self.taps or list(self.taps) != sorted(set(self.taps)) or not 0 <= self.taps[0] <= self.taps[-1] < layers:
            raise UserError(f"drafter.taps: {list(self.taps)} must be ascending, distinct and within 0 to {layers - 1}")
        if steps < 1:
            raise UserError(f"drafter.steps: {steps} must be at least 1")
        self.steps, self.decay = steps, decay
        shape = replace(  # one layer in Llama's layout, without the attention biases and norms that a target may have
            decoder,
            num_layers=1,
            intermediate_size=intermediate_size or decoder.intermediate_size,
            num_heads=num_heads or decoder.num_heads,
            num_kv_heads=num_kv_heads or decoder.num_kv_heads,
            qkv_bias=False,
            out_bias=False,
            mlp_bias=False,
            qk_norm=False,
            tied=False,
            rope=dict(rope or decoder.rope),
            norm_eps=norm_eps or decoder.norm_eps,
        )
        if rope and (fault := rope_fault(shape)):
            raise UserError(f"drafter.rope: {fault}")
        self.shape = with_supported_rope(shape)
        self.fc = Linear(len(self.taps) * D, D, bias=False)
        self.layer = EagleLayer(self.shape)
        self.norm = RMSNorm(D, eps=self.shape.norm_eps)
        self.lm_head = Linear(D, self.draft_vocab_size, bias=False)
        self.rope = Rotary(self.shape)
        self.embedding_folder: Path | None = None
        # The feature starts as the last tap, and the layer adds nothing to it.
        draw_weights(self.layer, residual_std=0.0)
        with torch.no_grad():
            self.fc.weight.zero_()[:, -D:].copy_(torch.eye(D))
        nn.init.normal_(self.lm_head.weight, std=0.02)

    @torch.no_grad()
    def initialise(self, target: FrozenTarget) -> None:
        self.lm_head.weight.copy_(target.head_weight if self.ids_K is None else target.head_weight[self.ids_K])
        self.norm.weight.copy_(target.norm_weight())

    def forward(self, batch: DraftBatch, divergence: Divergence) -> LossOutput:
        """Sum over steps s of decay^s * (loss sum of step s); the denominator is the number of labels counted in all steps.

        Step s at position t reads x_{t+1+s} and predicts x_{t+2+s}. All steps share one denominator, as in every loss here
        (modules/base.py), so a step that counts fewer predictions, near the end of a document or with a trimmed vocabulary,
        weighs less. The published code averages each step separately.

        In training, positions whose likeliest target token is outside the draft vocabulary do not count; in validation they
        count, as in serving.
        """
        assert batch.taps_BTAD is not None
        dtype = self.fc.weight.dtype  # the target may be bfloat16
        embedded_BTD = batch.handle.embed(batch.tokens_BT).to(dtype)
        feature_BTD = self.fc(batch.taps_BTAD.flatten(2).to(dtype))
        self.rope.reserve(batch.tokens_BT.shape[1] + self.steps, feature_BTD)
        entries: list[Entry] = []
        hidden, counted = [], []
        for step in range(self.steps):
            # Features of this level, from the tokens one further on and the features of the level above
            rope, next_BTD = self.rope.rows(batch.positions_BT + step), embedded_BTD.roll(-1 - step, 1)
            feature_BTD, entry = self.layer.unrolled(next_BTD, feature_BTD, rope, entries, batch.document_BT)
            entries.append(entry)
            counted.append((batch.label_mask(step + 2), step + 2))
            hidden.append(self.norm(feature_BTD[counted[-1][0]]))
        return batch.heads_loss(divergence, hidden, self.lm_head, counted, self.ids_K, self.decay, target_in_ids=self.training)

    # Serving: the cache entry of position t is made of x_{t+1} and the target's hidden states at t. So the root, at position R,
    # has slot R - 1, and node i has slot R - 1 + i. The root is known when the round before it ends: its entry is made together
    # with the entries of the path accepted in that round, and the first level of a draft needs only the head.

    def init_state(self, batch_size: int, slots: int, device: torch.device, dtype: torch.dtype) -> State:
        self.rope.reserve(slots, self.fc.weight)
        D, G, E = self.shape.hidden_size, self.shape.num_kv_heads, self.shape.head_dim
        return {
            "cache": torch.zeros(batch_size, 2 * G, slots, E, device=device, dtype=dtype),
            # outputs of the layer, at the root and at each node of the level above
            "root": torch.zeros(batch_size, 1, D, device=device, dtype=dtype),
            "outputs": torch.zeros(batch_size, WIDEST, D, device=device, dtype=dtype),
        }

    def prefill(self, state: State, chunk: Chunk, handle: TargetHandle, span: int) -> None:
        output_BTD = self._read(state, chunk.next_BT, chunk.taps_BTAD, chunk.positions_BT, handle, span)
        state["root"].copy_(chunk.last(output_BTD))

    def step(self, state: State, frontier: Frontier, handle: TargetHandle, span: int) -> StepOutput:
        output_BFD = self._deeper(state, frontier, handle, span) if frontier.depth else state["root"]
        state["outputs"][:, : output_BFD.shape[1]].copy_(output_BFD)
        return StepOutput(self.lm_head(self.norm(output_BFD)), self.ids_K, output_BFD)

    def _deeper(self, state: State, frontier: Frontier, handle: TargetHandle, span: int) -> Tensor:
        """Outputs [B, F, D] at the nodes of a level below the root; each reads its parent's output as its feature."""
        feature_BFD = frontier.gather_parents(state["outputs"])
        context = self.rope.context(frontier.positions_BF - 1, frontier.visible(-1), frontier.slots_BF - 1, span)
        return self.layer(handle.embed(frontier.tokens_BF).to(feature_BFD.dtype), feature_BFD, context, state["cache"])

    def commit(self, state: State, accepted: Accepted, handle: TargetHandle, span: int) -> None:
        # nodes past the accepted path are cached too; the next rounds overwrite them before any query sees them
        output_BPD = self._read(state, accepted.next_BP, accepted.taps_BPAD, accepted.positions_BP, handle, span)
        state["root"].copy_(accepted.last(output_BPD, state["root"]))

    def _read(
        self, state: State, next_BT: Tensor, taps_BTAD: Tensor | None, positions_BT: Tensor, handle: TargetHandle, span: int
    ) -> Tensor:
        """Outputs [B, T, D] for text whose target hidden states are known; their keys and values go into the cache."""
        assert taps_BTAD is not None
        feature_BTD = self.fc(taps_BTAD.flatten(2))
        context = self.rope.context(positions_BT, Visible.causal(positions_BT), positions_BT, span)
        return self.layer(handle.embed(next_BT).to(feature_BTD.dtype), feature_BTD, context, state["cache"])

    def step_bytes(self, head_bytes: int) -> int:
        return super().step_bytes(head_bytes) - weight_bytes(self.fc)  # fc runs in `commit`

    # Files: layouts.py

    def config(self) -> dict[str, Any]:
        sizes = ("intermediate_size", "num_heads", "num_kv_heads", "norm_eps")
        values = {name: getattr(self.shape, name) for name in sizes} | {"rope": dict(self.shape.rope)}
        own = {"taps": list(self.taps), "steps": self.steps, "decay": self.decay, "draft_vocab": self.draft_vocab}
        return own | values

    def use_target_folder(self, folder: Path) -> None:
        self.embedding_folder = folder

    def check_format(self, format: str) -> None:
        if format == "sglang" and len(self.taps) == 1:
            raise UserError(
                "--format sglang: SGLang skips fc if a drafter has a single tap, like this one; export it for vllm, or train "
                "it with several taps"
            )

    def layout_shapes(self, layout: str) -> Mapping[str, tuple[int, ...]] | None:
        return layouts.shapes(self.shape, len(self.taps), self.lm_head.weight.shape[0], layout)

    def export(self, folder: Path, dtype: torch.dtype, layout: str = "flat") -> None:
        source = self.embedding_folder
        if source is None:
            raise UserError(
                "the target is not in the folder that it had in training, and EAGLE-3's files contain its embedding; "
                "name its folder with --target"
            )
        tensors = layouts.to_file(self.state_dict(), self.shape, self.ids_K, layout)
        tensors["embed_tokens.weight"] = layouts.embedding(source)
        name = self.target_name or (None if layouts.is_eagle(source) else str(source.resolve()))
        config = layouts.configuration(
            self.shape, self.taps, self.target, source, self.lm_head.weight.shape[0], layout, dtype, name
        )
        layouts.write(folder, tensors, config, dtype)

    @classmethod
    def claims(cls, folder: Path) -> bool:
        return layouts.is_eagle(folder)

    @classmethod
    def load(cls, folder: Path, target: TargetShape, config: Mapping[str, Any]) -> Eagle:
        weights, ids_K = layouts.from_file(dict(read_tensors(folder)), folder, target.decoder.vocab_size)
        if not config:  # written by another program
            trimmed = len(ids_K) < target.decoder.vocab_size
            ids = ids_K.tolist() if trimmed else None
            config = {**layouts.arguments(folder, target.decoder.num_layers), "draft_vocab": ids}
        drafter = cls(target, **config)
        weights = trim_rows(weights, ids_K, drafter.ids_K)
        for name, expected in drafter.state_dict().items():
            if weights[name].shape != expected.shape:
                sizes = f"has shape {list(weights[name].shape)}, this target requires {list(expected.shape)}"
                raise UserError(f"{folder}: {name} {sizes}; give the target that it was trained for")
        drafter.to(weights["fc.weight"].dtype).load_state_dict(weights)
        drafter.embedding_folder = folder
        return drafter.eval()
