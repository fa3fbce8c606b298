"""The end of a round, one program per row: the accepted path of a draft, and the next root."""

# B batch  N nodes, root first  P path length, depth + 1  I end ids

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainkit.layers.kernels.launch import on_its_device


@triton.jit
def _walk_chain(
    choices,
    tokens,
    lengths,
    done,
    counts,
    N,
    choice_stride,
    token_stride,
    PLAIN: tl.constexpr,
    PACKED: tl.constexpr,
    NODES: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    count = 1
    if not PLAIN:
        # The path ends at the first node without a child that is its choice.
        node = tl.arange(0, NODES)
        inside = node + 1 < N
        if PACKED:
            inside &= node + 1 < tl.load(lengths + b)
        choice = tl.load(choices + b * choice_stride + node, mask=inside, other=0)
        child = tl.load(tokens + b * token_stride + node + 1, mask=inside, other=0)
        count += tl.min(tl.where(inside & (choice == child), NODES, node), axis=0)
    tl.store(counts + b, tl.where(tl.load(done + b), 0, count))


@triton.jit
def _walk_tree(
    choices,
    tokens,
    parents,
    done,
    paths,
    counts,
    emitted,
    N,
    P,
    choice_stride,
    token_stride,
    parent_stride,
    NODES: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    node = tl.arange(0, NODES)
    inside = node < N
    token = tl.load(tokens + b * token_stride + node, mask=inside, other=0)
    parent = tl.load(parents + b * parent_stride + node, mask=inside, other=0)
    inside &= node > 0
    # From each node on to the child that is its choice; past the path's end the node is the root again.
    at, count, alive = 0, 0, 1
    for depth in range(P):
        choice = tl.load(choices + b * choice_stride + at)
        tl.store(paths + b * P + depth, at)
        tl.store(emitted + b * P + depth, choice)
        count += alive
        child = tl.min(tl.where(inside & (parent == at) & (token == choice), node, NODES), axis=0)
        alive = tl.where(child < NODES, alive, 0)
        at = tl.where(alive > 0, child, 0)
    tl.store(counts + b, tl.where(tl.load(done + b), 0, count))


@triton.jit
def _move_root(
    emitted, counts, ends, limits, endless, token, position, done, P, I, emitted_stride, WIDTH: tl.constexpr, ENDS: tl.constexpr
):
    b = tl.program_id(0).to(tl.int64)
    count = tl.load(counts + b)
    column, end = tl.arange(0, WIDTH), tl.arange(0, ENDS)
    ids = tl.load(emitted + b * emitted_stride + column, mask=(column < P) & (column < count), other=-1)
    end_ids = tl.load(ends + end, mask=end < I, other=-2)
    ended = tl.max(tl.max((ids[:, None] == end_ids[None, :]).to(tl.int32), axis=1), axis=0)
    if count > 0:
        tl.store(token + b, tl.load(emitted + b * emitted_stride + count - 1))
    moved = tl.load(position + b) + count
    tl.store(position + b, moved)
    if ((ended > 0) & (tl.load(endless + b) == 0)) | (moved + 1 >= tl.load(limits + b)):
        tl.store(done + b, 1)


@on_its_device
def walk(
    choice_BN: Tensor,
    tokens_BN: Tensor,
    parents_BN: Tensor | None,
    done_B: Tensor,
    depth: int,
    lengths_B: Tensor | None = None,
    plain: bool = False,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The fields of a `Verdict` by the rule of `Coupled`: path [B, P], counts [B] and emitted tokens [B, P], all int64.

    A path goes on to the child that is the choice after its last node. As in `Coupled.verify`, the path is 0 past its end, and
    a chain has none: its emitted tokens are the choices. A row whose text has ended has a count of 0.

    Args:
        choice_BN: The target's choice after each node.
        tokens_BN: Tokens of the nodes, root first; siblings differ.
        parents_BN: Number of each node's parent, [1, N] if all rows are alike; None for a chain.
        done_B: True where the text has ended.
        depth: Longest path without the root.
        lengths_B: Number of nodes of each row of a chain where rows differ; the rest is padding.
        plain: Accept nothing: each row emits the choice after its root.
    """
    B, N = choice_BN.shape
    counts_B = torch.empty(B, device=choice_BN.device, dtype=torch.long)
    nodes = triton.next_power_of_2(N)
    assert choice_BN.stride(1) == 1 and done_B.is_contiguous() and (plain or tokens_BN.stride(1) == 1)
    if parents_BN is None:
        _walk_chain[(B,)](
            choice_BN,
            tokens_BN,
            counts_B if lengths_B is None else lengths_B,
            done_B,
            counts_B,
            N,
            choice_BN.stride(0),
            tokens_BN.stride(0),
            PLAIN=plain,
            PACKED=lengths_B is not None,
            NODES=nodes,
            num_warps=1,
        )
        return None, counts_B, choice_BN
    assert parents_BN.stride(1) == 1 and lengths_B is None and not plain
    path_BP, emitted_BP = (torch.empty(B, depth + 1, device=choice_BN.device, dtype=torch.long) for _ in range(2))
    _walk_tree[(B,)](
        choice_BN,
        tokens_BN,
        parents_BN,
        done_B,
        path_BP,
        counts_B,
        emitted_BP,
        N,
        depth + 1,
        choice_BN.stride(0),
        tokens_BN.stride(0),
        0 if len(parents_BN) == 1 else parents_BN.stride(0),
        NODES=nodes,
        num_warps=1,
    )
    return path_BP, counts_B, emitted_BP


@on_its_device
def move_root(
    emitted_BP: Tensor,
    counts_B: Tensor,
    end_ids_I: Tensor,
    limit_B: Tensor,
    ignore_end_B: Tensor,
    token_B: Tensor,
    position_B: Tensor,
    done_B: Tensor,
) -> None:
    """Makes the last emitted token the root, in `token_B` and `position_B`, and marks the rows whose text has ended.

    A text ends with a token of `end_ids_I`, unless `ignore_end_B`, or when it has `limit_B` tokens. A row with a count of 0
    keeps its root.
    """
    (B, P), I = emitted_BP.shape, len(end_ids_I)
    assert emitted_BP.stride(1) == 1 and all(
        x.is_contiguous() for x in (counts_B, limit_B, ignore_end_B, token_B, position_B, done_B)
    )
    _move_root[(B,)](
        emitted_BP,
        counts_B,
        end_ids_I,
        limit_B,
        ignore_end_B,
        token_B,
        position_B,
        done_B,
        P,
        I,
        emitted_BP.stride(0),
        WIDTH=triton.next_power_of_2(P),
        ENDS=triton.next_power_of_2(max(1, I)),
        num_warps=1,
    )
