"""Runs a causal LM on packed rows so that no attention or recurrent state crosses documents, whatever its architecture.

transformers derives a block-diagonal causal mask from position ids that restart, but not for every architecture: some build
their own mask (OPT, BLOOM, MPT, GPT-OSS), and recurrent layers (Mamba, Jamba, ...) keep their state from one document to the
next. `crosses_documents` detects this by running the model. Such models read one document per row, padded at the end; the
causal mask hides the padding.
"""

# B packed rows  T positions  N documents  L longest document of a call  C channels

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Largest relative difference that rounding causes, by dtype; 0.1 for other dtypes. Mixing documents causes 0.3 to 1.5."""


@torch.no_grad()
def crosses_documents(backbone: Any, name: str) -> bool:
    """Whether the hidden states of a document depend on the documents before it in its row; if so, prints a line.

    Compares the second of two short documents, packed and alone, in eval mode.

    Args:
        backbone: The model without its output head.
        name: Name of the model in the message.
    """
    weight = backbone.get_input_embeddings().weight
    tokens_BT = torch.linspace(0, len(weight) - 1, 12, device=weight.device).long()[None]
    positions_BT = torch.cat([torch.arange(5), torch.arange(7)]).to(weight.device)[None]
    packed, alone = (
        backbone(input_ids=tokens, position_ids=positions, use_cache=False).last_hidden_state[0, -7:].double()
        for tokens, positions in ((tokens_BT, positions_BT), (tokens_BT[:, 5:], positions_BT[:, 5:]))
    )
    error = ((packed - alone).norm(dim=-1) / alone.norm(dim=-1)).max().item()
    crosses = not error <= _TOLERANCE.get(weight.dtype, 0.1)
    if crosses:
        print(f"{name}: {type(backbone).__name__} cannot separate packed documents; it runs one document per row, more slowly")
    return crosses


def run_documents_separately(run: Callable[[Tensor, Tensor], Tensor], tokens_BT: Tensor, document_BT: Tensor) -> Tensor:
    """[B, T, C] values of `run` for packed rows, each document computed alone; 0 at padding. Differentiable.

    Documents run in padded batches of similar length, of at most B x T tokens. All processes make the same number of calls,
    because calls of a sharded model are collective.

    Args:
        run: Maps token ids and positions [N, L] to values [N, L, C].
        tokens_BT: Token ids.
        document_BT: Document numbers, ascending within a row, -1 for padding at the end.
    """
    # First position and length of each document, the longest first.
    real_BT = document_BT >= 0
    first_BT = real_BT.clone()
    first_BT[:, 1:] &= document_BT[:, 1:] != document_BT[:, :-1]
    starts_N = first_BT.flatten().nonzero().squeeze(-1)
    number_T = (first_BT.flatten().cumsum(0) - 1)[real_BT.flatten()]
    lengths_N, order_N = number_T.bincount(minlength=len(starts_N)).sort(descending=True)
    starts_N, lengths = starts_N[order_N], lengths_N.tolist()
    # Batches: as many documents as fit if each is padded to the longest.
    bounds = [0]
    while bounds[-1] < len(lengths):
        bounds.append(min(bounds[-1] + max(1, tokens_BT.numel() // lengths[bounds[-1]]), len(lengths)))
    calls = torch.tensor(max(1, len(bounds) - 1), device=tokens_BT.device)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(calls, dist.ReduceOp.MAX)
    bounds += [len(lengths)] * (int(calls) + 1 - len(bounds))
    # Run them; a call without documents reads one token, whose values are not used.
    parts, indices = [], []
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        longest = lengths[start] if start < stop else 1
        steps_L = torch.arange(longest, device=tokens_BT.device)
        first_N = starts_N[start:stop] if start < stop else starts_N.new_zeros(1)
        used_NL = steps_L < (lengths_N[start:stop, None] if start < stop else 0)
        index_NL = (first_N[:, None] + steps_L).clamp(max=tokens_BT.numel() - 1)
        values_NLC = run(tokens_BT.flatten()[index_NL], steps_L.expand(index_NL.shape))
        parts.append(values_NLC[used_NL.expand(index_NL.shape)])
        indices.append(index_NL[used_NL.expand(index_NL.shape)])
    values = torch.cat(parts)
    return (
        values.new_zeros(tokens_BT.numel(), values.shape[-1])
        .index_copy(0, torch.cat(indices), values)
        .unflatten(0, tokens_BT.shape)
    )
