"""Ranks of the target's tokens among a drafter's proposals, at every depth and from every position of a text.

The drafter is replayed, teacher-forced, along the target's own text. From each position it drafts a chain that is forced to the
text's tokens, so that every node's parent is correct, and the rank of the next token among its proposals is recorded. A static
tree needs nothing else: its node is accepted where the node's rank path equals the text's. One replay therefore gives the
rounds of every tree (`simulate_decoding`) and the accuracies that trees are searched with (`accuracies`), for any drafter kind,
whether or not its heads read their parents' tokens.
"""

# B rows  T positions  A taps  D levels  V vocabulary  K ids it may propose  W ranks  L text length  P path length

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trainkit.drafters.base import Accepted, Chunk, Frontier, StepOutput
from trainkit.errors import UserError
from trainkit.layers.visible import Visible
from trainkit.runner import Runner, Stats
from trainkit.runner.policies.cost_model import isotonic
from trainkit.runner.sampling import CHOICE, Sampling, gumbel, request_keys
from trainkit.runner.trees.shape import RankPath

Pair = tuple[Sequence[int], Sequence[int]]
"""Token ids of a prompt, and those of its answer."""
PAST_END = -1
"""In place of a rank past the end of the text."""

Ranks = np.ndarray
"""[L - 1, D] for one text: [i, d] is the rank of token i + 1 + d among the proposals at depth d, with token i as the root.

The rank is W if the token is not among the first W proposals, and `PAST_END` past the end of the text.
"""


@torch.inference_mode()
def replay_ranks(
    runner: Runner,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    depth: int,
    width: int,
    temperature: float = 0.0,
    seed: int = 0,
    batch: int = 16,
) -> list[Ranks]:
    """The ranks of every text, as coupled verification would compare them.

    Args:
        runner: Runner with a drafter.
        prompts: Token ids of each prompt.
        texts: The runner's answer to each prompt, at this temperature and seed.
        depth: Number of levels to draft, D; at most the drafter's `max_depth`.
        width: Number of ranks that are distinguished, W.
        temperature: Sampling temperature; above 0, draft and target are ranked with the noise that they share.
        seed: Seed of that noise; the prompt's index is part of its key, as in `Runner.generate`.
        batch: Number of texts replayed together.

    Raises:
        UserError: the drafter proposes among fewer than `width` ids.
    """
    from tqdm import tqdm

    ranks: list[Ranks] = []
    for start in tqdm(range(0, len(prompts), batch), desc="replaying", unit=" batches", disable=None, delay=2):
        rows = range(start, min(start + batch, len(prompts)))
        keys_B2 = torch.tensor([request_keys(seed, i) for i in rows], dtype=torch.int32, device=runner.device)
        pairs = [(prompts[i], texts[i]) for i in rows]
        ranks += _replay(runner, pairs, depth, width, Sampling(temperature), keys_B2)
    return ranks


