"""One decoding round: draft, verify, accept, commit; and reading a prompt before the first round.

A round touches only device tensors, has static shapes and reads nothing on the host. So it runs eagerly on a CPU and is
replayed as one captured graph on a GPU. Plain decoding is the round whose tree is the root alone.
"""

# B batch  T positions  N tree nodes  P path length, depth + 1  V vocabulary  A taps  D hidden

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from trainkit.drafters.base import Accepted, Chunk, Drafter, State, TargetHandle
from trainkit.layers.attention import causal_bias, move_slots, tree_bias
from trainkit.layers.blocks import Decoder
from trainkit.runner.sampling import CHOICE, Noise, Sampling, gumbel
from trainkit.runner.trees.shape import Draft, Shape, Steps, without_last_level
from trainkit.runner.trees.static import Tree
from trainkit.runner.verify import Coupled, Verdict, Verification


@dataclass(frozen=True)
class Trace:
    """What an observer sees of a round: exact distributions at the verified nodes.

    Attributes:
        draft: The draft, with its logits and signals.
        scores_BNV: The target's processed logits at every node; at padding those of the row's root.
        verdict: What was accepted; a row whose text has ended has a count of 0.
        keys_B2: Noise keys, which identify the rows' requests.
        position_B: Absolute position of each row's root.
    """

    draft: Draft
    scores_BNV: Tensor
    verdict: Verdict
    keys_B2: Tensor
    position_B: Tensor


@dataclass(frozen=True)
class Plan:
    """What is the same in every round of a call.

    Attributes:
        sampling: Temperature, top-k, top-p.
        shape: Shape of the draft; the root alone decodes plainly.
        verification: Decides which tokens are accepted.
        logprobs: Also return the log-probability of each emitted token.
        observe: Called after each round with its trace; rounds then run eagerly.
        can_pause: Rounds without a draft may come between others; their tokens are stored for the drafter to read later.
    """

    sampling: Sampling
    shape: Shape
    verification: Verification = Coupled()
    logprobs: bool = False
    observe: Callable[[Trace], None] | None = None
    can_pause: bool = False


@dataclass(frozen=True)
class RoundOutput:
    """What a round emitted, and how much it drafted.

    Attributes:
        emitted_BP: Token ids.
        counts_B: Number of tokens that each row emitted.
        logprobs_BP: Their log-probabilities, if requested.
        depth: Depth of the verified draft.
        drafted: Number of tokens drafted in each row, verified or not.
        levels: Number of draft levels run.
        paused: Whether a policy chose not to draft.
        verified_B: Number of tokens verified in each row, where rows differ; otherwise None, and each verified `depth`.
        chances_BD: As in `Draft`.
    """

    emitted_BP: Tensor
    counts_B: Tensor
    logprobs_BP: Tensor | None
    depth: int = 0
    drafted: int = 0
    levels: int = 0
    paused: bool = False
    verified_B: Tensor | None = None
    chances_BD: Tensor | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors among its fields, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def verified(self, row: int) -> int:
        """Number of tokens verified in a row."""
        return self.depth if self.verified_B is None else int(self.verified_B[row])


MISSED = 512
"""Capacity of the buffer of tokens decoded while drafting is paused.

Few texts are decoded that long without a draft, and if a text ends before drafting resumes, the drafter need not read it.
"""


