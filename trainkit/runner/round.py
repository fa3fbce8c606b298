"""One decoding round: draft, verify, accept, commit; and reading a prompt before the first round.

A round touches only device tensors, has static shapes and reads nothing on the host. So it runs eagerly on a CPU and is
replayed as one captured graph on a GPU. Plain decoding is the round whose tree is the root alone.
"""

# B batch  T positions  N tree nodes  P path length, depth + 1  V vocabulary  A taps  D hidden  M buffered tokens

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trainkit.drafters.base import Accepted, Chunk, Drafter, State, TargetHandle
from trainkit.layers.attention import move_slots
from trainkit.layers.blocks import Decoder
from trainkit.layers.kernels import available
from trainkit.layers.visible import Visible
from trainkit.runner.sampling import CHOICE, Mixed, Noise, RowSampling, Sampling
from trainkit.runner.trees.shape import Draft, Shape, Steps
from trainkit.runner.trees.static import Tree, build, chain, without_last_level
from trainkit.runner.verify import Coupled, Verdict, Verification

MISSED = 512
"""Capacity of the buffer of tokens decoded while drafting is paused.

Few texts are decoded that long without a draft, and if a text ends before drafting resumes, the drafter need not read it.
"""

PREFILL_CHUNK = 512
"""Largest number of prompt tokens that are read at once."""