def _replay(runner: Runner, pairs: Sequence[Pair], depth: int, width: int, sampling: Sampling, keys_B2: Tensor) -> list[Ranks]:
    """The ranks of a batch of texts: a forced chain is drafted from every position, then the drafter reads one more token."""
    rounds, drafter, target, device = runner.rounds, runner.drafter, runner.rounds.target, runner.device
    assert drafter is not None
    prompt_lengths_B = torch.tensor([len(prompt) for prompt, _ in pairs], device=device)
    lengths_B = torch.tensor([len(text) for _, text in pairs], device=device)
    longest = max(len(prompt) + len(text) for prompt, text in pairs) + depth + 1
    span = -(-longest // 64) * 64
    rows = [[*prompt, *text] + [0] * (longest - len(prompt) - len(text)) for prompt, text in pairs]
    tokens_BT, dtype = torch.tensor(rows, device=device), target.embed.weight.dtype

    # the drafter reads each prompt; the target's taps of each text are zero past its end
    state, taps_by_row = drafter.init_state(len(rows), span, device, dtype), []
    for row, (prompt, text) in enumerate(pairs):
        size, length = len(prompt), len(prompt) + len(text)
        target.reserve_positions(length)
        tokens_1T, positions_1T = tokens_BT[row : row + 1, :length], torch.arange(length, device=device)[None]
        _, taps = target(tokens_1T, positions_1T, Visible.causal(positions_1T), taps=rounds.taps)
        prompt_taps = None if taps is None else taps[:, :size]
        chunk = Chunk(tokens_1T[:, :size], tokens_BT[row : row + 1, 1 : size + 1], positions_1T[:, :size], prompt_taps)
        drafter.prefill({name: tensor[row : row + 1] for name, tensor in state.items()}, chunk, rounds.handle, size)
        if taps is not None:
            taps_by_row.append(F.pad(taps[0], (0, 0, 0, 0, 0, longest - length)))
    taps_BTAD = torch.stack(taps_by_row) if taps_by_row else None

    # draft from every position in turn, then commit the root alone
    step = lambda frontier: drafter.step(state, frontier, rounds.handle, span)
    levels, positions = torch.arange(depth + 1, device=device), int(lengths_B.max()) - 1
    ranks_BLD = torch.zeros(len(rows), positions, depth, dtype=torch.long, device=device)
    for position in range(positions):
        alive_B = position < lengths_B - 1
        root_B = prompt_lengths_B + torch.where(alive_B, position, 0)  # rows whose text has ended remain at its start
        path_BP = root_B[:, None] + levels
        tokens_BP, noise_BDV = tokens_BT.gather(1, path_BP), None
        if not sampling.greedy:
            noise_BDV = gumbel(keys_B2, path_BP[:, 1:], rounds.vocabulary, CHOICE)
        ranks_BLD[:, position] = _chain_ranks(step, sampling, root_B, tokens_BP, noise_BDV, width)
        taps = None if taps_BTAD is None else taps_BTAD.gather(1, path_BP[..., None, None].expand(-1, -1, *taps_BTAD.shape[2:]))
        next_BP = tokens_BT.gather(1, (path_BP + 1).clamp(max=longest - 1))
        drafter.commit(state, Accepted(None, tokens_BP, next_BP, alive_B.long(), root_B, taps), rounds.handle, span)

    label_LD = 1 + torch.arange(positions, device=device)[:, None] + levels[:depth]
    ranks_BLD = ranks_BLD.masked_fill(label_LD >= lengths_B[:, None, None], PAST_END).cpu().numpy()
    return [ranks_LD[: len(text) - 1] for ranks_LD, (_, text) in zip(ranks_BLD, pairs, strict=True)]


def _chain_ranks(
    step: Callable[[Frontier], StepOutput],
    sampling: Sampling,
    root_B: Tensor,
    tokens_BP: Tensor,
    noise: Tensor | None,
    width: int,
) -> Tensor:
    """[B, D] ranks of the text's tokens after the root, each drafted after the text's earlier tokens; noise is [B, D, V]."""
    ranks, P = [], tokens_BP.shape[1]
    for depth in range(P - 1):
        out = step(Frontier.chain(tokens_BP[:, depth : depth + 1], root_B[:, None] + depth, depth))
        scores_BK, ids_K = sampling.process(out.logits_BFK)[:, 0], out.ids_K
        if scores_BK.shape[1] < width:
            raise UserError(f"width {width}: the drafter proposes among {scores_BK.shape[1]} ids; lower width")
        if noise is not None:
            scores_BK = scores_BK + (noise[:, depth] if ids_K is None else noise[:, depth][:, ids_K])
        ranks.append(rank_of(tokens_BP[:, depth + 1], scores_BK, ids_K, width))
    return torch.stack(ranks, 1)


def rank_of(token_B: Tensor, scores_BK: Tensor, ids_K: Tensor | None, width: int) -> Tensor:
    """[B] number of proposals ahead of each token, at most `width`; among equal scores lower ids come first.

    A token that is not proposed, or has score -inf, has rank `width`.
    """
    if ids_K is None:
        ids_K = torch.arange(scores_BK.shape[1], device=token_B.device)
    is_token_BK = ids_K == token_B[:, None]
    own_B1 = scores_BK.masked_fill(~is_token_BK, float("-inf")).amax(1, keepdim=True)
    ahead_BK = (scores_BK > own_B1) | ((scores_BK == own_B1) & (ids_K < token_B[:, None]))
    return ahead_BK.sum(1).masked_fill(own_B1[:, 0] == float("-inf"), width).clamp(max=width)


def simulate_decoding(ranks: Sequence[Ranks], paths: Collection[RankPath]) -> Stats:
    """The statistics of decoding these texts with this tree, round by round, without running the drafter again.

    Each round starts where the previous one ended, so tau is that of decoding. A mean over all positions would differ, because
    rounds start after a rejection more often than positions in general do.
    """
    tree, stats = set(paths), Stats()
    depth = max(map(len, tree), default=0)
    for ranks_LD in ranks:
        position, length = 0, len(ranks_LD) + 1
        stats.tokens += length
        while position < length - 1:
            path: RankPath = ()
            for rank in ranks_LD[position].tolist():
                if (*path, rank) not in tree:
                    break
                path = (*path, rank)
            if position + len(path) == length - 1:  # its bonus token would lie past the end
                stats.cut_rounds += 1
                break
            stats.add_round(len(path), depth, len(tree))
            position += len(path) + 1
    return stats


PRIOR = 16
"""Pseudo-count, in observations: weight of a depth's accuracies over all parents in those after a parent of one rank."""

Accuracies = np.ndarray
"""[D, W, W]: [d, q, r] is the probability that the child of rank r is the target's choice, if its parent was and had rank q.

Depth 0 has the root as parent, at q = 0. Rows do not increase with r.
"""


def accuracies(ranks: Sequence[Ranks], width: int) -> Accuracies:
    """The accuracies that a tree is searched with, counted over all positions.

    The product along a path is the probability that the whole path is correct, if a node's rank depends on the past only
    through its parent's rank. Cai et al. 2024 (arXiv 2401.10774) use one row per depth for all parents, a product of shares.
    But after a correct first proposal, the next first proposal is correct more often. This also holds for heads that do not
    read their parents, because easy positions are easy for every head. Rows with few observations are shrunk towards the row
    over all parents of their depth (`PRIOR`).

    Raises:
        UserError: every text is shorter than the tree's depth.
    """
    ranks_ND = np.concatenate(list(ranks))
    D = ranks_ND.shape[1]
    table_DWW = np.zeros((D, width, width))
    for depth in range(D):
        known_N = ranks_ND[:, depth] != PAST_END
        if not known_N.any():
            raise UserError(f"no text is longer than {depth + 1} tokens; lower depth, or raise max_new_tokens")
        child_N = ranks_ND[known_N, depth]
        if depth == 0:
            table_DWW[0, 0] = _non_increasing(_shares(child_N, width))
            continue
        parent_N = ranks_ND[known_N, depth - 1]
        any_parent_W = _shares(child_N[parent_N < width], width)
        for rank in range(width):
            after_N = child_N[parent_N == rank]
            counts_W = np.bincount(after_N, minlength=width + 1)[:width]
            table_DWW[depth, rank] = _non_increasing((counts_W + PRIOR * any_parent_W) / (len(after_N) + PRIOR))
    return table_DWW


def shares(ranks: Sequence[Ranks], width: int) -> np.ndarray:
    """[D, W] share of positions whose token has each rank at each depth, whatever its parent's rank; Medusa's accuracies."""
    ranks_ND = np.concatenate(list(ranks))
    return np.stack([_shares(column[column != PAST_END], width) for column in ranks_ND.T])


def _shares(ranks_N: np.ndarray, width: int) -> np.ndarray:
    return np.bincount(ranks_N, minlength=width + 1)[:width] / max(1, len(ranks_N))


def _non_increasing(values: np.ndarray) -> np.ndarray:
    return np.array(isotonic(values[::-1].tolist())[::-1])
