"""The runner: folders in, text out. Loads target and drafter, schedules requests over cache rows, stops, counts, streams.

Left out on purpose: paged caches and preemption. A request owns one row of a static cache from its prompt to its end.
"""

# B rows  P path length  T positions  V vocabulary

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from trainkit import bundle
from trainkit.drafters.base import Drafter, State, discover, load_kind
from trainkit.errors import UserError
from trainkit.layers.attention import causal_bias
from trainkit.layers.linear import stream_weights
from trainkit.models.load import copy_weights, load_decoder, read_config
from trainkit.models.shape import TargetShape
from trainkit.models.target import target_shape
from trainkit.runner.decoder import Plan, RoundOutput, Rounds, Trace
from trainkit.runner.graphs import Graphs
from trainkit.runner.sampling import Sampling, request_keys
from trainkit.runner.stats import Stats
from trainkit.runner.tree import RankPath, Tree, build, chain

Prompt = str | Sequence[int]
VERIFICATIONS = ("coupled", "residual")
DEFAULT_DEPTH = 4


@dataclass
class Output:
    """One generated continuation.

    Attributes:
        tokens: The new tokens, the end token included.
        text: Their text without special tokens, cut before a stop string.
        finish: `end` (end token), `stop` (stop string) or `length`.
        stats: Rounds and accepted lengths.
        logprobs: Log-probability of each token under the target at temperature 1, or None.
    """

    tokens: list[int]
    text: str
    finish: str
    stats: Stats
    logprobs: list[float] | None = None


@dataclass
class _Request:
    """A request being decoded, as the host knows it: `position` lags the device by the rounds in flight."""

    index: int
    prompt: list[int]
    keys: tuple[int, int]
    limit: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stats: Stats = field(default_factory=Stats)
    finish: str = ""
    text_end: int | None = None


@dataclass(frozen=True)
class _Stopping:
    """When a request's text ends."""

    end_ids: tuple[int, ...]
    stop: tuple[str, ...]
    decode: Callable[[Sequence[int]], str] | None