@dataclass(frozen=True)
class RoundState:
    """The static tensors of a batch, one row per text; rounds change them in place.

    Attributes:
        cache: The target's keys and values.
        position_B: Absolute position of the root, the last emitted token.
        token_B: Token id of the root.
        keys_B2: Noise keys of the text's request.
        limit_B: Number of tokens, prompt included, at which the text ends.
        ignore_end_B: True where end tokens do not end the text.
        temperature_B: Sampling temperature; read if `Plan.sampling` is `Mixed`, as are the next two.
        top_k_B: As in `RowSampling`.
        top_p_B: As in `RowSampling`.
        done_B: True where the text has ended, and in rows without a text.
        hidden_B1D: The target's final hidden state at the prompt's last token, and
        taps_B1AD: its taps there, from which another row may continue (`Rounds.repeat`).
        draft: The drafter's tensors; empty without a drafter.
        missed: Tokens decoded since the drafter last read: `count` [B], `tokens` [B, M] and the target's `taps` [B, M, A, D];
            empty if drafting never pauses.
    """

    cache: Tensor
    position_B: Tensor
    token_B: Tensor
    keys_B2: Tensor
    limit_B: Tensor
    ignore_end_B: Tensor
    temperature_B: Tensor
    top_k_B: Tensor
    top_p_B: Tensor
    done_B: Tensor
    hidden_B1D: Tensor
    taps_B1AD: Tensor
    draft: State
    missed: State

    def map(self, function: Callable[[Tensor], Tensor]) -> RoundState:
        """The state that holds the function's output for each tensor."""

        def mapped(value: Any) -> Any:
            return {name: function(tensor) for name, tensor in value.items()} if isinstance(value, dict) else function(value)

        return RoundState(**{name: mapped(value) for name, value in vars(self).items()})

    def rows(self, start: int, stop: int) -> RoundState:
        """A view of some rows; for all rows the state itself."""
        return self if stop - start == len(self.done_B) else self.map(lambda tensor: tensor[start:stop])

    def copy_row(self, source: int, target: int, slots: int) -> None:
        """Copies a row to another one; of the target's cache the first `slots` slots."""
        for name, value in vars(self).items():
            for tensor in value.values() if isinstance(value, dict) else [value[:, :, :, :slots] if name == "cache" else value]:
                tensor[target].copy_(tensor[source])


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
        sampling: Temperature, top-k, top-p, the same for all rows; or `Mixed` where each row has its own.
        shape: Shape of the draft; the root alone decodes plainly.
        verification: Decides which tokens are accepted.
        logprobs: Also return the log-probability of each emitted token.
        observe: Called in each round with its trace; rounds then run eagerly.
        can_pause: Rounds without a draft may come between others; their tokens are stored for the drafter to read later.
        plain: Rounds draft nothing, emit one token, and compute as many rows as verifying the shape takes.
        top: With `logprobs`, also return this number of likeliest tokens at each position.
        processed: Log-probabilities are those of the distribution that tokens are drawn from, not of temperature 1.
    """

    sampling: Sampling | Mixed
    shape: Shape
    verification: Verification = Coupled()
    logprobs: bool = False
    observe: Callable[[Trace], None] | None = None
    can_pause: bool = False
    plain: bool = False
    top: int = 0
    processed: bool = False

    @property
    def filters(self) -> bool:
        """Whether any row has a top-k or top-p."""
        sampling = self.sampling
        return sampling.filters if isinstance(sampling, Mixed) else sampling.top_k > 0 or sampling.top_p < 1


@dataclass(frozen=True)
class RoundOutput:
    """What a round emitted, and how much it drafted.

    Attributes:
        emitted_BP: Token ids; -1 where the target's logits are not finite.
        counts_B: Number of tokens that each row emitted.
        logprobs_BP: Log-probabilities of the emitted tokens, if requested.
        depth: Depth of the verified draft.
        drafted: Number of tokens drafted in each row, verified or not.
        levels: Number of draft levels run.
        paused: Whether a policy chose not to draft.
        verified_B: Number of tokens verified in each row, where rows differ; otherwise None, and each verified `depth`.
        chances_BD: As in `Draft`.
        features_BD: As in `Draft`.
        top_BPK: The likeliest tokens at each position, if requested.
        top_logprobs_BPK: Their log-probabilities.
    """

    emitted_BP: Tensor
    counts_B: Tensor
    logprobs_BP: Tensor | None = None
    depth: int = 0
    drafted: int = 0
    levels: int = 0
    paused: bool = False
    verified_B: Tensor | None = None
    chances_BD: Tensor | None = None
    features_BD: Tensor | None = None
    top_BPK: Tensor | None = None
    top_logprobs_BPK: Tensor | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors among its fields, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def verified(self, row: int) -> int:
        """Number of tokens verified in a row."""
        return self.depth if self.verified_B is None else int(self.verified_B[row])


class Rounds:
    """Runs rounds over the static tensors of a target and a drafter; of requests and texts it knows end ids and length limits.

    Args:
        target: The decoder that verifies.
        drafter: The drafter, or None.

    Attributes:
        updates: Number of times that weights were replaced; what older weights have read is not shared.
        seconds: Time spent in eager rounds since the scheduler last set it to 0: draft, target, verify.
    """

    def __init__(self, target: Decoder, drafter: Drafter | None) -> None:
        self.target, self.drafter, self.updates = target, drafter, 0
        self.taps = () if drafter is None else drafter.taps
        self.device = target.embed.weight.device
        # Every tensor of end ids ever used is retained, because captured graphs point to them.
        self._ends: dict[tuple[int, ...], Tensor] = {}
        self._padded: dict[int, Tree] = {}
        self.set_end_ids(())
        self.vocabulary = torch.arange(target.shape.vocab_size, device=self.device)
        self.handle = TargetHandle(target.embed, target.head, target.shape.vocab_size)
        self.seconds = {"draft": 0.0, "target": 0.0, "verify": 0.0}

    def set_end_ids(self, end_ids: Sequence[int]) -> None:
        """Replaces the token ids that end a text; they are part of a graph's key."""
        self.end_key = tuple(end_ids)
        self.end_ids = self._ends.setdefault(self.end_key, torch.tensor(self.end_key, dtype=torch.long, device=self.device))

    def new_state(self, batch_size: int, slots: int, can_pause: bool = False) -> RoundState:
        """Static tensors for `batch_size` free rows of `slots` cache slots; `can_pause` adds the buffer of missed tokens."""
        B, weight, device, missed = batch_size, self.target.embed.weight, self.device, {}
        if can_pause:
            missed["count"] = torch.zeros(B, dtype=torch.long, device=device)
            missed["tokens"] = torch.zeros(B, MISSED, dtype=torch.long, device=device)
            missed["taps"] = weight.new_zeros(B, MISSED, len(self.taps), weight.shape[1])
        return RoundState(
            cache=self.target.new_cache(B, slots, device, weight.dtype),
            position_B=torch.ones(B, dtype=torch.long, device=device),
            token_B=torch.zeros(B, dtype=torch.long, device=device),
            keys_B2=torch.zeros(B, 2, dtype=torch.int32, device=device),
            limit_B=torch.zeros(B, dtype=torch.long, device=device),
            ignore_end_B=torch.zeros(B, dtype=torch.bool, device=device),
            temperature_B=torch.zeros(B, device=device),
            top_k_B=torch.zeros(B, dtype=torch.long, device=device),
            top_p_B=torch.ones(B, device=device),
            done_B=torch.ones(B, dtype=torch.bool, device=device),
            hidden_B1D=weight.new_zeros(B, 1, weight.shape[1]),
            taps_B1AD=weight.new_zeros(B, 1, len(self.taps), weight.shape[1]),
            draft={} if self.drafter is None else self.drafter.init_state(B, slots, device, weight.dtype),
            missed=missed,
        )

    def __call__(self, plan: Plan, state: RoundState, span: int, levels: int | None = None) -> RoundOutput:
        """Runs one round of every row; a row whose text has ended emits nothing and keeps its root.

        Args:
            plan: What kind of round.
            state: From `new_state`, or a view of its first rows; changed in place.
            span: Upper bound of the cache slots in use in this round, the tree's scratch slots included; only attention with a
                bias reads it.
            levels: Largest number of levels to draft; None for the shape's depth.
        """
        rule, started = plan.verification, perf_counter()
        # Step 1: draft, level by level.
        noise = self.noise(plan, state)
        draft = self.draft(plan, state, noise, span, levels)
        drafted = perf_counter()
        # Step 2: verify. One target forward over all nodes.
        verified = draft if rule.verifies_last_level else without_last_level(draft)
        logits, taps = self.evaluate(verified, state, span)
        evaluated = perf_counter()
        # Step 3: accept the longest path that the rule allows; nothing in rows whose text has ended.
        if rule.chooses_by_score and not plan.filters and plan.observe is None and available(logits):
            verdict, finite_BN, logprobs = self._verify_by_kernels(plan, state, draft, logits)
        else:
            scores = self.sampling(plan, state).process(logits)
            verdict = rule.verify(draft, scores, noise, state.keys_B2, state.position_B)
            counts_B = verdict.counts_B.clamp(max=1) if plan.plain else verdict.counts_B
            verdict = replace(verdict, counts_B=counts_B.masked_fill(state.done_B, 0))
            if plan.observe is not None:
                plan.observe(Trace(verified, scores, verdict, state.keys_B2.clone(), state.position_B.clone()))
            finite_BN = logits.amax(-1).isfinite()
            shown = scores if plan.processed else logits
            logprobs = _logprobs(plan.top, verdict.along_path(shown), verdict.emitted_BP) if plan.logprobs else {}
        # Step 4: commit the path to both caches; its last token is the next root.
        self._commit_caches(plan, state, verified, verdict, taps, span)
        self._move_root(state, verdict)
        self.seconds["draft"] += drafted - started
        self.seconds["target"] += evaluated - drafted
        self.seconds["verify"] += perf_counter() - evaluated
        return RoundOutput(
            verdict.emitted_BP.masked_fill(~verdict.along_path(finite_BN), -1),
            verdict.counts_B,
            depth=0 if plan.plain else verified.shape.depth,
            drafted=draft.levels if draft.shape.is_chain else verified.shape.size - 1,
            levels=draft.levels,
            paused=plan.can_pause and not draft.levels,
            verified_B=None if draft.packing is None else draft.packing.lengths_B - 1,
            chances_BD=draft.chances_BD,
            features_BD=draft.features_BD,
            **logprobs,
        )

    def sampling(self, plan: Plan, state: RoundState) -> Sampling | RowSampling:
        """How logits become distributions, with the parameters of the rows if they have their own."""
        if isinstance(plan.sampling, Sampling):
            return plan.sampling
        return RowSampling(plan.sampling, state.temperature_B, state.top_k_B, state.top_p_B)

    def noise(self, plan: Plan, state: RoundState) -> Noise | None:
        """The round's Gumbel noise, or None at temperature 0: a hash of request and position, so replays draw new numbers."""
        rule, shape, position_B = plan.verification, plan.shape, state.position_B
        sampling = self.sampling(plan, state)
        if sampling.greedy:
            return None
        rows, silent_B = 4 if shape.key is None else shape.depth + 1, _silent(sampling)
        return Noise(rule.noise_keys(state.keys_B2, position_B), position_B, self.vocabulary, rule.stream, rows, silent_B)

    def draft(self, plan: Plan, state: RoundState, noise: Noise | None, span: int, levels: int | None = None) -> Draft:
        """The tree that the drafter proposes; the root alone where nothing is drafted."""
        shape, rule = plan.shape, plan.verification
        if plan.plain:
            if shape.size not in self._padded:
                self._padded[shape.size] = build(chain(shape.size - 1), self.device)
            padded = self._padded[shape.size]
            return Draft(padded, state.token_B[:, None].expand(-1, shape.size), padded.topology, 0)
        if self.drafter is None or not shape.depth:
            assert isinstance(shape, Tree)
            return Draft(shape, state.token_B[:, None], shape.topology, 0)
        steps = Steps(
            self.drafter,
            state.draft,
            self.handle,
            state.token_B,
            state.position_B,
            self.sampling(plan, state),
            noise if rule.draft_sees_noise else None,
            span,
            levels,
            keep_logits=rule.needs_logits or plan.observe is not None,
            keep_signals=plan.observe is not None,
            done_B=state.done_B,
        )
        draft = shape.grow(steps)
        assert draft.packing is None or rule.may_drop
        return draft

    def evaluate(self, draft: Draft, state: RoundState, span: int) -> tuple[Tensor, Tensor | None]:
        """The target's logits [B, N, V] at every node and its taps; the nodes' keys and values go to scratch slots.

        A chain's nodes lie in the slots of their positions, so a causal mask is enough. Where rows verify different numbers of
        nodes, logits and taps of the padding are those of the row's root.
        """
        position, topology, packing = state.position_B, draft.topology, draft.packing
        positions = position[:, None] + topology.depths_BN
        if draft.shape.is_chain:
            slots, visible = positions, Visible(position.int())
        else:
            slots = position[:, None] + torch.arange(draft.shape.size, device=position.device)
            visible = Visible(position.int(), topology.bits_BNW)
        tokens = draft.tokens_BN if packing is None else packing.pack(draft.tokens_BN)
        hidden, taps = self.target(tokens, positions, visible, state.cache, slots, self.taps, packing, span)
        logits = self.target.head(hidden)
        if packing is None:
            return logits, taps
        return packing.pad(logits), None if taps is None else packing.pad(taps)

    def _verify_by_kernels(
        self, plan: Plan, state: RoundState, draft: Draft, logits_BNV: Tensor
    ) -> tuple[Verdict, Tensor, dict[str, Tensor]]:
        """What `Coupled` accepts, without tensors of scores and noise; whether each node's logits are finite; and requested
        log-probabilities as fields.
        """
        from trainkit.layers.kernels.choose import choose
        from trainkit.layers.kernels.walk import walk

        temperature_B = state.temperature_B
        if isinstance(plan.sampling, Sampling):
            temperature_B = torch.full_like(temperature_B, plan.sampling.temperature)
        positions_BN = state.position_B[:, None] + 1 + draft.topology.depths_BN
        chosen_BN, logprobs_BN = choose(
            logits_BNV,
            temperature_B,
            state.keys_B2,
            positions_BN,
            plan.verification.stream,
            plan.logprobs and not plan.top,
            plan.processed,
        )
        finite_BN = chosen_BN >= 0
        chosen_BN.clamp_(min=0)  # -1 after an overflow, where any token will do
        parents_BN = None if draft.shape.is_chain else draft.topology.parents_BN
        lengths_B = None if draft.packing is None else draft.packing.lengths_B
        fields = walk(chosen_BN, draft.tokens_BN, parents_BN, state.done_B, draft.shape.depth, lengths_B, plan.plain)
        verdict = Verdict(*fields)
        if plan.top:
            shown_BPV = verdict.along_path(logits_BNV)
            if plan.processed:
                shown_BPV = self.sampling(plan, state).process(shown_BPV)
            return verdict, finite_BN, _logprobs(plan.top, shown_BPV, verdict.emitted_BP)
        return verdict, finite_BN, {} if logprobs_BN is None else {"logprobs_BP": verdict.along_path(logprobs_BN)}

    def _commit_caches(
        self, plan: Plan, state: RoundState, draft: Draft, verdict: Verdict, taps: Tensor | None, span: int
    ) -> None:
        """Compacts the accepted path in both caches; in a pause, stores the root for the drafter to read later."""
        path, position, counts = verdict.path_BP, state.position_B, verdict.counts_B
        if path is not None:
            move_slots(state.cache, position[:, None] + path, position)
        if self.drafter is not None and draft.levels:
            numbers = path if draft.drafter_numbers_BN is None else verdict.along_path(draft.drafter_numbers_BN)
            taps = None if taps is None else verdict.along_path(taps)
            tokens = verdict.along_path(draft.tokens_BN)
            accepted = Accepted(numbers, tokens, verdict.emitted_BP, counts, position, taps)
            self.drafter.commit(state.draft, accepted, self.handle, span)
        elif self.drafter is not None and plan.can_pause:  # `catch_up` has made room
            index_B1 = state.missed["count"].clamp(max=MISSED - 1)[:, None]
            state.missed["tokens"].scatter_(1, index_B1, draft.tokens_BN)
            if taps is not None:
                state.missed["taps"].scatter_(1, index_B1[..., None, None].expand_as(taps), taps)
            state.missed["count"].add_(counts.clamp(max=1))

    def _move_root(self, state: RoundState, verdict: Verdict) -> None:
        """Makes the last emitted token the root, and marks the rows whose text has ended."""
        if available(state.cache):
            from trainkit.layers.kernels.walk import move_root

            text = (state.limit_B, state.ignore_end_B, state.token_B, state.position_B, state.done_B)
            return move_root(verdict.emitted_BP, verdict.counts_B, self.end_ids, *text)
        emitted, counts = verdict.emitted_BP, verdict.counts_B
        last = emitted.gather(1, (counts - 1).clamp(min=0)[:, None])[:, 0]
        state.token_B.copy_(torch.where(counts > 0, last, state.token_B))
        state.position_B.add_(counts)
        inside = torch.arange(emitted.shape[1], device=emitted.device) < counts[:, None]
        ended = ((emitted[..., None] == self.end_ids).any(-1) & inside).any(1)
        state.done_B.logical_or_(ended & ~state.ignore_end_B | (state.position_B + 1 >= state.limit_B))

    def prefill(
        self,
        plan: Plan,
        state: RoundState,
        prompts: Sequence[Tensor],
        begins: Sequence[int],
        ends: Sequence[int],
        later: bool = False,
    ) -> RoundOutput | None:
        """Reads a chunk of each row's prompt after the chunks before it; returns None if no prompt ends in its chunk.

        A row whose prompt ends in the chunk emits its first token, which becomes the root. Until then the row stays done, and
        rounds write nothing below the position that it has reached.

        Args:
            plan: The plan of the rounds that follow.
            state: The rows.
            prompts: The whole prompt of each row, on the device.
            begins: First position to read in each row; 0 in all rows or in none.
            ends: Position after the last one to read.
            later: The drafter does not read the chunk now: its tokens, at most `MISSED`, are stored for `catch_up`. Only for
                chunks that end a prompt.
        """
        # Step 1: the tokens of all rows, padded to the longest chunk, and those that follow them.
        pieces = list(zip(prompts, begins, ends, strict=True))
        counts, finals = [end - begin for _, begin, end in pieces], [end == len(prompt) for prompt, _, end in pieces]
        begin_B, counts_B, final_B = self.to_device([list(begins), counts, finals])
        final_B, T = final_B.bool(), max(counts)
        tokens_BT = pad_sequence([prompt[begin:end] for prompt, begin, end in pieces], batch_first=True)
        next_BT = pad_sequence([prompt[begin + 1 : end + 1] for prompt, begin, end in pieces], batch_first=True)
        next_BT = F.pad(next_BT, (0, T - next_BT.shape[1]))
        positions_BT = begin_B[:, None] + torch.arange(T, device=self.device)
        if min(counts) < T:  # padding past a row's end goes to its last slot
            positions_BT = positions_BT.clamp(max=state.cache.shape[3] - 1)
        # Step 2: the target reads them.
        visible, span, output = Visible.causal(positions_BT), max(ends), None
        hidden_BTD, taps = self.target(tokens_BT, positions_BT, visible, state.cache, positions_BT, self.taps, span=span)
        chunk = Chunk(tokens_BT, next_BT, positions_BT, taps, begins[0] > 0, counts_B if min(counts) < T else None)
        # Step 3: rows whose prompt ends choose their first token.
        state.position_B.copy_(begin_B + counts_B - final_B.long())
        state.done_B.copy_(~final_B)
        if any(finals):
            state.hidden_B1D.copy_(chunk.last(hidden_BTD))
            if taps is not None:
                state.taps_B1AD.copy_(chunk.last(taps))
            output = self._first_token(plan, state, chunk.last(hidden_BTD), final_B)
            last_B1 = counts_B[:, None] - 1
            next_BT.scatter_(1, last_B1, torch.where(final_B[:, None], state.token_B[:, None], next_BT.gather(1, last_B1)))
        # Step 4: the drafter reads them too, now or later.
        if later:
            state.missed["tokens"][:, :T] = tokens_BT
            if taps is not None:
                state.missed["taps"][:, :T] = taps
            state.missed["count"].copy_(counts_B)
        elif self.drafter is not None and plan.shape.depth:
            self.drafter.prefill(state.draft, chunk, self.handle, span)
        return output

    def repeat(self, plan: Plan, state: RoundState, prompt_T: Tensor) -> RoundOutput:
        """The first token after a prompt that the target has read in this row, or in the row that this one is a copy of.

        The target reads nothing. The drafter, which has read the prompt too, reads its last token again, because what it stores
        there may depend on the token that follows.

        Args:
            plan: The plan of the rounds that follow.
            state: The row; the copy may have been made after further rounds.
            prompt_T: The whole prompt, on the device.
        """
        last = len(prompt_T) - 1
        state.position_B.fill_(last)
        state.done_B.fill_(False)
        output = self._first_token(plan, state, state.hidden_B1D, torch.ones_like(state.done_B))
        if self.drafter is not None and plan.shape.depth:
            if last:
                self.drafter.resume(state.draft, prompt_T[None, last - 1 : last])
            positions_B1, taps = torch.full((1, 1), last, device=self.device), state.taps_B1AD if self.taps else None
            chunk = Chunk(prompt_T[None, last:], state.token_B[:, None], positions_B1, taps, continues=last > 0)
            self.drafter.prefill(state.draft, chunk, self.handle, last + 1)
        return output

    def _first_token(self, plan: Plan, state: RoundState, hidden_B1D: Tensor, final_B: Tensor) -> RoundOutput:
        """The token after each prompt that has been read, -1 if the target's logits are not finite; it becomes the root."""
        logits, sampling = self.target.head(hidden_B1D), self.sampling(plan, state)
        if state.missed:
            state.missed["count"].zero_()
        scores = sampling.process(logits)
        if not sampling.greedy:
            scores = scores + Noise(state.keys_B2, state.position_B, self.vocabulary, CHOICE, 1, _silent(sampling))[:, :1]
        token_B1, finite_B1 = scores.argmax(-1), logits.amax(-1).isfinite()
        counts_B = final_B.long()
        self._move_root(state, Verdict(None, counts_B, token_B1))
        # NaN, for example after an overflow in float16, would silently become a token.
        state.done_B.logical_or_(~finite_B1[:, 0])
        shown = sampling.process(logits) if plan.processed else logits
        logprobs = _logprobs(plan.top, shown, token_B1) if plan.logprobs else {}
        return RoundOutput(token_B1.masked_fill(~finite_B1, -1), counts_B, **logprobs)

    def to_device(self, values: Sequence[Any]) -> Tensor:
        """The integers on the device; the host does not wait for the copy."""
        return torch.tensor(values, pin_memory=self.device.type == "cuda").to(self.device, non_blocking=True)

    def catch_up(self, state: RoundState, rows: Sequence[int]) -> None:
        """Lets the drafter read what these rows decoded without it. Reads counts on the host, so not in every round."""
        assert self.drafter is not None
        counts, roots = state.missed["count"].tolist(), state.position_B.tolist()
        for row in rows:
            missed, position = counts[row], roots[row]
            if missed:
                own = state.rows(row, row + 1)
                positions = torch.arange(position - missed, position, device=self.device)[None]
                tokens = own.missed["tokens"][:, :missed]
                following = torch.cat([tokens[:, 1:], own.token_B[:, None]], dim=1)
                taps = own.missed["taps"][:, :missed] if self.taps else None
                chunk = Chunk(tokens, following, positions, taps, continues=position > missed)
                self.drafter.prefill(own.draft, chunk, self.handle, position)
        state.missed["count"].zero_()


def _silent(sampling: Sampling | RowSampling) -> Tensor | None:
    """True in the rows that have no noise although others have."""
    return sampling.temperature_B == 0 if isinstance(sampling, RowSampling) else None


def _logprobs(top: int, logits_BPV: Tensor, tokens_BP: Tensor) -> dict[str, Any]:
    """Log-softmax of logits as fields of `RoundOutput`: of the tokens, and of the `top` likeliest ones."""
    log_p_BPV = logits_BPV.float().log_softmax(-1)
    fields = {"logprobs_BP": log_p_BPV.gather(2, tokens_BP[..., None])[..., 0]}
    if top:
        fields["top_logprobs_BPK"], fields["top_BPK"] = log_p_BPV.topk(top, dim=-1)
    return fields
