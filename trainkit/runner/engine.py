"""The runner: folders in, text out. Loads target and drafter, turns prompts into requests and what comes of them into text.

Left out on purpose: paged caches and preemption; schedule.py gives each text a cache row of its own.
"""

# B rows  P path length  T positions  V vocabulary

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainkit import bundle
from trainkit.drafters.base import Drafter, load_bundle, load_outside
from trainkit.errors import UserError
from trainkit.layers.attention import causal_bias
from trainkit.layers.linear import stream_weights
from trainkit.models.load import copy_weights, covered_positions, find_device, load_decoder, read_tokenizer
from trainkit.models.predictor import AcceptancePredictor, load_predictor
from trainkit.models.shape import TargetShape
from trainkit.models.target import target_shape
from trainkit.runner.policies.build import Pacer
from trainkit.runner.policies.chain import Paced
from trainkit.runner.request import Options, Output, Request, Stopping, strings
from trainkit.runner.round import Plan, Rounds, Trace
from trainkit.runner.sampling import Sampling, request_keys
from trainkit.runner.scheduler import Schedule
from trainkit.runner.stats import Stats
from trainkit.runner.trees.shape import RankPath, Shape
from trainkit.runner.trees.static import Tree, build, chain
from trainkit.runner.verify import Typical

Prompt = str | Sequence[int]
VERIFICATIONS = ("coupled", "residual", "typical")
DEFAULT_DEPTH = 4


