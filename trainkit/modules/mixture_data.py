"""Training text from several sources: a corpus, the target's answers, and text that the draft generates during training."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist

from trainkit.data.mixture import MixedLoader, sequence
from trainkit.data.text.chat_template import Document, Encoder, load_tokenizer, prompt_digest
from trainkit.data.text.packing import PackedSet, pack
from trainkit.data.text.prepare import Prepared
from trainkit.data.text.prompts import read_prompt_rows
from trainkit.errors import UserError
from trainkit.models.load import load_decoder
from trainkit.modules.base import TrainingModule
from trainkit.modules.draft import DraftModule
from trainkit.modules.mixed_text import Mixed
from trainkit.modules.text_data import TextData
from trainkit.modules.training_data import global_seed
from trainkit.runner import Runner
from trainkit.runner.sampling import Sampling

Source = Literal["corpus", "target", "draft", "mixed"]


class MixtureData(TextData):
    """Training rows drawn from several sources by weight.

    The text of `corpus` and `target` is stored on disk. The text of `draft` and `mixed` is generated during training: `draft`
    text is sampled from the draft with its current weights (on-policy); in `mixed` text each token comes from the draft or from
    the target. The teacher scores all four in the same way. Every `refresh` optimiser steps new text is generated, each process
    generating a part. A drafter that cannot generate without its target (heads) drafts `depth` tokens at a time from the
    target's hidden states.

    Args:
        weights: Share of the packed rows by source, such as {target: 0.9, corpus: 0.1}.
        corpus: Ground-truth text: a file, a folder, the name of a data set on the hub, or a list of these.
        target: Answers of the target, named in the same way, such as a set of `trainkit distill`.
        prompts: File of prompts that the `draft` and `mixed` texts answer.
        limit_prompts: Number of prompts to read, from the first one.
        refresh: Optimiser steps that train on the same generated texts.
        share: Share of tokens in `mixed` texts that come from the draft.
        depth: Draft tokens in a row, for a drafter that needs its target to generate.
        temperature: Sampling temperature of the generated texts.
        max_new_tokens: Maximum length of a generated answer, in tokens.
        sample_batch: Number of answers generated at the same time.
        validation: Validation files; by default a share of the first stored source is held out, and its prompts are left out
            of the other sources.
        **text: As in `TextData`; `limit` applies to each stored source.
    """

    def __init__(
        self,
        weights: dict[Source, float],
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
        # Refuse weights, files and values that do not fit together.
        for name in weights:
            if name not in get_args(Source):
                raise UserError(f"data.weights: unknown source {name!r}; choose from {', '.join(get_args(Source))}")
        if any(weight < 0 for weight in weights.values()) or not sum(weights.values()) > 0:
            raise UserError(f"data.weights: {weights}: each weight must be at least 0, and one of them above 0")
        counts = {"refresh": refresh, "depth": depth, "max_new_tokens": max_new_tokens, "sample_batch": sample_batch}
        for name, count in (counts | {"limit_prompts": 1 if limit_prompts is None else limit_prompts}).items():
            if count < 1:
                raise UserError(f"data.{name}: {count} must be at least 1")
        if not 0 <= share <= 1 or not temperature >= 0:
            raise UserError(f"data: share {share} must be in 0..1, temperature {temperature} at least 0")
        self.weights = {name: weight for name, weight in weights.items() if weight > 0}
        files = {name: paths for name, paths in {"corpus": corpus, "target": target}.items() if name in self.weights}
        for name, paths in files.items():
            if not paths:
                raise UserError(f"data.weights: {name} has a weight but data.{name} names no files")
        self.generated = [name for name in ("draft", "mixed") if name in self.weights]
        if self.generated and prompts is None:
            raise UserError(f"data.weights: {self.generated[0]} has a weight but data.prompts names no file")
        if validation is None and not files:
            raise UserError("data.validation: name validation files; no stored source has rows that could be held out")

        # `TextData` prepares the first stored source; without one, the validation files take its place.
        super().__init__(next(iter(files.values()), validation) or [], validation=validation, **text)
        self._files = {name: [paths] if isinstance(paths, str) else list(paths or ()) for name, paths in files.items()}
        self.prompts, self.limit_prompts = prompts, limit_prompts
        self.refresh, self.share, self.depth, self.temperature = refresh, share, depth, Sampling(temperature).temperature
        self.max_new_tokens, self.sample_batch = max_new_tokens, sample_batch
        self.sets: dict[str, PackedSet] = {}
        self._prompts: list[list[int]] = []

    def connect(self, module: TrainingModule) -> None:
        if self.generated and not isinstance(module, DraftModule):
            raise UserError("data.weights: draft and mixed texts are for training a drafter; set model.class_path: DraftModule")
        super().connect(module)

    def prepare_data(self) -> None:
        super().prepare_data()
        for name in list(self._files)[1:]:
            print(f"{name}: {self._prepare_stored(name).report.train}")

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self._files and not self.sets:
            first, *others = self._files
            self.sets = {first: self.rows[0]} | {name: self._prepare_stored(name).train for name in others}
        self.training_sets = list(self.sets.values())
        if self.prompts is not None and not self._prompts:
            self._read_prompts(self.prompts)

    def train_dataloader(self) -> Any:
        generators = {name: partial(self._generate, name) for name in self.generated}
        options = self._training_options()
        return MixedLoader(self.sets, generators, self.weights, self.batch_size, refresh=self.refresh, **options)

    def _prepare_stored(self, name: str) -> Prepared:
        """The rows of another source than the first, without the prompts that are held out of the first."""
        options = self._options | {"validation_share": 0.0, "limit_validation": None, "exclude": self._prepare().held_out}
        return self._prepare_files(self._files[name], None, **options)

    def _read_prompts(self, file: str) -> None:
        tokenizer = load_tokenizer(self.tokenizer_folder)
        encoder, held_out = Encoder(tokenizer, self.module.tokenizer_folder), self._prepare().held_out
        prompts = [prompt.tokens for prompt in read_prompt_rows(file, encoder, self.limit_prompts, self._options["columns"])]
        short = [prompt for prompt in prompts if len(prompt) <= self.length - self.max_new_tokens]
        self._prompts = [prompt for prompt in short if prompt_digest(prompt) not in held_out]
        if not short:
            raise UserError(
                f"data.prompts: none of {len(prompts)} prompts leaves room for {self.max_new_tokens} new tokens in a row of "
                f"data.length {self.length}; lower data.max_new_tokens"
            )
        if not self._prompts:
            raise UserError(f"data.prompts: all {len(short)} prompts are held out for validation; give data.validation files")
        counts = (
            (len(prompts) - len(short), "too long for data.length"),
            (len(short) - len(self._prompts), "held out for validation"),
        )
        for count, reason in counts:
            if count:
                print(f"prompts: {count} of {len(prompts)} left out, {reason}")

    # Generating text during training

    def _generate(self, name: str, rows: int, used: int) -> tuple[PackedSet, int]:
        """New texts that fill at least `rows` packed rows, the same on every rank, and the number of prompts answered.

        Args:
            name: Source of the texts, `draft` or `mixed`.
            rows: Number of packed rows to fill.
            used: Number of prompts answered by earlier calls, which this call skips.
        """
        assert self.trainer is not None
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        runner, documents, start = self._runner(name), [], used
        wanted = max(world_size, rows * self.length // (len(self._prompts[0]) + self.max_new_tokens))
        while True:
            # Each rank answers its share of the next prompts, then receives the answers of all ranks in the same order.
            requests = list(enumerate(sequence(len(self._prompts), used, wanted, global_seed()), start=used))
            answers = self._answers(runner, name, requests[rank::world_size])
            parts: list[Any] = [answers]
            if world_size > 1:
                parts = [None] * world_size
                dist.all_gather_object(parts, answers)
            for _, index, tokens in sorted(answer for part in parts for answer in part):
                prompt = self._prompts[index]
                ids = torch.tensor([*prompt, *tokens], dtype=torch.int32).numpy()
                documents.append(Document(ids, torch.arange(len(ids)).ge(len(prompt)).numpy()))
            used += wanted
            packed = pack(documents, self.length)
            if len(packed) > rows:  # one more, because the last row is seldom full and is not trained on
                return packed, used - start
            # Too few rows: estimate from the mean length so far how many more prompts are needed.
            mean = sum(len(document.tokens) for document in documents) / len(documents)
            wanted = max(world_size, int((rows + 1 - len(packed) + 1) * self.length / mean) + 1)

    def _runner(self, name: str) -> Runner:
        """A runner over copies of the networks, because a runner freezes the parameters of its networks."""
        module = self.module
        assert isinstance(module, DraftModule)
        drafter, room = copy.deepcopy(module.drafter), max(map(len, self._prompts)) + self.max_new_tokens
        alone = drafter.standalone_decoder() if name == "draft" else None
        if alone is not None:
            return Runner(alone, None, module.shape, None, self.sample_batch, room, capture=False)
        dtype = module.teacher.dtype
        decoder = load_decoder(module.target, module.device, dtype, room + self.depth)
        return Runner(decoder, drafter.to(dtype), module.shape, None, self.sample_batch, room, capture=False)

    def _answers(self, runner: Runner, name: str, requests: Sequence[tuple[int, int]]) -> list[tuple[int, int, list[int]]]:
        """Answers to (number, index of the prompt) requests, as (number, index of the prompt, new tokens).

        The number of a request seeds its random numbers, so an answer does not depend on the rank that generates it.
        """
        options: dict[str, Any] = {"temperature": self.temperature, "max_new_tokens": self.max_new_tokens}
        if runner.drafter is not None:
            share = self.share if name == "mixed" else 1.0
            run = self.depth if share == 1 else max(1, round(share / (1 - share)))  # mean number of draft tokens in a row
            options |= {"verify": Mixed(share, greedy=self.temperature == 0), "depth": min(self.depth, run)}
        prompts = [self._prompts[index] for _, index in requests]
        draws = [(number, 0) for number, _ in requests]
        outputs = runner.generate_each(prompts, draws, seed=global_seed(), **options)
        return [(*requests[i], output.tokens) for i, output in outputs]