class Runner:
    """Decodes with a target, and a drafter if there is one. Build it with `Runner.load`.

    Attributes:
        seconds: Where the last call's time went: prefill, draft, target, verify, host (eager), in seconds.
        last: Counts of the last call, its outputs added together.
        rounds_run: Rounds the last call ran, each over all of its rows.
        lag: Rounds the host reads behind the device: none on a CPU, one on a GPU.
        observe: Set to a function to receive every round's `Trace`; runs eagerly then.
    """

    def __init__(
        self, rounds: Rounds, shape: TargetShape, folder: Path | None, max_batch: int, max_len: int, capture: bool
    ) -> None:
        self.rounds, self.shape, self.folder = rounds, shape, folder
        self.max_batch, self.max_len = max_batch, max_len
        self.device = rounds.target.embed.weight.device
        self.lag = 1 if self.device.type == "cuda" else 0
        self.observe: Callable[[Trace], None] | None = None
        self.seconds: dict[str, float] = {}
        self.rounds_run = 0
        self.last = Stats()
        self.graphs = Graphs() if capture else None
        self._trees: dict[tuple[RankPath, ...], Tree] = {}
        self._turn = 0
        self._states: tuple[int, int, State, State] | None = None

    @staticmethod
    def load(
        target: str | Path,
        drafter: str | Path | None = None,
        device: str = "cpu",
        dtype: str = "float32",
        max_batch: int = 8,
        max_len: int | None = None,
        capture: bool | None = None,
    ) -> Runner:
        """Loads a target folder and a drafter bundle.

        Args:
            target: Hugging Face folder of a Llama, Mistral, Qwen2 or Qwen3 model.
            drafter: A bundle of ours, or a plain Hugging Face folder of a small model with the same tokenizer.
            device: Torch device.
            dtype: float32, bfloat16 or float16.
            max_batch: Most rows decoded together; longer lists of prompts queue.
            max_len: Most tokens of prompt and continuation together; 2048, or what the model covers if less, by default.
            capture: Capture rounds as CUDA graphs; where there is a GPU by default.

        Raises:
            UserError: a folder is missing or broken, the architecture is not covered, or drafter and target do not fit.
        """
        where = torch.device(device)
        if where.type == "cuda" and not torch.cuda.is_available():
            raise UserError(f"device {device!r}: no CUDA device is available here; use device cpu")
        kind = getattr(torch, dtype, None)
        if kind not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise UserError(f"dtype {dtype!r}: must be float32, bfloat16, float16 or float64")
        folder = Path(target)
        if max_batch < 1:
            raise UserError(f"max_batch {max_batch}: must be at least 1")
        length = max_len or min(2048, read_config(folder).max_position_embeddings)
        decoder = load_decoder(folder, where, kind, length)
        shape = target_shape(folder)
        draft = None if drafter is None else load_drafter(Path(drafter), folder, shape).to(device=where, dtype=kind)
        return Runner.of(decoder, draft, shape, folder, max_batch, length, capture)

    @staticmethod
    def of(
        target: Any, drafter: Drafter | None, shape: TargetShape, folder: Path | None = None, max_batch: int = 8,
        max_len: int = 2048, capture: bool | None = None,
    ) -> Runner:  # fmt: skip
        """A runner over modules that are already in memory."""
        device = target.embed.weight.device
        if drafter is not None:
            drafter.requires_grad_(False).eval()
        stream_weights(target, *([] if drafter is None else [drafter]))
        rounds = Rounds(target, drafter, shape.end_ids)
        return Runner(rounds, shape, folder, max_batch, max_len, device.type == "cuda" if capture is None else capture)

    @property
    def drafter(self) -> Drafter | None:
        """What drafts, or None."""
        return self.rounds.drafter

    @cached_property
    def tokenizer(self) -> Any:
        """The target folder's tokenizer.

        Raises:
            UserError: there is none.
        """
        from transformers import AutoTokenizer

        if self.folder is None:
            raise UserError("this runner was built without a folder, so it has no tokenizer; give prompts as token ids")
        try:
            return AutoTokenizer.from_pretrained(self.folder)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.folder}: no tokenizer there ({str(error).splitlines()[0]})") from error

    def generate(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        depth: int | None = None,
        verify: str = "coupled",
        stop: Sequence[str] = (),
        n: int = 1,
        logprobs: bool = False,
        tree: Sequence[RankPath] | None = None,
        ignore_end: bool = False,
        progress: bool = False,
    ) -> list[Output]:
        """Continues every prompt; `n` outputs for each, in the order of the prompts.

        Args:
            prompts: Raw text (no template, nothing prepended) or token ids.
            max_new_tokens: Most tokens for each, the end token included.
            temperature: 0 takes the likeliest token; above, samples.
            top_p: Nucleus mass.
            top_k: Likeliest tokens kept; 0 keeps all.
            seed: With the prompt's place in the list it fixes every draw, whatever the batch, depth or drafter.
            depth: Tokens drafted a round, a chain; 0 decodes plainly; the drafter's own tree, or a chain of 4, by default.
            verify: `coupled` (equals plain seeded decoding token for token) or `residual` (equal in distribution).
            stop: Strings that end a text; the text is cut before them.
            n: Samples for each prompt.
            logprobs: Also return each token's log-probability.
            tree: Rank paths of a static draft tree, instead of `depth`.
            ignore_end: Go on to `max_new_tokens` past end tokens; for measuring.
            progress: Show a progress bar.

        Raises:
            UserError: an argument out of range, an empty prompt, or one longer than the cache.
        """
        plan, stopping = self._plan(temperature, top_p, top_k, depth, tree, verify, logprobs), self._stopping(stop, ignore_end)
        if max_new_tokens < 1 or n < 1:
            raise UserError(f"max_new_tokens {max_new_tokens} and n {n} must be at least 1")
        requests = [
            self._request(prompt, i, sample, seed, max_new_tokens, n) for i, prompt in enumerate(prompts) for sample in range(n)
        ]
        outputs: list[Output | None] = [None] * len(requests)
        bar = None
        if progress:
            from tqdm import tqdm

            bar = tqdm(total=len(requests), desc="decoding", unit="text")
        for request, finished in self._decode(requests, plan, stopping):
            if finished:
                outputs[request.index] = self._output(request, logprobs)
                if bar is not None:
                    bar.update()
        if bar is not None:
            bar.close()
        return [output for output in outputs if output is not None]

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[str]:
        """Yields the text of one prompt as rounds emit it; options as in `generate` (but `n` and `logprobs`)."""
        plan = self._plan(
            options.pop("temperature", 0.0), options.pop("top_p", 1.0), options.pop("top_k", 0), options.pop("depth", None),
            options.pop("tree", None), options.pop("verify", "coupled"), False,
        )  # fmt: skip
        stop = tuple(options.pop("stop", ()))
        stopping = self._stopping(stop, options.pop("ignore_end", False))
        limit = options.pop("max_new_tokens", 128)
        if limit < 1:
            raise UserError(f"max_new_tokens {limit} must be at least 1")
        request = self._request(prompt, 0, 0, options.pop("seed", 0), limit, 1)
        if options:
            raise UserError(f"stream has no option {next(iter(options))!r}")
        # a stop string may begin in text already decoded: hold back as many characters as it could still need
        held = max((len(s) for s in stop), default=1) - 1
        shown = 0
        for _, finished in self._decode([request], plan, stopping):
            text = self.tokenizer.decode(request.tokens, skip_special_tokens=True)
            if finished:
                text = text if request.text_end is None else text[: request.text_end]
                yield text[shown:]
            elif not text.endswith("\ufffd") and len(text) - held > shown:
                yield text[shown : len(text) - held]
                shown = len(text) - held

    @torch.inference_mode()
    def score(self, prompts: Sequence[Prompt], continuations: Sequence[Prompt], chunk: int = 256) -> list[list[float]]:
        """Log-probability of every continuation token after its prompt, under the target at temperature 1, in nats.

        Raises:
            UserError: the lists differ in length, a prompt or continuation is empty, or both exceed the cache.
        """
        if len(prompts) != len(continuations):
            raise UserError(f"score: {len(prompts)} prompts but {len(continuations)} continuations")
        self._turn += 1
        target, scores = self.rounds.target, []
        for i, (prompt, continuation) in enumerate(zip(prompts, continuations, strict=True)):
            head, tail = self._encode(prompt, i), self._encode(continuation, i)
            if len(head) + len(tail) > self.max_len:
                raise UserError(f"score: pair {i} has {len(head) + len(tail)} tokens, max_len is {self.max_len}")
            state, _ = self._state(1, self.max_len)
            tokens_T = torch.tensor(head + tail, device=self.device)
            found: list[Tensor] = []
            for start in range(0, len(tokens_T) - 1, chunk):
                tokens = tokens_T[None, start : min(start + chunk, len(tokens_T) - 1)]
                positions = torch.arange(start, start + tokens.shape[1], device=self.device)[None]
                bias = causal_bias(positions, start + tokens.shape[1], state["cache"].dtype)
                hidden, _ = target(tokens, positions, bias, state["cache"][:1], positions)
                skip = max(0, len(head) - 1 - start)
                if skip < tokens.shape[1]:
                    labels = tokens_T[start + skip + 1 : start + tokens.shape[1] + 1]
                    log_p = target.head(hidden[0, skip:]).float().log_softmax(-1)
                    found.append(log_p.gather(1, labels[:, None])[:, 0])
            scores.append(torch.cat(found).tolist())
        return scores

    def update(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copies new target weights, under their Hugging Face names, into the fused storage in place; graphs stay valid.

        Raises:
            UserError: a name or shape that the target does not have.
        """
        copy_weights(self.rounds.target, named_tensors, "update", complete=False)

    # what follows is the schedule

    def _plan(
        self, temperature: float, top_p: float, top_k: int, depth: int | None, tree: Sequence[RankPath] | None, verify: str,
        logprobs: bool,
    ) -> Plan:  # fmt: skip
        if verify not in VERIFICATIONS:
            raise UserError(f"verify {verify!r}: must be one of {', '.join(VERIFICATIONS)}")
        if tree is not None and depth is not None:
            raise UserError("give depth or tree, not both")
        if depth is not None and depth < 0:
            raise UserError(f"depth {depth}: must be at least 0")
        if self.drafter is None:
            if depth or tree:
                raise UserError("depth or tree given, but this runner was loaded without a drafter")
            paths: tuple[RankPath, ...] = ()
        elif tree is not None:
            paths = tuple(tuple(path) for path in tree)
        elif depth is not None:
            paths = chain(depth)
        else:
            paths = self.drafter.default_tree or chain(DEFAULT_DEPTH)
        if paths not in self._trees:
            self._trees[paths] = build(paths, self.device)
        sampling = Sampling(temperature, top_k, top_p)
        return Plan(sampling, self._trees[paths], verify, logprobs, self.observe)

    def _stopping(self, stop: Sequence[str], ignore_end: bool) -> _Stopping:
        if isinstance(stop, str):
            stop = (stop,)
        if any(not s for s in stop):
            raise UserError("stop: an empty string would end every text at once")
        decode = (lambda tokens: self.tokenizer.decode(tokens, skip_special_tokens=True)) if stop else None
        return _Stopping(() if ignore_end else self.shape.end_ids, tuple(stop), decode)

    def _encode(self, prompt: Prompt, index: int) -> list[int]:
        if isinstance(prompt, str):
            tokens = self.tokenizer.encode(prompt, add_special_tokens=False)
        else:
            tokens = [int(token) for token in prompt]
        if not tokens:
            raise UserError(f"prompt {index} is empty; give at least one token")
        worst = max(tokens) if min(tokens) >= 0 else min(tokens)
        if not 0 <= worst < self.shape.decoder.vocab_size:
            raise UserError(f"prompt {index}: token id {worst} is outside the vocabulary of {self.shape.decoder.vocab_size}")
        return tokens

    def _request(self, prompt: Prompt, prompt_index: int, sample: int, seed: int, max_new_tokens: int, n: int) -> _Request:
        tokens = self._encode(prompt, prompt_index)
        if len(tokens) >= self.max_len:
            raise UserError(
                f"prompt {prompt_index} has {len(tokens)} tokens, and max_len {self.max_len} must hold one new one too; "
                "shorten it or load with a larger max_len"
            )
        limit = min(len(tokens) + max_new_tokens, self.max_len)
        return _Request(prompt_index * n + sample, tokens, request_keys(seed, prompt_index, sample), limit)

    def _state(self, batch_size: int, slots: int) -> tuple[State, State]:
        """Static tensors for at least this many rows and slots; made anew only when they must grow."""
        if self._states is None or self._states[0] < batch_size or self._states[1] < slots:
            if self.graphs is not None:
                self.graphs.clear()
            rows, size = batch_size, -(-slots // 64) * 64
            if self._states is not None:
                rows, size = max(rows, self._states[0]), max(size, self._states[1])
            self._states = None
            self.rounds.target.reserve_positions(size)
            weight = self.rounds.target.embed.weight
            draft = {} if self.drafter is None else self.drafter.init_state(rows, size, self.device, weight.dtype)
            self._states = (rows, size, self.rounds.new_state(rows, size), draft)
        return self._states[2], self._states[3]

    @torch.inference_mode()
    def _decode(self, requests: Sequence[_Request], plan: Plan, stopping: _Stopping) -> Iterator[tuple[_Request, bool]]:
        """Decodes over at most `max_batch` rows; yields a request whenever it got tokens, and whether it is finished.

        The host reads `lag` rounds behind the device, so that a GPU never waits for the host.
        """
        began = perf_counter()
        self._turn += 1
        turn = self._turn
        self.rounds.set_end_ids(stopping.end_ids)
        step = plan.tree.depth + 1
        slack = plan.tree.size + (self.lag + 1) * step
        batch = min(self.max_batch, len(requests))
        state, draft_state = self._state(batch, self.max_len + slack)
        state["done"].fill_(True)
        waiting, rows = deque(requests), []
        flight: deque[tuple[list[_Request], Callable[[], RoundOutput]]] = deque()
        seconds, rounds_run = {"prefill": 0.0}, 0

        while waiting or rows:
            while waiting and len(rows) < batch:
                request = waiting.popleft()
                mark = perf_counter()
                first = self._start(request, len(rows), plan, state, draft_state)
                rows.append(request)
                self._take(request, first, 0, stopping, prefill=True)
                seconds["prefill"] += perf_counter() - mark
                yield request, bool(request.finish)
                self._check_turn(turn)
                if request.finish:
                    rows.pop()
            if not rows:
                continue
            ahead = (len(flight) + 1) * step
            longest = max(len(r.prompt) + len(r.tokens) for r in rows)
            span = self._span(longest + ahead + plan.tree.size)
            output = self._round(plan, state, draft_state, len(rows), span)
            rounds_run += 1
            flight.append((list(rows), self._fetch(output)))
            if len(flight) <= self.lag:
                continue
            members, fetch = flight.popleft()
            emitted = fetch()
            for slot, request in enumerate(members):
                if not request.finish:
                    self._take(request, emitted, slot, stopping)
                    yield request, bool(request.finish)
                    self._check_turn(turn)
            self._release(rows, state, draft_state)
        self.rounds_run, self.seconds = rounds_run, {**seconds, **plan.seconds}
        self.seconds["host"] = perf_counter() - began - sum(self.seconds.values())
        self.last = Stats.merge(request.stats for request in requests)

    def _check_turn(self, turn: int) -> None:
        """Raises UserError where another call has taken the rows since: a stream left open, then gone on with."""
        if self._turn != turn:
            raise UserError(
                "this stream cannot go on: its runner has begun another generate, stream or score; finish one first"
            )

    def _start(self, request: _Request, slot: int, plan: Plan, state: State, draft_state: State) -> RoundOutput:
        """Prefills a free row and returns its first token."""
        row, draft_row = _rows(state, slot, slot + 1), _rows(draft_state, slot, slot + 1)
        row["keys"].copy_(torch.tensor([request.keys], dtype=torch.int32))
        row["limit"].fill_(request.limit)
        output = self.rounds.prefill(plan, row, draft_row, torch.tensor(request.prompt, device=self.device))
        logprobs = None if output.logprobs_BP is None else output.logprobs_BP.cpu()
        return RoundOutput(output.emitted_BP.cpu(), output.counts_B.cpu(), logprobs)

    def _span(self, needed: int) -> int:
        """Cache slots looked at: few sizes, so that few graphs are captured; no more than there are."""
        assert self._states is not None
        size = -(-needed // 64) * 64 if self.graphs is None else max(256, 1 << (needed - 1).bit_length())
        return min(size, self._states[1])

    def _round(self, plan: Plan, state: State, draft_state: State, active: int, span: int) -> RoundOutput:
        if self.graphs is None or plan.observe is not None:
            return self.rounds(plan, _rows(state, 0, active), _rows(draft_state, 0, active), span)
        batch = min(1 << (active - 1).bit_length(), state["done"].shape[0])
        state["done"][active:batch].fill_(True)
        # a padded row's old position may lie past this round's span
        state["position"][active:batch].fill_(1)
        views = _rows(state, 0, batch), _rows(draft_state, 0, batch)
        key = (plan.sampling, plan.tree.paths, plan.verify, plan.logprobs, batch, span, self.rounds.end_key)
        return self.graphs.run(key, lambda: self.rounds(plan, *views, span), views[0]["done"])

    def _fetch(self, output: RoundOutput) -> Callable[[], RoundOutput]:
        """Starts the copy of a round's output to the host; the returned function waits for it."""
        if self.device.type != "cuda":
            return lambda: output
        parts = (output.emitted_BP, output.counts_B, output.logprobs_BP)
        pinned = [None if t is None else torch.empty_like(t, device="cpu", pin_memory=True) for t in parts]
        copies = [None if p is None or t is None else p.copy_(t, non_blocking=True) for p, t in zip(pinned, parts, strict=True)]
        event = torch.cuda.Event()
        event.record()

        def wait() -> RoundOutput:
            event.synchronize()
            emitted, counts, logprobs = copies
            assert emitted is not None and counts is not None
            return RoundOutput(emitted, counts, logprobs)

        return wait

    def _take(self, request: _Request, output: RoundOutput, slot: int, stopping: _Stopping, prefill: bool = False) -> None:
        """Appends a round's tokens to a request, ends it inside the block where it ends, and counts the round."""
        count = int(output.counts_B[slot])
        emitted = output.emitted_BP[slot].tolist()[:count]
        kept = 0
        for token in emitted:
            request.tokens.append(token)
            kept += 1
            if token in stopping.end_ids:
                request.finish = "end"
            elif stopping.stop and stopping.decode is not None:
                text = stopping.decode(request.tokens)
                found = [at for at in map(text.find, stopping.stop) if at >= 0]
                if found:
                    request.finish, request.text_end = "stop", min(found)
            if not request.finish and len(request.prompt) + len(request.tokens) >= request.limit:
                request.finish = "length"
            if request.finish:
                break
        if output.logprobs_BP is not None:
            request.logprobs.extend(output.logprobs_BP[slot].tolist()[:kept])
        request.stats.tokens += kept
        if not prefill and kept < count:
            request.stats.cut_rounds += 1
        elif not prefill and count:
            request.stats.add_round(count - 1)

    def _release(self, rows: list[_Request], state: State, draft_state: State) -> None:
        """Gives the rows of finished requests back: the last active row moves into the hole."""
        for slot in reversed(range(len(rows))):
            if rows[slot].finish:
                last = len(rows) - 1
                if slot != last:
                    for tensors in (state, draft_state):
                        for tensor in tensors.values():
                            tensor[slot].copy_(tensor[last])
                rows[slot] = rows[last]
                rows.pop()
                state["done"][last].fill_(True)

    def _output(self, request: _Request, logprobs: bool) -> Output:
        text = ""
        # token ids can be continued without a tokenizer, as with a folder of weights alone
        if self.folder is not None and any(self.folder.glob("tokenizer*")):
            text = self.tokenizer.decode(request.tokens, skip_special_tokens=True)
            text = text if request.text_end is None else text[: request.text_end]
        return Output(request.tokens, text, request.finish, request.stats, request.logprobs if logprobs else None)


def _rows(state: State, start: int, stop: int) -> State:
    return {name: tensor[start:stop] for name, tensor in state.items()}


def load_drafter(folder: Path, target_folder: Path, shape: TargetShape) -> Drafter:
    """A drafter from a bundle of ours, or from a folder that an outside program wrote and a kind claims.

    Raises:
        UserError: no such folder, a broken bundle, or one made for another target.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a drafter bundle or a Hugging Face folder")
    found = bundle.read(folder) if bundle.is_bundle(folder) else None
    if found is not None and found.target:
        reads_hidden = bool(found.extra.get("taps"))
        bundle.check_fit(found.target, bundle.fingerprint(target_folder), shape.decoder.to_dict(), hidden=reads_hidden)
        return load_kind(found.kind).load(folder, shape, found.config)
    for kind in discover().values():
        if kind.claims(folder):
            return kind.load(folder, shape, {})
    raise UserError(f"{folder}: neither a trainkit bundle (no trainkit.json) nor a model folder that a drafter kind reads")
