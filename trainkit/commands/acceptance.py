"""`trainkit features --acceptance`: decodes prompts with a drafter and keeps what each verification said of its proposals."""

# B rows  D draft positions  H hidden  C signals  V vocabulary  N records

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from trainkit import __version__, bundle
from trainkit.data.manifest import weights_digest
from trainkit.data.sets.acceptance import AcceptanceLayout, Make, Written, drafter_fingerprint, write_acceptance
from trainkit.data.text.chat_template import load_tokenizer
from trainkit.data.text.prompts import read_prompts
from trainkit.data.text.sources import content_hash
from trainkit.errors import UserError
from trainkit.models.load import covered_positions, read_config
from trainkit.models.predictor import SIGNALS
from trainkit.runner.engine import Runner
from trainkit.runner.round import Trace
from trainkit.runner.sampling import Sampling, request_keys

VERIFICATIONS = ("coupled", "residual")


class Recorder:
    """Takes a record for each draft position that a round came to: those accepted, and the one that was not.

    The label is whether the target accepted the proposal. Under `coupled`, and at temperature 0, that is settled by the noise
    that draft and target share, which the signals have seen: a probability averaged over the noise would be the wrong answer.
    There the proposals that a tree would have hung beside it have labels too, whether they are what the target chose.
    Under `residual` above temperature 0 the coin is independent of all that the predictor sees, and its probability
    min(1, p/q) at the drafted token has the same expectation and less variance, so that stands in its place.

    Args:
        soft: Labels are min(1, p/q).
        dtype: Of the hidden states.
        number_of: Prompt numbers by noise keys.
    """

    def __init__(self, soft: bool, dtype: torch.dtype, number_of: Mapping[tuple[int, int], int]) -> None:
        self.soft, self.dtype, self.number_of = soft, dtype, number_of
        self._kept: list[dict[str, Tensor]] = []

    def __call__(self, trace: Trace) -> None:
        """Adds the records of a round; a row that is done has none."""
        draft, counts_B = trace.draft, trace.verdict.counts_B
        assert trace.draft.shape.is_chain and len(draft.signals) == trace.draft.shape.depth == len(draft.logits)
        places_D = torch.arange(trace.draft.shape.depth, device=counts_B.device)
        rows_N, depth_N = (places_D < counts_B[:, None]).nonzero(as_tuple=True)
        if not len(rows_N):
            return
        q_NV = torch.cat(draft.logits, 1)[rows_N, depth_N].softmax(-1)
        if self.soft:
            token_N1 = draft.tokens_BN[rows_N, depth_N + 1][:, None]
            p_N1, q_N1 = trace.scores_BNV[rows_N, depth_N].softmax(-1).gather(1, token_N1), q_NV.gather(1, token_N1)
            label_NW = (p_N1 / q_N1).clamp(max=1.0)
        else:
            chosen_N1 = trace.verdict.emitted_BP[rows_N, depth_N][:, None]
            label_NW = (torch.cat([said.tokens_BFW for said in draft.signals], 1)[rows_N, depth_N] == chosen_N1).float()
        numbers_B = [self.number_of.get((first, second), -1) for first, second in trace.keys_B2.tolist()]
        found = {
            "hidden": torch.cat([said.hidden_BFD for said in draft.signals], 1)[rows_N, depth_N].to(self.dtype),
            "signals": torch.cat([said.signals_BFWC for said in draft.signals], 1)[
                rows_N, depth_N, : label_NW.shape[1]
            ].float(),
            "depth": depth_N.short(),
            "label": label_NW,
            "max_q": q_NV.amax(-1),
            "prompt": torch.tensor(numbers_B, dtype=torch.int32, device=rows_N.device)[rows_N],
        }
        self._kept.append({name: value.cpu() for name, value in found.items()})

    def take(self) -> dict[str, Tensor]:
        """The records so far, by prompt, of each in the order they came; begins again.

        Raises:
            UserError: a state that is not finite.
        """
        kept, self._kept = self._kept, []
        if not kept:
            shapes = {"hidden": ((0, 0), self.dtype), "signals": ((0, 1, SIGNALS), torch.float32), "depth": ((0,), torch.int16)}
            shapes |= {"label": ((0, 1), torch.float32), "max_q": ((0,), torch.float32), "prompt": ((0,), torch.int32)}
            return {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
        together = {name: torch.cat([one[name] for one in kept]) for name in kept[0]}
        assert int(together["prompt"].min()) >= 0
        if not all(bool(together[name].isfinite().all()) for name in ("hidden", "signals", "label")):
            raise UserError("--acceptance: the drafter or the target gives NaN or infinity; a predictor cannot learn from that")
        order_N = together["prompt"].argsort(stable=True)
        return {name: value[order_N] for name, value in together.items()}


def records_of(
    runner: Runner,
    prompts: Sequence[Sequence[int]],
    *,
    depth: int,
    verify: str,
    max_new_tokens: int,
    seed: int,
    dtype: torch.dtype,
) -> Make:
    """What `write_acceptance` gets records from: chains of `depth`, the draws of a prompt fixed by its number and `seed`."""

    def make(numbers: Sequence[int], temperature: float, told: Callable[[int], None]) -> dict[str, Tensor]:
        number_of = {request_keys(seed, number, 0): number for number in numbers}
        assert len(number_of) == len(numbers)
        recorder = Recorder(verify == "residual" and temperature > 0, dtype, number_of)
        # sorted, so that rows decoded side by side have prompts of similar length
        order = sorted(numbers, key=lambda number: -len(prompts[number]))
        before, runner.observe = runner.observe, recorder
        try:
            texts, draws = [prompts[number] for number in order], [(number, 0) for number in order]
            for _, output in runner.generate_each(
                texts, draws, temperature=temperature, depth=depth, verify=verify, max_new_tokens=max_new_tokens, seed=seed
            ):
                told(len(output.tokens))
        finally:
            runner.observe = before
        return recorder.take()

    return make


def write_set(
    *,
    target: str,
    drafter: str,
    prompts: str,
    out: str,
    temperatures: Sequence[float],
    verify: str,
    depth: int,
    max_new_tokens: int,
    part_prompts: int,
    dtype: str,
    target_dtype: str,
    seed: int,
    limit: int | None,
    columns: dict[str, str] | None,
    batch: int,
    device: str,
    rank: int,
    world_size: int,
) -> str:
    """Makes an acceptance set and says what was done; arguments as in `trainkit.commands.features.features`.

    Raises:
        UserError: arguments out of range, a drafter that is no bundle or was made for another target, or prompts that do not
            fit.
    """
    _check(temperatures, verify, {"depth": depth, "max_new_tokens": max_new_tokens, "part_prompts": part_prompts}, dtype)
    read_config(target)  # a missing folder would be looked for on the hub, as a tokenizer's name
    made = bundle.read(drafter)
    tokens = read_prompts(prompts, load_tokenizer(target), limit, columns)
    longest, covered = max(map(len, tokens)), covered_positions(target)
    if longest >= covered:
        raise UserError(f"--data: a prompt has {longest} tokens, the target covers {covered}; shorten it or take it out")
    runner = Runner.load(target, drafter, device, target_dtype, batch, min(longest + max_new_tokens, covered))
    assert runner.drafter is not None
    depth = min(depth, runner.drafter.max_depth or depth)
    settings = {"verify": verify, "depth": depth, "max_new_tokens": max_new_tokens, "seed": seed}
    provenance = {
        "target": bundle.fingerprint(target),
        "weights": weights_digest(target),
        "precision": target_dtype,
        "drafter": drafter_fingerprint(made),
        **settings,
        "dtype": dtype,
        "prompts": {"name": Path(prompts).name, "sha256": content_hash(prompts), "limit": limit, "columns": columns},
        "versions": {"trainkit": __version__, "torch": torch.__version__},
    }
    layout = AcceptanceLayout(len(tokens), tuple(temperatures), part_prompts)
    make = records_of(runner, tokens, **settings, dtype=getattr(torch, dtype))
    written = write_acceptance(Path(out), layout, make, provenance, rank=rank, world_size=world_size, progress=rank == 0)
    return _summary(out, layout, written, rank, world_size)


def _check(temperatures: Sequence[float], verify: str, counts: Mapping[str, int], dtype: str) -> None:
    """Before the folder is begun, since a set is gone on with only under the settings it was begun with."""
    if not temperatures:
        raise UserError("--temperatures: give at least one, such as [0,1]")
    for temperature in temperatures:
        Sampling(temperature)
    if len(set(temperatures)) < len(temperatures):
        raise UserError(f"--temperatures: {list(temperatures)} names one twice")
    if verify not in VERIFICATIONS:
        raise UserError(f"--verify {verify}: a predictor is trained for {' or '.join(VERIFICATIONS)}")
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"--{name}: {value} must be at least 1")
    if dtype == "float16":
        raise UserError("--dtype float16: states may exceed it; give bfloat16 or float32 with --acceptance")


def _summary(out: str, layout: AcceptanceLayout, written: Written, rank: int, world_size: int) -> str:
    speed = written.tokens / written.seconds if written.seconds else 0.0
    share = f", {written.accepted / written.records:.3f} of them accepted" if written.records else ""
    whose = f" (process {rank} of {world_size})" if world_size > 1 else ""
    return (
        f"{out}: {written.parts:,} of {layout.parts:,} parts made{whose}, {written.found:,} were there; {written.records:,} "
        f"records{share}; {written.tokens:,} tokens in {written.seconds:.0f} s, {speed:,.0f} tokens/s"
    )
