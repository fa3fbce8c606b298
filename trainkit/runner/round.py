"""One decoding round: draft, verify, compact, append; and the reading of a prompt before the first.

A round touches only device tensors, has static shapes and reads nothing on the host, so that it runs eagerly on a CPU and is
replayed as one captured graph on a GPU. Plain decoding is the round whose tree is the root alone.
"""

# B batch  T positions  N tree nodes  P path length, depth + 1  V vocabulary  A taps  D hidden

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter

import torch
from torch import Tensor

from trainkit.drafters.base import Accepted, Chunk, Drafter, State, TargetHandle
from trainkit.layers.attention import causal_bias, move_slots, tree_bias
from trainkit.layers.blocks import Decoder
from trainkit.runner.sampling import CHOICE, PROPOSAL, RESIDUAL, Noise, Sampling, gumbel, mix
from trainkit.runner.trees.shape import Draft, Shape, grow
from trainkit.runner.trees.static import Tree
from trainkit.runner.verify import Typical, Verdict, coupled, mixed, residual, typical


@dataclass(frozen=True)
class Trace:
    """What an observer sees of a round: exact distributions at the nodes that were judged.

    Attributes:
        tree: Shape of the draft.
        draft: Its tokens, topology and processed logits.
        scores_BNV: The target's processed logits at every node; at pads, where rows have unequally many, their root's.
        verdict: What was accepted; a row that was done has a count of 0.
        keys_B2: Noise keys, which tell the rows' requests apart.
        position_B: Absolute position of each row's root.
    """

    tree: Shape
    draft: Draft
    scores_BNV: Tensor
    verdict: Verdict
    keys_B2: Tensor
    position_B: Tensor


@dataclass
class Plan:
    """Everything about a round that is fixed while its graph is reused.

    Attributes:
        sampling: Temperature, top-k, top-p.
        tree: Shape of the draft.
        verify: `coupled`, `residual` or, lossy, `typical`; temperature 0 is always coupled, of which it is the case without
            noise. `mixed` lets text of the draft pass unverified.
        share: Of the draft's tokens in `mixed` text.
        typical: Thresholds of `typical`.
        logprobs: Also return the log-probability of each emitted token.
        observe: Called after each round with its trace; only without graphs.
        pauses: Rounds without a draft may stand between others: what they decode is kept for the drafter to catch up on.
    """

    sampling: Sampling
    tree: Shape
    verify: str = "coupled"
    share: float = 0.0
    typical: Typical = Typical()
    logprobs: bool = False
    observe: Callable[[Trace], None] | None = None
    pauses: bool = False
    seconds: dict[str, float] = field(default_factory=lambda: {"draft": 0.0, "target": 0.0, "verify": 0.0})

    @property
    def is_residual(self) -> bool:
        return self.verify == "residual" and not self.sampling.greedy


@dataclass(frozen=True)
class RoundOutput:
    """What a round gave.

    Attributes:
        emitted_BP: Tokens.
        counts_B: How many of them each row emitted.
        logprobs_BP: Their log-probabilities, if asked for.
        depth: Of the draft that was verified.
        drafted: Tokens drafted in each row, those that were not verified too.
        levels: Draft levels run.
        nodes: That the target judged in each row beside the root, where all have as many.
        paused: It has no draft because a policy chose so.
        verified_B: Tokens verified in each row, where some had fewer than `depth`.
        chances_BD: As in `Draft`.
    """

    emitted_BP: Tensor
    counts_B: Tensor
    logprobs_BP: Tensor | None
    depth: int = 0
    drafted: int = 0
    levels: int = 0
    nodes: int = 0
    paused: bool = False
    verified_B: Tensor | None = None
    chances_BD: Tensor | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those that are there, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def verified(self, row: int) -> int:
        """Tokens verified in a row."""
        return self.depth if self.verified_B is None else int(self.verified_B[row])


MISSED = 512
"""Tokens that the drafter has not read while drafting rests are kept, at most so many, before it catches up on them.

Few texts go on so long while drafting rests, and for one that ends before it is taken up again nothing need be read.
"""


