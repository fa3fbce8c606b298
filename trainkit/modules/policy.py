"""RL fine-tuning of a target: responses by the bundled runner on the current weights, rewards, and a policy-gradient loss.

A generation is one set of groups: `prompts` prompts with `samples` responses each. It is sampled at the start of its first
optimiser step and trained on for `epochs` x `minibatches` optimiser steps. The engine is synchronous: no response is older
than the policy that began the generation. Trainer and runner each have a copy of the weights, and the runner's is updated in
place before it generates. A checkpoint inside a generation holds its tokens, log-probabilities and advantages, because the
weights that they came from are gone. Otherwise counters are enough, since all draws are keyed by (seed, generation, prompt,
sample). Left out on purpose: sharding (FSDP, DeepSpeed), and generation that runs ahead of training.
"""

# R responses  L response tokens, padded  N response tokens  G responses of a prompt

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import nn

from trainkit.data.manifest import weights_digest
from trainkit.drafters.base import Drafter
from trainkit.errors import UserError, note
from trainkit.losses.output import LossOutput
from trainkit.models.adapter import PROJECTIONS, AdapterShape, TunedTarget
from trainkit.models.load import covered_positions
from trainkit.models.target import FrozenTarget, LiveTarget
from trainkit.modules.base import CHECKPOINT_KEY, Batch, TrainingModule
from trainkit.modules.checkpoint import POLICY_KEY, describe_config
from trainkit.modules.prompt_data import PromptData
from trainkit.modules.ranks import stop_all
from trainkit.modules.training_data import global_seed
from trainkit.rl.algorithms import Algorithm
from trainkit.rl.batches import Micro, policy_logprobs
from trainkit.rl.collect import Collected, Collector, rollout_means, statistics, together
from trainkit.rl.correction import Kind, check_correction
from trainkit.rl.evaluate import greedy_metrics, sample_metrics
from trainkit.rl.infalign import InfAlign
from trainkit.rl.joint import JointRefresh
from trainkit.rl.prepare import Preparation
from trainkit.rl.refresh import Refresh
from trainkit.rl.rewards.score import Rewards
from trainkit.rl.rollout import Rollouts
from trainkit.rl.thr import THR
from trainkit.rl.types import Group, PolicyTokens
from trainkit.rl.weights import policy_tensors
from trainkit.runner import Runner

ROUNDING = 0.1
"""Mean difference between log-probabilities of runner and trainer, in nats, above which bfloat16 does not explain it."""


