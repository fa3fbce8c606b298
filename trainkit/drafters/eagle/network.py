"""EAGLE-3 (Li et al. 2025, arXiv 2503.01840): a decoder layer over three of the target's states, which drafts from its outputs.

At place t the layer reads the embedding of x_{t+1} beside a feature of place t: a mix of the target's tapped states there, or,
while drafting, its own output one level up. It names x_{t+2}. Training unrolls the drafting (the training-time test), so that
the layer meets its own features; no state of the target is imitated.
"""

# B batch  T places  D hidden  A taps  F frontier nodes  M drafted nodes  P path  K ids it may propose  V vocabulary

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
from trainkit.drafters.eagle import layouts
from trainkit.drafters.eagle.unrolled import Entry, attend
from trainkit.errors import UserError
from trainkit.layers.attention import Attention, causal_bias, fold_bias, rotary_table, slot_index, tree_bias
from trainkit.layers.blocks import GatedMLP
from trainkit.layers.heads import WIDEST, checked_vocab, last_accepted, trim_rows
from trainkit.layers.linear import Linear
from trainkit.layers.shape import DecoderShape
from trainkit.losses.chunked import target_choices
from trainkit.losses.output import combine_heads
from trainkit.models.load import load_decoder, read_tensors


class EagleLayer(nn.Module):
    """A decoder layer whose queries, keys and values read a token's embedding beside the feature, each normalised.

    The feature itself, not its norm, is the residual stream: the form that vLLM and SGLang both serve.
    """

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        D, eps = shape.hidden_size, shape.norm_eps
        self.embedding_norm, self.hidden_norm = nn.RMSNorm(D, eps=eps), nn.RMSNorm(D, eps=eps)
        self.attention = Attention(shape, input_size=2 * D)
        self.mlp_norm = nn.RMSNorm(D, eps=eps)
        self.mlp = GatedMLP(D, shape.intermediate_size)

    def forward(
        self, embedded_BTD: Tensor, feature_BTD: Tensor, rope: Tensor, bias: Tensor, cache: Tensor, slots: Tensor
    ) -> Tensor:
        """The next features [B, T, D], over a cache as in `Attention.forward`."""
        return self._rest(feature_BTD, self.attention(self._inputs(embedded_BTD, feature_BTD), rope, bias, cache, slots))

    def unrolled(
        self, embedded_BTD: Tensor, feature_BTD: Tensor, rope: Tensor, earlier: Sequence[Entry], document_BT: Tensor
    ) -> tuple[Tensor, Entry]:
        """The next features, and this step's keys and values, as step `len(earlier)` of the training-time test."""
        heads = self.attention.heads
        qk, v_BTGE = self.attention.projected(self._inputs(embedded_BTD, feature_BTD), rope)
        entry = (qk[:, :, heads:], v_BTGE)
        y_BTHE = attend(qk[:, :, :heads], [*earlier, entry], document_BT)
        return self._rest(feature_BTD, self.attention.out(y_BTHE.flatten(2))), entry

    def _inputs(self, embedded_BTD: Tensor, feature_BTD: Tensor) -> Tensor:
        return torch.cat([self.embedding_norm(embedded_BTD), self.hidden_norm(feature_BTD)], dim=-1)

    def _rest(self, feature_BTD: Tensor, attended_BTD: Tensor) -> Tensor:
        x = feature_BTD + attended_BTD
        return x + self.mlp(self.mlp_norm(x))