class Rounds:
    """Runs rounds over a target's state; knows nothing of requests, text or stopping but by end ids and length.

    Args:
        target: The decoder that verifies.
        drafter: What drafts, or None.
        end_ids: Tokens that end a row.
    """

    def __init__(self, target: Decoder, drafter: Drafter | None, end_ids: tuple[int, ...]) -> None:
        self.target, self.drafter = target, drafter
        self.taps = () if drafter is None else drafter.taps
        weight = target.embed.weight
        # every tensor of end ids ever used is kept: captured graphs point to them
        self._ends: dict[tuple[int, ...], Tensor] = {}
        self.set_end_ids(end_ids)
        self.vocabulary = torch.arange(target.shape.vocab_size, device=weight.device)
        self.handle = TargetHandle(target.embed, target.head, target.shape.vocab_size)

    def set_end_ids(self, end_ids: Sequence[int]) -> None:
        """Replaces the tokens that end a row; part of a graph's key."""
        self.end_key = tuple(end_ids)
        device = self.target.embed.weight.device
        self.end_ids = self._ends.setdefault(self.end_key, torch.tensor(self.end_key, dtype=torch.long, device=device))

    def new_state(self, batch_size: int, slots: int) -> State:
        """The target's static tensors: cache, the root's position and token, noise keys, length limit, and who is done.

        And, of tokens decoded without a draft since the last one: how many, which, and the target's taps there.
        """
        weight = self.target.embed.weight
        device, missed = weight.device, MISSED if self.drafter is not None else 0
        return {
            "missed": torch.zeros(batch_size, dtype=torch.long, device=device),
            "missed_tokens": torch.zeros(batch_size, missed, dtype=torch.long, device=device),
            "missed_taps": weight.new_zeros(batch_size, missed, len(self.taps), weight.shape[1]),
            "cache": self.target.new_cache(batch_size, slots, device, weight.dtype),
            "position": torch.ones(batch_size, dtype=torch.long, device=device),
            "token": torch.zeros(batch_size, dtype=torch.long, device=device),
            "keys": torch.zeros(batch_size, 2, dtype=torch.int32, device=device),
            "limit": torch.zeros(batch_size, dtype=torch.long, device=device),
            "done": torch.ones(batch_size, dtype=torch.bool, device=device),
        }

    def prefill(
        self, plan: Plan, state: State, draft_state: State, tokens_T: Tensor, later: bool = False, chunk: int = 512
    ) -> RoundOutput:
        """Reads one row's prompt and emits the first token; `state` and `draft_state` are views of that row.

        With `later` the prompt, `MISSED` tokens and a chunk at most, is kept for the drafter to catch up on.
        """
        T, output = tokens_T.shape[0], None
        for start in range(0, T, chunk):
            tokens, following = tokens_T[None, start : start + chunk], tokens_T[None, start + 1 : start + chunk + 1]
            positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)[None]
            span = start + tokens.shape[1]
            bias = causal_bias(positions, span, state["cache"].dtype)
            hidden, taps = self.target(tokens, positions, bias, state["cache"], positions, self.taps)
            if span == T:
                output = self._first(plan, state, hidden[:, -1:], T)
                following = torch.cat([following, output.emitted_BP], dim=1)
            if later:
                state["missed_tokens"][:, :T] = tokens
                if taps is not None:
                    state["missed_taps"][:, :T] = taps
                state["missed"].fill_(T)
            elif self.drafter is not None and plan.tree.depth:
                self.drafter.prefill(draft_state, Chunk(tokens, following, positions, taps), self.handle, span)
        assert output is not None
        return output

    def _first(self, plan: Plan, state: State, hidden_11D: Tensor, length: int) -> RoundOutput:
        """The token after a prompt of this length, which becomes the root."""
        logits = self.target.head(hidden_11D)
        state["position"].fill_(length)
        state["missed"].zero_()
        noise = None if plan.sampling.greedy else gumbel(state["keys"], state["position"][:, None], self.vocabulary, CHOICE)
        scores = plan.sampling.process(logits)
        token = (scores if noise is None else scores + noise).argmax(-1)
        state["token"].copy_(token[:, 0])
        state["done"].copy_(torch.isin(token[:, 0], self.end_ids) | (state["position"] + 1 >= state["limit"]))
        logprobs = logits.float().log_softmax(-1).gather(2, token[..., None])[..., 0] if plan.logprobs else None
        return RoundOutput(token, torch.ones_like(token[:, 0]), logprobs)

    def __call__(self, plan: Plan, state: State, draft_state: State, span: int) -> RoundOutput:
        """Drafts, verifies and commits one round of every row; a row that is done emits nothing and keeps its place.

        Args:
            plan: What kind of round.
            state: From `new_state`, or a view of its first rows; changed in place.
            draft_state: The drafter's tensors of the same rows.
            span: No cache slot at or past it is used in this round, the tree's scratch slots included.
        """
        tree, sampling = plan.tree, plan.sampling
        position, token = state["position"], state["token"]
        started = perf_counter()
        root = position.clone() if plan.observe is not None else position
        noise = None
        ranked = plan.is_residual and tree.ranked
        drawn = plan.is_residual and not ranked
        if not sampling.greedy and not (plan.is_residual and not tree.depth):
            # under `residual` and in `mixed` text, draft and target draw independently
            stream = RESIDUAL if ranked else PROPOSAL if drawn or plan.verify == "mixed" else CHOICE
            # under `residual` a policy may have been told of proposals that no round judged: each round draws others
            keys = state["keys"] ^ mix(position.int())[:, None] if drawn else state["keys"]
            noise = Noise(keys, position, self.vocabulary, stream)
            if tree.key is not None:  # how far it drafts is known
                noise = noise.first(tree.depth + 1)
        if self.drafter is None or not tree.depth:
            assert isinstance(tree, Tree)
            draft = Draft(token[:, None], (), tree.topology, levels=0)
        else:
            proposing, keep = None if ranked else noise, drawn or plan.observe is not None
            draft = grow(
                tree,
                self.drafter,
                draft_state,
                self.handle,
                token,
                position,
                sampling,
                proposing,
                span,
                keep,
                keep_said=plan.observe is not None,
                done_B=state["done"],
            )
            if draft.shape is not None:
                tree, noise = draft.shape, None if noise is None else noise[:, : draft.shape.depth + 1]
        assert not isinstance(noise, Noise)
        assert draft.packing is None or plan.verify == "coupled" or sampling.greedy  # the others would judge pads
        proposed = draft
        if plan.verify == "mixed":  # the last token is the draft's or the target's, and nobody asks what comes after it
            assert isinstance(tree, Tree) and tree.is_chain
            tree = tree.shortened
            draft = replace(draft, tokens_BN=draft.tokens_BN[:, : tree.size], topology=tree.topology, levels=tree.size)
        drafted = perf_counter()

        logits, taps = self.judge(tree, draft, state, span)
        judged = perf_counter()

        scores = sampling.process(logits)
        if drawn:
            assert isinstance(tree, Tree)
            verdict = residual(tree, draft, scores, state["keys"], position)
        elif plan.verify == "mixed":
            verdict = mixed(proposed, scores, state["keys"], position, plan.share, sampling.greedy)
        elif plan.verify == "typical" and not sampling.greedy:
            verdict = typical(tree, draft, scores, noise, plan.typical)
        else:
            verdict = coupled(tree, draft, scores, noise)
        output = self._commit(plan, tree, state, draft_state, draft, verdict, logits, taps, span)
        if plan.observe is not None:
            judged_as = Verdict(verdict.path_BP, output.counts_B, verdict.emitted_BP)
            plan.observe(Trace(tree, draft, scores, judged_as, state["keys"].clone(), root))
        seconds = plan.seconds
        seconds["draft"] += drafted - started
        seconds["target"] += judged - drafted
        seconds["verify"] += perf_counter() - judged
        return output

    def judge(self, tree: Shape, draft: Draft, state: State, span: int) -> tuple[Tensor, Tensor | None]:
        """The target's logits [B, N, V] at every node, and its taps; the nodes' keys and values go to scratch slots.

        A chain's nodes lie in the slots of their positions, so what each may see needs no ancestors. Where rows have unequally
        many, the logits and taps of pads are their roots'.
        """
        position = state["position"]
        topology = draft.topology
        positions = position[:, None] + topology.depths_BN
        if tree.is_chain:
            slots, bias = positions, causal_bias(positions, span, state["cache"].dtype)
        else:
            slots = position[:, None] + torch.arange(tree.size, device=position.device)
            bias = tree_bias(position, topology.ancestors_BNN.expand(position.shape[0], -1, -1), span, state["cache"].dtype)
        packing = draft.packing
        tokens = draft.tokens_BN if packing is None else packing.pack(draft.tokens_BN)
        hidden, taps = self.target(tokens, positions, bias, state["cache"], slots, self.taps, packing)
        logits = self.target.head(hidden)
        if packing is None:
            return logits, taps
        return packing.pad(logits), None if taps is None else packing.pad(taps)

    def _commit(
        self,
        plan: Plan,
        tree: Shape,
        state: State,
        draft_state: State,
        draft: Draft,
        verdict: Verdict,
        logits: Tensor,
        taps: Tensor | None,
        span: int,
    ) -> RoundOutput:
        position, path = state["position"], verdict.path_BP
        levels = tree.depth if draft.levels is None else draft.levels
        counts = verdict.counts_B.masked_fill(state["done"], 0)
        emitted = verdict.emitted_BP
        if path is not None:
            move_slots(state["cache"], position[:, None] + path, position)
        if self.drafter is not None and levels:
            tokens, kept, numbers = draft.tokens_BN, taps, path
            if path is not None:
                tokens = tokens.gather(1, path)
                kept = None if taps is None else taps.gather(1, path[..., None, None].expand(-1, -1, *taps.shape[2:]))
                numbers = path if draft.numbers_BN is None else draft.numbers_BN.gather(1, path)
            accepted = Accepted(numbers, tokens, emitted, counts, position, kept)
            self.drafter.commit(draft_state, accepted, self.handle, span)
        elif plan.pauses:
            self._miss(state, draft.tokens_BN, taps, counts)
        logprobs = None
        if plan.logprobs:
            at_nodes = logits if path is None else logits.gather(1, path[..., None].expand(-1, -1, logits.shape[-1]))
            logprobs = at_nodes.float().log_softmax(-1).gather(2, emitted[..., None])[..., 0]
        last = emitted.gather(1, (counts - 1).clamp(min=0)[:, None])[:, 0]
        state["token"].copy_(torch.where(counts > 0, last, state["token"]))
        position.add_(counts)
        inside = torch.arange(emitted.shape[1], device=emitted.device) < counts[:, None]
        ended = (torch.isin(emitted, self.end_ids) & inside).any(1)
        state["done"].logical_or_(ended | (position + 1 >= state["limit"]))
        drafted = levels if draft.levels is not None and plan.tree.is_chain else tree.size - 1
        verified = None if draft.packing is None else draft.packing.lengths_B - 1
        paused = plan.pauses and not levels
        return RoundOutput(
            emitted, counts, logprobs, tree.depth, drafted, levels, tree.size - 1, paused, verified, draft.chances_BD
        )

    def _miss(self, state: State, tokens_B1: Tensor, taps_B1AD: Tensor | None, counts_B: Tensor) -> None:
        """Keeps a root that was decoded without a draft; room was made by `catch_up`."""
        place_B1 = state["missed"].clamp(max=MISSED - 1)[:, None]
        state["missed_tokens"].scatter_(1, place_B1, tokens_B1)
        if taps_B1AD is not None:
            state["missed_taps"].scatter_(1, place_B1[..., None, None].expand_as(taps_B1AD), taps_B1AD)
        state["missed"].add_(counts_B.clamp(max=1))

    def catch_up(self, state: State, draft_state: State) -> None:
        """Lets the drafter read what each row has decoded without it; reads counts on the host, so not in every round."""
        assert self.drafter is not None
        for row, (missed, position) in enumerate(zip(state["missed"].tolist(), state["position"].tolist(), strict=True)):
            if missed:
                positions = torch.arange(position - missed, position, device=state["missed"].device)[None]
                own = {name: tensor[row : row + 1] for name, tensor in draft_state.items()}
                taps = state["missed_taps"][row : row + 1, :missed] if self.taps else None
                tokens = state["missed_tokens"][row : row + 1, :missed]
                following = torch.cat([tokens[:, 1:], state["token"][row : row + 1, None]], dim=1)
                self.drafter.prefill(own, Chunk(tokens, following, positions, taps), self.handle, position)
        state["missed"].zero_()
