"""`trainkit acceptance`: decodes prompts with a drafter and records which of its proposals the target accepts."""

# B rows  D draft positions  V vocabulary  N records  W proposals of a position

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from trainkit import __version__, bundle
from trainkit.commands.distill import check_lengths, check_sampling
from trainkit.data.manifest import weights_digest
from trainkit.data.sets.acceptance import AcceptanceLayout, Record, drafter_fingerprint, write_acceptance
from trainkit.data.sets.writer import SetJob, check_positive, local_device, quiet_libraries
from trainkit.data.text.chat_template import load_tokenizer
from trainkit.data.text.prompts import read_prompts
from trainkit.data.text.sources import content_hash
from trainkit.errors import UserError
from trainkit.models.load import read_config
from trainkit.models.predictor import SIGNALS
from trainkit.runner.engine import Runner
from trainkit.runner.round import Trace
from trainkit.runner.sampling import request_keys


def acceptance(
    drafter: str,
    *,
    target: str,
    prompts: str,
    out: str,
    temperatures: tuple[float, ...] = (0.0, 1.0),
    verify: Literal["coupled", "residual"] = "coupled",
    depth: int = 8,
    max_new_tokens: int = 128,
    max_len: int | None = None,
    seed: int = 0,
    limit: int | None = None,
    columns: dict[str, str] | None = None,
    batch: int = 8,
    device: str = "auto",
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    target_dtype: Literal["float32", "bfloat16"] = "float32",
    part_prompts: int = 64,
) -> str:
    """Decodes prompts with a drafter and writes, for each verified draft position, what an acceptance predictor is trained on.

    Train the predictor on the set with recipes/predictor.yaml (PredictorModule). After a kill or an interrupt, the same command
    continues where it stopped. Under torchrun, each process writes its share of the parts on its own device.

    Examples:
        trainkit acceptance models/draft --target models/target --prompts prompts.jsonl --out data/acceptance
        trainkit acceptance models/draft --target DIR --prompts FILE --out DIR --temperatures [0,0.7,1] --verify residual
        torchrun --nproc-per-node 8 -m trainkit.cli acceptance DRAFTER --target DIR --prompts FILE --out DIR --device cuda

    Args:
        drafter: Bundle of the drafter whose proposals are recorded.
        target: Hugging Face folder of the target.
        prompts: File, folder or hub name of rows with prompts: chats (up to their last user turn), `prompt`, `question`,
            the first of `turns`, or `text`, which is raw: no chat template and no BOS token is added.
        out: Folder of the set; pass it to training as `data.train`.
        temperatures: Sampling temperatures, all of which are used for each prompt.
        verify: Verification that the predictor will be used with.
        depth: Tokens drafted in each round, as a chain; reduced to the drafter's maximum depth.
        max_new_tokens: Maximum length of a text in tokens.
        max_len: Maximum length of a prompt and its text together; by default as many tokens as the target covers.
        seed: Seed for sampling; with a prompt's index, it determines the prompt's text.
        limit: Number of prompts to use, from the beginning; all by default.
        columns: Column mapping, from trainkit's names to the file's.
        batch: Texts decoded at the same time.
        device: Torch device; `auto` uses a GPU if there is one, under torchrun each process its own.
        dtype: Dtype of the stored hidden states; float16 is not offered, because hidden states may exceed its range.
        target_dtype: Precision of the weights of target and drafter.
        part_prompts: Prompts in a file, at one temperature: the unit that processes share out, and the work that a kill loses.
    """
    # Check every option before the folder is created, since a set is continued only with the options that started it.
    temperatures = check_sampling(temperatures)
    check_positive(depth=depth, max_new_tokens=max_new_tokens, part_prompts=part_prompts, batch=batch, limit=limit)
    quiet_libraries()
    read_config(target)  # first, since a missing folder would be taken for a tokenizer's name on the hub
    # Read the prompts, and load target and drafter.
    drafter_bundle = bundle.read(drafter)
    tokens = read_prompts(prompts, load_tokenizer(target), limit, columns)
    check_lengths(target, [len(prompt) for prompt in tokens], max_len)
    runner = Runner.load(target, drafter, local_device(device), target_dtype, batch, max_len)
    assert runner.drafter is not None
    # Write the set.
    depth = min(depth, runner.drafter.max_depth or depth)
    settings = {"verify": verify, "depth": depth, "max_new_tokens": max_new_tokens, "seed": seed}
    provenance = {
        "target": bundle.fingerprint(target),
        "weights": weights_digest(target),
        "precision": target_dtype,
        "drafter": drafter_fingerprint(drafter_bundle),
        **settings,
        **({} if max_len is None else {"max_len": max_len}),
        "dtype": dtype,
        "prompts": {"name": Path(prompts).name, "sha256": content_hash(prompts), "limit": limit, "columns": columns},
        "versions": {"trainkit": __version__, "torch": torch.__version__},
    }
    job, layout = SetJob.from_environment(out, provenance), AcceptanceLayout(len(tokens), temperatures, part_prompts)
    stats = write_acceptance(job, layout, recording(runner, tokens, getattr(torch, dtype), **settings))
    share = f"{stats.records:,} records, {stats.accepted / stats.records:.3f} of them accepted; " if stats.records else ""
    return stats.summary(job, len(layout.parts()), "parts", share + stats.cut_note)