class Runner:
    """Decodes with a target, and a drafter if there is one. Build it with `Runner.load`.

    Attributes:
        observe: Set to a function to receive every round's `Trace`; runs eagerly then.
        predictor: Says how likely the drafter's proposals are to be kept, or None.
    """

    def __init__(
        self,
        rounds: Rounds,
        shape: TargetShape,
        folder: Path | None,
        max_batch: int,
        max_len: int,
        capture: bool,
        predictor: AcceptancePredictor | None = None,
    ) -> None:
        self.rounds, self.shape, self.folder = rounds, shape, folder
        self.max_len = max_len
        self.device = rounds.target.embed.weight.device
        self.observe: Callable[[Trace], None] | None = None
        self.schedule = Schedule(rounds, max_batch, max_len, capture)
        self.predictor = predictor
        self._trees: dict[tuple[RankPath, ...], Tree] = {}
        self.pacer = Pacer(rounds, self.schedule, max_len)

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
        where = find_device(device)
        kind = getattr(torch, dtype, None)
        if kind not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise UserError(f"dtype {dtype!r}: must be float32, bfloat16, float16 or float64")
        folder = Path(target)
        if max_batch < 1:
            raise UserError(f"max_batch {max_batch}: must be at least 1")
        length = max_len or min(2048, covered_positions(folder))
        decoder = load_decoder(folder, where, kind, length)
        shape = target_shape(folder)
        draft = None if drafter is None else load_drafter(Path(drafter), folder, shape).to(device=where, dtype=kind)
        predictor = None if drafter is None else load_bundle_predictor(Path(drafter), where)
        return Runner.from_modules(decoder, draft, shape, folder, max_batch, length, capture, predictor)

    @staticmethod
    def from_modules(
        target: Any,
        drafter: Drafter | None,
        shape: TargetShape,
        folder: Path | None = None,
        max_batch: int = 8,
        max_len: int = 2048,
        capture: bool | None = None,
        predictor: AcceptancePredictor | None = None,
    ) -> Runner:
        """A runner over modules that are already in memory."""
        device = target.embed.weight.device
        if drafter is not None:
            drafter.requires_grad_(False).eval()
        stream_weights(target, *([] if drafter is None else [drafter]))
        rounds = Rounds(target, drafter, shape.end_ids)
        captures = device.type == "cuda" if capture is None else capture
        return Runner(rounds, shape, folder, max_batch, max_len, captures, predictor)

    @property
    def seconds(self) -> dict[str, float]:
        """Where the last call's time went: prefill, draft, target, verify, host (eager), in seconds."""
        return self.schedule.seconds

    @property
    def last(self) -> Stats:
        """Counts of the last call, its outputs added together."""
        return self.schedule.last

    @property
    def rounds_run(self) -> int:
        """Rounds the last call ran, each over all of its rows."""
        return self.schedule.rounds_run

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
        if self.folder is None:
            raise UserError("this runner was built without a folder, so it has no tokenizer; give prompts as token ids")
        return read_tokenizer(self.folder)

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
        tree: Sequence[RankPath] | Shape | None = None,
        policy: str | None = None,
        ignore_end: bool = False,
        progress: bool = False,
        typical_epsilon: float = Typical.epsilon,
        typical_scale: float = Typical.scale,
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
            verify: `coupled` (equals plain seeded decoding token for token), `residual` (equal in distribution), or `typical`
                (LOSSY above temperature 0: keeps what the target finds plausible; outputs say `lossy`).
            stop: Strings that end a text; the text is cut before them.
            n: Samples for each prompt.
            logprobs: Also return each token's log-probability.
            tree: Rank paths of a static draft tree, or a shape such as `DynamicTree`, instead of `depth`.
            policy: How many of at most `depth` (10) tokens to draft, decided as it goes (runner/control.py): `cost`, by what
                drafting and verifying cost here and how likely each token is to be kept; `predictor:P` or `confidence:P`, until
                that chance, or the draft's own, falls below P; `ema`, by what was lately accepted; `fixed`. With a
                `DynamicTree`: `fixed`, ranked by the predictor, or `cost`, which also ends its growth and prunes it.
            ignore_end: Go on to `max_new_tokens` past end tokens; for measuring.
            progress: Show a progress bar.
            typical_epsilon: `typical` keeps a token whose probability is above the lower of this,
            typical_scale: and of this times exp(-entropy).

        Raises:
            UserError: an argument out of range, an empty prompt, or one longer than the cache.
        """
        options = Options(
            max_new_tokens,
            temperature,
            top_p,
            top_k,
            seed,
            depth,
            verify,
            strings(stop),
            logprobs,
            tree,
            policy,
            ignore_end,
            typical_epsilon,
            typical_scale,
        )
        if n < 1:
            raise UserError(f"n {n} must be at least 1")
        each = [(prompt, (i, sample)) for i, prompt in enumerate(prompts) for sample in range(n)]
        outputs: list[Output | None] = [None] * len(each)
        bar = None
        if progress:
            from tqdm import tqdm

            bar = tqdm(total=len(each), desc="decoding", unit=" texts", disable=None)
        for place, output in self._finished([prompt for prompt, _ in each], [draws for _, draws in each], options):
            outputs[place] = output
            if bar is not None:
                bar.update()
        if bar is not None:
            bar.close()
        return [output for output in outputs if output is not None]

    def generate_each(
        self, prompts: Sequence[Prompt], draws: Sequence[tuple[int, int]] | None = None, **options: Any
    ) -> Iterator[tuple[int, Output]]:
        """Continues every prompt and yields (its place in `prompts`, its output) as soon as it has ended.

        Args:
            prompts: As in `generate`.
            draws: For each prompt the pair of numbers that, with `seed`, fixes its draws; (place, 0), as `generate` has it, by
                default. A long job cut into calls gives each prompt the same pair in any cut.
            **options: As in `generate`, but `n` and `progress`. `verify="mixed"` with `share` lets draft and target write
                together (runner/verify.py): text to train on, not the target's.
        """
        chosen = Options.of("generate_each", options)
        pairs = [(place, 0) for place in range(len(prompts))] if draws is None else draws
        if len(pairs) != len(prompts):
            raise UserError(f"generate_each: {len(prompts)} prompts but {len(pairs)} draws")
        return self._finished(prompts, pairs, chosen)

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[str]:
        """Yields the text of one prompt as rounds emit it; options as in `generate` (but `n` and `logprobs`)."""
        chosen = Options.of("stream", options)
        stop = chosen.stop
        request = self._request(prompt, 0, (0, 0), chosen)
        # a stop string may begin in text already decoded: hold back as many characters as it could still need
        held = max((len(s) for s in stop), default=1) - 1
        shown = 0
        for _, finished in self.schedule.decode([request], self._plan(chosen), self._stopping(chosen)):
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
        self.schedule.begin()
        target, scores = self.rounds.target, []
        for i, (prompt, continuation) in enumerate(zip(prompts, continuations, strict=True)):
            head, tail = self._encode(prompt, i), self._encode(continuation, i)
            if len(head) + len(tail) > self.max_len:
                raise UserError(f"score: pair {i} has {len(head) + len(tail)} tokens, max_len is {self.max_len}")
            state, _ = self.schedule.state(1, self.max_len)
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

    def _finished(
        self, prompts: Sequence[Prompt], draws: Sequence[tuple[int, int]], options: Options
    ) -> Iterator[tuple[int, Output]]:
        requests = [
            self._request(prompt, place, pair, options) for place, (prompt, pair) in enumerate(zip(prompts, draws, strict=True))
        ]
        for request, finished in self.schedule.decode(requests, self._plan(options), self._stopping(options)):
            if finished:
                yield request.place, self._output(request, options.logprobs)

    def _plan(self, options: Options) -> Plan:
        tree, depth = options.tree, options.depth
        if options.verify == "mixed":
            if self.drafter is None or not depth or not 0 <= options.share <= 1:
                raise UserError("mixed text needs a drafter, a depth of at least 1 and a share between 0 and 1")
        elif options.verify not in VERIFICATIONS:
            raise UserError(f"verify {options.verify!r}: must be one of {', '.join(VERIFICATIONS)}")
        if tree is not None and depth is not None:
            raise UserError("give depth or tree, not both")
        if depth is not None and not 0 <= depth < self.max_len:
            raise UserError(f"depth {depth}: must be at least 0 and at most {self.max_len - 1}, what the cache holds")
        if self.drafter is None and (depth or tree):
            raise UserError("depth or tree given, but this runner was loaded without a drafter; give one (--drafter)")
        shape = tree if isinstance(tree, Shape) else self._static(tree, depth)
        if self.drafter is not None:
            deepest, widest = self.drafter.max_depth, self.drafter.max_width
            if deepest is not None and shape.depth > deepest:
                raise UserError(f"depth {shape.depth}: this drafter has heads for {deepest} tokens; draft at most so many")
            if widest is not None and shape.widest > widest:
                raise UserError(f"tree: {shape.widest} nodes on a level, this drafter expands at most {widest} together")
        if options.policy is not None:  # which may measure what such a draft costs
            shape = self.pacer.shape(options, self.predictor)
        sampling = Sampling(options.temperature, options.top_k, options.top_p)
        thresholds = Typical(options.typical_epsilon, options.typical_scale)
        pauses = isinstance(shape, Paced)
        return Plan(sampling, shape, options.verify, options.share, thresholds, options.logprobs, self.observe, pauses)

    def _static(self, tree: Sequence[RankPath] | None, depth: int | None) -> Tree:
        """The tree of these paths, or a chain of this depth, or what the drafter drafts by itself; the root without one."""
        if tree is not None:
            paths = tuple(tuple(path) for path in tree)
        elif self.drafter is None or depth is not None:
            paths = chain(depth or 0)
        else:
            paths = self.drafter.default_tree or chain(min(DEFAULT_DEPTH, self.drafter.max_depth or DEFAULT_DEPTH))
        if paths not in self._trees:
            self._trees[paths] = build(paths, self.device)
        return self._trees[paths]

    def _stopping(self, options: Options) -> Stopping:
        decode = (lambda tokens: self.tokenizer.decode(tokens, skip_special_tokens=True)) if options.stop else None
        return Stopping(() if options.ignore_end else self.shape.end_ids, options.stop, decode)

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

    def _request(self, prompt: Prompt, place: int, draws: tuple[int, int], options: Options) -> Request:
        tokens = self._encode(prompt, place)
        if len(tokens) >= self.max_len:
            raise UserError(
                f"prompt {place} has {len(tokens)} tokens, and max_len {self.max_len} must hold one new one too; "
                "shorten it or load with a larger max_len"
            )
        limit = min(len(tokens) + options.max_new_tokens, self.max_len)
        return Request(place, tokens, request_keys(options.seed, *draws), limit, stats=Stats(lossy=options.lossy))

    def _output(self, request: Request, logprobs: bool) -> Output:
        text = ""
        # token ids can be continued without a tokenizer, as with a folder of weights alone
        if self.folder is not None and any(self.folder.glob("tokenizer*")):
            text = self.tokenizer.decode(request.tokens, skip_special_tokens=True)
            text = text if request.text_end is None else text[: request.text_end]
        return Output(request.tokens, text, request.finish, request.stats, request.logprobs if logprobs else None)


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
        return load_bundle(found, shape)
    return load_outside(folder, shape)


def load_bundle_predictor(folder: Path, device: torch.device) -> AcceptancePredictor | None:
    """The acceptance predictor in a drafter's bundle, if it has one; in float32 whatever the drafter is in.

    Raises:
        UserError: the bundle speaks of one that is missing or of other sizes.
    """
    config = bundle.read(folder, checksums=False).runner.get("predictor") if bundle.is_bundle(folder) else None
    return None if config is None else load_predictor(folder, config).to(device)