class PolicyModule(TrainingModule):
    """Fine-tunes a target on the rewards of its own responses.

    Logs under `train/`: `reward` (mean over the generated responses) and `reward/FUNCTION`; the shares `missing` (responses
    without a reward), `zero_variance` (groups with equal rewards), `filtered` (groups that dynamic sampling dropped) and
    `truncated` (responses at the length limit); `length` and `length_max` in tokens; means over tokens of `entropy`,
    `clip_low`, `clip_high`, `ratio` and estimators of KL divergences (`kl_old_*`, `kl_ref_*`, nats); `ratio_max` of a step;
    for the runner compared with the trainer `mismatch` (mean and `_max` of the log-probability difference), `mismatch_k3`,
    `mismatch_capped` (share of tokens above the cap) and `corrected` (0 or 1); with a drafter `tau`, `first_accepted` (share
    of first drafted tokens), `paused` (share of rounds without a draft) and, by draft position, `alpha_K`; numbers of calls of
    reward functions `failures/FUNCTION` and `timeouts/FUNCTION`.
    Under `refresh/`: what the last refresh of the drafter did.
    Under `speed/`: `rollout_tokens_per_second`, and `seconds_PHASE` of a generation. In validation: `reward`, `accuracy`,
    `length` and `truncated` of greedy responses, and `pass@K` of samples.

    Args:
        target: Folder of the model to fine-tune.
        algorithm: Class that computes advantages and the loss, with its arguments: GRPO, DrGRPO, DAPO, GSPO, CISPO or
            OnPolicyDistillation.
        rewards: Reward functions, each as {function: NAME, weight: 1.0, options: {...}}, optionally with `name` and `timeout`
            (seconds). NAME is a built-in function (docs/rl.md lists them), module:function or file.py:function.
        samples: Responses to each prompt.
        prompts: Prompts of a generation, over all processes.
        minibatches: Optimiser steps on one generation in an epoch; each trains on different groups.
        epochs: Number of times that a generation is trained on.
        max_new_tokens: Largest number of tokens in a response, the end token included.
        temperature: Sampling temperature of the responses; log-probabilities are those at this temperature.
        lora_rank: Rank of a LoRA adapter, which is then trained instead of all weights; null trains all weights.
        lora_alpha: Numerator of the adapter's scale, lora_alpha / lora_rank.
        lora_modules: Names of the projections with an adapter; by default all seven of attention and MLP.
        reference: Folder of the model that the loss compares the policy with: the teacher of `OnPolicyDistillation`; for a KL
            term by default the target as it was before training.
        drafter: Drafter bundle of the target, with which responses are generated faster; the texts are the same.
        refresh: Class that trains the drafter on recent responses, with its arguments: `Refresh` every few generations, or
            `JointRefresh` in the policy's own forward pass. null leaves the drafter as it is.
        speculate: When to draft: `on` in every round, `off` never, `auto` in rounds where it is expected to be faster.
        rollout: Further options of `GenerateOptions`, such as `depth` or `tree` (what to draft), `verify` and `stop`.
        rollout_batch: Largest number of responses that each process generates at the same time.
        rollout_dtype: Precision of the runner's weights; by default bfloat16 if `trainer.precision` is, otherwise float32.
        correction: Factor of each token's loss that corrects a mismatch between runner and trainer. `token_truncate`: the ratio
            of the two probabilities of the token, at most the cap; `sequence_truncate`: that of the response, at most the cap;
            `sequence_mask`: that of the response, or 0 above the cap; `none`: 1. `auto` is `none` while the mismatch is that of
            float32 (KL estimate k3 up to 1e-4 nats), else `token_truncate`.
        correction_cap: The cap, the largest factor.
        reweight: `THR` with its arguments, which changes the advantages of single tokens; null leaves them.
        transform: `InfAlign` with its arguments, which changes rewards before advantages; null leaves them.
        correct: Lowest reward of a right response, for accuracy and pass@k.
        pass_at: Numbers of attempts for pass@k in validation; each at most `samples`.
        target_dtype: Precision of the trainer's weights.
        warmup_steps: Optimiser steps of warm-up in the default schedule.
        final_lr: Last learning rate of the default schedule, as a share of the peak; 1 keeps it constant.
        **optim: `optimizer`, `lr_scheduler` and `on_nonfinite`, as in `TrainingModule`.
    """

    data_class = PromptData
    data: PromptData
    # Built by `setup`:
    policy: FrozenTarget
    lm: Any  # the policy if all weights are trained
    rollouts: Rollouts

    def __init__(
        self,
        target: str,
        algorithm: Algorithm,
        rewards: list[dict[str, Any]] | None = None,
        samples: int = 8,
        prompts: int = 32,
        minibatches: int = 2,
        epochs: int = 1,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        lora_rank: int | None = None,
        lora_alpha: float = 16.0,
        lora_modules: list[str] | None = None,
        reference: str | None = None,
        drafter: str | None = None,
        refresh: Callable[[Drafter, str, LiveTarget], Refresh] | None = None,
        speculate: Literal["on", "off", "auto"] = "auto",
        rollout: dict[str, Any] | None = None,
        rollout_batch: int = 64,
        rollout_dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        correction: Kind = "auto",
        correction_cap: float = 2.0,
        reweight: THR | None = None,
        transform: InfAlign | None = None,
        correct: float = 1.0,
        pass_at: list[int] | None = None,
        target_dtype: Literal["float32", "bfloat16"] = "float32",
        warmup_steps: int = 0,
        final_lr: float = 1.0,
        **optim: Any,
    ) -> None:
        super().__init__(warmup_steps=warmup_steps, final_lr=final_lr, **optim)
        # Refuse values that do not fit together.
        counts = {"samples": samples, "prompts": prompts, "minibatches": minibatches, "epochs": epochs}
        counts |= {"max_new_tokens": max_new_tokens, "rollout_batch": rollout_batch}
        for name, count in counts.items():
            if count < 1:
                raise UserError(f"model.{name} is {count}; it must be at least 1")
        if algorithm.needs_rewards and not rewards:
            raise UserError(f"model.rewards: {type(algorithm).__name__} needs at least one reward function; name one")
        if algorithm.needs_rewards and samples < 2:
            raise UserError(
                f"model.samples is {samples}, but {type(algorithm).__name__} compares responses to a prompt; give at least 2"
            )
        if prompts % minibatches:
            raise UserError(f"model.minibatches: {prompts} prompts do not divide into {minibatches} minibatches; change one")
        if not temperature > 0:
            raise UserError(f"model.temperature is {temperature}; it must be above 0, or all responses to a prompt are equal")
        if algorithm.needs_teacher and reference is None:
            raise UserError(f"model.reference: {type(algorithm).__name__} needs the folder of a teacher; set it")
        if reference is not None and not (algorithm.needs_teacher or algorithm.needs_reference):
            raise UserError("model.reference: the algorithm reads no reference; leave it out, or set model.algorithm.beta")
        algorithm.set_limit(max_new_tokens)
        owners = {"seed": "seed_everything"}
        owners |= {name: f"model.{name}" for name in ("samples", "max_new_tokens", "temperature", "speculate")}
        for name in owners.keys() & (rollout or {}).keys():
            raise UserError(f"model.rollout.{name}: set {owners[name]} instead")
        check_correction(correction, correction_cap)
        if refresh is not None and drafter is None:
            raise UserError("model.refresh: there is no drafter to refresh; set model.drafter, or leave refresh out")
        if lora_rank is not None and not (lora_rank >= 1 and lora_alpha > 0):
            raise UserError(f"model: lora_rank {lora_rank} must be at least 1 and lora_alpha {lora_alpha} above 0")
        if lora_rank is None and lora_modules is not None:
            raise UserError(
                "model.lora_modules: without an adapter all weights are trained; set model.lora_rank, or leave it out"
            )
        for k in pass_at or ():
            if not 1 <= k <= samples:
                raise UserError(f"model.pass_at: {k} must be between 1 and model.samples, {samples}")
        self.target = self.tokenizer_folder = target
        self.algorithm, self.samples, self.prompts = algorithm, samples, prompts
        self.minibatches, self.epochs = minibatches, epochs
        self.max_new_tokens, self.temperature, self.reference = max_new_tokens, temperature, reference
        self.lora = None if lora_rank is None else AdapterShape(lora_rank, lora_alpha, tuple(lora_modules or PROJECTIONS))
        self.drafter, self.speculate, self.rollout_batch, self.rollout_dtype = drafter, speculate, rollout_batch, rollout_dtype
        self.rollout, self.correction_cap = dict(rollout or {}), correction_cap
        self.correction: Kind = correction
        self.reweight, self.transform = reweight, transform
        self._make_refresh, self.refresh = refresh, None
        self.correct, self.pass_at, self.target_dtype = correct, sorted(pass_at or ()), getattr(torch, target_dtype)
        try:
            self.rewards = Rewards(rewards) if rewards else None
        except UserError as error:
            raise UserError(f"model.{error}") from error
        # The current generation: its number, its micro-batches, and the loss counts of its minibatches over all ranks.
        self._generation: int | None = None
        self._micros: list[list[Micro]] = []
        self._counts: list[float] = []
        self._minibatch = 0
        self._cursor = 0  # prompts used so far
        self.groups: list[Group] = []
        """Groups that this process generated last; another list for each generation."""
        self._acceptance = float("nan")  # share of first drafted tokens in the current generation, over all ranks
        self._unrewarded = 0  # generations in a row without any reward
        self._refreshed: dict[str, float] = {}  # metrics of the last refresh, until they are logged
        self._synced: int | None = None  # optimiser step of the weights that the runner has
        self.statistics: dict[str, float] = {}
        """Mismatch and largest length of the current generation, equal on all ranks."""
        self._speeds: dict[str, float] = {}  # of the current log line
        self._ratio_max = torch.zeros(())
        self._evaluated: dict[str, list[Group]] = {"greedy": [], "sampled": []}

    # Networks

    def setup(self, stage: str) -> None:
        if type(self.trainer.strategy) not in (SingleDeviceStrategy, DDPStrategy):  # DeepSpeed's is a subclass of DDPStrategy
            raise UserError(f"trainer.strategy: PolicyModule trains under ddp, not {type(self.trainer.strategy).__name__}")
        if hasattr(self, "rollouts"):
            return
        accumulate = self.trainer.accumulate_grad_batches
        check_division(self.prompts, self.samples, self.minibatches, self.trainer.world_size, accumulate)
        self.data.fit_prompts(covered_positions(self.target), self.max_new_tokens)
        if len(self.data.tasks) < self.prompts:
            raise UserError(
                f"data.train: {len(self.data.tasks)} prompts, but a generation needs {self.prompts}; lower model.prompts"
            )
        if self.rewards is not None:
            unlimited = self.trainer.max_steps < 0
            epochs = max(self.trainer.max_epochs or 0, 0)
            self.rewards.steps = self.steps_per_generation
            self.rewards.max_steps = (
                epochs * self.steps_per_epoch(len(self.data.tasks)) if unlimited else self.trainer.max_steps
            )
            self.rewards.check([*self.data.tasks, *self.data.validation_tasks])
        if self.transform is not None:
            self.transform.check(self.data.tasks)
        # The policy: all weights, or an adapter.
        if self.lora is not None:
            self.policy = TunedTarget(self.target, self.lora, dtype=self.target_dtype)
            self.adapter = self.policy.adapter
        else:
            self.policy = FrozenTarget(self.target, self.target_dtype)
            self.policy.frozen = False
            self.lm = self.policy.model.requires_grad_(True)
        device = self.trainer.strategy.root_device
        self.policy.to(device)
        # The reference: the teacher, the adapter switched off, or a frozen copy.
        self._frozen = None
        if self.reference is not None or (self.algorithm.needs_reference and self.lora is None):
            self._frozen = FrozenTarget(self.reference or self.target, self.target_dtype).to(device)
            ours, theirs = self.policy.handle().vocab_size, self._frozen.handle().vocab_size
            if ours != theirs:
                raise UserError(
                    f"model.reference: its vocabulary has {theirs} tokens, that of the target {ours}; give another model"
                )
        # The runner, with a copy of the weights.
        tasks = [*self.data.tasks, *self.data.validation_tasks]
        room = max(len(task.tokens) for task in tasks) + self.max_new_tokens
        dtype = self.rollout_dtype or ("bfloat16" if "bf16" in str(self.trainer.precision) else "float32")
        runner = Runner.load(self.target, self.drafter, str(device), dtype, self.rollout_batch, room)
        options: dict[str, Any] = self.rollout | {"speculate": self.speculate}
        try:
            self.rollouts = Rollouts(runner, self.samples, self.max_new_tokens, self.temperature, global_seed(), **options)
        except UserError as error:
            raise UserError(f"model.rollout: {error}") from error
        if self._make_refresh is not None:
            assert self.drafter is not None and runner.drafter is not None
            live, options = LiveTarget(self.policy.model, self.target), {"seed": global_seed(), "reduce": self._reduce}
            self.refresh = self._make_refresh(runner.drafter, self.drafter, live, **options)  # pyright: ignore[reportCallIssue]

    def train(self, mode: bool = True) -> PolicyModule:
        """Stays in eval mode, because with dropout the ratio of the first minibatch would not be 1."""
        return super().train(False)

    def trained(self) -> list[tuple[nn.Module, float]]:
        return [(self.lm if self.lora is None else self.adapter, 1.0)]

    def describe(self) -> dict[str, Any]:
        if self.lora is not None:
            return {"adapter": self.lora.to_dict(), "target_weights": weights_digest(self.target)}
        return {"model_config": describe_config(self.lm.config)}

    # What `PromptData` reads

    @property
    def steps_per_generation(self) -> int:
        """Optimiser steps on one generation."""
        return self.epochs * self.minibatches

    def steps_per_epoch(self, tasks: int) -> int:
        """Optimiser steps on `tasks` prompts, if none is replaced."""
        return -(-tasks // self.prompts) * self.steps_per_generation

    def generation_settings(self) -> dict[str, Any]:
        """Values that determine the responses of a generation and its split; a resumed run must share them."""
        names = ("prompts", "samples", "minibatches", "epochs", "max_new_tokens", "temperature")
        calibration = {} if self.transform is None else {"calibration": self.transform.digest}
        return {name: getattr(self, name) for name in names} | calibration

    # A generation

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        generation, index = divmod(batch["step"], self.steps_per_generation)
        if generation != self._generation:
            self._collect(generation)
        epoch, position = divmod(index, self.minibatches)
        # The minibatches are the same in all epochs, in a different order.
        order = np.random.default_rng([global_seed(), generation, epoch]).permutation(self.minibatches)
        minibatch = self._minibatch = int(order[position])
        batch |= {name: value.to(self.device) for name, value in self._micros[minibatch][batch["micro"]].items()}
        batch["window_count"] = torch.tensor(self._counts[minibatch], device=self.device)
        if batch["micro"] == 0:
            self._ratio_max = torch.zeros((), device=self.device)

    def _collect(self, generation: int) -> None:
        """Generates the groups of a generation and fills its micro-batches with everything that the loss reads."""
        trainer, seconds = self.trainer, dict[str, float]()
        with _timed(seconds, "sync"):
            self.sync()
        # Refresh the drafter, if that is due after the last generation. A run that was resumed at its end does the same.
        if self.refresh is not None and generation and self.refresh.due(generation, self._acceptance):
            with _timed(seconds, "refresh"):
                self._refreshed = self.refresh.run(generation)
        collector = Collector(
            rollouts=self.rollouts,
            rewards=self.rewards,
            algorithm=self.algorithm,
            tasks=self.data.tasks,
            prompts=self.prompts,
            minibatches=self.minibatches,
            limit=self.max_new_tokens,
            seed=global_seed(),
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            gather=self._gather_objects,
            transform=self.transform,
        )
        try:
            collected = collector.collect(generation, self._cursor)
        except UserError as error:  # on all ranks
            stop_all(trainer, str(error))
        seconds |= collected.seconds
        if self.rewards is not None and self.algorithm.needs_rewards:
            self._unrewarded = 0 if collected.valid else self._unrewarded + 1
            if self._unrewarded >= self.rewards.max_failures:
                stop_all(
                    trainer,
                    f"model.rewards: no response of the last {self._unrewarded} generations has a reward: the functions "
                    f"({', '.join(self.rewards.names)}) failed or returned None; fix them",
                )
        with _timed(seconds, "logprobs"):
            try:
                prepared = self._preparation().prepare(collected)
            except UserError as error:  # on all ranks
                stop_all(trainer, str(error))
        self._micros, self._counts, self.statistics = prepared.micros, prepared.counts, prepared.mismatch
        if prepared.mismatch["mismatch"] > ROUNDING and trainer.is_global_zero:
            wrong = self.rollouts.differing(policy_tensors(self.policy.model))
            cause = f"{wrong[0]} has other values in the runner" if wrong else "their weights are equal"
            note(
                f"runner and trainer differ by {prepared.mismatch['mismatch']:.2g} nats per token in mean, more than rounding "
                f"explains; {cause}; compare trainer.precision with model.rollout_dtype, and watch train/mismatch"
            )
        self._generation, self._cursor, self.groups = generation, collected.cursor, collected.generated
        self._record(collected, seconds)
        if self.refresh is not None:
            self.refresh.observe(self.groups, generation + 1)

    def _preparation(self) -> Preparation:
        world, accumulate = self.trainer.world_size, self.trainer.accumulate_grad_batches
        compares = self.algorithm.needs_reference or self.algorithm.needs_teacher
        return Preparation(
            policy=self.policy,
            reference=self._reference if compares else None,
            algorithm=self.algorithm,
            temperature=self.temperature,
            minibatches=self.minibatches,
            accumulate=accumulate,
            size=self.prompts * self.samples // (self.minibatches * world * accumulate),
            correction=self.correction,
            cap=self.correction_cap,
            reweight=self.reweight,
            gather=self._gather_objects,
            context=self.trainer.precision_plugin.forward_context,
        )

    @contextmanager
    def _reference(self) -> Iterator[FrozenTarget]:
        """The teacher or the frozen copy, if there is one, otherwise the policy without its adapter."""
        if self._frozen is not None:
            yield self._frozen
        else:
            assert isinstance(self.policy, TunedTarget)
            with self.policy.off():
                yield self.policy

    def sync(self) -> None:
        """Copies the current weights to the runner, if they have changed."""
        if self._synced != self.trainer.global_step:
            self.rollouts.update(policy_tensors(self.policy.model))
            self._synced = self.trainer.global_step

    def loss(self, batch: Batch, micro: int | None) -> LossOutput:
        with self.refresh.listening(batch) if isinstance(self.refresh, JointRefresh) else nullcontext():
            new_RL, entropy_RL, _ = policy_logprobs(self.policy, batch, self.temperature)
        more = batch.get("ref_RL"), batch.get("correction_RL")
        tokens = PolicyTokens(new_RL, batch["old_RL"], batch["advantage_RL"], batch["mask_RL"], *more)
        output = self.algorithm.loss(tokens)
        ratio_RL = output.per_token["ratio"] * batch["mask_RL"]
        self._ratio_max = torch.maximum(self._ratio_max, ratio_RL.max())
        metrics = {**output.metrics, "entropy": (entropy_RL * batch["mask_RL"]).sum()}
        return LossOutput(output.sum, output.count, metrics)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if isinstance(self.refresh, JointRefresh):
            self.refresh.step()
        if not self._counts[self._minibatch]:  # nothing counts on any rank: moments and weight decay must not move the weights
            for parameter in self.parameters():
                parameter.grad = None

    # Metrics

    def _record(self, collected: Collected, seconds: dict[str, float]) -> None:
        """Adds the statistics of a generation, over all ranks, to the sums of the next log line."""
        sums, maxima = statistics(collected.generated)
        for name, value in self.rewards.metrics.items() if self.rewards is not None else ():
            sums |= {f"sum log/{name}": value, f"known log/{name}": 1.0}
        sums |= collected.failures
        sums |= {f"seconds_{name}": value / self.trainer.world_size for name, value in seconds.items()}
        parts = self._gather_objects((sums, maxima))
        totals = {
            name: sum(part.get(name, 0.0) for part, _ in parts) for name in sorted({n for part, _ in parts for n in part})
        }
        totals |= {"generations": 1.0, "candidates": float(collected.candidates), "kept": float(collected.kept)}
        for name, value in totals.items():  # equal names on all ranks; the sums over ranks are logged
            self._training.add(f"rollouts/{name}", value if self.trainer.is_global_zero else 0.0)
        self.statistics |= {name: max(part[name] for _, part in parts) for name in maxima}
        self._acceptance = rollout_means(totals).get("first_accepted", float("nan"))

    def training_means(self, sums: dict[str, float]) -> dict[str, float]:
        values = {"loss": sums.get("loss", 0.0) / max(sums.get("count", 0.0), 1.0)}
        tokens = max(sums.get("count_tokens", 0.0), 1.0)
        others = ("loss", "tokens", "skipped_steps")
        values |= {
            name: value / tokens
            for name, value in sums.items()
            if "/" not in name and not name.startswith("count") and name not in others
        }
        rolled = {name.removeprefix("rollouts/"): value for name, value in sums.items() if name.startswith("rollouts/")}
        self._speeds = {}
        if rolled:
            seconds = {name: value for name, value in rolled.items() if name.startswith("seconds_")}
            self._speeds = {f"speed/{name}": value / rolled["generations"] for name, value in seconds.items()}
            self._speeds["speed/rollout_tokens_per_second"] = rolled["tokens"] / rolled["seconds_rollouts"]
            values |= rollout_means(rolled)
            if self.algorithm.dynamic_sampling:
                values["filtered"] = 1 - rolled["kept"] / rolled["candidates"]
        return values | self.statistics

    def training_values(self) -> dict[str, float]:
        largest = self.trainer.strategy.reduce(self._ratio_max, reduce_op="max")  # pyright: ignore[reportArgumentType]
        refreshed, self._refreshed = self._refreshed, {}
        return self._speeds | refreshed | {"train/ratio_max": float(largest)}

    # Validation

    def on_validation_start(self) -> None:
        self.sync()

    def on_validation_batch_start(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        # Not in `validation_step`, where autocast would change the runner's precision.
        tasks = [self.data.validation_tasks[number] for number in batch["tasks"]]
        found = {"greedy": [Group(task, [r]) for task, r in zip(tasks, self.rollouts.greedy(tasks), strict=True)]}
        found["sampled"] = self.rollouts.generate(tasks, 0) if self.pass_at else []
        generation = self.trainer.global_step // self.steps_per_generation
        for name, groups in found.items():
            if (rewards := self.rewards) is not None:
                try:
                    together(self._gather_objects, partial(rewards.score, groups, generation))
                except UserError as error:  # on all ranks
                    stop_all(self.trainer, str(error))
            self._evaluated[name] += groups

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        pass  # everything is done before, see above

    def validation_metrics(self) -> dict[str, float]:
        parts, self._evaluated = self._gather_objects(self._evaluated), {"greedy": [], "sampled": []}
        greedy, sampled = (
            sorted((group for part in parts for group in part[name]), key=lambda group: group.task.index)
            for name in ("greedy", "sampled")
        )
        return greedy_metrics(greedy, self.correct) | sample_metrics(sampled, self.pass_at, self.correct)

    on_test_start, on_test_batch_start, test_step = on_validation_start, on_validation_batch_start, validation_step

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        policy = {"algorithm": type(self.algorithm).__name__, "rewards": self.rewards.names if self.rewards is not None else []}
        policy |= {"samples": self.samples, "temperature": self.temperature}
        checkpoint[CHECKPOINT_KEY]["info"] |= {"target": str(self.target), "policy": policy}
        if self.lora is None:
            checkpoint[CHECKPOINT_KEY]["info"]["generation_config"] = self.lm.generation_config.to_diff_dict()
        # The rollouts of a generation that is not finished, of all ranks.
        unfinished = self.trainer.global_step % self.steps_per_generation != 0
        checkpoint[POLICY_KEY] = {
            "cursor": self._cursor,
            "generation": self._generation if unfinished else None,
            "micros": self._gather_objects(self._micros) if unfinished else [],
            "counts": self._counts,
            "statistics": self.statistics,
            "rollouts": self.rollouts.state_dict(),
            "acceptance": self._acceptance,
            "unrewarded": self._unrewarded,
            "refreshed": self._refreshed,
        }
        if self.refresh is not None:
            state = self.refresh.state_dict()
            checkpoint[POLICY_KEY]["refresh"] = state | {"window": self._gather_objects(state["window"])}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        state = checkpoint[POLICY_KEY]
        self._cursor, self._generation, self._counts = state["cursor"], state["generation"], state["counts"]
        self.statistics, self._synced = state["statistics"], None
        if len(state["micros"]) == self.trainer.world_size:
            self._micros = state["micros"][self.trainer.global_rank]
        self._acceptance, self._refreshed, self._unrewarded = state["acceptance"], state["refreshed"], state["unrewarded"]
        if self.refresh is not None and "refresh" in state:
            windows = state["refresh"]["window"]
            rank = self.trainer.global_rank if len(windows) == self.trainer.world_size else 0
            self.refresh.load_state_dict(state["refresh"] | {"window": windows[rank]})
        self.rollouts.load_state_dict(state["rollouts"])  # after the drafter, whose new weights it would try again

    def _gather_objects(self, value: Any) -> list[Any]:
        """The values of all ranks, on every rank."""
        if self.trainer.world_size == 1:
            return [value]
        parts: list[Any] = [None] * self.trainer.world_size
        dist.all_gather_object(parts, value)
        return parts


def check_division(prompts: int, samples: int, minibatches: int, processes: int, accumulate: int) -> None:
    """Checks that all ranks have equally many groups in each minibatch, and equally many responses in each micro-batch.

    Raises:
        UserError: they have not.
    """
    groups, rest = divmod(prompts, minibatches * processes)
    if rest:
        raise UserError(
            f"model.prompts: {prompts} prompts do not divide into {minibatches} minibatches on {processes} processes; "
            "change one"
        )
    if groups * samples % accumulate:
        raise UserError(
            f"trainer.accumulate_grad_batches: {groups * samples} responses of a process and minibatch do not divide into "
            f"{accumulate} micro-batches; change it"
        )


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Adds the time of the block to `seconds`, by the name of a phase."""
    start = time.perf_counter()
    yield
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start
