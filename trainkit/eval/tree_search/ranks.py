"""Which of a drafter's proposals the target's choice is, at every depth, seen from every place of a text.

The drafter is walked along the target's own text: from each place it drafts a chain whose tokens are the text's, so that every
node's parent is right, and the rank of the next token among its proposals is kept. That is all a static tree needs: a node is
accepted where its rank path is the text's. So one walk tells every tree's rounds (`simulated`) and the accuracies that trees
are searched with (`accuracies`), for any kind, whether or not its heads see their parents' tokens.
"""

# B rows  T positions  A taps  D levels  K ids it may propose  W ranks told apart  L text length  P path length

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from trainkit.drafters.base import Accepted, Chunk, Frontier, State
from trainkit.errors import UserError
from trainkit.layers.attention import causal_bias
from trainkit.runner import Runner, Stats
from trainkit.runner.sampling import CHOICE, Sampling, gumbel, request_keys
from trainkit.runner.trees.shape import RankPath

BEYOND = -1
"""In place of a rank: the text has ended."""

Ranks = np.ndarray
"""[L - 1, D] of one text: from the token at i as root, the rank of token i + 1 + d among the proposals at depth d.

W where it is not among the first W, and `BEYOND` past the text's end.
"""


@torch.inference_mode()
def walk(
    runner: Runner,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    depth: int,
    width: int,
    temperature: float = 0.0,
    seed: int = 0,
    batch: int = 16,
) -> list[Ranks]:
    """The ranks of every text, as coupled verification judges them.

    Args:
        runner: With a drafter.
        prompts: Token ids.
        texts: What the runner made of each, under this temperature and this seed.
        depth: D, at most the drafter's `max_depth`.
        width: W.
        temperature: Above 0, draft and target are ranked with the noise that they share.
        seed: Of that noise; a prompt's place in the list is part of it, as in `Runner.generate`.
        batch: Texts walked side by side.
    """
    from tqdm import tqdm

    found: list[Ranks] = []
    for start in tqdm(range(0, len(prompts), batch), desc="walking", unit=" batches", disable=None, delay=2):
        rows = range(start, min(start + batch, len(prompts)))
        keys_B2 = torch.tensor([request_keys(seed, i) for i in rows], dtype=torch.int32, device=runner.device)
        part = _Part(runner, [prompts[i] for i in rows], [texts[i] for i in rows], depth, width, Sampling(temperature), keys_B2)
        found += part.ranks()
    return found


