"""Data policies: whose text a drafter is trained on, any mixture of the corpus, the target's answers and its own."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist

from trainkit.data.mixture import MixedLoader, sequence
from trainkit.data.text.chat_template import Document, Encoder, load_tokenizer
from trainkit.data.text.packing import PackedSet, pack
from trainkit.data.text.prepare import Prepared, prepare
from trainkit.data.text.prompts import read_prompts
from trainkit.errors import UserError
from trainkit.models.load import load_decoder
from trainkit.modules.base import global_seed
from trainkit.modules.draft import DraftModule
from trainkit.modules.mixed_text import Mixed
from trainkit.modules.text_data import TextData
from trainkit.runner import Runner

Policy = Literal["corpus", "target", "draft", "mixed"]


class PolicyData(TextData):
    """Training rows by policy and weight. `corpus` and `target` are stored sets; `draft` and `mixed` are written on the way.

    `draft` texts are sampled from the draft as it stands (on-policy), `mixed` ones token by token from draft or target; both
    are graded by the target like any other text. They are written anew every `refresh` optimiser steps, each process its part.
    A kind that cannot write without the target (heads) drafts on the target's states, `depth` tokens at a time.

    Args:
        weights: Share of the packed rows by policy, such as {target: 0.9, corpus: 0.1}.
        corpus: File, folder or hub name of ground truth text, or several.
        target: The same of the target's own answers, such as a set of `trainkit distill`.
        prompts: Rows whose prompts `draft` and `mixed` texts answer.
        limit_prompts: First prompts to take.
        refresh: Optimiser steps trained on the same written texts.
        share: Of the draft's tokens in `mixed` texts.
        depth: Tokens that a kind drafts in a row where it needs the target.
        temperature: Of written texts.
        max_new_tokens: Most tokens of a written answer.
        sample_batch: Answers written together.
        validation: Validation files; by default a share of the first stored set is held out.
        **text: As in `TextData`; `limit` takes the first rows of each stored set.
    """

    def __init__(
        self,
        weights: dict[Policy, float],
        corpus: str | list[str] | None = None,
        target: str | list[str] | None = None,
        prompts: str | None = None,
        limit_prompts: int | None = None,
        refresh: int = 50,
        share: float = 0.5,
        depth: int = 8,
        temperature: float = 1.0,
        max_new_tokens: int = 256,
        sample_batch: int = 32,
        validation: str | list[str] | None = None,
        **text: Any,
    ) -> None:
        given = {"corpus": corpus, "target": target}
        self.weights = {name: weight for name, weight in weights.items() if weight > 0}
        _check(weights, given, prompts, validation, refresh, share, temperature)
        stored = {name: files for name, files in given.items() if self.weights.get(name) and files is not None}
        super().__init__(next(iter(stored.values()), validation) or [], validation=validation, **text)
        self._files = {name: [files] if isinstance(files, str) else list(files) for name, files in stored.items()}
        self.prompts, self.limit_prompts = prompts, limit_prompts
        self.refresh, self.share, self.depth, self.temperature = refresh, share, depth, temperature
        self.max_new_tokens, self.sample_batch = max_new_tokens, sample_batch
        self.sets: dict[str, Prepared] = {}
        self._prompts: list[list[int]] = []
        self._pad_id = 0

    def prepare_data(self) -> None:
        super().prepare_data()
        for name in list(self._files)[1:]:
            print(f"{name}: {self._stored(name).report.train}")

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self._files and not self.sets:
            assert self.prepared is not None
            first, *others = self._files
            self.sets = {first: self.prepared} | {name: self._stored(name) for name in others}
        if self.prompts is not None and not self._prompts:
            tokenizer = load_tokenizer(self.tokenizer_folder)
            room = self.length - self.max_new_tokens
            prompts = read_prompts(self.prompts, tokenizer, self.limit_prompts, self._options["columns"])
            self._prompts = [prompt for prompt in prompts if len(prompt) <= room]
            if not self._prompts:
                raise UserError(f"data.prompts: none of {len(prompts)} leaves max_new_tokens of data.length {self.length} free")
            if len(self._prompts) < len(prompts):
                print(f"prompts: {len(prompts) - len(self._prompts)} of {len(prompts)} left out, too long for data.length")
            pad = tokenizer.pad_token_id
            self._pad_id = pad if isinstance(pad, int) else Encoder(tokenizer).end_id

    def train_dataloader(self) -> Any:
        assert self.trainer is not None
        written = {name: lambda rows, used, name=name: self._write(name, rows, used) for name in ("draft", "mixed")}
        return MixedLoader(
            {name: made.train for name, made in self.sets.items()},
            written,
            self.weights,
            self.batch_size,
            refresh=self.refresh,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            accumulate=self.trainer.accumulate_grad_batches,
            seed=global_seed(),
            attach_window=self._module.needs_window,
        )

    @property
    def largest_id(self) -> int:
        return max((int(made.train.tokens_N.max()) for made in self.sets.values()), default=0)

    def _stored(self, name: str) -> Prepared:
        options = self._options | {"validation_share": 0.0, "limit_validation": None}
        return prepare(self._files[name], None, self.tokenizer_folder, self.length, seed=global_seed(), **options)

    def _write(self, name: str, rows: int, used: int) -> tuple[PackedSet, int]:
        """Fresh texts that fill `rows` packed rows, the same on every rank, and how many prompts they took."""
        assert self.trainer is not None
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        writer, documents, start = self._writer(name), [], used
        wanted = max(world_size, rows * self.length // (len(self._prompts[0]) + self.max_new_tokens))
        while True:
            numbers = range(used, used + wanted)
            chosen = sequence(len(self._prompts), used, wanted, global_seed())
            mine = list(zip(numbers, chosen, strict=True))[rank::world_size]
            texts = self._answers(writer, name, mine)
            for prompt, tokens in _gathered(texts, world_size):
                ids = torch.tensor([*self._prompts[prompt], *tokens], dtype=torch.int32).numpy()
                mask = torch.arange(len(ids)).ge(len(self._prompts[prompt])).numpy()
                documents.append(Document(ids, mask))
            used += wanted
            packed = pack(documents, self.length, self._pad_id)
            # the last row is seldom full: what is in it is not trained on
            if len(packed) > rows:
                return packed, used - start
            mean = sum(len(document.tokens) for document in documents) / len(documents)
            wanted = max(world_size, int((rows + 1 - len(packed) + 1) * self.length / mean) + 1)

    def _writer(self, name: str) -> Runner:
        """A runner over copies: serving freezes what it is given."""
        module = self._module
        if not isinstance(module, DraftModule) or module.drafter is None or module.shape is None:
            raise UserError("data.weights: draft and mixed texts are for training a drafter; set model.class_path: DraftModule")
        drafter, room = copy.deepcopy(module.drafter), max(map(len, self._prompts)) + self.max_new_tokens
        alone = drafter.standalone_decoder() if name == "draft" else None
        if alone is not None:
            return Runner.from_modules(alone, None, module.shape, None, self.sample_batch, room, capture=False)
        decoder = load_decoder(module.target, module.device, torch.float32, room + self.depth)
        return Runner.from_modules(decoder, drafter, module.shape, None, self.sample_batch, room, capture=False)

    def _answers(self, runner: Runner, name: str, asked: Sequence[tuple[int, int]]) -> list[tuple[int, int, list[int]]]:
        """(number, prompt's place, new tokens) of the prompts of this rank."""
        options: dict[str, Any] = {"temperature": self.temperature, "max_new_tokens": self.max_new_tokens}
        if runner.drafter is not None:
            share = self.share if name == "mixed" else 1.0
            run = self.depth if share == 1 else max(1, round(share / (1 - share)))  # of the draft's tokens, in the mean
            options |= {"verify": Mixed(share, greedy=self.temperature == 0), "depth": min(self.depth, run)}
        draws = [(number, 0) for number, _ in asked]
        outputs = runner.generate_each([self._prompts[place] for _, place in asked], draws, seed=global_seed(), **options)
        return [(*asked[place], output.tokens) for place, output in outputs]


def _gathered(texts: list[tuple[int, int, list[int]]], world_size: int) -> list[tuple[int, list[int]]]:
    """(prompt's place, new tokens) of all ranks, by number."""
    everyone: list[Any] = [texts]
    if world_size > 1:
        everyone = [None] * world_size
        dist.all_gather_object(everyone, texts)
    ordered = sorted((text for part in everyone for text in part), key=lambda text: text[0])
    return [(place, tokens) for _, place, tokens in ordered]


def _check(
    weights: dict[Policy, float],
    given: dict[str, Any],
    prompts: str | None,
    validation: Any,
    refresh: int,
    share: float,
    temperature: float,
) -> None:
    for name in weights:
        if name not in get_args(Policy):
            raise UserError(f"data.weights: {name!r} is no policy; there are {', '.join(get_args(Policy))}")
    if any(weight < 0 for weight in weights.values()) or not sum(weights.values()) > 0:
        raise UserError(f"data.weights: {weights} must be at least 0, and one above 0")
    for name, files in given.items():
        if weights.get(name) and not files:  # type: ignore[call-overload]
            raise UserError(f"data.weights: {name} has a weight but data.{name} names no files")
    written = [name for name in ("draft", "mixed") if weights.get(name)]
    if written and prompts is None:
        raise UserError(f"data.weights: {written[0]} has a weight but data.prompts names no file")
    if validation is None and not any(weights.get(name) for name in given):  # type: ignore[call-overload]
        raise UserError("data.validation: name files, there is no stored set to hold rows out from")
    if refresh < 1 or not 0 <= share <= 1 or temperature < 0:
        raise UserError(f"data: refresh {refresh} must be at least 1, share {share} in 0..1, temperature {temperature} >= 0")
