"""The runner: loads target and drafter from folders, turns prompts into requests, and decoded tokens into text.

Left out on purpose: paged caches and preemption; a session gives each text a cache row of its own.
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
from trainkit.errors import UserError, check_unicode, note
from trainkit.layers.linear import block_weights
from trainkit.models.load import copy_weights, covered_positions, find_device, load_decoder, read_tokenizer
from trainkit.models.predictor import AcceptancePredictor, load_predictor
from trainkit.models.shape import TargetShape
from trainkit.models.target import target_shape
from trainkit.runner.graphs import Graphs
from trainkit.runner.options import GenerateOptions
from trainkit.runner.policies.build import Policies
from trainkit.runner.request import Output, Request
from trainkit.runner.round import PREFILL_CHUNK, Plan, Rounds, Trace
from trainkit.runner.sampling import request_keys
from trainkit.runner.scheduler import Scheduler
from trainkit.runner.scoring import Score, score_rows
from trainkit.runner.session import Session
from trainkit.runner.stats import Stats
from trainkit.runner.text import IncrementalText, special_tokens
from trainkit.runner.trees.shape import RankPath, Shape
from trainkit.runner.trees.static import Tree, build, chain
from trainkit.runner.verify import Typical, Verification, build_verification

Prompt = str | Sequence[int]
DEFAULT_DEPTH = 4


class Runner:
    """Decodes with a target, and a drafter if there is one. `Runner.load` builds it from folders.

    Args:
        target: The decoder, on its device.
        drafter: The drafter on the same device, or None.
        shape: Shape of the target, with its end tokens.
        folder: Folder of the target, for its tokenizer; without one, prompts must be token ids.
        max_batch: As in `load`.
        max_len: Largest number of tokens of prompt and continuation together.
        capture: As in `load`.
        predictor: Predicts how likely the drafter's proposals are accepted, or None.
        grow: Size cache rows by the texts of each call; otherwise every row has room for `max_len` tokens from the start.

    Attributes:
        observe: Set to a function to receive every round's `Trace`; rounds then run eagerly.
        policies: The policies used so far, with what they have learned.
    """

    def __init__(
        self,
        target: Any,
        drafter: Drafter | None,
        shape: TargetShape,
        folder: Path | None = None,
        max_batch: int = 8,
        max_len: int = 2048,
        capture: bool | None = None,
        predictor: AcceptancePredictor | None = None,
        grow: bool = False,
    ) -> None:
        self.drafter, self.shape, self.folder, self.max_len, self.predictor = drafter, shape, folder, max_len, predictor
        if drafter is not None:
            drafter.requires_grad_(False).eval()
            block_weights(drafter)
        block_weights(target)
        self.rounds = Rounds(target, drafter)
        self.device = self.rounds.device
        if self.device.type == "cuda":
            # half-precision accumulation would increase the difference between one row and several
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        capture = self.device.type == "cuda" if capture is None else capture
        self.scheduler = Scheduler(self.rounds, max_batch, max_len, capture, grow)
        self.policies = Policies(self.scheduler)
        self.observe: Callable[[Trace], None] | None = None
        self._trees: dict[tuple[RankPath, ...], Tree] = {}

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
            drafter: A trainkit bundle, or a plain Hugging Face folder of a small model with the same tokenizer.
            device: Torch device.
            dtype: float32, bfloat16 or float16.
            max_batch: Largest number of texts decoded together; further prompts wait.
            max_len: Largest number of tokens of prompt and continuation together; every cache row then has room for them. By
                default as many as the model covers, and rows grow with the texts of each call.
            capture: Whether to capture rounds as CUDA graphs; by default where there is a GPU.

        Raises:
            UserError: a folder is missing or broken, the architecture is not covered, or drafter and target do not fit.
        """
        where = find_device(device)
        kind = getattr(torch, dtype, None)
        if kind not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise UserError(f"dtype {dtype!r}: must be float32, bfloat16, float16 or float64")
        folder = Path(target)
        bundle.note_drafter_as_target(folder)
        if max_batch < 1:
            raise UserError(f"max_batch {max_batch}: must be at least 1")
        if max_len is not None and max_len < 2:
            raise UserError(f"max_len {max_len}: must be at least 2, a token of the prompt and a new one")
        length = max_len or covered_positions(folder)
        decoder = load_decoder(folder, where, kind, length)
        shape, draft, predictor = target_shape(folder), None, None
        if drafter is not None:
            draft = load_drafter(Path(drafter), folder, shape).to(device=where, dtype=kind)
            predictor = load_bundle_predictor(Path(drafter), where)
        return Runner(decoder, draft, shape, folder, max_batch, length, capture, predictor, grow=max_len is None)

    @property
    def last(self) -> Stats:
        """Counts of the last call, its outputs added together."""
        return self.scheduler.last

    @cached_property
    def tokenizer(self) -> Any:
        """The target folder's tokenizer.

        Raises:
            UserError: the runner was built without a folder.
        """
        if self.folder is None:
            raise UserError("this runner was built without a folder, so it has no tokenizer; give prompts as token ids")
        return read_tokenizer(self.folder)

    def generate(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int = GenerateOptions.max_new_tokens,
        temperature: float = GenerateOptions.temperature,
        *,
        n: int = 1,
        progress: bool = False,
        **options: Any,
    ) -> list[Output]:
        """Continues every prompt; `n` outputs for each, in the order of the prompts.

        Args:
            prompts: Raw text (no template, nothing prepended) or token ids.
            max_new_tokens: Largest number of new tokens for each, the end token included.
            temperature: 0 takes the likeliest token; above 0, tokens are sampled.
            n: Number of samples for each prompt.
            progress: Show a progress bar.
            **options: The other fields of `GenerateOptions`.

        Raises:
            UserError: an option out of range, an empty prompt, or one longer than the cache.
        """
        options |= {"max_new_tokens": max_new_tokens, "temperature": temperature}
        chosen = GenerateOptions.from_names("generate", options)
        if n < 1:
            raise UserError(f"n {n} must be at least 1")
        draws = [(index, sample) for index in range(len(prompts)) for sample in range(n)]
        finished = self._finished([prompts[index] for index, _ in draws], draws, chosen)
        if progress:
            from tqdm import tqdm

            finished = tqdm(finished, total=len(draws), desc="decoding", unit=" texts", disable=None)
        outputs = dict(finished)
        return [outputs[index] for index in range(len(draws))]

    def generate_each(
        self, prompts: Sequence[Prompt], draws: Sequence[tuple[int, int]] | None = None, **options: Any
    ) -> Iterator[tuple[int, Output]]:
        """Continues every prompt and yields (its index in `prompts`, its output) as soon as it has ended.

        Args:
            prompts: As in `generate`.
            draws: For each prompt the pair of numbers that, with `seed`, fixes its draws; by default (index, 0), as in
                `generate`. A long job that is split into calls gives each prompt the same pair in any split.
            **options: Fields of `GenerateOptions`.
        """
        chosen = GenerateOptions.from_names("generate_each", options)
        pairs = [(index, 0) for index in range(len(prompts))] if draws is None else draws
        if len(pairs) != len(prompts):
            raise UserError(f"generate_each: {len(prompts)} prompts but {len(pairs)} draws")
        return self._finished(prompts, pairs, chosen)

    def stream(self, prompt: Prompt, options: GenerateOptions | None = None, **named: Any) -> Iterator[str]:
        """Yields the text of one prompt as rounds emit it; options as an object or by name, checked before the first round."""
        chosen = options or GenerateOptions.from_names("stream", named)
        request = self.request(prompt, chosen)
        request.text = request.text or self._incremental_text(chosen)
        return self._streamed(request, request.text, self._plan(chosen))

    def _streamed(self, request: Request, text: IncrementalText, plan: Plan) -> Iterator[str]:
        shown = 0
        for _, finished in self.scheduler.decode([request], plan):
            known = self._text(request) if finished else text.shown[: text.safe_length]
            if finished or len(known) > shown:
                yield known[shown:]
                shown = len(known)

    def session(self, rows: int, options: GenerateOptions, prefill: int = PREFILL_CHUNK, sharing: bool = True) -> Session:
        """A new session over `rows` rows of `max_len` tokens, for requests that join and leave; see `Session`.

        Args:
            rows: Number of texts decoded together.
            options: What to draft and how to verify it, for all requests; the other options are those of each `request`.
            prefill: As in `Session`.
            sharing: As in `Session`.
        """
        graphs = None if self.scheduler.graphs is None else Graphs(self.device)
        return Session(self.rounds, rows, self.max_len, self._plan(options), graphs, prefill=prefill, sharing=sharing)

    def request(self, prompt: Prompt, options: GenerateOptions, index: int = 0, draws: tuple[int, int] = (0, 0)) -> Request:
        """The request that continues a prompt, for `Session.submit`.

        It takes the options that requests of a session need not share: length, sampling, seed, stop strings, end tokens and
        log-probabilities.

        Args:
            prompt: As in `generate`.
            options: The request's options; draft, verification and `processed_logprobs` are ignored.
            index: Number of the prompt in error messages.
            draws: As in `generate_each`.

        Raises:
            UserError: an empty prompt, a token outside the vocabulary, or one longer than the cache.
        """
        tokens = self._encode(prompt, index)
        if len(tokens) >= self.max_len:
            remedy = "which is all that the target covers; shorten it" if self.scheduler.grow else "shorten it or raise max_len"
            raise UserError(
                f"prompt {index} has {len(tokens)} tokens and one new one must fit max_len {self.max_len}, {remedy}"
            )
        wanted, keys = len(tokens) + options.max_new_tokens, request_keys(options.seed, *draws)
        limit, cut = min(wanted, self.max_len), wanted > self.max_len
        text = self._incremental_text(options) if options.stop else None
        top = 0 if options.logprobs else None
        return Request(index, tokens, keys, limit, cut, options.sampling, options.ignore_end, top, text)

    def score(self, prompts: Sequence[Prompt], continuations: Sequence[Prompt], chunk: int = 256) -> list[list[float]]:
        """Log-probability of every continuation token after its prompt, under the target at temperature 1, in nats.

        Raises:
            UserError: the lists differ in length, a prompt or continuation is empty, or both exceed the cache.
        """
        scores = dict(self.score_each(prompts, continuations, chunk))
        return [scores[index].logprobs for index in range(len(prompts))]

    @torch.inference_mode()
    def score_each(
        self, prompts: Sequence[Prompt], continuations: Sequence[Prompt], chunk: int = 256
    ) -> Iterator[tuple[int, Score]]:
        """Yields (index of a pair, its score) in batches of up to `max_batch` pairs of similar length, longest first.

        Arguments and errors as in `score`. Prompt and continuation may together have one token more than `max_len`, because the
        last token is not read.
        """
        if len(prompts) != len(continuations):
            raise UserError(f"score: {len(prompts)} prompts but {len(continuations)} continuations")
        given = enumerate(zip(prompts, continuations, strict=True))
        pairs = [(self._encode(prompt, index), self._encode(continuation, index)) for index, (prompt, continuation) in given]
        lengths = [len(head) + len(tail) - 1 for head, tail in pairs]
        order = sorted(range(len(pairs)), key=lambda index: -lengths[index])
        if order and lengths[order[0]] > self.max_len:
            raise UserError(f"score: pair {order[0]} has {lengths[order[0]] + 1} tokens, max_len is {self.max_len}")
        self.scheduler.begin()
        for start in range(0, len(order), self.scheduler.max_batch):
            batch = order[start : start + self.scheduler.max_batch]
            slots = lengths[batch[0]] if self.scheduler.grow else self.max_len
            cache = self.scheduler.state(len(batch), slots).cache[: len(batch)]
            yield from zip(batch, score_rows(self.rounds.target, cache, [pairs[index] for index in batch], chunk), strict=True)

    def update(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copies new target weights, under their Hugging Face names, into the fused storage in place; graphs stay valid.

        What older weights have read is not shared any more. A text that is being decoded continues with mixed weights.

        Raises:
            UserError: a name or shape that the target does not have.
        """
        self.rounds.updates += 1
        copy_weights(self.rounds.target, named_tensors, "update", complete=False)

    def _finished(
        self, prompts: Sequence[Prompt], draws: Sequence[tuple[int, int]], options: GenerateOptions
    ) -> Iterator[tuple[int, Output]]:
        pairs = enumerate(zip(prompts, draws, strict=True))
        requests = [self.request(prompt, options, index, pair) for index, (prompt, pair) in pairs]
        for request, finished in self.scheduler.decode(requests, self._plan(options)):
            if finished:
                yield request.index, self._output(request, options.logprobs)

    def _plan(self, options: GenerateOptions) -> Plan:
        self.rounds.set_end_ids(self.shape.end_ids)
        # What to draft: the shape that is requested, or the chain of a policy; both are checked against the drafter.
        shape = self._shape(options)
        if options.policy is not None:
            shape = self.policies.chain(options.policy, options, self.predictor)
        # How to verify it.
        sampling, rule = options.sampling, options.verify
        if not isinstance(rule, Verification):
            thresholds = Typical(options.typical_epsilon, options.typical_scale)
            rule = build_verification(rule, sampling.greedy, shape.ranked, thresholds)
        if not (rule.verifies_last_level or (isinstance(shape, Tree) and shape.is_chain and shape.depth)):
            raise UserError(f"{type(rule).__name__} needs a drafter and a chain of at least one token; give depth")
        can_pause = shape.policy is not None and shape.policy.pauses
        return Plan(
            sampling,
            shape,
            rule,
            options.logprobs,
            self.observe,
            can_pause,
            options.plain,
            processed=options.processed_logprobs,
        )

    def _shape(self, options: GenerateOptions) -> Shape:
        """The requested shape: a tree, a chain, or by default the drafter's own; the root alone without a drafter."""
        tree, depth, drafter = options.tree, options.depth, self.drafter
        assert not isinstance(tree, str)  # `GenerateOptions` has parsed it
        if depth is not None and not 0 <= depth < self.max_len:
            raise UserError(f"depth {depth}: must be at least 0 and at most {self.max_len - 1}, the cache's size")
        if drafter is None and (depth or tree) and not options.plain:
            raise UserError("depth or tree given, but this runner was loaded without a drafter; give one (--drafter)")
        if isinstance(tree, Shape):
            shape = tree
        else:
            if tree is not None:
                paths = tuple(tuple(path) for path in tree)
            elif drafter is None or depth is not None:
                paths = chain(depth or 0)
            else:
                paths = drafter.default_tree or chain(min(DEFAULT_DEPTH, drafter.max_depth or DEFAULT_DEPTH))
            if paths not in self._trees:
                self._trees[paths] = build(paths, self.device)
            shape = self._trees[paths]
        if drafter is not None:
            deepest, widest = drafter.max_depth, drafter.max_width
            if deepest is not None and shape.depth > deepest:
                raise UserError(f"depth {shape.depth}: this drafter has heads for {deepest} tokens; draft at most {deepest}")
            if widest is not None and shape.widest > widest:
                raise UserError(f"tree: {shape.widest} nodes on a level, this drafter expands at most {widest} together")
        return shape

    @cached_property
    def _special_tokens(self) -> dict[int, str]:
        return special_tokens(self.tokenizer)

    def _incremental_text(self, options: GenerateOptions) -> IncrementalText:
        return IncrementalText(self._decode, self._special_tokens, options.stop)

    def _decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def _text(self, request: Request) -> str:
        """The text of a request that has ended."""
        if request.text is not None and request.text_end is not None:
            return request.text.shown[: request.text_end]
        return self._decode(request.tokens)

    def _encode(self, prompt: Prompt, index: int) -> list[int]:
        if isinstance(prompt, str):
            tokens = self.tokenizer.encode(check_unicode(f"prompt {index}", prompt), add_special_tokens=False)
        else:
            tokens = [int(token) for token in prompt]
        if not tokens:
            raise UserError(f"prompt {index} is empty; give at least one token")
        worst = max(tokens) if min(tokens) >= 0 else min(tokens)
        if not 0 <= worst < self.shape.decoder.vocab_size:
            raise UserError(f"prompt {index}: token id {worst} is outside the vocabulary of {self.shape.decoder.vocab_size}")
        return tokens

    def _output(self, request: Request, logprobs: bool) -> Output:
        # Token ids can be continued without a tokenizer, as with a folder of weights alone.
        readable = self.folder is not None and any(self.folder.glob("tokenizer*"))
        text = self._text(request) if readable else ""
        return Output(request.tokens, text, request.finish, request.stats, request.logprobs if logprobs else None)


def load_drafter(folder: Path, target_folder: Path, shape: TargetShape, packed: bool = True) -> Drafter:
    """A drafter from a trainkit bundle, or from a folder that another program wrote and a kind claims.

    With `packed`, quantised weights of heads stay as they are stored, for decoding.

    Raises:
        UserError: no such folder, a broken bundle, or one made for another target.
    """
    if not folder.is_dir():
        hint = "; repeat the flag for several" if str(folder).startswith("[") else ""
        raise UserError(f"{folder}: no such folder; give a drafter bundle or a Hugging Face folder{hint}")
    manifest = bundle.read(folder) if bundle.is_bundle(folder) else None
    if manifest is not None and manifest.target:
        for line in bundle.check_fit(manifest, bundle.fingerprint(target_folder), shape.decoder.to_dict()):
            note(line)
        return load_bundle(manifest, shape, packed)
    return load_outside(folder, shape, target_folder)


def load_bundle_predictor(folder: Path, device: torch.device) -> AcceptancePredictor | None:
    """The acceptance predictor in a drafter's bundle, if it has one; in float32 whatever the drafter's dtype.

    Raises:
        UserError: the bundle names one that is missing or has other sizes.
    """
    config = bundle.read(folder, checksums=False).runner.get("predictor") if bundle.is_bundle(folder) else None
    return None if config is None else load_predictor(folder, config).to(device)