class _Part:
    """Texts side by side, each with a drafter's row that has read its prompt."""

    def __init__(
        self,
        runner: Runner,
        prompts: Sequence[Sequence[int]],
        texts: Sequence[Sequence[int]],
        depth: int,
        width: int,
        sampling: Sampling,
        keys_B2: Tensor,
    ) -> None:
        assert runner.drafter is not None
        self.rounds, self.drafter, self.device = runner.rounds, runner.drafter, runner.device
        self.depth, self.width, self.sampling, self.keys_B2 = depth, width, sampling, keys_B2
        wholes = [[*prompt, *text] for prompt, text in zip(prompts, texts, strict=True)]
        longest = max(map(len, wholes)) + depth + 1
        self.span = -(-longest // 64) * 64
        self.firsts_B = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        self.lengths_B = torch.tensor([len(text) for text in texts], device=self.device)
        rows = [whole + [0] * (longest - len(whole)) for whole in wholes]
        self.tokens_BT = torch.tensor(rows, device=self.device)
        dtype = self.rounds.target.embed.weight.dtype
        self.state = self.drafter.init_state(len(rows), self.span, self.device, dtype)
        taps = [self._read(b, len(prompts[b]), len(whole)) for b, whole in enumerate(wholes)]
        self.taps_BTAD = None if taps[0] is None else torch.stack([t for t in taps if t is not None])

    def _read(self, row: int, prompt: int, length: int) -> Tensor | None:
        """Prefills the drafter's row; returns the target's taps over the whole text, [T, A, hidden] with zeros past it."""
        target = self.rounds.target
        target.reserve_positions(length)
        tokens_1T = self.tokens_BT[row : row + 1, :length]
        positions_1T = torch.arange(length, device=self.device)[None]
        bias = causal_bias(positions_1T, length, target.embed.weight.dtype)
        _, taps = target(tokens_1T, positions_1T, bias, taps=self.rounds.taps)
        view: State = {name: tensor[row : row + 1] for name, tensor in self.state.items()}
        seen = None if taps is None else taps[:, :prompt]
        next_1T = self.tokens_BT[row : row + 1, 1 : prompt + 1]
        chunk = Chunk(tokens_1T[:, :prompt], next_1T, positions_1T[:, :prompt], seen)
        self.drafter.prefill(view, chunk, self.rounds.handle, prompt)
        if taps is None:
            return None
        padded = taps.new_zeros(self.tokens_BT.shape[1], *taps.shape[2:])
        padded[:length] = taps[0]
        return padded

    def ranks(self) -> list[Ranks]:
        """From every place in turn: a chain of the text's own tokens, of which the round then keeps the root alone."""
        levels = torch.arange(self.depth + 1, device=self.device)
        places = int(self.lengths_B.max()) - 1
        found = []
        for place in range(places):
            alive_B = place < self.lengths_B - 1
            root_B = self.firsts_B + torch.where(alive_B, place, 0)
            path_BP = root_B[:, None] + levels
            tokens_BP = self.tokens_BT.gather(1, path_BP)
            found.append(self._chain(root_B, tokens_BP))
            taps = self.taps_BTAD
            if taps is not None:
                taps = taps.gather(1, path_BP[..., None, None].expand(-1, -1, *taps.shape[2:]))
            next_BP = self.tokens_BT.gather(1, (path_BP + 1).clamp(max=self.tokens_BT.shape[1] - 1))
            accepted = Accepted(None, tokens_BP, next_BP, alive_B.long(), root_B, taps)
            self.drafter.commit(self.state, accepted, self.rounds.handle, self.span)
        if not found:
            return [np.zeros((0, self.depth), np.int64) for _ in self.lengths_B]
        ranks_BLD = torch.stack(found, 1)
        label_LD = 1 + torch.arange(places, device=self.device)[:, None] + levels[: self.depth]
        ranks_BLD = ranks_BLD.masked_fill(label_LD >= self.lengths_B[:, None, None], BEYOND).cpu().numpy()
        return [ranks_LD[: length - 1] for ranks_LD, length in zip(ranks_BLD, self.lengths_B.tolist(), strict=True)]

    def _chain(self, root_B: Tensor, tokens_BP: Tensor) -> Tensor:
        """[B, D] ranks of the text's tokens after the root, each after those before it."""
        D = self.depth
        noise_BDV = None
        if not self.sampling.greedy:
            rows = root_B[:, None] + 1 + torch.arange(D, device=self.device)
            noise_BDV = gumbel(self.keys_B2, rows, self.rounds.vocabulary, CHOICE)
        found = []
        for depth in range(D):
            frontier = Frontier.chain(tokens_BP[:, depth : depth + 1], root_B[:, None] + depth, depth, D + 1)
            out = self.drafter.step(self.state, frontier, self.rounds.handle, self.span)
            scores_BK, ids_K = self.sampling.process(out.logits_BFK)[:, 0], out.ids_K
            if scores_BK.shape[1] < self.width:
                raise UserError(f"width {self.width}: the drafter proposes among {scores_BK.shape[1]} ids; ask for no more")
            if noise_BDV is not None:
                scores_BK = scores_BK + (noise_BDV[:, depth] if ids_K is None else noise_BDV[:, depth][:, ids_K])
            found.append(rank_of(tokens_BP[:, depth + 1], scores_BK, ids_K, self.width))
        return torch.stack(found, 1)


def rank_of(token_B: Tensor, scores_BK: Tensor, ids_K: Tensor | None, width: int) -> Tensor:
    """How many proposals come before each token, lower ids first among equals; `width` where it is as many or more, or none."""
    if ids_K is None:
        ids_K = torch.arange(scores_BK.shape[1], device=token_B.device)
    is_token_BK = ids_K == token_B[:, None]
    own_B1 = scores_BK.masked_fill(~is_token_BK, float("-inf")).amax(1, keepdim=True)
    before_BK = (scores_BK > own_B1) | ((scores_BK == own_B1) & (ids_K < token_B[:, None]))
    return before_BK.sum(1).masked_fill(own_B1[:, 0] == float("-inf"), width).clamp(max=width)


def simulated(ranks: Sequence[Ranks], paths: Collection[RankPath]) -> Stats:
    """What decoding these texts with this tree counts, round for round; the drafter is not asked again.

    Rounds begin where the one before ended, so its tau is the served one, where means over all places are not: a round begins
    after a rejection more often than a place does.
    """
    tree, stats = set(paths), Stats()
    depth = max(map(len, tree), default=0)
    for ranks_LD in ranks:
        place, length = 0, len(ranks_LD) + 1
        stats.tokens += length
        while place < length - 1:
            path: RankPath = ()
            for rank in ranks_LD[place].tolist():
                if (*path, rank) not in tree:
                    break
                path = (*path, rank)
            if place + len(path) == length - 1:  # its bonus token lies past the end
                stats.cut_rounds += 1
                break
            stats.add_round(len(path), depth, len(tree))
            place += len(path) + 1
    return stats


PRIOR = 16
"""Sightings that the accuracies after one rank of the parent are given from those after any."""

Accuracies = np.ndarray
"""[D, W, W]: at [d, q, r] the probability that the child of rank r is the target's choice, where its parent was and had rank q.

Depth 0 has the root for parent, at q = 0. Rows do not increase with r.
"""


def accuracies(ranks: Sequence[Ranks], width: int) -> Accuracies:
    """What a tree is searched with, counted over all places.

    A product of these along a path is the chance that the whole path is right, if what a rank says of the next is all that the
    past says. With one row for all parents (Cai et al. 2024, arXiv 2401.10774) it would be the product of each depth's shares,
    which misses that where the first proposal was right, the next one's first is right more often: for heads that do not see
    their parents as well, since easy places are easy for all of them. A row seen seldom leans on the depth's own.

    Raises:
        UserError: no text is as long as the tree is deep.
    """
    every_ND = np.concatenate(list(ranks))
    D = every_ND.shape[1]
    table_DWW = np.zeros((D, width, width))
    for depth in range(D):
        known_N = every_ND[:, depth] != BEYOND
        if not known_N.any():
            raise UserError(f"no text is longer than {depth + 1} tokens; draft fewer levels, or raise max_new_tokens")
        child_N = every_ND[known_N, depth]
        if depth == 0:
            table_DWW[0, 0] = falling(_shares(child_N, width))
            continue
        parent_N = every_ND[known_N, depth - 1]
        after_any = _shares(child_N[parent_N < width], width)
        for rank in range(width):
            own_N = child_N[parent_N == rank]
            counted = np.bincount(own_N, minlength=width + 1)[:width]
            table_DWW[depth, rank] = falling((counted + PRIOR * after_any) / (len(own_N) + PRIOR))
    return table_DWW


def shares(ranks: Sequence[Ranks], width: int) -> np.ndarray:
    """[D, W]: how often the text's token has each rank at each depth, whatever came before; Medusa's accuracies."""
    every_ND = np.concatenate(list(ranks))
    return np.stack([_shares(column[column != BEYOND], width) for column in every_ND.T])


def _shares(ranks_N: np.ndarray, width: int) -> np.ndarray:
    return np.bincount(ranks_N, minlength=width + 1)[:width] / max(1, len(ranks_N))


def falling(values: np.ndarray) -> np.ndarray:
    """The nearest values (least squares) that do not increase: neighbours that do are averaged (pool adjacent violators)."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        total, size = float(value), 1
        while blocks and blocks[-1][0] / blocks[-1][1] < total / size:
            above, count = blocks.pop()
            total, size = total + above, size + count
        blocks.append((total, size))
    return np.concatenate([np.full(size, total / size) for total, size in blocks])