class Rounds:
    """Runs rounds over the static tensors of a target and a drafter. Knows nothing of requests or text beyond end ids and
    length.

    Args:
        target: The decoder that verifies.
        drafter: The drafter, or None.
        end_ids: Token ids that end a row.

    Attributes:
        seconds: Time spent in eager rounds since it was last cleared: draft, target, verify.
    """

    def __init__(self, target: Decoder, drafter: Drafter | None, end_ids: tuple[int, ...]) -> None:
        self.target, self.drafter = target, drafter
        self.taps = () if drafter is None else drafter.taps
        # Every tensor of end ids ever used is kept: captured graphs point to them.
        self._ends: dict[tuple[int, ...], Tensor] = {}
        self.set_end_ids(end_ids)
        self.vocabulary = torch.arange(target.shape.vocab_size, device=target.embed.weight.device)
        self.handle = TargetHandle(target.embed, target.head, target.shape.vocab_size)
        self.clear_seconds()

    def clear_seconds(self) -> None:
        """Starts measuring again."""
        self.seconds = {"draft": 0.0, "target": 0.0, "verify": 0.0}

    def set_end_ids(self, end_ids: Sequence[int]) -> None:
        """Replaces the tokens that end a row; part of a graph's key."""
        self.end_key = tuple(end_ids)
        device = self.target.embed.weight.device
        self.end_ids = self._ends.setdefault(self.end_key, torch.tensor(self.end_key, dtype=torch.long, device=device))

    def new_state(self, batch_size: int, slots: int, can_pause: bool = False) -> State:
        """The target's static tensors: cache, the root's position and token, noise keys, length limit, and which rows have
        ended.

        With `can_pause` also a buffer of tokens decoded since the drafter last read: how many, which, and the target's taps.
        """
        weight = self.target.embed.weight
        device = weight.device
        state = {
            "cache": self.target.new_cache(batch_size, slots, device, weight.dtype),
            "position": torch.ones(batch_size, dtype=torch.long, device=device),
            "token": torch.zeros(batch_size, dtype=torch.long, device=device),
            "keys": torch.zeros(batch_size, 2, dtype=torch.int32, device=device),
            "limit": torch.zeros(batch_size, dtype=torch.long, device=device),
            "done": torch.ones(batch_size, dtype=torch.bool, device=device),
        }
        if can_pause:
            state["missed"] = torch.zeros(batch_size, dtype=torch.long, device=device)
            state["missed_tokens"] = torch.zeros(batch_size, MISSED, dtype=torch.long, device=device)
            state["missed_taps"] = weight.new_zeros(batch_size, MISSED, len(self.taps), weight.shape[1])
        return state

    def prefill(
        self, plan: Plan, state: State, draft_state: State, tokens_T: Tensor, later: bool = False, chunk: int = 512
    ) -> RoundOutput:
        """Reads one row's prompt and emits the first token; `state` and `draft_state` are views of that row.

        With `later` the drafter does not read the prompt now: it is stored, at most `MISSED` tokens, for `catch_up`.
        """
        T, output = tokens_T.shape[0], None
        for start in range(0, T, chunk):
            tokens, following = tokens_T[None, start : start + chunk], tokens_T[None, start + 1 : start + chunk + 1]
            positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)[None]
            span = start + tokens.shape[1]
            bias = causal_bias(positions, span, state["cache"].dtype)
            hidden, taps = self.target(tokens, positions, bias, state["cache"], positions, self.taps)
            if span == T:
                output = self._first_token(plan, state, hidden[:, -1:], T)
                following = torch.cat([following, output.emitted_BP], dim=1)
            if later:
                state["missed_tokens"][:, :T] = tokens
                if taps is not None:
                    state["missed_taps"][:, :T] = taps
                state["missed"].fill_(T)
            elif self.drafter is not None and plan.shape.depth:
                self.drafter.prefill(draft_state, Chunk(tokens, following, positions, taps), self.handle, span)
        assert output is not None
        return output

    def _first_token(self, plan: Plan, state: State, hidden_11D: Tensor, length: int) -> RoundOutput:
        """The token after a prompt of this length, which becomes the root."""
        logits = self.target.head(hidden_11D)
        state["position"].fill_(length)
        if "missed" in state:
            state["missed"].zero_()
        scores = plan.sampling.process(logits)
        if not plan.sampling.greedy:
            scores = scores + gumbel(state["keys"], state["position"][:, None], self.vocabulary, CHOICE)
        token = scores.argmax(-1)
        state["token"].copy_(token[:, 0])
        state["done"].copy_(torch.isin(token[:, 0], self.end_ids) | (state["position"] + 1 >= state["limit"]))
        logprobs = logits.float().log_softmax(-1).gather(2, token[..., None])[..., 0] if plan.logprobs else None
        return RoundOutput(token, torch.ones_like(token[:, 0]), logprobs)

    def __call__(self, plan: Plan, state: State, draft_state: State, span: int, levels: int | None = None) -> RoundOutput:
        """Runs one round of every row; a row whose text has ended emits nothing and stays where it is.

        Args:
            plan: What kind of round.
            state: From `new_state`, or a view of its first rows; changed in place.
            draft_state: The drafter's tensors of the same rows.
            span: Upper bound of the cache slots in use in this round, the tree's scratch slots included.
            levels: Largest number of levels to draft; None for the shape's depth.
        """
        started = perf_counter()
        # Step 1: draft. Noise is a hash of request and position, so a replayed graph draws new numbers.
        rule, position = plan.verification, state["position"]
        noise = None
        if not plan.sampling.greedy:
            rows = 4 if plan.shape.key is None else plan.shape.depth + 1
            noise = Noise(rule.noise_keys(state["keys"], position), position, self.vocabulary, rule.stream, rows)
        draft = self._draft(plan, state, draft_state, noise, span, levels)
        assert draft.packing is None or rule.may_drop
        drafted = perf_counter()
        # Step 2: verify. One target forward over all nodes.
        verified = draft
        if not rule.verifies_last_level:
            assert isinstance(draft.shape, Tree)
            verified = without_last_level(draft, draft.shape.shortened, draft.shape.shortened.topology)
        logits, taps = self.evaluate(verified, state, span)
        evaluated = perf_counter()
        # Step 3: accept the longest path that the rule allows.
        scores = plan.sampling.process(logits)
        verdict = rule.verify(draft, scores, noise, state["keys"], position)
        root = position.clone() if plan.observe is not None else position
        # Step 4: commit the path to both caches; its last token is the next root.
        output = self._commit(plan, state, draft_state, verified, verdict, logits, taps, span)
        if plan.observe is not None:
            counted = Verdict(verdict.path_BP, output.counts_B, verdict.emitted_BP)
            plan.observe(Trace(verified, scores, counted, state["keys"].clone(), root))
        self.seconds["draft"] += drafted - started
        self.seconds["target"] += evaluated - drafted
        self.seconds["verify"] += perf_counter() - evaluated
        return output

    def _draft(self, plan: Plan, state: State, draft_state: State, noise: Noise | None, span: int, levels: int | None) -> Draft:
        shape, rule = plan.shape, plan.verification
        if self.drafter is None or not shape.depth:
            assert isinstance(shape, Tree)
            return Draft(shape, state["token"][:, None], shape.topology, 0)
        steps = Steps(
            self.drafter,
            draft_state,
            self.handle,
            state["token"],
            state["position"],
            plan.sampling,
            noise if rule.draft_sees_noise else None,
            span,
            levels,
            keep_logits=rule.needs_logits or plan.observe is not None,
            keep_signals=plan.observe is not None,
            done_B=state["done"],
        )
        return shape.grow(steps)

    def evaluate(self, draft: Draft, state: State, span: int) -> tuple[Tensor, Tensor | None]:
        """The target's logits [B, N, V] at every node and its taps; the nodes' keys and values go to scratch slots.

        A chain's nodes lie in the slots of their positions, so a causal mask is enough. Where rows verify different numbers of
        nodes, logits and taps of the padding are those of the row's root.
        """
        position, topology, packing = state["position"], draft.topology, draft.packing
        positions = position[:, None] + topology.depths_BN
        if draft.shape.is_chain:
            slots, bias = positions, causal_bias(positions, span, state["cache"].dtype)
        else:
            slots = position[:, None] + torch.arange(draft.shape.size, device=position.device)
            bias = tree_bias(position, topology.ancestors_BNN.expand(position.shape[0], -1, -1), span, state["cache"].dtype)
        tokens = draft.tokens_BN if packing is None else packing.pack(draft.tokens_BN)
        hidden, taps = self.target(tokens, positions, bias, state["cache"], slots, self.taps, packing)
        logits = self.target.head(hidden)
        if packing is None:
            return logits, taps
        return packing.pad(logits), None if taps is None else packing.pad(taps)

    def _commit(
        self,
        plan: Plan,
        state: State,
        draft_state: State,
        draft: Draft,
        verdict: Verdict,
        logits: Tensor,
        taps: Tensor | None,
        span: int,
    ) -> RoundOutput:
        position, path = state["position"], verdict.path_BP
        counts, emitted = verdict.counts_B.masked_fill(state["done"], 0), verdict.emitted_BP
        # The target's cache: the path's keys and values move to the slots of their positions.
        if path is not None:
            move_slots(state["cache"], position[:, None] + path, position)
        # The drafter's cache; or, while drafting is paused, the buffer of what it has to read later.
        if self.drafter is not None and draft.levels:
            tokens, numbers = draft.tokens_BN, path
            if path is not None:
                tokens = tokens.gather(1, path)
                taps = None if taps is None else taps.gather(1, path[..., None, None].expand(-1, -1, *taps.shape[2:]))
                numbers = path if draft.drafter_numbers_BN is None else draft.drafter_numbers_BN.gather(1, path)
            self.drafter.commit(draft_state, Accepted(numbers, tokens, emitted, counts, position, taps), self.handle, span)
        elif plan.can_pause and self.drafter is not None:
            self._store_missed(state, draft.tokens_BN, taps, counts)
        # The next root, and which rows have ended.
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
        return RoundOutput(
            emitted,
            counts,
            logprobs,
            depth=draft.shape.depth,
            drafted=draft.levels if draft.shape.is_chain else draft.shape.size - 1,
            levels=draft.levels,
            paused=plan.can_pause and not draft.levels,
            verified_B=None if draft.packing is None else draft.packing.lengths_B - 1,
            chances_BD=draft.chances_BD,
        )

    def _store_missed(self, state: State, tokens_B1: Tensor, taps_B1AD: Tensor | None, counts_B: Tensor) -> None:
        """Stores a root that was decoded without a draft; `catch_up` has made room."""
        index_B1 = state["missed"].clamp(max=MISSED - 1)[:, None]
        state["missed_tokens"].scatter_(1, index_B1, tokens_B1)
        if taps_B1AD is not None:
            state["missed_taps"].scatter_(1, index_B1[..., None, None].expand_as(taps_B1AD), taps_B1AD)
        state["missed"].add_(counts_B.clamp(max=1))

    def catch_up(self, state: State, draft_state: State) -> None:
        """Lets the drafter read what each row decoded without it. Reads counts on the host, so not in every round."""
        assert self.drafter is not None
        for row, (missed, position) in enumerate(zip(state["missed"].tolist(), state["position"].tolist(), strict=True)):
            if missed:
                positions = torch.arange(position - missed, position, device=state["missed"].device)[None]
                taps = state["missed_taps"][row : row + 1, :missed] if self.taps else None
                tokens = state["missed_tokens"][row : row + 1, :missed]
                following = torch.cat([tokens[:, 1:], state["token"][row : row + 1, None]], dim=1)
                own = {name: tensor[row : row + 1] for name, tensor in draft_state.items()}
                self.drafter.prefill(own, Chunk(tokens, following, positions, taps), self.handle, position)
        state["missed"].zero_()