def recording(runner: Runner, prompts: Sequence[Sequence[int]], dtype: torch.dtype, **settings: Any) -> Record:
    """A function for `write_acceptance` that decodes prompts and records the draft positions.

    Args:
        runner: Runner with a drafter.
        prompts: Token ids of each prompt.
        dtype: Dtype of the hidden states.
        **settings: `verify`, `depth`, `max_new_tokens` and `seed` of `Runner.generate_each`. The random draws of a prompt
            depend only on its index and `seed`.
    """
    first = {
        tuple(prompt): number for number, prompt in reversed(list(enumerate(prompts)))
    }  # equal prompts get the index of the first

    def record(numbers: Sequence[int], temperature: float, on_text: Callable[[int, bool], None]) -> dict[str, Tensor]:
        prompt_of_key = {request_keys(settings["seed"], number, 0): first[tuple(prompts[number])] for number in numbers}
        assert len(prompt_of_key) == len(numbers)
        soft, rounds = settings["verify"] == "residual" and temperature > 0, []
        # Decode; sorted, so that rows decoded side by side have prompts of similar length.
        order = sorted(numbers, key=lambda number: -len(prompts[number]))
        texts, draws = [prompts[number] for number in order], [(number, 0) for number in order]
        before, runner.observe = runner.observe, lambda trace: rounds.append(round_records(trace, soft, dtype, prompt_of_key))
        try:
            for _, output in runner.generate_each(texts, draws, temperature=temperature, **settings):
                on_text(len(output.tokens), output.finish == "max_len")
        finally:
            runner.observe = before
        # Join the rounds, and sort by prompt and then by time.
        if not rounds:
            shapes = {"hidden": ((0, 0), dtype), "signals": ((0, 1, SIGNALS), torch.float32), "depth": ((0,), torch.int16)}
            shapes |= {"label": ((0, 1), torch.float32), "max_q": ((0,), torch.float32), "prompt": ((0,), torch.int32)}
            return {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
        records = {name: torch.cat([values[name] for values in rounds]) for name in rounds[0]}
        if not all(bool(records[name].isfinite().all()) for name in ("hidden", "signals", "label")):
            raise UserError("acceptance: hidden states or logits of drafter or target are NaN or infinite; use other weights")
        order_N = records["prompt"].argsort(stable=True)
        return {name: value[order_N] for name, value in records.items()}

    return record


def round_records(
    trace: Trace, soft: bool, dtype: torch.dtype, prompt_of_key: Mapping[tuple[int, int], int]
) -> dict[str, Tensor]:
    """Records of a round's verified draft positions: those accepted, and the first that is not. A finished row has none.

    The label is whether the target accepted the proposal. Under `coupled`, and at temperature 0, this is determined by the
    noise that draft and target share, which the signals contain; a probability averaged over the noise would be wrong. There,
    the other proposals, which a tree would have drafted too, also have labels: whether the target chose them. Under `residual`
    above temperature 0, acceptance is a random draw that is independent of everything the predictor sees. Its probability
    min(1, p/q) at the drafted token has the same expectation and less variance, so that is the label.

    Args:
        trace: The round.
        soft: Whether labels are min(1, p/q).
        dtype: Dtype of the hidden states.
        prompt_of_key: Prompt index by noise keys.
    """
    draft, counts_B = trace.draft, trace.verdict.counts_B
    assert draft.shape.is_chain and len(draft.signals) == draft.shape.depth == len(draft.logits)
    # Find the verified positions.
    positions_D = torch.arange(draft.shape.depth, device=counts_B.device)
    rows_N, depth_N = (positions_D < counts_B[:, None]).nonzero(as_tuple=True)
    # Compute their labels.
    q_NV = torch.cat(draft.logits, 1)[rows_N, depth_N].softmax(-1)
    if soft:
        token_N1 = draft.tokens_BN[rows_N, depth_N + 1][:, None]
        p_N1, q_N1 = trace.scores_BNV[rows_N, depth_N].softmax(-1).gather(1, token_N1), q_NV.gather(1, token_N1)
        label_NW = (p_N1 / q_N1).clamp(max=1.0)
    else:
        chosen_N1 = trace.verdict.emitted_BP[rows_N, depth_N][:, None]
        proposed_NW = torch.cat([step.tokens_BFW for step in draft.signals], 1)[rows_N, depth_N]
        label_NW = (proposed_NW == chosen_N1).float()
    # Take what the predictor reads.
    prompt_B = [prompt_of_key.get((first, second), -1) for first, second in trace.keys_B2.tolist()]  # -1: an empty row
    signals_NWC = torch.cat([step.signals_BFWC for step in draft.signals], 1)[rows_N, depth_N, : label_NW.shape[1]]
    records = {
        "hidden": torch.cat([step.hidden_BFD for step in draft.signals], 1)[rows_N, depth_N].to(dtype),
        "signals": signals_NWC.float(),
        "depth": depth_N.short(),
        "label": label_NW,
        "max_q": q_NV.amax(-1),
        "prompt": torch.tensor(prompt_B, dtype=torch.int32, device=rows_N.device)[rows_N],
    }
    return {name: value.cpu() for name, value in records.items()}