class Eagle(Drafter):
    """EAGLE-3.

    Args:
        target: Sizes of the target.
        taps: Target states that the feature is made of, indices of Hugging Face `hidden_states`, ascending, before the final
            norm; 2, L/2 and L - 3 by default (spread over all layers where there are fewer than 7).
        steps: Levels unrolled in training.
        decay: Step s weighs decay^s in the loss.
        intermediate_size: Width inside the layer's MLP; the target's by default.
        num_heads: Query heads; the target's by default.
        num_kv_heads: Key and value heads; the target's by default.
        rope: Rotary parameters as Hugging Face names them; the target's by default.
        norm_eps: Epsilon of the norms; the target's by default.
        draft_vocab: Token ids it may propose, ascending, or a JSON file of them (`trainkit vocab`); all by default.
    """

    max_width = WIDEST
    formats: ClassVar[Mapping[str, str]] = {"native": "flat", "vllm": "flat", "sglang": "flat", "speculators": "speculators"}

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
        super().__init__(target)
        layers, D, V = target.decoder.num_layers, target.decoder.hidden_size, target.decoder.vocab_size
        self.taps = tuple(taps) if taps is not None else layouts.default_taps(layers)
        if not self.taps or list(self.taps) != sorted(set(self.taps)) or not 0 <= self.taps[0] <= self.taps[-1] < layers:
            raise UserError(f"drafter.taps: {list(self.taps)} must be ascending, distinct and within 0 to {layers - 1}")
        if steps < 1:
            raise UserError(f"drafter.steps: {steps} must be at least 1")
        self.steps, self.decay = steps, decay
        self.shape = layouts.layer_shape(target.decoder, intermediate_size, num_heads, num_kv_heads, rope, norm_eps)
        self.register_buffer("ids_K", checked_vocab(draft_vocab, V), persistent=False)
        self.ids_K: Tensor | None
        self.fc = Linear(len(self.taps) * D, D, bias=False)
        self.layer = EagleLayer(self.shape)
        self.norm = nn.RMSNorm(D, eps=self.shape.norm_eps)
        self.lm_head = Linear(D, V if self.ids_K is None else len(self.ids_K), bias=False)
        self.register_buffer("rope", torch.empty(0, 2, self.shape.head_dim), persistent=False)
        self.rope: Tensor
        self.embedding_folder: Path | None = None
        self._draw()

    @torch.no_grad()
    def _draw(self) -> None:
        """Matrices from N(0, 0.02), those that write to the residual stream zero; the feature starts as the last tap."""
        for name, parameter in self.layer.named_parameters():
            if parameter.dim() > 1:
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.zeros_(parameter) if residual else nn.init.normal_(parameter, std=0.02)
        D = self.fc.weight.shape[0]
        self.fc.weight.zero_()[:, -D:].copy_(torch.eye(D))
        nn.init.normal_(self.lm_head.weight, std=0.02)

    @torch.no_grad()
    def initialise(self, target_folder: Path) -> None:
        source = load_decoder(target_folder, dtype=torch.float32, layers=False)
        self.lm_head.weight.copy_(source.head_weight if self.ids_K is None else source.head_weight[self.ids_K])
        self.norm.weight.copy_(source.norm.weight)

    def forward(self, batch: DraftBatch, divergence: Divergence) -> LossOutput:
        """The loss over all unrolled steps: sum over s of decay^s times step s's sum, with the step's labels as denominator.

        One denominator for all, as for every loss here (modules/base.py); where later steps count fewer predictions, next to a
        document's end or for want of vocabulary, they weigh less. The published code averages each by itself.

        Step s at place t reads x_{t+1+s} and names x_{t+2+s}. In training, places where the target's likeliest token lies
        outside the draft's vocabulary do not count; in validation they do, as they do when serving.
        """
        assert batch.taps_BTAD is not None
        dtype = self.fc.weight.dtype  # the target's may be a narrower one
        embedded_BTD = batch.handle.embed(batch.tokens_BT).to(dtype)
        feature_BTD = self.fc(batch.taps_BTAD.flatten(2).to(dtype))
        inside_BT = self._inside(batch) if self.training and self.ids_K is not None else None
        self._reserve(batch.tokens_BT.shape[1] + self.steps, feature_BTD)
        entries: list[Entry] = []
        outputs, counted = [], []
        for step in range(self.steps):
            rope = F.embedding(batch.positions_BT + step, self.rope.flatten(1)).unflatten(-1, self.rope.shape[1:])
            feature_BTD, entry = self.layer.unrolled(
                embedded_BTD.roll(-1 - step, 1), feature_BTD, rope, entries, batch.document_BT
            )
            entries.append(entry)
            ahead = step + 2
            counted_BT, target_ND, labels_N = batch.ahead(ahead)
            if inside_BT is not None:
                kept_N = inside_BT.roll(1 - ahead, 1)[counted_BT]
                counted_BT = counted_BT.masked_scatter(counted_BT, kept_N)
                target_ND, labels_N = target_ND[kept_N], labels_N[kept_N]
            hidden_ND = self.norm(feature_BTD[counted_BT])
            outputs.append(divergence(hidden_ND, self.lm_head, target_ND, batch.teacher_head, self.ids_K, labels_N=labels_N))
            counted.append((counted_BT, ahead))
        return combine_heads(outputs, [self.decay**step for step in range(self.steps)], counted)

    @torch.no_grad()
    def _inside(self, batch: DraftBatch) -> Tensor:
        """[B, T] whether the token that the target likes best after t is one that the draft may propose."""
        assert self.ids_K is not None
        choices_N = target_choices(batch.hidden_BTD.flatten(0, 1), batch.teacher_head, 1024)
        return torch.isin(choices_N, self.ids_K).view(batch.tokens_BT.shape)

    # Served: the entry of a text's place t is made of (x_{t+1}, target's states at t), so a round's root, at position R, has
    # the slot R - 1, and node i the slot R - 1 + i. The root is known when the round before it ends: its entry is made together
    # with those of the text that round accepted, and the first level of a draft costs a head alone.

    def init_state(self, batch_size: int, slots: int, device: torch.device, dtype: torch.dtype) -> State:
        self._reserve(slots, self.fc.weight)
        D, G, E = self.shape.hidden_size, self.shape.num_kv_heads, self.shape.head_dim
        return {
            "cache": torch.zeros(batch_size, 1, 2 * G, slots, E, device=device, dtype=dtype),
            # what came out at the root, and at each node of the level above
            "root": torch.zeros(batch_size, 1, D, device=device, dtype=dtype),
            "outputs": torch.zeros(batch_size, WIDEST, D, device=device, dtype=dtype),
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
        assert taps_BTAD is not None
        state["root"].copy_(self._read(state, next_BT, taps_BTAD, positions_BT, handle, span)[:, -1:])

    def step(self, state: State, frontier: Frontier, handle: TargetHandle, span: int) -> StepOutput:
        output_BFD = self._deeper(state, frontier, handle, span) if frontier.depth else state["root"]
        state["outputs"][:, : output_BFD.shape[1]].copy_(output_BFD)
        return StepOutput(self.lm_head(self.norm(output_BFD)), self.ids_K, output_BFD)

    def _deeper(self, state: State, frontier: Frontier, handle: TargetHandle, span: int) -> Tensor:
        """What comes out at the nodes of a level after the first [B, F, D]; each reads its parent's."""
        places_BF, outputs = frontier.positions_BF - 1, state["outputs"]
        feature_BFD = outputs.gather(1, frontier.parent_places_BF[..., None].expand(-1, -1, outputs.shape[2]))
        if frontier.chain:
            slots_BF, bias = places_BF, causal_bias(places_BF, span, feature_BFD.dtype)
        else:
            root_B = places_BF[:, 0] - frontier.depth
            slots_BF = root_B[:, None] + frontier.nodes_F
            bias = tree_bias(root_B, frontier.ancestors_BFM, span, feature_BFD.dtype)
        embedded_BFD = handle.embed(frontier.tokens_BF).to(feature_BFD.dtype)
        return self._layer(state, embedded_BFD, feature_BFD, places_BF, slots_BF, bias)

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
        assert taps_BPAD is not None
        # past the accepted path this writes what the next rounds write over, before anything looks there
        places_BP = root_B[:, None] + torch.arange(next_BP.shape[1], device=root_B.device)
        output_BPD = self._read(state, next_BP, taps_BPAD, places_BP, handle, span)
        state["root"].copy_(last_accepted(output_BPD, counts_B, state["root"]))

    def _read(
        self, state: State, next_BT: Tensor, taps_BTAD: Tensor, places_BT: Tensor, handle: TargetHandle, span: int
    ) -> Tensor:
        """Puts text into the cache, the target's states at places with the tokens one further on; what comes out [B, T, D]."""
        feature_BTD, bias = self.fc(taps_BTAD.flatten(2)), causal_bias(places_BT, span, taps_BTAD.dtype)
        return self._layer(state, handle.embed(next_BT).to(feature_BTD.dtype), feature_BTD, places_BT, places_BT, bias)

    def _layer(
        self, state: State, embedded_BTD: Tensor, feature_BTD: Tensor, places_BT: Tensor, slots_BT: Tensor, bias_BTS: Tensor
    ) -> Tensor:
        rope = F.embedding(places_BT, self.rope.flatten(1)).unflatten(-1, self.rope.shape[1:])
        bias, cache = fold_bias(bias_BTS, self.shape.num_heads // self.shape.num_kv_heads), state["cache"][:, 0]
        return self.layer(embedded_BTD, feature_BTD, rope, bias, cache, slot_index(slots_BT, cache))

    def _reserve(self, places: int, like: Tensor) -> None:
        if self.rope.shape[0] < places:
            self.rope = rotary_table(self.shape, places).to(device=like.device, dtype=like.dtype)

    def step_bytes(self, head_bytes: int) -> int:
        return sum(p.numel() * p.element_size() for name, p in self.named_parameters() if not name.startswith("fc."))

    def config(self) -> dict[str, Any]:
        return {
            "taps": list(self.taps),
            "steps": self.steps,
            "decay": self.decay,
            "intermediate_size": self.shape.intermediate_size,
            "num_heads": self.shape.num_heads,
            "num_kv_heads": self.shape.num_kv_heads,
            "rope": dict(self.shape.rope),
            "norm_eps": self.shape.norm_eps,
            "draft_vocab": None if self.ids_K is None else self.ids_K.tolist(),
        }

    # On disk: layouts.py

    def find_target(self, folder: Path) -> None:
        self.embedding_folder = folder

    def layout_shapes(self, layout: str) -> Mapping[str, tuple[int, ...]] | None:
        return layouts.shapes(self.shape, len(self.taps), self.lm_head.weight.shape[0], layout)

    def export(self, folder: Path, dtype: torch.dtype, layout: str = "flat") -> None:
        source, target = self.embedding_folder, self.target.decoder
        if source is None:
            raise UserError("the target is not where it lay in training, and its embedding goes along; name it by --target")
        tensors = layouts.to_file(self.state_dict(), self.shape, self.ids_K, layout)
        tensors["embed_tokens.weight"] = layouts.embedding(source)
        config = layouts.configuration(
            self.shape,
            self.taps,
            layouts.verifier(source, target),
            target,
            self.lm_head.weight.shape[0],
            layout,
            dtype,
            self.target.end_ids,
            (self.target.fingerprint or {}).get("path", ""),
        )
        layouts.write(folder, tensors, config, dtype)

    @classmethod
    def claims(cls, folder: Path) -> bool:
        return layouts.claimed(folder)

    @classmethod
    def load(cls, folder: Path, target: TargetShape, config: Mapping[str, Any]) -> Eagle:
        state, held_K = layouts.from_file(dict(read_tensors(folder)), folder)
        if not config:  # what an outside program trained
            trimmed = len(held_K) < target.decoder.vocab_size
            ids = held_K.tolist() if trimmed else None
            config = {**layouts.arguments(folder, target.decoder.num_layers), "draft_vocab": ids}
        made = cls(target, **config)
        state = trim_rows(state, "lm_head.", held_K, made.ids_K)
        for name, wanted in made.state_dict().items():
            if state[name].shape != wanted.shape:
                sizes = f"{list(state[name].shape)}, with this target it must be {list(wanted.shape)}"
                raise UserError(f"{folder}: {name} is {sizes}; give the target that it was trained for")
        made.to(state["fc.weight"].dtype).load_state_dict(state)
        made.embedding_folder = folder
        return made.eval()
