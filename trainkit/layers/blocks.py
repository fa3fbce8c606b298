"""The decoder: norms, gated MLP, layers, and the stack with its embedding, cache and hidden-state taps.

Supports the layouts of Llama, Mistral, Qwen2 and Qwen3. Projections of the same input are stored as one matrix (q, k and v;
gate and up), in training and in the runner; `models/load.py` maps them to and from Hugging Face names.
"""

# B batch  T positions  D hidden  A taps  S cache slots  E head width  G key-value heads  L layers  Q packed positions

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainkit.layers import kernels
from trainkit.layers.attention import Attention, Context, KernelContext, Packing, Rotary
from trainkit.layers.linear import Blocked, Linear, project, weight_bytes
from trainkit.layers.norm import RMSNorm
from trainkit.layers.shape import DecoderShape
from trainkit.layers.visible import Visible


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up fused, gate first."""

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_up = Linear(hidden_size, 2 * intermediate_size, bias=bias)
        self.down = Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(shape.hidden_size, eps=shape.norm_eps)
        self.attention = Attention(shape)
        self.mlp_norm = RMSNorm(shape.hidden_size, eps=shape.norm_eps)
        self.mlp = GatedMLP(shape.hidden_size, shape.intermediate_size, shape.mlp_bias)

    def forward(self, x: Tensor, context: Context | KernelContext, cache: Tensor | None = None) -> Tensor:
        """[B, T, D] residual stream after the layer; over a cache as in `Attention.forward`."""
        if isinstance(context, KernelContext):
            from trainkit.layers import fused  # it needs Triton

            assert cache is not None
            return fused.layer(self, x, context, cache)
        x = x + self.attention(self.attention_norm(x), context, cache)
        return x + self.mlp(self.mlp_norm(x))


@torch.no_grad()
def draw_weights(network: nn.Module, residual_std: float, std: float = 0.02) -> None:
    """Draws matrices from N(0, std^2), those that write to the residual stream from N(0, residual_std^2); norms 1, biases 0."""
    for name, parameter in network.named_parameters():
        if parameter.dim() < 2:
            parameter.fill_(name.endswith("weight"))
        elif not name.endswith(("out.weight", "down.weight")):
            nn.init.normal_(parameter, std=std)
        else:
            nn.init.normal_(parameter, std=residual_std) if residual_std else nn.init.zeros_(parameter)


class Decoder(nn.Module):
    """A causal language model without its loss.

    Args:
        shape: Sizes; with `tied` the head is the embedding.
    """

    blocked: Blocked | None = None
    """The head in the blocked layout; set by `block_weights`."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(shape) for _ in range(shape.num_layers))
        self.norm = RMSNorm(shape.hidden_size, eps=shape.norm_eps)
        self.lm_head = None if shape.tied else nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        self.rope = Rotary(shape)

    def initialise(self, std: float = 0.02) -> None:
        """Draws the weights with `draw_weights`; the residual stream's have std / sqrt(2 L)."""
        draw_weights(self, std / (2 * self.shape.num_layers) ** 0.5, std)

    def reserve_positions(self, length: int) -> None:
        """Computes rotary rows for positions below `length`; it allocates, so call it before capturing a graph."""
        self.rope.reserve(length, self.embed.weight)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states after the final norm."""
        if kernels.available(hidden):
            from trainkit.layers import fused  # it needs Triton

            return fused.logits(hidden, self.head_weight)
        return project(hidden, self.head_weight, None, self.blocked)

    @property
    def head_weight(self) -> Tensor:
        """The output head [V, D]; the embedding if they are tied."""
        return self.embed.weight if self.lm_head is None else self.lm_head.weight

    def new_cache(self, batch_size: int, slots: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """A zeroed cache [B, L, 2G, slots, E], keys before values."""
        shape = self.shape
        return torch.zeros(
            batch_size, shape.num_layers, 2 * shape.num_kv_heads, slots, shape.head_dim, device=device, dtype=dtype
        )

    def forward(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor,
        seen: Visible | Tensor,
        cache: Tensor | None = None,
        slots_BT: Tensor | None = None,
        taps: Sequence[int] = (),
        packing: Packing | None = None,
        span: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states after the final norm [B, T, D], and the tapped hidden states [B, T, A, D] (None without taps).

        Args:
            tokens_BT: Token ids.
            positions_BT: Absolute positions, below the length given to `reserve_positions`.
            seen: What each query sees, of the cache or of the sequence itself; a tensor is an additive bias [B, T, S].
            cache: Cache from `new_cache`; written in place at `slots_BT`.
            slots_BT: Cache slots of the new keys and values.
            taps: Hidden states to return, indexed as Hugging Face `hidden_states`: 0 embeddings, i after i layers, the last
                (L or -1) after the final norm.
            packing: If given, tokens and hidden states are packed [1, Q]; positions, slots and `seen` are of the padded rows.
            span: Upper bound, known on the host, of the cache slots in use; all by default.
        """
        span = span if span or cache is None else cache.shape[3]
        context = self.rope.context(positions_BT, seen, slots_BT, span, packing)
        tapped = [tap % (self.shape.num_layers + 1) for tap in taps]
        if isinstance(context, KernelContext):
            from trainkit.layers import fused  # it needs Triton

            assert cache is not None
            return fused.decode(self, tokens_BT, context, cache, tapped)
        x, states = self.embed(tokens_BT), dict[int, Tensor]()
        for index, layer in enumerate(self.layers):
            if index in tapped:
                states[index] = x
            x = layer(x, context, None if cache is None else cache[:, index])
        x = states[self.shape.num_layers] = self.norm(x)
        return x, torch.stack([states[index] for index in tapped], dim=2) if taps else None

    def step_bytes(self) -> int:
        """Bytes of weights that a decoding step reads: all but an untied embedding, of which it reads one row per token."""
        total = weight_bytes(self)
        return total if self.lm_head is None else total - self.embed.weight.numel() * self.embed.weight.element_size()
